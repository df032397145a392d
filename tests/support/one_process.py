"""Reset accelerate, which otherwise configures itself once per process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from accelerate.state import AcceleratorState


def begin_anew() -> None:
    """Make accelerate read its environment again."""
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def one_process() -> Iterator[None]:
    """One process on the CPU. For fixtures with a wider scope; tests use the fixture of this name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        begin_anew()
        yield
    begin_anew()
