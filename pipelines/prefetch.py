"""Prefetching of batches in a thread, and asynchronous copies to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from prior.given import Given

T = TypeVar("T")
Made = TypeVar("Made")
PREFETCHED = 2  # so that a fast batch can compensate for a slow one


def prefetch(
    make: Callable[[T], Made], items: Iterable[T], ahead: int = PREFETCHED, threads: int = 1
) -> Generator[Made, None, None]:
    """Yield `make(item)` for each item in order, computed by threads up to `ahead` items in advance.

    An error is raised when its item is due. Closing the generator waits for the current items and cancels the rest.
    """
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(threads, "ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def pin_memory(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(map_tensors(Tensor.pin_memory, part) for part in batch)


def move_batch_async(batch: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """Start asynchronous copies of the batch to the device; work queued there later waits for them."""
    return tuple(map_tensors(lambda tensor: tensor.to(device, non_blocking=True), part) for part in batch)


def map_tensors(act: Callable[[Tensor], Tensor], part: Any) -> Any:
    """Apply `act` to a tensor, or to the rows of a `Given`; return anything else unchanged."""
    if isinstance(part, Given):
        return part.with_rows(**{name: act(rows) for name, rows in part.rows.items()})
    return act(part) if isinstance(part, Tensor) else part
