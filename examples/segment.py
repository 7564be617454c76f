#!/usr/bin/env python3
"""Segmentation with segmentation_models.pytorch: python examples/segment.py

`tu-eva_pvt_v2_b3` is the encoder of a U-Net or an FPN, trained on crops of the left half of a photograph of coins and
judged on the right half, from random weights or those of --pretrained-path. pip install '.[dense]' brings what it
needs.
"""

import sys
import time
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
import torch
from scipy import ndimage
from timm.data import resolve_data_config

import evavit
from evavit.arguments import Parser
from evavit.errors import UserError, first_line, run_script
from evavit.models._saved import as_trained
from evavit.training.build import build_model, check_finite
from evavit.training.config import ModelConfig

try:
    import segmentation_models_pytorch as smp
    from skimage import data, filters, morphology, segmentation
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error.name} is not installed: in the clone, pip install '.[dense]'") from None

SIDE = 128


def coins() -> tuple:
    """A photograph that comes with scikit-image, `(3, 288, 384)` from 0 to 1, and its coins, `(288, 384)`, 1 on a coin.

    The coins are found without learning: floods from the surely dark and the surely bright pixels meet at the edges;
    holes are filled, specks removed.
    """
    photograph = data.coins()[:288]
    sure = np.where(photograph > 150, 2, np.where(photograph < 30, 1, 0))
    mask = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(photograph), sure) == 2)
    mask = morphology.opening(mask, morphology.disk(5))
    image = torch.from_numpy(np.repeat(photograph[None] / 255, 3, 0)).float()
    return image, torch.from_numpy(mask).float()


def crops(image: torch.Tensor, mask: torch.Tensor, count: int, side: int = SIDE) -> tuple:
    """Random crops of the left half, mirrored at random: images `(count, 3, side, side)` and masks."""
    images, masks = [], []
    for _ in range(count):
        y = int(torch.randint(image.shape[1] - side + 1, ()))
        x = int(torch.randint(image.shape[2] // 2 - side + 1, ()))
        flip = [-1] if torch.rand(()) < 0.5 else []
        images.append(image[:, y : y + side, x : x + side].flip(flip))
        masks.append(mask[y : y + side, x : x + side].flip(flip))
    return torch.stack(images), torch.stack(masks)


def normalized(images: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """Images from 0 to 1 with the mean and deviation that the encoder's weights know; ImageNet's by default."""
    data = resolve_data_config(model=getattr(model.encoder, 'model', model.encoder))
    mean, std = (torch.tensor(data[name], device=images.device)[:, None, None] for name in ('mean', 'std'))
    return (images - mean) / std


def train(
    model: torch.nn.Module,
    image: torch.Tensor,
    mask: torch.Tensor,
    steps: int,
    batch: int = 4,
    lr: float = 1e-3,
    side: int = SIDE,
) -> list:
    """AdamW on cross-entropy and Dice; returns the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    dice, entropy, losses = smp.losses.DiceLoss('binary'), torch.nn.BCEWithLogitsLoss(), []
    model.train()
    for _ in range(steps):
        images, masks = crops(image, mask, batch, side)
        logits = model(normalized(images, model))
        loss = entropy(logits, masks[:, None]) + dice(logits, masks[:, None])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(path: Optional[str]) -> dict:
    """smp's arguments for random weights, or for a file, which it reads with `encoder_weights=True` alone."""
    if not path:
        return dict(encoder_weights=None)
    return dict(encoder_weights=True, pretrained_cfg_overlay=as_trained(dict(file=path)))


def check(name: str, path: Optional[str]) -> None:
    """UserError or RuntimeError, of one line, on weights that cannot be read or are not finite, and on a model that
    would be fetched."""
    for text in (name, path or ''):
        if text.lower().replace('_', '-').startswith('hf-hub:'):
            raise UserError(
                f'{text} lies on the Hugging Face Hub, and nothing is fetched here; give what is on this disk'
            )
    if path and Path(path).is_file():
        check_finite(evavit.models.read_weights(path), path)


def check_body(name: str, path: Optional[str], **kwargs) -> None:
    """UserError where a file lacks weights of the model's body, which timm begins at random in a model of features.

    The models of this package see to it themselves.
    """
    if path and name not in evavit.models.model_names():
        build_model(ModelConfig(model=name, pretrained_path=path, model_kwargs=kwargs), num_classes=0)


def is_converted(path: str) -> bool:
    """Whether these are weights of a converted ViT."""
    try:
        evavit.load_converted(path)
    except (RuntimeError, ValueError):
        return False
    return True


@torch.no_grad()
def overlap(model: torch.nn.Module, image: torch.Tensor, mask: torch.Tensor) -> float:
    """Intersection over union of the coins on the right half, in one piece: no crop's size."""
    half = image.shape[2] // 2
    logits = model.eval()(normalized(image[None, :, :, half:], model))[0, 0]
    found, coin = logits > 0, mask[:, half:] > 0
    return ((found & coin).sum() / (found | coin).sum()).item()


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--encoder', default='tu-eva_pvt_v2_b3')
    parser.add_argument('--decoder', default='Unet', choices=('Unet', 'FPN'))
    parser.add_argument('--pretrained-path', metavar='FILE', help='weights of a run of the encoder, .safetensors')
    parser.add_argument('--steps', type=int, default=30)
    args = parser.parse_args(argv)
    if not 1 <= args.steps <= 1_000_000:
        raise UserError(f'--steps {args.steps}: must be 1 to 1,000,000')
    torch.manual_seed(0)
    image, mask = coins()
    path = args.pretrained_path
    asked = f'--encoder {args.encoder}' + (f' --pretrained-path {path}' if path else '')
    try:
        check(args.encoder.removeprefix('tu-'), path)
        if path and is_converted(path):
            raise UserError(
                'a converted ViT, which is no pyramid; put evavit.load_converted in the encoder of smp.DPT, '
                'as docs/dense.md shows'
            )
        if args.encoder.startswith('tu-'):
            check_body(args.encoder.removeprefix('tu-'), path)
        model = smp.create_model(args.decoder, args.encoder, classes=1, **weights(path)).eval()
        with torch.no_grad():
            for size in ((SIDE, SIDE), (image.shape[1], image.shape[2] // 2)):  # of training, of judging
                model(torch.zeros(1, 3, *size))
    except UserError as error:
        raise UserError(f'{asked}: {error}') from error
    except Exception as error:  # timm's and smp's models have one each
        hint = '' if path and 'pvt' in args.encoder else '; a pyramid is needed, such as tu-eva_pvt_v2_b3'
        raise UserError(f'{asked}: {first_line(error)}{hint}') from error
    begin = time.time()
    losses = train(model, image, mask, args.steps)
    print(
        f'{args.decoder} on {args.encoder}, {args.steps} steps in {time.time() - begin:.0f} s: loss '
        f'{losses[0]:.2f} to {losses[-1]:.2f}, IoU on the right half {overlap(model, image, mask):.2f} '
        f'(everything a coin: {mask[:, mask.shape[1] // 2 :].mean():.2f})'
    )


if __name__ == '__main__':
    sys.exit(run_script(main))
