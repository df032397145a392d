"""Tokenizers whose tokens mean the same in every crop (`local`), and tokenizers of another size."""

from __future__ import annotations

import pytest
import torch
from small import EMA, make_tokenizer

SHAPES = [
    {"factor": 8, "widths": (16, 16), "blocks": (1, 1)},
    {"factor": 2, "widths": (16,), "blocks": (2,)},
    {"factor": 4, "widths": (16,), "blocks": (1,), "upsampling": "nearest"},
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def make(shape, **config):
    torch.manual_seed(0)
    config = {"local": True, "quantizer": EMA, **shape, **config}
    made = make_tokenizer("vqvae", (64, 64), 1, **config).eval().double()
    return made


@every_shape
def test_a_pixel_depends_on_tokens_within_the_halo_and_on_no_other(shape):
    made = make(shape)
    large = made.resize(64, 512)
    tokens = torch.randint(32, (1, *large.grid.shape))
    at = large.grid.shape[1] // 2
    other = tokens.clone()
    other[..., at] = (tokens[..., at] + 1) % 32
    moved = (large.decode(tokens) != large.decode(other)).any(2).flatten()
    columns = torch.nonzero(moved)[:, 0] // shape["factor"]
    assert at - int(columns.min()) <= made.halo and int(columns.max()) - at <= made.halo
    assert at - int(columns.min()) >= made.halo - 1, "a halo wider than needed costs time"


@every_shape
def test_tokens_of_a_crop_are_those_of_the_whole_away_from_its_borders(shape):
    made = make(shape)
    image = torch.rand(1, 1, 64, 256, dtype=torch.float64) * 2 - 1
    whole, factor = made.resize(64, 256).encode(image), shape["factor"]
    crop = made.encode(image[..., 96:160])
    inner, first = slice(made.halo + 1, crop.shape[-1] - made.halo - 1), 96 // factor
    if inner.start < inner.stop:
        assert torch.equal(crop[..., inner], whole[..., first + inner.start : first + inner.stop])
    black = torch.full((1, 1, 64, 64), -1.0, dtype=torch.float64)
    assert len(made.encode(black).unique()) == 1, "borders are not seen as a change of brightness"


def test_group_norm_and_attention_see_the_whole_image():
    assert make(SHAPES[0], local=False).halo is None
    assert make(SHAPES[0], attention=True).halo is None


def test_files_of_other_tokenizers_stay_as_they_were():
    assert "local" not in make(SHAPES[0], local=False).config.to_dict()
    assert make(SHAPES[0]).config.to_dict()["local"] is True
