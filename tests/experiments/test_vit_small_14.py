"""experiments/vit_small_14 from end to end with a network of two blocks: an ONNX file, its weights, runs, a stop."""

import csv
import os
import re
import zipfile

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from programs import load_program
from runs import signal_at, words, write_images
from torch import nn

from evavit.errors import run_script

SMALL = dict(depth=2, embed_dim=16, num_heads=2)
FLAGS = words('--device cpu --no-amp -b 4 --global-batch-size 4 --workers 0 --model-kwargs depth=2 embed_dim=16')
FLAGS += words('num_heads=2 --lr 1e-4 --updates 12 --pictures 3')


class Foreign(nn.Module):
    """A DINOv2 with the Hugging Face Hub's names; the exporter makes constants of its positions, as in the file."""

    def __init__(self, width=16, heads=2, depth=2, grid=37):
        super().__init__()

        def linear(inputs, outputs):
            return nn.Linear(inputs, outputs)

        def tree(**modules):
            return nn.ModuleDict(modules)

        self.heads, self.grid = heads, grid
        self.backbone = tree(embeddings=nn.Module(), encoder=tree(), layernorm=nn.LayerNorm(width, eps=1e-6))
        embeddings = self.backbone['embeddings']
        embeddings.cls_token = nn.Parameter(torch.empty(1, 1, width))
        embeddings.patch_embeddings = tree(projection=nn.Conv2d(3, width, 14, 14))
        embeddings.position_embeddings = nn.Parameter(torch.empty(1, 1 + grid**2, width))
        layers = []
        for _ in range(depth):
            layer = tree(
                norm1=nn.LayerNorm(width, eps=1e-6),
                attention=tree(
                    attention=tree(**{name: linear(width, width) for name in ('query', 'key', 'value')}),
                    output=tree(dense=linear(width, width)),
                ),
                norm2=nn.LayerNorm(width, eps=1e-6),
                mlp=tree(fc1=linear(width, 4 * width), fc2=linear(4 * width, width)),
            )
            for name in ('layer_scale1', 'layer_scale2'):
                layer[name] = nn.Module()
                layer[name].lambda1 = nn.Parameter(torch.empty(width))
            layers.append(layer)
        self.backbone['encoder']['layer'] = nn.ModuleList(layers)
        for parameter in self.parameters():  # of two equal ones the exporter keeps one
            nn.init.normal_(parameter)

    def forward(self, x):
        embeddings = self.backbone['embeddings']
        x = embeddings.patch_embeddings['projection'](x)
        side = x.shape[2:]
        x = torch.cat([embeddings.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        first, rest = embeddings.position_embeddings[:, :1], embeddings.position_embeddings[:, 1:]
        grid = rest.reshape(1, self.grid, self.grid, x.shape[-1]).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=side, mode='bicubic').permute(0, 2, 3, 1)
        x = x + torch.cat([first, grid.reshape(1, -1, x.shape[-1])], 1)
        for layer in self.backbone['encoder']['layer']:
            inner, y = layer['attention']['attention'], layer['norm1'](x)
            q, k, v = (
                inner[name](y).unflatten(2, (self.heads, -1)).transpose(1, 2) for name in ('query', 'key', 'value')
            )
            y = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1) @ v
            y = layer['attention']['output']['dense'](y.transpose(1, 2).flatten(2))
            x = x + layer['layer_scale1'].lambda1 * y
            y = layer['mlp']['fc2'](F.gelu(layer['mlp']['fc1'](layer['norm2'](x))))
            x = x + layer['layer_scale2'].lambda1 * y
        return self.backbone['layernorm'](x).mean(1)  # the features are not what the graph gives


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    pytest.importorskip('onnxruntime')
    folder = tmp_path_factory.mktemp('wheel')
    torch.manual_seed(0)
    torch.onnx.export(
        Foreign().eval(), (torch.randn(1, 3, 224, 224),), str(folder / 'a.onnx'), dynamo=False, opset_version=14,
        input_names=['image'], dynamic_axes=dict(image=[0, 2, 3]),
    )  # fmt: skip
    with zipfile.ZipFile(folder / 'a.whl', 'w') as file:
        file.write(folder / 'a.onnx', 'a/models/a.onnx')
    return folder / 'a.whl'


@pytest.fixture
def build(monkeypatch):
    program = load_program('experiments/vit_small_14/build.py')
    monkeypatch.setattr(program, 'MODEL', {**program.MODEL, **SMALL})
    return program


def call(program, *flags):
    return run_script(program.main, list(map(str, flags)))


def test_weights_of_an_onnx_file(build, wheel, tmp_path, capsys):
    assert call(build, tmp_path / 'w.safetensors', '--onnx', wheel, '--files', 3) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    assert '518 px' in out and '224 px, positions resampled by timm' in out
    files = [tmp_path / f'w-{number}-of-3.safetensors' for number in (1, 2, 3)]
    parts = [safetensors.torch.load_file(file) for file in files]
    model = timm.create_model(**build.MODEL)
    assert sum(map(len, parts)) == len(model.state_dict())
    model.load_state_dict({name: value for part in parts for name, value in part.items()})


@pytest.mark.parametrize('files, name', [(1, 'w.safetensors'), (2, 'w-2-of-2.safetensors')])
def test_a_file_that_is_there_stays(build, tmp_path, capsys, files, name):
    (tmp_path / name).write_text('precious')
    assert call(build, tmp_path / 'w.safetensors', '--onnx', 'none.onnx', '--files', files) == 2
    assert f'{name} is there already; name another file' in capsys.readouterr().err
    assert (tmp_path / name).read_text() == 'precious' and os.listdir(tmp_path) == [name]


def test_what_is_no_such_file_is_a_line(build, wheel, tmp_path, capsys, monkeypatch):
    (tmp_path / 'text.onnx').write_text('no graph')
    other = tmp_path / 'other.onnx'
    torch.onnx.export(nn.Linear(2, 2), (torch.ones(1, 2),), str(other), dynamo=False, opset_version=14)
    wrong = {**build.MODEL, 'depth': 3}
    for path, change, line in (
        (tmp_path / 'none.onnx', {}, 'cannot be read'),
        (tmp_path / 'text.onnx', {}, 'neither an ONNX file nor a wheel'),
        (other, {}, 'no DINOv2 of this form'),
        (wheel, dict(MODEL=wrong), 'does not load into vit_small_patch14_dinov2'),
        (wheel, dict(resampled=lambda positions, side: positions[:, : 1 + side**2]), 'from onnxruntime'),
    ):
        for name, value in change.items():
            monkeypatch.setattr(build, name, value)
        assert call(build, tmp_path / 'w.safetensors', '--onnx', path) == 2
        assert line in capsys.readouterr().err
        assert not (tmp_path / 'w.safetensors').exists()
        if 'MODEL' in change:
            monkeypatch.setattr(build, 'MODEL', {**wrong, 'depth': 2})


@pytest.fixture
def pictures(tmp_path):
    """What experiments/tiny_imagenet/build.py writes, with a few pictures of noise."""
    for split, count in dict(train=9, held=2, val=1).items():
        write_images(tmp_path / 'tiny' / split, dict.fromkeys(('n01', 'n02'), count), side=64)
    return tmp_path / 'tiny'


def test_the_runs_at_a_small_size(pictures, tmp_path, monkeypatch, capsys):
    """Every conversion, a stop in the first training, the same command once more, the table."""
    driver = load_program('experiments/vit_small_14/run.py')
    torch.manual_seed(0)
    model = timm.create_model('vit_small_patch14_dinov2', **SMALL)
    for parameter in model.parameters():  # as if trained: attentions are not near uniform
        nn.init.normal_(parameter)
    state = sorted(model.state_dict().items())
    files = [tmp_path / 'a.safetensors', tmp_path / 'b.safetensors']
    for file, part in zip(files, (state[:9], state[9:]), strict=True):
        safetensors.torch.save_file(dict(part), file)

    def work(*more):
        capsys.readouterr()
        place = ['--weights', *files, '--data-dir', pictures, '--output', tmp_path / 'runs']
        assert call(driver, *place, *FLAGS, *more) == 0, capsys.readouterr()
        return capsys.readouterr().out

    def rows():
        with open(tmp_path / 'runs' / 'runs.csv', newline='') as stream:
            return {row['run']: row for row in csv.DictReader(stream)}

    states = dict(line.split(None, 1) for line in work('--list').splitlines())
    assert list(states) == [job.name for job in driver.all_jobs(12)] and set(states.values()) == {'to do'}
    work('--only', 'cells3-0', 'x8-0', 'x7-0')
    grids = {name: (row['tokens'], row['partition_grid'], row['updates']) for name, row in rows().items()}
    assert grids == {
        '224-cells3-0': ('256', '6', '0'), '224-cells8x8-0': ('256', '8', '0'),
        '518-cells3-0': ('1369', '13', '0'), '518-cells7x7-0': ('1369', '7', '0'),
    }  # fmt: skip
    with monkeypatch.context() as patch:
        signal_at(patch, [3])
        assert 'asked to stop: epoch 1, update 1 of 2' in work('--only', '224-cells3-12')
    assert re.search(r'^224-cells3-12-s0 +started$', work('--list'), re.M)
    work('--only', '224-cells3-12')
    row, before = rows()['224-cells3-12-s0'], rows()['224-cells3-0']
    assert row['train_pictures'] == '8' and row['pictures'] == '3' and row['commit'] and row['date']
    assert 0.98 < float(before['patch_cosine']) < float(row['patch_cosine']) < 1
    assert 0.98 < float(row['class_cosine']) <= 1
    settings = (tmp_path / 'runs' / 'settings' / row['settings']).read_text()
    assert 'kd_distill_type: feature' in settings and 'task_loss_weight: 0' in settings and '\nepochs: 6\n' in settings
    assert f'| 224 | 256 | 7 × 7 | 6 × 6 | {float(before["patch_cosine"]):.4f} |' in work('--report')
    for given, line in (([*files, files[0]], 'is in an earlier file too'), (files[:1], 'has runs from other weights')):
        assert call(driver, '--weights', *given, '--data-dir', pictures, '--output', tmp_path / 'runs') == 2
        assert line in capsys.readouterr().err


def test_no_data_is_a_line(tmp_path, capsys):
    driver = load_program('experiments/vit_small_14/run.py')
    for flags, line in (
        (['--data-dir', tmp_path], 'give --weights'),
        (['--data-dir', tmp_path, '--weights', 'w.safetensors'], 'tiny_imagenet/build.py'),
        (['--list', '--only', '999'], '--only 999'),
    ):
        assert call(driver, *flags) == 2
        assert line in capsys.readouterr().err


@pytest.mark.timeout(60)
@pytest.mark.parametrize('fault, words', [('pipe', 'not a regular file'), ('bomb', 'too long'), ('empty', 'no DINOv2')])
def test_a_wheel_that_is_none_is_a_line(fault, words, tmp_path, capsys):
    pytest.importorskip('onnx', reason='needs evavit[export]')
    path = tmp_path / 'file.whl'
    if fault == 'pipe':
        os.mkfifo(path)
    else:
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
            file.writestr('model.onnx', bytes(10**6) if fault == 'bomb' else b'')
    build = load_program('experiments/vit_small_14/build.py')
    assert run_script(build.main, [str(tmp_path / 'out.safetensors'), '--onnx', str(path)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1 and list(tmp_path.iterdir()) == [path]
