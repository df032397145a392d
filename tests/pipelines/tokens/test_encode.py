"""`smalti encode`: its rows, resuming, several processes, and invalid settings.

Covers: pipelines/encode.py, pipelines/job.py, pipelines/provenance.py.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import contents, files_in
from givens.images import write_classes, write_pictures
from launch import DIGITS as DIGITS_ONCE
from launch import output_of, start, two_processes
from PIL import Image, ImageOps
from ranks import Several
from small import make_tokenizer, quantizer_of

from pipelines import encode
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.encode import EncodeConfig, run
from pipelines.images import load_images, loading
from pipelines.images.attributes import load_attributes
from pipelines.job import work_folder
from pipelines.tokens import load_tokens
from pipelines.tokens.meta import META
from pipelines.train_prior import TrainPriorConfig, build_prior
from tokenizer import Tokenizer
from tokenizer.files import FormatError, PathError, write_manifest

SHIFT = {"augment": {"shift": 3}}


def config(tokenizer, out, data, **options):
    return EncodeConfig(tokenizer=str(tokenizer), out=str(out), data=data, **{"batch_size": 4, **options})


def interrupt(monkeypatch, *arguments, after=4, **options):
    """Start an encode and interrupt it after `after` batches."""
    calls, real = [], encode.variants_of

    def stop(*given, **how):
        calls.append(given)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "variants_of", stop)
        with pytest.raises(KeyboardInterrupt):
            run(config(*arguments, **options))


@pytest.fixture(autouse=True)
def digits_parsed_once(monkeypatch):
    """Parsing the digits takes a second."""
    monkeypatch.setattr(loading, "open_digits", DIGITS_ONCE)


def encoded(tokenizer, out, data, **options):
    return load_tokens(run(config(tokenizer, out, data, **options)))


@pytest.fixture(scope="module")
def columns(images, tmp_path_factory):
    """Settings of columns of the images: of a table, and inverted images in another folder as a grid of 3 x 3 ids, of
    12 x 12 pixels."""
    root, folder = tmp_path_factory.mktemp("columns"), Path(images["source"])
    torch.manual_seed(1)
    make_tokenizer("vqvae", (12, 12), 1).eval().save_pretrained(root / "tokenizer")
    lines = ["file_name,age,tags,view"]
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        name = path.relative_to(folder)
        lines.append(f"{name},{number if number % 7 else ''},a;b,{'left' if number % 2 else 'right'}")
        (root / "inverted" / name).parent.mkdir(parents=True, exist_ok=True)
        ImageOps.invert(Image.open(path)).save(root / "inverted" / name)
    (root / "table.csv").write_text("\n".join(lines) + "\n")
    grid = {"images": str(root / "inverted"), "tokenizer": str(root / "tokenizer")}
    attributes = {"age": "age", "tags": {"kind": "flags"}, "side": "view", "inverse": grid}
    return {"attributes": attributes, "table": str(root / "table.csv")}


def labels_of(data, split="train"):
    return data.splits[split].given.raw("label")


# Rows


def test_rows_are_the_images_in_order(tokenizer, images, tmp_path):
    data = {**images, "validation_fraction": 0.2}
    found = encoded(tokenizer, tmp_path / "tokens", data, batch_size=7)
    splits, model = load_images(config(tokenizer, "", data).data), Tokenizer.from_pretrained(tokenizer)
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.held_out}
    assert list(found.splits) == list(parts)
    for name, split in parts.items():
        expected = model.encode(split.batch(np.arange(len(split))))
        assert len(expected.unique()) > 1 and torch.equal(found.splits[name].tokens.long(), expected)
        assert torch.equal(labels_of(found, name), split.labels)
    assert found.class_names == ["cat", "dog", "eel"] and found.source["data"]["source"] == images["source"]
    assert found.augmentations == 0 and found.tokenizer.fingerprint() == model.fingerprint()


def test_augmentations_are_further_rows_determined_by_the_seed(tokenizer, images, tmp_path):
    augmented = {**images, **SHIFT}
    plain = encoded(tokenizer, tmp_path / "plain", images)
    data = encoded(tokenizer, tmp_path / "augmented", augmented, augmentations=2, batch_size=64)
    assert data.augmentations == 2 and [len(split) for split in data.splits.values()] == [90, 30]
    assert torch.equal(data.splits["test"].tokens, plain.splits["test"].tokens)
    variants = data.splits["train"].tokens.long().split(30)
    assert torch.equal(variants[0], plain.splits["train"].tokens.long())
    assert not torch.equal(variants[1], variants[0]) and not torch.equal(variants[2], variants[1])
    assert torch.equal(labels_of(data), labels_of(plain).repeat(3))
    again = encoded(tokenizer, tmp_path / "again", augmented, augmentations=2, batch_size=7)
    assert torch.equal(again.splits["train"].tokens, data.splits["train"].tokens)
    other = encoded(tokenizer, tmp_path / "other", augmented, augmentations=2, seed=1)
    assert torch.equal(other.splits["train"].tokens[:30], data.splits["train"].tokens[:30])
    assert not torch.equal(other.splits["train"].tokens, data.splits["train"].tokens)


def test_crops_are_rows_of_their_image(tokenizer, images, columns, tmp_path):
    """Images of 40 x 40 pixels, of which the tokenizer sees 28 x 28."""
    for path in Path(images["source"]).rglob("*.png"):
        target = tmp_path / "large" / path.relative_to(images["source"])
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((40, 40)).save(target)
    data = {"source": str(tmp_path / "large"), "crop": "random", "crops_per_image": 5}
    found = encoded(tokenizer, tmp_path / "tokens", data, batch_size=7, seed=3)
    splits, model = load_images(config(tokenizer, "", data).data), Tokenizer.from_pretrained(tokenizer)
    assert {name: len(part) for name, part in found.splits.items()} == {"train": 150, "test": 120}
    (train,) = splits.train.raw_batch(np.arange(150), 0, 3)
    assert torch.equal(found.splits["train"].tokens.long(), model.encode(splits.train.prepare(train)))
    assert torch.equal(found.splits["test"].tokens.long(), model.encode(splits.held_out.batch(np.arange(120))))
    rows = found.splits["train"].tokens.long().flatten(1).split(5)
    assert all(len(each.unique(dim=0)) > 2 for each in rows)
    assert torch.equal(labels_of(found), splits.train.labels)
    table = tmp_path / "ages.csv"
    names = sorted(str(path.relative_to(tmp_path / "large")) for path in (tmp_path / "large").rglob("*.png"))
    table.write_text("file_name,age\n" + "".join(f"{name},{number}\n" for number, name in enumerate(names)))
    ages = {"attributes": {"age": "age"}, "table": str(table)}
    given = encoded(tokenizer, tmp_path / "given", data, **ages).splits["train"].given[:150].raw("age").flatten()
    assert torch.equal(given, given[::5].repeat_interleave(5)) and len(given.unique()) == 30
    grid = {"attributes": {"inverse": columns["attributes"]["inverse"]}}
    with pytest.raises(UserError, match=r"^attributes.inverse: [^\n]*data.crop=null$"):
        encoded(tokenizer, tmp_path / "grid", {**data, "source": images["source"]}, **grid)


def test_columns_are_those_of_the_images(tokenizer, images, columns, tmp_path):
    """Values repeat in each variant; the grid is encoded from images that are moved as theirs are."""
    given = {**columns, "augmentations": 1, "rows_per_shard": 7}
    data = encoded(tokenizer, tmp_path / "tokens", {**images, **SHIFT}, **given)
    assert list(data.columns) == ["label", "age", "tags", "side", "inverse"] and data.columns["side"].names == [
        "left",
        "right",
    ]
    assert data.condition_sources["side"] == {"column": "view"}
    assert data.condition_sources["inverse"] == {"images": "inverted"}
    settings = config(tokenizer, "", {**images, **SHIFT}, **columns)
    splits = encode.name_splits(load_images(settings.data))
    paths = sorted(Path(images["source"]).rglob("*.png"))
    model = data.condition_tokenizers["inverse"]
    loaded = load_attributes(settings.data, settings.attributes, splits, table=settings.table)["inverse"].images
    for name, part in splits.items():
        found, rows = data.splits[name].given[:].rows, len(part)
        numbers = [paths.index(Path(images["source"]) / each) for each in part.names(np.arange(rows))]
        assert len(found["side"]) == rows * (1 + (name == "train"))
        for row, number in enumerate(2 * numbers if name == "train" else numbers):
            assert found["side"][row] == (number % 2 == 0) and found["tags"][row].tolist() == [1, 1]
            assert found["age"][row, 0] == number if number % 7 else found["age"][row].isnan()
        expected = [model.encode(loaded[name].batch(np.arange(rows)))]
        if name == "train":
            expected.append(model.encode(loaded[name].batch(np.arange(rows), epoch=1, augment=True)))
            assert not torch.equal(*expected)
        assert torch.equal(found["inverse"], torch.cat(expected))
    ages = data.splits["train"].given.raw("age")[:].double()
    assert np.allclose(data.columns["age"].mean, ages.nanmean())


def test_a_grid_without_an_image_is_null(tokenizer, tmp_path):
    """The first image of each clip has none before it."""
    for split in ("train", "test"):
        for clip in ("a", "b"):
            write_pictures(tmp_path / "images" / split / clip, 3)
    settings = {"source": str(tmp_path / "images")}
    attributes = {"before": {"frame": -1, "tokenizer": str(tokenizer)}}
    data = encoded(tokenizer, tmp_path / "tokens", settings, attributes=attributes)
    split = data.splits["train"]
    before = split.given.raw("before")[:]
    assert data.source["data"]["clips"] and not (tmp_path / "tokens" / "conditions").exists()
    assert torch.equal(data.columns["before"].is_null(before), torch.tensor([True, False, False] * 2))
    assert torch.equal(before[1:3], split.rows([0, 1])) and torch.equal(before[4:], split.rows([3, 4]))


def test_either_all_splits_have_labels_or_none(tokenizer, tmp_path):
    for place in ("train", "test/cat"):
        write_pictures(tmp_path / "images" / place)
    source = {"source": str(tmp_path / "images")}
    with pytest.raises(UserError, match=r"data\.label_column"):
        encoded(tokenizer, tmp_path / "tokens", source)
    data = encoded(tokenizer, tmp_path / "tokens", {**source, "label_column": None})
    assert data.class_names == [] and all(not split.given.rows for split in data.splits.values())


# Output


@pytest.mark.parametrize("kind", ["vqvae", "multiscale"])
def test_the_next_command_trains_a_preset_that_fits_these_tokens(images, tmp_path, capsys, kind):
    node = {"quantizer": quantizer_of(kind, 7, 7)} if kind == "multiscale" else {}
    model = make_tokenizer("vqvae", (28, 28), 1, **node)
    model.eval().save_pretrained(tmp_path / "tokenizer")
    for _ in ("done", "already finished"):
        encoded(tmp_path / "tokenizer", tmp_path / "my tokens", images)
        command = capsys.readouterr().out.splitlines()[-1].partition("; next: ")[2]
        first, verb, *words = shlex.split(command)
        found = parse(TrainPriorConfig, words, verb=verb, description="")
        assert (first, verb, found.tokens) == ("smalti", "train_prior", str(tmp_path / "my tokens"))
        assert "--config" in words and found.train.optimizer == ("adamw" if kind == "multiscale" else "muon")
        build_prior(found.model, load_tokens(found.tokens))


# Resuming


def test_an_encode_that_is_interrupted_again_and_again_ends_with_the_same_files(
    tokenizer, images, columns, tmp_path, monkeypatch
):
    options = {"augmentations": 2, "rows_per_shard": 7, **columns}
    run(config(tokenizer, tmp_path / "whole", {**images, **SHIFT}, **options))
    calls, real = [], encode.variants_of

    def interrupted(*given, **how):
        calls.append(None)
        if len(calls) % 7 == 0:
            raise KeyboardInterrupt
        return real(*given, **how)

    monkeypatch.setattr(encode, "variants_of", interrupted)
    attempt = 0
    while attempt < 100 and not (tmp_path / "parts").exists():
        with suppress(KeyboardInterrupt):
            run(config(tokenizer, tmp_path / "parts", {**images, **SHIFT}, **options))
        attempt += 1
    assert attempt > 4 and contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("place", ["encode.variants_of", "encode.publish_folder"])
def test_an_interrupted_encode_leaves_the_older_dataset(tokenizer, images, columns, tmp_path, monkeypatch, place):
    out = tmp_path / "tokens"
    run(config(tokenizer, out, images, rows_per_shard=4))
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(f"pipelines.{place}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config(tokenizer, out, images, **columns))
    assert contents(out) == before
    run(config(tokenizer, out, images, **columns))
    assert len(load_tokens(out).splits["train"]) == 30 and "train.safetensors" in files_in(out)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_a_dataset_set_aside_by_a_killed_process_is_restored(tokenizer, images, tmp_path, capsys):
    """A kill between the two renames that replace a dataset."""
    name = "tokens[v2]"
    run(config(tokenizer, tmp_path / name, images))
    (tmp_path / name).rename(tmp_path / f".del-{name}-0123abcd")
    with pytest.raises(PathError, match="rename"):
        load_tokens(tmp_path / name)
    run(config(tokenizer, tmp_path / name, images))
    assert "already finished" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_finished_one_says_so_until_its_images_change(tokenizer, tmp_path, capsys):
    images = write_classes(tmp_path / "images", ["cat", "dog"], 3)
    run(config(tokenizer, tmp_path / "tokens", images))
    before = contents(tmp_path / "tokens")
    for options, finished in ([{}, True], [{"seed": 1}, False], [{}, False], [{}, True]):
        capsys.readouterr()
        run(config(tokenizer, tmp_path / "tokens", images, **options))
        assert ("already finished: 6 train, 6 test rows" in capsys.readouterr().out) == finished
    picture = tmp_path / "images" / "train" / "cat" / "0.png"
    picture.write_bytes((tmp_path / "images" / "train" / "cat" / "1.png").read_bytes())
    began = os.stat(tmp_path / "tokens" / "job.json").st_mtime
    os.utime(tmp_path / "tokens" / META, (began + 60, began + 60))  # changed after it was read, while it was encoded
    os.utime(picture, (began + 30, began + 30))
    run(config(tokenizer, tmp_path / "tokens", images))
    assert contents(tmp_path / "tokens") != before


def test_changed_columns_are_noticed(tokenizer, images, columns, tmp_path, capsys, monkeypatch):
    root = Path(columns["table"]).parent
    copy = Path(shutil.copytree(root, tmp_path / "columns"))
    options = json.loads(json.dumps(columns).replace(str(root), str(copy)))
    out, table = tmp_path / "tokens", copy / "table.csv"

    def finished(**changes):
        capsys.readouterr()
        run(config(tokenizer, out, images, **{**options, **changes}))
        return "already finished" in capsys.readouterr().out

    def date(path, by):
        began = os.stat(out / "job.json").st_mtime
        os.utime(path, (began + by, began + by))

    for path in (table, *copy.rglob("*")):
        os.utime(path, (1, 1))
    assert not finished() and finished()
    (out / "job.json").write_text((out / "job.json").read_text().replace('"attributes"', '"conditions"'))  # as in 0.3
    write_manifest(out)
    assert finished()
    table.write_text(table.read_text().replace("left", "leftmost"))
    date(table, -9)  # its values are compared, too
    assert not finished() and finished()
    assert load_tokens(out).columns["side"].names == ["leftmost", "right"]
    date(next((copy / "inverted").rglob("*.png")), 9)
    assert not finished()
    without = {name: each for name, each in options["attributes"].items() if name != "age"}
    assert not finished(attributes=without) and list(load_tokens(out).columns) == ["label", "tags", "side", "inverse"]
    interrupt(monkeypatch, tokenizer, tmp_path / "parts", images, after=16, rows_per_shard=7, **options)
    table.write_text(table.read_text().replace(",1,", ",3,"))
    with pytest.raises(UserError, match=r"^out: .*columns\.age"):
        run(config(tokenizer, tmp_path / "parts", images, rows_per_shard=7, **options))


# Several processes


def run_together(monkeypatch, count, settings):
    """Run an encode in `count` threads; return the rows that each encoded."""
    several, rows, real = Several(count), [[] for _ in range(count)], encode.variants_of

    def variants_of(images, some, seed, **how):
        rows[several.side.rank].extend(some.tolist())
        return real(images, some, seed, **how)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "build_accelerator", several.accelerator)
        patch.setattr(encode, "variants_of", variants_of)
        patch.setattr(encode, "prefetch", lambda make, items: (make(item) for item in items))  # in this thread
        patch.setattr(encode, "group_of", several.group_of)
        several.run(lambda: run(settings))
    return rows


def test_any_number_of_processes_writes_the_same_files_and_continues_them(
    tokenizer, images, columns, tmp_path, monkeypatch
):
    data, options = {**images, **SHIFT}, {"augmentations": 2, "rows_per_shard": 7, **columns}
    reads = 2  # of each row: its image, and that of the grid
    for count in (1, 2, 3):
        rows = run_together(monkeypatch, count, config(tokenizer, tmp_path / str(count), data, **options))
        assert sum(map(len, rows)) == 120 * reads and max(map(len, rows)) - min(map(len, rows)) <= 16 * reads
        assert contents(tmp_path / str(count)) == contents(tmp_path / "1")
    interrupt(monkeypatch, tokenizer, tmp_path / "parts", data, after=8 * reads, **options)
    done = len(list(work_folder(tmp_path / "parts", "encode").glob("*.safetensors")))
    rows = run_together(monkeypatch, 3, config(tokenizer, tmp_path / "parts", data, **options))
    assert done > 2 and sum(map(len, rows)) == (120 - 7 * done) * reads and all(rows)
    assert contents(tmp_path / "parts") == contents(tmp_path / "1")


@pytest.mark.slow
def test_launched_processes_write_the_same_files(tokenizer, images, tmp_path):
    argv = [f"tokenizer={tokenizer}", f"data.source={images['source']}", "batch_size=4", "rows_per_shard=7"]
    output_of(start(two_processes("encode", [*argv, f"out={tmp_path / 'several'}"], 3)))
    run(config(tokenizer, tmp_path / "alone", images, rows_per_shard=7))
    assert contents(tmp_path / "several") == contents(tmp_path / "alone")


def test_a_second_encode_is_refused_at_any_moment(tokenizer, images, tmp_path, monkeypatch):
    run(config(tokenizer, tmp_path / "alone", images))
    moments = ["load_images", "variants_of", "finish_dataset", "finish_run"]

    def start_second_in(name):
        real = getattr(encode, name)

        def act(*given, **options):
            if name in moments:
                moments.remove(name)
                before = contents(tmp_path)
                with pytest.raises(UserError, match=rf"{tmp_path}/out: process {os.getpid()} on"):
                    run(config(tokenizer, tmp_path / "out", images))
                assert contents(tmp_path) == before
            return real(*given, **options)

        monkeypatch.setattr(encode, name, act)

    for name in list(moments):
        start_second_in(name)
    run(config(tokenizer, tmp_path / "out", images))
    assert not moments and contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


# Refusals


def test_an_encode_with_other_settings_is_not_continued(tokenizer, images, tmp_path, monkeypatch):
    interrupt(monkeypatch, tokenizer, tmp_path / "parts", images, rows_per_shard=4)
    torch.manual_seed(9)
    make_tokenizer("vqvae", (28, 28), 1).eval().save_pretrained(tmp_path / "other")
    before = contents(tmp_path)
    settings = {"tokenizer": tokenizer, "out": tmp_path / "parts", "data": images, "rows_per_shard": 4}
    for key, value in {"seed": 1, "tokenizer": tmp_path / "other", "data.limit": {**images, "limit": 29}}.items():
        with pytest.raises(UserError, match=rf"^out: .*{key}.*\.parts\.encode"):
            run(config(**{**settings, key.removesuffix(".limit"): value}))
        assert contents(tmp_path) == before
    run(config(**settings))
    assert len(load_tokens(tmp_path / "parts").splits["train"]) == 30


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("deep/thesis.tex", ""),
        ("job.json", '{"verb": "encode", "data": 3}'),
    ],
)
def test_foreign_files_in_the_work_folder_are_refused(tokenizer, images, tmp_path, monkeypatch, name, content):
    interrupt(monkeypatch, tokenizer, tmp_path / "parts", images, rows_per_shard=4)
    work = work_folder(tmp_path / "parts", "encode")
    (work / name).parent.mkdir(exist_ok=True)
    (work / name).write_text(content)
    before = contents(tmp_path)
    with pytest.raises((UserError, FormatError), match=r"\.parts\.encode"):
        run(config(tokenizer, tmp_path / "parts", images, rows_per_shard=4))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"data": {"image_size": 32}}, r"data.image_size.*\(1, 28, 28\).*\(1, 32, 32\)"),
        ({"data": {"source": "digits"}, "augmentations": 2}, "augmentations.*data.augment"),
        ({"rows_per_shard": 7}, "rows_per_shard"),
        ({"attributes": {"label": "age"}}, "^attributes: 'label'"),
    ],
)
def test_invalid_settings_are_refused_before_the_work(tokenizer, images, tmp_path, monkeypatch, options, named):
    monkeypatch.setattr("pipelines.tokens.shards.MAX_SHARDS", 9)
    monkeypatch.setattr(encode, "variants_of", lambda *_, **__: pytest.fail("images were encoded"))
    with pytest.raises(UserError, match=named):
        encoded(tokenizer, tmp_path / "tokens", **{"data": images, **options})
    assert not any(tmp_path.iterdir())
