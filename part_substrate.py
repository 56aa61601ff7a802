# --------------------------------------------------------------------------------------------------------
# substrate.py: the vocabulary

def test_layout_of_the_vocabulary():
    tokens, grams = substrate.tokenizer(), substrate.read_ngrams()
    assert tokens.n_vocab == 65_536 == substrate.VOCAB and substrate.EOS == 0xE002
    for i in (0, 0x0A, 0x41, 0x7F, 0x80, 0x416, 0x4E2D, 0xD7FF, 0xF900, 0xFFFF):
        assert tokens.encode_ordinary(chr(i)) == [i]
    places = {0xD800: grams[0], 0xDFFF: grams[2047], 0xE100: grams[2048], 0xF8FF: grams[8191]}
    names = {0xE000: '<pad>', 0xE001: '<s>', 0xE002: '</s>', 0xE003: '<unk>', 0xE004: '<04>', 0xE07F: '<7F>'}
    assert all(tokens.decode([i]) == text for i, text in (places | names).items())
    assert tokens.decode_bytes(range(0xE080, 0xE100)) == bytes(range(0x80, 0x100))
    assert len({tokens.decode_single_token_bytes(i) for i in range(substrate.VOCAB)}) == substrate.VOCAB
    # what ids mean may never change: checkpoints and shards of others are made of them
    assert substrate.tokenizer_fingerprint() == 'bd8b4e82547af825'

def test_the_tokenizer_against_a_slow_one_in_every_script():
    """Longest n-gram first, character by character, in text of all scripts mixed, the slowest there is."""
    tokens, grams, rng = substrate.tokenizer(), substrate.read_ngrams(), random.Random(0)
    text = ''.join(piece + rng.choice(['', '', ' ', piece[0]]) for piece in rng.choices(grams, k=30_000))
    place, slow, at = dict(zip(grams, substrate.NGRAM_IDS)), [], 0
    while at < len(text):
        piece = next((text[at:at + n] for n in (3, 2) if text[at:at + n] in place), text[at])
        slow.append(place.get(piece, ord(piece[0])))
        at += len(piece)
    begun = time.process_time()
    assert tokens.encode_ordinary(text) == slow and time.process_time() - begun < 4

def test_every_text_round_trips():
    tokens, rng = substrate.tokenizer(), random.Random(0)
    everything = [chr(i) for i in range(0x110000) if not 0xD800 <= i <= 0xDFFF]
    texts = [''.join(everything), '', '\0', '\uE000\uE080\uF8FF', '<s></s><pad><80>', 'a\r\nb\u2028\ufeff']
    for pieces in (everything, substrate.token_texts()):
        texts += [''.join(rng.choices(pieces, k=200)) for _ in range(100)]
    for text in texts:
        ids = tokens.encode_ordinary(text)
        # no text makes a special token
        assert tokens.decode(ids) == text and not {*range(0xE000, 0xE080)} & {*ids}
    assert tokens.encode_ordinary('\uE000') == [0xE0EE, 0xE080, 0xE080]           # its UTF-8 bytes
    assert tokens.encode_ordinary('\udfff\ud800') == [0xFFFD] * 2                 # they are no Unicode

def test_ngrams_are_counted_again_the_same(tmp_path, monkeypatch):
    pytest.importorskip('wordfreq')
    committed = substrate.NGRAMS.read_bytes()
    monkeypatch.setattr(substrate, 'NGRAMS', tmp_path / 'ngrams.txt')
    monkeypatch.syspath_prepend(REPO / 'interface')
    import count_ngrams
    count_ngrams.main([])
    assert substrate.NGRAMS.read_bytes() == committed

@pytest.mark.parametrize('damage', [
    lambda text: None, lambda text: text[:-9], lambda text: text + 'zz\n', lambda text: '[{' + text,
    lambda text: '\udcff', lambda text: text.replace('the', 'x'), lambda text: text.replace('the', 'thee'),
    lambda text: text.replace('the', 'ing'), lambda text: text.replace('the', 'thd')])
def test_damaged_ngrams_are_refused(damage, tmp_path, monkeypatch):
    path, damaged = tmp_path / 'ngrams.txt', damage(substrate.NGRAMS.read_text(encoding='utf-8'))
    # the last one leaves a list like any other, but not the one that belongs to the glyphs
    monkeypatch.setattr(substrate, 'NGRAMS', path if 'thd' in str(damaged) else None)
    if damaged:
        path.write_text(damaged, encoding='utf-8', errors='surrogateescape')
    with pytest.raises(substrate.UserError, match='ngrams.txt.*restore it'):
        substrate.tokenizer(path)

def test_another_ngram_list_makes_another_tokenizer(tmp_path, monkeypatch):
    pairs = [a + b for a in 'abcdefghijklmnopqrst' for b in 'abcdefghijklmnopqrst']
    grams = [pair + c for pair in pairs for c in 'abcdefghijklmnopqrst']
    (tmp_path / 'plain.txt').write_text('\n'.join(grams + pairs[:192]) + '\n')
    ranked = {2: [(gram, 1) for gram in pairs[:192]], 3: [(gram, 1) for gram in grams]}
    (tmp_path / 'literal.txt').write_text(repr([{'top_ngrams': ranked}, {'top_ngrams': {2: []}}]))
    plain, literal = (substrate.tokenizer(tmp_path / name) for name in ('plain.txt', 'literal.txt'))
    assert plain.encode_ordinary('abcab') == literal.encode_ordinary('abcab') == [0xD800 + 22, 0xF840 + 1]
    assert substrate.tokenizer_fingerprint(tmp_path / 'plain.txt') != substrate.tokenizer_fingerprint()
    monkeypatch.setattr(substrate, 'NGRAM_IDS', range(3))
    assert substrate.fill_places([['a', 'cc', 'b'], ['a', 'dd'], ['bb']]) == ['bb', 'cc', 'a']

# --------------------------------------------------------------------------------------------------------
# substrate.py: the glyphs

@pytest.fixture(scope='module')
def bits():
    return substrate.glyphs()

def test_white_space_differs_and_lookalikes_do_not(bits):
    assert bits.shape == (65_536, 1_024) and set(np.unique(bits)) == {0, 1}
    assert (bits[0x0A] != bits[0x09]).any() and bits[0x0A].any() and not bits[0x20].any()
    assert (bits[0x0A] == bits[0x240A]).all()           # drawn as its control picture
    groups = substrate.homoglyphs(bits)
    assert len(groups) == 733 and sum(map(len, groups)) == 1_642
    assert [0x41, 0x391, 0x410, 0x13AA, 0xA4EE] in groups
    assert substrate.homoglyphs(bits[0xE000:0xE100]) == []

@pytest.mark.skipif(not UNIFONT.exists(), reason='needs the font of the Debian package fonts-unifont 15.0.01')
def test_glyphs_are_drawn_again_bit_for_bit(bits, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPO / 'interface')
    import draw_glyphs
    monkeypatch.setattr(substrate, 'GLYPHS', tmp_path / 'glyphs.npz')
    draw_glyphs.main([str(UNIFONT)])
    assert 'bit for bit' in capsys.readouterr().out and (substrate.glyphs() == bits).all()
    fails(capsys, [str(tmp_path / 'none.otf')], 'fonts-unifont', main=draw_glyphs.main)

def test_damaged_glyphs_are_refused(tmp_path, monkeypatch):
    raw = substrate.GLYPHS.read_bytes()
    monkeypatch.setattr(substrate, 'GLYPHS', tmp_path / 'glyphs.npz')
    other = io.BytesIO()
    np.savez(other, np.zeros((65_536, 128), np.uint8))
    for damaged in (b'', raw[:-1000], raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:], other.getvalue()):
        substrate.GLYPHS.write_bytes(damaged)
        with pytest.raises(substrate.UserError, match='glyphs.npz.*draw_glyphs.py'):
            substrate.glyphs()

def test_show_prints_every_pixel(bits, capsys):
    substrate.main(['--show', 'А the\n🎉'])
    lines, tokens = capsys.readouterr().out.splitlines(), substrate.tokenizer().encode_ordinary('А the\n🎉')
    assert len(lines) == 8 * len(tokens)
    for k, i in enumerate(tokens):
        pixels = np.array([[' ▀▄█'.index(c) for c in line[:32]] for line in lines[8 * k:8 * k + 8]])
        pixels = np.stack([pixels & 1, pixels >> 1], axis=1).reshape(16, 32).repeat(2, axis=0)
        if len(substrate.token_texts()[i]) == 1:
            pixels = pixels[:, :16].repeat(2, axis=1)
        # what is doubled may begin on an odd row or column, in an n-gram each character on another one
        rolled = np.array([[np.roll(pixels, (y, x), (0, 1)) for y in (0, -1)] for x in (0, -1)])
        assert (rolled == bits[i].reshape(32, 32)).all(2).any(1).all(1).any(), hex(i)
    assert lines[3].endswith('  1,040 = 0x0410   А') and lines[11].endswith('0x0020   U+0020')
    assert lines[4].endswith('looks like A 0x0041, Α 0x0391, Ꭺ 0x13AA, ꓮ 0xA4EE') and len(lines[4]) < 90
    assert lines[19].endswith('0xDE2C   the') and not lines[20].strip('▀▄█ ')

def test_the_picture_of_a_text(bits, here, monkeypatch, capsys):
    monkeypatch.syspath_prepend(REPO / 'results')
    import pictures
    pictures.main(['show', 'А the', '--d_model', '16', '--out', 'new/a.png'])
    ids, image = [0x410, 0x20, 0xDE2C], np.asarray(pictures.Image.open('new/a.png')).astype(int)
    left, share = pictures.what_is_left(ids, 16)
    assert 0 < share.min() and share.max() < 1
    for y, i, kept, row in zip((56, 160, 264), ids, left, substrate.unicode_table(16)[ids]):
        assert (image[y + 1:y + 96:3, 251:346:3, 0] == 255 - 255 * bits[i].reshape(32, 32)).all()
        dark = 255 - image[y + 1:y + 96:3, 371:466:3, 0]
        assert np.abs(dark - 255 * kept.clip(0, 1).reshape(32, 32)).max() <= 1
        assert (np.sign(image[y + 40, 558:1054:32] @ [1, 0, -1]) == np.sign(row)).all()
    for wrong in (['show'], ['show', ''], ['show', 'a', '--d_model', '0'], ['idea', 'run'], ['loss']):
        fails(capsys, wrong, status=2, main=pictures.main)

# --------------------------------------------------------------------------------------------------------
# substrate.py: the tables

def test_unicode_rows_keep_the_angles_between_pictures(bits):
    table = substrate.substrate('unicode', 1024).table.detach().double().numpy()
    assert np.allclose(np.linalg.norm(table, axis=1), 1, atol=1e-6)
    assert (np.abs(table).max(0) > 0).sum() == 992 and not table[:, 992:].any()
    some = np.random.default_rng(0).integers(0, substrate.VOCAB, 500)
    centred = bits[some] - bits.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    assert np.allclose(centred @ centred.T, table[some] @ table[some].T, atol=1e-6)
    # a narrow table is the beginning of a wide one; most variance first, signs determined
    narrow, (_, axes) = substrate.unicode_table(16), substrate.principal_components()
    assert np.allclose(narrow[some], F.normalize(torch.from_numpy(table[some, :16])), atol=1e-5)
    variances = (bits[some] @ axes).var(0)
    assert variances[:16].min() > variances[200:300].max() and (axes.max(0) >= -axes.min(0)).all()

def test_binary_is_the_bits_of_the_id_lifted_on_the_fly():
    interface = substrate.substrate('binary', 64)
    assert interface.table.shape == (65_536, 16) and not interface.table.requires_grad
    idx = torch.tensor([[1, 0x8000], [0xE002, 0x41]])
    expected = [[[float(bit) for bit in f'{i:016b}' for _ in range(4)] for i in row] for row in idx.tolist()]
    assert interface(idx).tolist() == expected
    with pytest.raises(substrate.UserError, match='multiple of 16'):
        substrate.Substrate('binary', 100)

def test_random_has_a_seed_of_its_own_and_learned_takes_the_runs():
    first, second = (substrate.substrate('random', 16, seed=seed).table for seed in (0, 1))
    assert torch.equal(first, second) and torch.allclose(first.norm(dim=1), torch.ones(65_536))
    assert not first.requires_grad and abs(first.mean()) < 1e-3
    first, same, other = (substrate.substrate('learned', 16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.table, same.table) and not torch.equal(first.table, other.table)
    first(torch.tensor([[5]])).sum().backward()
    assert first.table.grad[5].eq(1).all() and first.table.grad.sum() == 16
    assert abs(first.table.std().item() - 0.02) < 1e-3

def test_built_unfilled_and_compiled():
    with torch.device('meta'):
        assert substrate.Substrate('unicode', 1024).table.is_meta
    with pytest.raises(substrate.UserError, match='unicode, binary, random, learned'):
        substrate.substrate('unicod', 32)
    idx = torch.tensor([[1, 2, 65_535]])
    interface = substrate.substrate('binary', 32)
    assert torch.equal(torch.compile(interface, backend='aot_eager', fullgraph=True)(idx), interface(idx))

def test_substrate_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = np.random.default_rng(0).standard_normal((65_536, 4)).astype(np.float16)
    good = torch.from_numpy(table)
    np.save('a.npy', table)
    torch.save(good, 'b.pt')
    torch.save({'weight': good, 'step': 3, 'bias': torch.zeros(4)}, 'c.pt')
    for name in ('a.npy', 'b.pt', Path('c.pt')):
        read = substrate.substrate(name, 4).table
        assert np.array_equal(read.numpy(), table) and read.dtype == torch.float32 and not read.requires_grad
    np.save('wide.npy', np.zeros((65_536, 5)))
    np.save('nan.npy', np.where(np.arange(4) == 2, np.nan, table))
    np.save('objects.npy', np.array([{}], dtype=object), allow_pickle=True)
    torch.save({'a': good, 'b': good}, 'two.pt')
    for name in 'wide.npy nan.npy objects.npy two.pt absent.pt'.split():
        with pytest.raises(substrate.UserError, match=f'{name} must hold 65536 x 4'):
            substrate.substrate(name, 4)

# --------------------------------------------------------------------------------------------------------
# substrate.py: what all scripts share

@pytest.mark.parametrize('error, status, words', [
    (OSError(errno.ENOSPC, 'No space left', 'log.csv'), 1, "error: [Errno 28] No space left: 'log.csv'\n"),
    (substrate.UserError('why'), 1, 'error: why\n'), (substrate.UserError('why', 2), 2, 'error: why\n'),
    (KeyboardInterrupt(), 130, 'interrupted\n')])
def test_errors_end_in_one_sentence(error, status, words, capsys):
    @substrate.cli
    def main(argv):
        raise error
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == status and capsys.readouterr().err == words
    fails(capsys, ['--shw'], '-h explains', status=2, main=substrate.main)

@pytest.mark.parametrize('ending, status', [('| true; exit ${PIPESTATUS[0]}', 141), ('>&-', 0)])
@pytest.mark.parametrize('lines', [1, 100_000])         # what breaks is the flush, or the write
def test_a_stdout_that_nobody_reads_or_that_is_ascii(ending, status, lines):
    script = f'import substrate\nsubstrate.cli(lambda argv: print("строка\\n" * {lines}))()'
    command = f'{shlex.quote(sys.executable)} -c {shlex.quote(script)} {ending}'
    env = os.environ | dict(PYTHONIOENCODING='ascii', PYTHONUNBUFFERED='')
    done = subprocess.run(['bash', '-c', command], cwd=REPO, capture_output=True, timeout=120, env=env)
    assert done.returncode == status and not done.stderr, done

@pytest.mark.parametrize('error', [None, OSError('full'), RuntimeError('torch\nmore'), KeyboardInterrupt()])
def test_replacing_leaves_the_old_or_the_new_file_whole(tmp_path, error):
    path = tmp_path / 'new' / 'a.txt'
    with substrate.replacing(path) as beside:
        beside.write_text('old')
    with pytest.raises(BaseException) if error else contextlib.nullcontext() as end:
        with substrate.replacing(path) as beside:
            beside.write_text('new')
            if error:
                raise error
    assert path.read_text() == ('old' if error else 'new') and list(path.parent.iterdir()) == [path]
    if isinstance(error, Exception):
        assert end.type is substrate.UserError and '\n' not in str(end.value) and 'a.txt' in str(end.value)

def test_digests_and_tables(tmp_path, capsys):
    assert substrate.digest('a', 1) == substrate.digest('a', '1') != substrate.digest('a1')
    for raw, begins in ((b'', 'e3b0c44298fc1c14'), (b'abc', 'ba7816bf8f01cfea')):
        (tmp_path / 'a').write_bytes(raw)
        assert substrate.sha256_of(tmp_path / 'a')[:16] == begins and len(substrate.digest(raw)) == 16
    substrate.table([dict(name='a', n=1234, loss=0.5), dict(name='long', n=5, loss=10.12345)])
    assert capsys.readouterr().out == 'name      n    loss\n   a  1,234   0.500\nlong      5  10.123\n'
