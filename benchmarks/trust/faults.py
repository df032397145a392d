"""Kill and interrupt training runs at random moments, resume them, and compare them with uninterrupted runs.

    python -m benchmarks.trust.faults kills=50 ctrl_c=20 sharded=20

`kills` and `ctrl_c` are the total numbers of kill -9 and Ctrl-C, divided among both stages with one and two processes;
`sharded` is the number of kill -9 for priors sharded over two processes (FSDP2). Runs take `steps=300` steps and save
every 6. `seed=0` determines the moments; `only="prior, 2 processes"` selects a case.

These must be bit-identical: all tensors of the last checkpoint (weights, averages, codebook, moments) and of the
snapshot, the counters, every line of metrics.jsonl except timings, the previews, and the names of all files. Prints one
table row per case; exits with 1 if anything differs. Needs `pip install -e '.[dev]'` and Linux.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

from benchmarks.support.options import add_test_helpers, read_options
from benchmarks.support.tables import table_head, table_row

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1")
FOUR = [("tokenizer", 1), ("prior", 1), ("tokenizer", 2), ("prior", 2)]
DEFAULTS = {"kills": 0, "ctrl_c": 0, "sharded": 0, "steps": 300, "seed": 0, "only": None}


def main() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background; child processes would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    options = read_options(__doc__, DEFAULTS)
    add_test_helpers()
    import torch
    from kills import interrupt, make_case

    torch.set_num_threads(1)
    head = table_head("signal", "run", "sent", "when", "runs compared", "not equal", "slowest end", "minutes")
    print(head, flush=True)
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, number, total, cases, sharded in (
            ("kill -9", signal.SIGKILL, options.kills, FOUR, False),
            ("Ctrl-C", signal.SIGINT, options.ctrl_c, FOUR, False),
            ("kill -9", signal.SIGKILL, options.sharded, [("prior", 2)], True),
        ):
            for place, (stage, processes) in enumerate(cases):
                count = total // len(cases) + (place < total % len(cases))
                label = f"{stage}, {processes} process{'es' * (processes > 1)}{', FSDP2' * sharded}"
                if not count or options.only not in (None, label):
                    continue
                start = time.monotonic()
                case = make_case(stage, processes, Path(folder, name, str(sharded)), options.steps, sharded)
                found = interrupt(case, options.seed, count, number)
                wrong, slowest = found.pop("broken"), found.pop("slowest end")
                sent, runs = found.pop("interrupted"), found.pop("runs compared")
                when = ", ".join(f"{times} {moment}" for moment, times in found.items())
                minutes = (time.monotonic() - start) / 60
                cells = name, case.name, sent, when, runs, len(wrong), f"{slowest:.1f} s", f"{minutes:.1f}"
                print(table_row(map(str, cells)), *(f"NOT AS PROMISED: {text}" for text in wrong), sep="\n", flush=True)
                broken += wrong
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
