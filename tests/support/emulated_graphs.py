"""Emulate CUDA graphs on a CPU: record the operations of a capture with their tensors, and replay them.

As in a real graph, Python numbers are frozen at capture, nothing is computed before a replay, and reading a value or
copying values from the host during capture is an error. A replay reads and writes the same memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2", "unique_dim", "item"}


INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class HostAccess(RuntimeError):
    """A value was read, or copied from the host, during capture."""


def forbidden(*_: Any, **__: Any) -> Any:
    """Replaces functions that read or make a tensor without the dispatcher."""
    raise HostAccess("operation not permitted when stream is capturing")


def memory_of(tensor: Tensor) -> Any:
    """A key that views of the same memory share."""
    return tensor.untyped_storage()._cdata


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in a nested structure."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Recording(TorchDispatchMode):
    """Computes and records operations. `undo` restores memory that existed before and invalidates new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[Any, tuple[Tensor, Tensor]] = {}
        self.new: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        given = tensors_in((args, kwargs))
        if name in READS or (name in INDEXED and any(each.dtype == torch.bool for each in tensors_in(args[1]))):
            raise HostAccess(f"{name} during capture")
        if name == "lift_fresh" and given[0].dim():  # of a list or an array; a GPU fills in a single number
            raise HostAccess("values of the host during capture")
        self.keep(function, args, kwargs)
        out = function(*args, **kwargs)
        there = {memory_of(each) for each in given}
        fresh = [each for each in tensors_in(out) if memory_of(each) not in there]
        self.new |= {memory_of(each): each for each in fresh}
        if fresh or function._schema.is_mutable:  # not a view
            self.operations.append((function, args, kwargs, tensors_in(out) if fresh else []))
        return out

    def keep(self, function: Any, args: Any, kwargs: Any) -> None:
        """Save memory that existed before the capture and is about to be overwritten."""
        named = zip(function._schema.arguments, args, strict=False)
        written = [value for argument, value in named if argument.alias_info and argument.alias_info.is_write]
        written += [kwargs[each.name] for each in function._schema.arguments if each.is_out and each.name in kwargs]
        for tensor in tensors_in(written):
            if memory_of(tensor) not in self.before and memory_of(tensor) not in self.new:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[memory_of(tensor)] = whole, whole.clone()

    def undo(self) -> None:
        """Restore the state before the capture."""
        for tensor, before in self.before.values():
            tensor.copy_(before)
        for tensor in self.new.values():
            tensor.fill_(torch.nan if tensor.dtype.is_floating_point or tensor.dtype.is_complex else 0)


class Emulated:
    """Captures graphs as lists of operations. `captured` and `replayed` count over all instances."""

    captured = replayed = 0

    def capture(self, run: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Record `run` and return a function that replays it."""
        methods = dict.fromkeys(("tolist", "numpy", "cpu", "new_tensor"), forbidden)
        functions = mock.patch.multiple(torch, tensor=forbidden, from_numpy=forbidden)
        with mock.patch.multiple(Tensor, **methods), functions, Recording() as recording:
            run()
        recording.undo()
        Emulated.captured += 1

        def replay() -> None:
            Emulated.replayed += 1
            for function, args, kwargs, outs in recording.operations:
                found = function(*args, **kwargs)
                for out, new in zip(outs, tensors_in(found) if outs else [], strict=True):
                    out.copy_(new)

        return replay


class Stream:
    """A stream of a card; equal to itself only."""

    def __init__(self, card: int) -> None:
        self.device = torch.device("cuda", card)


class TwoCards:
    """The streams of two pretended GPUs, for the real `torch.cuda.graph`. Each card has a current stream, on which its
    kernels are launched; those on the stream of a capture are recorded."""

    def __init__(self) -> None:
        self.device, self.current = 0, [Stream(0), Stream(1)]
        self.capturing: Any = None

    def launch(self, card: int) -> bool:
        """Launch a kernel on a card, and return whether it is recorded."""
        return self.current[card] is self.capturing

    def set_stream(self, stream: Any) -> None:
        self.device = stream.device.index
        self.current[self.device] = stream

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before = self.current[self.device]
        self.set_stream(stream)
        yield
        self.set_stream(before)

    @contextmanager
    def on(self, device: Any) -> Iterator[None]:
        before, self.device = self.device, device.index
        try:
            yield
        finally:
            self.device = before

    def graph(self) -> Any:
        """A graph whose capture takes place on the current stream, and whose end reports what went wrong before."""

        def begin(**_: Any) -> None:
            self.capturing = self.current[self.device]

        def end() -> None:
            self.capturing = None
            if sys.exc_info()[0] is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

        return SimpleNamespace(capture_begin=begin, capture_end=end, replay=None)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """A context in which torch uses these cards."""
        cuda = {
            "CUDAGraph": self.graph,
            "Stream": lambda: Stream(self.device),
            "current_stream": lambda: self.current[self.device],
            "set_stream": self.set_stream,
            "stream": self.stream,
            "device": self.on,
            **dict.fromkeys(("synchronize", "empty_cache"), lambda: None),
        }
        empty = mock.patch.object(torch._C, "_host_emptyCache", lambda: None, create=True)
        with mock.patch.multiple(torch.cuda, **cuda), empty:
            yield
