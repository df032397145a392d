"""Clips as files that are read again as they were.

Covers: pipelines/images/animations.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipelines.config import UserError
from pipelines.images.animations import MILLISECONDS, MIN_SIDE, require_video, write_animation
from pipelines.images.clip_files import open_clip


def read_clip(path, mode="RGB"):
    """The frames of a file as the data set reads them."""
    clip = open_clip(str(path))
    return np.stack([np.asarray(clip.read(k, deep=False).convert(mode)) for k in range(len(clip))])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_holds_every_frame_also_equal_ones(tmp_path, channels):
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 6, (6, 7, 9, channels), dtype=np.uint8) * 40  # at most 216 colours
    clip[2] = clip[1]
    clip[4] = clip[5] = 0
    write_animation(clip, tmp_path / "it.gif")
    assert np.array_equal(read_clip(tmp_path / "it.gif"), np.broadcast_to(clip, (6, 7, 9, 3)))
    with Image.open(tmp_path / "it.gif") as image:
        assert image.n_frames == 6 and image.info["duration"] == MILLISECONDS and image.info["loop"] == 0


def test_a_gif_of_many_colours_has_near_ones_and_does_not_flicker(tmp_path):
    y, x = np.mgrid[:40, :40]
    clip = np.stack([np.stack([x * 6, y * 6, (x + y) * 3], -1)] * 4).astype(np.uint8)
    clip[1:, :8] = np.random.default_rng(0).integers(0, 256, (3, 8, 40, 3))
    write_animation(clip, tmp_path / "it.gif")
    found = read_clip(tmp_path / "it.gif").astype(int)
    assert np.abs(found - clip)[:, 8:].mean() < 12
    assert np.array_equal(found[0, 8:], found[1, 8:]) and np.array_equal(found[1, 8:], found[3, 8:])


@pytest.mark.parametrize(("size", "channels"), [((3, 201), 1), ((150, 131), 3)])
def test_an_mp4_is_read_again_at_any_size(tmp_path, size, channels):
    pytest.importorskip("av")
    clip = np.full((3, *size, channels), 200, np.uint8)
    clip[1], clip[..., -1] = 30, clip[..., -1] // 2
    write_animation(clip, tmp_path / "it.mp4")
    frames = read_clip(tmp_path / "it.mp4")
    assert len(frames) == 3 and min(frames.shape[1:3]) >= MIN_SIDE and not any(side % 2 for side in frames.shape[1:3])
    assert np.abs(frames.mean((1, 2)) - clip.mean((1, 2))).max() < 3
    assert np.abs(frames.astype(int) - clip[:, :1, :1]).max() < 6


def test_mp4_needs_an_extra_which_the_error_names(monkeypatch):
    monkeypatch.setattr("pipelines.images.animations.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^out: [^\n]*smalti\[video\][^\n]*$"):
        require_video("out")
