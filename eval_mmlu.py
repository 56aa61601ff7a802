"""Scores of a trained model on MMLU, ARC, CommonsenseQA and SQuAD, with their standard errors and with chance beside them (paper section 4).

    python eval_mmlu.py out/001                                 # MMLU, 0-shot; downloads it on first use (166 MB) to data/mmlu
    python eval_mmlu.py out/001 --all_stages                    # score by depth: every stage_K.pt of the run
    python eval_mmlu.py out/001 --task arc_easy                 # or arc_challenge, csqa, squad
    python eval_mmlu.py out/ru out/zh                           # several runs are experts: scores the mean of their logits

A choice question gets two scores from one pass over its prompt:
    likelihood   the option whose " A", " B", ... has the highest log-probability after `Answer:`
    letter       the original's score: the likeliest next token after `Answer:`, over the whole vocabulary, is the key. (The original samples
                 one character; we take the likeliest. In our tokenizer " A" is a space and a letter, so a model that learned to write
                 `Answer: A` predicts the space, and is wrong.)
A model that has not learned the format scores at chance by likelihood and below it by letter. OUT/eval_TASK.json holds a row for every question
(of those of --limit N: eval_TASK_limit_N.json).
The scoring functions take any model and any tokenizer: results/check_eval.py compares them with lm-eval. There are no chat templates here.
"""

import argparse
import contextlib
import csv
import json
import os
import re
import string
import tarfile
import tempfile
import time
import zipfile
from collections import Counter, namedtuple
from pathlib import Path

import torch

import grow
import prepare_data
from substrate import EOS, Parser, UserError, cli, replacing, sha256_of, tokenizer

GENERATED = 16          # tokens of an answer to SQuAD: the answers that are asked for have at most 8 characters
FILLED = 0.9            # a batch holds no row shorter than this part of its longest, so padding is at most a tenth

# MMLU's categories as its authors group the subjects; all others are 'other': business, health, miscellaneous (14 subjects)
CATEGORIES = {
    'STEM': '''astronomy college_physics conceptual_physics high_school_physics college_chemistry high_school_chemistry college_biology
        high_school_biology college_computer_science computer_security high_school_computer_science machine_learning abstract_algebra
        college_mathematics elementary_mathematics high_school_mathematics high_school_statistics electrical_engineering''',
    'humanities': '''high_school_european_history high_school_us_history high_school_world_history prehistory formal_logic logical_fallacies
        moral_disputes moral_scenarios philosophy world_religions international_law jurisprudence professional_law''',
    'social sciences': '''high_school_government_and_politics public_relations security_studies us_foreign_policy human_sexuality sociology
        econometrics high_school_macroeconomics high_school_microeconomics high_school_geography high_school_psychology professional_psychology''',
}
CATEGORY = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects.split()}

# ---------------------------------------------------------------------------------------------------------------------
# The questions. A prompt ends with `Answer:`, its context is all a model gets. Tasks and prompts are the paper's (section 4), and so is the
# choice of the 256 first questions of SQuAD with a short answer

LETTERS = 'ABCDE'
MMLU_QUESTIONS = 14_042
SQUAD_ITEMS, SQUAD_LONGEST = 256, 8

Question = namedtuple('Question', 'subject index prompt letters key')          # letters: 'ABCD', or as many as there are options
OpenQuestion = namedtuple('OpenQuestion', 'subject index prompt answers')

def mmlu_prompt(question, options):
    """The original's prompt for a question and its four options, strings."""
    return f'Question: {question}\nOptions: ' + ' '.join(f'{letter}) {option}' for letter, option in zip(LETTERS, options)) + '\nAnswer:'

def read_csv(path):
    """The rows of an MMLU file, which has no header: [question, A, B, C, D, letter of the key], all strings. UserError with file and line."""
    if not path.exists():
        raise UserError(f'{path} does not exist: --data must name a folder that holds test/ and dev/')
    with open(path, 'rb') as f:
        reader, rows = csv.reader((line.decode() for line in f), strict=True), []
        try:
            for row in filter(None, reader):
                if len(row) != 6 or row[5] not in tuple('ABCD'):
                    raise ValueError('not six fields of which the last is A, B, C or D')
                rows.append(row)
        except (csv.Error, ValueError) as error:      # wrong quotes, wrong fields, not UTF-8
            line = reader.line_num + isinstance(error, UnicodeDecodeError)
            raise UserError(f'{path}, line {line}: cannot be read ({error}); mend or restore it') from None
    if not rows:
        raise UserError(f'{path} is empty: restore it')
    return rows

def mmlu(test, task='mmlu', shots=0):
    """MMLU's test split, from its folder, subject by subject. Before each question stand `shots` dev questions with their answers."""
    questions = []
    for path in sorted(test.glob('*_test.csv')):
        subject = path.name.removesuffix('_test.csv')
        examples = read_csv(test.parent / 'dev' / f'{subject}_dev.csv')[:shots] if shots else []
        if len(examples) < shots:
            raise UserError(f'{test.parent}/dev has {len(examples)} examples of {subject}: --shots can be no more')
        before = ''.join(f'{mmlu_prompt(row[0], row[1:5])} {row[5]}\n\n' for row in examples)
        questions += [Question(subject, i, before + mmlu_prompt(row[0], row[1:5]), 'ABCD', row[5]) for i, row in enumerate(read_csv(path))]
    return questions

def choices(path, task, shots=0):
    """ARC or CommonsenseQA from a .jsonl file, in either of the two forms in which they are published. Keys 1 to 4 become A to D."""
    questions = []
    with open(path, 'rb') as f:
        for i, line in enumerate(f):
            try:
                row = json.loads(line)
                if isinstance(row['question'], dict):
                    stem, texts, labels = row['question']['stem'], *zip(*((c['text'], c['label']) for c in row['question']['choices']))
                else:
                    stem, texts, labels = row['question'], row['choices']['text'], row['choices']['label']
                key = LETTERS[list(labels).index(row['answerKey'])]
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise UserError(f'{path}, line {i + 1}: cannot be read ({type(error).__name__}: {error}); mend or restore it') from None
            options = '\n'.join(f'{letter}) {text}' for letter, text in zip(LETTERS, texts))
            questions.append(Question(task, i, f'Question: {stem}\nOptions:\n{options}\nAnswer:', LETTERS[:len(texts)], key))
    return questions

def squad(path, task='squad', shots=0):
    """The first 256 SQuAD questions that can be answered, and in at most 8 characters (their first answer)."""
    try:
        articles = json.loads(path.read_text(encoding='utf-8'))['data']
        asked = [(p['context'], q['question'], [a['text'] for a in q['answers']])
                 for article in articles for p in article['paragraphs'] for q in p['qas'] if not q['is_impossible']]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} cannot be read as SQuAD 2.0 ({type(error).__name__}: {error}); restore it') from None
    asked = [item for item in asked if len(item[2][0]) <= SQUAD_LONGEST][:SQUAD_ITEMS]
    return [OpenQuestion('squad', i, f'Context: {context}\nQuestion: {q}\nAnswer:', answers) for i, (context, q, answers) in enumerate(asked)]

# ---------------------------------------------------------------------------------------------------------------------
# Where the questions come from

FILES = dict(arc_easy='arc/ARC-Easy-validation.jsonl', arc_challenge='arc/ARC-Challenge-validation.jsonl', csqa='csqa/dev_rand_split.jsonl',
             squad='squad/dev-v2.0*.json', mmlu='mmlu/test')
MMLU_URL = 'https://people.eecs.berkeley.edu/~hendrycks/data.tar'
MMLU_SHA256 = 'bec563ba4bac1d6aaf04141cd7d1605d7a5ca833e38f994051e818489592989b'
ARC_URL = 'https://ai2-public-datasets.s3.amazonaws.com/arc/ARC-V1-Feb2018.zip'
CSQA_URL = 'https://s3.amazonaws.com/commensenseqa/dev_rand_split.jsonl'
SQUAD_URL = 'https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json'

def fetch(task, root):
    """Downloads a task to root/mmlu, root/arc, root/csqa or root/squad. Archives are unpacked beside their folder, which is whole or absent."""
    folder = root / Path(FILES[task]).parts[0]
    if url := dict(csqa=CSQA_URL, squad=SQUAD_URL).get(task):
        prepare_data.download(url, folder / url.rpartition('/')[2])
        return
    if folder.exists():
        raise UserError(f'{folder} exists but lacks {FILES[task]}: restore or remove it, or name another folder with --data')
    archive = prepare_data.download(MMLU_URL, root / 'mmlu.tar', MMLU_SHA256) if task == 'mmlu' else prepare_data.download(ARC_URL, root / 'arc.zip')
    with tempfile.TemporaryDirectory(dir=root) as beside:
        unpacked = Path(beside) / 'data'              # as it is named in the MMLU archive
        unpacked.mkdir()
        try:
            if task == 'mmlu':
                with tarfile.open(archive) as tar:
                    tar.extractall(beside, filter='data')                      # refuses members that would land elsewhere
            else:
                with zipfile.ZipFile(archive) as file:
                    for kind in ('Easy', 'Challenge'):
                        [member] = (name for name in file.namelist() if name.endswith(f'/ARC-{kind}-Dev.jsonl'))
                        (unpacked / f'ARC-{kind}-validation.jsonl').write_bytes(file.read(member))
        except (tarfile.TarError, zipfile.BadZipFile, ValueError) as error:
            raise UserError(f'{archive} cannot be unpacked ({error}); remove it and run this again') from None
        os.rename(unpacked, folder)
    archive.unlink()

def read_task(task, data=None, shots=0):
    """The questions of a task from the folder `data`, or data/ here, where they are downloaded on first use. Raises UserError."""
    root, (folder, _, name) = Path(data or 'data'), FILES[task].partition('/')
    if data and not root.is_dir():
        raise UserError(f'{data} is no folder: name one that holds {name}, or leave out --data to download')
    if not data and not any(root.glob(FILES[task])):
        root.mkdir(exist_ok=True)
        fetch(task, root)
    found = [*sorted((root / folder).glob(name)), *sorted(root.glob(name))]    # DIR holds the folder, or is it
    read = mmlu if task == 'mmlu' else squad if task == 'squad' else choices
    questions = read(found[0], task, shots) if found else []
    if not questions:
        raise UserError(f'{root} holds no questions of {task}: they should be in {name}')
    return questions

# ---------------------------------------------------------------------------------------------------------------------
# Scoring. `model` is any callable from token ids (int64, B x T) to logits (B, T, V) with causal attention; `encoding` has encode and
# decode. A model with `hidden` and `head` (grow.py's) has its head computed only where it is read

def batches(lengths, batch_tokens):
    """Yields lists of indices into `lengths`, longest first: together at most batch_tokens with padding, and of similar length."""
    batch = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (lengths[batch[0]] * (len(batch) + 1) > batch_tokens or lengths[i] < FILLED * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch

@torch.no_grad()
def read_logits(model, windows, reads=1, device='cpu', amp=contextlib.nullcontext()):
    """The logits after each of the last `reads` tokens of every window, a list of token ids: float32 (B, reads, V). Windows are padded on
    the right: attention is causal, so what stands there changes nothing before it."""
    lengths = torch.tensor([len(window) for window in windows])
    idx = torch.zeros(len(windows), int(lengths.max()), dtype=torch.int64)
    for row, window in zip(idx, windows):
        row[:len(window)] = torch.tensor(window)
    at = torch.arange(len(windows))[:, None], lengths[:, None] + torch.arange(-reads, 0)                    # B, 1 and B, reads
    if not hasattr(model, 'hidden'):
        return model(idx.to(device))[at].float()
    with amp:
        h = model.hidden(idx.to(device))
    return model.head(h[at].float())                  # in float32: bfloat16 has too few digits to tell four options apart

def split_options(encoding, question):
    """-> (tokens that all options share, how many of them the prompt has, one last token for each option). Our tokenizer's " A" is a space
    and a letter, so the space is shared and one pass serves all options; where " A" is one token the prompt alone is shared."""
    prompt, *whole = map(encoding.encode, [question.prompt, *(f'{question.prompt} {letter}' for letter in question.letters)])
    shared = os.path.commonprefix(whole)              # of any sequences, not of paths alone
    if shared[:len(prompt)] != prompt or any(len(tokens) != len(shared) + 1 for tokens in whole):
        raise ValueError('options must differ in one token, and a prompt must be encoded alike with and without an answer')
    return shared, len(prompt), [tokens[-1] for tokens in whole]

def padding(plan, lengths):
    """The share of padding in all tokens that pass the model."""
    return 1 - sum(lengths) / sum(len(batch) * lengths[batch[0]] for batch in plan)

def in_batches(answer, lengths, batch_tokens, name):
    """-> (the rows of all questions, in order, and the share of padding): answer(batch), a list of indices, gives the rows of those. `lengths`:
    tokens of each. Shows progress under `name`."""
    plan, rows = list(batches(lengths, batch_tokens)), [None] * len(lengths)
    for batch in prepare_data.progress(plan, name, lambda batch: sum(lengths[i] for i in batch) / 1e3, 'k tokens', total=sum(lengths) / 1e3):
        for i, row in zip(batch, answer(batch)):
            rows[i] = row
    return rows, padding(plan, lengths)

def score(model, encoding, questions, context, batch_tokens=8192, device='cpu', amp=contextlib.nullcontext(), name='scored'):
    """Scores Questions by likelihood and by letter -> (rows, share of padding). A row is a dict: subject, index, key, choice (the likeliest
    option), letter (text of the likeliest next token), cut (did the prompt exceed `context` tokens? then its left is missing), logps
    (log-probability of " A", " B", ... in nats), and scores, 0 or 1 each."""
    parts = [split_options(encoding, question) for question in questions]
    windows = [shared[-context:] for shared, _, _ in parts]
    reads = 1 + max(len(shared) - prompt for shared, prompt, _ in parts)

    def answer(batch):
        logps = read_logits(model, [windows[i] for i in batch], reads, device, amp).log_softmax(-1)         # B, reads, V
        for i, logp in zip(batch, logps):
            (shared, prompt, last), q = parts[i], questions[i]
            logp = logp[reads - 1 - len(shared) + prompt:]                                                  # from `Answer:` on
            common = sum(logp[k, token].item() for k, token in enumerate(shared[prompt:]))
            options = [common + x for x in logp[-1, last].tolist()]
            choice, letter = q.letters[options.index(max(options))], encoding.decode([logp[0].argmax().item()])
            yield dict(subject=q.subject, index=q.index, key=q.key, choice=choice, letter=letter, cut=len(shared) > context,
                       logps=[round(x, 5) for x in options], scores=dict(likelihood=int(choice == q.key), letter=int(letter.strip() == q.key)))
    return in_batches(answer, [len(window) for window in windows], batch_tokens, name)

# ---------------------------------------------------------------------------------------------------------------------
# SQuAD: hit is the paper's score, exact match and F1 are SQuAD's own

def words(text):
    """SQuAD's normalisation: lower case, no punctuation, no articles; the words that remain."""
    text = ''.join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r'\b(a|an|the)\b', ' ', text).split()

def f1(answer, text):
    """Harmonic mean of precision and recall over the words of two texts; without words on either side, whether both have none."""
    a, b = words(answer), words(text)
    if not a or not b:
        return float(a == b)
    return 2 * (Counter(a) & Counter(b)).total() / (len(a) + len(b))

def score_open(model, encoding, questions, context, batch_tokens=8192, device='cpu', amp=contextlib.nullcontext(), name='answered'):
    """Answers OpenQuestions by 16 greedy tokens, up to </s> -> (rows, share of padding). hit: the first answer is a substring of what was
    generated (paper). Exact match and F1 look at its first line alone, and take the best of all answers that SQuAD gives."""
    prompts = [encoding.encode(question.prompt) for question in questions]

    def answer(batch):
        texts = [list(prompts[i]) for i in batch]
        for _ in range(GENERATED):
            logits = read_logits(model, [ids[-context:] for ids in texts], 1, device, amp)                  # B, 1, V
            for ids, token in zip(texts, logits[:, 0].argmax(-1).tolist()):
                ids.append(token)
        for i, ids in zip(batch, texts):
            q, ids = questions[i], ids[len(prompts[i]):]
            text = encoding.decode(ids[:ids.index(EOS)] if EOS in ids else ids)
            line = text.strip().partition('\n')[0]
            scores = dict(hit=int(q.answers[0] in text), exact_match=int(any(words(x) == words(line) for x in q.answers)),
                          f1=max(f1(x, line) for x in q.answers))
            yield dict(subject=q.subject, index=q.index, answers=q.answers, generation=text, cut=len(prompts[i]) > context, scores=scores)
    return in_batches(answer, [min(len(prompt), context) for prompt in prompts], batch_tokens, name)

# ---------------------------------------------------------------------------------------------------------------------
# Summary

def figures(rows):
    """n, and for each score its sum, mean and the standard error of the mean: for right or wrong that is sqrt(p (1 - p) / n)."""
    result = dict(n=len(rows))
    for name in rows[0]['scores'] if rows else ():
        values = [row['scores'][name] for row in rows]
        mean = sum(values) / len(values)
        result[name] = dict(sum=sum(values), mean=mean, stderr=(max(0, sum(v * v for v in values) / len(values) - mean**2) / len(values)) ** 0.5)
    return result

def summarise(rows):
    """Figures of all rows (the micro average), of those whose prompt was not cut, of each subject and category; macro: the mean over subjects."""
    def grouped(key):
        return {group: figures([row for row in rows if key(row) == group]) for group in dict.fromkeys(map(key, rows))}
    total, subjects = figures(rows), grouped(lambda row: row['subject'])
    names = list(rows[0]['scores'])
    return dict(total=total, macro={name: sum(s[name]['mean'] for s in subjects.values()) / len(subjects) for name in names},
                chance=sum(1 / len(row['logps']) for row in rows) / len(rows) if 'logps' in rows[0] else None,
                cut=sum(row['cut'] for row in rows), uncut=figures([row for row in rows if not row['cut']]),
                categories=grouped(lambda row: CATEGORY.get(row['subject'], 'other')), subjects=subjects)

def percent(x):
    """'25.31 ± 0.37' of figures such as `figures` gives."""
    return f'{100 * x["mean"]:.2f} ± {100 * x["stderr"]:.2f}'

def cells(figures):
    """`figures` as cells of a table: n, and each score in percent with its standard error."""
    return dict(n=figures['n'], **{name: percent(x) for name, x in figures.items() if name != 'n'})

def print_summary(summary, context):
    """The table of one model, scores in percent with their standard errors."""
    lines = [dict(of='all (micro average)', **cells(summary['total']))]
    if len(summary['subjects']) > 1:
        groups = [*summary['subjects'].items(), *summary['categories'].items()]
        lines = [dict(of=name, **cells(x)) for name, x in groups] + lines
        lines.append(dict(of='macro average', n=len(summary['subjects']), **{name: f'{100 * x:.2f}' for name, x in summary['macro'].items()}))
    print()
    grow.table(lines)
    if summary['chance']:
        print(f'chance: {100 * summary["chance"]:.2f}')
    left, n = summary['uncut'], summary['total']['n']
    print(f'{summary["cut"]:,} of {n:,} prompts ({summary["cut"] / n:.1%}) exceed the context of {context} tokens and were cut from the left'
          + (f'; the other {left["n"]:,}: ' + ', '.join(f'{name} {percent(x)}' for name, x in left.items() if name != 'n') if left['n'] else ''))

# ---------------------------------------------------------------------------------------------------------------------
# Main

def evaluate(model, sources, target, questions, a, c, amp):
    """Scores one model, writes `target` and prints what is needed to read the score. -> the summary."""
    context, start = model.config.context, time.monotonic()
    scorer = score_open if a.task == 'squad' else score
    rows, waste = scorer(model, tokenizer(), questions, context, a.batch_tokens, c.device, amp, target.stem)
    seconds = time.monotonic() - start
    summary = dict(summarise(rows), layers=len(model.blocks), context=context, padding=waste, seconds=seconds)
    settings = dict(task=a.task, shots=a.shots, limit=a.limit, batch_tokens=a.batch_tokens, device=c.device, dtype=c.dtype,
                    torch=str(torch.__version__), checkpoints={str(path): sha256_of(path) for path in sources})
    with replacing(target) as path:
        path.write_text(json.dumps(dict(settings=settings, summary=summary, rows=rows)), encoding='utf-8')
    print_summary(summary, context)
    print(f'padding {waste:.1%} of all tokens; {seconds:.0f} s, {len(rows) / seconds:.1f} prompts/s; rows in {target}')
    return summary

def targets(a):
    """What to score: [(checkpoint files, file of their result)], several checkpoints where experts are merged. An OUT is the folder of a run,
    or a checkpoint in it."""
    files = [Path(out) / 'latest.pt' if Path(out).is_dir() else Path(out) for out in a.out]
    if a.all_stages:
        files = sorted(files[0].parent.glob('stage_*.pt'), key=lambda path: int(re.sub(r'\D', '', path.stem) or 0))
        if not files:
            raise UserError(f'{a.out[0]} holds no stage_K.pt: --all_stages takes the folder of a run')
    for path in files:
        if not path.is_file():
            raise UserError(f'{path} does not exist: OUT must be the folder of a run, or a checkpoint in it')
    part = f'_limit_{a.limit}' if a.limit else ''      # so that a look at a few questions replaces no whole result
    if len(a.out) > 1:
        return [(files, files[0].parent / f'eval_{a.task}_merged{part}.json')]
    return [([path], path.parent / f'eval_{a.task}{"" if path.stem == "latest" else "_" + path.stem}{part}.json') for path in files]

@cli
def main(argv=None):
    """The command line: scores each OUT, or the merge of several."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('out', nargs='+', metavar='OUT', help='folder of a run, or a stage_K.pt in it; several are experts, which are merged')
    parser.add_argument('--task', choices=list(FILES), default='mmlu', help='(%(default)s)')
    parser.add_argument('--shots', type=int, default=0, help='solved dev questions before each question of MMLU (%(default)s)')
    parser.add_argument('--data', metavar='DIR', help='folder with the files of the task; default: data/, where they are downloaded on first use')
    parser.add_argument('--all_stages', action='store_true', help='score every stage_K.pt of the run')
    parser.add_argument('--limit', type=int, help='score only so many questions, evenly spread over all')
    parser.add_argument('--batch_tokens', type=int, default=8192, help='tokens that pass the model at once (%(default)s)')
    parser.add_argument('--device', default='auto', choices=['auto', 'cpu', 'cuda', 'mps'])
    parser.add_argument('--dtype', default='auto', choices=['auto', 'float32', 'bfloat16'], help='of matrix products, as in grow.py')
    a = parser.parse_intermixed_args(argv)
    if a.shots < 0 or a.batch_tokens < 1 or a.limit is not None and a.limit < 1:
        parser.error('--shots must be at least 0, --limit and --batch_tokens at least 1')
    if a.shots and a.task != 'mmlu':
        parser.error('--shots is for mmlu, which alone has a dev split')
    if a.all_stages and len(a.out) > 1:
        parser.error('--all_stages takes one OUT')
    c, _ = grow.configure(['--device', a.device, '--dtype', a.dtype, '--no-compile'])
    files, depths = targets(a), []
    questions = read_task(a.task, a.data, a.shots)
    found = len(questions)
    n = min(a.limit or found, found)
    questions = [questions[i * found // n] for i in range(n)]
    print(f'{a.task}, {a.shots}-shot: {n:,} questions, {len({q.subject for q in questions})} subject(s)')
    if a.task == 'mmlu' and found != MMLU_QUESTIONS:
        print(f'note: {found:,} questions were found and MMLU has {MMLU_QUESTIONS:,}: these scores are not comparable')
    amp = grow.set_up(c)
    for paths, target in files:
        print('\n' + ' + '.join(map(str, paths)))
        c.moe = paths
        summary = evaluate(grow.load_model(*paths, c.device) if len(paths) == 1 else grow.merge_experts(c), paths, target, questions, a, c, amp)
        depths.append(dict(checkpoint=paths[0].name, layers=summary['layers'], **cells(summary['total'])))
    if a.all_stages:
        print('\nscore by depth, in percent' + (f'; chance {100 * summary["chance"]:.2f}' if summary['chance'] else ''))
        grow.table(depths)

if __name__ == '__main__':
    main()
