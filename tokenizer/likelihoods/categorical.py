"""A softmax over a channel's 256 values (van den Oord et al. 2016): any shape, also spikes at black or white."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import ModelConfig
from .base import LEVELS, Likelihood, to_intensities


class CategoricalConfig(ModelConfig):
    """No settings."""


class Categorical(Likelihood, name="categorical"):
    """Channels are independent given the tokens."""

    Config = CategoricalConfig

    def __init__(self, config: CategoricalConfig, channels: int) -> None:
        super().__init__(config, channels)
        self.num_parameters = channels * LEVELS

    def mean(self, parameters: Tensor) -> Tensor:
        """The expected image, `(B, C, H, W)` in [-1, 1]."""
        shares = parameters.float().unflatten(1, (self.channels, LEVELS)).softmax(2)
        intensities = to_intensities(torch.arange(LEVELS, device=parameters.device), shares.dtype)
        with torch.autocast(parameters.device.type, enabled=False):  # autocast would compute the mean in bfloat16
            return torch.einsum("bcvhw,v->bchw", shares, intensities)

    def _channel_log_prob(self, parameters: Tensor, values: Tensor, channel: int, asked: Tensor) -> Tensor:
        logs = parameters.unflatten(1, (self.channels, LEVELS))[:, channel].log_softmax(1)
        return logs.gather(1, asked.expand(len(logs), -1, *logs.shape[2:]))
