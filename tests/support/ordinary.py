"""Run as root without its privilege to ignore file modes."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

VERSION, OVERRIDE, SEARCH = 0x20080522, 1, 2  # of capset; CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


@contextmanager
def as_others() -> Iterator[None]:
    """File modes apply to this thread and threads started from it, even for root."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root cannot give up its privilege here")
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~(1 << OVERRIDE | 1 << SEARCH)  # the effective set; the permitted set is unchanged
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
