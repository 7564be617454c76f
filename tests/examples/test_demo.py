"""The page to try a model on: its functions without Gradio, and the page itself in a browser."""

import json
import shutil
import socket
import struct
import sys
import zlib

import pytest
import timm
import torch
from PIL import Image
from programs import load_program
from runs import KWARGS, SOFTMAX

import evavit
from evavit.cli import inference
from evavit.errors import UserError, run_script
from evavit.hub import save_folder
from evavit.layers import ATTENTIONS

NAMES = ['apple', 'pear', 'plum']
CARD = dict(data='none', licence='cc0-1.0', label_names=NAMES)


@pytest.fixture(scope='module')
def example():
    return load_program('examples/demo.py')


def saved(folder, kind):
    """A folder of save_folder with a small model of each kind."""
    if kind == 'own':
        model = timm.create_model('eva_deit_tiny', num_classes=3, **KWARGS)
    elif kind == 'pyramid':
        model = timm.create_model('eva_pvt_v2_b3', num_classes=3, depths=(1, 1, 1, 1), img_size=64)
    elif kind == 'other':
        model = timm.create_model('resnet10t', num_classes=3)
    else:
        model = timm.create_model('vit_tiny_patch16_224', num_classes=0 if kind == 'body' else 3, **SOFTMAX)
        if kind == 'converted':
            model = evavit.convert_vit(model, window_size=2)
    save_folder(model.eval(), str(folder), **CARD)
    return str(folder)


def opened(example, folder, kind, *flags):
    demo, _ = example.load(['--checkpoint', saved(folder, kind), '--device', 'cpu', *flags], 2)
    return demo


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / 'picture.png'
    Image.effect_noise((60, 40), 90).convert('RGB').save(path)
    return str(path)


def bomb(path):
    """A PNG of a few bytes that says it has 3.6 thousand million pixels."""
    parts = {b'IHDR': struct.pack('>IIBBBBB', 60_000, 60_000, 8, 2, 0, 0, 0), b'IDAT': zlib.compress(bytes(1000))}
    chunks = (
        struct.pack('>I', len(c)) + name + c + struct.pack('>I', zlib.crc32(name + c)) for name, c in parts.items()
    )
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(chunks))
    return str(path)


@pytest.mark.parametrize(
    'kind, names, about',
    [
        ('own', ['softmax', 'EVA'], 'trained with EVA'),
        ('converted', ['softmax', 'EVA'], 'is converted'),
        ('vit', ['softmax', 'EVA'], 'without any training'),
        ('body', ['softmax', 'EVA'], 'no classifier'),
        ('pyramid', ['softmax', 'EVA'], 'trained with EVA'),
        ('other', ['model'], 'No EVA beside it: cannot convert'),
    ],
)
def test_every_checkpoint(example, tmp_path, picture, kind, names, about):
    demo = opened(example, tmp_path / 'saved', kind)
    assert list(demo.models) == names and about in demo.about
    shown = demo.read(picture)
    assert min(shown.seen.size) >= example.SHOWN
    predicted = demo.predict(shown)
    if kind == 'body':
        assert predicted == []
    else:
        with torch.no_grad():
            expected = demo.model(shown.images).softmax(-1)[0]
        mine = predicted[list(demo.models.values()).index(demo.model)]
        assert set(mine) == set(NAMES)
        for number, name in enumerate(NAMES):
            assert mine[name] == pytest.approx(expected[number].item(), abs=1e-6)
    if kind == 'other':
        with pytest.raises(UserError, match='No attention to show: ResNet has no attention'):
            demo.look(shown, 1, 0, example.MEAN)
    else:
        assert [one.size for one in demo.look(shown, 1, 0, demo.first_query)] == [shown.seen.size] * 2


def test_predictions_are_those_of_inference(example, tmp_path, picture):
    demo = opened(example, tmp_path / 'saved', 'own')
    words = ['--data-dir', picture, '--checkpoint', str(tmp_path / 'saved'), '--topk', '3', '--device', 'cpu']
    words += ['--workers', '0', '--no-console-results', '--results-dir', str(tmp_path), '--results-file', 'found.json']
    assert run_script(inference.main, words) == 0
    (found,) = json.loads((tmp_path / 'found.json').read_text()).values()
    ours = demo.predict(demo.read(picture))[1]
    assert list(ours) == found['label'] and list(ours.values()) == pytest.approx(found['prob'], abs=1e-5)


def test_an_orientation_that_is_not_applied_is_told(example, tmp_path, picture):
    demo, exif = opened(example, tmp_path, 'own'), Image.Exif()
    exif[0x0112] = 3
    Image.open(picture).save(tmp_path / 'turned.png', exif=exif)
    straight, turned = demo.read(picture), demo.read(str(tmp_path / 'turned.png'))
    assert torch.equal(straight.images, turned.images) and not straight.note
    assert turned.note.startswith('Its EXIF orientation is not applied')


def test_attention_is_that_of_the_place(example, tmp_path, picture):
    demo = opened(example, tmp_path / 'saved', 'vit')
    shown = demo.read(picture)
    place = (0.9, 0.3)
    drawn = demo.look(shown, 2, 1, example.PATCH, place)
    for model, found in zip(demo.models.values(), drawn, strict=True):
        (one,) = evavit.attention_maps(model, shown.images, layer=1, query=(14, 4))
        sides = shown.seen.size[::-1]
        mark = tuple(min(int(part * side), side - 1) for part, side in zip(place, sides, strict=True))
        assert found == evavit.overlay_attention(shown.seen, one.grid[0, 0, 0], mark=mark)
    assert drawn[0] != demo.look(shown, 2, 1, example.PATCH, (0.1, 0.3))[0]
    assert demo.look(shown, 2, 1, example.CLASS) != demo.look(shown, 2, 1, example.MEAN)
    demo.look(shown, 1, 0, example.PATCH, (1.0, 1.0))  # a click on the very edge
    with pytest.raises(UserError, match='Click on a patch'):
        demo.look(shown, 1, 0, example.PATCH)
    with pytest.raises(UserError, match='Layer 1 has 2 heads'):
        demo.look(shown, 1, 3, example.MEAN)


def test_softmax_of_a_model_of_ours(example):
    """Where EVA sees the whole grid in its window, without biases and cells, it is softmax with the same weights."""
    kwargs = {**KWARGS, 'window_size': 4, 'partition_grid': 0, 'rel_pos_bias': False}
    model = timm.create_model('eva_deit_tiny', num_classes=3, **kwargs).eval()
    twin = example.with_softmax(model)
    assert any(isinstance(part, example.SoftmaxAttention) for part in twin.modules())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)


def test_softmax_of_a_reformer(example):
    """Where every pair of patches meets in a bucket, the two differ in a patch's weight for itself alone."""
    model = timm.create_model(
        'reformer_deit_tiny', img_size=16, patch_size=4, depth=2, num_classes=3, num_hashes=64
    ).eval()
    model.blocks[0].attn.qkv.weight.data.mul_(2)
    twin = example.with_softmax(model)
    x = torch.randn(1, 16, model.embed_dim)
    ours, theirs = (each.blocks[0].attn.attention_rows(x, [4, 4]) for each in (model, twin))
    theirs = theirs.masked_fill(torch.eye(16, dtype=torch.bool), 0)
    theirs = theirs / theirs.sum(-1, keepdim=True)
    assert theirs.std() > 0.02
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    images = torch.randn(1, 3, 16, 16)
    assert len(evavit.attention_maps(twin, images)) == 2 and twin(images).isfinite().all()


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_softmax_of_every_attention(example, attention):
    kwargs = dict(img_size=16, patch_size=4, depth=1, embed_dim=32, num_heads=2, num_classes=3)
    twin = example.with_softmax(timm.create_model(f'{attention}_deit_tiny', **kwargs).eval())
    assert twin(torch.randn(1, 3, 16, 16)).isfinite().all()


def test_bad_pictures_are_one_line(example, tmp_path):
    demo = opened(example, tmp_path / 'saved', 'vit')
    (tmp_path / 'notes.txt').write_text('no picture')
    (tmp_path / 'empty.png').touch()
    for path, words in (
        (None, 'Give a picture'),
        (str(tmp_path / 'notes.txt'), 'notes.txt is not a readable picture'),
        (str(tmp_path / 'empty.png'), 'empty.png is not a readable picture'),
        (bomb(tmp_path / 'bomb.png'), r'bomb.png is not a readable picture: .*3600000000 pixels.*[^.]\.$'),
    ):
        with pytest.raises(UserError, match=words) as error:
            demo.read(path)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind', ['own', 'vit', 'converted', 'pyramid', 'other'])
def test_cost_grows_until_it_takes_long(example, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(example, 'GROWTH', (1, 2))
    demo = opened(example, tmp_path / 'saved', kind)
    costs = list(demo.cost())
    first = demo.data_config['input_size'][-1]
    assert [(one.side, one.attention) for one in costs] == [(s, n) for s in (first, 2 * first) for n in demo.models]
    assert all(one.milliseconds > 0 and one.mebibytes > 0 for one in costs)
    assert costs[-1].mebibytes > 2 * costs[0].mebibytes
    monkeypatch.setattr(example, 'MOST_SECONDS', 0)
    assert {one.side for one in demo.cost()} == {first}
    table = example.cost_table(costs).splitlines()
    assert len(table) == 4 and table[2].startswith(f'| {first} |')


def test_cells_of_the_pages_conversion_stay_small(example, tmp_path):
    vit = opened(example, tmp_path / 'vit', 'vit').at_side(64)['EVA']
    own = opened(example, tmp_path / 'converted', 'converted').at_side(64)['EVA']
    assert vit.conversion['partition_grid'] == 6  # 16 × 16 patches in cells of 3
    assert own.conversion['partition_grid'] == 2


def test_flags(example, tmp_path, monkeypatch, capsys):
    folder = saved(tmp_path / 'saved', 'vit')
    one = opened(example, tmp_path / 'again', 'vit', '--topk', '1')
    assert [len(names) for names in one.predict(example.Picture(torch.zeros(1, 3, 16, 16), None))] == [1, 1]
    monkeypatch.setattr(example, 'QUICKSTART', tmp_path / 'nothing')
    for flags, words in (
        ([], 'make quickstart'),
        (['--data-dir', 'x', '--checkpoint', folder], '--data-dir'),
        (['--checkpoint', str(tmp_path / 'nowhere')], 'nowhere'),
        (['--window-size', '0'], '--window-size 0'),
        (['--port', 'x'], '--port'),
    ):
        assert run_script(example.main, flags) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(example, 'QUICKSTART', tmp_path / 'saved')
    monkeypatch.setitem(sys.modules, 'gradio', None)
    assert run_script(example.main, ['--device', 'cpu']) == 2
    assert "in the clone, pip install '.[demo]'" in capsys.readouterr().err


def test_a_timm_name_takes_the_published_weights(example, monkeypatch):
    """Without the network: the settings that the model would be built with."""
    asked = []

    def build_model(config, num_classes, new_head):
        asked.append((config.model, config.pretrained))
        raise UserError('far enough')

    monkeypatch.setattr(example.build, 'build_model', build_model)
    with pytest.raises(UserError, match='far enough'):
        example.load(['--model', 'vit_tiny_patch16_224', '--device', 'cpu'], 7)
    assert asked == [('vit_tiny_patch16_224', True)]
    with pytest.raises(UserError, match='timm publishes none for eva_deit_tiny'):
        example.load(['--model', 'eva_deit_tiny', '--device', 'cpu'], 7)


FLAGS = (
    '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
    '--disable-component-update --disable-sync'
)


@pytest.fixture
def browser_page(tmp_path):
    """A new page of Debian's Chromium, and the addresses that it asks for."""
    reason = 'needs evavit[browser]'
    pytest.importorskip('gradio', reason=reason)
    playwright = pytest.importorskip('playwright.sync_api', reason=reason)
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium:
        pytest.skip('needs a browser: apt-get install chromium')
    asked = []
    with playwright.sync_playwright() as start:
        context = start.chromium.launch_persistent_context(
            str(tmp_path / 'profile'), executable_path=chromium, headless=True, args=FLAGS.split()
        )
        page = context.new_page()
        page.on('request', lambda request: asked.append(request.url))
        page.set_default_timeout(30_000)
        yield page, asked
        context.close()


@pytest.mark.slow
def test_in_a_browser(example, tmp_path, picture, browser_page):
    page, asked = browser_page
    demo = opened(example, tmp_path / 'saved', 'vit')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    server = example.build_page(demo, 'a small model')
    example.launch(server, '127.0.0.1', port, prevent_thread_lock=True)
    try:
        broken = []
        page.on('pageerror', lambda error: broken.append(str(error)))
        page.goto(f'http://127.0.0.1:{port}')
        (tmp_path / 'notes.txt').write_text('no picture')

        def upload(path):
            cross = page.locator('#file button[aria-label="Remove this file"], #file button[aria-label="Clear"]')
            if cross.count():
                cross.first.click()
            page.wait_for_selector('#file input[type=file]', state='attached')
            page.set_input_files('#file input[type=file]', path)

        def source(box):
            return page.locator(f'#{box} img').first.get_attribute('src')

        def wait_for_another(box, before):
            page.wait_for_function(
                '([box, before]) => { const one = document.querySelector(`#${box} img`); '
                'return one && one.src != before }',
                arg=[box, before],
            )

        upload(picture)
        page.wait_for_selector('#map-EVA img')
        assert page.get_by_text('plum').count() == 2  # in the classes of both models
        before = source('map-softmax'), source('map-EVA')
        page.locator('#seen img').first.click(position=dict(x=50, y=60))
        for box, one in zip(('map-softmax', 'map-EVA'), before, strict=True):
            wait_for_another(box, one)
        assert page.get_by_label(example.PATCH).is_checked()
        before = source('map-EVA')
        page.locator('#map-EVA img').first.click(position=dict(x=150, y=160))  # a map can be clicked as well
        wait_for_another('map-EVA', before)

        for path, words in (
            (str(tmp_path / 'notes.txt'), 'notes.txt is not a readable picture'),
            (bomb(tmp_path / 'bomb.png'), 'bomb.png is not a readable picture'),
        ):
            upload(path)
            page.wait_for_selector(f'#message :text("{words}")')
            assert page.locator('#map-EVA img').count() == 0
        upload(picture)
        page.wait_for_selector('#map-EVA img')
        assert page.locator('#message').inner_text().strip() == ''

        page.click('#measure')
        page.wait_for_selector('#costs tr:nth-child(3)')
        page.wait_for_selector('.vega-embed canvas, .vega-embed svg')
        assert not broken
        assert {url.split('/')[2] for url in asked if not url.startswith(('data:', 'blob:'))} == {f'127.0.0.1:{port}'}
    finally:
        server.close()
