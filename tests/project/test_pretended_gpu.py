"""No model and no run mixes devices, and no training step waits for the GPU: on a pretended one (`pretended_gpu`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "support" / "pretended_gpu.py"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def try_all(*words: str, seconds: int = 280) -> None:
    """Try those whose title contains a word; skips where nothing can be pretended."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    command = [sys.executable, str(SCRIPT), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    if done.returncode == 3:
        pytest.skip(f"no GPU can be pretended here: {done.stdout}")
    assert done.returncode == 0 and done.stdout.endswith(" 0 failed\n"), done.stdout + done.stderr


@pytest.mark.parametrize("words", [("what",), ("run of",), ("pipeline",), ("prior gpt",), ("tokenizer vqvae",)])
def test_some_go_through(words: tuple[str, ...]) -> None:
    try_all(*words)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", [(), ("--float32",)])
def test_all_go_through(kind: tuple[str, ...]) -> None:
    """Also on a GPU without float64."""
    try_all(*kind, seconds=3500)
