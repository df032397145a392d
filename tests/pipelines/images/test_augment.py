"""Augmentation: a function of seed, epoch and index, and as large as it is asked to be."""

import numpy as np
import pytest
import torch
from givens.image_files import noise
from givens.image_folders import ALL, config, write_folder

from pipelines.images import load_images, to_float, to_uint8
from pipelines.images.augment import AugmentConfig, affine_grid, draw_changes
from pipelines.images.dataset import prepare_images


def augmented(pixels: torch.Tensor, change: AugmentConfig) -> torch.Tensor:
    """uint8 images, augmented as floats."""
    return prepare_images(pixels, draw_changes(np.arange(len(pixels)), 0, change, 0), change)


@pytest.mark.parametrize("change", [{"flip": True}, {"shift": 2}, {"rotate": 20.0}, {"zoom": 0.3}, ALL.model_dump()])
def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path, change):
    write_folder(tmp_path, count=40, shape=(12, 10))
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


@pytest.mark.parametrize("change", [{"flip": True}, {"rotate": 20.0}, ALL.model_dump()])
def test_a_batch_of_several_epochs_travels_as_bytes_and_becomes_the_images_of_each(tmp_path, change):
    write_folder(tmp_path, count=40, shape=(12, 10))
    train = load_images(config(tmp_path, image_size=[12, 10], augment=change)).train
    indices, epochs = np.array([7, 2, 2, 0, 7, 11]), np.array([3, 1, 2, 3, 1, 2])
    pixels, changes = train.raw_batch(indices, epochs, 5)
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, train.pixels(indices)) and changes.shape == (6, 5)
    alone = [train.batch([i], seed=5, epoch=int(e), augment=True) for i, e in zip(indices, epochs, strict=True)]
    assert torch.equal(train.prepare(pixels, changes), torch.cat(alone))
    assert len(train.raw_batch(indices, epochs, 5, augment=False)) == 1


@pytest.mark.parametrize("change", [{"shift": 2}, {"rotate": 20.0, "zoom": 0.3, "flip": True}])
def test_pixels_are_those_of_the_plain_formula(change):
    """In NumPy and float64, an output pixel at a time: mirrored, then read between its four neighbours."""
    made, pixels = AugmentConfig(**change), torch.from_numpy(noise(5, 3, 7, 9))
    changes = draw_changes(np.arange(5), 4, made, 1)
    found = prepare_images(pixels, changes, made)
    for image, values, (mirror, cos, sin, down, right) in zip(found, pixels.numpy(), changes.tolist(), strict=True):
        plain = values[:, :, :: -1 if mirror else 1] / 127.5 - 1
        for row, column in np.ndindex(7, 9):
            y, x = row - 3 - down, column - 4 - right
            at = np.clip([sin * x + cos * y + 3, cos * x - sin * y + 4], 0, [6, 8])
            (top, left), (v, u) = low = np.floor(at).astype(int), at - np.floor(at)
            (bottom, other) = np.minimum(np.array(low[0]) + 1, [6, 8])
            upper = plain[:, top, left] * (1 - u) + plain[:, top, other] * u
            lower = plain[:, bottom, left] * (1 - u) + plain[:, bottom, other] * u
            assert np.allclose(image[:, row, column].numpy(), upper * (1 - v) + lower * v, atol=1e-5)


def test_no_augmentation_changes_nothing():
    pixels = torch.from_numpy(noise(8, 1, 9, 9))
    assert draw_changes(np.arange(8), 0, AugmentConfig(), 0) is None
    assert torch.equal(augmented(pixels, AugmentConfig()), to_float(pixels))


def test_shift_moves_by_every_whole_number_of_pixels_up_to_the_limit():
    pixels = torch.zeros(600, 1, 9, 11, dtype=torch.uint8)
    pixels[:, :, 4, 5] = 255
    moved = to_uint8(augmented(pixels, AugmentConfig(shift=1)))
    assert (moved == 255).sum((1, 2, 3)).eq(1).all() and ((moved == 0) | (moved == 255)).all()
    places = (moved == 255).nonzero()[:, 2:] - torch.tensor([4, 5])
    assert {tuple(p) for p in places.tolist()} == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}


def test_flip_mirrors_about_half_of_the_images():
    pixels = torch.from_numpy(noise(1, 1, 6, 6)).expand(400, -1, -1, -1)
    images, flipped = to_float(pixels), augmented(pixels, AugmentConfig(flip=True))
    is_flipped = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (is_flipped | (flipped == images).flatten(1).all(1)).all()
    assert 140 < is_flipped.sum() < 260


def test_rotation_and_zoom_reach_their_limits_without_shear():
    images = to_float(torch.from_numpy(noise(1, 1, 9, 9)))
    quarter = affine_grid(turned_and_scaled(90), 9, 9)
    turned = torch.nn.functional.grid_sample(images, quarter, padding_mode="border", align_corners=False)
    assert min((turned - images.rot90(k, (-2, -1))).abs().max() for k in (1, 3)) < 1e-4
    half, full = affine_grid(turned_and_scaled(0, 1 / 1.5), 9, 5), affine_grid(turned_and_scaled(0), 9, 5)
    assert torch.allclose(half * 1.5, full)
    oblong = affine_grid(turned_and_scaled(30), 8, 20) * torch.tensor([10.0, 4.0])
    steps = (oblong[0, 1:] - oblong[0, :-1]).norm(dim=-1), (oblong[0, :, 1:] - oblong[0, :, :-1]).norm(dim=-1)
    assert all(torch.allclose(step, torch.ones(()), atol=1e-5) for step in steps)  # pixels stay square
    made = AugmentConfig(rotate=90, zoom=0.5)
    cos, sin = draw_changes(np.arange(4000), 0, made, 0)[:, 1:3].T
    scales, angles = torch.hypot(cos, sin), torch.atan2(sin, cos).rad2deg()
    assert 1 / 1.5 - 1e-6 <= scales.min() < 0.67 and 1.99 < scales.max() <= 2 + 1e-6
    assert -90.001 < angles.min() < -89.9 and 89.9 < angles.max() < 90.001


def turned_and_scaled(degrees: float, scale: float = 1.0) -> torch.Tensor:
    """The changes of one image."""
    angle = np.radians(degrees)
    return torch.tensor([[0, np.cos(angle) * scale, np.sin(angle) * scale, 0, 0]], dtype=torch.float32)
