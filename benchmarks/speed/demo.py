"""Estimate how long `make demo` takes on this machine, from a few training steps of both stages.

    python -m benchmarks.speed.demo threads=2

The first line of the demo.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.support.options import ROOT, read_options, use_threads
from benchmarks.support.random_data import write_random_tokens
from benchmarks.support.timing import build_task, seconds_of, stepper
from pipelines.config.table import count_of

REST = 0.6
"""Time of everything but training, as a share of training: 11.6 minutes beside 18.8, on one thread of an AMD EPYC with
many other jobs, 1 December 2026."""


def main() -> None:
    threads = use_threads(read_options(__doc__, {"threads": 0}).threads)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        tokens = write_random_tokens(Path(folder) / "tokens", side=7, vocab_size=128, rows=256)
        changes = {"tokenizer/vqvae_digits": "data.limit=256", "prior/gpt_digits": f"tokens={tokens}"}
        tasks = []
        for preset, change in changes.items():
            argv = ["--config", str(ROOT / "configs" / f"{preset}.yaml"), "track.wandb=disabled", change]
            tasks.append(build_task(argv, of_prior=preset.startswith("prior")))
        steppers = [stack.enter_context(stepper(*task)) for task in tasks]
        seconds = seconds_of(steppers, repeats=5)
    steps = [config.train.steps for _, config in tasks]
    training = sum(number * each for number, each in zip(steps, seconds, strict=True))
    minutes = count_of(max(1, round(training * (1 + REST) / 60)), "minute")
    stages = [f"{number:,} steps of {each:.3f} s" for number, each in zip(steps, seconds, strict=True)]
    print(
        f"make demo: about {minutes} on this machine, {count_of(threads, 'thread')}: {' and '.join(stages)}", flush=True
    )


if __name__ == "__main__":
    main()
