"""The weights that a finished run delivers: finished by the task, if it accepts the result, and in no checkpoint."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import EMA, VQVAE, assert_equal_tensors, metrics, states, train_tokenizer
from safetensors.torch import load_file
from small import make_tokenizer
from tiny_task import TinyTask, assert_same_run, read_checkpoint, train_tiny
from torch import Tensor

from pipelines.images import DataConfig, load_images
from pipelines.metrics.reconstruction import evaluate_code_cost, evaluate_pixel_bits, evaluate_reconstruction
from pipelines.processes.group import ALONE
from pipelines.train_tokenizer import TokenizerTask
from tokenizer import Tokenizer
from tokenizer.quantizers import price
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
def test_finished_weights_are_evaluated_and_saved_but_not_part_of_the_run(tmp_path, validation):
    """The best ones, if they are known."""
    tasks: list[TinyTask] = []

    def make(kind: type[TinyTask]) -> TinyTask:
        tasks.append(kind(validation=validation))
        return tasks[-1]

    plain, run = (train_tiny(tmp_path / kind.__name__, partial(make, kind), **EVERY) for kind in (TinyTask, Finished))
    before, after = delivered(plain), delivered(run)
    assert_equal_tensors(after, {**before, BIAS: before[BIAS] + 1})
    assert_equal_tensors(read_checkpoint(states(run)[-1]), read_checkpoint(states(plain)[-1]))
    (split, weights) = tasks[1].evaluations[-1]
    assert split == "held_out" and torch.equal(weights[BIAS], after[BIAS])
    here, there = (metrics(each)[-1] for each in (run, plain))
    assert here["held_out/error"] != there["held_out/error"]
    assert tasks[1].facts["evaluation"]["error"] == here["held_out/error"]
    if validation:
        assert here["validation/error"] == there["validation/error"]  # the curve of the averaged weights
        finished, known = tasks[1].compared
        assert tasks[1].facts["evaluation"]["validation_error"] == finished["error"]
        assert known["error"] == min(line["validation/error"] for line in metrics(plain) if "validation/error" in line)


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


# The codebook of a tokenizer

OFTEN = {"data__limit": 600, "train__steps": 30, "train__seed": 2, "train__ema_decay": 0.9, "train__save_every": 10}


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
    images = load_images(DataConfig(source="digits", limit=600))
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


@pytest.mark.parametrize(
    ("likelihood", "rate", "fraction"),
    [({"kind": "discretized_logistic"}, 0.0, 0.1), (None, 0.0, 0), (None, 0.3, 0.1), (None, 0.3, 0)],
)
def test_a_worse_codebook_is_not_delivered(tmp_path, monkeypatch, likelihood, rate, fraction):
    """With and without validation images; of a decoder with a likelihood, in bits. Here codes are moved to noise."""
    monkeypatch.setattr(price, "WARM_UP", 1)

    def spoil(quantizer: Any, vectors: Any) -> None:
        noise = torch.randn(quantizer.codebook.shape, generator=torch.Generator().manual_seed(0))
        quantizer.codebook.data.copy_(noise)

    monkeypatch.setattr(CountedCodebook, "lloyd_step", spoil)
    options = {"train__steps": 4, "data__validation_fraction": fraction, "model": {**VQVAE, "likelihood": likelihood}}
    options["model"]["quantizer"] = {**EMA, "rate": rate}
    run = train_tokenizer(tmp_path / "run", **options)
    monkeypatch.setattr(TokenizerTask, "finish", lambda *_: {})
    assert_same_run(run, train_tokenizer(tmp_path / "plain", **options))


@pytest.mark.parametrize("fraction", [0.1, 0])
def test_the_cost_of_codes_with_a_price_decides(tmp_path, monkeypatch, fraction):
    """With and without validation images, whatever PSNR is. Spoilt prices leave the codes as they are."""
    better = {"psnr": 30.0, "code_cost": 2.1}, {"psnr": 31.0, "code_cost": 2.2}
    assert TokenizerTask.accepts(None, *better) and not TokenizerTask.accepts(None, *better[::-1])
    step = CountedCodebook.lloyd_step

    def spoil(quantizer: Any, vectors: Any) -> None:
        step(quantizer, vectors)
        quantizer.price.frequencies.copy_(quantizer.price.frequencies.flip(1).argsort(1).float().softmax(1))

    monkeypatch.setattr(price, "WARM_UP", 1)
    model = {**VQVAE, "quantizer": {**EMA, "rate": 0.3}}
    options = {"train__steps": 30, "data__limit": 600, "data__validation_fraction": fraction, "model": model}
    run, spoilt, plain = (tmp_path / name for name in ("run", "spoilt", "plain"))
    train_tokenizer(run, **options)
    with monkeypatch.context() as patch:
        patch.setattr(CountedCodebook, "lloyd_step", spoil)
        train_tokenizer(spoilt, **options)
        patch.setattr(TokenizerTask, "finish", lambda *_: {})
        train_tokenizer(plain, **options)
    assert_same_run(spoilt, plain)
    tokenizers = [Tokenizer.from_pretrained(each / "tokenizer").eval() for each in (run, plain)]
    images = load_images(DataConfig(source="digits", limit=600))
    after, before = (evaluate_code_cost(tokenizer, images.held_out) for tokenizer in tokenizers)
    assert after["code_cost"] < before["code_cost"]
    one, other = (tokenizer.state_dict() for tokenizer in tokenizers)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {f"quantizer.{name}" for name in ("codebook", "sums", "price.frequencies")}
    vectors = tokenizers[0].embed(images.held_out.batch(range(len(images.held_out))))
    assert after == pytest.approx({"code_cost": tokenizers[0].quantizer.cost(vectors)}, rel=1e-5)
    assert evaluate_code_cost(make_tokenizer("vqvae", (28, 28), 1), images.held_out) == {}


def test_bits_of_pixels_decide_before_psnr():
    better = {"psnr": 30.0, "pixel_bits_per_dim": 2.1}, {"psnr": 31.0, "pixel_bits_per_dim": 2.2}
    assert TokenizerTask.accepts(None, *better) and not TokenizerTask.accepts(None, *better[::-1])
    assert not TokenizerTask.accepts(None, {"psnr": 30.0}, better[1])  # of a checkpoint without bits
    model = make_tokenizer("vqvae", (28, 28), 1, likelihood={"kind": "discretized_logistic"}).eval()
    held_out = load_images(DataConfig(source="digits", limit=20)).held_out
    images = held_out.batch(range(20))
    bits = -model.pixel_log_prob(images, model.encode(images)).mean().item() / 784 / math.log(2)
    assert evaluate_pixel_bits(model, held_out) == pytest.approx({"pixel_bits_per_dim": bits}, rel=1e-5)
