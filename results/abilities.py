"""
What depth can do at this size: four abilities that small models learn, scored after every stage of runs.

    python results/abilities.py out/study/grown.equal.x1.s0 out/study/once.9.x1.s0 out/study/once.3.x1.s0

Each is how much likelier, in nats, an end becomes by something that stands in the context; chance is 0.
- copy: ten random words, then the same again: the second time, against the first, a token.
- recall: a long word of held-out text, if it stood there before, against another word in its place.
- close: a closing bracket or quote of held-out text, if the opening one stands there, against none.
- name: the second half of a made-up name, held-out text after the whole one, against after another name.

Writes results/abilities.csv, .txt and .png.
"""

import argparse
import re
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
import pictures
import prepare_data
from substrate import EOS, Parser, UserError, cli, replacing, tokenizer

ITEMS = 300      # of each ability

@torch.no_grad()
def log_probs(model, ids):
    """The log-probabilities of ids, a list, from the second on."""
    idx = torch.tensor(ids)
    return model(idx[None, :-1])[0].log_softmax(-1).gather(1, idx[1:, None])[:, 0].numpy()

def gains(model, triples):
    """Of each (context, other context, end): how much likelier the end is after the one, in nats."""
    encode, found = tokenizer().encode_ordinary, []
    for context, other, end in triples:
        end = encode(end)
        rows = [encode(text)[-(model.config.context - len(end)):] + end for text in (context, other)]
        a, b = (log_probs(model, row)[-len(end):].sum() for row in rows)
        found.append(a - b)
    return found

def copying(model, texts, words, random):
    found = []
    for _ in range(ITEMS // 3):
        ids = tokenizer().encode_ordinary(' ' + ' '.join(random.choice(words, 10)))[:60]
        logp = log_probs(model, ids + ids)
        found.append((logp[len(ids):] - logp[:len(ids) - 1]).mean())
    return found

def recalling(model, texts, words, random):
    triples = []
    for text in texts:
        match = re.search(r'(?s)\b([a-z]{7,})\b.{20,120}?\b(?=\1\b)', text)
        if match:
            before, after = text[max(0, match.start() - 60):match.start()], text[match.end(1):match.end()]
            triples.append((before + match[1] + after, before + random.choice(words) + after, match[1]))
    return gains(model, triples[:ITEMS])

def closing(model, texts, words, random):
    triples = []
    for text in texts:
        match = re.search(r'(?s)\(([^()]{15,80})(?=\))|"([^"]{15,80})(?=")', text)
        if match:
            before, inside = text[max(0, match.start() - 60):match.start()], match[1] or match[2]
            triples.append((before + match[0], before + inside, text[match.end()]))
    return gains(model, triples[:ITEMS])

def naming(model, texts, words, random):
    syllables = 'bra cho dre fli gro hul jin kas lom mur nel pov quo ryt sab tez vun wix yar zet'.split()
    triples = []
    for text in texts[:ITEMS]:
        between = f'. {text[:60].rpartition(" ")[0]}. The '
        a, b, c, d = random.choice(syllables, 4, replace=False)
        triples.append((*(f'This is about {x}{y}{between}{a}' for x, y in ((a, b), (c, d))), b))
    return gains(model, triples)

ABILITIES = dict(copy=copying, recall=recalling, close=closing, name=naming)

def picture(rows):
    """A panel an ability: score over depth, a line a run."""
    figure, axes = pictures.plt.subplots(1, len(ABILITIES), figsize=(11, 3.2), layout='constrained')
    for ax, name in zip(axes, ABILITIES):
        for run, colour in zip(dict.fromkeys(row['run'] for row in rows), pictures.RUNS):
            layers, scores, errors = zip(*((row['layers'], row[name], row[f'{name}_stderr'])
                                           for row in rows if row['run'] == run))
            ax.errorbar(layers, scores, errors, color=colour, marker='o', label=run)
        ax.axhline(0, color=pictures.GREY, ls=':')
        pictures.tidy(ax, title=name, xlabel='layers')
    axes[0].legend(edgecolor='white', fontsize=7)
    return figure

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folders of runs')
    parser.add_argument('--data', default='docs', help='a data set (%(default)s)')
    args = parser.parse_args(argv)
    ids = np.concatenate(prepare_data.Dataset(args.data).val)
    texts = [tokenizer().decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == EOS) + 1)]
    words, rows = sorted(set(re.findall(r'\b[a-z]{7,}\b', ' '.join(texts)))), []
    for run in args.runs:
        for path in sorted(Path(run).glob('stage_?*.pt')):
            model = grow.load_model(path)
            row = dict(run=Path(run).name, layers=len(model.blocks))
            for name, ability in ABILITIES.items():
                scores = np.array(ability(model, texts, words, np.random.default_rng(0)))
                row[name] = scores.mean().item()
                row[f'{name}_stderr'] = (scores.std() / len(scores) ** 0.5).item()
            rows.append(row)
    if not rows:
        raise UserError(f'no stage_K.pt in {" ".join(args.runs)}: name folders of runs')
    pictures.write_tables(HERE / 'abilities', rows, f'nats; chance: 0; {ITEMS} items, of copy a third')
    with replacing(HERE / 'abilities.png') as path:
        picture(rows).savefig(path, format='png', dpi=160)

if __name__ == '__main__':
    main()
