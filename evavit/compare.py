"""Errors of the attentions against softmax attention: `python -m evavit.compare`, and what it is made of."""

import sys

from evavit.bench.compare import attention_matrix, image_qkv, make_attention, open_picture, relative_rms
from evavit.cli.compare import main
from evavit.errors import run_script

__all__ = ['attention_matrix', 'image_qkv', 'make_attention', 'open_picture', 'relative_rms']

if __name__ == '__main__':
    sys.exit(run_script(main, no_memory='lower the batch size (-b) or --tokens'))
