"""Pixels as tokens: an id is an intensity, so that a prior over the grid is a pixel model, like PixelCNN (van den Oord
et al. 2016) and MADE (Germain et al. 2015). 256 levels are the 8-bit image itself, 2 levels a binary image."""

from __future__ import annotations

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
        description="number of intensities of each channel; 256 represent an 8-bit image exactly, 2 threshold it at "
        "mid grey",
    )


class Pixels(Tokenizer, name="pixels"):
    """Maps each channel of each pixel to the nearest of `levels` intensities, evenly spaced from black to white.

    Channels are interleaved as rows of the grid: row `C * i + c` holds channel c of image row i. So, in raster order,
    the green of a row comes after its red, and all channels of a row before the next row. Nothing is learned.
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
        """Ids `(B, C * H, W)`; a value halfway between two levels is rounded up. Raises `ValueError` for images of
        another size."""
        self.check_images(images)
        return self._nearest(images.float()).transpose(1, 2).flatten(1, 2)

    def decode(self, tokens: Tensor) -> Tensor:
        """The levels' intensities, `(B, C, H, W)` from -1 to 1. Raises `ValueError` for ids out of range."""
        self.grid.check(tokens)
        return self._to_channels(tokens).float() * 2 / (self.grid.vocab_size - 1) - 1

    def forward(self, images: Tensor) -> Reconstruction:
        """The nearest levels, without losses."""
        tokens = self.encode(images)
        return Reconstruction(self.decode(tokens), tokens, {})

    @property
    def has_likelihood(self) -> bool:
        """8-bit values that share an id are equally likely. With a prior over tokens this is an exact distribution of
        8-bit images for any number of levels."""
        return True

    @property
    def reversible(self) -> bool:
        """With 256 levels an id is the 8-bit value."""
        return self.config.levels == 256

    def pixel_log_probs(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Minus the log of the number of 8-bit values that share the id, 0 with 256 levels; -inf where the image has
        another id. `(B, C, H, W)` nats."""
        inside = -in_finest(self.sizes).log()[tokens.long()]
        found = torch.where(self.encode(images) == tokens, inside, -torch.inf).float()
        return self._to_channels(found)

    def value_log_probs(self, tokens: Tensor, values: Tensor, channel: int) -> Tensor:
        """`(B, 256, H, W)` nats, -inf for values of other ids; channels are independent."""
        ids = self._to_channels(tokens.long())[:, channel, None]
        every = self._nearest(torch.arange(256, device=ids.device) / 127.5 - 1)[None, :, None, None]
        return torch.where(every == ids, -in_finest(self.sizes).log()[ids], -torch.inf)

    def known_tokens(self, known: Tensor) -> Tensor:
        """True for each channel of each known pixel, `(B, C * H, W)`, given bool `(B, H, W)`."""
        channels, height, width = self.image_shape
        return known.reshape(-1, height, width).repeat_interleave(channels, dim=1)

    def _to_channels(self, rows: Tensor) -> Tensor:
        """`(B, C * H, W)` as `(B, C, H, W)`."""
        channels, height, _ = self.image_shape
        return rows.unflatten(1, (height, channels)).transpose(1, 2)

    def _nearest(self, intensities: Tensor) -> Tensor:
        """Ids of intensities in [-1, 1], rounded half up. (No 8-bit value is halfway between levels: 255 is odd.)"""
        top = self.config.levels - 1
        return ((intensities + 1) * (top / 2) + 0.5).floor().long().clamp(0, top)
