"""Each attention trains from the same settings: only the model's name changes."""

import pytest
import yaml
from runs import KWARGS


@pytest.mark.parametrize('attention', ['performer', 'scatterbrain'])
def test_one_word_of_the_file_changes_the_attention(attention, train, call, images, tmp_path):
    settings = dict(
        model='eva_deit_tiny',
        epochs=2,
        model_kwargs={key: value for key, value in KWARGS.items() if key not in ('window_size', 'partition_grid')},
    )
    file = tmp_path / 'settings.yaml'
    file.write_text(yaml.safe_dump(settings).replace('eva_deit_tiny', f'{attention}_deit_tiny'))
    folder = train('run', '-c', file, '--epochs', '1', model=())
    assert f'model: {attention}_deit_tiny' in (folder / 'args.yaml').read_text()
    code, out, err = call(
        'validate',
        '--checkpoint',
        folder / 'last.safetensors',
        '--data-dir',
        images,
        '--device',
        'cpu',
        '--workers',
        '0',
    )
    assert code == 0, out + err
