# ------------------------------------------------------------------------------------------------------------
# prepare_data.py: data sets small enough to look at

@pytest.fixture
def dataset(tmp_path):
    """A data set of 400 documents in four parts."""
    parts = [(texts()[i:i + 100], None) for i in range(0, 400, 100)]
    prepare_data.prepare_parts('tiny', parts, 'made up', tmp_path)
    return prepare_data.Dataset('tiny', tmp_path)


def documents_of(dataset, split):
    """What the shards hold, as text again."""
    tokens = np.concatenate(getattr(dataset, split))
    ends = np.flatnonzero(tokens == prepare_data.EOS) + 1
    assert ends[-1] == len(tokens)
    return [substrate.tokenizer().decode(part.tolist()) for part in np.split(tokens, ends)[:-1]]


def with_end(documents):
    return [text + '</s>' for text in documents]


def refuses(pattern, function, *args, **kwargs):
    with pytest.raises(substrate.UserError, match=pattern) as error:
        function(*args, **kwargs)
    assert '\n' not in str(error.value)


def shards_of(folder):
    """Name and bytes of all that a folder holds but its lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != '.lock'}


def test_documents_come_back_and_what_a_part_holds_is_counted(tmp_path, dataset):
    names = 'part_{:06}.json', 'train_{:06}.bin', 'val_{:06}.bin'
    files = [name.format(k) for name in names for k in range(4)]
    assert sorted(shards_of(dataset.folder)) == files and dataset.name == 'tiny'
    assert np.array_equal(np.fromfile(dataset.folder / files[6], '<u2'), dataset.train[2])
    assert isinstance(dataset.train[2], np.memmap) and dataset.train[2].dtype == np.uint16
    held_out = documents_of(dataset, 'val')
    assert documents_of(dataset, 'train') == [text for text in with_end(texts()) if text not in held_out]
    train, val = np.concatenate(dataset.train), np.concatenate(dataset.val)
    assert [dataset.train_tokens, dataset.val_tokens] == [len(train), len(val)]
    assert np.array_equal(dataset.counts, np.bincount(train, minlength=65_536))
    assert dataset.bytes_per_token == sum(len(text.removesuffix('</s>')) for text in held_out) / len(val)
    odd = 'a text that says </s> and <s>, \x00, 😀'
    prepare_data.prepare('odd', [*texts(), '', ' \n', None, odd], 'made up', tmp_path)
    marked = prepare_data.Dataset(tmp_path / 'odd')                    # a path does for a name
    found = documents_of(marked, 'train') + documents_of(marked, 'val')
    assert sorted(found) == sorted(with_end([*texts(), odd])) and marked.parts[0]['documents'] == 401
    fingerprints = [prepare_data.Dataset(str(tmp_path / name)).fingerprint for name in ('tiny', 'odd')]
    assert fingerprints[0] == dataset.fingerprint != fingerprints[1]


def test_val_is_decided_by_the_document_alone(tmp_path, dataset, monkeypatch):
    assert [i for i in range(300) if prepare_data.encode(str(i))[0]] == [225, 299]
    prepare_data.prepare('again', texts()[::-1] + texts(), 'made up', tmp_path)
    again = prepare_data.Dataset('again', tmp_path)
    assert set(documents_of(again, 'val')) == set(documents_of(dataset, 'val'))
    assert set(documents_of(again, 'train')).isdisjoint(documents_of(again, 'val'))
    monkeypatch.setattr(prepare_data, 'SMALLEST', dataset.val_tokens)
    prepare_data.prepare('just', texts(), 'made up', tmp_path)
    monkeypatch.setattr(prepare_data, 'SMALLEST', dataset.val_tokens + 1)
    refuses('^400 documents give .*--split-line', prepare_data.prepare, 'short', texts(), 'made up', tmp_path)
    parts = [(texts(1), None), (texts(2), None)]
    refuses('^3 documents', prepare_data.prepare_parts, 'few', parts, '', tmp_path)
    refuses('^0 documents', prepare_data.prepare, 'none', [], 'made up', tmp_path)
    assert not [name for folder in ('short', 'few', 'none') for name in shards_of(tmp_path / folder)]
    refuses('names no folder', prepare_data.prepare, '../tiny', texts(), 'made up', tmp_path)


def test_stdlib_is_prose(tmp_path, monkeypatch):
    code = '# x = [1, 2, 3, 4, 5]; y = {"a": 1, "b": 2}; z = x[0] + y["a"] * 3.14159\n'
    assert prepare_data.prose(
        '"""Says\n    what.\n    """\n'
        '# x:\n# A comment of two lines that is long enough\n# to be taken for an English sentence.\n'
        'def f():\n    "Inner."  # no\n    s = """\n# not a comment at all, only a string\n"""\n'
        '    # A comment that is indented and stands in a block of its own, to be sure.\n'
        '# Another column is another block, as long as it has sixty letters.\n\n'
        '# A comment of some fifty letters is left out again.\n\n' + code) == [
        'Says what.', 'x:\nA comment of two lines that is long enough to be taken for an English sentence.',
        'Inner.', 'A comment that is indented and stands in a block of its own, to be sure.',
        'Another column is another block, as long as it has sixty letters.']
    assert prepare_data.normalised('A \n-----\n\n>>> 1\n1\n\n| t |\n\nB....  C\ud83d') == 'A\n---\n\nB...  C?'
    a, b = ('"""' + word * 600 + '"""\n' for word in ('word ', 'more '))
    (tmp_path / 'test').mkdir()
    for name, source in (('a.py', f'{a}def f():\n    {b}def g():\n    "G."\n'), ('c.py', 'def ('),
                         ('b.py', f'{a}def h():\n    "H."\n'), ('test/d.py', b)):
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(prepare_data.sysconfig, 'get_path', lambda name: str(tmp_path))
    found = list(itertools.islice(prepare_data.stdlib_documents(), 3))
    assert found == [f'{a[3:-5]}\n\n{b[3:-5]}', 'G.', 'H.']


def test_files_command(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('\n%\n'.join(texts(1000)))
    command = ['--root', str(tmp_path), 'files', '--name', 'a', '--split-line', '%', str(tmp_path / 'a.txt')]
    prepare_data.main(command)
    assert '1,000 documents' in capsys.readouterr().out
    assert documents_of(prepare_data.Dataset('a', tmp_path), 'train')[0] == texts()[0] + '\n</s>'
    before = shards_of(tmp_path / 'a')
    prepare_data.main(command)                                         # the same again changes nothing
    assert 'train_000000.bin is there already' in capsys.readouterr().out
    fails(capsys, [*command, str(tmp_path)], 'was begun from', '--name', main=prepare_data.main)
    assert shards_of(tmp_path / 'a') == before
    for argv in ([], ['--check', 'a', 'stdlib'], ['files', '--name', 'x'], ['stdlib', '--tokens', '1'],
                 ['files', 'a'], ['wikipedia-en', '--tokens', '102499']):
        fails(capsys, argv, status=2, main=prepare_data.main)


def test_damaged_data_sets_are_refused_by_name(tmp_path, dataset, capsys):
    folder, check = dataset.folder, ['--root', str(tmp_path), '--check', 'tiny']
    refuses('no data set .*stdlib; .*prepare_data.py stdlib', prepare_data.Dataset, 'stdlib', tmp_path)
    refuses('no data set .*files --name mine PATH', prepare_data.Dataset, 'mine', tmp_path)
    prepare_data.main(check)
    assert 'all 8 shards' in capsys.readouterr().out
    held_out = next(path.name for path in folder.glob('val*') if path.stat().st_size)
    for name in ('train_000001.bin', held_out):
        shard, whole = folder / name, (folder / name).read_bytes()
        shard.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])     # the size is right
        prepare_data.Dataset('tiny', tmp_path)
        fails(capsys, check, name, main=prepare_data.main)
        for broken in (whole[:-2], whole + b'xx', b''):
            shard.write_bytes(broken)
            refuses(f'part {name[-5]} of .*tiny is incomplete', prepare_data.Dataset, 'tiny', tmp_path)
        shard.write_bytes(whole)
    path, part = folder / 'part_000001.json', json.loads((folder / 'part_000001.json').read_text())
    less = {key: value for key, value in part.items() if key != 'val_bytes'}
    for broken in ({}, [], less, part | {'counts': {'65': 1}}, part | {'counts': 3}, part | {'tokens': [1]}):
        path.write_text(json.dumps(broken))
        refuses('part 1 of .*tiny is incomplete.*train_000001.bin', prepare_data.Dataset, 'tiny', tmp_path)
    path.write_text(json.dumps(part | {'tokenizer': 'another'}))
    refuses('another tokenizer', prepare_data.Dataset, 'tiny', tmp_path)
    path.write_text(json.dumps(part)[:-1])
    (folder / 'train_000001.bin').unlink()
    refuses('part 1 of .*tiny is incomplete', prepare_data.Dataset, 'tiny', tmp_path)
    parts = [(iter(texts()[i:i + 100]), None) for i in range(0, 400, 100)]
    prepare_data.prepare_parts('tiny', parts, 'made up', tmp_path)     # makes that part anew, as told
    assert prepare_data.Dataset('tiny', tmp_path).fingerprint == dataset.fingerprint
    assert json.loads(path.read_text()) == part and len(list(parts[0][0])) == 100


def test_other_options_are_refused(tmp_path, dataset, monkeypatch):
    parts = [(texts(), None)] * 4
    refuses('begun from made up', prepare_data.prepare_parts, 'tiny', parts, 'elsewhere', tmp_path)
    refuses('--tokens None', prepare_data.prepare_parts, 'tiny', parts, 'made up', tmp_path, limit=5)
    monkeypatch.setattr(prepare_data, 'tokenizer_fingerprint', lambda: 'another')
    refuses('another tokenizer', prepare_data.prepare_parts, 'tiny', parts, 'made up', tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Documents of files

def test_how_a_text_file_is_cut(tmp_path, monkeypatch):
    path, line = tmp_path / 'a.txt', b'x' * 999 + b'\n'
    for raw, sizes in ((line * 65 + b'y' * 536, [65_536]),             # 64 KiB exactly, and one byte more
                       (line * 65 + b'y' * 537, [17_000, 17_000, 17_000, 14_537]),
                       ((b'x' * 1023 + b'\n') * 65, [16_384] * 4 + [1024]),
                       (b'z' * 10_000_000 + b'\n' + line * 20, [10_000_001, 17_000, 3_000]),
                       ('п'.encode() * 32_769, [32_769, 0]),           # bytes count, not characters
                       (('п' * 99 + '\n').encode() * 400, [8300] * 4 + [6800]),
                       (b'\xef\xbb\xbf' + b'line\r' * 20_000, [16_385] * 6 + [1690])):
        path.write_bytes(raw)
        assert [len(text) for text in prepare_data.text_documents(path)] == sizes
    path.write_bytes(b'one\n 100 %\n%\r\ntwo\n%\n%\nthree ' + b'x' * 100_000)
    found = ['one\n 100 %\n', 'two\n', '', 'three ' + 'x' * 100_000]
    assert list(prepare_data.text_documents(path, '%')) == found
    monkeypatch.setattr(prepare_data, 'LONGEST', 1000)                 # what would not fit into memory is cut
    assert max(len(text) for text in prepare_data.text_documents(path, '%')) == 1000


def test_folders_and_rows(tmp_path, monkeypatch, capsys):
    for name in ('sub', 'sub/.git', 'empty'):
        (tmp_path / name).mkdir()
    for name, text in (('c.MD', 'upper'), ('a.log', 'log'), ('.hidden.txt', 'no'), ('sub/.git/x.txt', 'no'),
                       ('d.PY', '\ufeffpy'), ('e.ndjson', '{"text": "nd"}'), ('f.Json', '{"text": "json"}'),
                       ('sub/b.jsonl', '{"text": "two\\nlines"}\r\n\n{"text": null}\n{"text": "\\u00e9"}\n'),
                       ('a.txt', 'txt')):
        (tmp_path / name).write_text(text, newline='')
    (tmp_path / 'empty' / 'loop').symlink_to(tmp_path)
    read = lambda *paths: [text for text in prepare_data.file_documents(paths) if text is not None]
    assert read(tmp_path) == ['txt', 'upper', 'py', 'nd', 'json', 'two\nlines', 'é']
    assert read(tmp_path / 'a.log', str(tmp_path / '.hidden.txt')) == ['log', 'no']      # named
    assert read(tmp_path / 'empty') == []
    refuses('nowhere is damaged or cannot be read', read, tmp_path / 'nowhere')

    def denied(path):
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))
    monkeypatch.setattr(Path, 'iterdir', denied)
    fails(capsys, ['files', '--name', 'x', str(tmp_path)], 'Permission denied', main=prepare_data.main)


@pytest.mark.parametrize('row', ['{', '{"txt": "a"}', '["a"]', '{"text": 3}', r'{"text": "\ud83d"}'])
def test_bad_rows_name_their_line(tmp_path, row):
    (tmp_path / 'rows.jsonl').write_text('{"text": "good"}\n' + row + '\n')
    refuses('rows.jsonl, line 2: no JSON object', list, prepare_data.file_documents([tmp_path]))


def test_gz_files_are_unpacked_and_broken_ones_named(tmp_path):
    long, path = 'line ' * 20 + '\n', tmp_path / 'a.txt.GZ'
    for name, text in (('a.txt', long * 1000), ('b.jsonl', '{"text": "row"}'), ('c.md', 'md'), ('d', 'no')):
        (tmp_path / f'{name}.GZ').write_bytes(gzip.compress(text.encode()) + bytes(100))     # padded
    found = list(prepare_data.file_documents([tmp_path]))
    (tmp_path / 'a.txt').write_text(long * 1000)
    assert found == [*prepare_data.text_documents(tmp_path / 'a.txt'), 'row', 'md'] and len(found) > 5
    whole = path.read_bytes()
    for broken in (whole[:-109], whole[:20], whole[:50] + b'x' * 50 + whole[100:], b'text'):
        path.write_bytes(broken)
        refuses('a.txt.GZ is damaged or cannot be read', list, prepare_data.file_documents([path]))


@pytest.mark.parametrize('raw', [b'\xff\xfea\0b\0', 'words'.encode('utf-16-le'), 'words'.encode('utf-16-be'),
                                 b'\xed\xa0\x80', b'\xc0\x80', b'\xf4\x90\x80\x80', b'\xe4\xb8', b'\x80'])
def test_bytes_that_are_no_utf_8_name_file_and_line(tmp_path, raw):
    for name, before, after in (('a.txt', b'one\ntwo\n', b''), ('c.jsonl', b'{"text": "a"}\n\n', b'\n')):
        (tmp_path / name).write_bytes(before + raw + after)
        read = prepare_data.file_documents([tmp_path / name])
        words = f'{name}, line 3: not UTF-8.*iconv -f UTF-16 -t UTF-8'
        refuses(words, prepare_data.prepare, 'x', read, '', tmp_path)  # nor is it taken for a full disk
    assert not shards_of(tmp_path / 'x')


def test_any_text_comes_back_from_a_file(tmp_path, monkeypatch):
    """Every code point in one file, and files of any text: cut into pieces that are that text."""
    hypothesis = pytest.importorskip('hypothesis')
    st, path = hypothesis.strategies, tmp_path / 'any.txt'
    every = ''.join(chr(i) for i in range(0x110000) if not 0xD800 <= i <= 0xDFFF)
    path.write_bytes(every.encode())
    prepare_data.prepare('all', [*texts(), *prepare_data.file_documents([path])], 'made up', tmp_path)
    read = prepare_data.Dataset('all', tmp_path)
    found = documents_of(read, 'train') + documents_of(read, 'val')
    assert sorted(found) == sorted(with_end([*texts(), *filter(None, prepare_data.text_documents(path))]))
    assert ''.join(prepare_data.text_documents(path)) == every.replace('\r', '\n')
    monkeypatch.setattr(prepare_data, 'WHOLE', 40)
    monkeypatch.setattr(prepare_data, 'PIECE', 10)

    @hypothesis.settings(max_examples=200, deadline=None, database=None)
    @hypothesis.given(st.text(st.sampled_from('ab\n\ré中😀\ufeff\u202e\u2028\x85\x0c')))
    @hypothesis.example('x' * 50 + '\n\ufeffnot the first piece')
    def check(text):
        path.write_bytes(text.encode())
        want = text.removeprefix('\ufeff').replace('\r\n', '\n').replace('\r', '\n')
        assert ''.join(prepare_data.text_documents(path)) == want
    check()


def test_parquet_needs_pyarrow_and_a_column_of_text(tmp_path, monkeypatch):
    pa, path = pytest.importorskip('pyarrow'), tmp_path / 'a.parquet'
    write = pytest.importorskip('pyarrow.parquet').write_table
    read = lambda: list(prepare_data.file_documents([path]))
    write(pa.table({'id': range(3), 'text': pa.array(['one', None, 'two'], pa.large_string())}), path)
    assert read() == ['one', None, 'two']
    write(pa.table({'text': texts()}), path)
    whole = path.read_bytes()
    for column in ({'txt': ['a']}, {'text': [b'\xff']}, {'text': [['a']]},
                   {'text': pa.array([b'\xff']).view('string')}):
        write(pa.table(column), path)
        refuses('a.parquet is damaged or has no column "text"', read)
    for broken in (whole[:-9], whole[:8] + bytes(255 - x for x in whole[8:16]) + whole[16:], b''):
        path.write_bytes(broken)
        refuses('a.parquet is damaged', read)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    refuses('pip install pyarrow', read)


# ------------------------------------------------------------------------------------------------------------
# Batches

def first_tokens(dataset, split, context):
    """Every sequence of a split, the slow way."""
    return [shard[i:i + context + 1].tolist() for shard in getattr(dataset, split)
            for i in range(0, len(shard) - context, context)]


def rows_of(batch):
    inputs, targets = batch
    assert inputs.dtype == targets.dtype == torch.int64 and torch.equal(inputs[:, 1:], targets[:, :-1])
    return [x.tolist() + [y[-1].item()] for x, y in zip(inputs, targets)]


def test_an_epoch_is_every_sequence_once_and_each_is_shuffled_anew(dataset):
    every = first_tokens(dataset, 'train', 16)
    batches = prepare_data.Batches([dataset], [1], seed=5, rows=7, context=16)
    seen = [row for step in range(2 * len(every) // 7 + 1) for row in rows_of(batches.batch(step))]
    first, second = seen[:len(every)], seen[len(every):2 * len(every)]
    assert sorted(first) == sorted(second) == sorted(every)
    assert first != second and first != every
    assert second == [every[i] for i in np.random.default_rng([5, 1]).permutation(len(every))]


def test_a_batch_depends_on_seed_and_step_alone(dataset):
    make = lambda seed: prepare_data.Batches([dataset], [1], seed=seed, rows=8, context=16)
    a, b = make(1), make(1)
    for step in (900, 3, 0, 50_000):                                   # any order, any epoch
        assert all(map(torch.equal, a.batch(step), make(1).batch(step)))
        parts = [b.batch(step, rows=slice(rank, None, 3)) for rank in range(3)]
        for rank, part in enumerate(parts):
            assert rows_of(part) == rows_of(a.batch(step))[rank::3]
    assert rows_of(a.batch(0)) != rows_of(make(2).batch(0))
    refuses('smaller --context', prepare_data.Batches, [dataset], [1], 0, 8, 100_000)


def test_a_mixture_is_exact(tmp_path, dataset):
    prepare_data.prepare('other', texts(seed=1, words=['перед', 'вами', 'слова', 'и']), 'made up', tmp_path)
    other = prepare_data.Dataset('other', tmp_path)
    mixed = prepare_data.Batches([dataset, other], [3, 2], seed=0, rows=6, context=16)
    rows = [row for step in range(40) for row in rows_of(mixed.batch(step))]
    alone = [prepare_data.Batches([d], [1], seed=0, rows=48, context=16) for d in (dataset, other)]
    streams = [iter([row for step in range(3) for row in rows_of(b.batch(step))]) for b in alone]
    assert rows == [next(streams[d]) for _ in range(48) for d in (0, 0, 0, 1, 1)]


def test_val_batches_are_the_whole_split_in_order(dataset):
    every = first_tokens(dataset, 'val', 16)
    batches = list(prepare_data.val_batches(dataset, 16, 5))
    assert [row for batch in batches for row in rows_of(batch)] == every
    assert {len(inputs) for inputs, _ in batches[:-1]} == {5}
    for limit, rows in ((16 * 7 + 15, 7), (1, 1), (10**9, len(every))):
        limited = prepare_data.val_batches(dataset, 16, 5, limit)
        assert [row for batch in limited for row in rows_of(batch)] == every[:rows]
    refuses('val split of tiny', prepare_data.val_batches, dataset, dataset.val_tokens, 1)


def test_a_part_may_hold_nothing_out(tmp_path, dataset):
    parts = [(texts(), None), (['225'], None), (['1', '2'], None)]     # one is all held out, one not at all
    prepare_data.prepare_parts('holes', parts, 'made up', tmp_path)
    holes = prepare_data.Dataset('holes', tmp_path)
    assert [len(holes.train), len(holes.val)] == [2, 2]
    assert len(prepare_data.Sequences(holes, 'train', 16)) == (len(holes.train[0]) - 1) // 16


# ------------------------------------------------------------------------------------------------------------
# Baselines

def slow_witten_bell(pairs):
    """The two formulas, word for word."""
    word, pair = collections.Counter(w for _, w in pairs), collections.Counter(pairs)
    total, successors = collections.Counter(h for h, _ in pairs), collections.Counter(h for h, _ in pair)

    def unigram(w):
        return (word[w] + len(word) / 65_536) / (len(pairs) + len(word))

    def bigram(h, w):
        if not total[h]:
            return unigram(w)
        return (pair[h, w] + successors[h] * unigram(w)) / (total[h] + successors[h])
    return unigram, bigram


def test_witten_bell_sums_to_one_and_by_hand():
    ngrams = prepare_data.NGrams(np.array([7, 7, 7, 65_535]), np.array([8, 8, 65_535, 7]))
    for h in (7, 8, 65_535, 0):                                        # 8 and 0 were followed by nothing
        assert ngrams.bigram(np.full(65_536, h), np.arange(65_536)).sum() == pytest.approx(1)
    p8 = (2 + 3 / 65_536) / (4 + 3)
    assert ngrams.bigram(np.array([7]), np.array([8]))[0] == pytest.approx((2 + 2 * p8) / (3 + 2))


@pytest.mark.parametrize('counted', [700, 20_000, 20_000_000])         # of one part, of two, of all
def test_ngram_losses_against_counting_in_dictionaries(dataset, monkeypatch, counted):
    val = [pair for batch in prepare_data.val_batches(dataset, 16, 8, 2000)
           for row in rows_of(batch) for pair in zip(row, row[1:])]
    monkeypatch.setattr(prepare_data, 'COUNTED', counted)
    tokens = np.concatenate(dataset.train)[:counted].tolist()
    assert len(tokens) == min(counted, dataset.train_tokens)
    unigram, bigram = slow_witten_bell(list(zip(tokens, tokens[1:])))
    expected = [-sum(math.log(unigram(w)) for _, w in val) / len(val),
                -sum(math.log(bigram(h, w)) for h, w in val) / len(val)]
    assert prepare_data.ngram_losses(dataset, 16, limit=2000) == pytest.approx(expected, rel=1e-12)
    assert expected[1] < expected[0] < math.log(65_536)


def test_unigram_log_probs(tmp_path, dataset):
    prepare_data.prepare('other', texts(seed=1), 'made up', tmp_path)
    other = prepare_data.Dataset('other', tmp_path)
    bias = prepare_data.unigram_log_probs([dataset, other], [3, 1])
    assert bias.dtype == torch.float32 and bias.exp().sum().item() == pytest.approx(1)
    a, b = ((np.count_nonzero(np.concatenate(d.train) == prepare_data.EOS) + 1) / (d.train_tokens + 65_536)
            for d in (dataset, other))
    assert bias[prepare_data.EOS].exp().item() == pytest.approx(0.75 * a + 0.25 * b)


# ------------------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine

class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; breaks each answer off after `breaks` bytes, if set; `ranges`: can it go on half-way?
    Each of `faults` spoils one answer: a status, or what do_GET makes of its name."""
    files, breaks, ranges, asked, faults = {}, None, True, [], []

    def do_GET(self):
        self.asked.append(self.headers.get('Range'))
        body, fault = self.files.get(self.path), self.faults.pop(0) if self.faults else None
        if 'gzip' in self.headers.get('Accept-Encoding', ''):          # its bytes could not be counted
            return self.send_error(406)
        if body is None or isinstance(fault, int):
            return self.send_error(fault or 404)
        if fault == 'hang up':
            return self.connection.shutdown(socket.SHUT_RDWR)
        first = int(self.headers['Range'][6:-1]) if self.ranges and 'Range' in self.headers else 0
        first -= fault == 'elsewhere' and first > 0
        if first >= len(body):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(body)}')
            self.send_header('Content-Length', '0')
            return self.end_headers()
        self.send_response(206 if first else 200)
        if first:
            self.send_header('Content-Range', f'bytes {first}-{len(body) - 1}/{len(body)}')
        if fault != 'no length':
            self.send_header('Content-Length', str(len(body) - first + 1000 * (fault == 'too long')))
        self.end_headers()
        sent = dict(half=(len(body) - first) // 2, nothing=0).get(fault, self.breaks)
        self.wfile.write(body[first:][:sent])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """-> (address, Handler); retries do not wait."""
    monkeypatch.setattr(prepare_data.time, 'sleep', lambda seconds: None)
    for name, value in (('files', {}), ('breaks', None), ('ranges', True), ('asked', []), ('faults', [])):
        monkeypatch.setattr(Handler, name, value)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}', Handler
        server.shutdown()


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    url, handler = server
    body = random.Random(0).randbytes(9 * 2**16)
    handler.files['/a'], handler.breaks = body, 2**16
    sha256 = prepare_data.hashlib.sha256(body).hexdigest()
    path = prepare_data.download(f'{url}/a', tmp_path / 'new' / 'a', sha256)
    assert path.read_bytes() == body
    assert handler.asked == [None] + [f'bytes={k * 2**16}-' for k in range(1, 9)]
    assert [p.name for p in path.parent.iterdir()] == ['a']
    assert prepare_data.download(f'{url}/gone', path) == path          # there already
    handler.breaks = None
    for left in (body, body + b'too much', body[:1000], b''):
        (tmp_path / 'b.part').write_bytes(left)
        assert prepare_data.download(f'{url}/a', tmp_path / 'b').read_bytes() == body
        (tmp_path / 'b').unlink()
    handler.ranges = False                                             # this server starts again each time
    (tmp_path / 'b.part').write_bytes(b'x' * 10)
    assert prepare_data.download(f'{url}/a', tmp_path / 'b').read_bytes() == body


@pytest.mark.parametrize('fault', [408, 429, 500, 502, 503, 504, 'hang up', 'half', 'too long', 'no length',
                                   'elsewhere', 'nothing'])
def test_faults_that_pass(server, tmp_path, fault):
    url, handler = server
    handler.files['/a'], handler.faults[:] = random.Random(0).randbytes(2**18), ['half', fault, fault, fault]
    assert prepare_data.download(f'{url}/a', tmp_path / 'a').read_bytes() == handler.files['/a']


def test_downloads_that_cannot_succeed_say_why(server, tmp_path, monkeypatch):
    url, handler = server
    handler.files['/a'], path = b'abc', tmp_path / 'a'
    with open(tmp_path / 'a.part', 'wb') as f, prepare_data.locked(f.name, 'x'):
        refuses('another process is downloading', prepare_data.download, f'{url}/a', path)
    refuses('sha256', prepare_data.download, f'{url}/a', path, '0' * 64)
    assert not list(tmp_path.iterdir())                                # what is damaged is not gone on with
    (tmp_path / 'a.part').write_bytes(b'ab')
    for wrong, words in (('htp://x', 'htp'), ('x', 'scheme'), ('http://a..b', 'label'), (f'{url}/x', '404')):
        refuses(words, prepare_data.download, wrong, path)
    assert len(handler.asked) == 2                                     # at once
    monkeypatch.setenv('HTTP_PROXY', 'socks5://127.0.0.1:1')
    monkeypatch.setenv('NO_PROXY', '')
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'socks', None)
        refuses('SOCKS', prepare_data.download, 'http://a.invalid/', path)
    monkeypatch.delenv('HTTP_PROXY')
    for fault, words in (('hang up', 'run this again'), (503, '503')):
        handler.faults[:] = [fault] * 100
        refuses(words, prepare_data.download, f'{url}/a', path)
        assert len(handler.faults) == 95                               # five attempts
    handler.faults.clear()
    assert prepare_data.download(f'{url}/a', path).read_bytes() == b'abc' and handler.asked[-1] == 'bytes=2-'
    handler.files['/long'], handler.breaks, before = b'x' * 1000, 0, len(handler.asked)
    refuses('breaks off at 0 bytes.*run this again', prepare_data.download, f'{url}/long', tmp_path / 'long')
    assert len(handler.asked) - before == prepare_data.TRIES


def test_progress_shows_speed_and_the_time_left(monkeypatch, capsys):
    clock = iter(range(100))
    monkeypatch.setattr(prepare_data.time, 'monotonic', lambda: next(clock))
    assert list(prepare_data.progress([2, 3, 5], 'a', lambda n: n, 'MB', done=10, total=20)) == [2, 3, 5]
    lines = capsys.readouterr().err.split('\r')
    assert [line.strip() for line in lines[1:]] == ['a: 12.0 MB, 2.0 MB/s, 60%, 0:00:04 left',
                                                    'a: 15.0 MB, 2.5 MB/s, 75%, 0:00:02 left',
                                                    'a: 20.0 MB, 3.3 MB/s, 100%, 0:00:00 left']
    for n in prepare_data.progress([1, 2, 3], 'b', lambda n: n, 'MB'):         # no total, and left early
        if n == 2:
            break
    assert capsys.readouterr().err == '\rb: 1.0 MB, 1.0 MB/s  \n'
    clock = itertools.count(0, 0.1)                                    # not more often than twice a second
    assert list(prepare_data.progress([1, 2, 3], 'c', lambda n: n, 'MB')) and not capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Corpora, from the same server: three small parquet files

@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """-> (make, whole, Handler): make() prepares the corpus in tmp_path and returns its files; `whole` is
    what they must be, made another way."""
    pyarrow, (url, handler) = pytest.importorskip('pyarrow'), server
    write = pytest.importorskip('pyarrow.parquet').write_table
    monkeypatch.setattr(prepare_data, 'SMALLEST', 50)
    monkeypatch.setattr(prepare_data, 'CORPORA', {'fineweb-edu': (url + '/{:03}.parquet', 3)})
    pages = [texts(150, seed=i) for i in range(3)]
    for i, page in enumerate(pages):
        packed = io.BytesIO()
        write(pyarrow.table({'id': range(151), 'text': page + [None]}), packed, row_group_size=40)
        handler.files[f'/{i:03}.parquet'] = packed.getvalue()
    parts = [(page, None) for page in pages]
    prepare_data.prepare_parts('whole', parts, 'fineweb-edu', tmp_path / 'elsewhere')

    def make(name='fineweb-edu', limit=None):
        prepare_data.prepare_corpus('fineweb-edu', tmp_path, name, limit)
        return shards_of(tmp_path / name)
    return make, shards_of(tmp_path / 'elsewhere' / 'whole'), handler


def test_a_corpus_is_the_same_on_any_number_of_cores(hub, monkeypatch):
    make, whole, handler = hub
    pool = prepare_data.ThreadPoolExecutor
    monkeypatch.setattr(prepare_data, 'CHUNK', 50)
    assert next(prepare_data.encoded(itertools.repeat('some text')))   # no more than a chunk is in memory
    for cores, chunk in ((1, 1), (2, 2**20), (7, 3000)):
        monkeypatch.setattr(prepare_data, 'ThreadPoolExecutor', lambda: pool(cores))
        monkeypatch.setattr(prepare_data, 'CHUNK', chunk)
        assert make(f'on{cores}') == whole and len(whole) == 9         # and the parquet files are gone


def test_tokens_are_enough_at_the_document_that_reaches_them(hub, tmp_path):
    make, whole, handler = hub
    limit = prepare_data.Dataset(tmp_path / 'elsewhere' / 'whole').train_tokens // 2
    prepare_data.main(['--root', str(tmp_path), 'fineweb-edu', '--name', 'half', '--tokens', str(limit)])
    half, every = (prepare_data.Dataset(tmp_path / folder) for folder in ('half', 'elsewhere/whole'))
    assert len(half.parts) == 2 and len(handler.asked) == 2 and len(make('half', limit)) == 6
    train = np.concatenate(half.train)
    last = np.flatnonzero(train == prepare_data.EOS)[-2] + 1
    assert np.array_equal(train, np.concatenate(every.train)[:len(train)]) and last < limit <= len(train)
    refuses('was begun from fineweb-edu', make, 'half')


def test_killed_before_any_rename_it_goes_on_to_the_same_shards(hub, tmp_path):
    make, whole, handler = hub
    replace, left = os.replace, 0

    def dying(*paths):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        replace(*paths)
    for kill_at in range(100):
        name, child = f'at{kill_at}', os.fork()
        if child == 0:
            try:
                left, os.replace = kill_at, dying
                make(name)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            break
        done = len(list(tmp_path.glob(f'{name}/train_*')))
        assert done == kill_at // 4                                    # a download, val, part and train
        handler.asked.clear()
        assert make(name) == whole and 3 - done - (kill_at % 4 > 0) <= len(handler.asked) <= 3 - done
    assert status == 0 and kill_at == 12


def test_ctrl_c_ends_in_one_line_and_goes_on(hub, tmp_path, capsys, monkeypatch):
    make, whole, handler = hub

    def interrupted(url, path, sha256=None):
        if '001' in path.name:
            raise KeyboardInterrupt
        return download(url, path)
    download = prepare_data.download
    monkeypatch.setattr(prepare_data, 'download', interrupted)
    with pytest.raises(SystemExit) as end:
        prepare_data.main(['--root', str(tmp_path), 'fineweb-edu'])
    assert end.value.code == 130 and capsys.readouterr().err.endswith('interrupted\n')
    assert len(prepare_data.Dataset('fineweb-edu', tmp_path).train) == 1       # enough to train on
    monkeypatch.setattr(prepare_data, 'download', download)
    assert make() == whole


def test_shakespeare_is_checked_and_split_into_speeches(server, tmp_path, monkeypatch):
    url, handler = server
    handler.files['/input.txt'] = body = '\n\n'.join(texts(1000)).encode()
    sha256 = prepare_data.CORPORA['shakespeare'][2]
    for known in (sha256, prepare_data.hashlib.sha256(body).hexdigest()):
        monkeypatch.setitem(prepare_data.CORPORA, 'shakespeare', (f'{url}/input.txt', 1, known))
        if known == sha256:                                            # not the file that is meant
            refuses('sha256', prepare_data.prepare_corpus, 'shakespeare', tmp_path)
    prepare_data.prepare_corpus('shakespeare', tmp_path)
    plays = prepare_data.Dataset('shakespeare', tmp_path)
    assert plays.parts[0]['documents'] == 1000 and documents_of(plays, 'train')[0] == texts()[0] + '\n</s>'


def test_the_server_can_be_changed():
    code = 'import prepare_data; print(*[corpus[0] for corpus in prepare_data.CORPORA.values()])'
    environment = os.environ | {'HF_ENDPOINT': 'https://mirror.example/', 'PYTHONPATH': str(REPO)}
    printed = subprocess.check_output([sys.executable, '-c', code], env=environment, text=True)
    assert printed.count('https://mirror.example/datasets/') == 5 and 'huggingface.co' not in printed


# ------------------------------------------------------------------------------------------------------------
# Locks, kills and full disks

@pytest.mark.parametrize('error', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, None])
def test_locks_where_there_are_some_and_where_not(tmp_path, monkeypatch, error):
    with prepare_data.locked(tmp_path, 'x'):
        (tmp_path / 'a').mkdir()
        refuses('another process is looking; wait', prepare_data.locked(tmp_path, 'looking').__enter__)
        with prepare_data.locked(tmp_path / 'a', 'x'):                 # another folder
            pass
    with prepare_data.locked(tmp_path, 'x'):                           # it is free again
        pass

    def none(*args):
        raise OSError(error, os.strerror(error))
    if error is None:
        monkeypatch.setitem(sys.modules, 'fcntl', None)                # Windows
    else:
        monkeypatch.setattr('fcntl.flock', none)
    with pytest.warns(UserWarning, match='no locks here'), prepare_data.locked(tmp_path, 'x'):
        pass


def test_killed_halfway_leaves_no_data_set(tmp_path):
    def dying():
        yield from texts()
        os.kill(os.getpid(), signal.SIGKILL)
    child = os.fork()
    if child == 0:
        try:
            prepare_data.prepare('d', dying(), 'made up', tmp_path)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL and list(tmp_path.glob('d/.train*.tmp'))
    refuses('no data set .*files --name d PATH', prepare_data.Dataset, 'd', tmp_path)
    with prepare_data.locked(tmp_path / 'd', 'x'):
        refuses('another process is preparing', prepare_data.prepare, 'd', texts(), 'made up', tmp_path)
    prepare_data.prepare('d', texts(), 'made up', tmp_path)
    assert sorted(shards_of(tmp_path / 'd')) == ['part_000000.json', 'train_000000.bin', 'val_000000.bin']


@contextlib.contextmanager
def no_file_over(size):
    """The kernel refuses to write more into any file: all that a full disk would do, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_while_writing_shards(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('a.txt').write_text('\n%\n'.join(texts(1000)))
    command = ['files', 'a.txt', '--name', 'a', '--split-line', '%']
    for size in (100, 10_000):
        with no_file_over(size):
            fails(capsys, command, 'data/a/', 'could not be written', main=prepare_data.main)
        assert not list(Path('data/a').glob('*'))[1:]
    prepare_data.main(command)
    prepare_data.check('a')
