"""
Speed and peak memory of the same work, optimiser steps of 9 layers with 65,536 tokens, by nanoGPT, by Hugging
Face's GPT-NeoX, and by grow.py: monolithic, in its last stage, in its last LoRA phase.

    pip install transformers; git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python results/bench.py --nanogpt ../nanoGPT               # with --d_model 512 a table of its own

Other flags are grow.py's, whose loop trains all: forward, backward, clip, step, as in nanoGPT's. Peers: as
they start on a CPU (`eager float32`), and `tuned`, compiled as one graph, bfloat16 where the device has it,
with grow.py's use of memory and a fused AdamW. GPT-NeoX is grow.py's model but for the head's bias; nanoGPT
trains its embedding, tied to the head. `full`: an output row for each token; `by AdamW`: as the peers,
without Muon; `seen`: rows for --rows tokens, in text of those. A case is a process; machines are noisy, so
all run twice: the faster median, the smaller peak. 15 minutes. Writes results/bench_DEVICE_WIDTH.*;
bench_cpu.* and bench_cuda.* are of the first edition.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from timeit import repeat
from types import SimpleNamespace

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
import pictures
from substrate import VOCAB, Parser, UserError, cli, substrate

DEFAULTS = '--layers 9 --d_model 256 --heads 8 --context 256 --batch_tokens 2048 --micro_batch 8'.split()
EAGER, OURS = 'eager float32', {'monolithic': 0, 'last stage': -2, 'LoRA phase': -1}     # places in the plan
CASES = [f'{kind}, {how}' for kind in ('nanoGPT', 'GPT-NeoX') for how in (EAGER, 'tuned')]
CASES += ['monolithic, full by AdamW', *(f'{kind}, {how}' for how in ('full', 'seen') for kind in OURS)]

class NeoX(torch.nn.Module):
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

def build(kind, how, c, phase, rows, nanogpt):
    """-> (model, optimisers, context of mixed precision)."""
    # The model comes first: set_up has the C library keep what is freed, and training would use it uncounted.
    if kind == 'nanoGPT':
        sys.path.insert(0, nanogpt)
        from model import GPT, GPTConfig
        model = GPT(GPTConfig(c.context, VOCAB, c.layers, c.heads, c.d_model, dropout=0.0, bias=True))
    elif kind == 'GPT-NeoX':
        model = NeoX(c)
    else:
        model = grow.GrowingTransformer(c, substrate('random', c.d_model), torch.arange(rows))
        grow.enter(model, phase)
    model.to(c.device)
    amp = torch.autocast(c.device, enabled=False) if how == EAGER else grow.set_up(c)
    if kind in OURS:
        if c.compile:
            grow.compile_model(model)
        if how != 'full by AdamW':
            return model, grow.make_optimizers(model, c, phase), amp
    else:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_cudnn_sdp(True)
        if how == 'tuned' and c.compile:
            model.compile(fullgraph=True, dynamic=False)         # an error, should any part stay eager
    if kind == 'nanoGPT':
        device = 'cuda' if how == 'tuned' else c.device          # for which alone it takes the fused AdamW
        return model, [model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)], amp
    return model, [torch.optim.AdamW(model.parameters(), 6e-4, (0.9, 0.95), fused=True)], amp

def peak(device):
    """The most bytes in use since the last call: of a GPU, or of this process on Linux."""
    if device == 'cuda':
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        most = 1024 * int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])
        Path('/proc/self/clear_refs').write_text('5')
    return most

def measure(args, c):
    """Trains on random tokens -> tokens/s (median step), FLOP/s, peak bytes above the weights."""
    kind, how = args.case.split(', ')
    c.lora, c.monolithic, rows = 'interleaved', not OURS.get(kind), args.rows if how == 'seen' else VOCAB
    phase = grow.phases(c)[OURS.get(kind, 0)]
    model, optimizers, amp = build(kind, how, c, phase, rows, args.nanogpt)
    _, before, sequences = peak(c.device), peak(c.device), c.batch_tokens // c.context
    both = torch.randint(0, rows, (2, sequences, c.context))     # inputs and targets
    batches = SimpleNamespace(rows=sequences, batch=lambda step, rows: both[:, rows])
    times = repeat(lambda: grow.train_step(model, optimizers, batches, 0, c, amp), number=1, repeat=12)
    speed, most = c.batch_tokens / median(times[3:]), peak(c.device) - before
    return dict(speed=speed, flops=speed * sum(grow.flops_per_token(c, phase, rows)), peak=most)

def matmul_rate(c):
    """FLOP/s of nothing but the matrix products of a monolithic step, forward and both backward ones."""
    grow.set_up(c)
    d, rows, seconds = c.d_model, c.micro_batch * c.context, 0
    for fan_in, fan_out in [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)] * c.layers + [(d, VOCAB)]:
        x, w, y = (torch.randn(shape, device=c.device, dtype=getattr(torch, c.dtype))
                   for shape in ((rows, fan_in), (fan_out, fan_in), (rows, fan_out)))
        for a, b in ((x, w.T), (y, w), (y.T, x)):                # .item() waits for the device
            seconds += median(repeat(lambda: (a @ b)[0, 0].item(), number=1, repeat=8)[2:])
    return dict(speed=0, flops=6 * rows * (12 * d * d * c.layers + d * VOCAB) / seconds, peak=0)

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--nanogpt', default='', metavar='FOLDER', help='a clone of nanoGPT')
    parser.add_argument('--rows', type=int, default=1595, help='of the head (1595, as occur in stdlib)')
    parser.add_argument('--case', help=argparse.SUPPRESS)        # how this script starts itself
    args, flags = parser.parse_known_args(argv)
    c, _ = grow.configure([*DEFAULTS, *flags])
    if args.case:
        return print(json.dumps(matmul_rate(c) if args.case == 'rate' else measure(args, c)))
    if not 0 < args.rows <= VOCAB or args.nanogpt and not Path(args.nanogpt, 'model.py').exists():
        raise UserError(f'give --rows of 1 to {VOCAB:,}, and a --nanogpt that has a model.py', status=2)
    if not args.nanogpt:
        print('nanoGPT is left out: git clone https://github.com/karpathy/nanoGPT, then --nanogpt its folder')
    cases, best = CASES[0 if args.nanogpt else 2:], {}
    for name in 2 * ['rate', *cases]:
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), '--case', name]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise UserError(f'{name} failed: {run.stderr.strip().rpartition(chr(10))[2]}')
        *said, last = run.stdout.splitlines()
        print(f'{name}: {last}', flush=True)
        pair = json.loads(last), best.get(name, json.loads(last))
        best[name] = {key: (min if key == 'peak' else max)(r[key] for r in pair) for key in pair[0]}
    rate, base, rows = best.pop('rate')['flops'], cases[bool(args.nanogpt and c.device != 'cpu')], []
    for name, r in best.items():
        full = r['speed'] / best[name.replace('seen', 'full')]['speed'] if 'seen' in name else ''
        rows.append(dict(case=name, tokens_per_s=round(r['speed']), GFLOP_per_s=round(r['flops'] / 1e9),
                         share_of_matmul_rate=r['flops'] / rate, peak_GiB=r['peak'] / 2**30,
                         over_peer=r['speed'] / best[base]['speed'], over_full=full))
    lines = (f'{said[-1]}; matrix products alone: {rate / 1e9:,.0f} GFLOP/s; peaks are above the weights',
             f'over_peer: tokens/s over those of {base}; over_full: over those of the same with a full head',
             ' '.join(f'{flag} {getattr(c, flag[2:])}' for flag in DEFAULTS[::2]) + f' --rows {args.rows}')
    pictures.write_tables(HERE / f'bench_{c.device}_{c.d_model}', rows, *lines)

if __name__ == '__main__':
    main()
