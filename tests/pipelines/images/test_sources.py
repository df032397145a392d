"""Digits, tables and names: what a source holds, and what is said where it cannot be opened."""

import csv
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from givens.image_files import KINDS, noise, rows_of, write_shards
from givens.image_folders import BAD, PNGS, bytes_of_each, config, write_image, write_table
from optional import needs_digits

from pipelines.config import UserError
from pipelines.images import DataConfig, load_images

# Digits


@needs_digits
def test_digits_are_divided_balanced_and_disjoint():
    splits = load_images(DataConfig(validation_fraction=0))
    assert (len(splits.train), len(splits.held_out), splits.validation) == (4000, 1000, None)
    assert splits.train.labels.bincount().tolist() == [400] * 10
    assert splits.held_out.labels.bincount().tolist() == [100] * 10
    train, held_out = (set(bytes_of_each(part)) for part in (splits.train, splits.held_out))
    assert not train & held_out
    assert splits.train.class_names == list("0123456789") and splits.train.image_shape == (1, 28, 28)
    assert not torch.equal(splits.train.labels[:10], splits.train.labels[10:20])  # shuffled within each ten
    small = load_images(DataConfig(limit=50, image_size=[14, 20], channels=3, validation_fraction=0))
    assert small.train.labels.bincount().tolist() == [5] * 10 and len(small.held_out) == 50
    assert small.train.pixels([0]).shape == (1, 3, 14, 20)
    assert torch.equal(small.train.labels, splits.train.labels[:50])


def test_digits_without_their_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "smalti\[digits\]"'):
        load_images(DataConfig())


# What cannot be opened


@pytest.mark.parametrize("source", ["/no/such/folder", "./missing", "a/b/c", "~/nothing here", "~no-such-user/x"])
def test_missing_path_is_said_to_be_missing(source):
    with pytest.raises(UserError, match="there is no file or folder"):
        load_images(config(source))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{}/*.tar", r"there is no file or folder .*/\*.tar"),
        ("ftp://somewhere/a.tar", "URLs begin with one of hf, http"),
        ("simplecache::http://somewhere/a.tar", "URLs begin with one of hf, http"),
        ("http://127.0.0.1:9/a.tar", "cannot be read: "),
        ("{}/a.tar.gz", "not a parquet file, nor a .tar; of pictures, give their folder"),
        ("{}/a.*", "has files .gz, .png; .parquet and .tar"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_a_line(tmp_path, source, reason):
    write_image(tmp_path / "a.tar.gz", b"")
    write_image(tmp_path / "a.png", PNGS[0])
    for streaming in (False, True):
        with pytest.raises(UserError, match=f"^data.source: .*{reason}"):
            load_images(config(source.format(tmp_path), streaming=streaming))


@pytest.mark.parametrize("source", ["owner/name", "cifar"])
def test_unreachable_hub_id_names_both_readings(source, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("Couldn't reach it\nwith details")

    monkeypatch.setattr("datasets.load_dataset_builder", unreachable)
    with pytest.raises(UserError, match=f"no such folder here .*{source}.* Hub id '{source}'.*Couldn't reach it$"):
        load_images(config(source))


# Parquet


def test_parquet_folder_and_file(tmp_path):
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


def test_plain_labels_are_numbered_in_order(tmp_path):
    train = load_images(config(write_table(tmp_path / "a.parquet", PNGS, [30, 7, 100, 7, 7, 30, 7, 7, 7, 7]))).train
    assert train.class_names == ["7", "30", "100"] and train.labels[:3].tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("label", "told"),
    [(-1, "the label is -1, allowed is .*an integer from 0"), (None, "no class, while other images have one")],
)
def test_bad_labels_are_named_by_row(tmp_path, label, told):
    path = write_table(tmp_path / "a.parquet", PNGS, [0, 1, 2, label, 1, 0, 0, 0, 0, 0])
    with pytest.raises(UserError, match=f"row 3 of train: {told}"):
        load_images(config(path))


def test_a_column_of_no_class_is_said_to_have_none(tmp_path):
    path = write_table(tmp_path / "a.parquet", PNGS, [None] * 10)
    with pytest.raises(UserError, match="no class, as no image has one; data.label_column=null uses all"):
        load_images(config(path))


def test_unlabelled_rows_of_a_class_column(tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["cat", "dog"])
    path = write_table(tmp_path / "a.parquet", PNGS, [0, 1, 1, 1, 1, -1, 0, 0, 0, 0], feature=names)
    with pytest.raises(UserError, match="row 5 of train: the label is -1, allowed is 0 to 1"):
        load_images(config(path))


def test_the_working_folder_is_a_source(tmp_path, monkeypatch):
    write_table(tmp_path / "a.parquet", PNGS, list(range(10)))
    monkeypatch.chdir(tmp_path)
    assert len(load_images(config(".")).train) == 9


def test_a_name_that_is_there_is_no_pattern(tmp_path):
    """As patterns, both files are also `a1.parquet`."""
    write_table(tmp_path / "a1.parquet", PNGS, [0, 1] * 5)
    for name in ("a?.parquet", "a[1].parquet"):
        path = write_table(tmp_path / name, PNGS[:4], [0, 1, 0, 1])
        assert len(load_images(config(path)).train) == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_tables_that_would_be_a_pattern_is_refused(tmp_path, streaming):
    write_table(tmp_path / "a1" / "a.parquet", PNGS, [0, 1] * 5)
    write_table(tmp_path / "a?" / "a.parquet", PNGS[:4], [0, 1, 0, 1])
    with pytest.raises(UserError, match=r"a\?: a folder of tables cannot have \*, \? or \[ in its name; rename it"):
        load_images(config(tmp_path / "a?", streaming=streaming))


def test_columns_are_named_when_one_is_missing(tmp_path):
    path = write_table(tmp_path / "a.parquet", PNGS, list(range(10)), columns=("img", "fine"))
    with pytest.raises(UserError, match=r"no column 'image'; there are \['img', 'fine'\]"):
        load_images(config(path))
    with pytest.raises(UserError, match=r"no column 'class'; there are \['img', 'fine'\]"):
        load_images(config(path, image_column="img", label_column="class"))
    with pytest.raises(UserError, match="does not hold images"):
        load_images(config(path, image_column="fine"))
    with pytest.raises(UserError, match="no split 'validation'; it has train"):
        load_images(config(path, image_column="img", split="validation"))
    assert load_images(config(path, image_column="img", label_column="fine")).train.labels is not None


def test_bad_rows_are_named_by_row(tmp_path):
    path = write_table(
        tmp_path / "a.parquet", [*PNGS[:4], BAD["truncated"][0], BAD["text"][0], *PNGS[4:], None], list(range(13))
    )
    splits = load_images(config(path, on_error="skip", max_bad_fraction=1))
    problems = sorted(splits.train.bad + splits.held_out.bad)
    assert [problem.path for problem in problems] == ["row 12 of train", "row 4 of train", "row 5 of train"]
    kept = torch.cat([splits.train.labels, splits.held_out.labels]).tolist()
    assert sorted(kept) == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]


def test_where_all_are_bad_no_share_of_them_is_too_many(tmp_path):
    path = write_table(tmp_path / "a.parquet", [BAD["text"][0]] * 3, [0, 1, 2])
    with pytest.raises(UserError, match="^3 of 3 images cannot be decoded, all of a part that is trained on or held"):
        load_images(config(path, on_error="skip", max_bad_fraction=1))


# Sheets


def write_sheet(folder, rows, name="metadata.jsonl"):
    """A sheet of the images in `folder`, whose `rows` are mappings with `file_name`."""
    with open(folder / name, "w", newline="") as file:
        if name.endswith(".csv"):
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def sheet_of(folder, count, name="metadata.jsonl", *, listed=None, column="label"):
    """`count` images in a folder and a sheet of the first `listed` of them, of the classes x and y in turn."""
    for k in range(count):
        write_image(folder / f"{k:02}.png", noise(12, 12, seed=k))
    rows = [{"file_name": f"{k:02}.png", column: "xy"[k % 2]} for k in range(count if listed is None else listed)]
    write_sheet(folder, rows, name)


def images_of(splits):
    """The class name of each image by its pixels, whatever split it is in."""
    names = splits.train.class_names
    return {
        pixels: names[int(label)]
        for part in splits.by_name().values()
        for pixels, label in zip(bytes_of_each(part), part.labels, strict=True)
    }


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_sheet_gives_each_image_its_class(tmp_path, name, streaming):
    sheet_of(tmp_path, 12, name)
    expected = {noise(1, 12, 12, seed=k).tobytes(): "xy"[k % 2] for k in range(12)}
    assert images_of(load_images(config(tmp_path, streaming=streaming))) == expected
    sheet_of(tmp_path, 12, name, column="kind")
    assert images_of(load_images(config(tmp_path, streaming=streaming, label_column="kind"))) == expected


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_images_that_a_sheet_does_not_list_are_not_left_out_in_silence(tmp_path, name, streaming):
    sheet_of(tmp_path, 12, name, listed=5)
    with pytest.raises(UserError) as caught:
        load_images(config(tmp_path, streaming=streaming))
    message = str(caught.value)
    assert message.startswith("data.source: ") and f"7 of 12 images have no row in {name}" in message
    assert "05.png" in message and "\n" not in message


def test_every_split_of_a_folder_with_sheets_needs_one(tmp_path):
    sheet_of(tmp_path / "train", 12)
    sheet_of(tmp_path / "test", 4)
    assert len(load_images(config(tmp_path)).held_out) == 4
    (tmp_path / "test/metadata.jsonl").unlink()
    with pytest.raises(UserError, match=f"data.source: {tmp_path}/test: 4 of 4 images have no row"):
        load_images(config(tmp_path))
    (tmp_path / "train/metadata.jsonl").rename(tmp_path / "metadata.jsonl")
    with pytest.raises(UserError, match=f"data.source: {tmp_path}/metadata.jsonl: .* train, test"):
        load_images(config(tmp_path))


def test_images_of_any_split_and_of_any_name_are_found_by_their_sheet(tmp_path, capsys):
    """`datasets` takes `my_test.png` for a split, and knows no `holdout`."""
    sheet_of(tmp_path / "train", 12)
    sheet_of(tmp_path / "holdout", 3)
    (tmp_path / "train/00.png").rename(tmp_path / "train/my_test.png")
    write_sheet(tmp_path / "train", [{"file_name": path.name} for path in sorted(tmp_path.glob("train/*.png"))])
    assert len(load_images(config(tmp_path, held_out="holdout", label_column=None)).train) == 12
    assert capsys.readouterr().err == ""
    load_images(config(tmp_path, label_column=None))
    assert "not used: holdout" in capsys.readouterr().err


def test_a_sheet_may_name_other_files_of_a_row(tmp_path):
    """Masks, which are no images of the set by themselves."""
    sheet_of(tmp_path, 4)
    for k in range(4):
        write_image(tmp_path / f"masks/{k}.png", noise(12, 12, seed=50 + k))
    rows = [{"file_name": f"{k:02}.png", "mask_file_name": f"masks/{k}.png", "label": k % 2} for k in range(4)]
    write_sheet(tmp_path, rows)
    splits = load_images(config(tmp_path))
    assert len(splits.train) + len(splits.held_out) == 4


def test_a_sheet_without_classes_is_said_to_have_none(tmp_path, capsys):
    sheet_of(tmp_path, 4, column="author")
    assert load_images(config(tmp_path)).train.labels is None
    told = capsys.readouterr().err
    assert told.startswith("data.label_column: ") and "author" in told and told.count("\n") == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_of_no_split_are_said_to_be_unused(tmp_path, capsys, streaming):
    for name in ("train-0.parquet", "test-0.parquet", "holdout-0.parquet"):
        write_table(tmp_path / name, PNGS, [0, 1] * 5)
    capsys.readouterr()  # a progress bar
    load_images(config(tmp_path, streaming=streaming))
    told = capsys.readouterr().err.splitlines()
    assert (
        told[0].startswith("data.source: ") and "not used: holdout-0.parquet" in told[0] and len(told) == 1 + streaming
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_copy_that_is_large_is_announced_once(tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr("pipelines.images.tables.LARGE", 1)
    for rows, lines in ((rows_of(20), 1), (rows_of(20), 0), (rows_of(24), 1)):
        if lines:
            write_shards(tmp_path / "data", kind, rows, 2)
        time.sleep(0.01)  # a copy is new by its date
        splits = load_images(config(tmp_path / "data"))
        assert capsys.readouterr().err.count("were copied to ") == lines
        assert len(splits.train) + len(splits.held_out) == len(rows)  # a changed file is copied again


def test_a_data_set_reads_its_own_files_whatever_its_card_and_rows_name(tmp_path):
    write_table(tmp_path / "private/train.parquet", PNGS, [0, 1] * 5)
    write_image(tmp_path / "private/a.png", PNGS[0])
    folder = write_table(tmp_path / "mine/train.parquet", PNGS, [0, 1] * 5).parent
    for place in (f"{tmp_path}/private/train.parquet", "../private/*.parquet"):
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {place}\n---\n")
        for streaming in (False, True):
            with pytest.raises(UserError, match="^data.source: .*(names a file that is not its own|cannot be read)"):
                load_images(config(folder, streaming=streaming))
    (folder / "README.md").write_text('---\nconfigs:\n- config_name: default\n  data_files: "*.parquet"\n---\n')
    assert len(load_images(config(folder)).train) == 9
    for own in (True, False):
        write_image(folder / "a.png", PNGS[0])
        path = (folder if own else tmp_path / "private") / "a.png"
        rows = pa.array([{"bytes": None, "path": str(path)}] * 12)
        pq.write_table(pa.table({"image": rows}), folder / "train.parquet")
        if own:
            assert len(load_images(config(folder)).train) == 11
        else:
            with pytest.raises(UserError, match="names a file that is not the data set's own"):
                load_images(config(folder))
    write_image(tmp_path / "listed/0.png", PNGS[0])
    (tmp_path / "listed/metadata.csv").write_text("file_name,label\n0.png,a\n../private/a.png,b\n")
    with pytest.raises(UserError, match="it lists .*private/a.png, which is no image in"):
        load_images(config(tmp_path / "listed"))
