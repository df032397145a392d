"""Runs killed or interrupted at random moments end as uninterrupted ones, to the bit.

By default one kill of two kinds of runs; the campaign is `python -m benchmarks.trust.faults`.
"""

from __future__ import annotations

import os
import re
import signal
import sys

import pytest
from kills import interrupt, make_case
from launch import output_of, start


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("stage", "processes", "sharded"), [("tokenizer", 1, False), ("prior", 2, True)])
def test_a_killed_run_ends_as_an_uninterrupted_one(tmp_path, stage, processes, sharded):
    """With equal tensors, records, metrics, previews and names of files."""
    case = make_case(stage, processes, tmp_path, 14, sharded)
    found = interrupt(case, int(os.environ.get("SMALTI_SEED", "0")), 1, signal.SIGKILL)
    assert found["interrupted"] == 1 and found["broken"] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_dozens_of_kills_and_interruptions():
    argv = ["-m", "benchmarks.trust.faults", "kills=50", "ctrl_c=20", "sharded=20"]
    printed = output_of(start([sys.executable, *argv]), 3500)
    counts = re.findall(r"^\| (?:kill -9|Ctrl-C) \| .*? \| (\d+) \| .* \| \d+ \| 0 \| ", printed, re.MULTILINE)
    assert sum(map(int, counts)) == 90
