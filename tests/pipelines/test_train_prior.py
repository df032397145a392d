"""The task of stage two: its batches and its evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from launch import make_tokens, prior_arguments, train_prior

from pipelines import ImagePipeline
from pipelines.config.command import parse
from pipelines.metrics.likelihood import bits_per_token
from pipelines.train_prior import PriorTask, TrainPriorConfig

pytestmark = pytest.mark.usefixtures("one_process")


def task_of(tokens, run, **more):
    argv = prior_arguments(run, tokens, **more)
    return PriorTask(parse(TrainPriorConfig, argv, verb="train_prior", description=None))


def test_perturbed_tokens_are_a_function_of_seed_epoch_and_row(tmp_path):
    tokens = make_tokens(tmp_path / "tokens", rows=2000)
    rows, zeros = np.arange(2000), np.zeros(2000, np.int64)
    clean, given = task_of(tokens, tmp_path / "a").batch(rows, zeros, 0)
    task = task_of(tokens, tmp_path / "b", perturb=0.3)
    whole, same = task.batch(rows, zeros, 0)
    assert torch.equal(given.raw("label"), same.raw("label")) and whole.dtype == torch.int64
    vocab = task.data.grid.vocab_size
    task.data.grid.check(whole)
    changed = float((whole != clean).double().mean())
    assert changed == pytest.approx(0.3 * (1 - 1 / vocab), abs=0.005)
    ids = torch.bincount(whole[whole != clean], minlength=vocab).double()
    assert (ids / ids.sum()).max() < 2.5 / vocab  # uniform, whatever the tokens are
    parts = torch.cat([task.batch(part, zeros[: len(part)], 0)[0] for part in np.array_split(rows, 7)])
    assert torch.equal(parts, whole)
    assert torch.equal(task.batch(rows[::-1].copy(), zeros, 0)[0].flip(0), whole)
    epochs = np.arange(2000) % 3
    mixed = task.batch(rows, epochs, 0)[0]
    for epoch in range(3):
        alone = task.batch(rows, zeros + epoch, 0)[0]
        assert torch.equal(mixed[epochs == epoch], alone[epochs == epoch])
        assert (epoch == 0) == torch.equal(alone, whole)
    assert not torch.equal(task.batch(rows, zeros, 1)[0], whole)


def test_an_evaluation_uses_clean_tokens(tmp_path, tokens):
    task = task_of(tokens, tmp_path / "run", perturb=1.0)
    clean = bits_per_token(task.model.eval(), task.data.splits["test"], 2000)
    assert task.evaluate(task.model.eval(), "held_out") == {"bits_per_token": clean}


def test_a_pipeline_records_the_tokens_of_its_prior(tmp_path, monkeypatch):
    make_tokens(tmp_path / "tokens")
    monkeypatch.chdir(tmp_path)
    task = task_of("tokens", tmp_path / "run")
    task.save(task.model, tmp_path / "run", {}, {"samples": np.zeros((8, 8, 3), np.uint8)})
    pipe = ImagePipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.provenance["tokens"] == str(tmp_path / "tokens")


def test_a_prior_of_many_passes_is_evaluated_on_fewer_rows(tmp_path, monkeypatch, tokens):
    """The number of tokens over all passes is limited; a prior of one pass is evaluated on all rows."""
    passes, model = 4, {"kind": "masked", "exact": False, "bound_passes": 4, "dim": 16, "depth": 1, "heads": 2}
    monkeypatch.setattr("pipelines.metrics.likelihood.EVALUATED_TOKENS", 10 * passes * 49 + 48)
    task = task_of(tokens, tmp_path / "run", model=model)
    assert task.evaluated == {"held_out": 10, "validation": 10}
    sizes, log_prob = [], task.model.log_prob
    task.model.log_prob = lambda rows, *rest, **more: (sizes.append(len(rows)), log_prob(rows, *rest, **more))[1]
    found = task.evaluate(task.model.eval(), "held_out")
    assert sizes == [10] and found["bits_per_token"] == bits_per_token(task.model, task.data.splits["test"], 10)
    assert task_of(tokens, tmp_path / "other").evaluated == {"held_out": 24, "validation": 24}


def labels_of(tokens, rows, epochs, tmp_path, seed=0, **more):
    task = task_of(tokens, tmp_path / "run", **more)
    given = task.batch(np.asarray(rows), np.asarray(epochs), seed)[1]
    return given.raw("label"), task.train_split.given.raw("label")


def test_labels_are_dropped_by_seed_epoch_and_row(tmp_path):
    tokens = make_tokens(tmp_path / "tokens", rows=4000)
    rows, zeros = np.arange(4000), np.zeros(4000, np.int64)
    found, labels = labels_of(tokens, rows, zeros, tmp_path, label_dropout=0.3)
    dropped = found < 0
    assert abs(float(dropped.float().mean()) - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    assert torch.equal(found[~dropped], labels[~dropped])
    some = np.array([7, 3999, 0, 12])
    alone, _ = labels_of(tokens, some, zeros[:4], tmp_path, label_dropout=0.3)
    assert torch.equal(alone, found[some])
    for other in ({"epochs": zeros + 1}, {"epochs": zeros, "seed": 1}):
        differs, _ = labels_of(tokens, rows, tmp_path=tmp_path, label_dropout=0.3, **other)
        assert 0.3 < float(((differs < 0) != (found < 0)).float().mean()) < 0.54  # independent: 2 x 0.3 x 0.7


def test_a_prior_trained_without_labels_has_no_classes(tmp_path, tokens):
    """It is evaluated, saved and sampled without class embeddings, which would be untrained."""
    run = train_prior(tmp_path / "run", tokens, label_dropout=1.0, train__steps=3)
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    assert (pipe.prior.num_classes, pipe.labels) == (0, [])
    task = task_of(tokens, tmp_path / "again", label_dropout=1.0)
    rows, given = task.eval_splits["held_out"].tokens[:].long(), task.eval_splits["held_out"].given
    pipe.prior.eval()
    bits = -float(pipe.prior.log_prob(rows).detach().double().mean()) / (math.log(2) * len(pipe.prior.grid))
    assert given.names == () and task.evaluate(pipe.prior, "held_out")["bits_per_token"] == pytest.approx(
        bits, abs=1e-6
    )
    assert len(pipe(num_images=2, seed=0, progress=False).images) == 2


def test_rows_of_a_dataset_without_labels_have_the_null_class(tmp_path):
    tokens = make_tokens(tmp_path / "tokens", classes=0)
    _, given = task_of(tokens, tmp_path / "task", label_dropout=0.3).batch(np.arange(3), np.zeros(3, np.int64), 0)
    assert (len(given), given.columns) == (3, {})
    run = train_prior(tmp_path / "run", tokens, sampler__guidance_scale=1.5, train__steps=3)
    assert ImagePipeline.from_pretrained(run / "pipeline")(num_images=1, seed=0, progress=False).images
