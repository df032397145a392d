"""Streams of images from shards: shares of processes, held-out shards, and damaged ones.

Covers: pipelines/images/streaming.py.
"""

from __future__ import annotations

import functools
import gc
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from givens.images import KINDS, identities, load, rows_of, write_parquet, write_shards, write_tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launch import losses, output_of, start, tokenizer_arguments, train_tokenizer, two_processes
from servers.fake_hub import DatasetHandler, serve

from pipelines.commands import reconstruct
from pipelines.config import UserError
from pipelines.images import DataConfig, load_images, streaming

stream = functools.partial(load, streaming=True)
ROWS = rows_of(20)


def stream_config(source: Path, **options: Any) -> DataConfig:
    return DataConfig(**{"source": str(source), "image_size": 12, "streaming": True, **options})


def take(train: Any, batches: int, size: int = 4, first: int = 0, part: slice = slice(None)) -> list[int]:
    """Return which images come in `batches` steps of `size`, of which this process gets a part."""
    found = list[int]()
    for step in range(first, first + batches):
        indices, epochs = train.samples(size, 0, step)
        found += identities(train.raw_batch(indices[part], epochs[part], 0)[0])
    return found


@pytest.mark.parametrize(("kind", "world"), [("tar", 1), ("parquet", 2), ("tar", 3)])
def test_processes_together_see_every_image_once_an_epoch(tmp_path, monkeypatch, kind, world):
    """With eight shards, a multiple of two processes but not of three."""
    write_shards(tmp_path, kind, rows_of(48), 8)
    write_shards(tmp_path, kind, rows_of(4), 1, split="test")
    found = list[int]()
    for rank in range(world):
        group = SimpleNamespace(
            is_initialized=lambda: True, get_rank=lambda rank=rank: rank, get_world_size=lambda: world
        )
        monkeypatch.setattr(streaming, "dist", group)
        train = stream(tmp_path, shuffle_window=10, validation_fraction=0).train
        share = 4 // world if 4 % world == 0 else 1
        found += take(train, 48 // world // share, share * world, part=slice(rank * share, (rank + 1) * share))
    assert sorted(found) == list(range(48)) and found[:8] != list(range(8))


def test_each_epoch_and_a_resumed_run_have_new_orders(tmp_path, capsys):
    write_shards(tmp_path, "tar", rows_of(40), 4)
    write_shards(tmp_path, "tar", rows_of(4), 1, split="test")
    one, other, resumed = (stream(tmp_path, validation_fraction=0, augment={"flip": True}).train for _ in range(3))
    assert capsys.readouterr().err.count("data.streaming: ") == 3
    first, second = take(one, 10), take(one, 10, first=10)
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    assert take(resumed, 10, first=10) not in (first, second)
    indices, epochs = other.samples(40, 0, 0)
    pixels, changes = other.raw_batch(indices, epochs, 5)
    assert identities(pixels) == first and 0 < changes[:, 0].sum() < 40  # the seed decides the start


def test_a_stream_has_no_random_access(tmp_path):
    write_shards(tmp_path, "parquet", rows_of(40), 4)
    train = stream(tmp_path).train
    take(train, 2)
    for act in (lambda: train.pixels([3]), lambda: len(train), lambda: train.names([0])):
        with pytest.raises(UserError, match="^data.streaming: .*data.streaming=false"):
            act()
    assert len(take(train, 1, first=2)) == 4
    first = train.examples(8, 0)
    assert torch.equal(first, train.examples(8, 0)) and first.shape == (8, 1, 12, 12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    labels=st.lists(st.integers(0, 99), min_size=2, max_size=20),
    shards=st.integers(1, 4),
)
def test_shards_give_the_rows_that_were_written(tmp_path_factory, kind, labels, shards):
    rows = [(key, data, label) for (key, data, _), label in zip(ROWS, labels, strict=False)]
    folder = write_shards(tmp_path_factory.mktemp("shards"), kind, rows, min(shards, len(rows)))
    files = sorted(map(str, folder.glob("*")))
    found = [(sample["data"], int(sample["label"])) for sample in streaming.read_shards(files, stream_config(folder))]
    assert found == [(data, label) for _, data, label in rows]


# Held-out shards


@pytest.mark.parametrize("kind", KINDS)
def test_whole_shards_are_held_out(tmp_path, kind):
    write_shards(tmp_path, kind, rows_of(60), 12)
    splits = stream(tmp_path, validation_fraction=0.2, held_out_fraction=0.2)
    parts = {n: identities(p.pixels(range(len(p)))) for n, p in splits.by_name().items() if n != "train"}
    for name, part in parts.items():
        assert len(part) == 10 and set(Counter(k // 5 for k in part).values()) == {5}
        assert splits.by_name()[name].labels.tolist() == [k % 3 for k in part]
    assert sorted(take(splits.train, 10) + parts["validation"] + parts["held_out"]) == list(range(60))
    held_out = stream(tmp_path, held_out_fraction=0.2, validation_fraction=0).held_out
    assert sorted(identities(held_out.pixels(range(10)))) == sorted(parts["held_out"])
    with pytest.raises(UserError, match=r"^data.streaming: .* 1 shards"):
        stream(next(tmp_path.glob(f"train-00000*.{kind}")))


def test_without_training_the_first_images_have_random_access(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streaming, "MOST", 20)
    write_shards(tmp_path, "tar", rows_of(60), 4)
    splits = load_images(stream(tmp_path).train.config)
    assert len(splits.train) == 20 and len(splits.held_out) == 15
    assert splits.train.labels.tolist() == [k % 3 for k in identities(splits.train.pixels(range(20)))]
    assert "including train" in capsys.readouterr().err


def test_shards_with_different_classes_are_refused(tmp_path):
    """Otherwise one label would mean several classes."""
    for split in ("train", "test"):
        write_shards(tmp_path, "parquet", rows_of(20, 2), 2, split=split, names=["cat", "dog"])
    assert load_images(stream_config(tmp_path)).train.class_names == ["cat", "dog"]
    for name in ("train-00001-of-00002", "test-00001-of-00002"):
        path = tmp_path / f"{name}.parquet"
        before = path.read_bytes()
        write_parquet(path, rows_of(10, 2), names=["dog", "cat"])
        with pytest.raises(UserError, match=f"^data.label_column: {path}"):
            load_images(stream_config(tmp_path))
        gc.collect()  # frees the frames, which ends the threads of `datasets`
        assert len(load_images(stream_config(tmp_path, label_column=None)).held_out) == 20
        path.write_bytes(before)


# Damaged and remote shards


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [False, True])
def test_a_truncated_shard_ends_the_run(tmp_path, kind, copied):
    write_shards(tmp_path, kind, rows_of(20), 2)
    write_shards(tmp_path, kind, rows_of(4), 1, split="test")
    path = tmp_path / f"train-00001-of-00002.{kind}"
    data = path.read_bytes()
    for cut in (len(data) // 2 // 512 * 512, len(data) - (9 if kind == "parquet" else 10_240)):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError) as caught:
            train = stream(tmp_path, on_error="skip", validation_fraction=0, streaming=not copied).train
            take(train, 5)
        assert "\n" not in str(caught.value) and (copied or str(path) in str(caught.value))
        del caught
        gc.collect()  # frees the frames, which ends the threads of `datasets`


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_on_a_server_is_read(tmp_path, kind, monkeypatch):
    """As a copy; a single file is too few for a stream, so its reader is called directly."""
    (write_tar if kind == "tar" else write_parquet)(tmp_path / "hub/me/shards/main" / f"a.{kind}", rows_of(20))
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
    with serve(tmp_path / "hub") as server:
        server.RequestHandlerClass, url = DatasetHandler, f"{server.url}/me/shards/resolve/main"
        train = load(f"{url}/a.{kind}", streaming=False).train
        assert identities(train.pixels(range(18))) == train._positions.tolist() and train.labels is not None
        found = list(
            streaming.read_shards(
                [f"{url}/a.{kind}"], stream(write_shards(tmp_path / "b", kind, rows_of(4), 2)).train.config
            )
        )
        assert [sample["data"] for sample in found] == [data for _, data, _ in rows_of(20)]
        with pytest.raises(UserError, match=f"^data.source: {url}/none.{kind} cannot be read: "):
            load(f"{url}/none.{kind}")


# Training


def options_with_bad_shards(folder: Path, kind: str, **more: Any) -> dict[str, Any]:
    """Training options for 60 images in three shards, of which 3, 6, 9 and 10 are bad, and 20 test images."""
    write_shards(folder, kind, rows_of(20), 1, split="test")
    bad = (3, 6, 9, 10)
    rows = [(key, b"not an image" if k in bad else data, label) for k, (key, data, label) in enumerate(rows_of(60))]
    write_shards(folder, kind, rows, 3)
    data = {"source": str(folder), "streaming": True, "image_size": 12, "limit": 60, "shuffle_window": 15}
    data |= {"on_error": "skip", "max_bad_fraction": 0.1}
    return {**{f"data__{name}": value for name, value in data.items()}, **more}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_is_trained_on_a_stream_and_continued(tmp_path, kind):
    options = options_with_bad_shards(tmp_path / "data", kind, train__save_every=4, train__batch_size=8)
    run = train_tokenizer(tmp_path / "run", train__steps=8, **options)
    lines = [json.loads(line) for line in (run / "bad_images.jsonl").read_text().splitlines()]
    assert len({line["path"] for line in lines}) == 4
    train_tokenizer(run, train__steps=12, **options)
    assert len(losses(run)) == 12 and np.isfinite(losses(run)).all()
    reconstruct.main([f"tokenizer={run}/tokenizer", f"out={tmp_path}/looks.png"])
    assert (tmp_path / "looks.png").is_file()


@pytest.mark.slow
def test_two_processes_train_on_a_stream(tmp_path):
    options = options_with_bad_shards(tmp_path / "data", "tar", train__steps=6, train__evaluate_every=3)
    argv = tokenizer_arguments(tmp_path / "run", **options)
    printed = output_of(start(two_processes("train_tokenizer", argv), HF_HOME=str(tmp_path / "home")))
    assert "2 processes" in printed and len(losses(tmp_path / "run")) == 6
