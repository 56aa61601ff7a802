"""
Training speed and peak memory of grown stages, a LoRA phase, the monolithic model, and a peer of its shapes.

    python results/bench.py --d_model 512 --heads 8 --context 512 --batch_tokens 2048 --micro_batch 4

The flags are those of grow.py. The peer is GPT-NeoX of Hugging Face `transformers` (pip install it), which
has the same architecture but for the head's bias, on a frozen embedding, trained by the same loop. Every case
is a process of its own, with its own peak memory, one after the other, since machines are noisy: read the
ratios. Some 10 minutes. Writes results/bench_DEVICE.csv and .txt; until they are made anew, those are of the
first edition (commit 8146166, where this script also compared with targets).
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
import pictures
from substrate import VOCAB, UserError, cli, substrate

STEPS = 12             # of which three warm up
GROWN, MONO, FULL = ['--lora', 'interleaved'], ['--monolithic'], ['--no-compile', '--dtype', 'float32']
CASES = {              # name: phase of the plan, flags
    'grown, stage 1': (0, GROWN), 'LoRA phase 2': (2, GROWN), 'grown, stage 3': (3, GROWN),
    'monolithic': (0, MONO), 'peer': (0, MONO), 'grown, stage 3, eager float32': (3, GROWN + FULL),
    'monolithic, eager float32': (0, MONO + FULL), 'peer, eager float32': (0, MONO + FULL)}

class Peer(torch.nn.Module):
    """GPT-NeoX as a model of grow.py's loop: all trains but the embedding."""
    def __init__(self, c):
        super().__init__()
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        self.model = GPTNeoXForCausalLM(GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=c.d_model, intermediate_size=4 * c.d_model, rotary_pct=1.0,
            num_hidden_layers=c.layers, num_attention_heads=c.heads, max_position_embeddings=c.context,
            use_parallel_residual=False, attention_bias=False, tie_word_embeddings=False, use_cache=False))
        self.model.gpt_neox.embed_in.requires_grad_(False)

    def forward(self, idx, targets):
        return None, F.cross_entropy(self.model(idx).logits.flatten(0, 1).float(), targets.flatten())

def memory(device, peak):
    """Bytes in use, now or at most so far: of a GPU, or of this process on Linux."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    text = Path('/proc/self/status').read_text()
    return 1024 * int(text.partition('VmHWM:' if peak else 'VmRSS:')[2].split()[0])

def measure(name, flags):
    """Trains on random tokens -> tokens/s and FLOP/s (median step), peak memory above the weights, GiB."""
    at, more = CASES[name]
    c, _ = grow.configure([*flags, *more])
    amp, phase, peer = grow.set_up(c), grow.phases(c)[at], name.startswith('peer')
    if peer:
        model = Peer(c).to(c.device)
    else:
        model = grow.GrowingTransformer(c, substrate('random', c.d_model))
        grow.enter(model, phase)
        model.to(c.device)
    before = memory(c.device, peak=False)
    if c.compile and peer:
        model.compile(dynamic=False)
    elif c.compile:
        grow.compile_model(model)
    rows, times = c.batch_tokens // c.context, []
    idx, targets = (torch.randint(0, VOCAB, (rows, c.context)) for _ in range(2))
    batches = SimpleNamespace(rows=rows, batch=lambda step, rows: (idx[rows], targets[rows]))
    optimizer = grow.make_optimizer(model, c)
    for step in range(STEPS):
        start = time.perf_counter()
        grow.train_step(model, optimizer, batches, step, c, amp)     # it ends when the device has finished
        times.append(time.perf_counter() - start)
    speed = c.batch_tokens / statistics.median(times[3:])
    per_token = sum(grow.flops_per_token(c, phase))
    peak = (memory(c.device, peak=True) - before) / 2**30
    return dict(tokens_per_s=speed, flops=per_token * speed, flops_per_token=per_token, peak=peak)

def matmul_rate(flags):
    """FLOP/s of nothing but the matrix products of a monolithic step, forward and both backward ones."""
    c, _ = grow.configure(flags)
    grow.set_up(c)
    d, rows, seconds, flops = c.d_model, c.micro_batch * c.context, 0, 0
    for fan_in, fan_out in [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)] * c.layers + [(d, VOCAB)]:
        x, w, y = (torch.randn(shape, device=c.device, dtype=getattr(torch, c.dtype))
                   for shape in ((rows, fan_in), (fan_out, fan_in), (rows, fan_out)))
        for a, b in ((x, w.T), (y, w), (y.T, x)):
            took = []
            for _ in range(8):
                start = time.perf_counter()
                (a @ b)[0, 0].item()                   # waits for the device
                took.append(time.perf_counter() - start)
            seconds += statistics.median(took[2:])
            flops += 2 * rows * fan_in * fan_out
    return flops / seconds

@cli
def main(argv=None):
    flags = sys.argv[1:] if argv is None else argv
    if flags[:1] == ['--case']:                        # how this script starts itself
        _, name, *flags = flags
        return print(json.dumps(measure(name, flags) if name in CASES else matmul_rate(flags)))
    (c, _), found = grow.configure(flags), {}
    for name in ('rate', *CASES):
        command = [sys.executable, __file__, '--case', name, *flags]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise UserError(f'{name} failed: {run.stderr.strip().rpartition(chr(10))[2]}')
        found[name] = json.loads(run.stdout.splitlines()[-1])
        print(f'{name}: {run.stdout}', flush=True)
    rate, mono = found.pop('rate'), found['monolithic']
    rows = [dict(case=name, tokens_per_s=round(r['tokens_per_s']), GFLOP_per_s=round(r['flops'] / 1e9),
                 share_of_matmul_rate=r['flops'] / rate, peak_GiB=r['peak'],
                 speed_over_monolithic=r['tokens_per_s'] / mono['tokens_per_s'],
                 expected_by_flops=mono['flops_per_token'] / r['flops_per_token'],
                 peak_over_monolithic=r['peak'] / mono['peak']) for name, r in found.items()]
    lines = (f'matrix products alone: {rate / 1e9:,.0f} GFLOP/s; peaks are above the weights',
             f'torch {torch.__version__}; flags: {" ".join(flags)}')
    pictures.write_tables(HERE / f'bench_{c.device}', rows, *lines)

if __name__ == '__main__':
    main()
