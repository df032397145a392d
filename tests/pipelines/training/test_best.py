"""The best weights of a run: what it leaves are those of the step whose figure on validation images was the best."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import VQVAE, assert_equal_tensors, make_tokens, metrics, states, train_prior, train_tokenizer
from one_process import one_process
from safetensors.torch import load_file
from tiny_task import (
    TinyTask,
    assert_same_run,
    assert_same_tensors,
    killed_at,
    read_checkpoint,
    stopped_at,
    train_tiny,
)

from pipelines import ImagePipeline
from pipelines.images import DataConfig, load_images
from pipelines.metrics.likelihood import bits_per_token
from pipelines.metrics.reconstruction import evaluate_reconstruction
from pipelines.tokens import TokenDataset, TokenSplit, load_tokens
from pipelines.train_tokenizer import TokenizerTask
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_process")

EVERY = {"evaluate_every": 2, "save_every": 2, "log_every": 2}


def weights_of(checkpoint: Path, part: str = "average") -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint, or its best ones."""
    found = read_checkpoint(checkpoint).items()
    return {name.removeprefix(f"{part}."): value for name, value in found if name.startswith(f"{part}.")}


@pytest.mark.parametrize(
    ("scores", "best"),
    [((3.0, 2.0, 5.0, 4.0), 4), ((3.0, 2.0, 2.0, 2.0), 4), ((4.0, 3.0, 2.0, 1.0), 8), ((1.0, 2.0, 3.0, 4.0), 2)],
)
def test_a_run_ends_with_the_weights_that_were_best(tmp_path, capsys, scores, best):
    """The first of those that are as good; its checkpoint holds the last average all the same."""
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
    assert split == "held_out"  # looked at once, and with the weights that are left
    assert_same_tensors(dict(sorted(reported.items())), expected)
    assert len(tasks[0].evaluations) == 5
    assert_same_tensors(weights_of(states(run)[-1]), dict(sorted(seen[-1].items())))
    assert_same_tensors(weights_of(states(run)[-1], "best"), expected)
    facts = tasks[0].facts
    assert facts["steps"] == 8 and facts["best_step"] == best and facts["images"] == {"validation": 4, "held_out": 4}
    assert facts["evaluation"] == {"validation_error": min(scores), "error": metrics(run)[-1]["held_out/error"]}
    assert [line["validation/error"] for line in metrics(run)] == list(scores)
    assert [line["step"] for line in metrics(run) if "held_out/error" in line] == [8]
    assert (f"step {best} was best" in capsys.readouterr().out) == (best != 8)


def test_while_a_run_goes_on_its_snapshot_is_the_newest(tmp_path, monkeypatch):
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


def test_an_extended_run_may_find_better_ones(tmp_path):
    """Among those of the first part and of the second alike."""
    scores = {2: 2.0, 4: 3.0, 6: 4.0, 8: 5.0, 10: 1.0, 12: 1.5, 14: 9.0}
    run = train_tiny(tmp_path / "run", partial(TinyTask, scores=scores), **EVERY)
    assert int(load_file(run / "net.safetensors")["net.norm.num_batches_tracked"]) == 2
    train_tiny(run, partial(TinyTask, scores=scores), **EVERY, steps=14)
    assert int(load_file(run / "net.safetensors")["net.norm.num_batches_tracked"]) == 10
    assert int(weights_of(states(run)[-1])["net.norm.num_batches_tracked"]) == 14


@pytest.mark.parametrize("why", ["keep_best=false", "no validation images", "no score", "not finite"])
def test_otherwise_it_ends_with_the_newest(tmp_path, monkeypatch, why):
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


def test_of_figures_some_of_which_are_not_finite_the_best_of_the_others_counts(tmp_path):
    scores = {2: math.nan, 4: 2.0, 6: math.inf, 8: 3.0}
    run = train_tiny(tmp_path / "run", partial(TinyTask, scores=scores), **EVERY)
    assert int(load_file(run / "net.safetensors")["net.norm.num_batches_tracked"]) == 4


def test_a_last_snapshot_that_is_written_later_is_of_the_best(tmp_path, monkeypatch):
    """Where the last snapshot could not be written, the same command writes it, of the same weights."""
    task = partial(TinyTask, scores={2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0})
    whole = train_tiny(tmp_path / "whole", task, **EVERY)
    save = TinyTask.save

    def full(one: TinyTask, model: Any, run: Path, facts: dict[str, Any], pictures: Any) -> None:
        if facts["steps"] == 8:
            raise OSError(28, "full")
        save(one, model, run, facts, pictures)

    with monkeypatch.context() as patch, pytest.raises(Exception, match="step 8"):
        patch.setattr(TinyTask, "save", full)
        train_tiny(tmp_path / "run", task, **EVERY)
    train_tiny(tmp_path / "run", task, **EVERY)
    assert_same_run(tmp_path / "run", whole)


# The two stages


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen rows of chance, which can only be learned by heart: the longer, the worse others are predicted."""
    folder = tmp_path_factory.mktemp("few")
    made = load_tokens(make_tokens(folder / "made", classes=0))
    draw = torch.Generator().manual_seed(0)
    splits = {
        name: TokenSplit(torch.randint(made.grid.vocab_size, (count, 7, 7), generator=draw), None)
        for name, count in (("train", 16), ("validation", 64), ("test", 16))
    }
    TokenDataset(made.grid, [], splits, made.tokenizer, {}).save(folder / "tokens")
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


def test_a_run_that_overfits_ends_with_the_weights_of_before(by_heart, few):
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


def test_interrupted_after_the_best_step_it_ends_in_the_same_way(tmp_path, by_heart, few):
    run = tmp_path / "run"
    with stopped_at(12):
        train_prior(run, few, **BY_HEART)
    with killed_at(15):
        train_prior(run, few, **BY_HEART)
    train_prior(run, few, **BY_HEART)
    assert_same_run(run, by_heart)


def test_images_of_a_source_choose_for_its_tokenizer(tmp_path):
    run = train_tokenizer(tmp_path / "run", model=VQVAE, train__steps=2)
    tokenizer, images = Tokenizer.from_pretrained(run / "tokenizer"), load_images(DataConfig(limit=72))
    assert images.validation is not None
    found = evaluate_reconstruction(tokenizer, images.validation)
    assert {f"validation/{name}": value for name, value in found.items()}.items() <= metrics(run)[-1].items()


def test_without_images_for_validation_figures_are_of_those_held_out(tmp_path, tokens, capsys):
    """And the newest weights are what is left."""
    data = load_tokens(tokens)
    splits = {name: data.splits[name] for name in ("train", "test")}
    TokenDataset(data.grid, data.class_names, splits, data.tokenizer, {}).save(tmp_path / "tokens")
    whole = train_prior(tmp_path / "whole", tmp_path / "tokens", train__steps=4, train__evaluate_every=2)
    assert "no images for validation" in capsys.readouterr().out
    for line in metrics(whole)[1::2]:
        assert "held_out/bits_per_token" in line and "validation/bits_per_token" not in line
    facts = json.loads((whole / "pipeline" / "provenance.json").read_text())["prior"]
    assert facts["evaluation"] == {"bits_per_token": metrics(whole)[-1]["held_out/bits_per_token"]}
    assert "best_step" not in facts and not list(whole.rglob("best.safetensors"))


def test_no_figure_tells_which_weights_of_a_critic_or_of_lpips_are_best():
    figures = {"psnr": 20.0}
    for adversary, perceptual, score in ((None, None, 20.0), (object(), None, None), (None, object(), None)):
        task: Any = SimpleNamespace(adversary=adversary, perceptual=perceptual)
        assert TokenizerTask.score(task, figures) == score
