"""What MADE's units sum: over all tokens at once, or one token at a time, where a unit is finished once all of its
tokens are in."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def summed(inputs: Tensor, weight: Tensor) -> Tensor:
    """What `(B, U)` units sum over all positions.

    inputs: features `(B, N, width)`, or ids `(B, N)` that stand for one-hot features; weight: `(N, width, U)`.
    """
    if inputs.is_floating_point():
        return inputs.flatten(1) @ weight.flatten(0, 1)
    first_rows = torch.arange(len(weight), device=weight.device) * weight.shape[1]
    return F.embedding_bag(inputs + first_rows, weight.flatten(0, 1), mode="sum")


class Sums:
    """What sampling remembers: the first layer's sums over the tokens so far, and the units that are finished.

    Units are sorted by degree (of a drawn connectivity, in a copy), so all masks are prefixes: the token of rank r is
    added to the units of degree > r, those of degree r + 1 are then finished, and the next position reads all that are.
    Each weight is used once, those that are masked never.
    """

    def __init__(self, model: Any, labels: Tensor, order: Tensor) -> None:
        """model: a `MADE`; labels: `(B,)`; order: `(N,)`, or `(B, N)` where each image goes its own way."""
        self.model = model
        self.rank = 0
        self.walk = order.tolist() if order.ndim == 1 else order.t()  # a position for all images, or for each
        ranks = torch.arange(len(model.grid), device="cpu")
        degrees = [each.cpu().sort(stable=True) for each in model.degrees()]
        units = [each.indices for each in degrees]
        finished = [torch.searchsorted(each.values, ranks, right=True) for each in degrees]
        self.ends = [each.tolist() for each in finished]  # of each layer, how many units are finished at each rank
        self.input = of_units(model.input, -1, units[0])
        self.output = of_units(model.output, -1, units[-1])
        layers_below = zip(model.hidden, units, units[1:], strict=False)
        self.hidden = [of_units(of_units(weight, 0, own), 1, below) for weight, below, own in layers_below]
        *layers, outputs = [bias(labels).expand(len(labels), -1).clone() for bias in model.biases]
        self.layers = [of_units(sums, 1, own) for sums, own in zip(layers, units, strict=True)]  # then activations
        self.outputs = outputs.unflatten(1, (-1, model.width_out))
        self.images = torch.arange(len(labels), device=labels.device)

    def step(self, token: Tensor | None) -> Tensor:
        """What is put out at the next position, `(B, size)`, given the last one's `token` `(B,)`."""
        model, rank, layers = self.model, self.rank, self.layers
        if token is not None:
            self._add(token, self.walk[rank - 1])
            self._finish(rank)
        at, end = self.walk[rank], self.ends[-1][rank]
        outputs = self.outputs[slice(None) if isinstance(at, int) else self.images, at]
        outputs = outputs + times(layers[-1][:, :end], at_position(self.output[..., :end], at).mT)
        self.rank += 1
        return model.read_out(outputs, None if model.head_bias is None else model.head_bias[at])

    def _add(self, token: Tensor, at: Any) -> None:
        """Add the token at position `at` to all that will see it."""
        model, begin = self.model, self.ends[0][self.rank - 1]
        weights = [(self.layers[0][:, begin:], self.input[..., begin:])]
        if model.direct is not None:
            weights.append((self.outputs.flatten(1), model.direct))
        for sums, weight in weights:
            if model.embedding is None:
                sums += weight.flatten(0, 1).index_select(0, at * model.width + token)
            else:
                sums += times(model.embedding.index_select(0, token), at_position(weight, at))

    def _finish(self, rank: int) -> None:
        """Activate the units of degree `rank`, layer by layer."""
        for depth, (layer, ends) in enumerate(zip(self.layers, self.ends, strict=True)):
            begin, end = ends[rank - 1], ends[rank]
            if begin == end:
                continue
            if depth:
                below = self.ends[depth - 1][rank]
                weight = self.hidden[depth - 1][begin:end, :below]
                layer[:, begin:end].add_(times(self.layers[depth - 1][:, :below], weight.t()))
            layer[:, begin:end].relu_()


def of_units(weight: Tensor, axis: int, units: Tensor) -> Tensor:
    """`weight` with its `units` in that order, and itself where they are."""
    return weight if bool((units.diff() > 0).all()) else weight.index_select(axis, units.to(weight.device))


def at_position(weight: Tensor, at: int | Tensor) -> Tensor:
    """The weights `(...)` of one position, or `(B, ...)` of each image's."""
    return weight[at] if isinstance(at, int) else weight.index_select(0, at)


def times(x: Tensor, weight: Tensor) -> Tensor:
    """`x` (B, in) times `weight`, (in, out) for all rows or (B, in, out) for each."""
    return torch.bmm(x[:, None], weight)[:, 0] if weight.ndim == 3 else x @ weight
