"""`smalti encode` with `data.streaming`: its rows, columns, processes, kills, bad images and refusals.

Covers: pipelines/encode_stream.py, and the summaries of pipelines/columns.py.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from folders import contents
from givens.images import KINDS, encoded, identities, noise, rows_of, write_shards, write_tar
from kills import Attempt
from launch import losses, output_of, start, train_prior, train_tokenizer, two_processes
from processes import printed_in, start_ranks
from ranks import Several
from small import make_tokenizer

from pipelines import encode, encode_stream
from pipelines.commands import verify
from pipelines.config import UserError
from pipelines.encode import EncodeConfig, run
from pipelines.images import load_images
from pipelines.job import work_folder
from pipelines.tokens import TokenDataset, load_tokens
from tokenizer import Tokenizer

AUGMENT = {"augment": {"shift": 2, "flip": True}}
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog", "eel"]),
        "age": datasets.Value("float64"),
        "turn": datasets.Value("float64"),
        "view": datasets.Value("string"),
        "tags": datasets.List(datasets.Value("string")),
        "point": datasets.List(datasets.Value("float32")),
        "text": datasets.Value("string"),
    }
)
ATTRIBUTES: dict[str, Any] = {
    "age": "age",
    "turn": {"kind": "angle"},
    "view": "view",
    "tags": "tags",
    "point": {"kind": "vector"},
    "text": {"encoder": "ngrams:8"},
}


def write_columns(path: Path, numbers: list[int], **changes: Any) -> Path:
    """Write a parquet file with the images of `rows_of` at `numbers`, and columns that depend on these."""
    table = {
        "image": [{"bytes": encoded(noise(12, 12, seed=k)), "path": None} for k in numbers],
        "label": [k % 3 for k in numbers],
        "age": [k + 0.25 if k % 5 else None for k in numbers],
        "turn": [400.0 * k for k in numbers],
        "view": [f"view {k % 4}" if k % 7 else None for k in numbers],
        "tags": [[name for name, every in (("odd", 2), ("third", 3)) if k % every == 0] for k in numbers],
        "point": [[k / 8] * 6 for k in numbers],
        "text": [f"number {k}" for k in numbers],
    }
    features = datasets.Features({name: changes.get(f"{name}_type", kind) for name, kind in FEATURES.items()})
    table |= {name: value for name, value in changes.items() if name in table}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(datasets.Dataset.from_dict(table, features=features).data.table, path, row_group_size=3)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    make_tokenizer("vqvae", (12, 12), 1).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """60 training images in six files of unequal size with columns, and 15 test images in two."""
    folder = tmp_path_factory.mktemp("source")
    for number, part in enumerate(np.split(np.arange(60), [3, 20, 21, 40, 44])):
        write_columns(folder / f"train-{number:05d}-of-00006.parquet", part.tolist())
    for number, part in enumerate(np.split(np.arange(60, 75), [4])):
        write_columns(folder / f"test-{number:05d}-of-00002.parquet", part.tolist())
    return folder


def config(tokenizer: Path, out: Path, source: Path, *, data: dict[str, Any] | None = None, **options: Any) -> Any:
    settings = {"source": str(source), "image_size": 12, "streaming": True, "validation_fraction": 0.2, **(data or {})}
    return EncodeConfig(tokenizer=str(tokenizer), out=str(out), data=settings, **{"batch_size": 4, **options})


def encoded_stream(*arguments: Any, **options: Any) -> TokenDataset:
    return load_tokens(run(config(*arguments, **options)))


def run_together(monkeypatch: pytest.MonkeyPatch, count: int, settings: EncodeConfig) -> list[list[str]]:
    """Run an encode in `count` threads; return the files that each wrote."""
    several, files = Several(count), [list[str]() for _ in range(count)]
    real = encode_stream.write_shard

    def write_shard(path: Path, *given: Any) -> None:
        files[several.side.rank].append(path.name)
        real(path, *given)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "build_accelerator", several.accelerator)
        patch.setattr(encode, "group_of", several.group_of)
        patch.setattr(encode_stream, "write_shard", write_shard)
        several.run(lambda: run(settings))
    return files


# Rows


def test_rows_are_those_of_a_copy(tokenizer, source, tmp_path):
    """Of the test split, which both take whole; and all of the training split, in the order of the shards."""
    streamed = encoded_stream(tokenizer, tmp_path / "streamed", source, attributes=ATTRIBUTES)
    copied = encoded_stream(tokenizer, tmp_path / "copied", source, data={"streaming": False}, attributes=ATTRIBUTES)
    test, copy = streamed.splits["test"], copied.splits["test"]
    assert torch.equal(test.tokens, copy.tokens) and len(test.tokens.unique()) > 4
    model = Tokenizer.from_pretrained(tokenizer)
    images = torch.from_numpy(np.stack([noise(12, 12, seed=k) for k in range(75)]))[:, None]
    expected = model.encode(images / 127.5 - 1)
    shards = json.loads((tmp_path / "streamed" / "meta.json").read_text())["splits"]
    assert sorted(shards["train"] + shards["validation"]) == [1, 3, 4, 16, 17, 19] and shards["test"] == [4, 11]
    assert len(shards["validation"]) == 1 and "train-00000-of-00005.safetensors" in contents(tmp_path / "streamed")
    found = {name: split.tokens.long() for name, split in streamed.splits.items()}
    assert torch.equal(found["test"], expected[60:])
    seen = [k for name in ("train", "validation") for k in which(found[name], expected)]
    assert sorted(seen) == list(range(60)) and [k for k in seen if k not in which(found["validation"], expected)] == (
        which(found["train"], expected)
    )
    for name in ("train", "validation", "test"):
        numbers, given = which(found[name], expected), streamed.splits[name].given[:]
        assert given.raw("label").tolist() == [k % 3 for k in numbers]
        age = torch.tensor([k + 0.25 if k % 5 else torch.nan for k in numbers])
        assert torch.equal(given.raw("age")[:, 0].nan_to_num(-1), age.nan_to_num(-1))
        assert given.raw("turn")[:, 0].tolist() == [400 * k % 360 for k in numbers]
        assert given.raw("view").tolist() == [k % 4 if k % 7 else -1 for k in numbers]
        assert given.raw("tags").tolist() == [[float(k % 2 == 0), float(k % 3 == 0)] for k in numbers]
        assert given.raw("point").tolist() == [[k / 8] * 6 for k in numbers]
    assert torch.equal(test.given.raw("text")[:], copy.given.raw("text")[:])
    assert streamed.columns["view"] == copied.columns["view"] and streamed.columns["turn"] == copied.columns["turn"]
    assert streamed.class_names == ["cat", "dog", "eel"] and streamed.condition_sources == copied.condition_sources
    known = [k + 0.25 for k in which(found["train"], expected) if k % 5]
    age = streamed.columns["age"]
    assert np.allclose([age.mean, age.std], [[np.mean(known)], [np.std(known)]], rtol=1e-12)
    assert (age.low, age.high) == ([min(known)], [max(known)])
    points = [k / 8 for k in which(found["train"], expected)]
    assert np.isclose(streamed.columns["point"].scale, np.sqrt(np.mean(np.square(points))))
    assert streamed.frequencies.tables
    verify.main([f"folder={tmp_path / 'streamed'}"])


def which(tokens: torch.Tensor, expected: torch.Tensor) -> list[int]:
    """Return which images the tokens are of."""
    known = {tuple(row.flatten().tolist()): number for number, row in enumerate(expected)}
    assert len(known) == len(expected)
    return [known[tuple(row.flatten().tolist())] for row in tokens]


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_both_kinds_give_the_images_and_classes(tokenizer, tmp_path, kind):
    write_shards(tmp_path / "data", kind, rows_of(60), 5)
    data = encoded_stream(tokenizer, tmp_path / "tokens", tmp_path / "data")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 36, "validation": 12, "test": 12}
    assert data.class_names == ["0", "1", "2"] and data.source["splits"]["unit"] == "shard"
    splits = load_images(config(tokenizer, "", tmp_path / "data").data, inherited=None)  # up to 2,000 of each
    model = Tokenizer.from_pretrained(tokenizer)
    for name, part in {"train": splits.train, "validation": splits.validation, "test": splits.held_out}.items():
        tokens = model.encode(part.batch(np.arange(len(part))))
        pairs = sorted(zip(tokens.flatten(1).tolist(), part.labels.tolist(), strict=True))
        split = data.splits[name]
        assert pairs == sorted(zip(split.tokens.long().flatten(1).tolist(), split.given.raw("label").tolist(), strict=True))


def test_columns_of_a_tar_are_keys_of_its_json(tokenizer, tmp_path, capsys):
    for number in range(3):
        rows = [(key, data, json.dumps({"age": int(key), "label": "ab"[int(key) % 2]})) for key, data, _ in rows_of(9)]
        write_tar(tmp_path / "data" / f"train-{number}.tar", rows[3 * number : 3 * number + 3], label="json")
    data = encoded_stream(tokenizer, tmp_path / "tokens", tmp_path / "data", attributes={"age": "age", "none": {}})
    assert data.class_names == ["a", "b"]
    ages, labels = (data.splits["train"].given.raw(name)[:] for name in ("age", "label"))
    assert torch.equal(ages[:, 0] % 2, labels.float())


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_augmentations_depend_on_shard_row_and_draw_alone(tokenizer, source, tmp_path, batch_size):
    options = {"augmentations": 2, "data": AUGMENT, "seed": 3}
    data = encoded_stream(tokenizer, tmp_path / "one", source, **options)
    again = encoded_stream(tokenizer, tmp_path / "again", source, **{**options, "batch_size": batch_size})
    assert data.augmentations == 2 and [len(split) for split in data.splits.values()][2] == 15
    for name, split in data.splits.items():
        assert torch.equal(split.tokens, again.splits[name].tokens)
    plain = encoded_stream(tokenizer, tmp_path / "plain", source)
    sizes = json.loads((tmp_path / "plain" / "meta.json").read_text())["splits"]["train"]
    parts = data.splits["train"].tokens.split([3 * size for size in sizes])
    for part, unchanged in zip(parts, plain.splits["train"].tokens.split(sizes), strict=True):
        first, second, third = part.chunk(3)
        assert torch.equal(first, unchanged) and not torch.equal(second, third)
    # In another file of the same name, after other rows and in another place among the files.
    other = encoded_stream(tokenizer, tmp_path / "seed", source, **{**options, "seed": 4})
    assert not torch.equal(other.splits["train"].tokens, data.splits["train"].tokens)


def test_added_shards_and_bad_images_change_no_augmentation(tokenizer, tmp_path):
    rows = rows_of(40)
    options = {"augmentations": 1, "data": {**AUGMENT, "on_error": "skip", "max_bad_fraction": 0.5}}
    write_shards(tmp_path / "data", "parquet", rows[:20], 4)
    write_shards(tmp_path / "data", "parquet", rows[20:30], 1, split="test")
    found = {}
    for name in ("before", "after"):
        data = encoded_stream(tokenizer, tmp_path / name, tmp_path / "data", **options)
        parts = [path for path in sorted((tmp_path / name).glob("train*"))]
        found[name] = {
            tuple(row.flatten().tolist()): other.flatten().tolist()
            for path in parts
            for row, other in zip(*torch.chunk(tokens_of(path), 2), strict=True)
        }
        broken = [(key, b"no image" if number == 1 else data, label) for number, (key, data, label) in enumerate(rows[:5])]
        write_shards(tmp_path / "new", "parquet", broken, 1)
        (tmp_path / "new" / "train-00000-of-00001.parquet").rename(tmp_path / "data" / "train-00000-of-00004.parquet")
        write_shards(tmp_path / "more", "parquet", rows[30:], 1)
        (tmp_path / "more" / "train-00000-of-00001.parquet").rename(tmp_path / "data" / "train-0-first.parquet")
        assert data.augmentations == 1
    common = found["before"].keys() & found["after"].keys()
    assert len(common) >= 14 and all(found["before"][key] == found["after"][key] for key in common)


def tokens_of(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(path)["tokens"].long()
