"""Tests of growing transformers: `pytest` runs all of them on a CPU in a few minutes; those marked cuda need a GPU."""

import collections
import contextlib
import dataclasses
import errno
import gzip
import http.server
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
import zipfile
from pathlib import Path

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
TINY = dict(layers=3, layers_per_stage=1, d_model=32, heads=2, context=16, substrate='binary', stage_tokens=640, batch_tokens=64, micro_batch=4,
            lr=1e-2, head_lr=1e-2, stage_ratio=1.0, lr_later=1e-2, head_lr_later=1e-2, eval_tokens=256, save_every=100, device='cpu', dtype='float32', compile=False, head_birth='random', lora='none', lora_tokens=320)
PAPER = dict(d_model=1024, heads=32, context=1024)


def config(**changes):
    return grow.Config(**TINY | changes)


def flags(**changes):
    """A command line of the tiny run."""
    words = []
    for name, value in (TINY | changes).items():
        words += [f'--{name}' if value else f'--no-{name}'] if isinstance(value, bool) else [f'--{name}', str(value)]
    return words


def always_the_batch(one):
    """Batches that are all the same (inputs, targets)."""
    return type('OneBatch', (), dict(batch=lambda self, step, rows=None: one))()


def model_of(c, blocks=None):
    model = grow.GrowingTransformer(c, substrate.substrate(c.substrate, c.d_model))
    torch.manual_seed(c.seed)
    torch.nn.init.normal_(model.head.weight, 0, 0.02)
    torch.nn.init.zeros_(model.head.bias)
    model.append(c.layers if blocks is None else blocks)
    return model


def ids(*shape, seed=0):
    return torch.randint(0, substrate.VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def texts(n=400, seed=0, words='the cat sat on a mat and saw more cats than mats in that hat'.split()):
    rng = np.random.default_rng(seed)
    return [f'{i}: ' + ' '.join(rng.choice(words, 60)) for i in range(n)]


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    """A folder with a small data set in data/stdlib, where the main job looks for its text."""
    folder = tmp_path_factory.mktemp('corpus')
    prepare_data.prepare('stdlib', texts(), 'made up', folder / 'data')
    return folder


@pytest.fixture
def here(corpus, tmp_path, monkeypatch):
    """An empty working folder that sees the small data set."""
    (tmp_path / 'data').symlink_to(corpus / 'data')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capsys, argv, *words, status=1, main=grow.main):
    """Runs main(argv); it must end with that status and one sentence on stderr that has all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    error = re.sub(r'(.*\r[^\n]*\n)?', '', capsys.readouterr().err, count=1, flags=re.DOTALL).strip()      # less a line of progress
    assert end.value.code == status and error.startswith('error: '), error
    assert 'Traceback' not in error and '\n' not in error, error
    for word in words:
        assert word in error, error


# ---------------------------------------------------------------------------------------------------------------------
# The README


def test_links_of_the_readme_lead_to_what_they_name():
    text = (REPO / 'README.md').read_text(encoding='utf-8')
    lines = re.findall(r'\[`(\w+)`\]\((\w+\.py)#L(\d+)\)', text)
    assert len(lines) >= 20
    for name, path, number in lines:
        assert re.match(rf'\s*(def|class) {name}\b', (REPO / path).read_text(encoding='utf-8').splitlines()[int(number) - 1]), f'{path}#L{number} is not {name}'
    for path in re.findall(r'\]\((?!http)([^)#]+)', text):
        assert (REPO / path).exists(), path


def test_the_pictures_are_drawn(here, monkeypatch):
    pytest.importorskip('matplotlib')
    monkeypatch.syspath_prepend(REPO / 'results')
    import pictures
    grow.main(flags(out='run', lora='interleaved'))
    for argv in (['idea'], ['loss', 'run']):
        pictures.main([*argv, '--out', 'a.png'])
        assert Path('a.png').read_bytes()[:4] == b'\x89PNG'


def test_flags_of_the_readme_exist():
    known = {f.name for f in dataclasses.fields(grow.Config) if f.metadata}
    for command in re.findall(r'python grow\.py ([^`\n]*)', (REPO / 'README.md').read_text(encoding='utf-8')):
        for flag in re.findall(r'--([a-z_]+)', command):
            assert flag.removeprefix('no_') in known, command


# ---------------------------------------------------------------------------------------------------------------------
# The vocabulary

def test_layout_of_the_vocabulary():
    tokens = substrate.tokenizer()
    grams = substrate.read_ngrams()
    assert tokens.n_vocab == 65_536 == substrate.VOCAB
    for i in (0, 0x0A, 0x41, 0x7F, 0x80, 0x416, 0x4E2D, 0xD7FF, 0xF900, 0xFFFF):
        assert tokens.encode_ordinary(chr(i)) == [i] and tokens.decode([i]) == chr(i)
    assert [tokens.decode([i]) for i in (0xD800, 0xDFFF, 0xE100, 0xF8FF)] == [grams[0], grams[2047], grams[2048], grams[8191]]
    assert [tokens.decode([i]) for i in range(0xE000, 0xE005)] == ['<pad>', '<s>', '</s>', '<unk>', '<04>']
    assert tokens.decode_bytes(range(0xE080, 0xE100)) == bytes(range(0x80, 0x100))
    assert len({tokens.decode_single_token_bytes(i) for i in range(substrate.VOCAB)}) == substrate.VOCAB
    assert len(tokens.decode(range(substrate.VOCAB))) > substrate.VOCAB           # whatever a model samples can be printed


def test_the_longest_ngram_wins():
    tokens = substrate.tokenizer()
    assert [tokens.decode([i]) for i in tokens.encode_ordinary('singing the 中国人')] == ['sin', 'gin', 'g', ' ', 'the', ' ', '中国', '人']


def test_the_tokenizer_against_a_slow_one_in_every_script():
    """Longest n-gram first, character by character, in text of all scripts mixed, the slowest there is: 2 s (18 s with a plain alternation of the n-grams)."""
    tokens, grams = substrate.tokenizer(), substrate.read_ngrams()
    rng = random.Random(0)
    text = ''.join(piece + rng.choice(['', '', ' ', piece[0]]) for piece in rng.choices(grams, k=60_000))
    place, ids = {gram: i for i, gram in zip(substrate.NGRAM_IDS, grams)}, []
    begun = time.process_time()
    found, seconds = tokens.encode_ordinary(text), time.process_time() - begun
    at = 0
    while at < len(text):
        piece = next((text[at:at + n] for n in (3, 2) if text[at:at + n] in place), text[at])
        ids.append(place[piece] if piece in place else ord(piece))
        at += len(piece)
    assert found == ids
    assert seconds < 8, f'{len(text.encode()) / 1e6 / seconds:.2f} MB/s'


def test_every_text_round_trips():
    tokens = substrate.tokenizer()
    rng = random.Random(0)
    everything = [chr(i) for i in range(0x110000) if not 0xD800 <= i <= 0xDFFF]
    texts = [''.join(everything), '', '\0', '😀 𝔄 \uE000\uE080\uF8FF', '<s></s><pad><|endoftext|><80>', 'a\r\nb\tc\u2028\ufeff']
    texts += [''.join(rng.choices(everything, k=200)) for _ in range(200)]
    pieces = substrate.token_texts()
    texts += [''.join(rng.choices(pieces, k=200)) for _ in range(200)]
    for text in texts:
        ids = tokens.encode_ordinary(text)
        assert tokens.decode(ids) == text
        assert not any(0xE000 <= i < 0xE080 for i in ids)                         # no text makes a special token
    assert tokens.encode_ordinary('\uE000') == [0xE0EE, 0xE080, 0xE080]           # its UTF-8 bytes
    assert tokens.encode_ordinary(''.join(map(chr, range(0xDFFF, 0xD7FF, -1)))) == [0xFFFD] * 2048      # a lone surrogate is no Unicode
    assert tokens.encode_ordinary('\ud83d\ude00') == tokens.encode_ordinary('😀')                       # and a pair is one character


def test_ngrams_are_real_in_every_script():
    grams = substrate.read_ngrams()
    first = [unicodedata.name(gram[0]).replace('-', ' ').split()[0] for gram in grams]
    for script in 'LATIN CYRILLIC GREEK ARABIC HEBREW DEVANAGARI BENGALI TAMIL CJK HANGUL HIRAGANA KATAKANA'.split():
        assert first.count(script) >= 100, script
    assert all(unicodedata.category(c)[0] in 'LM' for gram in grams for c in gram)
    assert {'the', 'ing', 'что', 'της', 'מה', '一个', 'です'} <= set(grams)


def test_ngrams_are_counted_again_the_same(tmp_path, monkeypatch):
    pytest.importorskip('wordfreq')
    committed = substrate.NGRAMS.read_bytes()
    monkeypatch.setattr(substrate, 'NGRAMS', tmp_path / 'ngrams.txt')
    monkeypatch.syspath_prepend(REPO / 'interface')
    import count_ngrams
    count_ngrams.main([])
    assert substrate.NGRAMS.read_bytes() == committed


@pytest.mark.parametrize('damage', [
    lambda lines: lines[:-1], lambda lines: lines[::-1], lambda lines: lines[:-1] + ['x'], lambda lines: lines[:-1] + lines[-1:] * 2,
    lambda lines: ['abcd'] + lines[1:], lambda lines: ['[{'] + lines, lambda lines: ["[{'top_ngrams': 3}]"]])
def test_damaged_ngrams_are_refused(damage, tmp_path):
    path = tmp_path / 'list.txt'
    path.write_text('\n'.join(damage(substrate.read_ngrams())), encoding='utf-8')
    with pytest.raises(substrate.UserError, match='list.txt'):
        substrate.tokenizer(path)
    path.write_bytes(b'\xff\xfe')
    with pytest.raises(substrate.UserError, match='list.txt'):
        substrate.tokenizer(path)
    path.unlink()
    with pytest.raises(substrate.UserError, match='list.txt'):
        substrate.tokenizer(path)


def test_a_flipped_bit_in_the_ngrams_is_found(tmp_path, monkeypatch):
    """Some flips leave a list that is in order: only its digest tells."""
    whole, rng, path = substrate.NGRAMS.read_bytes(), random.Random(0), tmp_path / 'ngrams.txt'
    monkeypatch.setattr(substrate, 'NGRAMS', path)
    path.write_bytes(whole)
    substrate.read_ngrams(path)
    reasons = collections.Counter()
    for _ in range(100):
        path.write_bytes(flipped(whole, rng))
        with pytest.raises(substrate.UserError, match='ngrams.txt') as error:
            substrate.read_ngrams(path)
        reasons['DIGEST' in str(error.value)] += 1
    assert min(reasons[True], reasons[False]) > 5, reasons


def test_another_ngram_list_makes_another_tokenizer(tmp_path):
    grams = [a + b + c for a in 'abcdefghijklmnopqrst' for b in 'abcdefghijklmnopqrst' for c in 'abcdefghijklmnopqrst']
    (tmp_path / 'plain.txt').write_text('\n'.join(grams + sorted({gram[:2] for gram in grams})[:192]) + '\n')
    ranked = {2: [(gram[:2], 1) for gram in grams[::20][:192]], 3: [(gram, 1) for gram in grams]}
    (tmp_path / 'literal.txt').write_text(repr([{'lang': 'xx', 'top_ngrams': ranked}]))
    plain, literal = (substrate.tokenizer(tmp_path / name) for name in ('plain.txt', 'literal.txt'))
    assert plain.encode_ordinary('abcab') == literal.encode_ordinary('abcab') != substrate.tokenizer().encode_ordinary('abcab')
    assert plain.decode(plain.encode_ordinary('a cab 😀')) == 'a cab 😀'
    assert substrate.tokenizer_fingerprint(tmp_path / 'plain.txt') == substrate.tokenizer_fingerprint(tmp_path / 'literal.txt')
    assert substrate.tokenizer_fingerprint(tmp_path / 'plain.txt') != substrate.tokenizer_fingerprint()


# ---------------------------------------------------------------------------------------------------------------------
# The glyphs

@pytest.fixture(scope='module')
def bits():
    return substrate.glyphs()


def test_white_space_differs_and_lookalikes_do_not(bits):
    newline, tab, space = bits[0x0A], bits[0x09], bits[0x20]
    assert (newline != tab).any() and (newline != space).any() and (tab != space).any() and not space.any()
    assert (newline == bits[0x240A]).all()                                        # drawn as its control picture
    assert (bits[ord('A')] == bits[ord('А')]).all() and (bits[ord('A')] == bits[ord('Α')]).all()
    assert sum(map(len, substrate.homoglyphs(bits))) == 1_642
    assert substrate.homoglyphs(bits[0xE000:0xE100]) == []                        # special tokens and bytes all differ
    assert bits.shape == (65_536, 1_024) and set(np.unique(bits)) == {0, 1}


@pytest.mark.skipif(not UNIFONT.exists(), reason='needs the font of the Debian package fonts-unifont 15.0.01')
def test_glyphs_are_drawn_again_bit_for_bit(bits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(substrate, 'GLYPHS', tmp_path / 'glyphs.npz')
    substrate.main(['--draw', str(UNIFONT)])
    assert 'bit for bit' in capsys.readouterr().out and (substrate.glyphs() == bits).all()


def test_damaged_glyphs_and_fonts_are_refused(tmp_path, monkeypatch, capsys):
    whole, bits, rng = substrate.GLYPHS.read_bytes(), substrate.glyphs(), random.Random(0)
    monkeypatch.setattr(substrate, 'GLYPHS', tmp_path / 'glyphs.npz')
    for _ in range(20):                               # one bit: refused, or where it changes no picture
        substrate.GLYPHS.write_bytes(flipped(whole, rng))
        try:
            assert np.array_equal(substrate.glyphs(), bits)
        except substrate.UserError as error:
            assert 'glyphs.npz' in str(error)
    for damaged in (whole[:-1000], whole[:5000] + b'x' + whole[5001:], b'', None):
        if damaged is not None:
            substrate.GLYPHS.write_bytes(damaged)
        else:
            substrate.GLYPHS.unlink()
        with pytest.raises(substrate.UserError, match='glyphs.npz'):
            substrate.glyphs()
    np.savez(substrate.GLYPHS, np.zeros((65_536, 128), np.uint8))                 # a whole file, but of other pictures
    with pytest.raises(substrate.UserError, match='glyphs.npz'):
        substrate.glyphs()
    fails(capsys, ['--draw', str(tmp_path / 'none.otf')], 'fonts-unifont', main=substrate.main)


# ---------------------------------------------------------------------------------------------------------------------
# The tables

@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(substrate, 'CACHE', tmp_path / 'cache')
    return substrate.CACHE


def test_unicode_rows_keep_the_angles_between_pictures(bits, cache):
    table = substrate.substrate('unicode', 1024).table.detach().double().numpy()
    assert np.allclose(np.linalg.norm(table, axis=1), 1, atol=1e-6)
    assert (np.abs(table).max(0) > 0).sum() == 992 and not table[:, 992:].any()   # null components are zero
    some = np.random.default_rng(0).integers(0, substrate.VOCAB, 500)
    centred = bits[some] - bits.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    assert np.allclose(centred @ centred.T, table[some] @ table[some].T, atol=1e-6)
    left, share = substrate.what_is_left(some, 1024)                              # all of the pictures
    assert np.allclose(left, bits[some], atol=1e-5) and np.allclose(share, 1)


def test_unicode_is_cached_and_a_damaged_cache_is_computed_again(cache):
    first = substrate.substrate('unicode', 16)
    [path] = cache.iterdir()
    whole = path.read_bytes()
    assert first.fingerprint in path.name and torch.equal(substrate.substrate('unicode', 16).table, first.table)
    path.write_bytes(whole[:100_000] + bytes([whole[100_000] ^ 1]) + whole[100_001:])      # one bit
    assert torch.equal(substrate.substrate('unicode', 16).table, first.table) and path.read_bytes() == whole
    assert not first.table.requires_grad


def test_show_prints_and_draws_what_a_model_sees(bits, cache, tmp_path, capsys):
    substrate.main(['--show', 'А, the\n🎉', '--d_model', '16', '--out', str(tmp_path / 'new' / 'a.png')])
    lines = capsys.readouterr().out.splitlines()
    tokens = substrate.tokenizer().encode_ordinary('А, the\n🎉')
    assert [int(line.split(' = 0x')[1][:4], 16) for line in lines[1:-1]] == tokens and tokens[-4:] == [0xE0F0, 0xE09F, 0xE08E, 0xE089]
    assert '  А ' in lines[1] and 'A 0x0041  Α 0x0391' in lines[1] and '0x0410' not in lines[1].partition('А')[2]      # its twins, not itself
    assert 'U+000A' in lines[-6] and '␊ 0x240A' in lines[-6] and '<F0>' in lines[-5]
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['a.png']
    image = np.asarray(substrate.Image.open(tmp_path / 'new' / 'a.png')).astype(int)
    left, share = substrate.what_is_left(tokens, 16)
    assert 0 < share.min() and share.max() < 1
    for k, (i, row) in enumerate(zip(tokens, substrate.unicode_table(16)[tokens])):
        y = 56 + 104 * k
        assert (image[y + 1:y + 96:3, 251:346:3, 0] == 255 - 255 * bits[i].reshape(32, 32)).all()
        assert np.abs(image[y + 1:y + 96:3, 371:466:3, 0] - 255 * (1 - left[k].clip(0, 1)).reshape(32, 32)).max() <= 1
        assert (np.sign(image[y + 40, 558:1054:32] @ [1, 0, -1]) == np.sign(row)).all()       # red above zero, blue below
    for wrong in ('', 'a ' * 201):
        fails(capsys, ['--show', wrong], '--show', '400', status=2, main=substrate.main)
    fails(capsys, ['--show', 'a', '--d_model', '0'], '--d_model', status=2, main=substrate.main)


def test_homoglyphs_share_a_vector(bits, cache, capsys):
    substrate.main(['--homoglyphs'])
    *listed, _, last = capsys.readouterr().out.splitlines()
    groups, table = substrate.homoglyphs(bits), substrate.unicode_table(16)
    assert len(listed) == len(groups) == 733 and '1,642 tokens' in last and '733 groups' in last
    assert [line for line in listed if line.startswith('A 0x0041  Α 0x0391  А 0x0410')]
    for group in groups:
        assert np.allclose(table[group], table[group[0]], atol=1e-6)
    alone = np.setdiff1d(np.arange(65_536), sum(groups, []))
    assert len({row.tobytes() for row in bits[alone]}) == len(alone) == 65_536 - 1_642


def test_binary_is_the_bits_of_the_id_lifted_on_the_fly():
    interface = substrate.substrate('binary', 64)
    assert interface.table.shape == (65_536, 16) and not interface.table.requires_grad
    idx = torch.tensor([[0, 1, 0x8000], [0xFFFF, 0xE002, 0x41]])
    x = interface(idx)
    assert x.shape == (2, 3, 64)
    for row, i in zip(x.reshape(6, 64), idx.reshape(6).tolist()):
        assert row.tolist() == [float(bit) for bit in f'{i:016b}' for _ in range(4)]
    assert torch.linalg.matrix_rank(interface(torch.arange(0, 65_536, 7))) == 16
    with pytest.raises(substrate.UserError, match='multiple of 16'):
        substrate.Substrate('binary', 100)


def test_random_has_a_seed_of_its_own():
    torch.manual_seed(1)
    first = substrate.substrate('random', 32)
    torch.manual_seed(2)
    second = substrate.substrate('random', 32, seed=3)
    assert torch.equal(first.table, second.table) and first.fingerprint == second.fingerprint
    assert torch.allclose(first.table.norm(dim=1), torch.ones(65_536)) and not first.table.requires_grad


def test_learned_is_seeded_and_takes_gradients():
    first, same, other = (substrate.substrate('learned', 16, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.table, same.table) and not torch.equal(first.table, other.table)
    first(torch.tensor([[5]])).sum().backward()
    assert first.table.grad[5].eq(1).all() and first.table.grad.sum() == 16
    assert abs(first.table.std().item() - 0.02) < 1e-3


def test_substrates_are_told_apart(cache):
    prints = [substrate.fingerprint(name, d) for name in substrate.RECIPES for d in (32, 64)]
    assert len(set(prints)) == len(prints) and all(len(p) == 16 for p in prints)
    with torch.device('meta'):
        built = substrate.Substrate('unicode', 1024, 'abc')
    assert built.table.is_meta and (built.name, built.d_model, built.fingerprint) == ('unicode', 1024, 'abc')
    with pytest.raises(substrate.UserError, match='unicode, binary, random, learned'):
        substrate.substrate('unicod', 32)


def test_substrate_from_a_file(tmp_path):
    table = np.random.default_rng(0).standard_normal((65_536, 4)).astype(np.float32)
    np.save(tmp_path / 'a.npy', table)
    np.save(tmp_path / 'half.npy', table.astype(np.float16))
    torch.save(torch.from_numpy(table), tmp_path / 'b.pt')
    torch.save({'weight': torch.from_numpy(table), 'step': 3, 'bias': torch.zeros(4)}, tmp_path / 'c.pt')
    for name in ('a.npy', 'b.pt', 'c.pt'):
        interface = substrate.substrate(str(tmp_path / name), 4)
        assert np.array_equal(interface.table.numpy(), table) and not interface.table.requires_grad
        assert interface(torch.tensor([[7, 9]])).shape == (1, 2, 4)
    assert substrate.substrate(tmp_path / 'half.npy', 4).table.dtype == torch.float32
    before = substrate.fingerprint(tmp_path / 'a.npy', 4)
    np.save(tmp_path / 'a.npy', table + 1)
    assert substrate.fingerprint(tmp_path / 'a.npy', 4) != before


def test_files_that_do_not_fit_are_refused(tmp_path):
    table = np.zeros((65_536, 4), np.float32)
    np.save(tmp_path / 'wide.npy', np.zeros((65_536, 5), np.float32))
    np.save(tmp_path / 'whole.npy', table.astype(np.int64))
    np.save(tmp_path / 'flat.npy', np.zeros(65_536, np.float32))
    np.save(tmp_path / 'nan.npy', np.where(np.arange(4) == 2, np.nan, table))
    np.save(tmp_path / 'objects.npy', np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / 'cut.npy').write_bytes((tmp_path / 'wide.npy').read_bytes()[:-8])
    (tmp_path / 'empty.pt').write_bytes(b'')
    (tmp_path / 'text.pt').write_text('hello')
    torch.save({'a': torch.zeros(65_536, 4), 'b': torch.zeros(2, 2)}, tmp_path / 'two.pt')
    torch.save('words', tmp_path / 'words.pt')
    for path, says in [('wide.npy', '65536 x 5'), ('whole.npy', 'int64'), ('flat.npy', 'none'), ('nan.npy', 'NaN'), ('objects.npy', 'cannot read'),
                       ('cut.npy', 'cannot read'), ('empty.pt', 'cannot read'), ('text.pt', 'cannot read'), ('two.pt', '2 x 2'), ('words.pt', 'none'),
                       ('absent.npy', 'No such file')]:
        with pytest.raises(substrate.UserError, match=says) as error:
            substrate.substrate(str(tmp_path / path), 4)
        assert path in str(error.value) and '\n' not in str(error.value)


def test_forward_compiles_whole():
    idx = torch.tensor([[1, 2, 65_535]])
    for name in ('binary', 'learned'):
        interface = substrate.substrate(name, 32)
        assert torch.equal(torch.compile(interface, backend='aot_eager', fullgraph=True)(idx), interface(idx))


# ---------------------------------------------------------------------------------------------------------------------
# prepare_data.py: data sets small enough to look at

@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A data set of 400 documents in several training shards."""
    monkeypatch.setattr(prepare_data, 'SHARD', 20_000)
    prepare_data.prepare('tiny', texts(), 'made up', tmp_path)
    return prepare_data.Dataset('tiny', tmp_path)


def documents_of(dataset, split):
    """What the shards hold, as text again."""
    ids = np.concatenate(getattr(dataset, split))
    assert ids[-1] == prepare_data.EOS
    return [substrate.tokenizer().decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == prepare_data.EOS) + 1)[:-1]]


def with_end(documents):
    return [text + '</s>' for text in documents]


def refuses(pattern, function, *args, **kwargs):
    with pytest.raises(substrate.UserError, match=pattern) as error:
        function(*args, **kwargs)
    assert '\n' not in str(error.value)


def flipped(raw, rng, at=None):
    """Bytes with one bit flipped, in byte `at` or anywhere."""
    at = rng.randrange(len(raw)) if at is None else at
    return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]


def test_every_id_survives_a_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_data, 'SHARD', 50_000)
    meta = dict(documents=0, train_tokens=0, train_bytes=0, shards={})
    writer = prepare_data.ShardWriter(tmp_path, 'train', meta)
    writer.add(np.arange(65_536), 0)
    writer.flush()
    assert [shard['tokens'] for shard in meta['shards'].values()] == [50_000, 15_536]
    read = [np.load(tmp_path / file, mmap_mode='r') for file in meta['shards']]
    assert all(isinstance(shard, np.memmap) and shard.dtype == np.uint16 for shard in read)
    assert np.array_equal(np.concatenate(read), np.arange(65_536))


def test_documents_come_back_and_only_we_write_the_separator(tmp_path, dataset):
    assert len(dataset.train) > 1
    assert sorted(documents_of(dataset, 'train') + documents_of(dataset, 'val')) == sorted(with_end(texts()))
    odd = 'a text that says </s> and <s>, \x00, 😀'
    prepare_data.prepare('marked', texts() + [odd], 'made up', tmp_path)
    marked = prepare_data.Dataset(tmp_path / 'marked')
    assert sum((np.concatenate(split) == prepare_data.EOS).sum() for split in (marked.train, marked.val)) == 401
    assert odd + '</s>' in documents_of(marked, 'train') + documents_of(marked, 'val')
    assert marked.meta['documents'] == 401 and marked.meta['train_tokens'] == marked.train_tokens
    assert marked.meta['train_bytes'] + marked.meta['val_bytes'] == sum(len(text.encode()) for text in texts() + [odd])


def test_how_a_text_file_is_cut(tmp_path):
    path = tmp_path / 'a.txt'
    line = b'x' * 999 + b'\n'
    path.write_bytes(line * 65 + b'y' * 536)                                   # 64 KiB exactly
    assert [len(text) for text in prepare_data.text_documents(path)] == [65_536]
    path.write_bytes(line * 65 + b'y' * 537)                                   # and one byte more
    assert [len(text) for text in prepare_data.text_documents(path)] == [17_000, 17_000, 17_000, 14_537]
    path.write_bytes((b'x' * 1023 + b'\n') * 65)                               # lines that end at 16 KiB exactly
    assert [len(text) for text in prepare_data.text_documents(path)] == [16_384] * 4 + [1024]
    path.write_bytes(b'z' * 10_000_000 + b'\n' + line * 20)                    # one very long line
    assert [len(text) for text in prepare_data.text_documents(path)] == [10_000_001, 17_000, 3_000]
    path.write_bytes('п'.encode() * 40_000 + b'\nend')
    assert ''.join(prepare_data.text_documents(path)) == 'п' * 40_000 + '\nend'


def test_split_line(tmp_path, monkeypatch):
    path = tmp_path / 'fortunes'
    path.write_bytes(b'one\n 100 %\n%\r\ntwo\n%\n%\nthree ' + b'x' * 100_000)
    assert list(prepare_data.text_documents(path, '%')) == ['one\n 100 %\n', 'two\n', '', 'three ' + 'x' * 100_000]
    monkeypatch.setattr(prepare_data, 'LONGEST', 1000)
    refuses('fortunes, line 7: .*--split-line', list, prepare_data.text_documents(path, '%'))


def test_folders_and_jsonl(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub' / 'b.jsonl').write_text('{"text": "first\\nrow"}\n\n{"text": "\\u00e9", "id": 2}\n')
    (tmp_path / 'c.md').write_text('\ufeffmarked')
    (tmp_path / 'a.log').write_text('log')
    assert list(prepare_data.file_documents([tmp_path])) == ['marked', 'first\nrow', 'é']
    assert list(prepare_data.file_documents([tmp_path / 'a.log'])) == ['log']   # a named file, whatever its ending
    (tmp_path / 'empty').mkdir()
    refuses('empty is neither', prepare_data.file_documents, [tmp_path / 'empty'])
    refuses('nowhere is neither', prepare_data.file_documents, [tmp_path / 'nowhere'])


@pytest.mark.parametrize('row', ['{"text": "a"', '{"txt": "a"}', '["a"]', '{"text": 3}', r'{"text": "\ud83d"}'])
def test_bad_rows_name_their_line(tmp_path, row):
    (tmp_path / 'rows.jsonl').write_text('{"text": "good"}\n' + row + '\n')
    refuses('rows.jsonl, line 2: not a JSON object', list, prepare_data.file_documents([tmp_path]))


def test_gz_files_are_unpacked_and_broken_ones_named(tmp_path):
    long = 'line ' * 20 + '\n'
    for name, text in (('a.txt', long * 1000), ('b.jsonl', '{"text": "row"}\n'), ('c.md', 'md'), ('d.log', 'left out')):
        (tmp_path / f'{name}.gz').write_bytes(gzip.compress(text.encode()))
    found = list(prepare_data.file_documents([tmp_path]))
    (tmp_path / 'a.txt').write_text(long * 1000)
    assert found == [*prepare_data.text_documents(tmp_path / 'a.txt'), 'row', 'md'] and len(found) > 5
    assert list(prepare_data.file_documents([tmp_path / 'd.log.gz'])) == ['left out']
    whole = (tmp_path / 'a.txt.gz').read_bytes()
    for broken in (whole[:-9], whole[:20], whole[:50] + b'x' * 50 + whole[100:], b'text'):
        (tmp_path / 'a.txt.gz').write_bytes(broken)
        refuses('a.txt.gz is cut short or damaged', list, prepare_data.file_documents([tmp_path / 'a.txt.gz']))


def test_encoding_errors_name_file_and_line(tmp_path):
    (tmp_path / 'latin.txt').write_bytes('\n'.join(['word'] * 20_000 + ['café']).encode('latin-1'))
    refuses('latin.txt, line 20001: not UTF-8', list, prepare_data.file_documents([tmp_path]))
    refuses('latin.txt, line 20001: not UTF-8', prepare_data.prepare, 'x', prepare_data.file_documents([tmp_path]), '', tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['latin.txt']


@pytest.mark.parametrize('raw', [b'\xff\xfea\0b\0', b'\xed\xa0\x80', b'\xc0\x80', b'\xf4\x90\x80\x80', b'\xe4\xb8', b'\x80', b'caf\xe9'],
                         ids=['utf-16', 'surrogate', 'overlong', 'above U+10FFFF', 'cut', 'continuation', 'latin-1'])
def test_bytes_that_are_no_utf_8_name_file_and_line(tmp_path, raw):
    for name, before, after in (('a.txt', b'one\ntwo ', b''), ('b.md', b'one\ntwo ', b'\nthree'), ('c.jsonl', b'{"text": "a"}\n{"text": "', b'"}\n')):
        (tmp_path / name).write_bytes(before + raw + after)
        refuses(f'{name}, line 2: not UTF-8', list, prepare_data.file_documents([tmp_path / name]))


ODD = ['\0', 'a\0b', 'עברית ו-English (בסוגריים)', '\u202eabc\u202c', 'e\u0301\u0323 \u0e01\u0e33', 'a' + '\u0301' * 300, '👩‍👩‍👧‍👦🏽', '\u2028\u2029\x85\x0b\x0c\x1c', '\r\r\n\n\r',
       'zero\u200bwidth\u200d\ufeff', '\ufffe\uffff\ufdd0', '\U0010ffff\U000e0001', '</s><s><pad><unk><80>']


def test_all_of_unicode_comes_back_from_a_file(tmp_path, monkeypatch):
    """Every code point, the odd texts above, and a line of 10 MB: from a file to shards, and back."""
    rng = random.Random(0)
    every, long = ''.join(chr(i) for i in range(0x110000) if not 0xD800 <= i <= 0xDFFF), ''.join(rng.choices('ab cdе中', k=1000)) * 7_500
    (tmp_path / 'all.txt').write_bytes(every.encode())
    (tmp_path / 'long.txt').write_bytes(long.encode())
    (tmp_path / 'odd.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in [*ODD, every]))
    assert len(long.encode()) > 10**7
    prepare_data.prepare('all', [*texts(), *prepare_data.file_documents([tmp_path])], 'made up', tmp_path)
    read = prepare_data.Dataset('all', tmp_path)
    assert ''.join(prepare_data.text_documents(tmp_path / 'all.txt')) == every
    want = [*texts(), *prepare_data.text_documents(tmp_path / 'all.txt'), long, *ODD, every]
    assert sorted(documents_of(read, 'train') + documents_of(read, 'val')) == sorted(with_end(text for text in want if text and not text.isspace()))


def test_any_text_round_trips():
    hypothesis = pytest.importorskip('hypothesis')
    st, tokens = hypothesis.strategies, substrate.tokenizer()
    pieces = st.sampled_from(substrate.token_texts())

    @hypothesis.settings(max_examples=1000, deadline=None, database=None)
    @hypothesis.given(st.text(st.characters(exclude_categories=())) | st.lists(pieces | st.sampled_from(ODD) | st.characters(exclude_categories=())).map(''.join))
    def check(text):
        ids = tokens.encode_ordinary(text)
        sound = text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')     # where halves of surrogate pairs stand alone
        assert tokens.decode(ids) == sound and not any(0xE000 <= i < 0xE080 for i in ids)
        assert tokens.encode_to_numpy(sound, disallowed_special=()).tolist() == ids
    check()


def test_any_bytes_are_read_or_named(tmp_path, monkeypatch):
    """A file of any bytes is cut into pieces that are its text, or refused with the line of the first byte that is no UTF-8."""
    hypothesis = pytest.importorskip('hypothesis')
    st, path = hypothesis.strategies, tmp_path / 'any.txt'
    monkeypatch.setattr(prepare_data, 'WHOLE', 40)
    monkeypatch.setattr(prepare_data, 'PIECE', 10)
    texts = st.text(st.sampled_from('ab\n\r\0é中😀\ufeff\u202e') | st.characters(codec='utf-8')).map(str.encode)

    @hypothesis.settings(max_examples=1000, deadline=None, database=None)
    @hypothesis.given(st.lists(texts | st.sampled_from([b'\n', b'\xff', b'\xe4\xb8']) | st.binary(max_size=3), max_size=20).map(b''.join))
    @hypothesis.example(b'x' * 50 + b'\n' + '\ufeffnot the first piece'.encode())
    def check(raw):
        path.write_bytes(raw)
        try:
            want = raw.decode('utf-8-sig')
        except UnicodeDecodeError as error:
            start = error.start + 3 * raw.startswith('\ufeff'.encode())
            refuses(f'any.txt, line {raw.count(10, 0, start) + 1}: not UTF-8', list, prepare_data.text_documents(path))
        else:
            assert ''.join(prepare_data.text_documents(path)) == want
    check()


def test_val_is_decided_by_the_document_alone(tmp_path, dataset):
    prepare_data.prepare('again', texts()[::-1] + texts(), 'made up', tmp_path)
    again = prepare_data.Dataset('again', tmp_path)
    assert set(documents_of(again, 'val')) == set(documents_of(dataset, 'val'))
    assert set(documents_of(again, 'train')).isdisjoint(documents_of(again, 'val'))
    refuses(r'^3 documents give .*--split-line', prepare_data.prepare, 'few', texts(3), 'made up', tmp_path)
    refuses('^0 documents', prepare_data.prepare, 'none', ['', ' \n'], 'made up', tmp_path)
    refuses('exists already', prepare_data.prepare, 'tiny', texts(), 'made up', tmp_path)
    refuses('does not name a folder', prepare_data.prepare, '../tiny', texts(), 'made up', tmp_path)
    assert not (tmp_path / 'few').exists()


def test_stdlib_is_prose(tmp_path):
    assert prepare_data.prose('"""Says\n    what.\n    """\n'
                              '# x:\n# A comment of two lines that is long enough\n# to be taken for an English sentence.\n'
                              'def f():\n    "Inner."  # no\n    s = """\n# not a comment at all, only a string\n"""\n'
                              '# x = [1, 2, 3, 4, 5]; y = {"a": 1, "b": 2}; z = x[0] + y["a"] * 3.14159\n') == [
        'Says what.', 'x:\nA comment of two lines that is long enough to be taken for an English sentence.', 'Inner.']
    assert prepare_data.normalised('A \n-----\n\n>>> 1\n1\n\n| t |\n\nB....      C') == 'A\n---\n\nB...   C'
    first = next(prepare_data.stdlib_documents())
    assert len(first) > 100 and '>>>' not in first


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
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (tmp_path / '.d.tmp' / 'train_000007.npy').write_bytes(b'rubbish')
    refuses('no data set .*files --name d PATH', prepare_data.Dataset, 'd', tmp_path)
    with pytest.raises(OSError, match='stopped'), prepare_data.new_folder(tmp_path / 'd'):
        refuses('another process is preparing', prepare_data.prepare, 'd', texts(), 'made up', tmp_path)     # while one writes, others wait
        (tmp_path / '.d.tmp' / 'meta.json').write_text('{')
        raise OSError('stopped')
    refuses('.d.tmp/meta.json is broken', prepare_data.prepare, 'd', texts(), 'made up', tmp_path)
    (tmp_path / '.d.tmp' / 'meta.json').unlink()
    prepare_data.prepare('d', texts(), 'made up', tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['d']
    assert sorted(path.name for path in (tmp_path / 'd').iterdir()) == ['meta.json', 'train_000000.npy', 'val_000000.npy']


def test_damaged_data_sets_are_refused_by_name(tmp_path, dataset, capsys):
    folder, shard = tmp_path / 'tiny', tmp_path / 'tiny' / 'train_000001.npy'
    whole = shard.read_bytes()
    prepare_data.check('tiny', tmp_path)
    shard.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])  # one bit: the size is right
    prepare_data.Dataset('tiny', tmp_path)
    with pytest.raises(SystemExit) as exit:
        prepare_data.main(['--check', 'tiny', '--root', str(tmp_path)])
    assert exit.value.code == 1 and 'train_000001.npy;' in capsys.readouterr().err
    for broken in (whole[:-2], whole + b'xx', b'', b'no array at all', whole.replace(b'<u2', b'<i2')):
        shard.write_bytes(broken)
        refuses('train_000001.npy is missing, cut short', prepare_data.Dataset, 'tiny', tmp_path)
    shard.unlink()
    refuses('train_000001.npy is missing', prepare_data.Dataset, 'tiny', tmp_path)
    shard.write_bytes(whole)
    text, meta = (folder / 'meta.json').read_text(), prepare_data.read_meta(folder)
    (folder / 'meta.json').write_text(json.dumps(meta | {'tokenizer': 'another'}))
    refuses('another tokenizer', prepare_data.Dataset, 'tiny', tmp_path)
    for broken in ('{', '[]', '{}', json.dumps(meta | {'shards': {'train_000000.npy': 3}})):
        (folder / 'meta.json').write_text(broken)
        refuses('meta.json is broken', prepare_data.Dataset, 'tiny', tmp_path)
    rng = random.Random(0)
    for i in range(len(text)):                                                    # a bit of every byte: refused, or it changes nothing that counts
        (folder / 'meta.json').write_bytes(flipped(text.encode(), rng, i))
        try:
            assert meta.items() <= prepare_data.read_meta(folder).items()
        except substrate.UserError as error:
            assert 'meta.json is broken' in str(error)
    refuses('no data set .*stdlib; make it with: python prepare_data.py stdlib', prepare_data.Dataset, 'stdlib', tmp_path)


def test_files_command(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('\n%\n'.join(texts(1000)))
    prepare_data.main(['files', '--root', str(tmp_path), '--name', 'a', '--split-line', '%', str(tmp_path / 'a.txt')])
    assert '1,000 documents' in capsys.readouterr().out
    assert documents_of(prepare_data.Dataset('a', tmp_path), 'train')[0] == texts()[0] + '\n</s>'


# ---------------------------------------------------------------------------------------------------------------------
# Batches

def first_tokens(dataset, split, context):
    """Every sequence of a split, the slow way."""
    return [shard[i:i + context + 1].tolist() for shard in getattr(dataset, split) for i in range(0, len(shard) - context, context)]


def rows_of(batch):
    inputs, targets = batch
    assert inputs.dtype == targets.dtype == torch.int64 and torch.equal(inputs[:, 1:], targets[:, :-1])
    return [x.tolist() + [y[-1].item()] for x, y in zip(inputs, targets)]


def test_an_epoch_is_every_sequence_once_and_each_is_shuffled_anew(dataset):
    every = first_tokens(dataset, 'train', 16)
    batches = prepare_data.Batches([dataset], [1], seed=5, rows=7, context=16)
    steps = 2 * len(every) // 7 + 1
    seen = [row for step in range(steps) for row in rows_of(batches.batch(step))]
    first, second = seen[:len(every)], seen[len(every):2 * len(every)]
    assert sorted(first) == sorted(second) == sorted(every)
    assert first != second and first != every


def test_a_batch_depends_on_seed_and_step_alone(dataset):
    make = lambda seed: prepare_data.Batches([dataset], [1], seed=seed, rows=8, context=16)
    a, b = make(1), make(1)
    for step in (900, 3, 0, 50_000):                                           # any order, any epoch
        assert all(map(torch.equal, a.batch(step), make(1).batch(step)))
        parts = [b.batch(step, rows=slice(rank, None, 3)) for rank in range(3)]
        for rank, part in enumerate(parts):
            assert rows_of(part) == rows_of(a.batch(step))[rank::3]
    assert rows_of(a.batch(0)) != rows_of(make(2).batch(0))
    refuses('smaller --context', prepare_data.Batches, [dataset], [1], 0, 8, 20_000)


def test_a_mixture_is_exact(tmp_path, dataset):
    prepare_data.prepare('other', texts(seed=1, words=['перед', 'вами', 'слова', 'и', 'знаки']), 'made up', tmp_path)
    other = prepare_data.Dataset('other', tmp_path)
    mixed = prepare_data.Batches([dataset, other], [3, 2], seed=0, rows=6, context=16)
    rows = [row for step in range(40) for row in rows_of(mixed.batch(step))]
    alone = [prepare_data.Batches([d], [1], seed=0, rows=48, context=16) for d in (dataset, other)]
    streams = [iter([row for step in range(3) for row in rows_of(b.batch(step))]) for b in alone]
    assert rows == [next(streams[d]) for _ in range(48) for d in (0, 0, 0, 1, 1)]


def test_val_batches_are_the_whole_split_in_order(dataset):
    every = first_tokens(dataset, 'val', 16)
    assert [row for batch in prepare_data.val_batches(dataset, 16, 5) for row in rows_of(batch)] == every
    assert [row for batch in prepare_data.val_batches(dataset, 16, 5, limit=16 * 7 + 3) for row in rows_of(batch)] == every[:7]
    refuses('val split of tiny', prepare_data.val_batches, dataset, dataset.val_tokens, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Baselines

def slow_witten_bell(pairs):
    """The two formulas, word for word."""
    word, pair = collections.Counter(w for _, w in pairs), collections.Counter(pairs)
    total, successors = collections.Counter(h for h, _ in pairs), collections.Counter(h for h, _ in pair)

    def unigram(w):
        return (word[w] + len(word) / 65_536) / (len(pairs) + len(word))

    def bigram(h, w):
        return (pair[h, w] + successors[h] * unigram(w)) / (total[h] + successors[h]) if total[h] else unigram(w)
    return unigram, bigram


def test_witten_bell_sums_to_one_and_by_hand():
    ngrams = prepare_data.NGrams(np.array([7, 7, 7, 65_535]), np.array([8, 8, 65_535, 7]))
    every = np.arange(65_536)
    assert ngrams.unigram.sum() == pytest.approx(1)
    for h in (7, 8, 65_535, 0):                                                # 8 and 0 were followed by nothing
        assert ngrams.bigram(np.full(65_536, h), every).sum() == pytest.approx(1)
    p8 = (2 + 3 / 65_536) / (4 + 3)
    assert ngrams.bigram(np.array([7]), np.array([8]))[0] == pytest.approx((2 + 2 * p8) / (3 + 2))


def test_ngram_losses_against_counting_in_dictionaries(dataset, monkeypatch):
    batches = prepare_data.Batches([dataset], [1], seed=3, rows=4, context=16)
    val = [pair for batch in prepare_data.val_batches(dataset, 16, 8, 2000) for row in rows_of(batch) for pair in zip(row, row[1:])]
    for steps, counted in ((30, None), (1400, None), (30, 700)):               # within an epoch, more than an epoch, a capped count
        pairs = [pair for step in range(steps) for row in rows_of(batches.batch(step)) for pair in zip(row, row[1:])]
        if counted:
            monkeypatch.setattr(prepare_data, 'COUNTED', counted)
        unigram, bigram = slow_witten_bell(pairs[:counted])
        expected = [-sum(math.log(p) for p in ps) / len(val) for ps in ([unigram(w) for _, w in val], [bigram(h, w) for h, w in val])]
        assert prepare_data.ngram_losses(batches, steps, dataset, limit=2000) == pytest.approx(expected, rel=1e-12)
    assert expected[1] < expected[0] < math.log(65_536)


def test_unigram_log_probs(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(prepare_data, 'SHARD', 2**20)
    prepare_data.prepare('other', texts(seed=1), 'made up', tmp_path)
    other = prepare_data.Dataset('other', tmp_path)
    bias = prepare_data.unigram_log_probs(prepare_data.Batches([dataset, other], [3, 1], 0, 8, 16))
    assert bias.dtype == torch.float32 and bias.shape == (65_536,) and bias.exp().sum().item() == pytest.approx(1)
    a, b = ((np.count_nonzero(d.train[0] == prepare_data.EOS) + 1) / (len(d.train[0]) + 65_536) for d in (dataset, other))
    assert bias[prepare_data.EOS].exp().item() == pytest.approx(0.75 * a + 0.25 * b)


# ---------------------------------------------------------------------------------------------------------------------
# The model: sizes of the paper, to the digit


def test_parameter_counts_of_the_paper():
    with torch.device('meta'):
        assert grow.count(grow.Block(1024, 32).parameters()) == 12_592_128
        assert grow.count(torch.nn.Linear(1024, substrate.VOCAB).parameters()) == 67_174_400
    grown = grow.ledger(config(**PAPER | dict(layers=9, layers_per_stage=3, substrate='unicode')))
    assert [r['active'] for r in grown] == [104_952_832] * 3
    mono = grow.ledger(config(**PAPER | dict(layers=9, layers_per_stage=3, substrate='unicode', monolithic=True)))
    assert [r['active'] for r in mono] == [180_505_600]
    learned = grow.ledger(config(**PAPER | dict(layers=9, layers_per_stage=3, substrate='learned', monolithic=True)))
    assert [r['active'] for r in learned] == [247_614_464]
    assert grow.ledger(config(**PAPER | dict(layers=9, layers_per_stage=3)))[-1]['total'] == 181_554_176
    long = grow.ledger(config(**PAPER | dict(layers=16, layers_per_stage=3)))
    assert long[-1]['total'] == 269_699_072 and [r['layers'] for r in long] == [3, 6, 9, 12, 15, 16]


def test_plan_prints_the_paper_numbers(capsys):
    grow.main('--plan --layers 9 --d_model 1024 --heads 32 --context 1024 --substrate unicode'.split())
    text = capsys.readouterr().out
    for number in ('104,952,832', '180,505,600', '247,614,464'):
        assert number in text
    grow.main('--plan --layers 16 --d_model 1024 --heads 32 --context 1024 --substrate binary'.split())
    assert '269,699,072' in capsys.readouterr().out


def test_flops_against_torch_counter():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    c = config(context=32, d_model=64, layers=2, heads=2)
    model = model_of(c)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(ids(1, 32))
    attention = 2 * 2 * 32 * 64 * 2                     # the counter takes the full square of attention, the ledger its lower half
    block, head = grow.flops_per_token(c, grow.Phase('grow', 1, 2, 0, 1))
    assert counter.get_total_flops() == 32 * (block + head // 3 + attention // 2)


def test_causality():
    model, a = model_of(config()), ids(2, 16)
    b = a.clone()
    b[:, 9:] = ids(2, 7, seed=1)
    with torch.no_grad():
        assert torch.equal(model(a)[:, :9], model(b)[:, :9])
        assert not torch.equal(model(a)[:, 9:], model(b)[:, 9:])


def test_rotary_is_a_rotation_by_position():
    D, T = 8, 5
    x = torch.randn(1, 1, T, D)
    angle = torch.outer(torch.arange(T), 10_000.0 ** (-torch.arange(D // 2) / (D // 2)))
    z = torch.complex(x[..., :D // 2], x[..., D // 2:]) * torch.polar(torch.ones_like(angle), angle)   # second formulation
    assert torch.allclose(grow.rotate(x, angle.cos(), angle.sin()), torch.cat((z.real, z.imag), -1), atol=1e-6)


def test_block_against_torch_reference():
    """One block against torch's own pre-norm encoder layer, with positions switched off."""
    d, heads = 32, 4
    block = grow.Block(d, heads)
    ref = torch.nn.TransformerEncoderLayer(d, heads, 4 * d, dropout=0.0, activation='gelu', batch_first=True, norm_first=True)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0, 0.1)
        ref.self_attn.in_proj_weight.copy_(block.qkv.weight), ref.self_attn.in_proj_bias.zero_()
        ref.self_attn.out_proj.weight.copy_(block.out.weight), ref.self_attn.out_proj.bias.zero_()
        for ours, theirs in ((block.up, ref.linear1), (block.down, ref.linear2), (block.norm1, ref.norm1), (block.norm2, ref.norm2)):
            theirs.load_state_dict(ours.state_dict())
    x, one = torch.randn(2, 7, d), torch.ones(7, d // heads // 2)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(7)
    assert torch.allclose(block(x, one, 0 * one), ref(x, src_mask=mask, is_causal=True), atol=1e-5)


def test_initial_loss_is_log_vocabulary():
    model = model_of(config())
    loss = model(ids(8, 16), ids(8, 16, seed=1))[1].item()
    assert abs(loss - math.log(substrate.VOCAB)) < 0.05


@pytest.mark.parametrize('size', [4096, 1000, 65_536])
def test_loss_in_slices_equals_cross_entropy(monkeypatch, size):
    monkeypatch.setattr(grow, 'SLICE', size)
    model = model_of(config(birth='random'))
    idx, targets = ids(4, 16), ids(4, 16, seed=1)
    targets[0, :5] = -100
    targets[1] = targets[1, 0]                          # the same token several times
    (3 * model(idx, targets)[1]).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    reference = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    (3 * reference).backward()
    assert torch.allclose(model(idx, targets)[1], reference, atol=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(found[name], p.grad, atol=1e-6), name
    model.zero_grad()
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(idx, targets)[1]
    (3 * loss).backward()
    assert abs(loss.item() - reference.item()) < 0.02
    for name in ('head.weight', 'head.bias', 'norm.weight'):
        got = model.get_parameter(name).grad
        assert (got - found[name]).norm() < 0.02 * found[name].norm(), name


def test_the_interface_enters_with_elements_of_about_one():
    seen = []
    for name in ('unicode', 'random', 'binary'):
        model = model_of(config(substrate=name, d_model=64))
        model.blocks[0].register_forward_hook(lambda module, args, y: seen.append(args[0]))
        model(torch.arange(0x20, 0x60).reshape(4, 16))
    assert all(0.9 < x.square().mean().sqrt() < 1.1 for x in seen[:2]) and set(seen[2].unique().tolist()) == {0, 1}


# ---------------------------------------------------------------------------------------------------------------------
# Growth: frozen means frozen, and a block is what it says at birth


def test_identity_blocks_change_nothing_at_birth():
    model, x = model_of(config(birth='identity'), blocks=1), ids(2, 16)
    with torch.no_grad():
        for p in model.blocks[0].parameters():
            p.add_(0.05 * torch.randn_like(p))
        before = model(x)
        model.append(2)
        assert torch.equal(before, model(x))
        model.config.birth = 'random'
        model.append(1)
        assert not torch.equal(before, model(x))


def test_optimizer_holds_exactly_the_trainable_set():
    c = config(substrate='learned', layers=4, layers_per_stage=2)
    model = model_of(c, blocks=0)
    for phase, interface_trains in zip(grow.phases(c), (True, False)):
        grow.enter(model, phase)
        optimizer = grow.make_optimizer(model, c)
        held = {id(p) for group in optimizer.param_groups for p in group['params']}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}
        names = {name for name, p in model.named_parameters() if id(p) in held}
        top = range(phase.depth - phase.trained, phase.depth)
        assert {n.split('.')[1] for n in names if n.startswith('blocks')} == {str(k) for k in top}
        assert {'head.weight', 'head.bias', 'norm.weight', 'norm.bias'} <= names
        assert ('interface.table' in names) == interface_trains


def test_stages_that_shrink_keep_budget_and_tokens():
    for ratio, lora in ((0.5, 'none'), (2.0, 'interleaved'), (0.01, 'none')):
        c = config(stage_tokens=6400, layers=5, layers_per_stage=2, stage_ratio=ratio, lora=lora)
        rows = grow.ledger(c)
        grown = [r for r in rows if r['phase'] == 'grow']
        assert max(r['active'] for r in rows) <= grow.budget(c)
        assert abs(sum(r['tokens'] for r in grown) - len(grown) * 6400) <= len(grown) * c.batch_tokens
        for later in grown[1:]:
            assert later['tokens'] > 0 and abs(later['tokens'] - ratio * grown[0]['tokens']) <= (1 + ratio) * c.batch_tokens


def test_monolithic_restarts_where_a_grown_run_does(here):
    c = config(monolithic=True, restarts=True, stage_ratio=0.5, substrate='learned')
    plan = grow.phases(c)
    assert [(p.depth, p.trained) for p in plan] == [(3, 3)] * 3 and [p.steps for p in plan] == [p.steps for p in grow.phases(config(stage_ratio=0.5))]
    model = model_of(c, blocks=0)
    for phase in plan:
        grow.enter(model, phase)
        assert all(p.requires_grad for p in model.parameters())


def test_frozen_tensors_keep_their_bytes_over_a_stage(here):
    grow.main(flags(out='run', substrate='unicode'))
    stages = [grow.load(f'run/stage_{k}.pt')['model'] for k in (1, 2, 3)]
    for k, (before, after) in enumerate(zip(stages, stages[1:]), start=1):
        for name, old in before.items():
            frozen = name == 'interface.table' or name.startswith('blocks') and int(name.split('.')[1]) < k
            assert torch.equal(old, after[name]) == frozen, name
    assert torch.equal(stages[0]['interface.table'], substrate.substrate('unicode', 32).table)


def test_frozen_blocks_record_no_graph():
    c = config(layers=3)
    model = model_of(c, blocks=0)
    grow.enter(model, grow.Phase('grow', 3, 3, 1, 1))
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, y: seen.append(y.requires_grad))
    model(ids(1, 16), ids(1, 16))
    assert seen == [False, False, True]


def test_it_overfits_one_batch():
    c = config(layers=2, layers_per_stage=2, d_model=64, heads=4, substrate='random')
    model = model_of(c, blocks=0)
    grow.enter(model, grow.Phase('grow', 1, 2, 2, 20))
    optimizer = grow.make_optimizer(model, c)
    one = (ids(4, 16), ids(4, 16, seed=1))
    batches = always_the_batch(one)
    losses = [grow.train_step(model, optimizer, batches, k, c, torch.autocast('cpu', enabled=False))[0] for k in range(20)]
    assert losses[-1] < 0.5 < 10 < losses[0]


def test_accumulation_equals_one_large_batch(here):
    grow.main(flags(out='whole', micro_batch=4, stage_tokens=320))
    grow.main(flags(out='parts', micro_batch=1, stage_tokens=320))
    a, b = grow.load_model('whole').state_dict(), grow.load_model('parts').state_dict()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=2e-4), name


def test_same_seed_same_run_and_monolithic_sees_the_same_batches(here, monkeypatch):
    seen = []
    original = prepare_data.Batches.batch
    monkeypatch.setattr(prepare_data.Batches, 'batch', lambda self, step, rows=slice(None): seen.append(original(self, step, rows)) or seen[-1])
    grow.main(flags(out='a'))
    grow.main(flags(out='b'))
    grow.main(flags(out='c', monolithic=True))
    a, b = grow.load('a/latest.pt')['model'], grow.load('b/latest.pt')['model']
    assert all(torch.equal(a[name], b[name]) for name in a)
    third = len(seen) // 3
    for x, y, z in zip(seen[:third], seen[third:2 * third], seen[2 * third:]):
        assert torch.equal(x[0], y[0]) and torch.equal(x[0], z[0]) and torch.equal(x[0][:, 1:], x[1][:, :-1])


# ---------------------------------------------------------------------------------------------------------------------
# LoRA: within the budget, exact at birth, and gone after the merge


def test_lora_budget_of_the_paper():
    c = config(**PAPER | dict(layers=16, layers_per_stage=3, lora='interleaved', lora_tokens=640))
    rows = grow.ledger(c)
    assert max(r['active'] for r in rows) == 104_952_832 == grow.budget(c)
    assert [(r['layers'], r['rank']) for r in rows if r['phase'] == 'lora'] == [(6, 384), (9, 256), (12, 192), (15, 153), (16, 144)]
    for r in rows:
        if r['phase'] == 'lora':       # one rank more would not fit
            assert r['active'] <= grow.budget(c) < r['active'] + 16 * 1024 * r['layers']
    joint = grow.ledger(config(**PAPER | dict(layers=9, layers_per_stage=3, lora='joint', lora_rank=16)))
    assert joint[-1]['active'] - grow.budget(c) == 16 * 1024 * 16 * 6


def test_merge_by_hand():
    linear = torch.nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1., 2.], [3., 4.]]))
        linear.bias.copy_(torch.tensor([10., 20.]))
    lora = grow.LoRA(linear, 1)
    with torch.no_grad():
        lora.A.copy_(torch.tensor([[5., 6.]]))
        lora.B.copy_(torch.tensor([[1.], [-1.]]))
    x = torch.tensor([1., 1.])
    # W x + b = (13, 27); A x = 11; B A x = (11, -11)
    assert lora(x).tolist() == [24., 16.]
    merged = lora.merged()
    assert merged is linear and merged.weight.tolist() == [[6., 8.], [-2., -2.]] and merged(x).tolist() == [24., 16.]
    lora.merged()                                       # twice is harmless
    assert linear.weight.tolist() == [[6., 8.], [-2., -2.]]


def test_lora_against_peft():
    peft = pytest.importorskip('peft')
    block = grow.Block(32, 4)
    block.reset('random', 0.02, torch.Generator().manual_seed(0))
    grow.add_adapters([block], 4, 'test')
    other = grow.Block(32, 4)
    other.load_state_dict({name.replace('linear.', ''): p for name, p in block.state_dict().items() if not name.endswith(('.A', '.B'))})
    other = peft.get_peft_model(other, peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(grow.LINEARS)))
    with torch.no_grad():
        for name in grow.LINEARS:
            ours, theirs = getattr(block, name), getattr(other.base_model.model, name)
            ours.B.normal_(0, 0.1)
            theirs.lora_A['default'].weight.copy_(ours.A)
            theirs.lora_B['default'].weight.copy_(ours.B)
    x, one = torch.randn(2, 7, 32), torch.ones(7, 4)
    with torch.no_grad():
        assert torch.allclose(block(x, one, 0 * one), other(x, one, 0 * one), atol=1e-6)
        grow.merge_adapters([block])
        other = other.merge_and_unload()
        for name in grow.LINEARS:
            assert torch.allclose(getattr(block, name).weight, getattr(other, name).weight, atol=1e-6)


def test_adapters_are_exact_at_birth_and_merge_to_the_same_function():
    model, x = model_of(config(birth='random')), ids(2, 16)
    names, count = list(model.state_dict()), grow.count(model.parameters())
    with torch.no_grad():
        before = model(x)
        grow.add_adapters(model.blocks, 3, 'test')
        grow.add_adapters(model.blocks, 3, 'test')      # twice is harmless
        assert torch.equal(before, model(x)) and grow.count(model.parameters()) == count + 3 * 16 * 32 * 3
        for block in model.blocks:
            for name in grow.LINEARS:
                getattr(block, name).B.normal_(0, 0.1)
        trained = model(x)
        assert not torch.allclose(before, trained, atol=1e-3)
        grow.merge_adapters(model.blocks)
        grow.merge_adapters(model.blocks)
        assert torch.allclose(trained, model(x), atol=1e-5)
    assert list(model.state_dict()) == names and grow.count(model.parameters()) == count


LORA = dict(lora='interleaved', lora_lr=1e-2)


def test_lora_phase_trains_all_blocks_and_merges(here, capsys):
    grow.main(flags(out='run', **LORA, lora_stages=2))
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if 'merged' in line)
    before, after = (float(word.strip(',')) for word in line.replace('after', '').replace('before', '').split() if word.strip(',').replace('.', '').isdigit() and '.' in word)
    assert abs(before - after) < 1e-5
    first, second = (grow.load(f'run/stage_{k}.pt')['model'] for k in (1, 2))
    assert not any(name.endswith('.A') for name in second)
    assert not torch.equal(first['blocks.0.qkv.weight'], second['blocks.0.qkv.weight'])
    assert torch.equal(first['blocks.0.norm1.weight'], second['blocks.0.norm1.weight'])
    rows = Path('run/log.csv').read_text().splitlines()
    assert [row.split(',')[:2] for row in rows if row.split(',')[6]][1:] == [['grow', '1'], ['grow', '2'], ['lora', '2'], ['grow', '3']]


def test_joint_adapters_train_beside_new_blocks(here):
    grow.main(flags(out='run', lora='joint', lora_rank=2, lora_lr=1e-2))
    first, second = (grow.load(f'run/stage_{k}.pt')['model'] for k in (1, 2))
    assert not torch.equal(first['blocks.0.up.weight'], second['blocks.0.up.weight']) and 'blocks.0.up.A' not in second


@pytest.mark.parametrize('stop_at', [23, 25, 26])
def test_killed_in_a_lora_phase_at_its_merge_and_after(here, monkeypatch, stop_at):
    """Steps 20-24 are the LoRA phase of stage 2; 'at its merge' is a crash inside merge_adapters, with the last checkpoint before it."""
    grow.main(flags(out='whole', **LORA, lora_stages=2))
    at_merge = stop_at == 25
    name = 'merge_adapters' if at_merge else 'train_step'
    original, calls = getattr(grow, name), []

    def crash(*args):
        calls.append(1)
        if len(calls) == (1 if at_merge else stop_at):
            if at_merge:
                getattr(args[0][0], 'qkv').merged()     # half-merged in memory when it dies
            raise RuntimeError('crash')
        return original(*args)
    monkeypatch.setattr(grow, name, crash)
    with pytest.raises(RuntimeError):
        grow.main(flags(out='cut', save_every=0, **LORA, lora_stages=2))
    monkeypatch.setattr(grow, name, original)
    if stop_at == 23:
        model = grow.load_model('cut')                   # in the middle: adapters merged on loading
        assert not any(name.endswith('.A') for name in model.state_dict())
    grow.main(['--resume', '--out', 'cut'])
    assert same_weights('whole', 'cut')


def test_copied_block_is_the_block_below():
    model = model_of(config(birth='copy'), blocks=2)
    for a, b in zip(model.blocks[0].parameters(), model.blocks[1].parameters()):
        assert torch.equal(a, b) and a is not b


def test_growing_a_finished_model_further(here, capsys):
    grow.main(flags(out='small', substrate='random'))
    prepare_data.prepare('other', texts(seed=1), 'made up', 'mine')
    grow.main(['--layers', '5', '--grow_from', 'small', '--out', 'large', '--data', 'mine/other', '--device', 'cpu', '--no-compile', '--dtype', 'float32',
              '--layers_per_stage', '1', '--stage_tokens', '320', '--batch_tokens', '64', '--eval_tokens', '256', '--lora', 'none'])
    old, new = grow.load('small/latest.pt'), grow.load('large/latest.pt')
    assert new['depth'] == 5 and new['config']['grow_from'] == 'small' and 'small' in capsys.readouterr().out
    assert [(row['phase'], row['stage']) for row in new['at']['history']] == [('before', 4), ('grow', 4), ('grow', 5)]
    for name, value in old['model'].items():
        if name.startswith(('blocks', 'interface')):
            assert torch.equal(value, new['model'][name])
    fails(capsys, ['--grow_from', 'small', '--layers', '3'], '--layers', status=2)
    fails(capsys, ['--grow_from', 'small', '--layers', '5', '--d_model', '64'], '--d_model', status=2)
    grow.main(['--plan', '--grow_from', 'small', '--layers', '5'])
    assert 'small' in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Experts on one interface


@pytest.fixture(scope='session')
def experts(corpus):
    """Two experts on one interface and one on another, in the folder of the data."""
    for name, changes in dict(a=dict(seed=1), b=dict(seed=2, d_model=48, heads=3), c=dict(seed=3, substrate='random'), d=dict(seed=4)).items():
        old = os.getcwd()
        os.chdir(corpus)
        grow.main(flags(out=name, **changes, stage_tokens=320))
        os.chdir(old)
    prepare_data.prepare('other', texts(seed=1, words='one two three four'.split()), 'made up', corpus / 'data')
    return corpus


def loaded(experts, *names):
    return [grow.load_model(experts / name) for name in names]


def test_mean_of_copies_is_the_expert(experts):
    x, [a] = ids(2, 16), loaded(experts, 'a')
    with torch.no_grad():
        want, loss = a(x), a(x, x)[1]
        for n in (2, 3):
            merged = grow.MixtureOfExperts(loaded(experts, *'a' * n)).share_interface()
            assert torch.allclose(merged(x), want, atol=1e-5) and torch.allclose(merged(x, x)[1], loss, atol=1e-5)
            assert all(e.interface.table is merged.experts[0].interface.table for e in merged.experts)


def test_fused_head_is_the_mean_of_the_logits(experts):
    x, models = ids(2, 16), loaded(experts, 'a', 'd', 'c')
    with torch.no_grad():
        want = torch.stack([model(x) for model in models]).mean(0)
        assert torch.allclose(grow.MixtureOfExperts(models)(x), want, atol=1e-5)


def test_experts_on_other_interfaces_are_refused_before_any_computing(experts, monkeypatch, capsys):
    monkeypatch.chdir(experts)
    monkeypatch.setattr(grow, 'evaluate', lambda *args: 1 / 0)
    tail = ['--device', 'cpu', '--no-compile', '--dtype', 'float32', '--data', 'stdlib']
    fails(capsys, ['--moe', 'a', 'c', *tail], 'random', '--allow_mismatch')
    fails(capsys, ['--moe', 'a', *tail], '--moe', status=2)
    fails(capsys, ['--moe', 'a', 'd', '--grow_from', 'a', '--layers', '5', *tail], '--moe', status=2)
    fails(capsys, ['--tune_heads', '640', *tail], '--moe', status=2)
    monkeypatch.undo()
    monkeypatch.chdir(experts)
    grow.main(['--moe', 'a', 'c', '--allow_mismatch', '--eval_tokens', '64', '--batch_tokens', '64', *tail])
    assert 'merged' in capsys.readouterr().out
    contexts = [grow.configure(['--moe', 'a', 'c', *context])[0].context for context in ([], ['--context', '8'], ['--context', '999'])]
    assert contexts == [16, 8, 16]                                                # what all experts can see, or less if one asks for it


def test_experts_are_compared_on_every_data_set(experts, monkeypatch, capsys):
    monkeypatch.chdir(experts)
    grow.main(['--moe', 'a', 'b', '--data', 'stdlib', 'other', '--eval_tokens', '256', '--device', 'cpu', '--no-compile', '--dtype', 'float32'])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    seen = {tuple(row[:2]): float(row[2]) for row in rows if len(row) == 5 and row[1] in ('stdlib', 'other')}
    assert set(seen) == {(m, d) for m in ('a', 'b', 'merged', 'unigram', 'bigram') for d in ('stdlib', 'other')}
    amp, c = torch.autocast('cpu', enabled=False), config()
    for name in 'ab':
        for d in ('stdlib', 'other'):
            assert abs(seen[name, d] - grow.evaluate(grow.load_model(name), prepare_data.Dataset(d), c, amp)) < 1e-3


def test_tuned_heads_move_alone_and_load_like_any_model(experts, monkeypatch, capsys):
    monkeypatch.chdir(experts)
    words = ['--moe', 'a', 'd', '--data', 'stdlib:3', 'other:1', '--tune_heads', '640', '--batch_tokens', '64', '--eval_tokens', '256', '--head_lr_later', '0.01',
             '--device', 'cpu', '--no-compile', '--dtype', 'float32', '--out']
    grow.main([*words, 'tuned'])
    text = capsys.readouterr().out
    assert 'before' in text
    tuned, untuned = grow.load_model('tuned'), grow.MixtureOfExperts(loaded(experts, 'a', 'd'))
    for name, value in untuned.state_dict().items():
        assert torch.equal(value, tuned.state_dict()[name]) != name.startswith('head'), name
    history = grow.load('tuned/latest.pt')['at']['history']
    assert history[-1]['phase'] == 'tune' and history[-1]['val_loss'] < history[0]['val_loss'] and 'val_other' in history[-1]
    grow.main(['--sample', 'cats', '--out', 'tuned', '--length', '5', '--device', 'cpu'])
    capsys.readouterr()
    grow.main(['--resume', '--out', 'tuned'])
    assert 'is finished' in (said := capsys.readouterr().out) and '--grow_from' not in said      # which takes no mixture
    fails(capsys, ['--grow_from', 'tuned', '--layers', '9'], 'mixture')
    grow.main(['--sample', 'cats', '--moe', 'a', 'd', '--length', '5', '--device', 'cpu'])
    original, calls = grow.train_step, []

    def crash(*args):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError('crash')
        return original(*args)
    monkeypatch.setattr(grow, 'train_step', crash)
    with pytest.raises(RuntimeError):
        grow.main([*words, 'cut', '--save_every', '0'])
    monkeypatch.setattr(grow, 'train_step', original)
    grow.main(['--resume', '--out', 'cut'])
    assert same_weights('tuned', 'cut')


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def same_weights(a, b):
    a, b = grow.load(f'{a}/latest.pt')['model'], grow.load(f'{b}/latest.pt')['model']
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize('stop_at', [1, 4, 10, 11, 17, 29])
def test_resume_equals_uninterrupted_bit_for_bit(here, monkeypatch, stop_at):
    """Stopped by a crash at any step (here: with a checkpoint at every step), in the middle or at the edge of a stage."""
    grow.main(flags(out='whole'))
    original, calls = grow.train_step, []

    def crash(*args):
        calls.append(1)
        if len(calls) == stop_at + 1:
            raise RuntimeError('crash')
        return original(*args)
    monkeypatch.setattr(grow, 'train_step', crash)
    with pytest.raises(RuntimeError):
        grow.main(flags(out='cut', save_every=0))
    monkeypatch.setattr(grow, 'train_step', original)
    grow.main(['--resume', '--out', 'cut'])
    assert same_weights('whole', 'cut')
    histories = [[{k: v for k, v in row.items() if k != 'tokens_per_s'} for row in grow.load(run)['at']['history']] for run in ('whole', 'cut')]
    assert histories[0] == histories[1] and len(histories[0]) == 3
    rows = [Path(run, 'log.csv').read_text().splitlines() for run in ('whole', 'cut')]
    strip = [[','.join(v for k, v in zip(rows[0][0].split(','), line.split(',')) if k not in ('seconds', 'tokens_per_s')) for line in r] for r in rows]
    assert strip[0] == strip[1]


def test_finished_run_says_so_and_keeps_its_files(here, capsys):
    grow.main(flags(out='run'))
    before = Path('run/latest.pt').read_bytes()
    grow.main(['--resume', '--out', 'run'])
    assert 'finished' in capsys.readouterr().out
    files = {path.name: path.read_bytes() for path in Path('run').iterdir()}
    fails(capsys, flags(out='run'), 'run', '--resume')
    fails(capsys, flags(out='run', layers=5, seed=1, substrate='random'), 'run', '--resume')
    assert Path('run/latest.pt').read_bytes() == before and files == {path.name: path.read_bytes() for path in Path('run').iterdir()}
    os.remove('run/latest.pt')                                                    # what is left is not written over either
    fails(capsys, flags(out='run'), 'run', 'another --out')


def test_load_model_and_sampling(here, capsys):
    grow.main(flags(out='run', substrate='unicode'))
    model = grow.load_model('run')
    x = ids(2, 16)
    logits, (none, loss) = model(x), model(x, x)
    assert logits.shape == (2, 16, substrate.VOCAB) and none is None and not model.training
    assert torch.allclose(loss, F.cross_entropy(logits.flatten(0, 1), x.flatten()), atol=1e-4)
    capsys.readouterr()
    texts = []
    for _ in range(2):
        grow.main(['--sample', 'Привет', '--out', 'run', '--length', '20', '--device', 'cpu'])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and 'Привет' in texts[0]


def test_checkpoint_carries_its_table(here, monkeypatch):
    """A trained model never recomputes its interface."""
    np.save('table.npy', np.random.default_rng(0).standard_normal((substrate.VOCAB, 32)).astype('float32'))
    grow.main(flags(out='run', substrate='table.npy'))
    os.remove('table.npy')
    assert grow.load_model('run').interface.table.shape == (substrate.VOCAB, 32)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

WORKER = '''
import os, signal, sys
sys.path.insert(0, {repo!r})
import grow
original, calls = grow.train_step, []
open('pid%d' % grow.RANK, 'w').write(str(os.getpid()))
def step(*args):
    calls.append(1)
    if len(calls) == {at}:
        {what}
    return original(*args)
grow.train_step = step
grow.main()
'''


def torchrun(argv, what='pass', at=0, processes=2):
    """Runs grow.main(argv) in several processes; what[at] happens in each before its step number `at`. -> status, stdout, stderr"""
    Path('worker.py').write_text(WORKER.format(repo=str(REPO), what=what, at=at))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(processes), 'worker.py', *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | dict(OMP_NUM_THREADS='1'))
    return done.returncode, done.stdout, done.stderr


def close(a, b, tolerance=1e-5):
    """Two runs end alike: losses in log and history, weights in the checkpoint."""
    (a, b), logs = map(grow.load, (a, b)), [Path(run, 'log.csv').read_text().splitlines() for run in (a, b)]
    for x, y in zip(*logs, strict=True):
        for name, u, v in zip(grow.COLUMNS, x.split(','), y.split(','), strict=True):
            assert u == v or name in ('seconds', 'tokens_per_s') or name.endswith('loss') and abs(float(u) - float(v)) <= tolerance + 1e-5, (x, y)
    for x, y in zip(a['at']['history'], b['at']['history'], strict=True):
        assert x['phase'] == y['phase'] and abs(x['val_loss'] - y['val_loss']) <= tolerance, (x, y)
    for name, tensor in a['model'].items():
        assert torch.allclose(tensor, b['model'][name], rtol=0, atol=10 * tolerance), name


def test_two_processes_train_like_one(here):
    """Stages and a LoRA phase; each process adds gradients up over two micro-batches before they are averaged."""
    words = dict(**LORA, lora_stages=2, micro_batch=1)
    grow.main(flags(out='one', **words))
    status, text, error = torchrun(flags(out='two', **words))
    assert status == 0 and text.count('lora 2: val loss') == text.count('saved in two') == 1, error
    close('one', 'two')


def test_killed_with_two_processes_and_resumed_with_one(here, capsys):
    """Killed in stage 2; here each process passes its rows at once."""
    grow.main(flags(out='whole', micro_batch=2))
    status, _, error = torchrun(flags(out='cut', micro_batch=2, save_every=0), 'os.kill(os.getpid(), signal.SIGKILL)', at=15)
    assert status and grow.load('cut')['at']['global_step'] == 14, error
    grow.main(['--resume', '--out', 'cut'])
    assert 'not to the same bits' in capsys.readouterr().out
    close('whole', 'cut')


@pytest.mark.parametrize('what, words', [
    ('os.kill(os.getpid(), signal.SIGKILL)', ['SIGKILL']),
    ('raise grow.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")', ['error: out of memory', '--micro_batch']),
    ('args[0].module.head.bias.data.fill_(float("nan"))', ['not finite', 'grow 2, step 3', 'latest.pt'])])
def test_a_process_that_ends_early_ends_the_others(here, what, words):
    status, _, error = torchrun(flags(out='run', micro_batch=2, save_every=0), f'if grow.RANK == 1: {what}', at=13)
    assert status == 1 and all(word in error for word in words) and '[rank' not in error, error     # no traceback but torchrun's
    assert grow.load('run')['at']['global_step'] == 12
    for k in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int(Path(f'pid{k}').read_text()), 0)


def test_ctrl_c_stops_all_processes_after_the_same_step(here):
    status, text, error = torchrun(flags(out='run', micro_batch=2), 'if grow.RANK == 1: os.kill(os.getpid(), signal.SIGINT)', at=13)
    assert status and 'stopped: go on with --resume' in text, error
    assert grow.load('run')['at']['global_step'] == 13


def test_what_several_processes_cannot_do(here, capsys, monkeypatch):
    assert grow.configure(['--device', 'cpu', '--context', '128'])[0].micro_batch == 4       # the batch has four rows, and the preset eight
    monkeypatch.setattr(grow, 'RANKS', 3)
    fails(capsys, flags(plan=True), '--micro_batch', '3 processes', status=2)
    monkeypatch.setattr(grow, 'RANKS', 2)
    fails(capsys, flags(plan=True, micro_batch=2), '--plan', 'one process', status=2)
    fails(capsys, ['--sample', 'x', '--device', 'cpu'], '--sample', 'one process', status=2)


@pytest.mark.parametrize('error', [lambda: torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), lambda: torch.empty(2**60),
                                   lambda: RuntimeError('CUDA error: out of memory'), lambda: RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling')])
def test_out_of_memory_is_one_sentence(here, capsys, monkeypatch, error):
    def full(*args):
        raise error()
    monkeypatch.setattr(grow, 'train_step', full)
    fails(capsys, flags(out='run'), 'out of memory', '--micro_batch')
    monkeypatch.undo()
    os.chdir(here)
    grow.main(['--resume', '--out', 'run', '--micro_batch', '1'])
    assert grow.load('run')['at']['global_step'] == 30


# ---------------------------------------------------------------------------------------------------------------------
# Compilation


def test_nine_stages_compile_without_falling_back_to_eager(here):
    """Growing recompiles, but every block of every stage must run compiled: dynamo counts what it gave up on."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    c = config(layers=10, layers_per_stage=1)
    model = model_of(c, blocks=0)
    ran = []
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph, inputs):
        compiled = aot_eager(graph, inputs)
        return lambda *args: ran.append(1) or compiled(*args)
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True
    for phase in grow.phases(c):
        grow.enter(model, phase)
        for block in model.blocks:
            block.compile(dynamic=False, backend=backend)
        ran.clear()
        model(ids(1, 16), ids(1, 16))[1].backward()
        assert len(ran) >= phase.depth, (phase, len(ran))
    assert not torch._dynamo.utils.counters['graph_break']
    assert len(torch._dynamo.utils.counters['frames']) and torch._dynamo.utils.counters['stats']['unique_graphs'] < 12


def test_compiled_run_equals_eager(here):
    if not any(map(grow.shutil.which, ('c++', 'g++', 'clang++'))):
        pytest.skip('no C++ compiler')
    grow.main(flags(out='eager', stage_tokens=128))
    grow.main(flags(out='compiled', stage_tokens=128, compile=True))
    a, b = (grow.load(f'{run}/latest.pt')['at']['history'][-1]['val_loss'] for run in ('eager', 'compiled'))
    assert abs(a - b) < 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes of users


NUMBERS = [f for f in dataclasses.fields(grow.Config) if f.metadata and f.type in (int, float)]
WORDS = [f for f in dataclasses.fields(grow.Config) if f.metadata and f.type is str and f.metadata['allowed']]


@pytest.mark.parametrize('field', NUMBERS, ids=[f.name for f in NUMBERS])
def test_numbers_out_of_range_and_of_another_kind(field, tmp_path, monkeypatch, capsys):
    """Made from Config, so a new flag is in it. Both ends of the range are accepted; `--plan --moe x` keeps a value that slips through from training."""
    monkeypatch.chdir(tmp_path)
    (low, high), whole = field.metadata['allowed'], field.type is int
    wrong = [low - 1, high + 1, 2 * high + 1, -10**9, 10**30] if whole else [low - 1e-3, -low - 1, high * 1.001, -1e300, '1e400']
    for value in [*wrong, 'nan', 'inf', '-inf', '', 'x', '1,5', '0x10', '1 2', *['1.5', '1e3', '2.0'] * whole]:
        fails(capsys, [f'--{field.name}={value}', '--plan', '--moe', 'x'], f'--{field.name}', status=2)
    for value in (low, high):
        assert getattr(grow.configure([f'--{field.name}={value}', '--resume'])[0], field.name) == value
    assert not list(tmp_path.iterdir())


WRONG = [(script, shlex.split(line), word) for script, lines in {
    grow: """
        --no-such-flag | --no-such-flag
        layers 3 | layers
        --lay 3 | --lay
        --layers | --layers
        --no-layers | --no-layers
        --compile yes | yes
        --born_layers 3 | --born_layers
        --d_model 250 --heads 7 | even multiple of --heads
        --d_model 250 | even multiple of --heads
        --heads 1024 --d_model 1024 | even multiple of --heads
        --heads 256 | even multiple of --heads
        --substrate binary --d_model 40 --heads 2 | multiple of 16
        --substrate binary --d_model 17 --heads 1 | even multiple of --heads
        --substrate unicod | unicode, binary
        --substrate '' | unicode, binary
        --batch_tokens 1 | --batch_tokens 1 must be a multiple
        --batch_tokens 65 | --batch_tokens 65 must be a multiple
        --batch_tokens 512 --context 63 | --context 63
        --batch_tokens 512 --context 1024 | --context 1024
        --micro_batch 3 | --micro_batch 3
        --micro_batch 100000 | --micro_batch 100000
        --micro_batch 3 --batch_tokens 1024 --context 128 | --micro_batch
        --stage_tokens 5 | --stage_tokens
        --lora_tokens 5 | --lora_tokens
        --tune_heads 100000 | --moe
        --monolithic --lora joint | leave out --lora
        --monolithic --lora interleaved | leave out --lora
        --lora interleaved --layers_per_stage 1 --layers 20 --d_model 16 --heads 1 | --layers_per_stage
        --lora_stages x | --lora_stages
        --lora_stages '' | --lora_stages
        --lora_stages 1, | --lora_stages
        --lora_stages 0 | --lora_stages
        --lora_stages 2,4 --lora interleaved | --lora_stages
        --lora_stages 2 | --lora interleaved
        --lora_stages 2 --lora joint | --lora interleaved
        --sample x --layers 5 | --layers
        --sample x --out run --substrate unicode | --substrate
        --sample x --grow_from run | --grow_from
        --data | --data
        --data a:0 | weight
        --data a:1001 | weight
        --data a:-1 | weight
        --data a:1.5 | weight
        --data a:nan | weight
        --data a: b:x | weight
        --data a a | once
        --data stdlib b:0 | weight
        --moe | --moe
        --resume --plan | give one of them
        --resume --sample x | give one of them
        --plan --sample x | give one of them
        --sample | --sample
        --moe RUN | two experts
        --moe RUN RUN --plan | --plan
        --moe RUN RUN --monolithic | --monolithic
        --moe RUN RUN --grow_from RUN --layers 5 | --grow_from
        --moe RUN RUN --tune_heads 1 | --tune_heads
        --grow_from RUN --layers 3 | --layers
        --grow_from RUN --layers 5 --monolithic | --grow_from
        --grow_from RUN --layers 5 --substrate random | --substrate
        --grow_from RUN --layers 5 --d_model 64 | --d_model
        --grow_from RUN --layers 5 --heads 4 | --heads
        --grow_from RUN --layers 5 --context 32 | --context
    """, prepare_data: """
        | what to prepare
        bogus | bogus
        wikipedia-de | wikipedia-de
        stdlib --bogus | --bogus
        stdlib --nam a | --nam
        stdlib --check a | --check
        --check | --check
        files | --name
        files a.txt | --name
        files --name a | PATH
        files --name a/b TEXT | --name
        files --name ../a TEXT | --name
        stdlib a.txt | a.txt
        stdlib --name a | --name
        stdlib --split-line % | --split-line
        stdlib --tokens 9 | --tokens
        stdlib --keep-raw | --keep-raw
        cosmopedia a.txt | a.txt
        shakespeare --name a/b | --name
        shakespeare --mirror ftp://a | --mirror
        shakespeare --mirror '' | --mirror
        shakespeare --split-line x | --split-line
        shakespeare --tokens 0 | --tokens
        shakespeare --tokens -1 | --tokens
        shakespeare --tokens nan | --tokens
        shakespeare --tokens inf | --tokens
        shakespeare --tokens 1.5 | --tokens
        shakespeare --tokens x | --tokens
    """, eval_mmlu: """
        | OUT
        RUN --bogus | --bogus
        RUN --shot 1 | --shot
        RUN --task mmlu2 | --task
        RUN --shots -1 | --shots
        RUN --shots nan | --shots
        RUN --shots 1 --task csqa | --shots
        RUN --limit 0 | --limit
        RUN --limit -1 | --limit
        RUN --limit 1e3 | --limit
        RUN --limit inf | --limit
        RUN --batch_tokens 0 | --batch_tokens
        RUN --batch_tokens -5 | --batch_tokens
        RUN --batch_tokens x | --batch_tokens
        RUN --device tpu | --device
        RUN --dtype float8 | --dtype
        RUN RUN --all_stages | --all_stages
    """, substrate: """
        --bogus | --bogus
        x | x
        --draw | --draw
        --count | --count
        --count-ngrams=3 | --count-ngrams
    """}.items() for line, _, word in (row.rpartition('|') for row in lines.strip().splitlines()) for word in [word.strip()]]


@pytest.fixture(scope='session')
def finished(corpus, tmp_path_factory):
    """The folder of a tiny finished run."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp('finished')
    (folder / 'data').symlink_to(corpus / 'data')
    os.chdir(folder)
    try:
        grow.main(flags(out='run', stage_tokens=64, length=1))
    finally:
        os.chdir(before)
    return folder / 'run'


@pytest.mark.parametrize('script, argv, word', WRONG, ids=[f'{script.__name__} {shlex.join(argv)}' for script, argv, _ in WRONG])
def test_wrong_command_lines_end_in_one_sentence(script, argv, word, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in finished.iterdir()}
    cpu = ['--device', 'cpu'] if script is grow and '--device' not in argv else []
    for name in ('download', 'prepare_stdlib'):                                   # whoever gets that far has failed
        monkeypatch.setattr(prepare_data, name, None)
    fails(capsys, [dict(RUN=str(finished), TEXT=str(substrate.NGRAMS)).get(x, x) for x in argv] + cpu, word, status=2, main=script.main)
    assert not list(tmp_path.iterdir()) and before == {path: path.read_bytes() for path in finished.iterdir()}


@pytest.mark.parametrize('field', WORDS, ids=[f.name for f in WORDS])
def test_words_that_are_no_choice(field, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for value in ('', 'x', '0', field.metadata['allowed'][0].upper() + ' '):
        fails(capsys, [f'--{field.name}={value}', '--plan'], f'--{field.name}', field.metadata['allowed'][0], status=2)
    assert not list(tmp_path.iterdir())


def test_contradicting_resume_is_refused(finished, tmp_path, monkeypatch, capsys):
    """Every flag but those of RUNTIME, made from Config."""
    monkeypatch.chdir(tmp_path)
    stored, before = grow.load(finished)['config'], {path.name: path.read_bytes() for path in finished.iterdir()}
    tried = 0
    for field in dataclasses.fields(grow.Config):
        if field.metadata and field.name not in grow.RUNTIME | {'plan', 'sample'}:
            allowed, had = field.metadata['allowed'], stored[field.name]
            if field.type is bool:
                words = [f'--no-{field.name}' if had else f'--{field.name}']
            else:
                words = [f'--{field.name}', str(next(value for value in [*allowed, 'other'] if value != had))]
            fails(capsys, ['--resume', '--out', str(finished), *words], f'--{field.name}', 'leave the flag out', status=2)
            tried += 1
    assert tried > 20 and before == {path.name: path.read_bytes() for path in finished.iterdir()} and not list(tmp_path.iterdir())


def test_missing_things_are_named(here, capsys):
    fails(capsys, flags(out='run', data='nothing'), 'nothing', 'prepare_data.py')
    fails(capsys, ['--sample', 'x', '--out', 'nowhere'], 'nowhere')
    fails(capsys, ['--sample', 'x'], 'out')
    fails(capsys, ['--resume', '--out', 'nowhere'], 'nowhere')
    fails(capsys, flags(out='run2', substrate='no.npy'), 'no.npy')


@pytest.fixture
def own(finished, tmp_path, monkeypatch):
    """A copy of the finished run in a working folder of its own: ./run."""
    shutil.copytree(finished, tmp_path / 'run')
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'run'


def test_damaged_checkpoints_are_refused(own, capsys):
    whole, foreign = (own / 'latest.pt').read_bytes(), io.BytesIO()
    with zipfile.ZipFile(foreign, 'w') as file:
        file.writestr('a.txt', 'text')
    torch.save({'model': {}, 'model_args': {}, 'iter_num': 3, 'config': {}}, own / 'nanogpt.pt')
    torch.save([torch.zeros(3)], own / 'list.pt')
    torch.save(torch.zeros(3), own / 'legacy.pt', _use_new_zipfile_serialization=False)
    others = [path.read_bytes() for path in (own / 'nanogpt.pt', own / 'list.pt', own / 'legacy.pt', own / 'log.csv', substrate.GLYPHS)]
    for damage in (b'', whole[:1000], whole[:len(whole) // 2], whole[:-50], whole[1:], b'foreign' * 100, foreign.getvalue(), *others):
        (own / 'latest.pt').write_bytes(damage)
        fails(capsys, ['--sample', 'x', '--out', 'run', '--device', 'cpu'], 'latest.pt')
        fails(capsys, ['--resume', '--out', 'run', '--device', 'cpu'], 'latest.pt')
        (own / 'stage_2.pt').write_bytes(damage)
        fails(capsys, ['--grow_from', 'run/stage_2.pt', '--layers', '9', '--device', 'cpu'], 'stage_2.pt')


def test_a_flipped_bit_in_a_checkpoint_is_found(own):
    """torch.load takes it without a word: nearly all of the file are numbers."""
    path, rng, silent, found = own / 'stage_1.pt', random.Random(0), 0, 0
    whole, good = path.read_bytes(), grow.load(path)
    for _ in range(25):
        path.write_bytes(flipped(whole, rng))
        try:
            torch.load(path, weights_only=True)
            silent += 1
        except Exception:
            pass
        try:
            loaded = grow.load(path)
            assert all(torch.equal(t, loaded['model'][name]) for name, t in good['model'].items()) and loaded['config'] == good['config']
        except substrate.UserError as error:
            assert 'stage_1.pt is damaged' in str(error)
            found += 1
    assert silent > 15 and found > 20


class Payload:
    """What unpickling it does is to make a file."""

    def __reduce__(self):
        return os.mkdir, ('ran',)


def test_code_in_a_file_is_refused_and_not_run(own, capsys):
    ckpt = torch.load('run/latest.pt', weights_only=True)
    for name, legacy in (('new', False), ('old', True)):
        torch.save(ckpt | {'at': Payload()}, f'{name}.pt', _use_new_zipfile_serialization=not legacy)
        torch.save({'weight': torch.zeros(substrate.VOCAB, 32), 'more': Payload()}, f'table_{name}.pt', _use_new_zipfile_serialization=not legacy)
    Path('plain.pt').write_bytes(pickle.dumps(Payload(), protocol=2))
    np.save('table.npy', np.array([Payload()]), allow_pickle=True)
    for name in ('new.pt', 'old.pt', 'plain.pt'):
        fails(capsys, ['--sample', 'x', '--out', name, '--device', 'cpu'], name)
        fails(capsys, ['--grow_from', name, '--layers', '9'], name)
        with pytest.raises(substrate.UserError, match=name):
            grow.load_model(name)
    for name in ('table_new.pt', 'table_old.pt', 'plain.pt', 'table.npy'):
        with pytest.raises(substrate.UserError, match=name):
            substrate.substrate(name, 32)
    np.savez('glyphs.npz', np.array([Payload()]))
    assert substrate.load_npz('glyphs.npz') is None
    assert not Path('ran').exists()
    pickle.loads(Path('plain.pt').read_bytes())
    assert Path('ran').exists()                                                   # so the payload does work


def test_checkpoints_from_before_the_scaled_interface_are_refused(own, capsys):
    old = grow.load('run')
    del old['machine']['processes']                                               # which came with it
    torch.save(old, 'run/latest.pt')
    fails(capsys, ['--sample', 'x', '--out', 'run', '--device', 'cpu'], 'latest.pt', 'not a checkpoint of this version')


@pytest.mark.parametrize('number', ['nan', 'inf', '-inf'])
def test_nan_stops_and_keeps_the_last_good_checkpoint(here, capsys, monkeypatch, number):
    original = prepare_data.Batches.batch

    def poison(self, step, rows=slice(None)):
        if step == 5:
            model[0].norm.bias.data[7] = float(number)
        return original(self, step, rows)
    model, new_model = [], grow.new_model
    monkeypatch.setattr(grow, 'new_model', lambda *args: model.append(new_model(*args)) or model[0])
    monkeypatch.setattr(prepare_data.Batches, 'batch', poison)
    fails(capsys, flags(out='run', save_every=0), 'not finite', 'step 6', 'latest.pt')
    last = grow.load('run/latest.pt')
    assert last['at']['global_step'] == 5 and all(t.isfinite().all() for t in last['model'].values())


def test_full_disk_keeps_the_last_good_checkpoint(here, capsys, monkeypatch):
    original, calls = torch.save, []

    def full(content, path):
        calls.append(1)
        if len(calls) == 3:
            Path(path).write_bytes(b'half of it')
            raise RuntimeError('[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file')
        original(content, path)
    monkeypatch.setattr(torch, 'save', full)
    fails(capsys, flags(out='run', save_every=0), 'latest.pt', 'disk')
    monkeypatch.undo()
    os.chdir(here)
    assert grow.load('run')['at']['global_step'] == 1 and not list(Path('run').glob('.*'))
    grow.main(['--resume', '--out', 'run'])


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
            fails(capsys, command, 'train_000000.npy', 'is the disk full?', main=prepare_data.main)
        assert not list(Path('data').iterdir())
    prepare_data.main(command)
    with no_file_over(100), pytest.raises(substrate.UserError, match='meta.json .* disk full'):
        with substrate.replacing('data/a/meta.json') as path:
            path.write_text('x' * 1000)
    prepare_data.check('a')                                                       # the old one is whole


def test_full_disk_while_writing_checkpoints_and_log(here, monkeypatch, capsys):
    with no_file_over(10_000):
        fails(capsys, flags(out='run', stage_tokens=128), 'run/latest.pt', 'is the disk full?')
    assert {path.name for path in Path('run').iterdir()} == {'log.csv'}   # the run is free to start
    original, limit = grow.train_step, []

    def full(*args):
        if len(limit) == 3:
            limit.append(no_file_over(Path('run/log.csv').stat().st_size + 3))
            limit[-1].__enter__()
        limit.append(None)
        return original(*args)
    monkeypatch.setattr(grow, 'train_step', full)
    try:
        fails(capsys, flags(out='run', stage_tokens=128), 'File too large', 'make room')
    finally:
        limit[3].__exit__(None, None, None)
    monkeypatch.setattr(grow, 'train_step', original)
    assert grow.load('run')['at']['global_step'] == 2                             # stage 1
    grow.main(['--resume', '--out', 'run'])
    grow.main(flags(out='whole', stage_tokens=128))
    assert same_weights('run', 'whole') and len(Path('run/log.csv').read_text().splitlines()) == len(Path('whole/log.csv').read_text().splitlines())


@pytest.mark.parametrize('text', [*ODD, '', '\ud83d', '\udcff\udc80', 'x' * 1000])
def test_any_text_can_be_continued(own, text, capsys):
    grow.main(['--sample', text, '--out', 'run', '--length', '3', '--device', 'cpu'])
    assert capsys.readouterr().out.splitlines(keepends=True)[1:]                  # after the line on the device


def test_what_a_kill_left_half_written_is_removed(own, capsys):
    left = own / '.latest.pt.12345.tmp'
    left.write_bytes(b'half')
    grow.main(['--resume', '--out', 'run'])
    assert not left.exists() and (own / 'latest.pt').exists()


def test_a_pipe_that_nobody_reads(tmp_path):
    script = 'import substrate\nsubstrate.cli(lambda argv: print("a line\\n" * {}))()'
    for lines in (1, 100_000):                                                    # what breaks is the flush, or the write
        command = f'{shlex.quote(sys.executable)} -c {shlex.quote(script.format(lines))} | true; exit ${{PIPESTATUS[0]}}'
        buffered = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}
        done = subprocess.run(['bash', '-c', command], cwd=REPO, capture_output=True, text=True, timeout=120, env=buffered)
        assert done.returncode == 141 and not done.stderr, (done.returncode, done.stderr)


def test_no_compiler_and_no_gpu(here, capsys, monkeypatch):
    monkeypatch.setattr(grow.shutil, 'which', lambda name: None)
    fails(capsys, flags(out='run', compile=True), '--no-compile')
    if not torch.cuda.is_available():
        fails(capsys, ['--device', 'cuda'], '--device', status=2)


def test_other_data_under_a_run_is_refused(here, capsys):
    prepare_data.prepare('mine', texts(seed=5), 'made up', here / 'own')
    grow.main(flags(out='run', data='own/mine', stage_tokens=128))
    state = grow.load('run')
    state['at']['phase'] = 1
    torch.save(state, 'run/latest.pt')
    shutil.rmtree('own/mine')
    prepare_data.prepare('mine', texts(seed=6), 'made up', here / 'own')
    fails(capsys, ['--resume', '--out', 'run'], 'own/mine')


def test_two_runs_on_one_folder(here, capsys):
    out, lock = grow.open_out(config(out='run'))
    fails(capsys, flags(out='run'), 'another process')
    (out / 'latest.pt').touch()
    fails(capsys, ['--resume', '--out', 'run'], 'another process')


def test_ctrl_c_writes_a_checkpoint(here, monkeypatch, capsys):
    original, calls = grow.train_step, []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)
    monkeypatch.setattr(grow, 'train_step', interrupt)
    with pytest.raises(SystemExit) as end:
        grow.main(flags(out='run'))
    text, error = capsys.readouterr()
    assert error == 'interrupted\n' and text.endswith('stopped: go on with --resume --out run\n')
    assert end.value.code == 130 and grow.load('run/latest.pt')['at']['global_step'] == 13
    monkeypatch.setattr(grow, 'train_step', original)
    grow.main(['--resume', '--out', 'run'])
    grow.main(flags(out='whole'))
    assert same_weights('run', 'whole')


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation.

class Letters:
    """An encoding with one token a character, but " A" to " E" are one token each: as in most tokenizers, unlike ours."""

    def encode(self, text):
        out = []
        while text:
            one = text[:2] if text[0] == ' ' and text[1:2] and text[1] in 'ABCDE' and text[2:3] in ('', '\n') else text[0]
            out.append(500 + ord(one[1]) if len(one) == 2 else ord(one))
            text = text[len(one):]
        return out

    def decode(self, ids):
        return ''.join(f' {chr(i - 500)}' if i >= 500 else chr(i) for i in ids)


def always(*texts, vocab=substrate.VOCAB):
    """A model that takes the tokens of `texts` for the likeliest next ones, in this order, whatever came before."""
    def model(idx):
        logits = torch.zeros(*idx.shape, vocab)
        for k, text in enumerate(texts):
            logits[..., ord(text)] = 10.0 - k
        return logits
    return model


def question(key='C', letters='ABCD', prompt='Question: q?\nOptions: A) 1 B) 2 C) 3 D) 4\nAnswer:', index=0, subject='anatomy'):
    return eval_mmlu.Question(subject, index, prompt, letters, key)


SUBJECTS = dict(anatomy='ABCC', virology='CDA', philosophy='BCCCD')


@pytest.fixture
def mmlu(tmp_path):
    """A small MMLU: three subjects, the keys of which are in SUBJECTS."""
    folder = tmp_path / 'questions'
    for split in ('test', 'dev'):
        (folder / split).mkdir(parents=True)
        for subject, keys in SUBJECTS.items():
            rows = [f'"{subject} {split} {i}, or\n""none""?",one,None,"a, b",{i},{key}' for i, key in enumerate(keys)]
            (folder / split / f'{subject}_{split}.csv').write_text('\n'.join(rows) + '\n')
    return folder


@pytest.fixture
def run(here):
    """The folder of a run with two stages, as training leaves it but for the log."""
    c = config(layers=2, context=64)
    for name, blocks in (('stage_1', 1), ('stage_2', 2), ('latest', 2)):
        model = model_of(c, blocks)
        grow.save(here / 'run' / f'{name}.pt', config=grow.dataclasses.asdict(c), depth=blocks, interface=model.interface.fingerprint,
                  tokenizer=substrate.tokenizer_fingerprint(), model=model.state_dict(), at={}, machine=grow.machine(c))
    return here / 'run'


def test_prompts_are_the_papers(mmlu):
    first = eval_mmlu.read_task('mmlu', mmlu)[0]
    assert first.prompt == 'Question: anatomy test 0, or\n"none"?\nOptions: A) one B) None C) a, b D) 0\nAnswer:'      # None stays a string
    assert (first.subject, first.index, first.letters, first.key) == ('anatomy', 0, 'ABCD', 'A')
    two = eval_mmlu.read_task('mmlu', mmlu, shots=2)[-1].prompt.split('\n\n')
    assert [part.partition('\nAnswer:')[2] for part in two] == [' C', ' D', '']
    assert [part[:25] for part in two] == ['Question: virology dev 0,', 'Question: virology dev 1,', 'Question: virology test 2']


def test_the_other_tasks_are_read(tmp_path):
    arc = [dict(question='why?', choices=dict(text=['x', 'y', 'z'], label=['1', '2', '3']), answerKey='2'),
           dict(question=dict(stem='how?', choices=[dict(text=t, label=t.upper()) for t in 'abcde']), answerKey='E')]
    (tmp_path / 'ARC-Easy-validation.jsonl').write_text('\n'.join(map(json.dumps, arc)))
    first, second = eval_mmlu.read_task('arc_easy', tmp_path)
    assert first.prompt == 'Question: why?\nOptions:\nA) x\nB) y\nC) z\nAnswer:' and (first.letters, first.key) == ('ABC', 'B')
    assert second.prompt.endswith('\nE) e\nAnswer:') and (second.letters, second.key) == ('ABCDE', 'E')
    rows, _ = eval_mmlu.score(always('B'), substrate.tokenizer(), [first, second], 64)
    assert eval_mmlu.summarise(rows)['chance'] == pytest.approx((1 / 3 + 1 / 5) / 2)
    squad = [dict(question=q, is_impossible=not a, answers=[dict(text=t) for t in a])
             for q, a in (('who?', ['Bo', 'Bo B']), ('when?', []), ('where?', ['in a far country']))]
    (tmp_path / 'dev-v2.0.json').write_text(json.dumps(dict(data=[dict(paragraphs=[dict(context='c', qas=squad)])])))
    [only] = eval_mmlu.read_task('squad', tmp_path)
    assert only.prompt == 'Context: c\nQuestion: who?\nAnswer:' and only.answers == ['Bo', 'Bo B']


def test_likelihood_and_letter_by_hand():
    # After every token the same logits: 2 for B, 1 for C, 3 for a space, 0 for the 65,533 others. Our " B" is a space, then a letter.
    def model(idx):
        logits = torch.zeros(*idx.shape, substrate.VOCAB)
        logits[..., [ord('B'), ord('C'), ord(' ')]] = torch.tensor([2.0, 1.0, 3.0])
        return logits
    log_z = math.log(math.e**2 + math.e + math.e**3 + 65_533)
    [row], waste = eval_mmlu.score(model, substrate.tokenizer(), [question('B')], 128)
    assert row['logps'] == pytest.approx([3 + x - 2 * log_z for x in (0, 2, 1, 0)], abs=1e-4)
    assert (row['choice'], row['letter'], row['cut'], waste) == ('B', ' ', False, 0)
    assert row['scores'] == dict(likelihood=1, letter=0)                          # the likeliest next token is the space

    def single(idx):                                                              # where " B" is one token, both scores read it
        logits = torch.zeros(*idx.shape, 600)
        logits[..., 500 + ord('B')] = 2.0
        return logits
    [row], _ = eval_mmlu.score(single, Letters(), [question('B')], 128)
    log_z = math.log(math.e**2 + 599)
    assert row['logps'] == pytest.approx([x - log_z for x in (0, 2, 0, 0)], abs=1e-4)
    assert row['letter'] == ' B' and row['scores'] == dict(likelihood=1, letter=1)


def test_exact_match_and_f1_by_hand():
    assert eval_mmlu.words('The  Duke, of a York!') == ['duke', 'of', 'york']
    assert eval_mmlu.f1('the Duke of York', 'Duke of Kent and York') == pytest.approx(2 * (3 / 5) * (3 / 3) / (3 / 5 + 3 / 3))
    assert eval_mmlu.f1('the', 'a') == 1 and eval_mmlu.f1('the', 'Rome') == 0
    said = ' Bo B.\nRome'                                                         # an answer, and the next line

    def model(idx):                                                               # says the next character of it
        logits = torch.zeros(*idx.shape, 600)
        for row, ids in zip(logits, idx.tolist()):
            for t in range(len(ids)):
                text = Letters().decode(ids[:t + 1]).rpartition('Answer:')[2]
                row[t, ord((said + '~' * 20)[len(text)])] = 1
        return logits
    asked = [eval_mmlu.OpenQuestion('squad', i, f'{"c" * i}\nAnswer:', answers)
             for i, answers in enumerate([['Bo', 'bo b'], ['Rome'], ['B. Bo Ng'], ['Oslo']])]
    rows, _ = eval_mmlu.score_open(model, Letters(), asked, 64)
    assert rows[0]['generation'] == (said + '~' * 20)[:eval_mmlu.GENERATED]
    assert [row['scores'] for row in rows] == [dict(hit=1, exact_match=1, f1=1), dict(hit=1, exact_match=0, f1=0),
                                               dict(hit=0, exact_match=0, f1=pytest.approx(0.8)), dict(hit=0, exact_match=0, f1=0)]
    f1 = eval_mmlu.summarise(rows)['total']['f1']
    assert f1['mean'] == pytest.approx(0.45) and f1['stderr'] == pytest.approx(np.std([1, 0, 0.8, 0]) / 2)


def test_a_model_that_prefers_c_scores_the_share_of_c(mmlu):
    questions = eval_mmlu.read_task('mmlu', mmlu)
    keys = ''.join(SUBJECTS.values())
    rows, _ = eval_mmlu.score(always('C'), substrate.tokenizer(), questions, 256)
    summary = eval_mmlu.summarise(rows)
    total, p = summary['total'], keys.count('C') / len(keys)
    for name in ('likelihood', 'letter'):                                         # C is also the likeliest token of all
        assert total[name]['mean'] == p and total[name]['stderr'] == pytest.approx(math.sqrt(p * (1 - p) / len(keys)))
        for groups in (summary['subjects'], summary['categories']):
            assert sum(group['n'] for group in groups.values()) == total['n'] == len(keys)
            assert sum(group[name]['sum'] for group in groups.values()) == total[name]['sum'] == keys.count('C')
        assert summary['macro'][name] == pytest.approx(np.mean([k.count('C') / len(k) for k in SUBJECTS.values()]))
    assert {s: group['n'] for s, group in summary['subjects'].items()} == {s: len(keys) for s, keys in SUBJECTS.items()}
    assert {s: group['n'] for s, group in summary['categories'].items()} == dict(other=7, humanities=5)
    rows, _ = eval_mmlu.score(always(' ', 'C'), substrate.tokenizer(), questions, 256)
    assert eval_mmlu.summarise(rows)['total']['letter']['sum'] == 0               # " C" by likelihood, a space by letter


def test_the_categories_are_complete():
    assert {name: len(subjects.split()) for name, subjects in eval_mmlu.CATEGORIES.items()} == {'STEM': 18, 'humanities': 13, 'social sciences': 12}
    assert len(eval_mmlu.CATEGORY) == 43                                          # 14 others


def test_batches_waste_at_most_a_tenth_and_change_no_score():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 300, 500).tolist()
    plan = list(eval_mmlu.batches(lengths, 1024))
    assert sorted(i for batch in plan for i in batch) == list(range(500)) and eval_mmlu.padding(plan, lengths) <= 0.1
    assert max(len(batch) * lengths[batch[0]] for batch in plan) <= 1024 and len(plan) < 200
    assert list(eval_mmlu.batches([9, 500, 10], 64)) == [[1], [2, 0]]             # one that alone exceeds the budget passes alone
    model = model_of(config(context=64, heads=4)).eval()
    questions = [question(prompt=f'{"long " * int(n)}\nAnswer:') for n in rng.integers(0, 16, 30)]
    rows, waste = eval_mmlu.score(model, substrate.tokenizer(), questions, 64)
    alone, none = eval_mmlu.score(model, substrate.tokenizer(), questions, 64, batch_tokens=1)
    assert waste > 0 and none == 0
    assert np.allclose([row['logps'] for row in rows], [row['logps'] for row in alone], atol=2e-5)
    full, _ = eval_mmlu.score(lambda idx: model(idx), substrate.tokenizer(), questions, 64)      # as any callable: all logits
    assert np.allclose([row['logps'] for row in rows], [row['logps'] for row in full], atol=2e-5)


def test_long_prompts_are_cut_from_the_left():
    seen = []

    def model(idx):
        seen.extend(idx.tolist())
        return always('C')(idx)
    tokens = substrate.tokenizer()
    whole = tokens.encode_ordinary('0123456789 Answer: ')                         # with the space that all options share
    rows, _ = eval_mmlu.score(model, tokens, [question(prompt='0123456789 Answer:'), question('A', prompt='Answer:')], len(whole) - 2)
    assert seen[0] == whole[2:] and [row['cut'] for row in rows] == [True, False]
    summary = eval_mmlu.summarise(rows)
    assert summary['cut'] == 1 and summary['uncut']['n'] == 1
    assert summary['total']['likelihood']['mean'] == 0.5 and summary['uncut']['likelihood']['mean'] == 0


def test_eval_writes_a_row_for_every_question(run, mmlu, capsys):
    eval_mmlu.main([str(run), '--data', str(mmlu), '--device', 'cpu', '--dtype', 'float32'])
    saved = json.loads((run / 'eval_mmlu.json').read_text())
    out = capsys.readouterr().out
    assert [(row['subject'], row['index']) for row in saved['rows']] == [(s, i) for s in sorted(SUBJECTS) for i in range(len(SUBJECTS[s]))]
    assert saved['settings']['checkpoints'] == {str(run / 'latest.pt'): substrate.sha256_of(run / 'latest.pt')}
    assert saved['summary']['total']['n'] == 12 and saved['summary']['layers'] == 2
    for words in ('12 questions, 3 subject(s)', 'note: 12 questions', 'chance: 25.00', 'were cut from the left', 'padding', 'micro', 'macro', 'humanities'):
        assert words in out, words
    eval_mmlu.main([str(run), '--data', str(mmlu), '--device', 'cpu', '--limit', '6', '--shots', '2'])
    rows = json.loads((run / 'eval_mmlu_limit_6.json').read_text())['rows']
    assert json.loads((run / 'eval_mmlu.json').read_text()) == saved                # of all questions, as before
    assert len(rows) == 6 and len({row['subject'] for row in rows}) == 3 and all(row['cut'] for row in rows)


def test_every_stage_is_scored_by_depth(run, mmlu, capsys):
    eval_mmlu.main([str(run), '--data', str(mmlu), '--device', 'cpu', '--all_stages'])
    out = capsys.readouterr().out
    assert [json.loads((run / f'eval_mmlu_stage_{k}.json').read_text())['summary']['layers'] for k in (1, 2)] == [1, 2]
    assert 'score by depth' in out and not (run / 'eval_mmlu.json').exists()
    eval_mmlu.main([str(run / 'stage_1.pt'), '--data', str(mmlu), '--device', 'cpu'])
    assert 'stage_1.pt' in capsys.readouterr().out


def test_experts_are_merged_and_scored(run, mmlu):
    eval_mmlu.main([str(run), str(run), '--data', str(mmlu), '--device', 'cpu', '--dtype', 'float32'])
    merged = json.loads((run / 'eval_mmlu_merged.json').read_text())
    eval_mmlu.main([str(run), '--data', str(mmlu), '--device', 'cpu', '--dtype', 'float32'])
    alone = json.loads((run / 'eval_mmlu.json').read_text())
    for row, other in zip(merged['rows'], alone['rows']):                         # the mean of a model and itself is the model
        assert row['logps'] == pytest.approx(other['logps'], abs=1e-4)


def test_mistakes_in_questions_are_named(run, mmlu, capsys):
    def wrong(*words, argv=(), status=1):
        fails(capsys, [str(run), '--data', str(mmlu), '--device', 'cpu', *argv], *words, status=status, main=eval_mmlu.main)
    wrong('nowhere', argv=['--data', 'nowhere'])
    assert not Path('nowhere').exists()
    fails(capsys, ['no_run', '--data', str(mmlu)], 'no_run does not exist', main=eval_mmlu.main)
    wrong('arc_easy', 'ARC-Easy-validation.jsonl', argv=['--task', 'arc_easy'])
    wrong('has 4 examples of anatomy', argv=['--shots', '5'])
    wrong('--shots', argv=['--shots', '1', '--task', 'csqa'], status=2)
    wrong('--all_stages', argv=[str(run), '--all_stages'], status=2)
    (mmlu / 'csqa').mkdir()
    (mmlu / 'csqa' / 'dev_rand_split.jsonl').write_text('{"question": 3}\n')
    wrong('dev_rand_split.jsonl, line 1', argv=['--task', 'csqa'])
    path = mmlu / 'test' / 'anatomy_test.csv'
    whole = path.read_bytes()
    for length in range(len(whole)):                  # cut anywhere but after a row: named; text itself has no checksum
        if whole[:length].rstrip(b'\n') not in (b'\n'.join(whole.splitlines()[:2 * k]) for k in range(1, 5)):
            path.write_bytes(whole[:length])
            refuses('anatomy_test.csv', eval_mmlu.read_csv, path)
    path.write_bytes(b'')
    wrong('anatomy_test.csv is empty')
    path.write_bytes(Path(run / 'latest.pt').read_bytes()[:5000])
    wrong('anatomy_test.csv, line 1')
    for damage in (b'q,1,2,3,D', b'q,1,2,3,4,E', b'q,1,2,3,4,', b'q\xff,1,2,3,4,D', b'"q"x,1,2,3,4,D', b'"q,1,2,3,4,D'):
        path.write_bytes(b'"fine,\nindeed",1,2,3,4,A\n' + damage + b'\n')
        wrong('anatomy_test.csv, line 3')


# ---------------------------------------------------------------------------------------------------------------------
# Downloads, from a server on this machine

class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`; breaks each answer off after `breaks` bytes, if set; `ranges` says whether it can go on in the middle. Each of `faults`
    spoils one answer: a status, or what do_GET makes of its name."""
    files, breaks, ranges, asked, faults = {}, None, True, [], []

    def do_GET(self):
        self.asked.append(self.headers.get('Range'))
        body, fault = self.files.get(self.path), self.faults.pop(0) if self.faults else None
        if body is None or isinstance(fault, int):
            return self.send_error(fault or 404)
        if fault == 'hang up':
            return self.connection.shutdown(socket.SHUT_RDWR)
        body = body[:len(body) // 2] if fault == 'too short' else body             # and the length says the same
        first = int(self.headers['Range'][6:-1]) if self.ranges and 'Range' in self.headers else 0
        if first >= len(body):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(body)}')
            return self.end_headers()
        self.send_response(206 if first else 200)
        if first:
            self.send_header('Content-Range', f'bytes {first}-{len(body) - 1}/{len(body)}')
        self.send_header('Content-Length', str(len(body) - first + 1000 * (fault == 'too long')))
        self.end_headers()
        self.wfile.write(body[first:][:(len(body) - first) // 2 if fault == 'half' else self.breaks])

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
    path = prepare_data.download(f'{url}/a', tmp_path / 'new' / 'a', prepare_data.hashlib.sha256(body).hexdigest())
    assert path.read_bytes() == body and handler.asked == [None] + [f'bytes={k * 2**16}-' for k in range(1, 9)]
    assert [p.name for p in path.parent.iterdir()] == ['a'] and prepare_data.download(f'{url}/gone', path) == path     # there already
    (tmp_path / 'b.part').write_bytes(body)                                       # killed between the last byte and the rename
    assert prepare_data.download(f'{url}/a', tmp_path / 'b').read_bytes() == body
    (tmp_path / 'c.part').write_bytes(body + b'too much')
    handler.breaks = None
    assert prepare_data.download(f'{url}/a', tmp_path / 'c').read_bytes() == body
    handler.ranges = False                                                        # this server starts again each time
    (tmp_path / 'd.part').write_bytes(b'x' * 10)
    assert prepare_data.download(f'{url}/a', tmp_path / 'd').read_bytes() == body


def test_progress_shows_speed_and_the_time_left(monkeypatch, capsys):
    clock = iter(range(100))
    monkeypatch.setattr(prepare_data.time, 'monotonic', lambda: next(clock))
    assert list(prepare_data.progress([2, 3, 5], 'a', lambda n: n, 'MB', done=10, total=20)) == [2, 3, 5]
    lines = capsys.readouterr().err.split('\r')
    assert [line.strip() for line in lines[1:]] == ['a: 12.0 MB, 2.0 MB/s, 60%, 0:00:04 left', 'a: 15.0 MB, 2.5 MB/s, 75%, 0:00:02 left',
                                                    'a: 20.0 MB, 3.3 MB/s, 100%, 0:00:00 left']
    for n in prepare_data.progress([1, 2, 3], 'b', lambda n: n, 'MB'):           # no total, and left early
        if n == 2:
            break
    assert capsys.readouterr().err == '\rb: 1.0 MB, 1.0 MB/s  \n'


def test_downloads_that_cannot_succeed_say_why(server, tmp_path, monkeypatch):
    url, handler = server
    handler.files['/a'] = b'abc'
    (tmp_path / 'b.part').touch()
    with prepare_data.locked(tmp_path / 'b.part', 'x'):
        refuses('another process is downloading', prepare_data.download, f'{url}/a', tmp_path / 'b')
    (tmp_path / 'b.part').unlink()
    with pytest.raises(substrate.UserError, match='sha256'):
        prepare_data.download(f'{url}/a', tmp_path / 'a', '0' * 64)
    assert not list(tmp_path.iterdir())                                           # what is damaged is not gone on with
    with pytest.raises(substrate.UserError, match='404'):
        prepare_data.download(f'{url}/none', tmp_path / 'none')
    handler.files['/long'], handler.breaks, before = b'x' * 1000, 0, len(handler.asked)
    with pytest.raises(substrate.UserError, match='run this again'):
        prepare_data.download(f'{url}/long', tmp_path / 'long')
    assert len(handler.asked) - before == prepare_data.TRIES
    monkeypatch.setattr(prepare_data.shutil, 'disk_usage', lambda path: collections.namedtuple('Usage', 'free')(2))
    with pytest.raises(substrate.UserError, match='disk'):
        prepare_data.download(f'{url}/a', tmp_path / 'a')


# ---------------------------------------------------------------------------------------------------------------------
# Corpora that are downloaded, from the same server: three small parquet files

def pages(i):
    return texts(150, seed=i)


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """-> (make, whole, Handler): make() prepares the corpus in tmp_path; `whole` is the meta it must have, by another way."""
    pyarrow, (url, handler) = pytest.importorskip('pyarrow.parquet'), server
    for name, value in (('SHARD', 15_000), ('SMALLEST', 50), ('CORPORA', {'fineweb-edu': (url + '/{:03}.parquet', 3)})):
        monkeypatch.setattr(prepare_data, name, value)
    for i in range(3):
        packed = io.BytesIO()
        table = prepare_data.parquet().table({'id': range(151), 'text': pages(i) + [None]})
        pyarrow.write_table(table, packed, row_group_size=40)
        handler.files[f'/{i:03}.parquet'] = packed.getvalue()
    parts = [prepare_data.contextlib.nullcontext(pages(i)) for i in range(3)]
    whole = prepare_data.prepare_parts('whole', parts, f'{url}/, files: 3', tmp_path / 'elsewhere')
    assert whole['documents'] == 450 and len(whole['shards']) > 6
    return lambda **options: prepare_data.prepare_corpus('fineweb-edu', tmp_path, **options), whole, handler


def test_a_corpus_is_the_same_on_any_number_of_cores(hub, tmp_path, monkeypatch):
    make, whole, handler = hub
    for cores, ahead in ((1, 1), (2, 2**20), (7, 3000)):
        monkeypatch.setattr(prepare_data, 'CORES', cores)
        monkeypatch.setattr(prepare_data, 'AHEAD', ahead)
        assert make(name=f'on{cores}', keep_raw=cores == 7) == whole
        assert prepare_data.read_meta(tmp_path / f'on{cores}') == whole
        prepare_data.check(f'on{cores}', tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['elsewhere', 'on1', 'on2', 'on7', 'on7.raw']
    assert sorted(path.name for path in (tmp_path / 'on7.raw').iterdir()) == ['000.parquet', '001.parquet', '002.parquet']
    both = prepare_data.Dataset('on1', tmp_path)
    assert sorted(documents_of(both, 'train') + documents_of(both, 'val')) == sorted(with_end(pages(0) + pages(1) + pages(2)))


@pytest.mark.parametrize('faults', [[429], [500, 503], ['hang up'] * 2, ['too long'], ['half'] * 3, [500, 'half', 429, 'too long', 'hang up']])
def test_faults_that_pass(hub, faults):
    make, whole, handler = hub
    handler.faults[:] = faults
    assert make() == whole and not handler.faults


@pytest.mark.parametrize('fault, words', [(404, '000.parquet answers 404'), (503, '503 .* run this again'), ('hang up', 'no connection.* run this again'),
                                          ('too short', '000.parquet is damaged .* remove it')])
def test_faults_that_last_are_named_and_nothing_is_lost(hub, tmp_path, fault, words):
    make, whole, handler = hub
    handler.faults[:] = [fault] * prepare_data.TRIES
    refuses(words, make)
    handler.faults.clear()
    if fault == 'too short':                                                      # as the sentence says
        (tmp_path / 'fineweb-edu.raw' / '000.parquet').unlink()
    assert make() == whole


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
        child = os.fork()
        if child == 0:
            try:
                left, os.replace = kill_at, dying
                make(name=f'at{kill_at}')
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            break
        assert not (tmp_path / f'at{kill_at}').exists()
        record = tmp_path / f'.at{kill_at}.tmp' / 'meta.json'
        left = 3 - (json.loads(record.read_text())['parts'] if record.exists() else 0)
        handler.asked.clear()
        assert make(name=f'at{kill_at}') == whole and len(handler.asked) in (left, left - 1)       # what is in the shards is not asked for again
        prepare_data.check(f'at{kill_at}', tmp_path)
        assert {path.name for path in (tmp_path / f'at{kill_at}').iterdir()} == {'meta.json', *whole['shards']}
    assert status == 0 and kill_at == 3 + len(whole['shards']) + 3                # downloads, shards, records
    assert not list(tmp_path.glob('.*')) and not list(tmp_path.glob('*.raw'))


def test_tokens_are_enough_at_the_document_that_reaches_them(hub, tmp_path, capsys):
    make, whole, handler = hub
    limit = whole['train_tokens'] // 2
    meta = make(name='half', limit=limit)
    assert meta['parts'] == 2 and len(handler.asked) == 2 and len(meta['shards']) < len(whole['shards'])
    half, all_of_it = (np.concatenate(prepare_data.Dataset(tmp_path / folder).train) for folder in ('half', 'elsewhere/whole'))
    last = np.flatnonzero(half == prepare_data.EOS)[-2] + 1
    assert np.array_equal(half, all_of_it[:len(half)]) and last < limit <= len(half) == meta['train_tokens']
    handler.files.pop('/002.parquet')                                             # so that it stops after two files
    refuses('404', make)
    refuses('was begun from .* a limit of None', make, limit=10**9)
    assert (tmp_path / '.fineweb-edu.tmp' / 'meta.json').exists()
    (tmp_path / '.fineweb-edu.tmp' / 'train_000001.npy').write_bytes(b'')
    refuses('train_000001.npy is missing, cut short', make)
    refuses('each needs', prepare_data.prepare, 'few', texts(3), 'made up', tmp_path)


def test_ctrl_c_ends_in_one_line_and_goes_on(hub, tmp_path, capsys, monkeypatch):
    make, whole, handler = hub
    def interrupted(path):
        yield from pages(0)
        if '001' in path.name:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(prepare_data, 'parquet_documents', interrupted)
        prepare_data.main(['fineweb-edu', '--root', str(tmp_path)])
    assert exit.value.code == 130 and capsys.readouterr().err.endswith('interrupted\n')
    assert make() == whole and [path.name for path in tmp_path.iterdir() if 'fine' in path.name] == ['fineweb-edu']


def test_parquet_needs_pyarrow_and_a_column_of_text(hub, tmp_path, monkeypatch):
    make, whole, handler = hub
    for number, column in enumerate(({'txt': ['a']}, {'text': [b'\xff']}, {'text': [['a']]})):
        prepare_data.parquet().parquet.write_table(prepare_data.parquet().table(column), tmp_path / f'{number}.parquet')
        refuses(f'{number}.parquet is damaged or has no column', list, prepare_data.file_documents([tmp_path]))
        (tmp_path / f'{number}.parquet').unlink()
    (tmp_path / 'a.txt').write_text('text')
    (tmp_path / 'b.parquet').write_bytes(b'')
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)
    refuses('pip install pyarrow', prepare_data.file_documents, [tmp_path])       # before the first document, a.txt, is read
    refuses('pip install pyarrow', make)
    assert not handler.asked and not (tmp_path / 'fineweb-edu.raw').exists()


def test_shakespeare_comes_from_a_mirror(server, tmp_path, monkeypatch):
    url, handler = server
    path = '/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
    handler.files[path] = body = '\n\n'.join(texts(1000)).encode()
    command = ['shakespeare', '--mirror', url + '/', '--root', str(tmp_path), '--name', 'plays']
    refuses('sha256', prepare_data.main.__wrapped__, command)                     # not the file that is meant
    monkeypatch.setitem(prepare_data.CORPORA, 'shakespeare', (*prepare_data.CORPORA['shakespeare'][:2], prepare_data.hashlib.sha256(body).hexdigest()))
    prepare_data.main(command)
    plays = prepare_data.Dataset('plays', tmp_path)
    assert plays.meta['documents'] == 1000 and documents_of(plays, 'train')[0] == texts()[0] + '\n</s>'
    assert plays.meta['source'] == f'https://raw.githubusercontent.com{path.removesuffix("input.txt")}, files: 1'


def test_archives_are_fetched_and_unpacked(server, mmlu, tmp_path, monkeypatch):
    url, handler = server
    monkeypatch.chdir(tmp_path)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w') as tar:
        tar.add(mmlu, 'data')
    handler.files['/data.tar'] = packed.getvalue()
    monkeypatch.setattr(eval_mmlu, 'MMLU_URL', f'{url}/data.tar')
    monkeypatch.setattr(eval_mmlu, 'MMLU_SHA256', prepare_data.hashlib.sha256(packed.getvalue()).hexdigest())
    assert eval_mmlu.read_task('mmlu') == eval_mmlu.read_task('mmlu', mmlu) == eval_mmlu.read_task('mmlu')
    assert len(handler.asked) == 1 and [p.name for p in Path('data').iterdir()] == ['mmlu']
    packed, row = io.BytesIO(), dict(question=dict(stem='how?', choices=[dict(text='x', label='A'), dict(text='y', label='B')]), answerKey='B')
    with zipfile.ZipFile(packed, 'w') as file:
        for kind in ('Easy', 'Challenge'):
            file.writestr(f'ARC-V1/ARC-{kind}/ARC-{kind}-Dev.jsonl', json.dumps(row))
    handler.files |= {'/arc.zip': packed.getvalue(), '/dev_rand_split.jsonl': json.dumps(row).encode()}
    monkeypatch.setattr(eval_mmlu, 'ARC_URL', f'{url}/arc.zip')
    monkeypatch.setattr(eval_mmlu, 'CSQA_URL', f'{url}/dev_rand_split.jsonl')
    for task in ('arc_easy', 'arc_challenge', 'csqa'):
        assert [(q.subject, q.letters, q.key) for q in eval_mmlu.read_task(task)] == [(task, 'AB', 'B')]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w') as tar:
        tar.addfile(tarfile.TarInfo('../outside.txt'))
    handler.files['/data.tar'] = packed.getvalue()
    monkeypatch.setattr(eval_mmlu, 'MMLU_SHA256', prepare_data.hashlib.sha256(packed.getvalue()).hexdigest())
    eval_mmlu.os.rename('data/mmlu', 'moved')
    with pytest.raises(substrate.UserError, match='cannot be unpacked'):
        eval_mmlu.read_task('mmlu')
    assert not Path('outside.txt').exists() and not Path('data/outside.txt').exists() and not Path('data/mmlu').exists()


# ---------------------------------------------------------------------------------------------------------------------
# What no other test would miss

def test_resume_makes_no_folder(here, capsys):
    fails(capsys, ['--resume', '--out', 'nowhere'], 'nowhere', 'leave out --resume')
    assert not Path('nowhere').exists()


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_kind_of_full_disk_is_one_sentence(capsys, number):
    @substrate.cli
    def main(argv):
        raise OSError(number, os.strerror(number), 'log.csv')
    fails(capsys, [], os.strerror(number), 'log.csv', 'make room', main=main)


def test_damaged_parquet_is_named(tmp_path):
    pa, path = pytest.importorskip('pyarrow.parquet'), tmp_path / 'a.parquet'
    table = prepare_data.parquet().table
    pa.write_table(table({'text': texts()}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:8] + bytes(255 - x for x in whole[8:16]) + whole[16:])     # OSError, unlike a file cut short
    refuses('a.parquet is damaged', list, prepare_data.file_documents([path]))
    pa.write_table(table({'text': prepare_data.parquet().array([b'\xff']).view('string')}), path)     # UnicodeDecodeError
    refuses('a.parquet is damaged', list, prepare_data.file_documents([path]))


def test_a_row_with_one_field_too_many(run, mmlu, capsys):
    (mmlu / 'test' / 'anatomy_test.csv').write_bytes(b'q,1,2,3,4,A\nq,1,2,3,4,D,5\n')
    fails(capsys, [str(run), '--data', str(mmlu), '--device', 'cpu'], 'anatomy_test.csv, line 2', main=eval_mmlu.main)


def test_the_whole_of_mmlu_has_no_note(run, mmlu, capsys, monkeypatch):
    monkeypatch.setattr(eval_mmlu, 'MMLU_QUESTIONS', 12)
    eval_mmlu.main([str(run), '--data', str(mmlu), '--device', 'cpu', '--limit', '6'])
    assert 'note:' not in capsys.readouterr().out


def test_resume_takes_what_may_change_and_nothing_else(own, capsys):
    assert grow.RUNTIME == set('out resume micro_batch save_every device dtype compile length temperature top_k'.split())
    new = dict(micro_batch=2, save_every=7.0, device='cpu', dtype='bfloat16', compile=True, length=3, temperature=1.5, top_k=2)
    ckpt, words = grow.load('run'), [word for name, value in new.items() for word in (f'--{name}', str(value)) if value is not True]
    c = grow.resumed_config(*grow.configure(['--resume', '--out', 'run', '--compile', *words]), ckpt, 'run')
    assert dataclasses.asdict(c) == dataclasses.asdict(grow.Config(**ckpt['config'])) | new | dict(out='run', resume=True)
    fails(capsys, ['--resume', '--out', 'run', '--micro_batch', '3'], '--micro_batch 3', status=2)


def test_an_unfinished_run_is_not_grown_further(own, capsys):
    torch.save(grow.load('run/stage_1.pt'), 'run/latest.pt')
    fails(capsys, ['--grow_from', 'run', '--layers', '9', '--plan', '--device', 'cpu'], 'run is not finished', '--resume')


@pytest.mark.parametrize('number', [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(number):
    c = config()
    model, one = model_of(c), (ids(4, 16), ids(4, 16, seed=1))
    optimizer, before = grow.make_optimizer(model, c), [p.clone() for p in model.parameters()]
    model.norm.weight.register_hook(lambda g: g * number)                         # the loss stays finite
    batches = always_the_batch(one)
    loss, norm = grow.train_step(model, optimizer, batches, 0, c, torch.autocast('cpu', enabled=False))
    assert math.isfinite(loss) and not math.isfinite(norm) and not optimizer.state
    assert all(map(torch.equal, before, model.parameters())) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('bad', [(math.nan, 1.0), (1.0, math.inf)])
def test_loss_and_norm_are_both_looked_at(here, capsys, monkeypatch, bad):
    monkeypatch.setattr(grow, 'train_step', lambda *args: bad)
    fails(capsys, flags(out='run'), 'not finite', 'grow 1, step 1')


def test_a_run_keeps_its_folder_while_it_trains(here, monkeypatch):
    original, steps = grow.train_step, []

    def step(*args):
        with pytest.raises(substrate.UserError, match='another process'):
            grow.open_out(config(out='run', resume=True))
        if len(steps) == 1:
            steps.append(2)
            raise RuntimeError('crash')
        steps.append(1)
        return original(*args)
    monkeypatch.setattr(grow, 'train_step', step)
    with pytest.raises(RuntimeError, match='crash'):
        grow.main(flags(out='run', stage_tokens=64))
    grow.main(['--resume', '--out', 'run'])
    assert steps == [1, 2, 1, 1]


def test_a_second_ctrl_c_does_not_wait(here, monkeypatch):
    before = signal.getsignal(signal.SIGINT)

    def interrupt(*args):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        pytest.fail('it waited')
    monkeypatch.setattr(grow, 'train_step', interrupt)
    with pytest.raises(SystemExit) as end:
        grow.main(flags(out='run'))
    assert end.value.code == 130 and grow.load('run')['at']['global_step'] == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoints_of_another_tokenizer_are_refused(own, capsys):
    torch.save(grow.load('run') | dict(tokenizer='another'), 'run/latest.pt')
    fails(capsys, ['--sample', 'x', '--out', 'run', '--device', 'cpu'], 'latest.pt', 'another list of n-grams')


def test_positions_reach_attention():
    model, a = model_of(config(birth='random'), blocks=1), ids(1, 16)
    b = a[:, [1, 0, *range(2, 16)]]                                               # one block without positions sees a set
    with torch.no_grad():
        model.blocks[0].qkv.weight.mul_(20)
        assert not torch.allclose(model(a)[0, -1], model(b)[0, -1], atol=1e-4)
    assert torch.allclose(model.cos[5], torch.tensor([math.cos(5 * 10_000 ** (-k / 8)) for k in range(8)]))


def test_weights_at_birth():
    block = model_of(config(birth='random', d_model=64)).blocks[2]
    for linear, std in ((block.qkv, 0.02), (block.up, 0.02), (block.out, 0.02 / 6**0.5), (block.down, 0.02 / 6**0.5)):
        assert linear.weight.std().item() == pytest.approx(std, rel=0.05)


def test_every_group_has_its_rate_and_matrices_alone_decay():
    c = config(lr=1e-2, head_lr=2e-2, lr_later=3e-2, head_lr_later=4e-2, lora_lr=5e-2, weight_decay=0.25, lora='joint', lora_rank=2, warmup=4)
    model = model_of(c, blocks=0)
    for phase, want in zip(grow.phases(c), ((1e-2, 2e-2), (3e-2, 4e-2))):
        grow.enter(model, phase)
        optimizer = grow.make_optimizer(model, c, later=phase.stage > 1)
        rate = {id(p): (group['peak'], group['weight_decay']) for group in optimizer.param_groups for p in group['params']}
        found = {name: rate[id(p)] for name, p in model.named_parameters() if id(p) in rate}
        lr, head_lr = want
        for name, value in found.items():
            assert value == ((head_lr, 0) if name.startswith('head') else (5e-2, 0) if name.endswith(('.A', '.B')) else
                             (lr, 0.25) if name.startswith('blocks') and name.endswith('weight') and 'norm' not in name else (lr, 0)), name
    assert any(name.endswith('.A') for name in found)
    assert [grow.lr_factor(c, step, 24) for step in (0, 3, 4, 14, 24)] == pytest.approx([0.2, 0.8, 1, 0.55, 0.1])


def test_gradients_are_clipped():
    c = config(clip=1e-3)
    model, one = model_of(c), (ids(4, 16), ids(4, 16, seed=1))
    optimizer, norms = grow.make_optimizer(model, c), []
    optimizer.register_step_pre_hook(lambda *args: norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()))
    batches = always_the_batch(one)
    _, norm = grow.train_step(model, optimizer, batches, 0, c, torch.autocast('cpu', enabled=False))
    assert norm > 1e-2 and norms == [pytest.approx(1e-3, rel=1e-2)]


def test_enter_refuses_more_than_the_budget():
    c = config()
    with pytest.raises(AssertionError, match='budget'):
        grow.enter(model_of(c, blocks=0), grow.Phase('grow', 1, 2, 2, 1))


def test_tables_are_compared_by_their_numbers():
    a, b, c = (model_of(config(substrate='random', seed=seed), blocks=1) for seed in range(3))
    b.interface.table.data += 5e-6                                                # the last bits of another machine
    c.interface.table.data[7, 7] += 1e-3
    assert not grow.tables_differ(a, b) and 'differ by up to 0.001' in grow.tables_differ(a, c)
    merged = grow.MixtureOfExperts([a, b, c]).share_interface().experts
    assert merged[1].interface.table is merged[0].interface.table and merged[2].interface.table is not merged[0].interface.table


def test_a_mixture_sees_what_all_its_experts_see():
    assert grow.MixtureOfExperts([model_of(config(context=n), blocks=1) for n in (32, 16)]).config.context == 16


def test_the_log_shows_the_schedule(here, monkeypatch):
    seen, original = [], prepare_data.Batches.batch
    monkeypatch.setattr(prepare_data.Batches, 'batch', lambda self, step, rows=slice(None): seen.append(original(self, step, rows)) or seen[-1])
    words = dict(warmup=4, lr=1e-2, lr_later=2e-3)
    grow.main(flags(out='run', **words))
    first = seen[0]
    seen.clear()
    grow.main(flags(out='more', grow_from='run', layers=4, **words))
    lines = [line.split(',') for run in ('run', 'more') for line in Path(run, 'log.csv').read_text().splitlines()[1:]]
    at_end = 0.55 + 0.45 * math.cos(math.pi * 5 / 6)                              # of the tenth step of ten
    assert [float(line[7]) for line in lines if line[7]] == pytest.approx([1e-2 * at_end, *[2e-3 * at_end] * 3], rel=1e-3)
    assert not torch.equal(first[0], seen[0][0])                                  # another order than the source's


def test_stages_grown_further_are_later_ones():
    assert [p.steps for p in grow.phases(config(born_layers=3, born_stage=3, layers=5, stage_ratio=0.5))] == [10, 10]


def test_units_by_hand(dataset):
    n_bytes = sum(len(document.removesuffix('</s>').encode()) for document in documents_of(dataset, 'val'))
    assert dataset.bytes_per_token == n_bytes / dataset.val_tokens
    assert grow.in_units(2.0, dataset) == pytest.approx(dict(val_loss=2, perplexity=math.e**2, bits_per_byte=2 / math.log(2) * dataset.val_tokens / n_bytes))


def test_val_loss_of_a_mixture_is_weighted(monkeypatch):
    sets = [type('D', (), dict(name=name, bytes_per_token=1.0))() for name in 'ab']
    monkeypatch.setattr(grow, 'evaluate', lambda model, d, c, amp: 1.0 if d.name == 'a' else 5.0)
    assert grow.validate(None, sets, [3, 1], config(), None)['val_loss'] == 2


def test_a_mixture_is_no_expert(experts, monkeypatch, capsys):
    monkeypatch.chdir(experts)
    models = iter([grow.MixtureOfExperts(loaded(experts, 'a', 'd')), *loaded(experts, 'b')])
    monkeypatch.setattr(grow, 'load_model', lambda path: next(models))
    with pytest.raises(substrate.UserError, match='mixture already'):
        grow.merge_experts(config(moe=('x', 'b')))


def test_weights_depend_on_seed_and_place():
    def born(seed):
        model = model_of(config(birth='random', seed=seed), blocks=2)
        return [block.qkv.weight for block in model.blocks]
    (a, b), again, (other, _) = born(0), born(0), born(1)
    assert torch.equal(a, again[0]) and not torch.equal(a, b) and not torch.equal(a, other)
    heads = [grow.new_model(config(seed=seed), None).head.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    tables = [grow.new_model(config(seed=seed, substrate='learned'), None).interface.table for seed in (0, 1)]
    assert not torch.equal(*tables)


def test_sampling_obeys_its_flags():
    model = model_of(config(birth='random'))

    def said(prompt='x', **changes):
        return grow.sample(model, prompt, config(length=20, **changes), contextlib.nullcontext())
    usual = said(top_k=1000)
    assert usual == said(top_k=1000) != said(top_k=1000, seed=1)
    assert usual != said(top_k=1000, temperature=0.01)
    assert said(top_k=1, seed=1) == said(top_k=1, seed=2, temperature=100)        # one token to choose from
    with torch.no_grad():
        model.head.bias[[substrate.EOS, ord('y')]] = torch.tensor([50.0, 40.0])
    assert said() == '</s>'
    seen = []
    hidden = model.hidden
    model.hidden = lambda idx: seen.append(idx.shape[1]) or hidden(idx)
    said('y' * 100)
    assert seen == [16]                                                           # the newest context of them, no more


def test_open_prompts_are_cut_from_the_left():
    seen, tokens = [], substrate.tokenizer()

    def model(idx):
        seen.append(idx[0].tolist())
        return always('y')(idx)
    whole = tokens.encode_ordinary('0123456789 Answer:')
    [row], _ = eval_mmlu.score_open(model, tokens, [eval_mmlu.OpenQuestion('squad', 0, '0123456789 Answer:', ['y'])], len(whole) - 2)
    assert seen[0] == whole[2:] and seen[1] == [*whole, ord('y')][3:] and row['cut'] and row['generation'] == 'y' * 16


def test_the_letter_is_what_follows_the_prompt():
    def model(idx):                                                               # a space after a colon, C after a space
        logits = torch.zeros(*idx.shape, substrate.VOCAB)
        logits[..., ord(' ')], logits[..., ord('C')] = 9.0 * (idx == ord(':')), 9.0 * (idx == ord(' '))
        return logits
    asked, n = question('C'), 1 + len(substrate.tokenizer().encode(question().prompt))
    for context, cut in ((n, False), (n - 1, True)):
        [row], _ = eval_mmlu.score(model, substrate.tokenizer(), [asked], context)
        assert (row['letter'], row['choice'], row['cut'], row['scores']) == (' ', 'C', cut, dict(likelihood=1, letter=0))


def test_a_val_split_too_short_is_refused_before_training(here, capsys):
    grow.open_data(config())
    n = prepare_data.Dataset('stdlib').val_tokens
    fails(capsys, flags(out='run', context=n, batch_tokens=n, micro_batch=1, stage_tokens=n, lora_tokens=n), 'val split', '--context')
    assert not Path('run').exists()


@pytest.mark.parametrize('rank, ranks, words', [('abc', '1', 'fit together'), ('1', '1', 'fit together'), ('-1', '2', 'fit together'), ('0', '', 'fit together'), ('1', '2', 'not set by torchrun'),
                                                ('0', '2', 'torchrun')])
def test_stray_ranks_in_the_environment_are_named(rank, ranks, words):
    lone = {name: value for name, value in os.environ.items() if name not in ('MASTER_ADDR', 'LOCAL_RANK')}
    done = subprocess.run([sys.executable, REPO / 'grow.py', '--sample', 'x', '--out', 'nowhere'], capture_output=True, text=True, timeout=120,
                          env=lone | dict(RANK=rank, WORLD_SIZE=ranks))
    assert done.returncode == 2 and words in done.stderr and 'Traceback' not in done.stderr, done


def test_a_run_without_its_latest_checkpoint(own, capsys):
    Path('run/latest.pt').unlink()
    fails(capsys, ['--resume', '--out', 'run'], 'latest.pt is gone', '--out')


def test_an_unwritable_cache_is_no_harm(bits, cache, monkeypatch):
    monkeypatch.setattr(substrate, 'CACHE', Path('/proc/nothing'))
    assert substrate.unicode_table(16).shape == (substrate.VOCAB, 16)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU: pytest -m cuda -s

cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')]


def marked_cuda(test):
    for mark in cuda:
        test = mark(test)
    return test


@marked_cuda
def test_cuda_loss_equals_the_cpu(here):
    torch.set_float32_matmul_precision('highest')
    model, idx, targets = model_of(config(birth='random')), ids(4, 16), ids(4, 16, seed=1)
    with torch.no_grad():
        there, here = model(idx, targets)[1].item(), model.cuda()(idx.cuda(), targets.cuda())[1].item()
    assert abs(there - here) < 1e-4


@marked_cuda
def test_cuda_uses_the_flash_kernel(here):
    """Forward and backward, after set_up and without being forced to."""
    c = config(d_model=64, heads=2, context=128, device='cuda', dtype='bfloat16')
    amp, model = grow.set_up(c), model_of(c).cuda()
    with torch.profiler.profile() as profile, amp:
        model(ids(2, 128).cuda(), ids(2, 128).cuda())[1].backward()
    ran = {event.key for event in profile.key_averages()}
    assert {'aten::_flash_attention_forward', 'aten::_flash_attention_backward'} <= ran, sorted(ran)


@marked_cuda
def test_cuda_three_compiled_stages(here):
    grow.main(flags(out='run', device='cuda', dtype='bfloat16', compile=True, d_model=64, context=32, batch_tokens=128))
    losses = [row['val_loss'] for row in grow.load('run/latest.pt')['at']['history']]
    assert len(losses) == 3 and losses[-1] < losses[0] < math.log(substrate.VOCAB)


@marked_cuda
def test_cuda_twenty_steps_at_paper_size(here):
    """Prints what a GPU does with the paper's model: the last of three grown stages."""
    c = config(**PAPER | dict(layers=9, layers_per_stage=3, substrate='random', device='cuda', dtype='bfloat16', micro_batch=16, batch_tokens=16 * 1024, compile=True,
                              lr=6e-4, head_lr=6e-4))
    amp = grow.set_up(c)
    model = model_of(c, blocks=0).cuda()
    grow.enter(model, grow.Phase('grow', 3, 9, 3, 20))
    grow.compile_model(model)
    optimizer = grow.make_optimizer(model, c)
    one = (ids(16, 1024), ids(16, 1024, seed=1))
    batches = always_the_batch(one)
    torch.cuda.reset_peak_memory_stats()
    losses = [grow.train_step(model, optimizer, batches, k, c, amp)[0] for k in range(5)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    losses += [grow.train_step(model, optimizer, batches, k, c, amp)[0] for k in range(20)]
    torch.cuda.synchronize()
    speed, peak = 20 * c.batch_tokens / (time.perf_counter() - start), torch.cuda.max_memory_allocated() / 2**30
    print(f'\n{torch.cuda.get_device_name()}: {speed:,.0f} tokens/s, {peak:.1f} GiB at most, loss {losses[0]:.3f} -> {losses[-1]:.3f}')
    assert losses[-1] < losses[0]
