#!/usr/bin/env python3
"""Detection with torchvision: python examples/detect.py

A pyramid through a feature pyramid network, or a plain model through a simple feature pyramid, is the backbone of
Faster R-CNN or RetinaNet, trained for some steps on crops of a photograph of coins, from random weights or those of
--pretrained-path. pip install '.[dense]' brings what it needs.
"""

import sys
import time
from typing import Optional, Sequence

import timm
import torch
from scipy import ndimage
from segment import check, check_body, coins, crops, is_converted
from timm.data import resolve_data_config
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torchvision.models.detection import FasterRCNN, RetinaNet

import evavit
from evavit.arguments import Parser
from evavit.dense import DetectionBackbone
from evavit.errors import UserError, first_line, run_script
from evavit.models._saved import as_trained

DETECTORS = {'faster_rcnn': FasterRCNN, 'retinanet': RetinaNet}


def build(
    model: Optional[str], detector: str, side: int, out_channels: int = 256, weights: Optional[str] = None, **kwargs
) -> torch.nn.Module:
    """A detector of one class beside the background, for images of about `side` pixels.

    `weights` is the file of a run of `model`; without `model` a run of a converted ViT, which knows its own.
    """
    if not model:
        free = dict(dynamic_img_size=True, dynamic_img_pad=True)
        features = evavit.load_converted(weights, features_only=True, out_indices=1, **free)
        return head(features, detector, side, out_channels)
    if weights:
        if is_converted(weights):
            raise ValueError('a converted run knows its model; leave --model out')
        evavit.models.read_weights(weights)  # which says what is wrong with it
        check_body(model, weights, **kwargs)
    if is_plain(model):
        kwargs = dict(dynamic_img_size=True, dynamic_img_pad=True, out_indices=1, **kwargs)  # the last block's map
    if weights:
        kwargs = dict(pretrained=True, pretrained_cfg_overlay=as_trained(dict(file=weights)), **kwargs)
    return head(timm.create_model(model, features_only=True, **kwargs), detector, side, out_channels)


def is_plain(model: str) -> bool:
    """Whether a model is a ViT, of this package or timm's, that takes images of any size where it is told to."""
    with torch.device('meta'):
        made = timm.create_model(model)
    return isinstance(made, (VisionTransformer, Eva))


def head(features: torch.nn.Module, detector: str, side: int, out_channels: int) -> torch.nn.Module:
    """The detector behind a backbone's maps, which normalises images as the backbone's weights know them."""
    backbone, data = DetectionBackbone(features, out_channels), resolve_data_config(model=features)
    normal = dict(image_mean=data['mean'], image_std=data['std'])
    return DETECTORS[detector](backbone, num_classes=2, min_size=side, max_size=2 * side, **normal)


def targets(masks: torch.Tensor) -> list:
    """Boxes x0, y0, x1, y1 of the connected pieces of masks `(B, H, W)`, specks left out, all of class 1."""
    found = []
    for mask in masks:
        places = ndimage.find_objects(ndimage.label(mask.numpy())[0])
        boxes = (
            torch.tensor(
                [[x.start, y.start, x.stop, y.stop] for y, x in places if min(x.stop - x.start, y.stop - y.start) >= 8]
            )
            .reshape(-1, 4)
            .float()
        )
        found.append(dict(boxes=boxes, labels=torch.ones(len(boxes), dtype=torch.int64)))
    return found


def train(
    model: torch.nn.Module,
    image: torch.Tensor,
    mask: torch.Tensor,
    steps: int,
    batch: int = 2,
    side: int = 192,
    lr: float = 3e-4,
) -> list:
    """AdamW on the sum of the detector's losses; returns that of each step."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01), []
    model.train()
    for _ in range(steps):
        images, masks = crops(image, mask, batch, side)
        loss = sum(model(list(images), targets(masks)).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', help='eva_pvt_v2_b3 by default; another pyramid, or a plain ViT: eva_deit_tiny')
    parser.add_argument('--detector', default='faster_rcnn', choices=list(DETECTORS))
    parser.add_argument(
        '--pretrained-path',
        metavar='PATH',
        help='weights of a run: the file of one of --model, or a converted one, without --model',
    )
    parser.add_argument('--steps', type=int, default=20)
    args = parser.parse_args(argv)
    if not 1 <= args.steps <= 1_000_000:
        raise UserError(f'--steps {args.steps}: must be 1 to 1,000,000')
    if not args.pretrained_path:
        args.model = args.model or 'eva_pvt_v2_b3'
    torch.manual_seed(0)
    image, mask = coins()
    given = {'--model': args.model, '--pretrained-path': args.pretrained_path}
    asked = ' '.join(f'{flag} {value}' for flag, value in given.items() if value)
    try:
        check(args.model or '', args.pretrained_path)
        model = build(args.model, args.detector, side=192, weights=args.pretrained_path)
        with torch.no_grad():
            model.eval().backbone(torch.zeros(1, 3, 192, 256))
    except Exception as error:  # timm's models have one each
        raise UserError(f'{asked}: {first_line(error)}') from error
    begin = time.time()
    losses = train(model, image, mask, args.steps)
    with torch.no_grad():
        found = model.eval()([image])[0]
    print(
        f'{args.detector} on {args.model or args.pretrained_path}, {args.steps} steps in '
        f'{time.time() - begin:.0f} s: loss {losses[0]:.2f} to {sum(losses[-5:]) / len(losses[-5:]):.2f}; '
        f'{len(found["boxes"])} boxes on the whole photograph'
    )


if __name__ == '__main__':
    sys.exit(run_script(main))
