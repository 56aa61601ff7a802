"""
Two experts, grown apart on one frozen interface, become one by averaging their logits: is it any good?

    python prepare_data.py wikipedia-ru --tokens 10_000_000      # and wikipedia-zh; any data sets will do
    python results/experts.py wikipedia-ru wikipedia-zh          # models go to out/experts
    python results/experts.py ru zh --shared en --tokens 6144 --flags="--d_model 64 --heads 2" --out out/try

Controls: models of one expert's size and of the size of both, which see both texts, and two experts whose
embeddings are learned, each its own. What is finished is skipped. Writes OUT.csv and OUT.txt.

The records results/experts.* and experts_logs are of the first edition (commit 98c4ce7): Russian and Chinese
of Debian packages, with --shared en. At b189083 this script fetches these texts (ru.txt, zh.txt and en.txt),
also tunes the heads of merged models, measures what merging costs, and draws.
"""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
import prepare_data
from pictures import write_tables
from study import train
from substrate import VOCAB, Parser, cli

FLAGS = '--d_model 256 --heads 8 --head full --context 256 --batch_tokens 1024 --stage_ratio 1'
MERGED = dict(merged=('expert_1', 'expert_2'), learned_merged=('learned_1', 'learned_2'))

def size(c):
    """Parameters of a finished model besides the token table."""
    return grow.ledger(c)[-1]['total'] - VOCAB * c.d_model

def as_large_as_two(c):
    """The config as wide as it must be for the parameters of two experts, in heads of the same size."""
    head = c.d_model // c.heads
    wider = [dataclasses.replace(c, d_model=head * n, heads=n) for n in range(c.heads, 4 * c.heads)]
    return min(wider, key=lambda w: abs(size(w) - 2 * size(c)))

def runs(c, names, shared, tokens):
    """{name: (flags of grow.py, tokens)} of every training; a control gets twice as many tokens."""
    first, second = [f'{name}:3' for name in names]
    some, more = ([f'{shared}:1'], [f'{shared}:2']) if shared else ([], [])
    own, other = ['--data', first, *some, '--seed', '1'], ['--data', second, *some, '--seed', '2']
    both, large = ['--data', first, second, *more, '--seed', '1'], as_large_as_two(c)
    wide, learned = ['--d_model', str(large.d_model), '--heads', str(large.heads)], ['--substrate', 'learned']
    return dict(expert_1=(own, tokens), expert_2=(other, tokens), control_small=(both, 2 * tokens),
                control_large=([*both, *wide], 2 * tokens), learned_1=([*own, *learned], tokens),
                learned_2=([*other, *learned], tokens))

def mixture(paths):
    """The mean of the logits of these runs, each with its own interface; of one path, its model."""
    experts = [grow.load_model(path) for path in paths]
    tables = [expert.interface.table for expert in experts]
    model = grow.MixtureOfExperts(experts) if len(experts) > 1 else experts[0]
    for expert, table in zip(experts, tables):         # grow.py gives all of them that of the first
        expert.interface.table = table
    return model.eval()

def compare(c, out, names, datasets):
    """A row a model, trained or merged: its loss on each data set, their mean, its size; then n-grams."""
    amp, losses, took = grow.set_up(c), {}, {}
    for name in [*names, *MERGED]:
        paths = [out / part for part in MERGED.get(name, (name,))]
        model = mixture(paths).to(c.device)
        losses[name] = [grow.evaluate(model, d, c, amp) for d in datasets]
        tables = sum(p.numel() for key, p in model.named_parameters() if key.endswith('interface.table'))
        took[name] = (grow.count(model.parameters()) - tables,
                      sum(grow.load(path)['state']['history'][-1]['tokens'] for path in paths))
    ngrams = [prepare_data.ngram_losses(d, c.context, c.eval_tokens) for d in datasets]
    losses |= zip(('unigram', 'bigram'), zip(*ngrams))
    rows = []
    for name, each in losses.items():
        bits = [grow.in_units(loss, d)['bits_per_byte'] for loss, d in zip(each, datasets)]
        parameters, tokens = took.get(name, ('', ''))
        rows.append(dict(model=name, **{d.name: loss for d, loss in zip(datasets, each)},
                         mean=sum(each) / len(each), bits_per_byte=sum(bits) / len(bits),
                         parameters_besides_tables=parameters, tokens=tokens))
    return rows

def verdicts(rows, columns):
    """The loss of each merged model less that of the better of its experts and, in the mean, the controls."""
    loss = {row['model']: row for row in rows}
    for merged, experts in MERGED.items():
        pairs = [(column, min(experts, key=lambda name: loss[name][column])) for column in columns]
        for column, other in [*pairs, ('mean', 'control_small'), ('mean', 'control_large')]:
            yield f'{column}: {merged} less {other} {loss[merged][column] - loss[other][column]:+.3f} nats'

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', nargs=2, metavar='NAME', help='the data sets of the two experts')
    parser.add_argument('--shared', metavar='NAME', help='a data set that all see too, one part to three')
    parser.add_argument('--tokens', type=int, default=360_000, help='of an expert (%(default)s)')
    parser.add_argument('--flags', default='', help=f'of grow.py for every training, after {FLAGS}')
    parser.add_argument('--out', type=Path, default=Path('out/experts'), help='folder (%(default)s)')
    args = parser.parse_args(argv)
    flags = FLAGS.split() + shlex.split(args.flags)
    c, _ = grow.configure(flags)
    plan = runs(c, args.data, args.shared, args.tokens)
    for name, (own, tokens) in plan.items():
        train(args.out / name, [*flags, *own, '--stage_tokens', str(tokens // 3)])
    columns = [name for name in (*args.data, args.shared) if name]
    rows = compare(c, args.out, plan, [prepare_data.Dataset(name) for name in columns])
    write_tables(args.out, rows, '', *verdicts(rows, [*columns, 'mean']))

if __name__ == '__main__':
    main()
