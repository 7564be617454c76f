"""Load models by torch.hub before evavit is imported: python torch_hub.py REPOSITORY FILE FOLDER KWARGS

tests/test_hub.py runs this file. Each model has to hold the weights of FILE; KWARGS are its arguments, as JSON.
"""

import json
import sys

import torch

repository, file, folder, kwargs = sys.argv[1:]
one = torch.hub.load(repository, 'eva_deit_tiny', source='local', checkpoint_path=file, **json.loads(kwargs))
two = torch.hub.load(repository, 'timm_model', f'local-dir:{folder}', source='local', pretrained=True)
state = torch.load(file)
for model in (one, two):
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
