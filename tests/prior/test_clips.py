"""Priors over grids (frames, rows, columns), beyond the promises of the family.

Covers: prior/masks.py, prior/transformer.py.
"""

import pytest
import torch
from givens.headed import CLIPS, make_model
from small import FLAT, draw_tokens, make_prior

from prior.masks import make_windows

CLIP = (3, 2, 3)


def test_priors_of_two_axes_refuse_clips_and_windows_lead_through_the_frames():
    assert {"gpt, clip", "blocks, clip", "masked, clip", "made, clip", "causal_conv, clip"} <= set(CLIPS)
    for name in FLAT:
        with pytest.raises(ValueError, match=f"^{name}: grid: [^\n]*$"):
            make_prior(name, CLIP)
    for name in ("gpt", "blocks"):
        field = make_model(f"windowed {name}, clip").receptive_field
        assert field[-6:, :6].any() and not field.equal(torch.ones(18, 18).tril(-1).bool())


@pytest.mark.parametrize("name", ["gpt", "blocks", "masked"])
def test_each_axis_has_its_own_positions(name):
    """Cells that differ along one axis alone have different learned embeddings and rotations."""
    model = make_prior(name, CLIP, vocab_size=1)
    assert [len(table) for table in model.axis_embeddings] == list(CLIP)
    table = model.rotations.table[-18:] if name == "blocks" else model.rotations.table[:18]
    assert len(table.flatten(1).unique(dim=0)) == 18
    with torch.no_grad():
        for axis, embedding in enumerate(model.axis_embeddings):
            before = model.outputs(draw_tokens(model, 1), model.encode_nothing(1))
            embedding[1] += 1
            assert not torch.equal(model.outputs(draw_tokens(model, 1), model.encode_nothing(1)), before), axis


def test_a_window_of_one_frame_sees_as_a_window_of_the_picture():
    """With a single frame, frames, rows and columns see the same keys as rows and columns do."""
    for order in ("raster", "random:2"):
        flat = make_prior("gpt", (4, 5), window=(1, 2), order=order)
        deep = make_prior("gpt", (1, 4, 5), window=(1, 1, 2), order=order)
        for one, other in zip(flat.layers, deep.layers, strict=True):
            for field in ("queries", "keys", "mask", "at"):
                assert getattr(one.window, field).equal(getattr(other.window, field))
    assert make_windows(torch.zeros(1, 4), torch.zeros(1, 4), (2, 1, 2), (1,), CLIP) == [None]
