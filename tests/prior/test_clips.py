"""Priors over grids (frames, rows, columns): the promises of the family, with and without windows.

Covers: prior/masks.py, prior/transformer.py.
"""

import pytest
import torch
from costs import all_steps
from frequencies import as_frequent
from givens.headed import all_grids, numbers_of
from small import FLAT, PRIORS, draw_known, draw_tokens, generators, logits_of, make_prior, moved_by

from prior.masks import make_windows

CLIP = (3, 2, 3)
MODELS = {name: (name, {}) for name in PRIORS if name not in FLAT}
MODELS |= {f"windowed {name}": (name, {"window": (1, 1, 1), "dilation": (2, 1)}) for name in ("gpt", "blocks")}
MODELS |= {"gpt, any order": ("gpt", {"any_order": True}), "blocks of 4": ("blocks", {"order": "raster/4"})}
MODELS |= {"gpt, random": ("gpt", {"order": "random:1"}), "blocks, random": ("blocks", {"order": "random:1:4"})}
every_model = pytest.mark.parametrize("name", MODELS)


def make_model(name, shape=CLIP, **config):
    kind, settings = MODELS[name]
    return make_prior(kind, shape, **{**settings, **config})


def test_priors_of_one_axis_or_of_all_take_clips_and_those_of_two_refuse_them():
    assert {"gpt", "blocks", "masked", "made", "causal_conv", "marginal"} <= set(MODELS)
    for name in FLAT:
        with pytest.raises(ValueError, match=f"^{name}: grid: [^\n]*$"):
            make_prior(name, CLIP)


@every_model
def test_logits_depend_on_earlier_blocks_only(name):
    """In raster order a frame does not depend on later frames."""
    model = make_model(name).double()
    tokens, labels = draw_tokens(model, 12), torch.arange(12) % 4
    field = model.receptive_field
    assert moved_by(model, tokens, labels, least=1e-13).equal(field)
    block_of = model.block_of
    assert not field[block_of[None] >= block_of[:, None]].any()
    if name in ("gpt", "blocks", "masked", "made"):
        assert field.equal(block_of < block_of[:, None])
    if name.startswith("windowed"):
        assert not field.equal(block_of < block_of[:, None]) and field[-6:, :6].any(), "no way through the frames"


@every_model
def test_probabilities_sum_to_one_and_samples_follow_them(name):
    model = make_model(name, (2, 1, 3), vocab_size=2).double()
    grids = all_grids(model.grid)
    expected = model.log_prob(grids, torch.ones(len(grids)).long()).detach().double().exp()
    assert abs(float(expected.sum()) - 1) < 1e-5
    drawn = model.float().sample(2500, torch.ones(2500).long(), generator=torch.Generator().manual_seed(5))
    assert as_frequent(numbers_of(drawn, model.grid), expected)


@every_model
def test_steps_equal_forward_and_all_paths_draw_the_same_tokens(name):
    model = make_model(name)
    labels, tokens, known = torch.arange(4), draw_tokens(model, 4), draw_known(model, 4, 0.4)
    for settings in ({}, {"tokens": tokens, "known": known, "guidance_scale": 1.5}):
        cached, uncached, parallel = (
            model.sample(4, labels, generator=generators(4), **settings, **path)
            for path in ({}, {"cache": False}, {"parallel": True})
        )
        assert torch.equal(cached, uncached) and torch.equal(cached, parallel)
        assert cached.shape == (4, *CLIP) and cached.unique().numel() > 1
    assert torch.equal(cached[known], tokens[known])
    model = model.double()
    with torch.no_grad():
        whole, steps = logits_of(model, tokens, labels), all_steps(model, tokens, labels)
    assert (steps - whole[:, model.order]).abs().max() < 1e-9


@pytest.mark.parametrize("name", [name for name, (_, more) in MODELS.items() if "order" not in more])
def test_bits_of_a_frame_add_up_and_do_not_depend_on_later_frames(name):
    model = make_model(name).double()
    tokens, labels = draw_tokens(model, 6), torch.arange(6) % 4
    frames = model.token_log_probs(tokens, labels).flatten(2).sum(2)
    torch.testing.assert_close(frames.sum(1).float(), model.log_prob(tokens, labels).float())
    for last in range(3):
        other = torch.cat([tokens[:, : last + 1], draw_tokens(model, 6)[:, last + 1 :]], 1)
        found = model.token_log_probs(other, labels).flatten(2).sum(2)
        torch.testing.assert_close(found[:, : last + 1], frames[:, : last + 1])
    if name != "marginal":
        assert not torch.allclose(model.token_log_probs(tokens.flip(0), labels).flatten(2).sum(2), frames)


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
