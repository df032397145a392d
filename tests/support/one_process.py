"""Accelerate in this process, which is the only one and on the CPU; accelerate sets itself up once, unless told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from accelerate.state import AcceleratorState


def begin_anew() -> None:
    """What accelerate is, it is asked again: as if the process had just begun."""
    AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def one_process() -> Iterator[None]:
    """For fixtures that train once for several tests; a test asks for the fixture of this name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        begin_anew()
        yield
    begin_anew()
