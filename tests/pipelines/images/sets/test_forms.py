"""Sets of images, each form read back by a reader that is not ours.

Covers: pipelines/images/sets/npz.py, pipelines/images/sets/parquet.py, pipelines/images/sets/tar.py,
pipelines/images/sets/parts.py.
"""

from __future__ import annotations

import tarfile
import tracemalloc
import weakref
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from pipelines.config import UserError
from pipelines.files import Output
from pipelines.images import DataConfig, load_images
from pipelines.images.sets import Drawn, Facts, Part, check_out, form_of, save
from pipelines.images.sets.parts import regrouped

NAMES = ["cat", "dog", "eel"]
SUFFIXES = [".npz", ".parquet", ".tar"]


def pixels_for(count: int, channels: int) -> np.ndarray:
    """Random images, (B, H, W, C)."""
    return np.random.default_rng(0).integers(0, 256, (count, 8, 12, channels), dtype=np.uint8)


def write(
    out: Path, pixels: np.ndarray, labels: list[int] | None, size: int = 3, overwrite: bool = False, **options
) -> None:
    """A set in parts of `size`."""
    drawn, facts = Drawn(form_of(out).keep), Facts(len(pixels), 8, 12, None if labels is None else NAMES)
    drawn.add(pixels, labels)
    parts = [drawn.take(first, min(size, len(pixels) - first)) for first in range(0, len(pixels), size)]
    save(form_of(out), Output(out, overwrite=overwrite), iter(parts), facts, columns=4, **options)


def loaded(kind: str, tmp_path: Path, **options) -> datasets.Dataset:
    """What `datasets` reads."""
    return datasets.load_dataset(kind, split="train", cache_dir=str(tmp_path / "cache"), **options)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [None, [2, 0, 1, 2, 0, 1, 1]])
def test_npz_is_that_of_adm(tmp_path, channels, labels):
    pixels = pixels_for(7, channels)
    write(tmp_path / "set.npz", pixels, labels)
    with np.load(tmp_path / "set.npz") as found:
        assert sorted(found) == (["arr_0"] if labels is None else ["arr_0", "arr_1"])
        assert found["arr_0"].dtype == np.uint8 and found["arr_0"].shape == (7, 8, 12, 3)
        assert np.array_equal(found["arr_0"], np.broadcast_to(pixels, (7, 8, 12, 3)))
        assert labels is None or (found["arr_1"].dtype == np.int64 and found["arr_1"].tolist() == labels)
    assert zipfile.ZipFile(tmp_path / "set.npz").testzip() is None


@pytest.mark.parametrize("channels", [1, 3])
def test_parquet_is_that_of_datasets(tmp_path, channels):
    pixels, labels = pixels_for(7, channels), [2, 0, 1, 2, 0, 1, 1]
    write(tmp_path / "set.parquet", pixels, labels)
    rows = loaded("parquet", tmp_path, data_files=str(tmp_path / "set.parquet"))
    assert isinstance(rows.features["image"], datasets.Image) and rows.features["label"].names == NAMES
    assert rows["label"] == labels
    assert np.array_equal(np.stack([np.asarray(image) for image in rows["image"]]).reshape(pixels.shape), pixels)
    write(tmp_path / "bare.parquet", pixels, None)
    assert loaded("parquet", tmp_path, data_files=str(tmp_path / "bare.parquet")).column_names == ["image"]


def test_tar_is_that_of_webdataset(tmp_path):
    pixels, labels = pixels_for(7, 3), [2, 0, 1, 2, 0, 1, 1]
    write(tmp_path / "set.tar", pixels, labels)
    rows = loaded("webdataset", tmp_path, data_files=str(tmp_path / "set.tar"))
    assert rows["__key__"] == [f"{k:05d}" for k in range(7)] and [int(label) for label in rows["cls"]] == labels
    assert np.array_equal(np.stack([np.asarray(image) for image in rows["png"]]), pixels)
    write(tmp_path / "bare.tar", pixels, None)
    with tarfile.open(tmp_path / "bare.tar") as tar:
        assert tar.getnames() == [f"{k:05d}.png" for k in range(7)]


def test_a_folder_is_one_of_pictures(tmp_path):
    pixels = pixels_for(7, 1)
    write(tmp_path / "set", pixels, [2, 0, 1, 2, 0, 1, 1])
    rows = loaded("imagefolder", tmp_path, data_dir=str(tmp_path / "set"))
    assert np.array_equal(np.stack([np.asarray(image) for image in rows["image"]])[..., None], pixels)
    assert rows["label"] == [NAMES[label] for label in [2, 0, 1, 2, 0, 1, 1]]
    write(tmp_path / "bare", pixels, None)
    assert sorted(path.name for path in (tmp_path / "bare").iterdir()) == [f"{k:05d}.png" for k in range(7)]


def classes_read(folder: Path) -> dict[int, str | None]:
    """The class of each image by its first pixel, which differs, as `data.source` reads a folder."""
    images = load_images(DataConfig(source=str(folder), image_size=[8, 12], held_out_fraction=0.2))
    return {
        int(pixels[0, 0, 0]): None if part.labels is None else part.class_names[int(part.labels[k])]
        for part in images.named().values()
        for k, pixels in enumerate(part.pixels(range(len(part))))
    }


def marked(*marks: int) -> np.ndarray:
    """Grey images that are told apart by their grey."""
    return np.stack([np.full((8, 12, 1), mark, np.uint8) for mark in marks])


@pytest.mark.parametrize("names", [NAMES, ["10", "01", "1"], ["NA", "true", "null"], ["кошка", "a/b", 'x, "y"']])
def test_a_folder_has_the_class_of_each_image(tmp_path, names, monkeypatch):
    monkeypatch.setitem(globals(), "NAMES", names)
    write(tmp_path / "set", marked(0, 1, 2, 3, 4), [2, 0, 1, 2, 2])
    assert classes_read(tmp_path / "set") == {0: names[2], 1: names[0], 2: names[1], 3: names[2], 4: names[2]}


def test_images_that_join_a_folder_leave_the_others_their_classes(tmp_path):
    out = tmp_path / "set"
    write(out, marked(0, 1, 2, 3, 4), [0, 0, 0, 1, 1])
    write(out, marked(10, 11), [2, 2], overwrite=True)
    assert classes_read(out) == {10: "eel", 11: "eel", 2: "cat", 3: "dog", 4: "dog"}
    (out / "00004.png").unlink()
    write(out, marked(20), [1], overwrite=True)
    assert classes_read(out) == {20: "dog", 11: "eel", 2: "cat", 3: "dog"}
    write(out, marked(30, 31, 32, 33), None, overwrite=True)  # without classes, and no image has that of the one before
    assert classes_read(out) == dict.fromkeys((30, 31, 32, 33))


def test_somebodys_sheet_is_not_replaced(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/metadata.jsonl").write_text('{"file_name": "mine.png", "label": "mine"}\n')
    with pytest.raises(UserError, match="^out: "):
        check_out(form_of(tmp_path / "set"), Output(tmp_path / "set"), 3)
    with pytest.raises(UserError, match="^out: "):
        write(tmp_path / "set", marked(0, 1), [0, 1])
    assert "mine.png" in (tmp_path / "set/metadata.jsonl").read_text() and len(list((tmp_path / "set").iterdir())) == 1


@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_what_is_written_can_be_trained_on(tmp_path, suffix):
    """By `data.source`, labels and all."""
    pixels, labels = pixels_for(40, 1), [k % 3 for k in range(40)]
    write(tmp_path / f"set{suffix}", pixels, labels)
    options = {"image_size": 8, "channels": 1, "held_out_fraction": 0.25}
    images = load_images(DataConfig(source=str(tmp_path / f"set{suffix}"), **options))
    assert len(images.train) + len(images.held_out) == 40
    assert sorted(images.train.class_names) == (NAMES if suffix == ".parquet" else ["0", "1", "2"])


def test_grids_enlarge_and_order_images(tmp_path):
    pixels = pixels_for(7, 1)
    write(tmp_path / "grid.png", pixels, None)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    scale = 5  # 12 pixels become 60
    assert picture.shape == (2 * (8 * scale + 2) + 2, 4 * (12 * scale + 2) + 2, 3)
    sixth = picture[2 + 8 * scale + 2 :, 2 + 12 * scale + 2 :][: 8 * scale : scale, : 12 * scale : scale]
    assert np.array_equal(sixth, pixels[5].repeat(3, -1))


def test_the_same_images_are_the_same_file(tmp_path):
    for suffix in SUFFIXES:
        for size, name in ((64, "a"), (3, "b")):
            write(tmp_path / f"{name}{suffix}", pixels_for(230, 1), [k % 3 for k in range(230)], size)
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_set_replaces_a_file_only_if_that_is_asked_for(tmp_path, suffix):
    out = tmp_path / f"set{suffix}"
    write(out, pixels_for(7, 3), None)
    before = out.read_bytes()
    with pytest.raises(UserError, match="^out: "):
        write(out, pixels_for(5, 3), None)
    assert out.read_bytes() == before
    write(out, pixels_for(5, 3), None, overwrite=True)
    assert out.read_bytes() != before


@pytest.mark.parametrize("suffix", [*SUFFIXES, ""])
def test_only_a_part_is_in_memory(tmp_path, suffix):
    """40 MB in parts of half a MB; what pyarrow has is not counted, so parts have to be gone as well."""
    made, most = [], 0

    def parts():
        nonlocal most
        for number in range(80):
            part = Part(4 * number, [bytes(128 * 341 * 3) for _ in range(4)])
            made.append(weakref.ref(part))
            most = max(most, sum(one() is not None for one in made))
            yield part

    group = 2 * 100 * 128 * 341 * 3 if suffix == ".parquet" else 0  # of which pyarrow takes one as a whole
    tracemalloc.start()
    try:
        save(form_of(out := tmp_path / f"set{suffix}"), Output(out), parts(), Facts(320, 128, 341), columns=1)
        assert tracemalloc.get_traced_memory()[1] < group + (4 << 20) and most <= 2
    finally:
        tracemalloc.stop()
    size = sum(path.stat().st_size for path in (out.iterdir() if out.is_dir() else [out]))
    assert size >= 320 * 128 * 341 * 3


def test_a_tar_of_many_small_files_does_not_remember_them(tmp_path):
    parts = (Part(10 * k, [b"x"] * 10, [0] * 10) for k in range(100))
    tracemalloc.start()
    try:
        save(form_of(out := tmp_path / "set.tar"), Output(out), parts, Facts(1000, 8, 8, NAMES), columns=1)
        assert tracemalloc.get_traced_memory()[1] < 1 << 17
    finally:
        tracemalloc.stop()
    with tarfile.open(out) as tar:
        assert len(tar.getnames()) == 2000


def test_parts_are_cut_anew():
    for labels in (None, list(range(10))):
        parts = [Part(k, [b"%d" % k], None if labels is None else labels[k : k + 1]) for k in range(10)]
        found = list(regrouped(parts, 4))
        assert [(part.first, len(part.images)) for part in found] == [(0, 4), (4, 4), (8, 2)]
        assert b"".join(image for part in found for image in part.images) == b"0123456789"
        assert all(part.labels == (None if labels is None else labels[part.first :][:4]) for part in found)


def test_parts_survive_as_bytes():
    for labels in (None, [3, 1]):
        part = Part(5, [b"", b"abc"], labels)
        assert Part.from_bytes(part.to_bytes(), 5) == part


def test_a_million_images_have_names_of_one_length():
    assert Facts(100_000, 8, 8).key(7) == "00007" and Facts(100_001, 8, 8).key(7) == "000007"


@pytest.mark.parametrize("name", ["set.zip", "set.npy", "set.tar.gz", "grid.gif"])
def test_another_suffix_is_refused_in_one_line(name):
    with pytest.raises(UserError) as caught:
        form_of(Path(name))
    assert "should end in .png" in str(caught.value) and ".npz, .parquet, .tar" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
