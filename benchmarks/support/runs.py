"""Runs of the verbs, each done once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.support.options import ROOT

NEVER = 1_000_000  # steps: for what a run is to do only at its end


def smalti(verb: str, *arguments: str) -> None:
    """Run a verb as a user would."""
    subprocess.run([sys.executable, "-m", f"pipelines.{verb}", *arguments], check=True, cwd=ROOT)


def train_once(verb: str, preset: Path, steps: int, run: Path, *more: str, never: tuple[str, ...]) -> None:
    """Train for so many steps, whatever the preset says of its end, unless that was done before; exits where it was
    done for another number. never: what the run does not do on its way, such as `save`."""
    done = run / "steps"
    if not done.is_file():
        end = ["train.minutes=null", f"train.steps={steps}", "track.wandb=disabled"]
        end += [f"train.{what}_every={NEVER}" for what in never]
        smalti(verb, "--config", str(preset), f"out={run}", *more, *end)
        done.write_text(str(steps))
    if int(done.read_text()) != steps:
        raise SystemExit(f"{run}: was trained for {done.read_text()} steps; choose another out=")
