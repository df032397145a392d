"""Estimate how long `make demo` takes on this machine, from a few training steps of both stages.

    python -m benchmarks.speed.demo threads=2

The first line of the demo.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.support.options import ROOT, read_options, use_threads
from benchmarks.support.random_data import write_random_tokens
from benchmarks.support.timing import seconds_of, stepper

REST = 0.6
"""Time of everything but training, as a share of training: 11.6 minutes beside 18.8, on one thread of an AMD EPYC with
many other jobs, 1 December 2026."""


def main() -> None:
    threads = use_threads(read_options(__doc__, {"threads": 0}).threads)

    from pipelines.config.table import count_of
    from pipelines.train_prior import PriorTask, TrainPriorConfig
    from pipelines.train_tokenizer import TokenizerTask, TrainTokenizerConfig

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        tokens = write_random_tokens(Path(folder) / "tokens", side=7, vocab_size=128, rows=256)
        configs = (
            read_preset(TrainTokenizerConfig, "tokenizer/vqvae_digits.yaml", "data.limit=256"),
            read_preset(TrainPriorConfig, "prior/gpt_digits.yaml", f"tokens={tokens}"),
        )
        with redirect_stdout(None):  # the number of images, which the run itself prints
            tasks = TokenizerTask(configs[0]), PriorTask(configs[1])
        steppers = [stack.enter_context(stepper(*pair)) for pair in zip(tasks, configs, strict=True)]
        seconds = seconds_of(steppers, repeats=5)
    steps = [config.train.steps for config in configs]
    training = sum(number * each for number, each in zip(steps, seconds, strict=True))
    minutes = count_of(max(1, round(training * (1 + REST) / 60)), "minute")
    stages = [f"{number:,} steps of {each:.3f} s" for number, each in zip(steps, seconds, strict=True)]
    print(
        f"make demo: about {minutes} on this machine, {count_of(threads, 'thread')}: {' and '.join(stages)}", flush=True
    )


def read_preset(stage: type, preset: str, *changes: str) -> Any:
    """Return the configuration of a preset."""
    from pipelines.config.command import parse

    argv = ["--config", str(ROOT / "configs" / preset), "track.wandb=disabled", *changes]
    return parse(stage, argv, verb="", description="")


if __name__ == "__main__":
    main()
