"""What all the scripts share, and what has nothing to do with models: errors that are one sentence, files that are whole or absent, progress."""

import argparse
import contextlib
import fcntl                                          # Linux and macOS
import functools
import hashlib
import os
import sys
import time
from pathlib import Path

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
