"""Text to shards, and shards to batches.

A data set is a folder data/NAME of parts: a file of a downloaded corpus, or all that one command reads. A
part is train_000000.bin and val_000000.bin, a uint16 a token and the id of </s> after each document, and
part_000000.json, what is known of them. The train shard gets its name last: where it is, its part is done.

    python prepare_data.py stdlib                              # the prose of Python's standard library
    python prepare_data.py files --name books PATH...          # .txt .md .py .jsonl, .gz; .parquet; folders
    python prepare_data.py files --name sayings --split-line % PATH     # a document ends at each line %
    python prepare_data.py fineweb-edu --tokens 1_000_000_000  # or cosmopedia, wikipedia-en, -ru, -zh
    python prepare_data.py --check books                       # is every shard still what was written?

Whatever stops it, the same command goes on and ends in the same bytes, on however many cores.
"""

import argparse
import ast
import contextlib
import gzip
import hashlib
import inspect
import io
import json
import os
import re
import sys
import time
import tokenize
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import requests
import torch
from requests.adapters import Retry

from substrate import EOS, VOCAB, Parser, UserError, cli, digest, replacing, sha256_of
from substrate import tokenizer, tokenizer_fingerprint

PIECE = 16 * 2**10         # characters after which the next line end of a text file ends a document (ours)
AT_ONCE = 64               # documents that are tokenized at once, on all cores
VAL_ONE_IN = 50            # one document in so many is held out: 2%
SMALLEST = 1_025           # tokens that a split needs: a sequence of the paper's and one target more
COUNTED = 20_000_000       # tokens that the n-gram baselines count, which still fit into memory
FILES = 'train_{:06}.bin', 'val_{:06}.bin', 'part_{:06}.json'      # of a part
ROWS = '.jsonl', '.ndjson', '.json'    # endings of files with a JSON object in each line
IN_FOLDERS = '.parquet', '.txt', '.md', '.py', '.jsonl', '.ndjson'     # without .json, mostly of settings
RETRY = Retry(4, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504))     # of a request; 1: a second
HUB = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/') + '/datasets/'
CORPORA = {                # repository of the hub, pattern of the names of its files, how many there are
    'fineweb-edu': ('HuggingFaceFW/fineweb-edu', 'sample/10BT/{:03}_00000.parquet', 14),
    'cosmopedia': ('HuggingFaceTB/smollm-corpus', 'cosmopedia-v2/train-{:05}-of-00104.parquet', 104),
    'wikipedia-en': ('wikimedia/wikipedia', '20231101.en/train-{:05}-of-00041.parquet', 41),
    'wikipedia-ru': ('wikimedia/wikipedia', '20231101.ru/train-{:05}-of-00021.parquet', 21),
    'wikipedia-zh': ('wikimedia/wikipedia', '20231101.zh/train-{:05}-of-00006.parquet', 6),
}

# ------------------------------------------------------------------------------------------------------------
# Reading a data set

class Dataset:
    """The data set data/NAME, or at a path: `train` and `val`, lists of memory-mapped uint16 arrays; `counts`
    (65536,), how often each id is in `train`; `bytes_per_token`, the UTF-8 bytes behind a validation token;
    `fingerprint`, which stands for all shards; `parts`, their records. Raises UserError."""

    def __init__(self, name):
        self.folder = Path(name) if os.sep in str(name) else Path('data', name)
        self.name, self.parts, self.train, self.val = self.folder.name, [], [], []
        for k in range(len(list(self.folder.glob('train_*.bin')))):
            *shards, record = [self.folder / file.format(k) for file in FILES]
            try:
                text, _, seal = record.read_text().partition('\n')
                if digest(text) != seal:
                    raise ValueError('a byte of its record is another')
                self.parts.append(json.loads(text))
                for split, path, n in zip((self.train, self.val), shards, self.parts[k]['tokens']):
                    if n:                              # nothing cannot be mapped
                        split.append(np.memmap(path, '<u2', 'r', shape=(n,)))
            except (OSError, ValueError) as error:
                raise UserError(f'part {k} of {self.folder} cannot be read ({error}); if damaged, remove its '
                                'train_*.bin from there on: the same command makes them again') from None
        if {part['tokenizer'] for part in self.parts} != {tokenizer_fingerprint()}:
            raise UserError(f'no data set {self.folder}, or one of another tokenizer, then remove it; '
                            'python prepare_data.py -h says how to make one')
        self.counts = np.sum([part['counts'] for part in self.parts], axis=0)
        self.train_tokens, self.val_tokens = np.sum([part['tokens'] for part in self.parts], axis=0).tolist()
        self.bytes_per_token = sum(part['val_bytes'] for part in self.parts) / max(self.val_tokens, 1)
        self.fingerprint = digest(*(part['sha256'] for part in self.parts))

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
        taken = []
        for i in range(step * self.rows, (step + 1) * self.rows)[rows]:
            turn, place = divmod(i, len(self.pattern))
            d = self.pattern[place]
            own = turn * self.weights[d] + place - sum(self.weights[:d])       # how many of d came before
            epoch, k = divmod(own, len(self.sequences[d]))
            if self.orders[d][0] != epoch:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sequences[d]))
                self.orders[d] = epoch, order
            taken.append(self.sequences[d][self.orders[d][1][k]])
        return inputs_and_targets(taken)

def val_batches(dataset, context, rows, limit=None):
    """The validation split in fixed order, all of it or its first `limit` tokens, in whole sequences: yields
    (inputs, targets), int64 (rows, context). The last batch may have fewer rows."""
    sequences = Sequences(dataset, 'val', context)
    n = len(sequences) if limit is None else min(len(sequences), max(1, limit // context))
    return (inputs_and_targets([sequences[i] for i in range(n)[at:at + rows]]) for at in range(0, n, rows))

def open_batches(words, seed, rows, context):
    """The training batches of --data, words like 'ru:3'. What is called stdlib is made on the spot."""
    weights = {name: weight or '1' for name, _, weight in (word.partition(':') for word in words)}
    if len(weights) < len(words) or not all(w.isdecimal() and int(w) for w in weights.values()):
        raise UserError(f'--data {" ".join(words)}: name each data set once, with a positive whole weight if '
                        'any, as in ru:3 en:1', status=2)
    if 'stdlib' in weights and not Path('data/stdlib/train_000000.bin').exists():
        print('no data yet: preparing the text of the Python standard library')
        prepare_stdlib()
    datasets = [Dataset(name) for name in weights]
    for dataset in datasets:
        Sequences(dataset, 'val', context)             # refuses what is too short now, not after a stage
    return Batches(datasets, [int(w) for w in weights.values()], seed, rows, context)

# ------------------------------------------------------------------------------------------------------------
# Baselines: what counting alone achieves

def ngram_losses(dataset, context, limit=None):
    """(unigram, bigram) cross-entropy in nats a token, on the positions that val_batches gives, counted on
    the first 20 M tokens of the first training shard and smoothed after Witten and Bell (1991): if h had T(h)
    kinds of successors in c(h) places, P(w|h) = (c(h,w) + T(h) P(w)) / (c(h) + T(h)), and P(w) likewise."""
    tokens = dataset.train[0][:COUNTED]
    pairs, times = np.unique(tokens[:-1].astype(np.uint32) << 16 | tokens[1:], return_counts=True)
    seen, total = np.bincount(tokens[1:], minlength=VOCAB), np.bincount(tokens[:-1], minlength=VOCAB)    # V
    unigram = (seen + np.count_nonzero(seen) / VOCAB) / (seen.sum() + np.count_nonzero(seen))            # V
    kinds = np.maximum(np.bincount(pairs >> 16, minlength=VOCAB), 1)   # 1: after an unseen h it is P(w)
    nats = []
    for inputs, targets in val_batches(dataset, context, 64, limit):
        h, w = inputs.numpy().ravel(), targets.numpy().ravel()
        place = np.minimum(np.searchsorted(pairs, h << 16 | w), len(pairs) - 1)
        together = np.where(pairs[place] == h << 16 | w, times[place], 0)
        nats.append(-np.log([unigram[w], (together + kinds[h] * unigram[w]) / (total[h] + kinds[h])]))
    return tuple(np.concatenate(nats, axis=1).mean(axis=1).tolist())

def unigram_log_probs(datasets, weights):
    """float32 tensor (65536,): log frequencies of the training data, add-one smoothed, mixed by weight."""
    shares = [(dataset.counts + 1) / (dataset.train_tokens + VOCAB) for dataset in datasets]
    return torch.from_numpy(np.log(np.average(shares, axis=0, weights=weights))).float()

# ------------------------------------------------------------------------------------------------------------
# Where text comes from. Every Python brings some along: docstrings, comments and help topics of its standard
# library, which are prose; the code between them would mostly teach indentation. 2.8 MB from Python 3.11

def normalised(text):
    """Plain prose: wrapped lines joined, no examples or tables, no four like signs in a row."""
    text = inspect.cleandoc(re.sub(r'(?m)[ \t]+$', '', text))
    kept = [part for part in text.split('\n\n') if not re.search(r'(?m)>>>|^ *[|+]', part)]
    text = re.sub(r'(?<=[a-z,])\n(?=[a-z(`"*])', ' ', '\n\n'.join(kept))
    return re.sub(r'([^a-zA-Z0-9])\1{3,}', r'\1\1\1', text)

def prose(path):
    """The docstrings of a module and its comment blocks (runs of full-line comments), in source order."""
    pieces, documented = [], (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, documented) and ast.get_docstring(node):
            pieces.append((node.body[0].lineno, normalised(ast.get_docstring(node))))
    with tokenize.open(path) as f:
        tokens = [t for t in tokenize.generate_tokens(f.readline) if t.type == tokenize.COMMENT]
    comments = [t for t in tokens if t.line.lstrip().startswith('#')]
    # Within a block line less index stays the same, and so does the column.
    for _, block in groupby(enumerate(comments), lambda pair: (pair[1].start[0] - pair[0], pair[1].start[1])):
        block = [comment for _, comment in block]
        text = normalised('\n'.join(comment.string.lstrip('#').removeprefix(' ') for comment in block))
        # Tables and old code have few letters.
        if len(text) >= 60 and sum(c.isalpha() or c.isspace() for c in text) >= 0.75 * len(text):
            pieces.append((block[0].start[0], text))
    return [text for _, text in sorted(pieces)]

def stdlib_documents():
    """Yields a document for each 4,000 characters of a module, then one a topic of Python's `help()`."""
    from pydoc_data.topics import topics
    library, seen = Path(ast.__file__).parent, set()
    left_out = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'encodings', '__pycache__'}
    for path in sorted(library.rglob('*.py')):
        if not left_out.isdisjoint(path.relative_to(library).parts):
            continue
        try:
            pieces, held = prose(path), []
        except (SyntaxError, ValueError, tokenize.TokenError):         # some are broken on purpose
            continue
        for piece in pieces:
            if piece not in seen:                      # licences and inherited docstrings come often
                seen.add(piece)
                held.append(piece)
            if sum(map(len, held)) > 4000:             # documents of like size make the split an even one
                yield '\n\n'.join(held)
                held = []
        yield '\n\n'.join(held)
    yield from (normalised(topics[key]) for key in sorted(topics))

class Gzip(gzip.GzipFile):
    """Ends where its last member ends: the program gzip too says no more than that something follows."""
    def read1(self, size=-1):
        try:
            return super().read1(size)
        except gzip.BadGzipFile as error:
            if not self.tell() or 'Not a gzipped file' not in str(error):
                raise
            print(f'{self.name}: the text is whole, and what follows it is no gzip and left out')
            return b''

def likely_encoding(path):
    """What iconv calls the encoding of a file, as far as its first character tells, a mark or a Latin one."""
    with open(path, 'rb') as file:
        start = file.read(4)
    if start[:2] in (b'\xff\xfe', b'\xfe\xff') or b'\0\0' in start:
        return 'UTF-32' if b'\0\0' in start else 'UTF-16'
    return {0: 'UTF-16BE', 1: 'UTF-16LE'}.get(start.find(0), 'ENCODING')

def documents_of(path, split_line=None):
    """Yields "text" of each row of a .parquet file or a file of ROWS, perhaps None; of any other file what is
    between lines that are `split_line`, or else pieces of whole lines. Raises UserError."""
    name, number, held = path.name.lower().removesuffix('.gz'), 0, ''
    try:
        if path.suffix.lower() == '.parquet':
            import pyarrow.parquet
            with pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:     # not a row group at once
                for batch in file.iter_batches(256, columns=['text']):
                    yield from batch['text'].cast('string').to_pylist()
            return
        with Gzip(path) if path.suffix.lower() == '.gz' else open(path, 'rb') as file:
            # -sig drops a byte-order mark; bytes that are no UTF-8 become characters that cannot be encoded.
            lines = io.TextIOWrapper(file, encoding='utf-8-sig', errors='surrogateescape')
            for number, line in enumerate(lines, start=1):
                line.encode()
                if '\0' in line:                       # UTF-16 of Latin letters is UTF-8 by accident
                    raise UnicodeError
                if name.endswith(ROWS):
                    text = '' if line.isspace() else json.loads(line)['text']
                    yield None if text is None else '' + text
                    continue
                if number == 1 and re.match(r'\s*[{[]\s*["{]', line):
                    raise ValueError('this is JSON: make it an object a line, in a file that ends in .jsonl')
                ends = line.removesuffix('\n') == split_line
                held += '' if ends else line
                if ends or split_line is None and len(held) >= PIECE:
                    yield held
                    held = ''
        yield held
    except ImportError:
        raise UserError('parquet files need pyarrow: pip install pyarrow, then the same again') from None
    except UnicodeError:
        raise UserError(f'{path}, line {number}: not UTF-8; unpack it, or try '
                        f'iconv -f {likely_encoding(path)} -t utf-8') from None
    except Exception as error:                         # what is damaged fails in many ways
        raise UserError(f'{path}, line {number}: missing, damaged or without a "text" ({error!r})') from None

def files_below(folder):
    """The files below a folder by IN_FOLDERS, sorted, none hidden; says what it leaves. Raises UserError."""
    found = []
    def unreadable(error):
        raise UserError(f'{error.filename} cannot be read ({error.strerror}): allow it, or name other paths')
    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith('.')]
        links = [name for name in folders if Path(parent, name).is_symlink()]      # are left
        found += [Path(parent, name) for name in names + links if not name.startswith('.')]
    taken = [path for path in sorted(filter(Path.is_file, found))
             if path.name.lower().removesuffix('.gz').endswith(IN_FOLDERS)]
    left = Counter(path.suffix.lower() or path.name for path in sorted({*found} - {*taken}))
    endings = ', '.join(f'{n:,} {ending}' for ending, n in left.most_common(9))
    print(f'{folder}: {len(taken):,} files are read, {left.total():,} are not ({endings or "none"})')
    return taken

def file_documents(paths, split_line=None):
    """The documents of files, and of those below folders; None for a row without text, which are counted."""
    without = 0
    for top in map(Path, paths):
        for path in files_below(top) if top.is_dir() else [top]:
            for text in documents_of(path, split_line):
                without += text is None
                yield text
    if without:
        print(f'{without:,} rows without text are left out')

# ------------------------------------------------------------------------------------------------------------
# Downloading and writing: long work that others may be doing too, and may want to watch

@contextlib.contextmanager
def locked(path, doing):
    """Opens a file that no other process has. Raises UserError if one has it: `doing` says what it does."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'ab') as f:
        try:
            import fcntl
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f'another process is {doing}; wait until it is done') from None
        except (ImportError, OSError):                 # Windows, and some network file systems
            print('no locks here: see to it yourself that no two processes write to one folder')
        yield f

def progress(items, name, size, unit, done=0, total=None):
    """Yields `items`, and twice a second shows on stderr how much has passed and how fast. `size(item)` is in
    units, as are `done`, what was there before, and `total`, with which the time left is shown too."""
    start, passed, shown = time.monotonic(), 0, 0
    try:
        for item in items:
            yield item
            passed, now = passed + size(item), time.monotonic()
            if now > shown + 0.5 or done + passed == total:
                shown, speed = now, passed / (now - start + 1e-9)
                left = f', {(total - done - passed) / (speed + 1e-9):,.0f} s left' if total else ''
                line = f'\r{name}: {done + passed:,.1f} {unit}, {speed:,.1f}/s{left}  '
                print(line, end='', file=sys.stderr, flush=True)
    finally:
        if shown:
            print(file=sys.stderr)                     # what comes next, be it an error, begins its own line

def download(url, path, sha256=None):
    """Downloads `url` to `path`, unless it is there; -> path. Goes on with path.part. Raises UserError."""
    path, part, session = Path(path), Path(f'{path}.part'), requests.Session()
    if path.exists():
        return path
    with locked(part, f'downloading {path}') as f:
        try:
            session.get_adapter(url).max_retries = RETRY
            have, size = f.seek(0, os.SEEK_END), None
            while have != size:
                headers = {'Accept-Encoding': 'identity', 'Range': f'bytes={have}-'}
                with session.get(url, headers=headers, stream=True, timeout=60) as answer:
                    size = answer.headers.get('Content-Range') or answer.headers.get('Content-Length', '')
                    size = int(size.rpartition('/')[2] or -1)
                    if answer.status_code == 416 and have == size:
                        break
                    if answer.status_code in (200, 416):               # it starts over
                        f.truncate(0)
                    answer.raise_for_status()
                    with contextlib.suppress(requests.RequestException):       # the body breaks off
                        f.writelines(progress(answer.iter_content(2**16), path.name, lambda x: len(x) / 1e6,
                                              'MB', f.seek(0, os.SEEK_END) / 1e6, size / 1e6))
                before, have = have, f.seek(0, os.SEEK_END)
                if have <= before and have != size:
                    raise requests.ConnectionError(f'it breaks off at {have:,} bytes')
        except (requests.RequestException, ValueError) as error:       # ValueError: a malformed address
            raise UserError(f'{url} failed ({error}); run this again to go on with {part}') from None
    if sha256 and sha256_of(part) != sha256:
        part.unlink()
        raise UserError(f'{url} arrived damaged or is another file by now (wrong sha256): run this again')
    os.replace(part, path)
    return path

def encode(text):
    """-> (held out?, UTF-8 bytes, ids with </s>) of a document."""
    raw = text.encode(errors='replace')                # half a surrogate pair is no character
    # Its hash alone decides whether a document is held out, so copies of it never stand on both sides.
    held_out = int.from_bytes(hashlib.sha256(raw).digest()[:8], 'big') % VAL_ONE_IN == 0
    ids = tokenizer().encode_to_numpy(raw.decode(), disallowed_special=())     # (): </s> is four characters
    return held_out, len(raw), np.append(ids, EOS).astype('<u2')

def encoded(documents):
    """Yields `encode` of each document but blank ones, in order, from all cores; tiktoken drops the GIL."""
    texts = (text for text in documents if text and not text.isspace())
    with ThreadPoolExecutor() as pool:
        for some in iter(lambda: list(islice(texts, AT_ONCE)), []):
            yield from pool.map(encode, some)

def write_part(folder, k, documents, begun, wanted=None):
    """Writes part k, up to the document with which it has `wanted` training tokens; -> its record, which is
    `begun` and what was counted. Raises UserError if the first part has too few tokens."""
    train, val, record = [folder / file.format(k) for file in FILES]
    tokens, val_bytes, counts = [0, 0], 0, np.zeros(VOCAB, np.int64)       # tokens: training, validation
    # They are renamed in the order val, record, train.
    with replacing(train) as new_train, replacing(record) as new_record, replacing(val) as new_val:
        with open(new_train, 'wb') as train_file, open(new_val, 'wb') as val_file:
            for held_out, n_bytes, ids in progress(encoded(documents), f'{folder}, part {k + 1}',
                                                   lambda item: len(item[2]) / 1e6, 'M tokens'):
                tokens[held_out] += len(ids)
                if held_out:
                    val_file.write(ids)
                    val_bytes += n_bytes
                else:
                    train_file.write(ids)
                    np.add.at(counts, ids, 1)
                if wanted and tokens[0] >= wanted:
                    break
        if k == 0 and min(tokens) < SMALLEST:
            raise UserError('{:,} training and {:,} validation tokens are less than {:,}; give more text, of '
                            'which one document in {} is held out'.format(*tokens, SMALLEST, VAL_ONE_IN))
        part = begun | dict(tokens=tokens, val_bytes=val_bytes, counts=counts.tolist(),
                            sha256=[sha256_of(new_train), sha256_of(new_val)])
        text = json.dumps(part)
        new_record.write_text(f'{text}\n{digest(text)}')
    return part

def prepare_parts(name, parts, source, limit=None):
    """Writes the data set data/NAME, a part from each iterable of strings. `source` says where they are from;
    the document with which there are `limit` training tokens is the last. Raises UserError."""
    if not re.fullmatch(r'\w[\w.-]*', name):
        raise UserError(f'{name!r} names no data set; use letters, digits, - and _', status=2)
    folder = Path('data', name)
    begun = dict(source=source, limit=limit, tokenizer=tokenizer_fingerprint())
    with locked(folder / '.lock', f'preparing {folder}'):
        done = Dataset(folder).parts if list(folder.glob('train_*.bin')) else []
        if done and not begun.items() <= done[0].items():
            raise UserError(f'{folder} was begun from {done[0]["source"]} with --tokens {done[0]["limit"]}; '
                            'give that command, or remove it; files may take another --name')
        if done:
            print(f'{folder}: {len(done)} parts are there already; remove it to read their text again')
        for k, documents in enumerate(parts):
            tokens = sum(part['tokens'][0] for part in done)
            if k >= len(done) and (limit is None or tokens < limit):
                done.append(write_part(folder, k, documents, begun, limit and limit - tokens))
    dataset = Dataset(folder)
    print(f'{folder}: {dataset.train_tokens:,} training and {dataset.val_tokens:,} validation tokens')

def prepare(name, documents, source):
    """Writes the data set data/NAME, in one part, from an iterable of strings. Raises UserError."""
    prepare_parts(name, [documents], source)

def prepare_stdlib():
    """Writes the data set data/stdlib."""
    prepare('stdlib', stdlib_documents(), f'the standard library of Python {sys.version.split()[0]}')

def corpus_parts(corpus):
    """Yields the documents of each file of a corpus, which is downloaded when the first one is asked for."""
    repository, names, count = CORPORA[corpus]
    for k in range(count):
        url, path = f'{HUB}{repository}/resolve/main/{names.format(k)}', Path('data', corpus, f'{k}.parquet')
        yield file_documents(map(download, [url], [path]))
        path.unlink(missing_ok=True)                   # its part is written when the next one is asked for

def check(name):
    """Compares every shard with its sha256. Raises UserError."""
    dataset = Dataset(name)
    for k, part in enumerate(dataset.parts):
        if [sha256_of(dataset.folder / file.format(k)) for file in FILES[:2]] != part['sha256']:
            raise UserError(f'part {k} of {dataset.folder} is damaged; remove that folder, prepare it again')
    print(f'{dataset.folder}: all shards are as they were written')

@cli
def main(argv=None):
    """The command line: prepare a data set, or check one."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', metavar='NAME', help='compare its shards with their checksums')
    commands = parser.add_subparsers(dest='corpus', metavar='CORPUS', help='CORPUS -h lists its flags')
    commands.add_parser('stdlib')
    files = commands.add_parser('files')
    files.add_argument('paths', nargs='+', metavar='PATH', help='files, or folders of them')
    files.add_argument('--name', required=True, help='the data set becomes data/NAME')
    files.add_argument('--split-line', metavar='TEXT', help='a document ends at each line that is TEXT')
    for corpus in CORPORA:
        commands.add_parser(corpus).add_argument('--tokens', type=int, help='stop at so many training tokens')
    args = parser.parse_args(argv)
    if bool(args.check) == bool(args.corpus):
        parser.error('say what to prepare, stdlib, files or a corpus, or give --check NAME')
    if args.check:
        check(args.check)
    elif args.corpus == 'stdlib':
        prepare_stdlib()
    elif args.corpus == 'files':
        split = '' if args.split_line is None else f' split at {args.split_line}'
        prepare(args.name, file_documents(args.paths, args.split_line), ' '.join(args.paths) + split)
    elif args.tokens is not None and args.tokens < 1:
        parser.error('--tokens must be above zero')
    else:
        prepare_parts(args.corpus, corpus_parts(args.corpus), args.corpus, args.tokens)

if __name__ == '__main__':
    main()
