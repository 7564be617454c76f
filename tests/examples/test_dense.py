"""The examples of dense prediction learn, at small size, with both families and each head."""

import json

import pytest
import timm
import torch
from programs import load_program

import evavit
from evavit.errors import run_script
from evavit.hub import save_folder
from evavit.models import write_weights

pytest.importorskip('segmentation_models_pytorch', reason='needs evavit[dense]')
pytest.importorskip('skimage', reason='needs evavit[dense]')
PYRAMID = dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4))
PLAIN = dict(depth=2, embed_dim=48, num_heads=3)
NORMAL = dict(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])


segment, detect = load_program('examples/segment.py'), load_program('examples/detect.py')


@pytest.mark.parametrize(
    'decoder, kwargs',
    [('Unet', dict(decoder_channels=(32, 32, 16, 16, 8))), ('FPN', dict(decoder_pyramid_channels=64))],
)
def test_segmentation_learns_coins(decoder, kwargs):
    import segmentation_models_pytorch as smp

    image, mask = segment.coins()
    model = smp.create_model(decoder, 'tu-eva_pvt_v2_b3', encoder_weights=None, classes=1, **kwargs, **PYRAMID)
    losses = segment.train(model, image, mask, steps=20, batch=2, lr=3e-3, side=96)
    assert losses[-1] < losses[0] / 2
    everything = mask[:, mask.shape[1] // 2 :].mean().item()
    assert segment.overlap(model, image, mask) > everything + 0.2


def test_every_coin_has_its_box():
    _, mask = segment.coins()
    (target,) = detect.targets(mask[None])
    assert len(target['boxes']) == 24 and (target['labels'] == 1).all()
    sides = target['boxes'][:, 2:] - target['boxes'][:, :2]
    assert sides.min() > 30 and sides.max() < 70


@pytest.mark.parametrize(
    'model, kwargs', [('eva_pvt_v2_b3', PYRAMID), ('eva_deit_tiny', PLAIN), ('vit_tiny_patch16_224', PLAIN)]
)
@pytest.mark.parametrize('detector, steps', [('retinanet', 15), ('faster_rcnn', 6)])
def test_detection_learns_coins(model, kwargs, detector, steps):
    image, mask = segment.coins()
    network = detect.build(model, detector, side=96, out_channels=32, **kwargs)
    losses = detect.train(network, image, mask, steps=steps, side=96, lr=1e-3)
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    assert all(p.grad is not None for p in network.backbone.parameters() if p.requires_grad)
    with torch.no_grad():
        (found,) = network.eval()([image])
    assert found['boxes'].shape[1] == 4 and torch.isfinite(found['boxes']).all()


def test_weights_of_a_run(tmp_path, monkeypatch, capsys):
    """Of the encoder's own model, and of a converted ViT, which names itself."""
    import segmentation_models_pytorch as smp

    for name, kwargs in (('eva_pvt_v2_b3', PYRAMID), ('eva_deit_tiny', PLAIN)):
        trained = timm.create_model(name, num_classes=3, **kwargs).state_dict()
        write_weights(trained, tmp_path / 'own.safetensors', dict(args=json.dumps(dict(model=name, **NORMAL))))
        file, key = str(tmp_path / 'own.safetensors'), 'patch_embed.proj.weight'
        detector = detect.build(name, 'retinanet', side=96, weights=file, **kwargs)
        assert detector.transform.image_mean == NORMAL['mean'] and detector.transform.image_std == NORMAL['std']
        state = detector.backbone.features.state_dict()
        assert torch.equal(state.get(f'model.{key}', state.get(key)), trained[key])
        if name == 'eva_pvt_v2_b3':
            unet = smp.create_model('Unet', f'tu-{name}', **segment.weights(file), **kwargs)
            assert torch.equal(unet.encoder.model.state_dict()[key], trained[key])
            images = torch.rand(1, 3, 4, 4)
            mean, std = (torch.tensor(NORMAL[x]).view(3, 1, 1) for x in ('mean', 'std'))
            torch.testing.assert_close(segment.normalized(images, unet), (images - mean) / std)
    kwargs = dict(embed_dim=48, depth=2, num_heads=3)
    vit = evavit.convert_vit(timm.create_model('vit_tiny_patch16_224', num_classes=3, **kwargs))
    args = dict(model='vit_tiny_patch16_224', convert='eva', num_classes=3, model_kwargs=kwargs, **NORMAL)
    write_weights(vit.state_dict(), tmp_path / 'model_best.safetensors', dict(args=json.dumps(args)))
    model = detect.build(None, 'retinanet', side=96, weights=str(tmp_path)).eval()
    assert model.transform.image_mean == NORMAL['mean'] and model.transform.image_std == NORMAL['std']
    for path in (tmp_path, tmp_path / 'model_best.safetensors'):
        with pytest.raises(ValueError, match='a converted run knows its model; leave --model out'):
            detect.build('vit_tiny_patch16_224', 'retinanet', side=96, weights=str(path))
        told = 'a converted ViT, which is no pyramid; put evavit.load_converted in'
        test_mistakes(capsys, 'segment', ['--pretrained-path', str(path)], [told])
    assert torch.equal(model.backbone.features.model.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)
    with torch.no_grad():
        assert model([torch.rand(3, 100, 140)])[0]['boxes'].shape[1] == 4


def test_images_are_those_of_a_file_of_timms_own_model(tmp_path):
    """The mean and std of a folder of save_folder, for which timm does not look."""
    import segmentation_models_pytorch as smp

    def saved(name, **kwargs):
        model = timm.create_model(name, num_classes=2, **kwargs)
        folder = save_folder(model, tmp_path / name, data='x', licence='mit', data_config=NORMAL)
        return str(folder / 'model.safetensors')

    name = 'vit_tiny_patch16_224'
    detector = detect.build(name, 'retinanet', side=96, weights=saved(name, **PLAIN), **PLAIN)
    assert detector.transform.image_mean == NORMAL['mean'] and detector.transform.image_std == NORMAL['std']
    unet = smp.create_model('Unet', 'tu-resnet10t', **segment.weights(saved('resnet10t')))
    mean, std = (torch.tensor(NORMAL[x]).view(3, 1, 1) for x in ('mean', 'std'))
    images = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(segment.normalized(images, unet), (images - mean) / std)


@pytest.mark.parametrize(
    'name, flags, words',
    [
        ('segment', ['--encoder', 'tu-eva_deit_tiny'], ['tu-eva_deit_tiny', 'a pyramid is needed']),
        ('segment', ['--encoder', 'tu-eva_pvt_v2_b9'], ['eva_pvt_v2_b9']),
        ('segment', ['--encoder', 'tu-swin_tiny_patch4_window7_224'], ['swin_tiny', 'Input height (128)']),
        ('segment', ['--encoder', 'tu-nest_tiny'], ['nest_tiny', 'a pyramid is needed']),
        *(
            (name, ['--steps', text], ['--steps', text])
            for name in ('segment', 'detect')
            for text in ('0', '2_0', '２')
        ),
        *((name, ['--step', '3'], ['--step', 'did you mean --steps?']) for name in ('segment', 'detect')),
        ('segment', ['--pretrained-path', 'x.safetensors'], ['--pretrained-path x.safetensors', 'no such checkpoint']),
        ('detect', ['--model', 'eva_deit_tin'], ['eva_deit_tin']),
        ('detect', ['--pretrained-path', 'no/run'], ['--pretrained-path no/run', 'no such folder']),
        ('detect', ['--model', 'linformer_deit_tiny'], ['linformer', 'one size']),
        ('detect', ['--model', 'beit_base_patch16_224'], ['beit_base', 'Input height (192)']),
        (
            'detect',
            ['--model', 'vit_tiny_patch16_224', '--pretrained-path', 'no/run'],
            ['no/run', 'no such checkpoint'],
        ),
        (
            'segment',
            ['--encoder', 'tu-eva_deit_tiny', '--pretrained-path', 'no/run'],
            ['tu-eva_deit_tiny', 'no/run', 'a pyramid is needed'],
        ),
    ],
)
def test_mistakes(capsys, name, flags, words):
    assert run_script({'segment': segment, 'detect': detect}[name].main, flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and all(word in line for word in words), line


@pytest.mark.parametrize('name', ['segment', 'detect'])
def test_weights_that_are_not_finite_are_a_line(capsys, tmp_path, name):
    state = timm.create_model('eva_pvt_v2_b3', num_classes=0).state_dict()
    next(iter(state.values())).view(-1)[0] = float('nan')
    write_weights(state, tmp_path / 'nan.safetensors')
    model = [] if name == 'segment' else ['--model', 'eva_pvt_v2_b3']
    test_mistakes(capsys, name, [*model, '--pretrained-path', str(tmp_path / 'nan.safetensors')], ['are not finite'])


@pytest.mark.parametrize(
    'name, flag, model', [('segment', '--encoder=tu-', 'pvt_v2_b0'), ('detect', '--model=', 'vit_tiny_patch16_224')]
)
def test_weights_that_lack_part_of_the_body_are_a_line(capsys, tmp_path, name, flag, model):
    """Of timm's models, of which timm begins those at random."""
    state = timm.create_model(model, num_classes=3).state_dict()
    part = {key: value for key, value in state.items() if not key.startswith(('blocks.9.', 'stages.3.'))}
    for weights in (part, {f'encoder.{key}': value for key, value in state.items()}):
        write_weights(weights, tmp_path / 'part.safetensors')
        flags = [flag + model, '--pretrained-path', str(tmp_path / 'part.safetensors')]
        test_mistakes(capsys, name, flags, ['part.safetensors does not fit the model: it lacks'])


def test_weights_of_timm_with_other_classes_or_none(tmp_path):
    for classes in (3, 0):
        trained = timm.create_model('vit_tiny_patch16_224', num_classes=classes, **PLAIN).state_dict()
        write_weights(trained, tmp_path / 'vit.safetensors')
        file = str(tmp_path / 'vit.safetensors')
        state = detect.build('vit_tiny_patch16_224', 'retinanet', side=96, weights=file, **PLAIN).state_dict()
        key = 'blocks.1.mlp.fc2.weight'
        assert torch.equal(state[f'backbone.features.model.{key}'], trained[key])


PLACES = [
    ('segment', '--encoder=tu-'),
    ('detect', '--model='),
    *((name, '--pretrained-path=') for name in ('segment', 'detect')),
]


@pytest.mark.parametrize('source', ['hf-hub:x/y', 'hf_hub:x/y', 'HF-HUB:x/y'])
@pytest.mark.parametrize('name, flag', PLACES)
def test_nothing_is_fetched(monkeypatch, capsys, name, flag, source):
    def fetch(*_, **__):
        pytest.fail('it asked the network')

    monkeypatch.setattr('timm.models._hub.hf_hub_download', fetch)
    monkeypatch.setattr('evavit.hub.download_from_hf', fetch)
    test_mistakes(capsys, name, [flag + source], [source, 'nothing is fetched'])


def test_a_folder_that_is_no_pyramid_is_a_line(capsys, tmp_path):
    model = timm.create_model('vit_tiny_patch16_224', **PLAIN)
    folder = save_folder(model, tmp_path / 'vit', data='x', licence='mit')
    test_mistakes(capsys, 'segment', ['--encoder', f'tu-local-dir:{folder}'], ['a pyramid is needed'])
