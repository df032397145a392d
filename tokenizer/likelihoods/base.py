"""The contract of likelihoods: the decoder's output parametrises a distribution of 8-bit pixels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..model import Registered
from ..precision import at_least_float32

LEVELS = 256
FLOOR = 2.0**-16
"""The share of the mass that is uniform, so that no value of a channel costs more than 24 bits; it costs 2e-5 bits
elsewhere."""


class Likelihood(Registered, nn.Module, family="tokenizer.likelihoods"):
    """P(image | parameters) = prod_c P(channel c | channels before c, parameters), pixel by pixel."""

    num_parameters: int
    """Number of parameters per pixel, which the decoder puts out."""

    def __init__(self, config: ModelConfig, channels: int) -> None:
        nn.Module.__init__(self)
        self.config: Any = config
        self.channels = channels

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """log P of int64 `values` (B, C, H, W), each given the channels before it; returns the same shape, in nats.

        parameters: (B, num_parameters, H, W); the result has their type, at least float32.
        """
        each = [self._of(parameters, values, channel, values[:, channel, None]) for channel in range(self.channels)]
        return torch.cat(each, 1)

    def table(self, parameters: Tensor, values: Tensor, channel: int) -> Tensor:
        """log P of each of the 256 values of one channel, `(B, 256, H, W)`, given the earlier channels of `values`."""
        every = torch.arange(LEVELS, device=parameters.device)[None, :, None, None]
        return self._of(parameters, values, channel, every)

    def mean(self, parameters: Tensor) -> Tensor:
        """The image to show, `(B, C, H, W)` in [-1, 1]: the mean, or what the likelihood defines in its place."""
        raise NotImplementedError

    def _of(self, parameters: Tensor, values: Tensor, channel: int, asked: Tensor) -> Tensor:
        wide = at_least_float32(parameters)
        found = self._channel_log_prob(wide, values, channel, asked)
        return torch.logaddexp(found + math.log1p(-FLOOR), torch.full_like(found, math.log(FLOOR / LEVELS)))

    def _channel_log_prob(self, parameters: Tensor, values: Tensor, channel: int, asked: Tensor) -> Tensor:
        """log P `(B, V, H, W)` of the values `asked`, which broadcast to that, before the floor."""
        raise NotImplementedError


def to_values(images: Tensor) -> Tensor:
    """Images in [-1, 1] as the nearest of 256 values, int64."""
    return ((images.float() + 1) * 127.5).round().long().clamp(0, LEVELS - 1)


def to_intensities(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `to_values`."""
    return values.to(dtype) / 127.5 - 1
