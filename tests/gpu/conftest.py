"""Set-up of the GPU tests, which `make gpu` runs. Without a GPU they run on the CPU, to test the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch

from prior import cuda_graph, sampling
from prior.cuda_graph import release_graph


@pytest.fixture
def device() -> torch.device:
    """The device under test."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def clean(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reset accelerate, and release CUDA graphs, around each test."""
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
    """Collects an entry per captured CUDA graph. On the CPU, graphs are emulated."""
    from emulated_graphs import Emulated

    real, captured = cuda_graph.capture, []
    if device.type == "cuda" and not sampling.can_capture(device):
        pytest.skip("graphs need torch 2.12")
    if device.type == "cpu":
        real = Emulated().capture
        monkeypatch.setattr(sampling, "can_capture", lambda device: cuda_graph.Graph.allowed)

    def capture(run, device):
        replay = real(run, device)
        captured.append("a graph")
        return replay

    monkeypatch.setattr(cuda_graph, "capture", capture)
    return captured


@pytest.fixture
def elsewhere(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A context in which to compute what is compared with the CPU. Without a GPU, it changes convolution kernels and
    the random state, so that numbers differ as they would on a GPU."""

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
