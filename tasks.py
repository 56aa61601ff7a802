"""The questions that eval_mmlu.py asks: MMLU, ARC, CommonsenseQA and SQuAD, from the files in which they are published, with the paper's prompts.

A prompt ends with `Answer:`, and its context is all a model gets. `read_task` is what the others call: it downloads a task on first use.
Tasks and prompts are the paper's (section 4), and so is the choice of the 256 first questions of SQuAD with a short answer.
"""

import csv
import json
import os
import tarfile
import tempfile
import zipfile
from collections import namedtuple
from pathlib import Path

from common import UserError, download

LETTERS = 'ABCDE'
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
        download(url, folder / url.rpartition('/')[2])
        return
    if folder.exists():
        raise UserError(f'{folder} exists but lacks {FILES[task]}: restore or remove it, or name another folder with --data')
    archive = download(MMLU_URL, root / 'mmlu.tar', MMLU_SHA256) if task == 'mmlu' else download(ARC_URL, root / 'arc.zip')
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
