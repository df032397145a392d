"""ViT-VQGAN (Yu et al. 2021, arXiv:2110.04627): an autoencoder of two transformers (Dosovitskiy et al. 2020, ViT).

The encoder is a linear embedding of factor x factor patches, transformer blocks, and a linear map to the quantizer's
width; the decoder mirrors it. Every position sees the whole image from the first layer on. The paper quantizes
directions in few dimensions: `quantizer: {kind: vq, codes: 8192, dim: 32, normalize: true}`.

A transformer's output varies little at first and soon much more, so the codebook must adapt quickly: on digits, `ema`
with a decay of 0.99 left three quarters of 128 codes unused, while with 0.9 all were used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .autoencoder import Autoencoder, AutoencoderConfig
from .layers import FusedLinear, Unshuffle


class ViTConfig(AutoencoderConfig):
    factor: Literal[2, 4, 7, 8, 14, 16] = Field(4, description="side of a patch in pixels; a patch is one position")
    dim: int = Field(128, ge=8, le=4096, description="width of the residual stream")
    depth: int = Field(4, ge=1, le=64, description="number of transformer blocks, in each of encoder and decoder")
    heads: int = Field(4, ge=1, le=256, description="number of attention heads; must divide dim")
    mlp: int = Field(4, ge=1, le=16, description="width of a block's hidden layer, as a multiple of dim")

    def check(self) -> Iterator[str]:
        yield from super().check()
        if any(side % self.factor for side in self.image_size):
            yield f"factor: {self.factor} does not divide the image size {'x'.join(map(str, self.image_size))}"
        if self.dim % self.heads:
            yield f"heads: dim must be a multiple of heads (got dim {self.dim}, heads {self.heads})"


class ViT(Autoencoder, name="vit"):
    """A transformer encoder and decoder, with one position per patch."""

    Config = ViTConfig

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(config, config.factor)
        factor, area, width = config.factor, config.factor**2, self.quantizer.dim
        self.encoder = nn.Sequential(Unshuffle(factor), Transformer(config, config.channels * area, width))
        self.decoder = nn.Sequential(Transformer(config, width, self.outputs * area), nn.PixelShuffle(factor))


class Transformer(nn.Module):
    """Maps `(B, inputs, h, w)` to `(B, outputs, h, w)`; every position attends to all others. Position embeddings are
    learned, as in ViT. (The paper's head has a hidden tanh layer; a linear head learned faster.)"""

    def __init__(self, config: ViTConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        height, width = (side // config.factor for side in config.image_size)
        self.embed = nn.Linear(inputs, config.dim)
        self.positions = nn.Parameter(torch.empty(height * width, config.dim).normal_(std=0.02))
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.norm, self.head = nn.LayerNorm(config.dim), nn.Linear(config.dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous, so that products round identically in every memory format.
        rows = x.movedim(1, -1).flatten(1, 2).contiguous()
        rows = self.blocks(self.embed(rows) + self.positions)
        return self.head(self.norm(rows)).unflatten(1, x.shape[2:]).movedim(-1, 1)


class Block(nn.Module):
    """Pre-normalised attention and MLP on the residual stream `(B, N, dim)`.

    `nn.TransformerEncoderLayer` is not used, because its fast path in eval mode rounds differently.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.mlp * config.dim
        self.heads = config.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = FusedLinear(dim, dim, parts=3), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.project(attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Apply attention to `(B, heads, N, width)`. Under CPU autocast it runs in float32, because torch's bfloat16
    backward pass is five times slower on a CPU."""
    if q.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float())
