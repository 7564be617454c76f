"""The examples of dense prediction learn, at small size, with both families and each head."""

import pytest
import torch
from programs import load_program

pytest.importorskip('segmentation_models_pytorch', reason='needs evavit[dense]')
pytest.importorskip('skimage', reason='needs evavit[dense]')
PYRAMID = dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4))
PLAIN = dict(depth=2, embed_dim=48, num_heads=3)


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


@pytest.mark.parametrize('model, kwargs', [('eva_pvt_v2_b3', PYRAMID), ('eva_deit_tiny', PLAIN)])
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


@pytest.mark.parametrize(
    'name, flags, words',
    [
        ('segment', ['--encoder', 'tu-eva_deit_tiny'], ['tu-eva_deit_tiny', 'a pyramid is needed']),
        ('segment', ['--encoder', 'tu-eva_pvt_v2_b9'], ['eva_pvt_v2_b9']),
        ('segment', ['--steps', '0'], ['--steps 0']),
        ('detect', ['--model', 'eva_deit_tin'], ['eva_deit_tin']),
        ('detect', ['--model', 'linformer_deit_tiny'], ['linformer', 'one size']),
    ],
)
def test_mistakes(monkeypatch, capsys, name, flags, words):
    module = {'segment': segment, 'detect': detect}[name]
    monkeypatch.setattr('sys.argv', [f'{name}.py', *flags])
    with pytest.raises(SystemExit) as stop:
        module.main()
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and all(word in line for word in words), line
