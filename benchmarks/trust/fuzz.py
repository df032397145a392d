"""Every parser of what may come from anyone, by the thousand: damaged and forged inputs, in watched workers.

    python -m benchmarks.trust.fuzz target=streams count=20000 out=fuzz.jsonl
    python -m benchmarks.trust.fuzz target=all count=20000 out=fuzz.jsonl
    python -m benchmarks.trust.fuzz count=0 out=fuzz.jsonl

Targets: pipelines, calibrations, tokens, states, sharded, streams, presets, shards, images, weights, runs, http, hub.
Case `number` of a target under a `seed` is the same each time; those from `start` up to `start + count` are tried, by
50 in a line of `out`, and a line that is there is not made again: the same command goes on. Allowed are a load, and an
error of the parser's kinds in printable lines. Anything else is a finding: another exception, a signal, more than 2 s
or 500 MB and ten bytes for each of the input's, something executed or unpickled, something written outside of the
worker's folder, damage that a manifest should have shown. The inputs of findings are kept in a folder beside `out`.
Prints a table of all that `out` holds, and ends with 1 if there are findings. `count=0` prints only. Needs `pip install
-e '.[dev]'`; for Linux.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.support.options import read_options, with_helpers_of_tests

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1")
os.environ.update(HF_HUB_DOWNLOAD_TIMEOUT="1", HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

LINE = 50  # cases

Row = dict[str, Any]


def free_port() -> int:
    """For the Hub of the workers."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def lines_of(path: Path) -> list[Row]:
    """What a file of a campaign holds, without a line that was torn."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def try_target(name: str, seed: int, numbers: range, out: Path) -> None:
    """Append a line for each 50 cases that has none yet."""
    from fuzzing.campaign import Campaign, summary
    from fuzzing.targets import TARGETS

    done = {(line["target"], line["seed"], line["first"], line["count"]) for line in lines_of(out)}
    parts = [range(first, min(first + LINE, numbers.stop)) for first in range(numbers.start, numbers.stop, LINE)]
    left = [part for part in parts if (name, seed, part.start, len(part)) not in done]
    if not left:
        return
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as place:
        campaign = Campaign(TARGETS[name], Path(place), seed, out.with_suffix(".findings"))
        campaign.require_good()
        for part in left:
            began = time.process_time() + children()
            rows = campaign.run(part)
            line = summary(name, seed, part, rows, time.process_time() + children() - began)
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            for row in line["findings"]:
                print(f"{name} {row['number']} ({row.get('base')}: {row.get('ways')}): {row['problem']}", flush=True)


def children() -> float:
    """Seconds of the processor that ended workers took."""
    times = os.times()
    return times.children_user + times.children_system


def table(lines: list[Row]) -> str:
    """All that was tried, in Markdown."""
    rows = ["| target | cases | loads | typed errors | findings | slowest, s | largest, MiB | CPU minutes |"]
    rows.append("|---" * 8 + "|")
    for name in dict.fromkeys(line["target"] for line in lines):
        some = [line for line in lines if line["target"] == name]
        kinds = sum((Counter(line["kinds"]) for line in some), Counter[str]())
        bad = sum(len(line["findings"]) for line in some)
        count, loads = sum(line["count"] for line in some), kinds["loads"]
        failed = sum(row["kind"] != "loads" for line in some for row in line["findings"])
        slow, large = max(line["slowest"][0] for line in some), max(line["largest"][0] for line in some)
        minutes = sum(line["seconds"] for line in some) / 60
        cells = [name, count, loads, count - loads - failed, bad, f"{slow:.2f}", large >> 20, f"{minutes:.1f}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def main() -> None:
    options = read_options(__doc__, {"target": "all", "count": 1000, "seed": 0, "start": 0, "out": "fuzz.jsonl"})
    out = Path(options.out).absolute()
    if options.count:
        port = free_port()
        with_helpers_of_tests()
        os.environ.update(SMALTI_FUZZ_PORT=str(port), HF_ENDPOINT=f"http://127.0.0.1:{port}")
        import torch
        from fuzzing.targets import TARGETS

        torch.set_num_threads(1)
        if options.target != "all" and options.target not in TARGETS:
            raise SystemExit(f"target: there are all, {', '.join(TARGETS)}")
        for name in TARGETS if options.target == "all" else [options.target]:
            try_target(name, options.seed, range(options.start, options.start + options.count), out)
    lines = lines_of(out)
    print(table(lines))
    raise SystemExit(any(line["findings"] for line in lines))


if __name__ == "__main__":
    main()
