"""Scores of runs on MMLU and the other tasks: by depth (the paper's figures 5 and 6), and of experts beside their merge.

    python results/scores.py out/grown out/monolithic                # every stage of each run, all tasks; questions are downloaded on first use
    python results/scores.py --data DIR out/grown out/ru/latest.pt out/zh/latest.pt out/ru+out/zh       # one checkpoint; a merge

What has been scored since its checkpoint was written is skipped, so stop it and start it again at will.
Writes results/scores.csv, .txt (the same as a table) and .png, or others by --out.
"""

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import eval_mmlu
import grow
import pictures
from substrate import Parser, UserError, cli, replacing

MAIN = dict.fromkeys(eval_mmlu.FILES, 'likelihood') | dict(squad='hit')          # the score of a task that is drawn


def scored(model, task, data):
    """Scores `model`, one word of the command line, where that is not done yet. -> [(name, content of its eval_TASK.json)], a row a checkpoint."""
    outs = model.split('+')
    a = SimpleNamespace(out=outs, task=task, all_stages=len(outs) == 1 and Path(model).is_dir(), limit=None)
    files = eval_mmlu.targets(a)

    def done(target, checkpoints):
        settings = json.loads(target.read_text(encoding='utf-8'))['settings'] if target.exists() else {}
        return (set(settings.get('checkpoints', ())) == checkpoints and settings['limit'] is None and settings['shots'] == 0
                and target.stat().st_mtime > max(Path(path).stat().st_mtime for path in checkpoints))
    if not all(done(target, set(map(str, paths))) for paths, target in files):
        eval_mmlu.main([*outs, '--task', task, *['--data', data] * bool(data), *['--all_stages'] * a.all_stages])
    short = '+'.join(Path(out).parent.name if out.endswith('.pt') else Path(out).name for out in outs)
    return [(short, json.loads(target.read_text(encoding='utf-8'))) for _, target in files]


def row_of(name, found):
    """A row of the table: scores in percent with their standard errors."""
    summary, task = found['summary'], found['settings']['task']
    left, main = summary['uncut'], MAIN[task]
    return dict(task=task, model=name, layers=summary['layers'], n=summary['total']['n'],
                **{score: eval_mmlu.percent(summary['total'][score]) if score in summary['total'] else ''
                   for score in ('likelihood', 'letter', 'hit', 'exact_match', 'f1')},
                chance=f'{100 * summary["chance"]:.2f}' if summary['chance'] else '', cut=f'{summary["cut"] / summary["total"]["n"]:.1%}',
                uncut=eval_mmlu.percent(left[main]) if left['n'] else '', padding=f'{summary["padding"]:.1%}', seconds=round(summary['seconds']))


def plot(rows, target):
    """A panel a task: score over depth with one standard error; models with more than one depth are joined, chance is dashed."""
    import matplotlib
    matplotlib.use('Agg')                              # draws into files, needs no screen
    import matplotlib.pyplot as plt
    tasks = list(dict.fromkeys(row['task'] for row in rows))
    figure, axes = plt.subplots(1, len(tasks), figsize=(3 * len(tasks), 3.6), squeeze=False)
    names = list(dict.fromkeys(row['model'] for row in rows))
    for axis, task in zip(axes[0], tasks):
        for k, name in enumerate(names):
            own = [row for row in rows if (row['task'], row['model']) == (task, name)]
            score, error = zip(*(map(float, row[MAIN[task]].split(' ± ')) for row in own))
            shift = 0.12 * (k - (len(names) - 1) / 2)  # so that bars do not hide each other
            axis.errorbar([row['layers'] + shift for row in own], score, error, marker='o', ms=4, lw=1.2, capsize=2, label=name)
        if own[0]['chance']:
            axis.axhline(float(own[0]['chance']), color='black', ls='--', lw=1, label='chance')
        axis.set_title(f'{task}: {MAIN[task]}', fontsize=9)
        axis.set_xlabel('layers')
        axis.spines[['top', 'right']].set_visible(False)
    axes[0][0].set_ylabel('percent')
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc='outside lower center', ncols=7, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    with replacing(target) as path:
        figure.savefig(path, dpi=130, format='png')


@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('models', nargs='+', metavar='MODEL', help='folder of a run: all its stages; a checkpoint; or several joined by +: their merge')
    parser.add_argument('--data', metavar='DIR', help='as in eval_mmlu.py')
    parser.add_argument('--out', metavar='PATH', type=Path, default=HERE / 'scores', help='of the table and picture, without an ending (results/scores)')
    parser.add_argument('--tasks', nargs='+', choices=list(MAIN), default=list(MAIN), help='(all)')
    a = parser.parse_intermixed_args(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError('the picture needs matplotlib: pip install matplotlib') from None
    rows = [row_of(name, found) for task in a.tasks for model in a.models for name, found in scored(model, task, a.data)]
    pictures.write_csv(a.out.with_suffix('.csv'), rows)
    with contextlib.redirect_stdout(io.StringIO()) as table:
        grow.table(rows)
    with replacing(a.out.with_suffix('.txt')) as path:
        path.write_text(table.getvalue(), encoding='utf-8')
    plot(rows, a.out.with_suffix('.png'))
    print(table.getvalue())


if __name__ == '__main__':
    main()
