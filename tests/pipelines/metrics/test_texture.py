"""Texture in flat areas: a pattern of known strength gives its strength, and what is no texture gives nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.images import to_float
from pipelines.metrics.reconstruction import look_figures, looks_of
from pipelines.metrics.texture import flat_windows, in_levels, texture_figures, texture_line
from pipelines.shuffling import spread

LEVEL = 1 / 127.5
SIDE = 64


def flat(level: float, *, channels: int = 3, side: int = SIDE, count: int = 1) -> Tensor:
    """Images of one grey level."""
    return to_float(torch.full((count, channels, side, side), int(level), dtype=torch.uint8))


def measured(decoded: Tensor, images: Tensor) -> dict[str, float | None]:
    figures = texture_figures(flat_windows(decoded, images))
    return {name: figures[f"texture_{name}"] for name in ("flat", "grid", "white")}


def wave(period: int, side: int = SIDE) -> Tensor:
    """Stripes both ways, of values -1 and 1, whose product repeats with `period` and has no slope in a window."""
    steps = torch.arange(side)
    stripe = torch.where(((steps + period // 4) % period) < period // 2, 1.0, -1.0)
    return stripe[:, None] * stripe


@pytest.mark.parametrize("strength", [0.5, 4.0])
@pytest.mark.parametrize(("period", "in_grid"), [(2, 1.0), (4, 1.0), (8, 0.0)])
def test_a_pattern_has_its_strength(period, in_grid, strength):
    images = flat(128)
    found = measured(images + strength * LEVEL * wave(period), images)
    assert found["flat"] == pytest.approx(strength, rel=1e-3)
    assert found["grid"] == pytest.approx(in_grid * strength, rel=1e-3, abs=1e-4)
    assert found["white"] is None


def test_a_long_period_is_half_slope():
    """Of a sine of period 16 a window sees at most half a period, which a plane takes most of."""
    images, steps = flat(128), torch.arange(SIDE)
    found = measured(images + 4 * LEVEL * torch.sin(2 * torch.pi * (steps + 0.5) / 16), images)
    assert 0.1 < found["flat"] < 0.5 * 4 / 2**0.5
    assert found["grid"] < 0.1 * 4


@pytest.mark.parametrize("wrong", ["color", "slope", "both"])
def test_a_wrong_colour_and_a_slope_are_no_texture(wrong):
    images, steps = flat(100), torch.arange(SIDE).float()
    color = torch.tensor([20.0, -30.0, 5.0])[:, None, None]
    slope = 0.6 * steps[:, None] - 0.4 * steps
    error = {"color": color, "slope": slope, "both": color + slope}[wrong]
    found = measured(images + LEVEL * error, images)
    assert found["flat"] == pytest.approx(0, abs=1e-4) and found["grid"] == pytest.approx(0, abs=1e-4)


def test_white_and_flat_windows_are_told_apart():
    images = torch.cat([flat(255), flat(250), flat(249), flat(60), flat(80)])
    strengths = torch.tensor([1.0, 1.0, 3.0, 5.0, 7.0])[:, None, None, None]
    figures = texture_figures(flat_windows(images + strengths * LEVEL * wave(2), images))
    assert figures["texture_white"] == pytest.approx(1, rel=1e-3)
    assert figures["texture_flat"] == pytest.approx(5, rel=1e-3)  # the median of 3, 5 and 7
    assert (figures["texture_white_windows"], figures["texture_flat_windows"]) == (2 * 64, 3 * 64)
    assert figures["texture_background"] == "white"


def test_the_background_is_the_commoner_extreme():
    """Of grey garments it is black; a white area is then one like others."""
    images = torch.cat([flat(0, channels=1, count=2), flat(255, channels=1)])
    strengths = torch.tensor([1.0, 1.0, 3.0])[:, None, None, None]
    figures = texture_figures(flat_windows(images + strengths * LEVEL * wave(4), images))
    assert (figures["texture_background"], figures["texture_white_windows"]) == ("black", 128)
    assert figures["texture_white"] == pytest.approx(1, rel=1e-3)
    assert figures["texture_flat"] == pytest.approx(3, rel=1e-3) == figures["texture_grid"]
    assert texture_line(figures).endswith("in black areas 1.00")


@pytest.mark.parametrize(("across", "counts"), [(8, True), (9, False)])
def test_flat_is_a_range_of_eight_levels(across, counts):
    images = flat(128).clone()
    images[..., ::2] += across * LEVEL
    figures = texture_figures(flat_windows(images, images))
    assert figures["texture_flat_windows"] == (64 if counts else 0)
    assert figures["texture_flat"] == (0 if counts else None)


def test_what_counts_is_brightness():
    images = flat(128)
    for channel, share in enumerate((0.299, 0.587, 0.114)):
        decoded = images.clone()
        decoded[:, channel] += 10 * LEVEL * wave(2)
        assert measured(decoded, images)["flat"] == pytest.approx(10 * share, rel=1e-3)


def test_small_images_have_overlapping_windows_and_tiny_ones_none():
    counts = {}
    for side in (64, 63, 28, 8, 7):
        images = flat(128, channels=1, side=side)
        counts[side] = texture_figures(flat_windows(images, images))["texture_flat_windows"]
    assert counts == {64: 64, 63: 14**2, 28: 36, 8: 1, 7: 0}


def test_no_flat_window_is_a_dash():
    images = torch.rand(2, 3, SIDE, SIDE)
    figures = texture_figures(flat_windows(images, images))
    assert [figures[f"texture_{name}"] for name in ("flat", "grid", "white")] == [None] * 3
    assert in_levels(None) == "-" and texture_line(figures).count(" -") == 3


@pytest.mark.parametrize("at_a_time", [3, 64])
def test_figures_do_not_depend_on_parts(at_a_time):
    """Over processes: `test_evaluate_together.py`."""
    levels = torch.arange(10.0) * 20 + 10
    images = torch.cat([flat(int(level)) for level in levels])
    decoded = images + LEVEL * (1 + images) * wave(2)

    def figures(looks: int) -> dict[str, Any]:
        looked, starts = spread(10, looks), range(0, 10, at_a_time)
        parts = [slice(start, start + at_a_time) for start in starts]
        return look_figures([looks_of(decoded[part], images[part], part.start, looked) for part in parts])

    found, few = figures(10), figures(4)
    assert found["texture_flat"] == pytest.approx(float((levels / 127.5).median()), rel=1e-3)
    assert (found["ssim_images"], found["texture_flat_windows"]) == (10, 640) and 0.5 < found["ssim"] < 1
    assert (few["ssim_images"], few["texture_flat_windows"]) == (4, 256)
    assert few["texture_flat"] == pytest.approx(float(levels[3] / 127.5), rel=1e-3)  # of images 0, 3, 6 and 9
