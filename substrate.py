"""The token interface: what a token is, and the fixed vector by which models know it (arXiv 2507.04886).

65,536 tokens (code points, frequent 2- and 3-grams, raw bytes), so that every text survives the round trip;
and a table that is never trained: it shows the token as drawn with GNU Unifont, or the 16 bits of its id, or
noise. Beside it, as a control, the trained table of ordinary models. Not in here: text normalisation, learned
merges, anything that grows.

    python substrate.py                                # describe the interface
    python substrate.py --show "Привет, 你好, the 🎉"   # the tokens of a text, as a model sees them
    python substrate.py --homoglyphs                   # the tokens that look exactly like another one
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import os
import re
import sys
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F

NGRAMS = Path(__file__).resolve().parent / 'interface' / 'ngrams.txt'
NGRAMS_DIGEST = 'a8940ebb4eb6e67e'
GLYPHS = NGRAMS.with_name('glyphs.npz')
GLYPHS_SHA256 = '51e2320ad26ea467f2cd09ce7b64a3c9eb7cc4ae1f59ac5c3252520c0c0e8436'    # of its bits
CELL = 32                               # Unifont is designed on 16 pixels: each of them is four here

# --------------------------------------------------------------------------------------------------------
# The vocabulary. Unicode has two holes below 65,536, surrogates and the private use area: all that is no
# character goes there. The layout is that of bvv241-2-3; the raw bytes, which make it lossless, are ours

VOCAB = 65_536                          # so a token is exactly one uint16
EOS = 0xE002                            # the one special token in use: it ends every document
SPECIALS = {0xE000: '<pad>', 0xE001: '<s>', EOS: '</s>', 0xE003: '<unk>'}
NAMED_IDS = range(0xE000, 0xE100)       # 128 special tokens, of them 124 free; then the raw bytes 0x80-0xFF
NGRAM_IDS = [*range(0xD800, 0xE000), *range(0xE100, 0xF900)]    # 8,192 places

def fill_places(rankings):
    """The first n-gram of every ranking, then the second ones, ... up to 8,192; in id order."""
    grams = dict.fromkeys(filter(None, chain.from_iterable(zip_longest(*rankings))))   # None: one has ended
    return sorted(list(grams)[:len(NGRAM_IDS)], key=lambda gram: (-len(gram), gram))

def read_ngrams(ngram_file=NGRAMS):
    """The 8,192 n-grams in id order, of a file with one a line or the rankings published with bvv241-2-3."""
    try:
        text = Path(ngram_file).read_text(encoding='utf-8')
        grams = text.removesuffix('\n').split('\n')
        if text.startswith('[{'):
            tops = [top for language in ast.literal_eval(text) for top in language['top_ngrams'].values()]
            grams = fill_places([[gram for gram, _ in top] for top in tops])
    except Exception:                   # absent, not UTF-8, a literal of another shape
        grams = []
    whole = len(grams) == len(set(grams)) == len(NGRAM_IDS) and {2, 3} >= set(map(len, grams))
    if not whole or (ngram_file == NGRAMS and digest(*grams) != NGRAMS_DIGEST):
        raise UserError(f'{ngram_file} is damaged, or another list (of digest {digest(*grams)}): restore it')
    return grams

def token_texts(ngram_file=NGRAMS):
    """The text of every id. Special tokens and bytes have names: `</s>`, `<7F>` (reserved), `<80>` (byte)."""
    texts = {i: f'<{i & 0xFF:02X}>' for i in NAMED_IDS} | SPECIALS
    texts |= dict(zip(NGRAM_IDS, read_ngrams(ngram_file)))
    return [texts.get(i, chr(i)) for i in range(VOCAB)]

@functools.cache
def tokenizer(ngram_file=NGRAMS):
    """The tiktoken.Encoding: use `.encode_ordinary(text)` and `.decode(ids)`. Its regex takes the longest
    n-gram that starts here, else one character, which is found among the ranks, or else is spelled in bytes.
    No text makes a special token. Bytes that are no UTF-8, and lone surrogates, become U+FFFD."""
    ranks = {text.encode(): i for i, text in enumerate(token_texts(ngram_file)) if i not in NAMED_IDS[128:]}
    ranks |= {bytes([i & 0xFF]): i for i in NAMED_IDS[128:]}
    # by first characters: in one long alternation each is tried in turn, on Chinese 80 times slower
    tails = {}
    for gram in sorted(read_ngrams(ngram_file), key=len, reverse=True):
        tails.setdefault(gram[0], []).append(re.escape(gram[1:]))
    regex = '|'.join(f'{re.escape(first)}(?:{"|".join(rest)})' for first, rest in tails.items()) + '|(?s:.)'
    return tiktoken.Encoding('bvv241-2-3-lossless', pat_str=regex, mergeable_ranks=ranks, special_tokens={})

def tokenizer_fingerprint(ngram_file=NGRAMS):
    """Sixteen hex digits that change with the layout and with the n-grams, so with what ids mean."""
    return digest('layout 1', *read_ngrams(ngram_file))

# --------------------------------------------------------------------------------------------------------
# The pictures of the tokens, drawn once by interface/draw_glyphs.py: no one needs the font to train

def glyphs():
    """The picture of every token, (65536, 1024) uint8 of 0 and 1. Raises UserError if the file is damaged."""
    try:
        packed = np.load(GLYPHS)['arr_0']
    except Exception:                   # zipfile, zlib and numpy complain of a bad file in several ways
        packed = np.empty(0)
    if hashlib.sha256(packed.tobytes()).hexdigest() != GLYPHS_SHA256:
        raise UserError(f'{GLYPHS} is damaged: restore it, or run python interface/draw_glyphs.py FONT')
    return np.unpackbits(packed, axis=1)

def homoglyphs(bits):
    """The groups of ids with one picture, and so with one vector, as A is in Latin, Greek and Cyrillic."""
    groups = {}
    for i, row in enumerate(np.packbits(bits, axis=1)):
        groups.setdefault(row.tobytes(), []).append(i)
    return [group for group in groups.values() if len(group) > 1]

def readable(text):
    """A token's text where it can be seen, else its code points: U+0020 for a space."""
    return text if text.isprintable() and not text.isspace() else ' '.join(f'U+{ord(c):04X}' for c in text)

def show(text):
    """Prints the tokens of `text`, one below the other: picture, id, text, and what has the same picture."""
    texts, bits = token_texts(), glyphs()
    twins = {i: group for group in homoglyphs(bits) for i in group}
    for i in tokenizer().encode_ordinary(text):
        # nothing is lost: all rows are there twice, and the columns of a single character
        pixels = bits[i].reshape(CELL, CELL)[::2, ::2 if len(texts[i]) == 1 else 1]
        lines = [''.join(' ▀▄█'[k] for k in row).ljust(CELL) for row in pixels[::2] + 2 * pixels[1::2]]
        lines[3] += f'  {i:,} = 0x{i:04X}   {readable(texts[i])}'
        others = [f'{readable(texts[k])} 0x{k:04X}' for k in twins.get(i, []) if k != i]
        lines[4] += '  looks like ' + ', '.join(others) if others else ''
        print(*lines, sep='\n')

# --------------------------------------------------------------------------------------------------------
# The tables

NAMES = 'unicode', 'binary', 'random', 'learned'        # each has its branch in `substrate` below
RANDOM_SEED = 250707129                 # of its own: --seed must not change the interface

class Substrate(torch.nn.Module):
    """The token interface: (B, T) int64 -> (B, T, d_model). `substrate` fills it, or a checkpoint. Its
    table is (65536, d_model) float32, for 'binary' (65536, 16), and takes gradients for 'learned' alone."""
    def __init__(self, name, d_model):
        super().__init__()
        self.name, self.d_model = str(name), d_model
        if self.name not in NAMES and not self.name.endswith(('.npy', '.pt')):
            raise UserError(f'{name} is no substrate: choose {", ".join(NAMES)} or a .npy or .pt file', 2)
        if self.name == 'binary' and d_model % 16:
            raise UserError('for substrate binary d_model must be a multiple of 16', 2)
        width = 16 if self.name == 'binary' else d_model
        self.table = torch.nn.Parameter(torch.empty(VOCAB, width), requires_grad=self.name == 'learned')

    def forward(self, idx):
        x = F.embedding(idx, self.table).unsqueeze(-1)                            # B, T, width, 1
        return x.expand(*x.shape[:-1], self.d_model // x.shape[-2]).flatten(-2)   # bits are repeated

@functools.cache
def principal_components():
    """-> the mean picture, (1024,), and the axes along which pictures differ, (1024, 992), widest first."""
    x = glyphs().astype(np.float32)                               # V, 1024
    mean = x.mean(0, dtype=np.float64)
    together = (x.T @ x).astype(np.float64)                       # exact, since below 2^24
    variances, axes = np.linalg.eigh(together / VOCAB - np.outer(mean, mean))
    axes = axes[:, variances > 1e-9 * variances[-1]][:, ::-1]
    # an axis has no sign: its largest entry gets +
    return mean, axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])

def unicode_table(d_model):
    """(65536, d_model): pictures on their principal components, zero beyond the 992; rows of length 1."""
    x, (mean, axes) = glyphs(), principal_components()
    axes, rows = axes[:, :d_model], np.zeros((VOCAB, d_model), np.float32)
    for i in range(0, VOCAB, 4096):                               # in parts, since these products are float64
        rows[i:i + 4096, :axes.shape[1]] = F.normalize(torch.from_numpy((x[i:i + 4096] - mean) @ axes))
    return rows

def read_table(path, d_model):
    """The matrix in a .npy file, or in a .pt file of a tensor or a dict with one matrix. Raises UserError."""
    try:
        saved = np.load(path) if path.endswith('.npy') else torch.load(path, 'cpu', weights_only=True)
        arrays = saved.values() if isinstance(saved, dict) else [saved]
        [rows] = [torch.as_tensor(x).float() for x in arrays if np.shape(x) == (VOCAB, d_model)]
    except Exception:                   # of a dozen kinds for a file that is no such table
        rows = torch.tensor(torch.nan)
    if not rows.isfinite().all():
        raise UserError(f'{path} is missing, or not {VOCAB} x {d_model} finite floats of numpy or torch.save')
    return rows

def substrate(name, d_model, seed=0):
    """The Substrate `name`, one of NAMES or a file, filled; `seed` is for 'learned'. Raises UserError."""
    module = Substrate(name, d_model)
    if name == 'unicode':
        rows = unicode_table(d_model)
    elif name == 'binary':                                        # the most significant bit first
        rows = np.arange(VOCAB)[:, None] >> np.arange(16)[::-1] & 1
    elif name == 'random':
        generator = np.random.Generator(np.random.PCG64(RANDOM_SEED))
        rows = F.normalize(torch.from_numpy(generator.standard_normal((VOCAB, d_model), np.float32)))
    elif name == 'learned':                                       # GPT-2's 0.02; the model scales it too
        rows = torch.normal(0, 0.02, (VOCAB, d_model), generator=torch.Generator().manual_seed(seed))
    else:
        rows = read_table(module.name, d_model)
    module.table.data = torch.as_tensor(rows, dtype=torch.float32)
    return module

# --------------------------------------------------------------------------------------------------------
# What all scripts share: errors that are one sentence, files that are whole or absent, tables

class UserError(Exception):
    """A mistake its user can mend: one sentence that names the remedy. Status 2 is for the command line."""
    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status

class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends a wrong command line in one sentence."""
    def error(self, message):
        raise UserError(f'{message} (-h explains)', status=2)

def cli(main):
    """Wraps a script's main(argv=None): errors end in one sentence and exit status 1 or 2, Ctrl-C in 130."""
    def run(argv=None):
        if hasattr(sys.stdout, 'reconfigure'):                    # it is None after >&-
            sys.stdout.reconfigure(errors='replace')              # for what a terminal cannot show
        try:
            main(argv)
            return print(end='', flush=True)                      # at exit nothing could be caught any more
        except BrokenPipeError:                                   # `| head -1`: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(141)
        except (UserError, OSError) as error:                     # OSError: disk full, no permission, ...
            message, status = f'error: {error}', getattr(error, 'status', 1)
        except KeyboardInterrupt as error:
            message, status = error.args or ('interrupted', 130)
        print(message, file=sys.stderr)
        sys.exit(status)
    return run

@contextlib.contextmanager
def replacing(path):
    """Yields a path to write to beside `path`, then renames it: killed half-way, the old file stays whole."""
    beside = Path(path).with_name(f'.{Path(path).name}.tmp')
    beside.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        with open(beside, 'rb') as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:                      # torch raises RuntimeError
        reason = str(error).partition('\n')[0]
        raise UserError(f'{path} could not be written, and is as before: make room? ({reason})') from None
    finally:
        beside.unlink(missing_ok=True)

def digest(*parts):
    """Sixteen hex digits that stand for `parts`, for file names and checkpoints."""
    return hashlib.sha256('|'.join(map(str, parts)).encode()).hexdigest()[:16]

def sha256_of(path):
    """Hex digest of a file, however large."""
    content = np.memmap(path, mode='r') if os.path.getsize(path) else b''
    return hashlib.sha256(content).hexdigest()

def table(rows):
    """Prints dicts as an aligned table, a column for each key; integers with thousands separators."""
    shown = {int: '{:,}', float: '{:.3f}'}
    keys = list(dict.fromkeys(key for row in rows for key in row))
    values = [[row.get(key, '') for key in keys] for row in rows]
    cells = [keys] + [[shown.get(type(x), '{}').format(x) for x in line] for line in values]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print('  '.join(cell.rjust(width) for cell, width in zip(line, widths)))

@cli
def main(argv=None):
    """The command line: describes the interface, shows a text's tokens, or lists those that look alike."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--show', metavar='TEXT', help='print the tokens of TEXT, as a model sees them')
    parser.add_argument('--homoglyphs', action='store_true', help='list the tokens that look like others')
    args = parser.parse_args(argv)
    if args.show is not None:
        return show(args.show)
    texts, groups = token_texts(), homoglyphs(glyphs())
    for group in groups if args.homoglyphs else ():
        print('  '.join(f'{readable(texts[i])} 0x{i:04X}' for i in group))
    print(f'{VOCAB:,} tokens, {sum(map(len, groups)):,} look alike; fingerprint', tokenizer_fingerprint())

if __name__ == '__main__':
    main()
