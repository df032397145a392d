"""Random crops: a function of (seed, epoch, row), at the image's own scale; a centred grid for other splits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from givens.images import config, noise, rows_of, write_image, write_shards
from PIL import Image

from pipelines.config import UserError
from pipelines.images import load_images
from pipelines.images.formats import OWN_SIZE, decode_image
from pipelines.processes.group import ALONE

SIDES = [(30, 41), (12, 12), (25, 12), (60, 33)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Distinct pixels in images of several sizes, in two classes and two splits."""
    root = tmp_path_factory.mktemp("crops")
    for split in ("train", "test"):
        for number in range(12):
            pixels = noise(*SIDES[number % 4], seed=number + 100 * (split == "test"))
            write_image(root / split / ("cat", "dog")[number % 2] / f"{number:02}.png", pixels)
    return root


def load(folder, **options):
    return load_images(config(folder, crop="random", validation_fraction=0, **options))


def place_of(crop, image):
    """The upper left pixel of a crop (1, h, w) in an image (1, H, W), or None."""
    _, height, width = crop.shape
    windows = np.lib.stride_tricks.sliding_window_view(image[0], (height, width))
    found = np.argwhere((windows == crop[0].numpy()).all((2, 3)))
    return tuple(found[0].tolist()) if len(found) else None


def image_of(images, row):
    with Image.open(images.config.path / images.names([row])[0]) as image:
        return decode_image(image, images.spec, least=OWN_SIZE)


@pytest.mark.parametrize("cache_mb", [0, 2048])
def test_each_row_is_a_crop_of_its_image_that_depends_on_seed_epoch_and_row_alone(folder, cache_mb):
    train = load(folder, crops_per_image=5, cache_mb=cache_mb).train
    assert len(train) == 60 and len(set(train.names(range(60)))) == 12
    indices, epochs = np.array([7, 33, 7, 59, 0, 34]), np.array([0, 2, 1, 2, 0, 2])
    (raw,) = train.raw_batch(indices, epochs, 5)
    for row, epoch, crop in zip(indices, epochs, raw, strict=True):
        assert place_of(crop, image_of(train, row)) is not None
        (alone,) = train.raw_batch([row], np.array([epoch]), 5, augment=False)
        assert torch.equal(alone[0], crop)
    assert not torch.equal(raw[0], raw[2])  # of another epoch
    assert not torch.equal(train.raw_batch(indices, epochs, 6)[0], raw)
    assert torch.equal(train.pixels(indices), train.raw_batch(indices, 0, 0)[0])
    assert torch.equal(train.labels, train.labels[::5].repeat_interleave(5))


def test_all_places_of_a_crop_are_equally_likely(tmp_path):
    for number in range(12):
        write_image(tmp_path / f"{number}.png", noise(14, 13, seed=number))
    train = load(tmp_path, crops_per_image=400, held_out_fraction=0.1).train
    places = [place_of(crop, image_of(train, 0)) for crop in train.pixels(range(400))]
    counts = np.bincount([2 * top + left for top, left in places], minlength=6)
    assert counts.min() > 400 / 6 - 4 * 400**0.5 / 2.4 and len(counts) == 6


def test_other_splits_have_a_centred_grid_of_crops(folder):
    one = load(folder).held_out
    assert len(one) == 12
    top, left = place_of(one.pixels([0])[0], image_of(one, 0))  # 30 x 41
    assert (top, left) == (9, 15)
    many = load(folder, crops_per_image=6).held_out  # a grid of 2 x 2
    assert len(many) == 48
    places = [place_of(crop, image_of(many, 0)) for crop in many.pixels(range(4))]
    assert places == [(4, 7), (4, 22), (14, 7), (14, 22)]
    assert torch.equal(many.raw_batch([3, 1], 4, seed=9)[0], many.pixels([3, 1]))


def test_crops_are_augmented_and_preloaded_like_other_images(folder):
    train = load(folder, crops_per_image=2, augment={"flip": True}).train
    raw, changes = train.raw_batch(range(24), 1, 3)
    assert torch.equal(raw, train.raw_batch(range(24), 1, 3, augment=False)[0]) and len(changes) == 24
    some = train.preload(torch.tensor([5, 2, 9]), ALONE)
    assert torch.equal(some.pixels([0, 1, 2]), train.pixels([5, 2, 9])) and some.names([1]) == train.names([2])
    assert torch.equal(some.batch([1]), train.batch([2])) and torch.equal(some.labels, train.labels[[5, 2, 9]])


def test_crops_need_random_access(tmp_path):
    write_shards(tmp_path, "tar", rows_of(8), 2)
    with pytest.raises(UserError, match=r"^data.crop: [^\n]*streaming=false[^\n]*$"):
        load(tmp_path, streaming=True)


def test_bad_images_are_skipped_and_counted(tmp_path):
    for number in range(20):
        write_image(tmp_path / f"{number:02}.png", noise(20, 20, seed=number))
    (tmp_path / "05.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="1 of 20 images cannot be decoded"):
        load(tmp_path)
    for cache_mb in (0, 64):
        splits = load(tmp_path, on_error="skip", max_bad_fraction=0.1, crops_per_image=2, cache_mb=cache_mb)
        assert sum(len(part.bad) for part in splits.by_name().values()) == 1
        names = {name for part in splits.by_name().values() for name in part.names(range(len(part)))}
        assert len(names) == 19 and "05.png" not in names
