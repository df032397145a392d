"""`make gpu` says what is missing, and updates the page only after its tests have passed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
PYTHON = """#!/bin/sh
echo "$@" >> $LOG
case "$*" in
  *cuda.is_available*|*compiler_problem*) exec $REAL "$@" ;;
  *"-m pytest"*) exit $TESTED ;;
  *benchmarks.speed.gpu*) exit $MEASURED ;;
esac
"""
FAKES = """
import sys
from types import ModuleType, SimpleNamespace

torch = sys.modules["torch"] = ModuleType("torch")
torch.__version__, torch.version = "2.13.0", SimpleNamespace(cuda="13.0")
torch.cuda = SimpleNamespace(is_available=lambda: {gpu})
compiling = ModuleType("prior.compiling")
compiling.compiler_problem = lambda: {problem!r}
sys.modules |= {{"prior": ModuleType("prior"), "prior.compiling": compiling}}
"""


@pytest.fixture
def make(tmp_path: Path):
    """A function that runs `make gpu` with a Python that does nothing, and returns exit code, errors and commands."""

    def run(gpu: bool = True, problem: str = "", tests: int = 0, benchmark: int = 0):
        python, log, fakes = tmp_path / "venv/bin/python", tmp_path / "log", tmp_path / "fakes"
        for folder in (python.parent, fakes):
            folder.mkdir(parents=True, exist_ok=True)
        python.write_text(PYTHON)
        python.chmod(0o755)
        log.write_text("")
        (fakes / "sitecustomize.py").write_text(FAKES.format(gpu=gpu, problem=problem))
        facts = {"LOG": str(log), "REAL": shutil.which("python3"), "TESTED": str(tests), "MEASURED": str(benchmark)}
        command = ["make", "--silent", "gpu", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}"]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        environment = {**clean, **facts, "PYTHONPATH": str(fakes)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr, log.read_text()

    return run


@pytest.mark.parametrize(("tests", "benchmark"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_the_page_is_updated_only_after_tests_have_passed(make, tests, benchmark):
    """And the exit code is that of the tests, or of the benchmark."""
    code, _, commands = make(tests=tests, benchmark=benchmark)
    assert "-m pytest -m gpu" in commands and "benchmarks.speed.gpu" in commands
    assert ("docs/results.md" in commands) == (tests == 0) and (code == 0) == (tests == benchmark == 0)


@pytest.mark.parametrize(
    ("lacks", "hint"), [({"gpu": False}, "whl/cu126"), ({"problem": "no C compiler"}, "no C compiler")], ids=str
)
def test_what_is_missing_is_named_with_a_remedy_before_any_test(make, lacks, hint):
    code, errors, commands = make(**lacks)
    assert code != 0 and hint in errors and "-m pytest" not in commands
