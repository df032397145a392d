"""Where a block of noise is drawn, and where it is used.

For 64 images and 16,384 ids the noise of a step takes a CPU longer than the step takes a GPU. So the images are shared
out among threads, and for a GPU blocks are drawn into pinned memory and copied from there while steps go on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from threading import Barrier, Lock

import torch
from torch import Tensor

MANY = 1 << 18
"""With fewer numbers in a block than that, threads take longer to begin than to draw them."""
BEGINNING = Lock()
"""Held while threads begin, so that callers in several threads get the same ones."""


class Buffer:
    """Memory for one block, `(positions, B, V)`."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.drawn = torch.empty(shape, device="cpu", pin_memory=device.type == "cuda")
        self.used = self.drawn if device.type == "cpu" else torch.empty(shape, device=device)
        self.tasks: list[Future[None]] = []

    def begin(self, generators: Sequence[torch.Generator]) -> None:
        """Have a block drawn, an image at a time, by each thread that is free; here and now if it is small."""
        images = iter(range(len(generators)))
        if self.drawn.numel() < MANY or cores() == 1:
            self.draw(generators, images)
            return
        with BEGINNING:
            pool = threads(os.getpid())
        tasks = min(cores(), len(generators))
        self.tasks = [pool.submit(self.draw, generators, images) for _ in range(tasks)]

    def draw(self, generators: Sequence[torch.Generator], images: Iterator[int]) -> None:
        """Draw those of `images` that nobody else has taken; the numbers that `gumbel` draws."""
        positions, _, vocab_size = self.drawn.shape
        with torch.inference_mode():
            uniform = torch.empty(positions, vocab_size, dtype=torch.float64, device="cpu")
            noise = torch.empty(positions, vocab_size, device="cpu")
            for image in images:
                uniform.uniform_(generator=generators[image]).log_().neg_()
                torch.neg(noise.copy_(uniform).log_(), out=self.drawn[:, image])

    def wait(self) -> None:
        """Until it is drawn."""
        for task in self.tasks:
            task.result()
        self.tasks = []

    def send(self) -> None:
        """Have it copied to where it is used, if it is drawn."""

    def receive(self) -> Tensor:
        """The block, once it is where it is used."""
        self.wait()
        return self.used if self.used is self.drawn else self.used.copy_(self.drawn)

    def leave(self) -> None:
        """What is asked for from now on is of another block."""


class Pinned(Buffer):
    """One that a GPU copies from on a stream of its own."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, stream: torch.cuda.Stream) -> None:
        super().__init__(shape, device)
        self.stream, self.sent = stream, False
        self.copied, self.left = torch.cuda.Event(blocking=True), torch.cuda.Event()
        self.leave()
        self.used.record_stream(stream)

    def draw(self, generators: Sequence[torch.Generator], images: Iterator[int]) -> None:
        """As soon as the last block has been copied from here."""
        self.copied.synchronize()
        super().draw(generators, images)

    def begin(self, generators: Sequence[torch.Generator]) -> None:
        """Have a block drawn."""
        self.sent = False
        super().begin(generators)

    def send(self) -> None:
        """Have it copied if it is drawn, as soon as the last block is used up."""
        if not self.sent and all(task.done() for task in self.tasks):
            self.wait()
            self.stream.wait_event(self.left)
            with torch.cuda.stream(self.stream):
                self.used.copy_(self.drawn, non_blocking=True)
            self.copied.record(self.stream)
            self.sent = True

    def receive(self) -> Tensor:
        """The block; what follows on this stream waits for it."""
        self.wait()
        self.send()
        torch.cuda.current_stream(self.used.device).wait_event(self.copied)
        return self.used

    def leave(self) -> None:
        """Steps that use it have been given to this stream."""
        self.left.record(torch.cuda.current_stream(self.used.device))


@cache
def copying(device: torch.device) -> torch.cuda.Stream:
    """The stream on which noise is copied to this GPU."""
    return torch.cuda.Stream(device)


def make_buffer(shape: tuple[int, ...], device: torch.device) -> Buffer:
    """A buffer for noise that is used on `device`."""
    return Pinned(shape, device, copying(device)) if device.type == "cuda" else Buffer(shape, device)


@cache
def cores() -> int:
    """How many threads draw: a processor's cores, shared among the processes that `accelerate launch` has started on
    this machine. (`OMP_NUM_THREADS` is of torch's own threads, and often 1 there.)"""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


@cache
def threads(process: int) -> ThreadPoolExecutor:
    """The threads of this process (a fork has none of its parent's), each of which computes alone."""
    own, together = torch.get_num_threads(), Barrier(cores())

    def alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # which a thread's first call takes over for good
        together.wait()

    pool = ThreadPoolExecutor(cores(), "noise")
    for begun in [pool.submit(alone) for _ in range(cores())]:
        begun.result()
    torch.set_num_threads(own)  # which threads that begin later take over from the last call
    return pool
