"""kill -9 at ten moments between 10% and 95% of a run with a LoRA phase, then --resume: are the weights those of an uninterrupted run?

    python results/kill.py [N] [flags of grow.py]      # prints a line a kill; exit status 1 if any differs

A moment is so many lines of the run's log, then a random part of the time to the next one (a checkpoint is written every 1.2 seconds).
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

REPO = Path(__file__).resolve().parent.parent
SMALL = '''--d_model 64 --heads 2 --context 64 --stage_tokens 20480 --lora interleaved --lora_stages 2 --lora_tokens 10240 --eval_tokens 4096
           --save_every 0.02 --length 5 --device cpu --no-compile'''.split()


def start(folder, *flags):
    return subprocess.Popen([sys.executable, REPO / 'grow.py', '--out', 'run', *flags], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def weights(folder):
    return torch.load(folder / 'run' / 'latest.pt', weights_only=True)['model']


def main():
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    flags = SMALL + sys.argv[2:]
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / 'whole'
        whole.mkdir()
        begin, lines, run = time.time(), [], start(whole, *flags)
        for line in run.stdout:
            lines += [time.time()] * ('tok/s' in line)                 # a line of the log
        run.wait()
        seconds, want, same = lines[-1] - lines[0], weights(whole), 0
        print(f'uninterrupted: {lines[0] - begin:.1f} s to the first of {len(lines)} lines, {seconds:.1f} s to the last; {len(want)} tensors', flush=True)
        for k in range(kills):
            folder = Path(place) / f'kill{k}'
            folder.mkdir()
            shutil.copytree(whole / 'data', folder / 'data')
            share = 0.10 + 0.85 * k / max(1, kills - 1)
            run, left = start(folder, *flags), max(1, int(share * len(lines)))
            while left and (line := run.stdout.readline()):
                left -= 'tok/s' in line
            time.sleep(random.Random(k).random() * seconds / len(lines))
            run.kill()                                 # SIGKILL
            run.communicate()
            resumed = start(folder, '--resume').communicate()[0]
            got = weights(folder)
            equal = got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
            same += equal
            where = next((line for line in resumed.splitlines() if 'resuming' in line or 'finished' in line), resumed[-200:])
            print(f'killed at {share:3.0%} | {where} | {"same bits" if equal else "DIFFERENT"}', flush=True)
            shutil.rmtree(folder)
    print(f'{same} of {kills} equal')
    sys.exit(same != kills)


if __name__ == '__main__':
    main()
