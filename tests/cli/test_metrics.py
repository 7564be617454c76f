"""What TensorBoard shows of a run, and the line that tells how long it still takes."""

import io
import os
import re
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from ops.eva.references import mass_loop
from PIL import Image
from runs import CLASSES, MODEL, QUICK, scalars

import evavit
from evavit.layers import EvaAttention
from evavit.training.metrics import Samples, attention_health, train_points
from evavit.training.sections import MachineConfig


def test_tensorboard_tells_how_attention_fares_and_shows_samples(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train('run', '--model-ema')
    for layer in ('blocks.0.attn', 'blocks.1.attn'):
        exact, cells, effective = (
            list(scalars(folder, f'where_attention_goes/{name}/{layer}').values())
            for name in ('mass_on_E', 'mass_on_cells', 'effective_cells')
        )
        assert len(exact) == 2
        np.testing.assert_allclose(np.add(exact, cells), 1, rtol=1e-5)
        assert all(1 <= value <= 4 for value in effective)  # 2 × 2 cells
    shares = scalars(folder, 'train/data_wait').values()
    assert all(0 <= share <= 1 for share in shares)
    assert all(0 < gib < 64 for gib in scalars(folder, 'train/memory_gib').values())
    assert set(scalars(folder, 'train/skipped').values()) == {0.0}

    events = EventAccumulator(str(folder))
    events.Reload()
    pictures = events.Images('validation')
    assert [picture.step for picture in pictures] == [6, 12]
    picture = np.asarray(Image.open(io.BytesIO(pictures[0].encoded_image_string)))
    # Images of all three classes, of which apples are red, pears green and plums blue, with captions below.
    rows, columns = picture.shape[0] // (128 + 26), picture.shape[1] // 128
    assert picture.shape == (rows * (128 + 26), 4 * 128, 3)
    places = [(row * 154, column * 128) for row in range(rows) for column in range(columns)]
    seen = [picture[top : top + 128, left : left + 128].reshape(-1, 3).mean(0) for top, left in places]
    assert [int(colour.argmax()) for colour in seen if colour.max() > 0] == sorted(
        int(colour.argmax()) for colour in seen if colour.max() > 0
    )
    assert {int(colour.argmax()) for colour in seen if colour.max() > 0} == {0, 1, 2}


@pytest.mark.parametrize('name', ['deit_tiny_patch16_224', 'eva02_tiny_patch14_224', 'eva_deit_tiny'])
def test_health_is_of_what_the_layers_are_given(name):
    """Converted ones too, with class tokens and rotary positions, as timm's blocks call them."""
    sizes, cells = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2), dict(window_size=2)
    converts = not name.startswith('eva_deit')
    model = timm.create_model(name, num_classes=3, **sizes, **({} if converts else cells)).double()
    model = evavit.convert_vit(model, **cells) if converts else model
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, EvaAttention)}
    given = {key: [] for key in layers}
    for key, layer in layers.items():
        layer.attend = lambda qkv, size, own=layer, key=key: (
            given[key].append(qkv[:2]) or type(own).attend(own, qkv, size)
        )
        layer.attend_apart = lambda q, k, v, size, own=layer, key=key: (
            given[key].append((q, k)) or type(own).attend_apart(own, q, k, v, size)
        )
    run = SimpleNamespace(
        task=SimpleNamespace(get_eval_model=lambda: model),
        machine=MachineConfig(),
        process=SimpleNamespace(device=torch.device('cpu')),
    )
    health = attention_health(run, torch.randn(3, 3, 16, 16, dtype=torch.float64))
    assert list(health) == list(layers) == ['blocks.0.attn', 'blocks.1.attn']
    for key, layer in layers.items():
        (q, k), table = given[key][0], layer.rel_pos and layer.rel_pos.relative_position_bias_table
        sizes = layer.window_size, layer.partition_grid, layer.count_cells, layer.num_prefix_tokens
        expected = mass_loop(q, k, (4, 4), layer.summary_k(), table, *sizes)
        assert list(health[key].values()) == pytest.approx(expected.mean((1, 2, 3)).tolist())


def test_a_class_without_a_name_is_called_by_its_number(train, call, images, tmp_path):
    """--class-map may name fewer classes than --num-classes counts, and its own name may be none of Unicode."""
    names = tmp_path / os.fsdecode(b'm\xe9p.txt')
    try:
        names.write_text('\n'.join(CLASSES))
    except OSError:
        pytest.skip('a file system that wants Unicode')
    folder = train('run', '--class-map', names, '--num-classes', '300', '--lr', '1e-6')
    code, out, err = call(
        'inference', '--checkpoint', folder, '--data-dir', images / 'val', '--results-dir', tmp_path, '--topk', '300'
    )
    assert code == 0 and '299' in out, err


def test_samples_are_of_every_class_right_and_wrong():
    samples = Samples(3)
    for start in range(
        0, 30, 5
    ):  # ten images of each class, one after the other; the first of each is taken for the next
        target = torch.arange(start, start + 5) // 10
        images = torch.arange(start, start + 5).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        wrong = torch.arange(start, start + 5) % 10 == 0
        output = torch.nn.functional.one_hot(torch.where(wrong, (target + 1) % 3, target), 3) * 2.0
        samples.add(images, target, output)
    numbers = {key: [int(image.mean()) for image, _, _ in kept] for key, kept in samples.found.items()}
    assert numbers == {(0, True): [1, 2], (0, False): [0], (1, True): [11, 12], (1, False): [10]} | {
        (2, True): [21, 22],
        (2, False): [20],
    }
    assert [int(image.mean()) for image in samples.first] == [*range(5), *range(10, 15), *range(20, 25)]
    spread = Samples(1000)
    assert len(spread.found) == 64 and max(label for label, _ in spread.found) > 960


def test_hyperparameters_stand_beside_the_best_metrics(train):
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.plugins.hparams import metadata

    folder = train('run')
    (path,) = folder.glob('events.out.tfevents.*')
    values = [value for event in LegacyEventFileLoader(str(path)).Load() for value in event.summary.value]
    parts = {value.tag: value.metadata.plugin_data.content for value in values if value.tag.startswith('_hparams_')}
    start = metadata.parse_session_start_info_plugin_data(parts[metadata.SESSION_START_INFO_TAG])
    assert start.hparams['lr'].number_value == 1e-3 and start.hparams['model'].string_value == 'eva_deit_tiny'
    experiment = metadata.parse_experiment_plugin_data(parts[metadata.EXPERIMENT_TAG])
    assert [info.name.tag for info in experiment.metric_infos] == ['eval/top1', 'eval/top5', 'eval/loss']
    assert metadata.SESSION_END_INFO_TAG in parts


def test_the_log_says_how_long_it_still_takes(call, images, tmp_path):
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run']
    code, out, _ = call('train', *MODEL, *QUICK, *place)
    assert code == 0
    lines = re.findall(r'epoch (\d) (\d)/6  loss [\d.]+ .*  data +\d+ %  (\d+):(\d\d):(\d\d) left', out)
    assert len(lines) == 12 and lines[-1][2:] == ('0', '00', '00')


@pytest.mark.parametrize('content', [b'\xff\xfe\xfd garbage', b'\x2a\x06\x0a\x04\x0a\x02\xff\xfe'])  # a tag of no text
def test_a_record_that_is_no_event_does_not_stop_a_resume(tmp_path, content):
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar('train/loss', 0.5, 3, walltime=7)
    size = struct.pack('<Q', len(content))
    record = [size, struct.pack('<I', masked_crc32c(size)), content, struct.pack('<I', masked_crc32c(content))]
    (tmp_path / 'events.out.tfevents.9999999999.x.1.0').write_bytes(b''.join(record))
    assert train_points(tmp_path, 3) == [('train/loss', 0.5, 7)]
