"""docs/evidence.md: figures from rows, verdicts that the figures bear out, runs as the experiments count them."""

import csv
import itertools
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
from programs import ROOT, load_program


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """The program on a copy of the results, of the runs from scratch the first four alone."""
    module = load_program('docs/make/evidence.py')
    shutil.copytree(ROOT / 'results', tmp_path / 'results')
    path = tmp_path / 'results' / 'attentions_h200.csv'
    first, *lines = path.read_text().splitlines(keepends=True)
    scratch = [line for line in lines if line.startswith('table2')]
    path.write_text(''.join([first, *scratch[:4], *(line for line in lines if line not in scratch)]))
    monkeypatch.setattr(module.pages, 'ROOT', tmp_path)
    monkeypatch.setattr(module, 'PLOT', tmp_path / 'evidence.svg')
    return module


def add(folder, *rows):
    """More runs like the first that is stored."""
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
    assert of['`softmax`'][1] == '31.82 %, seeds: 1'
    assert of['`eva`'][1] == '32.20 %, seeds: 1'  # that with 30 epochs is not among them
    assert of['`lara`'][1] == '–'
    add(tmp_path, run('eva', 1, 35.03), run('reformer', 0, 39), run('lara', 0, 38) | dict(group='long'))
    of = cells(evidence.eleven())
    assert of['`eva`'][1] == '33.62 ± 2.00 %, seeds: 2'
    assert of['`reformer`'][1] == '39.00 %, seeds: 1' and of['`lara`'][1] == '–'
    assert '15 epochs: 33.62 ± 2.00 % against 31.82 %, seeds: 2 and 1; 30 epochs: 42.83 % against' in evidence.claims()
    assert 'EVA 33.62 ± 2.00 % (seeds: 2): EVA is 1.8 points ahead.' in evidence.verdict()


def test_order_of_the_attentions(evidence, tmp_path):
    """Groups end where the next is out of reach of chance; pairs are counted as the experiment counts them."""
    assert evidence.groups() == [['eva', 'softmax'], ['performer', 'local']]
    assert '4 of 6 pairs are in the paper' in evidence.order() and 'Of the other 2, 2 are within' in evidence.order()
    add(tmp_path, run('lara', 0, 28), run('long_short', 0, 30.6))
    assert evidence.groups() == [['eva', 'softmax', 'long_short'], ['lara'], ['performer', 'local']]
    assert '* `lara`: 28.00 %.' in evidence.order()
    assert 'first and the last are 1.6 points apart,\n  2.4 standard errors of 0.66 points' in evidence.order()
    found = evidence.from_scratch()
    experiment = load_program('experiments/tiny_imagenet/attentions.py')
    tau = experiment.kendall(
        [float(found[name][0]['top1']) for name in found], [evidence.PAPER[name] for name in found]
    )
    assert f'τ is {tau:.2f}' in evidence.order()


def test_standard_error(evidence):
    assert evidence.pages.standard_error(dict(top1='50', images='10000')) == pytest.approx(0.5)
    assert '10,000 pictures decide. They alone give a figure a standard error of 0.5 points' in evidence.verdict()
    assert 'one of up to 0.7' in evidence.verdict()


def test_the_figures_bear_out_the_verdicts():
    """What the page and its table say in words."""
    evidence = load_program('docs/make/evidence.py')
    of = cells(evidence.claims())
    figures = {claim: list(map(float, re.findall(r'(?<!± )\b\d+\.\d+', line[0]))) for claim, line in of.items()}
    eva, softmax, eva_30, softmax_30 = figures['From scratch it learns as well as softmax']
    assert 0 < eva - softmax < 1.96 * 0.7 and 0 < softmax_30 - eva_30 < 1.96 * 0.7
    *_, best, eva = figures['It is the best of the ten that are not softmax']
    assert 5 < best - eva < 5.5  # five points
    eva, *others = figures['From scratch it learns better than local attention and Performer']
    assert all(6.5 < eva - other < 7.6 for other in others) and len(others) == 2  # seven points
    assert all(of_30 - of_15 > 10 for of_15, of_30 in ((eva, eva_30), (softmax, softmax_30)))
    found, parted = evidence.from_scratch(), evidence.groups()
    first, second, third, last = parted
    assert first == ['nystromformer'] and third == ['scatterbrain'] and second[0] == 'linformer'
    assert set(second[1:]) == {'softmax', 'eva', 'combiner', 'long_short', 'lara'}
    assert set(last) == {'local', 'performer', 'reformer'}
    apart, error = (
        [of(found[one], found[other]) for one, other in (('linformer', 'eva'), ('combiner', 'lara'))]
        for of in (evidence.apart, evidence.error_apart)
    )
    assert 1.45 < apart[0] < 1.55 and apart[0] > 1.96 * error[0] and apart[1] < 1.96 * error[1]
    assert all(evidence.apart(found['eva'], found[name]) > 4 for name in (*third, *last))
    for group in parted:
        for one, next_one in itertools.pairwise(found[name] for name in group):
            assert evidence.apart(one, next_one) < 1.96 * evidence.error_apart(one, next_one)
    assert max(figures['A converted ViT keeps its accuracy, untrained']) < 4.5
    trained, parent, second, *others, itself = figures['Training gives back what a conversion loses']
    assert trained > parent and min(others) > second + 1.9
    assert all(abs(other - itself) < 0.7 for other in others) and 1.9 < itself - second < 2.1
    assert min(figures['It is faster on large images, in wide networks']) > 1
    forward, training, timm, ours = figures['It is faster on small images, in narrow networks']
    assert max(forward, ours) < 1 < timm and training < 1.01
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
    assert of['Which of the eleven learns best?'][1] == '4 of 25'
    names = ('tiny_imagenet_h200.csv', 'tiny_imagenet_sizes_h200.csv')
    converted = {row['run'] for name in names for row in evidence.pages.read_results(name)}
    assert of['More seeds and sizes of converted networks'][1] == f'{len(converted)} of 46'
    assert of['How near is each to a trained softmax?'][1:] == ['53 of 53', '–']
    assert of['Long Range Arena, Image and Pathfinder'][1] == '0 of 36'
    assert of['Weights of our own to transfer from'][1] == '0 of 3'
    assert of['Transfer from weights of our own'][1] == '0 of 100'
    text = re.search(r'(\d+) runs of 15 epochs of commit \w+ took ([\d.]+) to ([\d.]+) minutes', evidence.missing())
    assert text.groups() == ('4', '5.2', '7.5')  # seconds: 309.9 and 452.8
    assert of['Which of the eleven learns best?'][2] == '0.6 to 0.9 h'  # 21 runs, three at once
    assert of['And at 1,024 tokens?'][2] == evidence.hours(8 * 4, [309.9 / 60, 452.8 / 60])
    add(tmp_path, *(run('softmax', seed, 32) for seed in range(4, 25)))
    assert cells(evidence.missing())['Which of the eleven learns best?'][1:] == ['25 of 25', '–']


def test_factors_are_those_of_the_budgets(evidence):
    """Time grows with the epochs and tokens; a third of the updates take half of the time."""
    budgets = load_program('experiments/tiny_imagenet/attentions.py').BUDGETS
    factors = {
        experiment.group: experiment.factor for experiment in evidence.EXPERIMENTS if experiment.group in budgets
    }
    assert factors == dict(table2=1, long=4 * budgets['long'][0] / budgets['table2'][0], cells=0.5, table8=0.5)
    assert {row['epochs'] for rows in evidence.from_scratch().values() for row in rows} == {str(budgets['table2'][0])}


def test_plot_knows_its_data(evidence, tmp_path):
    pytest.importorskip('matplotlib')
    assert not evidence.plot_is_fresh()
    evidence.draw()
    first = evidence.PLOT.read_bytes()
    assert evidence.plot_is_fresh()
    evidence.draw()
    assert evidence.PLOT.read_bytes() == first
    add(tmp_path, run('lara', 0, 39))
    assert not evidence.plot_is_fresh()
