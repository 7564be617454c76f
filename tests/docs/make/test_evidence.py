"""docs/evidence.md: figures from rows, verdicts that the figures bear out, runs as the experiments count them."""

import csv
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
from programs import ROOT, load_program


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """The program on a copy of the results, of the runs from scratch the first alone."""
    module = load_program('docs/make/evidence.py')
    shutil.copytree(ROOT / 'results', tmp_path / 'results')
    path = tmp_path / 'results' / 'attentions_h200.csv'
    path.write_text(''.join(path.read_text().splitlines(keepends=True)[:2]))
    monkeypatch.setattr(module.pages, 'ROOT', tmp_path)
    monkeypatch.setattr(module, 'PLOT', tmp_path / 'evidence.svg')
    return module


def add(folder, *rows):
    """More runs like the one that is stored."""
    path = folder / 'results' / 'attentions_h200.csv'
    with open(path, newline='') as file:
        first, *_ = csv.DictReader(file)
    with open(path, 'a', newline='') as file:
        csv.DictWriter(file, first).writerows(first | row for row in rows)


def cells(table):
    """First cell of each line to the others."""
    lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines() if line[:1] == '|']
    return {line[0]: line[1:] for line in lines[2:]}


def run(attention, seed, top1):
    return dict(run=f'table2-{attention}-s{seed}', attention=attention, seed=seed, top1=top1)


def test_runs_of_table_2(evidence, tmp_path):
    of = cells(evidence.eleven())
    assert list(of)[:3] == ['`softmax`', '`eva`', '`long_short`'] and len(of) == 11
    assert of['`softmax`'][1] == '43.63 %, seeds: 1'
    assert of['`eva`'][1] == '42.83 %, seeds: 1'  # of tiny_imagenet_h200.csv
    assert '9 of the 11 have no figure here' in evidence.eleven()
    add(tmp_path, run('eva', 0, 41), run('eva', 1, 43), run('local', 0, 39), run('lara', 0, 38) | dict(group='long'))
    of = cells(evidence.eleven())
    assert of['`eva`'][1] == '42.00 ± 1.41 %, seeds: 2'  # its own runs take the place of the other experiment's
    assert of['`local`'][1] == '39.00 %, seeds: 1' and of['`lara`'][1] == '–'
    assert '8 of the 11 have no figure here' in evidence.eleven()
    assert '42.00 ± 1.41 % against 43.63 %; seeds: 2 and 1' in evidence.claims()
    assert 'The difference is 1.6 points. Seeds: 1 and 2.' in evidence.verdict()


def test_standard_error(evidence):
    assert evidence.standard_error(dict(top1='50', images='10000')) == pytest.approx(0.5)
    assert '10,000 pictures decide. They alone give a figure a standard error of 0.5 points' in evidence.verdict()
    assert 'one of up to 0.7' in evidence.verdict()


def test_the_figures_bear_out_the_verdicts():
    """What the page and its table say in words."""
    evidence = load_program('docs/make/evidence.py')
    of = cells(evidence.claims())
    figures = {claim: list(map(float, re.findall(r'(?<!± )\b\d+\.\d+', line[0]))) for claim, line in of.items()}
    eva, softmax = figures['From scratch it learns as well as softmax']
    assert abs(softmax - eva) < 1.96 * 0.7 and of['From scratch it learns as well as softmax'][1] == '**open**'
    assert max(figures['A converted ViT keeps its accuracy, untrained']) < 4.5
    trained, parent = figures['Training gives back what a conversion loses']
    assert trained > parent
    assert min(figures['It is faster on large images, in wide networks']) > 1
    forward, training, graphs = figures['It is faster on small images, in narrow networks']
    assert forward < 1 and training < 1 < graphs
    published, converted, nystromformer = figures['It comes nearest to a trained softmax']
    assert nystromformer < converted < published
    errors = evidence.attentions.errors()
    for tokens, nearer in ((784, {'nystromformer'}), (3136, {'nystromformer', 'lara'})):
        of_size = {name: float(errors[name, tokens]['error']) for name in evidence.ATTENTIONS if name != 'softmax'}
        assert {name for name in of_size if of_size[name] < of_size['eva']} == nearer
    assert not {'nystromformer', 'lara'} & {
        name for name, attention in evidence.ATTENTIONS.items() if attention.takes_prefix_tokens
    }


def test_runs_are_counted_as_the_experiments_count_them(evidence):
    driver = None
    for experiment in evidence.EXPERIMENTS:
        path, *flags = shlex.split(experiment.command)
        program = load_program(path)
        if hasattr(program, 'all_jobs'):
            driver = driver or load_program('experiments/driver.py')
            jobs = driver.chosen(program.all_jobs(), SimpleNamespace(only=flags[1:]))
        else:
            jobs = program.SEEDS * program.ATTENTIONS
        assert len(jobs) == experiment.runs, experiment.command
        if experiment.group:
            assert {job.group for job in jobs} == {experiment.group}
        if hasattr(program, 'PAPER') and experiment.group:
            assert {name: program.PAPER[name] for name in evidence.PAPER} == evidence.PAPER == program.PAPER


def test_what_is_missing(evidence, tmp_path):
    of = cells(evidence.missing())
    assert of['Which of the eleven learns best?'][1] == '1 of 25'
    converted = len(evidence.pages.read_results('tiny_imagenet_h200.csv'))
    assert of['More seeds and sizes of converted networks'][1] == f'{converted} of 44'
    assert of['How near is each to a trained softmax?'][1:] == ['53 of 53', '–']
    assert of['Long Range Arena, Image and Pathfinder'][1] == '0 of 36'
    assert of['Weights of our own to transfer from'][1] == '0 of 3'
    assert of['Transfer from weights of our own'][1] == '0 of 100'
    found = re.search(
        r'(\d+) stored runs of 30 epochs at 256 tokens took ([\d.]+) to ([\d.]+) minutes', evidence.missing()
    )
    count, least, most = map(float, found.groups())
    assert count == 5 and of['Which of the eleven learns best?'][2] == evidence.hours(24, [274 / 60, most])
    assert least == pytest.approx(274 / 60, abs=0.05)  # the quickest, one of the parents
    add(tmp_path, *(run('softmax', seed, 43) for seed in range(1, 25)))
    assert cells(evidence.missing())['Which of the eleven learns best?'][1:] == ['25 of 25', '–']


def test_plot_knows_its_data(evidence, tmp_path):
    pytest.importorskip('matplotlib')
    assert not evidence.plot_is_fresh()
    evidence.draw()
    first = evidence.PLOT.read_bytes()
    assert evidence.plot_is_fresh()
    evidence.draw()
    assert evidence.PLOT.read_bytes() == first
    add(tmp_path, run('local', 0, 39))
    assert not evidence.plot_is_fresh()
