"""Columns of image data sets: the same from any origin, statistics of training alone, pictures that move together."""

from __future__ import annotations

import importlib
import json
import math
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from givens.images import ALL, encoded, identities, noise, write_image, write_rows, write_tar
from givens.images import rows_of as write_tar_rows
from processes import run_file

from pipelines.config import UserError
from pipelines.images import DataConfig, load_images
from pipelines.images.attributes import AttributeSource, check_sources, choose_data, load_attributes
from pipelines.images.augment import AugmentConfig
from pipelines.images.unseen import require_unseen
from pipelines.text import encode_text, run_encoder
from prior.columns import read_column
from tokenizer import Tokenizer

COUNT = 20
ROWS = {
    "view": ["front", None, "side", "front", "rear"] * 4,
    "tags": [["a", "b"], [], None, ["c"], ["b"]] * 4,
    "age": [float(k) if k % 6 else None for k in range(COUNT)],
    "sick": [k % 3 == 0 for k in range(COUNT)],
    "size": [[k, 2.5 * k] for k in range(COUNT)],
    "face": [[k / 7, 1.0, -k, 0.5, 2] if k != 4 else None for k in range(COUNT)],
    "wind": [20 * k - 350 if k % 7 else None for k in range(COUNT)],
    "text": [f"a {word}" if word else None for word in ["cat", "dog", "", "eel", "Ünïcode"]] * 4,
}
SKIP = {"on_error": "skip", "max_bad_fraction": 0.2}
KINDS = {"view": "class", "tags": "flags", "age": "number", "sick": "number", "size": "number", "face": "vector"}
KINDS |= {"wind": "angle", "text": "vector"}
GUESSED = [*KINDS][:-2]


def picture(k: int) -> np.ndarray:
    return noise(12, 12, seed=k)


def outline(k: int) -> np.ndarray:
    """The picture that belongs to image k, of another size."""
    return noise(24, 24, seed=1000 + k)


def write_table(path, bad):
    """Write a parquet file with images and columns. bad: number of an image that cannot be decoded."""
    import datasets

    def cell(data, valid=True):
        return {"bytes": encoded(data) if valid else b"no image", "path": None}

    pictures = {
        "image": [cell(picture(k), k != bad) for k in range(COUNT)],
        "outline": [cell(outline(k)) for k in range(COUNT)],
    }
    features = {key: datasets.Image() for key in pictures}
    table = datasets.Dataset.from_dict(pictures, features=datasets.Features(features))
    for key, part in ROWS.items():
        table = table.add_column(key, pa.array(part))
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(path))
    return path


def write_files(folder, pairs=None):
    """Write the images as files and, in another folder, their pictures."""
    for k in range(COUNT):
        write_image(folder / f"{k:03}.png", picture(k))
        if pairs is not None:
            write_image(pairs / f"{k:03}.png", outline(k))
    return folder


def rows_of(columns=ROWS):
    return [{"file_name": f"{k:03}.png", **{key: part[k] for key, part in columns.items()}} for k in range(COUNT)]


def pixels(path, side: int = 12, channels: int = 1) -> str:
    """Save a tokenizer whose ids are bytes."""
    Tokenizer.create("pixels", image_size=(side, side), channels=channels).save_pretrained(path)
    return str(path)


def load(source, sources, table=None, **options):
    """Load images and columns of a source."""
    sources = {name: AttributeSource.model_validate(one) for name, one in sources.items()}
    config = choose_data(DataConfig(**{"source": str(source), "image_size": 12, **options}), sources)
    splits = load_images(config)
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.held_out}
    parts = {name: part for name, part in parts.items() if part is not None}
    return parts, load_attributes(config, sources, parts, table=None if table is None else str(table))


def numbers_of(images) -> list[int]:
    return identities(images.pixels(range(len(images))))


def sources_of(tokenizer=None):
    """Columns of all kinds: guessed, except for the angle, text and the picture."""
    chosen = {"wind": AttributeSource(kind="angle"), "text": AttributeSource(encoder="ngrams:32")}
    grid = {"outline": AttributeSource(kind="grid", tokenizer=tokenizer)} if tokenizer else {}
    return {name: name for name in GUESSED} | chosen | grid


# The same rows from any origin


def check_columns(parts, columns) -> None:
    """Compare columns with `ROWS`."""
    for split, images in parts.items():
        for row, k in enumerate(numbers_of(images)):
            for name, loaded in columns.items():
                if name == "outline":
                    raw = loaded.images[split].batch([row])
                    ids = loaded.tokenizer.encode(raw)[0]
                    expected = Tokenizer.create("pixels", image_size=(24, 24), channels=1).encode(
                        torch.from_numpy(outline(k))[None, None] / 127.5 - 1
                    )[0]
                    assert torch.equal(ids, expected) and not loaded.images[split].missing[row]
                    continue
                value, column = ROWS[name][k], loaded.column
                value = encode_text("ngrams:32", [value])[0] if name == "text" and value is not None else value
                assert loaded.values[split].dtype == column.null(1).dtype
                assert torch.equal(loaded.values[split][row].nan_to_num(99), column.parse(value).nan_to_num(99))
    for name, kind in KINDS.items():
        assert columns[name].column.kind == kind
        assert read_column(columns[name].column.to_dict()) == columns[name].column


@pytest.mark.parametrize("origin", ["parquet", "metadata.csv", "metadata.parquet", "t.jsonl", "t.tsv"])
def test_the_same_rows_from_any_origin_are_the_same_columns(tmp_path, capsys, origin):
    sources, table = sources_of(pixels(tmp_path / "tokenizer", 24)), None
    if origin == "parquet":
        source = write_table(tmp_path / "data" / "a.parquet", bad=7)
    else:
        source, pairs = tmp_path / "images", tmp_path / "conditions" / "outline"
        write_files(source, pairs)
        sources["outline"] = AttributeSource(images=str(pairs), tokenizer=sources["outline"].tokenizer)
        file = write_rows((tmp_path if origin.startswith("t.") else source) / origin, rows_of())
        table = file if origin.startswith("t.") else None
        write_image(source / "007.png", b"no image")
    capsys.readouterr()
    parts, columns = load(source, sources, table, label_column=None, validation_fraction=0.2, **SKIP)
    assert sum(map(len, parts.values())) == COUNT - 1  # rows stay with their images, though one is skipped
    assert list(parts) == ["train", "validation", "test"] and list(columns) == list(sources)
    check_columns(parts, columns)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attributes")]
    assert [line.split(": ")[0] for line in lines] == [f"attributes.{name}" for name in GUESSED]
    assert all(f" {KINDS[line.split(': ')[0].split('.')[1]]}," in line for line in lines)
    assert columns["view"].column.names == ["front", "rear", "side"] and columns["tags"].column.names == ["a", "b", "c"]
    assert columns["text"].column.encoder == "ngrams:32" and str(tmp_path) not in str(
        [c.source for c in columns.values()]
    )


def test_names_come_from_the_features_and_kinds_can_be_chosen(tmp_path):
    import datasets

    names = ["z", "y", "x"]
    label = datasets.ClassLabel(names=names)
    columns = {"view": [0, -1, 1, 0, 0] * 4, "tags": [[0, 2], [], [1], None, [2]] * 4, "year": [2001, 1999] * 10}
    pictures = [{"bytes": encoded(picture(k)), "path": None} for k in range(COUNT)]
    features = {"image": datasets.Image(), "view": label, "tags": datasets.List(label), "year": datasets.Value("int32")}
    table = datasets.Dataset.from_dict({"image": pictures, **columns}, features=datasets.Features(features))
    table.to_parquet(str(tmp_path / "a.parquet"))
    sources = {"view": "view", "tags": "tags", "era": AttributeSource(kind="class", column="year")}
    parts, found = load(tmp_path / "a.parquet", sources)
    assert found["view"].column.names == found["tags"].column.names == names
    assert found["era"].column.names == ["1999", "2001"] and found["era"].source == {"column": "year"}
    for split, images in parts.items():
        at = numbers_of(images)
        assert found["view"].values[split].tolist() == [columns["view"][k] for k in at]
        assert [names[i] for i in found["tags"].values[split][0].nonzero()] == [
            names[i] for i in columns["tags"][at[0]]
        ]
    rude = table.cast_column("view", datasets.ClassLabel(names=["z", "y", "\x1b[2J"]))
    rude.to_parquet(str(tmp_path / "rude.parquet"))
    with pytest.raises(UserError, match=r"^attributes\.view: '\\x1b"):
        load(tmp_path / "rude.parquet", {"view": "view"})


@pytest.mark.parametrize(
    ("suffix", "cells", "kind", "names"),
    [
        (".csv", ["True", "false", "", "True"], "class", ["no", "yes"]),
        (".jsonl", [True, False, None, True], "class", ["no", "yes"]),
        (".jsonl", [1.0, math.nan, 3.0, 1.0], "class", ["1", "3"]),
        (".csv", ["a;b;", "b", "", "c; a"], "flags", ["a", "b", "c"]),
        (".csv", ["1_1", "1_2", "", "1_1"], "class", ["1_1", "1_2"]),
        (".csv", ["1.5", "10", "", "2.0"], "class", ["1.5", "2", "10"]),
    ],
)
def test_text_of_tables_is_read_by_the_kind_that_is_chosen(tmp_path, suffix, cells, kind, names):
    source = write_files(tmp_path / "images")
    table = write_rows(tmp_path / f"t{suffix}", rows_of({"x": cells * 5}))
    parts, found = load(source, {"x": AttributeSource(kind=kind)}, table)
    assert found["x"].column.names == names
    for split, images in parts.items():
        null = [cells[k % 4] in ("", None) or cells[k % 4] != cells[k % 4] for k in numbers_of(images)]
        assert found["x"].column.is_null(found["x"].values[split]).tolist() == null


def test_statistics_are_those_of_the_training_split(tmp_path):
    source = write_files(tmp_path / "images")
    values = {
        "x": [10.0**k for k in range(COUNT)],
        "one": [3] * COUNT,
        "v": [[k, 2 * k, 0, 1, -k] for k in range(COUNT)],
    }
    table = write_rows(tmp_path / "t.jsonl", rows_of(values))
    parts, found = load(source, {"x": "x", "one": "one", "v": "v"}, table, validation_fraction=0.2)
    train = np.array([values["x"][k] for k in numbers_of(parts["train"])])
    assert len(train) < COUNT
    column = found["x"].column
    assert np.allclose([*column.mean, *column.std], [train.mean(), train.std()])
    assert (column.low, column.high) == ([train.min()], [train.max()])
    assert (found["one"].column.mean, found["one"].column.std) == ([3.0], [1.0])
    vectors = np.array([values["v"][k] for k in numbers_of(parts["train"])])
    assert found["v"].column.scale == pytest.approx(np.sqrt((vectors**2).mean()))


# Images as columns


@pytest.mark.parametrize("flip", [True, False])
def test_an_image_and_its_picture_are_moved_alike(tmp_path, flip):
    """Each has a mark at the same place; the picture is twice as large."""
    rng = np.random.default_rng(0)
    for k in range(COUNT):
        y, x = rng.integers(3, 9, 2)
        small, large = np.zeros((12, 12), np.uint8), np.zeros((24, 24, 3), np.uint8)
        small[y : y + 2, x : x + 2] = 255
        large[2 * y : 2 * y + 4, 2 * x : 2 * x + 4] = 255
        write_image(tmp_path / "images" / f"{k}.png", small)
        write_image(tmp_path / "pairs" / f"{k}.jpg", encoded(large, "JPEG", quality=100))
    source = AttributeSource(images=str(tmp_path / "pairs"), tokenizer=pixels(tmp_path / "t", 24, 3))
    augment = ALL if flip else AugmentConfig(shift=3)
    parts, found = load(tmp_path / "images", {"twin": source}, augment=augment)
    images, twins = parts["train"], found["twin"].images["train"]
    rows, variants = np.arange(len(images)), np.arange(len(images)) % 3 + 1

    def centres(some):
        moved = some.prepare(*some.raw_batch(rows, variants, 5, augment=True)).mean(1) / 2 + 0.5
        places = (torch.arange(moved.shape[-1]) + 0.5) / moved.shape[-1]
        mass = moved.sum((1, 2))
        return torch.stack([(moved.sum(2) * places).sum(1) / mass, (moved.sum(1) * places).sum(1) / mass], 1)

    assert twins.prepare(*twins.raw_batch(rows, variants, 5)).shape[1:] == (3, 24, 24)
    inside = ((centres(images) > 0.25) & (centres(images) < 0.75)).all(1)  # marks are not cut at the edge
    assert inside.sum() > 5 and torch.allclose(centres(images)[inside], centres(twins)[inside], atol=0.02)
    still = images.batch(rows) - images.batch(rows, seed=5, epoch=1, augment=True)
    assert still.abs().max() > 1


@pytest.mark.parametrize("column", ["mask", "mask_file_name"])
def test_missing_pictures_are_marked_and_bad_ones_skipped_as_images_are(tmp_path, column):
    """Paths are relative to the images, whatever the column is called."""
    source = write_files(tmp_path / "images", tmp_path / "pairs")
    write_image(tmp_path / "pairs" / "005.png", b"no image")
    names = [None if k == 3 else f"../pairs/{k:03}.png" for k in range(COUNT)]
    table = write_rows(tmp_path / "t.jsonl", rows_of({column: names}))
    sources = {"mask": AttributeSource(kind="grid", tokenizer=pixels(tmp_path / "t", 24))}
    with pytest.raises(UserError, match=r"005.png: not an image"):
        load(source, sources, table)
    parts, found = load(source, sources, table, **SKIP)
    for split, images in parts.items():
        numbers = numbers_of(images)
        assert found["mask"].images[split].missing.tolist() == [k in (3, 5) for k in numbers]
        for row, k in enumerate(numbers):
            pixels_of = found["mask"].images[split].pixels([row])[0, 0].numpy()
            assert np.array_equal(pixels_of, outline(k) if k not in (3, 5) else 0 * outline(k))


# Clips


def write_clips(root, clips=10, frames=11):
    """Write clips whose frames are numbered without leading zeros."""
    for clip in range(clips):
        for frame in range(frames):
            write_image(root / f"clip{clip}" / f"f{frame}.png", picture(clip * frames + frame))
    return root


def test_clips_are_held_out_whole_and_a_frame_is_given_the_one_before(tmp_path):
    root = write_clips(tmp_path / "clips")
    sources = {"past": AttributeSource(frame=-1, tokenizer=pixels(tmp_path / "t"))}
    options = {"held_out_fraction": 0.2, "validation_fraction": 0.3}
    parts, found = load(root, sources, **options)
    clips = {name: {number // 11 for number in numbers_of(images)} for name, images in parts.items()}
    assert {name: len(some) for name, some in clips.items()} == {"train": 5, "validation": 3, "test": 2}
    assert sum(map(len, parts.values())) == 110 and len(set().union(*clips.values())) == 10
    assert all(images.labels is None for images in parts.values())  # a clip is no class
    images = load_images(DataConfig(source=str(root), image_size=12, label_column=None))
    with pytest.raises(UserError, match=r"attributes.past: .*clip.*two splits.*data\.clips"):
        load_attributes(DataConfig(source=str(root)), sources, {"train": images.train, "test": images.held_out})
    for split, images in parts.items():
        past = found["past"].images[split].pixels(range(len(images)))
        for row, number in enumerate(numbers_of(images)):
            assert bool(found["past"].images[split].missing[row]) == (number % 11 == 0)
            assert np.array_equal(past[row, 0], picture(number - 1) if number % 11 else 0 * picture(0))
    config = DataConfig(source=str(root), image_size=12, **options)
    with pytest.raises(UserError, match="images were trained on"):  # other images than without clips
        require_unseen(config, choose_data(config, sources), "held_out")
    assert "clips" not in config.model_dump() and "clips" not in config.model_dump(mode="json")
    assert DataConfig(**choose_data(config, sources).model_dump()).clips


# Text


TEXTS = ["a cat", "A Cat ", "a cab", "Ünïcode 宇宙", ""]


def test_ngrams_are_equal_in_all_processes():
    vectors = encode_text("ngrams:64", TEXTS)
    assert run_file(__file__, PYTHONHASHSEED="1").strip() == str(vectors.tolist())
    assert torch.equal(vectors[0], vectors[1]) and torch.allclose(vectors[:4].norm(dim=1), torch.ones(4))
    assert 0.2 < vectors[0] @ vectors[2] < 0.9 and abs(vectors[0] @ vectors[3]) < 0.3


def test_an_encoder_of_the_users_runs_only_if_its_module_was_imported(tmp_path, monkeypatch):
    (tmp_path / "my_encoder.py").write_text(
        "import numpy as np\n"
        "def lengths(texts): return np.array([[len(t), t.count('a'), 1, 2, 3] for t in texts])\n"
        "def ragged(texts): return np.zeros(len(texts))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = write_files(tmp_path / "images")
    table = write_rows(tmp_path / "t.csv", rows_of({"text": ["banana", "a", "", "cat"] * 5}))
    sources = {"text": AttributeSource(encoder="my_encoder:lengths")}
    with pytest.raises(UserError, match=r"^attributes\.text: .*--import my_encoder"):
        load(source, sources, table)
    assert "my_encoder" not in sys.modules
    importlib.import_module("my_encoder")
    monkeypatch.setattr("pipelines.text.IMPORTED", ["my_encoder"])
    parts, found = load(source, sources, table)
    assert found["text"].column.encoder == "my_encoder:lengths" and found["text"].column.size == 5
    rows = [[6, 3, 1, 2, 3], [1, 1, 1, 2, 3], [math.nan] * 5, [3, 1, 1, 2, 3]]
    expected = torch.tensor([rows[k % 4] for k in numbers_of(parts["train"])])
    assert torch.equal(found["text"].values["train"].nan_to_num(-1), expected.nan_to_num(-1))
    for name, words in (("ragged", "must return"), ("none", "no function 'none'")):
        with pytest.raises(ValueError, match=words):
            run_encoder(f"my_encoder:{name}", ["a"])
    with pytest.raises(ValueError, match="not a built-in"):  # names from files never run code
        encode_text("my_encoder:lengths", ["a"])


# Refusals


@pytest.mark.parametrize(
    ("column", "values", "settings", "words"),
    [
        ("ages", [1.0] * 20, {}, "'ages'.*did you mean 'age'.*file_name, age"),
        ("age", ["x" if k == 7 else k for k in range(20)], {"kind": "number"}, "007.png.*expected numbers.*'x'"),
        ("age", [[1e5] * (5 if k == 7 else 0) or None for k in range(20)], {"kind": "vector"}, "007.png.*65504"),
        ("age", [5] * 20, {"encoder": "ngrams:8"}, "png.*expected text"),
    ],
)
def test_bad_values_are_refused_by_row_and_column(tmp_path, column, values, settings, words):
    source = write_files(tmp_path / "images")
    table = write_rows(tmp_path / "t.jsonl", rows_of({"age": values}))
    with pytest.raises(UserError, match=f"^attributes.c: .*({words})") as caught:
        load(source, {"c": AttributeSource(column=column, **settings)}, table)
    assert "\n" not in str(caught.value)


@pytest.mark.sparse
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[1:], "no row for .*000.png"),
        (lambda rows: [*rows, {"file_name": "other.png", "x": 1}], "lists .*other.png"),
        (lambda rows: [*rows, rows[5]], "two rows .*005.png"),
        (lambda rows: [{"name;x": "000.png;1"}], "no column file_name; it has name;x$"),  # another delimiter
    ],
)
def test_a_table_has_one_row_for_each_image(tmp_path, change, words):
    source = write_files(tmp_path / "images")
    table = write_rows(tmp_path / "t.csv", change(rows_of({"x": [1] * 20})))
    with pytest.raises(UserError, match=f"^attributes.x: {table}:? .*{words}") as caught:
        load(source, {"x": "x"}, table)
    assert "\n" not in str(caught.value)


@pytest.mark.sparse
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"file_name": None, "x": 1}, "a row has no file_name"),
        (["000.png"], "cannot be read: a line is not a JSON object"),
    ],
)
def test_a_table_and_a_sheet_of_the_folder_refuse_the_same_rows(tmp_path, row, words):
    source = write_files(tmp_path / "images")
    lines = "".join(f"{json.dumps(each)}\n" for each in [*rows_of({"x": [1] * 20}), row])
    (table := tmp_path / "t.jsonl").write_text(lines)
    with pytest.raises(UserError, match=f"^attributes.x: .*{words}|^table: .*{words}") as of_table:
        load(source, {"x": "x"}, table)
    (tmp_path / "images/metadata.jsonl").write_text(lines)
    with pytest.raises(UserError, match=f"^data.source: .*{words}") as of_sheet:
        load_images(DataConfig(source=str(source), image_size=12))
    assert "\n" not in str(of_table.value) + str(of_sheet.value)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("images/a.png", "pairs: no image with the stem 'a', which .*images has"),
        ("pairs/003.jpg", "003.jpg.*003.png"),
    ],
)
def test_each_image_has_one_pair(tmp_path, extra, words):
    source = write_files(tmp_path / "images", tmp_path / "pairs")
    write_image(tmp_path / extra, picture(3))
    sources = {"c": AttributeSource(images=str(tmp_path / "pairs"), tokenizer=pixels(tmp_path / "t"))}
    with pytest.raises(UserError, match=f"^attributes.c: .*{words}"):
        load(source, sources)


@pytest.mark.parametrize(
    ("settings", "table", "words"),
    [
        ({"images": "nowhere", "tokenizer": "t"}, None, "images: there is no folder nowhere"),
        ({"images": ".", "tokenizer": "t"}, None, "outside data.source"),
        ({}, "nowhere.csv", "table: there is no file nowhere.csv"),
    ],
)
def test_mistakes_are_found_before_images_are_read(tmp_path, monkeypatch, settings, table, words):
    monkeypatch.chdir(write_files(tmp_path / "images"))
    with pytest.raises(UserError, match=words):
        check_sources(DataConfig(source="."), {"c": AttributeSource(**settings)}, table, 0)


@pytest.mark.parametrize(
    "settings", [{"column": "a", "frame": -1}, {"images": "a"}, {"kind": "class", "encoder": "ngrams:8"}]
)
def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings)) + "|exclude|tokenizer: missing"):
        AttributeSource(**settings)


def test_a_source_without_columns_says_where_they_come_from(tmp_path):
    tar = write_tar(tmp_path / "a.tar", write_tar_rows(20))
    for source, words in ((tar, "parquet"), (write_files(tmp_path / "images"), "table=FILE")):
        with pytest.raises(UserError, match=f"^attributes.c: .*{words}"):
            load(source, {"c": "c"})


if __name__ == "__main__":
    print(encode_text("ngrams:64", TEXTS).tolist())
