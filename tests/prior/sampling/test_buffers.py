"""Where noise is drawn and where it is used: on another device, and by a GPU that is pretended."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from small import generators

from prior.sampling import buffers, gumbel
from prior.sampling.buffers import Buffer, Pinned, cores, make_buffer

SHAPE = (3, 2, 5)
GPU = torch.device("cuda", 1)


def expected(blocks: int = 1) -> torch.Tensor:
    """The last of so many blocks, `(positions, B, V)`, from its definition."""
    own = generators(2)
    for _ in range(blocks):
        block = torch.stack([gumbel((3, 5), generator) for generator in own], 1)
    return block


class There(torch.Tensor):
    """On a device that is not here."""

    log: list[Any]

    def record_stream(self, stream: Any) -> None:
        self.log.append(("used on", stream))

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        self.log.append(("copied", non_blocking))
        return super().copy_(source)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of a GPU, in turn."""
    log: list[Any] = []
    plain = torch.empty

    class Event:
        def __init__(self, blocking: bool = False) -> None:
            self.name = "copied" if blocking else "left"

        def record(self, stream: Any) -> None:
            log.append((self.name, "recorded on", stream))

        def synchronize(self) -> None:
            log.append((self.name, "waited for"))

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name

        def wait_event(self, event: Event) -> None:
            log.append((self.name, "waits for", event.name))

        def __repr__(self) -> str:
            return str(self.name)

        def __eq__(self, other: object) -> bool:
            return str(other) == str(self.name)

    def empty(*shape: Any, device: Any = None, pin_memory: bool = False, **how: Any) -> torch.Tensor:
        there = torch.device(device or "cpu").type != "cpu"
        log.append(("made", "there" if there else "pinned" if pin_memory else "here"))
        made = plain(*shape, **how)
        if not there:
            return made
        elsewhere = made.as_subclass(There)
        elsewhere.log = log
        return elsewhere

    @contextlib.contextmanager
    def stream(which: Any) -> Any:
        log.append(("in", which))
        yield

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"copying to {device.index}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("steps"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    buffers.copying.cache_clear()
    yield log
    buffers.copying.cache_clear()


SIDE, LEFT = "copying to 1", ("left", "recorded on", "steps")
DRAWN = [("copied", "waited for"), ("made", "here"), ("made", "here")]
SENT = [(SIDE, "waits for", "left"), ("in", SIDE), ("copied", True), ("copied", "recorded on", SIDE)]


def test_a_gpu_copies_a_block_once_it_is_drawn_and_the_last_is_used(gpu):
    buffer = make_buffer(SHAPE, GPU)
    assert type(buffer) is Pinned and make_buffer(SHAPE, GPU).stream is buffer.stream
    assert gpu[:4] == [("made", "pinned"), ("made", "there"), LEFT, ("used on", SIDE)]
    gpu.clear()
    own = generators(2)
    buffer.begin(own)
    assert gpu == DRAWN
    gpu.clear()
    buffer.send()
    assert gpu == SENT
    buffer.send()  # it is on its way
    assert gpu == SENT
    gpu.clear()
    block = buffer.receive()
    assert gpu == [("steps", "waits for", "copied")] and block is buffer.used
    assert torch.equal(block.as_subclass(torch.Tensor), expected())
    gpu.clear()
    buffer.leave()
    assert gpu == [LEFT]
    buffer.begin(own)
    gpu.clear()
    block = buffer.receive()  # nobody has sent it
    assert gpu == [*SENT, ("steps", "waits for", "copied")]
    assert torch.equal(block.as_subclass(torch.Tensor), expected(2))


def test_what_is_still_being_drawn_is_not_sent(gpu):
    buffer, task = make_buffer(SHAPE, GPU), Future[None]()
    buffer.tasks = [task]
    gpu.clear()
    buffer.send()
    assert gpu == []
    task.set_result(None)
    buffer.send()
    assert gpu == SENT and buffer.tasks == []


def test_on_another_device_a_block_is_copied_and_here_it_is_not(gpu):
    there = make_buffer(SHAPE, torch.device("mps"))
    assert type(there) is Buffer and gpu == [("made", "here"), ("made", "there")]
    there.begin(generators(2))
    gpu.clear()
    there.send()
    there.leave()
    assert torch.equal(there.receive().as_subclass(torch.Tensor), expected()) and gpu == [("copied", False)]
    gpu.clear()
    here = make_buffer(SHAPE, torch.device("cpu"))
    assert gpu == [("made", "here")]
    here.begin(generators(2))
    assert here.receive() is here.drawn and torch.equal(here.drawn, expected())
    assert here.drawn.shape == SHAPE and here.drawn.dtype == torch.float32


@pytest.mark.parametrize(("numbers", "threads", "tasks"), [(30, 3, 2), (31, 3, 0), (0, 1, 0), (0, 2, 2)])
def test_large_blocks_are_drawn_by_threads_and_small_ones_here(monkeypatch, numbers, threads, tasks):
    monkeypatch.setattr(buffers, "MANY", numbers)
    monkeypatch.setattr(buffers, "cores", lambda: threads)
    buffers.threads.cache_clear()
    buffer = make_buffer(SHAPE, torch.device("cpu"))
    buffer.begin(generators(2))
    assert len(buffer.tasks) == tasks  # no more than there are images
    assert torch.equal(buffer.receive(), expected()) and buffer.tasks == []
    if tasks:
        buffers.threads(os.getpid()).shutdown()
    buffers.threads.cache_clear()


@pytest.mark.parametrize(
    ("usable", "processes", "found"), [(8, None, 8), (8, "", 8), (8, "2", 4), (8, "3", 2), (2, "4", 1)]
)
def test_processes_of_one_machine_share_its_cores(monkeypatch, usable, processes, found):
    if processes is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(usable)), raising=False)
    cores.cache_clear()
    assert cores() == found
    monkeypatch.delattr(os, "sched_getaffinity")
    for counted, expected_ in ((usable, found), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda counted=counted: counted)
        cores.cache_clear()
        assert cores() == expected_
    cores.cache_clear()
