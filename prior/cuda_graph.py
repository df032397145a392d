"""A whole computation as one CUDA graph, which is launched once where hundreds of small kernels are launch-bound.

A graph reads and writes the memory that it was captured with, so its inputs are copied there. It holds all memory of
the computation, such as a key/value cache, so only the last graph is kept, as long as its model lives."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Graph:
    """A computation of a model for inputs of the same shapes, which `key` identifies."""

    last: Graph | None = None
    allowed: bool = True

    def __init__(self, model: nn.Module, key: Any) -> None:
        self.model, self.key, self.failed = weakref.ref(model, self._release), key, False
        self.inputs: dict[str, Tensor] = {}
        self.replay: Callable[[], None] | None = None

    @classmethod
    def _release(cls, model: weakref.ref[nn.Module]) -> None:
        """Free the memory of the last graph if it belongs to this model, which no longer exists."""
        if cls.last is not None and cls.last.model is model:
            cls.last = None

    def compute(self, inputs: dict[str, Tensor], compute: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Return `compute(inputs)`, which the first call captures."""
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
    """Return `compute(inputs)` by a CUDA graph, or None where the caller should compute without one: the first time, to
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
        warnings.warn(f"not captured in a CUDA graph, so sampling takes longer: {error}", stacklevel=2)
        return None


def release_graph() -> None:
    """Free the memory of the last graph."""
    Graph.last = None


@contextmanager
def without_graphs() -> Iterator[None]:
    """Compute eagerly in this context, and free the memory of the last graph."""
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
