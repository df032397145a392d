"""Distributions over a pixel's 256 values, with parameters from the decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .config import ModelConfig
from .model import Registered
from .precision import at_least_float32

LEVELS = 256
HALF_BIN = 1 / (LEVELS - 1)  # of intensities from -1 to 1
# Probability mass that is mixed in uniformly. It limits the cost of any value to 24 bits per channel, and adds at most
# 2e-5 bits otherwise.
FLOOR = 2.0**-16


class Likelihood(Registered, nn.Module, family="tokenizer.likelihoods"):
    """P(image | parameters) = prod_c P(channel c | channels before c, parameters), pixel by pixel."""

    num_parameters: int  # decoder outputs per pixel

    def __init__(self, config: ModelConfig, channels: int) -> None:
        nn.Module.__init__(self)
        self.config: Any = config
        self.channels = channels

    def log_prob(self, parameters: Tensor, values: Tensor) -> Tensor:
        """Return log P of int64 `values` (B, C, H, W), each given the channels before it, in nats and the same shape.

        parameters: (B, num_parameters, H, W); the result is float64 for float64 parameters, else float32.
        """
        parts = [
            self._floored(parameters, values, channel, values[:, channel, None]) for channel in range(self.channels)
        ]
        return torch.cat(parts, 1)

    def table(self, parameters: Tensor, values: Tensor, channel: int) -> Tensor:
        """Return log P of all 256 values of one channel, `(B, 256, H, W)`, given the earlier channels of `values`."""
        candidates = torch.arange(LEVELS, device=parameters.device)[None, :, None, None]
        return self._floored(parameters, values, channel, candidates)

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the mean image or an approximation, `(B, C, H, W)` in [-1, 1], for display."""
        raise NotImplementedError

    def _floored(self, parameters: Tensor, values: Tensor, channel: int, candidates: Tensor) -> Tensor:
        logs = self._channel_log_prob(at_least_float32(parameters), values, channel, candidates)
        return torch.logaddexp(logs + math.log1p(-FLOOR), torch.full_like(logs, math.log(FLOOR / LEVELS)))

    def _channel_log_prob(self, parameters: Tensor, values: Tensor, channel: int, candidates: Tensor) -> Tensor:
        """Return log P `(B, V, H, W)`, without the floor, of `candidates`, which broadcast to that shape."""
        raise NotImplementedError


def to_values(images: Tensor) -> Tensor:
    """Round images in [-1, 1] to the nearest of 256 values, int64."""
    return ((images.float() + 1) * 127.5).round().long().clamp(0, LEVELS - 1)


def to_intensities(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) / 127.5 - 1


class Categorical(Likelihood, name="categorical"):
    """A softmax over a channel's 256 values (van den Oord et al. 2016): flexible enough for spikes at black or white.

    Channels are independent given the tokens.
    """

    Config = ModelConfig

    def __init__(self, config: ModelConfig, channels: int) -> None:
        super().__init__(config, channels)
        self.num_parameters = channels * LEVELS

    def mean(self, parameters: Tensor) -> Tensor:
        shares = parameters.float().unflatten(1, (self.channels, LEVELS)).softmax(2)
        intensities = to_intensities(torch.arange(LEVELS, device=parameters.device), shares.dtype)
        with torch.autocast(parameters.device.type, enabled=False):  # autocast would compute the mean in bfloat16
            return torch.einsum("bcvhw,v->bchw", shares, intensities)

    def _channel_log_prob(self, parameters: Tensor, values: Tensor, channel: int, candidates: Tensor) -> Tensor:
        logs = parameters.unflatten(1, (self.channels, LEVELS))[:, channel].log_softmax(1)
        return logs.gather(1, candidates.expand(len(logs), -1, *logs.shape[2:]))


class DiscretizedLogisticConfig(ModelConfig):
    components: int = Field(5, ge=1, le=64, description="number of logistics in each channel's mixture")
    min_log_scale: float = Field(-7.0, le=0, description="log of the smallest scale, for intensities from -1 to 1")


class DiscretizedLogistic(Likelihood, name="discretized_logistic"):
    """A mixture of discretized logistics per channel (Salimans et al. 2017), with few parameters and smooth in
    intensity.

    P(v) = sum_k w_k (cdf_k(v + half a bin) - cdf_k(v - half a bin)); black and white include the whole tails. The means
    of green and blue depend linearly on the true values of the preceding channels. In PixelCNN++ the channels of a
    pixel share mixture weights, which makes their components dependent; here each channel has its own.
    """

    Config = DiscretizedLogisticConfig

    def __init__(self, config: DiscretizedLogisticConfig, channels: int) -> None:
        super().__init__(config, channels)
        count = config.components
        self.sizes = [(3 + channel) * count for channel in range(channels)]  # weights, means, scales, coefficients
        self.num_parameters = sum(self.sizes)
        spread = torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1)
        self.register_buffer("spread", spread.reshape(1, -1, 1, 1), persistent=False)
        self.spread: Tensor

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the mean of the clamped component means, `(B, C, H, W)` in [-1, 1]: green given red's mean, blue given
        both. This approximates the expected image: the tails at black and white shift the means of wide logistics."""
        channels: list[Tensor] = []
        for channel in range(self.channels):
            weights, means, _ = self._mixture(parameters.float(), channel, channels)
            channels.append((weights.softmax(1) * means.clamp(-1, 1)).sum(1))
        return torch.stack(channels, 1)

    def _channel_log_prob(self, parameters: Tensor, values: Tensor, channel: int, candidates: Tensor) -> Tensor:
        before = [to_intensities(values[:, earlier], parameters.dtype) for earlier in range(channel)]
        weights, means, scales = (part.unsqueeze(2) for part in self._mixture(parameters, channel, before))
        candidates = candidates.unsqueeze(1)  # (B, 1, V, H, W), to broadcast with (B, K, 1, H, W)
        distance = to_intensities(candidates, parameters.dtype) - means
        inverse = (-scales).exp()
        upper, lower = F.logsigmoid((distance + HALF_BIN) * inverse), F.logsigmoid((HALF_BIN - distance) * inverse)
        # cdf(u) - cdf(l) = cdf(u) (1 - cdf(l)) (1 - exp(l - u)), exactly
        inside = upper + lower + (-torch.expm1(-2 * HALF_BIN * inverse)).log()
        logs = torch.where(candidates == 0, upper, torch.where(candidates == LEVELS - 1, lower, inside))
        return (weights.log_softmax(1) + logs).logsumexp(1)

    def _mixture(self, parameters: Tensor, channel: int, before: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights, means and log scales `(B, K, H, W)`. before: intensities `(B, H, W)` of earlier channels."""
        own = parameters.split(self.sizes, 1)[channel].unflatten(1, (3 + channel, -1))
        weights, means, scales, *coefficients = own.unbind(1)
        means = means + self.spread.to(means.dtype)
        for coefficient, intensity in zip(coefficients, before, strict=True):
            means = means + coefficient.tanh() * intensity.unsqueeze(1)
        return weights, means, (scales - 2).clamp(min=self.config.min_log_scale)
