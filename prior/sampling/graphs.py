"""Steps of sampling as CUDA graphs: launched at once, for a step of a few hundred small kernels is bound by launching.

A step is recorded as it is, block by block of the walk, in one pool of memory, and so is what comes before the first
(weights laid out for steps): so new weights in the same memory are packed anew by the same graphs. Replayed in the same
order, the same kernels do the same to the same memory. Nothing of it is saved, copied or pickled with the model.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

import torch

KEPT = 2
"""How many sets of graphs a model keeps: each holds what sampling remembers."""
REMEMBERED = 64
SMALLEST, LARGEST = 4, 256
"""Rows go in buckets of 4, 8, ... 256, 512, 768, ..., as each number of rows would need graphs of its own."""


class Recorder(Protocol):
    """What makes graphs, which share their memory."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record `run`, which is called but not computed; returns what computes it."""


class CUDARecorder:
    """Graphs of CUDA in one pool."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """As `torch.cuda.graph` does, which would collect garbage each time. Other threads (those that draw noise) may
        go on."""
        graph, others = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(others)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        others.wait_stream(self.stream)

        def replay() -> None:
            with torch.cuda.device(self.device):
                graph.replay()

        return replay


def recorder_for(device: torch.device) -> Callable[[], Recorder] | None:
    """What makes a recorder of steps on this device, None if nothing can record, or may now."""
    if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return None
    return None if torch.cuda.is_current_stream_capturing() else partial(CUDARecorder, device)


def bucket(rows: int) -> int:
    """The number of rows that a graph for `rows` rows has."""
    if rows > LARGEST:
        return -(-rows // LARGEST) * LARGEST
    return max(SMALLEST, 1 << (rows - 1).bit_length())


class Graphs:
    """The sets of graphs that a model keeps, least recently used first, and what is known of others by their keys."""

    def __init__(self) -> None:
        self.sets: OrderedDict[Hashable, Any] = OrderedDict()
        self.seen: OrderedDict[Hashable, bool] = OrderedDict()  # whether it may be captured
        self.weights: Hashable = None
        self.busy = threading.Lock()
        """Held by the call that draws from them: their memory is one call's at a time."""

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:  # copies and pickles of a model have none
        return Graphs, ()

    def find(self, key: Hashable, weights: Hashable, make: Callable[[], Any]) -> Any | None:
        """The set of this key: made at its second use, as the first warms up, and may be the only one; None before,
        and where it has failed. weights: where they are; graphs of others are of no more use."""
        if weights != self.weights:
            self.sets.clear()
            self.seen.clear()
            self.weights = weights
        if key not in self.seen:
            self.seen[key] = True
            if len(self.seen) > REMEMBERED:
                self.seen.popitem(last=False)
            return None
        if not self.seen[key]:
            return None
        if key not in self.sets:
            while len(self.sets) >= KEPT:
                self.sets.popitem(last=False)
            self.sets[key] = make()
        self.sets.move_to_end(key)
        return self.sets[key]

    def refuse(self, key: Hashable, error: Exception) -> None:
        """Try this key no more, and say so."""
        self.seen[key] = False
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"steps are not captured in CUDA graphs, so sampling takes longer: {reason}", stacklevel=2)

    def drop(self, key: Hashable) -> None:
        """Forget a set."""
        self.sets.pop(key, None)


def graphs_of(model: Any) -> Graphs:
    """What `model` keeps."""
    graphs: Graphs = model.graphs
    return graphs


def places(model: Any) -> Hashable:
    """Where the weights are, and what they are."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((each.data_ptr(), each.dtype, each.shape) for each in tensors)
