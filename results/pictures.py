"""
The pictures of this project: the idea of growth, the losses of your runs, and what a model sees of a text.

    python results/pictures.py idea                                  # results/idea.png
    python results/pictures.py loss out/001 out/002                  # losses of runs: out/001/loss.png
    python results/pictures.py loss out/001 --out mine.png
    python results/pictures.py show "Привет, 你好, the 🎉"            # a text's tokens as numbers: show.png

The first two need matplotlib, which is in requirements-dev.txt.
"""

import argparse
import csv
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
from substrate import (CELL, VOCAB, Parser, UserError, cli, glyphs, principal_components, readable, replacing,
                       token_texts, tokenizer, unicode_table)

try:
    import matplotlib
    matplotlib.use('Agg')                             # draws into files, needs no screen
    import matplotlib.pyplot as plt
    from matplotlib.patches import Arc, FancyArrowPatch, FancyBboxPatch, Rectangle
except ImportError:
    plt = None                                        # main says what to install

INK, GREY = '#22303c', '#5d6c7a'
# of an area, its edge and the text on it
TRAINED, FROZEN = ('#f7ab5e', '#d8752a', '#5a2a00'), ('#dbe5ef', '#8fa8c0', '#47627d')
INTERFACE, PLAIN = ('#b4c8dd', '#7d99b5', '#2f4a66'), ('white', INK, INK)
# told apart by the colour-blind (Okabe and Ito)
RUNS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#444444'


def write_csv(target, rows):
    """Dicts of equal keys -> a csv file, whole or absent: for the scripts beside this one."""
    with replacing(target) as path, open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

# --------------------------------------------------------------------------------------------------------
# idea: how a model of 9 blocks grows, and how two grown models become one, in pixels of a page of 900 x 566

# where blocks begin; height of a block, of a block and its gap, of a head
FLOOR, BLOCK, STEP, HEAD = 166, 26, 30, 38


def say(ax, x, y, text, size=9, colour=INK, **more):
    ax.text(x, y, text, size=size, color=colour, **{'ha': 'center', 'va': 'center'} | more)


def box(ax, x, y, width, height, colours, text=''):
    """A box with its lower left corner at (x, y), in colours (area, edge, text)."""
    area, edge, ink = colours
    shape = 'round,pad=2,rounding_size=4'
    ax.add_patch(FancyBboxPatch((x + 2, y + 2), width - 4, height - 4, shape, fc=area, ec=edge, lw=1))
    say(ax, x + width / 2, y + height / 2, text, 8.5, ink)


def padlock(ax, x, y, colour, size=1):
    ax.add_patch(Rectangle((x - 4 * size, y - 5 * size), 8 * size, 6 * size, color=colour, lw=0))
    ax.add_patch(Arc((x, y + size), 5.5 * size, 8 * size, theta2=180, color=colour, lw=1.3 * size))


def block(ax, x, y, width, height, trained, text='', adapter=False):
    """A block: warm while it trains, else cool and locked; an adapter is a thin warm strip beside it."""
    if adapter:
        ax.add_patch(Rectangle((x + width - 11, y), 9, height, fc=TRAINED[0], ec=TRAINED[1], lw=1))
        width -= 16
    box(ax, x, y, width, height, TRAINED if trained else FROZEN, text)
    if not trained:
        padlock(ax, x + width - 12, y + height / 2, FROZEN[2])


def arrow(ax, start, end):
    style = dict(arrowstyle='-|>', mutation_scale=9, lw=1.3, color=GREY, shrinkA=0, shrinkB=0)
    ax.add_patch(FancyArrowPatch(start, end, **style))


def tokens(ax, x, text):
    """The tokens of `text` as the model sees them: their glyphs, side by side, centred on x."""
    for k, character in enumerate(text):
        left, bottom = x + 32 * (k - len(text) / 2), FLOOR - 44
        picture = glyphs()[ord(character)].reshape(32, 32)
        extent = left, left + 32, bottom, bottom + 32
        ax.imshow(picture, extent=extent, cmap='gray_r', interpolation='nearest', zorder=3)
        ax.add_patch(Rectangle((left, bottom), 32, 32, fill=False, ec=INTERFACE[1], lw=0.8, zorder=4))


def column(ax, x, width, row, largest):
    """A phase, from a row of the ledger: what it does, the model from its tokens up to its head, and its
    active and total parameters."""
    middle, n = x + width / 2, row['layers']
    if row['rank']:
        title, what = 'LoRA phase', f'adapt all {n} blocks\n(rank {row["rank"]}), then merge'
    else:
        title, what = f'stage {row["stage"]}', f'train {row["trained"]} blocks'
        if row['frozen']:
            what = f'freeze, append {row["trained"]},\ntrain them'
    say(ax, middle, 548, title, 11, weight='bold')
    say(ax, middle, 533, what, colour=GREY, va='top')
    box(ax, x, FLOOR + n * STEP, width, HEAD, TRAINED, 'final LayerNorm\nand LM head')
    for k in range(n):
        trained = k >= row['frozen']
        block(ax, x, FLOOR + k * STEP, width, BLOCK, trained, f'{k + 1}', bool(row['rank']) and not trained)
    tokens(ax, middle, 'grow')
    for kind, colour in (('total', FROZEN[1]), ('active', TRAINED[0])):
        ax.add_patch(Rectangle((x, 72), width * row[kind] / largest, 10, color=colour, lw=0))
    say(ax, middle, 57, f'{row["active"]:,}', 10, '#b85a12', weight='bold')
    say(ax, middle, 38, f'{row["total"]:,}', 10, FROZEN[2])


def composition(ax, x, width):
    """Two models trained apart on the same interface: together they predict by the mean of their logits."""
    middle = x + width + 8
    say(ax, middle, 548, 'composition', 11, weight='bold')
    note = 'models trained apart fit together:\nthey share the interface'
    say(ax, middle, 533, note, colour=GREY, va='top')
    box(ax, middle - 70, FLOOR + 270, 140, HEAD, PLAIN, 'mean of the logits')
    for left, language in ((x, 'Russian'), (x + width + 16, 'Chinese')):
        centre = left + width / 2
        arrow(ax, (centre, FLOOR + 244), (middle + 0.6 * (centre - middle), FLOOR + 267))
        say(ax, centre, FLOOR + 231, f'{language} expert', 8.5)
        for k, name in enumerate([*'123456789', 'norm']):
            block(ax, left, FLOOR + 20 * k, width, 17, False, name)
        box(ax, left, FLOOR + 200, width, 20, TRAINED, 'LM head')
        tokens(ax, centre, 'Ж中')
    say(ax, middle, 48, 'no new parameters; afterwards\nat most the heads are tuned', colour=GREY)


def idea():
    """Growth on the left, composition on the right, on one interface. All numbers come from the ledger of the
    paper's model."""
    c = grow.Config(**grow.PRESETS['gpu'], lora='interleaved', lora_stages='2')
    rows = grow.ledger(c)
    figure = plt.figure(figsize=(9, 5.66))
    ax = figure.add_axes((0, 0, 1, 1))
    box(ax, 8, FLOOR - 76, 884, 68, INTERFACE)
    padlock(ax, 36, FLOOR - 28, INTERFACE[2], 2)
    note = 'the frozen token interface: a token enters as its picture, and nothing here is ever trained'
    say(ax, 450, FLOOR - 61, note, 9, INTERFACE[2])
    for k, row in enumerate(rows):
        column(ax, 66 + 146 * k, 130, row, max(r['total'] for r in rows))
        if k:
            arrow(ax, (66 + 146 * k - 20, 548), (66 + 146 * k + 4, 548))
    composition(ax, 676, 98)
    for y, kind in ((446, 'trained'), (420, 'frozen'), (394, 'LoRA adapter')):
        if kind == 'LoRA adapter':
            ax.add_patch(Rectangle((82, y), 9, 18, fc=TRAINED[0], ec=TRAINED[1], lw=1))
        else:
            block(ax, 70, y, 34, 18, kind == 'trained')
        say(ax, 114, y + 9, kind, ha='left')
    say(ax, 10, 57, 'active', 10, '#b85a12', ha='left', weight='bold')
    say(ax, 10, 38, 'total', 10, FROZEN[2], ha='left')
    note = 'the total counts the frozen interface too, and the LoRA adapters while they exist'
    say(ax, 10, 14, f'parameters at width {c.d_model:,}; {note}', 8.5, GREY, ha='left')
    ax.set(xlim=(0, 900), ylim=(0, 566), aspect='auto')
    ax.axis('off')
    return figure


# --------------------------------------------------------------------------------------------------------
# loss: what runs have logged

# a run's lane above the axes and the strip in it, in heights of the axes
LANE, STRIP = 0.064, 0.042


def read_run(folder):
    """RUN/log.csv -> its phases in order: kind ('grow', 'lora'), stage, start and end in tokens, and the
    losses train and val [(tokens, loss)]."""
    path, phases, start = Path(folder) / 'log.csv', [], 0
    try:
        with open(path, newline='') as file:
            # the last line of a live run may be half written
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        for (kind, stage), part in itertools.groupby(rows, key=lambda row: (row['phase'], row['stage'])):
            part = list(part)
            train, val = ([(int(row['tokens']), float(row[name])) for row in part if row[name]]
                          for name in ('train_loss', 'val_loss'))
            end = int(part[-1]['tokens'])
            phases.append(SimpleNamespace(kind=kind, stage=stage, start=start, end=end, train=train, val=val))
            start = end
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f'cannot read {path} ({error}): name folders of runs of grow.py') from None
    if not phases:
        raise UserError(f'{path} holds no losses yet: wait for the first steps')
    return phases


def smooth(values, width):
    """Moving average over `width` values, at the ends over those there are."""
    window = np.ones(min(width, len(values)))
    return np.convolve(values, window, 'same') / np.convolve(np.ones(len(values)), window, 'same')


def lane(ax, phases, bottom, colour, longest):
    """A run's phases as a strip above the axes: the val loss after each, and marks for what came between."""
    # x in tokens, y in heights of the axes
    place = dict(transform=ax.get_xaxis_transform(), clip_on=False)
    for before, p in zip([None, *phases], phases):
        width = p.end - p.start
        look = dict(fc=colour, ec='white', lw=1, alpha=0.2 if p.kind == 'lora' else 0.45)
        ax.add_patch(Rectangle((p.start, bottom), width, STRIP, **look, **place))
        # empty while the phase goes on, or where there is no room
        text = ''.join(f'{loss:.3f}' for _, loss in p.val) if width > 0.045 * longest else ''
        if width > 0.14 * longest:
            text = ('LoRA' if p.kind == 'lora' else f'stage {p.stage}') + f'   {text}'
        say(ax, p.start + width / 2, bottom + STRIP * 0.47, text, 8.5, **place)
        if p.kind == 'grow' and before:
            ax.axvline(p.start, color=colour, lw=0.8, ls='--', alpha=0.5, zorder=0)
            ax.plot(p.start, bottom, '^', color=colour, ms=6, **place)
        if p.kind == 'lora' and p.val:
            ax.plot(p.end, bottom + STRIP, 'v', color=colour, ms=6, **place)


def loss(folders):
    """Train loss over tokens, smoothed within each phase (thin: as logged). Dots are the val losses after the
    phases; their numbers are above."""
    runs = [read_run(folder) for folder in folders]
    longest = max(phases[-1].end for phases in runs)
    figure, ax = plt.subplots(figsize=(9, 5), layout='constrained')
    for k, (folder, phases, colour) in enumerate(zip(folders, runs, itertools.cycle(RUNS))):
        lane(ax, phases, 1.02 + LANE * (len(runs) - 1 - k), colour, longest)
        ax.plot([], [], color=colour, lw=2, label=Path(folder).resolve().name)
        width = 1 + sum(len(p.train) for p in phases) // 30
        for p in phases:
            x, y = np.array(p.train).reshape(-1, 2).T
            ax.plot(x, y, color=colour, lw=0.7, alpha=0.3)
            ax.plot(x, smooth(y, width), color=colour, lw=1.8)
            ax.plot(*np.array(p.val).reshape(-1, 2).T, 'o', color=colour, mec='white', ms=8, zorder=4)
    for marker, meaning in zip('o^v', ('val loss (in digits: above)', 'blocks appended', 'LoRA merged')):
        ax.plot([], [], marker, color=GREY, label=meaning)
    ax.set(xlim=(0, 1.02 * longest), xlabel='training tokens', ylabel='loss, nats a token')
    ax.xaxis.set_major_formatter(lambda x, _: f'{x:,.0f}')
    ax.spines[['top', 'right']].set_visible(False)
    ax.grid(axis='y', lw=0.5, alpha=0.4)
    ax.legend(loc='upper right', edgecolor='white', framealpha=0.9, borderaxespad=0, fontsize=9)
    return figure


# --------------------------------------------------------------------------------------------------------
# show: the tokens of a text, and what a model of some width sees of them

def what_is_left(ids, d_model):
    """-> (what rows of the unicode table still tell of their pictures, (len(ids), 1024) of about 0 to 1; the
    share of each picture's variance that this is, (len(ids),)). A row is a direction among pictures; how far
    to go in it, the length it lost, is taken from the picture."""
    mean, axes = principal_components()
    directions = unicode_table(d_model)[ids, :axes.shape[1]] @ axes[:, :d_model].T            # n, 1024
    away = glyphs()[ids] - mean
    along = (away * directions).sum(1)
    return mean + along[:, None] * directions, along ** 2 / (away ** 2).sum(1)


def show(text, d_model):
    """A PIL image with a row a token: its text and id, its picture as the table is made of it, what is left
    of that, and its d_model numbers."""
    ids = tokenizer().encode_ordinary(text)
    if not 1 <= len(ids) <= 400 or d_model < 1:
        raise UserError(f'show takes 1 to 400 tokens, not {len(ids):,}, and a positive --d_model', status=2)
    bits, texts, font = glyphs().reshape(VOCAB, CELL, CELL), token_texts(), ImageFont.load_default(14)
    left, share = what_is_left(ids, d_model)
    # 1 is three standard deviations
    numbers = unicode_table(d_model)[ids] * d_model ** 0.5 / 3
    # red, green and blue: n, d_model, 3
    heat = np.stack([1 + numbers.clip(max=0), 1 - abs(numbers), 1 - numbers.clip(min=0)], axis=-1)
    image = Image.new('RGB', (1066, 60 + 104 * len(ids)), 'white')
    pen = ImageDraw.Draw(image)

    def paste(x, y, colours, width, height):
        """Colours: rows, columns and perhaps 3, of 0 to 1."""
        part = Image.fromarray((255 * colours.clip(0, 1)).astype(np.uint8))
        image.paste(part.resize((width, height), Image.Resampling.BOX), (x, y))
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline='#b8c4d0')

    for x, caption in ((10, 'token'), (150, 'id'), (250, f'its picture,\n{CELL} x {CELL} bits'),
                       (370, f'what is left of it with\n{d_model:,} numbers'),
                       (542, 'these numbers, most telling first:\nred above zero, blue below')):
        pen.text((x, 12), caption, 'black', font)
    for y, i, picture, kept, strip in zip(range(56, image.height, 104), ids, left, share, heat):
        label = readable(texts[i])
        width, height = min(32 * len(label), 128), 32 if len(label) < 5 else 20
        paste(10, y + 32, 1.0 - np.hstack([bits[ord(c)] for c in label]), width, height)
        pen.text((150, y + 32), f'{i:,}\n0x{i:04X}', 'black', font)
        paste(250, y, 1.0 - bits[i], 96, 96)
        paste(370, y, 1.0 - picture.reshape(CELL, CELL), 96, 96)
        pen.text((474, y + 32), f'{kept:.1%} of\nvariance', 'black', font)
        paste(542, y, strip[None], 512, 96)
    return image


# --------------------------------------------------------------------------------------------------------

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=('idea', 'loss', 'show'), help='which picture')
    parser.add_argument('words', nargs='*', metavar='RUN|TEXT', help='runs, for loss; a text, for show')
    parser.add_argument('--out', type=Path, help='PNG file to write')
    parser.add_argument('--d_model', type=int, default=256, help='for show: numbers a token (%(default)s)')
    args = parser.parse_args(argv)
    fits = dict(idea=len(args.words) == 0, loss=len(args.words) > 0, show=len(args.words) == 1)
    if not fits[args.name]:
        parser.error('give folders of runs to loss, a text in quotes to show, and nothing to idea')
    if plt is None and args.name != 'show':
        raise UserError('the pictures need matplotlib: pip install matplotlib')
    if args.name == 'idea':
        out, picture = HERE / 'idea.png', idea()
    elif args.name == 'loss':
        out, picture = Path(args.words[0]) / 'loss.png', loss(args.words)
    else:
        out, picture = Path('show.png'), show(args.words[0], args.d_model)
    out = args.out or out
    with replacing(out) as beside:
        if args.name == 'show':
            picture.save(beside, 'PNG')
        else:
            picture.savefig(beside, format='png', dpi=200)
    print(f'wrote {out}')


if __name__ == '__main__':
    main()
