"""Runs killed or interrupted at random moments end as uninterrupted ones, to the bit.

By default one kill of two kinds of runs; the campaign is `python -m benchmarks.trust.faults`.
"""

from __future__ import annotations

import os
import re
import sys

import pytest
from launch import output_of, start

TABLE = re.compile(r"^\| (kill -9|Ctrl-C) \| (.*?) \| (\d+) \| .* \| (\d+) \| 0 \| ", re.MULTILINE)


def campaign(*counts: str, seconds: float = 280) -> list[tuple[str, ...]]:
    """Run a campaign; return signal, case, number of signals and number of compared runs, all of them equal."""
    printed = output_of(start([sys.executable, "-m", "benchmarks.trust.faults", *counts]), seconds, code=None)
    assert "NOT AS PROMISED" not in printed and "Traceback" not in printed, printed
    return TABLE.findall(printed)


@pytest.mark.timeout(300)
def test_a_killed_run_ends_as_an_uninterrupted_one():
    """With equal tensors, records, metrics, previews and names of files."""
    seed = os.environ.get("SMALTI_SEED", "0")
    found = campaign("kills=1", "sharded=1", "steps=20", f"seed={seed}")
    runs = ("tokenizer, 1 process", "prior, 2 processes, FSDP2")
    assert [row[:3] for row in found] == [("kill -9", run, "1") for run in runs]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_dozens_of_kills_and_interruptions():
    found = campaign("kills=50", "ctrl_c=20", "sharded=20", seconds=3500)
    assert sum(int(count) for _, _, count, _ in found) == 90
