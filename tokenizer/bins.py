"""Bins of equal probability: each dimension of a vector gets an id of its own (TokenBridge, Wang et al. 2025).

Bins are finer where values are more frequent, so that all ids are equally frequent. The initial bins are those of the
standard normal, which a VAE's latents are drawn to; `fit` takes the quantiles of given vectors instead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import ModelConfig
from .precision import in_finest
from .quantizers import Quantizer
from .quantizers.base import Quantized
from .quantizers.gradients import straight_through


class Bins(Quantizer):
    """`bins` ids for each of `dim` dimensions: id k of dimension d covers edges[d, k - 1] <= z < edges[d, k] and looks
    up centres[d, k], the mean of the values in the bin, which minimises the squared error.

    Dimension d of row r stands in row `d * rows + r` of the tokens.
    """

    edges: Tensor
    centres: Tensor

    def __init__(self, dim: int, bins: int) -> None:
        super().__init__(ModelConfig())
        self.dim = self.levels = dim
        self.vocab_size = bins
        edges, centres = gaussian_bins(bins)
        self.register_buffer("edges", edges.float().repeat(dim, 1))  # (dim, bins - 1)
        self.register_buffer("centres", centres.float().repeat(dim, 1))  # (dim, bins)

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Choose the bins so that each holds equally many of the vectors `rows` (n, dim), per dimension; centres are
        the means of the bins.

        Equal values are never split: they share the bin that begins with them, and the bins before it that they would
        also have filled stay empty. So a constant dimension has a single id. The centre of an empty bin is its edge.
        Centres that would be equal are moved apart by the smallest possible amount, so that ids stay distinct.
        Raises `ValueError` for fewer vectors than bins.
        """
        count, bins = len(rows), self.vocab_size
        if count < bins:
            raise ValueError(f"{bins} bins need at least {bins} vectors (got {count})")
        ordered = rows.to(self.edges).t().contiguous().sort(1).values
        edges = ordered[:, torch.arange(1, bins, device=ordered.device) * count // bins]
        self.edges.copy_(edges)
        ids, values = self._ids(ordered), in_finest(ordered)
        totals = values.new_zeros(self.dim, bins)
        sums, counts = totals.scatter_add(1, ids, values), totals.scatter_add(1, ids, torch.ones_like(values))
        empty = in_finest(torch.cat([edges[:, :1], edges], 1))
        self.centres.copy_(torch.where(counts > 0, sums / counts.clamp(min=1), empty))
        for before, centre in zip(self.centres.t(), self.centres.t()[1:], strict=False):
            torch.maximum(centre, before.nextafter(torch.full_like(before, math.inf)), out=centre)

    def _quantize(self, z: Tensor) -> Quantized:
        rows = z.detach().transpose(0, 1)
        ids = self._ids(rows.reshape(self.dim, -1)).reshape(rows.shape)
        tokens = ids.transpose(0, 1).flatten(1, 2)
        return Quantized(straight_through(z, self.lookup_checked(tokens)), tokens, {})

    def _ids(self, rows: Tensor) -> Tensor:
        """The bins of `rows` (dim, n): the number of edges that are not above each value."""
        return torch.searchsorted(self.edges, rows.contiguous(), right=True)

    def lookup_checked(self, tokens: Tensor) -> Tensor:
        """The centres `(B, dim, *spatial)` of `tokens` `(B, dim * rows, ...)`."""
        ids = tokens.unflatten(1, (self.dim, -1)).transpose(0, 1)
        return self.centres.gather(1, ids.flatten(1)).reshape(ids.shape).transpose(0, 1).contiguous()


def gaussian_bins(bins: int) -> tuple[Tensor, Tensor]:
    """Edges `(bins - 1,)` between equally probable parts of N(0, 1), and the mean of each part `(bins,)`, float64:
    E[z | a < z < b] = (phi(a) - phi(b)) / P(a < z < b), with the density phi."""
    edges = torch.special.ndtri(torch.arange(1, bins, dtype=torch.float64) / bins)
    density = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi)
    ends = density.new_zeros(1)
    return edges, bins * (torch.cat([ends, density]) - torch.cat([density, ends]))
