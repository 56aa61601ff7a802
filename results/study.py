"""The controlled study: what does growth cost or gain against training all layers at once, and do the glyphs matter?

    python results/study.py                                    # everything; what is finished is skipped, so stop it and start it again at will
    python results/study.py --only draw                        # tables and pictures from the results in results/study, in seconds
    python results/study.py --only A.mono --mmlu DIR           # the arms whose names begin so; MMLU's csv files from DIR instead of the network
    python results/study.py --tokens 6144 --work /tmp/try --flags="--d_model 64 --heads 2 --context 64 --batch_tokens 512"      # a small trial

All arms see the same text in the same order (the first so many sequences of one shuffled epoch of the standard library's text). Tier A, two
seeds, asks at equal tokens, at equal FLOPs in the blocks and at equal FLOPs in all; tier B, one seed, half the tokens, compares interfaces,
births and stages of one layer. Weights stay in --work (out/study, 300 MB an arm); results/study/ARM gets what is kept of each: log.csv, plan.txt (the
ledger), run.txt (what it printed, with a sample) and result.json. Writes results/study.txt, study.csv and study_*.png.
"""

import argparse
import concurrent.futures
import contextlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
import pictures
from substrate import Parser, UserError, cli, replacing

FLAGS = '--d_model 256 --heads 8 --context 256 --batch_tokens 1024 --eval_tokens 1_000_000'
QUESTIONS = 500                                        # of MMLU, evenly spread, for each depth of each arm

# ---------------------------------------------------------------------------------------------------------------------
# The arms

EQUAL = '--stage_ratio 1 --lr_later 3e-3 --head_lr_later 2e-3 '      # with stages of equal length, cooler rates are worse
RECIPES = {                                            # ways to grow 9 layers by three at a time, none above the budget of a stage: flags, LoRA phases
    'grown': (EQUAL, 0),                               # the paper's: three equal stages
    'lora': (EQUAL + '--lora interleaved --lora_lr 2e-3', 2),      # and LoRA phases after the second and the third, each as long as a stage
    'long': ('', 0),                                   # ours, the preset: later stages a tenth as long as the first, at cooler rates
}
RATES = {'0': ('1e-3', '2e-3', '3e-3'), '1': ('2e-3',)}      # of the monolithic model's blocks, by seed: seed 1 takes the best of seed 0. Grown: the preset's 3e-3


def flops(flags):
    """FLOPs of a whole run: (blocks, all)."""
    rows = grow.ledger(grow.configure(flags)[0])
    blocks = sum(r['block_flops'] * r['tokens'] for r in rows)
    return blocks, blocks + sum(r['head_flops'] * r['tokens'] for r in rows)


def sized(flags, lora, stage_tokens, batch):
    """Flags with stages (and LoRA phases as long as a stage) of so many tokens, in whole batches."""
    n = str(max(1, round(stage_tokens / batch)) * batch)
    return [*flags, '--stage_tokens', n, *['--lora_tokens', n] * (lora > 0)]


def arms(common, tokens):
    """{name: flags of grow.py}. An arm that is equal in FLOPs has as many tokens as the ledger says that they buy."""
    batch, found = grow.configure(common)[0].batch_tokens, {}
    for seed in RATES:
        base = [*common, '--seed', seed]
        mono = sized([*base, *EQUAL.split(), '--monolithic'], 0, tokens / 3, batch)
        for rate in RATES[seed]:
            found[f'A.mono_{rate}.s{seed}'] = [*mono, '--lr', rate]
        if seed == '0':
            found['A.mono_restarts.s0'] = [*mono, '--restarts']
        found[f'A.three_layers.s{seed}'] = sized([*base, '--layers', '3'], 0, tokens, batch)
        for recipe, (more, lora) in RECIPES.items():
            flags = [*base, *more.split()]
            found[f'A.{recipe}.tokens.s{seed}'] = sized(flags, lora, tokens / (3 + lora), batch)
            for k, equal in enumerate(('block_flops', 'total_flops')):
                many = 1000 * batch
                found[f'A.{recipe}.{equal}.s{seed}'] = sized(flags, lora, many * flops(mono)[k] / flops(sized(flags, lora, many, batch))[k], batch)
    half = sized([*common, *EQUAL.split()], 0, tokens / 6, batch)
    for substrate in ('unicode', 'binary', 'random', 'learned'):
        found[f'B.{substrate}.grown'] = [*half, '--substrate', substrate]
        found[f'B.{substrate}.mono'] = [*half, '--substrate', substrate, '--monolithic']
    for birth in ('random', 'copy'):                   # identity is B.unicode.grown
        found[f'B.birth_{birth}.grown'] = [*half, '--birth', birth]
    found['B.one_at_a_time.grown'] = sized([*common, *EQUAL.split(), '--layers', '6', '--layers_per_stage', '1'], 0, tokens / 12, batch)
    return found


def train(order, name, flags, work, mmlu, place):
    """Trains an arm, or goes on where it was stopped, scores it, and keeps its results. One thread: two arms at a time fill two cores better than one."""
    kept, out = place / 'study' / name, work / name
    if (kept / 'result.json').exists():
        return
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, HERE.parent / 'grow.py', *flags, '--out', name, *['--resume'] * (out / 'latest.pt').exists()]
    with open(out / 'console.txt', 'a') as console:
        if subprocess.run(command, cwd=work, env=environment, stdout=console, stderr=subprocess.STDOUT).returncode:
            raise UserError(f'training {name} failed: its last words are in {out}/console.txt')
        subprocess.run([sys.executable, HERE.parent / 'eval_mmlu.py', name, '--all_stages', '--limit', str(QUESTIONS), *['--data', mmlu] * bool(mmlu)],
                       cwd=work, env=environment, stdout=console, stderr=subprocess.STDOUT)
    lines = (out / 'console.txt').read_text().splitlines()
    if not list(out.glob('eval_mmlu_*.json')):
        raise UserError(f'scoring {name} failed: {lines[-1]}')
    kept.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=HERE, capture_output=True, text=True).stdout.strip()
    (kept / 'run.txt').write_text(f'python grow.py {shlex.join(flags)}\n{time.strftime("%Y-%m-%d")}, commit {commit}\n\n'
                                  + '\n'.join(line for line in lines if '| step' not in line) + '\n')
    shutil.copy(out / 'log.csv', kept)
    with contextlib.redirect_stdout(io.StringIO()) as plan:
        grow.print_plan(grow.configure(flags)[0])
    (kept / 'plan.txt').write_text(plan.getvalue())
    at = grow.load(out)['at']
    scores = {}
    for path in sorted(out.glob('eval_mmlu_*.json')):
        summary = json.loads(path.read_text())['summary']
        scores[summary['layers']] = [summary['total']['likelihood'][key] for key in ('mean', 'stderr')]
    blocks, total = flops(flags)
    peak = max(float(line.split()[2]) for line in lines if line.startswith('peak memory'))
    with replacing(kept / 'result.json') as path:      # last: it says that the arm is finished
        path.write_text(json.dumps(dict(order=order, flags=flags, history=at['history'], seconds=at['seconds'], block_flops=blocks, total_flops=total, peak_gib=peak,
                                        mmlu=scores), indent=1))

# ---------------------------------------------------------------------------------------------------------------------
# Tables and pictures, from results/study alone


def results(place):
    """{name: result.json} of all finished arms in place/study, in the order of `arms`."""
    found = {path.parent.name: json.loads(path.read_text()) for path in (place / 'study').glob('*/result.json')}
    if not found:
        raise UserError(f'{place}/study holds no finished arm: leave out --only draw')
    return {name: found[name] for name in sorted(found, key=lambda name: found[name]['order'])}


def row_of(name, r):
    """A row of the table."""
    last = r['history'][-1]
    return dict(arm=name, layers=last['layers'], total_params=last['total_params'], active_params=max(h['active_params'] for h in r['history']),
                tokens=last['tokens'], block_flops=f'{r["block_flops"]:.3g}', total_flops=f'{r["total_flops"]:.3g}', minutes=round(r['seconds'] / 60, 1),
                peak_GiB=r['peak_gib'], val_loss=last['val_loss'], perplexity=last['perplexity'], bits_per_byte=last['bits_per_byte'],
                by_phase=' '.join(f'{h["val_loss"]:.3f}' for h in r['history']))


def loss_of(r):
    return r['history'][-1]['val_loss']


def verdicts(found):
    """Plain sentences: each way to grow against the monolithic model, at its best rate, of the same seed."""
    seeds = [f's{seed}' for seed, rates in RATES.items() if all(f'A.mono_{rate}.s{seed}' in found for rate in rates)]
    best = {s: min((found[f'A.mono_{rate}.{s}'] for rate in RATES[s[1]]), key=loss_of) for s in seeds}
    goals = dict(tokens=1.03, block_flops=0.96, total_flops=1.00)
    for recipe in RECIPES:
        for equal, goal in goals.items():
            name = f'A.{recipe}.{equal}'
            pairs = [(found[f'{name}.{s}'], best[s]) for s in seeds if f'{name}.{s}' in found]
            if pairs:
                ratios = [loss_of(r) / loss_of(mono) for r, mono in pairs]
                r, mono = pairs[0]
                yield (f'{recipe:6} at equal {equal:11}: {" and ".join(f"{x:.3f}" for x in ratios)} x the monolithic val loss (goal {goal:.2f}: '
                       f'{"met" if max(ratios) <= goal else "NOT met"}); {r["history"][-1]["tokens"] / mono["history"][-1]["tokens"]:.2f} x its tokens, '
                       f'{r["block_flops"] / mono["block_flops"]:.2f} x its block FLOPs, {r["total_flops"] / mono["total_flops"]:.2f} x all its FLOPs')
    for name in ('mono_restarts', 'three_layers'):
        ratios = [f'{loss_of(found[f"A.{name}.{s}"]) / loss_of(best[s]):.3f}' for s in seeds if f'A.{name}.{s}' in found]
        if ratios:
            yield f'{name} at equal tokens: {" and ".join(ratios)} x the monolithic val loss'


def flops_picture(plt, found):
    """Val loss after each phase over the FLOPs spent so far, in blocks and in all; seed 0, and the ends of seed 1 as hollow marks."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, layout='constrained')
    for axis, kinds, title in zip(axes, (('block_flops',), ('block_flops', 'head_flops')), ('FLOPs in blocks', 'FLOPs in all (the head holds most of them)')):
        groups = {'monolithic': [f'A.mono_{rate}' for rate in RATES['0']]} | {recipe: [f'A.{recipe}.{e}' for e in ('tokens', 'total_flops', 'block_flops')] for recipe in RECIPES}
        for (label, names), colour in zip(groups.items(), pictures.RUNS):
            for name in names:
                for seed in ('0', '1'):
                    if (r := found.get(f'{name}.s{seed}')) is None:
                        continue
                    spent, x = 0.0, []
                    for p in grow.ledger(grow.configure(r['flags'])[0]):
                        spent += sum(p[kind] for kind in kinds) * p['tokens']
                        x.append(spent)
                    y = [h['val_loss'] for h in r['history']]
                    if seed == '0':
                        axis.plot(x, y, color=colour, lw=1.2, alpha=0.6)
                        axis.plot(x[:-1], y[:-1], '.', color=colour, ms=5)
                    axis.plot(x[-1], y[-1], 'o', color=colour, ms=7, mfc=colour if seed == '0' else 'none')
            axis.plot([], [], 'o-', color=colour, label=label)
        axis.set(xlabel=title, xlim=(0, None))
        axis.grid(lw=0.5, alpha=0.4)
        axis.spines[['top', 'right']].set_visible(False)
    axes[0].set_ylabel('val loss, nats a token')
    axes[0].legend(frameon=False, title='large: end of a run; hollow: seed 1', fontsize=9)
    return figure


def substrates_picture(plt, found):
    """Tier B: the val loss after each stage, grown, and the monolithic model's, by interface; and births."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout='constrained')
    names = [name for name in found if name.startswith('B.')]
    for k, name in enumerate(names):
        losses = [h['val_loss'] for h in found[name]['history']]
        colour = pictures.RUNS[1] if name.endswith('grown') else pictures.RUNS[0]
        axis.plot([k] * len(losses), losses, 'o', color=colour, alpha=0.35, ms=6)
        axis.plot(k, losses[-1], 'o', color=colour, ms=9)
        axis.text(k + 0.12, losses[-1], f'{losses[-1]:.3f}', va='center', fontsize=8)
    axis.set_xticks(range(len(names)), [name[2:].replace('.', '\n').replace('_', '\n', 1).replace('_', ' ') for name in names], fontsize=8)
    axis.set_ylabel('val loss, nats a token (pale: earlier stages)')
    axis.grid(axis='y', lw=0.5, alpha=0.4)
    axis.spines[['top', 'right']].set_visible(False)
    return figure


def depth_picture(plt, found):
    """Tier A, seed 0, equal tokens: MMLU by likelihood and val loss, by depth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout='constrained')
    shown = ['A.mono_2e-3.s0', *(f'A.{recipe}.tokens.s0' for recipe in RECIPES), 'B.one_at_a_time.grown']
    for name, colour, shift in zip(shown, pictures.RUNS, (-0.2, -0.1, 0, 0.1, 0.2)):
        if name in found:
            r = found[name]
            depths = [int(depth) for depth in r['mmlu']]
            scores, errors = zip(*((100 * score, 100 * error) for score, error in r['mmlu'].values()))
            left.errorbar([d + shift for d in depths], scores, errors, marker='o', ms=4, capsize=2, lw=1.2, color=colour, label=name)
            by_depth = {h['layers']: h['val_loss'] for h in r['history']}
            right.plot(list(by_depth), list(by_depth.values()), 'o-', color=colour, lw=1.2, ms=5, label=name)
    left.axhline(25, color='black', ls='--', lw=1)
    left.set(xlabel='layers', ylabel=f'MMLU by likelihood, percent of {QUESTIONS}')
    right.set(xlabel='layers', ylabel='val loss, nats a token')
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[['top', 'right']].set_visible(False)
    return figure


def draw(place):
    """place/study -> place/study.txt, study.csv and the pictures. `place`: results, or the folder of a trial."""
    if pictures.plt is None:
        raise UserError('the pictures need matplotlib: pip install matplotlib')
    found = results(place)
    rows = [row_of(name, r) for name, r in found.items()]
    pictures.write_csv(place / 'study.csv', rows)
    with contextlib.redirect_stdout(io.StringIO()) as table:
        grow.table(rows)
    text = '\n'.join([table.getvalue(), *verdicts(found)])
    print(text)
    with replacing(place / 'study.txt') as path:
        path.write_text(text + '\n')
    runs = [place / 'study' / name for name in ('A.mono_2e-3.s0', *(f'A.{recipe}.tokens.s0' for recipe in RECIPES)) if name in found]
    for name, figure in (('tokens', pictures.loss(runs) if runs else None), ('flops', flops_picture(pictures.plt, found)),
                         ('substrates', substrates_picture(pictures.plt, found)), ('depth', depth_picture(pictures.plt, found))):
        if figure:
            with replacing(place / f'study_{name}.png') as path:
                figure.savefig(path, dpi=130, format='png')


@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--work', default=HERE.parent / 'out' / 'study', type=Path, help='folder of data and weights (out/study)')
    parser.add_argument('--tokens', type=int, default=221_184, help='training tokens of a tier A arm (%(default)s); half as many in tier B')
    parser.add_argument('--flags', default='', help=f'further flags of grow.py for every training, after {FLAGS}')
    parser.add_argument('--only', nargs='+', default=[''], metavar='NAME', help='the arms whose names begin so; draw: nothing but tables and pictures')
    parser.add_argument('--jobs', type=int, default=2, help='arms at a time, of one thread each (%(default)s)')
    parser.add_argument('--mmlu', metavar='DIR', help='as --data of eval_mmlu.py')
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.tokens < 1:
        parser.error('--jobs and --tokens must be at least 1')
    trial = args.flags or args.tokens != parser.get_default('tokens')
    place = args.work.resolve() if trial else HERE     # the results of a small trial stay with its weights
    if args.only != ['draw']:
        args.work.mkdir(parents=True, exist_ok=True)
        common = [*FLAGS.split(), *shlex.split(args.flags)]
        mmlu, work = args.mmlu and str(Path(args.mmlu).resolve()), args.work.resolve()
        os.chdir(work)                                 # where grow.py finds data/
        grow.open_data(grow.configure(common)[0])      # prepares it, once
        todo = [(k, name, flags) for k, (name, flags) in enumerate(arms(common, args.tokens).items()) if name.startswith(tuple(args.only))]
        if not todo:
            parser.error(f'no arm begins with {" ".join(args.only)}')
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for name, _ in zip((name for _, name, _ in todo), pool.map(lambda arm: train(*arm, work, mmlu, place), todo)):
                print(f'{name}: val loss {loss_of(json.loads((place / "study" / name / "result.json").read_text())):.4f}', flush=True)
    draw(place)


if __name__ == '__main__':
    main()
