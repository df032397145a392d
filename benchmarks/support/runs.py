"""Run verbs in child processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.support.options import ROOT
from pipelines import ImagePipeline

NEVER = 1_000_000  # a period in steps: act only at the end of a run


def smalti(verb: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pipelines", verb, *arguments], check=True, cwd=ROOT)


def train_once(
    verb: str, preset: Path, steps: int, run: Path, *more: str, never: Sequence[str] = ("evaluate", "preview", "save")
) -> None:
    """Train a preset for `steps` steps, unless the run is finished; exit if that run took another number of steps.
    never: periodic actions to turn off, such as `save`."""
    done = run / "steps"
    if not done.is_file():
        end = ["train.minutes=null", f"train.steps={steps}", "track.wandb=disabled"]
        end += [f"train.{what}_every={NEVER}" for what in never]
        smalti(verb, "--config", str(preset), f"out={run}", *more, *end)
        done.write_text(str(steps))
    if int(done.read_text()) != steps:
        raise SystemExit(f"{run}: already trained for {done.read_text()} steps; choose another out=")


def encode_once(tokenizer: Path, tokens: Path, *more: str) -> None:
    if not (tokens / "manifest.json").is_file():
        smalti("encode", f"tokenizer={tokenizer}", f"out={tokens}", *more)


def load_pipeline(run: Path) -> Any:
    """Load the pipeline of a run, without progress bars."""
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe
