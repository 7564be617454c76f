"""A causal Transformer over the bytes of 32 × 32 pictures, with EVA or softmax attention."""

import torch
import torch.nn.functional as F
from torch import nn

from evavit.layers import EvaAttention1d

SIDE, CHANNELS, LEVELS = 32, 3, 256
TOKENS = SIDE * SIDE * CHANNELS


class CausalSoftmax(nn.Module):
    """Softmax attention to the tokens up to one's own, by PyTorch's fastest kernel."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, [3, self.num_heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, dim, attn, drop):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), attn, nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ByteModel(nn.Module):
    """Logits `(B, 3072, 256)` of each byte of pictures `(B, 3072)` from those before it.

    The order is that of the rows, in them of the pixels, in them red, green, blue. A token knows its row, column and
    channel by an embedding each; EVA adds T5's bias inside of its chunks.
    """

    def __init__(self, attention, dim, depth, num_heads, window_size, cell_size, drop):
        super().__init__()

        def make():
            if attention == 'softmax':
                return CausalSoftmax(dim, num_heads)
            sizes = dict(window_size=window_size, cell_size=cell_size)
            return EvaAttention1d(dim, num_heads, **sizes, causal=True, overlap=True)

        self.byte = nn.Embedding(LEVELS + 1, dim)  # the last one stands before the first byte
        self.row, self.column = nn.Embedding(SIDE, dim), nn.Embedding(SIDE, dim)
        self.channel = nn.Embedding(CHANNELS, dim)
        self.blocks = nn.ModuleList(Block(dim, make(), drop) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, LEVELS)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, pictures):
        place = torch.arange(TOKENS, device=pictures.device)
        pixel = place // CHANNELS
        x = self.byte(F.pad(pictures[:, :-1], [1, 0], value=LEVELS))
        x = x + self.row(pixel // SIDE) + self.column(pixel % SIDE) + self.channel(place % CHANNELS)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
