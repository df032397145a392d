"""A run delivers the weights that were best on validation images."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from givens.token_datasets import make_split
from launch import assert_equal_tensors, make_tokens, metrics, states, train_prior
from one_process import one_process
from safetensors.torch import load_file
from tiny_task import (
    TinyTask,
    assert_same_tensors,
    read_checkpoint,
    train_tiny,
)

from pipelines import ImagePipeline
from pipelines.metrics.likelihood import bits_per_token
from pipelines.tokens import TokenDataset, load_tokens
from pipelines.train_tokenizer import TokenizerTask

pytestmark = pytest.mark.usefixtures("one_process")

EVERY = {"evaluate_every": 2, "save_every": 2, "log_every": 2}


def weights_of(checkpoint: Path, part: str = "average") -> dict[str, torch.Tensor]:
    """The averaged or best weights in a checkpoint."""
    found = read_checkpoint(checkpoint).items()
    return {name.removeprefix(f"{part}."): value for name, value in found if name.startswith(f"{part}.")}


@pytest.mark.parametrize(
    ("scores", "best"),
    [((3.0, 2.0, 2.0, 4.0), 4), ((4.0, 3.0, 2.0, 1.0), 8), ((math.nan, 2.0, math.inf, 3.0), 4)],
)
def test_a_run_delivers_the_first_of_its_best_weights(tmp_path, capsys, scores, best):
    """Its checkpoint still holds the last average."""
    tasks: list[TinyTask] = []

    def task() -> TinyTask:
        tasks.append(TinyTask(scores=dict(zip((2, 4, 6, 8), scores, strict=True))))
        return tasks[-1]

    run = train_tiny(tmp_path / "run", task, **EVERY)
    seen = [weights for split, weights in tasks[0].evaluations if split == "validation"]
    assert len(seen) == 4
    expected = dict(sorted(seen[best // 2 - 1].items()))
    assert_same_tensors(load_file(run / "net.safetensors"), expected)
    (split, reported) = tasks[0].evaluations[-1]
    assert split == "held_out"  # evaluated once, with the delivered weights
    assert_same_tensors(dict(sorted(reported.items())), expected)
    assert len(tasks[0].evaluations) == 5
    assert_same_tensors(weights_of(states(run)[-1]), dict(sorted(seen[-1].items())))
    assert_same_tensors(weights_of(states(run)[-1], "best"), expected)
    facts = tasks[0].facts
    assert facts["steps"] == 8 and facts["best_step"] == best and facts["images"] == {"validation": 4, "held_out": 4}
    assert facts["evaluation"] == {
        "validation_error": scores[best // 2 - 1],
        "error": metrics(run)[-1]["held_out/error"],
    }
    logged = [line.get("validation/error", math.nan) for line in metrics(run)]
    assert logged == pytest.approx([score if math.isfinite(score) else math.nan for score in scores], nan_ok=True)
    assert [line["step"] for line in metrics(run) if "held_out/error" in line] == [8]
    assert (f"best at step {best}" in capsys.readouterr().out) == (best != 8)


def test_the_snapshot_during_training_is_of_the_newest_weights(tmp_path, monkeypatch):
    saved: list[tuple[dict[str, torch.Tensor], dict[str, Any]]] = []

    def save(task: TinyTask, model: Any, run: Path, facts: dict[str, Any], pictures: Any) -> None:
        saved.append(({name: value.clone() for name, value in model.state_dict().items()}, facts))

    monkeypatch.setattr(TinyTask, "save", save)
    scores = {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0}
    run = train_tiny(tmp_path / "run", partial(TinyTask, scores=scores), **EVERY)
    assert [facts["steps"] for _, facts in saved] == [2, 4, 6, 8]
    assert [int(weights["net.norm.num_batches_tracked"]) for weights, _ in saved] == [2, 4, 6, 2]
    assert [facts.get("best_step") for _, facts in saved] == [None, None, None, 2]
    assert [facts["evaluation"]["validation_error"] for _, facts in saved] == [1.0, 2.0, 3.0, 1.0]
    assert ["error" in facts["evaluation"] for _, facts in saved] == [False, False, False, True]
    assert_same_tensors(weights_of(states(run)[-1], "best"), dict(sorted(saved[0][0].items())))


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


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen random rows, which a prior can only memorise, so that validation gets worse."""
    folder = tmp_path_factory.mktemp("few")
    made = load_tokens(make_tokens(folder / "made", classes=0))
    draw = torch.Generator().manual_seed(0)
    splits = {
        name: make_split(torch.randint(made.grid.vocab_size, (count, 7, 7), generator=draw))
        for name, count in (("train", 16), ("validation", 64), ("test", 16))
    }
    TokenDataset(made.grid, {}, splits, made.tokenizer, {}).save(folder / "tokens")
    return folder / "tokens"


BY_HEART = {
    "train__log_every": 2,
    "train__evaluate_every": 2,
    "train__save_every": 2,
    "train__warmup_steps": 0,
    "train__steps": 16,
    "train__lr": 1e-2,
    "train__ema_decay": 0.5,
    "label_dropout": 0.0,
}


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory: pytest.TempPathFactory, few: Path) -> Path:
    """A run that overfits."""
    with one_process():
        return train_prior(tmp_path_factory.mktemp("by_heart") / "run", few, **BY_HEART)


def test_an_overfitting_run_delivers_earlier_weights(by_heart, few):
    curve = {line["step"]: line["validation/bits_per_token"] for line in metrics(by_heart)}
    best = min(curve, key=curve.__getitem__)
    assert 0 < best < 16 and curve[16] > curve[best] + 0.1
    pipe, data = ImagePipeline.from_pretrained(by_heart / "pipeline"), load_tokens(few)
    facts = json.loads((by_heart / "pipeline" / "provenance.json").read_text())["prior"]
    assert facts["best_step"] == best and facts["evaluation"]["validation_bits_per_token"] == curve[best]
    assert bits_per_token(pipe.prior, data.splits["validation"]) == curve[best]
    assert bits_per_token(pipe.prior, data.splits["test"]) == metrics(by_heart)[-1]["held_out/bits_per_token"]
    saved = load_file(states(by_heart)[-1] / "best.safetensors")
    assert_equal_tensors(saved, dict(sorted(pipe.prior.state_dict().items())))
    card = (by_heart / "pipeline" / "README.md").read_text()
    assert f"step {best}, best on validation images" in card and f"{curve[best]:.3f}" in card


def test_without_validation_images_held_out_ones_are_evaluated_and_the_newest_weights_delivered(
    tmp_path, tokens, capsys
):
    data = load_tokens(tokens)
    splits = {name: data.splits[name] for name in ("train", "test")}
    replace(data, splits=splits).save(tmp_path / "tokens")
    whole = train_prior(tmp_path / "whole", tmp_path / "tokens", train__steps=4, train__evaluate_every=2)
    assert "no validation images" in capsys.readouterr().out
    for line in metrics(whole)[1::2]:
        assert "held_out/bits_per_token" in line and "validation/bits_per_token" not in line
    facts = json.loads((whole / "pipeline" / "provenance.json").read_text())["prior"]
    assert facts["evaluation"] == {"bits_per_token": metrics(whole)[-1]["held_out/bits_per_token"]}
    assert "best_step" not in facts and not list(whole.rglob("best.safetensors"))


def test_a_tokenizer_with_a_critic_or_lpips_has_no_score():
    figures = {"psnr": 20.0}
    for adversary, perceptual, score in ((None, None, 20.0), (object(), None, None), (None, object(), None)):
        task: Any = SimpleNamespace(adversary=adversary, perceptual=perceptual)
        assert TokenizerTask.score(task, figures) == score
