"""The benchmarks run, and their commands are what there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


def run(script: str, *arguments: str) -> str:
    """What `python benchmarks/script arguments` prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, f"benchmarks/{script}", *arguments], cwd=ROOT, env=environment, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_commands_of_a_benchmark_exist(path):
    commands = re.findall(r"^    python (benchmarks/\w+\.py)(.*)$", path.read_text(), re.M)
    assert any(script == f"benchmarks/{path.name}" for script, _ in commands)
    assert all((ROOT / script).is_file() for script, _ in commands)
    for data in re.findall(r"data=(\w+)", " ".join(options for script, options in commands if "ladder" in script)):
        assert list((ROOT / "configs" / "prior").glob(f"*_{data}.yaml")), f"no presets for data={data}"
        assert [kind for kind in ("vqvae", "pixels") if (ROOT / f"configs/tokenizer/{kind}_{data}.yaml").is_file()]


def test_the_picture_of_the_blind_spot_is_the_one_that_is_drawn(tmp_path):
    from PIL import Image

    run("blind_spot.py", f"out={tmp_path / 'drawn.png'}")
    drawn, kept = (Image.open(path) for path in (tmp_path / "drawn.png", ROOT / "docs/images/blind_spot.png"))
    assert drawn.size == kept.size


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_ladder_of_seconds(tmp_path):
    """All presets of the digits, trained for a second each; a second call does nothing again; then its guesses."""
    command = ("ladder.py", "data=digits", "minutes=0.02", f"out={tmp_path}")
    printed = run(*command)
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    kinds = {path.stem.removesuffix("_digits") for path in (ROOT / "configs/prior").glob("*_digits.yaml")}
    assert {row.split(" | ")[0].removeprefix("| ") for row in rows} >= kinds | {"marginal", "held-out images"}
    assert "0.02 minutes each" in printed
    assert run(*command).splitlines()[-8:] == printed.splitlines()[-8:]
    guesses = run("parallel.py", f"ladder={tmp_path / 'digits'}")
    differ = [row.split(" | ")[-1] for row in guesses.splitlines() if " passes | " in row or "output" in row]
    assert len(differ) >= 15 and all(cell.strip(" |") == "0" for cell in differ)
