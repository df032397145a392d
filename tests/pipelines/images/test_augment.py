"""Augmentation: a function of seed, epoch and index, and as large as it is asked to be."""

import numpy as np
import pytest
import torch
from image_files import noise
from image_folders import ALL, config, write_folder

from pipelines.images import load_images, to_float, to_uint8
from pipelines.images.augment import AugmentConfig, affine_grid, augment_images


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


def test_no_augmentation_changes_nothing():
    images = to_float(torch.from_numpy(noise(8, 1, 9, 9)))
    assert torch.equal(augment_images(images, np.arange(8), AugmentConfig(), 0, 0), images)


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
