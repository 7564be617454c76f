"""What README.md says of a converted model's speed holds for the cells that `evavit.convert_vit` makes."""

import timm
from programs import ROOT, load_program

import evavit

converted = load_program('docs/make/converted.py')


def test_the_figures_are_those_of_the_default():
    vit = timm.create_model('vit_tiny_patch16_224', depth=1, img_size=144)  # 9 × 9 tokens
    cells = evavit.convert_vit(vit).conversion['partition_grid']
    assert f'cells of {9 // cells}' == converted.DEFAULT
    rows, readme = converted.measured(), (ROOT / 'README.md').read_text(encoding='utf-8')
    forward, training = (
        {width: dict(converted.ratios(rows, width, converted.DEFAULT, column)) for width in (192, 384, 768)}
        for column in converted.COLUMNS
    )
    assert f'{forward[768][1022]:.2f} times' in readme and f'{training[768][1022]:.2f} times' in readme
    # 768 trains faster from about 500 pixels a side on and breaks even in inference, 384 gains in both from about 1,000
    assert training[768][518] > 1.05 and 0.95 < forward[768][518] < 1.05 and 1.4 < forward[768][1022] < 1.6
    for speed in (forward[384], training[384]):
        assert speed[518] < 1 < speed[1022]
    assert max(forward[192][1022], training[192][1022]) < 1


def test_speed_of_our_own_models(monkeypatch):
    """Where `make gpu` measured them they are told too, in no more lines."""
    before = converted.evidence()
    rows = [
        dict(bench='train', case='eva_deit_tiny_784', img_size=str(side), torchcompile='reduce-overhead')
        | dict(attention=attention, img_per_s=str(speed))
        for side in (224, 448, 896)
        for attention, speed in (('eva', side), ('softmax', 200))
    ]
    monkeypatch.setattr(converted.performance, 'made', lambda table: rows if table == 'models' else [])
    after = converted.evidence()
    assert '`eva_deit_tiny_784` trains 1.12, 2.24, 4.48 times as fast at 224, 448, 896 pixels' in after
    assert len(after.splitlines()) == len(before.splitlines()) and 'eva_deit_tiny_784' not in before
