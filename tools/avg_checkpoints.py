#!/usr/bin/env python3
"""Weights alone, of one checkpoint or averaged: python tools/avg_checkpoints.py --input output/RUN --output FILE

--input is a folder, whose checkpoints are ranked by the metric that train.py stored in them. The best -n are averaged
in float64; without metrics, or with --no-sort, all of them. Or it is one file, whose weights are kept: optimizer,
settings and position go, and the average stays where there is one. Equal weights of equal settings count once.
The flags are those of timm's script of this name.
--hash puts the first eight digits of the file's SHA-256 before its ending, which timm and torch.hub check.
"""

import hashlib
import json
import os
import sys
from itertools import zip_longest
from pathlib import Path

import torch

from evavit.arguments import Parser, shown
from evavit.errors import UserError, first_line, printable, reason_of, run_script
from evavit.files import file_digest, replacing, stamp
from evavit.models import write_weights
from evavit.models._weights import other_kinds
from evavit.training import build
from evavit.training.checkpoint import NO_EFFECT
from evavit.training.contents import check_choice, saved_settings, stored_metric
from evavit.training.distributed import check_alone


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--input', required=True, metavar='PATH', help='folder of checkpoints, or one file')
    parser.add_argument('--filter', default='checkpoint-*.pth.tar', help='which files in it (checkpoint-*.pth.tar)')
    parser.add_argument('--output', default='./averaged.pth', metavar='FILE', help='.pth or .safetensors')
    parser.add_argument('--no-use-ema', action='store_true', help='the plain weights, not the moving average')
    parser.add_argument('--no-sort', action='store_true', help='all of the files, whatever their metric')
    parser.add_argument('-n', type=int, default=10, help='checkpoints to average (10)')
    parser.add_argument('--hash', action='store_true', help='put the start of the SHA-256 into the name')
    args = parser.parse_args(argv)
    check_alone('avg_checkpoints.py')
    source, output = Path(args.input), Path(args.output)
    try:
        paths = [source] if source.is_file() else sorted(path for path in source.glob(args.filter) if path.is_file())
    except (NotImplementedError, ValueError) as error:
        raise UserError(f'--filter {args.filter!r}: {first_line(error)}; give a pattern of names') from error
    if not paths:
        raise UserError(f'--input {source}: no file {args.filter} in it; name others with --filter')
    if os.path.lexists(output):
        raise UserError(f'--output {output} exists already; choose another name')
    if args.n < 1:
        raise UserError(f'-n {args.n}: must be at least 1')
    for path in paths if args.no_use_ema else ():
        check_choice('--no-use-ema', path)
    paths = distinct(paths, use_ema=not args.no_use_ema)
    if len(paths) > 1 and not args.no_sort:
        metrics = {path: stored_metric(path) for path in paths}
        if None not in metrics.values():
            names = {str(saved_settings(path).get('eval_metric', 'top1')) for path in paths}
            if len(names) > 1:
                raise UserError(
                    f'--input {source}: its files were ranked by {" and ".join(sorted(names))}; name those of one with '
                    f'--filter, or average all with --no-sort'
                )
            paths = sorted(paths, key=metrics.get, reverse=names != {'loss'})[: args.n]
    check_classes(paths)
    check_conversions(paths)
    if not args.no_use_ema:
        check_averages(paths)
    weights = average(paths, use_ema=not args.no_use_ema)
    output = save(weights, output, args.hash)
    what = f'mean of {", ".join(path.name for path in paths)}' if len(paths) > 1 else f'weights of {paths[0].name}'
    count = sum(value.numel() for value in weights.values())
    print(printable(f'{output}: {what}, {count / 1e6:.2f} M numbers'))


def distinct(paths, use_ema=True):
    """Equal weights once: a run's last, best and previous checkpoints are often those of an epoch by another name, and
    its .safetensors hold them too. Files whose settings differ all stay, for the checks that come; not for those, such
    as `resume`, that a run may change from start to start."""
    if len(paths) == 1:
        return paths
    first = {}
    for path in paths:
        settings = {name: value for name, value in saved_settings(path).items() if name not in NO_EFFECT}
        content = weights_digest(build.read_weights(path, use_ema=use_ema)), json.dumps(settings)
        if first.setdefault(content, path) != path:
            print(printable(f'{path.name} holds the weights of {first[content].name}, and is left out'))
    return list(first.values())


def weights_digest(weights):
    """Of names, types, shapes and values; neither of the file nor of what else is in it."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}\n'.encode())
        digest.update(value.resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.digest()


def check_classes(paths):
    """UserError where files say that their labels mean other classes."""
    known = [(path, names) for path in paths if (names := saved_settings(path).get('class_names'))]
    for path, names in known[1:]:
        first, expected = known[0]
        if names != expected:
            label = next(i for i, pair in enumerate(zip_longest(names, expected)) if pair[0] != pair[1])
            here, there = (shown((them[label : label + 1] or ['nothing'])[0]) for them in (names, expected))
            raise UserError(
                f'{path}: class {label} is {here}, and {there} in {first}: their mean is no model; name those of one '
                f'with --filter'
            )


def check_conversions(paths):
    """UserError where files are of other models or conversions, whose shapes need not show it. Rates of dropout may
    differ: they decide on nothing but the training."""

    def made(saved):
        kwargs = {name: value for name, value in (saved.get('model_kwargs') or {}).items() if 'drop' not in name}
        parts = dict(model=saved.get('model'), convert=saved.get('convert'), model_kwargs=kwargs)
        return {**parts, 'convert_kwargs': saved.get('convert_kwargs') or {}}

    known = [(path, made(saved)) for path in paths if (saved := saved_settings(path))]
    for path, parts in known[1:]:
        first, expected = known[0]
        for name, value in parts.items():
            if value != expected[name]:
                raise UserError(
                    f'{path}: {name} is {shown(value)}, and {shown(expected[name])} in {first}: their mean is no '
                    f'model; name those of one with --filter'
                )


def check_averages(paths):
    """UserError where some runs kept an average of their weights and others did not."""
    kept = {bool(settings.get('model_ema')): path for path in paths if (settings := saved_settings(path))}
    if len(kept) > 1:
        raise UserError(
            f'{kept[True]} has a moving average, {kept[False]} has none: their mean is no model; name those of one '
            f'with --filter, or take the plain weights of .pth.tar files with --no-use-ema'
        )


def average(paths, use_ema=True):
    """The mean of the weights of files, added in float64; a single file's as they are."""
    first = _read(paths[0], use_ema)
    if len(paths) == 1:
        return first
    wide = {name: torch.promote_types(value.dtype, torch.float64) for name, value in first.items()}
    total = {name: value.to(wide[name], copy=True) for name, value in first.items()}  # two names may share a tensor
    for path in paths[1:]:
        state = _read(path, use_ema)
        shapes, expected = ({name: value.shape for name, value in it.items()} for it in (state, first))
        if shapes != expected or other_kinds(state, first):
            raise UserError(f'{path} and {paths[0]} are not of the same model: their tensors differ')
        for name, value in state.items():
            total[name] += value.to(wide[name])
    return {name: (value / len(paths)).to(first[name].dtype) for name, value in total.items()}


def _read(path, use_ema):
    state = build.read_weights(path, use_ema=use_ema)
    build.check_finite(state, path)
    return state


def save(weights, path, hashed=False):
    """Write weights in the form that the name's ending says. Returns the name, with the hash where it is asked for."""
    if path.suffix not in ('.pth', '.safetensors'):
        raise UserError(f'--output {path}: the name must end in .pth or .safetensors')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True, new=True) as partial:
            if path.suffix == '.safetensors':
                write_weights(weights, partial)
            else:
                with open(partial, 'wb') as file:
                    torch.save(weights, file)
                stamp(partial)
            digest = file_digest(partial)[:8] if hashed else ''
            named = path.with_name(f'{path.stem}-{digest}{path.suffix}')
            if hashed and os.path.lexists(named):
                raise UserError(f'--output {path}: {named.name} exists already; choose another name')
        if hashed:
            os.replace(path, named)
            return named
    except (OSError, RuntimeError) as error:  # PyTorch's own for a write that fails
        if isinstance(error, FileExistsError) and os.path.lexists(path):
            raise UserError(f'--output {path} exists already; choose another name') from error
        raise UserError(f'--output {path}: cannot be written ({reason_of(error)})') from error
    return path


if __name__ == '__main__':
    sys.exit(run_script(main))
