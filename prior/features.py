"""What a prior's layers put out in one teacher-forced pass, for those who look inside it (`Prior.features`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tokenizer.base import full_float32

from .requests import check_labels


def outputs_of(
    modules: Sequence[nn.Module], layers: Sequence[int], arrange: Callable[[Any], Tensor], run: Callable[[], object]
) -> list[Tensor]:
    """The outputs of those of `modules` that `layers` counts, each as `arrange` returns it, while `run` calls all of
    them in their order. What other threads meanwhile have them put out is not looked at."""
    calls: list[Tensor | None] = []
    own = threading.get_ident()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != own:
            return
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


class Features:
    """What a `Prior` shows of its layers."""

    @property
    def feature_modules(self) -> list[nn.Module]:
        """The modules whose outputs `features` returns, in the order in which `forward` calls them; a module that is
        called twice is listed twice. Here none: a model without layers has no features."""
        return []

    @property
    def feature_layers(self) -> int:
        """The number of layers that `features` can return."""
        return len(self.feature_modules)

    def arrange(self, output: Any) -> Tensor:
        """The output of one of `feature_modules` as `(B, N, dim)`, raster order. Here the output is a map or a row in
        that order with channels last, or `(B, dim)` for the whole grid, which becomes `(B, 1, dim)`."""
        return output.flatten(1, -2) if output.ndim > 2 else output[:, None]

    def features(self, tokens: Tensor, labels: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Activations after a layer in the teacher-forced pass, raw, `(B, N, dim)` in raster order.

        Those at i, like `logits[:, i]`, depend on tokens ranked before i (in early layers on fewer than
        `receptive_field` says); pooled over positions they depend on all but the last token in the order. Models that
        differ say so. layer: 0 to `feature_layers` - 1; None is the middle one. Raises `ValueError` for another layer,
        and for tokens or labels out of range.
        """
        return self.layer_features(tokens, labels, [self.feature_layers // 2 if layer is None else layer])[0]

    @full_float32()
    def layer_features(
        self, tokens: Tensor, labels: Tensor | None, layers: Sequence[int], **inputs: Any
    ) -> list[Tensor]:
        """`features` of each of `layers`, from one pass. inputs: further arguments of `forward`."""
        prior: Any = self
        prior.grid.check(tokens)
        check_layers(prior.name, layers, self.feature_layers)
        labels = check_labels(prior, labels, len(tokens))
        run = prior._call_impl  # as it is written: a pass that was compiled without hooks calls none
        return outputs_of(self.feature_modules, layers, self.arrange, lambda: run(tokens, labels, **inputs))
