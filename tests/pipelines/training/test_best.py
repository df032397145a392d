"""The best weights of a run: what it leaves are those of the step whose figure on validation images was the best."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import (
    VQVAE,
    assert_equal_tensors,
    exact,
    make_tokens,
    metrics,
    states,
    tensors,
    train_prior,
    train_tokenizer,
)
from one_process import begin_anew, one_process
from safetensors.torch import load_file

from pipelines import ImagePipeline
from pipelines.config.command import RunError
from pipelines.images import DataConfig, load_images
from pipelines.metrics.likelihood import bits_per_token
from pipelines.metrics.reconstruction import evaluate_reconstruction
from pipelines.processes.sharing import ALONE
from pipelines.tokens import TokenDataset, TokenSplit, load_tokens
from pipelines.train_prior import PriorTask
from pipelines.train_tokenizer import TokenizerTask
from pipelines.training import loop as training
from pipelines.training.best import final_weights
from tokenizer import Tokenizer
from tokenizer.files import FormatError, WeightsError, write_manifest

EVERY = {
    "train__log_every": 2,
    "train__evaluate_every": 2,
    "train__preview_every": 100,
    "train__save_every": 2,
    "train__steps": 8,
    "train__warmup_steps": 0,
}


pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Sixteen rows of chance, which can only be learned by heart: the longer, the worse others are told."""
    folder = tmp_path_factory.mktemp("few")
    made = load_tokens(make_tokens(folder / "made", classes=0))
    draw = torch.Generator().manual_seed(0)
    splits = {
        name: TokenSplit(torch.randint(made.grid.vocab_size, (count, 7, 7), generator=draw), None)
        for name, count in (("train", 16), ("validation", 64), ("test", 16))
    }
    TokenDataset(made.grid, [], splits, made.tokenizer, {}).save(folder / "tokens")
    return folder / "tokens"


@pytest.fixture
def scripted(monkeypatch):
    """Validation figures that are chosen, one for each evaluation; what was evaluated is kept."""
    seen: list[dict[str, torch.Tensor]] = []

    def script(task: type, figure: str, values: list[float]) -> list[dict[str, torch.Tensor]]:
        evaluate = task.evaluate

        def scripted(self: Any, model: Any, split: str) -> dict[str, float]:
            found = evaluate(self, model, split)
            if split == "held_out":
                return found
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
            return found | {figure: values[len(seen) - 1]}

        monkeypatch.setattr(task, "evaluate", scripted)
        return seen

    return script


def facts_of(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "provenance.json").read_text())[stage]


@pytest.mark.parametrize(
    ("bits", "best"), [([3.0, 2.0, 5.0, 4.0], 4), ([3.0, 2.0, 2.0, 2.0], 4), ([4.0, 3.0, 2.0, 1.0], 8)]
)
def test_a_prior_ends_with_the_weights_that_were_best(tmp_path, tokens, scripted, bits, best, capsys):
    seen = scripted(PriorTask, "bits_per_token", bits)
    run = train_prior(tmp_path / "run", tokens, **EVERY)
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    assert_equal_tensors(dict(sorted(pipe.prior.state_dict().items())), dict(sorted(seen[best // 2 - 1].items())))
    newest = load_file(states(run)[-1] / "ema.safetensors")
    same = all(torch.equal(value, newest[f"module.{name}"]) for name, value in pipe.prior.state_dict().items())
    assert same == (best == 8)
    facts, data = facts_of(run / "pipeline", "prior"), load_tokens(tokens)
    assert (facts["steps"], facts["best_step"]) == (8, best)
    reported = bits_per_token(pipe.prior, data.splits["test"])
    assert facts["evaluation"] == {"validation_bits_per_token": min(bits), "bits_per_token": reported}
    assert facts["images"] == {"validation": 24, "held_out": 24}
    lines = metrics(run)
    assert [line["step"] for line in lines if "held_out/bits_per_token" in line] == [8]  # the test split, once
    assert lines[-1]["held_out/bits_per_token"] == reported
    assert [line["step"] for line in lines if "validation/bits_per_token" in line] == [2, 4, 6, 8]
    card = (run / "pipeline" / "README.md").read_text()
    assert f"8 steps, {facts['minutes']:.1f} minutes; the weights of step {best}, best on validation images" in card
    assert f"| bits per token, validation images | {min(bits):.4g}, of 24 |" in card
    assert f"| bits per token, held out | {reported:.4g}, of 24 |" in card
    said = capsys.readouterr().out
    kept = f", of which step {best} was best" if best < 8 else ""
    assert f" min{kept}, {reported:.3f} bits per token" in said and "24 for validation" in said


def test_a_tokenizer_ends_with_the_weights_that_were_best(tmp_path, scripted):
    seen = scripted(TokenizerTask, "psnr", [3.0, 9.0, 5.0, 4.0])
    run = train_tokenizer(tmp_path / "run", **EVERY)
    saved = Tokenizer.from_pretrained(run / "tokenizer")
    assert_equal_tensors(
        {f"tokenizer.{name}": value for name, value in sorted(saved.state_dict().items())},
        {k: v for k, v in sorted(seen[1].items()) if k.startswith("tokenizer.")},
    )
    facts = facts_of(run / "tokenizer", "tokenizer")
    found = evaluate_reconstruction(saved, load_images(DataConfig(limit=72)).held_out)
    assert facts["best_step"] == 4 and facts["evaluation"]["validation_psnr"] == 9.0
    assert {name: facts["evaluation"][name] for name in found} == found


def test_while_a_run_goes_on_its_snapshot_is_the_newest(tmp_path, tokens, scripted, monkeypatch):
    seen = scripted(PriorTask, "bits_per_token", [1.0, 2.0, 3.0, 4.0])
    saved, save = [], PriorTask.save
    monkeypatch.setattr(
        PriorTask,
        "save",
        lambda self, model, run, facts: (
            saved.append(({name: value.clone() for name, value in model.state_dict().items()}, facts)),
            save(self, model, run, facts),
        ),
    )
    train_prior(tmp_path / "run", tokens, **EVERY)
    for number, (weights, facts) in enumerate(saved):
        expected = seen[number if number < 3 else 0]
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
        assert facts.get("best_step") == (None if number < 3 else 2)
        assert facts["evaluation"]["validation_bits_per_token"] == [1.0, 2.0, 3.0, 1.0][number]
        assert ("bits_per_token" in facts["evaluation"]) == (number == 3)


def test_without_keep_best_it_is_the_newest(tmp_path, tokens, scripted):
    seen = scripted(PriorTask, "bits_per_token", [1.0, 2.0, 3.0, 4.0])
    run = train_prior(tmp_path / "run", tokens, **EVERY, train__keep_best=False)
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    assert_equal_tensors(dict(sorted(pipe.prior.state_dict().items())), dict(sorted(seen[3].items())))
    facts = facts_of(run / "pipeline", "prior")
    assert "best_step" not in facts and facts["evaluation"]["validation_bits_per_token"] == 4.0
    assert not list(run.rglob("best.safetensors"))


@pytest.mark.parametrize("sharded", [False, True])
def test_the_average_goes_on_unchanged_but_where_it_is_a_copy(sharded):
    """Of shards, what is evaluated was put together for that."""
    average, best = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = average.weight.clone()
    facts: dict[str, Any] = {"best": {"step": 4}, "best_weights": best.state_dict(), "step": 8, "sharded": sharded}
    run: Any = SimpleNamespace(**facts, task=SimpleNamespace(team=ALONE))
    assert torch.equal(final_weights(run, average).weight, best.weight)
    assert torch.equal(average.weight, best.weight if sharded else before)
    run.step = 4
    assert final_weights(run, average) is average


# By itself: rows that are learned by heart

BY_HEART = {
    **EVERY,
    "train__steps": 16,
    "train__batch_size": 16,
    "train__lr": 1e-2,
    "train__ema_decay": 0.5,
    "label_dropout": 0.0,
}


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory, few) -> Path:
    """A run that overfits."""
    with one_process():
        return train_prior(tmp_path_factory.mktemp("by_heart") / "run", few, **BY_HEART)


def test_a_run_that_overfits_ends_with_the_weights_of_before(by_heart, few):
    curve = {line["step"]: line["validation/bits_per_token"] for line in metrics(by_heart)}
    best = min(curve, key=curve.__getitem__)
    assert 0 < best < 16 and curve[16] > curve[best] + 0.1
    pipe, data = ImagePipeline.from_pretrained(by_heart / "pipeline"), load_tokens(few)
    assert facts_of(by_heart / "pipeline", "prior")["best_step"] == best
    assert bits_per_token(pipe.prior, data.splits["validation"]) == curve[best]
    assert bits_per_token(pipe.prior, data.splits["test"]) == metrics(by_heart)[-1]["held_out/bits_per_token"]
    state = states(by_heart)[-1]
    assert_equal_tensors(load_file(state / "best.safetensors"), dict(sorted(pipe.prior.state_dict().items())))


@pytest.mark.parametrize("at", [9, *(pytest.param(at, marks=pytest.mark.slow) for at in (5, 15))])
def test_interrupted_equals_uninterrupted(tmp_path, by_heart, few, monkeypatch, at):
    class Killed(Exception):
        pass

    def killed(run: Any, *given: Any) -> None:
        if run.step == at:
            raise Killed
        take_step(run, *given)

    take_step, run = training.take_step, tmp_path / "run"
    monkeypatch.setattr(training, "take_step", killed)
    with pytest.raises(RunError, match="Killed"):
        train_prior(run, few, **BY_HEART)
    monkeypatch.undo()
    begin_anew()
    assert states(run)[-1].name == f"step-{at - 1:08d}"
    train_prior(run, few, **BY_HEART)
    assert exact(run) == exact(by_heart)
    assert_equal_tensors(tensors(run), tensors(by_heart))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [("gone", FormatError, "best.safetensors: missing"), ("other", WeightsError, "missing tensors")],
)
def test_best_weights_that_are_not_those_of_the_run_are_refused(tmp_path, tokens, damage, error, message):
    run = train_prior(tmp_path / "run", tokens, **{**EVERY, "train__steps": 2})
    (state,) = states(run)
    if damage == "gone":
        (state / "best.safetensors").unlink()
    else:
        (state / "best.safetensors").write_bytes((state / "ema.safetensors").read_bytes())
    (state / "manifest.json").unlink()
    write_manifest(state, step=2)
    with pytest.raises(error, match=message):
        train_prior(run, tokens, **EVERY)


# Without images for validation


def test_without_images_for_validation_figures_are_of_those_held_out(tmp_path, tokens, capsys):
    """And the newest weights are what is left."""
    data = load_tokens(tokens)
    splits = {name: data.splits[name] for name in ("train", "test")}
    TokenDataset(data.grid, data.class_names, splits, data.tokenizer, {}).save(tmp_path / "tokens")
    whole = train_prior(tmp_path / "whole", tmp_path / "tokens", **EVERY)
    told = "no images for validation: figures while training are of the images held out, and the last weights are kept"
    assert told in capsys.readouterr().out
    for line in metrics(whole):
        assert "held_out/bits_per_token" in line and "validation/bits_per_token" not in line
    facts = facts_of(whole / "pipeline", "prior")
    assert facts["evaluation"] == {"bits_per_token": metrics(whole)[-1]["held_out/bits_per_token"]}
    assert "best_step" not in facts and not list(whole.rglob("best.safetensors"))


def test_no_figure_tells_which_weights_of_a_critic_or_of_lpips_are_best():
    figures = {"psnr": 20.0}
    for adversary, perceptual, score in ((None, None, 20.0), (object(), None, None), (None, object(), None)):
        task = SimpleNamespace(adversary=adversary, perceptual=perceptual)
        assert TokenizerTask.score(task, figures) == score  # type: ignore[arg-type]


def test_images_of_a_source_choose_for_its_tokenizer(tmp_path):
    run = train_tokenizer(tmp_path / "run", model=VQVAE, **{**EVERY, "train__steps": 2})
    tokenizer, images = Tokenizer.from_pretrained(run / "tokenizer"), load_images(DataConfig(limit=72))
    assert images.validation is not None
    found = evaluate_reconstruction(tokenizer, images.validation)
    assert {f"validation/{name}": value for name, value in found.items()}.items() <= metrics(run)[-1].items()
