"""Text to shards, and shards to batches.

A data set is a folder data/NAME/ of token shards (train_000000.npy, val_000000.npy, ...: flat uint16 arrays, memory-mapped when read)
and a meta.json. One token is one uint16, and every document is followed by the id of </s>.

    python prepare_data.py stdlib                                   # the prose of Python's standard library: 3 MB, no download
    python prepare_data.py files --name books PATH...               # your own .txt .md .py .jsonl .parquet files or folders, in UTF-8, or .gz
    python prepare_data.py files --name quotes --split-line % PATH  # one document between lines that say %
    python prepare_data.py wikipedia-ru --tokens 1_000_000_000      # downloaded, no more of it than that takes
    python prepare_data.py fineweb-edu                              # ... cosmopedia, wikipedia-en, wikipedia-zh, shakespeare
    python prepare_data.py --check books                            # is every shard still what was written?

Whatever stops a download, the same command again goes on: with the download where it stopped, with the shards after the last whole file of the
corpus. The shards come out the same, byte for byte, however often it was stopped and on however many cores it runs.

From `Dataset` on this file is what training reads with: `Batches`, `val_batches`, and the n-gram baselines that a language model has to beat.
There is no loader with hidden state: the batch of a step is a pure function of (seed, step).
"""

import argparse
import ast
import collections
import contextlib
import fcntl                                          # Linux and macOS
import gzip
import hashlib
import inspect
import io
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import tokenize
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import requests
import torch

from substrate import EOS, VOCAB, Parser, UserError, cli, digest, replacing, sha256_of, tokenizer, tokenizer_fingerprint

SHARD = 2**27              # tokens in a shard: 256 MB
WHOLE = 64 * 2**10         # bytes: a text file of at most this size is one document ...
PIECE = 16 * 2**10         # ... and a longer one is cut at the first line end after each so many (ours)
LONGEST = 16 * 2**20       # bytes: the longest document, which has to fit into memory some ten times
VAL_ONE_IN = 50            # one document in so many is held out: 2%
SMALLEST = 1_025           # tokens that a split needs: one sequence at the paper's context of 1,024, and the target of its last token
COUNTED = 20_000_000       # tokens that the n-gram baselines count, which still fit into memory
CORES = os.cpu_count() or 1
AHEAD = 2**19              # characters that a core may be tokenized ahead of the writer: with them memory is bounded, however large the corpus
ENDINGS = ('.jsonl', '.md', '.parquet', '.py', '.txt')
HUB = 'https://huggingface.co/datasets'
CORPORA = {                # address, with a place for the number of a file, and how many files there are
    'fineweb-edu': (HUB + '/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT/{:03}_00000.parquet', 14),                             # 2.2 GB each
    'cosmopedia': (HUB + '/HuggingFaceTB/smollm-corpus/resolve/main/cosmopedia-v2/train-{:05}-of-00104.parquet', 104),                # 1.2 GB each
    **{f'wikipedia-{language}': (f'{HUB}/wikimedia/wikipedia/resolve/main/20231101.{language}/train-{{:05}}-of-{files:05}.parquet', files)
       for language, files in (('en', 41), ('ru', 21), ('zh', 6))},
    'shakespeare': ('https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt', 1,
                    '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'),
}

# ---------------------------------------------------------------------------------------------------------------------
# The text that every Python brings along: the docstrings, comments and help topics of its standard library, which are prose. The code between
# them would mostly teach a small model indentation. Python 3.11 gives 1,029 documents, 2.8 MB, 1.7 M tokens, in 5 s

def normalised(text):
    """Plain prose: lines wrapped in mid-sentence are joined, paragraphs with interactive examples or tables left out, runs of blanks or
    punctuation cut to three characters."""
    text = text.encode(errors='replace').decode()      # a docstring may hold half a surrogate pair, which is no character
    text = inspect.cleandoc(re.sub(r'[ \t]+$', '', text, flags=re.MULTILINE))
    text = '\n\n'.join(paragraph for paragraph in text.split('\n\n') if not re.search(r'>>>|^ *[|+]', paragraph, flags=re.MULTILINE))
    return re.sub(r'([^a-zA-Z0-9])\1{3,}', r'\1\1\1', re.sub(r'(?<=[a-z,])\n(?=[a-z(`"*])', ' ', text))

def prose(source):
    """The docstrings of a module and its comment blocks (runs of full-line comments), in source order."""
    pieces, blocks, previous = [], [], None
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node):
            pieces.append((node.body[0].lineno, normalised(ast.get_docstring(node))))     # get_docstring takes the indentation away
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith('#'):
            line, column = token.start
            if previous != (line - 1, column):
                blocks.append((line, []))
            blocks[-1][1].append(token.string.lstrip('#').removeprefix(' '))
            previous = line, column
    for line, comments in blocks:
        text = normalised('\n'.join(comments))
        if len(text) >= 60 and sum(c.isalpha() or c.isspace() for c in text) >= 0.75 * len(text):     # tables and old code fall out
            pieces.append((line, text))
    return [text for _, text in sorted(pieces)]

def stdlib_documents():
    """Yields a document for each 4,000 characters of a module, then one a topic of Python's `help()`."""
    from pydoc_data.topics import topics
    library = Path(sysconfig.get_path('stdlib'))
    left_out = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'encodings', '__pycache__'}
    seen = set()                                       # licences and inherited docstrings come again and again: the first one stays
    for path in sorted(library.rglob('*.py')):
        if left_out.isdisjoint(path.relative_to(library).parts):
            try:
                with tokenize.open(path) as f:         # knows about coding lines
                    pieces = prose(f.read())
            except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):     # some are broken on purpose
                continue
            held, size = [], 0
            for piece in pieces:
                if piece not in seen:
                    seen.add(piece)
                    held.append(piece)
                    size += len(piece)
                if size > 4000:                        # characters: documents of like size make the split an even one
                    yield '\n\n'.join(held)
                    held, size = [], 0
            yield '\n\n'.join(held)
    for key in sorted(topics):
        yield normalised(topics[key])

# ---------------------------------------------------------------------------------------------------------------------
# Long work that others may be doing too, and may want to watch

@contextlib.contextmanager
def locked(path, doing):
    """Keeps `path`, a file or a folder, to this process until the block ends, or the process dies. Raises UserError if another one has it:
    `doing` says what that one is doing."""
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f'another process is {doing}; wait until it is done') from None
    finally:
        os.close(handle)

def progress(items, name, size, unit, done=0, total=None):
    """Yields `items`, and twice a second shows on stderr, under `name`, how much has passed and how fast. `size(item)` is in units, and so are
    `done`, what was there before, and `total`, with which the share and the time that is left are shown too."""
    start, before, shown = time.monotonic(), done, 0
    try:
        for item in items:
            yield item
            done, now = done + size(item), time.monotonic()
            if now > shown + 0.5 or done == total:
                shown, speed = now, (done - before) / (now - start + 1e-9)
                left = f', {done / total:.0%}, {timedelta(seconds=int((total - done) / (speed + 1e-9)))} left' if total else ''
                print(f'\r{name}: {done:,.1f} {unit}, {speed:,.1f} {unit}/s{left}  ', end='', file=sys.stderr, flush=True)
    finally:
        if shown:
            print(file=sys.stderr)                    # what comes next, be it an error, begins its own line

# ---------------------------------------------------------------------------------------------------------------------
# Downloads: gigabytes over lines that break

TRIES = 6                  # attempts in a row that bring nothing new, 2, 4, 8, 16 and 32 seconds apart

class Interrupted(Exception):
    """An attempt that failed in a way the next one may not."""

def download(url, path, sha256=None):
    """Downloads `url` to `path`, unless it is there; -> path, a Path. A broken attempt leaves path.part, with which the next one goes on.
    Size and, where given, sha256 are checked before the file gets its name. Raises UserError."""
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + '.part')
    part.touch()
    with locked(part, f'downloading {path}'), open(part, 'ab') as f:
        tries, longest = 0, 0
        while True:
            try:
                download_rest(url, f, path.name)
                break
            except (Interrupted, requests.RequestException) as error:
                arrived = f.seek(0, os.SEEK_END)
                tries, longest = 1 if arrived > longest else tries + 1, max(arrived, longest)         # what brings bytes is no failure
                why = str(error) if isinstance(error, Interrupted) else f'no connection, or it broke off: {type(error).__name__}'
                if tries == TRIES:
                    raise UserError(f'{url} could not be downloaded ({why}); what arrived is in {part}, run this again to go on') from None
                print(f'{path.name}: {why}; next attempt in {2 ** tries} s', file=sys.stderr)
                time.sleep(2 ** tries)
        f.flush()
        os.fsync(f.fileno())
        if sha256 and (found := sha256_of(part)) != sha256:
            part.unlink()
            raise UserError(f'{url} arrived damaged or is another file by now (sha256 {found}, not {sha256}): run this again, or get it elsewhere')
        os.replace(part, path)
    return path

def download_rest(url, f, name):
    """One attempt: asks for what comes after the bytes that f holds, and appends it. Raises Interrupted where another attempt may help."""
    have = f.seek(0, os.SEEK_END)
    headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={have}-'} if have else {})     # identity: bytes as they are counted
    with requests.get(url, headers=headers, stream=True, timeout=(20, 60)) as answer:
        status, span = answer.status_code, answer.headers.get('Content-Range', '')                # of 300 bytes: bytes 100-299/300, or bytes */300
        if status == 416 and span == f'bytes */{have}':                                           # nothing comes after: complete
            return
        if status == 416 or status == 206 and not span.startswith(f'bytes {have}-'):
            f.truncate(0)
            raise Interrupted('the server cannot go on where the last attempt stopped, so it starts again')
        if status in (408, 429) or status >= 500:
            raise Interrupted(f'the server answers {status} {answer.reason}')
        if status not in (200, 206):
            raise UserError(f'{url} answers {status} {answer.reason}; download {name} with a browser, or give another source')
        if status == 200:                                                                         # the whole file, whatever was asked for
            f.truncate(0)
            have = 0
        length = int(answer.headers.get('Content-Length', 0))                                     # of what comes now; 0: unknown
        if length > (free := shutil.disk_usage(Path(f.name).parent).free):
            raise UserError(f'{name} needs {length / 1e6:,.0f} MB more and the disk has {free / 1e6:,.0f} MB left; make room')
        blocks = answer.iter_content(2**16)                                                       # a block that breaks off is lost
        for block in progress(blocks, name, lambda block: len(block) / 1e6, 'MB', have / 1e6, (have + length) / 1e6 if length else None):
            f.write(block)
        if length and (got := f.seek(0, os.SEEK_END)) != have + length:
            raise Interrupted(f'{got:,} bytes arrived of {have + length:,}')

# ---------------------------------------------------------------------------------------------------------------------
# Documents of files, read bit by bit: a file may be larger than the memory

@contextlib.contextmanager
def opened(path):
    """Yields a binary file, unpacked if its name ends in .gz. Raises UserError where a .gz file breaks off or is damaged."""
    try:
        with gzip.open(path) if path.suffix == '.gz' else open(path, 'rb') as f:
            yield f
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f'{path} is cut short or damaged (gzip -t says the same); get it again') from None

def decoded(raw, path, first_line):
    """Bytes as UTF-8 text. Raises UserError with file and line where they are not."""
    try:
        return raw.decode('utf-8-sig' if first_line == 1 else 'utf-8')             # -sig: without the mark that some editors put before UTF-8
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b'\n', 0, error.start)
        raise UserError(f'{path}, line {line}: not UTF-8; convert the file first, for example with iconv -t utf-8') from None

def text_documents(path, split_line=None):
    """Yields what stands between lines equal to `split_line`; without it the whole file, or pieces of a long one."""
    held, size, first = [], 0, 1
    with opened(path) as f:
        room = PIECE if split_line is None and len(f.read(WHOLE + 1)) > WHOLE else LONGEST
        f.seek(0)
        for number, line in enumerate(iter(lambda: f.readline(LONGEST + 1), b''), start=1):
            ends = split_line is not None and line.rstrip(b'\r\n') == os.fsencode(split_line)
            if not ends:
                held.append(line)
                size += len(line)
            if size > LONGEST:
                raise UserError(f'{path}, line {first}: a document of over {LONGEST >> 20} MiB starts here; break its lines or --split-line it')
            if ends or size >= room:
                yield decoded(b''.join(held), path, first)
                held, size, first = [], 0, number + 1
    yield decoded(b''.join(held), path, first)

def jsonl_documents(path):
    """Yields the "text" of each row."""
    with opened(path) as f:
        for number, line in enumerate(f, start=1):
            row = decoded(line, path, number)
            if row.strip():
                try:
                    text = json.loads(row)['text']
                    text.encode()                      # JSON can spell half a surrogate pair (\ud83d), which is no character
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise UserError(f'{path}, line {number}: not a JSON object with a "text" of valid Unicode; mend or remove it') from None
                yield text

def parquet():
    """The module that reads parquet files, which nothing else here needs. Raises UserError if it is not installed."""
    try:
        import pyarrow.parquet
        return pyarrow
    except ImportError:
        raise UserError('parquet files are read with pyarrow: pip install pyarrow') from None

def parquet_documents(path):
    """Yields the column "text", row by row."""
    pyarrow = parquet()
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:     # with a buffer it reads page by page, not whole row groups
            for batch in file.iter_batches(256, columns=['text']):
                yield from batch['text'].cast('string').to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:     # ValueError: not UTF-8
        reason = str(error).partition('\n')[0]
        raise UserError(f'{path} is damaged or has no column "text" of strings ({reason}); remove it and get it again') from None

def documents_of(path, split_line=None):
    """The documents of a file, read as its name says, and as text if that says nothing."""
    if path.name.endswith('.parquet'):
        return parquet_documents(path)
    return jsonl_documents(path) if path.name.endswith(('.jsonl', '.jsonl.gz')) else text_documents(path, split_line)

def file_documents(paths, split_line=None):
    """The documents of files, whatever their ending, and of folders, recursively by ENDINGS and sorted."""
    files = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else sorted(p for p in path.rglob('*') if p.name.removesuffix('.gz').endswith(ENDINGS) and p.is_file())
        if not found:
            raise UserError(f'{path} is neither a file nor a folder with {" ".join(ENDINGS)} files in it; give the path of some text')
        files += found
    if any(path.suffix == '.parquet' for path in files):
        parquet()                                      # complains before anything is written
    return (text for path in files for text in documents_of(path, split_line))

# ---------------------------------------------------------------------------------------------------------------------
# A data set on the disk: what its meta.json says, and whether its shards are as it says

def read_meta(folder, least=1):
    """The meta.json of a data set, a dict. Raises UserError if it is missing or broken, or counts less than `least` of anything."""
    try:
        meta = json.loads((folder / 'meta.json').read_text())
        whole = meta.pop('digest', None) in (None, digest(json.dumps(meta)))      # None: an older data set
        counts = meta['train_tokens'], meta['val_tokens'], meta['val_bytes']
        if not whole or min(counts) < least or not all({'tokens', 'sha256'} <= shard.keys() for shard in meta['shards'].values()):
            raise ValueError
        return meta
    except (FileNotFoundError, NotADirectoryError):
        command = folder.name if folder.name in ('stdlib', *CORPORA) else f'files --name {folder.name} PATH...'
        raise UserError(f'there is no data set {folder}; make it with: python prepare_data.py {command}') from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{folder / "meta.json"} is broken; remove {folder} and prepare it again') from None

def open_shard(path, tokens):
    """A shard, memory-mapped. Only its size is looked at here; `check` reads every byte."""
    try:
        shard = np.lib.format.open_memmap(path, mode='r')
        if shard.dtype != np.uint16 or shard.shape != (tokens,) or path.stat().st_size != shard.offset + 2 * tokens:
            raise ValueError
        return shard
    except (ValueError, EOFError, FileNotFoundError):
        raise UserError(f'{path} is missing, cut short or not what meta.json describes; remove {path.parent} and prepare it again') from None

def check(name, root='data'):
    """Compares every shard with its sha256 in meta.json."""
    folder = Path(root) / name
    shards = read_meta(folder)['shards']
    bad = [file for file, shard in shards.items() if not (folder / file).is_file() or sha256_of(folder / file) != shard['sha256']]
    if bad:
        raise UserError(f'damaged or missing in {folder}: {", ".join(bad)}; remove the folder and prepare it again')
    print(f'{folder}: all {len(shards)} shards are as they were written')

# ---------------------------------------------------------------------------------------------------------------------
# Writing shards

def encoded(documents):
    """Yields (held out?, UTF-8 bytes, ids with </s>) of each document that is not blank, in order, tokenized on all cores. Threads will do:
    tiktoken lets go of the interpreter, which is held for 2% of the time."""
    encoding, waiting, ahead = tokenizer(), collections.deque(), 0

    def encode(text):
        raw = text.encode()
        # Its hash alone decides whether a document is held out, so copies of it never stand on both sides.
        held_out = int.from_bytes(hashlib.sha256(raw).digest()[:8], 'big') % VAL_ONE_IN == 0
        ids = encoding.encode_to_numpy(text, disallowed_special=())            # (): a text that says </s> says four characters
        return held_out, len(raw), np.append(ids.astype(np.uint16), np.uint16(EOS))

    with ThreadPoolExecutor(CORES) as pool:
        for text in documents:
            if text and not text.isspace():
                waiting.append((len(text), pool.submit(encode, text)))
                ahead += len(text)
            while ahead > AHEAD * CORES:
                ahead -= waiting[0][0]
                yield waiting.popleft()[1].result()
        while waiting:
            yield waiting.popleft()[1].result()

class ShardWriter:
    """Appends documents to {split}_000000.npy, {split}_000001.npy, ... and counts them in `meta`; a document may go on in the next shard."""

    def __init__(self, folder, split, meta):
        self.folder, self.split, self.meta, self.filled = folder, split, meta, 0
        self.buffer = np.empty(SHARD, np.uint16)       # costs memory only as it fills

    def add(self, ids, n_bytes):
        self.meta['documents'] += 1
        self.meta[f'{self.split}_tokens'] += len(ids)
        self.meta[f'{self.split}_bytes'] += n_bytes
        while len(ids):
            part = ids[:SHARD - self.filled]
            self.buffer[self.filled:self.filled + len(part)] = part
            self.filled, ids = self.filled + len(part), ids[len(part):]
            if self.filled == SHARD:
                self.flush()

    def flush(self):
        if self.filled:
            number = sum(file.startswith(self.split) for file in self.meta['shards'])
            target = self.folder / f'{self.split}_{number:06d}.npy'
            with replacing(target) as path, open(path, 'wb') as f:
                np.save(f, self.buffer[:self.filled])
            self.meta['shards'][target.name] = {'tokens': self.filled, 'sha256': sha256_of(target)}
            self.filled = 0

@contextlib.contextmanager
def new_folder(folder):
    """Yields a folder beside `folder` that becomes it in the end: a data set is whole or absent. Stopped before, it stays if there is a
    meta.json in it, which says what of it is good."""
    beside = folder.with_name(f'.{folder.name}.tmp')
    beside.mkdir(parents=True, exist_ok=True)
    with locked(beside, f'preparing {folder}'):
        try:
            yield beside
            os.rename(beside, folder)
        finally:
            if not (beside / 'meta.json').exists():
                shutil.rmtree(beside, ignore_errors=True)

def begin(beside, options):
    """The meta of a new data set, or of one that was begun in the folder `beside`, where whatever no meta.json counts is removed: it is of the
    part in which somebody was killed. Raises UserError if that one was begun with other `options`, a dict."""
    meta = options | dict(python=platform.python_version(), parts=0, shards={})
    meta |= dict.fromkeys(('documents', 'train_tokens', 'val_tokens', 'train_bytes', 'val_bytes'), 0)
    if (beside / 'meta.json').exists():
        meta = read_meta(beside, least=0)
        if not options.items() <= meta.items():
            raise UserError(f'{beside} was begun from {meta["source"]!r} with a limit of {meta.get("limit")} tokens, or with another tokenizer; '
                            'give the same command to go on, remove it to start again, or choose another --name')
        print(f'going on after {meta["parts"]} whole files', file=sys.stderr)
    for file, shard in meta['shards'].items():
        open_shard(beside / file, shard['tokens'])
    for path in beside.iterdir():
        if path.name not in ('meta.json', *meta['shards']):
            path.unlink()
    return meta

def prepare_parts(name, parts, source, root='data', limit=None):
    """Writes the data set root/name from a list of context managers that each give an iterable of strings; returns its meta, a dict. `source`
    says where the text is from. A part is left when its shards are on the disk and meta.json says so: when a call was stopped, the next one
    goes on after the last whole part and ends in the same bytes. `limit`: stop after the first document with which there are so many training
    tokens, and SMALLEST validation tokens. Raises UserError."""
    folder, start = Path(root) / name, time.time()
    if not re.fullmatch(r'\w[\w.-]*', name):
        raise UserError(f'{name!r} does not name a folder; use letters, digits, - and _ for --name', status=2)
    if folder.exists():
        raise UserError(f'{folder} exists already; remove it, or choose another --name')
    with new_folder(folder) as beside:
        meta = begin(beside, dict(source=source, limit=limit, tokenizer=tokenizer_fingerprint()))
        train, val = (ShardWriter(beside, split, meta) for split in ('train', 'val'))

        def megabytes():
            return (meta['train_bytes'] + meta['val_bytes']) / 1e6

        def enough():
            return limit is not None and meta['train_tokens'] >= limit and meta['val_tokens'] >= SMALLEST
        while meta['parts'] < len(parts) and not enough():
            with parts[meta['parts']] as documents:
                which = f'{name}, file {meta["parts"] + 1} of {len(parts)}'
                for held_out, n_bytes, ids in progress(encoded(documents), which, lambda document: document[1] / 1e6, 'MB', megabytes()):
                    (val if held_out else train).add(ids, n_bytes)
                    if enough():
                        break
                train.flush()
                val.flush()
                meta['parts'] += 1
                with replacing(beside / 'meta.json') as path:
                    path.write_text(json.dumps(meta | {'digest': digest(json.dumps(meta))}, indent=1))
        if min(meta['train_tokens'], meta['val_tokens']) < SMALLEST:
            (beside / 'meta.json').unlink(missing_ok=True)
            raise UserError(f'{meta["documents"]} documents give {meta["train_tokens"]:,} training and {meta["val_tokens"]:,} validation tokens, '
                            f'each needs {SMALLEST:,}, and one document in {VAL_ONE_IN} is held out; give more text, or cut it with --split-line')
    print(f'{folder}: {meta["documents"]:,} documents, {megabytes():.1f} MB of text, '
          f'{meta["train_tokens"]:,} training and {meta["val_tokens"]:,} validation tokens, {time.time() - start:.0f} s')
    return meta

def prepare(name, documents, source, root='data'):
    """Like `prepare_parts`, from one iterable of strings."""
    return prepare_parts(name, [contextlib.nullcontext(documents)], source, root)

def prepare_stdlib(root='data'):
    """Writes the data set root/stdlib; returns its meta."""
    return prepare('stdlib', stdlib_documents(), f'docstrings, comments and help topics of Python {platform.python_version()}', root)

def prepare_corpus(corpus, root='data', name=None, limit=None, keep_raw=False, mirror=None):
    """Downloads one of CORPORA to root/NAME.raw/, file by file, none of which stays longer than it must unless `keep_raw`, and writes the data
    set root/NAME; returns its meta. `limit`: training tokens that are enough. `mirror`: takes the place of https://HOST in the addresses."""
    address, count, *sha256 = CORPORA[corpus]
    name = name or corpus
    raw = Path(root) / f'{name}.raw'
    if address.endswith('.parquet'):
        parquet()                                      # complains before gigabytes are here, not after

    @contextlib.contextmanager
    def documents(url):
        path = download(mirror.rstrip('/') + url[url.index('/', 8):] if mirror else url, raw / url.rpartition('/')[2], *sha256)
        yield documents_of(path, split_line='')        # a play is split into its speeches: of its 68 pieces of 16 KiB none is held out
        if not keep_raw:
            path.unlink()
    parts = [documents(address.format(i)) for i in range(count)]
    meta = prepare_parts(name, parts, f'{address.rpartition("/")[0]}/, files: {count}', root, limit)
    if not keep_raw:                                   # with what a kill may have left between record and removal
        shutil.rmtree(raw, ignore_errors=True)
    return meta

# ---------------------------------------------------------------------------------------------------------------------
# Reading a data set

class Dataset:
    """A prepared data set: `name`, a folder of `root`, or the path of one.

    `train` and `val` are lists of memory-mapped uint16 arrays, `train_tokens` and `val_tokens` their lengths together, `bytes_per_token` the
    UTF-8 bytes of text behind a validation token (nats a token / ln 2 / bytes_per_token = bits per byte), `fingerprint` stands for the
    content of all shards, `meta` is all of meta.json."""

    def __init__(self, name, root='data'):
        folder = Path(name) if os.sep in str(name) else Path(root) / name
        self.name, self.meta = folder.name, read_meta(folder)
        if self.meta.get('tokenizer') != tokenizer_fingerprint():
            raise UserError(f'{folder} was made with another tokenizer; remove it and prepare it again')
        self.fingerprint = digest(*(shard['sha256'] for shard in self.meta['shards'].values()))
        opened = {file: open_shard(folder / file, shard['tokens']) for file, shard in sorted(self.meta['shards'].items())}
        self.train, self.val = ([shard for file, shard in opened.items() if file.startswith(split)] for split in ('train_', 'val_'))
        self.train_tokens, self.val_tokens = (sum(map(len, split)) for split in (self.train, self.val))
        self.bytes_per_token = self.meta['val_bytes'] / self.val_tokens

class Sequences:
    """One split as a list of sequences: context + 1 tokens, one every `context` tokens, none across two shards. So every token but a
    shard's first is a target once; a shard's tail shorter than a context is dropped."""

    def __init__(self, dataset, split, context):
        self.shards, self.context = getattr(dataset, split), context
        self.starts = np.cumsum([0] + [(len(shard) - 1) // context for shard in self.shards])
        if not len(self):
            raise UserError(f'the {split} split of {dataset.name} has no {context + 1:,} tokens in a row; choose a smaller --context or more text')

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i):
        shard = np.searchsorted(self.starts, i, side='right') - 1
        first = (i - self.starts[shard]) * self.context
        return self.shards[shard][first:first + self.context + 1]

def inputs_and_targets(sequences):
    """B sequences of T + 1 ids -> inputs and targets, int64 tensors (B, T)."""
    tokens = np.stack(sequences)                                               # B, T + 1
    return tuple(torch.from_numpy(part.astype(np.int64)) for part in (tokens[:, :-1], tokens[:, 1:]))

class Batches:
    """The training batches of a run, a pure function of (seed, step).

    Sequence i of the run, i = step * rows + row, is from data set pattern[i % len(pattern)], in which each stands as often as its integer
    weight says; there it is number k of epoch e, and every epoch is a permutation of its own: no sequence comes twice in one."""

    def __init__(self, datasets, weights, seed, rows, context):
        self.datasets, self.weights, self.seed, self.rows, self.context = datasets, weights, seed, rows, context
        self.sequences = [Sequences(dataset, 'train', context) for dataset in datasets]
        self.pattern = np.repeat(np.arange(len(datasets)), weights)            # weights 3 and 1: 0 0 0 1
        self.orders = [(None, None)] * len(datasets)                           # current epoch and its permutation: a cache, no state

    def batch(self, step, rows=slice(None)):
        """(inputs, targets), int64 tensors (rows, context). Rank r of W takes rows=slice(r, None, W) of the same global batch."""
        return inputs_and_targets([self._sequence(int(i)) for i in np.arange(step * self.rows, (step + 1) * self.rows)[rows]])

    def _sequence(self, i):
        turn, place = divmod(i, len(self.pattern))
        d = self.pattern[place]
        own = turn * self.weights[d] + place - sum(self.weights[:d])           # how many of d came before, in closed form
        epoch, k = divmod(own, len(self.sequences[d]))
        if self.orders[d][0] != epoch:
            self.orders[d] = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.sequences[d]))
        return self.sequences[d][self.orders[d][1][k]]

def val_batches(dataset, context, rows, limit=None):
    """The validation split in fixed order, all of it or its first `limit` tokens, in whole sequences: an iterator of (inputs, targets),
    int64 (rows, context). The last batch may have fewer rows; the tail of a shard, shorter than a context, is dropped."""
    sequences = Sequences(dataset, 'val', context)
    n = len(sequences) if limit is None else min(len(sequences), max(1, limit // context))
    return (inputs_and_targets([sequences[i] for i in range(first, min(first + rows, n))]) for first in range(0, n, rows))

# ---------------------------------------------------------------------------------------------------------------------
# Baselines: what counting alone achieves

class NGrams:
    """Unigram and bigram probabilities, both smoothed after Witten and Bell (1991).

    h had T(h) kinds of successors in c(h) places, so the next one is new with probability T(h) / (c(h) + T(h)):
    P(w|h) = (c(h,w) + T(h) P(w)) / (c(h) + T(h)). P(w) itself stands on the uniform distribution in the same way."""

    def __init__(self, before, after):
        """`before`, `after`: two flat arrays of token ids, position by position."""
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

def ngram_losses(batches, steps, dataset, limit=None):
    """(unigram, bigram) cross-entropy in nats a token, on the positions that val_batches(dataset, batches.context, ..., limit) gives.

    Counted on the first `steps` global batches, each position as often as the run saw it. Of a run longer than 20 M tokens only those
    are counted, which makes its baselines a little too weak."""
    enough = min(steps, -(-COUNTED // (batches.rows * batches.context)))
    pairs = [[part.numpy().astype(np.uint16).ravel() for part in batches.batch(step)] for step in range(enough)]
    ngrams = NGrams(*(np.concatenate(part)[:COUNTED] for part in zip(*pairs)))
    nats, positions = np.zeros(2), 0
    for inputs, targets in val_batches(dataset, batches.context, 64, limit):
        h, w = inputs.numpy().ravel(), targets.numpy().ravel()
        nats -= np.log(ngrams.unigram[w]).sum(), np.log(ngrams.bigram(h, w)).sum()
        positions += len(w)
    return tuple((nats / positions).tolist())

def unigram_log_probs(batches):
    """float32 tensor (65,536,): log frequencies of the training data, add-one smoothed, mixed by weight; of each data set the first shard's
    first 20 M tokens are counted. A head born with this as its bias spends no steps on learning it (ours)."""
    counts = [np.bincount(dataset.train[0][:COUNTED], minlength=VOCAB) + 1 for dataset in batches.datasets]
    return torch.from_numpy(np.log(np.average([c / c.sum() for c in counts], axis=0, weights=batches.weights))).float()

def open_batches(words, seed, rows, context):
    pairs = [(name, weight or '1') for name, _, weight in (word.partition(':') for word in words)]
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names) or not all(weight.isdecimal() and int(weight) for _, weight in pairs):
        raise UserError(f'--data {" ".join(words)}: name each data set once, with a positive whole weight if any, as in '
                        'ru:3 en:1', status=2)
    if 'stdlib' in names and not Path('data/stdlib').exists():
        print('no data yet: preparing the text of the Python standard library')
        prepare_stdlib()
    datasets = [Dataset(name) for name in names]
    for dataset in datasets:
        Sequences(dataset, 'val', context)             # refuses what is too short before anything is trained
    return Batches(datasets, [int(weight) for _, weight in pairs], seed, rows, context)

_n, _u = ngram_losses, unigram_log_probs
def ngram_losses(dataset, context, limit=None):
    b = Batches([dataset], [1], 0, 64, context)
    return _n(b, len(b.sequences[0]) // 64, dataset, limit)
def unigram_log_probs(datasets, weights):
    import types
    return _u(types.SimpleNamespace(datasets=datasets, weights=weights))

# ---------------------------------------------------------------------------------------------------------------------

@cli
def main(argv=None):
    """The command line: prepare a data set, or check one."""
    root = Parser(add_help=False)
    root.add_argument('--root', default=argparse.SUPPRESS, help='folder of the data sets (data)')
    common = dict(parents=[root], allow_abbrev=False)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, **common)
    parser.add_argument('--check', metavar='NAME', help='compare the shards of a data set with their checksums')
    commands = parser.add_subparsers(dest='corpus', metavar='CORPUS', help=f'stdlib, files, {", ".join(CORPORA)}; CORPUS -h lists the flags of each')
    commands.add_parser('stdlib', **common)
    files = commands.add_parser('files', **common)
    files.add_argument('paths', nargs='+', metavar='PATH', help='text files, or folders of them')
    files.add_argument('--name', required=True, help='the data set becomes ROOT/NAME')
    files.add_argument('--split-line', metavar='TEXT', help='a document ends at each line that is TEXT and nothing else')
    for corpus in CORPORA:
        hub = commands.add_parser(corpus, **common)
        hub.add_argument('--name', default=corpus, help='the data set becomes ROOT/NAME (%(default)s)')
        hub.add_argument('--tokens', type=int, metavar='N', help='stop after the document with which there are N training tokens')
        hub.add_argument('--keep-raw', action='store_true', help='leave what was downloaded in ROOT/NAME.raw')
        hub.add_argument('--mirror', metavar='URL', help='ask this server, not the one at https://HOST of the address')
    args = parser.parse_args(argv, argparse.Namespace(root='data'))
    if bool(args.check) == bool(args.corpus):
        parser.error('say what to prepare, stdlib, files or a corpus, or give --check NAME')
    if args.check:
        check(args.check, args.root)
    elif args.corpus == 'stdlib':
        prepare_stdlib(args.root)
    elif args.corpus == 'files':
        source = ' '.join(args.paths) + (f', split at {args.split_line}' if args.split_line is not None else '')
        prepare(args.name, file_documents(args.paths, args.split_line), source, args.root)
    elif args.tokens is not None and args.tokens < 1 or args.mirror is not None and not re.match('https?://', args.mirror):
        parser.error('--tokens must be positive, and --mirror start with https:// or http://')
    else:
        prepare_corpus(args.corpus, args.root, args.name, args.tokens, args.keep_raw, args.mirror)

if __name__ == '__main__':
    main()
