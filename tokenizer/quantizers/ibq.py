"""Index backpropagation (Shi et al. 2024, arXiv:2412.02692): all codes learn, through the softmax over indices.

A vector's logits are its inner products with the codes, and the largest is its id. The decoder's gradient reaches
vectors and codes through the one-hot vector of the id, which passes it straight through to the softmax of the logits
(section 3.2), so codes that are nobody's choice move along with the rest. `entropy` and `diversity` keep vectors sure
of their code and all codes in use; they look at a softmax of its own, at a temperature of 0.01.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Quantized
from .choice import How, choose
from .codebook import Codebook, CodebookConfig, map_of, rows_of
from .entropy import diversity
from .updates import mean_over_ranks


class IBQConfig(CodebookConfig):
    """What keeps all codes in use. (Inner products need no `normalize`; with it they are cosines.)"""

    beta: float = Field(
        0.25,
        ge=0,
        description="weight of the codebook loss, which pulls codes to their vectors; the vectors' own two pulls "
        "weigh 1",
    )
    gradient: Literal["index"] = Field(  # type: ignore[assignment]
        "index", description="gradients pass through the softmax over indices"
    )
    temperature: float = Field(
        0.1,
        gt=0,
        description="of the softmax that gradients pass (the paper: 1); where it is nearly flat, "
        "little of the decoder's gradient gets through",
    )
    entropy_temperature: float = Field(
        0.01, gt=0, description="of the softmax whose entropies are the two losses below"
    )
    entropy: float = Field(
        0.02, ge=0, description="weight of the entropy of a vector's code, in nats (the paper: 0.05)"
    )
    diversity: float = Field(
        0.02, ge=0, description="weight of what the codes' entropy over the batch lacks, in nats (the paper: 0.05)"
    )


class IBQ(Codebook, name="ibq"):
    """Codes are parameters, each with a gradient from every vector."""

    Config = IBQConfig

    def __init__(self, config: IBQConfig) -> None:
        super().__init__(config)
        self.codebook = nn.Parameter(torch.randn(config.codes, config.dim) * config.dim**-0.5)

    @property
    def loss_weights(self) -> dict[str, float]:
        """1 for both pulls on vectors, beta for that on codes, and the entropies' as configured."""
        weights = {"index": 1.0, "commitment": 1.0, "codebook": self.config.beta}
        return {**weights, "entropy": self.config.entropy, "diversity": self.config.diversity}

    def _quantize(self, z: Tensor) -> Quantized:
        rows = self.comparable(rows_of(z))
        recorded = self.may_record(rows.detach())
        table, how = self.table(), How(self.config.temperature, self.config.entropy_temperature)
        passed, tokens, entropy, mean = choose(rows, table, table.new_zeros(len(table)), table, how)
        entropies = {"entropy": entropy, "diversity": diversity(mean, share=self.training and torch.is_grad_enabled())}
        losses = {"index": F.mse_loss(passed, rows), **self.losses(rows, F.embedding(tokens, table)), **entropies}
        if recorded:
            self.record()
        return Quantized(map_of(passed, z), tokens.reshape(z.shape[0], *z.shape[2:]), losses)

    def losses(self, rows: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Means over elements of |z - sg(e)|^2 and |sg(z) - e|^2. (`index` is |z - e|^2 with its gradient through the
        softmax as well.)"""
        return {"commitment": F.mse_loss(rows, codes.detach()), "codebook": F.mse_loss(codes, rows.detach())}

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """k-means of directions, at the mean length of all ranks' vectors: of codes of many lengths, inner products
        would choose only the long ones."""
        super().start(F.normalize(rows, dim=1))
        length = mean_over_ranks(rows.norm(dim=1).mean())
        self.codebook.copy_(F.normalize(self.codebook, dim=1) * length)
