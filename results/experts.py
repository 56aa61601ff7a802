"""The composition experiment: a Russian and a Chinese expert, grown apart on one frozen interface, become one model by averaging their logits.

    python results/experts.py                              # everything; what is finished is skipped, so stop it and start it again at will
    python results/experts.py --only fetch                 # one step of fetch, train, compare, plot
    python results/experts.py --tokens 6000 --work /tmp/try --flags="--d_model 64 --heads 2 --context 64 --eval_tokens 2048"     # a small trial

The text comes from Debian packages, so this needs apt-get and dpkg-deb (but not root). The controls ask what the mean is worth: models of one
expert's size and of the merged size that saw both experts' text, and a pair of experts whose embeddings were learned, each its own.
Writes results/experts.csv, .txt and .png and results/experts_logs/.
"""

import argparse
import contextlib
import csv
import dataclasses
import gzip
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import grow
import pictures
import prepare_data
from substrate import VOCAB, Parser, UserError, cli, replacing

FLAGS = '--layers 9 --layers_per_stage 3 --stage_ratio 1 --lr_later 3e-3 --head_lr_later 2e-3 --lora none --d_model 256 --heads 8 --context 256 --batch_tokens 1024'
LANGUAGES = 'ru', 'zh', 'en'
PAIRS = {'merged': ('expert_ru', 'expert_zh'), 'learned_merged': ('learned_ru', 'learned_zh')}      # the models without a training of their own

# ---------------------------------------------------------------------------------------------------------------------
# fetch: Debian packages -> plain text -> data sets. Part of the handbook is not translated, and the fortunes hold English
# too, so of every document those paragraphs stay whose letters are mostly of the wanted script, each of them once.

PACKAGES = 'fortunes-ru', 'fortunes-zh', 'manpages-ru', 'manpages-zh', 'debian-handbook'
SCRIPTS = dict(ru='[\u0400-\u052f]', zh='[\u3400-\u9fff]', en='[A-Za-z]')
WIDE = '[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]'     # Chinese characters and punctuation, between which a line break is no space

def one_line(text):
    return re.sub(f'(?<={WIDE}) (?={WIDE})', '', ' '.join(text.split()))

def fortunes(path):
    """A fortune file -> its items, without the colours of a terminal. Verses keep their lines."""
    text = re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', path.read_text(errors='replace'))
    return [re.sub(r'[ \t]+$', '', item, flags=re.MULTILINE) for item in re.split(r'^%$', text, flags=re.MULTILINE)]

ASIDE = dict(TS='.TE', nf='.fi', EX='.EE', Bd='.Ed', ig='..', de='..')     # tables, examples and definitions, and what ends them
FONTS = 'B I R SM SB BR RB BI IB IR RI'.split()
INLINE = 'Nm Nd Ar Fl Cm Op Xr Pa Ev Dv Va Fn Em Sy Ql Dq Sq Pq Li Bx Fx'.split()
ESCAPES = ((r'\\".*', ''), (r'\\f(\[[^]]*\]|\(..|.)', ''), (r'\\s[-+]?\d+', ''),
           (r'\\\*?(\(aq|\(cq|\[aq\]|\[cq\])', "'"), (r'\\(\(lq|\(rq|\[lq\]|\[rq\])', '"'),
           (r'\\[nm*]?(\(..|\[[^]]*\])', ''), (r'\\[ ~0]', ' '), (r'\\-', '-'), (r'\\e', r'\\'), (r'\\[&|^:%c/,]', ''))

def man_page(path):
    """A gzipped man page -> its prose: headings, tables and examples dropped, macros and escapes taken away."""
    paragraphs, end = [''], None
    for line in gzip.decompress(path.read_bytes()).decode(errors='replace').splitlines():
        macro = re.match(r"[.'][ \t]*(\w*|\\\")(.*)", line)
        if end:
            end = None if line.startswith(end) else end
        elif not macro:
            paragraphs[-1] += line + '\n' if line.strip() else ''
            if not line.strip():
                paragraphs.append('')
        elif macro[1] in ASIDE:
            end = ASIDE[macro[1]]
        elif macro[1] in FONTS + INLINE:
            words = [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', macro[2])]
            paragraphs[-1] += ('' if macro[1] in FONTS[5:] else ' ').join(words) + '\n'     # .BR sets words without spaces
        elif macro[1] != '\\"':
            paragraphs.append('')
    for pattern, plain in ESCAPES:
        paragraphs = [re.sub(pattern, plain, paragraph) for paragraph in paragraphs]
    return '\n\n'.join(map(one_line, paragraphs))

class Page(HTMLParser):
    """A page of the handbook: `text` has its paragraphs. Headings, listings and contents are left out."""
    LEFT_OUT = 'head', 'script', 'style', 'pre', 'dt', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6'

    def __init__(self, path):
        super().__init__()
        self.text, self.inside = '', 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.inside += tag in self.LEFT_OUT
        self.text += '\0' if tag in ('p', 'div', 'li', 'dd', 'td') else ''

    def handle_endtag(self, tag):
        self.inside -= tag in self.LEFT_OUT
        self.text += '\0' if tag in ('p', 'div', 'li', 'dd', 'td') else ''

    def handle_data(self, data):
        self.text += '' if self.inside else data

def documents(language, root):
    """Yields the texts of a language: of fortunes an item, else a page; in English the handbook and the prose of Python's standard library."""
    share, country = root / 'usr/share', dict(ru='ru-RU', zh='zh-CN', en='en-US')[language]
    if language == 'en':
        yield from prepare_data.stdlib_documents()
    else:
        folder = share / 'games/fortunes' / ('ru' if language == 'ru' else '')
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.is_symlink() and path.suffix != '.dat':     # .u8 are links to the plain files, .dat their indices
                yield from fortunes(path)
        pages = share / 'man' / dict(ru='ru', zh='zh_CN')[language]
        yield from (man_page(path) for path in sorted(pages.rglob('*.gz')) if not path.is_symlink())
    for path in sorted((share / 'doc/debian-handbook/html' / country).glob('*.html')):
        yield '\n\n'.join(map(one_line, Page(path).text.split('\0')))

def paragraphs_in(language, text, seen):
    """The paragraphs of `text` whose letters are mostly of the language's script, at least ten, and that are not in `seen`."""
    for paragraph in re.split(r'\n\s*\n', text):
        wanted, letters = len(re.findall(SCRIPTS[language], paragraph)), sum(map(str.isalpha, paragraph))
        if wanted >= 10 and 2 * wanted > letters and not (paragraph in seen or seen.add(paragraph)):
            yield paragraph.strip('\n')

def fetch():
    """Makes ru.txt, zh.txt and en.txt, with a line % between documents, and the data sets of these names."""
    if not all(Path(f'{language}.txt').exists() for language in LANGUAGES):
        if not (shutil.which('apt-get') and shutil.which('dpkg-deb')):
            raise UserError('the texts come from Debian packages: run this step on Debian, then copy ru.txt, zh.txt and en.txt to --work')
        Path('packages').mkdir(exist_ok=True)
        for package in PACKAGES:
            if not list(Path('packages').glob(f'{package}_*.deb')) and subprocess.run(['apt-get', 'download', package], cwd='packages').returncode:
                raise UserError(f'apt-get download {package} failed: look at its message above; perhaps `apt-get update` has to come first')
            subprocess.run(['dpkg-deb', '-x', *Path('packages').glob(f'{package}_*.deb'), 'packages/root'], check=True)
        for language in LANGUAGES:
            seen = set()
            with replacing(f'{language}.txt') as path, open(path, 'w') as f:
                for text in documents(language, Path('packages/root')):
                    if kept := '\n\n'.join(paragraphs_in(language, text, seen)):
                        f.write(re.sub(r'^%$', '', kept, flags=re.MULTILINE) + '\n%\n')
    for language in LANGUAGES:
        if not Path('data', language).exists():
            prepare_data.prepare(language, prepare_data.file_documents([f'{language}.txt'], '%'), 'Debian packages, by results/experts.py')

# ---------------------------------------------------------------------------------------------------------------------
# train: every model is a run of grow.py, with the same flags but for what stands here

def size(c):
    """Parameters of a finished model besides the token table."""
    return grow.ledger(c)[-1]['total'] - VOCAB * c.d_model

def larger(c):
    """The config as wide as it must be for about the parameters of two merged experts, in heads of the same size."""
    head, wanted = c.d_model // c.heads, 2 * size(c) - VOCAB           # merged heads have one bias
    wider = (dataclasses.replace(c, d_model=head * n, heads=n) for n in range(c.heads, 4 * c.heads))
    found = min(wider, key=lambda config: abs(size(config) - wanted))
    print(f'parameters without the token table: expert {size(c):,}, two merged {wanted:,}; control_large {size(found):,} (d_model {found.d_model})')
    return found

def runs(c, tokens):
    """Name -> flags of grow.py, of every training."""
    stages, both, large = len(grow.phases(c)), ['--data', 'ru:3', 'zh:3', 'en:2'], larger(c)
    one, two, tune = (['--stage_tokens', tokens // stages], ['--stage_tokens', 2 * tokens // stages], ['--tune_heads', tokens // 4])
    ru, zh = ['--data', 'ru:3', 'en:1', '--seed', 1, *one], ['--data', 'zh:3', 'en:1', '--seed', 2, *one]
    return dict(expert_ru=ru, expert_zh=zh, control_small=[*both, '--seed', 1, *two],
                control_large=[*both, '--seed', 1, *two, '--d_model', large.d_model, '--heads', large.heads],
                learned_ru=[*ru, '--substrate', 'learned'], learned_zh=[*zh, '--substrate', 'learned'],
                merged_tuned=['--moe', *PAIRS['merged'], *both, *tune],
                learned_merged_tuned=['--moe', *PAIRS['learned_merged'], '--allow_mismatch', *both, *tune])

def train(flags, plan):
    for name, own in plan.items():
        print(f'\n=== {name}', flush=True)
        resume = ['--resume'] * Path(name, 'latest.pt').exists()       # of a finished run grow.py says so, and refuses other flags than it had
        run = subprocess.Popen([sys.executable, HERE.parent / 'grow.py', '--out', name, *flags, *map(str, own), *resume])
        try:
            status = run.wait()
        except KeyboardInterrupt:
            run.wait()                                                 # it got the Ctrl-C as well and is saving its state
            raise
        if status:
            raise UserError(f'the training of {name} ended with status {status}, see above; where it was cut off, the same command goes on')
        copy_log(name)

def copy_log(name):
    """log.csv -> results/experts_logs/NAME.csv, thinned to about 100 KB. Rows with a validation loss stay."""
    header, *rows = Path(name, 'log.csv').read_text().splitlines()
    every = 1 + sum(map(len, rows)) // 100_000
    val = header.split(',').index('val_loss')
    with replacing(HERE / 'experts_logs' / f'{name}.csv') as path:
        path.write_text('\n'.join([header] + [row for i, row in enumerate(rows) if i % every == 0 or row.split(',')[val]]) + '\n')

# ---------------------------------------------------------------------------------------------------------------------
# compare: every model on every language, n-gram baselines, and what merging costs

def built(name, c):
    """A model by its name, and the tokens that it and its experts were trained on."""
    names = PAIRS.get(name.removesuffix('_tuned'), ()) + ((name,) if name not in PAIRS else ())
    tokens = sum(grow.load(Path(n, 'latest.pt'))['at']['history'][-1]['tokens'] for n in names)
    if name in PAIRS:
        return grow.merge_experts(dataclasses.replace(c, moe=PAIRS[name], allow_mismatch=name != 'merged')), tokens
    return grow.load_model(name, c.device), tokens

def row_of(name, losses, datasets, **more):
    bits = [grow.in_units(loss, d)['bits_per_byte'] for loss, d in zip(losses, datasets)]
    return dict(model=name, **dict(zip(LANGUAGES, losses)), mean=sum(losses) / 3, bits_per_byte=sum(bits) / 3) | more

def score(name, c, amp, datasets):
    model, tokens = built(name, c)
    tables = sum(p.numel() for key, p in model.named_parameters() if key.endswith('interface.table'))       # a shared table counts once
    sizes = dict(parameters=grow.count(model.parameters()) - tables, token_tables=tables, tokens=tokens)
    if c.compile:
        grow.compile_model(model)
    return row_of(name, [grow.evaluate(model, d, c, amp) for d in datasets], datasets, **sizes)

def measure(name, c):
    """Prints seconds to evaluate one data set (best of three) and peak memory in bytes: before there is a model, and in all."""
    amp, data, before = grow.set_up(c), prepare_data.Dataset('ru'), peak_memory(c)
    model, times = built(name, c)[0], []
    if c.compile:
        grow.compile_model(model)
    for limit in (c.micro_batch * c.context, *[c.eval_tokens] * 3):    # the first warms up
        start = time.perf_counter()
        grow.evaluate(model, data, dataclasses.replace(c, eval_tokens=limit), amp)
        times.append(time.perf_counter() - start)
    print(json.dumps(dict(seconds=min(times[1:]), before=before, peak=peak_memory(c))))

def peak_memory(c):
    """As grow.peak_memory, but without what Linux's getrusage inherits from the process that started this one."""
    if c.device == 'cuda':
        return grow.peak_memory(c.device)
    return 1024 * int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])

def cost(command):
    """One expert and two merged in turn, each in processes of its own -> a sentence."""
    found = {}
    for name in ('expert_ru', 'merged') * 2:
        run = subprocess.run([*command, '--measure', name], capture_output=True, text=True)
        if run.returncode:
            raise UserError(f'measuring {name} failed: {run.stderr.strip().splitlines()[-1]}')
        row = json.loads(run.stdout.splitlines()[-1])
        found[name] = min(found.get(name, row), row, key=lambda r: r['seconds'])
    one, two = found['expert_ru'], found['merged']
    gib = [f'{r["peak"] / 2**30:.2f} GiB ({(r["peak"] - r["before"]) / 2**30:.2f} above the bare program)' for r in (one, two)]
    return (f'Evaluating two merged experts takes {two["seconds"]:.1f} s, one expert {one["seconds"]:.1f} s: '
            f'{two["seconds"] / one["seconds"]:.2f} times as long. Peak memory {gib[1]} against {gib[0]}: {two["peak"] / one["peak"]:.2f} times.')

def verdicts(rows):
    """Plain sentences: is the merged model better than the better of its experts, language by language?"""
    by_name = {row['model']: row for row in rows}
    for merged, kind in (('merged', 'Shared frozen interface'), ('learned_merged', 'Separately learned embeddings')):
        for name, when in ((merged, 'before tuning'), (f'{merged}_tuned', 'after tuning the head')):
            for key, where in (*zip(LANGUAGES, LANGUAGES), ('mean', 'the mean of the languages')):
                best = min(PAIRS[merged], key=lambda expert: by_name[expert][key])
                gain = by_name[best][key] - by_name[name][key]
                yield (f'{kind}, {when}, {where}: {name} {by_name[name][key]:.3f} {"beats" if gain > 0 else "does NOT beat"} its better expert, '
                       f'{best} {by_name[best][key]:.3f} ({abs(gain):.3f} nats {"better" if gain > 0 else "worse"}).')
    for name in ('merged', 'merged_tuned'):
        for control in ('control_small', 'control_large'):
            gain = by_name[control]['mean'] - by_name[name]['mean']
            yield (f'Mean of the languages: {name} is {abs(gain):.3f} nats {"better" if gain > 0 else "worse"} than {control}, '
                   "which was trained on both experts' text.")

def compare(c, tokens, flags, plan, command):
    """Evaluates what scores.json does not have yet, and writes experts.csv and experts.txt."""
    for name in plan:
        run = grow.load(Path(name, 'latest.pt'))
        if run['at']['phase'] < len(grow.phases(grow.Config(**run['config']))):
            raise UserError(f'the training of {name} is not finished: run the step train first')
    store, amp = Path('scores.json'), grow.set_up(c)
    key = [flags, tokens, {name: Path(name, 'latest.pt').stat().st_mtime_ns for name in plan}]
    scores = json.loads(store.read_text()) if store.exists() else {}
    scores = scores if scores.get('key') == key else dict(key=key)
    datasets = [prepare_data.Dataset(language) for language in LANGUAGES]
    order = 'expert_ru expert_zh merged merged_tuned control_small control_large learned_ru learned_zh learned_merged learned_merged_tuned'.split()
    for name in ['cost', *order]:
        if name not in scores:
            print(f'measuring {name}', flush=True)
            scores[name] = cost(command) if name == 'cost' else score(name, c, amp, datasets)
            with replacing(store) as path:
                path.write_text(json.dumps(scores))
    rows = [scores[name] for name in order]
    batches = [prepare_data.Batches([d], [1], 0, 64, c.context) for d in datasets]
    grams = [prepare_data.ngram_losses(b, len(b.sequences[0]) // 64, b.datasets[0], c.eval_tokens) for b in batches]
    rows += [row_of(name, [g[k] for g in grams], datasets, parameters='', token_tables='', tokens=sum(d.train_tokens for d in datasets))
             for k, name in enumerate(('unigram', 'bigram'))]
    pictures.write_csv(HERE / 'experts.csv', [{k: f'{v:.5f}' if isinstance(v, float) else v for k, v in row.items()} for row in rows])
    about = ['Validation loss in nats a token, by language; bits per byte, mean of the languages. Parameters without the token tables, which only',
             'learned models train. Tokens of a merged model: those of its experts and of its tuning; n-grams: the training split of each language.']
    with contextlib.redirect_stdout(io.StringIO()) as table:
        grow.table(rows)
    text = '\n'.join([table.getvalue(), *about, '', *verdicts(rows), scores['cost']])
    print(text)
    with replacing(HERE / 'experts.txt') as path:
        path.write_text(text + '\n')

# ---------------------------------------------------------------------------------------------------------------------
# plot

COLOURS = dict(expert_ru='#c6dbef', expert_zh='#9ecae1', merged='#4292c6', merged_tuned='#08519c', control_small='#bdbdbd', control_large='#737373',
               learned_ru='#fdd0a2', learned_zh='#fdae6b', learned_merged='#f16913', learned_merged_tuned='#a63603')

def plot():
    """results/experts.csv -> results/experts.png: for each language the loss of each model, and what bigrams achieve."""
    try:
        import matplotlib
        matplotlib.use('Agg')                          # draws into files, needs no screen
        import matplotlib.pyplot as plt
    except ImportError:
        raise UserError('the picture needs matplotlib: pip install matplotlib') from None
    try:
        with open(HERE / 'experts.csv') as f:
            rows = {row['model']: row for row in csv.DictReader(f)}
    except FileNotFoundError:
        raise UserError('there is no results/experts.csv to draw: run the step compare first') from None
    figure, axis = plt.subplots(figsize=(12, 5))
    width = 0.88 / len(COLOURS)
    for k, (name, colour) in enumerate(COLOURS.items()):
        places, losses = [x + (k - len(COLOURS) / 2 + 0.5) * width for x in range(3)], [float(rows[name][language]) for language in LANGUAGES]
        axis.bar(places, losses, width, color=colour, edgecolor='white', label=name.replace('_', ' '))
        for place, loss in zip(places, losses):
            axis.text(place, loss + 0.05, f'{loss:.2f}', ha='center', va='bottom', rotation=90, fontsize=8)
    axis.hlines([float(rows['bigram'][language]) for language in LANGUAGES], [x - 0.46 for x in range(3)], [x + 0.46 for x in range(3)],
                color='black', linestyle='--', linewidth=1, label='bigrams, counted on all text')
    axis.set_xticks(range(3), ['Russian', 'Chinese', 'English'])
    axis.set_ylabel('validation loss, nats per token (lower is better)')
    axis.set_ylim(0, 1.12 * axis.get_ylim()[1])
    axis.set_title('Two experts, and the mean of their logits: blue shares one frozen interface, orange learned two, grey saw both texts')
    axis.spines[['top', 'right']].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc='outside lower center', ncols=6, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    with replacing(HERE / 'experts.png') as path:
        figure.savefig(path, dpi=120, format='png')

# ---------------------------------------------------------------------------------------------------------------------

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--work', default=HERE.parent / 'out' / 'experts', type=Path, help='folder of texts, data, models: about 6 GB (out/experts)')
    parser.add_argument('--tokens', type=int, default=360_000, help='training tokens of an expert; a control gets twice as many (%(default)s)')
    parser.add_argument('--flags', default='', help=f'further flags of grow.py for every training, after {FLAGS}')
    parser.add_argument('--only', choices=['fetch', 'train', 'compare', 'plot'], help='do this step alone')
    parser.add_argument('--measure', help=argparse.SUPPRESS)           # by `cost`, of itself
    args = parser.parse_args(argv)
    flags = FLAGS.split() + shlex.split(args.flags)
    args.work.mkdir(parents=True, exist_ok=True)
    os.chdir(args.work)                                                # where grow.py finds data/
    c, _ = grow.configure(flags)
    if args.measure:
        return measure(args.measure, c)
    todo = [args.only] if args.only else ['fetch', 'train', 'compare', 'plot']
    if 'fetch' in todo:
        fetch()
    if 'train' in todo:
        train(flags, runs(c, args.tokens))
    if 'compare' in todo:
        compare(c, args.tokens, flags, runs(c, args.tokens), [sys.executable, HERE / 'experts.py', '--work', '.', f'--flags={args.flags}'])
    if 'plot' in todo:
        plot()

if __name__ == '__main__':
    main()
