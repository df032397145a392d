"""What the pretended GPU was given to do, and where the host would have waited for it, by line of the project.

The host waits for a number that it reads, for a result whose size depends on values, for a copy that is not from or to
pinned memory, and for an event.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

ROOT, TESTS = Path(__file__).parents[3], Path(__file__).parents[2]
READS = {
    "_local_scalar_dense": 1,
    "nonzero": 1,
    "masked_select": 1,
    "equal": 1,
    "is_nonzero": 1,
    "bincount": 2,
    "_unique2": 2,
    "unique_dim": 2,
    "unique_consecutive": 1,
}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
NO_KERNEL = {"_local_scalar_dense", "detach", "alias", "lift_fresh", "set_", "resize_", "_unsafe_view", "is_pinned"}
"""Besides views, and what makes empty tensors."""

launches: Counter[str] = Counter()
waits: Counter[tuple[str, str]] = Counter()
"""By line, and by what was waited for."""


def note(func: Any, args: Any, kwargs: dict[str, Any], on_gpu: bool, is_ours: Callable[[Any], bool]) -> None:
    """Count an operation. on_gpu: whether its result is there; is_ours: whether a tensor is."""
    name, leaves = func._schema.name.partition("::")[2], tree_leaves((args, kwargs))
    ours = [leaf for leaf in leaves if is_ours(leaf)]
    if not ours and not on_gpu:
        return
    count, what = READS.get(name, 0) if ours else 0, name
    if name in INDEXED:
        masks = [index for index in args[1] if isinstance(index, Tensor) and str(index.dtype) == "torch.bool"]
        count += len(masks) + sum(isinstance(index, Tensor) and not is_ours(index) for index in args[1])
    elif name == "repeat_interleave" and func._overloadname == "Tensor" and kwargs.get("output_size") is None:
        count += 1
    elif name in ("_to_copy", "copy_"):
        source, target = (args[0], on_gpu) if name == "_to_copy" else (args[1], is_ours(args[0]))
        if is_ours(source) != target and not is_free(name, args, kwargs, source, target):
            count, what = 1, "a copy to the GPU" if target else "a copy to the CPU"
    if count:
        waits[(place(), what)] += count
        arrive()
    views = any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
    if not views and name not in NO_KERNEL and "empty" not in name:
        launches[name] += 1


def is_free(name: str, args: Any, kwargs: dict[str, Any], source: Tensor, target: bool) -> bool:
    """Whether a copy goes by itself: it is told to, and its end on the CPU is pinned. (`to("cpu", non_blocking=True)`
    makes it so.)"""
    told = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
    pinned = source if target else args[0]
    return bool(told) and (getattr(pinned, "pretended_pinned", False) or (name == "_to_copy" and not target))


def pin(tensor: Tensor, device: Any = None) -> Tensor:
    """`Tensor.pin_memory`."""
    copy: Any = tensor.clone()
    copy.pretended_pinned = True
    return copy


on_their_way: list[tuple[Tensor, Tensor]] = []
"""Copies to the CPU that nobody has waited for, and what is to be in them."""


def send(copy: Tensor) -> Tensor:
    """A copy that has not arrived yet: whoever looks at it now sees nonsense."""
    on_their_way.append((copy, copy.clone()))
    return copy.fill_(float("nan") if copy.is_floating_point() else 1)


def arrive() -> None:
    """The host has waited."""
    for copy, values in on_their_way:
        copy.copy_(values)
    on_their_way.clear()


class Event:
    """`torch.cuda.Event`, for which the host may wait."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorded = False

    def record(self, *_: Any) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        if not self.recorded:  # nothing is waited for, and nothing arrives
            return
        waits[(place(), "an event")] += 1
        arrive()


def place() -> str:
    """The innermost line of the project that led here, but for tests."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(TESTS) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside"
