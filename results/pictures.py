"""
The pictures of this project: the idea of growth in general, and the losses of your own runs.

    python results/pictures.py                                  # every picture that needs no run (idea) -> results/*.png
    python results/pictures.py loss out/001 out/002             # the losses of these runs -> results/loss.png
    python results/pictures.py loss out/001 --out mine.png

Needs matplotlib, which requirements-dev.txt installs.
"""

import csv
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
from substrate import Parser, UserError, cli, glyphs, replacing

try:
    import matplotlib
    matplotlib.use('Agg')                             # draws into files, needs no screen
    import matplotlib.pyplot as plt
    from matplotlib.patches import Arc, FancyArrowPatch, FancyBboxPatch, Rectangle
    from matplotlib.patheffects import withStroke
except ImportError:
    plt = None                                        # main says what to install

INK, GREY = '#22303c', '#667786'
FROZEN, TRAINED = ('#dbe5ef', '#8fa8c0', '#47627d'), ('#f7ab5e', '#d8752a', '#5a2a00')          # (area, edge, text)
BAND = '#b4c8dd', '#7d99b5', '#2f4a66'                # the interface: frozen too, and the ground that all stands on
RUNS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#444444'              # colour-blind safe (Okabe and Ito)


# ---------------------------------------------------------------------------------------------------------------------
# idea: how a model of 9 blocks grows, and how two grown models become one. Coordinates are pixels of a page 900 wide

GROUND, BLOCK, STEP, HEAD = 142, 26, 30, 34           # where the blocks begin; height of a block, of a block with its gap, of the head


def say(ax, x, y, text, size=9, colour=INK, **more):
    ax.text(x, y, text, size=size, color=colour, **{'ha': 'center', 'va': 'center'} | more)


def box(ax, x, y, width, height, colours, text='', size=9):
    """A rounded box with its lower left corner at (x, y); a frozen one carries a padlock."""
    area, edge, ink = colours
    ax.add_patch(FancyBboxPatch((x + 2, y + 2), width - 4, height - 4, 'round,pad=2,rounding_size=4', fc=area, ec=edge, lw=1))
    say(ax, x + width / 2, y + height / 2, text, size, ink)
    if colours in (FROZEN, BAND):
        x, y = x + width - 12, y + height / 2
        ax.add_patch(Rectangle((x - 4, y - 5), 8, 6, color=ink, lw=0))
        ax.add_patch(Arc((x, y + 1), 5.5, 8, theta1=0, theta2=180, color=ink, lw=1.3))


def arrow(ax, start, end, colour=GREY):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=9, lw=1.3, color=colour, shrinkA=0, shrinkB=0))


def stack(ax, x, width, row):
    """A model in one phase (a row of the ledger): its blocks from the ground up, the adapters beside them, and the head on top."""
    for k in range(row['layers']):
        frozen, y = k < row['frozen'], GROUND + k * STEP
        strip = 16 if frozen and row['rank'] else 0
        box(ax, x, y, width - strip, BLOCK, FROZEN if frozen else TRAINED, f'{k + 1}')
        if strip:
            ax.add_patch(Rectangle((x + width - 11, y), 9, BLOCK, fc=TRAINED[0], ec=TRAINED[1], lw=1))
    box(ax, x, GROUND + row['layers'] * STEP, width, HEAD, TRAINED, 'LayerNorm, LM head')


def tokens(ax, x, text):
    """The tokens of `text` as the model sees them: their glyphs, 32 pixels wide, centred on x."""
    for k, character in enumerate(text):
        left = x + 32 * (k - len(text) / 2)
        ax.imshow(glyphs()[ord(character)].reshape(32, 32), extent=(left, left + 32, 97, 129), cmap='gray_r', interpolation='nearest', zorder=3)
        ax.add_patch(Rectangle((left, 97), 32, 32, fill=False, ec=BAND[1], lw=0.8, zorder=4))


def bill(ax, x, width, row, largest):
    """Under a column: active and total parameters, as a bar and in digits."""
    ax.add_patch(Rectangle((x, 48), width * row['total'] / largest, 10, color=FROZEN[1], lw=0))
    ax.add_patch(Rectangle((x, 48), width * row['active'] / largest, 10, color=TRAINED[0], lw=0))
    say(ax, x + width / 2, 33, f'{row["active"]:,}', 10, TRAINED[1], weight='bold')
    say(ax, x + width / 2, 14, f'{row["total"]:,}', 10, GREY)


def legend(ax, x, y):
    for k, (colours, text) in enumerate(((TRAINED, 'trained'), (FROZEN, 'frozen'), (None, 'LoRA adapter'))):
        if colours:
            box(ax, x, y - 25 * k, 34, 18, colours)
        else:
            ax.add_patch(Rectangle((x + 12, y - 25 * k), 9, 18, fc=TRAINED[0], ec=TRAINED[1], lw=1))
        say(ax, x + 43, y - 25 * k + 9, text, ha='left')


def experts(ax, x, width):
    """Two models that were trained apart, on the interface that both share: their logits are averaged."""
    middle = x + width + 8
    for left, name in ((x, 'Russian'), (x + width + 16, 'Chinese')):
        centre = left + width / 2
        for k in range(9):
            box(ax, left, GROUND + 20 * k, width, 17, FROZEN, f'{k + 1}', 8)
        box(ax, left, GROUND + 180, width, HEAD, TRAINED, 'LN, head')
        say(ax, centre, GROUND + 229, f'{name} expert', weight='bold')
        tokens(ax, centre, 'Ж中')
        arrow(ax, (centre, GROUND + 242), (middle + (centre - middle) * 0.55, GROUND + 268))
    box(ax, middle - 70, GROUND + 270, 140, 30, ('white', INK, INK), 'mean of the logits')
    say(ax, middle, 522, 'composition', 11, weight='bold')
    say(ax, middle, 492, 'experts trained apart fit together:\nsame interface', colour=GREY)
    say(ax, middle, 45, 'no change of architecture;\nat most the heads\nare trained once more', colour=GREY)


def idea():
    """The figure of the README: growth on the left, composition on the right. Every number comes from the ledger."""
    c = grow.Config(**grow.PRESETS['gpu'], lora='interleaved', lora_stages='2', lora_tokens=grow.PRESETS['gpu']['stage_tokens'])
    rows = grow.ledger(c)
    figure = plt.figure(figsize=(9, 5.4))
    ax = figure.add_axes((0, 0, 1, 1))
    box(ax, 10, 66, 880, 68, BAND)
    say(ax, 450, 81, 'frozen token interface: a token is its picture, never trained', 9, BAND[2])
    for k, row in enumerate(rows):
        x, width = 66 + 146 * k, 130
        if row['rank']:
            title, what = 'LoRA phase', f'adapt all {row["layers"]} blocks\n(rank {row["rank"]}), then merge'
        else:
            title, what = f'stage {row["stage"]}', f'freeze, append {row["trained"]},\ntrain them' if row['frozen'] else f'train {row["trained"]} blocks'
        say(ax, x + width / 2, 522, title, 11, weight='bold')
        say(ax, x + width / 2, 492, what, colour=GREY)
        stack(ax, x, width, row)
        bill(ax, x, width, row, rows[-1]['total'])
        tokens(ax, x + width / 2, 'grow')
    legend(ax, 70, 410)
    experts(ax, 674, 98)
    say(ax, 10, 33, 'active', ha='left', colour=TRAINED[1], weight='bold')
    say(ax, 10, 14, 'total', ha='left', colour=GREY)
    ax.set(xlim=(0, 900), ylim=(0, 540), aspect='auto')
    ax.axis('off')
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# loss: what runs have logged

@dataclass
class Stretch:
    """A phase as logged: its kind ('grow', 'lora', ...), stage, tokens at its start and end; its train and val losses, [(tokens, loss)]."""
    kind: str
    stage: str
    start: int
    end: int
    train: list
    val: list


def read_run(folder):
    """RUN/log.csv -> [Stretch]."""
    path, stretches, start = Path(folder) / 'log.csv', [], 0
    try:
        with open(path, newline='') as file:
            rows = list(csv.DictReader(file))
        for (kind, stage), part in itertools.groupby(rows, key=lambda row: (row['phase'], row['stage'])):
            part = list(part)
            train, val = ([(int(row['tokens']), float(row[name])) for row in part if row[name]] for name in ('train_loss', 'val_loss'))
            stretches.append(Stretch(kind, stage, start, start := int(part[-1]['tokens']), train, val))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f'cannot read {path} ({error!r}): name folders of runs of grow.py') from None
    if not stretches:
        raise UserError(f'{path} holds no losses yet: wait for the first ones')
    return stretches


def smooth(values, width):
    """Moving average over `width` values, over fewer at the ends."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, 'same') / np.convolve(np.ones(len(values)), ones, 'same')


def spread(heights, gap):
    """Moves sorted heights apart to at least `gap`, as a group about their old centre."""
    moved = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    return np.array(moved) - np.mean(moved) + np.mean(heights)


def loss(folders):
    """Train loss, averaged within each phase, over tokens; above it a lane a run with its phases; at each phase end the val loss in digits."""
    figure, ax = plt.subplots(figsize=(9, 5), layout='constrained')
    runs = {Path(folder).name: read_run(folder) for folder in folders}
    height = 0.045                                    # of a lane, in units of the axes
    dots = []
    for lane, ((name, stretches), colour) in enumerate(zip(runs.items(), itertools.cycle(RUNS))):
        width = max(1, sum(len(s.train) for s in stretches) // 40)
        bottom = 1.02 + height * (len(runs) - 1 - lane)
        across = ax.get_xaxis_transform()             # x in tokens, y in units of the axes
        for s in stretches:
            tokens, losses = np.array(s.train).T
            ax.plot(tokens, losses, color=colour, lw=0.8, alpha=0.25)
            ax.plot(tokens, smooth(losses, width), color=colour, lw=1.8, label=name if s is stretches[0] else None)
            ax.add_patch(Rectangle((s.start, bottom), s.end - s.start, height * 0.85, transform=across, clip_on=False, fc=colour, ec='white', lw=1.5,
                                   alpha=0.3 if s.kind == 'lora' else 0.75))
            ax.text((s.start + s.end) / 2, bottom + height * 0.4, 'LoRA' if s.kind == 'lora' else f'{s.stage}', transform=across, size=8.5, ha='center', va='center')
            dots += [(tokens, loss, colour) for tokens, loss in s.val]
    ax.legend()
    return figure


@cli
def main(argv=None):
    parser = Parser(description=__doc__.split('\n\n')[0])
    parser.add_argument('name', nargs='?', default='all', choices=['all', 'idea', 'loss'])
    parser.add_argument('runs', nargs='*')
    parser.add_argument('--out')
    args = parser.parse_args(argv)
    for name, figure in dict(idea=idea).items() if args.name == 'all' else [(args.name, idea if args.name == 'idea' else lambda: loss(args.runs))]:
        figure().savefig(args.out or HERE / f'{name}.png', dpi=200, facecolor='white')


if __name__ == '__main__':
    main()
