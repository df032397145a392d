"""A walk's plan, what a half-sampled batch remembers, and a step, each by what it says of itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prior.drawing import draw_part
from prior.requests import Rows, Walk, make_rows
from prior.sampling.steps import Plan, State, Steps, step_by_step
from prior.sampling.watching import Watch
from small import draw_tokens, generators, make_prior

from prior import Prior
from prior.sampling import GumbelNoise, Sampler


def rows_of(model: Prior, keep: torch.Tensor, **more: Any) -> Rows:
    """Of as many images as `keep` `(B, N)` has rows, in the model's own order."""
    rows = make_rows(model, len(keep), None, Sampler(), generators(len(keep)), None, None)
    given = draw_tokens(model, len(keep)).flatten(1)
    return Rows(rows.labels, rows.generators, given * keep, keep, model.order, model.blocks, rows.images, **more)


@pytest.mark.parametrize("wide", [False, True])
def test_a_state_writes_the_last_block_and_names_the_next(wide):
    path = torch.tensor([[3, 1, 0, 2], [2, 3, 1, 0]]) if wide else torch.tensor([3, 1, 0, 2])
    state = State(torch.zeros(2, 4).long(), torch.zeros(2).long(), path, (1, 2, 1))
    each = path.expand(2, 4)
    assert torch.equal(state.advance(None), each[:, :1])
    assert torch.equal(state.advance(torch.tensor([[5], [6]])), each[:, 1:3])
    assert torch.equal(state.advance(torch.tensor([[7, 8], [9, 4]])), each[:, 3:])
    state.tokens.scatter_(1, each[:, 3:], torch.tensor([[1], [2]]))
    assert torch.equal(state.tokens.gather(1, each), torch.tensor([[5, 7, 8, 1], [6, 9, 4, 2]]))
    assert (state.rank, state.block) == (4, 3)


def test_a_plan_ends_with_the_last_token_that_somebody_has_to_draw():
    model, keep = make_prior("blocks", order="rows"), torch.zeros(2, 12, dtype=torch.bool)
    cuts = [(0, 4), (4, 8), (8, 12)]
    assert Plan.of(rows_of(model, keep)) == Plan(cuts, [False] * 12, [False] * 12)
    keep[0, 8:] = keep[:, 1] = True
    plan = Plan.of(rows_of(model, keep))
    assert plan.cuts == cuts and plan.some_keep == [False, True, *[False] * 6, *[True] * 4]
    assert plan.all_keep == [False, True] + [False] * 10
    keep[1, 5:] = True
    assert Plan.of(rows_of(model, keep)).cuts == cuts[:2]
    keep[:, 1:] = True
    assert Plan.of(rows_of(model, keep)).cuts == cuts[:1]  # of which one is left
    keep[:] = True
    assert Plan.of(rows_of(model, keep)).cuts == []


def test_noise_is_drawn_ahead_for_a_gpu_as_far_as_it_is_needed():
    model, keep = make_prior("gpt"), torch.zeros(2, 12, dtype=torch.bool)
    keep[:, 7:] = True
    rows = rows_of(model, keep)
    for device, ahead in (("cpu", 0), ("cuda", 7), ("mps", 0)):
        there: Any = SimpleNamespace(grid=model.grid, device=torch.device(device))
        noise = Plan.of(rows).noise(there, rows)
        assert isinstance(noise, GumbelNoise) and noise.ahead == ahead and noise.device.type == device
        assert noise.generators is rows.generators and noise.shape == (12, 2, 5)
        assert Plan.of(rows_of(model, keep | True)).noise(there, rows).ahead == 0


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("cache", [True, False])
def test_steps_draw_what_the_logits_and_the_noise_say(cache, guidance):
    """One by one from whole passes; kept tokens are kept, and what rounding could turn is within its tolerance."""
    model, sampler = make_prior("gpt"), Sampler(guidance_scale=guidance)
    keep = torch.rand(3, 12) < 0.3
    rows = rows_of(model, keep)
    rows.labels[:] = torch.arange(3)
    noise = torch.stack([torch.rand(12, 5, generator=g) for g in generators(3)])
    steps = Steps(model, rows, sampler, cache)
    assert steps.drawn.equal(rows.given) and steps.drawn is not rows.given
    expected = rows.given.clone()
    with torch.no_grad():
        for rank in range(12):
            steps.take(rank, rank + 1, noise[:, rank : rank + 1], bool(keep[:, rank].any()), bool(keep[:, rank].all()))
            both = [model(expected.view(3, 3, 4), labels)[:, rank] for labels in (rows.labels, torch.full((3,), 3))]
            logits = both[0] if guidance == 1 else both[1] + guidance * (both[0] - both[1])
            drawn = (logits + noise[:, rank]).argmax(1)
            expected[:, rank] = torch.where(keep[:, rank], expected[:, rank], drawn)
            assert torch.equal(steps.drawn[:, : rank + 1], expected[:, : rank + 1]), rank
            assert len(steps.tokens) == 3 * sampler.copies and steps.could_turn[-1].shape == (3, 1)
    tokens, close = steps.result(12)
    assert torch.equal(tokens, expected) and close.shape == (3, 12)
    _, some = steps.result(4)
    assert some.shape == (3, 12) and torch.equal(some[:, :4], close[:, :4]) and not some[:, 4:].any()
    assert (steps.largest >= 1).all()


@pytest.mark.parametrize("kind", ["gpt", "masked"])
def test_tokens_that_all_keep_are_passed_by(kind):
    """A model that recomputes has nothing to do for them; one with a cache has to see them."""
    model, keep = make_prior(kind), torch.zeros(2, 12, dtype=torch.bool)
    keep[:, 2:5] = True
    rows = rows_of(model, keep)
    asked: list[int] = []
    forward = type(model).next_logits
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(type(model), "next_logits", lambda self, *given: asked.append(1) or forward(self, *given))
        watch = Watch(False, None, rows, model.grid.shape)
        tokens, close = step_by_step(model, rows, Sampler(), True, watch)
    assert len(asked) == (12 if kind == "gpt" else 9)
    assert torch.equal(tokens[keep], rows.given[keep]) and tokens.shape == close.shape == (2, 12)
    assert kind == "gpt" or not close[keep].any()


def test_parts_of_a_batch_are_watched_and_their_generators_moved_on():
    model, seen = make_prior("gpt"), []
    rows = rows_of(model, torch.zeros(2, 12, dtype=torch.bool))
    watch = Watch(False, lambda step: seen.append((step.number, step.rank)), rows, model.grid.shape)
    with torch.no_grad():
        tokens = draw_part(model, rows, Sampler(), Walk(), watch)
    assert seen == [(rank, rank + 1) for rank in range(12)] and torch.equal(watch.tokens, tokens)
    assert torch.equal(tokens.view(2, 3, 4), model.sample(2, generator=generators(2)))
    assert not torch.equal(rows.generators[0].get_state(), generators(2)[0].get_state())
