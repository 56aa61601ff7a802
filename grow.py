"""
Growing Transformers on a frozen substrate (arXiv 2507.07129), in one file to read from top to bottom.

A decoder-only language model whose token embeddings are a fixed function of the token (its glyph, or its
number), never trained. It grows: train a few blocks, freeze them, append new ones on top, train only those
and the output layer, repeat. The number of parameters in training, the *active* ones, stays constant.
After a stage, low-rank adapters may readjust all frozen blocks within the same budget, to be merged away;
and models grown apart become one by averaging their logits.

    python grow.py                                  # 9 layers in 3 stages, on text that Python brings along
    python grow.py --layers 9 --substrate unicode   # the same; other substrates: binary, random, learned
    python grow.py --monolithic                     # the baseline: all at once, same data in the same order
    python grow.py --plan --d_model 1024 --heads 32 --context 1024    # the paper's ledger; trains nothing
    python grow.py --sample "The default value"     # continue a text with the newest model
    python grow.py --resume --layers 12             # go on where a run stopped, or grow a finished one deeper
    python grow.py --moe out/001 out/002            # average the logits of two experts
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import inspect
import math
import os
import re
import signal
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare_data
from substrate import (EOS, VOCAB, Parser, Substrate, UserError, cli, digest, replacing, substrate, table,
                       tokenizer, tokenizer_fingerprint)

# ------------------------------------------------------------------------------------------------------------
# Hyperparameters. The paper gives the architecture; optimiser, schedule, batch and births are our choice

@dataclasses.dataclass
class Config:
    """A run. `layers` is the flag --layers, -h shows its comment, and the numbers are those of a laptop."""
    # the model
    layers: int = 9               # blocks of the finished model
    layers_per_stage: int = 3     # blocks that a stage appends and trains; the last stage takes the remainder
    monolithic: bool = False      # train all layers at once, on as many tokens: the baseline
    substrate: str = 'unicode'    # token interface: unicode, binary, random, learned, or a .npy or .pt file
    d_model: int = 128            # width
    heads: int = 4                # attention heads; d_model / heads must be even
    context: int = 128            # tokens that the model sees at once
    head: str = 'seen'            # output rows for tokens that occur in --data (seen), or for all (full)
    birth: str = 'stack'          # later blocks: copies of the topmost ones (stack), or no-ops (identity)
    # the training
    data: tuple = ('stdlib',)     # data sets made by prepare_data.py, mixed in whole-number parts: ru:3 en:1
    stage_tokens: int = 1_000_000  # training tokens of the first stage
    stage_ratio: float = 1.0      # tokens of each later stage over those of the first
    batch_tokens: int = 2048      # tokens of an optimiser step, cut to whole sequences
    micro_batch: int = 16         # at most so many sequences pass the model at once; their gradients add up
    lr: float = 8e-3              # peak learning rate of the matrices in blocks, by Muon
    adam_lr: float = 4e-3         # peak learning rate of all else but adapters, by AdamW
    lr_scale_later: float = 0.7   # factor of both rates from the second stage on
    warmup: int = 30              # steps of linear warm-up of the rates, at most half a phase
    cooldown: float = 0.4         # last part of a phase, over which the rates fall in a line to zero
    weight_decay: float = 0.1     # of matrices in blocks
    clip: float = 1.0             # largest gradient norm
    eval_tokens: int = 100_000    # validate on the first so many tokens of the val split, always the same
    seed: int = 0                 # of weights at birth, data order and sampling
    # adapters
    lora: str = 'none'            # LoRA phases: after every stage from the second (interleaved), or the last
    lora_tokens: int = 400_000    # training tokens of a LoRA phase
    lora_lr: float = 2e-3         # peak learning rate of adapters
    # the run
    out: str = ''                 # folder of the run; else a new out/NNN, to resume or to sample the newest
    resume: bool = False          # go on where --out stands; a finished run grows deeper with larger --layers
    save_every: float = 1.0       # minutes between checkpoints
    device: str = 'cuda' if torch.cuda.is_available() else 'cpu'    # cuda where there is one
    dtype: str = 'auto'           # of matrix products; auto takes bfloat16 where the device has it natively
    compile: bool = True          # torch.compile blocks and head, where there is a compiler
    plan: bool = False            # only print what phases train and cost, with all rows unless --head seen
    moe: tuple = ()               # folders of experts: average their logits and evaluate them on --data
    sample: str = ''              # continue this text with the model in --out or --moe; train nothing
    length: int = 200             # tokens to sample
    temperature: float = 0.7      # of sampling
    top_k: int = 40               # sample among so many of the likeliest tokens

# What changes on a GPU: the paper's model.
GPU = dict(d_model=1024, heads=32, context=1024, head='full', stage_tokens=4_194_304, batch_tokens=32_768,
           lr=6e-4, adam_lr=6e-4, lr_scale_later=1.0, lora_tokens=4_194_304, lora_lr=6e-4,
           eval_tokens=10_000_000, save_every=10.0)

# ------------------------------------------------------------------------------------------------------------
# Model: a pre-norm decoder with rotary positions (paper section 3; pre-norm, eps, weights at birth are ours)

def rotate(x, cos, sin):
    """Rotary position embedding, half-split pairing. x: B, H, T, D; cos, sin: T, D/2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

def attention(q, k, v):
    """Causal attention of q, k, v: B, H, T, D; flash attention on CUDA. On a CPU it is computed in float32,
    in which its backward pass takes a quarter to a sixth of the time that it takes in bfloat16."""
    if q.is_cpu:
        with torch.autocast('cpu', enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

class Block(nn.Module):
    """Attention and MLP, each added to the residual stream: 12 d^2 + 9 d parameters, 12 d^2 of them in
    matrices, as `phases`, `budget` and `flops_per_token` know."""
    def __init__(self, d_model, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                    # each B, H, T, D
        cos, sin = cos[:T].to(q.dtype), sin[:T].to(q.dtype)
        y = attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    @torch.no_grad()
    def reset(self, random):
        """Weights at birth: normal(0, 0.02), the two output projections zero: the block is an exact no-op."""
        for zero in (self.out.weight, self.down.weight, self.up.bias, self.down.bias):
            zero.zero_()
        for linear in (self.qkv, self.up):
            linear.weight.normal_(0, 0.02, generator=random)

def generator(*of):
    """A random generator that depends on `of` alone, so that a resumed run need not remember any."""
    return torch.Generator().manual_seed(int(digest(*of)[:15], 16))

UNSEEN = -25.0   # logit of a token without a row: at birth all of them have one millionth of the mass

class Head(nn.Module):
    """The output layer: a row for each token of `ids`, which ascend, and the constant logit UNSEEN for all
    others, so that the softmax is always over all V = 65,536 tokens (ours: the paper has a row for each).

    head(h) -> logits (..., V); head(h, targets) -> mean loss in nats over targets (N,), -100 not counted."""
    def __init__(self, d_model, ids):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(ids), d_model))
        self.bias = nn.Parameter(torch.zeros(len(ids)))
        self.register_buffer('ids', ids)
        self.register_buffer('row', torch.full((VOCAB,), len(ids)), persistent=False)    # of each token
        self.row[ids] = torch.arange(len(ids))

    def forward(self, h, targets=None):
        logits, others = F.linear(h, self.weight, self.bias).float(), VOCAB - len(self.ids)
        if not others:
            return logits if targets is None else F.cross_entropy(logits, targets)
        if targets is None:
            return F.pad(logits, (0, 1), value=UNSEEN)[..., self.row]
        # All tokens without a row are one more column; each of them gets an equal share of its probability.
        logits = F.pad(logits, (0, 1), value=UNSEEN + math.log(others))
        rows = torch.where(targets < 0, targets, self.row[targets])
        without = (rows == len(self.ids)).sum() / (rows >= 0).sum()    # the part of the targets without a row
        return F.cross_entropy(logits, rows) + without * math.log(others)

    @torch.no_grad()
    def with_rows(self, ids, bias=UNSEEN):
        """A head with a row for each of `ids`, which include its own; new rows are zero, their bias `bias`: a
        number, or one for each of `ids`. As long as that is UNSEEN, it is the same function."""
        head = Head(self.weight.shape[1], ids)
        mine = torch.isin(ids, self.ids)
        head.bias.add_(bias)
        head.weight[mine], head.bias[mine] = self.weight, self.bias
        return head

class GrowingTransformer(nn.Module):
    """A token interface, blocks (none yet: `append` adds them on top), a final LayerNorm, an untied head.

    model(idx) -> logits (B, T, V); model(idx, targets) -> (None, mean loss in nats), without logits. Both are
    int64 (B, T)."""
    def __init__(self, config, interface, ids=()):
        super().__init__()
        self.config, self.interface, self.blocks = config, interface, nn.ModuleList()
        self.norm = nn.LayerNorm(config.d_model)
        self.head = Head(config.d_model, torch.as_tensor(ids, dtype=torch.int64))
        half = config.d_model // config.heads // 2
        angle = torch.outer(torch.arange(config.context), 10_000.0 ** (-torch.arange(half) / half))   # T, D/2
        self.register_buffer('cos', angle.cos(), persistent=False)
        self.register_buffer('sin', angle.sin(), persistent=False)
        # Rows of length 1 become elements of about 1, which learns faster (ours). Bits are 0 and 1 already.
        self.scale = 1.0 if interface.name == 'binary' else math.sqrt(config.d_model)

    def append(self, count):
        """Adds `count` blocks on top: with birth 'stack' copies of the topmost ones, if there are any. Others
        depend on seed and place alone, so that a resumed run gets the same."""
        c, below = self.config, len(self.blocks)
        for k in range(below, below + count):
            block = Block(c.d_model, c.heads)
            if below and c.birth == 'stack':
                block.load_state_dict(self.blocks[k - count].state_dict())
            elif not block.up.weight.is_meta:
                block.reset(generator(c.seed, 'block', k))
            self.blocks.append(block.to(self.head.weight.device))

    def hidden(self, idx):
        """idx (B, T) -> the final LayerNorm's output (B, T, C): what a head reads."""
        x = self.interface(idx) * self.scale
        # Where nothing below needs a gradient, autograd records nothing: a frozen block costs one forward
        # pass and keeps no activations.
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.norm(x)

    def forward(self, idx, targets=None):
        h = self.hidden(idx)
        if targets is None:
            return self.head(h)
        return None, self.head(h.flatten(0, 1), targets.flatten())

def ids_in(batches, c):
    """The tokens that get a row of the head: all, or those that occur in the training splits."""
    if c.head == 'full':
        return torch.arange(VOCAB)
    return sum(torch.from_numpy(dataset.counts) for dataset in batches.datasets).nonzero().flatten()

def add_rows(model, batches):
    """Gives the head a row for each token that has none yet, born as a unigram model (ours): weights zero,
    and as bias the log frequency in the training text, which saves the steps that learning it would take."""
    ids = torch.cat([model.head.ids, ids_in(batches, model.config)]).unique()
    frequencies = prepare_data.unigram_log_probs(batches.datasets, batches.weights)
    model.head = model.head.with_rows(ids, frequencies[ids])

# ------------------------------------------------------------------------------------------------------------
# LoRA: a frozen linear layer learns a low-rank correction, which is then merged away (paper section 4)

LINEARS = 'qkv', 'out', 'up', 'down'   # q, k and v share one adapter: 16 d r parameters a block

class LoRA(nn.Module):
    """W x + b + B A x with the linear layer (W, b) frozen; A (rank, in) is random, B (out, rank) zero: at
    birth an exact no-op. No extra factor alpha / rank (unpublished; ours)."""
    def __init__(self, linear, rank, random=None):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        if not linear.weight.is_meta:
            nn.init.normal_(self.A, 0, linear.in_features**-0.5, generator=random)
        self.to(linear.weight.device)

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B)

def add_adapters(blocks, rank, *seed):
    """Puts an adapter on the linear layers of every block; a run resumed in mid-phase has them already."""
    for k, block in enumerate(blocks):
        for name in LINEARS:
            if not isinstance(getattr(block, name), LoRA):
                setattr(block, name, LoRA(getattr(block, name), rank, generator(*seed, k, name)))

@torch.no_grad()
def merge_adapters(blocks):
    """Adds every adapter to its linear layer and removes it: the model has the parameters it had before."""
    for block in blocks:
        for name in LINEARS:
            lora = getattr(block, name)
            if isinstance(lora, LoRA):
                lora.linear.weight += lora.B @ lora.A
                setattr(block, name, lora.linear)

# ------------------------------------------------------------------------------------------------------------
# Growth: phases, each with its own trainable set (paper section 4), and the ledger that proves the budget

@dataclasses.dataclass
class Phase:
    """A stretch of training with one trainable set, its own optimisers and one schedule."""
    kind: str       # 'grow': new blocks; 'lora': adapters on all blocks
    stage: int      # from 1
    depth: int      # blocks in the model
    trained: int    # how many of them train: the topmost ones
    steps: int      # optimiser steps
    rank: int = 0   # of the adapters on all blocks; 0 = none

def phases(c):
    """The run as a list of phases; the monolithic baseline is one phase over all blocks, of as many steps."""
    depths = [*range(c.layers_per_stage, c.layers, c.layers_per_stage), c.layers]
    plan, below = [], 0
    for stage, depth in enumerate(depths, start=1):
        tokens = c.stage_tokens * (c.stage_ratio if stage > 1 else 1)
        plan.append(Phase('grow', stage, depth, depth - below, max(1, round(tokens / c.batch_tokens))))
        if c.lora == 'interleaved' and stage > 1 or c.lora == 'last' and depth == c.layers:
            # The largest rank at which adapters, 16 d rank a block, are no more than a stage's blocks.
            rank = c.layers_per_stage * (12 * c.d_model + 9) // (16 * depth)
            if not rank:
                raise UserError(f'not even rank 1 on {depth} blocks fits the budget: leave out --lora')
            plan.append(Phase('lora', stage, depth, 0, max(1, c.lora_tokens // c.batch_tokens), rank))
        below = depth
    if c.monolithic:
        return [Phase('grow', 1, c.layers, c.layers, sum(phase.steps for phase in plan))]
    return plan

def enter(model, phase):
    """Appends the phase's new blocks and adapters, and sets what trains: the topmost blocks or all adapters,
    the final LayerNorm, the head. A `learned` interface trains in stage 1, over the budget; others never."""
    model.append(phase.depth - len(model.blocks))
    model.requires_grad_(False)
    for part in (*model.blocks[phase.depth - phase.trained:], model.norm, model.head):
        part.requires_grad_(True)
    if phase.rank:
        add_adapters(model.blocks, phase.rank, model.config.seed, phase.stage)
        for name, p in model.blocks.named_parameters():
            p.requires_grad_(name.endswith(('.A', '.B')))
    over = count(model.parameters(), active=True) - budget(model.config, len(model.head.ids))
    assert over <= 0 or model.config.monolithic, f'{phase} exceeds `budget` by {over:,} active parameters'
    if phase.kind == 'grow' and phase.stage == 1:
        model.interface.requires_grad_(model.interface.name == 'learned')

def budget(c, rows):
    """The most parameters that may train at a time: blocks of a stage, rows of the head, final LayerNorm."""
    d = c.d_model
    return c.layers_per_stage * (12 * d * d + 9 * d) + (d + 1) * rows + 2 * d

def count(parameters, active=False):
    """Number of parameters in all, or of the active (trainable) ones."""
    return sum(p.numel() for p in parameters if p.requires_grad or not active)

def flops_per_token(c, phase, rows):
    """Training FLOPs a token, (blocks, head): 2 a multiply-add, attention causal. A trained block costs its
    forward pass and twice as much backward; a frozen one its forward pass; with adapters also the way back,
    and the adapters' own products. The optimiser's are not counted."""
    matrices, attention = 2 * 12 * c.d_model**2, 2 * c.context * c.d_model
    untrained = matrices + attention
    if phase.rank:
        untrained += matrices + 2 * attention + 3 * 2 * 16 * c.d_model * phase.rank
    blocks = untrained * (phase.depth - phase.trained) + 3 * (matrices + attention) * phase.trained
    return blocks, 3 * 2 * c.d_model * rows

def ledger(c, head_rows=VOCAB):
    """One dict a phase: what is frozen, trains, costs; counted after `enter`, on tensors without memory."""
    rows = []
    with torch.device('meta'):
        model = GrowingTransformer(c, Substrate(c.substrate, c.d_model), torch.arange(head_rows))
        for phase in phases(c):
            enter(model, phase)
            blocks, head = flops_per_token(c, phase, head_rows)
            rows.append(dict(
                phase=phase.kind, stage=phase.stage, layers=phase.depth, frozen=phase.depth - phase.trained,
                trained=phase.trained, rank=phase.rank, active=count(model.parameters(), active=True),
                total=count(model.parameters()), block_flops=blocks, head_flops=head,
                tokens=phase.steps * c.batch_tokens))
            merge_adapters(model.blocks)
    return rows

def print_plan(c, head_rows):
    """The ledger of the grown model, of the monolithic one, and of that with a trainable embedding."""
    for title, changes in (('grown', dict(monolithic=False)), ('monolithic', dict(monolithic=True)),
                           ('monolithic, trainable embedding', dict(monolithic=True, substrate='learned'))):
        rows = ledger(dataclasses.replace(c, **changes), head_rows)
        table(rows)
        blocks, head = (sum(r[kind] * r['tokens'] for r in rows) for kind in ('block_flops', 'head_flops'))
        print(f'{title}: {blocks + head:.3g} training FLOPs, of them {blocks:.3g} in blocks\n')

# ------------------------------------------------------------------------------------------------------------
# Composition: experts trained apart on one interface become one by averaging their logits (paper section 5)

class MixtureOfExperts(nn.Module):
    """The mean of the experts' logits, without routing, as a model to evaluate and to sample from. Heads are
    linear, so that the mean is one linear head on the concatenated hidden states: experts x B x T x V logits
    never exist. It takes the experts apart."""
    def __init__(self, experts):
        super().__init__()
        n = len(experts)
        self.config = dataclasses.replace(experts[0].config, context=min(e.config.context for e in experts))
        ids = torch.cat([e.head.ids for e in experts]).unique()
        heads = [e.head.with_rows(ids) for e in experts]
        self.head = Head(sum(e.config.d_model for e in experts), ids)
        with torch.no_grad():
            self.head.weight.copy_(torch.cat([head.weight / n for head in heads], dim=1))
            self.head.bias.copy_(sum(head.bias for head in heads) / n)
        self.experts = nn.ModuleList(experts)
        self.blocks = [block for e in experts for block in e.blocks]
        for e in experts:
            e.head, e.interface.table = None, experts[0].interface.table

    def hidden(self, idx):
        """idx (B, T) -> B, T, sum of the experts' widths."""
        return torch.cat([e.hidden(idx) for e in self.experts], dim=-1)

    forward = GrowingTransformer.forward

def merge_experts(paths, device='cpu'):
    """The experts in these folders as one model in eval mode. Raises UserError unless they share an
    interface: the tables are compared, not their names; within 1e-5 (ours) they are equal."""
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise UserError('an expert is named twice: a merge takes different ones')
    experts = [load_model(path) for path in paths]
    first = experts[0].interface
    for path, expert in zip(paths, experts):
        other = expert.interface
        if first.table.shape != other.table.shape or (first.table - other.table).abs().max() > 1e-5:
            raise UserError(f'{paths[0]} ({first.name}) and {path} ({other.name}) have no common interface: '
                            'their tables differ; train them with the same --substrate and --d_model')
    if any(not torch.equal(expert.head.ids, experts[0].head.ids) for expert in experts):
        say('note: the experts have rows for different tokens, and what one has no row for becomes all but '
            'impossible in the mean: train experts of different texts with --head full')
    return MixtureOfExperts(experts).to(device).eval()

# ------------------------------------------------------------------------------------------------------------
# Training, phase by phase

LOG_EVERY = 10   # steps
SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}    # Ctrl-C, a cluster's
COLUMNS = ('phase', 'stage', 'step', 'tokens', 'seconds', 'train_loss', 'val_loss', 'lr', 'active_params',
           'total_params', 'tokens_per_s')

def train(model, batches, state, c, amp, moments=None):
    """The main job: grows a model, phase by phase, from where `state` stands. The state is all that a run
    has but weights and optimisers: its place, history and log. `moments`: states of the optimisers, if it
    stands in mid-phase."""
    plan, saved, stop = phases(c), time.monotonic(), []

    def on_signal(number, _):                         # the step is finished; a second signal acts at once
        stop.append(number)
        signal.signal(number, SIGNALS[number])
    if WORLD == 1:                                    # torchrun ends processes in its own way
        for number in SIGNALS:
            signal.signal(number, on_signal)
    while state['phase'] < len(plan):
        # Enter the phase: new blocks on top, what trains, and optimisers over exactly that.
        phase = plan[state['phase']]
        enter(model, phase)
        if c.compile:
            compile_model(model)
        # It does not see blocks that are appended later, so it too is made anew.
        ddp = nn.parallel.DistributedDataParallel(model) if WORLD > 1 else model
        optimizers = make_optimizers(model, c, phase)
        peaks = [group['lr'] for group in groups_of(optimizers)]
        if state['step']:
            for optimizer, its_state in zip(optimizers, moments, strict=True):
                optimizer.load_state_dict(its_state)
        parameters = list(model.parameters())
        sizes = dict(active_params=count(parameters, active=True), total_params=count(parameters))
        say(f'{phase}: {sizes["active_params"]:,} of {sizes["total_params"]:,} parameters are active')

        # Take its steps. The clock stands still while the run is logged, saved and evaluated.
        logged = state['step'], state['seconds']
        while state['step'] < phase.steps:
            clock = time.monotonic()
            set_rates(optimizers, peaks, c, state['step'], phase.steps)
            loss, norm = train_step(ddp, optimizers, batches, state['global_step'], c, amp)
            state['step'] += 1
            state['global_step'] += 1
            state['seconds'] += time.monotonic() - clock
            if state['step'] % LOG_EVERY == 0 or state['step'] == phase.steps:
                speed = (state['step'] - logged[0]) * c.batch_tokens / (state['seconds'] - logged[1])
                to_go = (sum(p.steps for p in plan) - state['global_step']) * c.batch_tokens
                logged = state['step'], state['seconds']
                log(state, c, phase, sizes, train_loss=f'{loss:.5f}', norm=f'{norm:.3f}',
                    lr=f'{groups_of(optimizers)[0]["lr"]:.3e}', tokens_per_s=f'{speed:.0f}',
                    left=timedelta(seconds=int(to_go / speed)))
            if stop or time.monotonic() - saved > 60 * c.save_every:
                save('latest.pt', c, model, state, optimizers)
                saved = time.monotonic()
            if stop:
                raise KeyboardInterrupt(f'stopped: go on with --resume --out {c.out}', 128 + stop[0])

        # Keep its result: adapters are merged, and the model of the stage is saved.
        merge_adapters(model.blocks)
        val = validate(model, batches, c, amp)
        log(state, c, phase, sizes, val_loss=f'{val["val_loss"]:.5f}')
        state['history'].append(dict(
            phase=phase.kind, stage=phase.stage, layers=phase.depth, rank=phase.rank, **sizes,
            tokens=state['global_step'] * c.batch_tokens, seconds=round(state['seconds']), **val))
        state.update(phase=state['phase'] + 1, step=0)
        save(f'stage_{phase.stage}{"_lora" if phase.rank else ""}.pt', c, model, state)
        save('latest.pt', c, model, state)
    for number, default in SIGNALS.items():
        signal.signal(number, default)

def train_step(model, optimizers, batches, step, c, amp):
    """One optimiser step on global batch number `step`, of which each process takes its share of the rows; ->
    (loss, gradient norm) of the whole batch. Raises UserError, with nothing updated, if one is not finite."""
    batch = batches.batch(step, rows=slice(RANK, None, WORLD))
    batch = [(x.pin_memory() if c.device == 'cuda' else x).to(c.device, non_blocking=True) for x in batch]
    micro_batches, loss = list(zip(*(x.split(c.micro_batch) for x in batch))), 0.0
    for k, (idx, targets) in enumerate(micro_batches, start=1):
        # DistributedDataParallel, if it is one, averages gradients over processes with the last one only.
        model.require_backward_grad_sync = k == len(micro_batches)
        with amp:
            part = model(idx, targets)[1] * (len(idx) * WORLD / batches.rows)
        # In this thread: settings of torch.compile are those of a thread.
        with torch.autograd.set_multithreading_enabled(False):
            part.backward()
        loss += part.detach()
    norm = nn.utils.clip_grad_norm_(model.parameters(), c.clip).item()
    loss = over_processes(loss.item()) / WORLD
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(f'loss {loss}, gradient norm {norm} in step {step + 1}: nothing was updated, '
                        f'{c.out}/latest.pt is good; --resume with a lower --lr, --adam_lr or --lora_lr')
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss, norm

def log(state, c, phase, sizes, **row):
    """Prints a row of the log and keeps it; every checkpoint writes OUT/log.csv anew."""
    words = [f'{name} {value}' for name, value in row.items()]
    say(f'{phase.kind} {phase.stage} | step {state["step"]:5d}/{phase.steps} | {" | ".join(words)}')
    row |= dict(phase=phase.kind, stage=phase.stage, step=state['step'], seconds=f'{state["seconds"]:.1f}',
                tokens=state['global_step'] * c.batch_tokens, **sizes)
    state['log'].append(','.join(str(row.get(column, '')) for column in COLUMNS))

# ------------------------------------------------------------------------------------------------------------
# Evaluation and sampling

@torch.no_grad()
def evaluate(model, dataset, c, amp):
    """Mean loss in nats over the first c.eval_tokens of the val split: fixed sequences in fixed order."""
    total = tokens = 0
    for k, batch in enumerate(prepare_data.val_batches(dataset, c.context, c.micro_batch, c.eval_tokens)):
        if k % WORLD == RANK:
            # The last batch gets the shape of the others by targets that do not count.
            missing = c.micro_batch - len(batch[0])
            idx, targets = (F.pad(x, (0, 0, 0, missing), value=y) for x, y in zip(batch, (0, -100)))
            with amp:
                loss = model(idx.to(c.device), targets.to(c.device))[1]
            counted = (targets != -100).sum().item()
            tokens += counted
            total += loss.item() * counted
    return over_processes(total) / over_processes(tokens)

def in_units(loss, dataset):
    """A loss in nats a token -> the three units in which it is read."""
    bits_per_byte = loss / math.log(2) / dataset.bytes_per_token
    perplexity = math.exp(loss) if loss < 709 else math.inf        # else it is too large for a float
    return dict(val_loss=loss, perplexity=perplexity, bits_per_byte=bits_per_byte)

def validate(model, batches, c, amp):
    """The three units, averaged over the data sets by weight, and the loss of each if there are several."""
    each = [in_units(evaluate(model, d, c, amp), d) for d in batches.datasets]
    val = {unit: float(np.average([e[unit] for e in each], weights=batches.weights)) for unit in each[0]}
    val['perplexity'] = in_units(val['val_loss'], batches.datasets[0])['perplexity']
    if len(each) > 1:
        val |= {f'val_{d.name}': e['val_loss'] for d, e in zip(batches.datasets, each)}
    return val

def compare(models, datasets, c, amp):
    """Prints the loss of the models, {name: model}, on every data set, beside baselines that only count."""
    rows = []
    for d in datasets:
        losses = {name: evaluate(model, d, c, amp) for name, model in models.items()}
        losses |= zip(('unigram', 'bigram'), prepare_data.ngram_losses(d, c.context, c.eval_tokens))
        rows += [dict(data=d.name, model=name, **in_units(loss, d)) for name, loss in losses.items()]
    table(rows)

@torch.no_grad()
def sample(model, text, c, amp):
    """Continues `text` by c.length tokens, or to </s>, drawn at c.temperature among the c.top_k likeliest."""
    encoding, random = tokenizer(), torch.Generator().manual_seed(c.seed)
    ids = encoding.encode_ordinary(text) or [EOS]
    start = len(ids)
    # Compiled, every length would be a new graph.
    with torch.compiler.set_stance('force_eager'):
        while len(ids) < start + c.length and (len(ids) == start or ids[-1] != EOS):
            window = torch.tensor([ids[-model.config.context:]], device=model.head.weight.device)
            with amp:
                logits = model.head(model.hidden(window)[:, -1]).cpu()          # 1, V
            values, tokens = logits.topk(min(c.top_k, VOCAB))
            probabilities = ((values - values.max()) / c.temperature).softmax(-1)
            ids.append(tokens[0, torch.multinomial(probabilities, 1, generator=random)].item())
    return encoding.decode(ids[start:], errors='replace')

# ------------------------------------------------------------------------------------------------------------
# Optimiser, device, processes

def make_optimizers(model, c, phase):
    """Fresh ones for every phase, over exactly what trains, so that no stale momentum moves what is frozen:
    Muon for the matrices of blocks, AdamW for adapters and for all else."""
    inner, rest, scale = [], [], c.lr_scale_later if phase.stage > 1 else 1.0
    for name, p in model.named_parameters():
        if p.requires_grad:
            (inner if name.startswith('blocks') and p.dim() == 2 else rest).append(p)
    adamw = [dict(params=rest, lr=c.adam_lr * scale)]
    if phase.rank:
        adamw.insert(0, dict(params=inner, lr=c.lora_lr))
    optimizers = [torch.optim.AdamW(adamw, betas=(0.9, 0.99), weight_decay=0.0, fused=True)]
    if not phase.rank:
        # Its steps have the size of AdamW's, whatever the shape of a matrix (arXiv 2502.16982).
        optimizers.insert(0, torch.optim.Muon(inner, lr=c.lr * scale, weight_decay=c.weight_decay,
                                              adjust_lr_fn='match_rms_adamw'))
    return optimizers

def groups_of(optimizers):
    """The groups of parameters of all optimisers, each with its learning rate."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]

def schedule(c, step, steps):
    """A step's rates over their peaks: linear warm-up, over half a phase at most; 1; linear fall to zero."""
    warmup = min(c.warmup, steps // 2)
    return min((step + 1) / (warmup + 1), 1.0, (steps - step) / (c.cooldown * steps))

def set_rates(optimizers, peaks, c, step, steps):
    """Gives each group of parameters its rate for a step, by `schedule`."""
    for group, peak in zip(groups_of(optimizers), peaks):
        group['lr'] = peak * schedule(c, step, steps)

# torchrun numbers its processes in the environment. Each has the whole model and takes its share of the rows
# of every batch; the first one speaks and writes.
RANK, WORLD, LOCAL_RANK = 0, 1, 0
if 'TORCHELASTIC_RUN_ID' in os.environ:
    RANK, WORLD, LOCAL_RANK = (int(os.environ[name]) for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'))

def say(text):
    """Prints, in the first process alone."""
    if RANK == 0:
        print(text, flush=True)

def over_processes(number):
    """The sum of a number over all processes, which wait for one another here."""
    total = torch.tensor(number, dtype=torch.float64)
    if WORLD > 1:
        torch.distributed.all_reduce(total)
    return total.item()

def set_up(c):
    """Chooses precision and compilation in c and prints them; -> the context of mixed precision."""
    try:
        torch.ones(1, device=f'{c.device}:{LOCAL_RANK}')
    except (AssertionError, RuntimeError):
        raise UserError(f'this machine or this torch has no {c.device} for every process: give --device cpu')
    if c.device == 'cuda':
        torch.cuda.set_device(LOCAL_RANK)
        # The same losses again: torch prefers cuDNN's attention to flash, and its gradients differ by run.
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch.set_float32_matmul_precision('high')        # TF32 on CUDA for what stays float32
    if c.device == 'cpu':
        # The C library hands large buffers back to the system and takes them anew, page by page, in every
        # step: here it keeps them, where it is glibc. -4: M_MMAP_MAX, -1: M_TRIM_THRESHOLD.
        with contextlib.suppress(AttributeError, TypeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)
            mallopt(-1, -1)
    if c.dtype == 'auto':
        # Where it is only emulated, bfloat16 is slower than float32.
        has = torch.cpu.get_capabilities() if c.device == 'cpu' else {}
        native = (c.device == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
                  or any(has.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16')))
        c.dtype = 'bfloat16' if native else 'float32'
    if c.compile:
        try:
            torch.compile(torch.neg)(torch.ones(8, device=c.device))
        except Exception as error:
            c.compile = False
            why = str(error).strip().partition('\n')[0]
            say(f'no compiler works here, so it is slower (--resume --compile tries again): {why}')
    name = torch.cuda.get_device_name() if c.device == 'cuda' else f'{torch.get_num_threads()} threads'
    how = 'compiled' if c.compile else 'eager'
    say(f'device {WORLD} x {c.device} ({name}), {c.dtype}, {how}, torch {torch.__version__}')
    return torch.autocast(c.device, torch.bfloat16, enabled=c.dtype == 'bfloat16')

def compile_model(model):
    """Compiles block by block and in place: blocks share their graphs, so that growing costs nothing."""
    # Frozen or not, with gradient or not, three a rank: more than the usual 8, and never eager in silence.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # This would cut a block's graph where a bucket of gradients ends; blocks are small enough.
    torch._dynamo.config.optimize_ddp = False
    for block in model.blocks:
        block.compile(dynamic=False)
    model.head.compile(dynamic=False)

# ------------------------------------------------------------------------------------------------------------
# Checkpoints: OUT/latest.pt holds all that a bit-exact resume needs, OUT/stage_K.pt the model after a stage,
# OUT/stage_K_lora.pt after the LoRA phase that follows it

def save(name, c, model, state, optimizers=()):
    """Writes OUT/name and OUT/log.csv, each beside its target: a kill or a full disk leaves the old file."""
    if RANK == 0:
        with replacing(Path(c.out) / name) as beside:
            torch.save(dict(config=dataclasses.asdict(c), tokenizer=tokenizer_fingerprint(), state=state,
                            model=model.state_dict(),
                            optimizers=[optimizer.state_dict() for optimizer in optimizers]), beside)
        with replacing(Path(c.out) / 'log.csv') as beside:
            beside.write_text('\n'.join([','.join(COLUMNS), *state['log'], '']))

def load(path):
    """The checkpoint in a file, or the latest in a folder: tensors and plain values, never code."""
    path = Path(path) / 'latest.pt' if Path(path).is_dir() else Path(path)
    try:
        # torch itself loads flipped bits without a word; the price is to read the file twice.
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                raise zipfile.BadZipFile
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'there is no {path}: name the folder of a run, or a checkpoint in it') from None
    except Exception as error:
        raise UserError(f'{path} is damaged or no checkpoint ({type(error).__name__}): restore it') from None
    if (not isinstance(ckpt, dict) or set(ckpt.get('config') or ()) != set(vars(Config()))
            or ckpt.get('tokenizer') != tokenizer_fingerprint()):
        raise UserError(f'{path} is no checkpoint of this grow.py and interface/ngrams.txt: name another')
    if not all(weights.isfinite().all() for weights in ckpt['model'].values()):
        raise UserError(f'{path} holds weights that are not finite: restore it, or name another')
    return ckpt | dict(path=str(path))

def restore(ckpt, c):
    """Checkpoint -> its model under the config c, with its own interface table, and everything frozen."""
    weights = ckpt['model']
    try:
        model = GrowingTransformer(c, Substrate(c.substrate, c.d_model), weights['head.ids'])
        model.append(len({name.split('.')[1] for name in weights if name.startswith('blocks.')}))
        if 'blocks.0.qkv.A' in weights:               # saved in the middle of a LoRA phase
            add_adapters(model.blocks, len(weights['blocks.0.qkv.A']))
        model.load_state_dict(weights)
    except (KeyError, IndexError, RuntimeError):
        raise UserError(f'{ckpt["path"]} does not fit its config: damaged, or of another grow.py') from None
    return model.requires_grad_(False)

def load_model(path, device='cpu'):
    """A run's folder (its latest state) or a checkpoint file -> the model in eval mode, adapters merged."""
    ckpt = load(path)
    model = restore(ckpt, Config(**ckpt['config']))
    if ckpt['state']['step'] or not model.blocks:
        say(f'note: {path} was saved in mid-training: finish it by --resume')
    merge_adapters(model.blocks)
    return model.to(device).eval()

def newest_out():
    """The folder in out/ with the newest checkpoint."""
    newest = max(Path('out').glob('*/latest.pt'), key=lambda path: path.stat().st_mtime, default=None)
    if not newest:
        raise UserError('there is no run in out/ yet: train one by `python grow.py`, or name one by --out')
    return str(newest.parent)

# ------------------------------------------------------------------------------------------------------------
# Command line

CHOICES = dict(head=('seen', 'full'), birth=('stack', 'identity'), lora=('none', 'interleaved', 'last'),
               device=('cpu', 'cuda', 'mps'), dtype=('auto', 'float32', 'bfloat16'))
PROMPT = 'The default value is'
MAY_BE_ZERO = 'seed', 'warmup', 'weight_decay', 'save_every'
# What may stand beside the flag that names a job; --plan and training itself take all else.
JOBS = dict(resume='out layers data micro_batch lr adam_lr lora_lr save_every eval_tokens device dtype '
                   'compile',
            sample='out moe length temperature top_k seed device dtype compile',
            moe='data micro_batch eval_tokens sample length temperature top_k seed device dtype compile')

def configure(argv):
    """Command line -> (Config, the flags that were given). A mistake ends in one sentence, status 2."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = dict(re.findall(r'^    (\w+): .*?  # (.*)$', inspect.getsource(Config), re.MULTILINE))
    for f in dataclasses.fields(Config):
        kind = dict(type=f.type, choices=CHOICES.get(f.name))
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif f.type is tuple:
            kind = dict(nargs='+')
        default = ' '.join(f.default) if f.type is tuple else str(f.default)
        default += f'; {GPU[f.name]} on a GPU' if f.name in GPU else ''
        help = f'{comments[f.name]} ({default})' if default else comments[f.name]
        parser.add_argument(f'--{f.name}', default=argparse.SUPPRESS, help=help, **kind)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    c = Config(**given)
    if c.device != 'cpu':
        c = Config(**GPU | given)
    for job, beside in JOBS.items():
        strays = given.keys() - {job, *beside.split()}
        if given.get(job) not in (None, False) and strays:
            parser.error(f'--{min(strays)} has no place beside --{job}, which takes: {beside}')
    for name, value in vars(c).items():
        if type(value) in (int, float) and not (0 < value < 2**63 or value == 0 and name in MAY_BE_ZERO):
            parser.error(f'--{name} {value}: give a number above zero, and below 2^63')
    if c.d_model % (2 * c.heads):
        parser.error(f'--d_model {c.d_model} must be an even multiple of --heads {c.heads}')
    with torch.device('meta'):
        Substrate(c.substrate, c.d_model)             # refuses a wrong name or width
    c.batch_tokens = max(WORLD, c.batch_tokens // c.context) * c.context
    return c, given

def resumed(c, given):
    """The run in --out -> (its config, with what the flags change, and its checkpoint). --layers and --data
    are for stages to come: raises UserError where they would change what has begun."""
    c.out = c.out or newest_out()
    ckpt = load(c.out)
    old, state = Config(**ckpt['config']), ckpt['state']
    new = dataclasses.replace(old, **{name: getattr(c, name) for name in {'out', *given}})
    if WORLD > new.batch_tokens // new.context:
        raise UserError(f'a batch has {new.batch_tokens // new.context} sequences: give no more processes')
    begun = state['phase'] + (state['step'] > 0)
    if phases(new)[:begun] != phases(old)[:begun] or new.data != old.data and state['step']:
        raise UserError(f'{c.out} cannot go on with --layers {new.layers} --data {" ".join(new.data)}: what '
                        'has begun stays as it is (--monolithic, --lora last and a smaller last stage end a '
                        'run), and other data come in between two stages')
    if new.data != old.data:
        del state['data']
    return new, ckpt

def run(c, given):
    """Trains, or goes on training, and prints the stages, baselines that only count, and a sample."""
    c, ckpt = resumed(c, given) if c.resume else (c, None)
    numbers = [int(path.name) for path in Path('out').glob('*') if path.name.isdecimal()]
    c.out = c.out or f'out/{max(numbers, default=0) + 1:03d}'
    if Path(c.out).is_file() or not ckpt and any(Path(c.out).glob('*.pt')):
        raise UserError(f'{c.out} is a file or holds a run: go on by --resume, or choose another --out')
    if WORLD > 1:
        torch.distributed.init_process_group('cpu:gloo,cuda:nccl' if c.device == 'cuda' else 'gloo')
    amp = set_up(c)
    if given.get('compile') and not c.compile:
        raise UserError('so --compile cannot be obeyed: install a compiler, or give --no-compile')
    for rank in range(WORLD):                         # one after another: the first may have data to prepare
        if rank == RANK:
            batches = prepare_data.open_batches(c.data, c.seed, c.batch_tokens // c.context, c.context)
        over_processes(0)
    state = ckpt['state'] if ckpt else dict(phase=0, step=0, global_step=0, seconds=0.0, history=[], log=[])
    data = digest(*(dataset.fingerprint for dataset in batches.datasets))
    if state.setdefault('data', data) != data:
        raise UserError(f'{c.out} was trained on other text than {" ".join(c.data)} holds now: restore it')
    threads, version = torch.get_num_threads(), str(torch.__version__)
    here = [version, WORLD, threads, c.device, c.dtype, c.compile, c.micro_batch]
    if state.setdefault('machine', here) != here:
        say(f'note: it began on {state["machine"]}, this is {here}: it goes on, but not to the same bits')
    with prepare_data.locked(Path(c.out) / f'.lock{RANK}', f'writing to {c.out}'):
        say(f'checkpoints and log go to {c.out}')
        model = restore(ckpt, c) if ckpt else GrowingTransformer(c, substrate(c.substrate, c.d_model, c.seed))
        add_rows(model, batches)
        model.to(c.device)
        if not ckpt:
            save('latest.pt', c, model, state)
        train(model, batches, state, c, amp, ckpt and ckpt['optimizers'])
    if WORLD > 1:
        # Whoever holds a wrapped model holds the group, whose threads would outlive it and abort the process.
        gc.collect()
        torch.distributed.destroy_process_group()
    if RANK == 0:
        table(state['history'])
        compare({}, batches.datasets, c, amp)         # baselines alone: the losses are in the table
        print(f'\n--- sample\n{PROMPT}{sample(model, PROMPT, c, amp)}')
        print(f'\nsaved; continue any text by: python grow.py --out {c.out} --sample "The default value"')

@cli
def main(argv=None):
    """The command line: prints the plan, samples, compares experts, or trains."""
    c, given = configure(argv)
    if WORLD > 1 and (c.plan or c.moe or 'sample' in given):
        raise UserError('only training takes several processes: leave out torchrun', status=2)
    if c.plan:
        # As in the paper, every token has its row, unless the rows of the data are asked for.
        rows = VOCAB
        if given.get('head') == 'seen':
            rows = len(ids_in(prepare_data.open_batches(c.data, c.seed, 1, c.context), c))
        print_plan(c, rows)
    elif 'sample' in given:
        c.compile = False                             # `sample` is eager, so no compiler need be tried
        amp = set_up(c)
        model = merge_experts(c.moe, c.device) if c.moe else load_model(c.out or newest_out(), c.device)
        print(c.sample + sample(model, c.sample, c, amp))
    elif c.moe:
        amp, models = set_up(c), dict(merged=merge_experts(c.moe, c.device))
        c.context = models['merged'].config.context
        models |= {path: load_model(path, c.device) for path in c.moe}
        compare(models, prepare_data.open_batches(c.data, c.seed, 1, c.context).datasets, c, amp)
    else:
        try:
            run(c, given)
        except RuntimeError as error:
            if not re.search('out of memory|allocate memory|ALLOC_FAILED', str(error)):
                raise
            raise UserError('out of memory: start again, or --resume, with a smaller --micro_batch') from None

if __name__ == '__main__':
    main()
