"""On a fake GPU, no model and no run mixes devices, and no training step waits for the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "support" / "fake_gpu.py"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")


def run_checks(*options: str, seconds: int = 280) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    if done.returncode == 3:
        pytest.skip(f"the fake cannot be compiled: {done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_some_checks_pass() -> None:
    run_checks("fake", "run of", "plan of gpt", "pipeline", "prior gpt", "tokenizer vqvae")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", [(), ("--float32",)], ids=["float64", "float32 only"])
def test_all_checks_pass(options: tuple[str, ...]) -> None:
    run_checks(*options, seconds=3500)
