#!/usr/bin/env python3
"""A checkpoint's weights alone, to hand on: python tools/clean_checkpoint.py --checkpoint FILE --output FILE

The flags are those of timm's script of this name. Optimizer, settings and position go, the average stays where there is
one. The name gets the first eight digits of the file's SHA-256 before its ending, which timm and torch.hub check.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

from avg_checkpoints import save

from evavit.errors import run_script
from evavit.training import build


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--checkpoint', required=True, metavar='FILE')
    parser.add_argument('--output', required=True, metavar='FILE', help='.pth or .safetensors')
    parser.add_argument('--no-use-ema', action='store_true', help='the plain weights, not the moving average')
    parser.add_argument('--no-hash', action='store_true', help='leave the name as it is')
    args = parser.parse_args(argv)
    output = Path(args.output)
    weights = build.read_weights(args.checkpoint, use_ema=not args.no_use_ema)
    save(weights, output)
    if not args.no_hash:
        digest = hashlib.sha256(output.read_bytes()).hexdigest()[:8]
        named = output.with_name(f'{output.stem}-{digest}{output.suffix}')
        os.replace(output, named)
        output = named
    print(f'{output}: {len(weights)} tensors, {sum(value.numel() for value in weights.values()) / 1e6:.2f} M numbers')


if __name__ == '__main__':
    sys.exit(run_script(main))
