"""The example of inference prepares pictures as timm does in validation, without timm."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from faults import postscript
from PIL import Image
from programs import load_program
from runs import ROOT, unwritable
from timm.data import create_transform
from training.data.test_decode import planes, tiff

from evavit.training.data.decode import BadImageError, decode

pytest.importorskip('onnxruntime', reason='needs evavit[export]')


@pytest.fixture(scope='module')
def example():
    return load_program('examples/classify.py')


@pytest.mark.parametrize('picture_size', [(640, 427), (123, 301), (224, 224), (40, 31)])
@pytest.mark.parametrize(
    'about',
    [
        dict(
            input_size=(3, 224, 224),
            crop_pct=0.875,
            interpolation='bicubic',
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        dict(input_size=(3, 160, 256), crop_pct=0.9, interpolation='bilinear', mean=(0.5,) * 3, std=(0.5,) * 3),
        dict(input_size=(1, 28, 28), crop_pct=1.0, interpolation='nearest', mean=(0.3,), std=(0.2,)),
        dict(input_size=(3, 31, 31), crop_pct=1.15, interpolation='bicubic', mean=(0.5,) * 3, std=(0.5,) * 3),
    ],
    ids=['square', 'wide', 'grey', 'padded'],
)
@pytest.mark.parametrize('mode', [{}, *(dict(crop_mode=mode) for mode in ('center', 'squash', 'border'))])
def test_pictures_are_those_of_validation(example, about, mode, picture_size):
    about = about | mode
    from sklearn.datasets import load_sample_image

    picture = Image.fromarray(load_sample_image('china.jpg')).resize(picture_size)
    expected = create_transform(**about)(picture.convert('L') if about['input_size'][0] == 1 else picture)
    np.testing.assert_allclose(example.prepare(picture, about)[0], expected.numpy(), atol=1e-5)


def test_16_bits_are_scaled(example):
    about = dict(input_size=(1, 4, 4), crop_pct=1.0, interpolation='nearest', mean=(0,), std=(1,))
    picture = Image.fromarray(np.full((4, 4), 100 * 257, np.uint16))
    np.testing.assert_allclose(example.prepare(picture, about), 100 / 255)


@pytest.mark.parametrize(
    'content',
    [
        *(tiff([0, 4095, 65535], photometric=photometric) for photometric in (0, 1)),
        tiff([0, 16, 2048, 4095], bits=12),
        *(tiff([-100, 100], bits=bits, kind=2) for bits in (8, 16, 32)),
        tiff([0, 63], bits=32),
        *(planes(bits) for bits in (8, 16)),
    ],
)
def test_a_tiff_is_read_or_refused_as_by_inference(example, content):
    picture = Image.open(io.BytesIO(content))
    about = dict(input_size=(1, 1, picture.width), crop_pct=1.0, interpolation='nearest', mean=(0,), std=(1,))
    try:
        expected = decode(io.BytesIO(content), 'L')
    except BadImageError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            example.prepare(picture, about)
    else:
        assert np.array_equal(example.prepare(picture, about), example.prepare(expected, about))


class Session:
    """Stands for onnxruntime's: of three classes the one of the picture's brightest channel."""

    def get_inputs(self):
        return [type('Input', (), {'type': 'tensor(float)'})]

    def run(self, _, inputs):
        return [inputs['input0'].mean((2, 3))]


def test_folders_and_broken_pictures(example, tmp_path, monkeypatch, capsys):
    about = dict(
        input_size=(3, 8, 8),
        crop_pct=1.0,
        interpolation='bilinear',
        mean=(0.5,) * 3,
        std=(0.1,) * 3,
        class_names=['red', 'green', 'blue'],
    )
    monkeypatch.setattr(example, 'load', lambda path: (Session(), about))
    (tmp_path / 'deep').mkdir()
    for number, name in enumerate(('a.png', 'deep/b.webp', 'single.bmp')):
        colour = [0, 0, 0]
        colour[number] = 255
        Image.new('RGB', (20, 10), tuple(colour)).save(tmp_path / name)
    (tmp_path / 'broken.png').write_text('no picture')
    (tmp_path / 'drawing.png').write_bytes(postscript())
    Image.new('F', (20, 10), 0.5).save(tmp_path / 'float.tif')
    os.mkfifo(tmp_path / 'pipe.png')
    Image.new('RGB', (1, 101)).save(tmp_path / 'thin.png')
    (tmp_path / 'notes.txt').write_text('no picture')
    monkeypatch.setattr('sys.argv', ['classify.py', 'm.onnx', str(tmp_path), str(tmp_path / 'deep' / 'b.webp')])
    example.main()
    out, err = capsys.readouterr()
    assert [line.split(': ')[1].split()[0] for line in out.splitlines()] == ['red', 'green', 'blue', 'green']
    assert [line.split(' ')[0][len(str(tmp_path)) + 1 :] for line in err.splitlines()] == [
        'broken.png',
        'drawing.png',
        'float.tif',
        'pipe.png',
        'thin.png',
    ]
    assert 'thin.png is left out: 1 × 101 pixels, sides beyond 100:1' in err
    assert 'float.tif is left out: floating-point pixels, whose range is not known' in err
    assert 'drawing.png is left out: cannot identify' in err and 'pipe.png is left out: not a regular file' in err
    monkeypatch.setattr('sys.argv', ['classify.py', 'm.onnx', str(tmp_path / 'broken.png')])
    with pytest.raises(SystemExit) as stop:
        example.main()
    assert stop.value.code == 2


def test_mistakes_are_one_clear_error(example, tmp_path, monkeypatch, capsys):
    (tmp_path / 'text.onnx').write_text('no model')
    for words in (['nowhere.onnx', 'p.png'], [str(tmp_path / 'text.onnx'), 'p.png']):
        monkeypatch.setattr('sys.argv', ['classify.py', *words])
        with pytest.raises(SystemExit) as stop:
            example.main()
        assert stop.value.code == 2 and words[0] in capsys.readouterr().err


def command(folder, class_names='null'):
    """The words that classify one picture by its mean colour."""
    onnx = pytest.importorskip('onnx', reason='needs evavit[export]')
    image, logits = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (('input0', [1, 3, 8, 8]), ('output0', [1, 3]))
    )
    mean = (
        onnx.helper.make_node('GlobalAveragePool', ['input0'], ['mean']),
        onnx.helper.make_node('Flatten', ['mean'], ['output0']),
    )
    graph = onnx.helper.make_graph([*mean], 'mean', [image], [logits])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 18)], ir_version=8)
    about = dict(input_size='[3, 8, 8]', crop_pct='1.0', interpolation='"bilinear"', class_names=class_names)
    onnx.helper.set_model_props(model, {**about, 'mean': '[0.5, 0.5, 0.5]', 'std': '[0.1, 0.1, 0.1]'})
    onnx.save(model, folder / 'mean.onnx')
    Image.new('RGB', (20, 10)).save(folder / 'a.png')
    return [sys.executable, ROOT / 'examples/classify.py', folder / 'mean.onnx', folder / 'a.png']


@pytest.mark.skipif(not hasattr(signal, 'SIGPIPE'), reason='a signal of POSIX')
def test_a_reader_that_has_ended_is_no_traceback(tmp_path):
    words = command(tmp_path)
    whole = subprocess.run(words, capture_output=True, text=True)
    assert whole.returncode == 0 and 'a.png: ' in whole.stdout, whole.stderr
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert ended.stderr == '' and ended.returncode == -signal.SIGPIPE


@pytest.mark.parametrize('encoding', ['cp1252', 'ascii', 'latin-1', 'utf-8'])
def test_names_that_the_output_has_no_characters_for(tmp_path, encoding):
    names = ['Käfer', '中文', '\udc80']
    done = subprocess.run(
        command(tmp_path, json.dumps(names)), capture_output=True, env={**os.environ, 'PYTHONIOENCODING': encoding}
    )
    shown = ', '.join(f'{name} 33.3 %' for name in [*names[:2], r'\udc80'])
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'{tmp_path}/a.png: {shown}\n'.encode(encoding, 'backslashreplace')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='/dev/full, a disk that is full, is of Linux')
@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_a_full_disk_is_a_line_of_classify(tmp_path, unbuffered):
    stream = unwritable('full')
    full = subprocess.run(
        command(tmp_path),
        stdout=stream,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONUNBUFFERED': unbuffered},
    )
    os.close(stream)
    usage, line = full.stderr.splitlines()
    assert full.returncode == 2 and usage.startswith('usage: ') and 'error: standard output: ' in line


ABOUT = dict(
    input_size=(3, 8, 8), crop_pct=1.0, interpolation='bilinear', mean=(0.5,) * 3, std=(0.1,) * 3, class_names=None
)


@pytest.mark.parametrize(
    'about, words',
    [
        (dict(class_names=['red', 'green']), '2 names of 3 classes'),
        (dict(mean=(0.5, float('nan'), 0.5)), 'not finite'),
        (dict(crop_pct=0), 'm.onnx'),
        (dict(interpolation='cubist'), 'CUBIST'),
    ],
)
def test_a_file_that_contradicts_itself_is_a_line(example, about, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, 'load', lambda path: (Session(), ABOUT | about))
    Image.new('RGB', (20, 10)).save(tmp_path / 'a.png')
    monkeypatch.setattr('sys.argv', ['classify.py', 'm.onnx', str(tmp_path / 'a.png')])
    with pytest.raises(SystemExit) as stop:
        example.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and words in err.splitlines()[-1] and not out


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    'about, words',
    [
        (dict(class_names='5'), 'class_names 5 are no list'),
        (dict(class_names='["a", 5, "c"]'), 'are no list of names'),
        (dict(input_size='[3, 8, 9]'), 'not that of its graph, [3, 8, '),
        (dict(input_size='[3, 8, 100000000000]'), 'not that of its graph'),
        (dict(input_size='[3, "8", 8]'), 'not three whole numbers'),
        (dict(crop_pct='1e-9'), 'crop_pct 1e-09'),
        (dict(crop_mode='"zoom"'), "crop_mode 'zoom'"),
        (dict(mean='"red"'), 'm.onnx: '),
    ],
)
def test_a_file_whose_metadata_does_not_fit_is_a_line(example, about, words, tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip('onnx', reason='needs evavit[export]')
    shape, kind = [None, 3, 8, 8], onnx.TensorProto.FLOAT
    values = [onnx.helper.make_tensor_value_info(name, kind, shape) for name in ('input0', 'output0')]
    node = onnx.helper.make_node('Relu', ['input0'], ['output0'])
    graph = onnx.helper.make_graph([node], 'relu', values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 18)], ir_version=8)
    own = dict(input_size='[3, 8, 8]', crop_pct='1.0', interpolation='"bilinear"', class_names='null')
    onnx.helper.set_model_props(model, {**own, 'mean': '[0.5, 0.5, 0.5]', 'std': '[0.1, 0.1, 0.1]', **about})
    onnx.save(model, tmp_path / 'm.onnx')
    monkeypatch.setattr('sys.argv', ['classify.py', str(tmp_path / 'm.onnx'), str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        example.main()
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.timeout(30)
def test_hostile_names_sizes_and_pipes(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 300)
    os.mkfifo(tmp_path / 'pipe.onnx')
    monkeypatch.setattr('sys.argv', ['classify.py', str(tmp_path / 'pipe.onnx'), 'p.png'])
    with pytest.raises(SystemExit) as stop:
        example.main()
    assert stop.value.code == 2 and 'not a regular file' in capsys.readouterr().err
    monkeypatch.setattr(example, 'load', lambda path: (Session(), ABOUT))
    Image.new('RGB', (20, 10)).save(tmp_path / '\x1b]0;a.png')
    Image.new('RGB', (20, 20)).save(tmp_path / 'large.png')
    monkeypatch.setattr('sys.argv', ['classify.py', 'm.onnx', str(tmp_path)])
    example.main()
    out, err = capsys.readouterr()
    assert '\\x1b]0;a.png: ' in out and '\x1b' not in out
    assert 'large.png is left out' in err and 'exceeds limit of 300 pixels' in err
