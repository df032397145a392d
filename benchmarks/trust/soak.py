"""What a long run and a long-lived process hold on to: memory, threads, handles, files; and whether steps slow down.

    python -m benchmarks.trust.soak what=run steps=20000 save_every=20
    python -m benchmarks.trust.soak what=run steps=1500 every=50 only=prior trackers=
    python -m benchmarks.trust.soak what=pipeline minutes=30

`run`: a run of each stage; and for a quarter of the steps one with images that are read from files, and one in two
processes (`only=` chooses). Each is a process of its own, with a state and a snapshot every `save_every` steps,
figures, previews and `trackers`. A row every `every` steps. Promised, after a quarter for warming up: less than 1 MB
and 500 objects more per 1,000 steps; threads, file handles, child processes and states as many as before; a step takes
no more time of the processor.

`pipeline`: one process that samples, is interrupted, completes, scores, embeds, searches, detects, heals, compresses,
saves and loads, with other seeds, classes and orders each time, three pipelines in turn. A row every 6 rounds; promised
is the same per 1,000 rounds.

Rows go to `out`/rows.jsonl as they come, and curves to `out`/soak.png. Ends with 1 if anything is not as promised.
Needs `pip install -e '.[dev]'`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.support.options import choose, read_options, use_threads, with_helpers_of_tests

os.environ.update(
    ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1"
)
DEFAULTS: dict[str, Any] = {
    "what": str,
    "out": "runs/soak",
    "steps": 20000,
    "save_every": 20,
    "every": 200,
    "minutes": 30.0,
    "only": None,
    "trackers": "wandb,tensorboard",
    "case": None,
}
ROUNDS = 6
"""Between two rows of a pipeline."""
PER = 1000
"""Steps, or rounds, for which growth is told."""
SHOWN = (
    "memory_mb",
    "before_mb",
    "objects",
    "threads",
    "handles",
    "children",
    "children_mb",
    "files",
    "step_ms",
    "cpu_ms",
)


def main() -> None:
    options = read_options(__doc__, DEFAULTS)
    use_threads(1)
    with_helpers_of_tests()
    if options.what not in ("run", "pipeline"):
        raise SystemExit(f"what={options.what}: choose among run, pipeline")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if options.case:
        return alone(options, out)
    raise SystemExit(each_alone(options, out))


def alone(options: Any, out: Path) -> None:
    """One case, in this process."""
    from trust.soak_cases import Everything, rank, soak_run
    from trust.soaking import Soak, repeat

    rows = out / "rows.jsonl" if rank() == 0 else out / "second.jsonl"
    if options.case == "pipeline":
        soak = Soak(rows, "pipeline", ROUNDS, begin=5 * ROUNDS)
        repeat(soak, Everything(), seconds=60 * options.minutes)
    else:
        trackers = tuple(name for name in options.trackers.split(",") if name)
        steps = options.steps if options.case in ("tokenizer", "prior") else options.steps // 4
        soak = Soak(rows, options.case, options.every, out / options.case, begin=steps // 4)
        soak_run(options.case, out, soak, steps, options.save_every, trackers)
    if rank() == 0:
        print(f"{options.case}: objects that are more than after the warm-up:", *soak.more(), sep="\n    ", flush=True)


def each_alone(options: Any, out: Path) -> bool:
    """Every case in processes of its own, then the table and the curves; whether anything is broken."""
    import two_processes
    from trust.soak_cases import RUNS
    from trust.soaking import grown, slopes

    names = ["pipeline"] if options.what == "pipeline" else choose(options.only, list(RUNS))
    given = {key: getattr(options, key) for key in DEFAULTS if key not in ("case", "only") and getattr(options, key)}
    broken, kept = False, list[dict[str, Any]]()
    if there := [name for name in names if (out / name).exists()]:
        raise SystemExit(f"out={out}: has a run {there[0]} already, which would go on; choose another folder")
    (out / "rows.jsonl").unlink(missing_ok=True)
    for name in names:
        began, command = time.monotonic(), [sys.executable, "-m", __spec__.name]
        command += [f"{key}={value}" for key, value in given.items()] + [f"case={name}", f"trackers={options.trackers}"]
        if name == "pair":
            printed = "".join(text for _, text in two_processes.run_together([command] * 2, seconds=24 * 3600))
        else:
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            printed = done.stdout
            if done.returncode:
                raise SystemExit(f"{name}: exit code {done.returncode}\n{printed[-3000:]}")
        (out / f"{name}.txt").write_text(printed)
        rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
        kept, mine = rows, [row for row in rows if row["case"] == name]
        print(f"\n{name}: {mine[-1]['step']:,} in {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
        print(table(mine, slopes(mine, PER)))
        lines = grown(mine, PER)
        print(*(f"NOT AS PROMISED: {name}: {line}" for line in lines), sep="\n", flush=True)
        broken |= bool(lines)
    draw(kept, out / "soak.png")
    return broken


def table(rows: list[dict[str, Any]], rates: dict[str, float]) -> str:
    """What was measured at the beginning and at the end, and how it grows."""
    from benchmarks.support.tables import table_head, table_row

    names = [*SHOWN, *(name for name in rates if name not in SHOWN)]
    lines = [table_head("", "first row", "last row", f"per {PER:,}")]
    for name in names:
        if name in rates:
            ends = (f"{rows[at].get(name, 0):,.4g}" for at in (0, -1))
            lines.append(table_row((name, *ends, f"{rates[name]:+.3g}")))
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The curves of all cases."""
    from benchmarks.support.soak_curves import picture
    from pipelines.images.pictures import save_picture

    save_picture(picture(rows), path, overwrite=True)
    print(f"\n{path}")


if __name__ == "__main__":
    main()
