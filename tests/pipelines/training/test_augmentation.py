"""DiffAugment: each kind changes what it should, and gradients pass through."""

from __future__ import annotations

import pytest
import torch

from pipelines.training.augmentation import AUGMENTATIONS, augment, color, cutout, translation

SHAPES = [(200, 3, 16, 24), (200, 1, 16, 24)]


def some(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 1.8 - 0.9


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kinds", [*((kind,) for kind in AUGMENTATIONS), tuple(AUGMENTATIONS)])
def test_augmentation_is_differentiable_and_seeded(kinds, shape):
    images = some(shape).requires_grad_()
    found = augment(images, kinds)
    assert found.shape == images.shape and not torch.equal(found, images)
    found.square().sum().backward()
    assert images.grad is not None and bool((images.grad.flatten(1).abs().amax(1) > 0).all())
    torch.manual_seed(0)
    assert torch.equal(augment(images, kinds[::-1]), found)
    assert not torch.equal(augment(images, kinds), found)
    assert augment(images.bfloat16(), kinds).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES)
def test_color_changes_brightness_saturation_and_contrast_within_their_ranges(shape):
    images = some(shape)
    found = color(images)
    moved = found.mean((1, 2, 3)) - images.mean((1, 2, 3))
    assert 0.4 < moved.max() <= 0.5 and -0.5 <= moved.min() < -0.4
    grey, before = found.mean(1), images.mean(1)
    contrast = grey.flatten(1).std(1) / before.flatten(1).std(1)
    assert 0.5 <= contrast.min() < 0.55 and 1.45 < contrast.max() <= 1.5
    if shape[1] == 3:
        spread = (found - grey[:, None]).flatten(1).std(1) / (images - before[:, None]).flatten(1).std(1)
        saturation = spread / contrast
        assert 0 <= saturation.min() < 0.1 and 1.9 < saturation.max() <= 2


@pytest.mark.parametrize("shape", SHAPES)
def test_translation_shifts_by_up_to_an_eighth(shape):
    images = some(shape)
    found, moves = translation(images), set()
    for image, moved in zip(images, found, strict=True):
        fits = [
            (down, across)
            for down in range(-2, 3)
            for across in range(-3, 4)
            if torch.equal(shifted(image, down, across), moved)
        ]
        assert len(fits) == 1
        moves.add(fits[0])
    assert {down for down, _ in moves} == set(range(-2, 3)) and {across for _, across in moves} == set(range(-3, 4))


def shifted(image: torch.Tensor, down: int, across: int) -> torch.Tensor:
    """Shift an image, filling with 0."""
    height, width = image.shape[1:]
    padded = torch.nn.functional.pad(image, (3, 3, 2, 2))
    return padded[:, 2 - down : 2 - down + height, 3 - across : 3 - across + width]


@pytest.mark.parametrize("shape", SHAPES)
def test_cutout_zeroes_a_rectangle_of_half_the_sides(shape):
    images = some(shape)
    found = cutout(images)
    holes = (found == 0).all(1)
    assert torch.equal(found, images * ~holes[:, None])
    rows, columns = holes.any(2), holes.any(1)
    assert torch.equal(holes, rows[:, :, None] & columns[:, None])
    assert set(rows.sum(1).tolist()) <= set(range(4, 9)) and set(columns.sum(1).tolist()) <= set(range(6, 13))
    assert rows.sum(1).max() == 8 and columns.sum(1).max() == 12
    assert bool(holes.any(0).all()), "a pixel is never cut out"
