"""What editors know: the packages say that they are typed, and a user's script is clean, and wrong calls are not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "user_script.py"
WRONG = {
    'pipe(num_images="four")': "num_images",
    "pipe.encode(out.images, batchsize=3)": "batchsize",
    "pipe.log_prob(out.images, lables=3)": "lables",
    'DataConfig(surce="digits")': "surce",
    "out.tokns": "tokns",
    "data.splts": "splts",
}
"""Mistakes, each a line, and the word that a checker's complaint holds."""


def test_every_package_says_that_it_is_typed() -> None:
    assert all((ROOT / name / "py.typed").read_bytes() == b"" for name in ("tokenizer", "prior", "pipelines"))


def with_mistakes(folder: Path) -> Path:
    """The script, and below it the mistakes."""
    path = folder / "script.py"
    path.write_text(SCRIPT.read_text(encoding="utf-8") + "\n".join(["", *WRONG, ""]), encoding="utf-8")
    return path


def pyright(folder: Path, script: Path) -> list[dict[str, Any]]:
    """What pyright complains of, strictly. Skips where it cannot run: it is node's, which its package may have to
    fetch."""
    pytest.importorskip("pyright")
    settings = {"include": [str(script)], "extraPaths": [str(ROOT)], "typeCheckingMode": "strict"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "-p", str(folder), "--outputjson", "--pythonpath", sys.executable]
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=200)
        found = json.loads(result.stdout)
    except (ValueError, subprocess.TimeoutExpired):
        pytest.skip("pyright does not start here")
    return [each for each in found["generalDiagnostics"] if each["severity"] == "error"]


def test_pyright_finds_a_users_script_clean_and_mistakes_in_it(tmp_path: Path) -> None:
    path = with_mistakes(tmp_path)
    first = path.read_text().splitlines().index(next(iter(WRONG)))
    found = [(each["range"]["start"]["line"], each["message"]) for each in pyright(tmp_path, path)]
    assert not [complaint for complaint in found if complaint[0] < first]
    for number, (call, word) in enumerate(WRONG.items()):
        assert [message for line, message in found if line == first + number and word in message], call


@pytest.mark.slow
def test_mypy_strictly_finds_a_users_script_clean_and_mistakes_in_it(tmp_path: Path) -> None:
    """`make check` looks at the script, too, in the project's own strictness."""
    path = with_mistakes(tmp_path)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(tmp_path),
        str(path),
    ]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=900)
    found = [(int(line), told) for line, told in re.findall(r"script\.py:(\d+): error: (.*)", result.stdout)]
    first = path.read_text().splitlines().index(next(iter(WRONG))) + 1
    assert found and not [complaint for complaint in found if complaint[0] < first]
    for number, call in enumerate(WRONG):
        assert [told for line, told in found if line == first + number], call
