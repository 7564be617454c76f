"""What TensorBoard shows of a run, and the line that tells how long it still takes."""

import io
import re

import numpy as np
from PIL import Image
from runs import MODEL, QUICK, scalars


def test_tensorboard_tells_how_attention_fares_and_shows_samples(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train('run', '--model-ema')
    for layer in ('blocks.0.attn', 'blocks.1.attn'):
        exact, cells, effective = (
            list(scalars(folder, f'{name}/{layer}').values())
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
    assert picture.shape == (128 + 26, 4 * 128, 3)  # one batch of 4 validation images, with captions
    apple = picture[:128, :128].reshape(-1, 3).mean(0)
    assert apple[0] > apple[1] + 60 and apple[0] > apple[2] + 60  # the first image is an apple, which is red


def test_the_log_says_how_long_it_still_takes(call, images, tmp_path):
    place = ['--data-dir', images, '--output', tmp_path, '--experiment', 'run']
    code, out, _ = call('train', *MODEL, *QUICK, *place)
    assert code == 0
    lines = re.findall(r'epoch (\d) (\d)/6  loss [\d.]+ .*  data +\d+ %  (\d+):(\d\d):(\d\d) left', out)
    assert len(lines) == 12 and lines[-1][2:] == ('0', '00', '00')
