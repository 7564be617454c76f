#!/usr/bin/env python3
"""Softmax weights in an EVA model, and how near it starts: python experiments/softmax_to_eva/run.py

Trains a small softmax ViT on scikit-learn's Digits (a minute or two on a core), takes its weights into the same model
with EVA, and compares ways to start what EVA has beside softmax attention: the summaries, and the bias of the window.
Printed for each: the error of the attention's output, mean over the layers on the softmax network's own tokens; the
error of the logits; accuracy. No training follows. `--pyramid` does it with a small PVT of timm, which shortens keys
and values; `--convert` with two networks of timm that have a class token, `eva02` rotary positions too, which
`evavit.convert_vit` converts: each start with every `count_cells`. `--weights FILE` takes a file of a softmax ViT
(timm's names) instead of training, and two photographs that scikit-learn carries: errors alone. Needs scikit-learn.
"""

import argparse
import logging
import math
import sys
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import evavit
from evavit.bench.results import ORIGIN, check_writable, origin, read_rows, store_rows
from evavit.errors import UserError, first_line, run_script
from evavit.models import fit_checkpoint
from evavit.training import build

COLUMNS = ('weights', 'start', 'attention', 'output', 'top1', 'seed', 'torch', 'timm', 'evavit', 'count_cells')
COLUMNS += tuple(column for column in ORIGIN if column not in COLUMNS)
AS_CONVERTED = '**linear summary, as converted**'
DIGITS = dict(in_chans=1, img_size=32, patch_size=4, embed_dim=96, depth=3, num_heads=3, num_classes=10)
WINDOW = dict(window_size=4, partition_grid=4)  # on 8 × 8 tokens: windows of a quarter, cells of 2 × 2
PYRAMID = dict(
    in_chans=1,
    embed_dims=(32, 64, 96, 128),
    depths=(1, 1, 1, 1),
    num_heads=(1, 2, 3, 4),
    mlp_ratios=(4, 4, 4, 4),
    num_classes=10,
)  # at 64 × 64 pixels: 16 × 16 tokens, 8 × 8, 4 × 4, 2 × 2

CONVERTED = {  # --convert: timm's name, what else it is made with, what its rows are called
    'vit': ('vit_tiny_patch16_224', {}, 'Digits, class token, 1 + 64 tokens'),
    'eva02': (
        'eva02_tiny_patch14_224',
        dict(global_pool='token', ref_feat_shape=(8, 8)),
        'Digits, class token, rotary, 1 + 64 tokens',
    ),
}


def digits(side: int = 32) -> tuple:
    """Images `(1797, 1, side, side)` of mean 0 and deviation 1, and their labels; the last 360 are the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1)
    images = F.interpolate((images - images.mean()) / images.std(), size=side, mode='bicubic')
    return images, torch.from_numpy(data.target)


def photographs(side: int, count: int = 8) -> torch.Tensor:
    """Crops of scikit-learn's two sample photographs, `(count, 3, side, side)`."""
    from sklearn.datasets import load_sample_images

    rng, pictures, crops = np.random.default_rng(0), load_sample_images().images, []
    for i in range(count):
        picture, size = pictures[i % 2], rng.integers(200, 420)
        y, x = rng.integers(0, picture.shape[0] - size + 1), rng.integers(0, picture.shape[1] - size + 1)
        crop = Image.fromarray(picture[y : y + size, x : x + size]).resize((side, side), Image.Resampling.BICUBIC)
        crops.append(np.asarray(crop) / 255)
    images = torch.from_numpy(np.stack(crops)).float().permute(0, 3, 1, 2)
    mean, std = (
        torch.tensor(value).view(3, 1, 1) for value in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    return (images - mean) / std


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """AdamW, a cosine from 2.5e-3 to 0 with a short warm-up, digits shifted by up to two pixels."""
    size = 48
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.5e-3, epochs * (len(images) // size), pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(size):
            if len(batch) < size:
                continue
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(images[batch].roll(shift, (2, 3))), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    model.eval()


def blocks(network: torch.nn.Module) -> list:
    """The blocks that have EVA in an EVA model: all of a DeiT, those before the last stage of a pyramid."""
    return (
        [block for stage in network.stages[:-1] for block in stage.blocks]
        if hasattr(network, 'stages')
        else list(network.blocks)
    )


def identity_before_norm(network: torch.nn.Module, length: str) -> torch.nn.Module:
    """The projection the identity; LayerNorm gives every summary the length `length` times √d."""
    for block in blocks(network):
        for summary, rows in zip((block.attn.summary_q, block.attn.summary_k), (0, 1), strict=True):
            torch.nn.init.eye_(summary.proj.weight)
            torch.nn.init.zeros_(summary.proj.bias)
            torch.nn.init.zeros_(summary.norm.bias)
            scale = 1.0
            if length == 'typical':  # of a token's query or key, whose input is white with the norm's variances
                weight = block.attn.qkv.weight.chunk(3)[rows] * block.norm1.weight
                scale = weight.square().sum(1).mean().sqrt().item()
            torch.nn.init.constant_(summary.norm.weight, scale)
    return network


def starts(softmax: torch.nn.Module, sizes: dict, window: dict) -> dict:
    """Models with EVA that hold the softmax network's weights, by how the rest starts."""
    pyramid = 'depths' in sizes

    def model(attention='eva', **options):
        name = f'{attention}_{"pvt_v2_b3" if pyramid else "deit_tiny"}'
        return timm.create_model(name, **sizes, **(window if attention == 'eva' else {}), **options).eval()

    def converted(**options):
        ours = model(**options)
        ours.load_state_dict(fit_checkpoint(softmax.state_dict(), ours)[0])
        return ours

    def usual(network):
        """What EVA has of its own, as training from nothing starts it."""
        own = {name: value for name, value in model().state_dict().items() if 'summary' in name or 'rel_pos' in name}
        network.load_state_dict({**network.state_dict(), **own})
        return network

    def bias(network, shift):
        """The bias of the window as the conversion has it, and `shift`; None for no bias at all."""
        for block in blocks(network):
            table = block.attn.rel_pos.relative_position_bias_table
            table.copy_(torch.zeros_like(table) if shift is None else table + shift)
        return network

    whole = {'softmax, keys and values not shortened': converted(attention='softmax')} if pyramid else {}
    return whole | {
        'as from nothing': usual(converted()),
        'projection 1, LayerNorm weight 1': identity_before_norm(converted(), 'one'),
        'projection 1, LayerNorm weight typical': identity_before_norm(converted(), 'typical'),
        AS_CONVERTED: converted(),
        'the same, no count of tokens in the bias': bias(converted(), None),
        'the same, count × 0.6': bias(converted(), 0.5),
        'the same, count × 1.6': bias(converted(), -0.5),
        'the same, proposal_scale=0.5': converted(proposal_scale=0.5),
        'the same, proposal_scale=0': converted(proposal_scale=0.0),
        "the same, partition='complement'": converted(partition='complement'),
        "summary='identity'": converted(summary='identity'),
    }


def conversions(vit: torch.nn.Module, window: dict) -> list:
    """(start, model) of what `evavit.convert_vit` makes of timm's network, each start with every `count_cells`."""
    drawn = evavit.convert_vit(vit, **window)
    for block in blocks(drawn):  # as the layer by itself starts
        for summary in (block.attn.summary_q, block.attn.summary_k):
            summary.proj.reset_parameters()
            summary.norm.reset_parameters()
    found = []
    for count in ('outside', 'all', 'one'):

        def converted(count=count, **options):
            return evavit.convert_vit(vit, count_cells=count, **window, **options)

        nothing = converted()
        nothing.load_state_dict(drawn.state_dict())
        found += [
            ('as from nothing', nothing),
            ('projection 1, LayerNorm weight 1', identity_before_norm(converted(), 'one')),
            ('projection 1, LayerNorm weight typical', identity_before_norm(converted(), 'typical')),
            (AS_CONVERTED, converted()),
            ('the same, proposal_scale=0.5', converted(proposal_scale=0.5)),
            ('the same, proposal_scale=0', converted(proposal_scale=0.0)),
        ]
    return found


def errors(softmax: torch.nn.Module, eva: torch.nn.Module, images: torch.Tensor) -> tuple:
    """Relative errors of EVA: of the attentions' outputs on the softmax network's tokens, and of the network's."""
    seen, layers = [], []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, *given: seen.append(given), with_kwargs=True)
        for block in blocks(softmax)
    ]
    target = softmax(images)
    for hook in hooks:
        hook.remove()
    for ours, theirs, (given, named) in zip(blocks(eva), blocks(softmax), seen, strict=True):
        want = theirs.attn(*given, **named)
        layers.append((ours.attn(*given, **named) - want).norm() / want.norm())
    return torch.stack(layers).mean().item(), ((eva(images) - target).norm() / target.norm()).item()


def from_file(path: str) -> tuple:
    """The softmax network of a file at 14 × 14 tokens, its sizes, and photographs of that size."""
    state = build.read_weights(path)
    build.check_finite(state, path)
    try:
        patch = state['patch_embed.proj.weight'].shape[-1]
        dim = state['pos_embed'].shape[-1]
        sizes = dict(
            img_size=14 * patch,
            patch_size=patch,
            embed_dim=dim,
            num_heads=dim // 64,
            num_classes=0,
            depth=len({name.split('.')[1] for name in state if name.startswith('blocks.')}),
            init_values=1.0 if 'blocks.0.ls1.gamma' in state else None,
        )
        softmax = timm.create_model('softmax_deit_tiny', **sizes).eval()
        softmax.load_state_dict(state)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        raise UserError(f'--weights {path}: no softmax ViT ({first_line(error)[:200]})') from error
    return softmax, sizes, photographs(14 * patch)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--pyramid', action='store_true', help='a small PVT instead of a ViT')
    parser.add_argument('--convert', choices=CONVERTED, help='a network of timm with class token, by convert_vit')
    parser.add_argument('--weights', metavar='FILE', help='a softmax ViT instead of training one on Digits')
    parser.add_argument('--label', help='what the rows are called')
    parser.add_argument('--results-file', type=Path, metavar='CSV', help='put the rows into this file')
    args = parser.parse_args(argv)
    if bool(args.pyramid) + bool(args.convert) + bool(args.weights) > 1:
        raise UserError('--pyramid, --convert and --weights each name a network; give one of them')
    if args.results_file:
        check_writable(args.results_file)
        read_rows(args.results_file, COLUMNS)
    logging.getLogger('evavit').setLevel(logging.ERROR)  # each conversion is a table
    torch.manual_seed(args.seed)
    if args.weights:
        softmax, sizes, images = from_file(args.weights)
        args.label = args.label or args.weights
        labels, window = None, {}
    else:
        images, labels = digits(64 if args.pyramid else 32)
        sizes, window = PYRAMID if args.pyramid else DIGITS, WINDOW
        name, more, label = 'softmax_deit_tiny', {}, 'Digits, 64 tokens'
        if args.pyramid:
            name, label = 'pvt_v2_b3', 'Digits, PVT, 256 tokens'
        elif args.convert:
            name, more, label = CONVERTED[args.convert]
        softmax = timm.create_model(name, **sizes, **more)
        args.label = args.label or label
        train(softmax, images[:-360], labels[:-360], args.epochs)
        images, labels = images[-360:], labels[-360:]
    with torch.no_grad():
        models = conversions(softmax, window) if args.convert else starts(softmax, sizes, window).items()
        # as it is, with attentions that are called as those of the others
        softmax = evavit.convert_vit(softmax, attention='softmax') if args.convert else softmax
        table(args, softmax, models, images, labels)


def table(args, softmax, models, images, labels) -> list:
    """Print the comparison of (start, model), and write it where asked. Returns its rows."""

    def top1(model):
        return math.nan if labels is None else 100 * (model(images).argmax(1) == labels).float().mean().item()

    rows = [dict(start='softmax', count_cells='', attention=0.0, output=0.0, top1=top1(softmax))]
    for name, model in models:
        attention, output = errors(softmax, model, images)
        count = getattr(model, 'conversion', {}).get('count_cells', '')
        rows.append(dict(start=name, count_cells=count, attention=attention, output=output, top1=top1(model)))
    print(f'{"start":44} {"count":8} {"attention":>9} {"output":>8} {"top-1":>7}')
    for row in rows:
        errors_of = f'{row["attention"]:9.3f} {row["output"]:8.3f} {row["top1"]:7.2f}'
        print(f'{row["start"]:44} {row["count_cells"]:8} {errors_of}')
    if args.results_file:
        about = origin(torch.device('cpu'))
        found = [
            dict(weights=args.label, seed=args.seed, **about)
            | {name: f'{value:.4f}' if isinstance(value, float) else value for name, value in row.items()}
            for row in rows
        ]
        store_rows(args.results_file, found, COLUMNS, ('weights', 'start', 'count_cells', 'seed'))
    return rows


if __name__ == '__main__':
    sys.exit(run_script(main))
