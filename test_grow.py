"""Tests of growing transformers: `pytest` runs all of them on a CPU; those marked cuda need a GPU."""

import contextlib
import dataclasses
import gzip
import http.server
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_mmlu
import grow
import prepare_data
import substrate

REPO = Path(__file__).parent
UNIFONT = Path(os.environ.get('UNIFONT', '/usr/share/fonts/opentype/unifont/unifont.otf'))
TINY = dict(layers=3, layers_per_stage=1, d_model=32, heads=2, context=16, substrate='binary', head='seen',
            lora='none', stage_tokens=640, stage_ratio=1.0, batch_tokens=64, micro_batch=4, lr=1e-2,
            adam_lr=1e-2, lr_scale_later=1.0, warmup=10, cooldown=0.2, lora_tokens=320, lora_lr=1e-2,
            eval_tokens=256, device='cpu', dtype='float32', compile=False, save_every=100.0)
PAPER = dict(layers=9, layers_per_stage=3, d_model=1024, heads=32, context=1024)

def config(**changes):
    return grow.Config(**TINY | changes)

def flags(**changes):
    """A command line of the tiny run."""
    words = []
    for name, value in (TINY | changes).items():
        if isinstance(value, bool):
            words.append(f'--{name}' if value else f'--no-{name}')
        else:
            words += [f'--{name}', str(value)]
    return words

def model_of(c, blocks=None, head_ids=torch.arange(substrate.VOCAB)):
    """A model with random weights everywhere, so that no block is a no-op."""
    model = grow.GrowingTransformer(c, substrate.substrate(c.substrate, c.d_model), head_ids)
    chance = grow.generator(c.seed)
    model.append(c.layers if blocks is None else blocks)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and not name.startswith('interface'):
                p.normal_(0, 0.02, generator=chance)
        model.head.bias.zero_()
    return model

def ids(*shape, seed=0):
    return torch.randint(0, substrate.VOCAB, shape, generator=torch.Generator().manual_seed(seed))

def always_the_batch(one):
    """Batches that are all the same (inputs, targets)."""
    return type('OneBatch', (), dict(batch=lambda self, step, rows=None: one, rows=len(one[0])))()

def texts(n=400, seed=0, words='the cat sat on a mat and saw more cats than mats in that hat'.split()):
    rng = np.random.default_rng(seed)
    return [f'{i}: ' + ' '.join(rng.choice(words, 60)) for i in range(n)]

@contextlib.contextmanager
def inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)

@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    """A folder with a small data set in data/stdlib, where the main job looks for its text."""
    folder = tmp_path_factory.mktemp('corpus')
    with inside(folder):
        prepare_data.prepare('stdlib', texts(), 'made up')
    return folder

@pytest.fixture
def here(corpus, tmp_path, monkeypatch):
    """A working folder that holds a copy of the small data set and nothing else."""
    shutil.copytree(corpus / 'data', tmp_path / 'data')
    monkeypatch.chdir(tmp_path)
    return tmp_path

def fails(capsys, argv, *words, status=1, main=grow.main):
    """Runs main(argv); it must end with that status and one sentence on stderr that has all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    error = re.sub(r'(.*\r[^\n]*\n)?', '', capsys.readouterr().err, count=1, flags=re.DOTALL).strip()
    assert end.value.code == status and error.startswith('error: '), error
    assert 'Traceback' not in error and '\n' not in error, error
    for word in words:
        assert word in error, error

def refuses(pattern, function, *args):
    with pytest.raises(substrate.UserError, match=pattern) as error:
        function(*args)
    assert '\n' not in str(error.value)

def flipped(whole, rng):
    """The bytes with one bit flipped."""
    damaged = bytearray(whole)
    damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
    return bytes(damaged)

# ------------------------------ The interface: tokens, their pictures and their vectors
def test_layout_of_the_vocabulary():
    tokens, grams = substrate.tokenizer(), substrate.read_ngrams()
    assert tokens.n_vocab == substrate.VOCAB == 65_536 and substrate.EOS == 0xE002
    assert all(tokens.encode_ordinary(chr(i)) == [i] for i in (0, 0x7F, 0x80, 0x4E2D, 0xD7FF, 0xF900, 0xFFFF))
    places = {0xD800: grams[0], 0xDFFF: grams[2047], 0xE100: grams[2048], 0xF8FF: grams[8191]}
    names = {0xE000: '<pad>', 0xE001: '<s>', 0xE002: '</s>', 0xE003: '<unk>', 0xE004: '<04>', 0xE07F: '<7F>'}
    assert all(tokens.decode([i]) == text for i, text in (places | names).items())
    assert tokens.decode_bytes(range(0xE080, 0xE100)) == bytes(range(0x80, 0x100))
    # What ids mean may never change: checkpoints and shards are made of them.
    assert substrate.tokenizer_fingerprint() == 'bd8b4e82547af825'

def test_the_tokenizer_against_a_slow_one_in_every_script():
    tokens, grams, rng = substrate.tokenizer(), substrate.read_ngrams(), random.Random(0)
    text = ''.join(piece + rng.choice(['', '', ' ', piece[0]]) for piece in rng.choices(grams, k=30_000))
    place, slow, at = dict(zip(grams, substrate.NGRAM_IDS)), [], 0
    while at < len(text):
        piece = next((text[at:at + n] for n in (3, 2) if text[at:at + n] in place), text[at])
        slow.append(place.get(piece, ord(piece[0])))
        at += len(piece)
    assert tokens.encode_ordinary(text) == slow

def test_every_text_round_trips_and_none_makes_a_special_token():
    encode, decode = substrate.tokenizer().encode_ordinary, substrate.tokenizer().decode
    everything = ''.join(chr(i) for i in range(0x110000) if not 0xD800 <= i <= 0xDFFF)
    some = ''.join(random.Random(0).choices(substrate.token_texts(), k=20_000))
    for text in (everything, '', '\uE000\uE080\uF8FF', '<s></s><pad><80>', 'a\r\nb\u2028', some):
        assert decode(encode(text)) == text and not {*range(0xE000, 0xE080)} & {*encode(text)}
    assert encode('\uE000\udfff') == [0xE0EE, 0xE080, 0xE080, 0xFFFD]        # UTF-8 bytes; no Unicode

def test_lists_of_ngrams(tmp_path, monkeypatch):
    path, grams = tmp_path / 'ngrams.txt', substrate.read_ngrams()
    whole = substrate.NGRAMS.read_text(encoding='utf-8')
    for damaged in (whole[:-9], whole + '€€\n', '[{' + whole, '\udcff',
                    *(whole.replace('the\n', f'{gram}\n') for gram in ('x', 'thee', 'ing'))):
        path.write_text(damaged, encoding='utf-8', errors='surrogateescape')
        refuses('ngrams.txt.*restore it', substrate.tokenizer, path)
    # The form in which bvv241-2-3 published its own; then a list that does not belong to the glyphs.
    ranked = {n: [(gram, 1) for gram in grams if len(gram) == n] for n in (2, 3)}
    path.write_text(repr([{'top_ngrams': ranked}, {'top_ngrams': {2: []}}]), encoding='utf-8')
    assert substrate.read_ngrams(path) == grams
    path.write_text(whole.replace('the\n', 'thd\n'), encoding='utf-8')
    assert substrate.tokenizer_fingerprint(path) != substrate.tokenizer_fingerprint()
    monkeypatch.setattr(substrate, 'NGRAMS', path)
    refuses('ngrams.txt.*restore it', substrate.read_ngrams, path)

@pytest.fixture(scope='session')
def bits():
    return substrate.glyphs()

def test_white_space_is_drawn_and_lookalikes_are_listed(bits, capsys):
    assert (bits[0x0A] == bits[0x240A]).all() and bits[0x0A].any() and not bits[0x20].any()
    assert [0x41, 0x391, 0x410, 0x13AA, 0xA4EE] in substrate.homoglyphs(bits)
    for argv, count in (([], 1), (['--homoglyphs'], 734)):
        substrate.main(argv)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == count and '65,536 tokens, 1,642 look alike' in lines[-1]

@pytest.mark.skipif(not UNIFONT.exists(), reason='needs the font of the Debian package fonts-unifont 15.0.01')
def test_glyphs_are_drawn_again_bit_for_bit(bits, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPO / 'interface')
    monkeypatch.setattr(substrate, 'GLYPHS', tmp_path / 'glyphs.npz')
    __import__('draw_glyphs').main([str(UNIFONT)])
    assert (substrate.glyphs() == bits).all()

def test_other_glyphs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(substrate, 'GLYPHS', tmp_path / 'glyphs.npz')
    np.savez(substrate.GLYPHS, np.zeros((65_536, 128), np.uint8))
    refuses('glyphs.npz.*draw_glyphs.py', substrate.glyphs)

def test_show_prints_the_pixels_of_every_token(bits, capsys):
    substrate.main(['--show', 'А the'])
    lines = capsys.readouterr().out.splitlines()
    pairs = np.array([[' ▀▄█'.index(c) for c in line[:32]] for line in lines])
    pixels, pictures = np.stack([pairs & 1, pairs >> 1], axis=1).reshape(-1, 32), bits.reshape(-1, 32, 32)
    assert (pixels[:16, :16] == pictures[0x410][::2, ::2]).all()
    assert (pixels[32:] == pictures[0xDE2C][::2]).all()
    assert lines[3].endswith('  1,040 = 0x0410   А') and lines[11].endswith('0x0020   U+0020')
    assert lines[4].endswith('looks like A 0x0041, Α 0x0391, Ꭺ 0x13AA, ꓮ 0xA4EE')

def test_unicode_rows_keep_the_angles_between_pictures(bits):
    table = substrate.substrate('unicode', 1024).table.detach().double().numpy()
    assert np.allclose(np.linalg.norm(table, axis=1), 1, atol=1e-6)
    assert (np.abs(table).max(0) > 0).sum() == 992 and not table[:, 992:].any()
    some = np.random.default_rng(0).integers(0, substrate.VOCAB, 500)
    centred = F.normalize(torch.from_numpy(bits[some] - bits.mean(0))).numpy()
    assert np.allclose(centred @ centred.T, table[some] @ table[some].T, atol=1e-6)
    narrow, (_, axes) = substrate.unicode_table(16), substrate.principal_components()
    assert np.allclose(narrow[some], F.normalize(torch.from_numpy(table[some, :16])), atol=1e-5)
    variances = (bits[some] @ axes).var(0)
    assert variances[:16].min() > variances[200:].max() and (axes.max(0) >= -axes.min(0)).all()

def test_binary_random_and_learned_rows():
    interface, idx = substrate.substrate('binary', 64), torch.tensor([[1, 0x8000], [0xE002, 0x41]])
    expected = [[[float(bit) for bit in f'{i:016b}' for _ in range(4)] for i in row] for row in idx.tolist()]
    torch.testing.assert_close(interface(idx), torch.tensor(expected), rtol=0, atol=0)
    noise, same = (substrate.substrate('random', 16, seed=seed).table for seed in (0, 1))
    assert torch.equal(noise, same) and torch.allclose(noise.norm(dim=1), torch.ones(65_536))
    first, same, other = (substrate.substrate('learned', 16, seed=seed).table for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other) and abs(first.std() - 0.02) < 1e-3
    assert first.requires_grad and not noise.requires_grad and interface.table.shape == (65_536, 16)
    for name, words in (('binary', 'multiple of 16'), ('unicod', 'unicode, binary, random, learned')):
        refuses(words, substrate.Substrate, name, 24)

def test_tables_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = np.random.default_rng(0).standard_normal((65_536, 4)).astype(np.float16)
    np.save('a.npy', table)
    torch.save({'weight': torch.from_numpy(table), 'step': 3, 'bias': torch.zeros(4)}, 'b.pt')
    for name in ('a.npy', Path('b.pt')):
        read = substrate.substrate(name, 4).table
        assert np.array_equal(read.numpy(), table) and read.dtype == torch.float32 and not read.requires_grad
    np.save('wide.npy', np.zeros((65_536, 5)))
    np.save('nan.npy', np.where(np.arange(4) == 2, np.nan, table))
    torch.save(dict.fromkeys('ab', torch.from_numpy(table)), 'two.pt')
    for name in ('wide.npy', 'nan.npy', 'two.pt', 'absent.pt'):
        refuses(f'{name} is missing, or not 65536 x 4', substrate.substrate, name, 4)

# ------------------------------ What all scripts share
@pytest.mark.parametrize('error, status, words', [
    (OSError(28, 'No space left', 'log.csv'), 1, "error: [Errno 28] No space left: 'log.csv'\n"),
    (substrate.UserError('why'), 1, 'error: why\n'), (substrate.UserError('why', 2), 2, 'error: why\n'),
    (KeyboardInterrupt(), 130, 'interrupted\n'), (KeyboardInterrupt('stopped', 143), 143, 'stopped\n')])
def test_errors_end_in_one_sentence(error, status, words, monkeypatch, capsys):
    @substrate.cli
    def main(argv):
        print('я')
        raise error
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), 'ascii'))     # as on an old terminal
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == status and capsys.readouterr().err == words

def test_digests_and_tables(tmp_path, capsys):
    (tmp_path / 'a').write_text('abc')
    assert substrate.sha256_of(tmp_path / 'a')[:16] == substrate.digest('abc') != substrate.digest('ab', 'c')
    substrate.table([dict(name='a', n=1234), dict(name='long', loss=10.12345, n=5)])
    assert capsys.readouterr().out == 'name      n    loss\n   a  1,234        \nlong      5  10.123\n'

# ------------------------------ prepare_data.py: data sets small enough to look at
@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A data set of 400 documents in four parts, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data, 'SMALLEST', 0)
    prepare_data.prepare_parts('tiny', [texts()[i:i + 100] for i in range(0, 400, 100)], 'made up')
    return prepare_data.Dataset('tiny')

def made_of(documents):
    prepare_data.prepare('other', documents, 'made up')
    return prepare_data.Dataset('other')

def documents_in(dataset, *splits):
    """What the shards hold, as text again."""
    tokens = np.concatenate([shard for split in splits for shard in getattr(dataset, split)])
    parts = np.split(tokens, np.flatnonzero(tokens == prepare_data.EOS) + 1)
    return [substrate.tokenizer().decode(part.tolist()[:-1]) for part in parts if len(part)]

def shards_of(name):
    """Name and bytes of all that a data set's folder holds but its lock."""
    return {path.name: path.read_bytes() for path in Path('data', name).iterdir() if path.name != '.lock'}

def test_documents_come_back_and_what_a_part_holds_is_counted(dataset):
    assert len(shards_of('tiny')) == 12 and dataset.name == 'tiny' and isinstance(dataset.val[0], np.memmap)
    assert np.array_equal(np.fromfile('data/tiny/train_000002.bin', '<u2'), dataset.train[2])
    held_out = documents_in(dataset, 'val')
    assert documents_in(dataset, 'train') == [text for text in texts() if text not in held_out]
    train, val = np.concatenate(dataset.train), np.concatenate(dataset.val)
    assert [dataset.train_tokens, dataset.val_tokens] == [len(train), len(val)]
    assert np.array_equal(dataset.counts, np.bincount(train, minlength=65_536))
    assert dataset.bytes_per_token == sum(map(len, held_out)) / len(val)
    odd = 'a text that says </s> and <s>, \x00, 😀'
    other = made_of([*texts(), '', ' \n', None, odd, 'half \ud83d'])
    assert sorted(documents_in(other, 'train', 'val')) == sorted([*texts(), odd, 'half ?'])
    again = prepare_data.Dataset(dataset.folder.absolute())            # a path does for a name
    assert again.fingerprint == dataset.fingerprint != other.fingerprint

def test_commands(dataset, capsys, monkeypatch):
    Path('a.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in texts()))
    command = ['files', '--name', 'a', 'a.jsonl']
    for _ in range(2):                                                 # the same again changes nothing
        prepare_data.main(command)
        assert sorted(documents_in(prepare_data.Dataset('a'), 'train', 'val')) == sorted(texts())
    fails(capsys, [*command, 'b'], 'was begun from a.jsonl with --tokens None', main=prepare_data.main)
    refuses('was begun from', prepare_data.prepare_parts, 'a', [texts()], 'a.jsonl', 5)
    for argv in ([], ['--check', 'a', 'stdlib'], ['files', '--name', 'x'], ['stdlib', '--tokens', '1'],
                 ['fineweb-edu', '--tokens', '0'], ['files', '--name', '../x', 'a.jsonl']):
        fails(capsys, argv, status=2, main=prepare_data.main)
    monkeypatch.setattr(prepare_data, 'tokenizer_fingerprint', lambda: 'another')
    refuses('another tokenizer', prepare_data.prepare_parts, 'a', [texts()], 'a.jsonl')

def test_damaged_data_sets_are_refused_by_name(dataset, capsys):
    folder, check = dataset.folder, ['--check', 'tiny']
    refuses('no data set data/mine.* prepare_data.py', prepare_data.Dataset, 'mine')
    prepare_data.main(check)
    for name in ('train_000001.bin', max(folder.glob('val*'), key=os.path.getsize).name, 'part_000001.json'):
        path, whole = folder / name, (folder / name).read_bytes()
        if path.suffix == '.bin':
            path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])      # the size is right
            fails(capsys, check, f'part {path.stem[-1]} of data/tiny is damaged', main=prepare_data.main)
        else:
            path.write_bytes(whole.replace(b'made up', b'made us'))
            refuses('part 1 of .*another', prepare_data.Dataset, 'tiny')
        path.write_bytes(whole[:-2])
        refuses(f'part {path.stem[-1]} of data/tiny cannot be read', prepare_data.Dataset, 'tiny')
        path.write_bytes(whole)
    (folder / 'train_000001.bin').unlink()
    refuses('part 1 of data/tiny cannot.*remove its train', prepare_data.Dataset, 'tiny')
    for k in (2, 3):                                                   # as told
        (folder / f'train_00000{k}.bin').unlink()
    parts = [iter(texts()[i:i + 100]) for i in range(0, 400, 100)]
    prepare_data.prepare_parts('tiny', parts, 'made up')
    assert prepare_data.Dataset('tiny').fingerprint == dataset.fingerprint and len(list(parts[0])) == 100

def test_stdlib_is_prose(tmp_path, monkeypatch):
    (tmp_path / 'test').mkdir()
    (tmp_path / 'test/z.py').write_text(
        '"""Says\n    what.\n    """\n'
        '# x:\n# A comment of two lines that is long enough\n# to be taken for an English sentence.\n'
        'def f():\n    "Inner."  # no\n    s = """\n# not a comment but a string, which is long enough\n"""\n'
        '    # A comment that is indented and stands in a block of its own, to be sure.\n'
        '# A comment of some fifty letters is left out again.\n\n'
        '# value = table[0] + other["a"] * 3.1415 - (f(x) / g(y, z)) ** k\n')
    assert prepare_data.prose(tmp_path / 'test/z.py') == [
        'Says what.', 'x:\nA comment of two lines that is long enough to be taken for an English sentence.',
        'Inner.', 'A comment that is indented and stands in a block of its own, to be sure.']
    assert prepare_data.normalised('A \n-----\n\n>>> 1\n1\n\n| t |\n\nB....  C') == 'A\n---\n\nB...  C'
    (tmp_path / 'a.py').write_text(f'"""{"word " * 900}"""\ndef g():\n    "G."\n')
    (tmp_path / 'b.py').write_text('"G."\ndef h():\n    "H."\n')
    (tmp_path / 'broken.py').write_text('def')
    monkeypatch.setattr(prepare_data.ast, '__file__', str(tmp_path / 'ast.py'))
    assert list(prepare_data.stdlib_documents())[:3] == [('word ' * 900).strip(), 'G.', 'H.']

def test_val_is_decided_by_the_document_alone(dataset, monkeypatch):
    assert [i for i in range(300) if prepare_data.encode(str(i))[0]] == [225, 299]
    again = made_of(texts()[::-1] + texts())
    assert set(documents_in(again, 'val')) == set(documents_in(dataset, 'val'))
    assert set(documents_in(again, 'train')).isdisjoint(documents_in(again, 'val'))
    shutil.rmtree(again.folder)
    monkeypatch.setattr(prepare_data, 'SMALLEST', dataset.val_tokens)
    assert made_of(texts()).fingerprint != again.fingerprint
    monkeypatch.setattr(prepare_data, 'SMALLEST', dataset.val_tokens + 1)
    refuses('are less than .*; give more text', prepare_data.prepare, 'short', texts(), 'made up')
    assert not shards_of('short')

# ------------------------------ Documents of files
def read(*paths):
    return list(filter(None, prepare_data.file_documents(paths)))

@pytest.mark.parametrize('raw, sizes', [
    (b'x' * 16_383 + b'\n' + b'z', [16_384, 1]), ((b'x' * 999 + b'\n') * 40, [17_000, 17_000, 6_000]),
    ('п'.encode() * 40_000, [40_000]), (b'\xef\xbb\xbf' + b'line\r' * 5000, [16_385, 8_615]), (b'', [])])
def test_how_a_text_file_is_cut(tmp_path, raw, sizes):
    (tmp_path / 'a.txt').write_bytes(raw)
    assert [len(text) for text in read(tmp_path / 'a.txt')] == sizes
    assert ''.join(read(tmp_path / 'a.txt')) == raw.decode('utf-8-sig').replace('\r', '\n')

def test_folders_rows_and_packed_files(tmp_path, capsys, monkeypatch):
    (tmp_path / 'sub' / '.git').mkdir(parents=True)
    for name, text in (('c.MD', 'upper'), ('a.log', 'log'), ('.hidden.txt', 'no'), ('sub/.git/x.txt', 'no'),
                       ('sub/b.jsonl', '{"text": "two\\nlines"}\r\n\n{"text": null}\n{"text": "\\u00e9"}\n'),
                       ('d.PY', '\ufeffpy'), ('a.txt', 'txt'), ('sub/x.json', '{"text": "object"}\n'),
                       ('f.NDJSON', '{"text": "f"}\r{"text": "g"}\r'), ('._a.txt', 'no'), ('B.LOG', 'log')):
        (tmp_path / name).write_text(text, newline='')
    (tmp_path / 'link').symlink_to(tmp_path / 'sub')
    for end in (bytes(100), b'\r\n'):                   # padded, or damaged where no text is any more
        (tmp_path / 'e.jsonl.GZ').write_bytes(gzip.compress(b'{"text": "row"}') + end)
        assert read(tmp_path) == ['txt', 'upper', 'py', 'row', 'f', 'g', 'two\nlines', 'é']
        out = capsys.readouterr().out
        assert f'{tmp_path}: 6 files are read, 4 are not (2 .log, 1 link, 1 .json)\n' in out, out
        assert '1 rows without text' in out and ('what follows it is no gzip' in out) == (end == b'\r\n')
    assert read(tmp_path / 'a.log', str(tmp_path / '.hidden.txt')) == ['log', 'no']            # named
    assert read(tmp_path / 'sub/x.json') == ['object']
    rows = '{"text": "row"}\n', ' { "a": "row"}\n', '[{"text": "row"}]'
    for name, text in zip(('rows.txt', 'rows', 'rows.md'), rows):      # a wrong ending
        (tmp_path / name).write_text(text)
        refuses('rows.*JSON.*jsonl', read, tmp_path / name)
    scandir = os.scandir
    with monkeypatch.context() as patch:                # root, who may run this, can read all
        patch.setattr(os, 'scandir', lambda path: open('/x/') if str(path).endswith('sub') else scandir(path))
        refuses('/x/ cannot be read', read, tmp_path)
    assert read(tmp_path / 'sub' / '.git') == ['no']
    (tmp_path / 'a.txt').write_text('\ufeff%\n' + 'a\n' * 9999 + '%\nb%\n%\nc')
    assert list(prepare_data.file_documents([tmp_path / 'a.txt'], '%')) == ['', 'a\n' * 9999, 'b%\n', 'c']

@pytest.mark.parametrize('name, raw, words', [
    *(('a.jsonl', b'{"text": "good"}\n' + row + b'\n', 'line 2: missing, damaged or without a "text"')
      for row in (b'{', b'{"txt": "a"}', b'["a"]', b'{"text": 3}')),
    *((name, b'\n' * 9 + raw, f'{name}, line 10: not UTF-8; unpack it, or try iconv -f ENCODING -t utf-8')
      for name in ('a.txt', 'a.jsonl') for raw in (b'\xff\xfea\0', b'\xed\xa0\x80', b'\xe4\xb8', b'\0')),
    *((name, f'{mark}{text}'.encode(encoding), f'line 1: not UTF-8; .* iconv -f {guess} -t utf-8')
      for name, text in (('a.txt', 'some words\n' * 9), ('a.json', '{"text": "some words"}\n'))
      for mark, encoding, guess in (('', 'utf-16-le', 'UTF-16LE'), ('', 'utf-16-be', 'UTF-16BE'),
                                    ('\ufeff', 'utf-16-be', 'UTF-16'), ('\ufeff', 'utf-16-le', 'UTF-16'),
                                    ('\ufeff', 'utf-32-le', 'UTF-32'))),
    *(('a.txt.gz', raw, 'a.txt.gz, line .* damaged') for whole in [gzip.compress(b'abcdefghi' * 999)]
      for raw in (whole[:-9], whole[:20], whole[:30] + b'x' * 9 + whole[39:], b'text'))])
def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, name, raw, words):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(raw)
    refuses(words, made_of, prepare_data.file_documents([name]))       # nor is it taken for a full disk
    refuses('nowhere, line 0: missing, damaged', read, 'nowhere')

def test_parquet_needs_pyarrow_and_a_column_of_text(tmp_path, monkeypatch):
    pa, path = pytest.importorskip('pyarrow'), tmp_path / 'a.parquet'
    write = pytest.importorskip('pyarrow.parquet').write_table
    write(pa.table({'id': range(3), 'text': pa.array(['one', None, 'two'], pa.large_string())}), path)
    assert read(path) == read(tmp_path) == ['one', 'two']
    path.write_bytes(path.read_bytes()[:-9])
    refuses('a.parquet, line 0: missing, damaged', read, path)
    for column in ({'txt': ['a']}, {'text': [b'\xff']}, {'text': [['a']]}):
        write(pa.table(column), path)
        refuses('a.parquet, line 0: missing, damaged or without a "text"', read, path)
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    refuses('pip install pyarrow', read, path)

# ------------------------------ Batches and baselines
def first_tokens(dataset, split, context):
    """Every sequence of a split, the slow way."""
    return [shard[i:i + context + 1].tolist() for shard in getattr(dataset, split)
            for i in range(0, len(shard) - context, context)]

def rows_of(batch):
    inputs, targets = batch
    assert inputs.dtype == targets.dtype == torch.int64 and torch.equal(inputs[:, 1:], targets[:, :-1])
    return [x.tolist() + [y[-1].item()] for x, y in zip(inputs, targets)]

def test_a_batch_depends_on_seed_and_step_alone_and_an_epoch_is_every_sequence_once(dataset):
    make = lambda seed: prepare_data.Batches([dataset], [1], seed=seed, rows=7, context=16)
    a, b, every = make(5), make(5), first_tokens(dataset, 'train', 16)
    for step in (900, 3, 0, 50_000):                                   # any order, any epoch
        assert all(map(torch.equal, a.batch(step), make(5).batch(step)))
        for rank in range(3):
            assert rows_of(b.batch(step, rows=slice(rank, None, 3))) == rows_of(a.batch(step))[rank::3]
    seen = [row for step in range(2 * len(every) // 7 + 1) for row in rows_of(a.batch(step))]
    for epoch in range(2):
        order = np.random.default_rng([5, epoch]).permutation(len(every))
        assert seen[epoch * len(every):][:len(every)] == [every[i] for i in order]
    refuses('smaller --context', prepare_data.Batches, [dataset], [1], 0, 8, 100_000)

def test_a_mixture_is_exact(dataset):
    other = made_of(texts(seed=1, words=['перед', 'вами', 'слова', 'и']))
    mixed = prepare_data.Batches([dataset, other], [3, 2], seed=0, rows=6, context=16)
    rows = [row for step in range(40) for row in rows_of(mixed.batch(step))]
    alone = [prepare_data.Batches([d], [1], seed=0, rows=48, context=16) for d in (dataset, other)]
    streams = [iter([row for step in range(3) for row in rows_of(b.batch(step))]) for b in alone]
    assert rows == [next(streams[d]) for _ in range(48) for d in (0, 0, 0, 1, 1)]
    opened = prepare_data.open_batches(['tiny:3', 'other:02'], 0, 6, 16)
    assert rows_of(opened.batch(7)) == rows_of(mixed.batch(7))
    for words in (['tiny', 'tiny:2'], ['tiny:0'], ['tiny:x'], ['tiny:-1']):
        refuses('name each data set once', prepare_data.open_batches, words, 0, 6, 16)
    refuses('val split of tiny', prepare_data.open_batches, ['tiny'], 0, 6, dataset.val_tokens)
    i, bias = dataset.counts.argmax(), prepare_data.unigram_log_probs([dataset, other], [3, 2])
    a, b = ((np.sum(np.concatenate(d.train) == i) + 1) / (d.train_tokens + 65_536) for d in (dataset, other))
    assert bias[i] == pytest.approx(math.log(0.6 * a + 0.4 * b)) and len(bias) == 65_536

def test_val_batches_are_the_whole_split_in_order(dataset):
    every = first_tokens(dataset, 'val', 16)
    batches = list(map(rows_of, prepare_data.val_batches(dataset, 16, 5)))
    assert list(itertools.chain(*batches)) == every and set(map(len, batches[:-1])) == {5}
    for limit, rows in ((16 * 7 + 15, 7), (1, 1)):
        assert sum(map(rows_of, prepare_data.val_batches(dataset, 16, 5, limit)), []) == every[:rows]

@pytest.mark.parametrize('counted', [3, 700, 20_000_000])              # 3: most contexts are unseen
def test_ngram_losses_against_counting_in_dictionaries(dataset, monkeypatch, counted):
    val = [pair for batch in prepare_data.val_batches(dataset, 16, 8, 2000)
           for row in rows_of(batch) for pair in zip(row, row[1:])]
    monkeypatch.setattr(prepare_data, 'COUNTED', counted)
    tokens = dataset.train[0][:counted].tolist()
    pairs = list(zip(tokens, tokens[1:]))
    word, pair = Counter(tokens[1:]), Counter(pairs)
    total, kinds = Counter(tokens[:-1]), Counter(h for h, _ in pair)
    nats = np.zeros(2)
    for h, w in val:                                                   # the formulas, word for word
        p = (word[w] + len(word) / 65_536) / (len(pairs) + len(word))
        q = (pair[h, w] + kinds[h] * p) / (total[h] + kinds[h]) if total[h] else p
        nats -= np.log([p, q]) / len(val)
    assert prepare_data.ngram_losses(dataset, 16, limit=2000) == pytest.approx(nats.tolist(), rel=1e-9)

# ------------------------------ Downloads and corpora, from a server on this machine
class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; breaks each answer off after `breaks` bytes, if set; `ranges`: can it go on half-way?
    Each of `faults` spoils one answer: a status, or None to hang up."""
    def do_GET(self):
        self.asked.append(self.headers['Range'])
        body, fault = self.files.get(self.path, b''), self.faults.pop(0) if self.faults else 200
        if fault is None:
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault > 200 or not body or self.headers['Accept-Encoding'] != 'identity':
            return self.send_error(max(fault, 404))
        first = int(self.headers['Range'][6:-1]) if self.ranges else 0
        self.send_response(200 if not self.ranges else 206 if first < len(body) else 416)
        if self.ranges:
            self.send_header('Content-Range', f'bytes {first}-{len(body) - 1}/{len(body)}')
        self.send_header('Content-Length', str(len(body[first:])))
        self.end_headers()
        self.wfile.write(body[first:][:self.breaks])

    def log_message(self, *args):
        pass

@pytest.fixture
def server(monkeypatch, tmp_path):
    """-> (address, Handler), in an empty working folder; retries do not wait."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_data.time, 'sleep', lambda seconds: None)
    for name, value in (('files', {}), ('breaks', None), ('ranges', True), ('asked', []), ('faults', [])):
        monkeypatch.setattr(Handler, name, value, raising=False)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}', Handler
        server.shutdown()

def test_a_broken_download_goes_on_where_it_stopped(server):
    url, handler = server
    handler.files['/a'] = body = random.Random(0).randbytes(9 * 2**16)
    handler.breaks, handler.faults[:] = 2**16, [200, 429, 500, 502, 503, 200, 504, None, None]
    sha256 = prepare_data.hashlib.sha256(body).hexdigest()
    assert prepare_data.download(f'{url}/a', 'new/a', sha256).read_bytes() == body
    assert list(dict.fromkeys(handler.asked)) == [f'bytes={k * 2**16}-' for k in range(9)]
    assert prepare_data.download(f'{url}/gone', 'new/a') == Path('new/a')      # there already
    handler.breaks = None
    for left, ranges in ((body, True), (body[:1000], True), (b'', True), (b'x' * 10, False)):
        Path('b.part').write_bytes(left)
        handler.ranges = ranges                                        # False: it starts again each time
        assert prepare_data.download(f'{url}/a', 'b').read_bytes() == body
        Path('b').unlink()

def test_downloads_that_cannot_succeed_say_why(server, tmp_path, monkeypatch, capsys):
    url, handler = server
    handler.files['/a'] = b'abc'
    with prepare_data.locked('a.part', 'x'):
        refuses('another process is downloading a', prepare_data.download, f'{url}/a', 'a')
        without = SimpleNamespace(LOCK_EX=1, LOCK_NB=2, flock=lambda *_: os.stat('any OSError'))
        for module in (None, without):                  # Windows, a file system
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, 'fcntl', module)
                assert prepare_data.download(f'{url}/a', 'a').read_bytes() == b'abc'
                assert capsys.readouterr().out.count('no locks here') == 1
            Path('a').unlink()
    refuses('sha256', prepare_data.download, f'{url}/a', 'a', '0' * 64)
    assert not list(tmp_path.iterdir())                                # what is damaged is not gone on with
    Path('a.part').write_bytes(b'too much')
    refuses('416.*run this again', prepare_data.download, f'{url}/a', 'a')
    Path('a.part').write_bytes(b'ab')
    for wrong, words in (('htp://x', 'htp'), ('x', 'x'), ('http://a..b', 'label'), (f'{url}/x', '404')):
        refuses(words, prepare_data.download, wrong, 'a')
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'socks', None)
        patch.setenv('https_proxy', 'socks5://127.0.0.1:9')
        refuses('SOCKS', prepare_data.download, 'https://x.invalid/a', 'a')
    handler.faults[:] = [None, 503, 503, None, 503]                    # five attempts
    refuses('503.*run this again', prepare_data.download, f'{url}/a', 'a')
    assert prepare_data.download(f'{url}/a', 'a').read_bytes() == b'abc' and handler.asked[-1] == 'bytes=2-'
    for handler.ranges, handler.breaks in ((True, 0), (False, 1)):     # nothing, or the same again, for ever
        refuses('breaks off at .*run this again', prepare_data.download, f'{url}/a', 'b')

@pytest.fixture
def hub(server, monkeypatch):
    """-> (make, whole, Handler): make() prepares a corpus of three files; `whole`: what that must give."""
    pyarrow, (url, handler) = pytest.importorskip('pyarrow'), server
    write = pytest.importorskip('pyarrow.parquet').write_table
    monkeypatch.setattr(prepare_data, 'SMALLEST', 0)
    monkeypatch.setattr(prepare_data, 'HUB', f'{url}/datasets/')
    monkeypatch.setattr(prepare_data, 'CORPORA', {'cosmopedia': ('who/what', 'x/{:03}.parquet', 3)})
    pages = [texts(150, seed=i) for i in range(3)]
    for i, page in enumerate(pages):
        write(pyarrow.table({'id': range(151), 'text': page + [None]}), 'x', row_group_size=40)
        handler.files[f'/datasets/who/what/resolve/main/x/{i:03}.parquet'] = Path('x').read_bytes()
    prepare_data.prepare_parts('whole', pages, 'cosmopedia')

    def make(*words):
        prepare_data.main(['cosmopedia', *words])
        return shards_of('cosmopedia')
    return make, shards_of('whole'), handler

@pytest.mark.parametrize('cores, at_once', [(1, 1), (2, 1000), (7, 13)])
def test_a_corpus_is_the_same_on_any_number_of_cores(hub, monkeypatch, cores, at_once):
    make, whole, handler = hub
    pool = prepare_data.ThreadPoolExecutor
    monkeypatch.setattr(prepare_data, 'ThreadPoolExecutor', lambda: pool(cores))
    monkeypatch.setattr(prepare_data, 'AT_ONCE', at_once)
    assert make() == whole and len(whole) == 9                         # and the parquet files are gone
    assert next(prepare_data.encoded(itertools.repeat('some text')))   # no more than that is in memory

def test_tokens_are_enough_at_the_document_that_reaches_them(hub):
    make, whole, handler = hub
    every = np.concatenate(prepare_data.Dataset('whole').train)
    limit = np.flatnonzero(every == prepare_data.EOS)[200] + 1
    for _ in range(2):
        assert len(make('--tokens', str(limit))) == 6 and len(handler.asked) == 2
    train = np.concatenate(prepare_data.Dataset('cosmopedia').train)
    assert np.array_equal(train, every[:limit])

def test_killed_before_any_rename_it_goes_on_to_the_same_shards(hub):
    make, whole, handler = hub
    replace, left = os.replace, 0

    def dying(*paths):
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        replace(*paths)
    for kill_at in range(12):                                          # a download, val, part, train: thrice
        child = os.fork()
        if child == 0:
            try:
                left, os.replace = kill_at, dying
                make()
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        done = len(list(Path('data/cosmopedia').glob('train_*')))
        handler.asked.clear()
        assert done == kill_at // 4 and make() == whole and len(handler.asked) == 3 - done - (kill_at % 4 > 0)
        shutil.rmtree('data/cosmopedia')

# ------------------------------ The README
def test_what_the_readme_names_exists():
    pages = [REPO / 'README.md', REPO / 'results/README.md']
    assert pages[0].stat().st_size <= 12_288, 'README.md is to be read in an evening: cut something'
    assert f'{grow.budget(grow.Config(), 1595):,}' in pages[0].read_text(encoding='utf-8')
    for page in pages:
        for path in re.findall(r'\]\((?!http|#)([^)#]+)', page.read_text(encoding='utf-8')):
            assert (page.parent / path).exists(), path
    known = {field.name for field in dataclasses.fields(grow.Config)}
    for command in re.findall(r'grow\.py ([^`\n#]*)', pages[0].read_text(encoding='utf-8')):
        for flag in re.findall(r'--([a-z_]+)', command):
            assert flag.removeprefix('no_') in known, command

def test_the_lowest_python_that_the_readme_names_has_all_that_is_used():
    pytest.importorskip('vermin')
    lowest = re.search(r'Python (3\.\d+) or newer', (REPO / 'README.md').read_text(encoding='utf-8'))[1]
    scripts = [path for folder in ('', 'interface', 'results') for path in (REPO / folder).glob('*.py')]
    for older, status in ((lowest, 0), ('3.9', 1)):                    # there is no zip(..., strict=True)
        command = [sys.executable, '-c', 'from vermin.main import main; main()', f'-t={older}-', *scripts]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == status, done.stdout
# ------------------------------ The model: sizes of the paper, to the digit
def test_parameter_counts_of_the_paper(capsys):
    with torch.device('meta'):
        assert grow.count(grow.Block(1024, 32).parameters()) == 12_592_128
        assert grow.count(grow.Head(1024, torch.arange(substrate.VOCAB)).parameters()) == 67_174_400
    assert grow.ledger(config(**PAPER))[-1]['total'] == 181_554_176
    long = grow.ledger(config(**PAPER | dict(layers=16)))
    assert long[-1]['total'] == 269_699_072 and [row['layers'] for row in long] == [3, 6, 9, 12, 15, 16]
    grow.main('--plan --d_model 1024 --heads 32 --context 1024 --device cpu'.split())
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if 'grow ' in line]
    assert [row[6] for row in rows] == [*['104,952,832'] * 3, '180,505,600', '247,614,464']

def test_flops_against_torch_counter():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    c = config(context=32, d_model=64, layers=2)
    model = model_of(c)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(ids(1, 32))
    # The counter takes the full square of attention, the ledger its lower half.
    attention, V = 2 * 2 * 32 * 64 * 2, substrate.VOCAB
    frozen, head = grow.flops_per_token(c, grow.Phase('grow', 1, 2, 0, 1), V)
    assert counter.get_total_flops() == 32 * (frozen + head // 3 + attention // 2)
    assert grow.flops_per_token(c, grow.Phase('grow', 1, 2, 1, 1), V // 2) == (frozen * 2, head // 2)
    grow.enter(model, grow.Phase('lora', 1, 2, 0, 1, rank=4))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.hidden(ids(1, 32)).sum().backward()
    # What comes in at the bottom wants no gradient: nothing goes back through the first qkv and its A.
    lora, _ = grow.flops_per_token(c, grow.Phase('lora', 1, 2, 0, 1, rank=4), V)
    lora -= 2 * 3 * 64 * 64 + 2 * 4 * 64
    assert counter.get_total_flops() == 32 * (lora + 3 * attention // 2)

def test_causality_and_positions():
    model, a = model_of(config()), ids(2, 16)
    b = a.clone()
    b[:, 9:] = ids(2, 7, seed=1)
    with torch.no_grad():
        assert torch.equal(model(a)[:, :9], model(b)[:, :9])
        assert not torch.equal(model(a)[:, 9:], model(b)[:, 9:])
        # One block without positions sees a set.
        model = model_of(config(), blocks=1)
        model.blocks[0].qkv.weight.mul_(20)
        model.blocks[0].out.weight.mul_(20)
        assert not torch.allclose(model(a)[:, -1], model(a[:, [1, 0, *range(2, 16)]])[:, -1], atol=1e-4)
    angles = [5 * 10_000 ** (-k / 8) for k in range(8)]
    assert torch.allclose(model.cos[5], torch.tensor([math.cos(angle) for angle in angles]))
    assert torch.allclose(model.sin[5], torch.tensor([math.sin(angle) for angle in angles]))

def test_rotary_is_a_rotation_by_position():
    D, T = 8, 5
    x = torch.randn(1, 1, T, D)
    angle = torch.outer(torch.arange(T), 10_000.0 ** (-torch.arange(D // 2) / (D // 2)))
    z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.polar(torch.ones_like(angle), angle)
    rotated = grow.rotate(x, angle.cos(), angle.sin())
    assert torch.allclose(rotated, torch.cat((z.real, z.imag), -1), atol=1e-6)

def test_block_against_torch_reference():
    d, heads = 32, 4
    block = grow.Block(d, heads)
    ref = torch.nn.TransformerEncoderLayer(d, heads, 4 * d, dropout=0.0, activation='gelu', batch_first=True,
                                           norm_first=True)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0, 0.1)
        ref.self_attn.in_proj_weight.copy_(block.qkv.weight)
        ref.self_attn.in_proj_bias.zero_()
        ref.self_attn.out_proj.weight.copy_(block.out.weight)
        ref.self_attn.out_proj.bias.zero_()
        for ours, theirs in ((block.up, ref.linear1), (block.down, ref.linear2),
                             (block.norm1, ref.norm1), (block.norm2, ref.norm2)):
            theirs.load_state_dict(ours.state_dict())
    x, one = torch.randn(2, 7, d), torch.ones(7, d // heads // 2)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(7)
    assert torch.allclose(block(x, one, 0 * one), ref(x, src_mask=mask, is_causal=True), atol=1e-5)

@pytest.mark.parametrize('every', [40, 1])              # 1,639 tokens have rows, or all
def test_rows_for_few_tokens_are_an_exact_softmax_over_all(every):
    """Loss and gradients are those of a dense head written out by hand, also where a target has no row."""
    rows = torch.arange(0, substrate.VOCAB, every)
    model = model_of(config(), head_ids=rows)
    weight, bias = torch.zeros(substrate.VOCAB, 32), torch.full((substrate.VOCAB,), grow.UNSEEN)
    weight[rows] = model.head.weight.detach().normal_()
    bias[rows] = model.head.bias.detach().normal_()
    h, targets = torch.randn(24, 32), torch.full((24,), 80)
    targets[:8], targets[8:10] = torch.tensor([0, 280, 280, 65_520, 1, 65_535, 39, 41]), -100
    results = []
    for head in (model.head, lambda h, targets: F.cross_entropy(F.linear(h, weight, bias), targets)):
        for tensor in (h, weight, bias):
            tensor.requires_grad_().grad = None
        loss = head(h, targets)
        (3 * loss).backward()
        results.append((loss, h.grad))
    own, dense = (model.head.weight, model.head.bias), (weight, bias)
    for a, b in (*zip(*results), *((a.grad, b.grad[rows]) for a, b in zip(own, dense))):
        assert torch.allclose(a, b, atol=1e-5) and a.abs().max() > 1e-3
    assert torch.allclose(model.head(h), F.linear(h, weight, bias), atol=1e-5)

def test_rows_are_those_of_the_training_text_and_new_text_adds_some(here, capsys):
    prepare_data.prepare('greek', texts(1200, words='αβγ δεζ ηθι'.split()), 'made up')
    grow.main(flags(out='run', layers=2))
    before, counts = grow.load_model('run'), prepare_data.Dataset('stdlib').counts
    assert before.head.ids.tolist() == np.flatnonzero(counts).tolist() and len(before.head.ids) < 200
    grow.main([*flags(layers=2), '--plan'])
    active = grow.budget(config(), len(before.head.ids))
    assert f'{active:,}' in capsys.readouterr().out
    assert grow.load('run')['state']['history'][-1]['active_params'] == active
    born = grow.GrowingTransformer(config(), before.interface)
    grow.add_rows(born, prepare_data.open_batches(['stdlib'], 0, 1, 16))
    assert not born.head.weight.any() and torch.equal(born.head.ids, before.head.ids)
    frequencies = torch.from_numpy(counts[counts > 0] + 1) / (counts.sum() + substrate.VOCAB)
    assert torch.allclose(born.head.bias.detach().exp(), frequencies.float(), rtol=1e-4)
    grow.main(['--resume', '--out', 'run', '--layers', '3', '--data', 'greek'])
    after = grow.load_model('run').head
    new = set(np.flatnonzero(prepare_data.Dataset('greek').counts)) - set(before.head.ids.tolist())
    assert len(new) > 5 and set(after.ids.tolist()) == new | set(before.head.ids.tolist())
    wider, x = before.head.with_rows(after.ids), torch.randn(3, 32)
    assert torch.allclose(wider(x), before.head(x), atol=1e-6) and len(wider.ids) == len(after.ids)

# ------------------------------ Growth: frozen means frozen, and a block is what it says at birth
def test_identity_blocks_change_nothing_at_birth():
    model, x = model_of(config(birth='identity'), blocks=1), ids(2, 16)
    with torch.no_grad():
        before = model(x)
        model.append(2)
        assert torch.equal(before, model(x))
    other, again = [model_of(config(seed=seed, birth='identity'), blocks=2) for seed in (1, 0)]
    other.append(1), again.append(1)
    a, b, c, d = [blocks[k].qkv.weight for blocks, k in
                  ((model.blocks, 2), (again.blocks, 2), (other.blocks, 2), (model.blocks, 1))]
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, d)
    assert model.blocks[2].up.weight.std().item() == pytest.approx(0.02, rel=0.1)

def test_stacked_blocks_are_copies_of_the_stage_below():
    model = model_of(config(birth='stack'), blocks=0)
    for count, source in ((3, None), (3, [0, 1, 2]), (2, [4, 5])):      # the last stage is smaller
        model.append(count)
        with torch.no_grad():
            for p in model.blocks[-count:].parameters() if source is None else ():
                p.normal_()
        for a, b in zip(source or (), model.blocks[-count:]):
            for p, q in zip(model.blocks[a].parameters(), b.parameters()):
                assert torch.equal(p, q) and p is not q

def test_optimizer_holds_exactly_the_trainable_set():
    c = config(substrate='learned', layers=4, layers_per_stage=2)
    model = model_of(c, blocks=0)
    for phase, interface_trains in zip(grow.phases(c), (True, False)):
        grow.enter(model, phase)
        held = {id(p) for g in grow.groups_of(grow.make_optimizers(model, c, phase)) for p in g['params']}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}
        names = {name for name, p in model.named_parameters() if id(p) in held}
        top = range(phase.depth - phase.trained, phase.depth)
        assert {n.split('.')[1] for n in names if n.startswith('blocks')} == {str(k) for k in top}
        assert {'head.weight', 'head.bias', 'norm.weight', 'norm.bias'} <= names
        assert ('interface.table' in names) == interface_trains

def test_phases_keep_their_tokens_and_the_budget():
    for ratio, lora, after in ((0.5, 'none', []), (2.0, 'interleaved', [2, 3]), (0.001, 'last', [3])):
        c = config(stage_tokens=6400, layers=5, layers_per_stage=2, stage_ratio=ratio, lora=lora)
        rows = grow.ledger(c)
        assert max(row['active'] for row in rows) <= grow.budget(c, substrate.VOCAB)
        grown = [row['tokens'] for row in rows if row['phase'] == 'grow']
        assert grown == [6400, *[max(64, int(6400 * ratio))] * 2]
        assert [(row['stage'], row['tokens']) for row in rows if row['rank']] == [(k, 320) for k in after]
        [mono] = grow.phases(dataclasses.replace(c, monolithic=True))
        assert (mono.depth, mono.trained) == (5, 5) and mono.steps * 64 == sum(row['tokens'] for row in rows)
    with pytest.raises(AssertionError, match='budget'):
        grow.enter(model_of(config(), blocks=0), grow.Phase('grow', 1, 2, 2, 1))

def test_frozen_tensors_keep_their_bytes_over_a_stage(here):
    grow.main(flags(out='run', substrate='unicode'))
    stages = [grow.load(f'run/stage_{k}.pt')['model'] for k in (1, 2, 3)]
    for k, (before, after) in enumerate(zip(stages, stages[1:]), start=1):
        for name, old in before.items():
            frozen = name.startswith('blocks') and int(name.split('.')[1]) < k
            frozen = frozen or name in ('interface.table', 'head.ids')
            assert torch.equal(old, after[name]) == frozen, name
    assert torch.equal(stages[0]['interface.table'], substrate.substrate('unicode', 32).table)

NO_AMP = torch.autocast('cpu', enabled=False)

def test_it_overfits_one_batch_and_clips_gradients():
    c = config(layers=2, layers_per_stage=2, d_model=64, substrate='random')
    model = model_of(c, blocks=0)
    phase, batches = grow.Phase('grow', 1, 2, 2, 20), always_the_batch((ids(4, 16), ids(4, 16, seed=1)))
    grow.enter(model, phase)
    optimizers = grow.make_optimizers(model, c, phase)
    losses = [grow.train_step(model, optimizers, batches, k, c, NO_AMP)[0] for k in range(20)]
    optimizers[0].register_step_pre_hook(lambda *args: losses.append(
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()))
    grow.train_step(model, optimizers, batches, 0, config(clip=1e-9), NO_AMP)
    assert losses.pop() == pytest.approx(1e-9, rel=1e-2)
    assert losses[-1] < 0.5 < 10 < losses[0] and model.scale == 8
    assert model_of(config(), 0).scale == 1             # bits are 0 and 1 already

def exact_muon(monkeypatch):
    """Muon works in bfloat16, which makes steps out of the last bits of gradients: here in float32."""
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.float)

def test_accumulation_equals_one_large_batch(here, monkeypatch):
    exact_muon(monkeypatch)
    for micro_batch in (4, 1, 3):                       # and unequal parts
        grow.main(flags(out=f'of_{micro_batch}', micro_batch=micro_batch, stage_tokens=320, layers=2))
    whole, *others = [grow.load_model(f'of_{micro_batch}').state_dict() for micro_batch in (4, 1, 3)]
    for other in others:
        for name in whole:
            assert torch.allclose(whole[name], other[name], atol=2e-4), name

def test_same_seed_same_run_and_monolithic_sees_the_same_batches(here, monkeypatch):
    seen, original = [], prepare_data.Batches.batch
    monkeypatch.setattr(prepare_data.Batches, 'batch', lambda self, step, rows=slice(None): (
        seen.append(original(self, step, rows)), seen[-1])[1])
    for out, changes in (('a', {}), ('b', {}), ('c', dict(monolithic=True))):
        grow.main(flags(out=out, warmup=4, lr=1e-2, lr_scale_later=0.2, **changes))
    assert same_weights('a', 'b')
    for x, y, z in zip(seen[:30], seen[30:60], seen[60:], strict=True):
        assert torch.equal(x[0], y[0]) and torch.equal(x[0], z[0]) and torch.equal(x[0][:, 1:], x[1][:, :-1])
    rates = [line.split(',')[7] for line in Path('a/log.csv').read_text().split()[1::2]]
    at_end = 0.5                                        # in the last of ten steps, of which two cool down
    assert list(map(float, rates)) == pytest.approx([1e-2 * at_end, *[2e-3 * at_end] * 2], rel=1e-3)

def test_every_group_has_its_rate_and_matrices_alone_decay():
    c = config(lr=1e-2, adam_lr=2e-2, lr_scale_later=0.5, lora_lr=5e-2, weight_decay=0.25, warmup=4,
               lora='last', layers=2, cooldown=0.5)
    model = model_of(c, blocks=0)
    for phase, scale in zip(grow.phases(c), (1, 0.5, 0.5)):
        grow.enter(model, phase)
        optimizers = grow.make_optimizers(model, c, phase)
        groups = [(kind, g) for kind in optimizers for g in kind.param_groups]
        rule = {id(p): (type(kind).__name__, g['lr'], g['weight_decay']) for kind, g in groups
                for p in g['params']}
        found = {name: rule[id(p)] for name, p in model.named_parameters() if id(p) in rule}
        rest, matrix = ('AdamW', 2e-2 * scale, 0), ('Muon', 1e-2 * scale, 0.25)
        want = {'head.weight': rest, 'head.bias': rest, 'norm.weight': rest}
        if phase.rank:
            want |= dict.fromkeys(['blocks.0.qkv.A', 'blocks.1.down.B'], ('AdamW', 5e-2, 0))
            assert len(optimizers) == 1
        else:
            top = f'blocks.{phase.depth - 1}.'
            want |= {top + 'qkv.weight': matrix, top + 'norm1.weight': rest, top + 'up.bias': rest}
        assert found.items() >= want.items()
        for step, factor in ((0, 0.2), (3, 0.8), (4, 1), (12, 1), (15, 0.75), (18, 0.5), (23, 1 / 12)):
            grow.set_rates(optimizers, [3, 5], c, step, 24)
            assert [g['lr'] for _, g in groups] == pytest.approx([3 * factor, 5 * factor])
        for steps, factors in ((6, (1 / 4, 1 / 2, 3 / 4, 1)), (1, [1])):         # no room for a warm-up of 4
            for step, factor in enumerate(factors):
                grow.set_rates(optimizers, [3, 5], c, step, steps)
                assert groups[0][1]['lr'] == pytest.approx(3 * factor)

# ------------------------------ LoRA: within the budget, exact at birth, and gone after the merge
def test_lora_budget_of_the_paper():
    c = config(**PAPER | dict(layers=16, lora='interleaved'))
    rows = grow.ledger(c)
    assert max(row['active'] for row in rows) == 104_952_832 == grow.budget(c, substrate.VOCAB)
    adapted = [row for row in rows if row['rank']]
    assert [row['rank'] for row in adapted] == [384, 256, 192, 153, 144]
    for row in adapted:                                 # one rank more would not fit
        assert row['active'] <= 104_952_832 < row['active'] + 16 * 1024 * row['layers']

def test_lora_against_peft():
    peft = pytest.importorskip('peft')
    block = model_of(config(heads=4), blocks=1).blocks[0]
    other = grow.Block(32, 4)
    other.load_state_dict(block.state_dict())
    grow.add_adapters([block], 4, 'test')
    other = peft.get_peft_model(other, peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(grow.LINEARS)))
    with torch.no_grad():
        for name in grow.LINEARS:
            ours, theirs = getattr(block, name), getattr(other.base_model.model, name)
            ours.B.normal_(0, 0.1)
            theirs.lora_A['default'].weight.copy_(ours.A)
            theirs.lora_B['default'].weight.copy_(ours.B)
        x, one = torch.randn(2, 7, 32), torch.ones(7, 4)
        assert torch.allclose(block(x, one, 0 * one), other(x, one, 0 * one), atol=1e-6)
        grow.merge_adapters([block])
        other = other.merge_and_unload()
        for name in grow.LINEARS:
            assert torch.allclose(getattr(block, name).weight, getattr(other, name).weight, atol=1e-6)

def test_adapters_are_exact_at_birth_and_merge_to_the_same_function():
    model, x = model_of(config()), ids(2, 16)
    names, count = list(model.state_dict()), grow.count(model.parameters())
    with torch.no_grad():
        before = model(x)
        for _ in range(2):                              # twice is harmless
            grow.add_adapters(model.blocks, 3, 'test')
        assert torch.equal(before, model(x)) and grow.count(model.parameters()) == count + 3 * 16 * 32 * 3
        assert model.blocks[0].qkv.A.std().item() == pytest.approx(32**-0.5, rel=0.2)
        for block in model.blocks:
            for name in grow.LINEARS:
                getattr(block, name).B.normal_(0, 0.1)
        trained = model(x)
        assert not torch.allclose(before, trained, atol=1e-3)
        grow.merge_adapters(model.blocks)
        assert torch.allclose(trained, model(x), atol=1e-5)
    assert list(model.state_dict()) == names and grow.count(model.parameters()) == count

# ------------------------------ Experts on one interface
@pytest.fixture(scope='session')
def experts(corpus, tmp_path_factory):
    """A folder with experts a, b (wider) and d on one interface, c on another, and two data sets."""
    folder = tmp_path_factory.mktemp('experts')
    shutil.copytree(corpus / 'data', folder / 'data')
    with inside(folder):
        prepare_data.prepare('other', texts(seed=1, words='one two three four'.split()), 'made up')
        b = dict(seed=2, d_model=48, heads=3, context=8, data='other')
        changed = dict(a=dict(seed=1), b=b, c=dict(seed=3, substrate='random'), d=dict(seed=4))
        for name, changes in changed.items():
            grow.main(flags(out=name, layers=2, stage_tokens=320, length=1, **changes))
    return folder

def test_fused_head_is_the_mean_of_the_logits(experts):
    x, paths = ids(2, 8), [experts / name for name in 'abd']
    with torch.no_grad():
        want = torch.stack([grow.load_model(path)(x) for path in paths]).mean(0)
        merged = grow.merge_experts(paths)
        assert torch.allclose(merged(x), want, atol=1e-5) and merged.config.context == 8
        assert torch.allclose(merged(x, x)[1], F.cross_entropy(want.flatten(0, 1), x.flatten()), atol=1e-4)
        shutil.copytree(paths[0], copy := experts / 'copy')
        copies = grow.merge_experts([paths[0], copy])
        assert torch.allclose(copies(x), grow.load_model(paths[0])(x), atol=1e-5) and not copies.training
    heads = [grow.load_model(path).head.ids.tolist() for path in paths]
    assert merged.head.ids.tolist() == sorted(set(sum(heads, []))) and heads[0] != heads[1]
    assert len({id(e.interface.table) for e in merged.experts}) == 1 and len(merged.blocks) == 6

def test_experts_on_other_interfaces_are_refused_before_any_computing(experts, monkeypatch, capsys):
    monkeypatch.chdir(experts)
    monkeypatch.setattr(grow, 'evaluate', lambda *args: 1 / 0)
    fails(capsys, ['--moe', 'a', 'c', '--device', 'cpu'], 'binary', 'random', 'same --substrate')
    fails(capsys, ['--moe', 'a', 'b', 'a/', '--device', 'cpu'], 'named twice')
    ckpt = grow.load('d')
    for name, size in (('near', 5e-6), ('far', 1e-4)):
        ckpt['model']['interface.table'][7, 7] += size
        torch.save(ckpt, f'{name}.pt')
    grow.merge_experts(['d', 'near.pt'])                # the last bits of another machine
    fails(capsys, ['--moe', 'd', 'far.pt', '--device', 'cpu'], 'far.pt', 'no common interface')

def test_experts_are_compared_on_every_data_set(experts, monkeypatch, capsys):
    monkeypatch.chdir(experts)
    tail = ['--device', 'cpu', '--no-compile', '--dtype', 'float32']
    grow.main(['--moe', 'a', 'b', '--data', 'stdlib', 'other', '--eval_tokens', '256', *tail])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-10:]]
    models = 'merged', 'a', 'b', 'unigram', 'bigram'
    assert [row[:2] for row in rows] == [[d, m] for d in ('stdlib', 'other') for m in models]
    loss = grow.evaluate(grow.load_model('b'), prepare_data.Dataset('other'), config(context=8), NO_AMP)
    assert abs(float(rows[7][2]) - loss) < 1e-3

def test_val_loss_is_weighted_and_in_three_units(here, monkeypatch):
    dataset = prepare_data.Dataset('stdlib')
    want = dict(val_loss=2, perplexity=math.e**2, bits_per_byte=2 / math.log(2) / dataset.bytes_per_token)
    assert grow.in_units(2.0, dataset) == pytest.approx(want)
    other = SimpleNamespace(name='other', bytes_per_token=dataset.bytes_per_token)
    batches = SimpleNamespace(datasets=[dataset, other], weights=[3, 1])
    monkeypatch.setattr(grow, 'evaluate', lambda model, d, c, amp: 1.0 if d is dataset else 1e4)
    val = grow.validate(None, batches, None, None)
    assert val.pop('bits_per_byte') == pytest.approx(2500.75 / math.log(2) / dataset.bytes_per_token)
    assert val == dict(val_loss=2500.75, perplexity=math.inf, val_stdlib=1, val_other=1e4)

def test_evaluation_counts_every_token_once(here):
    model, dataset = model_of(config()), prepare_data.Dataset('stdlib')
    c = config(eval_tokens=7 * 16, micro_batch=3)       # seven sequences in batches of three
    sums = [F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction='sum').item()
            for x, y in prepare_data.val_batches(dataset, 16, 1, 7 * 16)]
    assert len(sums) == 7
    assert grow.evaluate(model, dataset, c, NO_AMP) == pytest.approx(sum(sums) / 112, abs=1e-5)

# ------------------------------ Checkpoints
def same_weights(a, b):
    a, b = grow.load(f'{a}/latest.pt')['model'], grow.load(f'{b}/latest.pt')['model']
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

Crash = type('Crash', (Exception,), {})

def crash_at(monkeypatch, name, at):
    """grow.NAME raises Crash in call number `at`; -> the function that takes it back."""
    original, calls = getattr(grow, name), []

    def crash(*args):
        calls.append(1)
        if len(calls) == at:
            if name == 'merge_adapters':
                original(args[0][:1])                   # half-merged in memory when it dies
            raise Crash
        return original(*args)
    monkeypatch.setattr(grow, name, crash)
    return lambda: monkeypatch.setattr(grow, name, original)

@pytest.fixture(scope='session')
def whole(corpus):
    """The folder of a finished run with a LoRA phase: steps 1-10, 11-20, 21-30 and, with adapters, 31-35."""
    with inside(corpus):
        grow.main(flags(out='whole', lora='last'))
    return corpus / 'whole'

@pytest.mark.parametrize('name, at', [*(('train_step', at) for at in (1, 2, 5, 11, 12, 18, 31, 33, 35)),
                                      ('merge_adapters', 4), ('save', 14), ('validate', 2)])
def test_resume_equals_uninterrupted_bit_for_bit(here, whole, monkeypatch, name, at):
    """Stopped by a crash anywhere, with a checkpoint at every step: in a stage, at an edge, with adapters."""
    undo = crash_at(monkeypatch, name, at if name != 'merge_adapters' else 1)
    with pytest.raises(Crash):
        grow.main(flags(out='cut', save_every=0, lora='last'))
    undo()
    if at == 33:                                        # in the middle: adapters are merged on loading
        assert not any(name.endswith('.A') for name in grow.load_model('cut').state_dict())
    grow.main(['--resume', '--out', 'cut'])
    assert same_weights(whole, 'cut')
    states = [grow.load(run)['state'] for run in (whole, 'cut')]
    histories = [[{**row, 'seconds': 0} for row in state['history']] for state in states]
    assert histories[0] == histories[1] and len(histories[0]) == 4
    logs = [[row.split(',') for row in Path(run, 'log.csv').read_text().split()] for run in (whole, 'cut')]
    assert [row[:4] + row[5:10] for row in logs[0]] == [row[:4] + row[5:10] for row in logs[1]]

def test_a_run_goes_on_with_a_lower_rate(here, whole, monkeypatch):
    undo = crash_at(monkeypatch, 'train_step', 15)
    with pytest.raises(Crash):
        grow.main(flags(out='cut', save_every=0, lora='last'))
    undo()
    grow.main(['--resume', '--out', 'cut', '--lr', '1e-3'])
    logs = [Path(run, 'log.csv').read_text().split()[1:] for run in (whole, 'cut')]
    before, after = (np.array([float(line.split(',')[7] or 0) for line in log]) for log in logs)
    lower = 1e-3 / grow.load(whole)['config']['lr']        # from the second of three stages on; then adapters
    assert np.allclose(after, before * [1, 1, *[lower] * (len(before) - 4), 1, 1], rtol=1e-3)

@pytest.fixture
def own(here, whole):
    """A copy of the finished run in a working folder of its own: ./run."""
    shutil.copytree(whole, here / 'run')
    return here / 'run'

def test_a_finished_run_keeps_its_files(own, capsys):
    files = {path.name: path.read_bytes() for path in own.iterdir()}
    grow.main(['--resume', '--out', 'run'])
    for out in (flags(out='run'), flags(out='run', layers=5, seed=1, substrate='random')):
        fails(capsys, out, 'run', '--resume')
    assert files == {path.name: path.read_bytes() for path in own.iterdir()}
    os.remove('run/latest.pt')                          # what is left is not written over either
    fails(capsys, flags(out='run'), 'run', 'another --out')
    fails(capsys, ['--resume', '--out', 'run'], 'run/latest.pt')

def test_growing_further_is_resuming_with_more_layers(here, monkeypatch, capsys):
    prepare_data.prepare('other', texts(1200, words='αβγ δεζ ηθι'.split()), 'made up')
    for out, layers in (('run', 3), ('at_once', 5)):
        grow.main(flags(out=out, layers=layers))
    shutil.copytree('run', 'mixed')
    shutil.copytree('run', 'unharmed')
    grow.main(['--resume', '--out', 'run', '--layers', '5'])
    assert same_weights('run', 'at_once')
    undo = crash_at(monkeypatch, 'train_step', 15)
    more = ['--resume', '--out', 'mixed', '--layers', '5', '--data', 'other']
    with pytest.raises(Crash):
        grow.main([*more, '--save_every', '0'])
    undo()
    grow.main(more)
    grow.main([*more[:2], 'unharmed', *more[3:]])
    assert same_weights('unharmed', 'mixed')            # rows for new tokens, stopped and resumed
    old, new = grow.load('run/stage_3.pt'), grow.load('mixed')
    assert [row['layers'] for row in new['state']['history']] == [1, 2, 3, 4, 5]
    for name, value in old['model'].items():
        assert torch.equal(value, new['model'][name]) or name.startswith(('head', 'norm'))
    fails(capsys, ['--resume', '--out', 'run', '--layers', '4'], '--layers', 'what has begun stays')
    torch.save(old | dict(state=old['state'] | dict(phase=2, step=3)), 'run/latest.pt')
    fails(capsys, ['--resume', '--out', 'run', '--data', 'other'], '--data other', 'between two')
    fails(capsys, ['--resume', '--out', 'run', '--layers', '2'], '--layers 2')
    fails(capsys, ['--resume', '--out', 'run', '--d_model', '64'], '--d_model', '--resume', status=2)

def test_load_model_and_sampling(here, monkeypatch, capsys):
    np.save('table.npy', np.random.default_rng(0).standard_normal((substrate.VOCAB, 32)).astype('float32'))
    grow.main(flags(out='run', substrate='table.npy', stage_tokens=64))
    os.remove('table.npy')                              # a trained model never makes its interface anew
    model, x = grow.load_model('run'), ids(2, 16)
    logits, (none, loss) = model(x), model(x, x)
    assert logits.shape == (2, 16, substrate.VOCAB) and none is None and not model.training
    assert torch.allclose(loss, F.cross_entropy(logits.flatten(0, 1), x.flatten()), atol=1e-4)
    assert 'in mid-training' not in capsys.readouterr().out
    for text in ('', '\ud83d', 'Привет'):
        grow.main(['--sample', text, '--out', 'run', '--length', '9', '--device', 'cpu'])
    assert 'Привет' in capsys.readouterr().out

def test_sampling_obeys_its_flags():
    model = model_of(config())

    def said(prompt='x', **changes):
        return grow.sample(model, prompt, config(length=20, **changes), contextlib.nullcontext())
    usual = said(top_k=1000)
    assert usual == said(top_k=1000) and usual != said(top_k=1000, seed=1)
    assert said(top_k=1) == said(top_k=1, seed=2) == said(top_k=10**6, temperature=1e-9)
    with torch.no_grad():
        model.head.bias[[substrate.EOS, ord('y')]] = torch.tensor([50.0, 40.0])
    assert said() == '</s>'
    seen, hidden = [], model.hidden
    model.hidden = lambda idx: seen.append(idx.tolist()) or hidden(idx)
    said('0' * 90 + '1' * 16)
    assert seen == [[[ord('1')] * 16]]                  # the newest context, no more

# ------------------------------ Several processes
WORKER = '''
import os, signal, sys
sys.path.insert(0, {repo!r})
import grow
grow.torch.Tensor.bfloat16 = grow.torch.Tensor.float
original, calls = grow.train_step, []
def step(*args):
    calls.append(1)
    if len(calls) == {at}:
        {what}
    return original(*args)
grow.train_step = step
grow.main()
'''

def torchrun(argv, what='pass', at=0):
    """grow.main(argv) in two processes; `what` happens in each before step `at`. -> status, output, errors"""
    Path('worker.py').write_text(WORKER.format(repo=str(REPO), what=what, at=at))
    run = [sys.executable, *'-m torch.distributed.run --standalone --nproc_per_node 2 worker.py'.split()]
    done = subprocess.run([*run, *argv], capture_output=True, text=True, timeout=120,
                          env=os.environ | dict(OMP_NUM_THREADS='1'))
    return done.returncode, done.stdout, done.stderr

def close(a, b, tolerance=1e-5):
    """Two runs end alike: log, but for speed and time, history and weights. AdamW and Muon make steps of full
    size out of the last bits of tiny gradients, so that weights are compared as whole tensors."""
    logs, (a, b) = [Path(run, 'log.csv').read_text().splitlines() for run in (a, b)], map(grow.load, (a, b))
    for x, y in zip(*([line.split(',') for line in log[1:]] for log in logs), strict=True):
        assert x[:4] == y[:4] and x[7:10] == y[7:10]
        assert all(u == v or abs(float(u) - float(v)) <= 2e-5 for u, v in zip(x[5:7], y[5:7])), (x, y)
    for x, y in zip(a['state']['history'], b['state']['history'], strict=True):
        assert x['phase'] == y['phase'] and abs(x['val_loss'] - y['val_loss']) <= tolerance, (x, y)
    for name, tensor in a['model'].items():
        difference = (tensor - b['model'][name]).float()     # `ids` are whole numbers
        assert difference.norm() <= 300 * tolerance * (1e-3 + tensor.float().norm()), name

def test_two_processes_train_like_one(here, monkeypatch):
    """Stages and LoRA phases, then one more on a text that adds rows to the head; each process adds up two
    micro-batches before gradients are averaged."""
    exact_muon(monkeypatch)
    grow.main(flags(out='one', lora='interleaved'))
    status, text, error = torchrun(flags(out='two', micro_batch=1, lora='interleaved'))
    assert status == 0 and text.count('--- sample') == 1, error
    prepare_data.prepare('other', texts(words='JUST UPPER CASE'.split()), 'made up')
    before, more = len(grow.load_model('one').head.ids), '--resume --layers 4 --data other --out'.split()
    grow.main([*more, 'one'])
    status, _, error = torchrun([*more, 'two'])
    assert status == 0 and before < len(grow.load_model('two').head.ids), error
    close('one', 'two')

@pytest.mark.parametrize('what, words', [
    ('raise grow.torch.OutOfMemoryError("CUDA out of memory")', ['error: out of memory', '--micro_batch']),
    ('args[0].module.head.bias.data.fill_(float("nan"))', ['error: loss nan', 'step 13', 'latest.pt'])])
def test_a_process_that_ends_early_ends_the_others(here, what, words):
    status, _, error = torchrun(flags(out='run', save_every=0, layers=2), f'if grow.RANK == 1: {what}', at=13)
    assert status == 1 and all(word in error for word in words), error
    assert grow.load('run')['state']['global_step'] == 12

# ------------------------------ Compilation
def test_ten_stages_compile_without_falling_back_to_eager():
    """Growing recompiles, but every block of every stage runs compiled: dynamo counts what it gave up on."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, counters = model_of(config(), blocks=0), torch._dynamo.utils.counters
    for phase in grow.phases(config(layers=10)):
        grow.enter(model, phase)
        grow.compile_model(model)
        for part in (*model.blocks, model.head):
            part.compile(dynamic=False, backend='aot_eager')
        model(ids(1, 16), ids(1, 16))[1].backward()
    assert not counters['graph_break'] and 1 < counters['stats']['unique_graphs'] < 12
    assert torch._dynamo.config.fail_on_recompile_limit_hit and torch._dynamo.config.recompile_limit > 8

@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler')
def test_compiled_run_equals_eager(here, monkeypatch, capsys):
    for out, compiled in (('eager', False), ('compiled', True)):
        grow.main(flags(out=out, stage_tokens=64, layers=2, compile=compiled))
        assert out in capsys.readouterr().out.partition('\n')[0]
    a, b = (grow.load(out)['state']['history'][-1]['val_loss'] for out in ('eager', 'compiled'))
    assert abs(a - b) < 1e-3
    monkeypatch.setattr(torch, 'compile', lambda *args, **kwargs: 1 / 0)
    c = config(compile=True)
    grow.set_up(c)
    assert c.compile is False and 'no compiler works here' in capsys.readouterr().out
    fails(capsys, flags(out='run', compile=True), '--compile cannot be obeyed', '--no-compile')

# ------------------------------ Mistakes of users
WRONG = [
    '--layers 0', '--layers x', '--layers -3', '--lr nan', '--lr inf', '--stage_tokens 0', '--temperature 0',
    '--batch_tokens 1.5', '--seed -1', '--birth random', '--head tied', '--device tpu', '--substrate runes',
    '--substrate binary --d_model 40 --heads 4', '--d_model 30 --heads 4', '--grow_from x', '--resume --plan',
    '--layers 3 --sample=', '--sample x --resume', '--resume --d_model 64', '--moe a b --layers 3']

@pytest.mark.parametrize('words', WRONG)
def test_wrong_command_lines_end_in_one_sentence(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ('download', 'prepare_stdlib'):         # whoever gets that far has failed
        monkeypatch.setattr(prepare_data, name, None)
    fails(capsys, words.split(), words.split()[0].lstrip('-').partition('_')[0], status=2)
    assert not list(tmp_path.iterdir())

def test_missing_things_are_named(here, capsys):
    for changes, words in ((dict(data='nothing'), 'prepare_data.py'), (dict(substrate='no.npy'), 'no.npy')):
        fails(capsys, flags(out='run', **changes), words)
    fails(capsys, flags(out='run', data='stdlib:x'), 'stdlib:x', 'weight', status=2)
    Path('file').touch()
    fails(capsys, flags(out='file'), 'file is a file', 'another --out')
    fails(capsys, ['--sample', 'x', '--out', 'nowhere'], 'nowhere')
    fails(capsys, ['--sample', 'x'], 'out/')
    if not torch.cuda.is_available():
        fails(capsys, flags(out='run', device='cuda'), 'no cuda', '--device cpu')
    for name in ('out/001-old', 'out/006'):             # a copy of a run is no number
        shutil.copytree('data', name)
    grow.main([*flags(stage_tokens=64, layers=1, length=1), '--plan', '--no-plan'])
    assert Path('out/007/latest.pt').exists()

def test_damaged_checkpoints_are_refused(own, capsys):
    whole, good, rng = (own / 'latest.pt').read_bytes(), grow.load('run')['model'], random.Random(0)
    others = {'nanogpt.pt': {'model': {}, 'iter_num': 3, 'config': {}}, 'list.pt': [torch.zeros(3)],
              'name.pt': {'model': {}, 'config': 'a.yaml'}, 'none.pt': {'config': None},
              'tokenizer.pt': grow.load('run') | dict(tokenizer='another'),
              'nan.pt': grow.load('run') | dict(model=good | {'norm.bias': torch.full((32,), math.nan)})}
    for name, content in others.items():
        torch.save(content, name)
        fails(capsys, ['--sample', 'x', '--out', name], name)
    for wrong in ({'norm.bias': torch.ones(31)}, {'more': torch.ones(1)}, {'head.ids': good['head.ids'][1:]}):
        torch.save(grow.load('run') | dict(model=good | wrong), 'wrong.pt')
        fails(capsys, ['--sample', 'x', '--out', 'wrong.pt'], 'wrong.pt does not fit', 'damaged, or')
    found = 0
    for damage in (b'', whole[:1000], whole[:-50], whole[1:], (own / 'log.csv').read_bytes(),
                   *(flipped(whole, rng) for _ in range(12))):
        (own / 'latest.pt').write_bytes(damage)
        try:                                            # a bit between the archive's members does no harm
            assert all(torch.equal(t, good[name]) for name, t in grow.load('run')['model'].items())
        except substrate.UserError:
            fails(capsys, ['--resume', '--out', 'run'], 'latest.pt')
            found += 1
    assert found > 13

class Payload:
    """What unpickling it does is to make a folder."""
    def __reduce__(self):
        return os.mkdir, ('ran',)

def test_code_in_a_file_is_not_run(own, capsys):
    torch.save(grow.load('run') | {'state': Payload()}, 'run/latest.pt')
    fails(capsys, ['--sample', 'x', '--out', 'run'], 'latest.pt')
    torch.save({'weight': torch.zeros(substrate.VOCAB, 32), 'more': Payload()}, 'table.pt')
    refuses('table.pt', substrate.substrate, 'table.pt', 32)
    assert not Path('ran').exists()

@pytest.mark.parametrize('number', [math.nan, math.inf])
def test_a_number_that_is_not_finite_moves_nothing(here, capsys, monkeypatch, number):
    original, models = grow.train_step, []

    def poison(model, optimizer, batches, step, *args):
        if step == 5:
            models.append((model, [p.clone() for p in model.parameters()]))
            if number == math.inf:                      # the loss stays finite
                model.norm.weight.register_hook(lambda g: g * number)
            else:
                model.head.bias.data[7] = models[0][1][-1][7] = number
        return original(model, optimizer, batches, step, *args)
    monkeypatch.setattr(grow, 'train_step', poison)
    words = 'loss nan' if math.isnan(number) else 'gradient norm'
    fails(capsys, flags(out='run', save_every=0), words, 'step 6', 'run/latest.pt')
    [(model, before)] = models
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, model.parameters()))
    last = grow.load('run/latest.pt')
    assert last['state']['global_step'] == 5 and all(t.isfinite().all() for t in last['model'].values())

def test_a_full_disk_keeps_the_last_good_checkpoint(here, whole, capsys, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))         # as full as a disk can be
    try:
        fails(capsys, flags(out='run'), 'run/latest.pt', 'could not be written')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(Path('run').glob('*.pt'))           # the run is free to start
    original, calls = torch.save, []

    def full(content, path):
        calls.append(1)
        if len(calls) == 4:
            Path(path).write_bytes(b'half of it')
            raise RuntimeError('PytorchStreamWriter failed writing file')
        original(content, path)
    monkeypatch.setattr(torch, 'save', full)
    words = flags(out='run', save_every=0, lora='last')
    fails(capsys, words, 'latest.pt', 'could not be written')
    monkeypatch.setattr(torch, 'save', original)
    assert grow.load('run')['state']['global_step'] == 2
    Path('run/.latest.pt.tmp').write_bytes(b'half of it')              # as a kill leaves it
    grow.main(['--resume', '--out', 'run'])
    assert same_weights('run', whole) and not list(Path('run').glob('.*.tmp'))

def test_out_of_memory_is_one_sentence(here, capsys, monkeypatch):
    monkeypatch.setattr(grow, 'train_step', lambda *args: torch.empty(2**60))
    fails(capsys, flags(out='run'), 'out of memory', '--micro_batch')

def test_other_data_under_a_run_is_refused(own, capsys):
    ckpt = grow.load('run/stage_1.pt')
    torch.save(ckpt, 'run/latest.pt')
    shutil.rmtree('data/stdlib')
    prepare_data.prepare('stdlib', texts(seed=6), 'made up')
    fails(capsys, ['--resume', '--out', 'run'], 'other text', 'stdlib')

def test_two_runs_on_one_folder(here, capsys):
    with prepare_data.locked('run/.lock0', 'training'):
        fails(capsys, flags(out='run'), 'another process is writing to run')

@pytest.mark.parametrize('number, often, step, words', [
    (signal.SIGINT, 1, 13, 'stopped: go on with --resume --out run'), (signal.SIGINT, 2, 10, 'interrupted'),
    (signal.SIGTERM, 1, 13, 'stopped: go on with --resume --out run')])
def test_ctrl_c_once_writes_a_checkpoint(here, whole, monkeypatch, capsys, number, often, step, words):
    original, calls = grow.train_step, []

    def interrupt(*args):
        calls.append(1)
        for _ in range(often if len(calls) == 13 else 0):
            os.kill(os.getpid(), number)
        return original(*args)
    monkeypatch.setattr(grow, 'train_step', interrupt)
    with pytest.raises(SystemExit) as end:
        grow.main(flags(out='run', lora='last'))
    assert end.value.code == 128 + number and grow.load('run')['state']['global_step'] == step
    assert capsys.readouterr().err == words + '\n'
    grow.load_model('run')
    assert ('run was saved in mid-training' in capsys.readouterr().out) == (step == 13)
    grow.main(['--resume', '--out', 'run'])
    assert same_weights('run', whole)
    assert {n: signal.getsignal(n) for n in grow.SIGNALS} == grow.SIGNALS

def test_a_pipe_that_nobody_reads(tmp_path):
    script = 'import substrate\nsubstrate.cli(lambda argv: print("a line\\n" * {}))()'
    for lines in (1, 100_000):                          # what breaks is the flush, or the write
        command = shlex.join([sys.executable, '-c', script.format(lines)])
        for end, status in (('| true; exit ${PIPESTATUS[0]}', 141), ('>&-', 0)):
            words = ['bash', '-c', f'{command} {end}']
            done = subprocess.run(words, cwd=REPO, capture_output=True, timeout=120)
            assert done.returncode == status and not done.stderr, (end, done)

# ------------------------------ On a GPU: pytest -m cuda -s
def marked_cuda(test):
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')(test))

@marked_cuda
def test_cuda_uses_the_flash_kernel():
    c = config(d_model=64, context=128, device='cuda', dtype='bfloat16')
    amp, model = grow.set_up(c), model_of(c, head_ids=torch.arange(0, substrate.VOCAB, 40)).cuda()
    with torch.profiler.profile() as profile, amp:
        model(ids(2, 128).cuda(), ids(2, 128).cuda())[1].backward()
    ran = {event.key for event in profile.key_averages()}
    assert {'aten::_flash_attention_forward', 'aten::_flash_attention_backward'} <= ran, sorted(ran)

@marked_cuda
def test_cuda_twenty_steps_at_paper_size():
    c = config(**PAPER | dict(substrate='random', device='cuda', dtype='bfloat16', compile=True, lr=6e-4,
                              micro_batch=16, batch_tokens=16 * 1024, adam_lr=6e-4))
    amp, model = grow.set_up(c), model_of(c, blocks=0).cuda()
    phase = grow.Phase('grow', 3, 9, 3, 20)
    grow.enter(model, phase)
    grow.compile_model(model)
    optimizers = grow.make_optimizers(model, c, phase)
    batches = always_the_batch((ids(16, 1024), ids(16, 1024, seed=1)))
    losses = [grow.train_step(model, optimizers, batches, k, c, amp)[0] for k in range(5)]
    start = time.perf_counter()
    losses += [grow.train_step(model, optimizers, batches, k, c, amp)[0] for k in range(20)]
    speed = 20 * c.batch_tokens / (time.perf_counter() - start)
    print(torch.cuda.get_device_name(), f'{speed:,.0f} tokens/s', torch.cuda.max_memory_allocated(), 'bytes')
    assert losses[-1] < losses[0]

# ------------------------------ Evaluation
class Knowing:
    """A model that goes on with logits(text so far), {character: logit}, 0 for all others."""
    def __init__(self, logits, context=512):
        self.logits, self.config, self.seen = logits, type('Config', (), dict(context=context)), []
        self.head, self.parameters = lambda h: h, lambda: iter([torch.zeros(1)])

    def hidden(self, idx):
        self.seen.append(idx[0].tolist())
        text = substrate.tokenizer().decode(self.seen[-1])
        h = torch.zeros(*idx.shape, substrate.VOCAB)
        for t in (-2, -1):
            for character, logit in self.logits(text[:len(text) + t + 1]).items():
                h[0, t, ord(character)] = logit
        return h

def always(characters, context=512):
    return Knowing(lambda text: {character: 10.0 - k for k, character in enumerate(characters)}, context)

def question(key='C', letters='ABCD', prompt='0123456789 Answer:'):
    return eval_mmlu.Question('anatomy', 0, prompt, letters, key)

SUBJECTS = dict(anatomy='ABCC', virology='CDA', philosophy='BCCCD')
EVERY = [(subject, i) for subject in sorted(SUBJECTS) for i in range(len(SUBJECTS[subject]))]
ROW = dict(question=dict(stem='how?', choices=[dict(text=x, label=x.upper()) for x in 'abcd']), answerKey='D')

@pytest.fixture
def mmlu(tmp_path):
    """A small MMLU: three subjects, the keys of which are in SUBJECTS; and what macOS leaves in archives."""
    folder = tmp_path / 'questions'
    for split in ('test', 'dev'):
        (folder / split).mkdir(parents=True)
        for subject, keys in SUBJECTS.items():
            text = '\n'.join(f'"{subject} {split} {i}, or\n""none""?",one,None,"a, b",{i},{key}'
                             for i, key in enumerate(keys))
            (folder / split / f'{subject}_{split}.csv').write_text('\ufeff' + text, encoding='utf-8')
    (folder / 'test/._anatomy_test.csv').write_bytes(b'\0\5')
    shutil.copytree(folder / 'test', folder / 'auxiliary_train')
    return folder

def write_squad(path, answers):
    asked = [dict(question=f'{i}?', answers=a and [dict(text=t) for t in a]) for i, a in enumerate(answers)]
    path.write_text(json.dumps(dict(data=[dict(paragraphs=[dict(context='c', qas=asked)])])))

def evaluate(target, *argv):
    eval_mmlu.main([*map(str, argv), '--device', 'cpu', '--dtype', 'float32'])
    return json.loads(Path('run', target).read_text(encoding='utf-8'))

def test_prompts_are_the_papers(mmlu):
    questions = eval_mmlu.read_task('mmlu', mmlu)
    prompt = 'Question: anatomy test 0, or\n"none"?\nOptions: A) one B) None C) a, b D) 0\nAnswer:'
    assert questions[0][2:] == (prompt, 'ABCD', 'A') and [q[:2] for q in questions] == EVERY
    two = eval_mmlu.read_task('mmlu', mmlu, shots=2)[-1].prompt.split('\n\n')
    assert [part.partition('\nAnswer:')[2] for part in two] == [' C', ' D', '']
    assert [part[10:25] for part in two] == ['virology dev 0,', 'virology dev 1,', 'virology test 2']

def test_the_other_tasks_are_read(tmp_path):
    row = dict(question='why?', choices=dict(text=['x', 'y', 'z'], label=['1', '2', '3']), answerKey='2')
    (tmp_path / 'ARC-Easy-val.jsonl').write_text(f'\ufeff{json.dumps(row)}\n{json.dumps(ROW)}\n \n', 'utf-8')
    (tmp_path / 'ARC-Easy-test.jsonl').write_text('never read')
    first, second = eval_mmlu.read_task('arc_easy', tmp_path)
    assert first[2:] == ('Question: why?\nOptions:\nA) x\nB) y\nC) z\nAnswer:', 'ABC', 'B')
    assert second.prompt.endswith('\nD) d\nAnswer:') and second[1:2] + second[3:] == (1, 'ABCD', 'D')
    answers = [['Bo', 'Bo B'], [], ['far away and more'], None, [None], ['12345678'], ['123456789']]
    write_squad(tmp_path / 'dev-v2.0-half.json', answers + [['x']] * 300)
    first, second, *others = eval_mmlu.read_task('squad', tmp_path)
    assert first == ('squad', 0, 'Context: c\nQuestion: 0?\nAnswer:', '', ['Bo', 'Bo B'])
    assert second[1:3] == (1, 'Context: c\nQuestion: 5?\nAnswer:') and len(others) == 254
    assert others[0].prompt == 'Context: c\nQuestion: 7?\nAnswer:'

def test_archives_are_downloaded_and_read_where_they_lie(mmlu, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(eval_mmlu, 'download', lambda *args: asked.append(args) or tmp_path / args[1].name)
    monkeypatch.chdir(tmp_path)
    Path('dev_rand_split.jsonl').write_text(json.dumps(ROW))
    for kind in ('Easy', 'Challenge'):
        path = Path(f'arc/ARC-V1/ARC-{kind}/ARC-{kind}-Dev.jsonl')
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(ROW).replace('how?', kind))
    shutil.make_archive('arc', 'zip', 'arc')
    shutil.make_archive('mmlu', 'tar', 'questions')
    assert eval_mmlu.read_task('mmlu', None, 3) == eval_mmlu.read_task('mmlu', mmlu, 3)
    for task, stem in (('arc_easy', 'Easy'), ('arc_challenge', 'Challenge'), ('csqa', 'how?')):
        [q] = eval_mmlu.read_task(task)
        assert q.prompt.startswith(f'Question: {stem}\n') and (q.subject, q.key) == (task, 'D')
    assert asked[0] == (eval_mmlu.MMLU_URL, Path('data/mmlu.tar'), eval_mmlu.MMLU_SHA256)
    Path('arc.zip').write_bytes(b'')
    refuses('arc.zip cannot be read', eval_mmlu.read_task, 'arc_easy', 'arc.zip')

def test_likelihood_and_letter_by_hand():
    model = Knowing(lambda text: {' ': 3.0} if text.endswith(':') else {'B': 2.0, 'C': 1.0})
    row = eval_mmlu.score_choice(model, question('B'))
    space, letter = 3 - math.log(math.e**3 + 65_535), math.log(math.e**2 + math.e + 65_534)
    assert row['logps'] == pytest.approx([space + x - letter for x in (0, 2, 1, 0)], abs=1e-4)
    assert (row['key'], row['choice'], row['letter'], row['scores']['letter']) == ('B', 'B', ' ', 0)
    row = eval_mmlu.score_choice(always('EC'), question(letters='ABC'))        # E is no option
    assert (row['choice'], row['letter']) == ('C', 'E')
    assert row['scores'] == dict(likelihood=1, letter=0, chance=1 / 3, cut=0)

def test_long_prompts_are_cut_from_the_left():
    start = substrate.tokenizer().encode_ordinary(question().prompt)
    for context, cut in ((len(start), 0), (len(start) - 3, 1)):
        model = always('y', context)
        row = eval_mmlu.score_open(model, question(['y'], ''))
        assert model.seen[:2] == [start[-context:], [*start, ord('y')][-context:]]
        assert row['generation'] == 'y' * 16 and row['scores']['cut'] == cut

def test_exact_match_and_f1_by_hand():
    assert eval_mmlu.words('The  Duke, of a York, an!') == ['duke', 'of', 'york']
    assert eval_mmlu.f1('the Duke of York', 'Duke of Kent and York') == pytest.approx(2 / (5 / 3 + 3 / 3))
    assert eval_mmlu.f1('the', 'a') == 1 and eval_mmlu.f1('the', 'Rome') == eval_mmlu.f1('Rome', 'the') == 0
    said = f'\nBo B.\nRome{chr(substrate.EOS)}'         # an answer, the next line, and the end
    model = Knowing(lambda text: {said[len(text) - len(question().prompt)]: 1.0})
    rows = [eval_mmlu.score_open(model, question(answers, ''))
            for answers in (['Bo', 'bo b'], ['Rome'], ['B. Bo Ng'], ['Oslo'])]
    assert rows[0]['generation'] == said[:-1] and rows[0]['answers'] == ['Bo', 'bo b']
    assert [[row['scores'][name] for name in ('hit', 'exact_match', 'f1')] for row in rows] == [
        [1, 1, 1], [1, 0, 0], [0, 0, pytest.approx(0.8)], [0, 0, 0]]

def test_a_model_that_prefers_c_scores_the_share_of_c(mmlu):
    questions = eval_mmlu.read_task('mmlu', mmlu)
    lengths = {len(substrate.tokenizer().encode_ordinary(q.prompt + ' ')) for q in questions}
    model = always('C', context=sorted(lengths)[-2])    # the longest are those of philosophy
    rows = [dict(subject=q.subject, **eval_mmlu.score_choice(model, q)) for q in questions]
    summary = eval_mmlu.summarise(rows)
    assert summary['total']['likelihood'] == summary['total']['letter'] == pytest.approx(
        dict(mean=1 / 2, stderr=1 / 48**0.5)) and summary['total']['chance'] == dict(mean=0.25, stderr=0)
    assert summary['macro']['letter'] == pytest.approx((2 / 4 + 1 / 3 + 3 / 5) / 3)
    assert {name: (x['n'], round(x['letter']['mean'] * x['n'])) for name, x in summary['groups'].items()} == {
        'anatomy': (4, 2), 'virology': (3, 1), 'philosophy': (5, 3), 'other': (7, 3), 'humanities': (5, 3),
        'whole prompts': (7, 3), 'cut prompts': (5, 3)}
    assert eval_mmlu.cells(summary['total'])['likelihood'] == '50.00 ± 14.43'

def test_eval_writes_a_row_for_every_question(own, mmlu, capsys):
    saved, out = evaluate('eval_mmlu.json', 'run', '--data', mmlu), capsys.readouterr().out
    assert [(row['subject'], row['index']) for row in saved['rows']] == EVERY
    assert list(saved['settings']['checkpoints'].values()) == [substrate.sha256_of('run/latest.pt')]
    assert '12 questions, 3 subject(s)' in out and '12 were found' in out and '25.00 ± 0.00' in out
    for row, q in zip(saved['rows'], eval_mmlu.read_task('mmlu', mmlu)):      # against all logits at once
        idx = torch.tensor([substrate.tokenizer().encode_ordinary(q.prompt + ' ')[-16:]])
        [logp] = grow.load_model('run')(idx).log_softmax(-1)
        expected = [(logp[-2, ord(' ')] + logp[-1, ord(letter)]).item() for letter in 'ABCD']
        assert row['logps'] == pytest.approx(expected, abs=2e-5)
    few = evaluate('eval_mmlu_shots_2_limit_6.json', 'run', '--data', mmlu, '--limit', 6, '--shots', 2)
    rows = few['rows']
    assert [(row['subject'], row['index']) for row in rows] == EVERY[::2]
    write_squad(mmlu / 'dev-v2.0.json', [['x']])
    assert 'f1' in evaluate('eval_squad.json', 'run', '--task', 'squad', '--data', mmlu)['summary']['total']
    shutil.copytree('run', 'other')
    shutil.copytree('run', 'third')
    others = [eval_mmlu.targets(['run', name], 'mmlu')[0][1] for name in ('third', 'other')]
    target = others.pop()
    assert others != [target]
    merged = evaluate(target.name, 'run', 'other', '--data', mmlu)
    assert (saved['summary']['layers'], merged['summary']['layers'], len(merged['rows'])) == (3, 6, 12)

def test_every_stage_is_scored_by_depth(own, mmlu, capsys):
    shutil.copy('run/stage_1.pt', 'run/stage_10.pt')
    evaluate('eval_mmlu_stage_10.json', 'run', '--data', mmlu, '--all_stages')
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-5:]]
    stages = dict(zip(('1', '2', '3', '3_lora', '10'), '12331'))
    assert lines == [[f'run/eval_mmlu_stage_{k}.json', n] for k, n in stages.items()]

@pytest.mark.parametrize('argv, words, status', [
    ('--data nowhere', 'nowhere has no questions of mmlu: --data', 1), ('--shots -1', '--shots', 2),
    ('--task arc_easy', 'ARC-Easy-', 1), ('--shots 5', 'anatomy_dev.csv has 4 examples', 1),
    ('--shots 1 --task csqa', '0 examples', 1), ('--limit 0', '--limit', 2), ('nil', 'nil does not exist', 1),
    ('--task csqa', 'dev_rand_split.jsonl, line 2 cannot be read', 1), ('run/latest.pt', 'named twice', 1),
    ('--task squad', 'dev-v2.0.json cannot be read', 1), ('x --all_stages', '--all_stages', 2)])
def test_mistakes_are_named(argv, words, status, own, mmlu, capsys):
    (mmlu / 'dev_rand_split.jsonl').write_text(json.dumps(ROW) + '\n{"question": 3}\n')
    (mmlu / 'dev-v2.0.json').write_text('{"data": [{}]}')
    fails(capsys, ['run', '--data', str(mmlu), *argv.split()], words, status=status, main=eval_mmlu.main)

def test_bad_lines_of_csv_are_named(mmlu):
    for damage in (b'q,1,2,3,D', b'q,1,2,3,4,5,D', b'q,1,2,3,4,AB', b'q\xff,1,2,3,4,D', b'"q"x,1,2,3,4,D'):
        (mmlu / 'test/anatomy_test.csv').write_bytes(b'"fine,\nindeed",1,2,3,4,A\n' + damage + b'\n')
        refuses('anatomy_test.csv, line 3', eval_mmlu.read_task, 'mmlu', mmlu)

# ------------------------------ Pictures of results/
def test_the_pictures_are_drawn(here, monkeypatch, capsys):
    pytest.importorskip('matplotlib')
    monkeypatch.syspath_prepend(REPO / 'results')
    import pictures
    grow.main(flags(out='run', lora='interleaved', layers=2))
    for argv in (['idea'], ['loss', 'run', 'run'], ['show', 'the cat']):
        pictures.main([*argv, '--out', 'new/a.png'])
        assert Path('new/a.png').read_bytes()[:4] == b'\x89PNG'
        os.remove('new/a.png')
    fails(capsys, ['loss', 'nowhere'], 'nowhere/log.csv', main=pictures.main)
