"""Files that change while a run reads them: the run ends, and says which file it was."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from givens.image_files import CHANGES, change, noise
from givens.image_folders import PNGS, config, write_folder, write_image, write_table

from pipelines.images import load_images
from pipelines.images.stamps import FileChanged
from tokenizer.files import read_bytes

LAZY = [{"cache_mb": 0}, {"streaming": True}]


def of(images, path):
    """The pixels of the image at `path`."""
    names = [images._rows.read([row])[0][0] for row in images._positions.tolist()]
    return images.pixels([names.index(str(path))])[0, 0].numpy()


def refuses(images, path):
    """Whether the image at `path` is refused as one that has changed, and not noted as a bad one."""
    with pytest.raises(FileChanged) as caught:
        of(images, path)
    told = f"{path}: it has changed since the run started; start the run again"
    return str(caught.value) == told and not images.report.problems


def lazily(folder, **options):
    """All images but one, read when they are due; bad ones would be skipped."""
    return load_images(config(folder, on_error="skip", max_bad_fraction=1.0, held_out_fraction=0.01, **options)).train


@pytest.mark.parametrize("how", [*CHANGES, "broken", "removed"])
@pytest.mark.parametrize("options", LAZY)
def test_a_file_that_changes_ends_the_run(tmp_path, options, how):
    """With its name, be it read before or not; the others are read on, time and again."""
    paths = [Path(path) for path in write_folder(tmp_path / "images", count=10)]
    other = Path(write_image(tmp_path / "other.png", noise(12, 12, seed=77)))
    train = lazily(tmp_path / "images", **options)
    for _ in range(2):
        assert (of(train, paths[3]) == noise(12, 12, seed=3)).all()
    if how == "removed":
        paths[3].unlink()
    elif how == "broken":
        paths[3].write_bytes(b"broken")
    else:
        assert paths[3].stat().st_size == other.stat().st_size
        change(paths[3], other, how)
    assert refuses(train, paths[3]) and refuses(train, paths[3])
    for k in (2, 4, 9):
        assert (of(train, paths[k]) == noise(12, 12, seed=k)).all()


@pytest.mark.parametrize("options", LAZY)
def test_a_folder_that_takes_the_name_of_another_is_noticed(tmp_path, options):
    """Its files are older than the run, and keep their dates; none was read before."""
    paths = write_folder(tmp_path / "images", count=10)
    for path in write_folder(tmp_path / "other", count=10, classes=("dog", "cat")):
        os.utime(path, (10**9, 10**9))
    train = lazily(tmp_path / "images", **options)
    (tmp_path / "images").rename(tmp_path / "older")
    (tmp_path / "other").rename(tmp_path / "images")
    assert all(refuses(train, path) for path in paths[1:6])


@pytest.mark.parametrize("options", LAZY)
def test_a_file_that_is_rewritten_during_a_read_is_noticed(tmp_path, monkeypatch, options):
    """It is opened, found to be the right one, and then written over."""
    paths = write_folder(tmp_path / "images", count=10)
    other = Path(write_image(tmp_path / "other.png", noise(12, 12, seed=77)))
    train = lazily(tmp_path / "images", **options)

    def read(path, limit):
        change(path, other, "rewritten")
        return read_bytes(path, limit)

    monkeypatch.setattr("pipelines.images.decoding.read_bytes", read)
    assert refuses(train, paths[3])


@pytest.mark.parametrize("options", LAZY)
def test_links_are_read_and_watched_where_they_lead(tmp_path, options):
    paths = write_folder(tmp_path / "elsewhere", count=10)
    for path in paths:
        link = tmp_path / "images" / Path(path).relative_to(tmp_path / "elsewhere")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    train = lazily(tmp_path / "images", **options)
    assert (of(train, tmp_path / "images/cat/003.png") == noise(12, 12, seed=3)).all()
    write_image(Path(paths[3]), noise(12, 12, seed=77))
    assert refuses(train, tmp_path / "images/cat/003.png")


@pytest.mark.parametrize("options", [{"cache_mb": 64}, *LAZY])
def test_a_file_that_is_no_image_stays_a_bad_one(tmp_path, options):
    """That was so from the start, and it is not a change: text, an empty file, and a link to nowhere."""
    write_folder(tmp_path, count=10)
    write_image(tmp_path / "cat/004x.png", b"text")
    write_image(tmp_path / "cat/005x.png", b"")
    (tmp_path / "cat/006x.png").symlink_to("nowhere.png")
    train = load_images(config(tmp_path, on_error="skip", max_bad_fraction=1.0, **options)).train
    for _ in range(2):
        assert len(train.pixels(range(len(train)))) == len(train)
    assert 2 <= train.report.bad <= 3  # one may be held out


def test_images_that_are_kept_do_not_need_their_files(tmp_path):
    paths = write_folder(tmp_path, count=10)
    train = load_images(config(tmp_path)).train
    expected = train.pixels(range(len(train)))
    for path in paths:
        Path(path).unlink()
    assert torch.equal(train.pixels(range(len(train))), expected)


def test_files_that_a_table_names_are_watched_too(tmp_path):
    """A folder with metadata, whose images `datasets` leaves where they are; beside them images in the table itself."""
    paths = write_folder(tmp_path / "images", count=10)
    lines = [f"{Path(path).relative_to(tmp_path / 'images')},{k % 2}" for k, path in enumerate(paths)]
    (tmp_path / "images/metadata.csv").write_text("file_name,label\n" + "\n".join(lines) + "\n")
    train = lazily(tmp_path / "images", cache_mb=0)
    assert (of(train, paths[3]) == noise(12, 12, seed=3)).all()
    write_image(Path(paths[3]), noise(12, 12, seed=77))
    assert refuses(train, paths[3]) and (of(train, paths[4]) == noise(12, 12, seed=4)).all()


def test_files_and_images_in_one_table(tmp_path):
    """Only the former can change. (`to_parquet` would put them into the table.)"""
    import datasets
    import pyarrow.parquet as pq

    files = write_folder(tmp_path / "images", count=5)
    images = [{"bytes": None, "path": path} for path in files] + [{"bytes": data, "path": None} for data in PNGS]
    table = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    pq.write_table(table.data.table, tmp_path / "a.parquet")
    train = lazily(tmp_path / "a.parquet", cache_mb=0)
    for path in files:
        write_image(Path(path), noise(12, 12, seed=77))
    found = [index for index, row in enumerate(train._positions.tolist()) if row >= 10]
    assert len(train) == 19 and len(found) >= 9
    expected = [noise(12, 12, seed=int(train._positions[index]) - 10) for index in found]
    assert (train.pixels(found)[:, 0].numpy() == np.stack(expected)).all()
    assert refuses(train, files[1]) and refuses(train, files[7])


def test_tables_are_read_as_they_were_copied(tmp_path):
    """`datasets` reads parquet once, into a cache that stays mapped when it is replaced or removed."""
    import datasets

    path = write_table(tmp_path / "a.parquet", PNGS, [0] * 10)
    train = lazily(path, cache_mb=0)
    write_table(path, PNGS[::-1], [0] * 10)
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE)
    for index, row in enumerate(train._positions.tolist()):
        assert (train.pixels([index])[0, 0].numpy() == noise(12, 12, seed=row)).all()
