"""TiTok (Yu et al. 2024, arXiv:2406.07550): an image as a 1D sequence of tokens without spatial positions.

An encoder of `vit`'s blocks sees the patches and K learned registers; the outputs at the registers are quantized. The
decoder sees these K codes and a learned query for each patch, whose output becomes the patch. Training has a single
stage, on pixels, without the paper's teacher. The paper adds a shared mask token to the queries, and positions to the
registers; one learned vector for each is equivalent. The decoder adds positions to the codes, since a
code means something else in another register. As with `vit`, the codebook has to follow quickly. Registers share it, so
`initialize` subtracts each register's mean output; otherwise each register would use its own few codes.

With `keep` the decoder is trained to work with fewer tokens (nested dropout: Rippel et al. 2014; FlexTok, Bachmann et
al. 2025, arXiv:2502.13967; One-D-Piece, Miwa et al. 2025, arXiv:2501.10064): it sees the first k registers of each
image, k random, and a learned vector in place of the others. So the first tokens carry the most important content, and
decode alone.
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
from .precision import full_float32
from .vit import Block, ViTConfig

Keep = Literal["uniform", "powers"]
STD = 0.3
"""Initial standard deviation of learned vectors. With ViT's 0.02 the registers stay nearly equal for a long time:
16.4 dB after 518 steps on garments; with 0.3, 18.8 dB after 400."""
IMAGES_AT_A_TIME = 256


class TiTokConfig(ViTConfig):
    """Sizes of the two transformers, the number of tokens, and whether prefixes decode."""

    registers: int = Field(16, ge=1, le=4096, description="number of tokens of an image; at most one per pixel")
    keep: Keep | None = Field(
        None,
        description="in training the decoder sees the first k registers of an image; uniform: k is any of 1 to "
        "registers; powers: k is 1, 2, 4, ... or registers; null: it sees all, and prefixes do not decode",
    )

    def check(self) -> Iterator[str]:
        yield from super().check()
        pixels = math.prod(self.image_size)
        if self.registers > pixels:
            yield f"registers: at most one per pixel, {pixels} (got {self.registers})"
        if self.quantizer.kind == "multiscale":
            yield "quantizer.kind: must not be multiscale, whose scales are 2D maps; registers have no positions"


class TiTok(Autoencoder, name="titok"):
    """Grid `(K,)`; with a quantizer of L levels `(L * K,)`, level after level. With `keep`, `decode` takes the first k
    tokens, `(B, k)`, for any k."""

    Config = TiTokConfig
    encoder: Encoder

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config, config.factor)
        if config.keep and self.levels > 1:
            raise ConfigError(
                f"keep: needs a quantizer with one id per register (got {self.levels} of {self.quantizer.name!r})"
            )
        self.grid = replace(self.grid, shape=(self.levels * config.registers,))
        self.prefixes = powers(config.registers) if config.keep else ()
        self.encoder = Encoder(config, self.quantizer.dim)
        self.decoder = nn.Sequential(Decoder(config, self.quantizer.dim, self.outputs), nn.PixelShuffle(config.factor))

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Center each register's output over `images` `(B, C, H, W)`, unless the tokenizer is trained. Raises
        `ValueError` for images of another size."""
        self.check_images(images)
        if not bool(self.encoder.center.any()):
            parts = [self._embed(part.to(self.device)).float().sum(0) for part in images.split(IMAGES_AT_A_TIME)]
            self.encoder.center.copy_(torch.stack(parts).sum(0).t() / len(images))

    @full_float32()
    def decode(self, tokens: Tensor) -> Tensor:
        """Images of `tokens` `(B, *grid.shape)`, or with `keep` of the first k, `(B, k)`, clamped to [-1, 1]. Raises
        `ValueError` for ids out of range and another number of tokens."""
        self.check_tokens(tokens)
        return self._image(self._decode_tokens(tokens)).clamp(-1, 1)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise `ValueError` unless `tokens` are all tokens of each image, or with `keep` a prefix."""
        most = len(self.grid)
        count = tokens.shape[1] if tokens.ndim == 2 else most
        if count != most and not (self.prefixes and 1 <= count <= most):
            hint = ""
            if 1 <= count < most:
                hint = "; prefixes need model.keep=uniform or powers in training"
                hint += " and a quantizer with one id per register" if self.levels > 1 else ""
            number = f"1 to {most}" if self.prefixes else f"all {most}"
            raise ValueError(f"takes {number} tokens of an image, got {count}{hint}")
        replace(self.grid, shape=(count,)).check(tokens)

    def known_tokens(self, known: Tensor) -> Tensor:
        """Raises `ValueError`: tokens have no position."""
        raise ValueError("a register's token belongs to no part of the image, so known pixels make no token known")


class Tower(nn.Module):
    """Transformer over `inputs` rows and `queries` learned vectors; returns the outputs at the queries."""

    def __init__(self, config: TiTokConfig, width_in: int, inputs: int, queries: int, width_out: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(inputs, config.dim).normal_(std=STD))
        self.queries = nn.Parameter(torch.empty(queries, config.dim).normal_(std=STD))
        self.embed = nn.Linear(width_in, config.dim)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.norm, self.head = nn.LayerNorm(config.dim), nn.Linear(config.dim, width_out)

    def attend(self, rows: Tensor) -> Tensor:
        """`(B, inputs, dim)`, embedded but without positions, to `(B, queries, width_out)`."""
        queries = self.queries.expand(rows.shape[0], -1, -1)
        rows = self.blocks(torch.cat([rows + self.positions, queries.to(rows.dtype)], 1))
        return self.head(self.norm(rows[:, -len(self.queries) :]))


class Encoder(Tower):
    """Images `(B, C, H, W)` to the registers' vectors `(B, width, K)`."""

    def __init__(self, config: TiTokConfig, width: int) -> None:
        super().__init__(config, config.channels * config.factor**2, count_patches(config), config.registers, width)
        self.center = nn.Parameter(torch.zeros(config.registers, width))
        self.unshuffle = Unshuffle(config.factor)

    def forward(self, images: Tensor) -> Tensor:
        # Contiguous, so that products round the same in every memory format.
        patches = self.unshuffle(images).movedim(1, -1).flatten(1, 2).contiguous()
        return (self.attend(self.embed(patches)) - self.center).transpose(1, 2)


class Decoder(Tower):
    """Codes `(B, width, k)` of the first k registers to patches `(B, outputs * factor ** 2, h, w)`."""

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
        """Fill `(B, k, dim)` up to `(B, K, dim)` with the mask. In training, also mask all but a random prefix of each
        image, drawn from torch's global generator."""
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
    """1, 2, 4, ... below `registers`, and `registers`."""
    return *(1 << n for n in range((registers - 1).bit_length())), registers


def draw_counts(keep: Keep, images: int, registers: int) -> Tensor:
    """The random prefix length of each image, `(images,)`, drawn on the CPU: the same for any device."""
    if keep == "uniform":
        return torch.randint(1, registers + 1, (images,), device="cpu")
    choices = torch.tensor(powers(registers), device="cpu")
    return choices[torch.randint(len(choices), (images,), device="cpu")]
