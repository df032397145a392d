"""Run a whole computation as one CUDA graph, replacing hundreds of small kernel launches by one.

A graph reads and writes the memory with which it was captured, so inputs are copied there. It holds all memory of the
computation, such as a key/value cache, so only the last graph is kept, and only while its model exists."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Graph:
    """A model's computation for inputs of fixed shapes, identified by `key`."""

    last: Graph | None = None
    allowed: bool = True

    def __init__(self, model: nn.Module, key: Any) -> None:
        self.model, self.key, self.failed = weakref.ref(model, self._release), key, False
        self.inputs: dict[str, Tensor] = {}
        self.replay: Callable[[], None] | None = None

    @classmethod
    def _release(cls, model: weakref.ref[nn.Module]) -> None:
        """Free the last graph if it belongs to this deleted model."""
        if cls.last is not None and cls.last.model is model:
            cls.last = None

    def compute(self, inputs: dict[str, Tensor], compute: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Return `compute(inputs)`; the first call captures the graph."""
        if self.replay is None:
            self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}

            def run() -> None:
                self.output = compute(self.inputs)

            self.replay = capture(run)
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.replay()
        return self.output.clone()


def compute_by_graph(
    model: nn.Module, key: Any, inputs: dict[str, Tensor], compute: Callable[[dict[str, Tensor]], Tensor]
) -> Tensor | None:
    """Return `compute(inputs)` from a CUDA graph, or None if the caller should compute eagerly: on the first call, to
    warm up, and after a failed capture, which warns."""
    weights = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    key, graph = (key, tuple(weights)), Graph.last
    if graph is None or graph.model() is not model or graph.key != key:
        Graph.last = Graph(model, key)
        return None
    if graph.failed:
        return None
    try:
        return graph.compute(inputs, compute)
    except RuntimeError as error:
        graph.failed, graph.replay = True, None
        warnings.warn(f"CUDA graph capture failed, so sampling is slower: {error}", stacklevel=2)
        return None


def release_graph() -> None:
    """Free the memory of the last graph."""
    Graph.last = None


@contextmanager
def without_graphs() -> Iterator[None]:
    """Compute eagerly inside the context; free the memory of the last graph."""
    release_graph()
    Graph.allowed, before = False, Graph.allowed
    try:
        yield
    finally:
        Graph.allowed = before


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels that `run` launches, and return a function that launches them again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay
