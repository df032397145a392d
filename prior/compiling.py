"""Whether torch.compile can make GPU kernels here."""

from __future__ import annotations

import os
import shutil
import sysconfig
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile can make kernels for this device: a GPU that Triton supports."""
    if device.type != "cuda" or compiler_problem():
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)


@cache
def compiler_problem() -> str:
    """Return what Triton lacks on this machine, empty if nothing: it builds a C extension for Python when it is first
    used."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC") or "gcc", "clang"))):
        return "there is no C compiler"
    headers = Path(sysconfig.get_path("include"))
    return "" if (headers / "Python.h").is_file() else f"{headers} has no Python.h"
