"""Image data sets: indexing, caching and settings.

Covers: pipelines/images/dataset.py.
"""

import os
from pathlib import Path

import pydantic
import pytest
import torch
from givens.images import ALL, config, write_folder

from pipelines.images import DataConfig, ImageDataset, load_images
from pipelines.images.dataset import warn_about_colour
from pipelines.images.settings import OPTIONAL
from tokenizer.spec import to_uint8

ROOT = Path(__file__).parents[3]
REAL = Path(os.environ.get("SMALTI_DATA") or ROOT / "../shared/data").resolve()


def test_images_are_indexed_like_rows_of_a_tensor(tmp_path):
    write_folder(tmp_path)
    train = load_images(config(tmp_path)).train
    pixels = train.pixels(range(len(train)))
    order = torch.randperm(len(train))
    assert torch.equal(to_uint8(train.batch(order)), pixels[order]) and train.batch(order).dtype == torch.float32
    mask = train.labels == 1
    assert torch.equal(train.pixels(mask), pixels[mask]) and torch.equal(train.pixels([-1]), pixels[-1:])
    assert train.pixels([]).shape == (0, 1, 12, 12)
    for wrong in ([len(train)], mask[1:], [0.5]):
        with pytest.raises(IndexError, match=str(len(train))):
            train.pixels(wrong)


def test_images_decoded_on_access_equal_cached_ones(tmp_path):
    write_folder(tmp_path, shape=(30, 20))
    options = {"image_size": [12, 16], "channels": 3, "augment": ALL}
    cached, lazy = (load_images(config(tmp_path, cache_mb=mb, **options)) for mb in (64, 0))
    assert cached.train._pixels is not None and lazy.train._pixels is None
    for name, part in cached.by_name().items():
        other = lazy.by_name()[name]
        assert torch.equal(part.batch([1, 0, 1], epoch=4, augment=True), other.batch([1, 0, 1], epoch=4, augment=True))
        assert torch.equal(part.pixels(range(len(part))), other.pixels(range(len(part))))
    assert lazy.train.pixels([]).shape == (0, 3, 12, 16)


@pytest.mark.parametrize(("shape", "warns"), [((12, 12, 3), True), ((12, 12), False)])
def test_colour_images_that_become_grey_are_reported(tmp_path, capsys, shape, warns):
    write_folder(tmp_path, shape=shape)
    for channels in (1, 3):
        warn_about_colour(load_images(config(tmp_path, channels=channels)).train)
        assert ("data.channels=3" in capsys.readouterr().err) == (warns and channels == 1)


# Configuration


@pytest.mark.parametrize(
    "wrong",
    [
        {"range": (2, 1)},
        {"channels": 3, "show": (0, 1, 2)},
        {"image_size": [28, 100_000]},
        {"held_out": "train"},
        {"crops_per_image": 3},
    ],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(pydantic.ValidationError):
        DataConfig(**wrong)


SET = {"clips": True, "frames": 4, "group": "a", "key": "id", "dtype": "uint8", "range": (0.0, 9.0), "show": (2, 1, 0)}
SET |= {"crop": "random", "crops_per_image": 3, "binarize": "drawn", "alpha": True}


@pytest.mark.parametrize("key", OPTIONAL)
def test_settings_that_0_3_began_without_are_written_only_if_they_are_set(key):
    others = {"crops_per_image": {"crop": "random"}, "show": {"channels": 4}, "alpha": {"channels": 4}}
    used = DataConfig(**{key: SET[key], **others.get(key, {})})
    written = used.model_dump(mode="json")
    assert DataConfig.model_validate(written) == used
    assert OPTIONAL.keys() & written == {key, *others.get(key, {})} - {"channels"}
    assert "held_out" in written and not OPTIONAL.keys() & DataConfig().model_dump().keys()  # null, but not optional


# Real sets


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("fashion_mnist", {"limit": 500, "image_size": 28}, (500, 500)),
        ("openmoji", {"image_size": 64, "channels": 3}, (1446, 400)),
    ],
)
def test_real_sets(name, options, sizes):
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is not there")
    splits = load_images(config(REAL / name, **options))
    assert (len(splits.train), len(splits.held_out)) == sizes
    assert len(splits.train.class_names) == 10 and not splits.train.bad
    assert isinstance(splits.train, ImageDataset) and splits.train.batch([0, 1]).std() > 0.1
