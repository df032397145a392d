"""Run a whole computation as one CUDA graph, replacing hundreds of small kernel launches by one.

A graph reads and writes the memory with which it was captured, so inputs are copied there; a smaller batch leaves the
last rows as they were. A graph holds all memory of the computation, such as a key/value cache, so only the last one is
kept, and only while its model exists."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LOCK = threading.Lock()  # a process can capture one graph at a time, and all threads share the last one
STREAMS: dict[torch.device, torch.cuda.Stream] = {}  # on which graphs are captured


class Graph:
    """A model's computation, identified by `key`, for up to `rows` rows."""

    last: Graph | None = None
    allowed: bool = True

    def __init__(self, model: nn.Module, key: Any, rows: int, inputs: dict[str, Tensor]) -> None:
        self.model, self.key, self.rows, self.failed = weakref.ref(model, self._release), key, rows, False
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self.replay: Callable[[], None] | None = None

    @classmethod
    def _release(cls, model: weakref.ref[nn.Module]) -> None:
        """Free the last graph if it belongs to this deleted model."""
        if cls.last is not None and cls.last.model is model:
            cls.last = None

    def compute(self, rows: int, inputs: dict[str, Tensor], compute: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Return `compute(inputs)`; the first call captures the graph."""

        def run() -> None:
            self.output = compute(self.inputs)

        self.replay = self.replay or capture(run, next(iter(inputs.values())).device)
        for name, tensor in inputs.items():
            self.inputs[name][: len(tensor)].copy_(tensor)
        self.replay()
        return self.output[:rows].clone()


def compute_by_graph(
    model: nn.Module, key: Any, rows: int, inputs: dict[str, Tensor], compute: Callable[[dict[str, Tensor]], Tensor]
) -> Tensor | None:
    """Return `compute(inputs)` from a CUDA graph, or None if the caller should compute eagerly: on the first call, to
    warm up, and after a failed capture, which warns. A graph of up to twice as many rows is used, too."""
    weights = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    with LOCK:
        key, graph = (key, tuple(weights)), Graph.last
        if graph is None or graph.model() is not model or graph.key != key or not rows <= graph.rows <= 2 * rows:
            Graph.last = Graph(model, key, rows, inputs)
            return None
        try:
            return None if graph.failed else graph.compute(rows, inputs, compute)
        except RuntimeError as error:
            graph.failed, graph.replay = True, None
            cause = error.__context__ or error  # the end of a capture raises an error of its own
            warnings.warn(f"CUDA graph capture failed, so sampling is slower: {cause}", stacklevel=2)
            return None


def release_graph() -> None:
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


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Record the kernels that `run` launches on `device`, and return a function that launches them again."""
    with torch.cuda.device(device):  # only kernels on a stream of the current device would be recorded
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        stream = STREAMS.setdefault(device, torch.cuda.Stream())
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                run()
        finally:
            torch.cuda.set_stream(before)  # torch leaves a failed capture on its stream
    return graph.replay
