"""Training speed and peak memory on the device at hand: grown stages, a LoRA phase and the monolithic model, compiled and eager.

    python results/bench.py [flags of grow.py, such as --d_model 512 --context 512]

Every case is a process of its own (so that its peak memory is its own), all in one run, since machines are noisy: read the ratios.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grow
import substrate

CASES = [   # name, phase of the plan, monolithic, flags
    ('grown, stage 1', 0, False, []), ('grown, stage 2', 1, False, []), ('LoRA phase 2', 2, False, []), ('grown, last stage', -1, False, []),
    ('monolithic', 0, True, []),
    ('grown, last stage, eager float32', -1, False, ['--no-compile', '--dtype', 'float32']),
    ('monolithic, eager float32', 0, True, ['--no-compile', '--dtype', 'float32']),
]
STEPS = 12


def measure(phase, monolithic, flags):
    """Trains STEPS steps on random tokens -> tokens/s (median step; the first three warm up) and peak memory above the weights, GiB."""
    c, _ = grow.configure(flags + (['--monolithic'] if monolithic else ['--lora', 'interleaved', '--lora_stages', '2']))
    amp, phase = grow.set_up(c), grow.phases(c)[phase]
    model = grow.GrowingTransformer(c, substrate.substrate('random', c.d_model))
    grow.enter(model, phase)
    model.to(c.device)
    before = memory(c.device)
    if c.compile:
        grow.compile_model(model)
    optimizer = grow.make_optimizer(model, c)
    shape = c.batch_tokens // c.context, c.context
    idx, targets = (torch.randint(0, substrate.VOCAB, shape) for _ in range(2))
    batches = type('OneBatch', (), dict(batch=lambda self, step, rows=None: (idx, targets)))()
    times = []
    for step in range(STEPS):
        start = time.perf_counter()
        grow.train_step(model, optimizer, batches, step, c, amp)     # ends in .item(), so the device has finished
        times.append(time.perf_counter() - start)
    return dict(tokens_per_s=round(c.batch_tokens / statistics.median(times[3:])), peak_above_weights=(grow.peak_memory(c.device) - before) / 2**30,
                flops=sum(grow.flops_per_token(c, phase)) * c.batch_tokens / statistics.median(times[3:]))


def memory(device):
    """Bytes in use now."""
    if device == 'cuda':
        return torch.cuda.memory_allocated()
    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096


def main():
    if sys.argv[1:2] == ['--case']:
        name, phase, monolithic, flags = CASES[int(sys.argv[2])]
        print(json.dumps(measure(phase, monolithic, sys.argv[3:] + flags)))
        return
    rows = []
    for k, (name, *_) in enumerate(CASES):
        run = subprocess.run([sys.executable, __file__, '--case', str(k), *sys.argv[1:]], capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        row = json.loads(run.stdout.splitlines()[-1])
        rows.append(dict(case=name, tokens_per_s=row['tokens_per_s'], GFLOP_per_s=round(row['flops'] / 1e9), peak_GiB_above_weights=row['peak_above_weights']))
        print(f'{name}: {row["tokens_per_s"]:,} tokens/s', flush=True)
    print(run.stdout.splitlines()[0])
    grow.table(rows)


if __name__ == '__main__':
    main()
