"""A prior step by step: with a fast path or without one, along its own walk and others, of positions of several ids."""

from __future__ import annotations

import pytest
import torch
from costs import all_steps
from givens.headed import make_headed
from prior.sampling.steps import State
from small import draw_tokens, generators, make_prior

from prior import Prior
from prior.heads import PositionSteps
from prior.orders import Partition, make_partition


@pytest.fixture(params=["gpt", "blocks"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Prior:
    """A kind that has written no fast path."""
    model = make_prior(request.param, any_order=True)
    monkeypatch.setattr(type(model), "make_cache", Prior.make_cache)
    return model


def walks(model: Prior) -> list[torch.Tensor | Partition | None]:
    """Its own, another one for all images, and one for each."""
    walk = make_partition("halton:4" if model.config.takes_blocks else "snake", (3, 4))
    return [None, walk, torch.rand(3, 12).argsort(1)]


def test_without_a_fast_path_steps_are_those_of_whole_passes(slow):
    tokens, labels = draw_tokens(slow, 3), torch.arange(3)
    for walk in walks(slow):
        state = slow.start(3, labels, walk)
        assert isinstance(state, State)
        order, blocks = walk if isinstance(walk, Partition) else (slow.order if walk is None else walk, slow.blocks)
        path, begin, last = order.expand(3, 12), 0, None
        given = {} if walk is None else {"order": order}
        if walk is not None and slow.config.takes_blocks:
            sizes = torch.tensor(blocks)
            numbers = torch.arange(len(blocks)).repeat_interleave(sizes)
            given = {"block_of": torch.empty_like(path).scatter_(1, path, numbers.expand(3, 12))}
        with torch.no_grad():
            whole = slow(tokens, labels, **given)
            for size in blocks:
                at = path[:, begin : begin + size]
                found = slow.next_logits(state, last)
                torch.testing.assert_close(found, whole[torch.arange(3)[:, None], at], rtol=1e-4, atol=1e-4)
                begin, last = begin + size, tokens.flatten(1).gather(1, at)


def test_without_a_fast_path_all_ways_of_sampling_draw_the_same(slow):
    labels = torch.arange(3)
    for walk in walks(slow):
        drawn = [slow.sample(3, labels, generator=generators(3), order=walk, cache=cache) for cache in (True, False)]
        assert torch.equal(*drawn)


@pytest.mark.parametrize("kind", ["gpt", "blocks"])
@pytest.mark.parametrize("order", ["raster", "snake"])
def test_positions_are_walked_one_id_after_the_other(kind, order):
    model = make_headed(kind, "depth", {"levels": 3}, order).double()
    state = model.start(2, None)
    assert isinstance(state, PositionSteps) and state.takes_blocks == (kind == "blocks")
    tokens = draw_tokens(model, 2)
    with torch.no_grad():
        whole = model(tokens)[:, model.order]
        assert (all_steps(model, tokens) - whole).abs().max() < 1e-9


def test_blocks_of_positions_are_walked_one_level_after_the_other():
    model = make_headed("blocks", "depth", {"levels": 3}, "halton:2").double()
    tokens, labels = draw_tokens(model, 2), torch.tensor([0, 3])
    assert max(model.blocks) > 1 and len(model.blocks) == 6
    with torch.no_grad():
        whole = model(tokens, labels)[:, model.order]
        assert (all_steps(model, tokens, labels) - whole).abs().max() < 1e-9


def test_without_labels_all_are_of_the_null_class():
    model = make_prior("gpt")
    assert model.class_ids(None, 4).tolist() == [3] * 4
    labels = torch.tensor([0, 1])
    assert model.class_ids(labels, 2) is labels
    drawn = [model.sample(2, given, generator=generators(2)) for given in (None, [3, 3])]
    assert torch.equal(*drawn)
