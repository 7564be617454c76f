"""Errors, time and memory of the attentions on the same queries, keys and values of a real picture.

`evavit/cli/compare.py` is the command, `python -m evavit.compare`. q, k and v come from the picture through random
projections, not through trained ones (`image_qkv`). What an attention learns is not trained either (`make_attention`).
"""

import inspect
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, cast

import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import build_sincos2d_pos_embed
from torch import nn

from evavit.errors import UserError
from evavit.layers import ATTENTIONS, GridAttention, attention_layer
from evavit.training.data.decode import BadImageError, read_file

from .clocks import median_seconds, peak_bytes

__all__ = [
    'PLAIN',
    'attention_matrix',
    'compare',
    'compare_all',
    'image_qkv',
    'make_attention',
    'open_picture',
    'relative_rms',
    'softmax_exactly',
]

DIM, NUM_HEADS, PATCH = 192, 3, 16  # DeiT-Tiny
UNTIMED = dict(forward_ms='', forward_backward_ms='', memory_mib='')  # columns of a row without a measurement
# Options that take out what softmax attention does not have, or what is not made of queries, keys and values alone.
PLAIN = dict(rel_pos_bias=False, conv_kernel_size=0, dual_ln=False, pooling='max', projection_source='keys')


def open_picture(path: Optional[str] = None) -> Image.Image:
    """A picture in RGB: the file, or scikit-learn's sample photograph of a temple.

    Raises:
        UserError: no such file, none that the scripts read as an image, or no scikit-learn.
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
        return cast(Image.Image, read_file(path, 'RGB'))
    except BadImageError as error:
        raise UserError(f'--image {path}: {error}') from None


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


def make_attention(
    name: str, feat_size: Sequence[int], seed: int = 0, dim: int = DIM, num_heads: int = NUM_HEADS, **options: Any
) -> GridAttention:
    """An attention of `ATTENTIONS` as it is initialised, in evaluation mode, without the parts of `PLAIN`.

    The square projections of its summaries or landmarks are the identity: these are then the cells' means, normalised.
    Other projections stay random.

    Args:
        name: A key of `ATTENTIONS`.
        feat_size: Grid (H, W).
        seed: Of the initial weights.
        dim: Channels.
        num_heads: Heads.
        **options: The attention's own, such as window_size; its defaults otherwise.
    """
    torch.manual_seed(seed)
    own = inspect.signature(ATTENTIONS[name]).parameters
    options = {key: value for key, value in PLAIN.items() if key in own} | options
    layer = attention_layer(name, feat_size, **options)(dim, num_heads).eval()
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


def softmax_exactly(qkv: torch.Tensor) -> torch.Tensor:
    """Softmax attention in float32, the measure of the errors."""
    q, k, v = qkv.float().unbind(0)
    return F.scaled_dot_product_attention(q, k, v)


def compare(
    name: str,
    qkv: torch.Tensor,
    feat_size: List[int],
    expected: torch.Tensor,
    seed: int = 0,
    repeats: int = 10,
    warmup: int = 2,
) -> Dict[str, object]:
    """A row: tokens, attention, error and, for an attention, milliseconds and MiB.

    Args:
        name: A key of `ATTENTIONS`, or 'mean': every weight is 1 / N.
        qkv: `(3, B, 3, N, 64)`, the same image B times.
        feat_size: Grid (H, W).
        expected: The exact output for one image, `(1, 3, N, 64)`.
        seed: Of the attention's initial weights.
        repeats: Calls of which the median is taken.
        warmup: Calls before them.
    """
    row: Dict[str, object] = dict(tokens=grid_name(feat_size), attention=name)
    if name == 'mean':
        mean = qkv[2].mean(2, keepdim=True).expand_as(qkv[2])
        return row | dict(error=f'{relative_rms(mean[:1], expected):.4f}', **UNTIMED)
    layer = make_attention(name, feat_size, seed).to(qkv.device, qkv.dtype)
    with torch.no_grad():
        row['error'] = f'{relative_rms(layer.attend(qkv[:, :1], feat_size), expected):.4f}'
    leaf = qkv.detach().clone().requires_grad_()
    grad = torch.ones_like(qkv[0])

    @torch.no_grad()
    def forward() -> None:
        layer.attend(qkv, feat_size)

    def step() -> None:
        layer.train()
        torch.autograd.grad(layer.attend(leaf, feat_size), leaf, grad)
        layer.eval()

    seconds = median_seconds([forward, step], qkv.device, repeats, warmup)
    return row | dict(
        forward_ms=f'{1e3 * seconds[0]:.3f}',
        forward_backward_ms=f'{1e3 * seconds[1]:.3f}',
        memory_mib=f'{peak_bytes(step, qkv.device) / 2**20:.1f}',
    )


def grid_name(feat_size: Sequence[int]) -> str:
    """What rows call a grid: a square by its number of tokens, another one 28x42."""
    height, width = feat_size
    return str(height * width) if height == width else f'{height}x{width}'


def compare_all(
    picture: Image.Image,
    grids: Sequence[List[int]],
    names: Sequence[str],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    logit_std: float = 2.0,
    seed: int = 0,
    repeats: int = 10,
    warmup: int = 2,
) -> Iterator[Dict[str, object]]:
    """The rows of `compare`, one after the other: of each grid first the mean's, then each attention's."""
    for feat_size in grids:
        qkv = image_qkv(picture, feat_size, logit_std, seed).to(device, dtype)
        expected = softmax_exactly(qkv)
        qkv = qkv.expand(-1, batch_size, -1, -1, -1).contiguous()
        for name in ['mean', *names]:
            try:
                yield compare(name, qkv, feat_size, expected, seed, repeats, warmup)
            except (torch.cuda.OutOfMemoryError, MemoryError):
                yield dict(tokens=grid_name(feat_size), attention=name, error='out of memory', **UNTIMED)
                torch.cuda.empty_cache()
