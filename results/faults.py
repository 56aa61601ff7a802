"""
Breaks a small job in every way it can: does each fault end in one sentence, and the job in the same bits?

    python results/faults.py               # 3 to 5 minutes; exit status 1 if anything was lost
    python results/faults.py --write       # the same, and results/faults.txt

The job: prepare a text, grow three stages with a LoRA phase and its merge after each later one, and save a
checkpoint after every step. The uninterrupted job is the measure of all others. Small disks are mounted
(tmpfs), which takes root. Until it is made anew, results/faults.txt is of the first edition (commit 5036787).
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
import prepare_data
import substrate
from pictures import as_text
from substrate import Parser, cli, replacing

GROW = '''--data tiny --out run --device cpu --no-compile --dtype float32 --substrate binary --d_model 16
    --context 16 --layers 3 --layers_per_stage 1 --stage_tokens 192 --stage_ratio 1 --batch_tokens 64
    --micro_batch 4 --lora interleaved --lora_tokens 192 --eval_tokens 256 --save_every 0'''.split()
RESUME = '--resume --out run --save_every 0'.split()
SAMPLE = '--out run/stage_1.pt --sample the --length 1 --device cpu --no-compile'.split()
NGRAMS = Path('interface/ngrams.txt')
found = {}         # fault -> Counter of what became of it

def note(fault, result, detail=''):
    """Counts what became of a fault, True for survived and False for LOST, and prints it."""
    result = {True: 'survived', False: 'LOST'}.get(result, result)
    found.setdefault(fault, Counter(tried=0, survived=0, unnoticed=0, LOST=0)).update([result, 'tried'])
    print(f'{fault}: {result} {detail}', flush=True)

# ------------------------------------------------------------------------------------------------------------
# The job, its processes and its result

def work(folder, said, calls):
    """Makes the calls (main, argv) in `folder` and prints to the file `said`."""
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    os.chdir(folder)
    for main, argv in calls:
        main(argv)

def start(folder, *calls):
    """Forks a process that makes the calls, so that torch is imported once; -> it, with what it prints."""
    said = tempfile.TemporaryFile()
    process = multiprocessing.get_context('fork').Process(target=work, args=(folder, said, calls))
    process.said = said
    process.start()
    return process

def ended(process):
    """Waits for a process; -> its exit status, negative for a signal, and its last line, or 'Traceback'."""
    process.join()
    process.said.seek(0)
    text = process.said.read().decode()
    return process.exitcode, 'Traceback' if 'Traceback' in text else text.strip().rpartition('\n')[2]

def refused(status, line):
    return status == 1 and line.startswith('error: ')

def job(folder):
    """The calls by which a user starts the job, or goes on with it, whatever is there already."""
    prepare = prepare_data.main, ['files', '--name', 'tiny', str(folder.parent / 'text.txt')]
    calls = [] if (folder / 'data/tiny/train_000000.bin').exists() else [prepare]
    return *calls, (grow.main, RESUME if (folder / 'run/latest.pt').exists() else GROW)

def outcome(folder):
    """What must be the same: the data set, the tensors of all checkpoints, and the log but for its times."""
    data = {path.name: path.read_bytes() for path in (folder / 'data/tiny').glob('*_*')}
    models = {(path.name, name): tensor.numpy().tobytes() for path in (folder / 'run').glob('*.pt')
              for name, tensor in grow.load(path)['model'].items()}
    log = [row.split(',') for row in (folder / 'run/log.csv').read_text().splitlines()]
    kept = [k for k, name in enumerate(log[0]) if name not in ('seconds', 'tokens_per_s')]
    return data, models, [[row[k] for k in kept] for row in log]

def goes_on(folder, whole):
    """Runs the job to its end; -> whether it has the same result."""
    return ended(start(folder, *job(folder)))[0] == 0 and outcome(folder) == whole

# ------------------------------------------------------------------------------------------------------------
# Faults

def kills(place, whole, count, rng):
    """A quarter of the kills while preparing; each other one in its part of as many of the training."""
    plan, early = grow.phases(grow.configure(GROW)[0]), count // 4
    names = [f'in a {phase.kind} phase' for phase in plan] + ['after the last checkpoint']
    merges = [(k, phase.steps) for k, phase in enumerate(plan) if phase.rank]
    for k in range(count):
        folder, status = place / f'kill{k}', 0
        # After the appearance of this folder, or so many changes of this file, and a random pause (seconds).
        watched, wanted, pause = folder / 'data/tiny', 1, 0.3 * rng.random()
        if k >= early:
            part = (k - early + rng.random()) / (count - early)
            watched, pause = folder / 'run/latest.pt', 0.1 * rng.random()
            wanted = 1 + int(part * (1 + sum(phase.steps + 1 for phase in plan)))
        while status != -signal.SIGKILL:               # it may have ended before: then again
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            process, seen = start(folder, *job(folder)), set()
            while len(seen) < wanted and process.is_alive():
                time.sleep(0.001)
                with contextlib.suppress(FileNotFoundError):
                    seen.add((watched.stat().st_ino, watched.stat().st_mtime_ns))
            time.sleep(pause)
            process.kill()
            status, _ = ended(process)
            pause /= 2
        where = 'while preparing' if len(job(folder)) == 2 else 'before the first checkpoint'
        if (folder / 'run/latest.pt').exists():
            state = grow.load(folder / 'run')['state']
            where = names[state['phase']]
            if (state['phase'], state['step']) in merges:
                where = 'at a merge'
        where += ', in a save' if any(folder.glob('run/.*.pt.*.tmp')) else ''
        note(f'kill -9 {where}', goes_on(folder, whole))
        shutil.rmtree(folder)

def interrupts(place, whole):
    """While a process stands still, others try to work in its folder; then it gets Ctrl-C, and goes on."""
    folder = place / 'interrupted'
    folder.mkdir()
    attempts = [(grow.main, GROW), (grow.main, RESUME)]
    for moment, file, tries in (('while preparing', 'data/tiny/.val*', job(folder)[:1]),
                                ('while training', 'run/stage_1.pt', attempts)):
        process = start(folder, *job(folder))
        while not any(folder.glob(file)) and process.is_alive():
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGSTOP)
        for call in tries:
            end = ended(start(folder, call))
            note(f'a second process {moment}', refused(*end), end[1])
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGCONT)
        status, line = ended(process)
        note(f'Ctrl-C {moment}', status == 130 and line != 'Traceback', line)
    note('going on after Ctrl-C', goes_on(folder, whole))

def full_disks(place, whole):
    """Disks that are full while shards are written, later, and where there is no room for one file more."""
    if os.geteuid() or not shutil.which('mount'):
        return print('full disks: left out, mounting one takes root')
    files = list((place / 'whole/data').rglob('*'))
    data = sum(path.stat().st_size for path in files)
    models = sum(path.stat().st_size for path in (place / 'whole/run').glob('*.pt'))
    limits = [('shards', f'size={int(data * part)}') for part in (0.1, 0.5, 0.9)]
    limits += [('checkpoints', f'size={int(data + 40_000 + models * k / 10)}') for k in (0, 1, 3, 5, 7, 9)]
    limits += [('one file more', f'nr_inodes={2 + len(files) + more}') for more in range(6)]
    for what, limit in limits:
        folder = place / limit
        folder.mkdir()
        subprocess.run(['mount', '-t', 'tmpfs', '-o', limit, 'tmpfs', folder], check=True)
        try:
            if what != 'shards':
                shutil.copytree(place / 'whole/data', folder / 'data')
            end = ended(start(folder, *job(folder)))
            ok = refused(*end) and not list(folder.rglob('.*.tmp'))
            subprocess.run(['mount', '-o', 'remount,size=1g,nr_inodes=10000', folder], check=True)
            note(f'disk full: no room for {what}', goes_on(folder, whole) and ok, end[1])
        finally:
            subprocess.run(['umount', '-l', folder], check=True)

def damages(place, rng):
    """Every kind of file with a bit flipped, cut short, empty, and of another kind: the command that reads it
    must name it in one sentence, end in status 1, and change nothing else."""
    folder = place / 'damaged'
    shutil.copytree(place / 'whole', folder)
    shutil.copytree(HERE.parent / 'interface', folder / 'interface')
    substrate.NGRAMS, substrate.GLYPHS = NGRAMS, NGRAMS.with_name('glyphs.npz')
    check = prepare_data.main, ['--check', 'tiny']
    for name, call in (('data/tiny/train_000000.bin', check), ('data/tiny/val_000000.bin', check),
                       ('data/tiny/part_000000.json', check), ('run/latest.pt', (grow.main, RESUME)),
                       ('run/stage_1.pt', (grow.main, SAMPLE)),
                       ('interface/ngrams.txt', (cli(substrate.read_ngrams), NGRAMS)),
                       ('interface/glyphs.npz', (cli(lambda _: substrate.glyphs()), []))):
        path = folder / name
        raw = path.read_bytes()
        cases = [('other files', part) for part in (Path(__file__).read_bytes(), bytes(1000), b'')]
        cases += [('cut short', raw[:rng.randrange(1, len(raw) - 1)]) for _ in range(16)]
        for at in rng.sample(range(len(raw)), 40):
            flipped = bytes([raw[at] ^ 1 << rng.randrange(8)])
            cases.append(('one bit flipped', raw[:at] + flipped + raw[at + 1:]))
        for kind, damaged in cases:
            path.write_bytes(damaged)
            before = state_of(folder)
            end = ended(start(folder, call))
            ok = refused(*end) and (name in end[1] or 'data/tiny' in end[1]) and state_of(folder) == before
            unnoticed = end[0] == 0 and kind == 'one bit flipped'
            note(f'{name}: {kind}', 'unnoticed' if unnoticed else ok, end[1])
        path.write_bytes(raw)

def state_of(folder):
    """All files in a folder, each with what changes when it is written or replaced."""
    files = [(path, path.stat()) for path in folder.rglob('*') if path.is_file()]
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in files}

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=20, help='how many (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments and the damages (%(default)s)')
    parser.add_argument('--write', action='store_true', help='write results/faults.txt')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rng, memory = random.Random(args.seed), '/dev/shm' if Path('/dev/shm').is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as place:      # in memory: a kill is no power cut
        place = Path(place)
        (place / 'text.txt').write_text('\n'.join(f'once {rng.random()} times' for _ in range(40_000)))
        (place / 'whole').mkdir()
        status, line = ended(start(place / 'whole', *job(place / 'whole')))
        assert status == 0, line
        whole = outcome(place / 'whole')
        kills(place, whole, args.kills, rng)
        interrupts(place, whole)
        full_disks(place, whole)
        damages(place, rng)
    text = as_text([dict(fault=fault, **results) for fault, results in sorted(found.items())])
    print(f'\n{text}')
    if args.write:
        with replacing(HERE / 'faults.txt') as path:
            path.write_text(text)
    sys.exit(any(results['LOST'] for results in found.values()))

if __name__ == '__main__':
    main()
