#!/usr/bin/env python3
"""Train in half precision on images made to break it: python experiments/adversarial/run.py [--steps 200]

The four models take images of contrast × 30, constant ones, ones with one pixel on, checkerboards between extremes, and
plain ones between them. Each line: steps whose loss was not finite, steps that float16's scaler skipped while it sought
its scale, the last loss. An error where a loss or a weight was not finite, or the scaler went on skipping.
"""

import sys
from typing import NamedTuple

import timm
import torch

import evavit  # noqa: F401  (registers the models with timm)
from evavit.arguments import Parser, find_device
from evavit.errors import UserError, run_script
from evavit.training.config import parse_settings
from evavit.training.loop import Stepper, autocast

MODELS = ('eva_deit_tiny', 'eva_deit_small', 'eva_deit_tiny_784', 'eva_pvt_v2_b3')
DTYPES = ('bfloat16', 'float16')
SMALL = dict(  # the same code on few tokens, for a CPU
    eva_deit_tiny=dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, window_size=2, partition_grid=2),
    eva_deit_small=dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, window_size=2, partition_grid=2),
    eva_deit_tiny_784=dict(
        img_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2, window_size=3, partition_grid=3
    ),
    eva_pvt_v2_b3=dict(img_size=64, depths=(1, 1, 1, 1), embed_dims=(16, 32, 80, 128)),
)


class Result(NamedTuple):
    bad: int  # steps whose loss was not finite, and 1 if a weight is not
    skipped: int  # steps that changed nothing
    late: int  # those of them in the second half
    loss: float


def images_of(step, batch, size, device, generator):
    """Normalised images of one kind, by the step."""
    plain = torch.randn(batch, 3, size, size, device=device, generator=generator)
    kind = step % 5
    if kind == 0:
        return 30 * plain
    if kind == 1:  # each image of one value, from 0 to 200
        return torch.linspace(0, 200, batch, device=device).view(-1, 1, 1, 1).expand_as(plain).contiguous()
    if kind == 2:  # black, but for one pixel
        image = torch.full_like(plain, -2.0)
        image[:, :, step % size, (7 * step) % size] = 80.0
        return image
    if kind == 3:
        board = (torch.arange(size, device=device)[:, None] + torch.arange(size, device=device)) % 2
        return (80.0 * (2 * board - 1)).to(plain).expand_as(plain).contiguous()
    return plain


def train(name, dtype, device, steps=200, small=False):
    """`steps` updates of AdamW at the recipe's rate, clipping and drop path, with the training loop's own step."""
    settings, _ = parse_settings('train', ['--amp', '--amp-dtype', dtype, '--clip-grad', '5'])
    device = torch.device(device)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.1, **(SMALL[name] if small else {})).to(device)
    size, batch = model.pretrained_cfg['input_size'][-1], 4 if small else 32
    size = SMALL[name]['img_size'] if small else size
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=device.type == 'cuda')
    stepper, parameters = Stepper(settings.machine, settings.optim, device), list(model.parameters())
    generator = torch.Generator(device).manual_seed(1)
    losses, norms = [], []
    for step in range(steps):
        images = images_of(step, batch, size, device, generator)
        target = torch.randint(10, (batch,), device=device, generator=generator)
        with autocast(settings.machine, device):
            loss = torch.nn.functional.cross_entropy(model(images), target)
        stepper.backward(loss)
        losses.append(loss.detach())
        norms.append(stepper.step(optimizer, losses[-1], parameters, parameters))
    finite, changed = torch.stack(losses).isfinite(), torch.stack(norms).isfinite()
    whole = all(bool(parameter.isfinite().all()) for parameter in parameters)
    return Result(
        int((~finite).sum()) + (not whole),
        int((~changed).sum()),
        int((~changed)[steps // 2 :].sum()),
        losses[-1].item(),
    )


def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', nargs='+', choices=MODELS, default=MODELS, help='which (default: all four)')
    parser.add_argument('--steps', type=int, default=200)
    parser.add_argument('--device', help='cpu, cuda or cuda:N (the first GPU, or else the CPU)')
    parser.add_argument('--small', action='store_true', help='small models, for a CPU')
    flags, broken = parser.parse_args(argv), 0
    if flags.steps < 1:
        raise UserError(f'--steps {flags.steps}: at least 1')
    device = find_device(flags.device)
    for name in flags.model:
        for dtype in DTYPES:
            result = train(name, dtype, device, flags.steps, flags.small)
            broken += bool(result.bad or result.late)
            print(
                f'{name} {dtype} {flags.steps} steps: {result.bad} not finite, {result.skipped} skipped '
                f'({result.late} in the second half), last loss {result.loss:.3f}',
                flush=True,
            )
    if broken:
        raise UserError(f'{broken} runs had a loss or weight that is not finite, or went on skipping')


if __name__ == '__main__':
    sys.exit(run_script(main))
