"""TiTok (Yu et al. 2024, arXiv:2406.07550): an image as a row of tokens, none of which belongs to a place in it.

An encoder of `vit`'s blocks sees the patches and K learned registers, and what it made of the registers is quantized.
The decoder sees these K codes and a learned query for each patch, which becomes the patch. It is trained in a single
stage against the pixels, without the paper's teacher. The paper adds a shared mask token to the queries, and positions
to the registers: one learned vector for each says the same. Codes get positions of their own in the decoder, as the
same code means another thing in another register. As with `vit`, a codebook has to follow quickly. And it is shared:
what each register says of all images alike is taken away before training, or each would have a few codes of its own.

With `keep` the decoder is trained to do with fewer (nested dropout: Rippel et al. 2014; FlexTok, Bachmann et al. 2025,
arXiv:2502.13967; One-D-Piece, Miwa et al. 2025, arXiv:2501.10064): of each image it sees the first k registers, k drawn
anew, and a learned vector in place of the others. So the first tokens hold what matters most, and decode alone.
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
"""Of learned vectors at the start. With ViT's 0.02 all registers say the same for long, as what they see drowns what
they are: 16.4 dB after 518 steps on garments; with 0.3 18.8 dB after 400."""
IMAGES_AT_A_TIME = 256


class TiTokConfig(ViTConfig):
    """Sizes of the two transformers, the number of tokens, and whether the first of them decode alone."""

    registers: int = Field(16, ge=1, le=4096, description="number of tokens of an image; at most one per pixel")
    keep: Keep | None = Field(
        None,
        description="in training the decoder sees the first k registers of an image: uniform: k is any of 1 to "
        "registers; powers: it is 1, 2, 4, ... or registers; null: it sees all, and only all of them decode",
    )

    def check(self) -> Iterator[str]:
        """Registers fit, and the quantizer's ids are not maps."""
        yield from super().check()
        pixels = math.prod(self.image_size)
        if self.registers > pixels:
            yield f"registers: at most one per pixel, {pixels} (got {self.registers})"
        if self.quantizer.kind == "multiscale":
            yield "quantizer.kind: must not be multiscale, whose scales are maps, and registers have no places"


class TiTok(Autoencoder, name="titok"):
    """Grid `(K,)`; with a quantizer of L levels `(L * K,)`, level after level. With `keep`, `decode` takes the first k
    tokens, `(B, k)`, for any k."""

    Config = TiTokConfig
    encoder: Encoder

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__(config, config.factor)
        if config.keep and self.levels > 1:
            raise ConfigError(
                f"keep: needs a quantizer of one id per register, as the first tokens would be the first level's (got "
                f"{self.levels} of {self.quantizer.name!r})"
            )
        self.grid = replace(self.grid, shape=(self.levels * config.registers,))
        self.prefixes = powers(config.registers) if config.keep else ()
        self.encoder = Encoder(config, self.quantizer.dim)
        self.decoder = nn.Sequential(Decoder(config, self.quantizer.dim, self.outputs), nn.PixelShuffle(config.factor))

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Take from each register what it says of `images` `(B, C, H, W)` on average, unless they are trained. Raises
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
        return self._image(self._paint(tokens)).clamp(-1, 1)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise `ValueError` unless `tokens` are all of each image, or with `keep` the first of each."""
        most = len(self.grid)
        count = tokens.shape[1] if tokens.ndim == 2 else most
        if count != most and not (self.prefixes and 1 <= count <= most):
            why = ""
            if 1 <= count < most:
                why = "; prefixes need model.keep=uniform or powers in training"
                why += " and a quantizer of one id per register" if self.levels > 1 else ""
            number = f"1 to {most}" if self.prefixes else f"all {most}"
            raise ValueError(f"takes {number} tokens of an image, got {count}{why}")
        replace(self.grid, shape=(count,)).check(tokens)

    def known_tokens(self, known: Tensor) -> Tensor:
        """Raises `ValueError`: none are."""
        raise ValueError(
            "a register's token belongs to no part of the image: known pixels make no token known, and its bits are at "
            "no pixel"
        )


class Tower(nn.Module):
    """Blocks in which `given` rows and `asked` learned queries attend to each other; what becomes of the queries is put
    out."""

    def __init__(self, config: TiTokConfig, inputs: int, given: int, asked: int, outputs: int) -> None:
        super().__init__()
        self.asked = asked
        self.positions = nn.Parameter(torch.empty(given, config.dim).normal_(std=STD))
        self.queries = nn.Parameter(torch.empty(asked, config.dim).normal_(std=STD))
        self.embed = nn.Linear(inputs, config.dim)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.norm, self.head = nn.LayerNorm(config.dim), nn.Linear(config.dim, outputs)

    def answer(self, rows: Tensor) -> Tensor:
        """`(B, given, dim)`, embedded but without positions, to `(B, asked, outputs)`."""
        queries = self.queries.expand(rows.shape[0], -1, -1)
        rows = self.blocks(torch.cat([rows + self.positions, queries.to(rows.dtype)], 1))
        return self.head(self.norm(rows[:, -self.asked :]))


class Encoder(Tower):
    """Images `(B, C, H, W)` to the registers' vectors `(B, width, K)`."""

    def __init__(self, config: TiTokConfig, width: int) -> None:
        super().__init__(config, config.channels * config.factor**2, count_patches(config), config.registers, width)
        self.center = nn.Parameter(torch.zeros(config.registers, width))
        self.unshuffle = Unshuffle(config.factor)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, width, K)`."""
        # Contiguous, whatever the memory format: another layout may be multiplied in another order and round otherwise.
        patches = self.unshuffle(images).movedim(1, -1).flatten(1, 2).contiguous()
        return (self.answer(self.embed(patches)) - self.center).transpose(1, 2)


class Decoder(Tower):
    """Codes `(B, width, k)` of the first k registers to patches `(B, outputs * factor ** 2, h, w)`."""

    def __init__(self, config: TiTokConfig, width: int, outputs: int) -> None:
        super().__init__(config, width, config.registers, count_patches(config), outputs * config.factor**2)
        self.keep: Keep | None = config.keep
        self.sides = tuple(side // config.factor for side in config.image_size)
        if config.keep:
            self.mask = nn.Parameter(torch.empty(config.dim).normal_(std=STD))

    def forward(self, codes: Tensor) -> Tensor:
        """`(B, width, k)` to `(B, outputs * factor ** 2, h, w)`; without `keep` k is K."""
        rows = self.embed(codes.transpose(1, 2).contiguous())
        if self.keep:
            rows = self.kept(rows, self.keep)
        return self.answer(rows).unflatten(1, self.sides).movedim(-1, 1)

    def kept(self, rows: Tensor, keep: Keep) -> Tensor:
        """`(B, k, dim)` filled up to `(B, K, dim)` by the mask; in training so that of each image some first ones are
        left, which torch's generator draws."""
        count, registers = rows.shape[1], len(self.positions)
        mask = self.mask.to(rows.dtype)
        if count < registers:
            return torch.cat([rows, mask.expand(rows.shape[0], registers - count, -1)], 1)
        if not self.training:
            return rows
        left = draw_counts(keep, len(rows), registers).to(rows.device)
        there = torch.arange(registers, device=rows.device) < left[:, None]
        return torch.where(there[..., None], rows, mask)


def count_patches(config: TiTokConfig) -> int:
    """The number of patches of an image."""
    height, width = (side // config.factor for side in config.image_size)
    return height * width


def powers(registers: int) -> tuple[int, ...]:
    """1, 2, 4, ... below `registers`, and this."""
    return *(1 << n for n in range((registers - 1).bit_length())), registers


def draw_counts(keep: Keep, images: int, registers: int) -> Tensor:
    """How many registers are left of each image, `(images,)`, on the CPU: the same draws on any device."""
    if keep == "uniform":
        return torch.randint(1, registers + 1, (images,), device="cpu")
    choices = torch.tensor(powers(registers), device="cpu")
    return choices[torch.randint(len(choices), (images,), device="cpu")]
