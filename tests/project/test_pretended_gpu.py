"""Nothing mixes devices: components, abilities and whole runs on a pretended GPU (`pretended_gpu`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def on_the_gpu(*words: str, seconds: int = 280) -> str:
    """What is said of the components whose names contain `words`; skips where nothing can be pretended."""
    path = os.environ["PYTHONPATH"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "pretended_gpu.py"), *words],
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, "PYTHONPATH": path},
    )
    if result.returncode == 2:
        pytest.skip(result.stdout.strip())
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert result.returncode == 0, "\n".join(failed) or result.stderr
    return result.stdout


def test_what_matters_most_goes_through():
    """And mixes of devices do not, which is tried first."""
    said = on_the_gpu("main")
    assert said.startswith("ok    main: what a GPU refuses") and said.count("ok  ") >= 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_goes_through():
    print(on_the_gpu(seconds=3500))
