"""`smalti encode` with `data.streaming`: its rows, columns, processes, kills, bad images and refusals.

Covers: pipelines/encode_stream.py, pipelines/images/stream_columns.py, and the summaries of pipelines/columns.py.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from folders import contents
from givens.images import encoded, noise, rows_of, write_parquet, write_shards
from launch import losses, train_prior, train_tokenizer
from processes import kill, start_ranks
from ranks import Several
from safetensors.torch import load_file
from small import make_tokenizer

from pipelines import columns, encode, encode_stream
from pipelines.commands import verify
from pipelines.config import UserError
from pipelines.encode import EncodeConfig, run
from pipelines.images import load_images, stream_columns
from pipelines.images.attributes import AttributeSource
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
    assert sorted(seen) == list(range(60))
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


def test_shards_of_tar_give_the_images_and_classes(tokenizer, tmp_path):
    write_shards(tmp_path / "data", "tar", rows_of(60), 5)
    data = encoded_stream(tokenizer, tmp_path / "tokens", tmp_path / "data")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 36, "validation": 12, "test": 12}
    assert data.class_names == ["0", "1", "2"] and data.source["splits"]["unit"] == "shard"
    splits = load_images(config(tokenizer, "", tmp_path / "data").data, inherited=None)  # up to 2,000 of each
    model = Tokenizer.from_pretrained(tokenizer)
    for name, part in {"train": splits.train, "validation": splits.validation, "test": splits.held_out}.items():
        tokens, split = model.encode(part.batch(np.arange(len(part)))), data.splits[name]
        one, other = (tokens, part.labels), (split.tokens.long(), split.given.raw("label"))
        one, other = (sorted(torch.column_stack([ids.flatten(1), of]).tolist()) for ids, of in (one, other))
        assert one == other


def test_augmentations_depend_on_shard_row_and_draw_alone(tokenizer, source, tmp_path, capsys):
    options = {"augmentations": 2, "data": AUGMENT, "seed": 3}
    data = encoded_stream(tokenizer, tmp_path / "one", source, **options)
    again = encoded_stream(tokenizer, tmp_path / "again", source, **{**options, "batch_size": 7})
    assert "75 images, at most 19 in a shard, whose tokens take 0.00205 MB" in capsys.readouterr().out
    assert data.augmentations == 2 and [len(split) for split in data.splits.values()][2] == 15
    for name, split in data.splits.items():
        assert torch.equal(split.tokens, again.splits[name].tokens)
    plain = encoded_stream(tokenizer, tmp_path / "plain", source)
    sizes = json.loads((tmp_path / "plain" / "meta.json").read_text())["splits"]["train"]
    parts = data.splits["train"].tokens.split([3 * size for size in sizes])
    for part, unchanged in zip(parts, plain.splits["train"].tokens.split(sizes), strict=True):
        first, second, third = part.chunk(3)
        assert torch.equal(first, unchanged) and not torch.equal(second, third)
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
        found[name] = {
            tuple(row.flatten().tolist()): other.flatten().tolist()
            for path in sorted((tmp_path / name).glob("train*"))
            for row, other in zip(*load_file(path)["tokens"].long().chunk(2), strict=True)
        }
        assert data.augmentations == 1
        broken = [rows[0], (rows[1][0], b"no image", rows[1][2]), *rows[2:5]]
        write_parquet(tmp_path / "data" / "train-00000-of-00004.parquet", broken)
        write_parquet(tmp_path / "data" / "train-0-first.parquet", rows[30:])
    common = found["before"].keys() & found["after"].keys()
    assert len(common) >= 14 and all(found["before"][key] == found["after"][key] for key in common)


def test_a_shard_of_many_rows_is_summarised_in_parts(tmp_path):
    """Of more rows than are held at a time."""
    path = write_columns(tmp_path / "train-0.parquet", [1] * 1100 + [2] * 100)
    shard = stream_columns.Input("train", str(path), "train.safetensors", 0)
    age = stream_columns.StreamedColumn("age", AttributeSource(), (), "number")
    scan = stream_columns.scan_shard(shard, config(path, path, path).data, [age], ("cat", "dog", "eel"))
    column = stream_columns.join_column(age, [shard], [scan])
    assert scan.images == 1200 > stream_columns.CELLS and list(scan.labels) == [1, 2]
    assert np.allclose([column.mean, column.std], [[1.25 + 1 / 12], [np.sqrt(11) / 12]])
    assert (column.low, column.high) == ([1.25], [2.25])


@pytest.mark.parametrize("option", [{"attributes": {"text": "text"}}, {"data": {"label_column": "text"}}])
def test_more_names_than_a_column_has_are_refused_while_they_are_read(tokenizer, tmp_path, monkeypatch, option):
    for number in range(3):
        write_columns(tmp_path / "data" / f"train-{number}.parquet", [10 * number + k for k in range(6)])
    for module in (stream_columns, columns):
        monkeypatch.setattr(module, "MAX_NAMES", 5)
    with pytest.raises(UserError, match=r"^(attributes.text|data.label_column): .*more than 5 (names|classes)"):
        run(config(tokenizer, tmp_path / "t", tmp_path / "data", **option))


# Processes and kills


def test_any_number_of_processes_writes_the_same_files(tokenizer, source, tmp_path, monkeypatch):
    options = {"augmentations": 1, "data": AUGMENT, "attributes": ATTRIBUTES}
    for world in (1, 2, 3):
        settings = config(tokenizer, tmp_path / str(world), source, batch_size=2**world, **options)
        files = run_together(monkeypatch, world, settings)
        assert sorted(len(some) for some in files) == {1: [8], 2: [4, 4], 3: [2, 3, 3]}[world]
        job = ("job.json", "manifest.json")  # which have the batch size
        first, found = ({k: v for k, v in contents(tmp_path / n).items() if k not in job} for n in ("1", str(world)))
        assert first == found


def test_finished_files_are_skipped(tokenizer, source, tmp_path, monkeypatch, capsys):
    """Interrupted in each batch in turn, the command ends with the same bits, and reads no finished shard again."""
    options = {"augmentations": 1, "data": AUGMENT, "attributes": ATTRIBUTES}
    run(config(tokenizer, tmp_path / "whole", source, **options))
    batches, read, real = list[None](), list[str](), encode_stream.StreamedShards._encode_batch
    real_read = stream_columns.read_shards

    def stop(*given: Any) -> Any:
        batches.append(None)
        if len(batches) % 5 == 0:
            raise KeyboardInterrupt
        return real(*given)

    def read_shards(files: list[str], *given: Any, with_images: bool, **options: Any) -> Any:
        read.extend(files if with_images else [])
        return real_read(files, *given, with_images=with_images, **options)

    monkeypatch.setattr(encode_stream.StreamedShards, "_encode_batch", stop)
    monkeypatch.setattr(stream_columns, "read_shards", read_shards)
    attempts, work = 0, work_folder(tmp_path / "parts", "encode")
    while not (tmp_path / "parts").exists():
        done = len(list(work.glob("[tv]*.safetensors")))
        read.clear()
        with suppress(KeyboardInterrupt):
            run(config(tokenizer, tmp_path / "parts", source, batch_size=8, **options))
        attempts += 1
        assert len(set(read)) == len(read) <= 8 - done and attempts < 20
    assert attempts > 2 and "shards are done" in capsys.readouterr().out
    assert tensors(tmp_path / "parts") == tensors(tmp_path / "whole")
    run(config(tokenizer, tmp_path / "parts", source, batch_size=8, **options))
    assert "already finished: 86 train, 17 validation, 15 test rows" in capsys.readouterr().out


def test_killed_processes_are_continued_by_one(tokenizer, tmp_path, capsys):
    """Killed with signal 9 as soon as two files are finished."""
    write_shards(tmp_path / "data", "parquet", rows_of(180) * 2, 12)
    argv = [f"tokenizer={tokenizer}", f"data.source={tmp_path / 'data'}", "data.image_size=12", "data.streaming=true"]
    argv += ["batch_size=2", "data.augment.shift=2", "augmentations=1"]
    work = work_folder(tmp_path / "parts", "encode")
    processes = start_ranks(["-m", "pipelines.encode", *argv, f"out={tmp_path / 'parts'}"], 2, tmp_path / "log")
    while len(list(work.glob("[tv]*.safetensors"))) < 2 and all(process.is_alive() for process in processes):
        time.sleep(0.001)
    for process in processes:
        kill(process)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2
    done = {path.name: path.stat().st_mtime_ns for path in work.glob("[tv]*.safetensors")}
    assert 2 <= len(done) < 12 and not (tmp_path / "parts").exists()
    encode.main([*argv, f"out={tmp_path / 'parts'}"])
    assert f"continuing, {len(done)} of 12 shards are done" in capsys.readouterr().out
    assert {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in done} == done
    encode.main([*argv, f"out={tmp_path / 'whole'}"])
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


# Bad images


def with_bad_images(folder: Path, kind: str, bad: Sequence[int], shards: int = 6) -> Path:
    """Write 60 images of which some are bad, and 10 test images."""
    rows = [(key, b"no image" if k in bad else data, label) for k, (key, data, label) in enumerate(rows_of(60))]
    write_shards(folder, kind, rows_of(10), 1, split="test")
    return write_shards(folder, kind, rows, shards)


def test_bad_images_are_left_out_and_listed(tokenizer, tmp_path, monkeypatch, capsys):
    source = with_bad_images(tmp_path / "data", "tar", [0, 13, 14, *range(20, 30)])  # all of the third shard
    data = {"on_error": "skip", "max_bad_fraction": 0.5, **AUGMENT, "validation_fraction": 0}
    options = {"data": data, "augmentations": 1, "batch_size": 3}
    run(config(tokenizer, tmp_path / "tokens", source, **options))
    assert "13 of 70 images cannot be decoded" in capsys.readouterr().err
    found = load_tokens(tmp_path / "tokens")
    shards = json.loads((tmp_path / "tokens" / "meta.json").read_text())["splits"]
    assert shards == {"train": [18, 16, 0, 20, 20, 20], "test": [10]}
    assert found.splits["train"].given.raw("label")[:9].tolist() == [k % 3 for k in range(1, 10)]
    lines = [json.loads(line) for line in (tmp_path / "tokens" / "bad_images.jsonl").read_text().splitlines()]
    assert [(line["split"], line["row"]) for line in lines] == [("train", k % 10) for k in (0, 13, 14, *range(20, 30))]
    assert lines[0]["path"].startswith(f"{source}/train-00000-of-00006.tar: ") and "not an image" in lines[0]["reason"]
    run_together(monkeypatch, 2, config(tokenizer, tmp_path / "two", source, **options))
    assert contents(tmp_path / "two") == contents(tmp_path / "tokens")
    with pytest.raises(
        UserError, match=r"9 of 70 images cannot be decoded, more than data.max_bad_fraction=0.1 allows"
    ):
        run(config(tokenizer, tmp_path / "few", source, batch_size=2, data={**data, "max_bad_fraction": 0.1}))
    assert len(list(work_folder(tmp_path / "few", "encode").glob("t*"))) == 2  # as soon as it is certain


def test_a_bad_image_ends_the_run_late_and_skipping_continues_it(tokenizer, tmp_path, capsys):
    source = with_bad_images(tmp_path / "data", "parquet", [33])
    data = {"validation_fraction": 0}
    with pytest.raises(UserError) as caught:
        run(config(tokenizer, tmp_path / "tokens", source, data=data))
    assert str(caught.value).startswith(f"{source}/train-00003-of-00006.parquet: row 3: not an image ")
    assert len(list(work_folder(tmp_path / "tokens", "encode").glob("[tv]*.safetensors"))) == 3
    skip = {**data, "on_error": "skip", "max_bad_fraction": 0.1}
    run(config(tokenizer, tmp_path / "tokens", source, data=skip))
    assert "continuing, 3 of 7 shards are done" in capsys.readouterr().out
    run(config(tokenizer, tmp_path / "whole", source, data=skip))
    assert tensors(tmp_path / "tokens") == tensors(tmp_path / "whole")


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows_per_shard": 7}, "rows_per_shard: with data.streaming"),
        ({"data": {"limit": 9}}, "data.limit: with data.streaming"),
        ({"attributes": {"age": {"tokenizer": "TOKENIZER"}}}, "attributes.age: a stream has one image a row"),
        ({"attributes": {"size": {}}}, "attributes: {source}/train-0000"),
        ({"attributes": {"text": {"kind": "number"}}}, "attributes.text: {source}/"),
        ({"data": {"image_column": "picture"}}, "data.image_column: {source}/train-0000"),
    ],
)
def test_what_a_stream_cannot_follow_is_refused_before_the_work(tokenizer, source, tmp_path, options, message):
    options = json.loads(json.dumps(options).replace("TOKENIZER", str(tokenizer)))
    with pytest.raises(UserError) as caught:
        encoded_stream(tokenizer, tmp_path / "tokens", source, **options)
    assert str(caught.value).startswith(message.replace("{source}", str(source))) and "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_type": datasets.ClassLabel(names=["dog", "cat", "eel"])}, "data.label_column: {path} and the first"),
        ({"age_type": datasets.List(datasets.Value("float64")), "age": [[1.0, 2.0]]}, "attributes.age: {path}: 2 num"),
        ({"age_type": datasets.Value("string"), "age": ["old"]}, "attributes.age: {path}: row 0: expected numbers"),
        ({"label": [None]}, "{path}: row 0: no class, unlike other images"),
        ("damaged", "{path}: cannot be read"),
    ],
)
def test_shards_unlike_the_first_are_named(tokenizer, tmp_path, changes, message):
    for number in range(7):
        write_columns(tmp_path / "data" / f"train-{number}.parquet", [number])
    path = tmp_path / "data" / "train-5.parquet"
    if changes == "damaged":
        whole = path.read_bytes()
        path.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    else:
        write_columns(path, [5], **changes)
    settings = config(tokenizer, tmp_path / "tokens", tmp_path / "data", attributes={"age": "age", "view": "view"})
    with pytest.raises(UserError) as caught:
        run(settings)
    assert str(caught.value).startswith(message.replace("{path}", str(path))) and "\n" not in str(caught.value)


def test_either_all_shards_have_labels_or_none(tokenizer, tmp_path):
    for split in ("train", "test"):
        write_shards(tmp_path / "data", "tar", rows_of(9, 3 if split == "test" else 0), 3, split=split)
    with pytest.raises(UserError, match=r"^data.label_column: some splits have labels and others do not"):
        run(config(tokenizer, tmp_path / "t", tmp_path / "data"))
    data = encoded_stream(tokenizer, tmp_path / "t", tmp_path / "data", data={"label_column": None})
    assert data.class_names == []


# Both stages


def test_a_stream_is_held_out_as_in_the_training_of_its_tokenizer(tmp_path, capsys):
    """With all settings of its images, and also after shards were added."""
    write_shards(tmp_path / "data", "parquet", rows_of(120), 12)
    settings = {"data__source": str(tmp_path / "data"), "data__image_size": 12, "data__streaming": True}
    model = train_tokenizer(tmp_path / "run", **settings, data__limit=None, data__shuffle_window=20, train__steps=2)
    held_out = json.loads((model / "splits.json").read_text())
    capsys.readouterr()
    encode.main([f"tokenizer={model}", f"out={tmp_path / 'tokens'}"])
    printed = capsys.readouterr()
    assert "12 shards: 10 train, 1 validation, 1 held out" in printed.out and "warning" not in printed.err
    assert json.loads((tmp_path / "tokens" / "splits.json").read_text()) == held_out
    data = load_tokens(tmp_path / "tokens")
    assert data.source["data"]["streaming"] and [len(split) for split in data.splits.values()] == [100, 10, 10]
    run_folder = train_prior(tmp_path / "prior", tmp_path / "tokens", train__steps=2)
    assert len(losses(run_folder)) == 2
    assert json.loads((run_folder / "pipeline" / "splits.json").read_text()) == held_out
    for path in write_shards(tmp_path / "more", "parquet", rows_of(120), 12).iterdir():
        path.rename(tmp_path / "data" / path.name.replace("train-", "train-more-"))
    encode.main([f"tokenizer={model}", f"out={tmp_path / 'grown'}"])
    assert "has changed since training: 24 shards instead of 12" in capsys.readouterr().err
    grown, rule = load_tokens(tmp_path / "grown").source["splits"], ("held_out_below", "validation_from")
    assert [grown[key] for key in rule] == [held_out[key] for key in rule]
    encode.main([f"tokenizer={model}", f"out={tmp_path / 'copied'}", "data.streaming=false"])
    assert "the tokenizer was trained with data.streaming=true, which holds out whole shards" in capsys.readouterr().err
    copied = tmp_path / "copied" / "tokenizer"
    encode.main([f"tokenizer={copied}", f"out={tmp_path / 'again'}", "data.streaming=true"])
    assert "with data.streaming=false, which holds out single images" in capsys.readouterr().err


def tensors(folder: Path) -> dict[str, str]:
    """The contents of the files of tokens and of their descriptions, which have no settings of the run."""
    names = ("job.json", "manifest.json", "meta.json")
    return {name: each for name, each in contents(folder).items() if name not in names}
