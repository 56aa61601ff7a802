"""The token interface: what a token is, and the fixed vector by which every model here knows it (arXiv 2507.04886, on which the paper builds).

65,536 tokens (code points, frequent 2- and 3-grams, raw bytes), so that a token is exactly one uint16 and every text survives
the round trip; and a table that gives each token d_model numbers. The table is never trained: it shows the token as drawn with
GNU Unifont, or the 16 bits of its id, or noise. (The trained table of ordinary models is here too, as a control.)
Not in here: text normalisation, learned merges, anything that grows.

    python substrate.py                             # describe the interface
    python substrate.py --show "Привет, 你好, the 🎉"   # the tokens of a text, as a model sees them: a table, and a picture in show.png
    python substrate.py --homoglyphs                # the tokens that no model on the unicode substrate can tell apart
    python substrate.py --draw /usr/share/fonts/opentype/unifont/unifont.otf      # rebuild interface/glyphs.npz
"""

import argparse
import ast
import contextlib
import errno
import functools
import hashlib
import os
import re
import sys
from itertools import chain, islice, zip_longest
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
NGRAMS = HERE / 'interface' / 'ngrams.txt'            # the n-grams, one a line in id order
NGRAMS_DIGEST = 'a8940ebb4eb6e67e'                    # of this list: another one there needs other glyphs too
GLYPHS = HERE / 'interface' / 'glyphs.npz'            # the picture of every token
GLYPHS_SHA256 = '51e2320ad26ea467f2cd09ce7b64a3c9eb7cc4ae1f59ac5c3252520c0c0e8436'      # of its bits
CACHE = HERE / 'data' / 'interface'                   # tables that take seconds to compute are kept here

# ---------------------------------------------------------------------------------------------------------------------
# What all scripts share: errors that are one sentence, files that are whole or absent

class UserError(Exception):
    """A mistake its user can mend. The message is one sentence that names the remedy; `cli` prints it without a traceback."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status                          # exit status: 2 where the command line itself is wrong

class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends a wrong command line in one sentence."""

    def error(self, message):
        raise UserError(f'{message} (-h explains)', status=2)

def cli(main):
    """Wraps a script's main(argv=None): a UserError or OSError ends in one sentence on stderr and exit status 1 or 2, Ctrl-C in 130."""
    @functools.wraps(main)
    def run(argv=None):
        if hasattr(sys.stdout, 'reconfigure'):
            sys.stdout.reconfigure(errors='replace')  # a model may say what a terminal cannot show
        try:
            result = main(argv)
            sys.stdout.flush()                        # here, not at exit, where nothing can be caught any more
            return result
        except UserError as error:
            message, status = f'error: {error}', error.status
        except BrokenPipeError:                       # `| head -1`: nobody reads on
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(141)
        except OSError as error:                      # disk full, no permission, ...
            full = '; make room on the disk and run the same again, or go on with --resume' * (error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
            message, status = f'error: {error.strerror or error}: {error.filename or "while reading or writing"}{full}', 1
        except KeyboardInterrupt:
            message, status = 'interrupted', 130
        print(message, file=sys.stderr)
        sys.exit(status)
    return run

@contextlib.contextmanager
def replacing(path):
    """Yields a path beside `path` to write to, then renames it to `path`: whoever is killed half-way leaves the old file whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield beside
        with open(beside, 'rb') as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:          # RuntimeError: what torch makes of a failed write
        raise UserError(f'{path} could not be written ({str(error).splitlines()[0]}): is the disk full? What was there before is still whole') from None
    finally:
        beside.unlink(missing_ok=True)

def digest(*parts):
    """Sixteen hex digits that stand for `parts`, for file names and checkpoints."""
    return hashlib.sha256('|'.join(map(str, parts)).encode()).hexdigest()[:16]

def sha256_of(path):
    """Hex digest of a file, read in parts."""
    sha = hashlib.sha256()
    with open(path, 'rb') as f:
        for block in iter(lambda: f.read(2**20), b''):
            sha.update(block)
    return sha.hexdigest()

# ---------------------------------------------------------------------------------------------------------------------
# The vocabulary. Unicode has two holes below 65,536, surrogates and the private use area: all that is no character goes there.
# The layout is that of the bvv241-2-3 tokenizer (arXiv 2507.04886); the raw bytes, which make it lossless, are ours

VOCAB = 65_536                                        # so a token is exactly one uint16
EOS = 0xE002                                          # the one special token that is used: it ends every document
SPECIALS = {0xE000: '<pad>', 0xE001: '<s>', EOS: '</s>', 0xE003: '<unk>'}
NAMED_IDS = range(0xE000, 0xE100)                     # 128 special tokens, 124 of them reserved; then the raw bytes 0x80-0xFF
NGRAM_IDS = [*range(0xD800, 0xE000), *range(0xE100, 0xF900)]    # 8,192 places

def id_order(gram):
    """The sort key of n-grams by which they get their ids."""
    return -len(gram), gram                           # longest first, then by code point

def fill_places(rankings):
    """The first of every ranking of n-grams, then the second of every ranking, ... until all places are taken; in id order."""
    grams = dict.fromkeys(chain.from_iterable(zip_longest(*rankings)))
    grams.pop(None, None)                             # stands where a ranking has ended
    return sorted(islice(grams, len(NGRAM_IDS)), key=id_order)

def read_ngrams(ngram_file=NGRAMS):
    """The 8,192 n-grams in id order, from a file with one a line, or from the Python literal published with the bvv241-2-3 tokenizer.
    Raises UserError unless they are distinct, of 2 or 3 characters, and in order."""
    try:
        text = Path(ngram_file).read_text(encoding='utf-8')
        grams = text.removesuffix('\n').split('\n')
        if text.startswith('[{'):                     # the original: rankings by language, as ours before they were merged
            grams = fill_places([[gram for gram, _ in top] for language in ast.literal_eval(text) for top in language['top_ngrams'].values()])
    except Exception as error:                        # absent, not UTF-8, or a literal of another shape
        raise UserError(f'cannot read the n-gram file {ngram_file} ({error}); restore it or name another') from None
    if len(grams) != len(NGRAM_IDS) or grams != sorted(set(grams), key=id_order) or not {2, 3} >= set(map(len, grams)):
        raise UserError(f'{ngram_file} must hold {len(NGRAM_IDS):,} distinct n-grams of 2 or 3 characters, one a line, longest first, '
                        'then by code point; restore it or rebuild it with: python interface/count_ngrams.py')
    if ngram_file == NGRAMS and (found := digest(*grams)) != NGRAMS_DIGEST:
        raise UserError(f'{ngram_file} is not the list of NGRAMS_DIGEST: restore it, or, if it was changed on purpose, set that to {found}')
    return grams

def token_texts(ngram_file=NGRAMS):
    """The text of every id, 65,536 strings. Special tokens and bytes have names: `</s>`, `<7F>` (reserved), `<80>` (a byte)."""
    texts = [chr(i) for i in range(VOCAB)]            # every place in the two holes is overwritten now
    for i, gram in zip(NGRAM_IDS, read_ngrams(ngram_file)):
        texts[i] = gram
    for i in NAMED_IDS:
        texts[i] = SPECIALS.get(i, f'<{i & 0xFF:02X}>')
    return texts

def longest_of(words):
    """A regex for the longest of `words` that stands here, as a tree of their common beginnings: a plain alternation of all n-grams is
    80 times slower on Chinese, where the engine would try each in turn."""
    tails = {}
    for word in filter(None, words):
        tails.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + longest_of(rest) for first, rest in tails.items() if rest != ['']]
    leaves = ''.join(re.escape(first) for first, rest in tails.items() if rest == [''])
    return f'(?:{"|".join(branches + [f"[{leaves}]"] * bool(leaves))})' + '?' * ('' in words)

@functools.lru_cache
def tokenizer(ngram_file=NGRAMS):
    """The tiktoken.Encoding: use `.encode_ordinary(text)` and `.decode(ids)`.

    The regex is the tokenizer: it takes the longest n-gram that starts here, else one character, and finds it whole among the ranks.
    Only characters above U+FFFF or in the private use area are not there: tiktoken spells them in bytes (no two of theirs make a
    token, so nothing merges). No text encodes to a special token: `<s>` in a text is three characters. All ids decode, special
    tokens to their names, bytes that are no UTF-8 to U+FFFD. A lone surrogate, which is no valid Unicode, is encoded as U+FFFD."""
    texts = token_texts(ngram_file)
    ranks = {text.encode(): i for i, text in enumerate(texts) if i not in NAMED_IDS[128:]}
    ranks |= {bytes([i & 0xFF]): i for i in NAMED_IDS[128:]}
    pattern = longest_of([texts[i] for i in NGRAM_IDS]) + '|(?s:.)'
    return tiktoken.Encoding('bvv241-2-3-lossless', pat_str=pattern, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=VOCAB)

def tokenizer_fingerprint(ngram_file=NGRAMS):
    """Sixteen hex digits that change with the layout and with the n-grams, so with what ids mean."""
    return digest('layout 1', *read_ngrams(ngram_file))

# ---------------------------------------------------------------------------------------------------------------------
# The pictures of the tokens, drawn once: no one needs the font to train

CELL = 32                                             # Unifont is designed on 16 pixels: each of them is exactly four here

def draw_tokens(font_file):
    """The picture of every token, (65536, 128) uint8, 1,024 bits packed. Several characters stand side by side, squeezed to one cell: a
    pixel is on if at least half of what it covers is. Recipe of arXiv 2507.04886 less its noise, but control characters are drawn as
    their control pictures (our choice), or a line end would be as blank as a space. Raises UserError if the font cannot be read."""
    try:
        font = ImageFont.truetype(font_file, CELL, layout_engine=ImageFont.Layout.BASIC)      # the other engine fails on some code points
    except OSError as error:
        raise UserError(f'cannot read the font {font_file} ({error}); Debian has it in the package fonts-unifont') from None

    @functools.cache
    def cell(character):                              # centred by its bounding box: at the origin, combining marks would fall outside
        image = Image.new('1', (CELL, CELL))
        left, top, right, bottom = font.getbbox(character, mode='1')
        ImageDraw.Draw(image).text(((CELL - left - right) // 2, (CELL - top - bottom) // 2), character, fill=1, font=font)
        return np.array(image)

    texts = token_texts()
    texts[:0x20], texts[0x7F] = map(chr, range(0x2400, 0x2420)), '\u2421'
    pictures = np.empty((VOCAB, CELL, CELL), bool)
    for i, text in enumerate(texts):
        row = np.concatenate([cell(character) for character in text], axis=1)     # 32, 32 * len(text)
        pictures[i] = 2 * row.reshape(CELL, CELL, -1).sum(2) >= len(text)
    return np.packbits(pictures.reshape(VOCAB, -1), axis=1)

def load_npz(path):
    """The one array of an .npz file, or None if the file is absent or damaged (each member of a zip file has a checksum)."""
    try:
        with np.load(path) as file:
            return file[file.files[0]]
    except Exception:                                 # zipfile, zlib and numpy each have several ways to complain of a bad file
        return None

def glyphs():
    """The picture of every token, (65536, 1024) uint8 of 0 and 1. Raises UserError if the file is damaged."""
    packed = load_npz(GLYPHS)
    if packed is None or hashlib.sha256(packed.tobytes()).hexdigest() != GLYPHS_SHA256:
        raise UserError(f'{GLYPHS} is damaged, or not the table of GLYPHS_SHA256; restore it or rebuild it with: python substrate.py --draw FONT')
    return np.unpackbits(packed, axis=1)

def homoglyphs(bits):
    """The groups of two or more tokens with one picture, and so with one vector: lists of ids, as A is in Latin, Greek and Cyrillic."""
    groups = {}
    for i, row in enumerate(np.packbits(bits, axis=1)):
        groups.setdefault(row.tobytes(), []).append(i)
    return [group for group in groups.values() if len(group) > 1]

# ---------------------------------------------------------------------------------------------------------------------
# The tables

RANDOM_SEED = 250707129                               # of its own: --seed must not change the interface
RECIPES = {                                           # whatever changes a table must change its recipe
    'unicode': f'pictures, principal components 1, {GLYPHS_SHA256}',
    'binary': 'bits of the id 1',
    'random': f'normal, PCG64 of {RANDOM_SEED}',
    'learned': 'normal 0.02',
}
CODE_BITS = 16

class Substrate(nn.Module):
    """Gives tokens their vectors: (B, T) int64 -> (B, T, d_model). Built unfilled (on the meta device too): `substrate` fills it, or a checkpoint.

    Attributes: name, d_model, fingerprint; table, an nn.Parameter of float32, (65536, d_model) or for 'binary' (65536, 16), which
    takes gradients for 'learned' alone. Raises UserError for an unknown name, and for 'binary' if 16 does not divide d_model."""

    def __init__(self, name, d_model, fingerprint=''):
        super().__init__()
        self.name, self.d_model, self.fingerprint = str(name), d_model, fingerprint
        if self.name not in RECIPES and not self.name.endswith(('.npy', '.pt')):
            raise UserError(f'there is no substrate {self.name!r}: choose {", ".join(RECIPES)}, or a file that ends in .npy or .pt', status=2)
        if self.name == 'binary' and d_model % CODE_BITS:
            raise UserError(f'the binary substrate needs a d_model that is a multiple of {CODE_BITS}, not {d_model}', status=2)
        width = CODE_BITS if self.name == 'binary' else d_model
        self.table = nn.Parameter(torch.empty(VOCAB, width, dtype=torch.float32), requires_grad=self.name == 'learned')

    def forward(self, idx):
        x = F.embedding(idx, self.table).unsqueeze(-1)                                        # B, T, width, 1
        return x.expand(*x.shape[:-1], self.d_model // x.shape[-2]).flatten(-2)               # each bit repeated; else as it is

def fingerprint(name, d_model):
    """Sixteen hex digits; models fit together only if theirs are equal. They stand for the recipe (of a file: its bytes), not for the floats,
    whose last bits differ between machines."""
    return digest(name, RECIPES[name], d_model) if name in RECIPES else digest(sha256_of(name))

@functools.cache
def principal_components():
    """-> (the mean picture, (1024,), and the axes along which pictures differ, (1024, 992), the one with most variance first): float64."""
    x = glyphs().astype(np.float32)                   # V, 1024
    mean = x.mean(0, dtype=np.float64)
    together = (x.T @ x).astype(np.float64)           # how often two pixels are on at once: exact, since below 2^24
    variances, axes = np.linalg.eigh(together / VOCAB - np.outer(mean, mean))                 # ascending
    axes = axes[:, variances > 1e-9 * variances[-1]][:, ::-1]
    return mean, axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])       # an axis has no sign: its largest entry gets +

def unicode_table(d_model):
    """The pictures on their first d_model principal components, then rows of length 1 (arXiv 2507.04886): (65536, d_model) float32.
    Columns beyond the 992 components are zero. Cached, since it takes seconds."""
    path = CACHE / f'unicode_{fingerprint("unicode", d_model)}.npz'
    if (table := load_npz(path)) is not None:
        return table
    x, (mean, axes) = glyphs(), principal_components()
    axes, table = axes[:, :d_model], np.zeros((VOCAB, d_model), np.float32)
    for i in range(0, VOCAB, 4096):                   # in parts, since these products are float64
        table[i:i + 4096, :axes.shape[1]] = F.normalize(torch.from_numpy((x[i:i + 4096] - mean) @ axes))
    with contextlib.suppress(UserError, OSError), replacing(path) as beside, open(beside, 'wb') as file:      # no place to keep it is no harm
        np.savez(file, table)
    return table

def read_table(path, d_model):
    """The matrix of a .npy file, or of a .pt file that holds a tensor or a dict with one matrix in it. Raises UserError for any other."""
    try:
        if str(path).endswith('.npy'):
            saved = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            saved = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:                        # numpy and torch raise a dozen kinds for a file that is none of theirs
        reason = str(error).partition('\n')[0]
        raise UserError(f'cannot read the substrate {path} ({reason}); save it with numpy.save, or torch.save as a tensor') from None
    tensors = saved.values() if isinstance(saved, dict) else [saved]
    matrices = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.dim() == 2]
    matrix = matrices[0] if len(matrices) == 1 else torch.empty(0)
    if matrix.shape != (VOCAB, d_model) or not matrix.is_floating_point() or not matrix.float().isfinite().all():
        found = ' and '.join(f'{len(m)} x {m.shape[1]} of {m.dtype}' for m in matrices) or 'none'
        raise UserError(f'the substrate {path} must hold one matrix, {VOCAB} x {d_model} floats for d_model {d_model}, none of them NaN or infinite '
                        f'in float32; it holds {found}')
    return matrix

def substrate(name, d_model, seed=0):
    """The filled Substrate `name`, one of RECIPES or the path of a .npy or .pt file; `seed` is for 'learned' alone. Raises UserError as
    Substrate does, or if the file does not fit."""
    module = Substrate(name, d_model)
    if name == 'unicode':
        table = unicode_table(d_model)
    elif name == 'binary':
        table = np.arange(VOCAB)[:, None] >> np.arange(CODE_BITS)[::-1] & 1                   # most significant bit first
    elif name == 'random':
        noise = np.random.Generator(np.random.PCG64(RANDOM_SEED)).standard_normal((VOCAB, d_model), np.float32)
        table = F.normalize(torch.from_numpy(noise))                                          # rows of length 1
    elif name == 'learned':
        table = torch.normal(0, 0.02, (VOCAB, d_model), generator=torch.Generator().manual_seed(seed))      # as in GPT-2
    else:
        table = read_table(name, d_model)
    module.fingerprint = fingerprint(name, d_model)
    with torch.no_grad():
        module.table.copy_(torch.as_tensor(table))
    return module

# ---------------------------------------------------------------------------------------------------------------------
# Looking at the tokens of a text

def readable(text):
    """A token's text where it can be seen, else its code points: U+0020 for a space."""
    return text if text.isprintable() and not text.isspace() else ' '.join(f'U+{ord(c):04X}' for c in text)

def what_is_left(ids, d_model):
    """-> (what rows of the unicode table still tell of their pictures, (len(ids), 1024) of about 0 to 1; the share of each picture's variance
    that this is, (len(ids),)). A row is a direction among pictures; how far to go in it, the length it lost, is taken from the picture."""
    mean, axes = principal_components()
    directions = unicode_table(d_model)[ids, :axes.shape[1]] @ axes[:, :d_model].T           # n, 1024
    away = glyphs()[ids] - mean
    along = (away * directions).sum(1)
    return mean + along[:, None] * directions, along ** 2 / (away ** 2).sum(1)

def draw_text(ids, d_model):
    """A PIL image with a row a token: its text and id, its picture as the table is made of it, what is left of that, and its d_model numbers."""
    bits, texts, font = glyphs().reshape(VOCAB, CELL, CELL), token_texts(), ImageFont.load_default(14)
    left, share = what_is_left(ids, d_model)
    numbers = unicode_table(d_model)[ids] * d_model ** 0.5 / 3                                # 1 is three standard deviations
    heat = np.stack([1 + numbers.clip(max=0), 1 - abs(numbers), 1 - numbers.clip(min=0)], axis=-1)      # n, d_model, 3
    image = Image.new('RGB', (1066, 60 + 104 * len(ids)), 'white')
    pen = ImageDraw.Draw(image)

    def paste(x, y, colours, width, height):          # colours: rows, columns and perhaps 3, of 0 to 1
        part = Image.fromarray((255 * colours.clip(0, 1)).astype(np.uint8))
        image.paste(part.resize((width, height), Image.Resampling.BOX), (x, y))
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline='#b8c4d0')

    for x, caption in ((10, 'token\n'), (150, 'id\n'), (250, f'its picture,\n{CELL} x {CELL} bits'),
                       (370, f'what is left of it with\n{d_model:,} numbers'), (542, 'these numbers, most telling first:\nred above zero, blue below')):
        pen.text((x, 12), caption, 'black', font)
    for y, i, picture, kept, strip in zip(range(56, image.height, 104), ids, left, share, heat):
        label = readable(texts[i])
        paste(10, y + 32, 1.0 - np.hstack([bits[ord(c)] for c in label]), min(32 * len(label), 128), 32 if len(label) < 5 else 20)
        pen.text((150, y + 32), f'{i:,}\n0x{i:04X}', 'black', font)
        paste(250, y, 1.0 - bits[i], 96, 96)
        paste(370, y, 1.0 - picture.reshape(CELL, CELL), 96, 96)
        pen.text((474, y + 32), f'{kept:.1%} of\nvariance', 'black', font)
        paste(542, y, strip[None], 512, 96)
    return image

# ---------------------------------------------------------------------------------------------------------------------

@cli
def main(argv=None):
    """Describes the interface, shows what is in it, or draws its pictures again."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--show', metavar='TEXT', help='print the tokens of TEXT, and draw what a model sees of them')
    parser.add_argument('--out', metavar='PNG', default='show.png', help='for --show: the picture (%(default)s)')
    parser.add_argument('--d_model', type=int, default=256, help='for --show: numbers a token, as in grow.py (%(default)s)')
    parser.add_argument('--homoglyphs', action='store_true', help='list the tokens that look exactly like another one')
    parser.add_argument('--draw', metavar='FONT', help='draw the tokens again with GNU Unifont (.otf) and write interface/glyphs.npz')
    args = parser.parse_args(argv)
    if args.draw:
        packed = draw_tokens(args.draw)
        with replacing(GLYPHS) as beside, open(beside, 'wb') as file:
            np.savez_compressed(file, packed)
        found = hashlib.sha256(packed.tobytes()).hexdigest()
        print(f'wrote {GLYPHS}: ' + ('bit for bit as before' if found == GLYPHS_SHA256 else f'a new interface, set GLYPHS_SHA256 to {found}'))
        return
    texts, groups = token_texts(), homoglyphs(glyphs())
    if args.show is not None:
        ids = tokenizer().encode_ordinary(args.show)
        if not 1 <= len(ids) <= 400 or args.d_model < 1:
            parser.error(f'--show takes a text of 1 to 400 tokens, not {len(ids):,}, and a positive --d_model')
        twins = {i: group for group in groups for i in group}
        print('id              token   looks exactly like')
        for i in ids:
            print(f'{i:6,} = 0x{i:04X}  {readable(texts[i]):6}  ' + '  '.join(f'{readable(texts[k])} 0x{k:04X}' for k in twins.get(i, ()) if k != i))
        with replacing(args.out) as beside:
            draw_text(ids, args.d_model).save(beside, 'PNG')
        print(f'wrote {args.out}')
        return
    for group in groups if args.homoglyphs else ():
        print('  '.join(f'{readable(texts[i])} 0x{i:04X}' for i in group))
    print(f'{VOCAB:,} tokens, fingerprint {tokenizer_fingerprint()}: {VOCAB - len(NGRAM_IDS) - len(NAMED_IDS):,} code points, '
          f'{len(NGRAM_IDS):,} n-grams, 128 special tokens (124 reserved), 128 raw bytes')
    print(f'{sum(map(len, groups)):,} tokens look exactly like another one, and have its vector on the unicode substrate: {len(groups):,} groups')

if __name__ == '__main__':
    main()
