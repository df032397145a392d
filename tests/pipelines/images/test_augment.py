"""Augmentation: a function of (seed, epoch, index), up to the configured limits."""

import numpy as np
import pytest
import torch
from givens.images import ALL, config, noise, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.images import load_images
from pipelines.images.augment import AugmentConfig, draw_changes
from pipelines.images.dataset import prepare_images
from tokenizer.spec import to_float


@pytest.fixture(scope="module")
def pixels():
    return torch.from_numpy(noise(40, 3, 7, 9))


def augment(pixels, config, seed=0, epochs=0, indices=None):
    """uint8 images, augmented as floats."""
    indices = np.arange(len(pixels)) if indices is None else indices
    return prepare_images(pixels[indices], draw_changes(indices, epochs, config, seed), config)


@settings(max_examples=30, deadline=None)
@given(
    config=st.builds(
        AugmentConfig,
        flip=st.booleans(),
        shift=st.integers(0, 9),
        rotate=st.floats(0, 180),
        zoom=st.floats(0, 1, exclude_max=True),
    ),
    indices=st.lists(st.integers(0, 39), min_size=1, max_size=20),
    seed=st.integers(0, 2**63),
)
def test_augmentation_of_an_image_depends_on_seed_epoch_and_index_alone(pixels, config, indices, seed):
    """Not on its batch; shape and range stay."""
    indices, epochs = np.array(indices), np.arange(len(indices)) % 3
    found = augment(pixels, config, seed, epochs, indices)
    assert found.shape == (len(indices), 3, 7, 9) and found.dtype == torch.float32 and found.abs().max() <= 1
    for image, index, epoch in zip(found, indices, epochs, strict=True):
        assert torch.equal(augment(pixels, config, seed, int(epoch), np.array([index]))[0], image)
    if config == AugmentConfig():
        assert torch.equal(found, to_float(pixels[indices]))


def test_a_data_set_augments_its_batches_on_request(tmp_path):
    write_folder(tmp_path, count=10)
    train = load_images(config(tmp_path, augment=ALL)).train
    indices, epochs = np.array([7, 2, 2, 0]), np.array([3, 1, 2, 3])
    raw, changes = train.raw_batch(indices, epochs, 5)
    assert raw.dtype == torch.uint8 and torch.equal(raw, train.pixels(indices))
    assert torch.equal(changes, draw_changes(indices, epochs, train.config.augment, 5))
    alone = [train.batch([i], seed=5, epoch=int(e), augment=True) for i, e in zip(indices, epochs, strict=True)]
    assert torch.equal(train.prepare(raw, changes), torch.cat(alone))
    assert torch.equal(train.batch(indices), to_float(raw))
    assert len(train.raw_batch(indices, epochs, 5, augment=False)) == 1


@pytest.mark.parametrize("change", [{"shift": 2}, {"rotate": 20.0, "zoom": 0.3, "flip": True}])
def test_pixels_equal_a_plain_loop_of_mirroring_and_bilinear_interpolation(change, pixels):
    """In NumPy and float64, one output pixel at a time."""
    config = AugmentConfig(**change)
    changes = draw_changes(np.arange(5), 4, config, 1)
    found = prepare_images(pixels[:5], changes, config)
    for image, values, (mirror, cos, sin, down, right) in zip(found, pixels[:5].numpy(), changes.tolist(), strict=True):
        source = values[:, :, :: -1 if mirror else 1] / 127.5 - 1
        for row, column in np.ndindex(7, 9):
            y, x = row - 3 - down, column - 4 - right
            at = np.clip([sin * x + cos * y + 3, cos * x - sin * y + 4], 0, [6, 8])
            (top, left), (v, u) = low = np.floor(at).astype(int), at - np.floor(at)
            (bottom, other) = np.minimum(np.array(low[0]) + 1, [6, 8])
            upper = source[:, top, left] * (1 - u) + source[:, top, other] * u
            lower = source[:, bottom, left] * (1 - u) + source[:, bottom, other] * u
            assert np.allclose(image[:, row, column].numpy(), upper * (1 - v) + lower * v, atol=1e-5)


def test_changes_are_uniform_up_to_their_limits():
    mirror, cos, sin, down, right = draw_changes(
        np.arange(4000), 0, AugmentConfig(flip=True, shift=1, rotate=90, zoom=0.5), 0
    ).T
    assert 1800 < mirror.sum() < 2200
    assert {*zip(down.tolist(), right.tolist(), strict=True)} == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    scales, angles = torch.hypot(cos, sin), torch.atan2(sin, cos).rad2deg()
    assert 1 / 1.5 - 1e-6 <= scales.min() < 0.67 and 1.99 < scales.max() <= 2 + 1e-6
    assert -90.001 < angles.min() < -89.9 and 89.9 < angles.max() < 90.001
