"""
Growing Transformers on a frozen substrate (arXiv 2507.07129), in one file to read from top to bottom.

A decoder-only language model whose token embeddings are a fixed function of the token (its glyph, or its number) and are
never trained. It grows: train a few blocks, freeze them, append new ones on top, train only those and the output layer, repeat.
The number of parameters in training, the *active* ones, stays constant while the model gets deeper. In between, low-rank adapters
may readjust all frozen blocks within the same budget and are merged away; models grown apart become one by averaging their logits.

    python grow.py                                      # grow 9 layers in 3 stages on text that every Python brings along
    python grow.py --layers 9 --substrate unicode       # the same, spelled out; other substrates: binary, random, learned
    python grow.py --monolithic                         # the baseline: all 9 layers at once, same data in the same order
    python grow.py --plan --d_model 1024 --heads 32 --context 1024 --stage_ratio 1      # the paper's ledger; trains nothing
    python grow.py --sample "The default value"         # continue a text with the newest model
    python grow.py --grow_from out/001 --layers 12      # grow a finished model deeper
    python grow.py --moe out/001 out/002 --data a b     # average the logits of two experts, compare them on two data sets
    torchrun --nproc_per_node 2 grow.py                 # train by two processes: the same batches, each half of their rows

It is not a fast path to a good chat model, and it reads no checkpoint of the paper's authors.
"""

import argparse
import ctypes
import dataclasses
import io
import itertools
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
import zipfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare_data
from substrate import EOS, VOCAB, Parser, Substrate, UserError, cli, digest, replacing, substrate, tokenizer, tokenizer_fingerprint

# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters. The command line is made from this block: `layers` is `--layers 9`. A default of None depends on the
# device (PRESETS below). The paper gives the architecture; optimiser, schedule, batch and births are this project's choice.

def opt(default, help, *allowed):
    """A hyperparameter: default, meaning, and what is allowed: lowest and highest number, or the words to choose from."""
    return field(default=default, metadata=dict(help=help, allowed=allowed))

@dataclass
class Config:
    """Every hyperparameter of a run; a checkpoint carries it as a plain dict."""
    # the model
    layers: int = opt(9, 'blocks of the finished model', 1, 1000)
    layers_per_stage: int = opt(3, 'blocks that a stage appends and trains; the last stage takes the remainder', 1, 1000)
    monolithic: bool = opt(False, 'train all layers at once, on as many tokens: the baseline')
    restarts: bool = opt(False, 'monolithic: begin optimiser and schedule anew where a grown run does')
    substrate: str = opt('unicode', 'token interface: unicode, binary, random, learned (the only one that trains), or a .npy or .pt file')
    d_model: int = opt(None, 'width', 16, 16384)
    heads: int = opt(None, 'attention heads; d_model / heads must be even', 1, 1024)
    context: int = opt(None, 'tokens that the model sees at once', 8, 65536)
    birth: str = opt('identity', 'new blocks: random; identity (output projections zero: an exact no-op); copy (of the block below)',
                     'random', 'identity', 'copy')
    head_birth: str = opt('unigram', 'output layer: weights zero and bias = log frequency of each token; or random', 'unigram', 'random')
    # the training
    data: tuple = opt(('stdlib',), 'data sets in data/, made by prepare_data.py; several are mixed in whole-number proportions: ru:3 en:1')
    stage_tokens: int = opt(None, 'training tokens of a stage (of the mean stage); not given: at most four epochs of the data in all', 1, 10**12)
    stage_ratio: float = opt(None, 'tokens of each later stage over those of the first', 0.01, 100)
    batch_tokens: int = opt(None, 'tokens of an optimiser step', 1, 10**8)
    micro_batch: int = opt(None, 'sequences that pass the model of a process at once; gradients add up over the rest of the batch', 1, 10**5)
    lr: float = opt(None, 'peak learning rate of the blocks', 1e-8, 1)
    head_lr: float = opt(None, 'peak learning rate of the output layer', 1e-8, 1)
    lr_later: float = opt(None, 'peak learning rate of the blocks in every later phase, and with --grow_from', 1e-8, 1)
    head_lr_later: float = opt(None, 'the same of the output layer, which is trained already; also with --tune_heads', 1e-8, 1)
    warmup: int = opt(10, 'steps of linear warm-up in every phase; then a cosine to a tenth of the peak', 0, 10**6)
    weight_decay: float = opt(0.1, 'AdamW weight decay of matrices in blocks', 0, 1)
    clip: float = opt(1.0, 'largest gradient norm', 1e-6, 1e6)
    eval_tokens: int = opt(None, 'validate on the first so many tokens of the val split, always the same', 1, 10**12)
    seed: int = opt(0, 'of weights at birth, data order and sampling', 0, 2**31 - 1)
    # LoRA
    lora: str = opt('none', 'low-rank adapters on frozen blocks: in phases of their own after stages (interleaved), or beside new blocks (joint)',
                    'none', 'interleaved', 'joint')
    lora_stages: str = opt('all', 'stages that a LoRA phase follows, such as 2,3; all: every one from the second')
    lora_tokens: int = opt(None, 'training tokens of a LoRA phase', 1, 10**12)
    lora_rank: int = opt(16, 'rank of joint adapters; interleaved ones are as large as the budget allows', 1, 10**5)
    lora_lr: float = opt(None, 'peak learning rate of adapters', 1e-8, 1)
    # experts
    moe: tuple = opt((), 'folders of two or more trained experts: average their logits and evaluate on every --data')
    tune_heads: int = opt(0, 'then train the output layer of the merged model on so many tokens of mixed --data', 0, 10**12)
    allow_mismatch: bool = opt(False, 'merge experts whose interfaces differ: each reads through its own')
    # the run
    out: str = opt(None, 'folder of checkpoints and log; default: a new out/NNN, and the newest for --resume and --sample')
    resume: bool = opt(False, 'go on with the run in --out exactly where its last checkpoint stands')
    grow_from: str = opt(None, 'grow the finished model in this folder deeper, to --layers, on --data')
    save_every: float = opt(None, 'minutes between checkpoints', 0, 10**4)
    device: str = opt('auto', 'auto takes cuda where there is one', 'auto', 'cpu', 'cuda', 'mps')
    dtype: str = opt('auto', 'of matrix products; auto takes bfloat16 where the device has it natively', 'auto', 'float32', 'bfloat16')
    compile: bool = opt(None, 'torch.compile the blocks and the loss; default: where a compiler is found')
    plan: bool = opt(False, 'print the ledger of parameters, FLOPs and tokens; train nothing')
    # sampling
    sample: str = opt(None, 'continue this text with the model in --out; train nothing')
    length: int = opt(200, 'tokens to sample', 1, 10**6)
    temperature: float = opt(0.7, 'of sampling', 0.01, 100)
    top_k: int = opt(40, 'sample among so many of the likeliest tokens', 1, VOCAB)
    # not a flag: the depth and stage that --grow_from found
    born_layers: int = 0
    born_stage: int = 0

PRESETS = {
    'laptop': dict(d_model=256, heads=8, context=64, stage_tokens=131_072, stage_ratio=0.1, batch_tokens=512, micro_batch=8,
                   lr=3e-3, head_lr=1e-2, lr_later=1e-3, head_lr_later=5e-4, lora_tokens=131_072, lora_lr=1e-3,
                   eval_tokens=32_768, save_every=1.0),
    'gpu': dict(d_model=1024, heads=32, context=1024, stage_tokens=4_194_304, stage_ratio=1.0, batch_tokens=32_768, micro_batch=16,
                lr=6e-4, head_lr=6e-4, lr_later=6e-4, head_lr_later=6e-4, lora_tokens=4_194_304, lora_lr=6e-4,
                eval_tokens=10**12, save_every=10.0),      # the paper's model
}

# ---------------------------------------------------------------------------------------------------------------------
# Model: a pre-norm decoder with rotary positions (paper section 3; pre-norm, eps and initial weights are our choice)

def rotate(x, cos, sin):
    """Rotary position embedding, half-split pairing. x: B, H, T, D; cos, sin: T, D/2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

class Block(nn.Module):
    """Attention and MLP, each added to the residual stream. 12 d^2 + 9 d parameters: 12,592,128 at d_model 1024."""

    def __init__(self, d_model, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x, cos, sin):  # x: B, T, C
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # each B, H, T, D
        cos, sin = cos[:T].to(q.dtype), sin[:T].to(q.dtype)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)      # flash on CUDA
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    @torch.no_grad()
    def reset(self, birth, std_out, generator):
        """The weights at birth: normal(0, 0.02), the two output projections smaller, or zero (`identity`: an exact no-op)."""
        if self.up.weight.is_meta:
            return
        for linear in (self.qkv, self.up):
            linear.weight.normal_(0, 0.02, generator=generator)
        for linear in (self.out, self.down):
            linear.weight.normal_(0, std_out, generator=generator).mul_(birth != 'identity')
        self.up.bias.zero_()
        self.down.bias.zero_()

def generator(*of):
    """A random generator that depends on `of` alone, so that nothing random needs to be remembered over a kill."""
    return torch.Generator().manual_seed(int(digest(*of)[:15], 16))

SLICE = 4096   # tokens of the vocabulary whose logits exist at once

def slice_logits(h, weight, bias):
    """h (N, d), weight (S, d), bias (S,) of a slice of the head -> its logits (N, S) in float32."""
    return F.linear(h, weight.to(h.dtype), bias.to(h.dtype)).float()

def slice_logsumexp(h, weight, bias):
    """-> log sum exp of the logits of a slice (N,)."""
    return slice_logits(h, weight, bias).logsumexp(1)

def slice_gradients(h, weight, bias, logsumexp, g):
    """The part of a slice in the gradients of h, weight and bias, less the one-hot; logsumexp of all logits (N,), g: of the losses (N,)."""
    p = ((slice_logits(h, weight, bias) - logsumexp[:, None]).exp() * g[:, None]).to(h.dtype)             # N, S: g softmax
    return p @ weight.to(h.dtype), p.T @ h, p.float().sum(0)

class HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies (nats) of h (N, d) under the linear head, weight (V, d) and bias (V,), for targets (N,); -100 does not count.

    The head passes in slices, so N x 65,536 logits never exist at once: they stay in a CPU's cache and spare a GPU's memory. The price is
    to compute them twice, for the log sum exp and for the gradient, which is softmax - one-hot. The two functions above come as arguments,
    since `compile_model` puts compiled ones in their place."""

    @staticmethod
    def forward(ctx, h, weight, bias, targets, slice_logsumexp, slice_gradients):
        device = h.device.type
        x = h.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype)
        slices = zip(weight.split(SLICE), bias.split(SLICE))
        logsumexp = torch.stack([slice_logsumexp(x, w, b) for w, b in slices]).logsumexp(0)               # N
        counted, targets = targets != -100, targets.clamp(min=0)
        ctx.save_for_backward(h, x, weight, bias, targets, counted, logsumexp)
        ctx.slice_gradients = slice_gradients
        return ((logsumexp - (h * weight[targets]).sum(1) - bias[targets]) * counted).sum()

    @staticmethod
    def backward(ctx, g):
        h, x, weight, bias, targets, counted, logsumexp = ctx.saved_tensors
        g = g * counted                                                                                   # N
        to_h, to_weight, to_bias = -g[:, None] * weight[targets], torch.empty_like(weight), torch.empty_like(bias)      # less the one-hot
        for first in range(0, len(bias), SLICE):
            at = slice(first, first + SLICE)
            part, to_weight[at], to_bias[at] = ctx.slice_gradients(x, weight[at], bias[at], logsumexp, g)
            to_h += part
        return to_h, to_weight.index_add_(0, targets, -g[:, None] * h), to_bias.index_add_(0, targets, -g), None, None, None

class GrowingTransformer(nn.Module):
    """A token interface, blocks (none at birth: `append` adds them on top), a final LayerNorm and an untied output layer.

    model(idx) -> logits (B, T, V);  model(idx, targets) -> (None, mean loss in nats);  idx, targets: int64 (B, T).
    """

    def __init__(self, config, interface):
        super().__init__()
        self.config, self.interface, self.blocks = config, interface, nn.ModuleList()
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, VOCAB)
        half = config.d_model // config.heads // 2
        angle = torch.outer(torch.arange(config.context), 10_000.0 ** (-torch.arange(half) / half))       # T, D/2
        self.register_buffer('cos', angle.cos(), persistent=False)
        self.register_buffer('sin', angle.sin(), persistent=False)
        self.slices = slice_logsumexp, slice_gradients                                                    # compiled below
        # Rows of length 1 become elements of about 1, which learns far faster (our choice; a learned table, born at 0.02, is scaled alike, as
        # in the first transformer, and a file's rows should have length 1 too). The bits of the code are 0 and 1 already.
        self.scale = 1.0 if interface.name == 'binary' else math.sqrt(config.d_model)

    def append(self, count):
        """Adds `count` new blocks. Block k is born from (seed, k), or as a copy of the one below: a resumed run gets the same."""
        for k in range(len(self.blocks), len(self.blocks) + count):
            block = Block(self.config.d_model, self.config.heads)
            if self.config.birth == 'copy' and k:
                block.load_state_dict(self.blocks[-1].state_dict())
            else:
                block.reset(self.config.birth, 0.02 / math.sqrt(2 * self.config.layers), generator(self.config.seed, 'block', k))
            self.blocks.append(block.to(self.head.weight.device))

    def hidden(self, idx):
        """idx (B, T) -> the final LayerNorm's output (B, T, C): what a head reads."""
        x = self.interface(idx) * self.scale
        for block in self.blocks:  # while nothing below needs a gradient, autograd records nothing: a frozen block costs
            x = block(x, self.cos, self.sin)  # one forward pass and keeps no activations
        return self.norm(x)

    def forward(self, idx, targets=None):
        h = self.hidden(idx)
        if targets is None:
            return self.head(h)
        loss = HeadLoss.apply(h.flatten(0, 1), self.head.weight, self.head.bias, targets.flatten(), *self.slices)
        return None, loss / (targets != -100).sum()

def new_model(c, batches):
    """A model without blocks, on its interface. The head is born as a unigram model (our choice): weights zero, and a bias of
    the log frequencies of the training tokens, which saves the steps that would otherwise go into learning them."""
    model = GrowingTransformer(c, substrate(c.substrate, c.d_model, seed=c.seed))
    with torch.no_grad():
        if c.head_birth == 'unigram':
            model.head.weight.zero_()
            model.head.bias.copy_(prepare_data.unigram_log_probs(batches))
        else:
            model.head.weight.normal_(0, 0.02, generator=generator(c.seed, 'head'))
            model.head.bias.zero_()
    return model.to(c.device)

# ---------------------------------------------------------------------------------------------------------------------
# LoRA: a frozen linear layer learns a low-rank correction, which is then merged away (paper section 4)

LINEARS = 'qkv', 'out', 'up', 'down'   # q, k and v share one adapter: 16 d r parameters a block

class LoRA(nn.Module):
    """W x + b + B A x with the linear layer (W, b) frozen; A (rank, in) is random, B (out, rank) zero: at birth an exact no-op.
    No extra factor alpha / rank (unpublished; our choice)."""

    def __init__(self, linear, rank, generator=None):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        if not linear.weight.is_meta:
            nn.init.normal_(self.A, 0, linear.in_features**-0.5, generator=generator)
        self.to(linear.weight.device)

    def forward(self, x):
        return self.linear(x) + F.linear(F.linear(x, self.A), self.B)

    @torch.no_grad()
    def merged(self):
        """The linear layer with the correction added to its weight; the adapter is spent."""
        self.linear.weight += self.B @ self.A
        self.B.zero_()
        return self.linear

def add_adapters(blocks, rank, *seed):
    """Puts an adapter on the four linear layers of every block that has none yet (a run resumed in the middle of a phase has them)."""
    for k, block in enumerate(blocks):
        for name in LINEARS:
            if not isinstance(getattr(block, name), LoRA):
                setattr(block, name, LoRA(getattr(block, name), rank, generator(*seed, k, name)))

def merge_adapters(blocks):
    """Adds every adapter to its linear layer and removes it: the model has the parameters it had before."""
    for block in blocks:
        for name in LINEARS:
            if isinstance(getattr(block, name), LoRA):
                setattr(block, name, getattr(block, name).merged())

# ---------------------------------------------------------------------------------------------------------------------
# Growth: phases, each with its own trainable set (paper section 4), and the ledger that proves the budget

@dataclass
class Phase:
    """A stretch of training with one trainable set, one optimiser and one schedule."""
    kind: str       # 'grow': new blocks; 'lora': adapters on all blocks; 'tune': the head of a mixture of experts
    stage: int      # from 1
    depth: int      # blocks in the model
    trained: int    # how many of them train: the topmost ones
    steps: int      # optimiser steps
    rank: int = 0   # of the adapters on all other blocks; 0 = none

def phases(c):
    """The run as a list of phases. The monolithic baseline is one phase over all blocks, with as many tokens; with --restarts, as many phases
    as the grown run, of the same lengths."""
    if c.moe:
        return [Phase('tune', 1, 0, 0, c.tune_heads // c.batch_tokens)]
    depths = [*range(c.born_layers + c.layers_per_stage, c.layers, c.layers_per_stage), c.layers]
    shares = [c.stage_ratio if k + c.born_stage else 1.0 for k in range(len(depths))]
    plan, below = [], c.born_layers
    for stage, (depth, share) in enumerate(zip(depths, shares), start=c.born_stage + 1):
        steps = max(1, round(share * len(depths) / sum(shares) * (c.stage_tokens // c.batch_tokens)))
        plan.append(Phase('grow', stage, depth, depth - below, steps, c.lora_rank if c.lora == 'joint' and below else 0))
        wanted = stage >= 2 if c.lora_stages == 'all' else str(stage) in c.lora_stages.split(',')
        if c.lora == 'interleaved' and wanted:
            rank = c.layers_per_stage * (12 * c.d_model + 9) // (16 * depth)      # the largest with adapters <= a stage's blocks
            if not rank:
                raise UserError(f'--lora interleaved: not even rank 1 on {depth} blocks fits the budget; give more --layers_per_stage', status=2)
            plan.append(Phase('lora', stage, depth, 0, c.lora_tokens // c.batch_tokens, rank))
        below = depth
    if c.monolithic:
        every = [p.steps for p in plan] if c.restarts else [sum(p.steps for p in plan)]
        return [Phase('grow', k, c.layers, c.layers, steps) for k, steps in enumerate(every, start=1)]
    return plan

def enter(model, phase):
    """Appends the phase's new blocks and adapters, and sets what trains: the topmost blocks, adapters on the others if any, the
    final LayerNorm and the head. A `learned` interface trains in stage 1 (and all the time in a monolithic run), any other never."""
    c = model.config
    if phase.kind == 'tune':
        model.requires_grad_(False).head.requires_grad_(True)
        return
    model.append(phase.depth - len(model.blocks))
    model.requires_grad_(False)
    new, old = model.blocks[phase.depth - phase.trained:], model.blocks[:phase.depth - phase.trained]
    if phase.rank:
        add_adapters(old, phase.rank, c.seed, phase.stage)
        for name, p in old.named_parameters():
            p.requires_grad_(name.endswith(('.A', '.B')))
    for part in (*new, model.norm, model.head):
        part.requires_grad_(True)
    if not c.monolithic and c.lora != 'joint':
        assert count(model.parameters(), active=True) <= budget(c), f'{phase} exceeds the budget of active parameters'
    model.interface.requires_grad_(model.interface.name == 'learned' and phase.kind == 'grow' and (phase.stage == 1 or c.monolithic))

def budget(c):
    """The most parameters that may train at a time: the blocks of one stage, the head and the final LayerNorm."""
    d = c.d_model
    return c.layers_per_stage * (12 * d * d + 9 * d) + d * VOCAB + VOCAB + 2 * d

def count(parameters, active=False):
    """Number of parameters in all, or of the active (trainable) ones."""
    return sum(p.numel() for p in parameters if p.requires_grad or not active)

def flops_per_token(c, phase):
    """Training FLOPs a token, (blocks, head): 2 a multiply-add, attention causal. A trained block costs its forward pass and twice as much
    backward; a frozen one its forward pass; one with adapters also the way back through it, and the adapters. (HeadLoss computes its
    logits twice, a third more than is counted.)"""
    matrices, attention = 2 * 12 * c.d_model**2, 2 * c.context * c.d_model
    other = matrices + attention                      # of a block that does not train
    if phase.rank:
        other += matrices + 2 * attention + 3 * 2 * 16 * c.d_model * phase.rank
    return other * (phase.depth - phase.trained) + 3 * (matrices + attention) * phase.trained, 3 * 2 * c.d_model * VOCAB

def ledger(c):
    """One dict a phase: what is frozen, what trains, what it costs. Built by the training code itself, on the meta device."""
    with torch.device('meta'):
        model = GrowingTransformer(c, Substrate(c.substrate, c.d_model))
        model.append(c.born_layers)
        rows = []
        for phase in phases(c):
            enter(model, phase)
            block_flops, head_flops = flops_per_token(c, phase)
            rows.append(dict(phase=phase.kind, stage=phase.stage, layers=phase.depth, frozen=phase.depth - phase.trained, trained=phase.trained,
                             rank=phase.rank, active=count(model.parameters(), active=True), total=count(model.parameters()),
                             block_flops=block_flops, head_flops=head_flops, tokens=phase.steps * c.batch_tokens))
            merge_adapters(model.blocks)
    return rows

def table(rows):
    """Prints dicts of equal keys as an aligned table; integers with thousands separators."""
    cells = [list(rows[0])] + [[f'{v:,}' if isinstance(v, int) else f'{v:.3f}' if isinstance(v, float) else str(v) for v in r.values()] for r in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print('  '.join(cell.rjust(w) for cell, w in zip(line, widths)))

def print_plan(c):
    """The ledger of this run, of the monolithic model, and of the monolithic model with a trainable embedding."""
    mono = dataclasses.replace(c, monolithic=True, born_layers=0, born_stage=0)
    source = f', from the {c.born_layers} layers of {c.grow_from}' if c.grow_from else ''
    for title, config in ((f'grown{source}', dataclasses.replace(c, monolithic=False)), ('monolithic', mono),
                          ('monolithic, trainable embedding', dataclasses.replace(mono, substrate='learned'))):
        rows = ledger(config)
        table(rows)
        blocks, head = (sum(r[kind] * r['tokens'] for r in rows) for kind in ('block_flops', 'head_flops'))
        print(f'{title}: {blocks + head:.3g} training FLOPs, of them {blocks:.3g} in blocks')
        over = max((r['active'] for r in rows if r['rank']), default=0) - budget(c)
        if c.lora == 'joint' and over > 0:
            print(f'joint adapters exceed the budget of {budget(c):,} active parameters by up to {over:,}')
        print()

# ---------------------------------------------------------------------------------------------------------------------
# Composition: experts trained apart on one interface become one model by averaging their logits (paper section 5)

class MixtureOfExperts(nn.Module):
    """The mean of the experts' logits, as a model like any other. Their heads are linear, so the mean of the logits is one linear
    head on the concatenated hidden states: never experts x B x T x V logits. It takes over the experts' heads and interface."""

    def __init__(self, experts):
        super().__init__()
        n = len(experts)
        self.config = dataclasses.replace(experts[0].config, context=min(e.config.context for e in experts))
        self.head = nn.Linear(sum(e.config.d_model for e in experts), VOCAB, device=experts[0].head.weight.device)
        with torch.no_grad():
            torch.cat([e.head.weight / n for e in experts], dim=1, out=self.head.weight.data)
            self.head.bias.copy_(sum(e.head.bias for e in experts) / n)
        self.experts, self.slices = nn.ModuleList(experts), (slice_logsumexp, slice_gradients)
        for e in experts:
            e.head = None

    def share_interface(self):
        """Keeps equal tables once in memory."""
        for e in self.experts[1:]:
            if not tables_differ(self.experts[0], e):
                e.interface.table = self.experts[0].interface.table
        return self

    @property
    def blocks(self):
        return [block for e in self.experts for block in e.blocks]

    def hidden(self, idx):
        """idx (B, T) -> B, T, sum of the experts' widths."""
        return torch.cat([e.hidden(idx) for e in self.experts], dim=-1)

    forward = GrowingTransformer.forward

def tables_differ(a, b):
    """What keeps two experts from sharing an interface, in words, or ''. The tables themselves are compared, not their names; within 1e-5
    (our choice) they are equal."""
    a, b = a.interface, b.interface
    if a.table.shape != b.table.shape:
        return f'the table of {a.name} is {tuple(a.table.shape)}, that of {b.name} {tuple(b.table.shape)}'
    difference = (a.table - b.table).abs().max().item()
    return '' if difference <= 1e-5 else f'the tables of {a.name} and {b.name} differ by up to {difference:.2g}'

# ---------------------------------------------------------------------------------------------------------------------
# Several processes, started by torchrun, which numbers them in the environment. Each holds the whole model and takes its share of the
# rows of every global batch; gradients are averaged. Rank 0 goes first, and it alone speaks and writes.

RANK, RANKS, LOCAL_RANK = (int(number) if (number := os.environ.get(name, alone)).isdecimal() else -1
                           for name, alone in (('RANK', '0'), ('WORLD_SIZE', '1'), ('LOCAL_RANK', '0')))

def join():
    """Meets the other processes, once: whoever comes first waits. Rank 0 comes when flags, data and tables are checked or made."""
    if RANKS > 1 and not torch.distributed.is_initialized():
        if 'MASTER_ADDR' not in os.environ:
            raise UserError(f'WORLD_SIZE is {RANKS} in the environment, but not set by torchrun: unset it, or start by torchrun', status=2)
        torch.distributed.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')

def over_ranks(number):
    """The sum of a number over all processes: all see the same, and so decide alike. They wait for one another here."""
    if RANKS == 1:
        return number
    torch.distributed.all_reduce(total := torch.tensor(number, dtype=torch.float64))
    return total.item()

# ---------------------------------------------------------------------------------------------------------------------
# Device, optimiser, schedule

def set_up(c):
    """Chooses precision and compilation where the user did not, prints them, and returns the context of mixed precision."""
    if not dict(cpu=True, cuda=torch.cuda.device_count() > LOCAL_RANK, mps=torch.backends.mps.is_available() and RANKS == 1)[c.device]:
        every = ' for every process: start fewer' if RANKS > 1 else ': leave out --device'
        raise UserError(f'this machine, or this build of torch, has no {c.device}{every}, or give --device cpu', status=2)
    if c.device == 'cuda':
        torch.cuda.set_device(LOCAL_RANK)
        torch.backends.cuda.enable_cudnn_sdp(False)  # which torch prefers to flash attention on Hopper; its gradients differ from run to run
    if c.dtype == 'auto':
        has = torch.cpu.get_capabilities()           # emulated bfloat16 is slower than float32
        native = (torch.cuda.is_bf16_supported(including_emulation=False) if c.device == 'cuda' else
                  c.device == 'cpu' and any(has.get(name) for name in ('avx512_bf16', 'amx_bf16', 'bf16')))
        c.dtype = 'bfloat16' if native else 'float32'
    headers = os.path.exists(sysconfig.get_path('include') + '/Python.h')
    compiler = c.device == 'cuda' or headers and any(map(shutil.which, ('c++', 'g++', 'clang++')))
    if c.compile and not compiler:
        raise UserError('--compile needs a C++ compiler and the Python headers: install g++ and python3-dev, or give --no-compile')
    c.compile = compiler if c.compile is None else c.compile
    torch.set_float32_matmul_precision('high')       # TF32 on CUDA for what stays float32
    if hasattr(libc := ctypes.CDLL(None), 'mallopt'):         # glibc would hand large blocks back to the kernel, which clears them for
        libc.mallopt(-4, 0), libc.mallopt(-1, -1)            # every step anew: M_MMAP_MAX 0, no M_TRIM_THRESHOLD; a fifth of a step on a CPU
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(c.device == 'cuda')                # the same losses again, on one device
    torch.utils.deterministic.fill_uninitialized_memory = False
    name = torch.cuda.get_device_name() if c.device == 'cuda' else f'{torch.get_num_threads()} threads'
    print(f'device {f"{RANKS} x " * (RANKS > 1)}{c.device} ({name}), {c.dtype}, {"compiled" if c.compile else "eager"}, torch {torch.__version__}')
    return torch.autocast(c.device, torch.bfloat16, enabled=c.dtype == 'bfloat16')

def compile_model(model):
    """Compiles block by block and in place: blocks share their graphs, so growing costs nothing, and state-dict keys stay."""
    torch._dynamo.config.recompile_limit = 1000      # frozen or not, with gradient or not, three for every rank: more than the usual 8
    torch._dynamo.config.accumulated_recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True                          # never fall back to eager in silence
    torch._dynamo.config.optimize_ddp = False        # would cut a block's graph where a bucket of gradients ends; blocks are small enough
    for block in model.blocks:
        block.compile(dynamic=False)
    model.slices = tuple(torch.compile(f, dynamic=False) for f in (slice_logsumexp, slice_gradients))

def make_optimizer(model, c, later=False):
    """AdamW over exactly the trainable parameters; a fresh one for every phase, so that moments exist only for what
    trains, and no stale gradient or momentum moves what is frozen."""
    matrices, vectors, adapters, head = [], [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (head if name.startswith('head') else adapters if name.endswith(('.A', '.B')) else
             matrices if name.endswith('.weight') and p.dim() == 2 else vectors).append(p)
    lr, head_lr = (c.lr_later, c.head_lr_later) if later else (c.lr, c.head_lr)
    groups = [dict(params=matrices, lr=lr, weight_decay=c.weight_decay), dict(params=adapters, lr=c.lora_lr),
              dict(params=head, lr=head_lr), dict(params=vectors, lr=lr)]      # with a learned interface's table
    for group in groups:
        group['peak'] = group['lr']
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

def lr_factor(c, step, steps):
    """Linear warm-up, then a cosine from 1 to 0.1."""
    if step < c.warmup:
        return (step + 1) / (c.warmup + 1)
    return 0.55 + 0.45 * math.cos(math.pi * (step - c.warmup) / max(1, steps - c.warmup))

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: OUT/latest.pt holds all that a bit-exact resume needs, OUT/stage_K.pt a model

def save(path, **content):
    """torch.save, beside the target and renamed; a full disk leaves the old file in place."""
    with replacing(path) as beside:
        torch.save(content, beside)

def load(path):
    """Reads a checkpoint, a file or the latest of a run's folder: tensors and plain values only, never code. Raises UserError naming
    the file that cannot be read."""
    path = Path(path) / 'latest.pt' if Path(path).is_dir() else Path(path)
    try:
        with zipfile.ZipFile(path) as file:              # torch itself loads flipped bits without a word; the price is to read the file twice
            if bad := file.testzip():
                raise zipfile.BadZipFile(bad)
        ckpt = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise UserError(f'there is no {path}: name the folder of a run, or a checkpoint in it') from None
    except Exception as error:
        raise UserError(f'{path} is damaged, or no checkpoint ({type(error).__name__}): restore it, or start a new run') from None
    known = {f.name for f in dataclasses.fields(Config)}
    if (not isinstance(ckpt, dict) or not {'config', 'tokenizer', 'model', 'at', 'machine'} <= ckpt.keys() or not ckpt['config'].keys() <= known
            or 'processes' not in ckpt['machine']):   # older than that, and its interface was not scaled
        raise UserError(f'{path} is not a checkpoint of this version of grow.py: name another run')
    if ckpt['tokenizer'] != tokenizer_fingerprint():
        raise UserError(f'{path} was trained with another list of n-grams: put interface/ngrams.txt of that time in place')
    return ckpt

def restore(ckpt, c=None):
    """Checkpoint -> its model (to go on under another config c), with its own interface table, and everything frozen."""
    model = bare_model(ckpt, c)
    for name, tensor in ckpt['model'].items():
        if name.endswith('qkv.A'):                    # saved in the middle of a LoRA phase
            add_adapters([model.blocks[int(name.split('.')[1])]], len(tensor))
    model.load_state_dict(ckpt['model'])
    return (model.share_interface() if 'experts' in ckpt else model).requires_grad_(False)

def parts(model):
    """What `bare_model` needs to build the model again, for its checkpoint."""
    if isinstance(model, MixtureOfExperts):
        return dict(experts=[dict(config=dataclasses.asdict(e.config), **parts(e)) for e in model.experts])
    return dict(depth=len(model.blocks), interface=model.interface.fingerprint)

def bare_model(described, c=None):
    """The model that `parts` described, its weights not yet filled."""
    if 'experts' in described:
        return MixtureOfExperts([bare_model(e) for e in described['experts']])
    c = c or Config(**described['config'])
    model = GrowingTransformer(c, Substrate(c.substrate, c.d_model, described['interface']))
    model.append(described['depth'])
    return model

def load_model(path, device='cpu'):
    """A run's folder (its latest state) or a checkpoint file -> the model in eval mode, float32, adapters merged."""
    model = restore(load(path))
    merge_adapters(model.blocks)                      # a run may have been stopped in a LoRA phase
    return model.to(device).eval()

def merge_experts(c):
    """The experts of --moe as one model on c.device. Raises UserError if their interfaces differ, unless that is allowed."""
    experts = [load_model(path) for path in c.moe]
    if any(isinstance(e, MixtureOfExperts) for e in experts):
        raise UserError('a merge takes grown models, and one of these is a mixture already: name its experts instead')
    for other in experts[1:]:
        if (why := tables_differ(experts[0], other)) and not c.allow_mismatch:
            raise UserError(f'these experts have no common interface: {why}; train them on the same substrate, or merge them by grow.py --allow_mismatch')
    return MixtureOfExperts(experts).share_interface().to(c.device).eval()

def open_out(c):
    """The run's folder, locked for this process. Refuses one that another process writes to."""
    number = 1 + max((int(p.name) for p in Path('out').glob('*') if p.name.isdecimal()), default=0)
    c.out = c.out or (newest_out() if c.resume else f'out/{number:03d}')
    out = Path(c.out)
    if RANK:
        return out, None                             # rank 0 has the lock
    if c.resume and not (out / 'latest.pt').exists():
        remedy = 'its latest.pt is gone, so choose another --out' if any(out.glob('*.pt')) else 'leave out --resume to start there'
        raise UserError(f'{out} holds no checkpoint to resume: {remedy}')
    out.mkdir(parents=True, exist_ok=True)
    (lock := prepare_data.locked(out, f'writing to {out}')).__enter__()
    if any(out.glob('*.pt')) and not c.resume:
        raise UserError(f'{out} holds a run already: go on with it by --resume, or choose another --out')
    for left in out.glob('.*.pt.*.tmp'):              # what was being written when a run was killed
        left.unlink()
    return out, lock                                 # which lasts as long as this object

def newest_out():
    """The folder in out/ with the newest checkpoint."""
    if not (newest := max(Path('out').glob('*/latest.pt'), key=lambda p: p.stat().st_mtime, default=None)):
        raise UserError('there is no run in out/ yet: train one with `python grow.py`, or name one with --out')
    return str(newest.parent)

# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and sampling

@torch.no_grad()
def evaluate(model, dataset, c, amp):
    """Mean loss in nats over the first c.eval_tokens of the val split: fixed sequences, fixed order; every process takes its share of
    the batches. The last one is filled up with targets that do not count, so that every batch has one shape."""
    total = tokens = 0
    for idx, targets in itertools.islice(prepare_data.val_batches(dataset, c.context, c.micro_batch, c.eval_tokens), RANK, None, RANKS):
        missing = c.micro_batch - len(idx)
        idx, targets = F.pad(idx, (0, 0, 0, missing)), F.pad(targets, (0, 0, 0, missing), value=-100)
        with amp:
            loss = model(idx.to(c.device), targets.to(c.device))[1]
        tokens += (valid := (targets != -100).sum().item())
        total += loss.item() * valid
    return over_ranks(total) / over_ranks(tokens)

def in_units(loss, dataset):
    """A loss in nats a token -> the three units in which it is read."""
    return dict(val_loss=loss, perplexity=math.exp(loss), bits_per_byte=loss / math.log(2) / dataset.bytes_per_token)

def validate(model, datasets, weights, c, amp):
    """The three units, averaged over the data sets by their weights; the loss of each set beside them where there are several."""
    each = [in_units(evaluate(model, d, c, amp), d) for d in datasets]
    mean = {unit: sum(w * e[unit] for w, e in zip(weights, each)) / sum(weights) for unit in each[0]}
    return mean | ({f'val_{d.name}': e['val_loss'] for d, e in zip(datasets, each)} if len(each) > 1 else {})

@torch.no_grad()
def sample(model, text, c, amp):
    """Continues `text` by up to c.length tokens drawn at c.temperature among the c.top_k likeliest; ends at </s>. -> the continuation."""
    encoding, device, random = tokenizer(), model.head.weight.device, torch.Generator().manual_seed(c.seed)
    ids = encoding.encode_ordinary(text) or [EOS]
    start = len(ids)
    with torch.compiler.set_stance('force_eager'):   # every length would be a new graph
        while len(ids) - start < c.length:
            with amp:
                h = model.hidden(torch.tensor([ids[-model.config.context:]], device=device))
                logits = model.head(h[:, -1]).float().cpu()                                               # 1, V
            values, tokens = (logits / c.temperature).topk(c.top_k)
            ids.append(tokens[0, torch.multinomial(values.softmax(-1), 1, generator=random)].item())
            if ids[-1] == EOS:
                break
    return encoding.decode(ids[start:], errors='replace')

# ---------------------------------------------------------------------------------------------------------------------
# Training

PROMPT = 'The default value is'
COLUMNS = 'phase stage step tokens seconds train_loss val_loss lr active_params total_params tokens_per_s'.split()
LOG_EVERY = 10   # steps

def train_step(model, optimizer, batches, step, c, amp):
    """One optimiser step on global batch number `step`. Returns (loss, gradient norm); a loss or norm that is not finite changes nothing.
    With several processes, `model` is in DistributedDataParallel, and both are those of the whole batch: all processes have as many tokens."""
    batch = batches.batch(step, rows=slice(RANK, None, RANKS))
    idx, targets = ((x.pin_memory() if c.device == 'cuda' else x).to(c.device, non_blocking=True) for x in batch)
    micro_batches, loss = len(idx) // c.micro_batch, 0.0
    for k, (x, t) in enumerate(zip(idx.split(c.micro_batch), targets.split(c.micro_batch)), start=1):
        model.require_backward_grad_sync = k == micro_batches     # for DDP, as its no_sync() does: average the gradients once a step
        with amp:
            part = model(x, t)[1] / micro_batches
        with torch.autograd.set_multithreading_enabled(False):    # in this thread, whose compiler settings are those of compile_model
            part.backward()
        loss += part.detach()
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group['params']], c.clip).item()
    loss = over_ranks(loss.item()) / RANKS
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm

def machine(c):
    """What a trajectory depends on besides config and data. A resumed run says so when it differs."""
    return dict(torch=str(torch.__version__), processes=RANKS, threads=torch.get_num_threads(), device=c.device, dtype=c.dtype, compile=c.compile,
                micro_batch=c.micro_batch)

def open_data(c):
    """--data -> (data sets, their whole-number weights). The text of the standard library is prepared on the spot: every machine has it."""
    pairs = [(name, weight or '1') for name, _, weight in (word.partition(':') for word in c.data)]
    for name, weight in pairs:
        if not weight.isdecimal() or not 1 <= int(weight) <= 1000 or [n for n, _ in pairs].count(name) > 1:
            raise UserError(f'--data {" ".join(c.data)}: name each data set once, with a weight from 1 to 1000 if any, as in ru:3 en:1', status=2)
    if 'stdlib' in dict(pairs) and not Path('data/stdlib').exists():
        print('no data yet: preparing the text of the Python standard library')
        prepare_data.prepare_stdlib()
    return [prepare_data.Dataset(name) for name, _ in pairs], [int(weight) for _, weight in pairs]

def limit_epochs(c, datasets):
    """Shortens stages and LoRA phases where the run would read the data more than four times (our choice)."""
    most, wanted = 4 * sum(d.train_tokens for d in datasets), sum(p.steps for p in phases(c)) * c.batch_tokens
    if wanted > most:
        c.stage_tokens, c.lora_tokens = (max(c.batch_tokens, n * most // wanted) for n in (c.stage_tokens, c.lora_tokens))
        print(f'--stage_tokens {c.stage_tokens}, --lora_tokens {c.lora_tokens}: four epochs of the data, instead of {wanted / most * 4:.1f}')

def open_log(out, at):
    """OUT/log.csv, written line by line for whoever looks on. Rows after the checkpoint are cut off: they are about to be written again."""
    log = io.StringIO() if RANK else open(out / 'log.csv', 'a', buffering=1)
    at['log_bytes'] = min(at['log_bytes'], log.tell())
    log.truncate(at['log_bytes'])
    if not at['log_bytes']:
        log.write(','.join(COLUMNS) + '\n')
    return log

def train(c, given):
    """The main job: grows a model phase by phase, or goes on where OUT/latest.pt stands. -> the folder of the run."""
    ckpt = None
    if c.resume:
        out, lock = open_out(c)
        ckpt = load(out)
        c = resumed_config(c, given, ckpt, out)
        if ckpt['at']['phase'] == len(phases(c)):
            table(ckpt['at']['history'])
            join()
            print(f'the run in {out} is finished: --sample shows what it says' + f', --grow_from {out} grows it further' * (not c.moe))
            return out
    amp = set_up(c)
    datasets, weights = open_data(c)
    if not ckpt and not {'stage_tokens', 'lora_tokens', 'moe'} & given.keys():
        limit_epochs(c, datasets)
    batches = prepare_data.Batches(datasets, weights, c.seed + c.born_stage, c.batch_tokens // c.context, c.context)   # another order than the source's
    for d in datasets:
        prepare_data.Sequences(d, 'val', c.context)   # refuses what is too short now, not when a stage is trained
    fingerprint = digest(*(d.fingerprint for d in datasets))
    plan = phases(c)
    at = ckpt['at'] if ckpt else dict(phase=0, step=0, global_step=0, seconds=0.0, log_bytes=0, history=[], began=0.0)
    if ckpt:
        if ckpt['data'] != fingerprint:
            raise UserError(f'data {" ".join(c.data)} is not what the run in {out} was trained on: prepare the same again, or start a new run')
        if ckpt['machine'] != machine(c):
            print(f'note: the run began on {ckpt["machine"]}; here it is {machine(c)}: it goes on, but not to the same bits')
        print(f'resuming {out} in phase {at["phase"] + 1} of {len(plan)} after step {at["step"]}')
    if ckpt or c.grow_from:
        model = restore(ckpt or load(c.grow_from), c).to(c.device)
        if c.grow_from:
            print(f'growing on from the {c.born_layers} layers of {c.grow_from}')
    else:
        model = merge_experts(c) if c.moe else new_model(c, batches)
    if not ckpt:                                     # now that nothing is left to refuse
        out, lock = open_out(c)
        print(f'checkpoints and log go to {out}')
    join()
    log = open_log(out, at)

    def log_row(**row):                               # phase and sizes: of the loop below
        row |= dict(phase=phase.kind, stage=phase.stage, step=at['step'], tokens=at['global_step'] * c.batch_tokens, **sizes,
                    seconds=f'{at["seconds"]:.1f}')
        log.write(','.join(str(row.get(column, '')) for column in COLUMNS) + '\n')

    def save_as(name, **more):
        log.flush()
        at['log_bytes'] = log.tell()
        if not RANK:
            save(out / name, config=dataclasses.asdict(c), **parts(model), model=model.state_dict(), tokenizer=tokenizer_fingerprint(),
                 data=fingerprint, machine=machine(c), at=at, **more)
        over_ranks(0)                                 # the others wait for the file

    def result(name, val, speed):
        at['history'].append(dict(phase=name, stage=phase.stage, layers=len(model.blocks), rank=phase.rank, **sizes,
                                  tokens=at['global_step'] * c.batch_tokens, **val, tokens_per_s=round(speed)))

    every = sum(p.steps for p in plan)                # steps of the whole run
    stop = []                                         # Ctrl-C waits for the end of the step: none is cut in half
    signal.signal(signal.SIGINT, lambda *_: stop.append(True) if not stop else sys.exit(130))
    if not ckpt:
        save_as('latest.pt', optimizer=None)
    while at['phase'] < len(plan):
        # ---- enter the phase: new blocks, what is frozen, a fresh optimiser
        phase = plan[at['phase']]
        if len(model.blocks) and not at['global_step']:      # --grow_from, --moe: what there is to begin with
            sizes = dict(active_params=0, total_params=count(model.parameters()))
            result('before', validate(model, datasets, weights, c, amp), 0)
        enter(model, phase)
        if c.compile:
            compile_model(model)
        ddp = nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False) if RANKS > 1 else model    # blind to blocks appended later
        optimizer = make_optimizer(model, c, later=at['phase'] > 0 or bool(c.grow_from or c.moe))
        if at['step']:
            optimizer.load_state_dict(ckpt['optimizer'])
        sizes = dict(active_params=count(model.parameters(), active=True), total_params=count(model.parameters()))
        adapters = f' with adapters of rank {phase.rank}' if phase.rank else ''
        print(f'{phase.kind} {phase.stage}: {len(model.blocks)} blocks, {len(model.blocks) - phase.trained} of them frozen{adapters}; '
              f'{sizes["active_params"]:,} of {sizes["total_params"]:,} parameters are active; {phase.steps * c.batch_tokens:,} tokens')

        # ---- its steps
        model.train()
        at['began'] = at['began'] if at['step'] else at['seconds']
        clock = saved = time.monotonic()
        seconds, logged = at['seconds'], at['step']
        while at['step'] < phase.steps:
            for group in optimizer.param_groups:
                group['lr'] = group['peak'] * lr_factor(c, at['step'], phase.steps)
            loss, norm = train_step(ddp, optimizer, batches, at['global_step'], c, amp)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise SystemExit(1) if RANK else UserError(
                    f'loss {loss}, gradient norm {norm} in {phase.kind} {phase.stage}, step {at["step"] + 1}: not finite, so nothing '
                    f'was updated; {out}/latest.pt holds the last good state; start again with a lower --lr')
            at.update(step=at['step'] + 1, global_step=at['global_step'] + 1, seconds=at['seconds'] + time.monotonic() - clock)
            if at['step'] % LOG_EVERY == 0 or at['step'] == phase.steps:
                speed = (at['step'] - logged) * c.batch_tokens / (at['seconds'] - seconds)
                seconds, logged, lr = at['seconds'], at['step'], next(g['lr'] for g in optimizer.param_groups if g['params'])
                log_row(train_loss=f'{loss:.5f}', lr=f'{lr:.3e}', tokens_per_s=f'{speed:.0f}')
                print(f'{phase.kind} {phase.stage} | step {at["step"]:5d}/{phase.steps} | loss {loss:7.4f} | lr {lr:.2e} | norm {norm:6.3f} | '
                      f'{speed:9,.0f} tok/s | {timedelta(seconds=int((every - at["global_step"]) * c.batch_tokens / speed))} left', flush=True)
            due = over_ranks(2 * len(stop) + (not RANK and time.monotonic() - saved > 60 * c.save_every))    # one clock, any Ctrl-C
            if due:
                save_as('latest.pt', optimizer=optimizer.state_dict())
                saved = time.monotonic()
                if due > 1:
                    print(f'stopped: go on with --resume --out {out}', flush=True)
                    raise SystemExit(130) if RANK else KeyboardInterrupt
            clock = time.monotonic()                  # checkpoints and evaluation do not count

        # ---- its result
        model.eval()
        val = validate(model, datasets, weights, c, amp)
        if phase.rank:
            merge_adapters(model.blocks)
            unmerged, val = val, validate(model, datasets, weights, c, amp)
            print(f'adapters of rank {phase.rank} merged: val loss {unmerged["val_loss"]:.6f} before, {val["val_loss"]:.6f} after')
        log_row(val_loss=f'{val["val_loss"]:.5f}')
        result(phase.kind, val, phase.steps * c.batch_tokens / (at['seconds'] - at['began']))     # compilation included
        print(f'{phase.kind} {phase.stage}: val loss {val["val_loss"]:.4f}')
        at.update(phase=at['phase'] + 1, step=0)
        save_as(f'stage_{phase.stage}.pt')            # after a LoRA phase once more
        save_as('latest.pt', optimizer=None)
    if RANKS > 1:
        torch.distributed.destroy_process_group()
    signal.signal(signal.SIGINT, signal.default_int_handler)      # all is saved
    if not RANK:
        report(model, at, batches, c, amp)
    return out

def report(model, at, batches, c, amp):
    """Prints the table of the stages, the n-gram baselines counted on the very tokens the run saw, peak memory, and a sample."""
    print()
    table(at['history'])
    for d in batches.datasets:
        losses = zip(('unigram', 'bigram'), prepare_data.ngram_losses(batches, at['global_step'], d, c.eval_tokens))
        print(f'{d.name}: ' + '; '.join(f'{name} {loss:.4f} nats, perplexity {math.exp(loss):.2f}, {in_units(loss, d)["bits_per_byte"]:.3f} bits a byte'
                                        for name, loss in losses))
    print(f'peak memory {peak_memory(c.device) / 2**30:.2f} GiB, {timedelta(seconds=int(at["seconds"]))} of training\n')
    print(f'--- sample\n{PROMPT}{sample(model, PROMPT, c, amp)}')

def compare_experts(c):
    """Prints the loss of every expert and of their mean on every data set, beside n-gram baselines counted on its training split."""
    amp, (datasets, _), rows = set_up(c), open_data(c), []
    merged = merge_experts(c)                         # refuses before anything is computed
    for name, model in [(path, None) for path in c.moe] + [('merged', merged)]:
        model = model or load_model(name, c.device)
        if c.compile:
            compile_model(model)
        rows += [dict(model=name, data=d.name, **in_units(evaluate(model, d, c, amp), d)) for d in datasets]
    for d in datasets:
        batches = prepare_data.Batches([d], [1], c.seed, 64, c.context)
        losses = prepare_data.ngram_losses(batches, len(batches.sequences[0]) // 64, d, c.eval_tokens)
        rows += [dict(model=name, data=d.name, **in_units(loss, d)) for name, loss in zip(('unigram', 'bigram'), losses)]
    table(rows)

def peak_memory(device):
    """Bytes: of the GPU's allocator, elsewhere of the whole process."""
    if device == 'cuda':
        return torch.cuda.max_memory_allocated()
    import resource                                  # Linux and macOS; kilobytes on the one, bytes on the other
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)

# ---------------------------------------------------------------------------------------------------------------------
# Command line

def agree(given, names, stored, path):
    """Refuses a flag that contradicts the config `stored` in the checkpoint of `path`."""
    for name in names:
        if name in given and given[name] != getattr(stored, name):
            raise UserError(f'--{name} {given[name]} contradicts the run in {path}, which has {getattr(stored, name)}: leave the flag out', status=2)

RUNTIME = {'out', 'resume', 'micro_batch', 'save_every', 'device', 'dtype', 'compile', 'length', 'temperature', 'top_k'}   # of a resumed run
SAMPLING = {'sample', 'out', 'moe', 'allow_mismatch', 'length', 'temperature', 'top_k', 'seed', 'device', 'dtype', 'compile'}     # beside --sample

def resumed_config(c, given, ckpt, path):
    """The config in the checkpoint, with what the flags may change. Other flags must agree with it."""
    stored = Config(**ckpt['config'])
    agree(given, given.keys() - RUNTIME, stored, path)
    return share_batch(dataclasses.replace(stored, **{name: getattr(c, name) for name in RUNTIME & given.keys() | {'out', 'resume'}}), given)

def grown_config(c, given):
    """The config for --grow_from: its model's sizes and interface, and the depth and stage from which it grows on."""
    ckpt = load(c.grow_from)
    if 'experts' in ckpt:
        raise UserError(f'{c.grow_from} is a mixture of experts: --grow_from takes a grown model')
    source = Config(**ckpt['config'])
    sizes = 'substrate', 'd_model', 'heads', 'context'
    agree(given, sizes, source, c.grow_from)
    if ckpt['at']['phase'] < len(phases(source)):
        raise UserError(f'the run in {c.grow_from} is not finished, or this is an earlier stage of it: name the folder of a finished run, or '
                        'finish it by --resume first')
    if c.layers <= ckpt['depth']:
        raise UserError(f'--layers {c.layers}: the model in {c.grow_from} has {ckpt["depth"]} already; give a larger number', status=2)
    return dataclasses.replace(c, born_layers=ckpt['depth'], born_stage=phases(source)[-1].stage, **{name: getattr(source, name) for name in sizes})

def share_batch(c, given):
    """Fits c.micro_batch, where it was not given, into the rows that one process takes of the global batch. -> c"""
    if 'micro_batch' not in given:
        c.micro_batch = math.gcd(c.micro_batch, c.batch_tokens // c.context // RANKS)
    if c.batch_tokens % (c.micro_batch * c.context * RANKS):
        raise UserError(f'--batch_tokens {c.batch_tokens} must be a multiple of --micro_batch {c.micro_batch} x --context {c.context}'
                        + f' x {RANKS} processes' * (RANKS > 1), status=2)
    return c

def configure(argv):
    """Command line -> (Config, dict of the flags that were given). A bad flag ends in one sentence and exit status 2."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags = [f for f in dataclasses.fields(Config) if f.metadata]
    for f in flags:
        allowed, help = f.metadata['allowed'], f.metadata['help']
        default = ', '.join(f'{p[f.name]} on a {name}' for name, p in PRESETS.items() if f.name in p) or f.default
        default = ' '.join(default) if f.type is tuple else default
        if f.type in (int, float):
            help += f'; {allowed[0]:g} to {allowed[1]:g}'
        if default not in (None, ''):
            help += f' (default: {default})'
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(nargs='+') if f.type is tuple else
                dict(choices=allowed) if f.type is str and allowed else dict(type=f.type))
        parser.add_argument(f'--{f.name}', default=argparse.SUPPRESS, help=help, **kind)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(parser.parse_args(argv)).items()}
    for f in flags:
        if f.name in given and f.type in (int, float):
            low, high = f.metadata['allowed']
            if not low <= given[f.name] <= high:
                parser.error(f'--{f.name} {given[f.name]} is out of range: give a number from {low} to {high}')
    c = Config(**given)
    if c.device == 'auto':
        c.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    for name, value in PRESETS['laptop' if c.device == 'cpu' else 'gpu'].items():
        if name not in given:
            setattr(c, name, value)
    if c.resume + c.plan + (c.sample is not None) > 1:
        parser.error('--resume, --plan and --sample are different jobs: give one of them')
    if c.sample is not None and (idle := sorted(given.keys() - SAMPLING)):
        parser.error(f'--sample takes a trained model as it is: leave out --{" --".join(idle)}')
    if c.resume:                                     # all else comes from the checkpoint
        return c, given
    if c.grow_from:
        c = grown_config(c, given)
    if c.moe:                                        # what all experts can see
        c.context = min([load(path)['config']['context'] for path in c.moe] + [c.context] * ('context' in given))
    if 'batch_tokens' not in given:                  # whole sequences
        c.batch_tokens = max(1, c.batch_tokens // c.context) * c.context
    share_batch(c, given)
    stages = {str(phase.stage) for phase in phases(c)}
    for wrong, message in (
            (c.d_model % (2 * c.heads), f'--d_model {c.d_model} must be an even multiple of --heads {c.heads}'),
            (c.stage_tokens < c.batch_tokens or
             c.lora_tokens < c.batch_tokens and (c.lora == 'interleaved' or 'lora_tokens' in given),
             f'--stage_tokens and --lora_tokens must be at least the --batch_tokens {c.batch_tokens} of one step'),
            (c.monolithic and (given.get('lora', 'none') != 'none' or c.grow_from), '--monolithic has no frozen blocks: leave out --lora and --grow_from'),
            (c.restarts and not c.monolithic, '--restarts is for --monolithic: a grown run restarts by itself'),
            (c.lora_stages != 'all' and (c.lora != 'interleaved' or not set(c.lora_stages.split(',')) <= stages),
             f'--lora_stages {c.lora_stages} must be all, or numbers of stages like 2,3 with --lora interleaved'),
            (len(c.moe) == 1 or c.tune_heads and not c.moe, '--moe needs two experts or more, and --tune_heads needs --moe'),
            (c.tune_heads and c.tune_heads < c.batch_tokens, f'--tune_heads must be at least the --batch_tokens {c.batch_tokens} of one step'),
            (c.moe and (c.grow_from or c.monolithic or c.plan), '--moe merges finished models: leave out --grow_from, --monolithic and --plan')):
        if wrong:
            parser.error(message)
    with torch.device('meta'):
        Substrate(c.substrate, c.d_model)            # refuses a wrong name or width before anything is written
    return c, given

@cli
def main(argv=None):
    """The command line: plan, sample, compare experts, or train."""
    if not 0 <= RANK < RANKS or LOCAL_RANK < 0:
        raise UserError('RANK, WORLD_SIZE and LOCAL_RANK in the environment do not fit together: unset them, or start by torchrun', status=2)
    if RANK:
        sys.stdout = io.StringIO()
        if not {'-h', '--help'} & set(sys.argv):
            join()                                   # what rank 0 refuses, no other process gets to see
    c, given = configure(argv)
    comparing = c.moe and not c.tune_heads and not c.resume
    if RANKS > 1 and c.resume and not c.out:
        raise UserError('several processes need to be told which run to go on with: give --out beside --resume', status=2)
    if RANKS > 1 and (c.plan or c.sample is not None or comparing):
        raise UserError('--plan, --sample and comparing experts want one process: start them by python, not by torchrun', status=2)
    if c.plan:
        print_plan(c)
    elif c.sample is not None:
        amp, model = set_up(c), merge_experts(c) if c.moe else load_model(c.out or newest_out(), c.device)
        print(c.sample + sample(model, c.sample, c, amp))
    elif comparing:
        compare_experts(c)
    else:
        if c.device == 'cpu' and not c.resume:
            print('the laptop preset, with your flags (' + ', '.join(f'{k} {getattr(c, k)}' for k in PRESETS['laptop']) + ')')
        handler = signal.getsignal(signal.SIGINT)
        try:
            out = train(c, given)
        except RuntimeError as error:                # of gloo, of a GPU's allocator, or of the CPU's
            if 'by peer' in str(error):
                raise UserError('another process has ended, and so does this one: the reason is in what that one printed') from None
            if not any(words in str(error) for words in ('out of memory', "can't allocate memory", 'CUBLAS_STATUS_ALLOC_FAILED')):
                raise
            raise UserError('out of memory: start again, or go on with --resume, with a smaller --micro_batch') from None
        finally:
            signal.signal(signal.SIGINT, handler)
        print(f'\nsaved in {out}; continue any text with: python grow.py --out {out} --sample "The default value"')

if __name__ == '__main__':
    main()
