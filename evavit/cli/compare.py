"""Compare the attentions on the same queries, keys and values of a real picture: python -m evavit.compare

    python -m evavit.compare --tokens 196 784 3136 --attentions softmax eva nystromformer --results-file compare.csv
    python -m evavit.compare --tokens 28x42 --image holiday.jpg --device cuda --dtype bfloat16 -b 64

For each number of tokens and each attention a row: the relative RMS of its output against softmax attention, the time
of a forward and of a forward and backward, and the memory that the latter needs beyond q, k, v. The row 'mean' replaces
every weight by 1 / N: an attention with its error has found nothing out.

q, k and v come from the picture through random projections, not through trained ones, and what an attention learns is
not trained either: the projection of EVA's summaries and LARA's landmarks is the identity, those of Linformer and
Long-Short are random. Parts that softmax attention does not have are left out: a bias, a convolution, norms of keys and
values, a projection of spans. So the errors tell how near the attentions come by construction. Reformer's keys are its
queries: it does not approximate softmax attention with other keys.
"""

import argparse
import math
import os
import re
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import torch

from evavit.arguments import NUMBER, Parser, find_device
from evavit.bench.compare import compare_all, open_picture
from evavit.bench.results import ORIGIN, check_writable, origin, read_rows, store_rows
from evavit.cli.benchmark import positive
from evavit.errors import UserError
from evavit.files import file_digest
from evavit.layers import ATTENTIONS
from evavit.training.distributed import check_backend

COLUMNS = {'tokens': 7, 'attention': 14, 'error': 8, 'forward_ms': 12, 'forward_backward_ms': 20, 'memory_mib': 11}
MOST_STD = 1000  # of logits: softmax then takes one key alone
SHARED = ('image', 'logit_std', 'batch_size', 'dtype', 'seed')  # of all rows


def grid(text: str) -> List[int]:
    """'784' or '28x28' to [28, 28]."""
    sides = text.lower().split('x')
    if len(sides) in (1, 2) and all(re.fullmatch('[0-9]{1,9}', side) and int(side) > 0 for side in sides):
        if len(sides) == 2:
            return [int(side) for side in sides]
        side = math.isqrt(int(text))
        if side**2 == int(text):
            return [side, side]
        raise argparse.ArgumentTypeError(f'{text} is no square; write the grid, such as {side}x{int(text) // side}')
    raise argparse.ArgumentTypeError(f'must be a number of tokens or a grid such as 28x28, got {text!r}')


def above_zero(text: str) -> float:
    if not NUMBER[float].fullmatch(text) or not 0 < float(text) <= MOST_STD:
        raise argparse.ArgumentTypeError(f'must be a number above 0, at most {MOST_STD}, got {text!r}')
    return float(text)


def seed(text: str) -> int:
    if not re.fullmatch('[0-9]{1,19}', text) or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f'must be a whole number from 0 on, below 2⁶³, got {text!r}')
    return int(text)


def parse(argv: Optional[Sequence[str]] = None) -> Tuple[argparse.Namespace, torch.device]:
    parser = Parser(
        prog='python -m evavit.compare',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        '--tokens',
        type=grid,
        nargs='+',
        default=[[14, 14], [28, 28], [56, 56]],
        help='numbers of tokens, squares, or grids such as 28x42 (default: 196 784 3136)',
    )
    add(
        '--attentions',
        nargs='+',
        choices=list(ATTENTIONS),
        default=list(ATTENTIONS),
        metavar='NAME',
        help=f'which to compare (default: all): {", ".join(ATTENTIONS)}',
    )
    add('--image', metavar='FILE', help='a picture (default: a photograph of a temple that scikit-learn carries)')
    add('-b', '--batch-size', type=positive, default=1, help='images in time and memory (default: 1)')
    add('--logit-std', type=above_zero, default=2.0, help="spread of a query's logits: sharpness (default: 2)")
    add('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32', help='of q, k, v (default: float32)')
    add('--device', help='cpu, cuda or cuda:N (default: cuda where there is one, else cpu)')
    add('--seed', type=seed, default=0, help='of the random projections and layers (default: 0)')
    add('--repeats', type=positive, default=10, help='calls of which the median is taken (default: 10)')
    add('--warmup', type=positive, default=2, help='calls before them (default: 2)')
    add(
        '--results-file',
        type=Path,
        metavar='FILE',
        help='CSV to put the rows into, with device, versions and commit; those of the same comparison are replaced',
    )
    args = parser.parse_args(argv)
    device = find_device(args.device)
    check_backend()
    if args.results_file:
        if args.results_file.suffix != '.csv' or args.results_file.is_dir():
            raise UserError(f'--results-file {args.results_file}: must be a .csv file')
        check_writable(args.results_file)  # now, and not after an hour of measuring
        read_rows(args.results_file, [*COLUMNS, *SHARED, *ORIGIN])
    return args, device


def main(argv: Optional[Sequence[str]] = None) -> None:
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler is silent about devices that are not there
    args, device = parse(argv)
    print(
        f'{args.image or "china.jpg of scikit-learn"}, {args.dtype} on {device}, batch {args.batch_size}, '
        f'standard deviation of the logits {args.logit_std:g}'
    )
    print(''.join(f'{name:>{width}}' for name, width in COLUMNS.items()))
    picture = open_picture(args.image)
    image = f'{args.image}, {file_digest(args.image)[:8]}' if args.image else 'china.jpg'  # two of one name differ
    shared = {name: getattr(args, name) for name in SHARED} | dict(image=image) | origin(device)
    key = ['tokens', 'attention', *SHARED, 'device']
    for row in compare_all(
        picture,
        args.tokens,
        args.attentions,
        args.batch_size,
        device,
        getattr(torch, args.dtype),
        args.logit_std,
        args.seed,
        args.repeats,
        args.warmup,
    ):
        print(''.join(f'{row[name]:>{width}}' for name, width in COLUMNS.items()), flush=True)
        if args.results_file:  # at once: a run that is cut short keeps what it measured
            store_rows(args.results_file, [row | shared], [*COLUMNS, *SHARED, *ORIGIN], key)
