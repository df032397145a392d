"""Killed and started again, a run ends where it would have ended: every logged figure and every bit of its weights."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from launch import (
    GPT,
    VQVAE,
    assert_equal_tensors,
    exact,
    make_tokens,
    metrics,
    output_of,
    prior_arguments,
    start,
    states,
    tensors,
    tokenizer_arguments,
    train_prior,
    train_tokenizer,
    verb,
    wait_for,
)

STEPS, SAVE_EVERY = 30, 5
HALF = (".tmp-", ".del-")  # what a save that was killed leaves behind
LONG = {
    "train__steps": STEPS, "train__save_every": SAVE_EVERY, "train__evaluate_every": 10, "train__preview_every": 15,
    "train__batch_size": 32,
}  # fmt: skip
# Batches run across epochs, images are augmented, codes are revived, dropout draws, a line of metrics is half
# gathered when a state is saved: all that a resume could lose.
TOKENIZER = {
    **LONG, "data__augment__rotate": 8, "data__augment__zoom": 0.1, "train__accumulate": 2,
    "model": {**VQVAE, "widths": [64], "quantizer": {"kind": "ema", "codes": 64, "dim": 8, "revive_every": 3}},
}  # fmt: skip
PRIOR = {
    **LONG,
    "train__log_every": 2,
    "model": {**GPT, "dim": 64, "depth": 3, "dropout": 0.2, "attention_dropout": 0.1},
}


@pytest.fixture(autouse=True)
def one_process_on_the_cpu(monkeypatch):
    """The uninterrupted run is made in this process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)


class Stage:
    """A verb, its command line, and the run that nobody interrupts."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.tokens = make_tokens(folder / "tokens") if name == "train_prior" else None

    def command(self, out: Path) -> list[str]:
        more = PRIOR if self.tokens else TOKENIZER
        argv = prior_arguments(out, self.tokens, **more) if self.tokens else tokenizer_arguments(out, **more)
        return verb(self.name, argv)

    def uninterrupted(self) -> Path:
        out = self.folder / "whole"
        return train_prior(out, self.tokens, **PRIOR) if self.tokens else train_tokenizer(out, **TOKENIZER)


def last_line(run: Path) -> tuple[int, int]:
    """The identity of `metrics.jsonl`, which a resumed run writes anew, and the last step in it."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            whole = file.read().split(b"\n")[:-1]
            return os.fstat(file.fileno()).st_ino, json.loads(whole[-1])["step"] if whole else 0
    except FileNotFoundError:
        return 0, 0


def half_written(run: Path) -> bool:
    """Whether something is being saved, or was when the run died."""
    return any(
        path.name.startswith(HALF) for place in (run, run / "state") for path in place.glob(".*") if path.is_dir()
    )


def kill_once(stage: Stage, run: Path, step: int, where: str, delay: float) -> str:
    """Start the run, kill it `delay` seconds after it has logged `step` or begun to save it; return where it died."""
    (before, _), process = last_line(run), start(stage.command(run))

    def has_come_there() -> bool:
        identity, logged = last_line(run)
        saving = where == "in a save"
        return identity != before and logged >= step - saving and (not saving or half_written(run))

    came = wait_for(has_come_there, process)
    time.sleep(delay)
    process.kill()
    printed, _ = process.communicate(timeout=30)
    assert came and process.returncode == -signal.SIGKILL, printed  # neither an error nor the end
    return "in a save" if half_written(run) else "in a step"


def check(stage: Stage, tmp_path: Path, kills: list[tuple[int, str, float]]) -> dict[str, int]:
    """Kill a run at each (step, where, delay), end it, and compare; returns how often it died where."""
    run, counts = tmp_path / "killed", {"in a step": 0, "in a save": 0}
    for kill in kills:
        counts[kill_once(stage, run, *kill)] += 1
    printed = output_of(start(stage.command(run)))
    assert "continuing from step" in printed
    whole = stage.uninterrupted()
    assert len(metrics(whole)) >= STEPS // 2 and metrics(whole)[-1]["step"] == STEPS
    assert exact(run) == exact(whole)  # every figure, to the last digit
    assert_equal_tensors(tensors(states(run)[-1]), tensors(states(whole)[-1]))
    for snapshot in ("tokenizer", "pipeline"):
        if (whole / snapshot).exists():
            assert_equal_tensors(tensors(run / snapshot), tensors(whole / snapshot))
    pictures = {path.name: path.read_bytes() for path in (whole / "previews").iterdir()}
    assert {path.name: path.read_bytes() for path in (run / "previews").iterdir()} == pictures
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in whole.iterdir())
    return counts


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["train_tokenizer", "train_prior"])
def test_killed_twice_equals_uninterrupted(tmp_path, name):
    draw = random.Random(name)
    kills = [(draw.choice([6, 7, 8, 9]), "in a step", draw.uniform(0, 0.01)),
             (draw.choice([15, 20]), "in a save", draw.uniform(0, 0.01))]  # fmt: skip
    counts = check(Stage(name, tmp_path), tmp_path, kills)
    assert sum(counts.values()) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["train_tokenizer", "train_prior"])
def test_killed_ten_times_equals_uninterrupted(tmp_path, name):
    """Ten kills a run, half of them aimed at saves; a run that starts over from its newest state dies further on."""
    draw = random.Random(f"{name} slow")
    steps = [step for step in range(1, STEPS) if step % SAVE_EVERY]
    kills = [(step, "in a step", draw.uniform(0, 0.01)) for step in draw.sample(steps, 5)]
    kills += [(step, "in a save", draw.uniform(0, 0.02)) for step in range(SAVE_EVERY, STEPS, SAVE_EVERY)]
    kills.sort(key=lambda kill: kill[0])
    counts = check(Stage(name, tmp_path), tmp_path, kills)
    print(f"{name}: 10 kills ({', '.join(f'{count} {place}' for place, count in counts.items())}), 0 differences")
    assert sum(counts.values()) == 10 and counts["in a save"] >= 2
