"""Bad images in shards, which are met when they are due; and training on shards, threads and processes included."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from givens.image_files import KINDS, identities, load, noise, rows_of, write_shards, write_tar
from launch import (
    assert_equal_tensors,
    exact,
    losses,
    output_of,
    start,
    tensors,
    tokenizer_arguments,
    train_tokenizer,
    two_processes,
)
from one_process import begin_anew
from small import make_tokenizer

from pipelines.config import UserError
from pipelines.images import to_float
from pipelines.images.bad import REPORT, read_report
from pipelines.train_tokenizer import TokenizerTask

pytestmark = pytest.mark.usefixtures("one_process")

TEXT = b"this is not an image"

# Bad images


def damaged(rows, *which):
    return [(key, TEXT if k in which else data, label) for k, (key, data, label) in enumerate(rows)]


def bad_shards(folder: Path, kind: str) -> Path:
    """60 images in 3 classes, of which 3, 6, 9 and 10 are bad."""
    write_shards(folder, kind, rows_of(20), 1, split="test")
    return write_shards(folder, kind, damaged(rows_of(60), 3, 6, 9, 10), 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_is_replaced_by_the_next_good_one_of_its_class(tmp_path, kind, capsys):
    train = load(bad_shards(tmp_path, kind), on_error="skip").train
    expected = list(range(60))
    for bad, good in ((3, 12), (6, 12), (9, 12), (10, 13)):
        expected[bad] = good
    for order in (range(60), [10, 9, 3, 6], [9, 9, 10]):  # what was met before makes no difference
        fresh = load(tmp_path, on_error="skip").train
        assert identities(fresh.pixels(order)) == [expected[k] for k in order]
        assert identities(fresh.pixels(order)) == [expected[k] for k in order]
    assert all(k % 3 == train.labels[j] for j, k in enumerate(expected))
    capsys.readouterr()
    train.pixels(range(60))
    shard = tmp_path / f"train-00000-of-00003.{kind}"
    called = {k: f"{shard}: " + (f"{k:05d}.png" if kind == "tar" else f"row {k}") for k in (3, 6, 9, 10, 12, 13)}
    found = [(p.path, p.row, p.replaced_by) for p in sorted(train.report.problems, key=lambda p: p.row)]
    assert found == [(called[b], b, called[g]) for b, g in ((3, 12), (6, 12), (9, 12), (10, 13))]
    assert all("not an image" in problem.reason for problem in train.report.problems)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and called[3] in warning


def test_the_last_of_a_class_goes_round_and_a_class_of_bad_ones_ends(tmp_path):
    write_tar(tmp_path / "train.tar", damaged(rows_of(60), 57, 59, *range(1, 60, 3)))
    write_tar(tmp_path / "test.tar", rows_of(3))
    train = load(tmp_path, on_error="skip", max_bad_fraction=0.5).train
    assert identities(train.pixels([57, 59])) == [0, 2]
    with pytest.raises(UserError, match=r"00001\.png: not an image.*no other image of its class"):
        train.pixels([1])


def test_a_bad_image_ends_the_run_by_default(tmp_path):
    train = load(bad_shards(tmp_path, "tar")).train
    assert identities(train.pixels([0, 1, 2])) == [0, 1, 2]
    with pytest.raises(UserError, match=r"train-00000-of-00003\.tar: 00003\.png: not an image.*data\.on_error=skip"):
        train.pixels([4, 3])


def test_too_many_bad_images_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.images.streamed.FEW", 30)
    options = {"on_error": "skip", "max_bad_fraction": 0.1}
    train = load(bad_shards(tmp_path, "parquet"), **options).train
    train.pixels([3, 6, 9])  # three of thirty
    with pytest.raises(UserError, match=r"4 of \d+ images so far.*max_bad_fraction=0.1(.|\n)*row 3: not an image"):
        train.pixels([10])
    train = load(tmp_path, **options).train
    train.pixels(range(11, 60))
    train.pixels([3, 6, 9, 10])  # four of more than forty
    assert train.report.found >= 53 and train.report.bad == 4


def test_the_report_has_each_bad_image_once(tmp_path):
    data = bad_shards(tmp_path / "data", "tar")
    for _ in range(2):  # as two processes, or two lives of a run
        splits = load(data, on_error="skip")
        splits.train.pixels(range(20))
        splits.write_report(tmp_path)
        splits.train.pixels(range(60))
        splits.write_report(tmp_path)
    lines = read_report(tmp_path)
    assert sorted(line["row"] for line in lines) == [3, 6, 9, 10]
    assert all(set(line) == {"split", "path", "row", "reason", "replaced_by"} for line in lines)
    assert json.loads((tmp_path / REPORT).read_text().splitlines()[0])["split"] == "train"


def test_bad_found_beforehand_are_reported_too(tmp_path):
    """Of a run that reads all images first: the same file, from the first process alone."""
    data = bad_shards(tmp_path / "data", "parquet")
    options = {
        "data__source": str(data),
        "data__image_size": 12,
        "data__limit": 60,
        "train__steps": 2,
        "data__on_error": "skip",
        "data__max_bad_fraction": 0.1,
    }
    run = train_tokenizer(tmp_path / "run", **options)
    lines = read_report(run)
    assert [(line["row"], line["replaced_by"]) for line in lines] == [(3, None), (6, None), (9, None), (10, None)]
    assert lines[0]["path"].startswith("row 3 of train") and lines[0]["reason"].startswith("not an image")


def test_a_token_dataset_is_encoded_from_shards(tmp_path):
    """Each row has the tokens of its image, or of the one that stands in for it, and the label of both."""
    from pipelines.encode import EncodeConfig
    from pipelines.encode import run as encode
    from pipelines.tokens import load_tokens

    tokenizer = make_tokenizer("vqvae", (12, 12), 1).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = {
        "source": str(bad_shards(tmp_path / "data", "tar")),
        "streaming": True,
        "image_size": 12,
        "on_error": "skip",
    }
    folder = encode(
        EncodeConfig(tokenizer=str(tmp_path / "tokenizer"), out=str(tmp_path / "t"), data=data, batch_size=7)
    )
    split, expected = load_tokens(folder).splits["train"], list(range(60))
    for bad, good in ((3, 12), (6, 12), (9, 12), (10, 13)):
        expected[bad] = good
    images = to_float(torch.from_numpy(np.stack([noise(1, 12, 12, seed=k) for k in expected])))
    found = torch.as_tensor(np.asarray(split.tokens[:])).long()
    assert torch.equal(found, tokenizer.encode(images)) and len(found.unique()) > 1
    assert torch.as_tensor(np.asarray(split.labels[:])).tolist() == [k % 3 for k in range(60)]


# Training


def streamed_options(data: Path, **more: Any) -> dict[str, Any]:
    return {
        "data__source": str(data),
        "data__streaming": True,
        "data__image_size": 12,
        "data__limit": 60,
        "data__shuffle_window": 15,
        "data__augment__rotate": 8,
        **more,
    }


def test_training_does_not_depend_on_the_threads_nor_on_being_resumed(tmp_path, monkeypatch):
    data = bad_shards(tmp_path / "data", "tar")
    options = streamed_options(data, data__on_error="skip", train__steps=9, train__save_every=4)
    whole = train_tokenizer(tmp_path / "whole", **options)
    assert len(set(losses(whole))) == 9 and len(read_report(whole)) == 4
    for workers in (1, 4):
        for module in ("images.dataset", "images.shards.reader"):
            monkeypatch.setattr(f"pipelines.{module}.WORKERS", workers)
        run = tmp_path / f"workers{workers}"
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(TokenizerTask, "loss", interrupted(TokenizerTask.loss, step=6 if workers > 1 else 99))
            begin_anew()
            train_tokenizer(run, **options)
        begin_anew()
        train_tokenizer(run, **options)  # goes on from step 4
        assert exact(run) == exact(whole)
        assert_equal_tensors(tensors(run / "tokenizer"), tensors(whole / "tokenizer"))


def interrupted(loss: Any, step: int) -> Any:
    """The loss, but for Ctrl-C at a step."""

    def interrupt(task: TokenizerTask, player: str, batch: Any, now: int) -> Any:
        if now == step:
            raise KeyboardInterrupt
        return loss(task, player, batch, now)

    return interrupt


@pytest.mark.slow
def test_two_processes_meet_bad_images_and_end(tmp_path):
    """Both really run; the one that meets a bad image does not leave the other waiting."""
    data = bad_shards(tmp_path / "data", "tar")
    options = streamed_options(data, train__steps=6, train__evaluate_every=3)
    argv = tokenizer_arguments(tmp_path / "run", **options, data__on_error="skip")
    printed = output_of(start(two_processes("train_tokenizer", argv), HF_HOME=str(tmp_path / "home")))
    assert "2 processes" in printed
    assert sorted(line["row"] for line in read_report(tmp_path / "run")) == [3, 6, 9, 10]
    alone = train_tokenizer(tmp_path / "alone", **options, data__on_error="skip")
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), rel=1e-4)


@pytest.mark.slow
def test_two_processes_end_when_one_meets_a_bad_image(tmp_path):
    data = bad_shards(tmp_path / "data", "tar")
    argv = tokenizer_arguments(tmp_path / "run", **streamed_options(data, train__steps=50), train__timeout=20)
    printed = output_of(start(two_processes("train_tokenizer", argv), HF_HOME=str(tmp_path / "home")), 120, code=None)
    assert re.search(r"error.*train-00000-of-00003\.tar: 000\d\d\.png: not an image", printed), printed


def test_bad_images_are_looked_at_once_however_many_there_are(tmp_path, monkeypatch):
    """Each of a batch among thousands of bad ones would else try them all again."""
    rows = rows_of(60, classes=0)
    train = load(write_tar(tmp_path / "a.tar", damaged(rows, *range(50))), on_error="skip", max_bad_fraction=1).train
    tried: list[int] = []
    decoded = train._decoded
    monkeypatch.setattr(train, "_decoded", lambda indices: tried.extend(indices.tolist()) or decoded(indices))
    bad = [k for k, position in enumerate(train._positions.tolist()) if position < 50]
    assert len(set(identities(train.pixels(bad)))) == 1
    assert max(tried.count(k) for k in bad) <= 2  # when it was due, and as a replacement for an earlier one
