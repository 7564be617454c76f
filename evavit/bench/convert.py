"""Converted models: the time and memory of a timm ViT with softmax attention and on EVA, over the side of the image."""

import copy
from typing import Any, Dict, List, Tuple

import timm
import torch

from evavit.errors import UserError, first_line
from evavit.models import convert_vit
from evavit.models._converted import why_not_converted
from evavit.training.compilation import AS_IS, Compilation

from .clocks import Call
from .contenders import ERROR_BOUNDS, Contender, Setting, measure, worst_error
from .models import build, parse_model
from .results import Row

__all__ = ['SIDES', 'VITS', 'bench_convert', 'fit_side']

SIDES = (224, 336, 518, 728, 1022, 1400, 2044)  # whole patches of 14
VITS = (  # of width 192, 384, 768 and 1,024
    'vit_small_patch14_reg4_dinov2:embed_dim=192:num_heads=3',
    'vit_small_patch14_reg4_dinov2',
    'vit_base_patch14_reg4_dinov2',
    'vit_large_patch14_reg4_dinov2',
)
TOKENS = 2**15  # of a batch
CHECKED_SIDE = 8  # patches along an axis of the images on which a contender is held against float64
# The contender's name and its arguments of `convert_vit`.
CONVERTED: Dict[str, Dict[str, Any]] = {
    'softmax': {},
    '49 cells': dict(partition_grid=7),
    'cells of 3': dict(),
}


def fit_side(text: str, side: int) -> Tuple[int, int]:
    """The largest side up to `side` that a model's patches divide, and the images of a batch of it.

    Raises:
        UserError: no such model, one that cannot be converted, or a side below that of a patch.
    """
    name, kwargs = parse_model(text)
    try:
        with torch.device('meta'):
            model: Any = timm.create_model(name, **kwargs)
    except Exception as error:  # each model has its own errors for arguments that do not fit
        raise UserError(f'--model {text}: {first_line(error)[:300]}') from error
    if reason := why_not_converted(model):
        raise UserError(f'--bench convert --model {text}: {reason}')
    patch = model.patch_embed.patch_size[0]
    if side < patch:
        raise UserError(f'--img-size {side}: {text} has patches of {patch} × {patch} pixels; give at least {patch}')
    return side // patch * patch, max(1, TOKENS // (side // patch) ** 2)


def bench_convert(setting: Setting, text: str, batch: int, side: int, compilation: Compilation = AS_IS) -> List[Row]:
    """A timm ViT as it is, and converted: windows of 7 × 7 tokens, with 7 × 7 cells and with cells of 3 × 3 tokens, at
    most 16 × 16 of them.

    `forward_ms` is inference, `ms` a training step: forward, mean of the squared output, backward, without optimizer.

    Args:
        setting: Device, dtype, repeats.
        text: The model, with arguments as `parse_model` reads them.
        batch: Images.
        side: Of the images.
        compilation: How all models are compiled, if they are.
    """
    torch.compiler.reset()
    device = setting.device

    def contender(name: str, options: Dict[str, Any]) -> Contender:
        def make(side: int) -> Any:
            model = build(*parse_model(text), side, str(device))
            return (model if name == 'softmax' else convert_vit(model, inplace=True, **options)).to(device)

        model = make(side)
        with setting.autocast():
            backend = 'sdpa' if name == 'softmax' else model.blocks[0].attn.backend
        row = dict(
            bench='convert',
            case=text,
            model=name,
            attention='softmax' if name == 'softmax' else 'eva',
            backend=backend,
            batch_size=batch,
            img_size=side,
            tokens=model.patch_embed.num_patches,
            width=model.embed_dim,
            heads=model.blocks[0].attn.num_heads,
            torchcompile=compilation.label,
        )

        def check() -> float:
            small = make(CHECKED_SIDE * model.patch_embed.patch_size[0]).eval()
            images = torch.randn(2, 3, *small.patch_embed.img_size, device=device)
            exact = copy.deepcopy(small).double()
            with torch.no_grad(), setting.autocast():
                judged = small(images)
            with torch.no_grad():
                return worst_error([judged], [exact(images.double())])

        def prepare() -> Dict[str, Call]:
            run = compilation.compile(model)
            images = torch.randn(batch, 3, side, side, device=device)

            def infer() -> torch.Tensor:
                model.eval()
                with torch.no_grad(), setting.autocast(), compilation.step():
                    return run(images)

            def train() -> torch.Tensor:
                model.train()
                with setting.autocast(), compilation.step():
                    loss = run(images).float().square().mean()
                loss.backward()
                model.zero_grad()
                return loss.detach()

            return {'forward_ms': infer, 'ms': train}

        return Contender(row, check, prepare)

    rows = measure(
        setting,
        [contender(name, options) for name, options in CONVERTED.items()],
        lambda row: ERROR_BOUNDS['model'][setting.dtype],
    )
    for row in rows:
        if row['status'] == 'ok':
            row['img_per_s'] = round(1e3 * batch / row['ms'], 1)
    return rows
