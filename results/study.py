"""
The study: when do nine layers beat three, what does growing them cost, and do glyphs matter there?

    python results/corpus.py                 # the text, data/docs
    python results/study.py                  # trains every arm that is not finished; stop it when you like
    python results/study.py --table          # trains nothing: table and picture of the arms that are finished

An arm is a run out/study/ARM and its record results/depth/ARM.json. All cost as many FLOPs as nine layers
at once on --tokens, or the fraction x of them in their name, optimiser apart; but those named `tokens` read
as many tokens. Rates are compared on data/tune. Two arms train side by side, one thread each. Writes
results/depth.csv, .txt and .png.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
import pictures
import prepare_data
from substrate import Parser, UserError, cli, replacing
from variants import VARIANTS

COMMON = '''--data docs --d_model 64 --heads 2 --context 128 --batch_tokens 4096 --micro_batch 32
    --eval_tokens 200_000 --device cpu --save_every 2'''.split()
# Ways to grow, each in three stages; a LoRA phase has half a stage's tokens.
WAYS = dict(equal='', long='--stage_ratio 0.35', warm='--lr_scale_later 1.0',
            both='--stage_ratio 0.35 --lr_scale_later 1.0', identity='--birth identity',
            pairs='--layers_per_stage 2', lora='--lora interleaved', last='--lora last')

def arms():
    """{name: (flags, share of the FLOPs or None, share of the tokens or None)}, the most telling first. The
    flags may begin with a name of variants.py."""
    found = {}

    def once(n, x, seed=0):
        found[f'once.{n}.x{x:g}.s{seed}'] = f'--monolithic --layers {n} --seed {seed}', x, None

    def grown(way, x, seed=0):
        found[f'grown.{way}.x{x:g}.s{seed}'] = f'{WAYS[way]} --seed {seed}', x, None

    for seed in (0, 1):
        for n in (9, 3):
            once(n, 1, seed)
        for way in ('equal', 'long', 'lora'):
            grown(way, 1, seed)
        found[f'grown.equal.tokens.s{seed}'] = f'--seed {seed}', None, 1
    for x in (1 / 8, 1 / 4, 1 / 2, 1):
        for n in (9, 6, 3):
            once(n, x)
    grown('equal', 1 / 2)
    grown('both', 1)
    for way in WAYS:
        grown(way, 1 / 4)
    for substrate in ('random', 'binary', 'learned'):
        for how, flags in (('once.9', '--monolithic'), ('grown.equal', '')):
            found[f'{substrate}.{how}.x0.25.s0'] = f'--substrate {substrate} {flags}', 1 / 4, None
    for lr in ('5e-3', '8e-3', '12e-3'):
        for n in (9, 3):
            flags = f'--data tune --monolithic --layers {n} --lr {lr}'
            found[f'tune.once.{n}.{lr}.x0.25.s0'] = flags, 1 / 4, None
    for lr, later in (('8e-3', 0.7), ('8e-3', 1.0), ('12e-3', 1.0)):
        for way in ('equal', 'long', 'lora'):
            flags = f'--data tune {WAYS[way]} --lr {lr} --lr_scale_later {later}'
            found[f'tune.grown.{way}.{lr}.{later}.x0.25.s0'] = flags, 1 / 4, None
    for name, (flags, x, share) in list(found.items()):
        found[f'cosine.{name}'] = f'cosine {flags}', x, share
    for cooldown in (0.2, 1.0):
        for how, flags in (('once.9', '--monolithic'), ('grown.equal', '')):
            found[f'cooldown.{cooldown}.{how}.x0.25.s0'] = f'--cooldown {cooldown} {flags}', 1 / 4, None
    found['zero.grown.equal.x0.25.s0'] = 'zero', 1 / 4, None
    return found

def sized(flags, rows, flops, tokens):
    """The flags of an arm with stages so long that it costs so many FLOPs, or reads so many tokens."""
    flags = [*COMMON, *flags]
    c, _ = grow.configure([*flags, '--stage_tokens', '1_000_000', '--lora_tokens', '500_000'])
    has = costs(c, rows)
    scale = flops / has['flops'] if flops else tokens / has['tokens']
    return [*flags, '--stage_tokens', str(round(1e6 * scale)), '--lora_tokens', str(round(5e5 * scale))]

def costs(c, rows):
    """Training FLOPs of a run, in all and in blocks, and its tokens."""
    phases = grow.ledger(c, rows)
    blocks, head = (sum(p[kind] * p['tokens'] for p in phases) for kind in ('block_flops', 'head_flops'))
    return dict(flops=blocks + head, block_flops=blocks, tokens=sum(p['tokens'] for p in phases))

def train(name, flags, rows, flops, tokens):
    """Trains an arm, or goes on with it, on one thread, and records what came of it. Raises UserError."""
    out, script, words = f'out/study/{name}', ['grow.py'], flags.split()
    if words and words[0] in VARIANTS:
        script = ['results/variants.py', words.pop(0)]
    flags = sized(words, rows, flops, tokens)
    now = ['--resume', '--save_every', '2'] if Path(out, 'latest.pt').exists() else flags
    done = subprocess.run([sys.executable, HERE.parent / script[0], *script[1:], '--out', out, *now],
                          env=os.environ | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f'{name} ended with status {done.returncode}: {done.stderr.strip()[-200:]}')
    ckpt = grow.load(out)
    c, last = grow.Config(**ckpt['config']), ckpt['state']['history'][-1]
    result = dict(arm=name, layers=c.layers, dtype=c.dtype, **costs(c, rows), seconds=last['seconds'],
                  by_phase=[h['val_loss'] for h in ckpt['state']['history']], val_loss=last['val_loss'],
                  command=' '.join(['python', *script, *flags]), log=ckpt['state']['log'])
    with replacing(HERE / f'depth/{name}.json') as path:
        path.write_text(json.dumps(result, indent=1))
    print(f'{name}: val loss {last["val_loss"]:.3f} after {last["seconds"] / 60:.0f} min', flush=True)

def curves(results):
    """Val loss over FLOPs: a line for each depth trained at once, a sign for each way to grow."""
    figure, ax = pictures.plt.subplots(figsize=(8, 4.6), layout='constrained')
    looks = [(f'once.{n}.', 'o-', colour) for n, colour in zip((3, 6, 9), pictures.RUNS)]
    looks += [(f'grown.{way}.', sign, pictures.INK) for way, sign in zip(WAYS, 's^vPXDd*')]
    looks += [('cosine.once.9.', 'o', pictures.ACTIVE), ('cosine.grown.equal.x', 's', pictures.ACTIVE)]
    for arm, sign, colour in looks:
        places = sorted((r['flops'], r['val_loss']) for r in results if r['arm'].startswith(arm))
        if places:
            ax.plot(*zip(*places), sign, color=colour, mfc='white', label=arm[:-1])
    pictures.tidy(ax, xlabel='training FLOPs', ylabel='val loss, nats a token', xscale='log')
    ax.legend(edgecolor='white', fontsize=8)
    return figure

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokens', type=int, default=9_600_000, help='of nine layers at once (%(default)s)')
    parser.add_argument('--only', nargs='+', default=[''], metavar='NAME', help='arms that begin so')
    parser.add_argument('--table', action='store_true', help='train nothing')
    args = parser.parse_args(argv)
    (HERE / 'depth').mkdir(exist_ok=True)
    if not args.table:
        rows = int((prepare_data.Dataset('docs').counts > 0).sum())
        nine = grow.configure([*COMMON, '--monolithic', '--stage_tokens', str(args.tokens // 3)])[0]
        whole = costs(nine, rows)
        with ThreadPoolExecutor(2) as pool:
            jobs = []
            for name, (flags, x, share) in arms().items():
                if name.startswith(tuple(args.only)) and not (HERE / f'depth/{name}.json').exists():
                    jobs.append(pool.submit(train, name, flags, rows, x and x * whole['flops'],
                                            share and share * whole['tokens']))
            for job in jobs:
                job.result()
    results = [json.loads(path.read_text()) for path in sorted((HERE / 'depth').glob('*.json'))]
    losses = {r['arm']: r['val_loss'] for r in results}
    table = []
    for r in results:
        # Against nine layers at once of the same schedule and seed; not where another split is read.
        schedule = 'cosine.' if r['arm'].startswith('cosine.') else ''
        nine = 'tune' not in r['arm'] and losses.get(f'{schedule}once.9.x1.{r["arm"][-2:]}')
        table.append(dict(arm=r['arm'], layers=r['layers'], tokens=r['tokens'], flops=f'{r["flops"]:.3g}',
                          block_flops=f'{r["block_flops"]:.3g}', minutes=round(r['seconds'] / 60, 1),
                          val_loss=r['val_loss'], over_nine=r['val_loss'] / nine if nine else '',
                          by_phase=' '.join(f'{x:.3f}' for x in r['by_phase'])))
    pictures.write_tables(HERE / 'depth', table)
    with replacing(HERE / 'depth.png') as path:
        curves(results).savefig(path, format='png', dpi=160)

if __name__ == '__main__':
    main()
