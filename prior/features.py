"""What a prior's layers put out in one teacher-forced pass, for those who look inside it (`Prior.features`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


def outputs_of(
    modules: Sequence[nn.Module], layers: Sequence[int], arrange: Callable[[Any], Tensor], run: Callable[[], object]
) -> list[Tensor]:
    """The outputs of those of `modules` that `layers` counts, each as `arrange` returns it, while `run` calls all of
    them in their order."""
    calls: list[Tensor | None] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(arrange(output) if len(calls) in layers else None)

    hooks = [module.register_forward_hook(keep) for module in dict.fromkeys(modules)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return [output for layer in layers if (output := calls[layer]) is not None]


def check_layers(name: str, layers: Sequence[int], count: int) -> None:
    """Raise `ValueError` unless all `layers` are among the `count` layers of a prior called `name`."""
    for layer in layers:
        if not count:
            raise ValueError(f"layer: a {name} prior has no layers, hence no features")
        if type(layer) is not int or not 0 <= layer < count:
            raise ValueError(f"layer must be a whole number from 0 to {count - 1} of this {name} (got {layer!r})")
