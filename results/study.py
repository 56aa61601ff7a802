"""
The controlled study: what does growth cost or gain against training all layers at once, and do glyphs matter?

    python results/study.py                            # tables and pictures of results/study, in seconds
    python results/study.py out/mine --flags="--context 128" --only A.grown      # trains such arms there first
    python results/study.py out/try --tokens 6144 --flags="--d_model 64 --heads 2"         # a small trial

An arm is FOLDER/ARM: its run, with result.json once it is finished. What is finished is skipped,
so stop it and start it again at will. Tier A compares ways to grow at equal tokens, at equal FLOPs in blocks
and in all; tier B, half as long, compares token interfaces. Writes FOLDER.csv, .txt and _*.png.

results/study is the record of the first edition (commits f9e3f6b to 8146166; --stage_tokens was the mean of
all stages then). Its run.txt say how each arm was made. At b189083 this script also trains what grow.py no
longer has (--restarts, births random and copy), stages of one layer and other rates, scores each arm on MMLU,
draws study_depth.png, and weighs the results against goals in study.txt.
"""

import argparse
import contextlib
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
import pictures
from substrate import Parser, UserError, cli, replacing, table

FLAGS = '--context 256 --batch_tokens 1024 --eval_tokens 1_000_000'
EQUAL = '--stage_ratio 1 --lr_later 3e-3 --head_lr_later 2e-3'
RECIPES = dict(grown=EQUAL, lora=EQUAL + ' --lora interleaved --lora_lr 2e-3', long='')      # ways to grow

def costs(flags):
    """Tokens and FLOPs of a whole run."""
    rows = grow.ledger(grow.configure(flags)[0])
    sums = {kind: sum(row[f'{kind}_flops'] * row['tokens'] for row in rows) for kind in ('block', 'head')}
    return dict(tokens=sum(row['tokens'] for row in rows), block_flops=sums['block'],
                total_flops=sums['block'] + sums['head'])

def sized(flags, tokens):
    """Flags with stages so long that the run has so many tokens; LoRA phases are as long as the first one."""
    c, _ = grow.configure(flags)
    plan = grow.phases(dataclasses.replace(c, monolithic=False))
    first = tokens / sum(c.stage_ratio if phase.kind == 'grow' and phase.stage > 1 else 1 for phase in plan)
    return [*flags, '--stage_tokens', str(round(first)), '--lora_tokens', str(round(first))]

def arms(common, tokens):
    """{name: flags of grow.py}. An arm that is equal in FLOPs has as many tokens as they buy."""
    found = {}
    for seed in '01':
        base = [*common, '--seed', seed]
        mono = sized([*base, *EQUAL.split(), '--monolithic', '--lr', '2e-3'], tokens)
        found[f'A.mono_2e-3.s{seed}'] = mono
        found[f'A.three_layers.s{seed}'] = sized([*base, '--layers', '3'], tokens)
        for recipe, more in RECIPES.items():
            flags = [*base, *more.split()]
            have, own = costs(mono), costs(sized(flags, tokens))
            for equal in have:
                found[f'A.{recipe}.{equal}.s{seed}'] = sized(flags, tokens * have[equal] / own[equal])
    for name in ('unicode', 'binary', 'random', 'learned'):
        flags = [*common, *EQUAL.split(), '--substrate', name]
        found[f'B.{name}.grown'] = sized(flags, tokens / 2)
        found[f'B.{name}.mono'] = sized([*flags, '--monolithic'], tokens / 2)
    return found

def train(out, flags):
    """Trains the run `out`, or goes on with it, or leaves it as it is where it is finished."""
    if Path(out, 'latest.pt').exists():
        ckpt = grow.load(out)
        if ckpt['state']['phase'] == len(grow.phases(grow.Config(**ckpt['config']))):
            return
        flags = ['--resume']
    print(f'\n=== {out}', flush=True)
    process = subprocess.Popen([sys.executable, HERE.parent / 'grow.py', '--out', out, *flags])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()                                 # it got the Ctrl-C as well and is saving its state
        raise
    if status:
        raise UserError(f'training {out} ended with status {status}, see above; the same command goes on')

def row_of(name, r):
    """A row of the table, from an arm's result.json."""
    last = r['history'][-1]
    return dict(arm=name, layers=last['layers'], total_params=last['total_params'],
                active_params=max(h['active_params'] for h in r['history']), tokens=last['tokens'],
                block_flops=f'{r["block_flops"]:.3g}', total_flops=f'{r["total_flops"]:.3g}',
                minutes=round(r['seconds'] / 60, 1), peak_GiB=r.get('peak_gib', ''),
                **{unit: last[unit] for unit in ('val_loss', 'perplexity', 'bits_per_byte')},
                by_phase=' '.join(f'{h["val_loss"]:.3f}' for h in r['history']))

def flops_picture(rows):
    """Tier A: val loss over the FLOPs of a run, in blocks and in all."""
    figure, axes = pictures.plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout='constrained')
    for ax, kind in zip(axes, ('block_flops', 'total_flops')):
        for way, colour in zip(('mono', 'three_layers', *RECIPES), pictures.RUNS):
            ax.plot([], [], 'o', color=colour, label=way)
            for row in rows:
                if row['arm'].startswith(f'A.{way}'):
                    full = colour if row['arm'].endswith('s0') else 'none'
                    ax.plot(float(row[kind]), row['val_loss'], 'o', color=colour, mfc=full)
        pictures.tidy(ax, xlabel=kind.replace('_flops', ' FLOPs'))
    axes[0].set_ylabel('val loss, nats a token')
    axes[0].legend(frameon=False, fontsize=9, title='hollow: another seed')
    return figure

def interfaces_picture(rows):
    """Tier B: the val loss after each phase, by arm."""
    figure, ax = pictures.plt.subplots(figsize=(9, 4.2), layout='constrained')
    arms = [row for row in rows if row['arm'].startswith('B.')]
    for k, row in enumerate(arms):
        losses = [float(loss) for loss in row['by_phase'].split()]
        ax.plot([k] * len(losses), losses, 'o', color=pictures.RUNS[row['arm'].endswith('grown')], alpha=0.35)
        ax.text(k + 0.12, losses[-1], f'{losses[-1]:.3f}', va='center', fontsize=8)
    ax.set_xticks(range(len(arms)), [row['arm'][2:].replace('.', '\n') for row in arms], fontsize=8)
    pictures.tidy(ax, ylabel='val loss after each phase, nats a token')
    return figure

def draw(folder):
    """Tables and pictures of all finished arms in the folder."""
    paths = sorted(folder.glob('*/result.json'))
    if not paths:
        raise UserError(f'{folder} has no finished arm yet: leave out --only, or wait for one')
    rows = [row_of(path.parent.name, json.loads(path.read_text())) for path in paths]
    table(rows)
    with replacing(f'{folder}.txt') as path, open(path, 'w') as file, contextlib.redirect_stdout(file):
        table(rows)
    pictures.write_csv(f'{folder}.csv', rows)
    compared = [path.parent for path in paths if path.parent.name in
                ('A.mono_2e-3.s0', *(f'A.{recipe}.tokens.s0' for recipe in RECIPES))]
    if compared:
        pictures.write_png(f'{folder}_tokens.png', pictures.loss(compared))
    pictures.write_png(f'{folder}_flops.png', flops_picture(rows))
    pictures.write_png(f'{folder}_substrates.png', interfaces_picture(rows))

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', type=Path, default=HERE / 'study', help='(results/study)')
    parser.add_argument('--tokens', type=int, default=221_184, help='of a tier A arm (%(default)s)')
    parser.add_argument('--flags', default='', help=f'of grow.py for every arm, after {FLAGS}')
    parser.add_argument('--only', nargs='+', default=[''], metavar='NAME', help='arms that begin so')
    args = parser.parse_args(argv)
    pictures.need_matplotlib()
    for name, flags in arms([*FLAGS.split(), *shlex.split(args.flags)], args.tokens).items():
        arm = args.folder / name
        if name.startswith(tuple(args.only)) and not (arm / 'result.json').exists():
            train(arm, flags)
            state = grow.load(arm)['state']
            result = dict(flags=flags, history=state['history'], seconds=state['seconds'], **costs(flags))
            with replacing(arm / 'result.json') as path:
                path.write_text(json.dumps(result, indent=1))
    draw(args.folder)

if __name__ == '__main__':
    main()
