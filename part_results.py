# ------------------------------------------------------------------------------------------------------------
# Pictures of results/

@pytest.fixture
def pictures(monkeypatch):
    pytest.importorskip('matplotlib')
    monkeypatch.syspath_prepend(REPO / 'results')
    import pictures
    return pictures


def test_the_pictures_are_drawn(here, pictures, capsys):
    grow.main(flags(out='run', lora='interleaved'))
    for argv in (['idea'], ['loss', 'run', 'run', 'run']):
        pictures.main([*argv, '--out', 'new/a.png'])
        assert Path('new/a.png').read_bytes()[:4] == b'\x89PNG'
    # What `loss` draws is what the run has logged, phase by phase.
    phases, history = pictures.read_run('run'), grow.load('run')['state']['history']
    assert [kind for kind, _, _ in phases] == [row['phase'] for row in history]
    for (_, train, val), row in zip(phases, history):
        assert val == [(row['tokens'], pytest.approx(row['val_loss'], abs=1e-5))]
        assert train[-1][0] == row['tokens'] and 0 < train[-1][1] < 12
    fails(capsys, ['loss', 'nowhere'], 'nowhere/log.csv', main=pictures.main)
    Path('run/log.csv').write_text(','.join(grow.COLUMNS) + '\n')
    fails(capsys, ['loss', 'run'], 'no losses yet', main=pictures.main)
    for words in (['loss'], ['idea', 'run'], ['show'], ['show', 'a', 'b']):
        fails(capsys, words, status=2, main=pictures.main)


def test_tables_are_written_whole(here, pictures, capsys):
    pictures.write_tables('new/a', [dict(arm='x', loss=1.0), dict(arm='y', loss=2.5)], 'a line')
    assert Path('new/a.csv').read_text() == 'arm,loss\nx,1.0\ny,2.5\n'
    text = Path('new/a.txt').read_text()
    assert text == 'arm   loss\n  x  1.000\n  y  2.500\na line\n' and text in capsys.readouterr().out
