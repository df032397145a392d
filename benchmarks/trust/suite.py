"""The tests themselves: in any order, each file alone, each test alone. None may fail, none may hang.

    python -m benchmarks.trust.suite alone=true out=alone.jsonl
    python -m benchmarks.trust.suite alone=true paths=tests/prior,tests/tokenizer out=alone.jsonl
    python -m benchmarks.trust.suite random=20 seed=1 out=random.jsonl
    python -m benchmarks.trust.suite random=3 paths=tests/prior out=random.jsonl

`alone`: each file of tests in a process of its own, then each of its tests in a fork of one that has collected the file
and run none. `random`: so many runs of the suite in random order (pytest-randomly), the k-th with seed `seed` + k - 1.
Results are lines of JSON in `out`; the same command goes on after them where it was stopped. `files=false` leaves out
the files, `marks` is what pytest's -m takes, `limit` the seconds that a test may take (all of a run: an hour),
`workers` the processes of a run in random order. Ends with 1 if anything fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.support.options import ROOT, need, read_options, with_helpers_of_tests

Row = dict[str, Any]
DEFAULTS = {"alone": False, "random": 0, "paths": "tests", "out": str, "seed": 1, "files": True}
MORE = {"marks": "not slow", "limit": 600.0, "workers": 2}
HOUR = 3600


def main() -> None:
    options = read_options(__doc__, {**DEFAULTS, **MORE})
    if not options.alone and not options.random:
        raise SystemExit("nothing to do: write alone=true or random=20")
    out, paths = Path(options.out).absolute(), options.paths.split(",")
    for path in paths:
        if not (ROOT / path).exists():
            raise SystemExit(f"paths={path}: not there")
    before = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    os.chdir(ROOT)
    rows = random_runs(options, paths, before) if options.random else alone(options, files_of(paths), before)
    with out.open("a") as file:
        for row in rows:
            print(json.dumps(row), file=file, flush=True)
            before.append(row)
            if row["outcome"] not in ("passed", "skipped"):
                print(f"{row['outcome'].upper()} {row.get('test') or row.get('file') or row['run']}", flush=True)
    report(before)


def files_of(paths: list[str]) -> list[str]:
    """Files of tests, relative to the root."""
    found = [
        path for each in paths for path in ([ROOT / each] if each.endswith(".py") else (ROOT / each).rglob("*.py"))
    ]
    return sorted({os.path.relpath(path, ROOT) for path in found if path.name.startswith("test_")})


def alone(options: Any, files: list[str], before: list[Row]) -> Iterator[Row]:
    """Rows of files and of tests; a file whose row says `done` is not looked at again."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="offline")
    with_helpers_of_tests()
    import torch
    from trust import alone as trust_alone  # which imports torch once, for all that is forked

    import pipelines

    assert pipelines
    torch.set_num_threads(1)
    done = {row["file"] for row in before if row.get("done")}
    told = {row["test"] for row in before if "test" in row}
    whole = {row["file"] for row in before if "file" in row}
    arguments = ["-m", options.marks]
    for number, path in enumerate(files, 1):
        if path in done:
            continue
        print(f"{number} of {len(files)}: {path}", flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if options.files and path not in whole:
                yield trust_alone.file_alone(path, arguments, folder, options.limit)
            yield from trust_alone.each_alone(path, arguments, folder, options.limit, told)
        yield {"file": path, "outcome": "passed", "done": True}


def random_runs(options: Any, paths: list[str], before: list[Row]) -> Iterator[Row]:
    """A row for each run."""
    need("pytest_randomly")
    for run in range(1 + sum("run" in row for row in before), options.random + 1):
        seed, began = options.seed + run - 1, time.monotonic()
        order = ["-p", "randomly", f"--randomly-seed={seed}", "--randomly-dont-reset-seed"]
        share = ["-n", str(options.workers), "--dist", "loadfile"] if options.workers else []
        argv = ["-m", options.marks, "-q", "-p", "no:cacheprovider", "-rfE", *order, *share, *paths]
        print(f"run {run} of {options.random}: seed {seed}", flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *argv],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            said, code = process.communicate(timeout=HOUR)[0], process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            said, code = process.communicate()[0], -9
        failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
        outcome = "hung" if code == -9 else "passed" if code == 0 else "failed"
        row = {"run": run, "seed": seed, "outcome": outcome, "seconds": round(time.monotonic() - began, 1)}
        last = said.strip().splitlines()[-1:]
        yield {**row, "failed": failed, "said": last, **({} if code == 0 else {"text": said[-4000:]})}


def report(rows: list[Row]) -> None:
    """Counts of outcomes, and each that is not as it should be; exits with 1 if there is one."""
    kinds = {"runs": "run", "files": "file", "tests": "test"}
    for name, key in kinds.items():
        found = Counter(row["outcome"] for row in rows if key in row and not row.get("done"))
        if found:
            print(f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in found.most_common())}")
    bad = [row for row in rows if row["outcome"] not in ("passed", "skipped")]
    for row in bad:
        what = row.get("test") or row.get("file") or f"run {row['run']}, seed {row['seed']}"
        print(f"\n{row['outcome']}: {what}\n{row.get('text', '')[-800:]}")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
