"""Time EVA beside softmax attention: whole models, the attention layer, attention alone.

    python benchmark.py --bench train infer --model eva_deit_tiny_784 -b 128 --torchcompile --results-file mine.csv
    python benchmark.py --bench op layer --results-file mine.csv
    python benchmark.py --bench op --grid 28 56 --backend gluon cudnn flex windows linear natten
    python benchmark.py --bench host
    python benchmark.py --bench op --grid 37 64 --partition-grid 13 16 --num-prefix-tokens 0 5 --count-cells outside
    python benchmark.py --bench infer --model eva_deit_tiny -b 8 --device cpu
    python benchmark.py --bench convert --img-size 224 518 1022 --results-file convert.csv
    python benchmark.py --bench data -c configs/eva_deit_tiny.yaml --data-dir DIR --workers-list 1 2 4

Beside a model with EVA runs timm's softmax model of its size, beside EVA's op and layer scaled_dot_product_attention
with each backend forced, and the peers that --backend names. Every contender is first held against float64: where it is
off, its row says so, it is not timed and the exit code is 1. Times are medians after a warm-up; a training step is
forward, cross-entropy, backward and AdamW on one fixed batch of noise. A model may carry arguments:
deit_tiny_patch16_224:patch_size=8. Those of an EVA model reach timm's too, but for the options of the attention; where
it does not take one, it is left out. --bench host takes the processor's milliseconds until the layer is launched.

--bench convert takes timm's ViTs as they are and converted (evavit.convert_vit), over sides of images. --bench data,
which must come first, takes the flags of train.py: the loader's throughput, alone and beside the step.
"""

import argparse
import fnmatch
import itertools
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import timm
import torch

from evavit.arguments import Parser, find_device, program
from evavit.bench import loader
from evavit.bench.clocks import copy_rate
from evavit.bench.contenders import (
    GRIDS,
    Setting,
    Sizes,
    attention_backends,
    backend_names,
    bench_layer,
    bench_op,
    default_batch,
)
from evavit.bench.convert import SIDES, VITS, bench_convert, fit_side
from evavit.bench.models import bench_model, input_size, model_contenders, parse_model
from evavit.bench.peers import PEERS
from evavit.bench.results import HARMLESS, Row, check_writable, is_done, origin, read_rows, store_rows
from evavit.errors import UserError, first_line, reason_of, run_script
from evavit.ops.eva import EVA
from evavit.training.compilation import MODES, Compilation, choose_compilation

HOST_SIDE, HOST_BATCH = 14, 32  # small enough that a GPU waits for the processor


def positive(text: str) -> int:
    if not re.fullmatch('[0-9]{1,9}', text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, below 10⁹, got {text!r}')
    return int(text)


def count(text: str) -> int:
    if not re.fullmatch('[0-9]{1,9}', text):
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 0, below 10⁹, got {text!r}')
    return int(text)


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(
        prog=program('benchmark'), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        '--bench',
        nargs='+',
        choices=('train', 'infer', 'layer', 'host', 'op', 'convert'),
        default=['train'],
        help='what to time',
    )
    add(
        '--model',
        '-m',
        nargs='+',
        default=[],
        help='models, with arguments after colons (default: eva_deit_tiny; convert: four ViTs)',
    )
    add('--model-list', help='more models: a file with one a line, or names and wildcards with commas between them')
    add(
        '-b',
        '--batch-size',
        type=positive,
        help='images (default: models 64; op and layer by the grid, at one number of tokens)',
    )
    add(
        '--img-size',
        type=positive,
        nargs='+',
        help="side of the images: one for train, infer (default: the model's), any for convert (default: 224 to 2044)",
    )
    add('--grid', type=positive, nargs='+', help='op, layer: sides of token grids (default: 14 to 256; CPU: 14, 28)')
    add('--window-size', type=positive, default=7, help='op: side of the windows in tokens (default: 7)')
    add(
        '--partition-grid',
        type=positive,
        nargs='+',
        default=[7],
        help='op: cells asked for along each axis; one for all grids, or one for each of --grid (default: 7)',
    )
    add('--num-prefix-tokens', type=count, nargs='+', default=[0], help='op: tokens before the grid (default: 0)')
    add(
        '--count-cells',
        choices=('one', 'all', 'outside'),
        default='one',
        help='op: how often a cell counts; with another than one, EVA has neither positions nor noise, as in a '
        'converted network (default: one)',
    )
    add('--dim', type=positive, default=192, help='op, layer: channels (default: 192)')
    add('--num-heads', type=positive, default=3, help='op, layer: heads (default: 3)')
    add(
        '--backend',
        nargs='+',
        choices=backend_names(),
        default=[],
        help=f"contenders: EVA's {', '.join(EVA.backends)};"
        " softmax's flash, cudnn, efficient, and sdpa, where PyTorch chooses; op alone: the peers"
        f' {", ".join(PEERS)}, which compute other functions (default: what the device has, no peers; for models'
        ' the one that EVA takes by itself, and sdpa)',
    )
    add('--amp-dtype', choices=('float32', 'bfloat16', 'float16'), help='default: bfloat16, on a CPU float32')
    add(
        '--torchcompile',
        nargs='?',
        const='inductor',
        help='compile the models: with a backend, or with Inductor in the mode named (default: the fastest mode)',
    )
    add('--torchcompile-mode', choices=MODES, help="mode of torch.compile's Inductor")
    add('--device', help='cpu, cuda or cuda:N (default: cuda where there is one, else cpu)')
    add('--repeats', type=positive, default=30, help='calls of which the median is taken (default: 30)')
    add('--warmup', type=positive, default=5, help='calls before them (default: 5)')
    add(
        '--results-file',
        type=Path,
        help='CSV; rows of the same comparison are replaced, but for those of other backends at this commit',
    )
    add('--resume', action='store_true', help='leave out what the results file has of this device and commit')
    add('--lock', type=Path, help='a file: runs that name the same one compile side by side, and measure one at a time')
    return parser.parse_args(argv)


def find_models(args: argparse.Namespace) -> List[str]:
    """Names of the models in the order asked for; those with arguments are checked here."""
    texts = list(args.model)
    if args.model_list and os.path.isfile(args.model_list):
        try:
            lines = Path(args.model_list).read_text(encoding='utf-8').splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f'--model-list {args.model_list}: cannot be read ({reason_of(error)})') from error
        texts += [line.strip() for line in lines if line.strip()]
    elif args.model_list:
        texts += args.model_list.split(',')
    models: List[str] = []
    for text in texts or (VITS if args.bench == ['convert'] else ['eva_deit_tiny']):
        if '*' in text or '?' in text:
            found = fnmatch.filter(timm.list_models(), text)
            if not found:
                raise UserError(f'no model is called {text}')
            models += found
        else:
            parse_model(text)
            models.append(text)
    return list(dict.fromkeys(models))


def attention_sizes(args: argparse.Namespace, setting: Setting, bench: str) -> Iterator[Tuple[int, Sizes]]:
    """(side of the grid, sizes of EVA) of all that the flags ask for."""
    default = list(GRIDS) if setting.cuda else [14, 28]
    grids = args.grid or ([HOST_SIDE] if bench == 'host' else default)
    partitions = args.partition_grid * (len(grids) if len(args.partition_grid) == 1 else 1)
    if len(partitions) != len(grids):
        raise UserError(f'--partition-grid takes one number, or one for each of {len(grids)} grids: {partitions}')
    for (side, partition), prefix in itertools.product(zip(grids, partitions, strict=True), args.num_prefix_tokens):
        sizes = Sizes(args.window_size, partition, prefix, args.count_cells)
        if bench != 'op' and sizes != Sizes():
            raise UserError(
                f'--bench {bench} has windows of 7 × 7 and 7 × 7 cells; other sizes are for --bench op alone'
            )
        yield side, sizes


def model_backends(text: str, setting: Setting, img_size: Optional[int]) -> List[str]:
    return [backend for *_, backend in model_contenders(text, setting, img_size)]


def comparisons(
    args: argparse.Namespace, setting: Setting, compilation: Compilation
) -> Iterator[Tuple[Row, Callable[[], List[Row]], Callable[[], Sequence[str]]]]:
    """(what the rows of a comparison share, function that makes them, function that tells their backends: none where
    they are not chosen by name), of all that the flags ask for."""
    shared = {'amp_dtype': setting.dtype_name}
    models = find_models(args)
    for bench in args.bench:
        if bench in ('op', 'layer', 'host'):
            if args.dim % args.num_heads:
                raise UserError(f'--num-heads {args.num_heads} does not divide --dim {args.dim}')
            for side, sizes in attention_sizes(args, setting, bench):
                batch = args.batch_size or (HOST_BATCH if bench == 'host' else default_batch(side, setting.device))
                key: Dict[str, Any] = dict(
                    bench=bench,
                    case=f'{side}x{side}',
                    batch_size=batch,
                    tokens=side**2,
                    width=args.dim,
                    heads=args.num_heads,
                    **sizes._asdict(),
                )
                asked = setting, batch, side, args.num_heads, args.dim // args.num_heads
                if bench == 'op':
                    yield key | shared, partial(bench_op, *asked, sizes), partial(attention_backends, setting)
                elif bench == 'layer':
                    yield key | shared, partial(bench_layer, *asked), partial(attention_backends, setting)
                else:
                    yield key | shared, partial(bench_layer, *asked, host=True), tuple
        elif bench == 'convert':
            for text, asked in itertools.product(models, args.img_size or SIDES):
                side, batch = fit_side(text, asked)
                batch = args.batch_size or batch
                key = dict(bench=bench, case=text, batch_size=batch, img_size=side, torchcompile=compilation.label)
                yield key | shared, partial(bench_convert, setting, text, batch, side, compilation), tuple
        else:
            if args.img_size and len(args.img_size) > 1:
                raise UserError(f'--img-size {" ".join(map(str, args.img_size))}: --bench {bench} takes one')
            img_size = args.img_size[0] if args.img_size else None
            for text in models:
                batch = args.batch_size or 64
                key = dict(
                    bench=bench,
                    case=text,
                    batch_size=batch,
                    torchcompile=compilation.label,
                    img_size=input_size(text, img_size)[1],
                )
                yield (
                    key | shared,
                    partial(bench_model, setting, bench, text, batch, img_size, compilation),
                    partial(model_backends, text, setting, img_size),
                )


def report(row: Row) -> None:
    shown = (
        'bench',
        'case',
        'model',
        'attention',
        'backend',
        'batch_size',
        'img_size',
        'tokens',
        'window_size',
        'partition_grid',
        'num_prefix_tokens',
        'status',
        'error',
        'forward_ms',
        'ms',
        'img_per_s',
        'peak_memory_mib',
        'forward_of_copy',
        'backward_of_copy',
    )
    print('  '.join(f'{name} {row[name]}' for name in shown if row.get(name, '') != ''), flush=True)


def store(path: Path, rows: List[Row]) -> None:
    """In place of earlier rows of the comparison, but for those of other backends at this commit."""
    backends = {row['backend'] for row in rows}

    def beside(row: Row) -> bool:
        return row['commit'] == rows[0]['commit'] and row['backend'] not in backends

    store_rows(path, rows, beside=beside)


def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if list(argv[:2]) == ['--bench', 'data']:
        loader.main(argv[2:])
        return
    args = parse(argv)
    device = find_device(args.device)
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)
    if 'host' in args.bench and args.backend:
        raise UserError('--bench host measures layers as they run; leave out --backend')
    on_cuda = [name for name, peer in PEERS.items() if peer.cuda]
    for backend in ('gluon', 'triton', 'cudnn', 'efficient', *on_cuda):
        if backend in args.backend and device.type == 'cpu':
            raise UserError(f'--backend {backend} needs a CUDA device; a CPU has plain and sdpa')
    kernels = [backend for backend in args.backend if backend in EVA.backends and backend != 'plain']
    compilation = choose_compilation(args.torchcompile, args.torchcompile_mode, device)
    if compilation.backend and len(kernels) > 1:
        raise UserError(
            f'--backend {" ".join(kernels)} with --torchcompile: name one; a compiled model keeps its backend'
        )
    if args.resume and not args.results_file:
        raise UserError('--resume needs a --results-file to go on with')
    if args.results_file:  # before the timing
        check_writable(args.results_file)
        read_rows(args.results_file)
    dtype = args.amp_dtype or ('bfloat16' if device.type == 'cuda' else 'float32')
    setting = Setting(device, getattr(torch, dtype), args.backend, args.repeats, args.warmup, lock=args.lock)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in PyTorch's matrix products
    planned = list(comparisons(args, setting, compilation))
    where = origin(device)
    if 'op' in args.bench:
        with setting.turn(alone=True):
            setting.copy_gb_per_s = copy_rate(device)
    failed = False
    for key, measure, backends in planned:
        if args.resume and is_done(args.results_file, key | where, backends):
            print(f'{key["bench"]} {key["case"]}: in {args.results_file} already')
            continue
        try:
            rows = [row | where for row in measure()]
        except (MemoryError, RuntimeError) as error:  # of the tensors that all contenders share
            raise UserError(f'{key["bench"]} {key["case"]}: {first_line(error)[:300]}; lower its sizes') from error
        for row in rows:
            report(row)
        if args.results_file:  # after every comparison, so that a run cut short leaves what it measured
            store(args.results_file, rows)
        failed |= any(row['status'] not in HARMLESS for row in rows)
    if failed:
        raise SystemExit(1)


if __name__ == '__main__':
    sys.exit(run_script(main))
