"""Compiled GPU kernels, where torch.compile can make them."""

from __future__ import annotations

import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REMEDY = "on Debian or Ubuntu: apt-get install python3-dev gcc"


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile can make kernels for this device: a GPU that Triton supports."""
    if device.type != "cuda" or compiler_problem():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)


@cache
def compiler_problem() -> str:
    """Return what Triton, which builds a C extension for Python, lacks on this machine; empty if nothing."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC") or "gcc", "clang"))):
        return f"there is no C compiler; {REMEDY}"
    headers = Path(sysconfig.get_path("include"))
    return "" if (headers / "Python.h").is_file() else f"{headers} has no Python.h; {REMEDY}"


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `function` compiled for all sizes of its tensors. If that fails, it warns once and stays as it is."""
    fastest = torch.compile(function, dynamic=True)

    def call(*given: Any) -> Tensor:
        nonlocal fastest
        try:
            return fastest(*given)
        except Exception as error:
            if fastest is function:
                raise
            warnings.warn(f"torch.compile failed, so sampling is slower: {error}", stacklevel=2)
            fastest = function
            return function(*given)

    return call
