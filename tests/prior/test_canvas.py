"""Canvases: the chain of windows, its density, its noise, and which priors can continue it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from frequencies import as_frequent
from small import ANY_ORDER, make_prior

from prior.canvas import Canvas, Chain, canvas_log_probs, draw_canvas
from prior.given import Given
from prior.noise import draw_keys
from prior.options import DecodingOptions, SamplingOptions
from tokenizer import TokenGrid

SIZES = [((5, 7), (2, 2), (False, False)), ((7, 6), (1, 2), (True, True)), ((6, 7), (2, 1), (False, True))]
every_size = pytest.mark.parametrize(("size", "stride", "wrap"), SIZES, ids=str)
every_any_order = pytest.mark.parametrize("kind", ANY_ORDER)


def make(kind, shape=(4, 4), vocab=3, **config):
    """A small prior in float64, so that no two candidates tie within rounding."""
    return make_prior(kind, grid=TokenGrid(shape, vocab), **{**ANY_ORDER.get(kind, {}), **config}).double()


def draw(prior, chain, count=2, *, seed=0, tokens=None, known=None, given=None, batch_size=64, **settings):
    shape = (count, *chain.canvas.shape)
    tokens = torch.zeros(shape, dtype=torch.long) if tokens is None else tokens
    known = torch.zeros(shape, dtype=torch.bool) if known is None else known
    given = given or Given(prior.columns, {}, count * len(chain.corners))
    keys = draw_keys([torch.Generator().manual_seed(seed + k) for k in range(count)], count)
    sampling = prior.make_sampling_options(**settings)
    return draw_canvas(prior, chain, given, keys, tokens, known, sampling, DecodingOptions(), batch_size=batch_size)


def score(prior, chain, tokens, known=None):
    known = torch.zeros_like(tokens, dtype=torch.bool) if known is None else known
    given = Given(prior.columns, {}, len(tokens) * len(chain.corners))
    return canvas_log_probs(prior, chain, given, tokens, known)


class OneAtATime(Chain):
    """A chain in which each window is its own wave."""

    def plan_waves(self, known):
        return [[number] for number in self.sort_windows(known)]


def one_at_a_time(chain):
    return OneAtATime(chain.grid, chain.size, chain.stride, chain.wrap, chain.order)


@pytest.mark.parametrize("wrap", [(False, False), (False, True), (True, False), (True, True)])
def test_windows_across_the_right_border_the_lower_border_and_both_come_last(wrap):
    chain = Chain(TokenGrid((4, 4), 5), (9, 11), (2, 2), wrap)
    rows, columns = map(len, chain.starts)
    at = torch.arange(rows * columns)
    down, right = wrap[0] & (at // columns == rows - 1), wrap[1] & (at % columns == columns - 1)
    expected = torch.cat([at[~down & ~right], at[~down & right], at[down & ~right], at[down & right]])
    assert chain.sort_windows(torch.zeros(99, dtype=torch.bool)) == expected.tolist()


def test_windows_are_drawn_outwards_from_known_tokens():
    """From the upper left corner, a window far from the known part would be drawn as if it were not there."""
    chain = Chain(TokenGrid((4, 4), 5), (12, 12), (2, 2))
    known = torch.zeros(12, 12, dtype=torch.bool)
    known[6:8, 6:8] = True
    there = known.flatten().clone()
    for number in chain.sort_windows(known.flatten()):
        assert there[chain.indices[number]].any()
        there[chain.indices[number]] = True
    rows, windows, _, _ = next(iter(chain.steps(torch.stack([known.flatten(), torch.zeros(144).bool()]))))
    assert (0, windows[rows == 0].tolist()[0]) != (1, 0), "each canvas has its own order"
    assert windows[rows == 1].tolist() == [0]


@pytest.mark.parametrize(("size", "stride"), [((32, 32), (2, 2)), ((20, 28), (3, 2)), ((9, 31), (4, 3))], ids=str)
def test_windows_of_a_wave_share_no_token_and_waves_are_as_few_as_they_can_be(size, stride):
    chain = Chain(TokenGrid((4, 6), 5), size, stride)
    for wave in chain.waves:
        tokens = chain.indices[torch.tensor(wave)].flatten()
        assert len(tokens) == len(tokens.unique())
    rows, columns = map(len, chain.starts)
    reach = -(-6 // stride[1])
    assert len(chain.waves) <= columns + reach * (rows - 1)
    if (size[1] - 6) % stride[1] == 0 and columns >= reach:
        assert len(chain.waves) == columns + reach * (rows - 1)
    assert sorted(number for wave in chain.waves for number in wave) == list(range(rows * columns))


@every_size
def test_windows_cover_the_canvas_and_cross_only_borders_that_wrap(size, stride, wrap):
    chain = Chain(TokenGrid((4, 4), 5), size, stride, wrap)
    assert chain.indices.unique().tolist() == list(range(math.prod(size)))
    places = chain.indices[:, chain.grid.cells[:, 0]].view(-1, 4, 4)
    for axis, by in ((0, size[1]), (1, 1)):
        at = places // size[1] if axis == 0 else places % size[1]
        jumps = at.diff(dim=1 + axis) != 1
        assert bool(jumps.any()) == (wrap[axis] and size[axis] > 0), by


def test_ids_of_a_position_move_together():
    """Channels are interleaved rows, and levels follow each other; both keep their meaning in the canvas."""
    for given in ({"channels": 3}, {"levels": 2}):
        several = next(iter(given.values()))
        chain = Chain(TokenGrid((2 * several, 2), 9, **given), (4, 3), (1, 1))
        windows = chain.indices.view(-1, len(chain.grid))[:, chain.grid.cells]  # (windows, positions, ids)
        for (top, left), window in zip(chain.corners, windows, strict=True):
            expected = chain.canvas.cells.view(4, 3, several)[top : top + 2, left : left + 2].flatten(0, 1)
            assert torch.equal(window, expected)


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [5, 6, 7, 8, 11])
def test_tokens_at_a_border_that_wraps_are_drawn_given_both_sides(side, stride):
    """As long as a window draws the last tokens of a row without the first, copies side by side have a seam."""
    chain, before = Chain(TokenGrid((4, 4), 5), (4, side), (4, stride), (False, True)), torch.zeros(1, 4 * side)
    known = before.bool()
    *_, (_, windows, tokens, there) = chain.steps(known)
    new = tokens[0][~there[0]] % side
    assert windows.tolist() == [len(chain.corners) - 1]
    assert int(new.max()) == side - 1
    assert {int(new.min()) - 1, 0} <= set((tokens[0][there[0]] % side).tolist()), "it sees both sides"


@every_any_order
@every_size
def test_waves_draw_what_one_window_at_a_time_draws(kind, size, stride, wrap):
    prior = make(kind)
    chain = Chain(prior.grid, size, stride, wrap)
    drawn = draw(prior, chain)
    assert torch.equal(drawn, draw(prior, one_at_a_time(chain)))
    assert torch.equal(drawn, draw(prior, chain, batch_size=1))
    assert torch.equal(drawn[1:], draw(prior, chain, 1, seed=1)), "a seed is a canvas, whatever its batch"


@every_any_order
def test_the_density_of_a_chain_sums_to_one_and_samples_follow_it(kind):
    prior = make(kind, (2, 2), 2)
    for size, stride, wrap, order in [
        ((2, 3), (1, 1), (False, False), None),
        ((3, 3), (1, 2), (False, False), "column" if kind != "blocks" else None),
        ((2, 4), (1, 2), (False, True), None),
        ((3, 3), (1, 1), (True, True), None),
    ]:
        chain = Chain(prior.grid, size, stride, wrap, order)
        every = torch.tensor(list(itertools.product(range(2), repeat=math.prod(size)))).unflatten(1, size)
        nats = score(prior, chain, every).flatten(1).sum(1)
        assert nats.exp().sum().item() == pytest.approx(1, abs=1e-9)
        drawn = draw(prior, chain, 3000).flatten(1)
        numbers = (drawn * 2 ** torch.arange(drawn.shape[1] - 1, -1, -1)).sum(1)
        assert as_frequent(numbers, nats.exp())


@every_any_order
def test_the_density_given_known_tokens_sums_to_one_over_the_others(kind):
    prior = make(kind, (2, 2), 2)
    chain = Chain(prior.grid, (3, 3), (1, 1))
    known = torch.zeros(3, 3, dtype=torch.bool)
    known[0, 2] = known[1, 1] = known[2, 0] = True
    every = torch.zeros(64, 9, dtype=torch.long)
    every[:, ~known.flatten()] = torch.tensor(list(itertools.product(range(2), repeat=6)))
    every[:, known.flatten()] = torch.tensor([1, 0, 1])
    every, keep = every.unflatten(1, (3, 3)), known.expand(64, 3, 3)
    each = score(prior, chain, every, keep)
    assert not each[keep].any()
    assert each.flatten(1).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-9)
    drawn = draw(prior, chain, 4, tokens=every[:4], known=keep[:4])
    assert torch.equal(drawn[keep[:4]], every[:4][keep[:4]])


def test_a_canvas_that_is_continued_equals_one_that_was_drawn_at_once():
    prior = make("gpt")
    whole = draw(prior, Chain(prior.grid, (10, 6), (2, 2)))
    first = draw(prior, Chain(prior.grid, (6, 6), (2, 2)))
    assert torch.equal(first, whole[:, :6])
    wide, narrow = (draw(prior, Chain(prior.grid, (4, side), (2, 2))) for side in (10, 6))
    assert torch.equal(wide[..., :6], narrow), "a place has the same noise in a canvas of any width"
    tokens, known = torch.zeros_like(whole), torch.zeros_like(whole, dtype=torch.bool)
    tokens[:, :6], known[:, :6] = first, True
    assert torch.equal(draw(prior, Chain(prior.grid, (10, 6), (2, 2)), tokens=tokens, known=known), whole)


def test_a_prior_with_one_order_continues_only_along_it():
    prior = make("gpt", any_order=False, order="raster")
    chain = Chain(prior.grid, (10, 4), (2, 2))
    drawn = draw(prior, chain)
    assert torch.equal(drawn, draw(prior, one_at_a_time(chain)))
    own = make("gpt", (2, 2), 2, any_order=False, order="raster")
    tall = Chain(own.grid, (4, 2), (1, 1))
    every = torch.tensor(list(itertools.product(range(2), repeat=8))).unflatten(1, (4, 2))
    assert score(own, tall, every).flatten(1).sum(1).exp().sum().item() == pytest.approx(1, abs=1e-9)
    for refused in (Chain(prior.grid, (4, 6), (2, 2)), Chain(prior.grid, (7, 4), (2, 2), (True, False))):
        with pytest.raises(ValueError, match=r"one order, 'raster'.*any-order prior"):
            draw(prior, refused)
    estimates = make("masked", exact=False)
    with pytest.raises(ValueError, match="exact=False; set prior.exact = True"):
        draw(estimates, Chain(estimates.grid, (6, 4), (2, 2)))


def test_each_window_has_its_own_condition():
    prior = make("gpt", num_classes=2)
    chain, count = Chain(prior.grid, (4, 12), (4, 4)), 8

    def with_labels(*labels):
        return draw(prior, chain, count, given=Given(prior.columns, {"label": torch.tensor(labels * count)}, 3 * count))

    mixed, plain = with_labels(0, 1, 0), with_labels(0, 0, 0)
    assert torch.equal(mixed[..., :4], plain[..., :4])
    assert torch.equal(mixed[..., 8:], plain[..., 8:]), "windows that do not overlap are independent"
    assert not torch.equal(mixed[..., 4:8], plain[..., 4:8])


@pytest.mark.parametrize("settings", [{"temperature": 0.5}, {"top_k": 2}, {"steps": 3}], ids=str)
def test_filters_and_steps_depend_on_the_place_alone(settings):
    prior = make("masked", vocab=5)
    chain = Chain(prior.grid, (6, 6), (2, 2))
    assert torch.equal(draw(prior, chain, **settings), draw(prior, one_at_a_time(chain), **settings))


def test_guidance_needs_a_condition_and_progress_is_reported_by_wave():
    prior, steps = make("gpt", num_classes=2), []
    chain = Chain(prior.grid, (4, 8), (4, 2))

    def report(step):
        steps.append((step.number, step.rank, step.known.sum(), step.tokens))

    with pytest.raises(ValueError, match="guidance_scale"):
        draw(prior, chain, guidance_scale=2.0)
    keys = torch.tensor([5])
    nothing = Given(prior.columns, {}, len(chain.corners))
    empty = torch.zeros(1, 4, 8, dtype=torch.long)
    final = draw_canvas(
        prior, chain, nothing, keys, empty, empty.bool(), SamplingOptions(), DecodingOptions(), on_step=report
    )
    assert [step[:3] for step in steps] == [(0, 16, 16), (1, 24, 24), (2, 32, 32)]
    assert torch.equal(steps[-1][-1], final)


BAD = [
    (TokenGrid((4,), 5), (8, 8), (2, 2), "two axes"),
    (TokenGrid((4, 4), 5), (3, 8), (2, 2), "smaller than a window"),
    (TokenGrid((4, 4), 5), (8, 8), (0, 2), "stride: must be from 1 to 4"),
    (TokenGrid((4, 4), 5), (8, 8), (2, 5), "stride: must be from 1 to 4"),
    (TokenGrid((4, 4), 5), (2048, 2048), (2, 2), "at most 2.20 tokens"),
]


@pytest.mark.parametrize(("grid", "size", "stride", "message"), BAD, ids=[case[-1] for case in BAD])
def test_a_chain_that_does_not_fit_is_refused(grid, size, stride, message):
    with pytest.raises(ValueError, match=message):
        Chain(grid, size, stride)


def test_a_canvas_of_another_prior_is_refused():
    prior, other = make("gpt"), make("masked")
    chain = Chain(prior.grid, (6, 6), (2, 2))
    tokens = draw(prior, chain)
    canvas = Canvas(tokens, chain, torch.zeros_like(tokens, dtype=torch.bool), prior.fingerprint())
    canvas.require(prior)
    with pytest.raises(ValueError, match="another prior"):
        canvas.require(other)
