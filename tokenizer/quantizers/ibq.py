"""Index backpropagation (Shi et al. 2024, arXiv:2412.02692): all codes learn through the softmax over indices.

A vector's logits are its inner products with the codes; the largest is its id. The decoder's gradient reaches vectors
and codes through the one-hot vector of the id, straight through to the softmax of the logits (section 3.2), so unused
codes get gradients too. `entropy` makes assignments confident and `diversity` keeps all codes in use; both use a
separate softmax with a temperature of 0.01.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .base import Quantized
from .choice import ChoiceOptions, choose
from .codebook import Codebook, CodebookConfig, map_of, rows_of
from .entropy import diversity
from .updates import mean_over_ranks


class IBQConfig(CodebookConfig):
    """Weights and temperatures. With `normalize`, inner products are cosines."""

    beta: float = Field(
        0.25, ge=0, description="weight of the loss that pulls codes to vectors; the others have weight 1"
    )
    gradient: Literal["index"] = Field(  # type: ignore[assignment]
        "index", description="gradients pass through the softmax over indices"
    )
    temperature: float = Field(0.1, gt=0, description="of the softmax that passes gradients (the paper: 1)")
    entropy_temperature: float = Field(0.01, gt=0, description="of the softmax in the entropy and diversity losses")
    entropy: float = Field(0.02, ge=0, description="weight of the entropy of p(code | vector) in nats (paper: 0.05)")
    diversity: float = Field(0.02, ge=0, description="weight of log(codes) - H(mean p(code)) in nats (the paper: 0.05)")


class IBQ(Codebook, name="ibq"):
    """A codebook of parameters in which every code gets a gradient from every vector."""

    Config = IBQConfig
    searches_codes = False

    def __init__(self, config: IBQConfig) -> None:
        super().__init__(config)
        self.codebook = nn.Parameter(torch.randn(config.codes, config.dim) * config.dim**-0.5)

    @property
    def loss_weights(self) -> dict[str, float]:
        weights = {"index": 1.0, "commitment": 1.0, "codebook": self.config.beta}
        return {**weights, "entropy": self.config.entropy, "diversity": self.config.diversity}

    def _quantize(self, z: Tensor) -> Quantized:
        rows = self.comparable(rows_of(z))
        recorded = self.may_record(rows.detach())
        table, options = self.table(), ChoiceOptions(self.config.temperature, self.config.entropy_temperature)
        z_q, tokens, entropy, mean = choose(rows, table, table.new_zeros(len(table)), table, options)
        entropies = {"entropy": entropy, "diversity": diversity(mean, share=self.training and torch.is_grad_enabled())}
        losses = {"index": F.mse_loss(z_q, rows), **self.losses(rows, F.embedding(tokens, table)), **entropies}
        if recorded:
            self.record()
        return Quantized(map_of(z_q, z), tokens.reshape(z.shape[0], *z.shape[2:]), losses)

    def _encode(self, z: Tensor) -> Tensor:
        return self._quantize(z).tokens  # by largest inner product, not smallest distance

    def losses(self, rows: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """Return |z - sg(e)|^2 and |sg(z) - e|^2, averaged over elements. (`index` is |z - e|^2 with its gradient
        through the softmax as well.)"""
        return {"commitment": F.mse_loss(rows, codes.detach()), "codebook": F.mse_loss(codes, rows.detach())}

    @torch.no_grad()
    def start(self, rows: Tensor) -> None:
        """Run k-means on directions, and scale the codes to the mean vector length over all ranks; inner products would
        otherwise choose only long codes."""
        super().start(F.normalize(rows, dim=1))
        length = mean_over_ranks(rows.norm(dim=1).mean())
        self.codebook.copy_(F.normalize(self.codebook, dim=1) * length)
