"""
The controlled study: what does growth cost or gain against training all layers at once, and do glyphs matter?

    python results/study.py                            # the table of results/study, in seconds
    python results/study.py out/mine --flags="--context 128" --only A.grown    # trains such arms there first

An arm is FOLDER/ARM: its run, with result.json once it is finished, so stop it and start it again at will.
Tier A compares ways to grow at equal tokens; tier B, half as long, token interfaces. Writes out/FOLDER.csv
and .txt; `pictures.py loss` draws the logs of arms.

results/study is the record of the first edition (commits f9e3f6b to 8146166); run.txt says how each arm was
made. At b189083 this script makes all of it, with arms of equal FLOPs, scores, and pictures.
"""

import argparse
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
from substrate import Parser, UserError, cli, replacing

FLAGS = '--d_model 256 --heads 8 --context 256 --batch_tokens 1024 --eval_tokens 1_000_000'
EQUAL = '--stage_ratio 1'
RECIPES = dict(grown=EQUAL, lora=EQUAL + ' --lora interleaved', long='--stage_ratio 0.1')      # ways to grow

def costs(flags, head_rows):
    """FLOPs of a whole run, in blocks and in all."""
    rows = grow.ledger(grow.configure(flags)[0], head_rows)
    block, head = (sum(row[kind] * row['tokens'] for row in rows) for kind in ('block_flops', 'head_flops'))
    return dict(block_flops=block, total_flops=block + head)

def sized(flags, tokens):
    """Flags with stages so long that the run has so many tokens; LoRA phases are as long as the first one."""
    c, _ = grow.configure(flags)
    plan = grow.phases(dataclasses.replace(c, monolithic=False))
    first = tokens / sum(c.stage_ratio if phase.kind == 'grow' and phase.stage > 1 else 1 for phase in plan)
    return [*flags, '--stage_tokens', str(round(first)), '--lora_tokens', str(round(first))]

def arms(common, tokens):
    """{name: flags of grow.py}."""
    found = {}
    for seed in '01':
        base = [*common, '--seed', seed]
        found[f'A.mono_2e-3.s{seed}'] = sized([*base, *EQUAL.split(), '--monolithic', '--lr', '2e-3'], tokens)
        found[f'A.three_layers.s{seed}'] = sized([*base, '--layers', '3'], tokens)
        for recipe, more in RECIPES.items():
            found[f'A.{recipe}.tokens.s{seed}'] = sized([*base, *more.split()], tokens)
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
                minutes=round(r['seconds'] / 60, 1), val_loss=last['val_loss'],
                perplexity=last['perplexity'], bits_per_byte=last['bits_per_byte'],
                by_phase=' '.join(f'{h["val_loss"]:.3f}' for h in r['history']))

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', nargs='?', type=Path, default=HERE / 'study', help='(results/study)')
    parser.add_argument('--tokens', type=int, default=221_184, help='of a tier A arm (%(default)s)')
    parser.add_argument('--flags', default='', help=f'of grow.py for every arm, after {FLAGS}')
    parser.add_argument('--only', nargs='+', default=[''], metavar='NAME', help='arms that begin so')
    args = parser.parse_args(argv)
    for name, flags in arms([*FLAGS.split(), *shlex.split(args.flags)], args.tokens).items():
        arm = args.folder / name
        if name.startswith(tuple(args.only)) and not (arm / 'result.json').exists():
            train(arm, flags)
            ckpt = grow.load(arm)
            state, head_rows = ckpt['state'], len(ckpt['model']['head.ids'])
            result = dict(flags=flags, history=state['history'], seconds=state['seconds'],
                          **costs(flags, head_rows))
            with replacing(arm / 'result.json') as path:
                path.write_text(json.dumps(result, indent=1))
    results, out = sorted(args.folder.glob('*/result.json')), Path('out', args.folder.name)
    if not results:
        raise UserError(f'{args.folder} has no finished arm: give other names to --only, or leave it out')
    rows = [row_of(path.parent.name, json.loads(path.read_text())) for path in results]
    pictures.write_tables(out, rows)

if __name__ == '__main__':
    main()
