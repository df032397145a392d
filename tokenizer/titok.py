"""TiTok (Yu et al. 2024, arXiv:2406.07550): represents an image by a 1D sequence of tokens without spatial positions.

The encoder, built from `vit`'s blocks, attends to the patches and to K learned registers; its outputs at the registers
are quantized. The decoder attends to these K codes and to one learned query per patch, and its output at a query
becomes the patch. Training has a single stage, on pixels, without the paper's teacher. The paper adds a shared mask
token to the queries and positions to the registers; one learned vector for each is equivalent. The decoder adds
positions to the codes, because a code has a different meaning in each register. As with `vit`, the codebook must adapt
quickly. Registers share it, so `initialize` subtracts each register's mean output; otherwise each register would use
its own few codes.

With `keep` the decoder learns to work with fewer tokens (nested dropout: Rippel et al. 2014; FlexTok, Bachmann et al.
2025, arXiv:2502.13967; One-D-Piece, Miwa et al. 2025, arXiv:2501.10064). It sees the first k registers of each image,
for random k, and a learned vector in place of the rest. The first tokens then carry the most important content, and any
prefix can be decoded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .files import ConfigError
from .layers import Unshuffle
from .vit import Block, ViTConfig

Keep = Literal["uniform", "powers"]
# Initial standard deviation of learned vectors. With ViT's 0.02, registers stay nearly equal for a long time: 16.4 dB
# after 518 steps on garments, compared with 18.8 dB after 400 steps with 0.3.
STD = 0.3
IMAGES_AT_A_TIME = 256


class TiTokConfig(ViTConfig):
    registers: int = Field(16, ge=1, le=4096, description="number of tokens per image; at most one per pixel")
    keep: Keep | None = Field(
        None,
        description="in training the decoder sees the first k registers of an image; uniform: k is any of 1 "
        "to registers; powers: 1, 2, 4, ... or registers; null: all, and prefixes cannot be decoded",
    )

    def check(self) -> Iterator[str]:
        yield from super().check()
        pixels = math.prod(self.image_size)
        if self.registers > pixels:
            yield f"registers: at most one per pixel, {pixels} (got {self.registers})"
        if self.quantizer.kind == "multiscale":
            yield "quantizer.kind: must not be multiscale, which needs 2D maps, while registers have no positions"


class TiTok(Autoencoder, name="titok"):
    """The grid is `(K,)`, or `(L * K,)`, level by level, for a quantizer with L levels. With `keep`, `decode` also
    accepts the first k tokens, `(B, k)`, for any k."""

    Config = TiTokConfig
    encoder: PatchEncoder

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config, config.factor)
        if config.keep and self.levels > 1:
            raise ConfigError(
                f"keep: needs a quantizer with one id per register (got {self.levels} of {self.quantizer.name!r})"
            )
        self.grid = replace(self.grid, shape=(self.levels * config.registers,))
        self.prefixes = powers(config.registers) if config.keep else ()
        self.encoder = PatchEncoder(config, self.quantizer.dim)
        self.decoder = nn.Sequential(
            PatchDecoder(config, self.quantizer.dim, self.outputs), nn.PixelShuffle(config.factor)
        )

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Center each register's output on its mean over `images`, unless the tokenizer is trained."""
        self.spec.check(images)
        if not bool(self.encoder.center.any()):
            parts = [self._embed(part.to(self.device)).float().sum(0) for part in images.split(IMAGES_AT_A_TIME)]
            self.encoder.center.copy_(torch.stack(parts).sum(0).t() / len(images))

    def check_tokens(self, tokens: Tensor) -> None:
        most = len(self.grid)
        count = tokens.shape[1] if tokens.ndim == 2 else most
        if count != most and not (self.prefixes and 1 <= count <= most):
            number = f"1 to {most}" if self.prefixes else f"all {most}"
            hint = "" if self.prefixes else "; to decode prefixes, train with model.keep=uniform or powers"
            raise ValueError(f"expected {number} tokens per image, got {count}{hint}")
        replace(self.grid, shape=(count,)).check(tokens)


class Tower(nn.Module):
    """Transformer over `inputs` rows and `queries` learned vectors that returns the outputs at the queries."""

    def __init__(self, config: TiTokConfig, width_in: int, inputs: int, queries: int, width_out: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(inputs, config.dim).normal_(std=STD))
        self.queries = nn.Parameter(torch.empty(queries, config.dim).normal_(std=STD))
        self.embed = nn.Linear(width_in, config.dim)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.norm, self.head = nn.LayerNorm(config.dim), nn.Linear(config.dim, width_out)

    def attend(self, rows: Tensor) -> Tensor:
        """Map embedded rows without positions, `(B, inputs, dim)`, to `(B, queries, width_out)`."""
        queries = self.queries.expand(rows.shape[0], -1, -1)
        rows = self.blocks(torch.cat([rows + self.positions, queries.to(rows.dtype)], 1))
        return self.head(self.norm(rows[:, -len(self.queries) :]))


class PatchEncoder(Tower):
    """Maps images `(B, C, H, W)` to the registers' vectors `(B, width, K)`."""

    def __init__(self, config: TiTokConfig, width: int) -> None:
        super().__init__(config, config.channels * config.factor**2, count_patches(config), config.registers, width)
        self.center = nn.Parameter(torch.zeros(config.registers, width))
        self.unshuffle = Unshuffle(config.factor)

    def forward(self, images: Tensor) -> Tensor:
        # Contiguous, so that products round identically in every memory format.
        patches = self.unshuffle(images).movedim(1, -1).flatten(1, 2).contiguous()
        return (self.attend(self.embed(patches)) - self.center).transpose(1, 2)


class PatchDecoder(Tower):
    """Maps codes `(B, width, k)` of the first k registers to patches `(B, outputs * factor ** 2, h, w)`."""

    def __init__(self, config: TiTokConfig, width: int, outputs: int) -> None:
        super().__init__(config, width, config.registers, count_patches(config), outputs * config.factor**2)
        self.keep: Keep | None = config.keep
        self.sides = tuple(side // config.factor for side in config.image_size)
        if config.keep:
            self.mask = nn.Parameter(torch.empty(config.dim).normal_(std=STD))

    def forward(self, codes: Tensor) -> Tensor:
        rows = self.embed(codes.transpose(1, 2).contiguous())
        if self.keep:
            rows = self.mask_rest(rows, self.keep)
        return self.attend(rows).unflatten(1, self.sides).movedim(-1, 1)

    def mask_rest(self, rows: Tensor, keep: Keep) -> Tensor:
        """Pad to `(B, K, dim)` with the mask vector; in training, mask all but a random prefix of each image."""
        count, registers = rows.shape[1], len(self.positions)
        mask = self.mask.to(rows.dtype)
        if count < registers:
            return torch.cat([rows, mask.expand(rows.shape[0], registers - count, -1)], 1)
        if not self.training:
            return rows
        counts = draw_counts(keep, len(rows), registers).to(rows.device)
        visible = torch.arange(registers, device=rows.device) < counts[:, None]
        return torch.where(visible[..., None], rows, mask)


def count_patches(config: TiTokConfig) -> int:
    height, width = (side // config.factor for side in config.image_size)
    return height * width


def powers(registers: int) -> tuple[int, ...]:
    """Return the powers of two below `registers`, and `registers`."""
    return *(1 << n for n in range((registers - 1).bit_length())), registers


def draw_counts(keep: Keep, images: int, registers: int) -> Tensor:
    """Draw a random prefix length for each image, `(images,)`, on the CPU, so that it does not depend on the device."""
    if keep == "uniform":
        return torch.randint(1, registers + 1, (images,), device="cpu")
    choices = torch.tensor(powers(registers), device="cpu")
    return choices[torch.randint(len(choices), (images,), device="cpu")]
