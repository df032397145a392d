"""MADE's connections: the degrees of its hidden units, their masks, and the weights that these leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

CHOSEN: ContextVar[Mapping[int, Tensor]] = ContextVar("chosen degrees", default=MappingProxyType({}))
"""The degrees of models, by their `id`, that are others than their own here: in this thread, in this block."""


@contextmanager
def chosen_degrees(model: Any, degrees: Tensor) -> Iterator[None]:
    """Have `model` use these degrees of all layers, `(sum of units,)`, in this thread, while the block lasts."""
    before = CHOSEN.set({**CHOSEN.get(), id(model): degrees})
    try:
        yield
    finally:
        CHOSEN.reset(before)


def degrees_of(model: Any) -> Tensor:
    """Those that `model` uses here, `(sum of units,)`: its own, or the chosen ones."""
    return CHOSEN.get().get(id(model), model.all_degrees)


def even_degrees(units: int, num_tokens: int) -> Tensor:
    """Degrees `(units,)`, ascending: each of 1 .. N - 1 equally often, the last unit seeing all but the last token."""
    steps = torch.arange(1, units + 1, device="cpu") * (num_tokens - 1)
    return ((steps + units - 1) // units).clamp(min=1)


def random_degrees(hidden: Sequence[int], num_tokens: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Degrees of each layer, uniform, none below the smallest of the layer before, so that no unit sees nothing."""
    degrees, smallest = [], 1
    for units in hidden:
        degrees.append(torch.randint(smallest, max(2, num_tokens), (units,), generator=generator, device="cpu"))
        smallest = int(degrees[-1].min())
    return degrees


@torch.inference_mode(False)
@torch.no_grad()
def build_masks(ranks: Tensor, degrees: Sequence[Tensor], direct: int | None, dtype: torch.dtype) -> list[Tensor]:
    """What the weights of the input, the hidden layers, the direct connections (if any) and the output are multiplied
    by: one where a connection may be, else zero; of the weights' type, which is fastest.

    ranks: `(N,)`, of each raster index; direct: numbers per token that direct connections lead to, None without any.
    """
    seen = ranks[:, None]
    masks = [(seen < degrees[0])[:, None]]
    masks += [below <= own[:, None] for below, own in zip(degrees, degrees[1:], strict=False)]
    if direct is not None:
        masks.append((seen < ranks.repeat_interleave(direct))[:, None])
    masks.append((degrees[-1] <= seen)[:, None])
    return [mask.to(dtype) for mask in masks]


class Connections:
    """The weights of a `MADE`, zero where they are cut; masks and weights are kept while nothing changes.

    Neither copied nor saved with the model.
    """

    def __init__(self) -> None:
        self.masks, self.masked = Memory(), Memory()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Connections, ()

    def weights(self, model: Any, order: Tensor | None, degrees: Sequence[Tensor] | None) -> list[Tensor]:
        """Those of input, hidden layers, direct connections (if any) and output. order and degrees: see `MADE.forward`.

        Masks are built where order or degrees are others than they were; while nothing is trained, weights are
        multiplied by them where they have changed. A fused optimizer changes them without a trace, so a pass that may
        lead to a step forgets what was kept, and nothing is kept while there are gradients.
        """
        direct = [] if model.direct is None else [model.direct]
        weights = [model.input, *model.hidden, *direct, model.output]
        chosen = [model.order if order is None else order, *(degrees or [degrees_of(model)])]

        def build() -> list[Tensor]:
            ranks = model.ranks if order is None else torch.argsort(order)
            return build_masks(
                ranks, degrees or model.degrees(), model.width_out if direct else None, model.input.dtype
            )

        masks = self.masks.get(chosen, build)

        def cut() -> list[Tensor]:
            return [weight * mask for weight, mask in zip(weights, masks, strict=True)]

        trained = model.training or torch.is_grad_enabled()
        if trained or any(weight.is_inference() or weight.grad is not None for weight in weights):
            self.masked = Memory()
            return cut()
        return self.masked.get([*weights, *masks], cut)


class Memory:
    """What was built last. It is built again only where the tensors that it is made of are others, or have changed."""

    def __init__(self) -> None:
        self.last: tuple[list[Tensor], list[int], list[Tensor]] = ([], [], [])
        """The tensors, their versions, and what was built: replaced as one, as other threads build other things."""

    def get(self, made_of: list[Tensor], build: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `build` gives for these tensors."""
        versions = [-1 if tensor.is_inference() else tensor._version for tensor in made_of]
        before, their_versions, built = self.last
        same = len(made_of) == len(before) and all(a is b for a, b in zip(made_of, before, strict=True))
        if not same or versions != their_versions:
            built = build()
            self.last = made_of, versions, built
        return built
