#!/usr/bin/env python3
"""An autoregressive model of images with causal EVA: python examples/causal_digits.py

The Digits of scikit-learn are 8 × 8 pixels of 17 grey levels. Read row by row they are sequences of 64 symbols, and a
small Transformer with `EvaAttention1d(causal=True)` predicts each from those before it. A minute or two on two cores
give fewer bits per pixel than any model of single pixels can; new digits then come one pixel at a time, through
`EvaAttention1d.step`. Needs scikit-learn.
"""

import math
import sys
import time
from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from evavit.arguments import Parser
from evavit.errors import UserError, run_script
from evavit.layers import EvaAttention1d

LEVELS, PIXELS = 17, 64


def load() -> tuple:
    """Grey levels of the training and the test images, `(images, 64)`; the last 360 images are the test."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().data).long()
    return images[:-360], images[-360:]


class CausalBlock(nn.Module):
    """Pre-norm block around causal EVA."""

    def __init__(self, dim: int, num_heads: int, window_size: int, cell_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = EvaAttention1d(
            dim, num_heads, window_size=window_size, cell_size=cell_size, causal=True, overlap=True
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def step(self, x: torch.Tensor, cache) -> tuple:
        y, cache = self.attn.step(self.norm1(x), cache)
        x = x + y
        return x + self.mlp(self.norm2(x)), cache


class PixelModel(nn.Module):
    """Logits of every pixel's grey level from the pixels before it.

    Chunks are two rows of the image, with one more row of context; cells are half a row.
    """

    def __init__(self, dim: int = 64, depth: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.level = nn.Embedding(LEVELS + 1, dim)  # the last one stands before the first pixel
        self.position = nn.Parameter(0.02 * torch.randn(PIXELS, dim))
        self.blocks = nn.ModuleList(CausalBlock(dim, num_heads, 16, 4) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, LEVELS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits `(B, 64, 17)` for grey levels `(B, 64)`."""
        x = self.level(F.pad(images[:, :-1], [1, 0], value=LEVELS)) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draw images `(count, 64)`, pixel by pixel."""
        caches = [None] * len(self.blocks)
        pixels = [torch.full((count, 1), LEVELS)]
        for n in range(PIXELS):
            x = self.level(pixels[-1]) + self.position[n]
            for i, block in enumerate(self.blocks):
                x, caches[i] = block.step(x, caches[i])
            probabilities = self.head(self.norm(x)).softmax(-1).squeeze(1)
            pixels.append(torch.multinomial(probabilities, 1, generator=generator))
        return torch.cat(pixels[1:], 1)


def train(model: nn.Module, images: torch.Tensor, epochs: int, lr: float = 3e-3, batch_size: int = 64) -> None:
    """AdamW, a cosine from lr to 0 with a short warm-up."""
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        start = step * batch_size % (len(images) - batch_size + 1)
        if start < batch_size:
            images = images[torch.randperm(len(images))]
        batch = images[start : start + batch_size]
        loss = F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def bits_per_pixel(model: nn.Module, images: torch.Tensor) -> float:
    """Mean code length of a pixel."""
    model.eval()
    return F.cross_entropy(model(images).flatten(0, 1), images.flatten()).item() / math.log(2)


def unigram_bits_per_pixel(images: torch.Tensor, test: torch.Tensor, by_position: bool = False) -> float:
    """The same with the frequencies of the training images, of all pixels alike or of each position; one added."""
    counts = F.one_hot(images, LEVELS).sum(0).double()
    if not by_position:
        counts = counts.sum(0, keepdim=True).expand(PIXELS, -1)
    probabilities = (counts + 1) / (counts + 1).sum(-1, keepdim=True)
    return -probabilities.log2()[torch.arange(PIXELS), test].mean().item()


def draw(images: torch.Tensor) -> str:
    """Images side by side as text."""
    shades = ' .:-=+*#%@'
    rows = images.view(-1, 8, 8).transpose(0, 1)
    return '\n'.join(
        '  '.join(''.join(2 * shades[min(level * 10 // LEVELS, 9)] for level in line) for line in row)
        for row in rows.tolist()
    )


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=15)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--samples', type=int, default=5, help='digits to draw')
    args = parser.parse_args(argv)
    for name, low, high in (('epochs', 1, 10**6), ('seed', 0, 2**63 - 1), ('samples', 0, 1000)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f'--{name} {getattr(args, name)}: takes a whole number of {low} to {high}')
    torch.manual_seed(args.seed)
    images, test = load()
    model = PixelModel()
    begin = time.time()
    train(model, images, args.epochs)
    print(f'trained {args.epochs} epochs in {time.time() - begin:.0f} s')
    print(
        f'bits per pixel on {len(test)} test images: causal EVA {bits_per_pixel(model, test):.3f}, '
        f'a distribution for each position {unigram_bits_per_pixel(images, test, by_position=True):.3f}, '
        f'one for all pixels {unigram_bits_per_pixel(images, test):.3f}'
    )
    if args.samples:
        print(draw(model.sample(args.samples, torch.Generator().manual_seed(args.seed))))


if __name__ == '__main__':
    sys.exit(run_script(main))
