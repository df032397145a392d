"""Kills and interrupts runs at random moments, continues them, and compares them with runs that nobody interrupts.

    python -m benchmarks.trust.faults kills=50 ctrl_c=20 sharded=20

Each number is how many in all: of kill -9 and of Ctrl-C over both stages with one and with two processes (`kills`,
`ctrl_c`), and of kill -9 over priors whose weights two processes share (FSDP2, `sharded`). `steps=300` is the length of
the runs, which save every 6 steps. `seed=0` draws the moments, and `only="prior, 2 processes"` chooses a case.

Compared are, to the bit: all tensors of the last checkpoint (weights, averages, codebook, moments) and of the snapshot,
the counters, every line of metrics.jsonl except what a clock says, previews, and the names of all files. Prints a line
of a table for each case, and ends with 1 if anything differs. Needs `pip install -e '.[dev]'` and Linux.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

from benchmarks.support.options import read_options, with_helpers_of_tests
from benchmarks.support.tables import table_head, table_row

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
FOUR = [("tokenizer", 1), ("prior", 1), ("tokenizer", 2), ("prior", 2)]
DEFAULTS = {"kills": 0, "ctrl_c": 0, "sharded": 0, "steps": 300, "seed": 0, "only": None}


def main() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background; all that it starts would be deaf
        signal.signal(signal.SIGINT, signal.default_int_handler)
    options = read_options(__doc__, DEFAULTS)
    with_helpers_of_tests()
    import torch
    from kills import interrupt, make_case

    torch.set_num_threads(1)
    print(
        table_head("signal", "run", "sent", "when", "runs compared", "not equal", "slowest end", "minutes"), flush=True
    )
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, number, cases, sharded in (
            ("kill -9", signal.SIGKILL, FOUR, False),
            ("Ctrl-C", signal.SIGINT, FOUR, False),
            ("kill -9", signal.SIGKILL, [("prior", 2)], True),
        ):
            count = options.sharded if sharded else options.kills if number == signal.SIGKILL else options.ctrl_c
            for place, (stage, processes) in enumerate(cases):
                share = count // len(cases) + (place < count % len(cases))
                label = f"{stage}, {processes} process{'es' * (processes > 1)}{', FSDP2' * sharded}"
                if not share or options.only not in (None, label):
                    continue
                began = time.monotonic()
                case = make_case(stage, processes, Path(folder, name, str(sharded)), options.steps, sharded)
                found = interrupt(case, options.seed, share, number)
                wrong, slowest, sent, runs = (
                    found.pop(key) for key in ("broken", "slowest end", "interrupted", "runs compared")
                )
                when = ", ".join(f"{count} {what}" for what, count in found.items())
                cells = name, case.name, sent, when, runs, len(wrong), f"{slowest:.1f} s"
                minutes = f"{(time.monotonic() - began) / 60:.1f}"
                print(
                    table_row(map(str, (*cells, minutes))),
                    *(f"NOT AS PROMISED: {text}" for text in wrong),
                    sep="\n",
                    flush=True,
                )
                broken += wrong
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
