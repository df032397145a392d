"""The tests that look at what lies underneath, on several Pythons with several versions of torch: a table.

    PYTHONPATH=tests/support python -m supply.matrix [ROW ...] [--tests PATH ...] [--keep]

A row is `PYTHON:TORCH`, as 3.12:2.13.0, and all else is the newest that there is; 3.11:lowest has the lowest versions
of everything. Without rows: the oldest Python with the lowest, one in the middle with the torch of uv.lock, and the
newest with the newest. Each has an environment below build/, which is removed after its tests but for --keep, and a
log. What is known stands in build/matrix.jsonl: a row that passed these tests at this commit is not tested again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from typing import Any

from supply import floors, locked

ROOT = floors.ROOT
KNOWN = ROOT / "build" / "matrix.jsonl"
CORE = (
    "tests/project/test_imports.py",
    "tests/prior/test_family.py",
    "tests/tokenizer/test_family.py",
    "tests/tokenizer/test_files.py",
    "tests/tokenizer/test_model.py",
    "tests/tokenizer/published",
    "tests/pipelines/training/test_checkpoint.py",
    "tests/pipelines/training/test_resume.py",
    "tests/pipelines/compression/test_container.py",
    "tests/pipelines/test_exports.py",
)
"""The contracts of both stages, states, resuming, streams, weights and libraries of others."""


def usual_rows() -> list[str]:
    """One row for each end, and one in the middle. Raises `ValueError` where no Python is found."""
    there = sorted(floors.pythons())
    if not there:
        raise ValueError("no Python that is new enough on PATH or in ~/.pyenv/versions")
    torch = next(package["version"] for package in locked.packages() if package["name"] == "torch")
    rows = [f"3.{there[0]}:lowest", f"3.{there[len(there) // 2]}:{torch}", f"3.{there[-1]}:newest"]
    return list(dict.fromkeys(rows))


def pins_of(torch: str) -> list[str]:
    """The constraints of a row."""
    return {"lowest": floors.lowest(), "newest": []}.get(torch, [f"torch=={torch}"])


def counts_of(output: str) -> dict[str, int]:
    """`{"passed": 12, "skipped": 1}`, from pytest's last line."""
    last = output.rstrip().rpartition("\n")[2]
    return {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}


def state_of_files() -> str:
    """What git says of the checkout: its commit, and a sign where files differ from it."""
    return subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()


def try_row(row: str, tests: list[str], keep: bool) -> dict[str, Any]:
    """Make the environment of a row, test there, and say how it went."""
    minor, torch = int(row.split(":")[0].removeprefix("3.")), row.split(":")[1]
    python = floors.pythons().get(minor)
    if python is None:
        return {"row": row, "result": f"there is no python3.{minor} on PATH or in ~/.pyenv/versions"}
    name = f"matrix-{row.replace(':', '-')}"
    began = time.monotonic()
    try:
        ours = floors.prepare(name, python, pins_of(torch))
    except subprocess.CalledProcessError:
        return {"row": row, "result": "cannot be installed"}
    installed = time.monotonic()
    command = [str(ours), "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    log = ROOT / "build" / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    found: dict[str, Any] = {
        "row": row,
        "versions": floors.versions(ours),
        **counts_of(log.read_text(encoding="utf-8")),
    }
    found |= {"installing": round(installed - began), "testing": round(time.monotonic() - installed)}
    if not keep:
        shutil.rmtree(ROOT / "build" / name)
    return found | {"result": "ok" if code == 0 else f"exit code {code}, see build/{log.name}"}


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    counts = [str(found.get(word, 0)) for word in ("passed", "failed", "skipped")]
    seconds = [str(found.get(word, "")) for word in ("installing", "testing")]
    return f"| {' | '.join([found['row'], found.get('versions', ''), *counts, *seconds, found['result']])} |"


def main() -> int:
    """The command line; returns 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--tests", nargs="+", default=list(CORE))
    parser.add_argument("--keep", action="store_true")
    chosen = parser.parse_args()
    rows = chosen.rows or usual_rows()
    if wrong := [row for row in rows if not re.fullmatch(r"3\.\d+:(lowest|newest|\d+(\.\d+)*)", row)]:
        parser.error(f"{wrong[0]}: expected PYTHON:TORCH, as 3.12:2.13.0, 3.11:lowest or 3.13:newest")
    KNOWN.parent.mkdir(exist_ok=True)
    key = {"files": state_of_files(), "tests": chosen.tests}
    known = [json.loads(text) for text in KNOWN.read_text().splitlines()] if KNOWN.is_file() else []
    done = {each["row"]: each for each in known if key.items() <= each.items() and each["result"] == "ok"}
    for row in rows:
        if row not in done:
            done[row] = try_row(row, chosen.tests, chosen.keep)
            with KNOWN.open("a", encoding="utf-8") as file:
                print(json.dumps({**key, **done[row]}), file=file)
        print(line(done[row]), flush=True)
    return int(any(done[row]["result"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
