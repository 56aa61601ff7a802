"""Breaks runs on purpose: kill -9, Ctrl-C, full disks, damaged files. Does each end in one sentence, and go on to the same bits?

    python results/faults.py [KILLS] [SEED]           # 20 kills, seed 0; writes results/faults.txt; exit status 1 if anything was lost

One job is the measure of all: prepare a text, grow three stages with a LoRA phase and its merge, a checkpoint after every step. Each attempt is a
process of its own, forked from this one so that torch is imported once. Full disks are mounted (tmpfs), which takes root; others skip them.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import grow  # noqa: E402
import prepare_data  # noqa: E402
import substrate  # noqa: E402

GROW = '''--data tiny --out run --device cpu --no-compile --dtype float32 --substrate binary --d_model 32 --heads 2 --context 16 --layers 3 --layers_per_stage 1
    --stage_tokens 192 --batch_tokens 64 --micro_batch 4 --lora interleaved --lora_stages 2 --lora_tokens 192 --eval_tokens 256 --length 5 --save_every 0'''.split()
RESUME = '--resume --out run --save_every 0 --length 5'.split()
lines, lost = [], []


def say(line, good=True):
    lines.append(line if good else f'{line}   <-- LOST')
    lost.extend([] if good else [line])
    print(lines[-1], flush=True)


def start(folder, *calls):
    """Forks a process that makes the calls (main, argv) in `folder`, its output in folder/said. -> its number"""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        os.chdir(folder)
        said = os.open('said', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        for main, argv in calls:
            main(argv)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def ended(pid):
    """Waits for a process. -> its exit status, negative for a signal"""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def job(folder, text):
    """The calls with which a user would start the job, or go on with it, whatever is there already."""
    calls = [] if (folder / 'data' / 'tiny').exists() else [(prepare_data.main, ['files', '--name', 'tiny', str(text)])]
    return *calls, (grow.main, RESUME if (folder / 'run' / 'latest.pt').exists() else GROW)


def outcome(folder):
    """What must be the same: shards, the tensors of every checkpoint, and the log but for its times."""
    tensors = {f'{path.name} {name}': t for path in sorted((folder / 'run').glob('*.pt')) for name, t in grow.load(path)['model'].items()}
    timed = [grow.COLUMNS.index(name) for name in ('seconds', 'tokens_per_s')]
    log = [[x for k, x in enumerate(row.split(',')) if k not in timed] for row in (folder / 'run' / 'log.csv').read_text().splitlines()]
    return prepare_data.Dataset(folder / 'data' / 'tiny').fingerprint, log, tensors


def same(a, b):
    return a[:2] == b[:2] and a[2].keys() == b[2].keys() and all(torch.equal(a[2][name], b[2][name]) for name in a[2])


def one_sentence(folder, *words):
    """Whether the last line of folder/said is an error with all the words, and there is no traceback."""
    text = (folder / 'said').read_text()
    last = text.strip().splitlines()[-1] if text.strip() else ''
    return 'Traceback' not in text and last.startswith('error: ') and all(word in last for word in words)


def wait_for(happened, pid):
    """Waits until happened() or the end of the process. -> whether it is still there"""
    while not happened():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.001)
    return True


def kill(folder, text, rng, in_prepare, saves, pause):
    """Starts the job, kills it at a random moment: of preparing, or after so many checkpoints, and a random part of the time to the next one."""
    pid, run = start(folder, *job(folder, text)), folder / 'run' / 'latest.pt'
    if in_prepare:
        here = wait_for((folder / 'data' / '.tiny.tmp').exists, pid)
    else:
        seen, left = set(), rng.randrange(saves)

        def enough():
            with contextlib.suppress(FileNotFoundError):
                seen.add((run.stat().st_ino, run.stat().st_mtime_ns))
            return len(seen) > left
        here = wait_for(enough, pid)
    if here:
        time.sleep(rng.random() * pause)
        os.kill(pid, signal.SIGKILL)
    return ended(pid) == -signal.SIGKILL


def kills(place, text, whole, times, count, seed):
    rng, good, seen = random.Random(seed), 0, Counter()
    saves = 1 + sum(phase.steps + 1 for phase in grow.phases(grow.configure(GROW)[0]))
    for k in range(count):
        folder, killed, in_prepare = place / f'kill{k}', False, k < count // 4
        while not killed:                              # it may have ended before: then again
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            killed = kill(folder, text, rng, in_prepare, saves, times[0] if in_prepare else times[1] / saves)
        calls, half = job(folder, text), len(list((folder / 'run').glob('.*.pt.*.tmp')))
        status = ended(start(folder, *calls))
        at = next((line for line in (folder / 'said').read_text().splitlines() if line.startswith(('resuming', 'the run'))), 'from the start')
        where = 'while preparing' if len(calls) == 2 else at.replace('resuming run ', '').replace('from the start', 'before the first checkpoint')
        equal = status == 0 and same(outcome(folder), whole) and not list((folder / 'run').glob('.*')) and [p.name for p in (folder / 'data').iterdir()] == ['tiny']
        good += equal
        seen[where.rpartition(' after')[0] or where] += 1
        seen['a checkpoint half written'] += half
        say(f'  kill {k + 1:2d}: {where}{", a checkpoint half written" * half}: {"same bits" if equal else "DIFFERENT"}', equal)
        shutil.rmtree(folder)
    say(f'kill -9 at {count} random moments (seed {seed}): {good} of {count} gave the same shards, weights and log; ' + ', '.join(f'{n} {what}' for what, n in sorted(seen.items())), good == count)


def interrupts(place, text, whole):
    folder = place / 'ctrl-c'
    folder.mkdir()
    shutil.copytree(place / 'whole' / 'data', folder / 'data')
    pid = start(folder, *job(folder, text))
    wait_for((folder / 'run' / 'stage_1.pt').exists, pid)
    os.kill(pid, signal.SIGSTOP)                       # it waits while others try
    (folder / 'second').mkdir()
    refused = []
    for argv in (GROW, RESUME):
        argv = [str(folder / word) if word == 'run' else str(folder / 'data' / word) if word == 'tiny' else word for word in argv]
        refused.append(ended(start(folder / 'second', (grow.main, argv))) == 1 and one_sentence(folder / 'second', 'another process is writing to'))
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGCONT)
    status, said = ended(pid), (folder / 'said').read_text()
    shutil.rmtree(folder / 'second')
    say(f'two runs in one folder: {sum(refused)} of 2 refused, with and without --resume', all(refused))
    stopped = status == 130 and said.endswith('interrupted\n') and 'stopped: go on with --resume' in said and 'Traceback' not in said
    stopped = stopped and ended(start(folder, *job(folder, text))) == 0 and same(outcome(folder), whole)
    say(f'Ctrl-C: {"exit status 130, one line, and went on to the same bits" if stopped else f"status {status}: {said[-200:]}"}', stopped)


@contextlib.contextmanager
def disk(folder, size):
    """A disk of so many bytes at `folder`; yields what makes room on it."""
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], check=True)
    try:
        yield lambda: subprocess.run(['mount', '-o', 'remount,size=1g', folder], check=True)
    finally:
        subprocess.run(['umount', '-l', folder], check=True)


def full_disks(place, text, whole):
    if os.geteuid() or shutil.which('mount') is None:
        return say('full disks: skipped, mounting one takes root')
    good = Counter()
    for what, size, word in [('shards', s, '.npy') for s in (50_000, 400_000, 1_000_000)] + \
                            [('checkpoints', s * 10**6, '.pt') for s in (14, 35, 50, 64, 76)] + [('log.csv', 200_000_000, 'No space left')]:
        folder = place / f'full{size}'
        with disk(folder, size) as make_room:
            if what != 'shards':
                shutil.copytree(place / 'whole' / 'data', folder / 'data')
            if what == 'log.csv':
                (folder / 'said').write_bytes(b' ' * 8192)
                with contextlib.suppress(OSError), open(folder / 'filler', 'wb', buffering=0) as f:
                    while f.write(b'x' * 4096):
                        pass
            pid = start(place, (os.chdir, folder), *job(folder, text))       # its last words are for another disk
            ok = ended(pid) == 1 and one_sentence(place, word, 'disk')
            end = (place / 'said').read_text().strip().splitlines()[-1]
            latest = folder / 'run' / 'latest.pt'
            at = f'step {grow.load(latest)["at"]["global_step"]} loads' if latest.exists() else 'none yet'
            ok = ok and not list(folder.glob('run/.*.tmp')) and (what != 'shards' or not list((folder / 'data').iterdir()))
            make_room()
            (folder / 'filler').unlink(missing_ok=True)
            ok = ok and ended(start(folder, *job(folder, text))) == 0 and same(outcome(folder), whole)
            good[what] += ok
            good[what, 'all'] += 1
            say(f'  {what}, {size / 1e6:g} MB: {end.replace(str(folder), "DISK")}; last checkpoint: {at}; with more room {"the same bits" if ok else "NOT the same"}', ok)
    for what in ('shards', 'checkpoints', 'log.csv'):
        say(f'disk full while writing {what}: {good[what]} of {good[what, "all"]} ended in one sentence, kept the last good checkpoint and went on to the same bits', good[what] == good[what, 'all'])


def flip(raw, rng):
    at = rng.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]


def damages(place, rng, each=60):
    """Every artefact truncated, with a flipped bit, empty, and in place of it a file of another kind."""
    folder = place / 'damaged'
    shutil.copytree(place / 'whole', folder)
    for name in ('ngrams.txt', 'glyphs.npz'):
        shutil.copy(HERE.parent / 'interface' / name, folder / name)
    substrate.NGRAMS, substrate.GLYPHS = folder / 'ngrams.txt', folder / 'glyphs.npz'

    def tensors(path):
        return {name: t.clone() for name, t in grow.load(path)['model'].items()}
    def shard(path):
        with contextlib.redirect_stdout(io.StringIO()):
            prepare_data.check('tiny', folder / 'data')
    readers = {
        'data/tiny/train_000000.npy': shard,
        'data/tiny/meta.json': lambda path: prepare_data.read_meta(path.parent),
        'run/latest.pt': tensors, 'run/stage_1.pt': tensors,
        'ngrams.txt': substrate.read_ngrams, 'glyphs.npz': lambda path: substrate.glyphs().tobytes(),
    }

    def equal(a, b):
        return all(torch.equal(a[name], b[name]) if torch.is_tensor(b[name]) else a[name] == b[name] for name in b) if isinstance(b, dict) else a == b
    with open(HERE / 'faults.py', 'rb') as f:
        foreign = [f.read(), (HERE / 'idea.png').read_bytes(), b'\0' * 1000]
    for name, read in readers.items():
        path = folder / name
        whole, seen = path.read_bytes(), Counter()
        good = read(path)
        cases = [('flipped', flip(whole, rng)) for _ in range(each)] + [('cut', whole[:rng.randrange(1, len(whole))]) for _ in range(each // 3)]
        for kind, raw in cases + [('empty', b'')] + [('foreign', raw) for raw in foreign]:
            path.write_bytes(raw)
            try:
                seen[kind, 'harmless' if equal(read(path), good) else 'UNNOTICED'] += 1
            except substrate.UserError as error:
                named = path.name in str(error) and '\n' not in str(error)
                seen[kind, 'refused' if named else 'NOT NAMED'] += 1
            except Exception as error:
                seen[kind, f'TRACEBACK {error!r:.80}'] += 1
        path.write_bytes(whole)
        bad = any(how not in ('refused', 'harmless') or kind != 'flipped' and how == 'harmless' for kind, how in seen)
        say(f'damaged {name}: ' + ', '.join(f'{n} {kind} {how}' for (kind, how), n in sorted(seen.items())), not bad)


def main():
    count, seed = (int(given or default) for given, default in zip([*sys.argv[1:], None, None], (20, 0)))
    with tempfile.TemporaryDirectory(dir='/dev/shm' if Path('/dev/shm').is_dir() else None) as place:      # in memory: no kill is a power cut
        place = Path(place)
        rng, text = random.Random(0), place / 'text.txt'
        text.write_text('\n'.join(' '.join(rng.choices('the cat sat on a mat and saw more cats than mats in that hat'.split(), k=15)) for _ in range(20_000)))
        (place / 'whole').mkdir()
        began = time.monotonic()
        pid = start(place / 'whole', *job(place / 'whole', text))
        wait_for((place / 'whole' / 'data' / '.tiny.tmp').exists, pid)
        first = time.monotonic()
        wait_for((place / 'whole' / 'data' / 'tiny').exists, pid)
        second = time.monotonic()
        wait_for((place / 'whole' / 'run').exists, pid)
        begun = time.monotonic()
        if ended(pid):
            sys.exit((place / 'whole' / 'said').read_text())
        whole, times = outcome(place / 'whole'), (0.9 * (second - first), time.monotonic() - begun)
        say(f'the job uninterrupted: {time.monotonic() - began:.0f} s, {len(whole[2])} tensors in {len(list((place / "whole" / "run").glob("*.pt")))} checkpoints')
        if count:
            kills(place, text, whole, times, count, seed)
        interrupts(place, text, whole)
        damages(place, random.Random(seed))
        full_disks(place, text, whole)
    say(f'{len(lost)} lost' if lost else 'nothing was lost')
    (HERE / 'faults.txt').write_text('\n'.join(lines) + '\n')
    sys.exit(bool(lost))


if __name__ == '__main__':
    main()
