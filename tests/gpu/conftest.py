"""Tests that want a GPU: `make gpu` runs them. SMALTI_DEVICE=cpu rehearses them without one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

WANTED = os.environ.get("SMALTI_DEVICE", "cuda")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Accelerate is set up anew for each test."""
    from one_process import begin_anew

    begin_anew()
    yield
    begin_anew()


@pytest.fixture
def device() -> torch.device:
    """The card; skips where there is none and no rehearsal is asked for."""
    if WANTED == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here that torch sees")
    return torch.device(WANTED)


@pytest.fixture
def two_cards() -> None:
    """Skips where there are fewer than two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"two GPUs are needed, torch sees {torch.cuda.device_count()}")
