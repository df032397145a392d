"""Binary spherical quantization (Zhao et al. 2024): lookup-free quantization on the unit sphere.

A vector u of length 1 becomes sign(u) / sqrt(bits), also of length 1, so the quantization error is bounded for every
input. p(code | u) is proportional to exp(u . code / temperature) (section 4): bit k is 1 with probability sigmoid(2 u_k
/ (temperature sqrt(bits))), and sigmoid(+-2 / (temperature bits)) if u equals its code. With 2 / (temperature bits) of
about 4 to 10, both entropies have gradients, even if a bit is equal for all vectors. A higher temperature reduces
`diversity` through uncertain bits rather than through code usage.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from .lfq import LFQ, LFQConfig

EPSILON = 1e-6  # added to |z|^2, because the gradient of the direction is unbounded at zero


class BSQConfig(LFQConfig):
    """Settings of `lfq`; the temperature applies to cosines."""

    temperature: float = Field(0.03, gt=0, description="temperature of cosines of vector and code; 0.015 suits 18 bits")


class BSQ(LFQ, name="bsq"):
    """Codes are the corners, +-1/sqrt(bits) per channel, of the cube inscribed in the unit sphere."""

    Config = BSQConfig

    def __init__(self, config: BSQConfig) -> None:
        super().__init__(config)
        self.size = config.bits**-0.5
        self.sharpness = 2 * self.size / config.temperature

    def project(self, z: Tensor) -> Tensor:
        """Divide `z` (..., bits) by its length."""
        return z * (z.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
