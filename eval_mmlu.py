"""Scores of a trained model on MMLU, ARC, CommonsenseQA and SQuAD, with chance beside them (paper section 4).

    python eval_mmlu.py out/001                     # MMLU, 0-shot; downloads it on first use (166 MB)
    python eval_mmlu.py out/001 --all_stages        # score by depth: every stage_K.pt of the run
    python eval_mmlu.py out/001 --task arc_easy     # or arc_challenge, csqa, squad
    python eval_mmlu.py out/ru out/zh               # several runs are experts: the mean of their logits

Likelihood asks: is the key the option whose " A", " B", ... is most probable after the prompt? Letter, the
original's score: is it the likeliest of all next tokens? (Our " A" is a space and a letter, so a model that
learned to write `Answer: A` is wrong.) Without knowing the format it is at chance by likelihood, below it by
letter. OUT/eval_TASK.json holds a row for every question; --limit N writes eval_TASK_limit_N.json.
"""

import argparse
import contextlib
import csv
import json
import re
import string
import tarfile
import zipfile
from collections import Counter, namedtuple
from pathlib import Path

import torch

import grow
from prepare_data import download, progress
from substrate import EOS, Parser, UserError, cli, digest, replacing, sha256_of, table, tokenizer

# ------------------------------------------------------------------------------------------------------------
# Questions. Tasks and prompts are the paper's (section 4). Archives are read where they lie, never unpacked

Question = namedtuple('Question', 'subject index prompt letters key')   # SQuAD: no letters, key: all answers

@contextlib.contextmanager
def reading(name, reader=None):
    """Whatever is wrong with a file ends in one sentence that names it, and the line a csv reader is at."""
    try:
        yield
    except Exception as error:
        if reader:
            name = f'{name}, line {reader.line_num + isinstance(error, UnicodeDecodeError)}'
        raise UserError(f'{name} cannot be read ({type(error).__name__}: {error}): restore it') from None

def read_files(where, pattern):
    """{path: bytes} of what fits in a folder, .tar or .zip, or of one file; without byte-order marks."""
    def wanted(path):
        return path.match(pattern) or path.match('dev/*_dev.csv')
    with reading(where):
        if where.suffix == '.tar':
            with tarfile.open(where, 'r:') as tar:
                files = {Path(m.name): tar.extractfile(m).read() for m in tar if wanted(Path(m.name))}
        elif where.suffix == '.zip':
            with zipfile.ZipFile(where) as archive:
                files = {Path(name): archive.read(name) for name in archive.namelist() if wanted(Path(name))}
        else:
            files = {path: path.read_bytes() for path in [where, *where.rglob('*')] if wanted(path)}
    return {path: files[path].removeprefix(b'\xef\xbb\xbf') for path in sorted(files)}

def choice_prompt(question, options, between):
    """The paper's prompt: a question and its lettered options, strings, with `between` before each."""
    lettered = [f'{letter}) {option}' for letter, option in zip(string.ascii_uppercase, options)]
    return between.join([f'Question: {question}\nOptions:', *lettered]) + '\nAnswer:'

def mmlu(path, raw):
    """Yields prompt, letters, key of an MMLU file, which has no header."""
    reader = csv.reader((line.decode() for line in raw.splitlines(keepends=True)), strict=True)
    with reading(path, reader):
        for question, *options, key in filter(None, reader):
            if len(options) != 4 or key not in tuple('ABCD'):
                raise ValueError('not six fields of which the last is A, B, C or D')
            yield choice_prompt(question, options, ' '), 'ABCD', key

def choices(path, raw):
    """The same of ARC or CommonsenseQA, in both forms that are published. Keys 1 to 4 become A to D."""
    for i, line in enumerate(raw.rstrip().splitlines()):
        with reading(f'{path}, line {i + 1}'):
            row = json.loads(line)
            stem, options = row['question'], row.get('choices')
            if options is None:
                options = {field: [x[field] for x in stem['choices']] for field in ('text', 'label')}
                stem = stem['stem']
            letters = string.ascii_uppercase[:len(options['text'])]
            key = letters[options['label'].index(row['answerKey'])]
            yield choice_prompt(stem, options['text'], '\n'), letters, key

def squad(path, raw):
    """The same of the first 256 questions of SQuAD 2.0 whose first answer has at most 8 characters."""
    with reading(path):
        paragraphs = [p for article in json.loads(raw)['data'] for p in article['paragraphs']]
        asked = [(p['context'], q['question'], [x['text'] for x in q['answers'] or () if x['text']])
                 for p in paragraphs for q in p['qas']]
        short = [item for item in asked if item[2] and len(item[2][0]) <= 8]
    for context, question, answers in short[:256]:
        yield f'Context: {context}\nQuestion: {question}\nAnswer:', '', answers

MMLU_QUESTIONS = 14_042
MMLU_SHA256 = 'bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b'
MMLU_URL = 'https://people.eecs.berkeley.edu/~hendrycks/data.tar'
ARC_URL = 'https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip'
CSQA_URL = 'https://s3.amazonaws.com/commensenseqa/dev_rand_split.jsonl'
SQUAD_URL = 'https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json'
# a task's reader, its files (ARC's end in Dev or validation), what data/ has them in, and where that is from
TASKS = dict(mmlu=(mmlu, 'test/[!.]*_test.csv', 'mmlu.tar', MMLU_URL),
             arc_easy=(choices, 'ARC-Easy-[Dv]*.jsonl', 'arc.zip', ARC_URL),
             arc_challenge=(choices, 'ARC-Challenge-[Dv]*.jsonl', 'arc.zip', ARC_URL),
             csqa=(choices, 'dev_rand_split.jsonl', 'dev_rand_split.jsonl', CSQA_URL),
             squad=(squad, 'dev-v2.0*.json', 'dev-v2.0.json', SQUAD_URL))

def read_task(task, data=None, shots=0):
    """Questions of a task, from `data` or downloaded; MMLU's after `shots` solved ones of the dev split."""
    read, pattern, kept, url = TASKS[task]
    where = Path(data) if data else download(url, Path('data', kept), MMLU_SHA256 if task == 'mmlu' else None)
    files = read_files(where, pattern)
    questions, paths = [], [path for path in files if path.match(pattern)]
    for path in paths if task == 'mmlu' else paths[:1]:
        subject = path.name.removesuffix('_test.csv') if task == 'mmlu' else task
        dev = path.parent.parent / 'dev' / f'{subject}_dev.csv'
        examples = list(mmlu(dev, files.get(dev, b'')))[:shots] if shots else []
        if len(examples) < shots:
            raise UserError(f'{dev} has {len(examples)} examples: --shots can be no more')
        before = ''.join(f'{prompt} {key}\n\n' for prompt, _, key in examples)
        for i, (prompt, letters, key) in enumerate(read(path, files[path])):
            questions.append(Question(subject, i, before + prompt, letters, key))
    if not questions:
        raise UserError(f'{where} has no questions of {task}: --data must name a folder that holds {pattern}')
    return questions

# ------------------------------------------------------------------------------------------------------------
# Scores, 0 to 1 each; beside them chance, and cut: is a prompt longer than the context, its left missing?

@torch.no_grad()
def read_logits(model, ids, count, amp):
    """The last `count` logits: count, V; float32, since bfloat16 has too few digits for options so close."""
    window = torch.tensor([ids[-model.config.context:]], device=next(model.parameters()).device)
    with amp:
        h = model.hidden(window)[0, -count:]
    return model.head(h.float()).cpu()

def score_choice(model, q, amp=contextlib.nullcontext()):
    """-> choice (the likeliest option), letter (text of the likeliest token), logps (of options, in nats)."""
    # " A" is always a space and a letter: one pass over the prompt and the space serves all options
    ids = tokenizer().encode_ordinary(q.prompt + ' ')
    after_colon, after_space = read_logits(model, ids, 2, amp).double().log_softmax(-1)
    logps = [after_colon[ord(' ')].item() + after_space[ord(letter)].item() for letter in q.letters]
    choice = q.letters[logps.index(max(logps))]
    letter = tokenizer().decode([after_colon.argmax().item()])
    scores = dict(likelihood=int(choice == q.key), letter=int(letter.strip() == q.key), chance=1 / len(logps),
                  cut=int(len(ids) > model.config.context))
    return dict(key=q.key, choice=choice, letter=letter, logps=[round(x, 5) for x in logps], scores=scores)

def words(text):
    """SQuAD's normalisation: lower case, no punctuation, no articles; the words that remain."""
    text = ''.join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r'\b(a|an|the)\b', ' ', text).split()

def f1(answer, text):
    """Harmonic mean of precision and recall over words; where a text has none, whether both have none."""
    a, b = words(answer), words(text)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b)) if a and b else float(a == b)

def score_open(model, q, amp=contextlib.nullcontext()):
    """-> generation, of 16 greedy tokens, up to </s>. hit: the first answer is in it (paper). Exact match and
    F1 are SQuAD's: of its first line alone, with the answer that fits best."""
    ids = tokenizer().encode_ordinary(q.prompt)
    start = len(ids)
    while len(ids) < start + 16:
        token = read_logits(model, ids, 1, amp).argmax().item()
        if token == EOS:
            break
        ids.append(token)
    text = tokenizer().decode(ids[start:])
    line = text.strip().partition('\n')[0]
    scores = dict(hit=int(q.key[0] in text), exact_match=int(any(words(x) == words(line) for x in q.key)),
                  f1=max(f1(x, line) for x in q.key), cut=int(start > model.config.context))
    return dict(answers=q.key, generation=text, scores=scores)

# ------------------------------------------------------------------------------------------------------------
# Summary and command line

# parts of the names of MMLU's subjects, as its authors group them; other: business, health, miscellaneous
CATEGORIES = {
    'STEM': 'astronomy|physics|chemistry|biology|computer|machine|algebra|mathematics|statistics|electrical',
    'humanities': 'history|logic|moral|philosophy|religions|law|jurisprudence',
    'social sciences': 'politics|relations|studies|policy|sexuality|sociology|econom|geography|psychology'}

def summarise(rows):
    """total: figures of all rows, the micro average; groups: of subjects, categories, cut and whole prompts;
    macro: means over subjects. Figures: n, and of each score the mean and its standard error."""
    groups, names, subjects = {}, list(rows[0]['scores']), dict.fromkeys(row['subject'] for row in rows)
    for row in rows:
        length = 'cut prompts' if row['scores']['cut'] else 'whole prompts'
        named = [name for name, parts in CATEGORIES.items() if re.search(parts, row['subject'])] + ['other']
        for group in row['subject'], named[0], length, 'all':
            groups.setdefault(group, []).append(list(row['scores'].values()))
    for group, scores in groups.items():
        scores = torch.tensor(scores, dtype=torch.float64)
        columns = zip(names, scores.mean(0).tolist(), scores.std(0, correction=0).tolist())
        figures = {name: dict(mean=mean, stderr=std / len(scores) ** 0.5) for name, mean, std in columns}
        groups[group] = dict(n=len(scores), **figures)
    macro = {name: sum(groups[x][name]['mean'] for x in subjects) / len(subjects) for name in names}
    return dict(total=groups.pop('all'), macro=macro, groups=groups)

def cells(figures):
    """`figures` as cells of a table: n, and each score in percent with its standard error."""
    return {name: x if name == 'n' else f'{100 * x["mean"]:.2f} ± {100 * x["stderr"]:.2f}'
            for name, x in figures.items()}

def targets(outs, task, all_stages=False, limit=None, shots=0):
    """[(checkpoints, file of their result)] of a command line; several checkpoints are a merge."""
    paths = [Path(out, 'latest.pt') if Path(out).is_dir() else Path(out) for out in outs]
    if all_stages:
        found = Path(outs[0]).glob('stage_*.pt')       # stage_2, stage_2_lora, stage_10
        paths = sorted(found, key=lambda path: (int(path.stem.split('_')[1]), path.stem))
    for path in paths or [Path(outs[0], 'stage_1.pt')]:
        if not path.is_file():
            raise UserError(f'{path} does not exist: OUT must be the folder of a run, or a checkpoint in it')
    # so that a look at a few questions, or another prompt, replaces no whole result
    end = (f'_shots_{shots}' if shots else '') + (f'_limit_{limit}.json' if limit else '.json')
    if len(outs) == 1:
        return [([x], x.with_name(f'eval_{task}_{x.stem}{end}'.replace('_latest', ''))) for x in paths]
    return [(paths, paths[0].with_name(f'eval_{task}_merged_{digest(*map(Path.resolve, paths))}{end}'))]

@cli
def main(argv=None):
    """The command line: scores each OUT, every stage of one, or the merge of several."""
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('out', nargs='+', metavar='OUT', help='folder of a run, or a checkpoint in it; several are experts')
    add('--task', choices=TASKS, default='mmlu', help='(%(default)s)')
    add('--shots', type=int, default=0, help='solved dev questions before each one of MMLU (%(default)s)')
    add('--data', metavar='DIR', help='folder with the files of the task (default: data/, downloaded once)')
    add('--all_stages', action='store_true', help='score every stage_K.pt of the run')
    add('--limit', type=int, help='score only so many questions, evenly spread over all')
    add('--device', default=grow.Config.device, choices=['cpu', 'cuda', 'mps'], help='(%(default)s)')
    add('--dtype', default='auto', choices=['auto', 'float32', 'bfloat16'], help='of matrix products')
    a = parser.parse_intermixed_args(argv)
    if a.shots < 0 or a.limit is not None and a.limit < 1 or a.all_stages and len(a.out) > 1:
        parser.error('--shots must be at least 0 and --limit at least 1, and --all_stages takes one OUT')
    jobs, every = targets(a.out, a.task, a.all_stages, a.limit, a.shots), read_task(a.task, a.data, a.shots)
    n = min(a.limit or len(every), len(every))
    questions = [every[i * len(every) // n] for i in range(n)]
    print(f'{a.task}, {a.shots}-shot: {n:,} questions, {len({q.subject for q in questions})} subject(s)')
    if a.task == 'mmlu' and len(every) != MMLU_QUESTIONS:
        print(f'note: MMLU has {MMLU_QUESTIONS:,} questions and {len(every):,} were found: not comparable')
    c = grow.Config(device=a.device, dtype=a.dtype, compile=False)
    amp, depths = grow.set_up(c), []
    score = score_open if a.task == 'squad' else score_choice
    for paths, target in jobs:
        model = grow.merge_experts(paths, c.device) if len(paths) > 1 else grow.load_model(paths[0], c.device)
        asked = progress(questions, target.stem, lambda q: 1, 'questions', total=n)
        rows = [dict(subject=q.subject, index=q.index, **score(model, q, amp)) for q in asked]
        summary = dict(summarise(rows), layers=len(model.blocks), context=model.config.context)
        checkpoints = {str(path): sha256_of(path) for path in paths}
        settings = dict(vars(a), device=c.device, dtype=c.dtype, checkpoints=checkpoints)
        groups = sorted(summary['groups'].items(), key=lambda item: item[1]['n'])
        table([dict(of=name, **cells(figures)) for name, figures in groups])
        print('macro average:', ', '.join(f'{name} {100 * x:.2f}' for name, x in summary['macro'].items()))
        depths.append(dict(rows_in=str(target), layers=summary['layers'], **cells(summary['total'])))
        with replacing(target) as path:
            path.write_text(json.dumps(dict(settings=settings, summary=summary, rows=rows)), encoding='utf-8')
    print('\nmicro averages in percent, with standard errors; cut: prompts longer than the context')
    table(depths)

if __name__ == '__main__':
    main()
