"""inference.py: the predictions of the model, of every source of weights and pictures, in every form; mistakes."""

import csv
import gzip
import io
import json
import lzma
import os
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from programs import load_program
from runs import CLASSES, KWARGS, MODEL, QUICK, SOFTMAX, Code, load_script, words, write_images
from timm.data import create_transform, resolve_data_config
from timm.models import save_for_hf
from training.data.hostile_tars import bomb, wounds

import evavit
from evavit.cli.inference import picture_names, results_base
from evavit.errors import UserError, run_script
from evavit.hub import save_folder
from evavit.models import read_weights, write_weights
from evavit.training.config import parse_settings
from evavit.training.sections import ResultsConfig


@pytest.fixture(scope='module')
def model():
    """A model whose predictions differ from picture to picture."""
    torch.manual_seed(0)
    model = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope='module')
def hub(model, tmp_path_factory):
    return save_folder(model, tmp_path_factory.mktemp('hub') / 'mine', data='x', licence='mit', label_names=CLASSES)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Pictures of many sizes, modes and formats, in folders and not: {name: picture as it is read}."""
    root, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    (root / 'deep' / 'er').mkdir(parents=True)
    (root / 'notes.txt').write_text('no picture')
    names = {}
    for name, size, mode in (
        ('a10.png', (40, 30), 'RGB'),
        ('a9.png', (16, 16), 'L'),
        ('deep/b.bmp', (50, 17), 'RGB'),
        ('deep/er/c.webp', (21, 64), 'RGBA'),
        ('deep/er/d.JPG', (33, 33), 'RGB'),
    ):
        colour = rng.integers(0, 255, (size[1], size[0], 4)) // 2 + rng.integers(0, 128, 4)
        Image.fromarray(colour.astype(np.uint8)).convert(mode).save(root / name)
        with Image.open(root / name) as picture:
            names[name] = picture.convert('RGB')
    return root, dict(sorted(names.items(), key=lambda item: ['a9.png', 'a10.png', *sorted(names)[2:]].index(item[0])))


def transform_of(model):
    size = model.patch_embed.img_size
    return create_transform(**resolve_data_config({'input_size': (3, *size)}, model=model))


def expected(model, pictures):
    """{name: probabilities}, by timm's transform and the model alone."""
    transform = transform_of(model)
    with torch.no_grad():
        return {name: model(transform(picture).unsqueeze(0)).softmax(-1)[0] for name, picture in pictures.items()}


@pytest.fixture
def infer(call, tmp_path):
    """infer(*flags) → (rows of the CSV file, lines of output)."""

    def infer(*flags, name='results'):
        place = ['--results-dir', tmp_path, '--results-file', name, '--workers', '0', '--device', 'cpu']
        code, out, err = call('inference', *place, *flags)
        assert code == 0 and not err, out + err
        with open(tmp_path / f'{name}.csv', newline='', encoding='utf-8') as file:
            return list(csv.DictReader(file)), out.splitlines()

    return infer


def assert_rows(rows, probabilities, names=CLASSES):
    assert [row['filename'] for row in rows] == list(probabilities)
    for row in rows:
        values, order = probabilities[row['filename']].sort(descending=True)
        assert [row[f'label_{i}'] for i in range(3)] == [names[i] for i in order]
        assert [float(row[f'prob_{i}']) for i in range(3)] == pytest.approx(values.tolist(), abs=2e-6)


def test_predictions_of_a_hub_folder_on_pictures_of_any_kind(infer, hub, model, pictures):
    root, known = pictures
    rows, out = infer('--data-dir', root, '--checkpoint', hub, '--topk', '3', '--fullname', '-b', '2')
    assert_rows(rows, expected(model, known))
    best = rows[0]
    assert f'a9.png: {best["label_0"]} {float(best["prob_0"]):.1%}, {best["label_1"]}' in '\n'.join(out)
    assert '5 pictures classified, 0 not readable' in out[-1]


def test_a_tar_file_and_one_picture(infer, hub, model, pictures, tmp_path):
    root, known = pictures
    for name in ('all.tar', 'all.tar.gz'):
        with tarfile.open(tmp_path / name, 'w:gz' if name.endswith('gz') else 'w') as tar:
            tar.add(root, arcname='all')
        flags = ['--checkpoint', hub, '--topk', '3', '--fullname', '--workers', '2', '-b', '1']
        rows, _ = infer('--data-dir', tmp_path / name, *flags)
        assert_rows(rows, {f'all/{key}': value for key, value in expected(model, known).items()})
    rows, _ = infer('--data-dir', root / 'deep' / 'b.bmp', '--checkpoint', hub, '--topk', '9')
    assert_rows(rows, {'b.bmp': expected(model, known)['deep/b.bmp']})


def test_a_run_and_its_checkpoints(train, infer, images, tmp_path):
    """The best weights of the folder, with the classes and the settings of the run; another image size."""
    folder = train('run')
    place = ['--data-dir', images / 'val', '--topk', '3', '--fullname']
    rows, out = infer('--checkpoint', folder, *place)
    assert any('model_best.safetensors of this run' in line for line in out)
    model = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS).eval()
    model.load_state_dict(evavit.models.read_weights(folder / 'model_best.safetensors'))
    known = {
        path.relative_to(images / 'val').as_posix(): Image.open(path).convert('RGB')
        for path in sorted((images / 'val').rglob('*.png'))
    }
    assert_rows(rows, expected(model, known))
    assert infer('--checkpoint', folder / 'model_best.pth.tar', *place)[0] == rows
    model.set_input_size(24)
    assert_rows(infer('--checkpoint', folder, *place, '--img-size', '24')[0], expected(model, known))


def test_validate_and_export_take_the_folder_of_a_run_and_of_the_hub(train, call, images, tmp_path, hub):
    folder = train('run')
    results = {}
    for name in (folder, folder / 'model_best.safetensors'):
        flags = ['--data-dir', images, '--workers', '0', '--results-file', tmp_path / 'result.json']
        assert call('validate', '--checkpoint', name, *flags)[0] == 0
        results[name] = json.loads((tmp_path / 'result.json').read_text())
        assert results[name].pop('checkpoint') == str(folder / 'model_best.safetensors')
    assert results[folder] == results[folder / 'model_best.safetensors']
    code, out, err = call('validate', '--checkpoint', hub, '--data-dir', images, '--workers', '0')
    assert code == 0 and '(13 images)' in out, out + err
    code, _, err = call('validate', '--checkpoint', folder, '--use-ema', '--data-dir', images)
    assert code == 2 and 'model_best.pth.tar holds no averaged weights' in err
    (tmp_path / 'nothing').mkdir()
    code, _, err = call('export', tmp_path / 'model.pt2', '--checkpoint', tmp_path / 'nothing')
    assert code == 2 and 'nothing: a folder without weights' in err


def test_a_folder_of_timms_save_for_hf(infer, pictures, tmp_path):
    """Of any model of timm's, in either form of weights."""
    torch.manual_seed(0)
    model = timm.create_model('resnet10t', num_classes=3, in_chans=3).eval()
    for safe in (True, False):
        save_for_hf(model, str(tmp_path / str(safe)), dict(label_names=list(CLASSES)), safe_serialization=safe)
        rows, _ = infer('--data-dir', pictures[0] / 'a9.png', '--checkpoint', tmp_path / str(safe), '--topk', '3')
        transform = create_transform(**resolve_data_config({}, model=model))
        with torch.no_grad():
            best = model(transform(pictures[1]['a9.png']).unsqueeze(0)).softmax(-1).max().item()
        assert float(rows[0]['prob_0']) == pytest.approx(best, abs=1e-5) and rows[0]['label_2'] in CLASSES


def test_a_converted_network_of_the_hub(infer, pictures, tmp_path):
    torch.manual_seed(0)
    parent = timm.create_model('vit_tiny_patch16_224', num_classes=3, **SOFTMAX)
    for parameter in parent.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    converted = evavit.convert_vit(parent.eval(), window_size=2, partition_grid=2)
    save_folder(converted, tmp_path / 'converted', data='x', licence='mit', label_names=CLASSES)
    root, known = pictures
    flags = ['--data-dir', root, '--topk', '3', '--fullname', '--include-attention']
    source = f'local-dir:{tmp_path / "converted"}'
    for weights in (['--checkpoint', tmp_path / 'converted'], ['--model', source], ['--model', source, '--pretrained']):
        rows, _ = infer(*weights, *flags)
        assert_rows(rows, expected(converted, known))
    assert all((tmp_path / row['attention']).is_file() for row in rows)


def test_a_grey_wide_model(infer, call, images, pictures, tmp_path):
    """Its folder says that images are grey, to validate.py too."""
    torch.manual_seed(0)
    kwargs = {**KWARGS, 'img_size': (16, 24)}
    model = timm.create_model('eva_deit_tiny', num_classes=3, in_chans=1, **kwargs).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    save_folder(model, tmp_path / 'grey', data='x', licence='mit', label_names=CLASSES)
    root, known = pictures
    flags = ['--checkpoint', tmp_path / 'grey', '--topk', '3', '--fullname', '--include-attention']
    rows, _ = infer('--data-dir', root, *flags)
    config = resolve_data_config({'input_size': (1, 16, 24)}, model=model)
    config = {**config, **{name: (sum(config[name]) / 3,) for name in ('mean', 'std')}}
    with torch.no_grad():
        outputs = {
            name: model(create_transform(**config)(Image.open(root / name).convert('RGB').convert('L')).unsqueeze(0))
            for name in known
        }
    # A palette or transparency goes to grey by way of colour or not: the last digit may differ.
    for row in rows:
        best = outputs[row['filename']].softmax(-1)[0].max().item()
        assert float(row['prob_0']) == pytest.approx(best, abs=0.02)
    assert Image.open(tmp_path / rows[0]['attention']).size == (24, 16)
    code, out, err = call('validate', '--checkpoint', tmp_path / 'grey', '--data-dir', images, '--workers', '0')
    assert code == 0 and '(13 images)' in out, out + err


def test_a_table_of_pictures_of_one_name_is_told(caplog):
    names = SimpleNamespace(dataset=SimpleNamespace(filenames=lambda basename: ['a.png', 'b.png', 'a.png']))
    assert picture_names(names, ResultsConfig(), ['csv']) == ['a.png', 'b.png', 'a.png']
    assert caplog.messages == ['warning: there are several pictures a.png; add --fullname']


def test_forms_of_the_results(call, hub, pictures, tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    place = ['--data-dir', pictures[0], '--checkpoint', hub, '--workers', '0', '--results-dir', tmp_path, '--fullname']
    tables = {}
    for form in ('json', 'json-records', 'json-split', 'csv', 'parquet'):
        for topk in ('1', '2'):
            flags = ['--results-format', form, '--topk', topk, '--include-index', '--no-console-results']
            code, out, err = call('inference', *place, *flags)
            assert code == 0 and not err and 'a9.png' not in out, out + err
            path = tmp_path / f'eva_deit_tiny-16.{form.split("-")[0]}'
            text = '' if form == 'parquet' else path.read_text(encoding='utf-8')
            if form == 'json':
                rows = [{'filename': name, **row} for name, row in json.loads(text).items()]
            elif form == 'json-records':
                rows = [json.loads(line) for line in text.splitlines()]
            elif form == 'json-split':
                split = json.loads(text)
                rows = [dict(zip(split['columns'], row, strict=True)) for row in split['data']]
            elif form == 'csv':
                rows = [
                    {key: float(x) if 'prob' in key else int(x) if 'index' in key else x for key, x in row.items()}
                    for row in csv.DictReader(text.splitlines())
                ]
            else:
                rows = parquet.read_table(path).to_pylist()
            tables[form, topk] = rows
    assert all(tables[form, '1'] == tables['json', '1'] for form in ('json-records', 'json-split', 'csv', 'parquet'))
    assert all(tables[form, '2'] == tables['json', '2'] for form in ('json-records', 'json-split', 'parquet'))
    one, two = tables['json', '1'][0], tables['json', '2'][0]
    assert list(one) == ['filename', 'index', 'label', 'prob'] and one['label'] == CLASSES[one['index']]
    assert two['label'] == [CLASSES[i] for i in two['index']] and two['prob'][0] >= two['prob'][1]
    apart = tables['csv', '2'][0]
    assert list(apart) == ['filename', *(f'{name}_{i}' for name in ('index', 'label', 'prob') for i in (0, 1))]
    assert [apart['prob_0'], apart['prob_1']] == two['prob']


def test_columns_and_labels(call, hub, pictures, tmp_path):
    def columns(*flags):
        (tmp_path / 'one.json').unlink(missing_ok=True)  # of other names
        place = ['--data-dir', pictures[0] / 'a9.png', '--workers', '0', '--results-file', tmp_path / 'one.json']
        code, out, err = call('inference', *place, *flags)
        assert code == 0, out + err
        return json.loads((tmp_path / 'one.json').read_text())['a9.png'], out

    names = words('--index-col i --label-col class --output-col p --filename-col f --include-index')
    assert list(columns('--checkpoint', hub, *names)[0]) == ['i', 'class', 'p']
    assert list(columns('--checkpoint', hub, '--label-type', 'none', '--exclude-output')[0]) == ['index']
    logit = columns('--checkpoint', hub, '--output-type', 'logit', '--topk', '3')[0]['logit']
    prob = columns('--checkpoint', hub, '--topk', '3')[0]['prob']
    assert torch.tensor(logit).softmax(-1).tolist() == pytest.approx(prob, abs=1e-5)
    apart = columns('--checkpoint', hub, '--topk', '2', '--results-separate-col')[0]
    assert list(apart) == ['label_0', 'label_1', 'prob_0', 'prob_1']
    (tmp_path / 'map.txt').write_text('x\ny\nz\n')
    assert columns('--checkpoint', hub, '--class-map', tmp_path / 'map.txt')[0]['label'] in 'xyz'

    model = timm.create_model('eva_deit_tiny', **KWARGS)
    torch.nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias[285] = 20.0
    torch.save(model.state_dict(), tmp_path / 'imagenet.pth')
    flags = [*MODEL, '--checkpoint', tmp_path / 'imagenet.pth', '--label-type']
    row, out = columns(*flags, 'name')
    assert row['label'] == 'n02124075' and 'taken for those of imagenet-1k' in out
    assert columns(*flags, 'description')[0]['label'].startswith('Egyptian cat')
    assert columns(*flags, 'detailed')[0]['label'] == 'Egyptian cat: a domestic cat of Egypt'
    seven = timm.create_model('eva_deit_tiny', num_classes=7, **KWARGS)
    torch.save(seven.state_dict(), tmp_path / 'seven.pth')
    row, out = columns(*MODEL, '--num-classes', '7', '--checkpoint', tmp_path / 'seven.pth')
    assert list(row) == ['index', 'prob'] and 'nothing says what the 7 classes are called' in out


def test_broken_pictures_are_named_and_left_out(infer, call, hub, model, pictures, tmp_path):
    _, known = pictures
    some = tmp_path / 'some'
    some.mkdir()
    known['a10.png'].save(some / 'b.png')
    known['a9.png'].save(some / 'd.png')
    whole = (some / 'b.png').read_bytes()
    broken = {'a.png': b'', 'c.jpg': b'no picture', 'e.png': whole[: len(whole) // 2], 'f.heic': b'unknown'}
    for name, content in broken.items():
        (some / name).write_bytes(content)
    if hasattr(os, 'mkfifo'):
        os.mkfifo(some / 'pipe.png')
        broken['pipe.png'] = b''
    for workers in ('0', '2'):
        flags = ['--data-dir', some, '--checkpoint', hub, '--topk', '3', '--workers', workers, '-b', '2']
        rows, out = infer(*flags)
        assert_rows(rows, {'b.png': expected(model, known)['a10.png'], 'd.png': expected(model, known)['a9.png']})
        for name in broken:
            (line,) = [line for line in out if f'/{name} is not a readable image' in line]
            assert line.startswith('warning: ') and '(' in line
        assert f'2 pictures classified, {len(broken)} not readable' in out[-1]
    for name in ('b.png', 'd.png'):
        (some / name).unlink()
    code, _, err = call('inference', '--data-dir', some, '--checkpoint', hub, '--workers', '0')
    assert code == 2 and f'none of the {len(broken)} pictures' in err and err.count('\n') == 1


@pytest.mark.parametrize('how', ['last', 'rollout'])
def test_attention_pictures(infer, hub, model, pictures, tmp_path, how):
    """As large as what the model saw, by name in the table; bright where the mean over the queries is large."""
    root, known = pictures
    rows, _ = infer('--data-dir', root, '--checkpoint', hub, '--include-attention', how, '--fullname', '-b', '3')
    transform = transform_of(model)
    for number, row in enumerate(rows):
        assert row['attention'] == f'results.csv.attention/{number:06d}_{row["filename"].split("/")[-1]}.png'
        maps = evavit.attention_maps(model, transform(known[row['filename']]).unsqueeze(0))
        one = evavit.attention_rollout(maps) if how == 'rollout' else maps[-1]
        weights = one.grid.mean((1, 2))[0]
        normalise = transform.transforms[-1]
        seen = transform(known[row['filename']]) * normalise.std.view(3, 1, 1) + normalise.mean.view(3, 1, 1)
        seen = Image.fromarray(seen.mul(255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())
        drawn = np.asarray(Image.open(tmp_path / row['attention']), dtype=int)
        assert abs(drawn - np.asarray(evavit.overlay_attention(seen, weights), dtype=int)).max() <= 2


def test_the_same_under_a_compiler_and_with_mixed_precision(infer, hub, model, pictures):
    """The last batch is smaller than the others."""
    root, known = pictures
    for flags in (['--torchcompile', 'eager', '--channels-last'], ['--amp']):
        rows, _ = infer('--data-dir', root, '--checkpoint', hub, '--topk', '3', '--fullname', '-b', '2', *flags)
        for row in rows:
            best = expected(model, known)[row['filename']].max().item()
            assert float(row['prob_0']) == pytest.approx(best, abs=0.03)


LONG_SHORT = words('--num-classes 3 --model long_short_deit_tiny --model-kwargs')
LONG_SHORT += [f'{key}={value}' for key, value in SOFTMAX.items()]
# flags beside --workers 0, and what the line must say; HUB and PICTURES stand for the folders
FAULTS = {
    'no pictures named': (['--checkpoint', 'HUB'], ['no pictures', '--data-dir']),
    'no such folder': (['--checkpoint', 'HUB', '--data-dir', 'nowhere'], ['nowhere', 'no such folder or file']),
    'an empty folder': (['--checkpoint', 'HUB', '--data-dir', 'empty'], ['empty', 'no picture in it']),
    'no tar file': (['--checkpoint', 'HUB', '--data-dir', 'no.tar'], ['no.tar', 'not a readable tar file']),
    'half a tar file': (['--checkpoint', 'HUB', '--data-dir', 'half.tar.gz'], ['half.tar.gz', 'not a readable tar']),
    'a tar file with a changed byte': (
        ['--checkpoint', 'HUB', '--data-dir', 'odd.tar.xz'],
        ['not a readable tar file'],
    ),
    'an entry of 2 ** 80 bytes': (['--checkpoint', 'HUB', '--data-dir', 'large.tar'], ['not a readable tar file']),
    'an entry before itself': (['--checkpoint', 'HUB', '--data-dir', 'negative.tar'], ['not a readable tar file']),
    'no model': (['--data-dir', 'PICTURES'], ['no model', '--checkpoint']),
    'no such checkpoint': (['--data-dir', 'PICTURES', '--checkpoint', 'x.pth'], ['x.pth', 'no such checkpoint']),
    'a folder without weights': (['--data-dir', 'PICTURES', '--checkpoint', 'empty'], ['empty', 'without weights']),
    'a damaged folder': (['--data-dir', 'PICTURES', '--checkpoint', 'broken'], ['broken', 'config.json is damaged']),
    'a folder half copied': (['--data-dir', 'PICTURES', '--checkpoint', 'half'], ['half', 'no model.safetensors']),
    'weights timm has not': (['--data-dir', 'PICTURES', '--model', 'eva_deit_tiny'], ['eva_deit_tiny', 'no weights']),
    'two sources': (['--data-dir', 'PICTURES', '--checkpoint', 'HUB', '--pretrained'], ['--pretrained', 'one of them']),
    'unknown model': (['--data-dir', 'PICTURES', '--model', 'eva_deit_tin'], ['eva_deit_tin', 'mean eva_deit_tiny']),
    'an ending': (
        ['--data-dir', 'PICTURES', '--checkpoint', 'HUB', '--results-file', 'x.xls'],
        ['x.xls', '.csv, .json or .parquet'],
    ),
    'one file for two forms': (
        ['--data-dir', 'PICTURES', '--checkpoint', 'HUB', '--results-format', 'csv', 'json', 'json-split'],
        ['csv json json-split: json, json-split go into one file; give one of them'],
    ),
    'a form that is none': (
        ['--data-dir', 'PICTURES', '--checkpoint', 'HUB', '--results-format', 'xml'],
        ['xml', 'csv, json'],
    ),
    'names that are not told apart': (
        ['--data-dir', 'twice', '--checkpoint', 'HUB', '--results-format', 'json'],
        ['several pictures x.png', '--fullname'],
    ),
    'a folder that is a file': (
        ['--data-dir', 'PICTURES', '--checkpoint', 'HUB', '--results-dir', 'no.tar'],
        ['no.tar', 'cannot be'],
    ),
    'no classes at all': (['--data-dir', 'PICTURES', '--checkpoint', 'HUB', '--topk', '0'], ['topk', '≥ 1']),
    'too small a size': (['--data-dir', 'PICTURES', '--checkpoint', 'HUB', '--img-size', '3'], ['model.safetensors']),
    'a body alone': (['--data-dir', 'PICTURES', '--checkpoint', 'body'], ['local-dir:body has no classifier']),
    'weights that carry code': (
        ['--data-dir', 'PICTURES', '--model', 'local-dir:code'],
        ['code/pytorch_model.bin', 'none of it is loaded; ask for the weights as .safetensors'],
    ),
    'maps that there are not': (
        ['--data-dir', 'PICTURES', '--checkpoint', 'ls.pth', '--include-attention', *LONG_SHORT],
        ['--include-attention', 'dual_ln'],
    ),
}


@pytest.fixture(scope='module')
def places(tmp_path_factory, hub, pictures):
    root = tmp_path_factory.mktemp('places')
    for name in ('empty', 'broken', 'half', 'twice/a', 'twice/b'):
        (root / name).mkdir(parents=True)
    (root / 'broken' / 'config.json').write_text('{"architecture":')
    (root / 'code').mkdir()
    shutil.copy(hub / 'config.json', root / 'code')
    torch.save({'weight': Code()}, root / 'code' / 'pytorch_model.bin')
    (root / 'half' / 'config.json').write_text((hub / 'config.json').read_text())
    (root / 'no.tar').write_text('no archive')
    with tarfile.open(root / 'whole.tar.gz', 'w:gz') as tar:
        tar.add(pictures[0], arcname='all')
    content = (root / 'whole.tar.gz').read_bytes()
    (root / 'half.tar.gz').write_bytes(content[: len(content) // 2])
    content = bytearray(lzma.compress(gzip.decompress(content)))
    content[len(content) // 2] ^= 1
    (root / 'odd.tar.xz').write_bytes(content)
    for name, size in (('large', 2**80), ('negative', -1024)):
        entry = tarfile.TarInfo('a.png')
        entry.size = size
        (root / f'{name}.tar').write_bytes(entry.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    for name in ('a', 'b'):
        Image.new('RGB', (8, 8)).save(root / 'twice' / name / 'x.png')
    save_for_hf(timm.create_model('eva_deit_tiny', num_classes=0, **KWARGS), str(root / 'body'))
    torch.save(timm.create_model('long_short_deit_tiny', num_classes=3, **SOFTMAX).state_dict(), root / 'ls.pth')
    return root


@pytest.mark.parametrize('flags, said', FAULTS.values(), ids=FAULTS)
def test_mistakes_are_one_line(call, places, hub, pictures, monkeypatch, flags, said):
    monkeypatch.chdir(places)
    stand = {'HUB': str(hub), 'PICTURES': str(pictures[0])}
    code, _, err = call('inference', '--workers', '0', *(stand.get(flag, flag) for flag in flags))
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1, err
    assert all(text in err for text in said), err


@pytest.mark.parametrize('compressed', [False, True])
def test_a_damaged_tar_file_is_a_line(call, hub, pictures, tmp_path, compressed):
    whole, archive = io.BytesIO(), tmp_path / f'in.tar{".gz" * compressed}'
    with tarfile.open(fileobj=whole, mode='w') as tar:
        for number in range(4):
            tar.add(pictures[0] / 'a9.png', arcname=f'{number}.png')
    for content in wounds(whole.getvalue(), whole.getvalue().index(b'2.png')).values():
        archive.write_bytes(gzip.compress(content) if compressed else content)
        code, _, err = call('inference', '--workers', '0', '--data-dir', archive, '--checkpoint', hub)
        assert code == 2 and err.startswith(f'error: {archive}: not a readable tar file'), err
        assert 'damaged or cut short at byte' in err and err.count('\n') == 1


def test_a_small_archive_that_unpacks_to_terabytes_is_a_line(call, hub, tmp_path, monkeypatch):
    monkeypatch.setattr('evavit.training.data.tars.LITTLE', 2**20)
    archive = bomb(tmp_path / 'in.tar.bz2', 2**26)
    code, _, err = call('inference', '--workers', '0', '--data-dir', archive, '--checkpoint', hub)
    assert code == 2 and 'in.tar.bz2: not a readable tar file (unpacks to more than 1,000 times its size' in err


@pytest.mark.parametrize('names', ['map', ['a', 'b'], ['a', 'b', 'b'], ['a', 'b', 'c', 'd']], ids=str)
def test_names_for_another_number_of_classes_are_a_line(call, hub, pictures, tmp_path, names):
    folder = shutil.copytree(hub, tmp_path / 'hub')
    flags = ['--data-dir', pictures[0], '--checkpoint', folder, '--workers', '0', '--results-dir', tmp_path / 'new']
    if names == 'map':
        (tmp_path / 'map.txt').write_text('a\nb\n')
        flags += ['--class-map', tmp_path / 'map.txt']
    else:
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps({**config, 'label_names': names}))
    code, _, err = call('inference', *flags)
    said = f'{2 if names == "map" else len(set(names))} different names for 3 classes; give --class-map FILE'
    assert code == 2 and said in err and err.count('\n') == 1, err
    assert not (tmp_path / 'new').exists()
    assert call('inference', *flags, '--label-type', 'none')[0] == 0


@pytest.mark.parametrize('form', ['csv', 'json', 'json-records', 'json-split'])
def test_results_take_the_place_of_results_alone(call, hub, pictures, tmp_path, form):
    path = tmp_path / f'own.{form[:4].rstrip("-")}'
    flags = ['--data-dir', pictures[0], '--checkpoint', hub, '--workers', '0', '--results-file', path]
    for more in ([], ['--topk', '3', '--include-index'], ['--output-type', 'logit'], ['--exclude-output']):
        assert call('inference', *flags, '--results-format', form, *more)[0] == 0
    users = [['filename', 'label'], ['filename', 'index', 'label'], ['filename', 'label', 'prob']]
    rows = [['a.png', 'apple'], ['a.png', 3, 'apple'], ['a.png', 'apple', 0.93]]  # which may be anybody's
    tables = [dict(zip(names, row, strict=True)) for names, row in zip(users, rows, strict=True)]
    if form == 'csv':
        contents = ['\n'.join(','.join(map(str, line)) for line in (table, table.values())) for table in tables]
    elif form == 'json-split':
        contents = [json.dumps(dict(columns=list(table), data=[list(table.values())])) for table in tables]
    else:
        contents = ['{"mine": {"size": 1}}', *map(json.dumps, tables)]
    for content in contents:
        path.write_text(content)
        for more in ([], ['--exclude-output']):
            code, _, err = call('inference', *flags, *more)
            assert code == 2 and f'{path} is there, with other content than is written to it' in err, err
            assert err.count('\n') == 1 and path.read_text() == content


@pytest.mark.parametrize('form', ['json', 'json-split'])
def test_what_somebody_added_inside_a_row_stays(call, hub, pictures, tmp_path, form):
    path = tmp_path / 'own.json'
    flags = ['--data-dir', pictures[0], '--checkpoint', hub, '--workers', '0', '--results-file', path, '--topk', '2']
    assert call('inference', *flags, '--results-format', form)[0] == 0
    written = path.read_text()
    for change in (lambda cell: [*cell, 'checked'], lambda cell: dict(was=cell, note='checked')):
        content = json.loads(written)
        row = content['data'][0] if form == 'json-split' else next(iter(content.values()))
        key = content['columns'].index('label') if form == 'json-split' else 'label'
        row[key] = change(row[key])
        path.write_text(json.dumps(content))
        code, _, err = call('inference', *flags, '--results-format', form)
        assert code == 2 and 'with other content' in err and 'checked' in path.read_text(), err


def test_results_of_parquet_take_the_place_of_results_alone(call, hub, pictures, tmp_path):
    parquet = pytest.importorskip('pyarrow.parquet')
    import pyarrow

    path = tmp_path / 'own.parquet'
    flags = ['--data-dir', pictures[0], '--checkpoint', hub, '--workers', '0', '--results-file', path]
    for more in ([], ['--topk', '3'], []):
        assert call('inference', *flags, *more)[0] == 0
    parquet.write_table(pyarrow.table(dict(filename=['a.png'], label=['apple'], prob=[1.0])), path)
    code, _, err = call('inference', *flags)
    assert code == 2 and 'other content' in err and parquet.read_table(path)['label'].to_pylist() == ['apple']


@pytest.mark.parametrize('script', ['inference', 'validate', 'export'])
def test_a_random_classifier_is_not_used(call, model, pictures, monkeypatch, tmp_path_factory, tmp_path, script):
    monkeypatch.chdir(tmp_path)
    place = tmp_path_factory.mktemp('five')
    write_images(place / 'val', dict.fromkeys('abcde', 1))
    folder = save_folder(model, place / 'hub', data='x', licence='mit')
    flags = {
        'inference': ['--data-dir', pictures[0]],
        'validate': ['--data-dir', place, '--pretrained'],
        'export': ['m.pt2', '--pretrained'],
    }[script]
    code, _, err = call(script, *flags, '--model', f'local-dir:{folder}', '--num-classes', '5')
    assert code == 2 and err.startswith('error: ') and err.count('\n') == 1 and not os.listdir(tmp_path), err
    assert all(text in err for text in ('--num-classes 5', 'have 3 classes', 'leave --num-classes out')), err


@pytest.mark.parametrize('flag', ['--checkpoint', '--model'])
def test_a_class_map_in_another_order_is_a_line(call, hub, pictures, tmp_path, flag):
    """One of other names is taken."""
    (tmp_path / 'map.txt').write_text('\n'.join([*reversed(CLASSES)]))
    (tmp_path / 'other.txt').write_text('pomme\npoire\nprune\n')
    flags = ['--data-dir', pictures[0], flag, hub if flag == '--checkpoint' else f'local-dir:{hub}', '--workers', '0']
    flags += ['--results-dir', tmp_path / 'results']
    code, _, err = call('inference', *flags, '--class-map', tmp_path / 'map.txt')
    assert code == 2 and 'apple is class 2 of it, and class 0 of ' in err and err.count('\n') == 1, err
    assert not (tmp_path / 'results' / 'eva_deit_tiny-16.csv').exists()
    code, out, err = call('inference', *flags, '--class-map', tmp_path / 'other.txt')
    assert code == 0 and 'pomme' in out, err


SOURCES = {
    'inference': ['--data-dir', 'PICTURES'],
    'validate': ['--data-dir', 'PLACE', '--pretrained'],
    'export': ['m.pt2', '--pretrained'],
    'knn': ['--data-dir', 'PLACE', '--pretrained', '-k', '2', '--split', 'val'],
    'train': ['--data-dir', 'PLACE', '--pretrained', *QUICK],
    'teacher': ['--data-dir', 'PLACE', *MODEL, *QUICK],
}


@pytest.fixture
def call_with(call, capfd, pictures, images):
    """call_with(program, source) → (exit code, error lines) of a program with weights of a folder or repository."""

    def call_with(program, source):
        places = {'PICTURES': pictures[0], 'PLACE': images}
        flags = [places.get(word, word) for word in SOURCES[program]]
        flags += ['--kd-model-name' if program == 'teacher' else '--model', source]
        if program != 'knn':
            code, _, err = call('train' if program == 'teacher' else program, *flags)
            return code, err
        capfd.readouterr()
        code = run_script(load_program('examples/knn.py').main, [str(flag) for flag in flags])
        return code, capfd.readouterr()[1]

    return call_with


@pytest.mark.parametrize('program', ['inference', 'validate', 'knn', 'train', 'dry run'])
@pytest.mark.parametrize('channels', [1, 4])
def test_the_channels_that_a_folder_asks_for(call_with, monkeypatch, tmp_path, images, call, program, channels):
    """Grey images are loaded as such, others than grey and coloured ones are refused."""
    monkeypatch.chdir(tmp_path)
    model = timm.create_model(MODEL[1], num_classes=3, in_chans=channels, **KWARGS)
    folder = save_folder(model, tmp_path / 'hub', data='x', licence='mit', label_names=CLASSES)
    if program == 'dry run':
        place = ['--data-dir', images, '--pretrained', '--dry-run', *QUICK]
        code, _, err = call('train', '--model', f'local-dir:{folder}', *place)
    else:
        code, err = call_with(program, f'local-dir:{folder}')
    if channels == 1:
        assert code == 0, err
    else:
        lines = [line for line in err.splitlines() if line.startswith('error: ')]
        assert code == 2 and len(lines) == 1 and 'Traceback' not in err, err
        assert '4 channels' in lines[0] and 'hub' in lines[0]


@pytest.mark.parametrize('source', ['local-dir:', 'hf-hub:'])
@pytest.mark.parametrize('kind', ['eva_deit_tiny', 'vit_tiny_patch16_224'])
@pytest.mark.parametrize('program', SOURCES)
def test_a_flipped_bit_in_a_folder_is_found(call_with, monkeypatch, tmp_path, program, kind, source):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model(kind, num_classes=3, **SOFTMAX)
    folder = save_folder(model, tmp_path / 'hub', data='x', licence='mit', label_names=CLASSES)
    content = bytearray((folder / 'model.safetensors').read_bytes())
    content[-100] ^= 0x40
    (folder / 'model.safetensors').write_bytes(content)
    monkeypatch.setattr('evavit.hub.download_from_hf', lambda name, file: str(folder / file))
    monkeypatch.setattr('timm.models._hub.download_from_hf', lambda name, file, **_: str(folder / file))
    code, err = call_with(program, f'local-dir:{folder}' if source == 'local-dir:' else 'hf-hub:me/mine')
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    assert code == 2 and len(lines) == 1 and 'Traceback' not in err, err
    assert 'model.safetensors: not a readable checkpoint: damaged: its SHA-256' in lines[0]


@pytest.mark.parametrize('program', ['inference', 'validate', 'export', 'teacher'])
def test_a_classifier_that_a_folder_lacks_is_not_random(call_with, hub, monkeypatch, tmp_path, program):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(hub, tmp_path / 'hub')
    body = {name: value for name, value in read_weights(folder / 'model.safetensors').items() if 'head' not in name}
    write_weights(body, folder / 'model.safetensors')
    code, err = call_with(program, f'local-dir:{folder}')
    lines = [line for line in err.splitlines() if line.startswith('error: ')]
    assert code == 2 and len(lines) == 1 and 'Traceback' not in err, err
    assert 'model.safetensors: the file does not fit' in lines[0] and 'lacks head.weight' in lines[0]


def test_the_default_name_and_place_are_timms(call, hub, pictures, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call('inference', '--data-dir', pictures[0], '--checkpoint', hub, '--workers', '0')
    assert code == 0 and os.listdir(tmp_path) == ['eva_deit_tiny-16.csv'] and 'eva_deit_tiny-16.csv' in out


def test_a_name_that_is_no_unicode_and_an_output_that_is_no_number(infer, call, hub, model, tmp_path):
    (tmp_path / 'in').mkdir()
    name = os.fsdecode(b'caf\xe9.png')
    try:
        Image.new('RGB', (8, 8)).save(tmp_path / 'in' / name)
    except OSError:  # a file system that wants Unicode
        name = 'cafe.png'
        Image.new('RGB', (8, 8)).save(tmp_path / 'in' / name)
    rows, _ = infer('--data-dir', tmp_path / 'in', '--checkpoint', hub, '--include-attention')
    assert rows[0]['filename'].startswith('caf') and (tmp_path / rows[0]['attention']).is_file()
    weights = torch.full_like(model.head.weight, torch.finfo(torch.float32).max)  # finite, with outputs that are not
    torch.save({**model.state_dict(), 'head.weight': weights}, tmp_path / 'huge.pth')
    flags = [*MODEL, '--num-classes', '3', '--workers', '0', '--results-dir', tmp_path]
    code, _, err = call('inference', '--data-dir', tmp_path / 'in', '--checkpoint', tmp_path / 'huge.pth', *flags)
    assert code == 2 and '.png: the output of the model is not finite' in err and err.count('\n') == 1


def test_an_orientation_that_is_not_applied_is_told_once(infer, hub, model, tmp_path):
    folder, exif = tmp_path / 'phone', Image.Exif()
    folder.mkdir()
    exif[0x0112] = 6
    for number in range(3):
        picture = Image.effect_noise((40 + number, 30), 90).convert('RGB')
        picture.save(folder / f'{number}.png', **(dict(exif=exif) if number else {}))
    rows, lines = infer('--data-dir', folder, '--checkpoint', hub, '-b', '1', '--workers', '2', '--topk', '3')
    (told,) = [line for line in lines if 'EXIF' in line]
    assert told.startswith('warning: 2 of 3 pictures have an EXIF orientation, which is not applied')
    assert 'mogrify -auto-orient' in told
    pictures = {path.name: Image.open(path).convert('RGB') for path in sorted(folder.iterdir())}
    assert_rows(rows, expected(model, pictures))


def test_folders_are_walked_as_in_training(infer, hub, tmp_path):
    """A link to another folder is followed, one in a circle is left; names with a dot in front are no pictures, in a
    tar file either."""
    for name in ('round/a/x.png', 'round/.y.png', 'round/.ipynb_checkpoints/z.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    with tarfile.open(tmp_path / 'round.tar', 'w') as tar:
        tar.add(tmp_path / 'round', './')
    (tmp_path / 'round' / 'a' / 'back').symlink_to(tmp_path / 'round')
    (tmp_path / 'round' / 'b').symlink_to(tmp_path / 'round' / 'a')
    rows, out = infer('--data-dir', tmp_path / 'round', '--checkpoint', hub, '--fullname')
    assert [row['filename'] for row in rows] == ['a/x.png', 'b/x.png']
    assert any('links that lead back to a folder around them, left out: ' in line for line in out)
    rows, _ = infer('--data-dir', tmp_path / 'round.tar', '--checkpoint', hub)
    assert [row['filename'] for row in rows] == ['x.png']


def test_names_with_a_dot_are_passed_over_and_results_told_of(infer, call, hub, tmp_path):
    """What macOS and Jupyter leave, in a folder and in a tar file; where the pictures of attention went."""
    for name in ('x.png', '._x.png', '.cache/y.png', 'deep/.z.png'):
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'in' / name)
    with tarfile.open(tmp_path / 'in.tar', 'w') as tar:
        tar.add(tmp_path / 'in', arcname='.')
    for place in ('in', 'in.tar'):
        rows, out = infer('--data-dir', tmp_path / place, '--checkpoint', hub, '--include-attention')
        assert len(rows) == 1 and out[-1].endswith(f'results.csv; attention in {tmp_path / "results.csv.attention"}')
    assert f'{tmp_path / "results.csv"}: written anew' in out


def test_links_in_a_tar_file_are_read_or_named(infer, hub, tmp_path):
    """A hard link is the picture that it leads to, as its tar file had it then; what else is no file is counted."""
    for number, name in enumerate(('a.png', 'b.png', 'c.png')):
        Image.new('RGB', (8 + number, 8), (90 * number,) * 3).save(tmp_path / name)
    with tarfile.open(tmp_path / 'in.tar.gz', 'w:gz') as tar:
        tar.add(tmp_path / 'a.png', './a.png')
        tar.add(tmp_path / 'a.png', 'data.bin')
        for name, kind, leads in (
            ('bin.png', tarfile.LNKTYPE, 'data.bin'),
            ('h.png', tarfile.LNKTYPE, 'a.png'),
            ('lost.png', tarfile.LNKTYPE, 'nowhere.png'),
            ('pipe.png', tarfile.FIFOTYPE, ''),
            ('s.png', tarfile.SYMTYPE, 'a.png'),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, leads
            tar.addfile(member)
        tar.add(tmp_path / 'b.png', './a.png')
        tar.add(tmp_path / 'a.png', 'z.png')
    for workers in ('0', '1'):
        rows, out = infer('--data-dir', tmp_path / 'in.tar.gz', '--checkpoint', hub, '--workers', workers)
        assert [row['filename'] for row in rows] == ['a.png', 'bin.png', 'h.png', 'z.png']
        assert rows[1]['prob'] == rows[2]['prob'] == rows[3]['prob'] != rows[0]['prob']
        for name in ('lost.png', 'pipe.png', 's.png'):
            assert any(f'in.tar.gz: {name} is not a readable image (a link or no file' in line for line in out), name
        assert '4 pictures classified, 3 not readable' in out[-1]


def test_more_loading_processes_than_cores_say_nothing(infer, hub, pictures, recwarn):
    infer('--data-dir', pictures[0], '--checkpoint', hub, '--workers', str((os.cpu_count() or 1) + 1), '-b', '1')
    assert not [it for it in recwarn if 'This DataLoader will create' in str(it.message)]


def test_a_class_whose_name_is_not_of_unicode(call, images, tmp_path):
    """From the folder that is trained on to every file that tells of its classes."""
    for split in ('train', 'val'):
        shutil.copytree(images / split, tmp_path / 'in' / split)
        try:
            (tmp_path / 'in' / split / 'pear').rename(os.fsdecode(bytes(tmp_path / 'in' / split) + b'/caf\xe9'))
        except OSError:
            pytest.skip('a file system that wants Unicode')
    place = ['--data-dir', tmp_path / 'in', '--workers', '0']
    code, out, err = call('train', *MODEL, *QUICK, *place, '--output', tmp_path, '--experiment', 'run')
    assert code == 0, err
    told = ['--results-dir', tmp_path, '--results-file', 'rows', '--results-format', 'csv', 'json-records']
    code, out, err = call('inference', '--checkpoint', tmp_path / 'run', *place, *told, '--topk', '3')
    assert code == 0 and 'caf\\udce9' in out, err
    assert all('caf' in line for line in (tmp_path / 'rows.json').read_text().splitlines())
    report = ['--report-dir', tmp_path / 'report', '--results-file', tmp_path / 'results.csv']
    code, _, err = call('validate', '--checkpoint', tmp_path / 'run', *place, *report)
    assert code == 0 and 'caf' in (tmp_path / 'report' / 'classes.csv').read_text(), err
    assert code == 0 and 'caf' in (tmp_path / 'report' / 'confusion.csv').read_text(), err


@pytest.mark.parametrize(
    'flags, twice',
    [
        ('--filename-col label', 'label'),
        ('--label-col prob', 'prob'),
        ('--include-index --index-col label', 'label'),
        ('--topk 2 --filename-col label_1', 'label_1'),
        ('--filename-col attention --include-attention', 'attention'),
        ('--label-type none --output-col index', 'index'),
    ],
)
def test_no_column_replaces_another(call, hub, pictures, tmp_path, flags, twice):
    place = ['--data-dir', pictures[0], '--checkpoint', hub, '--results-dir', tmp_path, '--workers', '0']
    code, _, err = call('inference', *place, *words(flags))
    assert code == 2 and f'2 columns of the results would be called {twice}: give --filename-col' in err, err
    code, _, err = call('inference', *place, *words(flags), '--results-format', 'json')
    assert (code == 0) == ('topk' in flags), err


def attention_of(call, hub, folder, picture):
    """inference.py on a new picture of this name, into results.csv of the folder: (code, error)."""
    (folder / 'in').mkdir(exist_ok=True)
    Image.effect_noise((8, 8), 80).save(folder / 'in' / picture)
    place = ['--data-dir', folder / 'in' / picture, '--checkpoint', hub, '--workers', '0', '--results-dir', folder]
    code, _, err = call('inference', *place, '--results-file', 'results.csv', '--include-attention')
    return code, err


def test_a_picture_of_attention_takes_the_place_of_its_own_alone(call, hub, tmp_path):
    """A user's text or picture is not one of an earlier run, nor is a link, wherever it leads."""
    folder = tmp_path / 'results.csv.attention'
    folder.mkdir()
    place, mine = folder / '000000_a.png.png', tmp_path / 'mine'
    mine.write_text('mine')

    def picture():
        Image.new('RGB', (8, 8)).save(place)

    for kind, make in dict(
        text=lambda: place.write_text('mine'),
        empty=place.touch,
        picture=picture,
        link=lambda: place.symlink_to(mine),
        dangling=lambda: place.symlink_to('nowhere'),
        folder=place.mkdir,
    ).items():
        make()
        before = os.lstat(place).st_mtime_ns
        code, err = attention_of(call, hub, tmp_path, 'a.png')
        assert code == 2 and f'{place} is there, and no picture of an earlier run; take it away' in err, (kind, err)
        assert err.count('\n') == 1 and os.lstat(place).st_mtime_ns == before and mine.read_text() == 'mine'
        assert not (tmp_path / 'results.csv').exists()
        place.rmdir() if kind == 'folder' else place.unlink()
    for lies in (folder.rmdir, folder.unlink):
        lies()
        (folder.symlink_to if lies == folder.rmdir else folder.write_text)(str(tmp_path / 'in'))
        code, err = attention_of(call, hub, tmp_path, 'a.png')
        assert code == 2 and f'{folder} is a link or no folder' in err and err.count('\n') == 1
    assert os.listdir(tmp_path / 'in') == ['a.png'] and not (tmp_path / 'results.csv').exists()


def test_pictures_of_attention_of_an_earlier_run_go(call, hub, tmp_path):
    """Its own, once the table is there; a user's file beside them stays, a copy of one of them too."""
    folder = tmp_path / 'results.csv.attention'
    assert attention_of(call, hub, tmp_path, 'a.png') == (0, '')
    (folder / 'notes.txt').write_text('mine')
    Image.new('RGB', (8, 8)).save(folder / '000007_mine.png')
    first = (folder / '000000_a.png.png').read_bytes()
    (folder / 'favourite.png').write_bytes(first)
    for picture in ('a.png', 'b.png'):
        assert attention_of(call, hub, tmp_path, picture) == (0, '')
        assert sorted(os.listdir(folder)) == [f'000000_{picture}.png', '000007_mine.png', 'favourite.png', 'notes.txt']
        assert (folder / f'000000_{picture}.png').read_bytes() != first  # of a new picture


def test_a_short_output_with_a_picture_of_attention_is_its_own(call, hub, tmp_path):
    assert attention_of(call, hub, tmp_path, 'a.png') == (0, '')
    path = tmp_path / 'results.csv'
    rows = [line.split(',') for line in path.read_text().splitlines()]
    rows[1][rows[0].index('prob')] = '0.5'
    path.write_text(''.join(f'{",".join(row)}\n' for row in rows))
    assert attention_of(call, hub, tmp_path, 'a.png') == (0, '')


def test_pictures_of_attention_are_not_classified(infer, call, hub, tmp_path):
    """Where results go to the folder of the pictures; a folder of the user's that is called so is read."""
    place = ['--data-dir', tmp_path, '--checkpoint', hub, '--workers', '0', '--results-file', tmp_path / 'results.csv']
    (tmp_path / 'mine.attention').mkdir()
    for name in ('a.png', 'mine.attention/b.png'):
        Image.effect_noise((8, 8), 80).save(tmp_path / name)
    for left in (0, 2):
        code, out, err = call('inference', *place, '--include-attention')
        assert code == 0 and '2 pictures classified, 0 not readable' in out, (out, err)
        assert (f'{left} pictures of attention, which inference.py drew, are left out' in out) == (left > 0)


@pytest.mark.parametrize('moment', ['draw', 'write_results'])
def test_a_table_never_stands_beside_pictures_of_another_run(call, hub, tmp_path, monkeypatch, moment):
    """Whatever ends it: the table keeps its pictures, or has none."""
    assert attention_of(call, hub, tmp_path, 'a.png') == (0, '')
    folder, table = tmp_path / 'results.csv.attention', (tmp_path / 'results.csv').read_bytes()
    before = (folder / '000000_a.png.png').read_bytes()
    program = load_script('inference')

    def fails(*args):
        if moment == 'draw':
            draw(*args)
        raise UserError('ended')

    owner = program.AttentionPictures if moment == 'draw' else program
    draw = getattr(owner, moment)
    monkeypatch.setattr(owner, moment, fails)
    code, err = attention_of(call, hub, tmp_path, 'a.png')
    assert (code, err) == (2, 'error: ended\n') and (tmp_path / 'results.csv').read_bytes() == table
    left = [path.read_bytes() for path in folder.iterdir()] if folder.exists() else []
    assert left == ([before] if moment == 'draw' else [])


def test_a_table_that_somebody_wrote_meanwhile_stays(call, hub, tmp_path, monkeypatch):
    write, program = load_script('inference').write_results, load_script('inference')

    def late(*args):
        (tmp_path / 'results.csv').write_text('mine')
        return write(*args)

    monkeypatch.setattr(program, 'write_results', late)
    (tmp_path / 'in').mkdir()
    Image.effect_noise((8, 8), 80).save(tmp_path / 'in' / 'a.png')
    place = ['--data-dir', tmp_path / 'in', '--checkpoint', hub, '--workers', '0']
    code, out, err = call('inference', *place, '--results-file', tmp_path / 'results.csv')
    assert code == 0 and f'the results are in {tmp_path / "results-1.csv"}' in out + err
    assert (tmp_path / 'results.csv').read_text() == 'mine' and 'a.png' in (tmp_path / 'results-1.csv').read_text()


def test_results_of_one_folder_have_pictures_of_attention_of_their_own(call, hub, tmp_path):
    """So do those that differ in form alone."""
    drawn = {}
    for name in ('one.csv', 'two.csv', 'one.json'):
        Image.effect_noise((8, 8), 80).save(tmp_path / 'a.png')
        place = ['--data-dir', tmp_path / 'a.png', '--checkpoint', hub, '--workers', '0']
        code, _, err = call('inference', *place, '--results-file', tmp_path / name, '--include-attention')
        assert code == 0, err
        (file,) = set(tmp_path.glob('*/*.png')) - drawn.keys()
        assert file.parent.name == f'{name}.attention'
        drawn[file] = file.read_bytes()
    assert all(file.read_bytes() == content for file, content in drawn.items())


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        load_script('inference').main(['--help'])
    out = capsys.readouterr().out
    flags = '--data-dir --checkpoint --topk --fullname --include-attention --results-format --label-type --img-size'
    assert all(flag in out for flag in words(flags)) and '--epochs' not in out


def test_a_folder_does_not_say_where_results_go():
    model = timm.create_model('eva_deit_tiny', depth=1)
    model.pretrained_cfg['architecture'] = '../up/evil'
    config, _ = parse_settings('inference', ['--data-dir', 'x'])
    assert str(results_base(config, model, dict(input_size=(3, 16, 16)))) == '.._up_evil-16'


def test_descriptions_that_are_no_text_are_a_line(call, hub, pictures, tmp_path):
    folder = shutil.copytree(hub, tmp_path / 'hub')
    config = json.loads((folder / 'config.json').read_text())
    config['label_descriptions'] = {name: [name] for name in CLASSES}
    (folder / 'config.json').write_text(json.dumps(config))
    code, _, err = call(
        'inference', '--data-dir', pictures[0], '--checkpoint', folder, '--workers', '0', '--label-type', 'description'
    )
    assert code == 2 and 'the names of its classes are damaged' in err and err.count('\n') == 1, err


@pytest.mark.parametrize('leads', ['pool', '../elsewhere'])
def test_a_link_to_a_folder_in_a_tar_file_is_a_line(call, hub, tmp_path, leads):
    """Its pictures would be missing without a word."""
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    with tarfile.open(tmp_path / 'in.tar', 'w') as tar:
        tar.add(tmp_path / 'a.png', './pool/a.png')
        tar.add(tmp_path / 'a.png', 'data.bin')
        for name, target in (('read_me', 'again'), ('again', 'data.bin'), ('more', leads)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    code, _, err = call('inference', '--data-dir', tmp_path / 'in.tar', '--checkpoint', hub, '--workers', '0')
    assert code == 2 and 'in.tar: its member more is a link' in err and err.count('\n') == 1, err
