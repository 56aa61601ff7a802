"""
The pictures of this project: the idea of growth, the losses of your runs, and what a model sees of a text.

    python results/pictures.py idea                           # results/idea.png
    python results/pictures.py loss out/001 out/002           # losses of runs: out/001/loss.png
    python results/pictures.py show "Привет, 你好, the 🎉"   # a text's tokens as numbers: show.png

The first two need matplotlib, of requirements-dev.txt. The records loss.png (of results/laptop) and show.png
are of the first edition (commits d40126e and 2d28fec).
"""

import argparse
import contextlib
import csv
import io
import itertools
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
from substrate import (CELL, VOCAB, Parser, UserError, cli, glyphs, principal_components, readable, replacing,
                       table, token_texts, tokenizer, unicode_table)

try:
    import matplotlib
    matplotlib.use('Agg')                             # draws into files, needs no screen
    import matplotlib.pyplot as plt
    from matplotlib.patches import Arc, FancyBboxPatch, Rectangle
except ImportError:
    plt = None                                        # whoever draws says what to install

INK, GREY = '#22303c', '#5d6c7a'
ACTIVE = '#b85a12'
# of an area, its edge and the text on it
TRAINED, FROZEN = ('#f7ab5e', '#d8752a', '#5a2a00'), ('#dbe5ef', '#8fa8c0', '#47627d')
INTERFACE, PLAIN = ('#b4c8dd', '#7d99b5', '#2f4a66'), ('white', INK, INK)
# told apart by the colour-blind (Okabe and Ito)
RUNS = '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#444444'

# ------------------------------------------------------------------------------------------------------------
# What the scripts beside this one draw and write with

def as_text(rows, *lines):
    """Dicts of equal keys as a table, and below it lines of text."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        table(rows)
        print(*lines, sep='\n', end='\n' if lines else '')
    return text.getvalue()

def write_csv(target, rows):
    """Dicts of equal keys -> a csv file, whole or absent."""
    with replacing(target) as path, open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)

def write_tables(stem, rows, *lines):
    """STEM.csv, and STEM.txt with the lines below, which is printed too."""
    text = as_text(rows, *lines)
    print(text)
    write_csv(f'{stem}.csv', rows)
    with replacing(f'{stem}.txt') as path:
        path.write_text(text)

def tidy(ax, **labels):
    """The look of all axes with numbers."""
    ax.set(**labels)
    ax.spines[['top', 'right']].set_visible(False)
    ax.grid(axis='y', lw=0.5, alpha=0.4)

# ------------------------------------------------------------------------------------------------------------
# idea: how a model of 9 blocks grows, and how two grown models become one, in pixels of a page of 900 x 566

FLOOR, STEP = 166, 30      # where blocks begin, and how far apart they are

def say(ax, x, y, text, size=9, colour=INK, **more):
    ax.text(x, y, text, size=size, color=colour, **{'ha': 'center', 'va': 'center'} | more)

def box(ax, x, y, width, height, colours, text=''):
    """A box with its lower left corner at (x, y), in colours (area, edge, text); what is frozen is locked."""
    area, edge, ink = colours
    look = dict(boxstyle='round,pad=2,rounding_size=4', fc=area, ec=edge, lw=1)
    ax.add_patch(FancyBboxPatch((x + 2, y + 2), width - 4, height - 4, **look))
    say(ax, x + width / 2, y + height / 2, text, 8.5, ink)
    if colours == FROZEN:
        ax.add_patch(Rectangle((x + width - 16, y + height / 2 - 5), 8, 6, color=ink, lw=0))
        ax.add_patch(Arc((x + width - 12, y + height / 2 + 1), 5.5, 8, theta2=180, color=ink, lw=1.3))

def tokens(ax, x, text):
    """The tokens of `text` as the model sees them: their glyphs, side by side, centred on x."""
    for k, bits in enumerate(glyphs()[[ord(character) for character in text]].reshape(-1, CELL, CELL)):
        left, bottom = x + 32 * (k - len(text) / 2), FLOOR - 44
        extent = left, left + 32, bottom, bottom + 32
        ax.imshow(bits, extent=extent, cmap='gray_r', interpolation='nearest', zorder=3)
        ax.add_patch(Rectangle((left, bottom), 32, 32, fill=False, ec=INTERFACE[1], lw=0.8, zorder=4))

def column(ax, x, width, row, largest):
    """A phase, from a row of the ledger: what it does, the model, its active and total parameters."""
    middle, n = x + width / 2, row['layers']
    name, what = f'stage {row["stage"]}', f'freeze, append {row["trained"]}\ncopies, train them'
    if row['rank']:
        name, what = 'LoRA phase', f'adapt all {n} blocks\n(rank {row["rank"]}), then merge'
    say(ax, middle, 548, name, 11, weight='bold')
    say(ax, middle, 533, what if row['frozen'] else f'train {n} blocks', colour=GREY, va='top')
    for k in range(n):
        y, frozen = FLOOR + k * STEP, k < row['frozen']
        box(ax, x, y, width - 16 * bool(row['rank']), STEP - 4, FROZEN if frozen else TRAINED, f'{k + 1}')
        if row['rank']:
            box(ax, x + width - 11, y, 11, STEP - 4, TRAINED)
    box(ax, x, FLOOR + n * STEP, width, 38, TRAINED, 'final LayerNorm\nand LM head')
    tokens(ax, middle, 'grow')
    for kind, (bar, _, _) in (('total', INTERFACE), ('active', TRAINED)):
        ax.add_patch(Rectangle((x, 72), width * row[kind] / largest, 10, color=bar, lw=0))
    say(ax, middle, 57, f'{row["active"]:,}', 10, ACTIVE, weight='bold')
    say(ax, middle, 38, f'{row["total"]:,}', 10, FROZEN[2])

def composition(ax, x, width):
    """Two models trained apart on the same interface: together they predict by the mean of their logits."""
    middle = x + width + 8
    say(ax, middle, 548, 'composition', 11, weight='bold')
    say(ax, middle, 533, 'models trained apart fit,\nsince they share the interface', colour=GREY, va='top')
    box(ax, middle - 70, FLOOR + 270, 140, 38, PLAIN, 'mean of the logits')
    for left, language in ((x, 'Russian'), (x + width + 16, 'Chinese')):
        centre = left + width / 2
        say(ax, centre, FLOOR + 253, '\N{UPWARDS ARROW}', 14, GREY)
        say(ax, centre, FLOOR + 231, f'{language} expert', 8.5)
        for k, name in enumerate([*'123456789', 'norm', 'LM head']):
            box(ax, left, FLOOR + 20 * k, width, 17, FROZEN, name)
        tokens(ax, centre, 'Ж中')
    say(ax, middle, 48, 'no new parameters,\nand nothing is trained again', colour=GREY)

def idea():
    """Growth, with one LoRA phase, and composition; all numbers come from the ledger of the paper's model."""
    c = grow.Config(**grow.GPU, lora='interleaved')
    rows = [row for row in grow.ledger(c) if not row['rank'] or row['stage'] == 2]
    figure = plt.figure(figsize=(9, 5.66))
    ax = figure.add_axes((0, 0, 1, 1))
    box(ax, 8, FLOOR - 76, 884, 68, INTERFACE)
    note = 'the frozen token interface: a token enters as its picture, and nothing here is ever trained'
    say(ax, 450, FLOOR - 61, note, 9, INTERFACE[2])
    for k, row in enumerate(rows):
        column(ax, 66 + 146 * k, 130, row, max(r['total'] for r in rows))
        if k:
            say(ax, 58 + 146 * k, 548, '\N{RIGHTWARDS ARROW}', 14, GREY)
    composition(ax, 676, 98)
    for y, text, width, colours in ((446, 'trained', 34, TRAINED), (420, 'frozen', 34, FROZEN),
                                    (394, 'LoRA adapter', 11, TRAINED)):
        box(ax, 104 - width, y, width, 18, colours)
        say(ax, 114, y + 9, text, ha='left')
    say(ax, 10, 57, 'active', 10, ACTIVE, ha='left', weight='bold')
    say(ax, 10, 38, 'total', 10, FROZEN[2], ha='left')
    note = f'parameters at width {c.d_model:,}, with the frozen interface, and LoRA adapters while they exist'
    say(ax, 10, 14, note, 8.5, GREY, ha='left')
    ax.set(xlim=(0, 900), ylim=(0, 566), aspect='auto')
    ax.axis('off')
    return figure

# ------------------------------------------------------------------------------------------------------------
# loss: what runs have logged

def read_run(folder):
    """RUN/log.csv -> its phases: 'grow' or 'lora', and [(tokens, loss)] of training and of validation."""
    path, phases = Path(folder) / 'log.csv', []
    try:
        with open(path, newline='') as file:
            rows = list(csv.DictReader(file))
        for (kind, _), part in itertools.groupby(rows, lambda row: (row['phase'], row['stage'])):
            part = list(part)
            phases.append((kind, *([(int(row['tokens']), float(row[name])) for row in part if row[name]]
                                   for name in ('train_loss', 'val_loss'))))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f'cannot read {path} ({error}): name folders of runs of grow.py') from None
    if not any(train for _, train, _ in phases):
        raise UserError(f'{path} holds no losses yet: wait for its first checkpoint with some')
    return phases

def loss(folders):
    """Train loss over tokens, a mean of several steps a point, and the val losses after the phases."""
    figure, ax = plt.subplots(figsize=(9, 5), layout='constrained')
    highest = 0
    for folder, colour in zip(folders, itertools.cycle(RUNS)):
        phases, start = read_run(folder), 0
        several = 1 + sum(len(train) for _, train, _ in phases) // 60
        ax.plot([], [], color=colour, lw=2, label=Path(folder).resolve().name)
        for kind, train, val in phases:
            if kind == 'grow' and start:
                ax.axvline(start, color=colour, lw=0.8, ls='--', alpha=0.5)
            if train:
                start = train[-1][0]
                means = np.array(train[len(train) % several:]).reshape(-1, several, 2).mean(1)
                ax.plot(*means.T, color=colour, lw=1.8)
            for place in val:
                ax.plot(*place, 'v' if kind == 'lora' else 'o', color=colour, mec='white', ms=8, zorder=4)
                ax.annotate(f'{place[1]:.3f}', place, (7, -3), color=colour, textcoords='offset points')
                highest = max(highest, place[1])
    for style, meaning in (('o', 'val loss'), ('v', 'val loss, adapters merged'), ('--', 'blocks appended')):
        ax.plot([], [], style, color=GREY, label=meaning)
    tidy(ax, xlabel='training tokens', ylabel='loss, nats a token')
    if highest:
        ax.set_ylim(top=highest + 1)                   # what matters, not where it began
    ax.xaxis.set_major_formatter(lambda x, _: f'{x:,.0f}')
    ax.legend(edgecolor='white', fontsize=9)
    return figure

# ------------------------------------------------------------------------------------------------------------
# show: the tokens of a text, and what a model of some width sees of them

def what_is_left(ids, d_model):
    """-> (what rows of the unicode table tell of their pictures, (n, 1024); the share of each one's variance,
    (n,)). A row is a direction among pictures; how far to go in it, is taken from the picture."""
    mean, axes = principal_components()
    directions = unicode_table(d_model)[ids, :axes.shape[1]] @ axes[:, :d_model].T            # n, 1024
    away = glyphs()[ids] - mean
    along = (away * directions).sum(1)
    return mean + along[:, None] * directions, along ** 2 / (away ** 2).sum(1)

def show(text, d_model):
    """A PIL image with a row a token: its text, id and picture, what is left of that, its d_model numbers."""
    ids = tokenizer().encode_ordinary(text)
    if not 1 <= len(ids) <= 400 or d_model < 1:
        raise UserError(f'show takes 1 to 400 tokens, not {len(ids):,}, and a positive --d_model', status=2)
    bits, texts, font = glyphs().reshape(VOCAB, CELL, CELL), token_texts(), ImageFont.load_default(14)
    left, share = what_is_left(ids, d_model)
    numbers = unicode_table(d_model)[ids] * d_model ** 0.5 / 3     # 1 is three standard deviations
    heat = np.stack([1 + numbers.clip(max=0), 1 - abs(numbers), 1 - numbers.clip(min=0)], axis=-1)      # RGB
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
    for y, i, picture, kept, row in zip(range(56, image.height, 104), ids, left, share, heat):
        label = readable(texts[i])
        width, height = min(32 * len(label), 128), 32 if len(label) < 5 else 20
        paste(10, y + 32, 1.0 - np.hstack([bits[ord(c)] for c in label]), width, height)
        pen.text((150, y + 32), f'{i:,}\n0x{i:04X}', 'black', font)
        paste(250, y, 1.0 - bits[i], 96, 96)
        paste(370, y, 1.0 - picture.reshape(CELL, CELL), 96, 96)
        pen.text((474, y + 32), f'{kept:.1%} of\nvariance', 'black', font)
        paste(542, y, row[None], 512, 96)
    return image

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('name', choices=('idea', 'loss', 'show'), help='which picture')
    parser.add_argument('words', nargs='*', metavar='RUN|TEXT', help='runs, for loss; a text, for show')
    parser.add_argument('--out', type=Path, help='PNG file to write')
    parser.add_argument('--d_model', type=int, default=256, help='for show: numbers a token (%(default)s)')
    args = parser.parse_args(argv)
    if args.name == 'show' and len(args.words) != 1 or bool(args.words) == (args.name == 'idea'):
        parser.error('give folders of runs to loss, a text in quotes to show, and nothing to idea')
    if plt is None and args.name != 'show':
        raise UserError('the pictures need matplotlib: pip install matplotlib')
    folder = Path(args.words[0]) if args.name == 'loss' else HERE if args.name == 'idea' else Path()
    out = args.out or folder / f'{args.name}.png'
    with replacing(out) as path:
        if args.name == 'show':
            show(args.words[0], args.d_model).save(path, 'PNG')
        else:
            (loss(args.words) if args.words else idea()).savefig(path, format='png', dpi=200)
    print(f'wrote {out}')

if __name__ == '__main__':
    main()
