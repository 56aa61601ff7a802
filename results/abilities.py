"""
What depth can do at this size: four abilities that small models learn, scored after every stage of runs.

    python results/abilities.py out/study/grown.equal.x1.s0 out/study/once.9.x1.s0 out/study/once.3.x1.s0

- copy: 50 random tokens, then the same again; the share of the second half that is the likeliest token.
- recall: how much more than from its frequency a rare token of held-out text is expected, in nats, when it
  stood in the last 128 tokens already, less the same of rare tokens that did not.
- close: held-out text up to a closing bracket or quote. Is that likelier than with the opening one taken out?
- name: a made-up name, held-out text between, its first half again. Is the second half likelier than after
  another name?

Chance is 0 of copy and recall, half of the others, which are pairs. Writes results/abilities.csv, .txt, .png.
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

@torch.no_grad()
def log_probs(model, rows):
    """Lists of ids -> of each a tensor: the log-probabilities of its tokens from the second on."""
    found = []
    for row in rows:
        row = torch.tensor(row)
        logits = model(row[None, :-1])[0].log_softmax(-1)
        found.append(logits.gather(1, row[1:, None])[:, 0])
    return found

@torch.no_grad()
def copying(model, dataset, random):
    kinds = np.argsort(-dataset.counts)[:256]
    halves = random.choice(kinds, (200, 50))
    idx = torch.from_numpy(np.concatenate([halves, halves], axis=1))
    hits = torch.cat([(model(part[:, :-1])[:, 50:].argmax(-1) == part[:, 51:]).float().mean(1)
                      for part in idx.split(8)])
    return hits.numpy()

def recalling(model, dataset, random):
    unigram = prepare_data.unigram_log_probs([dataset], [1]).numpy()
    sequences = prepare_data.Sequences(dataset, 'val', model.config.context)
    gains = {True: [], False: []}
    for i in range(0, len(sequences), max(1, len(sequences) // 200)):
        row = sequences[i].tolist()
        [logp] = log_probs(model, [row])
        for k in range(64, len(row)):
            if unigram[row[k]] < -7:
                gains[row[k] in row[:k]].append(logp[k - 1].item() - unigram[row[k]])
    seen, new = (np.array(gains[key]) for key in (True, False))
    return seen - new.mean(), np.hypot(seen.std() / len(seen) ** 0.5, new.std() / len(new) ** 0.5)

def held_out(dataset):
    """The documents of the val split, as text."""
    ids = np.concatenate(dataset.val)
    return [tokenizer().decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == EOS) + 1)]

def pairs(model, triples):
    """Of (context, other context, end), whether the end is likelier after the first one."""
    encode, wins = tokenizer().encode_ordinary, []
    for context, other, end in triples:
        end = encode(end)
        rows = [encode(text)[-(model.config.context - len(end)):] + end for text in (context, other)]
        a, b = (logp[-len(end):].sum() for logp in log_probs(model, rows))
        wins.append(float(a > b))
    return np.array(wins)

def closing(model, dataset, random):
    found = []
    for text in held_out(dataset):
        for match in re.finditer(r'(?s)[\w,.] ([("])([^()"]{8,60})([)"])', text):
            if match[1] + match[3] in ('()', '""'):
                before = text[max(0, match.start() - 60):match.start(1)]
                found.append((before + match[1] + match[2], before + match[2], match[3]))
    return pairs(model, [found[i] for i in random.permutation(len(found))[:400]])

def naming(model, dataset, random):
    syllables = 'bra cho dre fli gro hul jin kas lom mur nel pov quo ryt sab tez vun wix yar zet'.split()
    found = []
    for text in held_out(dataset)[:400]:
        between = f'. {text[:60].rpartition(" ")[0]}. The '
        a, b, c, d = random.choice(syllables, 4, replace=False)
        start = [f'This is about {x}{y}{between}{a}' for x, y in ((a, b), (c, d))]
        found.append((*start, b))
    return pairs(model, found)

ABILITIES = dict(copy=copying, recall=recalling, close=closing, name=naming)

def picture(rows):
    """A panel an ability: score over depth, a line a run."""
    figure, axes = pictures.plt.subplots(1, len(ABILITIES), figsize=(11, 3.2), layout='constrained')
    for ax, name in zip(axes, ABILITIES):
        for run, colour in zip(dict.fromkeys(row['run'] for row in rows), pictures.RUNS):
            layers, scores, errors = zip(*((row['layers'], row[name], row[f'{name}_stderr'])
                                           for row in rows if row['run'] == run))
            ax.errorbar(layers, scores, errors, color=colour, marker='o', label=run)
        ax.axhline(0.5 if name in ('close', 'name') else 0, color=pictures.GREY, ls=':')
        pictures.tidy(ax, title=name, xlabel='layers')
    axes[0].legend(edgecolor='white', fontsize=7)
    return figure

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folders of runs')
    parser.add_argument('--data', default='docs', help='a data set (%(default)s)')
    args = parser.parse_args(argv)
    dataset, rows = prepare_data.Dataset(args.data), []
    for run in args.runs:
        for path in sorted(Path(run).glob('stage_?.pt')):
            model = grow.load_model(path)
            row = dict(run=Path(run).name, layers=len(model.blocks))
            for name, ability in ABILITIES.items():
                result = ability(model, dataset, np.random.default_rng(0))
                scores, stderr = result if isinstance(result, tuple) else (result, None)
                row[name] = float(scores.mean())
                row[f'{name}_stderr'] = float(scores.std() / len(scores) ** 0.5 if stderr is None else stderr)
            rows.append(row)
            print(row, flush=True)
    if not rows:
        raise UserError(f'no stage_K.pt in {" ".join(args.runs)}: name folders of runs')
    pictures.write_tables(HERE / 'abilities', rows, 'chance: 0 of copy and recall, 0.5 of close and name')
    with replacing(HERE / 'abilities.png') as path:
        picture(rows).savefig(path, format='png', dpi=160)

if __name__ == '__main__':
    main()
