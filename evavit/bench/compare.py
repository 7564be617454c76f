"""Compare the attentions on the same queries, keys and values of a real picture: python -m evavit.compare

    python -m evavit.compare --tokens 196 784 3136 --attentions softmax eva nystromformer --results-file compare.csv
    python -m evavit.compare --tokens 28x42 --image holiday.jpg --device cuda --dtype bfloat16 -b 64

For each number of tokens and each attention a row: the relative RMS of its output against softmax attention, the time
of a forward and of a forward and backward, and the memory that the latter needs beyond q, k, v. The row 'mean' replaces
every weight by 1 / N: an attention with its error has found nothing out.

q, k and v come from the picture through random projections, not through trained ones (`image_qkv` says how), and what
an attention learns is not trained either: the projection of EVA's summaries and LARA's landmarks is the identity, those
of Linformer and Long-Short are random. Parts that softmax attention does not have, a bias, a convolution, norms of keys
and values or a projection of spans, are left out (`PLAIN`). The errors tell how near the attentions come by
construction; Reformer, whose keys are its queries, is none that approximates softmax attention with other keys.
"""

import argparse
import csv
import inspect
import math
import os
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from timm.layers import build_sincos2d_pos_embed
from torch import nn

from evavit.arguments import Parser
from evavit.errors import UserError, first_line, run_script
from evavit.layers import ATTENTIONS, GridAttention, attention_layer

from .models import median_seconds
from .results import origin

__all__ = ['PLAIN', 'attention_matrix', 'image_qkv', 'make_attention', 'open_picture', 'relative_rms']

DIM, NUM_HEADS, PATCH = 192, 3, 16  # DeiT-Tiny
# Options that take out what softmax attention does not have.
PLAIN = dict(rel_pos_bias=False, conv_kernel_size=0, dual_ln=False, pooling='max')


def open_picture(path: Optional[str] = None) -> Image.Image:
    """A picture in RGB: the file, or scikit-learn's sample photograph of a temple.

    Raises:
        UserError: no such file, none that PIL reads, or no scikit-learn.
    """
    if path is None:
        try:
            from sklearn.datasets import load_sample_image
        except ImportError:
            raise UserError(
                "the sample picture is scikit-learn's: pip install scikit-learn, or name one with --image"
            ) from None
        return Image.fromarray(load_sample_image('china.jpg'))
    try:
        return Image.open(path).convert('RGB')
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f'--image {path}: {first_line(error)}') from None


def image_qkv(picture: Image.Image, feat_size: Sequence[int], logit_std: float = 2.0, seed: int = 0) -> torch.Tensor:
    """Queries, keys and values `(3, 1, 3, N, 64)` of a picture, in float32.

    The picture is resized to H × W patches of 16 × 16 pixels. A patch becomes 192 channels by a random orthogonal
    projection, standardised over the tokens; a quarter of their variance is added as timm's sine-cosine position
    embedding; LayerNorm. Values are a random orthogonal projection of that; queries and keys are two that have half of
    their variance in common, so that like attends to like, scaled so that the logits of a query have the standard
    deviation `logit_std` over the keys, on average. No trained weight takes part.

    Args:
        picture: RGB.
        feat_size: Grid (H, W).
        logit_std: How sharp the attention is: 0 would be the mean of the values.
        seed: Of the projections.
    """
    H, W = feat_size
    generator = torch.Generator().manual_seed(seed)

    def orthogonal(rows: int, columns: int) -> torch.Tensor:
        q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator))
        return q * r.diagonal().sign()  # signs are the library's choice otherwise

    pixels = torch.frombuffer(
        bytearray(picture.resize((PATCH * W, PATCH * H), Image.Resampling.BICUBIC).tobytes()), dtype=torch.uint8
    ).view(H, PATCH, W, PATCH, 3)
    patches = pixels.permute(0, 2, 1, 3, 4).reshape(H * W, -1).float()
    x = patches @ orthogonal(patches.shape[1], DIM)
    x = (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6)
    position = build_sincos2d_pos_embed([H, W], DIM)
    x = F.layer_norm(x + 0.5 * F.layer_norm(position, [DIM]), [DIM])
    common, for_q, for_k, for_v = (orthogonal(DIM, DIM) for _ in range(4))
    q, k, v = (
        (x @ weight).view(H * W, NUM_HEADS, DIM // NUM_HEADS).transpose(0, 1).unsqueeze(0)
        for weight in ((common + for_q) / 2**0.5, (common + for_k) / 2**0.5, for_v)
    )
    rows = q[:, :, torch.randperm(H * W, generator=generator)[:256]]  # enough queries to measure the logits
    spread = (rows @ k.transpose(2, 3) * (DIM // NUM_HEADS) ** -0.5).std(-1, correction=0).mean().clamp(min=1e-6)
    factor = (logit_std / spread) ** 0.5
    return torch.stack([factor * q, factor * k, v])


def make_attention(name: str, feat_size: Sequence[int], seed: int = 0) -> GridAttention:
    """An attention of `ATTENTIONS` as it is initialised, in evaluation mode, without the parts of `PLAIN` and with the
    identity for the square projections of its summaries or landmarks: these are then the cells' means, normalised."""
    torch.manual_seed(seed)
    own = inspect.signature(ATTENTIONS[name]).parameters
    options = {key: value for key, value in PLAIN.items() if key in own}
    layer = attention_layer(name, feat_size, **options)(DIM, NUM_HEADS).eval()
    for module in layer.modules():
        if (
            isinstance(module, nn.Linear)
            and module not in (layer.qkv, layer.proj)
            and (module.in_features == module.out_features)
        ):
            nn.init.eye_(module.weight)
            nn.init.zeros_(module.bias)
    return layer


def relative_rms(output: torch.Tensor, expected: torch.Tensor) -> float:
    """‖output - expected‖ / ‖expected‖."""
    return ((output.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def attention_matrix(attend: Callable[[torch.Tensor], torch.Tensor], qkv: torch.Tensor) -> torch.Tensor:
    """The matrix A `(h, N, N)` with which an attention weighs the values: its output for the identity as values.

    The N columns of the identity are N values of one channel each. They go through the attention d at a time, as many
    images with the same queries and keys.

    Args:
        attend: Queries, keys, values `(3, B, h, N, d)` to outputs `(B, h, N, d)`, linear in the values.
        qkv: `(3, 1, h, N, d)`; its values are not used.
    """
    _, _, h, N, d = qkv.shape
    images = -(-N // d)
    identity = torch.eye(N, images * d, dtype=qkv.dtype, device=qkv.device)
    values = identity.view(N, images, 1, d).permute(1, 2, 0, 3).expand(images, h, N, d)
    q, k = (x.expand(images, -1, -1, -1) for x in (qkv[0], qkv[1]))
    columns = attend(torch.stack([q, k, values]))  # (images, h, N, d)
    return columns.permute(1, 2, 0, 3).flatten(2)[:, :, :N]


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes that were allocated during run(), beyond those before it."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    now = peak = 0
    events = [event for event in profile.kineto_results.events() if event.name() == '[memory]']
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def softmax_exactly(qkv: torch.Tensor) -> torch.Tensor:
    """Softmax attention in float32, the measure of the errors."""
    q, k, v = qkv.float().unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


def compare(name: str, qkv: torch.Tensor, feat_size: List[int], expected: torch.Tensor, args) -> Dict[str, object]:
    """One row."""
    device = qkv.device
    if name == 'mean':
        layer = None

        def attend(qkv: torch.Tensor) -> torch.Tensor:
            return qkv[2].mean(2, keepdim=True).expand_as(qkv[2])
    else:
        layer = make_attention(name, feat_size, args.seed).to(device, qkv.dtype)

        def attend(qkv: torch.Tensor) -> torch.Tensor:
            return layer.attend(qkv, feat_size)

    with torch.no_grad():
        error = relative_rms(attend(qkv[:, :1]), expected)
    row = {'tokens': feat_size[0] * feat_size[1], 'attention': name, 'error': f'{error:.4f}'}
    if layer is None:
        return row | dict(forward_ms='', forward_backward_ms='', memory_mib='')
    leaf = qkv.detach().clone().requires_grad_()
    grad = torch.ones_like(qkv[0])

    @torch.no_grad()
    def forward():
        attend(qkv)

    def step():
        layer.train()
        torch.autograd.grad(attend(leaf), leaf, grad)
        layer.eval()

    seconds = median_seconds([forward, step], device, args.repeats, args.warmup)
    return row | dict(
        zip(
            ('forward_ms', 'forward_backward_ms', 'memory_mib'),
            (f'{1e3 * seconds[0]:.3f}', f'{1e3 * seconds[1]:.3f}', f'{peak_bytes(step, device) / 2**20:.1f}'),
            strict=True,
        )
    )


def compare_all(args, device: torch.device, dtype: torch.dtype) -> Iterator[Dict[str, object]]:
    """The rows, one after the other."""
    picture = open_picture(args.image)
    for feat_size in args.tokens:
        qkv = image_qkv(picture, feat_size, args.logit_std, args.seed).to(device, dtype)
        expected = softmax_exactly(qkv)
        qkv = qkv.expand(-1, args.batch_size, -1, -1, -1).contiguous()
        for name in ['mean', *args.attentions]:
            try:
                yield compare(name, qkv, feat_size, expected, args)
            except (torch.cuda.OutOfMemoryError, MemoryError):
                yield dict(
                    tokens=feat_size[0] * feat_size[1],
                    attention=name,
                    error='out of memory',
                    forward_ms='',
                    forward_backward_ms='',
                    memory_mib='',
                )
                torch.cuda.empty_cache()


def grid(text: str) -> List[int]:
    """'784' or '28x28' to [28, 28]."""
    sides = text.lower().split('x')
    if len(sides) in (1, 2) and all(side.isdecimal() and int(side) > 0 for side in sides):
        if len(sides) == 2:
            return [int(side) for side in sides]
        side = math.isqrt(int(text))
        if side**2 == int(text):
            return [side, side]
        raise argparse.ArgumentTypeError(f'{text} is no square; write the grid, such as {side}x{int(text) // side}')
    raise argparse.ArgumentTypeError(f'must be a number of tokens or a grid such as 28x28, got {text!r}')


def whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text!r}')
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'must be a number above 0, got {text!r}')
    return value


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f'must be a whole number from 0 on, below 2⁶³, got {text!r}')
    return int(text)


def parse(argv: Optional[Sequence[str]] = None) -> Tuple[argparse.Namespace, torch.device]:
    parser = Parser(
        prog='python -m evavit.compare',
        description=__doc__,
        allow_abbrev=False,
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
    add('-b', '--batch-size', type=whole, default=1, help='images in time and memory (default: 1)')
    add('--logit-std', type=positive, default=2.0, help="spread of a query's logits: sharpness (default: 2)")
    add('--dtype', choices=('float32', 'bfloat16', 'float16'), default='float32', help='of q, k, v (default: float32)')
    add('--device', help='cpu, cuda or cuda:N (default: cuda where there is one, else cpu)')
    add('--seed', type=seed, default=0, help='of the random projections and layers (default: 0)')
    add('--repeats', type=whole, default=10, help='calls of which the median is taken (default: 10)')
    add('--warmup', type=whole, default=2, help='calls before them (default: 2)')
    add('--results-file', type=Path, metavar='FILE', help='CSV to write the rows to, with device, versions and commit')
    args = parser.parse_args(argv)
    name = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    kind, _, number = name.partition(':')
    if kind not in ('cpu', 'cuda') or (number and not number.isdecimal()):
        raise UserError(f'--device {name}: takes cpu, cuda or cuda:N')
    if kind == 'cuda' and int(number or 0) >= torch.cuda.device_count():
        raise UserError(f'--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices; use --device cpu')
    if args.results_file and (args.results_file.suffix != '.csv' or args.results_file.is_dir()):
        raise UserError(f'--results-file {args.results_file}: must be a .csv file')
    if args.results_file:  # now, and not after an hour of measuring
        new = not args.results_file.exists()
        try:
            args.results_file.parent.mkdir(parents=True, exist_ok=True)
            with open(args.results_file, 'a'):
                pass
            if new:
                args.results_file.unlink()
        except OSError as error:
            raise UserError(f'--results-file {args.results_file}: {error.strerror}; name another one') from None
    return args, torch.device(name)


def main(argv: Optional[Sequence[str]] = None) -> None:
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler is silent about devices that are not there
    args, device = parse(argv)
    dtype = getattr(torch, args.dtype)
    columns = {'tokens': 7, 'attention': 14, 'error': 8, 'forward_ms': 12, 'forward_backward_ms': 20, 'memory_mib': 11}
    print(
        f'{args.image or "china.jpg of scikit-learn"}, {args.dtype} on {device}, batch {args.batch_size}, '
        f'standard deviation of the logits {args.logit_std:g}'
    )
    print(''.join(f'{name:>{width}}' for name, width in columns.items()))
    rows = []
    for row in compare_all(args, device, dtype):
        print(''.join(f'{row[name]:>{width}}' for name, width in columns.items()), flush=True)
        rows.append(row)
    if args.results_file:
        shared = dict(
            image=args.image or 'china.jpg',
            logit_std=args.logit_std,
            batch_size=args.batch_size,
            dtype=args.dtype,
            seed=args.seed,
        ) | origin(device)
        with open(args.results_file, 'w', newline='') as stream:
            writer = csv.DictWriter(stream, [*columns, *shared], lineterminator='\n')
            writer.writeheader()
            writer.writerows(row | shared for row in rows)


if __name__ == '__main__':
    sys.exit(run_script(main))
