#!/usr/bin/env python3
"""The mean of several checkpoints' weights: python tools/avg_checkpoints.py --input output/RUN --output FILE

The flags are those of timm's script of this name. Checkpoints are ranked by the metric that train.py stored in them,
and the best -n are averaged in float64; without metrics, or with --no-sort, all of them.
"""

import argparse
import sys
from pathlib import Path

import safetensors.torch
import torch

from evavit.errors import UserError, run_script
from evavit.training import build
from evavit.training.checkpoint import replacing, stored_metric


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--input', required=True, metavar='PATH', help='folder of checkpoints')
    parser.add_argument('--filter', default='checkpoint-*.pth.tar', help='which files in it (checkpoint-*.pth.tar)')
    parser.add_argument('--output', default='./averaged.pth', metavar='FILE', help='.pth or .safetensors')
    parser.add_argument('--no-use-ema', action='store_true', help='the plain weights, not the moving average')
    parser.add_argument('--no-sort', action='store_true', help='all of the files, whatever their metric')
    parser.add_argument('-n', type=int, default=10, help='checkpoints to average (10)')
    args = parser.parse_args(argv)
    paths = sorted(path for path in Path(args.input).glob(args.filter) if path.is_file())
    if not paths:
        raise UserError(f'--input {args.input}: no file {args.filter} in it; name others with --filter')
    if Path(args.output).exists():
        raise UserError(f'--output {args.output} exists already; choose another name')
    if args.n < 1:
        raise UserError(f'-n {args.n}: must be at least 1')
    if not args.no_sort:
        metrics = {path: stored_metric(path) for path in paths}
        if None not in metrics.values():
            paths = sorted(paths, key=metrics.get, reverse=True)[: args.n]
    weights = average(paths, use_ema=not args.no_use_ema)
    save(weights, args.output)
    print(f'{args.output}: mean of {", ".join(path.name for path in paths)}')


def average(paths, use_ema=True):
    """The mean of the weights of files, added in float64."""
    total, first = {}, None
    for path in paths:
        state = build.read_weights(path, use_ema=use_ema)
        shapes = {name: value.shape for name, value in state.items()}
        first = first or (path, shapes, {name: value.dtype for name, value in state.items()})
        if shapes != first[1]:
            raise UserError(f'{path} and {first[0]} are not of the same model: their tensors differ')
        for name, value in state.items():
            total[name] = total.get(name, 0) + value.double()
    return {name: (value / len(paths)).to(first[2][name]) for name, value in total.items()}


def save(weights, path):
    """Weights alone, in the form that the name's ending says."""
    if Path(path).suffix not in ('.pth', '.safetensors'):
        raise UserError(f'--output {path}: the name must end in .pth or .safetensors')
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'--output {path}: cannot be written ({error.strerror})') from error
    with replacing(path) as partial:
        if str(path).endswith('.safetensors'):
            safetensors.torch.save_file({name: value.contiguous() for name, value in weights.items()}, str(partial))
        else:
            torch.save(weights, partial)


if __name__ == '__main__':
    sys.exit(run_script(main))
