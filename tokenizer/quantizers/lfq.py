"""Lookup-free quantization (Yu et al. 2023, MAGVIT-v2; Luo et al. 2024, Open-MAGVIT2): the id is the channels' signs.

There is no codebook and no search, so a vocabulary of 2^18 costs nothing. Two losses keep all codes in use, with p(code
| z) proportional to exp(-|z - code|^2 / temperature): bit k is 1 with probability sigmoid(4 z_k / temperature).
`entropy`, E[H(p)], is small if assignments are confident, and `diversity`, log K - H(E[p]), is small if the batch uses
all codes equally (see `entropy.py`). E[p] covers the vectors of all ranks, so results do not depend on the number of
processes; with gradient accumulation it covers a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ..config import ModelConfig
from .base import Quantized, Quantizer
from .entropy import bit_diversity, bit_entropy
from .gradients import straight_through

LARGEST = 18  # bits of an id, and of a group


class LFQConfig(ModelConfig):
    bits: int = Field(9, ge=2, le=256, description="number of channels, each of which becomes one bit")
    levels: int = Field(
        1, ge=1, le=64, description="ids per position, which share the bits evenly; a prior needs small vocabularies"
    )
    beta: float = Field(0.25, ge=0, description="weight of the commitment loss, which pulls vectors to their codes")
    entropy: float = Field(0.02, ge=0, description="weight of the entropy of p(code | vector), in nats")
    diversity: float = Field(0.1, ge=0, description="weight of log(codes) - H(mean p(code)), in nats")
    temperature: float = Field(1.0, gt=0, description="of p(code | vector) in the entropy and diversity losses")
    group: int = Field(
        10, ge=1, le=LARGEST, description="bits whose joint distribution `diversity` measures (exact for all bits)"
    )

    def check(self) -> Iterator[str]:
        if self.bits % self.levels:
            yield f"levels: must divide the {self.bits} bits (got {self.levels})"
        elif self.bits // self.levels > LARGEST:
            yield f"bits: at most {LARGEST} per id, so {self.bits} need more levels (got {self.levels})"


class LFQ(Quantizer, name="lfq"):
    """Quantizes channels to +1 if positive, else -1. With n = bits / levels, channels l n to (l + 1) n - 1 are the bits
    of level l's id, least significant first."""

    Config = LFQConfig
    places: Tensor

    def __init__(self, config: LFQConfig) -> None:
        super().__init__(config)
        self.dim, self.levels = config.bits, config.levels
        self.vocab_size = 2 ** (config.bits // config.levels)
        self.size = 1.0  # absolute value of a code's channels
        self.sharpness = 4 / config.temperature  # |z + 1|^2 - |z - 1|^2 = 4 z
        places = 2 ** torch.arange(config.bits // config.levels, device="cpu")
        self.register_buffer("places", places, persistent=False)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"commitment": self.config.beta, "entropy": self.config.entropy, "diversity": self.config.diversity}

    def project(self, z: Tensor) -> Tensor:
        """Map `z` (..., bits) to the space of the codes."""
        return z

    def _quantize(self, z: Tensor) -> Quantized:
        u = self.project(z.movedim(1, -1))
        positive = u.detach() > 0
        codes = self._codes(positive)
        ids = (positive.unflatten(-1, (self.levels, -1)) * self.places).sum(-1)
        z_q = straight_through(u, codes).movedim(-1, 1)
        return Quantized(z_q, torch.cat(ids.unbind(-1), 1), self.losses(u.flatten(0, -2), codes.flatten(0, -2)))

    def losses(self, rows: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Return unweighted scalar losses of rows `(n, bits)` and their codes: |z - sg(code)|^2 in units of `size`,
        averaged over channels, and the entropies in nats. In training, all ranks call this and share E[p]."""
        logits = rows * self.sharpness
        return {
            "commitment": F.mse_loss(rows / self.size, codes / self.size),
            "entropy": bit_entropy(logits),
            "diversity": bit_diversity(logits, self.config.group, share=self.training and torch.is_grad_enabled()),
        }

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        ids = torch.stack(tokens.chunk(self.levels, dim=1), -1)
        bits = ids.unsqueeze(-1) // self.places % 2
        return self._codes(bits.flatten(-2) == 1).movedim(-1, 1)

    def _codes(self, positive: Tensor) -> Tensor:
        return (positive.float() * 2 - 1) * self.size
