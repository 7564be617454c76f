"""validate.py: the figures of the run, every image once, the columns of timm."""

import csv
import json
import shutil

import pytest
import timm
import torch
from PIL import Image
from runs import CLASSES, KWARGS, MODEL, QUICK, SOFTMAX, load_script, together, words, write_shards

import evavit
from evavit.hub import save_folder
from evavit.models import read_weights, write_weights

COLUMNS = ['model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation']
SOFT = ['--model', 'vit_tiny_patch16_224', '--model-kwargs', *(f'{key}={value}' for key, value in SOFTMAX.items())]
HUB = dict(label_names=[*CLASSES], data='fruit', licence='mit')


@pytest.fixture
def judged(call, images, tmp_path):
    def judged(*flags, data=images):
        path = tmp_path / 'result.json'
        code, out, err = call('validate', '--data-dir', data, '--workers', '0', '--results-file', path, *flags)
        assert code == 0, out + err
        return json.loads(path.read_text())

    return judged


def last_row(folder):
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))[-1]


def test_checkpoints_need_no_other_flag(train, judged):
    folder = train('run')
    expected = last_row(folder)
    for name in ('last.pth.tar', 'last.safetensors'):
        row = judged('--checkpoint', folder / name)
        assert row['top1'] == pytest.approx(float(expected['eval_top1']), abs=1e-4)
        assert row['loss'] == pytest.approx(float(expected['eval_loss']), abs=1e-5)
        assert row['images'] == 13 and row['img_size'] == 16
        assert list(row)[:9] == COLUMNS and row['top1'] + row['top1_err'] == pytest.approx(100)


def test_cells_of_a_converted_run_stay_at_another_size(train, judged, tmp_path):
    """Those that it chose for its own images, as load_converted has them and a folder of save_folder says them."""
    sizes = [f'{key}={value}' for key, value in SOFTMAX.items()]
    parent = ['--model', 'vit_tiny_patch16_224', '--model-kwargs', *sizes]
    torch.manual_seed(0)
    vit = timm.create_model(parent[1], num_classes=3, **SOFTMAX)
    for parameter in vit.parameters():  # as if trained: attentions and answers are not near uniform
        torch.nn.init.normal_(parameter, std=0.3)
    write_weights(vit.state_dict(), tmp_path / 'vit.safetensors')
    parent += ['--initial-checkpoint', tmp_path / 'vit.safetensors']
    folder = train('run', *words('--epochs 1 --lr 0 --convert eva --convert-kwargs window_size=2'), model=parent)
    save_folder(evavit.load_converted(folder), tmp_path / 'hub', **HUB)
    sized = ['--img-size', '32']  # 8 × 8 tokens, for which convert_vit would choose 3 × 3 cells, of 4 × 4 tokens 2 × 2
    run, hub = (judged('--checkpoint', place, *sized)['loss'] for place in (folder, tmp_path / 'hub'))
    asked = judged('--checkpoint', folder, *sized, '--convert-kwargs', 'window_size=2', 'partition_grid=3')['loss']
    assert run == pytest.approx(hub, abs=1e-6) and abs(run - asked) > 1e-5


def test_results_as_csv(train, call, images, tmp_path):
    folder = train('run')
    path = tmp_path / 'deep' / 'result.csv'
    code, _, err = call(
        'validate',
        '--checkpoint',
        folder / 'last.pth.tar',
        '--data-dir',
        images,
        '--workers',
        '0',
        '--results-file',
        path,
    )
    assert code == 0, err
    with open(path, newline='') as file:
        (row,) = csv.DictReader(file)
    assert list(row)[:9] == COLUMNS and row['model'] == 'eva_deit_tiny'


def test_every_image_counts_once(train, images, judged, tmp_path):
    folder = train('run')
    whole = judged('--checkpoint', folder / 'last.pth.tar', '-b', '64')
    uneven = judged('--checkpoint', folder / 'last.pth.tar', '-b', '5')
    flags = ['--checkpoint', folder / 'last.pth.tar', '--data-dir', images, *words('--workers 0 -b 3 --device cpu')]
    done = together(load_script('validate').main, *flags, '--results-file', tmp_path / 'two.json')
    assert done.returncodes == [0, 0], done.stderr
    two = json.loads((tmp_path / 'two.json').read_text())
    for row in (uneven, two):
        assert row['images'] == 13 and row['top1'] == whole['top1']
        assert row['loss'] == pytest.approx(whole['loss'], abs=1e-5)


def test_every_image_of_shards_counts_once(train, images, judged, tmp_path):
    """Of shards of two sizes by one process, two and three, of which one has none."""
    pytest.importorskip('webdataset')
    folder = train('run')
    whole = judged('--checkpoint', folder / 'last.pth.tar')
    files = ((path, CLASSES.index(path.parent.name)) for path in sorted((images / 'val').rglob('*.png')))
    split = write_shards(tmp_path / 'shards', files, (9, 4))
    place = ['--checkpoint', folder / 'last.pth.tar', '--dataset', 'wds/x', '--data-dir', tmp_path / 'shards']
    flags = ['--split', split, *words('--workers 0 -b 3 --device cpu'), '--results-file', tmp_path / 'shards.json']
    for processes in (1, 2, 3):
        done = together(load_script('validate').main, *place, *flags, processes=processes)
        assert done.returncodes == [0] * processes, done.stderr
        row = json.loads((tmp_path / 'shards.json').read_text())
        assert row['images'] == 13 and row['top1'] == whole['top1']
        assert row['loss'] == pytest.approx(whole['loss'], abs=1e-5)


@pytest.mark.parametrize('start', ['checkpoint', 'model'])
def test_damaged_names_of_a_folder_for_the_hub_are_a_line(call, images, judged, tmp_path, start):
    """As inference.py refuses them: labels might mean other classes."""
    folder = save_folder(timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS), tmp_path / 'hub', **HUB)
    config = json.loads((folder / 'config.json').read_text())
    flags = ['--checkpoint', folder] if start == 'checkpoint' else ['--model', f'local-dir:{folder}', '--pretrained']
    (tmp_path / 'map.txt').write_text('\n'.join(CLASSES))
    for names, fault in (
        (['a', 'b'], '2 different names for 3 classes'),
        ([*CLASSES[:2], CLASSES[0]], '2 different names for 3 classes'),
        ([], '0 different names for 3 classes'),
        ([*CLASSES[:2], None], 'damaged, no list of names'),
        ('apple', 'damaged, no list of names'),
    ):
        (folder / 'config.json').write_text(json.dumps({**config, 'label_names': names}))
        code, _, err = call('validate', '--data-dir', images, '--workers', '0', *flags)
        assert code == 2 and f'label_names in its config.json: {fault}; give --class-map' in err, err
        assert err.count('\n') == 1
    judged(*flags, '--class-map', tmp_path / 'map.txt')
    for names in (CLASSES, None):
        (folder / 'config.json').write_text(json.dumps({**config, 'label_names': names}))
        judged(*flags)


def test_a_folder_of_some_classes_keeps_their_indices(train, images, judged, tmp_path):
    folder = train('run')
    one = tmp_path / 'one'
    shutil.copytree(images / 'val' / CLASSES[2], one / CLASSES[2])
    row = judged('--checkpoint', folder / 'last.pth.tar', data=one)
    assert row['images'] == 4
    parts = [judged('--checkpoint', folder / 'last.pth.tar', data=_only(images, tmp_path, name)) for name in CLASSES]
    whole = judged('--checkpoint', folder / 'last.pth.tar')
    total = sum(part['loss'] * part['images'] for part in parts)
    assert total / 13 == pytest.approx(whole['loss'], abs=1e-5)


def test_a_class_map_is_compared_with_the_classes_of_the_checkpoint(train, images, judged, call, tmp_path):
    folder, turned = train('run'), tmp_path / 'map.txt'
    turned.write_text('\n'.join(reversed(CLASSES)))
    save_folder(timm.create_model(MODEL[1], num_classes=3, **KWARGS), tmp_path / 'hub', **HUB)
    file = ['--checkpoint', tmp_path / 'hub' / 'model.safetensors', *MODEL, '--num-classes', '3']
    for flags in (['--checkpoint', folder], ['--checkpoint', tmp_path / 'hub'], file):
        code, _, err = call('validate', '--data-dir', images, '--workers', '0', *flags, '--class-map', turned)
        assert (
            code == 2
            and 'plum is class 0 of this data, and class 2 of the checkpoint; give' in err
            and err.count('\n') == 1
        ), err
    turned.write_text('\n'.join(CLASSES))
    assert judged('--checkpoint', folder, '--class-map', turned) == judged('--checkpoint', folder)


def test_a_file_of_a_folder_is_of_the_model_of_its_config(judged, tmp_path):
    """With --model and without: a conversion without weights of its own is not lost, nor arguments of the model."""
    torch.manual_seed(0)
    vit = timm.create_model(SOFT[1], num_classes=3, **SOFTMAX)
    own = timm.create_model(MODEL[1], num_classes=3, **{**KWARGS, 'proposal_scale': 4.0})
    for model, flags in (
        (evavit.convert_vit(vit, attention='local', window_size=2), SOFT),
        (own, MODEL),
    ):
        for parameter in model.parameters():  # as if trained
            torch.nn.init.normal_(parameter, std=0.3)
        folder = save_folder(model.eval(), tmp_path / flags[1], **HUB)
        file = folder / 'model.safetensors'
        ways = [[folder], [folder, *flags], [file, *flags], [file]]
        first, *others = (judged('--checkpoint', *way)['loss'] for way in ways)
        assert others == [first] * 3
        write_weights(read_weights(file), tmp_path / 'plain.safetensors')
        plain = judged('--checkpoint', tmp_path / 'plain.safetensors', *flags, '--num-classes', '3')['loss']
        assert plain != pytest.approx(first, abs=1e-4)


def _only(images, tmp_path, name):
    shutil.copytree(images / 'val' / name, tmp_path / f'only-{name}' / name)
    return tmp_path / f'only-{name}'


def test_flags_win_over_the_checkpoint(train, judged):
    folder = train('run')
    row = judged('--checkpoint', folder / 'last.pth.tar', '--crop-pct', '0.5', '--interpolation', 'nearest')
    assert row['crop_pct'] == 0.5 and row['interpolation'] == 'nearest'


def test_weights_of_other_origin(judged, tmp_path):
    import timm

    kwargs = dict(item.split('=') for item in MODEL[3:])
    model = timm.create_model(
        'vit_tiny_patch16_224', img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )
    torch.save(model.state_dict(), tmp_path / 'plain.pth')
    kwargs = [f'{name}={kwargs[name]}' for name in ('img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads')]
    row = judged(
        '--model',
        'vit_tiny_patch16_224',
        '--model-kwargs',
        *kwargs,
        '--num-classes',
        '3',
        '--checkpoint',
        tmp_path / 'plain.pth',
    )
    assert row['images'] == 13 and 0 <= row['top1'] <= 100


@pytest.mark.parametrize('script', ['validate', 'inference', 'export'])
def test_arguments_of_a_conversion_that_is_none_are_refused(call, images, tmp_path, script):
    """As train.py does: the figures would be those of softmax."""
    model = timm.create_model('vit_tiny_patch16_224', num_classes=3, **SOFTMAX)
    torch.save(model.state_dict(), tmp_path / 'plain.pth')
    flags = [*SOFT, '--num-classes', '3', '--checkpoint', tmp_path / 'plain.pth', '--convert-kwargs', 'window_size=2']
    place = [tmp_path / 'plain.onnx'] if script == 'export' else ['--data-dir', images]
    code, _, err = call(script, *place, *flags)
    assert (code, err) == (2, 'error: convert_kwargs does nothing without convert; add --convert\n')


@pytest.mark.parametrize('name, size', [('eva_deit_tiny', 24), ('softmax_deit_tiny', 16), ('vit_tiny_patch16_224', 24)])
def test_weights_are_fitted_as_in_training_and_export(judged, tmp_path, name, size):
    """Another image size, and softmax weights in an EVA model."""
    import timm

    kwargs = dict(item.split('=') for item in MODEL[3:])
    kwargs = {key: int(kwargs[key]) for key in ('patch_size', 'embed_dim', 'depth', 'num_heads')}
    torch.save(timm.create_model(name, img_size=16, num_classes=3, **kwargs).state_dict(), tmp_path / 'file.pth')
    row = judged(
        '--model',
        name.replace('softmax', 'eva'),
        '--img-size',
        size,
        '--num-classes',
        '3',
        '--model-kwargs',
        *(f'{key}={value}' for key, value in kwargs.items()),
        '--checkpoint',
        tmp_path / 'file.pth',
    )
    assert row['img_size'] == size and row['images'] == 13


def test_metrics_of_classes_calibration_and_latency(train, images, judged, call, tmp_path):
    folder = train('run')
    flags = ['--metrics-avg', 'weighted', '--report-dir', tmp_path / 'report', '--latency', '-b', '5']
    row = judged('--checkpoint', folder / 'last.pth.tar', *flags)
    assert row['weighted_recall'] == pytest.approx(row['top1'], abs=1e-3)  # by definition
    assert 0 <= row['weighted_precision'] <= 100 and 0 <= row['weighted_f1_score'] <= 100 and 0 <= row['ece'] <= 100
    assert row['latency_ms'] > 0 and row['batch_latency_ms'] > 0
    with open(tmp_path / 'report' / 'classes.csv', newline='') as file:
        assert [(line['class'], line['images']) for line in csv.DictReader(file)] == [
            *zip(CLASSES, ('5', '4', '4'), strict=True)
        ]
    plain = judged('--checkpoint', folder / 'last.pth.tar')
    assert list(plain)[-1] == 'ece' and plain['ece'] == pytest.approx(row['ece'], abs=1e-3)
    flags = ['--results-file', tmp_path / 'two.json', '--report-dir', tmp_path / 'two', '--metrics-avg', 'weighted']
    place = ['--checkpoint', folder / 'last.pth.tar', '--data-dir', images]
    done = together(load_script('validate').main, *place, '--workers', '0', '-b', '3', '--device', 'cpu', *flags)
    assert done.returncodes == [0, 0], done.stderr
    assert 'top-1' in done.stdout and 'top-5' not in done.stdout  # of three classes
    assert json.loads((tmp_path / 'two.json').read_text())['weighted_f1_score'] == row['weighted_f1_score']
    assert (tmp_path / 'two' / 'confusion.csv').read_text() == (tmp_path / 'report' / 'confusion.csv').read_text()


@pytest.mark.parametrize('name', ['classes.csv', 'confusion.csv', 'confusion.png', 'calibration.csv'])
def test_a_report_takes_no_other_file_s_place(call, images, tmp_path, name):
    """An earlier report's it takes."""
    model = timm.create_model(MODEL[1], num_classes=3, **KWARGS)
    folder = save_folder(model, tmp_path / 'hub', **HUB)
    flags = ['--checkpoint', folder, '--data-dir', images, '--workers', '0', '--report-dir', tmp_path / 'report']
    assert [call('validate', *flags)[0] for _ in range(2)] == [0, 0]
    path = tmp_path / 'report' / name
    contents = ['label,mine\n0,1\n']
    if name.endswith('.png'):
        Image.new('RGB', (4, 4)).save(path)
        contents = [path.read_bytes().decode('latin-1')]
    elif name != 'confusion.csv':  # a column of the user's
        contents += [ADDED_CSV[1](''.join(path.read_text().splitlines(keepends=True)[:2]))]
    for content in contents:
        path.write_text(content, encoding='latin-1')
        before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
        code, _, err = call('validate', *flags)
        assert code == 2 and err.startswith(f'error: {path} is there') and err.count('\n') == 1, err
        assert before == {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert f'--report-dir {path}: is no folder' in call('validate', *flags[:-1], path)[2]
    if name.endswith('.csv'):  # nor do the results of the same run
        path.unlink()
        code, _, err = call('validate', *flags, '--results-file', path)
        assert code == 2 and f'--results-file {path}: a table of the report has that name' in err, err


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_named(call, images, tmp_path, value):
    import timm

    kwargs = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    state = timm.create_model('softmax_deit_tiny', **kwargs).state_dict()
    state['blocks.0.mlp.fc1.weight'][3, 4] = value
    torch.save(state, tmp_path / 'bad.pth')
    model = ['--model', 'softmax_deit_tiny', '--model-kwargs', *(f'{key}={item}' for key, item in SOFTMAX.items())]
    model += ['--num-classes', '3']
    place = ['--data-dir', images, '--output', tmp_path / 'out']
    for script, *flags in (
        ('validate', '--checkpoint', tmp_path / 'bad.pth', '--data-dir', images, '--workers', '0'),
        ('export', tmp_path / 'model.onnx', '--checkpoint', tmp_path / 'bad.pth'),
        ('train', *QUICK, *place, '--initial-checkpoint', tmp_path / 'bad.pth'),
        ('train', *QUICK, *place, '--pretrained-path', tmp_path / 'bad.pth'),
    ):
        code, _, err = call(script, *flags, *model)
        assert code == 2 and err.count('\n') == 1, err
        assert f'{tmp_path}/bad.pth: its weights are not finite (blocks.0.mlp.fc1.weight has NaN' in err
    assert not (tmp_path / 'model.onnx').exists() and not (tmp_path / 'out').exists()


def test_outputs_that_are_not_finite_are_no_result(call, images, tmp_path):
    import timm

    kwargs = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    state = timm.create_model('softmax_deit_tiny', **kwargs).state_dict()
    state['head.weight'].fill_(3e38)
    torch.save(state, tmp_path / 'large.pth')
    model = ['--model', 'softmax_deit_tiny', '--model-kwargs', *(f'{key}={item}' for key, item in SOFTMAX.items())]
    flags = ['--num-classes', '3', '--data-dir', images, '--workers', '0', '--results-file', tmp_path / 'val.json']
    code, _, err = call('validate', *model, *flags, '--checkpoint', tmp_path / 'large.pth')
    assert code == 2 and 'loss ' in err and 'no result; the outputs of the model are not finite in float32' in err, err
    assert not (tmp_path / 'val.json').exists()


def test_a_latency_that_needs_more_memory_than_there_is(train, call, images):
    flags = ['--checkpoint', train('run'), '--data-dir', images, '--workers', '0', '--device', 'cpu']
    code, _, err = call('validate', *flags, '--latency', '-b', 10**12)
    assert code == 2 and 'no memory is left' in err and 'lower the batch size (-b)' in err and err.count('\n') == 1, err


def test_weights_that_change_while_they_are_read(train, call, images, tmp_path, monkeypatch):
    """As the best of a run that goes on: no results tell of other weights than were judged."""
    run, live = train('run'), tmp_path / 'live.safetensors'
    shutil.copy(run / 'last.safetensors', live)
    program = load_script('validate')
    build = program.build.build_model

    def replaced(*args, **kwargs):
        model = build(*args, **kwargs)
        write_weights(model.state_dict(), live)
        return model

    monkeypatch.setattr(program.build, 'build_model', replaced)
    flags = ['--checkpoint', live, '--data-dir', images, '--workers', '0', '--results-file', tmp_path / 'val.csv']
    code, _, err = call('validate', *flags)
    assert code == 2 and f'{live}: another file took its place while it was read; start again' in err, err
    assert not (tmp_path / 'val.csv').exists()


TIMM = (
    'model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation\nresnet18,70,30,90,10,12,224,1,x\n'
)
ADDED_CSV = (  # a row of another run, a column of the user's
    lambda text: text + text.splitlines()[-1] + '\n',
    lambda text: ''.join(f'{line},{word}\n' for line, word in zip(text.splitlines(), ('notes', 'good'), strict=True)),
)
ADDED_JSON = (
    lambda text: json.dumps({**json.loads(text), 'notes': 'good'}),
    lambda text: json.dumps({**json.loads(text), 'checkpoint': {'notes': 'good'}}),
    lambda text: json.dumps({'a': json.loads(text), 'b': json.loads(text)}),
)
OTHERS = [('val.csv', 'model,accuracy\nx,1\n'), ('val.csv', TIMM), ('val.json', '{"mine": 1}')]


def test_results_below_a_file_are_told_before_the_work(train, call, images, tmp_path):
    (tmp_path / 'file').touch()
    run = train('run')
    for name in ('--results-file', tmp_path / 'file' / 'val.csv'), ('--report-dir', tmp_path / 'file' / 'report'):
        code, out, err = call('validate', '--checkpoint', run, '--data-dir', images, '--workers', '0', *name)
        assert code == 2 and err.count('\n') == 1 and 'file is no folder); name another place' in err, err
        assert 'top-1' not in out


@pytest.mark.parametrize('name, content', OTHERS)
def test_a_results_file_of_others_is_not_replaced(train, call, images, tmp_path, name, content):
    path = tmp_path / name
    flags = ['--checkpoint', train('run'), '--data-dir', images, '--workers', '0', '--results-file', path]
    assert call('validate', *flags)[0] == 0
    target = path.rename(tmp_path / f'elsewhere{path.suffix}')
    path.symlink_to(target)
    assert call('validate', *flags)[0] == 0 and path.is_symlink()  # what the link leads to is written anew
    written = path.read_text()
    more = {'.csv': ADDED_CSV, '.json': ADDED_JSON}[path.suffix]
    for other in [content, *(add(written) for add in more)]:
        path.write_text(other)
        code, _, err = call('validate', *flags)
        assert code == 2 and f'{path} is there, with other content' in err and err.count('\n') == 1, err
        assert path.read_text() == other
