"""Image data sets: what is decoded, what is refused, and what a batch is a function of.

Covers: pipelines/images/dataset.py.
"""

import os
import re
from pathlib import Path

import numpy as np
import pydantic
import pytest
import torch
from givens.image_files import noise
from givens.image_folders import ALL, BAD, config, write_folder, write_image

from pipelines.config import UserError
from pipelines.images import DataConfig, ImageDataset, load_images, to_float, to_uint8
from pipelines.images.augment import AugmentConfig

ROOT = Path(__file__).parents[3]
REAL = Path(os.environ.get("SMALTI_DATA") or ROOT / "../shared/data").resolve()

# Pixels and floats


def test_every_uint8_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    images = to_float(pixels)
    assert images.min() == -1 and images.max() == 1
    assert torch.equal(to_uint8(images), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_batch_is_pixels_as_floats_in_any_order(tmp_path):
    write_folder(tmp_path)
    train = load_images(config(tmp_path)).train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_uint8(train.batch(order)), train.pixels(range(len(train)))[order])
    assert train.batch(np.arange(3)).dtype == torch.float32
    assert train.pixels([]).shape == (0, 1, 12, 12)
    assert torch.equal(train.pixels([-1]), train.pixels([len(train) - 1]))
    for wrong in ([-len(train) - 1], [len(train)]):
        with pytest.raises(IndexError, match=str(len(train))):
            train.pixels(wrong)


def test_a_mask_chooses_images_and_other_numbers_than_whole_ones_are_refused(tmp_path):
    """As numbers, those of a mask are 0 and 1: the first two images, again and again."""
    write_folder(tmp_path)
    train = load_images(config(tmp_path)).train
    mask = train.labels == 1
    places = mask.nonzero()[:, 0]
    assert 0 < len(places) < len(train) and torch.equal(train.pixels(mask), train.pixels(places))
    assert torch.equal(train.batch(mask.numpy()), train.batch(places))
    for wrong in (mask[1:], [True], [0.5], torch.ones(2)):
        with pytest.raises(IndexError, match=f"whole numbers, or a bool for each of {len(train)}$"):
            train.pixels(wrong)


# Bad images


def mixed_folder(root):
    """20 good images, and 3 of each bad kind among them."""
    good = write_folder(root)
    bad = {
        write_image(root / "cat" / f"{k:03}_{kind}.png", data): reason
        for k in range(3)
        for kind, (data, reason) in BAD.items()
    }
    return good, bad


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("cache_mb", [0, 64])
def test_bad_are_skipped_and_counted(tmp_path, capsys, cache_mb):
    good, bad = mixed_folder(tmp_path)
    splits = load_images(config(tmp_path, on_error="skip", max_bad_fraction=0.5, cache_mb=cache_mb))
    problems = {image.path: image.reason for image in splits.train.bad + splits.held_out.bad}
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
    write_folder(tmp_path, count=49)
    paths = [write_image(tmp_path / f"cat/x{k}.png", b"") for k in range(2)]  # 2 %
    with pytest.raises(UserError, match=r"max_bad_fraction=0.01(.|\n)*the file is empty"):
        load_images(config(tmp_path, on_error="skip"))
    monkeypatch.setenv("RANK", "1")
    splits = load_images(config(tmp_path, on_error="skip", max_bad_fraction=0.02))
    assert {image.path for image in splits.train.bad + splits.held_out.bad} == set(paths)
    assert capsys.readouterr().err == ""  # only rank 0 speaks


def test_lazily_decoded_images_equal_cached_ones(tmp_path):
    write_folder(tmp_path, shape=(30, 20))
    options = {"image_size": [12, 16], "channels": 3, "augment": ALL}
    cached, lazy = (load_images(config(tmp_path, cache_mb=mb, **options)) for mb in (64, 0))
    assert cached.train._pixels is not None and lazy.train._pixels is None
    indices = [5, 0, 5, 17]
    for images in ("train", "held_out"):
        a, b = getattr(cached, images), getattr(lazy, images)
        assert torch.equal(a.batch([1, 0, 1], epoch=4, augment=True), b.batch([1, 0, 1], epoch=4, augment=True))
    assert torch.equal(cached.train.pixels(indices), lazy.train.pixels(indices))
    assert lazy.train.pixels([]).shape == (0, 3, 12, 16)


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
        assert all(field.description and not field.description.endswith(".") for field in model.model_fields.values())


def test_nobody_disarms_the_guards_of_pillow():
    for package in ("tokenizer", "prior", "pipelines"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            assert "LOAD_TRUNCATED_IMAGES" not in text, path
            limits = re.findall(r"MAX_IMAGE_PIXELS(.*)", text)
            assert all(limit.startswith(" = MAX_PIXELS // 2") for limit in limits), path


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
    assert len(splits.train.class_names) == 10 and not splits.train.bad
    assert isinstance(splits.train, ImageDataset) and splits.train.batch([0, 1]).std() > 0.1
