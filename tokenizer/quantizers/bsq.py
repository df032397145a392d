"""Binary spherical quantization (Zhao et al. 2024): lookup-free quantization on the unit sphere.

A vector u of length 1 becomes sign(u) / sqrt(bits), which has length 1 as well, so the error of quantization is bounded
whatever the encoder puts out. p(code | u) is proportional to exp(u . code / temperature) (section 4): bit k is 1 with
probability sigmoid(2 u_k / (temperature sqrt(bits))); where u is at its code, sigmoid(+-2 / (temperature bits)). If the
temperature makes 2 / (temperature bits) about 4 to 10, both entropies have gradients, also where a bit is the same for
all vectors. A higher one makes `diversity` small through unsure bits, not through used codes.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from .lfq import LFQ, LFQConfig

EPSILON = 1e-6  # of |z|^2: a vector of zeros has no direction, and would have a gradient without bound


class BSQConfig(LFQConfig):
    """As for `lfq`; the temperature belongs to cosines."""

    temperature: float = Field(
        0.03, gt=0, description="of the cosine between vector and code; for 18 bits rather 0.015"
    )


class BSQ(LFQ, name="bsq"):
    """Codes are the corners +-1/sqrt(bits) of a cube inside the sphere."""

    Config = BSQConfig

    def __init__(self, config: BSQConfig) -> None:
        super().__init__(config)
        self.size = config.bits**-0.5
        self.sharpness = 2 * self.size / config.temperature

    def project(self, z: Tensor) -> Tensor:
        """`z` (..., bits), divided by its length."""
        return z * (z.square().sum(-1, keepdim=True) + EPSILON).rsqrt()
