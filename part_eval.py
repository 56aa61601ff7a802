# ------------------------------------------------------------------------------------------------------------
# Evaluation

class Knowing:
    """A model that goes on with logits(text so far), {character: logit}, 0 for all others."""
    def __init__(self, logits, context=512):
        self.logits, self.config, self.seen = logits, type('Config', (), dict(context=context)), []
        self.head, self.parameters = lambda h: h, lambda: iter([torch.zeros(1)])

    def hidden(self, idx):
        self.seen.append(idx[0].tolist())
        text = substrate.tokenizer().decode(self.seen[-1])
        h = torch.zeros(*idx.shape, substrate.VOCAB)
        for t in (-2, -1):
            for character, logit in self.logits(text[:len(text) + t + 1]).items():
                h[0, t, ord(character)] = logit
        return h

def always(*characters):
    return Knowing(lambda text: {character: 10.0 - k for k, character in enumerate(characters)})

def question(key='C', letters='ABCD', prompt='Question: q?\nOptions: A) 1 B) 2 C) 3 D) 4\nAnswer:'):
    return eval_mmlu.Question('anatomy', 0, prompt, letters, key)

def scored(model, questions):
    return [dict(subject=q.subject, **eval_mmlu.score_choice(model, q)) for q in questions]

SUBJECTS = dict(anatomy='ABCC', virology='CDA', philosophy='BCCCD')
EVERY = [(subject, i) for subject in sorted(SUBJECTS) for i in range(len(SUBJECTS[subject]))]
ROW = dict(question=dict(stem='how?', choices=[dict(text=x, label=x.upper()) for x in 'abcd']), answerKey='D')

@pytest.fixture
def mmlu(tmp_path):
    """A small MMLU: three subjects, the keys of which are in SUBJECTS; and what macOS leaves in archives."""
    folder = tmp_path / 'questions'
    for split in ('test', 'dev', 'auxiliary_train'):
        (folder / split).mkdir(parents=True)
        for subject, keys in SUBJECTS.items():
            rows = ['\ufeff'] + [f'"{subject} {split} {i}, or\n""none""?",one,None,"a, b",{i},{key}\n'
                                 for i, key in enumerate(keys)]
            (folder / split / f'{subject}_{split}.csv').write_text(''.join(rows), encoding='utf-8')
    (folder / 'test' / '._anatomy_test.csv').write_bytes(b'\0\5')
    shutil.copy(folder / 'test' / 'anatomy_test.csv', folder / 'auxiliary_train' / 'mc_test.csv')
    return folder

@pytest.fixture
def run(here):
    """The folder of a run with two stages, as training leaves it but for the log."""
    c = config(layers=2, context=64)
    for name, blocks in (('stage_1', 1), ('stage_2', 2), ('latest', 2)):
        model = model_of(c, blocks)
        grow.save(here / 'run' / f'{name}.pt', config=dataclasses.asdict(c), depth=blocks, at={},
                  interface=model.interface.fingerprint, tokenizer=substrate.tokenizer_fingerprint(),
                  model=model.state_dict(), machine=grow.machine(c))
    return here / 'run'

def write_squad(path, answers):
    asked = [dict(question=f'{i}?', answers=a and [dict(text=t) for t in a]) for i, a in enumerate(answers)]
    path.write_text(json.dumps(dict(data=[dict(paragraphs=[dict(context='c', qas=asked)])])))

def evaluate(target, *argv):
    """-> what the command line writes to run/target."""
    eval_mmlu.main([*map(str, argv), '--device', 'cpu', '--dtype', 'float32'])
    return json.loads(Path('run', target).read_text(encoding='utf-8'))

def test_prompts_are_the_papers(mmlu):
    first, *others = eval_mmlu.read_task('mmlu', mmlu)
    # None stays a string, and a byte-order mark is no part of a question
    prompt = 'Question: anatomy test 0, or\n"none"?\nOptions: A) one B) None C) a, b D) 0\nAnswer:'
    assert first == ('anatomy', 0, prompt, 'ABCD', 'A')
    assert [(q.subject, q.index) for q in [first, *others]] == EVERY
    two = eval_mmlu.read_task('mmlu', mmlu, shots=2)[-1].prompt.split('\n\n')
    assert [part.partition('\nAnswer:')[2] for part in two] == [' C', ' D', '']
    assert [part[10:25] for part in two] == ['virology dev 0,', 'virology dev 1,', 'virology test 2']

def test_the_other_tasks_are_read(tmp_path):
    row = dict(question='why?', choices=dict(text=['x', 'y', 'z'], label=['1', '2', '3']), answerKey='2')
    text = '\ufeff' + json.dumps(row) + '\n' + json.dumps(ROW) + '\n\n \n'
    (tmp_path / 'ARC-Easy-validation.jsonl').write_text(text, encoding='utf-8')
    (tmp_path / 'ARC-Easy-test.jsonl').write_text('never read')
    first, second = eval_mmlu.read_task('arc_easy', tmp_path)
    assert first[2:] == ('Question: why?\nOptions:\nA) x\nB) y\nC) z\nAnswer:', 'ABC', 'B')
    assert second.prompt.endswith('\nD) d\nAnswer:') and second[1:2] + second[3:] == (1, 'ABCD', 'D')
    chance = eval_mmlu.summarise(scored(always('B'), [first, second]))['total']['chance']
    assert chance['mean'] == pytest.approx((1 / 3 + 1 / 4) / 2)
    answers = [['Bo', 'Bo B'], [], ['far away and more'], None, [None], ['12345678'], ['123456789']]
    write_squad(tmp_path / 'dev-v2.0-half.json', answers + [['x']] * 300)
    first, second, *others = eval_mmlu.read_task('squad', tmp_path)
    assert first == ('squad', 0, 'Context: c\nQuestion: 0?\nAnswer:', '', ['Bo', 'Bo B'])
    assert second[1:3] == (1, 'Context: c\nQuestion: 5?\nAnswer:') and len(others) == 254

def test_archives_are_fetched_once_and_read_where_they_lie(server, mmlu, tmp_path, monkeypatch):
    url, handler = server
    monkeypatch.chdir(tmp_path)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w') as tar:
        tar.add(mmlu, 'data')
    handler.files['/data.tar'] = packed.getvalue()
    for task, (*others, address) in eval_mmlu.TASKS.items():
        monkeypatch.setitem(eval_mmlu.TASKS, task, (*others, f'{url}/{Path(address).name}'))
    refuses('sha256', eval_mmlu.read_task, 'mmlu')  # not the file that is meant
    (tmp_path / 'packed').write_bytes(packed.getvalue())
    monkeypatch.setattr(eval_mmlu, 'MMLU_SHA256', substrate.sha256_of('packed'))
    for shots in (0, 3):
        assert eval_mmlu.read_task('mmlu', None, shots) == eval_mmlu.read_task('mmlu', mmlu, shots)
    assert len(handler.asked) == 2 and [p.name for p in Path('data').iterdir()] == ['mmlu.tar']
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as file:
        for kind in ('Easy', 'Challenge'):
            row = ROW | dict(question=ROW['question'] | dict(stem=kind))
            file.writestr(f'ARC-V1/ARC-{kind}/ARC-{kind}-Test.jsonl', 'never read')
            file.writestr(f'ARC-V1/ARC-{kind}/ARC-{kind}-Dev.jsonl', json.dumps(row))
    handler.files['/ARC-V1-Feb2018.zip'] = packed.getvalue()
    handler.files['/dev_rand_split.jsonl'] = json.dumps(ROW).encode()
    for task, stem in (('arc_easy', 'Easy'), ('arc_challenge', 'Challenge'), ('csqa', 'how?')):
        [q] = eval_mmlu.read_task(task)
        assert q.prompt.startswith(f'Question: {stem}\n') and (q.subject, q.key) == (task, 'D')

@pytest.mark.parametrize('kind', ['tar', 'zip'])
def test_damaged_archives_are_named(kind, mmlu, tmp_path):
    path = Path(shutil.make_archive(tmp_path / 'mmlu', kind, mmlu))
    whole, questions = path.read_bytes(), eval_mmlu.read_task('mmlu', mmlu)
    assert eval_mmlu.read_task('mmlu', path) == questions
    for length in (0, 100, len(whole) // 2):
        path.write_bytes(whole[:length])
        refuses(f'mmlu.{kind} cannot be read', eval_mmlu.read_task, 'mmlu', path)

def test_likelihood_and_letter_by_hand():
    model = Knowing(lambda text: {' ': 3.0} if text.endswith(':') else {'B': 2.0, 'C': 1.0})
    [row] = scored(model, [question('B')])
    space, letter = 3 - math.log(math.e**3 + 65_535), math.log(math.e**2 + math.e + 65_534)
    assert row['logps'] == pytest.approx([space + x - letter for x in (0, 2, 1, 0)], abs=1e-4)
    assert (row['key'], row['choice'], row['letter']) == ('B', 'B', ' ')
    assert row['scores'] == dict(likelihood=1, letter=0, chance=0.25, cut=0)
    [row] = scored(always('C'), [question('C')])
    assert row['letter'] == 'C' and row['scores'] == dict(likelihood=1, letter=1, chance=0.25, cut=0)
    # E is no option
    [row] = scored(always('E', 'C'), [question('C')])
    assert (row['choice'], row['letter']) == ('C', 'E')

def test_long_prompts_are_cut_from_the_left():
    whole = substrate.tokenizer().encode_ordinary('0123456789 Answer: ')
    for context, cut in ((len(whole), 0), (len(whole) - 1, 1)):
        model = Knowing(lambda text: {'C': 1.0}, context)
        assert scored(model, [question(prompt='0123456789 Answer:')])[0]['scores']['cut'] == cut
        assert model.seen == [whole[-context:]]
    whole, model = whole[:-1], Knowing(lambda text: {'y': 1.0}, len(whole) - 3)
    row = eval_mmlu.score_open(model, question(['y'], '', '0123456789 Answer:'))
    assert model.seen[:2] == [whole[2:], [*whole, ord('y')][3:]]
    assert row['generation'] == 'y' * 16 and row['scores']['cut'] == 1
    model.config.context = len(whole)
    assert eval_mmlu.score_open(model, question(['y'], '', '0123456789 Answer:'))['scores']['cut'] == 0

def test_exact_match_and_f1_by_hand():
    assert eval_mmlu.words('The  Duke, of a York!') == ['duke', 'of', 'york']
    # precision 3 / 5, recall 3 / 3
    assert eval_mmlu.f1('the Duke of York', 'Duke of Kent and York') == pytest.approx(1.2 / 1.6)
    assert eval_mmlu.f1('the', 'a') == 1 and eval_mmlu.f1('the', 'Rome') == eval_mmlu.f1('Rome', 'the') == 0
    # an answer, and the next line
    said = ' Bo B.\nRome~~~~~~~~~'
    model = Knowing(lambda text: {said[len(text.rpartition('Answer:')[2])]: 1.0})
    rows = [dict(subject='squad', **eval_mmlu.score_open(model, question(answers, '', 'Answer:')))
            for answers in (['Bo', 'bo b'], ['Rome'], ['B. Bo Ng'], ['Oslo'])]
    assert rows[0]['generation'] == said[:16] and rows[0]['answers'] == ['Bo', 'bo b']
    assert [[row['scores'][name] for name in ('hit', 'exact_match', 'f1')] for row in rows] == [
        [1, 1, 1], [1, 0, 0], [0, 0, pytest.approx(0.8)], [0, 0, 0]]
    f1 = eval_mmlu.summarise(rows)['total']['f1']
    assert f1['mean'] == pytest.approx(0.45) and f1['stderr'] == pytest.approx(np.std([1, 0, 0.8, 0]) / 2)
    ends = Knowing(lambda text: {chr(substrate.EOS) if text.endswith('oo') else 'o': 1.0})
    assert eval_mmlu.score_open(ends, question(['o'], '', 'Answer:'))['generation'] == 'oo'

def test_a_model_that_prefers_c_scores_the_share_of_c(mmlu):
    keys, rows = ''.join(SUBJECTS.values()), scored(always('C'), eval_mmlu.read_task('mmlu', mmlu))
    for row, cut in zip(rows, [1, 1] + [0] * 10):
        row['scores']['cut'] = cut
    summary, p = eval_mmlu.summarise(rows), keys.count('C') / len(keys)
    total, groups = summary['total'], summary['groups']
    for name in ('likelihood', 'letter'):  # C is also the likeliest token of all
        assert total[name] == pytest.approx(dict(mean=p, stderr=math.sqrt(p * (1 - p) / len(keys))))
        assert summary['macro'][name] == pytest.approx((2 / 4 + 1 / 3 + 3 / 5) / 3)
        means = [groups[x][name]['mean'] for x in ('anatomy', 'other', 'whole prompts', 'cut prompts')]
        assert means == pytest.approx([2 / 4, 3 / 7, 6 / 10, 0 / 2])
    assert {name: figures['n'] for name, figures in groups.items()} == {
        'anatomy': 4, 'virology': 3, 'philosophy': 5, 'other': 7, 'humanities': 5,
        'whole prompts': 10, 'cut prompts': 2}
    assert total['cut']['mean'] == pytest.approx(2 / 12) and total['chance'] == dict(mean=0.25, stderr=0)
    assert eval_mmlu.cells(total)['likelihood'] == '50.00 ± 14.43'

def test_categories_are_those_of_the_authors_of_mmlu():
    authors = {
        'STEM': '''astronomy college_physics college_chemistry college_biology computer_security
            abstract_algebra machine_learning college_mathematics statistics electrical_engineering''',
        'humanities': '''prehistory formal_logic moral_disputes philosophy world_religions international_law
            jurisprudence''',
        'social sciences': '''high_school_government_and_politics public_relations security_studies sociology
            us_foreign_policy human_sexuality econometrics high_school_geography professional_psychology''',
        'other': 'business_ethics clinical_knowledge college_medicine human_aging management virology'}
    for category, subjects in authors.items():
        rows = [dict(subject=name, scores=dict(cut=0)) for name in subjects.split()]
        groups = eval_mmlu.summarise(rows)['groups']
        assert groups.keys() - subjects.split() == {category, 'whole prompts'}

def test_eval_writes_a_row_for_every_question(run, mmlu, capsys, monkeypatch):
    saved, out = evaluate('eval_mmlu.json', 'run', '--data', mmlu), capsys.readouterr().out
    assert [(row['subject'], row['index']) for row in saved['rows']] == EVERY
    assert list(saved['settings']['checkpoints'].values()) == [substrate.sha256_of(run / 'latest.pt')]
    assert [saved['summary'][name] for name in ('layers', 'context')] == [2, 64]
    for words in ('12 questions, 3 subject(s)', '12 were found', '25.00 ± 0.00', 'macro', 'eval_mmlu.json'):
        assert words in out, words
    monkeypatch.setattr(eval_mmlu, 'MMLU_QUESTIONS', 12)  # the whole of MMLU has no note
    rows = evaluate('eval_mmlu_limit_6.json', 'run', '--data', mmlu, '--limit', 6, '--shots', 2)['rows']
    assert 'note:' not in capsys.readouterr().out
    assert [(row['subject'], row['index']) for row in rows] == EVERY[::2]
    assert all(row['scores']['cut'] for row in rows)
    write_squad(mmlu / 'dev-v2.0.json', [['x']])
    assert 'f1' in evaluate('eval_squad.json', 'run', '--task', 'squad', '--data', mmlu)['summary']['total']
    model, questions = grow.load_model(run), eval_mmlu.read_task('mmlu', mmlu)
    for row, q in zip(saved['rows'], questions):  # against all logits at once
        idx = substrate.tokenizer().encode_ordinary(q.prompt + ' ')[-64:]
        [logp] = model(torch.tensor([idx])).log_softmax(-1)
        expected = [(logp[-2, ord(' ')] + logp[-1, ord(letter)]).item() for letter in 'ABCD']
        assert row['logps'] == pytest.approx(expected, abs=2e-5)

def test_every_stage_is_scored_by_depth(run, mmlu, capsys):
    shutil.copy(run / 'stage_1.pt', run / 'stage_10.pt')
    evaluate('eval_mmlu_stage_10.json', 'run', '--data', mmlu, '--all_stages')
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert lines == [[f'run/eval_mmlu_stage_{k}.json', n] for k, n in ((1, '1'), (2, '2'), (10, '1'))]
    assert not (run / 'eval_mmlu.json').exists()
    fails(capsys, [str(mmlu), '--all_stages'], 'stage_1.pt does not exist', main=eval_mmlu.main)

def test_experts_are_merged_and_scored(run, mmlu, capsys):
    for name in ('other', 'third'):
        shutil.copytree(run, run.parent / name)
        target = eval_mmlu.targets(['run', name], 'mmlu')[0][1].name
        merged = evaluate(target, 'run', name, '--data', mmlu)
    # other experts, another file
    assert len(list(run.glob('eval_mmlu_merged_*.json'))) == 2
    alone = evaluate('eval_mmlu.json', 'run', '--data', mmlu)
    for row, other in zip(merged['rows'], alone['rows']):
        # the mean of a model and itself is the model
        assert row['logps'] == pytest.approx(other['logps'], abs=1e-4)
    fails(capsys, [str(run), str(run / 'latest.pt')], 'named twice', main=eval_mmlu.main)

@pytest.mark.parametrize('argv, words, status', [
    (['--data', 'nowhere'], 'nowhere has no questions of mmlu: --data', 1),
    (['--task', 'arc_easy'], 'ARC-Easy-', 1), (['no_run'], 'no_run does not exist', 1),
    (['--shots', '5'], 'anatomy_dev.csv has 4 examples', 1), (['--shots', '-1'], '--shots', 2),
    (['--shots', '1', '--task', 'csqa'], '0 examples', 1), (['--limit', '0'], '--limit', 2),
    (['--task', 'csqa'], 'dev_rand_split.jsonl, line 2 cannot be read', 1),
    (['--task', 'squad'], 'dev-v2.0.json cannot be read', 1), (['x', '--all_stages'], '--all_stages', 2)])
def test_mistakes_are_named(argv, words, status, run, mmlu, capsys):
    (mmlu / 'dev_rand_split.jsonl').write_text(json.dumps(ROW) + '\n{"question": 3}\n')
    (mmlu / 'dev-v2.0.json').write_text('{"data": [{}]}')
    fails(capsys, [str(run), '--data', str(mmlu), *argv], words, status=status, main=eval_mmlu.main)
    assert not Path('nowhere').exists()

def test_bad_lines_of_csv_are_named(mmlu):
    path = mmlu / 'test' / 'anatomy_test.csv'
    whole = path.read_bytes()[3:]  # less the byte-order mark
    for length in range(1, len(whole)):  # cut anywhere but after a row: named
        if whole[:length].rstrip(b'\n') not in (b'\n'.join(whole.splitlines()[:2 * k]) for k in range(1, 5)):
            refuses('anatomy_test.csv, line', list, eval_mmlu.mmlu(path, whole[:length]))
    for damage in (b'q,1,2,3,D', b'q,1,2,3,4,5,D', b'q,1,2,3,4,E', b'q,1,2,3,4,AB', b'q,1,2,3,4,',
                   b'q\xff,1,2,3,4,D', b'"q"x,1,2,3,4,D', b'"q,1,2,3,4,D'):
        path.write_bytes(b'"fine,\nindeed",1,2,3,4,A\n' + damage + b'\n')
        refuses('anatomy_test.csv, line 3', eval_mmlu.read_task, 'mmlu', mmlu)
