"""Text to shards, and shards to batches.

A data set is a folder data/NAME/ of parts: a file of a downloaded corpus, or all that one command reads. A
part is train_000000.bin and val_000000.bin, a uint16 a token with the id of </s> after each document, and
part_000000.json, what is known of them. The train shard gets its name last: where it is, its part is done.

    python prepare_data.py stdlib                                # the prose of Python's standard library
    python prepare_data.py files --name books PATH...            # .txt .md .py .jsonl .parquet, .gz; folders
    python prepare_data.py files --name aphorisms --split-line % PATH   # documents end at a line %
    python prepare_data.py wikipedia-ru --tokens 1_000_000_000   # downloaded, no more than that takes
    python prepare_data.py fineweb-edu                           # cosmopedia, wikipedia-{en,zh}, shakespeare
    python prepare_data.py --check books                         # is every shard still what was written?

Whatever stops it, the same command goes on and ends in the same bytes, on however many cores.
"""

import argparse
import ast
import contextlib
import gzip
import hashlib
import inspect
import io
import itertools
import json
import os
import re
import sys
import sysconfig
import time
import tokenize
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import requests
import torch
from requests.adapters import HTTPAdapter, Retry

from substrate import EOS, VOCAB, Parser, UserError, cli, digest, replacing, sha256_of
from substrate import tokenizer, tokenizer_fingerprint

WHOLE = 64 * 2**10         # bytes: a text file of at most this size is one document ...
PIECE = 16 * 2**10         # ... and a longer one is cut at the first line end after each so many (ours)
LONGEST = 16 * 2**20       # bytes of the longest document, which has to fit into memory some ten times
CHUNK = 4 * 2**20          # characters that are tokenized at once, on all cores
VAL_ONE_IN = 50            # one document in so many is held out: 2%
SMALLEST = 1_025           # tokens that a split needs: a sequence of the paper's and one target more
COUNTED = 20_000_000       # tokens that the n-gram baselines count, which still fit into memory
TRIES = 4                  # attempts in a row that bring nothing, after which a download is given up
RECORD = ('source', 'limit', 'tokenizer', 'documents', 'tokens', 'val_bytes', 'sha256', 'counts')
ROWS = ('.jsonl', '.ndjson', '.json')
ENDINGS = ('.txt', '.md', '.py', '.parquet', *ROWS)
HUB = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/') + '/datasets/'
SMOLLM = HUB + 'HuggingFaceTB/smollm-corpus/resolve/main/'
WIKIPEDIA = HUB + 'wikimedia/wikipedia/resolve/main/20231101.'
GITHUB = 'https://raw.githubusercontent.com/'
CORPORA = {                # address, with a place for the number of a file; how many files; their sha256
    'fineweb-edu': (HUB + 'HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/{:03}_00000.parquet', 14),
    'cosmopedia': (SMOLLM + 'cosmopedia-v2/train-{:05}-of-00104.parquet', 104),
    'wikipedia-en': (WIKIPEDIA + 'en/train-{:05}-of-00041.parquet', 41),
    'wikipedia-ru': (WIKIPEDIA + 'ru/train-{:05}-of-00021.parquet', 21),
    'wikipedia-zh': (WIKIPEDIA + 'zh/train-{:05}-of-00006.parquet', 6),
    'shakespeare': (GITHUB + 'karpathy/char-rnn/master/data/tinyshakespeare/input.txt', 1,
                    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'),
}

# ------------------------------------------------------------------------------------------------------------
# Reading a data set

def part_files(folder, k):
    """The paths of the training tokens, the validation tokens and the record of part k."""
    return folder / f'train_{k:06}.bin', folder / f'val_{k:06}.bin', folder / f'part_{k:06}.json'

def read_part(folder, k):
    """The record of part k, a dict. Raises UserError if it is broken or does not fit the shards' sizes."""
    *shards, path = part_files(folder, k)
    try:
        part = json.loads(path.read_text())
        sizes = [shard.stat().st_size for shard in shards]
        if sizes != [2 * n for n in part['tokens']] or sizes[0] != 2 * sum(part['counts'].values()):
            raise ValueError
        return {key: part[key] for key in RECORD}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'part {k} of {folder} is incomplete or damaged; remove {shards[0].name} there, and '
                        'the command that made it makes it again') from None

class Dataset:
    """The data set root/name: `train` and `val`, lists of memory-mapped uint16 arrays; `counts` (65,536), how
    often each id is in `train`; `bytes_per_token`, the UTF-8 bytes behind a validation token; `fingerprint`,
    which stands for all shards. Raises UserError."""

    def __init__(self, name, root='data'):
        self.folder = Path(name) if os.sep in str(name) else Path(root) / name
        self.name, self.train, self.val, self.counts = self.folder.name, [], [], np.zeros(VOCAB, np.int64)
        self.parts = [read_part(self.folder, k) for k in range(len(list(self.folder.glob('train_*.bin'))))]
        if not self.parts:
            command = self.name if self.name in ('stdlib', *CORPORA) else f'files --name {self.name} PATH...'
            raise UserError(f'no data set {self.folder}; make it with: python prepare_data.py {command}')
        if {part['tokenizer'] for part in self.parts} != {tokenizer_fingerprint()}:
            raise UserError(f'{self.folder} was made with another tokenizer; remove it and prepare it again')
        for k, part in enumerate(self.parts):
            for split, path in zip((self.train, self.val), part_files(self.folder, k)):
                if path.stat().st_size:                # nothing cannot be mapped
                    split.append(np.memmap(path, '<u2', 'r'))
            for i, n in part['counts'].items():
                self.counts[int(i)] += n
        self.train_tokens, self.val_tokens = np.sum([part['tokens'] for part in self.parts], axis=0).tolist()
        self.bytes_per_token = sum(part['val_bytes'] for part in self.parts) / max(self.val_tokens, 1)
        self.sha256 = {file: sha256 for part in self.parts for file, sha256 in part['sha256'].items()}
        self.fingerprint = digest(*self.sha256.values())

class Sequences:
    """One split as a list of sequences: context + 1 tokens, one every `context` tokens, none across shards.
    So every token but a shard's first is a target once; a tail shorter than a context is dropped."""

    def __init__(self, dataset, split, context):
        self.shards, self.context = getattr(dataset, split), context
        self.starts = np.cumsum([0] + [(len(shard) - 1) // context for shard in self.shards])
        if not len(self):
            raise UserError(f'the {split} split of {dataset.name} has no {context + 1:,} tokens in a row; '
                            'choose a smaller --context or more text')

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        shard = np.searchsorted(self.starts, i, side='right') - 1
        first = (i - self.starts[shard]) * self.context
        return self.shards[shard][first:first + self.context + 1]

def inputs_and_targets(sequences):
    """B sequences of T + 1 ids -> inputs and targets, int64 tensors (B, T)."""
    tokens = torch.from_numpy(np.stack(sequences).astype(np.int64))            # B, T + 1
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

class Batches:
    """The training batches of a run, a pure function of (seed, step): there is no loader with hidden state.

    Sequence i of the run, i = step * rows + row, is from data set pattern[i % len(pattern)], where each
    stands as often as its integer weight says; there it is number k of an epoch, which has its own order."""

    def __init__(self, datasets, weights, seed, rows, context):
        self.datasets, self.weights, self.seed, self.rows = datasets, weights, seed, rows
        self.sequences = [Sequences(dataset, 'train', context) for dataset in datasets]
        self.pattern = np.repeat(np.arange(len(datasets)), weights)            # weights 3 and 1: 0 0 0 1
        self.orders = [(None, None)] * len(datasets)   # current epoch and its permutation: a cache, no state

    def batch(self, step, rows=slice(None)):
        """(inputs, targets), int64 (rows, context). Rank r of W takes rows=slice(r, None, W) of it."""
        return inputs_and_targets([self._sequence(step * self.rows + row) for row in range(self.rows)[rows]])

    def _sequence(self, i):
        turn, place = divmod(i, len(self.pattern))
        d = self.pattern[place]
        own = turn * self.weights[d] + place - sum(self.weights[:d])           # how many of d came before
        epoch, k = divmod(own, len(self.sequences[d]))
        if self.orders[d][0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sequences[d]))
            self.orders[d] = epoch, order
        return self.sequences[d][self.orders[d][1][k]]

def val_batches(dataset, context, rows, limit=None):
    """The validation split in fixed order, all of it or its first `limit` tokens, in whole sequences: yields
    (inputs, targets), int64 (rows, context). The last batch may have fewer rows."""
    sequences = Sequences(dataset, 'val', context)
    n = len(sequences) if limit is None else min(len(sequences), max(1, limit // context))
    return (inputs_and_targets([sequences[i] for i in range(n)[at:at + rows]]) for at in range(0, n, rows))

def open_batches(words, seed, rows, context):
    """The training batches of --data, words like 'ru:3'. The text of the standard library is made on the spot."""
    pairs = [(name, weight or '1') for name, _, weight in (word.partition(':') for word in words)]
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names) or not all(weight.isdecimal() and int(weight) for _, weight in pairs):
        raise UserError(f'--data {" ".join(words)}: name each data set once, with a positive whole weight if any, '
                        'as in ru:3 en:1', status=2)
    if 'stdlib' in names and not part_files(Path('data/stdlib'), 0)[0].exists():
        print('no data yet: preparing the text of the Python standard library')
        prepare_stdlib()
    datasets = [Dataset(name) for name in names]
    for dataset in datasets:
        Sequences(dataset, 'val', context)             # refuses what is too short now, not after a stage
    return Batches(datasets, [int(weight) for _, weight in pairs], seed, rows, context)

# ------------------------------------------------------------------------------------------------------------
# Baselines: what counting alone achieves

class NGrams:
    """Unigram and bigram probabilities of w after h, two flat arrays of ids, after Witten and Bell (1991).

    h had T(h) kinds of successors in c(h) places, so the next is new with probability T(h) / (c(h) + T(h)):
    P(w|h) = (c(h,w) + T(h) P(w)) / (c(h) + T(h)). P(w) itself stands on the uniform distribution likewise."""

    def __init__(self, before, after):
        self.keys, self.counts = np.unique(before.astype(np.uint32) << 16 | after, return_counts=True)
        seen = np.bincount(after, minlength=VOCAB)
        kinds = np.count_nonzero(seen)
        self.unigram = (seen + kinds / VOCAB) / (seen.sum() + kinds)           # V
        self.total = np.bincount(before, minlength=VOCAB)                      # V: c(h)
        self.kinds = np.bincount(self.keys >> 16, minlength=VOCAB)             # V: T(h)

    def bigram(self, h, w):
        """P(w|h) for two flat arrays of ids; after an unseen h it is P(w)."""
        key = h.astype(np.uint32) << 16 | w.astype(np.uint32)
        place = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        together = np.where(self.keys[place] == key, self.counts[place], 0)
        kinds = np.maximum(self.kinds[h], 1)
        return (together + kinds * self.unigram[w]) / (self.total[h] + kinds)

def ngram_losses(dataset, context, limit=None):
    """(unigram, bigram) cross-entropy in nats a token, on the positions that val_batches gives, counted on
    the first 20 M tokens of the training split."""
    tokens = np.empty(0, np.uint16)
    for shard in dataset.train:
        tokens = np.append(tokens, shard[:COUNTED - len(tokens)])
    ngrams, nats = NGrams(tokens[:-1], tokens[1:]), []
    for inputs, targets in val_batches(dataset, context, 64, limit):
        h, w = inputs.numpy().ravel(), targets.numpy().ravel()
        nats.append(-np.log([ngrams.unigram[w], ngrams.bigram(h, w)]))
    return tuple(np.concatenate(nats, axis=1).mean(axis=1).tolist())

def unigram_log_probs(datasets, weights):
    """float32 tensor (65,536): log frequencies of the training data, add-one smoothed, mixed by weight."""
    shares = [(dataset.counts + 1) / (dataset.train_tokens + VOCAB) for dataset in datasets]
    return torch.from_numpy(np.log(np.average(shares, axis=0, weights=weights))).float()

# ------------------------------------------------------------------------------------------------------------
# The text that every Python brings along: docstrings, comments and help topics of its standard library, which
# are prose. The code between them would mostly teach a small model indentation. 2.8 MB from Python 3.11

def normalised(text):
    """Plain prose: wrapped lines joined, no examples or tables, no four like signs in a row."""
    text = text.encode(errors='replace').decode()      # half a surrogate pair is no character
    text = inspect.cleandoc(re.sub(r'[ \t]+$', '', text, flags=re.MULTILINE))
    kept = [part for part in text.split('\n\n') if not re.search(r'>>>|^ *[|+]', part, flags=re.MULTILINE)]
    text = re.sub(r'(?<=[a-z,])\n(?=[a-z(`"*])', ' ', '\n\n'.join(kept))
    return re.sub(r'([^a-zA-Z0-9])\1{3,}', r'\1\1\1', text)

def prose(source):
    """The docstrings of a module and its comment blocks (runs of full-line comments), in source order."""
    pieces, documented = [], (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node):
            pieces.append((node.body[0].lineno, normalised(ast.get_docstring(node))))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [t for t in tokens if t.type == tokenize.COMMENT and t.line.lstrip().startswith('#')]
    # The lines of a block are consecutive, so line less index stays the same, and so does the column.
    starts = [(comment.start[0] - i, comment.start[1]) for i, comment in enumerate(comments)]
    for _, block in itertools.groupby(zip(starts, comments), lambda pair: pair[0]):
        block = [comment for _, comment in block]
        text = normalised('\n'.join(comment.string.lstrip('#').removeprefix(' ') for comment in block))
        # Tables and old code have few letters.
        if len(text) >= 60 and sum(c.isalpha() or c.isspace() for c in text) >= 0.75 * len(text):
            pieces.append((block[0].start[0], text))
    return [text for _, text in sorted(pieces)]

def stdlib_documents():
    """Yields a document for each 4,000 characters of a module, then one a topic of Python's `help()`."""
    from pydoc_data.topics import topics
    library, seen = Path(sysconfig.get_path('stdlib')), set()
    left_out = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'encodings', '__pycache__'}
    for path in sorted(library.rglob('*.py')):
        if not left_out.isdisjoint(path.relative_to(library).parts):
            continue
        try:
            with tokenize.open(path) as f:             # knows about coding lines
                pieces = prose(f.read())
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):         # some are broken on purpose
            continue
        held = []
        for piece in pieces:
            if piece not in seen:                      # licences and inherited docstrings come often
                seen.add(piece)
                held.append(piece)
            if sum(map(len, held)) > 4000:             # documents of like size make the split an even one
                yield '\n\n'.join(held)
                held = []
        yield '\n\n'.join(held)
    for key in sorted(topics):
        yield normalised(topics[key])

# ------------------------------------------------------------------------------------------------------------
# Documents of files, read bit by bit: a file may be larger than the memory

def lines_of(path):
    """Yields the lines of a UTF-8 file, unpacked if it is a .gz, ending in \\n, whatever ended them."""
    opener, number = gzip.open if path.suffix.lower() == '.gz' else open, 0
    try:
        # -sig drops a byte-order mark; bytes that are no UTF-8 become halves of surrogate pairs.
        with opener(path, 'rt', encoding='utf-8-sig', errors='surrogateescape') as f:
            for number, line in enumerate(iter(lambda: f.readline(LONGEST), ''), start=1):
                line.encode()                          # fails at such a half
                if 3 * line.count('\0') > len(line):   # in UTF-16 every other byte of English is 0
                    raise UnicodeError
                yield line
    except UnicodeError:
        raise UserError(f'{path}, line {number}: not UTF-8; try iconv -f UTF-16 -t UTF-8') from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f'{path} is damaged or cannot be read ({error}); get it again') from None

def text_documents(path, split_line=None):
    """Yields what is between lines equal to `split_line`; without it the file, or pieces of a long one."""
    sizes = itertools.accumulate(len(line.encode()) for line in lines_of(path))
    room = PIECE if split_line is None and any(size > WHOLE for size in sizes) else LONGEST
    held, size = [], 0
    for line in lines_of(path):
        ends = line.removesuffix('\n') == split_line
        if not ends:
            held.append(line)
            size += len(line.encode())
        if ends or size >= room:
            yield ''.join(held)
            held, size = [], 0
    yield ''.join(held)

def json_documents(path):
    """Yields the "text" of each row."""
    for number, line in enumerate(lines_of(path), start=1):
        try:
            text = None if line.isspace() else json.loads(line)['text']
            if text is not None:
                text.encode()                          # JSON can spell half a surrogate pair, \ud83d
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{path}, line {number}: no JSON object with a "text" of valid Unicode') from None
        yield text

def parquet_documents(path):
    """Yields the column "text", row by row."""
    try:
        import pyarrow.parquet
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:     # not a whole row group at once
            for batch in file.iter_batches(256, columns=['text']):
                yield from batch['text'].cast('string').to_pylist()
    except ImportError:
        raise UserError('parquet files need pyarrow: pip install pyarrow, then the same again') from None
    except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
        reason = str(error).partition('\n')[0]
        raise UserError(f'{path} is damaged or has no column "text" of strings: {reason}') from None

def kind(path):
    """The ending that says how a file is read."""
    return Path(path.name.lower().removesuffix('.gz')).suffix

def documents_of(path, split_line=None):
    """The documents of a file, read as its ending says, and as text if that says nothing."""
    if kind(path) == '.parquet':
        return parquet_documents(path)
    return json_documents(path) if kind(path) in ROWS else text_documents(path, split_line)

def files_in(path):
    """A file, as a list; of a folder the files that end in ENDINGS, recursively and sorted, none hidden."""
    if not path.is_dir():
        return [path]
    inside = [p for p in sorted(path.iterdir()) if p.is_file() or p.is_dir() and not p.is_symlink()]
    return [file for p in inside if p.name[0] != '.' for file in files_in(p) if kind(file) in ENDINGS]

def file_documents(paths, split_line=None):
    """The documents of files and folders, one after the other."""
    files = [file for path in paths for file in files_in(Path(path))]
    return itertools.chain.from_iterable(documents_of(file, split_line) for file in files)

# ------------------------------------------------------------------------------------------------------------
# Long work that others may be doing too, and may want to watch

@contextlib.contextmanager
def locked(path, doing):
    """Keeps `path`, a file or a folder, to this process until the block ends, or the process dies. Raises
    UserError if another one has it: `doing` says what that one is doing."""
    with open(Path(path) / '.lock' if Path(path).is_dir() else path, 'ab') as f:
        try:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another process is {doing}; wait until it is done') from None
        except (ImportError, OSError):                 # Windows, and some network file systems
            warnings.warn('no locks here: see to it yourself that no two processes write to one folder')
        yield

def progress(items, name, size, unit, done=0, total=None):
    """Yields `items`, and twice a second shows on stderr how much has passed and how fast. `size(item)` is in
    units, as are `done`, what was there before, and `total`, with which the time left is shown too."""
    start, before, shown, left = time.monotonic(), done, 0, ''
    try:
        for item in items:
            yield item
            done, now = done + size(item), time.monotonic()
            if now > shown + 0.5 or done == total:
                shown, speed = now, (done - before) / (now - start + 1e-9)
                if total:
                    seconds = int((total - done) / (speed + 1e-9))
                    left = f', {done / total:.0%}, {timedelta(seconds=seconds)} left'
                line = f'\r{name}: {done:,.1f} {unit}, {speed:,.1f} {unit}/s{left}  '
                print(line, end='', file=sys.stderr, flush=True)
    finally:
        if shown:
            print(file=sys.stderr)                     # what comes next, be it an error, begins its own line

def download(url, path, sha256=None):
    """Downloads `url` to `path`, unless it is there; -> path. Goes on with path.part. Raises UserError."""
    path, part, have, idle = Path(path), Path(f'{path}.part'), 0, 0
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    retry = Retry(4, backoff_factor=1, status_forcelist=(408, 429, 500, 502, 503, 504), raise_on_status=False)
    with locked(part, f'downloading {path}'), open(part, 'ab') as f, requests.Session() as session:
        session.mount('http://', HTTPAdapter(max_retries=retry))
        session.mount('https://', HTTPAdapter(max_retries=retry))
        try:
            while not append_rest(session, url, f, path.name):
                idle = 0 if f.seek(0, os.SEEK_END) > have else idle + 1
                have = f.tell()
                if idle == TRIES:
                    raise requests.ConnectionError(f'it breaks off at {have:,} bytes')
        except (requests.RequestException, ValueError) as error:       # ValueError: a malformed address
            raise UserError(f'{url} failed ({error}); run this again to go on with {part}') from None
        os.fsync(f.fileno())
    if sha256 and sha256_of(part) != sha256:
        part.unlink()
        raise UserError(f'{url} arrived damaged or is another file by now (wrong sha256): run this again')
    os.replace(part, path)
    return path

def append_rest(session, url, f, name):
    """One attempt to append to `f` what it lacks; -> is it whole now? Raises what no second attempt mends."""
    have = f.seek(0, os.SEEK_END)
    headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={have}-'} if have else {})
    with session.get(url, headers=headers, stream=True, timeout=(20, 60)) as answer:
        status, span = answer.status_code, answer.headers.get('Content-Range', '')
        if status == 416 or status == 206 and not span.startswith(f'bytes {have}-'):
            whole = span == f'bytes */{have}'
            f.truncate(have if whole else 0)
            return whole
        answer.raise_for_status()
        if status != 206:                              # the whole file, whatever was asked for
            f.truncate(0)
            have = 0
        end = have + int(answer.headers.get('Content-Length', 0))
        blocks = answer.iter_content(2**16)
        try:
            f.writelines(progress(blocks, name, lambda block: len(block) / 1e6, 'MB', have / 1e6, end / 1e6))
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            return False
    return f.seek(0, os.SEEK_END) == end or 'Content-Length' not in answer.headers

# ------------------------------------------------------------------------------------------------------------
# Writing shards

def encode(text):
    """-> (held out?, UTF-8 bytes, ids with </s>) of a document."""
    raw = text.encode()
    # Its hash alone decides whether a document is held out, so copies of it never stand on both sides.
    held_out = int.from_bytes(hashlib.sha256(raw).digest()[:8], 'big') % VAL_ONE_IN == 0
    ids = tokenizer().encode_to_numpy(text, disallowed_special=())             # (): </s> is four characters
    return held_out, len(raw), np.append(ids, EOS).astype('<u2')

def encoded(documents):
    """Yields `encode` of each document but blank ones, in order, from all cores; tiktoken drops the GIL."""
    chunk, size = [], 0
    with ThreadPoolExecutor() as pool:
        for text in documents:
            if text and not text.isspace():
                chunk.append(text)
                size += len(text)
            if size > CHUNK:
                yield from pool.map(encode, chunk)
                chunk, size = [], 0
        yield from pool.map(encode, chunk)

def write_part(folder, k, documents, begun, wanted=None):
    """Writes part k, until it has all training tokens `wanted`; -> its record, which starts with `begun`."""
    train, val, path = part_files(folder, k)
    part, counts = begun | dict(documents=0, tokens=[0, 0], val_bytes=0), np.zeros(VOCAB, np.int64)
    shown = progress(encoded(documents), f'{folder.name}, part {k + 1}',
                     lambda item: 0 if item[0] else len(item[2]) / 1e6,
                     'M tokens', total=wanted and wanted / 1e6)
    # They are renamed in the order val, part, train.
    with replacing(train) as new_train, replacing(path) as new_path, replacing(val) as new_val:
        with open(new_train, 'wb') as train_file, open(new_val, 'wb') as val_file:
            for held_out, n_bytes, ids in shown:
                part['documents'] += 1
                part['tokens'][held_out] += len(ids)
                if held_out:
                    val_file.write(ids)
                    part['val_bytes'] += n_bytes
                else:
                    train_file.write(ids)
                    np.add.at(counts, ids, 1)
                if wanted and part['tokens'][0] >= wanted:
                    break
        part['sha256'] = {train.name: sha256_of(new_train), val.name: sha256_of(new_val)}
        part['counts'] = {int(i): int(counts[i]) for i in np.flatnonzero(counts)}
        new_path.write_text(json.dumps(part))
    return part

def prepare_parts(name, parts, source, root='data', limit=None):
    """Writes the data set root/name from (strings, the file they are from or None), a part each; the file is
    removed once its part is written. `source` says where the text is from; the document with which there are
    `limit` training tokens is the last. Raises UserError."""
    if not re.fullmatch(r'\w[\w.-]*', name):
        raise UserError(f'{name!r} names no folder; use letters, digits, - and _ for --name', status=2)
    folder, documents, tokens = Path(root) / name, 0, np.zeros(2, np.int64)
    begun = dict(source=source, limit=limit, tokenizer=tokenizer_fingerprint())
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, f'preparing {folder}'):
        for path in folder.glob('.*.tmp'):             # of somebody who was killed
            path.unlink()
        for k, (texts, file) in enumerate(parts):
            if part_files(folder, k)[0].exists():
                print(f'{part_files(folder, k)[0]} is there already')
                part = read_part(folder, k)
            elif limit is None or tokens[0] < limit:
                part = write_part(folder, k, texts, begun, limit and limit - int(tokens[0]))
            else:
                break
            if not begun.items() <= part.items():
                raise UserError(f'{folder} was begun from {part["source"]} with --tokens {part["limit"]}, or '
                                'with another tokenizer; give that command, remove it or take another --name')
            if file:
                file.unlink(missing_ok=True)
            documents, tokens = documents + part['documents'], tokens + part['tokens']
        if min(tokens) < SMALLEST:
            for path in [path for k in range(len(parts)) for path in part_files(folder, k)]:
                path.unlink(missing_ok=True)
            raise UserError(f'{documents} documents give {tokens[0]:,} training and {tokens[1]:,} validation '
                            f'tokens, each needs {SMALLEST:,}, and one document in {VAL_ONE_IN} is held out; '
                            'give more text, or cut it with --split-line')
    print(f'{folder}: {documents:,} documents, {tokens[0]:,} training and {tokens[1]:,} validation tokens')

def prepare(name, documents, source, root='data'):
    """Writes the data set root/name, in one part, from an iterable of strings."""
    prepare_parts(name, [(documents, None)], source, root)

def prepare_stdlib(root='data'):
    """Writes the data set root/stdlib."""
    prepare('stdlib', stdlib_documents(), f'the standard library of Python {sys.version.split()[0]}', root)

def downloaded(url, path, sha256=None):
    """Yields the documents of a file that is downloaded when the first one is asked for."""
    yield from file_documents([download(url, path, sha256)], split_line='')    # a play: split into speeches

def prepare_corpus(corpus, root='data', name=None, limit=None):
    """Writes the data set root/NAME from one of CORPORA, downloaded file by file."""
    address, count, *sha256 = CORPORA[corpus]
    files = [Path(root) / (name or corpus) / f'{corpus}_{k:06}{Path(address).suffix}' for k in range(count)]
    parts = [(downloaded(address.format(k), file, *sha256), file) for k, file in enumerate(files)]
    prepare_parts(name or corpus, parts, corpus, root, limit)

def check(name, root='data'):
    """Compares every shard with its sha256."""
    dataset = Dataset(name, root)
    bad = [file for file, sha256 in dataset.sha256.items() if sha256_of(dataset.folder / file) != sha256]
    if bad:
        raise UserError(f'damaged in {dataset.folder}: {", ".join(bad)}; remove it and prepare it again')
    print(f'{dataset.folder}: all {len(dataset.sha256)} shards are as they were written')

# ------------------------------------------------------------------------------------------------------------

@cli
def main(argv=None):
    """The command line: prepare a data set, or check one."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', default='data', help='folder of the data sets (%(default)s)')
    parser.add_argument('--check', metavar='NAME', help='compare its shards with their checksums')
    commands = parser.add_subparsers(dest='corpus', metavar='CORPUS', help='CORPUS -h lists its flags')
    commands.add_parser('stdlib')
    files = commands.add_parser('files')
    files.add_argument('paths', nargs='+', metavar='PATH', help='files, or folders of them')
    files.add_argument('--name', required=True, help='the data set becomes data/NAME')
    files.add_argument('--split-line', metavar='TEXT', help='a document ends at a line that is TEXT')
    for corpus in CORPORA:
        command = commands.add_parser(corpus)
        command.add_argument('--name', help='the data set becomes data/NAME')
        command.add_argument('--tokens', type=int, metavar='N', help='stop at N training tokens')
    args = parser.parse_args(argv)
    if bool(args.check) == bool(args.corpus):
        parser.error('say what to prepare, stdlib, files or a corpus, or give --check NAME')
    if args.check:
        check(args.check, args.root)
    elif args.corpus == 'stdlib':
        prepare_stdlib(args.root)
    elif args.corpus == 'files':
        source = f'{" ".join(args.paths)}, split at {args.split_line}'
        prepare(args.name, file_documents(args.paths, args.split_line), source, args.root)
    elif args.tokens is not None and args.tokens < 100 * SMALLEST:
        parser.error(f'--tokens must be {100 * SMALLEST:,} or more: a fiftieth as many are held out')
    else:
        prepare_corpus(args.corpus, args.root, args.name, args.tokens)

if __name__ == '__main__':
    main()
