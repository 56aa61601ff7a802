"""What the scripts share and what has nothing to do with models: errors that are one sentence, files that are whole or absent, a line of
progress, and downloads that go on where they stopped."""

import argparse
import contextlib
import fcntl                                          # Linux and macOS
import functools
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

import requests

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
            return main(argv)
        except UserError as error:
            message, status = f'error: {error}', error.status
        except OSError as error:                      # disk full, no permission, ...
            message, status = f'error: {error.strerror or error}: {error.filename or "while reading or writing"}', 1
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
    finally:
        beside.unlink(missing_ok=True)

@contextlib.contextmanager
def locked(path, doing):
    """Keeps `path`, a file or a folder, to this process until the block ends, or the process dies. Raises UserError if another one has it:
    `doing` says what that one is doing."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f'another process is {doing}; wait until it is done') from None
    finally:
        os.close(handle)

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

def clock_time(seconds):
    """Seconds as h:mm:ss."""
    return f'{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}'

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
                left = f', {done / total:.0%}, {clock_time((total - done) / (speed + 1e-9))} left' if total else ''
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
