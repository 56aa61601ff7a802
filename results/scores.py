"""Scores of runs on MMLU and other tasks: by depth (the paper's figures 5 and 6), and of experts and merges.

    python results/scores.py out/grown out/monolithic      # every stage of each run, all tasks
    python results/scores.py out/ru/latest.pt out/zh/latest.pt out/ru+out/zh       # one checkpoint; a merge

What has been scored since its checkpoint was written is skipped, so stop it and start it again at will.
Writes results/scores.csv, .txt (the same as a table) and .png, or others by --out.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import eval_mmlu
import pictures
from substrate import Parser, UserError, cli, replacing, table

# the score that is drawn
MAIN = dict.fromkeys(eval_mmlu.TASKS, 'likelihood') | dict(squad='hit')

def scored(model, task, data):
    """Scores `model`, a word of the command line, where that is not done yet. Yields a row a checkpoint."""
    outs = model.split('+')
    stages = len(outs) == 1 and Path(model).is_dir()
    for paths, target in eval_mmlu.targets(outs, task, stages):
        found = json.loads(target.read_text(encoding='utf-8')) if target.exists() else {}
        old = target.exists() and target.stat().st_mtime <= max(path.stat().st_mtime for path in paths)
        if not found or found['settings']['shots'] or old:
            eval_mmlu.main([*map(str, paths), '--task', task, *(['--data', data] if data else [])])
            found = json.loads(target.read_text(encoding='utf-8'))
        summary, total = found['summary'], eval_mmlu.cells(found['summary']['total'])
        whole = eval_mmlu.cells(summary['groups'].get('whole prompts', {}))
        names = ['likelihood', 'letter', 'hit', 'exact_match', 'f1', 'chance', 'cut']
        short = '+'.join(path.parent.name for path in paths)
        yield dict(task=task, model=short, layers=summary['layers'], n=total['n'],
                   **{name: total.get(name, '') for name in names}, whole=whole.get(MAIN[task], ''))

def plot(rows, target):
    """A panel a task: score over depth with one standard error; chance is dashed."""
    import matplotlib
    matplotlib.use('Agg')                              # draws into files, needs no screen
    import matplotlib.pyplot as plt
    tasks, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ('task', 'model'))
    figure, axes = plt.subplots(1, len(tasks), figsize=(3 * len(tasks), 3.6), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        for k, name in enumerate(names):
            own = [row for row in rows if (row['task'], row['model']) == (task, name)]
            score, error = zip(*(map(float, row[MAIN[task]].split(' ± ')) for row in own))
            # shifted, so that bars do not hide each other
            depths = [row['layers'] + 0.12 * (k - (len(names) - 1) / 2) for row in own]
            axis.errorbar(depths, score, error, marker='o', ms=4, lw=1.2, capsize=2, label=name)
        if own[0]['chance']:
            chance = float(own[0]['chance'].split(' ± ')[0])
            axis.axhline(chance, color='black', ls='--', lw=1, label='chance')
        axis.set_title(f'{task}: {MAIN[task]}', fontsize=9)
        axis.set_xlabel('layers')
        axis.spines[['top', 'right']].set_visible(False)
    axes[0][0].set_ylabel('percent')
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc='outside lower center', ncols=7, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    with replacing(target) as path:
        figure.savefig(path, dpi=130, format='png')

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='+', metavar='MODEL', help='run, checkpoint, or several joined by +')
    parser.add_argument('--data', metavar='DIR', help='as in eval_mmlu.py')
    parser.add_argument('--out', metavar='PATH', type=Path, default=HERE / 'scores', help='(results/scores)')
    parser.add_argument('--tasks', nargs='+', choices=MAIN, default=MAIN, help='(all)')
    a = parser.parse_intermixed_args(argv)
    if not importlib.util.find_spec('matplotlib'):
        raise UserError('the picture needs matplotlib: pip install matplotlib')
    rows = [row for task in a.tasks for model in a.models for row in scored(model, task, a.data)]
    pictures.write_csv(a.out.with_suffix('.csv'), rows)
    with replacing(a.out.with_suffix('.txt')) as path, open(path, 'w', encoding='utf-8') as file:
        with contextlib.redirect_stdout(file):
            table(rows)
    plot(rows, a.out.with_suffix('.png'))
    table(rows)

if __name__ == '__main__':
    main()
