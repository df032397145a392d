"""The weights that a finished run delivers: finished by the task, if it accepts the result, and in no checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import VQVAE, assert_equal_tensors, metrics, states, train_tokenizer
from safetensors.torch import load_file
from small import make_tokenizer
from tiny_task import TinyTask, assert_same_run, copy_run, read_checkpoint, train_tiny
from torch import Tensor

from pipelines.images import DataConfig, load_images
from pipelines.metrics.reconstruction import evaluate_pixel_bits, evaluate_reconstruction
from pipelines.processes.group import ALONE
from pipelines.train_tokenizer import TokenizerTask
from tokenizer import Tokenizer
from tokenizer.quantizers.codebook import CountedCodebook

pytestmark = pytest.mark.usefixtures("one_process")

EVERY = {"evaluate_every": 2, "save_every": 2, "log_every": 2}
BIAS = "net.head.bias"


class Finished(TinyTask):
    """A task that adds 1 to the bias of the delivered weights."""

    accepted = True

    def finish(self, model: Any, group: Any = ALONE) -> dict[str, Tensor]:
        return {BIAS: model.net.head.bias + 1}

    def accepts(self, finished: dict[str, float], evaluation: dict[str, float]) -> bool:
        assert finished != evaluation
        self.compared = finished, evaluation
        return self.accepted


class Refused(Finished):
    accepted = False


def delivered(run: Path) -> dict[str, Tensor]:
    return load_file(run / "net.safetensors")


def facts_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "tokenizer" / "provenance.json").read_text())["tokenizer"]["evaluation"]


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("scores", [None, {2: 4.0, 4: 1.0, 6: 2.0, 8: 3.0}])
def test_finished_weights_are_evaluated_and_saved_but_not_part_of_the_run(tmp_path, validation, scores):
    """The best ones, if they are known."""
    tasks: list[TinyTask] = []

    def make(kind: type[TinyTask]) -> TinyTask:
        tasks.append(kind(validation=validation, scores=scores))
        monkey = tasks[-1]
        if scores is not None and kind is Finished:  # reported scores do not depend on the weights
            monkey.accepts = lambda finished, evaluation: True  # type: ignore[method-assign]
        return monkey

    plain = train_tiny(tmp_path / "plain", lambda: make(TinyTask), **EVERY)
    run = train_tiny(tmp_path / "run", lambda: make(Finished), **EVERY)
    before, after = delivered(plain), delivered(run)
    assert_equal_tensors(after, {**before, BIAS: before[BIAS] + 1})
    assert_equal_tensors(read_checkpoint(states(run)[-1]), read_checkpoint(states(plain)[-1]))
    (split, weights) = tasks[1].evaluations[-1]
    assert split == "held_out" and torch.equal(weights[BIAS], after[BIAS])
    here, there = (metrics(each)[-1] for each in (run, plain))
    assert here["held_out/error"] != there["held_out/error"]
    assert tasks[1].facts["evaluation"]["error"] == here["held_out/error"]
    if validation and scores is None:
        assert here["validation/error"] == there["validation/error"]  # the curve of the averaged weights
        finished, known = tasks[1].compared
        assert tasks[1].facts["evaluation"]["validation_error"] == finished["error"]
        best = min(line["validation/error"] for line in metrics(plain) if "validation/error" in line)
        assert known["error"] == best


def test_weights_that_the_task_does_not_accept_are_not_delivered(tmp_path):
    plain, run = train_tiny(tmp_path / "plain", **EVERY), train_tiny(tmp_path / "run", Refused, **EVERY)
    assert_same_run(run, plain)


def test_a_finished_run_that_is_started_again_writes_nothing_and_one_with_more_steps_continues(tmp_path):
    plain, run = train_tiny(tmp_path / "plain", **EVERY), train_tiny(tmp_path / "run", Finished, **EVERY)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finished, "finish", lambda *_: pytest.fail("finished again"))
        train_tiny(run, Finished, **EVERY)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    for each, task in ((plain, TinyTask), (run, Finished)):
        train_tiny(each, task, **EVERY, steps=14)
    assert_equal_tensors(read_checkpoint(states(run)[-1]), read_checkpoint(states(plain)[-1]))


def test_a_snapshot_that_is_still_due_is_finished_too(tmp_path, monkeypatch):
    """Its run is killed, or cannot write, after the last step."""
    whole, run = train_tiny(tmp_path / "whole", Finished, **EVERY), tmp_path / "run"
    save = Finished.save
    with monkeypatch.context() as patch:

        def fail(task: Any, model: Any, folder: Path, facts: dict[str, Any], pictures: Any) -> None:
            if facts["steps"] == 8:
                raise OSError("the disk is full")
            save(task, model, folder, facts, pictures)

        patch.setattr(Finished, "save", fail)
        with pytest.raises(Exception, match="disk is full"):
            train_tiny(run, Finished, **EVERY)
    stopped = copy_run(run, tmp_path / "copy")
    train_tiny(run, Finished, **EVERY)
    assert_same_run(run, whole)
    with pytest.raises(AssertionError):
        assert_same_run(stopped, whole)


# The codebook of a tokenizer

OFTEN = {"data__limit": None, "train__steps": 30, "train__seed": 2, "train__ema_decay": 0.9, "train__save_every": 10}


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A run, and the same one without Lloyd steps."""
    folder = tmp_path_factory.mktemp("codebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenizerTask, "finish", lambda *_: {})
        plain = train_tokenizer(folder / "plain", **OFTEN)
    return train_tokenizer(folder / "run", **OFTEN), plain


def test_lloyd_steps_raise_the_psnr_of_the_delivered_tokenizer(pair):
    """On training images, validation images and held-out ones; only the codebook changes."""
    run, plain = pair
    tokenizers = [Tokenizer.from_pretrained(each / "tokenizer").eval() for each in pair]
    images = load_images(DataConfig(source="digits"))
    for part in (images.train, images.validation, images.held_out):
        after, before = (evaluate_reconstruction(tokenizer, part, 1000)["psnr"] for tokenizer in tokenizers)
        assert after > before
    one, other = (tokenizer.state_dict() for tokenizer in tokenizers)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {"quantizer.codebook", "quantizer.sums"}
    assert_equal_tensors(read_checkpoint(states(run)[-1]), read_checkpoint(states(plain)[-1]))
    facts = facts_of(run)
    assert facts["psnr"] == metrics(run)[-1]["held_out/psnr"] > metrics(plain)[-1]["held_out/psnr"]
    assert facts["validation_psnr"] > facts_of(plain)["validation_psnr"]


@pytest.mark.parametrize(("likelihood", "fraction"), [({"kind": "discretized_logistic"}, 0.1), (None, 0)])
def test_a_worse_codebook_is_not_delivered(tmp_path, monkeypatch, likelihood, fraction):
    """With and without validation images; of a decoder with a likelihood, in bits. Here codes are moved to noise."""

    def spoil(quantizer: Any, vectors: Any) -> None:
        noise = torch.randn(quantizer.codebook.shape, generator=torch.Generator().manual_seed(0))
        quantizer.codebook.data.copy_(noise)

    monkeypatch.setattr(CountedCodebook, "lloyd_step", spoil)
    options = {"train__steps": 4, "data__validation_fraction": fraction, "model": {**VQVAE, "likelihood": likelihood}}
    run = train_tokenizer(tmp_path / "run", **options)
    monkeypatch.setattr(TokenizerTask, "finish", lambda *_: {})
    assert_same_run(run, train_tokenizer(tmp_path / "plain", **options))


def test_bits_of_pixels_decide_before_psnr():
    better = {"psnr": 30.0, "pixel_bits_per_dim": 2.1}, {"psnr": 31.0, "pixel_bits_per_dim": 2.2}
    assert TokenizerTask.accepts(None, *better) and not TokenizerTask.accepts(None, *better[::-1])
    assert not TokenizerTask.accepts(None, {"psnr": 30.0}, better[1])  # of a checkpoint without bits
    model = make_tokenizer("vqvae", (28, 28), 1, likelihood={"kind": "discretized_logistic"}).eval()
    held_out = load_images(DataConfig(source="digits", limit=20)).held_out
    nats = -model.pixel_log_prob(held_out.batch(range(20)), model.encode(held_out.batch(range(20)))).detach()
    assert evaluate_pixel_bits(model, held_out) == pytest.approx(
        {"pixel_bits_per_dim": float(nats.mean()) / 784 / math.log(2)}, rel=1e-5
    )


def test_lloyd_steps_take_images_that_are_not_augmented_up_to_a_limit(tmp_path, monkeypatch):
    seen: list[Tensor] = []
    step = TokenizerTask.refine_codebook

    def watched(task: TokenizerTask, tokenizer: Any) -> dict[str, Tensor]:
        embed = tokenizer.embed
        monkeypatch.setattr(tokenizer, "embed", lambda images: (seen.append(images), embed(images))[1])
        return step(task, tokenizer)

    monkeypatch.setattr(TokenizerTask, "refine_codebook", watched)
    monkeypatch.setattr("pipelines.train_tokenizer.LLOYD_PIXELS", 50 * 784 + 100)
    train_tokenizer(tmp_path / "run", train__steps=2, data__augment__rotate=90)
    images = load_images(DataConfig(source="digits", limit=72)).train
    whole = images.batch(range(len(images)))
    used = torch.cat(seen)
    assert len(used) == 50
    assert all((whole == image).flatten(1).all(1).any() for image in used)
