"""`init=PIPELINE`, which starts stage two from a trained prior, and `objective=cca`, which makes guidance unnecessary.

Covers: pipelines/train_prior.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from givens.token_datasets import same_rows
from launch import (
    COMMON,
    GPT,
    arguments,
    assert_equal_tensors,
    dotted,
    losses,
    make_tokens,
    metrics,
    output_of,
    prior_arguments,
    start,
    states,
    train_prior,
    two_processes,
)
from one_process import one_process
from tiny_task import assert_same_run, killed_at, read_checkpoint, stopped_at

from pipelines import ImagePipeline
from pipelines import train_prior as verb
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.tokens import load_tokens
from pipelines.train_prior import PriorTask, TrainPriorConfig

pytestmark = pytest.mark.usefixtures("one_process")

CCA = {"objective": "cca", "train__lr": 2e-3, "cca__beta": 0.1, "train__steps": 8}
RUN = {**CCA, "train__save_every": 4, "train__ema_decay": 0.0}


def command(out, tokens, init, **more):
    return arguments({"out": str(out), "tokens": str(tokens), "init": str(init), **COMMON, **dotted(more)})


def resolved(out, tokens, init, **more):
    """The configuration of a command line, with defaults of the pipeline `init`."""
    argv = command(out, tokens, init, **more)
    return parse(TrainPriorConfig, argv, verb="train_prior", description=None, defaults=verb.defaults)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A token dataset, and the pipeline of a prior trained on it."""
    with one_process():
        folder = tmp_path_factory.mktemp("made")
        tokens = make_tokens(folder / "tokens")
        return tokens, train_prior(folder / "run", tokens, sampler__guidance_scale=2.0, train__steps=20) / "pipeline"


def task_of(made, out, **more):
    tokens, init = made
    return PriorTask(resolved(out, tokens, init, **more))


def test_model_and_weights_are_those_of_the_pipeline(made, tmp_path):
    """Settings that affect training only may differ."""
    tokens, init = made
    config = resolved(tmp_path / "run", tokens, init)
    assert {key: config.model[key] for key in GPT} == GPT and config.objective is None
    task, before = PriorTask(config), ImagePipeline.from_pretrained(init).prior
    assert_equal_tensors(task.model.state_dict(), before.state_dict())
    assert task.init == {"source": str(init), "fingerprint": before.fingerprint()}
    assert task_of(made, tmp_path / "run", model__dropout=0.3).model.config.dropout == 0.3


def test_a_pipeline_that_does_not_fit_is_refused_in_a_line(made, tmp_path):
    tokens, init = made
    torch.manual_seed(123)
    other, run = make_tokens(tmp_path / "other"), tmp_path / "run"
    cases = {
        "another tokenizer": (other, {}),
        "model.dim: 32 there, 16 here": (tokens, {"model__dim": 16}),
        "model.order: 'raster' there, 'snake' here": (tokens, {"model__order": "snake"}),
    }
    for message, (source, more) in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            verb.run(resolved(run, source, init, **more))
        assert "\n" not in str(caught.value) and not (run / "config.json").exists()


# Alignment


def untrained(folder, tokens, **more):
    """Save a pipeline with an untrained prior."""
    task = PriorTask(parse(TrainPriorConfig, prior_arguments(folder, tokens, **more), verb="", description=None))
    task.pipeline(task.model).save_pretrained(folder)
    return folder


def test_cca_refuses_what_it_cannot_align(made, tmp_path):
    tokens, init = made
    masked = {"kind": "masked", "dim": 16, "depth": 1, "heads": 2}
    bound = untrained(tmp_path / "bound", tokens, model={**masked, "exact": False, "bound_passes": 4})
    bare = make_tokens(tmp_path / "bare", classes=0)
    cases = {
        r"'masked' takes 49 passes": (tokens, untrained(tmp_path / "whole", tokens, model=masked)),
        r"'masked' is an estimate": (tokens, bound),
        r"needs labels of two classes or more \(got 0\)": (bare, untrained(tmp_path / "nameless", bare)),
    }
    for message, pair in cases.items():
        with pytest.raises(UserError, match=f"objective: cca .*{message}") as caught:
            task_of(pair, tmp_path / "run", objective="cca")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="^init: missing"):
        train_prior(tmp_path / "run", tokens, objective="cca")


def test_the_wrong_label_is_a_function_of_seed_epoch_and_row(made, tmp_path):
    """It is never the image's own."""
    task = task_of(made, tmp_path / "run", objective="cca")
    rows, zeros = np.arange(72), np.zeros(72, np.int64)
    tokens, given, others = task.batch(rows, zeros, 0)
    own = task.train_split.given.raw("label")
    clean = task_of(made, tmp_path / "run").batch(rows, zeros, 0)
    assert torch.equal(tokens, clean[0]) and same_rows(given, clean[1]) and (given.raw("label") < 0).any()
    assert not (others == own).any() and others.dtype == torch.int64
    some = np.array([70, 3, 41])
    assert torch.equal(task.batch(some, zeros[:3], 0)[2], others[some])
    assert not torch.equal(task.batch(rows, zeros + 1, 0)[2], others)
    assert not torch.equal(task.batch(rows, zeros, 1)[2], others)


@pytest.fixture(scope="module")
def aligned(made, tmp_path_factory):
    """A run of eight steps."""
    with one_process():
        out = tmp_path_factory.mktemp("aligned") / "run"
        return verb.run(resolved(out, *made, **RUN))


def test_images_become_likelier_under_their_own_labels_than_under_others(made, aligned):
    lines = [line for line in metrics(aligned) if "cca" in line]
    # Before the first step both models are equal: each term is log 2, times 3 for the negatives of labelled images.
    assert math.log(2) < lines[0]["cca"] <= 4 * math.log(2) + 1e-6 and lines[0]["margin"] == 0 == lines[0]["above"]
    assert lines[0]["loss"] == pytest.approx(lines[0]["cca"] / 3)
    assert lines[-1]["cca"] < lines[0]["cca"] and lines[-1]["margin"] > 1 and lines[-1]["above"] > 0.9
    assert all(0 < line["bits_per_token"] < 4.1 for line in lines)
    data = load_tokens(made[0]).splits["test"]
    gains = []
    own = data.given.raw("label")
    for labels in (own, (own + 1) % 3):
        priors = [ImagePipeline.from_pretrained(folder).prior for folder in (aligned / "pipeline", made[1])]
        after, before = (prior.log_prob(data.tokens.long(), labels).detach() for prior in priors)
        gains.append(float((after - before).mean()))
    assert gains[0] > gains[1] + 1


def test_the_result_is_an_unguided_pipeline_with_provenance(made, aligned):
    """Checkpoints hold nothing of the frozen prior."""
    pipe, before = ImagePipeline.from_pretrained(aligned / "pipeline"), ImagePipeline.from_pretrained(made[1])
    assert before.sampler.guidance_scale == 2 and pipe.sampler.guidance_scale == 1
    facts = pipe.provenance["prior"]
    assert facts["objective"] == "cca" and facts["init"] == {
        "source": str(made[1]),
        "fingerprint": before.prior.fingerprint(),
    }
    assert "best_step" not in facts  # bits do not rank aligned weights
    names = set(read_checkpoint(states(aligned)[-1]))
    assert names and not any("frozen" in name or "reference" in name for name in names)


def test_a_resumed_run_equals_an_uninterrupted_one(made, aligned, tmp_path):
    with stopped_at(3):
        verb.run(resolved(tmp_path / "run", *made, **RUN))
    with killed_at(7):
        verb.run(resolved(tmp_path / "run", *made, **RUN))
    verb.run(resolved(tmp_path / "run", *made, **RUN))
    assert_same_run(tmp_path / "run", aligned)


def test_the_loss_is_the_mean_of_those_of_micro_batches(made, tmp_path):
    tasks = [task_of(made, tmp_path / "run", **CCA) for _ in range(2)]
    rows = np.arange(16)
    batch = tasks[0].batch(rows, rows * 0, 0)
    whole, _ = tasks[0].loss("model", batch, 0)
    halves = [tasks[1].loss("model", tuple(part[at] for part in batch), 0)[0] for at in (slice(8), slice(8, 16))]
    assert torch.allclose(sum(halves) / 2, whole)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_as_one_does(made, aligned, tmp_path):
    """Losses agree up to rounding, and nearly in bfloat16."""
    out = tmp_path / "two"
    output_of(start(two_processes("train_prior", command(out, *made, **RUN))))
    for name in ("loss", "cca", "bits_per_token"):
        assert losses(out, name) == pytest.approx(losses(aligned, name), rel=1e-4, abs=1e-4)
    for name in ("margin", "above"):  # a mean over labelled images, of which each process has another number
        assert losses(out, name) == pytest.approx(losses(aligned, name), rel=0.1)
    verb.run(resolved(tmp_path / "bf16", *made, **RUN, train__mixed_precision="bf16"))
    assert losses(tmp_path / "bf16", "margin")[0] == 0  # the frozen prior runs in the same precision
    assert losses(tmp_path / "bf16") == pytest.approx(losses(aligned), rel=0.02)
