"""Transformers for comparisons: a language model over characters and a vision transformer, of the same blocks.

Pre-norm blocks (Radford et al. 2019) with one matrix for queries, keys and values. Initial weights are GPT-2's: normal with
standard deviation 0.02, divided by √(2·depth) where a branch ends in the residual stream, biases 0.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Attention(nn.Module):
    """Multi-head self-attention, ``[N, S, d]`` to ``[N, S, d]``."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens ``[N, S]`` to logits of the token that follows each, ``[N, S, tokens]``; learned positions, a head of its own."""

    def __init__(self, tokens: int, context: int, *, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        _initialise(self, depth)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(x) + self.positions.weight[: x.shape[1]])))


class ViT(nn.Module):
    """Images ``[N, C, H, W]`` to class logits: patches, learned positions, the mean over positions (Zhai et al. 2022)."""

    def __init__(self, in_shape: tuple[int, int, int], classes: int, *, patch: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        channels, height, columns = in_shape
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Embedding((height // patch) * (columns // patch), width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        _initialise(self, depth)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(patches + self.positions.weight)).mean(dim=1))


def _initialise(model: nn.Module, depth: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            ends_branch = name.endswith(("attention.out", "mlp.2"))
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * depth) if ends_branch else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
