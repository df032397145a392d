"""Training with columns of conditions: batches, dropout, what the prior learns, and starting from other columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from givens.token_datasets import COLUMNS, make_conditioned, same_rows
from launch import (
    COMMON,
    arguments,
    dotted,
    losses,
    output_of,
    prior_arguments,
    start,
    train_prior,
    two_processes,
)
from one_process import one_process
from tiny_task import assert_same_run, killed_at

from pipelines import ImagePipeline
from pipelines import train_prior as verb
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.metrics.likelihood import bits_per_token
from pipelines.metrics.pairs import condition_picture
from pipelines.tokens import load_tokens
from pipelines.train_prior import PriorTask, TrainPriorConfig
from pipelines.training.optimizers import make_optimizer
from prior.objectives import alignment_loss

pytestmark = pytest.mark.usefixtures("one_process")

GPT = {"kind": "gpt", "dim": 32, "depth": 2, "heads": 2, "condition_width": 32}


@pytest.fixture(scope="module")
def data():
    return make_conditioned(rows=4096)


def config_of(**more):
    argv = arguments({"out": "run", "tokens": "tokens", "model": GPT, **COMMON, **dotted(more)})
    return parse(TrainPriorConfig, argv, verb="train_prior", description=None)


def task_of(data, monkeypatch, **more):
    monkeypatch.setattr(verb, "load_tokens", lambda *_, **__: data)
    return PriorTask(config_of(**more))


def nulls_of(task, rows, epochs, seed=0):
    """bool (B, columns): where each column, the label first, is null, and which rows have them all."""
    whole, given = task.train_split.given[rows], task.batch(rows, epochs, seed)[1]
    null = {name: column.is_null(given.raw(name)) for name, column in task.data.columns.items()}
    had = [~column.is_null(whole.raw(name)) for name, column in task.data.columns.items()]
    assert all(torch.equal(given.raw(name)[~null[name]], whole.raw(name)[~null[name]]) for name in null)
    return torch.stack(list(null.values()), 1), torch.stack(had).all(0)


def test_all_are_dropped_together_and_each_alone(data, monkeypatch):
    task = task_of(data, monkeypatch, label_dropout=0.2, condition_dropout=0.3)
    rows = np.arange(4096)
    null, had = nulls_of(task, rows, rows * 0)
    null = null[had].double()
    together = null.all(1)
    assert float(together.double().mean()) == pytest.approx(0.2, abs=0.03)  # 0.8 * 0.3^6 is nothing
    alone = null[~together]
    assert alone.mean(0).tolist() == pytest.approx([0.3] * 6, abs=0.03)
    pairs = np.cov(alone.T.numpy())
    assert np.abs(pairs - np.diag(np.diag(pairs))).max() < 0.02  # each independently of the others
    plain, _ = nulls_of(task_of(only_labels(data), monkeypatch, label_dropout=0.2), rows, rows * 0)
    assert plain.shape[1] == 1 and bool(together[plain[had, 0]].all())  # the same rows as without columns
    assert float(plain.double().mean()) == pytest.approx(0.2, abs=0.03)


def only_labels(data):
    return data.of_columns({"label": data.columns["label"]})


def test_dropout_depends_on_seed_epoch_row_and_name_only(data, monkeypatch):
    task = task_of(data, monkeypatch, condition_dropout=0.5)
    rows, epochs = np.arange(300), np.arange(300) % 3
    whole, _ = nulls_of(task, rows, epochs)
    some = np.array([200, 3, 77])
    assert torch.equal(nulls_of(task, some, epochs[some])[0], whole[some])
    fewer = task_of(data, monkeypatch, condition_dropout=0.5, attributes=["outline", "age"])
    expected = whole[:, [0, 1 + COLUMNS.index("outline"), 1 + COLUMNS.index("age")]]
    assert torch.equal(nulls_of(fewer, rows, epochs)[0], expected)
    for other in (nulls_of(task, rows, epochs + 1), nulls_of(task, rows, epochs, seed=1)):
        assert 0.3 < float((other[0] != whole).double().mean()) < 0.6


def test_columns_are_chosen_by_name(data, monkeypatch):
    _, given = task_of(data, monkeypatch, attributes=[]).batch(np.arange(4), np.zeros(4, np.int64), 0)
    assert list(given.columns) == ["label"]
    _, given = (bare := task_of(data, monkeypatch, label_dropout=1.0)).batch(np.arange(4), np.zeros(4, np.int64), 0)
    assert (bare.model.columns, given.columns, given.rows) == ({}, {}, {})
    with pytest.raises(UserError, match="attributes: unknown column 'aeg'; did you mean 'age'.*outline"):
        task_of(data, monkeypatch, attributes=["aeg"])


def fit(task, steps, batch=128, lr=5e-3):
    """Train without the loop; return the task."""
    task.model.train()
    settings = config_of(train__weight_decay=0.0).train
    optimizer = make_optimizer(list(task.model.parameters()), {}, set(), settings, settings.betas, False)
    for group in optimizer.param_groups:
        group["lr"] = lr
    for step in range(steps):
        indices, epochs = task.samples(batch, 0, step)
        loss, _ = task.loss("model", task.batch(indices, epochs, 0), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    task.model.eval()
    return task


def test_training_listens_to_every_column(data, monkeypatch):
    """Bits per token with all conditions are clearly fewer than without any; each column is worth some."""
    torch.manual_seed(0)
    task = fit(task_of(data, monkeypatch), 100, lr=1e-2)
    test = task.eval_splits["held_out"]
    with_all = task.evaluate(task.model, "held_out")["bits_per_token"]
    assert with_all == bits_per_token(task.model, test)
    without = bits_per_token(task.model, replace(test, given=test.given.without()))
    assert with_all < 0.6 * without, (with_all, without)
    for name in COLUMNS:
        fewer = replace(test, given=test.given.without([name]))
        assert bits_per_token(task.model, fewer) > with_all + 0.02, name


# Runs


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    with one_process():
        folder = tmp_path_factory.mktemp("columns") / "tokens"
        make_conditioned(rows=96).save(folder)
        return folder


RUN = {"model": GPT, "train__save_every": 4, "train__steps": 8}


def test_a_run_with_columns_is_resumed_saved_and_loaded(tokens, tmp_path):
    whole = train_prior(tmp_path / "whole", tokens, **RUN)
    with killed_at(6):
        train_prior(tmp_path / "run", tokens, **RUN)
    run = train_prior(tmp_path / "run", tokens, **RUN)
    assert_same_run(run, whole)
    pipe = ImagePipeline.from_pretrained(run / "pipeline")
    assert tuple(pipe.columns) == ("label", *COLUMNS) and list(pipe.condition_tokenizers) == ["outline"]
    test = load_tokens(tokens).splits["test"]
    assert pipe.provenance["prior"]["evaluation"]["bits_per_token"] == pytest.approx(
        bits_per_token(pipe.prior, test), abs=1e-6
    )


def test_a_picture_shows_samples_below_the_grids_that_they_follow(data, monkeypatch):
    """Samples differ with the condition, and only if it does."""
    task = task_of(data, monkeypatch)
    torch.manual_seed(0)
    torch.nn.init.normal_(task.model.condition_encoder.vectors["column_age"].second.weight)
    torch.nn.init.normal_(task.model.head.weight)  # so that an untrained prior listens
    picture, split = task.preview(task.model)["samples"], data.splits["test"]
    cell = picture.shape[0] // 6
    other = replace(split, given=split.given.with_rows(age=split.given.raw("age").flip(0)))
    changed = condition_picture(task.pipeline(task.model), other)
    assert np.array_equal(picture[:cell], changed[:cell]) and not np.array_equal(picture, changed)


def test_a_class_prior_continues_with_columns_and_says_what_is_new(tokens, tmp_path, capsys):
    first = train_prior(tmp_path / "first", tokens, **RUN, attributes=[]) / "pipeline"
    capsys.readouterr()
    run = train_prior(tmp_path / "second", tokens, **{**RUN, "train__steps": 1, "train__lr": 1e-12}, init=str(first))
    assert "new columns, which start without effect: view, tags, age, text, outline" in capsys.readouterr().out
    before, after = (ImagePipeline.from_pretrained(folder).prior for folder in (first, run / "pipeline"))
    test = load_tokens(tokens).splits["test"]
    bare = test.of_columns(before.columns)
    assert bits_per_token(after, test) == pytest.approx(bits_per_token(before, bare), abs=1e-5)


def test_cca_contrasts_labels_and_leaves_columns_as_they_are(tokens, tmp_path):
    first = train_prior(tmp_path / "first", tokens, **RUN) / "pipeline"
    more = {**RUN, "init": str(first), "objective": "cca"}
    argv = [prior_arguments(tmp_path / "second", tokens, **each) for each in (more, RUN)]
    task, plain = (PriorTask(parse(TrainPriorConfig, each, verb="", description=None)) for each in argv)
    ids, given, others = batch = task.batch(np.arange(20), np.zeros(20, np.int64), 0)
    assert same_rows(given, plain.batch(np.arange(20), np.zeros(20, np.int64), 0)[1])
    torch.nn.init.normal_(task.model.class_embedding.weight)  # now the priors differ
    with torch.no_grad():
        loss, _ = task.loss("model", batch, 0)
    before = ImagePipeline.from_pretrained(first).prior
    gains = [
        task.model.log_prob(ids, condition=condition) - before.log_prob(ids, condition=condition)
        for condition in (given, given.with_rows(label=others))
    ]
    weight = task.data.num_classes
    wanted = alignment_loss(*gains, (given.raw("label") >= 0).float(), 0.5, weight) / weight
    assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("sharded", "columns"), [(False, None), (True, None), (True, ["outline"])])
def test_two_processes_train_as_one_does(tokens, tmp_path, sharded, columns):
    settings = {**RUN, "attributes": columns}
    one = train_prior(tmp_path / "one", tokens, **settings)
    argv = prior_arguments(tmp_path / "two", tokens, **settings)
    more = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if sharded else {}
    output_of(start(two_processes("train_prior", argv), **more))
    for name in ("loss", "held_out/bits_per_token"):
        assert losses(tmp_path / "two", name) == pytest.approx(losses(one, name), rel=1e-4)
