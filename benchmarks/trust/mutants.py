"""Mutation testing (mutmut): a file is changed in one small place at a time, and its tests have to notice.

    python -m benchmarks.trust.mutants modules=prior/sampling.py out=mutants.jsonl
    python -m benchmarks.trust.mutants modules=prior/*.py sample=40 seed=1 out=mutants.jsonl
    python -m benchmarks.trust.mutants modules=tokenizer/quantizers/*.py sample=40 out=mutants.jsonl
    python -m benchmarks.trust.mutants out=mutants.jsonl

A file is tested by the test file that mirrors it, and by those that say `Covers:` it. Mutants are made in a copy of the
tree, of all functions but decorated ones (a tenth), and run in forks of a process that has imported everything: of each
file `sample` (0: all), drawn with `seed`, by so many `workers` at once. Results are lines of JSON in `out`; the same
command goes on after the last file that was done; without `modules` it prints the table of what there is. A mutant that
runs into a limit of time is noticed. Needs `pip install mutmut`, and a system that forks.
"""

from __future__ import annotations

import ast
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.support.options import ROOT, need, read_options
from benchmarks.support.tables import table_head, table_row

Row = dict[str, Any]
WORK = ROOT / "build" / "mutants"
COPIED = ("tokenizer", "prior", "pipelines", "tests", "configs", "docs", "benchmarks")
ENDS = {0: "survived", 1: "killed", 3: "killed", 5: "no tests", 33: "no tests", 34: "skipped", None: "not tried"}
"""What an exit code of pytest means; any other is a process that was killed, mostly at its limit of time."""
TRIES = 6  # with one test less each time, where it does not pass in the copy
NOTICED = ("killed", "ended")
CONFIGURATION = """
[tool.mutmut]
source_paths = ["tokenizer/", "prior/", "pipelines/"]
only_mutate = {modules}
also_copy = ["configs/", "docs/", "benchmarks/", "tests/", "pyproject.toml", "README.md", "CHANGELOG.md"]
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = {options}
process_isolation = "forkserver"
debug = true
"""
IN_CHILDREN = """import os

if os.environ.get("MUTANT_UNDER_TEST") == "stats":
    os.environ["MUTANT_UNDER_TEST"] = ""  # mutmut notes who calls whom in its own process, and not in another folder
"""


def main() -> None:
    options = read_options(__doc__, {"modules": None, "out": str, "sample": 0, "seed": 1, "workers": 1})
    out = Path(options.out).absolute()
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if options.modules:
        need("mutmut")
        files = files_of(options.modules)
        done = {row["file"] for row in rows if row.get("done")}
        for number, name in enumerate(files, 1):
            if name in done:
                continue
            print(f"{number} of {len(files)}: {name}", flush=True)
            found = mutated(name, options.sample, options.seed, options.workers)
            with out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
            rows += found
    print(report(rows))


def files_of(patterns: str) -> list[str]:
    """The files of our packages that a pattern fits."""
    names = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = [name for name in names.split() if name.split("/")[0] in COPIED[:3] and not name.endswith("__init__.py")]
    found = []
    for pattern in patterns.split(","):
        some = [name for name in ours if fnmatch(name, pattern) and name.count("/") == pattern.count("/")]
        if not some:
            raise SystemExit(f"modules={pattern}: no file of ours")
        found += [name for name in some if name not in found]
    return found


def tests_of(name: str) -> list[str]:
    """The test files of a file: that which mirrors it, and those that say so."""
    path, found = Path(name), []
    mirror = f"tests/{path.parent.as_posix()}/test_{path.stem.rstrip('_')}.py"
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        relative = test.relative_to(ROOT).as_posix()
        said = ast.get_docstring(ast.parse(test.read_text())) or ""
        covers = [
            each.strip()
            for some in re.findall(r"^Covers: (.+?)\.$", said, re.DOTALL | re.M)
            for each in some.split(",")
        ]
        if relative == mirror or name in covers:
            found.append(relative)
    return found


def mutated(name: str, sample: int, seed: int, workers: int) -> list[Row]:
    """A row for each mutant of a file that is tried, and a last one for the file."""
    tests, began = tests_of(name), time.monotonic()
    if not tests:
        return [{"file": name, "done": True, "mutants": 0, "tried": 0, "note": "no tests of its own"}]
    left_out: list[str] = []
    for _ in range(TRIES):
        folder = prepared(name, tests, left_out)
        log, stats = folder / "log", folder / "mutants" / "mutmut-stats.json"
        mutmut(folder, log, workers, "none.such")  # makes mutants, finds which test reaches which function, tries none
        said = log.read_text(errors="replace")
        failed = re.findall(r"^FAILED (\S+?::.+?)(?: - |$)", said, re.M)
        if stats.exists() or not failed:
            break
        left_out += failed  # as one does that kills a process which mutmut does not know of; it is told in the end
    meta = folder / "mutants" / f"{name}.meta"
    if not stats.exists():
        said = " ".join(said.split())[-400:]
        return [{"file": name, "done": True, "mutants": 0, "tried": 0, "note": f"its tests fail in the copy: {said}"}]
    every = sorted(json.loads(meta.read_text())["exit_code_by_key"]) if meta.exists() else []
    chosen = sorted(random.Random(f"{seed} {name}").sample(every, sample)) if 0 < sample < len(every) else every
    if chosen:
        mutmut(folder, log, workers, *chosen)
    codes = json.loads(meta.read_text()) if chosen else {"exit_code_by_key": {}, "durations_by_key": {}}
    rows = []
    for each in chosen:
        outcome = ENDS.get(codes["exit_code_by_key"][each], "ended")
        row = {"file": name, "mutant": each, "outcome": outcome, "seconds": codes["durations_by_key"].get(each)}
        rows.append({**row, **({} if outcome in NOTICED else {"diff": shown(folder, each)})})
    shutil.rmtree(folder)
    last = {
        "file": name,
        "done": True,
        "mutants": len(every),
        "tried": len(chosen),
        "tests": tests,
        "left out": left_out,
    }
    return [*rows, {**last, "seconds": round(time.monotonic() - began, 1)}]


def prepared(name: str, tests: list[str], left_out: list[str]) -> Path:
    """A copy of the tree, with mutmut's configuration; one that was left behind is replaced."""
    folder = WORK / name.replace("/", "-").removesuffix(".py")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for each in COPIED:
        shutil.copytree(ROOT / each, folder / each, ignore=shutil.ignore_patterns("__pycache__"))
    for each in ("README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / each, folder)
    (folder / "tests" / "support" / "sitecustomize.py").write_text(IN_CHILDREN)
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", *(f"--deselect={test}" for test in left_out)]
    settings = CONFIGURATION.format(modules=json.dumps([name]), tests=json.dumps(tests), options=json.dumps(options))
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + settings)
    return folder


def mutmut(folder: Path, log: Path, workers: int, *names: str) -> None:
    """Run it on these mutants; what it says goes to `log`, since it ends with 1 where there are none."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(workers), *names]
    with log.open("wb") as file:
        subprocess.run(command, cwd=folder, env=environment(), stdout=file, stderr=file)


def shown(folder: Path, mutant: str) -> list[str]:
    """The lines that a mutant changes."""
    command = [sys.executable, "-m", "mutmut", "show", mutant]
    said = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True).stdout
    return [line for line in said.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def environment() -> dict[str, str]:
    """One thread, no network, and the copy's modules."""
    outside = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MUTANT_UNDER_TEST")}
    return {**outside, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


# The table


def report(rows: list[Row]) -> str:
    """Score of each file and of all, and the survivors."""
    lines = [table_head("file", "mutants", "tried", "killed", "out of time", "survived", "no tests", "score")]
    weights = 0
    mean = variance = 0.0
    for last in [row for row in rows if row.get("done")]:
        counts = Counter(row["outcome"] for row in rows if row["file"] == last["file"] and "mutant" in row)
        tried, total = counts.total(), last["mutants"]
        if not tried:
            lines.append(table_row([last["file"], "0", "0", "", "", "", "", last.get("note", "nothing to change")]))
            continue
        share = sum(counts[each] for each in NOTICED) / tried
        weights, mean = weights + total, mean + total * share
        left = (1 - tried / total) * share * (1 - share) / max(1, tried - 1)
        variance += total**2 * left
        cells = [last["file"], total, tried, *(counts[each] for each in (*NOTICED, "survived", "no tests"))]
        lines.append(table_row([*map(str, cells), f"{share:.1%}"]))
    if weights:
        score, half = mean / weights, 1.96 * math.sqrt(variance) / weights
        lines.append(f"\nall: {score:.1%} +- {half:.1%} of {weights} mutants")
    for row in rows:
        if "diff" in row:
            lines.append(f"\n{row['outcome']}: {row['mutant']}\n" + "\n".join(f"    {line}" for line in row["diff"]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
