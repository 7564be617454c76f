"""Broken images are counted, named, and replaced by index and seed alone."""

import faults
import numpy as np
import pytest
import torch
from timm.data import ImageDataset, create_transform

from evavit.errors import LocalError, UserError
from evavit.training.data.images import UNREADABLE, BadImages, CheckedImages, substitute
from evavit.training.distributed import Process

ALONE = Process(torch.device('cpu'), 0, 0, 1)
BAD = faults.bad_files()


@pytest.fixture
def folder(tmp_path):
    """A reader over 30 images, of which 4, 5, 6 and 20 are broken in different ways."""
    (tmp_path / 'a').mkdir()
    for number in range(30):
        faults.picture(seed=number).save(tmp_path / 'a' / f'{number:02d}.png')
    for number, name in ((4, 'truncated.png'), (5, 'zeros.jpg'), (6, 'bomb.png'), (20, 'text.png')):
        (tmp_path / 'a' / f'{number:02d}.png').write_bytes(BAD[name][0])
    return tmp_path


def pixels(dataset, index):
    image, target = dataset[index]
    return np.asarray(image).tobytes(), target


def test_the_replacement_depends_on_index_and_seed_alone(folder):
    def run(seed, order):
        dataset = CheckedImages(ImageDataset(str(folder)), 'RGB', 1.0, seed)
        shown = {index: pixels(dataset, index) for index in order}
        assert dataset.bad.count == 4
        return [shown[index] for index in sorted(shown)]

    first = run(0, range(30))
    torch.rand(5), np.random.rand(3)
    assert first == run(0, reversed(range(30)))
    assert first != run(1, range(30))
    good = CheckedImages(ImageDataset(str(folder)), 'RGB', 1.0, 0)
    for index in (4, 5, 6, 20):
        chain = [substitute(index, attempt, 0, 30) for attempt in range(1, 10)]
        source = next(candidate for candidate in chain if candidate not in (4, 5, 6, 20))
        assert first[index] == pixels(good, source)


def test_replacements_are_spread_evenly():
    drawn = [substitute(index, 1, 7, 10) for index in range(5000)]
    assert min(np.bincount(drawn, minlength=10)) > 400
    assert substitute(3, 1, 0, 1000) == 511  # fixed: a run goes on with the same images in later versions


def test_validation_leaves_them_out(folder):
    dataset = CheckedImages(ImageDataset(str(folder)), 'RGB', 1.0)
    targets = [dataset[index][1] for index in range(30)]
    assert [index for index, target in enumerate(targets) if target == UNREADABLE] == [4, 5, 6, 20]


@pytest.mark.parametrize('workers', [0, 2])
def test_workers_count_each_image_once_and_name_it(folder, workers):
    dataset = CheckedImages(ImageDataset(str(folder)), 'RGB', 0.2, 0)
    dataset.transform = create_transform((3, 16, 16))
    order = [*range(30), 4, 5]  # drawn again
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, sampler=order, num_workers=workers)
    for epoch in range(2):
        dataset.bad.begin()
        for _ in loader:
            pass
        assert dataset.bad.review(ALONE) == 4
        names = {index: line.split('\n')[0].rsplit('/', 1)[1] for index, line in dataset.bad.found.items()}
        assert names == {4: '04.png', 5: '05.png', 6: '06.png', 20: '20.png'}
        assert len(dataset.bad.reported) == 4, epoch


def test_more_than_allowed_stop_the_run():
    bad = BadImages(1000, 0.002)
    for index in (1, 2, 2, 1):
        bad.mark(index, f'{index}.png', 'torn')
    assert bad.limit == 2 and bad.review(ALONE) == 2
    bad.mark(3, '3.png', 'torn')
    told = r'3.png is not a readable image \(torn\); 3 of 1000 .*0.002 allows 2; .* more \(--max-bad-images 0.01\)$'
    with pytest.raises(UserError, match=told):
        bad.review(ALONE)
    bad.begin()
    assert bad.review(ALONE) == 0


def test_names_are_warned_of_without_their_control_characters(caplog):
    """Whatever handles the log: the scripts' own handler would write them out by itself."""
    bad = BadImages(10, 1.0)
    bad.mark(3, 'a\x1b[2J\nepoch 7: done.png', 'no image')
    with caplog.at_level('WARNING', 'evavit'):
        bad.review(ALONE)
    (record,) = caplog.records
    assert record.getMessage().startswith('warning: a\\x1b[2J\\nepoch 7: done.png is not a readable image')


def test_the_rest_of_an_epoch_knows_its_bad_images():
    before, after = BadImages(3000, 1.0), BadImages(3000, 1.0)
    for index in range(1200):  # more than the names that are kept
        before.mark(index, f'{index}.png', 'torn')
    assert before.review(ALONE) == 1200
    after.begin(before.found)
    assert after.found == before.found and not after.count
    for index in (3, 1100, 1500):  # two were met before the run was stopped
        after.mark(index, f'{index}.png', 'torn')
    assert after.review(ALONE) == 1201 and after.count == 1
    assert after.reported - {*before.found.values()} == {'1500.png\ntorn'}  # by a warning
    after.begin()
    assert after.review(ALONE) == 0


def test_long_names_and_many_images_do_not_harm():
    bad = BadImages(5000, 1.0)
    for index in range(1500):
        bad.mark(index, f'{"x" * 700}/{index}.png', 'torn')
    assert bad.review(ALONE) == 1500
    names = [line.split('\n')[0] for line in bad.found.values() if line]
    assert len(names) == BadImages.LINES
    assert all(name.startswith('...') and name.endswith('.png') for name in names)


def test_a_data_set_that_is_gone_stops_at_once(folder):
    dataset = CheckedImages(ImageDataset(str(folder)), 'RGB', 1.0, 0)
    for image in (folder / 'a').iterdir():
        image.unlink()
    with pytest.raises(LocalError, match=r'No such file or directory.*9 others'):
        dataset[0]
