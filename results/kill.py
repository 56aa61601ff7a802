"""kill -9 at ten moments of a run with a LoRA phase, then --resume: are the weights those of an uninterrupted run?

    python results/kill.py [N] [flags of grow.py]      # prints a line a kill; exit status 1 if any differs
"""

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
        begin = time.time()
        run = start(whole, *flags)
        for line in run.stdout:
            if line.startswith('grow 1:'):
                begin_training = time.time() - begin
        run.wait()
        seconds, want, same = time.time() - begin, weights(whole), 0
        print(f'uninterrupted: {seconds:.1f} s, {len(want)} tensors; training begins after {begin_training:.1f} s', flush=True)
        for k in range(kills):
            folder = Path(place) / f'kill{k}'
            folder.mkdir()
            shutil.copytree(whole / 'data', folder / 'data')
            moment = begin_training + (seconds - begin_training) * (0.10 + 0.85 * k / max(1, kills - 1))
            run = start(folder, *flags)
            time.sleep(moment)
            run.kill()                                 # SIGKILL
            run.communicate()
            resumed = start(folder, '--resume').communicate()[0]
            got = weights(folder)
            equal = got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
            same += equal
            where = next((line for line in resumed.splitlines() if 'resuming' in line or 'finished' in line), resumed[-200:])
            print(f'killed after {moment:5.1f} s | {where} | {"same bits" if equal else "DIFFERENT"}', flush=True)
            shutil.rmtree(folder)
    print(f'{same} of {kills} equal')
    sys.exit(same != kills)


if __name__ == '__main__':
    main()
