"""A mixture of discretised logistics per channel of a pixel (Salimans et al. 2017): few parameters, smooth in
intensity.

In PixelCNN++, red, green and blue share one set of mixture weights per pixel, so that the component of one channel
tells about the others. Here each channel has weights of its own, and channels depend on each other only through their
means.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..config import ModelConfig
from .base import LEVELS, Likelihood, to_intensities

HALF_BIN = 1 / (LEVELS - 1)


class DiscretizedLogisticConfig(ModelConfig):
    """The size of the mixture and its smallest scale."""

    components: int = Field(5, ge=1, le=64, description="number of logistics in each channel's mixture")
    min_log_scale: float = Field(
        -7.0, le=0, description="log of the narrowest scale, in units of intensities from -1 to 1"
    )


class DiscretizedLogistic(Likelihood, name="discretized_logistic"):
    """P(v) = sum_k w_k (cdf_k(v + half a bin) - cdf_k(v - half a bin)); black and white take the whole tails.

    The means of green and blue depend linearly on the true values of the channels before them.
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
        """The mixture's clamped means, `(B, C, H, W)` in [-1, 1]: green given the mean of red, blue given both.

        This is not quite the expected image: black and white take the tails, so that wide logistics near them have
        another mean; and green is linear in the true red only until it is clamped.
        """
        found: list[Tensor] = []
        for channel in range(self.channels):
            weights, means, _ = self._mixture(parameters.float(), channel, found)
            found.append((weights.softmax(1) * means.clamp(-1, 1)).sum(1))
        return torch.stack(found, 1)

    def _channel_log_prob(self, parameters: Tensor, values: Tensor, channel: int, asked: Tensor) -> Tensor:
        before = [to_intensities(values[:, earlier], parameters.dtype) for earlier in range(channel)]
        weights, means, scales = (part.unsqueeze(2) for part in self._mixture(parameters, channel, before))
        asked = asked.unsqueeze(1)  # (B, 1, V, H, W) against (B, K, 1, H, W)
        away = to_intensities(asked, parameters.dtype) - means
        inverse = (-scales).exp()
        upper, lower = F.logsigmoid((away + HALF_BIN) * inverse), F.logsigmoid((HALF_BIN - away) * inverse)
        # cdf(u) - cdf(l) = cdf(u) (1 - cdf(l)) (1 - exp(l - u)), exactly
        inside = upper + lower + (-torch.expm1(-2 * HALF_BIN * inverse)).log()
        logs = torch.where(asked == 0, upper, torch.where(asked == LEVELS - 1, lower, inside))
        return (weights.log_softmax(1) + logs).logsumexp(1)

    def _mixture(self, parameters: Tensor, channel: int, before: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, means and log scales `(B, K, H, W)`, given the intensities `(B, H, W)` of the channels before."""
        own = parameters.split(self.sizes, 1)[channel].unflatten(1, (3 + channel, -1))
        weights, means, scales, *coefficients = own.unbind(1)
        means = means + self.spread.to(means.dtype)
        for coefficient, intensity in zip(coefficients, before, strict=True):
            means = means + coefficient.tanh() * intensity.unsqueeze(1)
        return weights, means, (scales - 2).clamp(min=self.config.min_log_scale)
