"""A run delivers the weights that were best on validation images."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import metrics, states
from safetensors.torch import load_file
from tiny_task import TinyTask, assert_same_tensors, read_checkpoint, train_tiny

from pipelines.train_prior import PriorTask
from pipelines.train_tokenizer import TokenizerTask

pytestmark = pytest.mark.usefixtures("one_process")

EVERY = {"evaluate_every": 2, "save_every": 2, "log_every": 2}


def weights_of(checkpoint: Path, part: str = "average") -> dict[str, torch.Tensor]:
    """The averaged or best weights in a checkpoint."""
    found = read_checkpoint(checkpoint).items()
    return {name.removeprefix(f"{part}."): value for name, value in found if name.startswith(f"{part}.")}


@pytest.mark.parametrize(
    ("scores", "best"), [((3.0, 2.0, 2.0, 4.0), 4), ((4.0, 3.0, 2.0, 1.0), 8), ((math.nan, 2.0, math.inf, 3.0), 4)]
)
def test_a_run_delivers_the_first_of_its_best_weights(tmp_path, capsys, scores, best):
    """Its checkpoint still holds the last average."""
    task = TinyTask(scores=dict(zip((2, 4, 6, 8), scores, strict=True)))
    run = train_tiny(tmp_path / "run", lambda: task, **EVERY)
    assert [split for split, _ in task.evaluations] == ["validation"] * 4 + ["held_out"]
    *seen, reported = [dict(sorted(weights.items())) for _, weights in task.evaluations]
    expected = seen[best // 2 - 1]
    for found in (load_file(run / "net.safetensors"), reported, weights_of(states(run)[-1], "best")):
        assert_same_tensors(found, expected)
    assert_same_tensors(weights_of(states(run)[-1]), seen[-1])
    facts, error = task.facts, metrics(run)[-1]["held_out/error"]
    assert facts["steps"] == 8 and facts["best_step"] == best and facts["images"] == {"validation": 4, "held_out": 4}
    assert facts["evaluation"] == {"validation_error": scores[best // 2 - 1], "error": error}
    logged = [line.get("validation/error", math.nan) for line in metrics(run)]
    assert logged == pytest.approx([score if math.isfinite(score) else math.nan for score in scores], nan_ok=True)
    assert (f"best at step {best}" in capsys.readouterr().out) == (best != 8)


def test_an_extended_run_may_find_better_weights(tmp_path):
    scores = {2: 2.0, 4: 3.0, 6: 4.0, 8: 5.0, 10: 1.0, 12: 1.5, 14: 9.0}
    run = train_tiny(tmp_path / "run", partial(TinyTask, scores=scores), **EVERY)
    assert int(load_file(run / "net.safetensors")["net.norm.num_batches_tracked"]) == 2
    train_tiny(run, partial(TinyTask, scores=scores), **EVERY, steps=14)
    assert int(load_file(run / "net.safetensors")["net.norm.num_batches_tracked"]) == 10
    assert int(weights_of(states(run)[-1])["net.norm.num_batches_tracked"]) == 14


@pytest.mark.parametrize("why", ["keep_best=false", "no validation images", "no score", "not finite"])
def test_otherwise_a_run_delivers_the_newest_weights(tmp_path, monkeypatch, why):
    scores = {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0}
    if why == "not finite":
        scores = dict.fromkeys(scores, math.nan)
    if why == "no score":
        monkeypatch.setattr(TinyTask, "score", lambda task, evaluation: None)
    task = partial(TinyTask, scores=scores, validation=why != "no validation images")
    run = train_tiny(tmp_path / "run", task, **EVERY, keep_best=why != "keep_best=false")
    assert_same_tensors(load_file(run / "net.safetensors"), weights_of(states(run)[-1]))
    assert int(load_file(run / "net.safetensors")["net.norm.num_batches_tracked"]) == 8
    assert not list(run.rglob("best.safetensors"))


# The two stages


def test_scores_rank_by_psnr_or_bits_unless_training_is_for_something_else():
    for adversary, perceptual, score in ((None, None, 20.0), (object(), None, None), (None, object(), None)):
        task: Any = SimpleNamespace(adversary=adversary, perceptual=perceptual)
        assert TokenizerTask.score(task, {"psnr": 20.0}) == score
    for objective, score in ((None, -2.0), ("cca", None)):
        task = SimpleNamespace(config=SimpleNamespace(objective=objective))
        assert PriorTask.score(task, {"bits_per_token": 2.0}) == score
