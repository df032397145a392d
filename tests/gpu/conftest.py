"""Tests of the GPU: `make gpu` runs them on the card. Without one they run on the CPU, which shows that they are right
themselves; `SMALTI_DEVICE` chooses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch

from prior import cuda_graph, sampling
from prior.cuda_graph import release_graph


@pytest.fixture
def device() -> torch.device:
    """The device that is tested."""
    return torch.device(os.environ.get("SMALTI_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(autouse=True)
def clean(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate is set up for each test anew, and no graph remains of another."""
    from one_process import begin_anew

    if device.type == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    begin_anew()
    release_graph()
    yield
    begin_anew()
    release_graph()


@pytest.fixture
def graphs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each CUDA graph that was captured; on the CPU graphs are emulated."""
    from emulated_graphs import Emulated

    real, captured = cuda_graph.capture, []
    if device.type == "cpu":
        real = Emulated().capture
        monkeypatch.setattr(sampling, "can_capture", lambda device: cuda_graph.Graph.allowed)

    def capture(run):
        replay = real(run)
        captured.append("a graph")
        return replay

    monkeypatch.setattr(cuda_graph, "capture", capture)
    return captured


@pytest.fixture
def elsewhere(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Where models compute that are compared with those on the CPU. A rehearsal is made as unlike the CPU as a card is:
    convolutions are computed by other kernels, and random numbers are others."""

    @contextmanager
    def other_kernels() -> Iterator[None]:
        enabled, state = torch.backends.mkldnn.enabled, torch.get_rng_state()
        torch.backends.mkldnn.set_flags(False)
        torch.manual_seed(1)
        try:
            yield
        finally:
            torch.backends.mkldnn.set_flags(enabled)
            torch.set_rng_state(state)

    return other_kernels if device.type == "cpu" else nullcontext
