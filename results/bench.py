"""Training speed and peak memory on the device at hand: grown stages, a LoRA phase, the monolithic model, and a peer of the same shapes.

    python results/bench.py --d_model 512 --heads 8 --context 512 --batch_tokens 2048 --micro_batch 4      # flags of grow.py; some 10 minutes

The peer is GPT-NeoX of Hugging Face `transformers` (pip install transformers), which has the same architecture but for the head's bias, on a
frozen embedding, trained by the same loop. Every case is a process of its own (so that its peak memory is its own), all in one run, since
machines are noisy: read the ratios. Writes results/bench_DEVICE.csv and results/bench_DEVICE.txt.
"""

import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
import pictures
import substrate
from substrate import replacing

MONO, EAGER, FULL = ['--monolithic'], ['--no-compile'], ['--no-compile', '--dtype', 'float32']
CASES = {   # name: (phase of the plan, flags, whether it is the peer)
    'grown, stage 1': (0, [], False), 'grown, stage 2': (1, [], False), 'LoRA phase 2': (2, [], False), 'grown, last stage': (-1, [], False),
    'monolithic': (0, MONO, False), 'peer': (0, MONO, True), 'monolithic, eager': (0, MONO + EAGER, False),
    'grown, last stage, eager float32': (-1, FULL, False), 'monolithic, eager float32': (0, MONO + FULL, False), 'peer, eager float32': (0, MONO + FULL, True),
}
STEPS = 12


class Peer(torch.nn.Module):
    """GPT-NeoX as a model of grow.py's loop: all blocks, the final LayerNorm and the output layer train, the embedding does not."""

    def __init__(self, c):
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        super().__init__()
        self.model = GPTNeoXForCausalLM(GPTNeoXConfig(
            vocab_size=substrate.VOCAB, hidden_size=c.d_model, num_hidden_layers=c.layers, num_attention_heads=c.heads, intermediate_size=4 * c.d_model,
            rotary_pct=1.0, max_position_embeddings=c.context, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=False, use_cache=False))
        self.model.gpt_neox.embed_in.requires_grad_(False)

    def forward(self, idx, targets):
        return None, F.cross_entropy(self.model(idx).logits.flatten(0, 1).float(), targets.flatten())


def measure(phase, flags, peer):
    """Trains STEPS steps on random tokens -> tokens/s (median step; the first three warm up), FLOP/s, and peak memory above the weights, GiB."""
    c, _ = grow.configure(flags + (['--lora', 'interleaved', '--lora_stages', '2'] if '--monolithic' not in flags else []))
    amp, phase = grow.set_up(c), grow.phases(c)[phase]
    if peer:
        model = Peer(c).to(c.device)
    else:
        model = grow.GrowingTransformer(c, substrate.substrate('random', c.d_model))
        grow.enter(model, phase)
        model.to(c.device)
    before = memory(c.device)
    if c.compile and peer:
        model.compile(dynamic=False)
    elif c.compile:
        grow.compile_model(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True) if peer else grow.make_optimizer(model, c)
    shape = c.batch_tokens // c.context, c.context
    idx, targets = (torch.randint(0, substrate.VOCAB, shape) for _ in range(2))
    batches = type('OneBatch', (), dict(batch=lambda self, step, rows=slice(None): (idx[rows], targets[rows])))()
    times = []
    for step in range(STEPS):
        start = time.perf_counter()
        grow.train_step(model, optimizer, batches, step, c, amp)     # ends in .item(), so the device has finished
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[3:])
    return dict(tokens_per_s=c.batch_tokens / seconds, flops=sum(grow.flops_per_token(c, phase)) * c.batch_tokens / seconds,
                peak=(grow.peak_memory(c.device) - before) / 2**30, flops_per_token=sum(grow.flops_per_token(c, phase)))


def matmul_rate(flags):
    """FLOP/s of nothing but the matrix products of a monolithic step, forward and both backward ones, in the training's precision."""
    c, _ = grow.configure(flags)
    grow.set_up(c)
    dtype, d, rows = getattr(torch, c.dtype), c.d_model, c.micro_batch * c.context
    seconds = flops = 0
    for fan_in, fan_out, times in ((d, 3 * d, c.layers), (d, d, c.layers), (d, 4 * d, c.layers), (4 * d, d, c.layers), (d, substrate.VOCAB, 1)):
        x, w, y = (torch.randn(*shape, device=c.device, dtype=dtype) for shape in ((rows, fan_in), (fan_out, fan_in), (rows, fan_out)))
        for product in (lambda: x @ w.T, lambda: y @ w, lambda: y.T @ x):
            took = []
            for _ in range(8):
                start = time.perf_counter()
                product()
                if c.device == 'cuda':
                    torch.cuda.synchronize()
                took.append(time.perf_counter() - start)
            seconds, flops = seconds + times * statistics.median(took[2:]), flops + times * 2 * rows * fan_in * fan_out
    return flops / seconds


def memory(device):
    """Bytes in use now."""
    if device == 'cuda':
        return torch.cuda.memory_allocated()
    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096


def verdicts(rows, rate):
    """The targets, each with what was measured."""
    mono, last, peer = rows['monolithic'], rows['grown, last stage'], rows['peer']
    speedup, predicted = last['tokens_per_s'] / mono['tokens_per_s'], mono['flops_per_token'] / last['flops_per_token']
    for what, value, target, better in (
            ('share of the matmul rate, monolithic', mono['flops'] / rate, 0.70, 'at least'),
            ('tokens/s against the peer, both as in training', mono['tokens_per_s'] / peer['tokens_per_s'], 1.0, 'at least'),
            ('tokens/s (compiled, as in training) against the peer as it starts on a CPU, eager and float32', mono['tokens_per_s'] / rows['peer, eager float32']['tokens_per_s'], 3.0, 'at least'),
            (f'speed-up of a grown last stage ({speedup:.2f}) against what its FLOPs predict ({predicted:.2f})', speedup / predicted, 0.95, 'at least'),
            ('its peak memory above the weights against monolithic', last['peak'] / mono['peak'], 0.75, 'at most')):
        met = value >= target if better == 'at least' else value <= target
        yield f'{what}: {value:.2f}, target {better} {target:.2f}: {"met" if met else "NOT met"}'


def main():
    if sys.argv[1:2] == ['--case']:
        name, flags = sys.argv[2], sys.argv[3:]
        print(json.dumps(matmul_rate(flags) if name == 'rate' else measure(CASES[name][0], flags + CASES[name][1], CASES[name][2])))
        return
    found = {}
    for name in ('rate', *CASES):
        run = subprocess.run([sys.executable, __file__, '--case', name, *sys.argv[1:]], capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        found[name] = json.loads(run.stdout.splitlines()[-1])
        print(name, 'done', flush=True)
        if name == 'rate':
            about = run.stdout.splitlines()[0]
    rate = found.pop('rate')
    table = [dict(case=name, tokens_per_s=round(row['tokens_per_s']), GFLOP_per_s=round(row['flops'] / 1e9), share_of_matmul_rate=row['flops'] / rate,
                  peak_GiB_above_weights=row['peak']) for name, row in found.items()]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        print(f'{about}; flags: {" ".join(sys.argv[1:])}\nmatrix products alone: {rate / 1e9:,.0f} GFLOP/s\n')
        grow.table(table)
        print('', *verdicts(found, rate), sep='\n')
    print(text.getvalue())
    stem = HERE / f'bench_{grow.configure(sys.argv[1:])[0].device}'
    with replacing(f'{stem}.txt') as path:
        path.write_text(text.getvalue())
    pictures.write_csv(f'{stem}.csv', table)


if __name__ == '__main__':
    main()
