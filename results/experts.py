"""
Two experts, grown apart on one frozen interface, become one by averaging their logits: is it any good?

    python prepare_data.py wikipedia-ru --tokens 10_000_000      # likewise wikipedia-zh; any data sets will do
    python results/experts.py wikipedia-ru wikipedia-zh          # models go to out/experts
    python results/experts.py ru zh --shared en --tokens 6144 --flags="--d_model 64 --heads 2" --out /tmp/try

Controls ask what the mean is worth: models of one expert's size and of the size of both that saw both texts,
and two experts whose embeddings were learned, each its own. What is finished is skipped, so stop it and start
it again at will. Writes OUT.csv, OUT.txt and OUT.png.

The records results/experts.* and experts_logs are of the first edition (commit 98c4ce7): 360,000 tokens an
expert, Russian and Chinese of Debian packages, with --shared en. This script's form at b189083 fetches these
texts (its step `fetch` makes ru.txt, zh.txt and en.txt for `prepare_data.py files --split-line %`), tunes the
heads of merged models and measures what merging costs; both were cut since.
"""

import argparse
import contextlib
import dataclasses
import io
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
import pictures
import prepare_data
from study import train
from substrate import VOCAB, Parser, cli, replacing, table

FLAGS = '--context 256 --batch_tokens 1024 --stage_ratio 1 --lr_later 3e-3 --head_lr_later 2e-3'
MERGED = dict(merged=('expert_1', 'expert_2'), learned_merged=('learned_1', 'learned_2'))
COLOURS = dict(expert_1='#c6dbef', expert_2='#9ecae1', merged='#2171b5', control_small='#bdbdbd',
               control_large='#737373', learned_1='#fdd0a2', learned_2='#fdae6b', learned_merged='#d94801')

def size(c):
    """Parameters of a finished model besides the token table."""
    return grow.ledger(c)[-1]['total'] - VOCAB * c.d_model

def as_large_as_two(c):
    """The config as wide as it must be for the parameters of two experts, in heads of the same size."""
    head = c.d_model // c.heads
    wider = [dataclasses.replace(c, d_model=head * n, heads=n) for n in range(c.heads, 4 * c.heads)]
    return min(wider, key=lambda w: abs(size(w) - 2 * size(c)))

def runs(c, names, shared, tokens):
    """{name: flags of grow.py} of every training; an expert gets `tokens`, a control twice as many."""
    stages = len(grow.phases(dataclasses.replace(c, lora='none')))
    one = tokens / (1 + c.stage_ratio * (stages - 1))        # tokens of the first stage
    first, second = names
    mixed = [f'{shared}:1'] if shared else []
    both = ['--data', f'{first}:3', f'{second}:3', *[f'{shared}:2'] * len(mixed), '--stage_tokens', int(2 * one)]
    own = ['--stage_tokens', int(one), '--data', f'{first}:3', *mixed, '--seed', 1]
    other = ['--stage_tokens', int(one), '--data', f'{second}:3', *mixed, '--seed', 2]
    large, learned = as_large_as_two(c), ['--substrate', 'learned']
    return dict(expert_1=own, expert_2=other, control_small=[*both, '--seed', 1],
                control_large=[*both, '--seed', 1, '--d_model', large.d_model, '--heads', large.heads],
                learned_1=[*own, *learned], learned_2=[*other, *learned])

def mixture(paths):
    """The mean of the logits of these runs, each with its own interface; of one path, its model."""
    experts = [grow.load_model(path) for path in paths]
    interfaces = [expert.interface for expert in experts]
    model = grow.MixtureOfExperts(experts) if len(experts) > 1 else experts[0]
    for expert, interface in zip(experts, interfaces):       # grow.py gives all that of the first
        expert.interface = interface
    return model.eval()

def compare(c, out, datasets):
    """A row a model: its loss on each data set, their mean, and what it took."""
    amp, rows = grow.set_up(c), []

    def add(name, losses, parameters='', tokens=''):
        units = [grow.in_units(loss, d) for loss, d in zip(losses, datasets)]
        means = {unit: sum(u[unit] for u in units) / len(units) for unit in ('val_loss', 'bits_per_byte')}
        each = {d.name: loss for d, loss in zip(datasets, losses)}
        rows.append(dict(model=name, **each, mean=means['val_loss'], bits_per_byte=means['bits_per_byte'],
                         parameters=parameters, tokens=tokens))

    for name in COLOURS:
        paths = [out / part for part in MERGED.get(name, (name,))]
        model = mixture(paths).to(c.device)
        tokens = sum(grow.load(path)['state']['history'][-1]['tokens'] for path in paths)
        tables = sum(p.numel() for key, p in model.named_parameters() if key.endswith('interface.table'))
        add(name, [grow.evaluate(model, d, c, amp) for d in datasets],
            grow.count(model.parameters()) - tables, tokens)
    ngrams = [prepare_data.ngram_losses(d, c.context, c.eval_tokens) for d in datasets]
    for name, losses in zip(('unigram', 'bigram'), zip(*ngrams)):
        add(name, losses)
    return rows

def verdicts(rows, columns):
    """Plain sentences: each merged model against the better of its experts and, in the mean, the controls."""
    loss = {row['model']: row for row in rows}
    for merged, experts in MERGED.items():
        pairs = [(column, min(experts, key=lambda name: loss[name][column])) for column in columns]
        for column, other in [*pairs, ('mean', 'control_small'), ('mean', 'control_large')]:
            gain = loss[other][column] - loss[merged][column]
            yield f'{column}: {merged} is {abs(gain):.3f} nats {"better" if gain > 0 else "worse"} than {other}'

def plot(rows, columns):
    """For each data set a bar a model, and what bigrams achieve."""
    figure, ax = pictures.plt.subplots(figsize=(11, 4.5), layout='constrained')
    width = 0.88 / len(COLOURS)
    for k, row in enumerate(rows[:len(COLOURS)]):
        places = [x + (k - len(COLOURS) / 2 + 0.5) * width for x in range(len(columns))]
        bars = ax.bar(places, [row[column] for column in columns], width, color=COLOURS[row['model']],
                      label=row['model'].replace('_', ' '))
        ax.bar_label(bars, fmt='%.2f', rotation=90, fontsize=8, padding=2)
    for x, column in enumerate(columns):
        ax.hlines(rows[-1][column], x - 0.46, x + 0.46, color='black', linestyle='--', linewidth=1)
    ax.set_xticks(range(len(columns)), columns)
    pictures.tidy(ax, ylabel='val loss, nats a token (dashed: bigrams)', ylim=(0, 1.12 * ax.get_ylim()[1]))
    figure.legend(loc='outside lower center', ncols=len(COLOURS), frameon=False, fontsize=9)
    return figure

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', nargs=2, metavar='NAME', help='the data sets of the two experts')
    parser.add_argument('--shared', metavar='NAME', help='a data set that all see too, one part to three')
    parser.add_argument('--tokens', type=int, default=360_000, help='of an expert (%(default)s)')
    parser.add_argument('--flags', default='', help=f'of grow.py for every training, after {FLAGS}')
    parser.add_argument('--out', type=Path, default=Path('out/experts'), help='folder (%(default)s)')
    args = parser.parse_args(argv)
    pictures.need_matplotlib()
    flags = FLAGS.split() + shlex.split(args.flags)
    c, _ = grow.configure(flags)
    for name, own in runs(c, args.data, args.shared, args.tokens).items():
        train(args.out / name, [*flags, *map(str, own)])
    columns = [*args.data, *[args.shared] * bool(args.shared)]
    rows = compare(c, args.out, [prepare_data.Dataset(name) for name in columns])
    with contextlib.redirect_stdout(io.StringIO()) as text:
        table(rows)
        print('', *verdicts(rows, [*columns, 'mean']), sep='\n')
    print(text.getvalue())
    with replacing(args.out.with_suffix('.txt')) as path:
        path.write_text(text.getvalue())
    pictures.write_csv(args.out.with_suffix('.csv'), rows)
    pictures.write_png(args.out.with_suffix('.png'), plot(rows, columns))

if __name__ == '__main__':
    main()
