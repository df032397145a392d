"""The training loop, on runs of a second: how it ends, what it leaves on disk, and that every model trains.

Covers: pipelines/train_tokenizer.py, pipelines/training/losses.py,
pipelines/training/saving.py, pipelines/training/starting.py, pipelines/training/state.py, pipelines/training/task.py.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from folders import contents
from givens.image_files import write_pictures
from givens.streams import streams_of
from launch import (
    EMA,
    GPT,
    VQVAE,
    assert_equal_tensors,
    exact,
    losses,
    make_tokens,
    metrics,
    states,
    tensors,
    train_prior,
    train_tokenizer,
)
from one_process import one_process
from PIL import Image
from safetensors.torch import load_file
from small import PRIORS, QUANTIZERS, TOKENIZERS, make_tokenizer, node_of

from pipelines import ImagePipeline, encode
from pipelines.config import UserError
from pipelines.images import DataConfig, load_images
from pipelines.metrics.likelihood import bits_per_token
from pipelines.metrics.reconstruction import evaluate_reconstruction
from pipelines.shuffling import samples_of
from pipelines.tokens import load_tokens
from pipelines.train_tokenizer import TokenizerTask, TrainTokenizerConfig
from pipelines.training import loop as training
from pipelines.training.loop import figures_on
from pipelines.training.schedule import TrainConfig
from pipelines.training.task import Task
from tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_process")

# The data's order


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_shares_the_same_batches(processes, accumulate):
    task: Any = Task()
    task.rows, task.batch = 50, lambda indices, epochs, seed: (indices, epochs, seed)
    config = TrainConfig(batch_size=24, accumulate=accumulate, seed=5)
    streams = streams_of(task, config, 7, processes)
    for step in range(7, 20):
        parts = [next(stream) for stream in streams]
        laid_out = [part for micro in zip(*parts, strict=True) for part in micro]  # micro-batch by micro-batch
        indices, epochs = samples_of(50, 24, 5, step)
        assert (np.concatenate([part[0] for part in laid_out]) == indices).all()
        assert (np.concatenate([part[1] for part in laid_out]) == epochs).all()
        assert {part[2] for part in laid_out} == {5}
    for stream in streams:
        stream.close()


def test_augmentation_may_be_for_the_prior_alone(tmp_path):
    """Then the tokenizer learns from images as they are, to the bit; `encode` finds what makes its copies."""
    augment = {"data__augment__flip": True, "data__augment__rotate": 9}
    plain = train_tokenizer(tmp_path / "plain")
    kept = train_tokenizer(tmp_path / "kept", augmented=False, **augment)
    moved = train_tokenizer(tmp_path / "moved", **augment)
    assert exact(kept) == exact(plain) != exact(moved)
    encode.main([f"tokenizer={kept / 'tokenizer'}", f"out={tmp_path / 'tokens'}", "augmentations=2"])
    assert len(load_tokens(tmp_path / "tokens").splits["train"]) == 3 * 72


@pytest.mark.parametrize("streaming", [False, True])
def test_images_travel_as_bytes_and_are_those_of_their_epochs(tmp_path, streaming):
    """Whatever makes the batch and wherever it becomes floats, the images are those of (seed, epoch, index)."""
    write_pictures(tmp_path / "images", 30)
    augment = {"flip": True, "shift": 2, "rotate": 9, "zoom": 0.1}
    data = DataConfig(source=str(tmp_path / "images"), image_size=8, augment=augment, streaming=streaming)
    task = TokenizerTask(TrainTokenizerConfig(out=str(tmp_path / "run"), data=data, model={**VQVAE, "widths": [8]}))
    (stream,) = streams_of(task, TrainConfig(batch_size=16, accumulate=2, seed=3), 0, 1)
    several = False
    for step in range(5):
        indices, epochs = task.samples(16, 3, step)
        raw = task.batch(indices, epochs, 3)
        assert raw[0].dtype == torch.uint8 and raw[0].shape == (16, 1, 8, 8) and sum(p.nbytes for p in raw) < 16 * 90
        parts = zip(indices.tolist(), epochs.tolist(), strict=True)
        alone = torch.cat([task.images.train.batch([i], seed=3, epoch=e, augment=True) for i, e in parts])
        assert torch.equal(torch.cat([images for (images,) in next(stream)]), alone)
        several |= len(set(epochs)) > 1
    assert several
    stream.close()


def test_what_prepares_batches_ends_with_the_run(tmp_path, monkeypatch):
    """At most two batches ahead of the step that failed, and no thread is left."""
    made, batch, loss = [], TokenizerTask.batch, TokenizerTask.loss

    def failing(task, player, images, step):
        if step == 3:
            raise UserError("the fourth step")
        return loss(task, player, images, step)

    monkeypatch.setattr(TokenizerTask, "loss", failing)
    monkeypatch.setattr(TokenizerTask, "batch", lambda *given: made.append(1) or batch(*given))
    with pytest.raises(UserError, match="the fourth step") as caught:
        train_tokenizer(tmp_path / "run")
    assert caught.tb and 4 <= len(made) <= 6  # the frames, and with them the stream, are still there
    before = len(made)
    time.sleep(0.05)
    assert len(made) == before and not [t for t in threading.enumerate() if t.name.startswith("ahead")]


# The end


def test_minutes_end_a_run(tmp_path):
    began = time.monotonic()
    run = train_tokenizer(tmp_path / "run", train__steps=None, train__minutes=0.02, train__final_lr=0.25)
    last = metrics(run)[-1]
    assert 0.02 <= last["minutes"] < 0.2 and time.monotonic() - began < 30 and last["step"] > 2
    assert last["learning_rate"] == pytest.approx(2e-3 * 0.25)  # the cosine has come to its end
    assert states(run)[-1].name == f"step-{last['step']:08d}" and "held_out/psnr" in last
    before = contents(run)
    train_tokenizer(tmp_path / "run", train__steps=None, train__minutes=0.02, train__final_lr=0.25)
    assert contents(run) == before


def test_steps_end_a_run_before_its_minutes(tmp_path):
    assert metrics(train_tokenizer(tmp_path / "run", train__minutes=5.0))[-1]["step"] == 12


def test_an_end_is_needed(tmp_path):
    with pytest.raises(UserError, match="train.minutes"):
        train_tokenizer(tmp_path / "run", train__steps=None)
    assert not (tmp_path / "run").exists()


# What a run leaves


EVERY = {"train__log_every": 2, "train__evaluate_every": 4, "train__preview_every": 6, "train__save_every": 5}
KEYS = {"learning_rate", "images_per_second", "tokens_per_second", "minutes", "skipped_steps", "gradient_norm", "loss"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokens) -> dict[str, Path]:
    """A finished run of each stage."""
    folder = tmp_path_factory.mktemp("runs")
    with one_process():
        return {
            "tokenizer": train_tokenizer(folder / "tokenizer", charts=True, **EVERY),
            "prior": train_prior(folder / "prior", tokens, **EVERY, sampler__guidance_scale=1.5),
        }


@pytest.mark.parametrize(
    ("stage", "own", "held_out"),
    [
        (
            "tokenizer",
            {"l1", "l2", "commitment", "codebook_usage", "codebook_perplexity", "codebook_dead"},
            {"psnr", "l1", "l2", "codebook_usage", "codebook_perplexity"},
        ),
        ("prior", {"bits_per_token"}, {"bits_per_token"}),
    ],
)
def test_metrics(runs, stage, own, held_out):
    lines = metrics(runs[stage])
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    for line in lines:
        evaluated = {f"validation/{name}" for name in held_out} if line["step"] in (4, 8, 12) else set()
        evaluated |= {f"held_out/{name}" for name in held_out} if line["step"] == 12 else set()
        assert set(line) == {"step"} | KEYS | own | evaluated
        assert all(math.isfinite(value) for value in line.values())
    if stage == "tokenizer":
        assert all(0 < line["codebook_usage"] <= 1 <= line["codebook_perplexity"] <= 16 for line in lines)
    else:
        assert all(line["bits_per_token"] == pytest.approx(line["loss"] / math.log(2)) for line in lines)
    assert all(line["tokens_per_second"] == pytest.approx(49 * line["images_per_second"]) for line in lines)
    rates = [line["learning_rate"] for line in lines]
    peak = {"tokenizer": 2e-3, "prior": 4e-3}[stage]
    assert rates[0] == pytest.approx(peak * 3 / 4) and rates[-1] == pytest.approx(0.02 * peak)


def test_a_line_is_the_mean_of_its_steps(tmp_path, runs):
    every = losses(train_tokenizer(tmp_path / "run"))
    assert losses(runs["tokenizer"]) == pytest.approx([(a + b) / 2 for a, b in zip(every[::2], every[1::2])])  # noqa: B905


@pytest.mark.parametrize(
    ("stage", "name", "size"),
    [("tokenizer", "reconstructions", 400), ("tokenizer", "codebook", 400), ("prior", "samples", 80)],
)
def test_previews_are_pictures(runs, stage, name, size):
    previews = sorted((runs[stage] / "previews").glob(f"{name}-*"))
    assert [path.name for path in previews] == [f"{name}-{step:08d}.png" for step in (0, 6, 12)]
    for path in previews:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.mode in ("L", "RGB")
            assert size <= image.width <= 2000 and 100 <= image.height <= 2000
            assert np.asarray(image).std() > 5
    assert previews[0].read_bytes() != previews[-1].read_bytes()


def test_the_tokenizer_that_is_saved_is_the_one_that_was_evaluated(runs):
    run = runs["tokenizer"]
    saved = Tokenizer.from_pretrained(run / "tokenizer")
    found = evaluate_reconstruction(saved, load_images(DataConfig(limit=72)).held_out)
    last = metrics(run)[-1]
    assert {f"held_out/{name}": value for name, value in found.items()} == {
        key: value for key, value in last.items() if key.startswith("held_out/")
    }
    average = load_file(states(run)[-1] / "ema.safetensors")
    assert_equal_tensors(
        {f"module.tokenizer.{k}": v for k, v in sorted(saved.state_dict().items())},
        {k: v for k, v in sorted(average.items()) if k.startswith("module.tokenizer.")},
    )
    facts = json.loads((run / "tokenizer" / "provenance.json").read_text())
    assert facts["tokenizer"]["steps"] == 12 and facts["data"]["limit"] == 72
    validated = {f"validation_{name}": last[f"validation/{name}"] for name in found}
    assert facts["tokenizer"]["evaluation"] == found | validated and facts["tokenizer"]["best_step"] == 12
    assert facts["tokenizer"]["images"] == {"validation": 72, "held_out": 72}


def test_the_pipeline_that_is_saved_is_the_one_that_was_evaluated(runs, tokens):
    run = runs["prior"]
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    found = bits_per_token(pipe.prior, load_tokens(tokens).splits["test"])
    assert found == metrics(run)[-1]["held_out/bits_per_token"]
    average = load_file(states(run)[-1] / "ema.safetensors")
    assert_equal_tensors(
        {f"module.{k}": v for k, v in sorted(pipe.prior.state_dict().items())},
        {k: v for k, v in sorted(average.items()) if k != "n_averaged"},
    )
    assert pipe.tokenizer.fingerprint() == load_tokens(tokens).tokenizer.fingerprint()
    assert len(pipe(num_images=2, labels=["class 1", "class 2"], seed=0, progress=False).images) == 2


def test_a_finished_run_started_again_does_nothing(runs, tokens, monkeypatch, capsys):
    before = {stage: contents(run) for stage, run in runs.items()}
    monkeypatch.setattr(training, "take_step", lambda *_: pytest.fail("a step was taken"))
    train_tokenizer(runs["tokenizer"], **EVERY)
    train_prior(runs["prior"], tokens, **EVERY, sampler__guidance_scale=1.5)
    assert {stage: contents(run) for stage, run in runs.items()} == before
    printed = capsys.readouterr().out
    assert printed.count("already finished: 12 steps in ") == 2 and "continuing" not in printed


def test_a_folder_of_another_configuration_is_refused(runs, tokens):
    before = {stage: contents(run) for stage, run in runs.items()}
    with pytest.raises(UserError, match="nothing was overwritten") as error:
        train_tokenizer(runs["tokenizer"], **EVERY, train__lr=1e-3, model={**VQVAE, "quantizer": {**EMA, "codes": 8}})
    lines = str(error.value).splitlines()
    assert lines[1:] == ["model.quantizer.codes: 16 -> 8", "train.lr: 0.002 -> 0.001"]
    with pytest.raises(UserError, match=r"sampler.guidance_scale: 1.5 -> 1.0"):
        train_prior(runs["prior"], tokens, **EVERY)
    with pytest.raises(UserError, match="another configuration"):  # the other stage
        train_prior(runs["tokenizer"], tokens, **EVERY)
    assert {stage: contents(run) for stage, run in runs.items()} == before


def test_tracking_may_change(runs):
    before = contents(runs["tokenizer"])
    train_tokenizer(runs["tokenizer"], **EVERY, track__name="another", track__project="elsewhere")
    after = contents(runs["tokenizer"])
    assert {name for name in after if after[name] != before.get(name)} == {"config.yaml"}
    train_tokenizer(runs["tokenizer"], **EVERY)


def test_a_run_folder_may_be_moved(tmp_path):
    train_tokenizer(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    before = contents(tmp_path / "there")
    train_tokenizer(tmp_path / "there")
    after = contents(tmp_path / "there")
    assert {name for name in after if after[name] != before.get(name)} <= {"config.yaml"}


@pytest.mark.parametrize("text", ["", "out: [1", "just text"])
def test_a_damaged_configuration_is_refused(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "run"))):
        train_tokenizer(tmp_path / "run")
    assert contents(tmp_path / "run") == {"config.yaml": text.encode()}


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train.batch_size: 16 is not a multiple of processes x accumulate \(1 x 3\)"):
        train_tokenizer(tmp_path / "run", train__accumulate=3)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [2**31, 2**53])
def test_any_seed_will_do(tmp_path, tokens, seed):
    small = losses(train_prior(tmp_path / "small", tokens, train__steps=2))
    large = losses(train_prior(tmp_path / "large", tokens, train__steps=2, train__seed=seed))
    assert small != large


# Every model


def test_tiny_runs_learn(tmp_path, tokens):
    first = losses(train_tokenizer(tmp_path / "tokenizer", train__steps=30))
    second = losses(train_prior(tmp_path / "prior", tokens, train__steps=60))
    assert np.mean(first[-3:]) < 0.6 * np.mean(first[:3])
    assert np.mean(second[-3:]) < 0.7 * np.mean(second[:3])


def test_two_runs_are_the_same_run(tmp_path, tokens):
    model = {**GPT, "dropout": 0.2, "attention_dropout": 0.1}
    one, two = (train_prior(tmp_path / name, tokens, model=model) for name in ("one", "two"))
    assert exact(one) == exact(two)
    assert_equal_tensors(tensors(states(two)[-1]), tensors(states(one)[-1]))


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_trains(tmp_path, tokens, name):
    if name == "next_scale":
        tokens = make_tokens(tmp_path / "tokens", quantizer=node_of("multiscale"))
    run = train_prior(tmp_path / "run", tokens, model=node_of(name), train__steps=3, train__save_every=2)
    assert len(losses(run)) == 3 and all(map(math.isfinite, losses(run)))
    assert not metrics(run)[-1]["skipped_steps"]
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    held_out = bits_per_token(pipe.prior, load_tokens(tokens).splits["test"])
    assert pipe.prior.name == name and held_out == metrics(run)[-1]["held_out/bits_per_token"]


def trained(name: str) -> bool:
    return any(parameter.requires_grad for parameter in make_tokenizer(name, (28, 28), 1).parameters())


def start_of(name: str, folder: Path) -> dict[str, str]:
    """What a tokenizer that is made of another one starts from."""
    return {"init": str(train_tokenizer(folder, model=node_of("klvae")) / "tokenizer")} if name == "posthoc" else {}


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if trained(name)])
def test_every_tokenizer_trains(tmp_path, name):
    run = train_tokenizer(tmp_path / "run", model=node_of(name), train__steps=3, train__save_every=2)
    assert len(losses(run)) == 3 and all(map(math.isfinite, losses(run)))
    assert Tokenizer.from_pretrained(run / "tokenizer").name == name


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if not trained(name)])
def test_every_tokenizer_without_parameters_is_saved_without_a_step(tmp_path, monkeypatch, name):
    start = start_of(name, tmp_path / "start")
    monkeypatch.setattr(training, "take_step", lambda *_: pytest.fail("a step was taken"))
    run = train_tokenizer(tmp_path / "run", model=node_of(name), **start)
    assert [line["step"] for line in metrics(run)] == [0] and math.isfinite(metrics(run)[0]["held_out/psnr"])
    assert Tokenizer.from_pretrained(run / "tokenizer").name == name
    before = contents(run)
    assert train_tokenizer(tmp_path / "run", model=node_of(name), **start) == run and contents(run) == before


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_trains(tmp_path, name):
    run = train_tokenizer(tmp_path / "run", model={**VQVAE, "quantizer": node_of(name)}, train__steps=3)
    assert len(losses(run)) == 3 and all(map(math.isfinite, losses(run)))


# Evaluation


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("cpu", False)])
def test_evaluation_has_the_precision_of_training_on_a_gpu_alone(device, expected):
    """On a CPU, where bfloat16 is no faster, figures are those of float32."""
    now: list[bool] = []

    @contextmanager
    def autocast() -> Iterator[None]:
        now.append(True)
        yield
        now.pop()

    accelerator = SimpleNamespace(device=torch.device(device), autocast=autocast)
    task = SimpleNamespace(evaluate=lambda model, split: {"mixed": float(bool(now)), split: model})
    run: Any = SimpleNamespace(accelerator=accelerator, task=task)
    model: Any = 1.0
    assert figures_on(run, model, "held_out") == {"mixed": float(expected), "held_out": 1.0} and not now
