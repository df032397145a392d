"""Pixels as tokens: an id is an intensity, so a prior over the grid is a pixel model such as PixelCNN (van den Oord et
al. 2016) or MADE (Germain et al. 2015). With 256 levels the tokens are the 8-bit image, with 2 levels a binary
image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from .base import Reconstruction, TokenGrid, Tokenizer, TokenizerConfig
from .precision import in_finest


class PixelsConfig(TokenizerConfig):
    """The number of intensities."""

    levels: int = Field(
        256,
        ge=2,
        le=256,
        description="number of intensities per channel; 256 represents 8-bit images exactly, 2 thresholds them at mid "
        "grey",
    )

    def check(self) -> Iterator[str]:
        yield from super().check()
        yield from self.check_plain("pixels")


class Pixels(Tokenizer, name="pixels"):
    """Maps each channel of each pixel to the nearest of `levels` intensities, evenly spaced from black to white.

    Channels are interleaved as rows of the grid: row `C * i + c` holds channel c of image row i. In raster order, the
    red of a row is followed by its green and its blue, and then by the next row. Nothing is learned.
    """

    Config = PixelsConfig

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__(config)
        height, width = config.image_size
        self.image_shape = (config.channels, height, width)
        self.grid = TokenGrid((config.channels * height, width), config.levels, channels=config.channels)
        ids = self._nearest(torch.arange(256) / 127.5 - 1)
        sizes = (ids == torch.arange(config.levels).unsqueeze(1)).sum(1)
        self.register_buffer("sizes", sizes, persistent=False)
        self.sizes: Tensor  # (levels,): number of 8-bit values that share an id

    def encode(self, images: Tensor) -> Tensor:
        """Return ids `(B, C * H, W)`, rounding half up. Raises `ValueError` for images of another size."""
        self.check_images(images)
        return self._nearest(images.float()).transpose(1, 2).flatten(1, 2)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the levels' intensities, `(B, C, H, W)` in [-1, 1]. Raises `ValueError` for ids out of range."""
        self.grid.check(tokens)
        return self._to_channels(tokens).float() * 2 / (self.grid.vocab_size - 1) - 1

    def forward(self, images: Tensor) -> Reconstruction:
        """Reconstruct with the nearest levels, without losses."""
        tokens = self.encode(images)
        return Reconstruction(self.decode(tokens), tokens, {})

    @property
    def has_likelihood(self) -> bool:
        """Always True: 8-bit values that share an id are equally likely, so a prior over tokens defines an exact
        distribution over 8-bit images for any number of levels."""
        return True

    @property
    def reversible(self) -> bool:
        """True with 256 levels, where an id is the 8-bit value."""
        return self.config.levels == 256

    def pixel_log_probs(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return -log(number of 8-bit values that share the id), `(B, C, H, W)` nats; -inf where the image has another
        id."""
        inside = -in_finest(self.sizes).log()[tokens.long()]
        found = torch.where(self.encode(images) == tokens, inside, -torch.inf).float()
        return self._to_channels(found)

    def value_log_probs(self, tokens: Tensor, values: Tensor, channel: int) -> Tensor:
        """Return log p of all values, `(B, 256, H, W)` nats; -inf for values of other ids. Channels are independent."""
        ids = self._to_channels(tokens.long())[:, channel, None]
        every = self._nearest(torch.arange(256, device=ids.device) / 127.5 - 1)[None, :, None, None]
        return torch.where(every == ids, -in_finest(self.sizes).log()[ids], -torch.inf)

    def known_tokens(self, known: Tensor) -> Tensor:
        """Repeat known pixels, bool `(B, H, W)`, for each channel: `(B, C * H, W)`."""
        channels, height, width = self.image_shape
        return known.reshape(-1, height, width).repeat_interleave(channels, dim=1)

    def _to_channels(self, rows: Tensor) -> Tensor:
        """Rearrange `(B, C * H, W)` to `(B, C, H, W)`."""
        channels, height, _ = self.image_shape
        return rows.unflatten(1, (height, channels)).transpose(1, 2)

    def _nearest(self, intensities: Tensor) -> Tensor:
        """Return the ids of intensities in [-1, 1], rounding half up. (No 8-bit value is halfway between levels,
        because 255 is odd.)"""
        top = self.config.levels - 1
        return ((intensities + 1) * (top / 2) + 0.5).floor().long().clamp(0, top)
