"""Batches made ahead of time by a thread, and copied to the device without waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Made = TypeVar("Made")
AHEAD = 2  # one may take longer than the use of another, if the next takes less


def prefetch(make: Callable[[T], Made], items: Iterable[T], ahead: int = AHEAD) -> Generator[Made, None, None]:
    """Yield what `make` returns for each item, in their order, made by one thread, `ahead` of them in advance.

    An error comes out where its item is due. Once closed, nothing more is made; closing waits for what is being made.
    """
    waiting: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(1, "ahead") as pool:
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
    """Return the batch with its tensors in pinned memory, from which a GPU copies them while the host goes on."""
    return tuple(part.pin_memory() if isinstance(part, Tensor) else part for part in batch)


def to_device_async(batch: tuple[Any, ...], device: torch.device) -> tuple[Any, ...]:
    """Return the batch with its tensors on their way to the device; what is computed with them there waits for them."""
    return tuple(part.to(device, non_blocking=True) if isinstance(part, Tensor) else part for part in batch)
