"""What runs go through: kill -9, SIGTERM, Ctrl-C, full disks, lost processes, bad images, losses that are not finite.

    python benchmarks/faults.py kills=200
    python benchmarks/faults.py saves=200
    python benchmarks/faults.py stops=80
    python benchmarks/faults.py ctrl_c=80
    python benchmarks/faults.py resumes=40
    python benchmarks/faults.py disks=20
    python benchmarks/faults.py matrix=24
    python benchmarks/faults.py sick=20
    python benchmarks/faults.py uneven=3

Each number is how many of them; several can be asked for at once. Runs of both stages, on one process and on two, are
compared with runs that nobody interrupts: every logged figure, and sha256 of weights, averaged weights, codebook,
optimizers, previews; and each row of the data must have come once an epoch. `steps=300` is their length. `matrix` runs
under `accelerate launch`, or faster, with `launched=false`, in processes without a launcher. Ends with 1 if anything is
not as promised. Needs `pip install -e '.[dev]'`; `disks` mounts a tmpfs in a namespace of its own (Linux).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from support.options import read_options

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
# Not this folder, whose `tokenizers.py` others would import.
sys.path[0] = str(Path(__file__).parents[1] / "tests" / "support")

TIMEOUT, GRACE = 5, 40  # seconds for a frozen process, and what a launcher may take to end it
COUNTS = ("kills", "saves", "stops", "ctrl_c", "resumes", "disks", "matrix", "sick", "uneven")

Row = dict[str, Any]


def every(steps: int, save: int) -> dict[str, int]:
    """How often a run of so many steps does what it does, if it is saved `save` times."""
    return {
        "train__steps": steps,
        "train__save_every": max(6, steps // save),
        "train__evaluate_every": steps // 3,
        "train__preview_every": steps // 2,
    }


def campaign(name: str, count: int, steps: int, launched: bool, folder: Path) -> list[Row]:
    """Its rows, one for each stage and number of processes."""
    import interruptions
    import mishaps
    from forked import STAGES, new_case

    def cases(processes: tuple[int, ...], **more: Any) -> list[Any]:
        places = [(verb, number) for verb in STAGES for number in processes]
        if len(places) == 4:  # so that few kills and few stops are not of the same
            places = [places[place] for place in ((1, 2, 0, 3) if name == "kills" else (3, 0, 1, 2))]
        return [new_case(verb, number, folder, **more) for verb, number in places[:count]]

    def shared(function: Any, cases: list[Any]) -> list[Row]:
        return [found(case, function, count // len(cases)) for case in cases]

    if name == "kills":
        return shared(interruptions.kills, cases((1, 2), **every(steps, 15)))
    if name == "saves":
        return shared(interruptions.saves, cases((1,), **every(steps, 30)))
    if name in ("stops", "ctrl_c"):
        return shared(getattr(interruptions, name), cases((1, 2), **every(steps, 15)))
    if name == "resumes":
        return [found(case, interruptions.every_step) for case in cases((1, 2), **every(count, 4))]
    if name == "disks":
        stages = cases((1,), **every(20, 5) | {"train__save_every": 4, "train__log_every": 1})[: 1 if count < 4 else 2]
        return [found(case, mishaps.full_disks, count) for case in stages]
    if name == "sick":
        return [found(case, mishaps.sick_steps, count) for case in cases((2,), **every(3 * count, 3))]
    if name == "uneven":
        return [{"case": "tokenizer, 3 processes", **mishaps.uneven_data(folder, count)}]
    more = {
        "train__steps": 20,
        "train__save_every": 8,
        "train__evaluate_every": 8,
        "train__timeout": TIMEOUT,
        "train__accumulate": 1,
        "critic": {"weight": 0},
    }
    case, happen = new_case(STAGES[0], 2, folder, **more), mishaps.launched_fault if launched else mishaps.forked_fault
    return [fault(case, happen, *place) for place in matrix(count)]


def found(case: Any, function: Any, *arguments: Any) -> Row:
    """What a campaign counted, with the time that it took."""
    began = time.monotonic()
    row = {"case": case.name, **function(case, *arguments)}
    return {**row, "seconds": round(time.monotonic() - began, 1)}


def matrix(count: int) -> list[tuple[str, str, int]]:
    """The first so many of fault x phase x rank: each fault in each phase on one of the ranks, then on the other; all
    faults, phases and ranks are among the first four."""
    import faulty

    phases = len(faulty.PHASES)  # no divisor of the number of faults: so every pair comes, each at its turn
    pairs = [(place % len(faulty.FAULTS), place % phases) for place in range(len(faulty.FAULTS) * phases)]
    return [
        (faulty.FAULTS[fault], faulty.PHASES[phase], (fault * phases + phase + turn) % 2)
        for turn in (1, 0)
        for fault, phase in pairs
    ][:count]


def fault(case: Any, happen: Any, *place: Any) -> Row:
    """A cell of the matrix."""
    import mishaps

    cell = mishaps.Cell(*place)
    happen(case, cell)
    where = {"fault": cell.fault, "while": cell.phase, "on rank": cell.rank}
    end = {"exit code": cell.codes[0], "seconds": round(cell.seconds, 1), "last line": cell.line}
    return {**where, **end, "broken": cell.broken(TIMEOUT, GRACE)}


def table(rows: list[Row]) -> str:
    """The rows in Markdown, `broken` as a number."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("lines", "broken")]
    rows = [{**row, "broken": len(row["broken"])} for row in rows]
    cells = [[row.get(name, 0) for name in [*names, "broken"]] for row in rows]
    shown = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in [[*names, "broken"], ["---"] * (len(names) + 1), *shown])


def main() -> None:
    options = read_options(__doc__, {**dict.fromkeys(COUNTS, 0), "steps": 300, "launched": True, "out": None})
    counts = {name: count for name in COUNTS if (count := getattr(options, name))}
    import torch

    torch.set_num_threads(1)
    if "disks" in counts:
        import mishaps

        mishaps.in_own_mounts()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, count in counts.items():
            print(f"\n{name}={count}", flush=True)
            results[name] = campaign(name, count, options.steps, options.launched, Path(temporary) / name)
            print(table(results[name]))
            for row in results[name]:
                for what, lines in row.get("lines", {}).items():
                    print(f"\n{row['case']}, {what}", *lines, sep="\n    ")
                print(*(f"NOT AS PROMISED: {text}" for text in row["broken"]), sep="\n", end="", flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=1))
    raise SystemExit(any(row["broken"] for rows in results.values() for row in rows))


if __name__ == "__main__":
    main()
