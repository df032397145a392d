"""Pixels as tokens: an id is an intensity, so a prior over the grid is a pixel model such as PixelCNN (van den Oord et
al. 2016) or MADE (Germain et al. 2015). With 256 levels the tokens are the 8-bit image, with 2 levels a binary
image. With `patch`, an id names all pixels of a small square, so that a prior has fewer, equally exact steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from .base import Reconstruction, TokenGrid, Tokenizer, TokenizerConfig
from .precision import in_finest

MAX_IDS = 1 << 16


class PixelsConfig(TokenizerConfig):
    levels: int = Field(
        256, ge=2, le=256, description="intensities per channel; 256: exact 8-bit images, 2: a threshold at mid grey"
    )

    patch: int = Field(
        1, ge=1, le=4, description="side of the squares of grey pixels that share one of levels^(patch x patch) ids"
    )

    @property
    def ids(self) -> int:
        return self.levels ** (self.patch * self.patch)

    def check(self) -> Iterator[str]:
        yield from super().check()
        yield from self.check_picture("pixels", alpha=True)
        if self.patch > 1 and self.channels > 1:
            yield f"patch: needs grey images, channels=1 (got {self.channels})"
        if any(side % self.patch for side in self.image_size):
            yield f"patch: {self.patch} does not divide the image size {list(self.image_size)}"
        if self.ids > MAX_IDS:
            yield f"patch: {self.levels} levels in {self.patch} x {self.patch} pixels are more than {MAX_IDS:,} ids"

    def to_dict(self) -> dict[str, Any]:
        found = super().to_dict()
        if self.patch == 1:
            del found["patch"]
        return found


class Pixels(Tokenizer, name="pixels"):
    """Maps each channel of each pixel to the nearest of `levels` intensities, evenly spaced from black to white.

    Channels are interleaved as rows of the grid: row `C * i + c` holds channel c of image row i. In raster order, the
    red of a row is followed by its green and its blue, and then by the next row. With `patch`, an id is the number
    whose digits, lowest first, are the intensities of a square in raster order. Nothing is learned.
    """

    Config = PixelsConfig
    resizable = True
    halo = 0

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__(config)
        height, width = config.image_size
        if config.patch == 1:
            self.grid = TokenGrid((config.channels * height, width), config.levels, channels=config.channels)
        else:
            self.grid = TokenGrid((height // config.patch, width // config.patch), config.ids)
        ids = self._nearest(torch.arange(256) / 127.5 - 1)
        sizes = (ids == torch.arange(config.levels).unsqueeze(1)).sum(1)
        self.register_buffer("sizes", sizes, persistent=False)
        self.sizes: Tensor  # (levels,): number of 8-bit values that share an id

    def encode(self, images: Tensor) -> Tensor:
        """Return ids `(B, *grid.shape)`, rounding half up. Raises `ValueError` for images of another size."""
        self.spec.check(images)
        levels = self._nearest(images.float())
        if self.config.patch == 1:
            return levels.transpose(1, 2).flatten(1, 2)
        return (self.cut_patches(levels) * self._place_values(levels)).sum(-1)

    def decode(self, tokens: Tensor) -> Tensor:
        self.grid.check(tokens)
        return self._to_levels(tokens).float() * 2 / (self.config.levels - 1) - 1

    def forward(self, images: Tensor) -> Reconstruction:
        tokens = self.encode(images)
        return Reconstruction(self.decode(tokens), tokens, {})

    @property
    def has_likelihood(self) -> bool:
        return True  # 8-bit values that share an id are equally likely, whatever the number of levels

    @property
    def reversible(self) -> bool:
        return self.config.levels == 256

    def pixel_log_probs(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return -log(number of 8-bit values that share the level), or -inf where the image has another level."""
        levels = self._to_levels(tokens.long())
        inside = -in_finest(self.sizes).log()[levels]
        return torch.where(self._nearest(images.float()) == levels, inside, -torch.inf).float()

    def value_log_probs(self, tokens: Tensor, values: Tensor, channel: int) -> Tensor:
        ids = self._to_levels(tokens.long())[:, channel, None]
        every = self._nearest(torch.arange(256, device=ids.device) / 127.5 - 1)[None, :, None, None]
        return torch.where(every == ids, -in_finest(self.sizes).log()[ids], -torch.inf)

    def known_tokens(self, known: Tensor) -> Tensor:
        """Repeat known pixels, bool `(B, H, W)`, for each channel: `(B, C * H, W)`. With `patch`, a token is known if
        all its pixels are."""
        if self.config.patch > 1:
            return super().known_tokens(known)
        channels, height, width = self.image_shape
        return known.reshape(-1, height, width).repeat_interleave(channels, dim=1)

    def cut_patches(self, images: Tensor) -> Tensor:
        """Rearrange grey images `(B, 1, H, W)` to the pixels of each id, `(B, *grid.shape, patch * patch)`."""
        side = self.config.patch
        squares = images.squeeze(1).unflatten(2, (-1, side)).unflatten(1, (-1, side))  # (B, h, side, w, side)
        return squares.transpose(2, 3).flatten(3)

    def _place_values(self, like: Tensor) -> Tensor:
        return self.config.levels ** torch.arange(self.config.patch**2, device=like.device)

    def _to_levels(self, tokens: Tensor) -> Tensor:
        """Return the level of each channel of each pixel, `(B, C, H, W)`, for tokens `(B, *grid.shape)`."""
        channels, height, _ = self.image_shape
        if self.config.patch == 1:
            return tokens.unflatten(1, (height, channels)).transpose(1, 2)
        digits = tokens.long().unsqueeze(-1) // self._place_values(tokens) % self.config.levels
        side = self.config.patch
        squares = digits.unflatten(-1, (side, side)).transpose(2, 3)  # (B, h, side, w, side)
        return squares.flatten(3, 4).flatten(1, 2).unsqueeze(1)

    def _nearest(self, intensities: Tensor) -> Tensor:
        """Return the ids of intensities in [-1, 1], rounding half up, where no 8-bit value is."""
        top = self.config.levels - 1
        return ((intensities + 1) * (top / 2) + 0.5).floor().long().clamp(0, top)
