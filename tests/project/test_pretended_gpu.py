"""Nothing mixes devices: components, abilities and whole runs on a pretended GPU (`pretended.gpu`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@cache
def on_the_gpu(*words: str, seconds: int = 280) -> str:
    """What is said of the components whose names contain `words`; skips where nothing can be pretended."""
    path = os.environ["PYTHONPATH"]
    result = subprocess.run(
        [sys.executable, "-m", "pretended.gpu", *words],
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


def waits_in(said: str) -> dict[str, list[int]]:
    """How often the host waits in a step, the most of each run, by what is trained."""
    found: dict[str, list[int]] = {"prior": [], "tokenizer": [], "tokenizer with a critic": []}
    for what, count in re.findall(r"waits of a ([\w ]+?)(?:, .*?)?  +(\d+) waits", said):
        found[what].append(int(count))
    return found


def test_what_matters_most_goes_through():
    """And mixes of devices do not, which is tried first."""
    said = on_the_gpu("main")
    assert said.startswith("ok    main: what a GPU refuses") and said.count("ok  ") >= 10


def test_a_gpu_without_float64_does_too():
    """Apple's GPUs have none."""
    assert on_the_gpu("--float32", "main").count("ok  ") >= 10


def test_a_training_step_does_not_wait_for_the_gpu():
    """Which would have nothing to do meanwhile."""
    waits = waits_in(on_the_gpu("main"))
    assert waits == {"prior": [0], "tokenizer": [0], "tokenizer with a critic": [0]}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_goes_through():
    said = on_the_gpu(seconds=3500)
    waits = waits_in(said)
    assert len(waits["prior"]) > 5 and max(waits["prior"]) == 0
    assert len(waits["tokenizer"]) > 5 and max(waits["tokenizer"]) == 0
    assert len(waits["tokenizer with a critic"]) == 1 and max(waits["tokenizer with a critic"]) == 0
    print(said)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_goes_through_without_float64():
    said = on_the_gpu("--float32", seconds=3500)
    assert said.endswith(" components, 0 failed\n") and said.count("ok  ") > 300
