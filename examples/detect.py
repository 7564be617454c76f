#!/usr/bin/env python3
"""Detection with torchvision: python examples/detect.py

A pyramid through a feature pyramid network, or a plain model through a simple feature pyramid, is the backbone of
Faster R-CNN or RetinaNet, trained for some steps on crops of a photograph of coins. pip install '.[dense]'
brings what it needs.
"""

import argparse
import time

import timm
import torch
from scipy import ndimage
from segment import coins, crops
from torchvision.models.detection import FasterRCNN, RetinaNet

from evavit.dense import DetectionBackbone
from evavit.models import GridVisionTransformer, families

DETECTORS = {'faster_rcnn': FasterRCNN, 'retinanet': RetinaNet}


def build(model: str, detector: str, side: int, out_channels: int = 256, **kwargs) -> torch.nn.Module:
    """A detector of one class beside the background, for images of about `side` pixels."""
    if any(model in family.models for family in families().values() if issubclass(family.model, GridVisionTransformer)):
        kwargs = dict(dynamic_img_size=True, out_indices=1, **kwargs)  # one map, the last block's
    backbone = DetectionBackbone(timm.create_model(model, features_only=True, **kwargs), out_channels)
    return DETECTORS[detector](backbone, num_classes=2, min_size=side, max_size=2 * side)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='eva_pvt_v2_b3', help='or eva_deit_tiny, any of the plain models')
    parser.add_argument('--detector', default='faster_rcnn', choices=list(DETECTORS))
    parser.add_argument('--steps', type=int, default=20)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f'--steps {args.steps}: at least 1')
    torch.manual_seed(0)
    image, mask = coins()
    try:
        model = build(args.model, args.detector, side=192)
    except (RuntimeError, ValueError) as error:
        parser.error(f'--model {args.model}: {error}')
    begin = time.time()
    losses = train(model, image, mask, args.steps)
    with torch.no_grad():
        found = model.eval()([image])[0]
    print(
        f'{args.detector} on {args.model}, {args.steps} steps in {time.time() - begin:.0f} s: loss {losses[0]:.2f} '
        f'to {sum(losses[-5:]) / len(losses[-5:]):.2f}; {len(found["boxes"])} boxes on the whole photograph'
    )


if __name__ == '__main__':
    main()
