"""What runs go through: kills, signals, full disks, lost processes, bad images, losses that are no numbers, power loss.

    python -m benchmarks.trust.faults kills=200 saves=200 sharded=200 threads=100 stops=80 ctrl_c=80 resumes=40
        encodes=100 generates=100 power=600 disks=20 matrix=24 sick=20 uneven=3 out=faults.jsonl

Each number is how many of them; any can be asked for alone. Runs of both stages, on one process and on two, are
compared with runs that nobody interrupts: every logged figure, and sha256 of weights, averaged weights, codebook,
optimizers, previews; and each row of the data must have come once an epoch. `steps=300` is their length. `sharded` are
kills within saves of two processes that share the weights, `threads` while a thread writes a state, `encodes` and
`generates` those of datasets and sets of images. `power` cuts what was recorded anywhere, and leaves of what was not
fsynced any part. `matrix` runs under `accelerate launch`, or faster, with `launched=false`, without a launcher.

Each row is appended to `out` when it is known; the same command goes on after those that are there. `start=1000` begins
at another number, by which everything is drawn. Ends with 1 if anything is not as promised. Needs
`pip install -e '.[dev]'`; `disks` mounts a tmpfs in a namespace of its own (Linux).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.campaigns import CAMPAIGNS, Campaign, Row
from benchmarks.support.options import read_options, with_helpers_of_tests

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")

IDLE = 20  # times in a row that nothing was tried: a run that ends before it is interrupted, say

# What was found


@dataclass
class Rows:
    """All that is known of campaigns, in a file that each row is appended to at once."""

    path: Path
    rows: list[Row]

    @classmethod
    def at(cls, path: Path) -> Rows:
        """Those in the file; a line that is cut short is left out."""
        text = path.read_text() if path.exists() else ""
        if not text.endswith("\n"):
            text = text[: text.rfind("\n") + 1]
            path.write_text(text)
        return cls(path, [json.loads(line) for line in text.splitlines()])

    def of(self, campaign: str, case: str | None = None) -> list[Row]:
        """Those of a campaign, or of a case of it."""
        return [row for row in self.rows if row["campaign"] == campaign and case in (None, row["case"])]

    def add(self, row: Row) -> None:
        """Keep one more."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def shares(count: int, cases: int) -> list[int]:
    """`count` in so many parts, as equal as they can be."""
    return [count // cases + (place < count % cases) for place in range(cases)]


def work_off(name: str, count: int, options: Any, rows: Rows, folder: Path) -> None:
    """Try a campaign's cases until all was tried, after what is in `rows`."""
    campaign = CAMPAIGNS[name]
    cases = campaign.cases(count, options.steps, options.launched, folder)
    parts = shares(count, len(cases)) if campaign.shared else [count] * len(cases)
    for case, share in zip(cases, parts, strict=True):
        while (left := share - done(campaign, there := rows.of(name, case.name))) > 0:
            number = max([options.start - 1, *(row["number"] for row in there)]) + 1
            began, cpu = time.monotonic(), seconds_of_cpu()
            wanted = share if campaign.units else left
            try:
                row = campaign.unit(case, number, wanted)
            except AssertionError as error:  # it hung, or could not even begin
                row = {"tried": 1, "broken": [f"number {number}: " + " ".join(str(error).split())[-300:]]}
            if not row["tried"] and not any(earlier["tried"] for earlier in there[-IDLE:]) and len(there) >= IDLE:
                row = {"tried": left, "broken": [f"number {number}: nothing could be tried, again and again"]}
            spent = {"seconds": round(time.monotonic() - began, 1), "cpu": round(seconds_of_cpu() - cpu, 1)}
            rows.add({"campaign": name, "case": case.name, "number": number, **row, **spent})
            print(
                *(f"NOT AS PROMISED: {name}, {case.name}: {text}\n" for text in row["broken"]),
                sep="",
                end="",
                flush=True,
            )


def done(campaign: Campaign, rows: list[Row]) -> int:
    """How much of a case was tried."""
    return len(rows) if campaign.units else sum(row["tried"] for row in rows)


def seconds_of_cpu() -> float:
    """What this process, and those that it has waited for, have used."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def table(rows: list[Row]) -> str:
    """A line for each case in Markdown: what was tried, how often all was as promised, and what else was counted."""
    cases: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cases[row["campaign"], "" if row["campaign"] == "matrix" else row["case"]].append(row)
    lines = ["| campaign | case | tried | as promised | broken | of these | CPU min |", "|---|---|---|---|---|---|---|"]
    for (campaign, case), found in cases.items():
        tried, broken = sum(row["tried"] for row in found), sum(min(row["tried"], len(row["broken"])) for row in found)
        known = {"tried", "number", "seconds", "cpu", "steps", "good images", "exit code", "on rank", "seconds to end"}
        names = dict.fromkeys(
            key for row in found for key, value in row.items() if type(value) is int and key not in known
        )
        what = [f"{name} {sum(row.get(name, 0) for row in found)}" for name in names]
        slowest = max((row.get("slowest end", row.get("seconds to end", 0)) for row in found), default=0)
        what += [f"slowest end {slowest:.1f} s"] * bool(slowest)
        minutes = sum(row["cpu"] for row in found) / 60
        lines.append(
            f"| {campaign} | {case} | {tried} | {tried - broken} | {broken} | {', '.join(what)} | {minutes:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background; all that it starts would be deaf
        signal.signal(signal.SIGINT, signal.default_int_handler)
    others = {"steps": 300, "start": 0, "launched": True, "out": None}
    options = read_options(__doc__, {**dict.fromkeys(CAMPAIGNS, 0), **others})
    with_helpers_of_tests()
    counts = {name: count for name in CAMPAIGNS if (count := getattr(options, name))}
    import torch

    torch.set_num_threads(1)
    if "disks" in counts:
        from failures import mishaps

        mishaps.in_own_mounts()
    with tempfile.TemporaryDirectory() as temporary:
        rows = Rows.at(Path(options.out or Path(temporary) / "rows.jsonl"))
        for name, count in counts.items():
            print(f"{name}={count}", flush=True)
            work_off(name, count, options, rows, Path(temporary) / name)
        found = [row for name in counts for row in rows.of(name)]
    for row in found:
        for what, lines in row.get("lines", {}).items():
            print(f"\n{row['case']}, {what}", *lines, sep="\n    ")
    print(f"\n{table(found)}")
    for row in found:
        print(
            *(f"NOT AS PROMISED: {row['campaign']}, {row['case']}: {text}\n" for text in row["broken"]), sep="", end=""
        )
    raise SystemExit(any(row["broken"] for row in found))


if __name__ == "__main__":
    main()
