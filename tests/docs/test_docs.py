"""The documentation says what the code does: its Python runs, its links lead somewhere, its table is fresh."""

import importlib
import importlib.util
import json
import math
import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import timm
import torch
from programs import load_program

import evavit
from evavit.bench import loader
from evavit.cli import benchmark
from evavit.models import write_weights
from evavit.training.checks import check_settings, global_batch
from evavit.training.compilation import check_compilation
from evavit.training.config import parse_settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')))

FENCE = re.compile(r'^```(\w*)\n(.*?)^```', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'\]\(([^)\s]+)\)')
FILE = re.compile(
    r'`((?:evavit|tools|tests|configs|docs|examples|experiments|results|\.ci)/[\w./-]*|[\w-]+\.(?:py|yaml|md|toml))`'
)
# Packages that blocks may need → the extra that brings them, or None: documented, and run where it is installed.
OPTIONAL = dict(
    onnx='export',
    onnxscript='export',
    onnxruntime='export',
    torchao='export',
    segmentation_models_pytorch='dense',
    skimage='dense',
    **dict.fromkeys(
        ('transformers', 'peft', 'accelerate', 'lightning', 'fastai', 'pytorch_grad_cam', 'captum'), 'integrations'
    ),
    detectron2=None,
)
SLOW = '.to_package('  # a block that compiles takes a minute: `pytest -m slow tests/docs` runs it
# Written by a run, or read from where the reader keeps it. NAME in a name stands for the reader's own.
NOT_OURS = {'args.yaml'}


def read(page):
    return (ROOT / page).read_text(encoding='utf-8')


def blocks(page, language):
    """(first line, code) of the fenced blocks in one language."""
    text = read(page)
    return [
        (text[: match.start()].count('\n') + 1, match.group(2))
        for match in FENCE.finditer(text)
        if match.group(1) == language
    ]


def prose(page):
    return FENCE.sub('', read(page))


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', FENCE.sub('', read(page)), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A file with the names and layouts of the published code, for the blocks that load one."""
    state = timm.create_model('eva_deit_tiny').state_dict()
    renamed = {}
    for name, value in state.items():
        for ours, theirs in (
            ('summary_q.proj.', 'adaptive_mu_q.0.'),
            ('summary_q.norm.', 'adaptive_mu_q.1.'),
            ('summary_k.proj.', 'adaptive_mu_k.0.'),
            ('summary_k.norm.', 'adaptive_mu_k.1.'),
            ('rel_pos.relative', 'local_relative'),
        ):
            name = name.replace(ours, theirs)
        if name.endswith('bias_table'):
            value = torch.randn(97, value.shape[1])
        renamed[name] = value
    path = tmp_path_factory.mktemp('weights') / 'published.pth'
    torch.save({'model': renamed}, path)
    return path


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """output/tiny and output/mine as train.py leaves them: eva_deit_tiny, and a converted ViT."""
    output = tmp_path_factory.mktemp('runs') / 'output'
    vit = timm.create_model('vit_tiny_patch16_224', num_classes=3)
    for name, model, args in (
        ('tiny', timm.create_model('eva_deit_tiny', num_classes=3), dict(model='eva_deit_tiny')),
        ('mine', evavit.convert_vit(vit), dict(model='vit_tiny_patch16_224', convert='eva', num_classes=3)),
    ):
        (output / name).mkdir(parents=True)
        write_weights(model.state_dict(), output / name / 'model_best.safetensors', dict(args=json.dumps(args)))
    return output


@pytest.mark.parametrize(
    'page, line, code',
    [
        pytest.param(page, line, code, id=f'{page}:{line}', marks=[pytest.mark.slow] if SLOW in code else [])
        for page in PAGES
        for line, code in blocks(page, 'python')
    ],
)
def test_python_runs(page, line, code, published, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'published.pth').symlink_to(published)
    (tmp_path / 'output').symlink_to(runs)
    program = compile('\n' * line + code, str(ROOT / page), 'exec')
    try:
        exec(program, {'__name__': 'docs'})
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        extra = OPTIONAL[error.name]
        pytest.skip(f'{error.name} is not installed' + (f': pip install evavit[{extra}]' if extra else ''))


def block_with(page, text):
    (code,) = [code for _, code in blocks(page, 'python') if text in code]
    return code


def test_configuration_of_mmpretrain():
    """What `TIMMBackbone` would make of the documented keywords has the maps that the documented neck expects."""
    names = {}
    exec(block_with('docs/dense.md', 'TIMMBackbone'), names)
    for name in names['custom_imports']['imports']:
        importlib.import_module(name)
    kwargs = {key: value for key, value in names['backbone'].items() if key != 'type'}
    info = timm.create_model(kwargs.pop('model_name'), **kwargs).feature_info
    assert info.channels() == names['neck']['in_channels'] and info.reduction() == [4, 8, 16, 32]


def test_backbone_for_detectron2(monkeypatch):
    """The documented class, where stand-ins take the place of detectron2's: names, channels, strides fit."""
    backbone, fpn = types.ModuleType('backbone'), types.ModuleType('fpn')
    backbone.Backbone, registered = torch.nn.Module, {}
    backbone.ShapeSpec = lambda channels, stride: (channels, stride)
    backbone.BACKBONE_REGISTRY = types.SimpleNamespace(
        register=lambda: lambda function: registered.setdefault(function.__name__, function)
    )
    fpn.FPN, fpn.LastLevelMaxPool = (lambda *args, **kwargs: (args, kwargs)), object
    for name, module in {
        'detectron2': types.ModuleType('detectron2'),
        'detectron2.modeling': backbone,
        'detectron2.modeling.backbone': backbone,
        'detectron2.modeling.backbone.fpn': fpn,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    exec(block_with('docs/dense.md', 'detectron2'), {'__name__': 'docs'})
    cfg = types.SimpleNamespace(MODEL=types.SimpleNamespace(FPN=types.SimpleNamespace(OUT_CHANNELS=256)))
    (pyramid, names, channels), _ = registered['build_eva_fpn'](cfg, None)
    with torch.no_grad():
        maps = pyramid.eval()(torch.randn(1, 3, 64, 96))
    assert channels == 256 and list(maps) == names == list(pyramid.output_shape())
    for name, (width, stride) in pyramid.output_shape().items():
        assert maps[name].shape == (1, width, 64 // stride, 96 // stride)


def test_python_is_found():
    """An empty list of blocks would pass unseen."""
    assert len(blocks('README.md', 'python')) >= 2 and len(blocks('docs/models.md', 'python')) >= 5
    assert block_with('docs/deploy.md', SLOW)


@pytest.mark.parametrize('page', PAGES)
def test_links_and_paths_exist(page):
    missing = []
    for link in LINK.findall(prose(page)):
        if '://' in link:
            continue
        target, _, anchor = link.partition('#')
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists() or (anchor and anchor not in anchors(path.relative_to(ROOT).as_posix())):
            missing.append(link)
    for name in FILE.findall(prose(page)):
        folders = (ROOT, *(ROOT / folder for folder in ('configs', 'docs', 'docs/make', 'evavit', 'tools')))
        if name not in NOT_OURS and 'NAME' not in name and not any((folder / name).exists() for folder in folders):
            missing.append(name)
    assert not missing


def commands(page):
    """Command lines of train.py, validate.py, inference.py and export.py, in bash blocks and indented lines; those of
    `evavit-train` and so on as lines of the scripts."""
    shell = [code for _, code in blocks(page, 'bash')]
    shell.append('\n'.join(line[4:] if line.startswith('    ') else '' for line in prose(page).splitlines()))
    lines = [line for code in shell for line in code.replace('\\\n', ' ').splitlines()]
    lines = [re.sub(r'^\s*evavit-(train|validate|inference|export) ', r'python \1.py ', line) for line in lines]
    start = re.compile(r'\s*(python|torchrun)\b.*\b(train|validate|inference|export)\.py\s')
    return [line.strip() for line in lines if start.match(line)]


@pytest.mark.parametrize(
    'page, line', [pytest.param(page, line, id=f'{page}: {line[:60]}') for page in PAGES for line in commands(page)]
)
def test_commands_parse(page, line, monkeypatch):
    """The flags of every command line exist and take these values, as do the keys of the file that it names."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    script = next(word for word in words if word in ('train.py', 'validate.py', 'inference.py', 'export.py'))
    flags = words[words.index(script) + 1 :]
    if flags == ['--help']:
        return
    if script == 'export.py':
        del flags[0]  # the file to write
    if '-c' in flags and flags[flags.index('-c') + 1].startswith('output/'):  # a run's own settings
        position = flags.index('-c')
        del flags[position : position + 2]
    settings, given = parse_settings(script.removesuffix('.py'), flags)
    assert given
    if script == 'train.py':  # as many images an update as the file says
        if settings.model.model:  # else it is in a run's own settings
            check_settings(settings)
        words = words[: words.index(script)]
        counts = [int(words[words.index(flag) + 1]) for flag in ('--nnodes', '--nproc-per-node') if flag in words]
        global_batch(settings.batch, settings.schedule, math.prod(counts))


@pytest.mark.parametrize('page', PAGES)
def test_commands_within_a_sentence_parse(page, monkeypatch):
    """`evavit-train …`, `train.py --…` and `--torchcompile …` in the running text."""
    monkeypatch.chdir(ROOT)
    for span in re.findall(r'`([^`]+)`', prose(page)):
        words = (
            shlex.split(span.replace('…', ''))
            if re.match(r'(evavit-train|train\.py(?= --)|--torchcompile)\s', span)
            else []
        )
        if words:
            settings, _ = parse_settings('train', words[not words[0].startswith('--') :])
            check_compilation(settings.machine.torchcompile, settings.machine.torchcompile_mode)


def test_benchmark_commands_parse(monkeypatch):
    """Flags and values of every command line that starts benchmark.py."""
    monkeypatch.chdir(ROOT)
    lines = [line for page in PAGES for line in read(page).splitlines() if re.match(r' {4}python benchmark\.py ', line)]
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line)[2:]
        if words[:2] == ['--bench', 'data']:
            loader.parse(words[2:])
        else:
            benchmark.parse(words)


def test_the_readme_is_short():
    assert len(read('README.md').splitlines()) <= 150


def test_a_readme_command_was_found():
    assert len(commands('README.md')) >= 5


@pytest.mark.parametrize('name', ['tables.py', 'scaling.py'])
def test_tables_are_fresh(name, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [name, '--check'])
    assert load_program(f'docs/make/{name}').main() == 0


def test_model_table_agrees_with_the_paper():
    """To the digit that the paper prints."""
    rows = [
        [cell.strip() for cell in row.strip('|').split('|')]
        for row in read('docs/models.md').splitlines()
        if row.startswith('| `eva_') and ' M |' in row
    ]
    assert len(rows) == 4
    for row in rows:
        for ours, paper in ((row[5], row[6]), (row[7], row[8])):
            assert f'{float(ours.split()[0]):.1f}' == paper.split()[0], row[0]


def test_ablation_table_agrees_with_the_paper():
    """Where the paper prints a number, to its digit; and every row of Tables 6 and 8 is there."""
    rows = [
        [cell.strip() for cell in row.strip('|').split('|')]
        for row in read('docs/ablations.md').splitlines()
        if ' M |' in row
    ]
    assert sum('6' in row[0] for row in rows) == 7 and sum('8' in row[0] for row in rows) == 8
    printed = [(row[i], row[i + 1]) for row in rows for i in (3, 5) if row[i + 1] != '–']
    assert len(printed) == 4
    for ours, paper in printed:
        assert f'{float(ours.split()[0]):.1f}' == paper.split()[0]
