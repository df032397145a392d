"""Settings of sampling and how they choose a token; batches, their orders, and what is reported of them."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import tqdm
from frequencies import as_frequent
from small import ANY_ORDER, draw_tokens, generators, make_prior
from torch import Tensor

from prior.masked import MaskedOptions
from prior.orders import make_order
from prior.sampling import (
    GREEDY,
    ORDERS,
    TOKENS,
    SamplingOptions,
    TokenNoise,
    draw_keys,
    gumbel_noise,
    likeliest,
    progress_bar,
)


def gumbel(shape: tuple[int, ...], seed: int) -> Tensor:
    """Noise of this shape."""
    keys = draw_keys(torch.Generator().manual_seed(seed), 1)
    return gumbel_noise(keys, TOKENS, 0, math.prod(shape)).view(shape)


# Settings


def test_numbers_of_numpy_and_torch_are_plain_numbers_in_settings():
    """So that a pipeline can hold them as its defaults, and save them."""
    given = {"temperature": np.float32(0.5), "top_k": np.int64(3), "top_p": torch.tensor(0.75)}
    options = MaskedOptions(**given, steps=np.int64(2))
    assert options == MaskedOptions(0.5, 3, 0.75, steps=2)
    assert json.loads(json.dumps(options.to_dict())) == options.to_dict()
    model, plain = make_prior("gpt"), {"temperature": 0.5, "top_k": 3, "top_p": 0.75}
    drawn = model.sample(2, generator=generators(2), **plain)
    for count in (np.int64(2), torch.tensor(2)):
        assert torch.equal(model.sample(count, generator=generators(2), **given), drawn)


# The course of guidance


def test_guidance_goes_from_the_unconditional_logits_through_the_conditional_ones():
    logits, guiding = torch.randn(4, 3, 5), SamplingOptions(guidance_scale=2.0)
    with_label, without = logits.chunk(2)
    assert SamplingOptions().guide(logits, 3.0) is logits
    for scale, by in ((0.0, 0.0), (1.0, 1.0), (2.5, 2.5), (torch.tensor([0.0, 1.0, 3.0]), [0.0, 1.0, 3.0])):
        found = guiding.guide(logits, scale)
        for at, each in enumerate(by if isinstance(by, list) else [by] * 3):
            torch.testing.assert_close(found[:, at], without[:, at] + each * (with_label - without)[:, at])
    each_image = guiding.guide(logits, torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(each_image, torch.stack([without[0], with_label[1]]))


def test_guidance_goes_from_its_scale_to_its_end():
    """In t, the rank of a token's block as a share of the last one's; the two ends to the last bit."""
    chain, cut = [1] * 5, (1, 3, 4)
    assert SamplingOptions(guidance_scale=0.1, guidance_end=0.7).scale_by_block(chain) == pytest.approx(
        [0.1, 0.25, 0.4, 0.55, 0.7]
    )
    for start, end, power in itertools.product((0.1, 1.0, 3.3), (0.0, 0.7, 4.1), (None, 0.5, 1.0, 2.75, 200.0)):
        options = SamplingOptions(guidance_scale=start, guidance_end=end, guidance_power=power)
        scales = options.scale_by_block(chain)
        assert (scales[0], scales[-1]) == (start, end) and options.scale_by_block([7]) == [start]
        assert scales == sorted(scales, reverse=end < start), "it goes one way, so that none is larger than both ends"
        assert options.rows_per_image == 2 and options.scale_by_block(cut)[1] == pytest.approx(
            options.scale_by_block(chain)[1]
        ), "1/4 of 4"
    options = SamplingOptions(guidance_end=3.0, guidance_power=2.0)
    assert options.scale_by_block(chain) == pytest.approx(
        [1 + (1 - math.cos(math.pi * (r / 4) ** 2)) for r in range(5)]
    )
    by_rank = SamplingOptions(guidance_end=3.0).scale_by_rank(cut, torch.device("cpu"))
    assert by_rank.tolist() == [1.0, 1.5, 1.5, 1.5, 3.0, 3.0, 3.0, 3.0], "tokens of a block are guided alike"


def test_a_course_that_ends_where_it_begins_is_constant():
    """The same numbers, not tensors of them: the same kernels, to the last bit."""
    for course in ({}, {"guidance_end": 1.7, "guidance_power": 2.0}):
        options = SamplingOptions(guidance_scale=1.7, **course)
        assert options.scale_by_rank((2, 3), torch.device("cpu")) == 1.7
        assert options.scale_by_block((2, 3)) == [1.7, 1.7]
    assert SamplingOptions(guidance_end=1.0).rows_per_image == 1
    assert SamplingOptions(guidance_scale=3.0, guidance_end=1.0).rows_per_image == 2


# Filters


def allowed(logits: list[float], top_k: int | None, top_p: float | None) -> set[int]:
    """Ids that may be drawn, by the definition."""
    ids = sorted(range(len(logits)), key=lambda number: -logits[number])[:top_k]
    shares, mass, kept = [math.exp(logits[number]) for number in ids], 0.0, set()
    for number, share in zip(ids, shares, strict=True):
        if mass < (2.0 if top_p is None else top_p) * sum(shares):
            kept.add(number)
        mass += share
    return kept


FILTERS = [(None, None), (3, None), (None, 0.7), (4, 0.6), (1, None), (7, 1.0), (None, 1e-9), (99, 0.9)]


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_tokens_have_the_frequencies_of_what_is_kept(top_k, top_p, temperature):
    """Renormalised probabilities of the tempered logits; nothing that is filtered out is ever drawn."""
    logits, count = torch.randn(7, generator=torch.Generator().manual_seed(3)) * 1.5, 20_000
    options = SamplingOptions(temperature, top_k, top_p)
    drawn = options.choose(logits.expand(count, 7), gumbel((count, 7), 1))
    kept = allowed((logits / temperature).tolist(), top_k, top_p)
    out = torch.tensor([number not in kept for number in range(7)])
    assert as_frequent(drawn, (logits / temperature).masked_fill(out, -torch.inf).softmax(0))


def test_the_likeliest_ids_up_to_a_mass():
    assert likeliest(torch.tensor([0.5, 0.3, 0.2]).log(), 0.7).tolist() == [True, True, False]
    assert likeliest(torch.tensor([0.2, 0.5, 0.3]).log(), 0.5).tolist() == [False, True, False]
    assert likeliest(torch.zeros(3), 0.5).tolist() == [True, True, False], "of equal ones the first"
    assert likeliest(torch.tensor([0.0, -torch.inf, 0.0]), 1.0).tolist() == [True, False, True]
    for seed in range(50):
        logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(seed)) * 3
        mass = float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
        for row, found in zip(logits.tolist(), likeliest(logits, mass), strict=True):
            assert set(found.nonzero()[:, 0].tolist()) == allowed(row, None, mass)


# Ties, and temperatures next to nothing


def flat(vocab_size):
    """A prior that thinks all ids equally likely, with and without a class."""
    model = make_prior("marginal", shape=(2, 3), vocab_size=vocab_size)
    torch.nn.init.constant_(model.table, 0.7)
    return model


PATHS = [{}, {"cache": False}, {"parallel": True}]


@pytest.mark.sparse
@pytest.mark.parametrize("vocab_size", [*range(2, 9), 16, 33, 64, 257, 600])
@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-7])
def test_the_first_of_equal_ids_is_taken(vocab_size, temperature):
    model, labels = flat(vocab_size), torch.arange(5) % 3
    for path, more in itertools.product(PATHS, ({}, {"guidance_scale": 2.0}, {"top_k": 2}, {"top_p": 0.5})):
        drawn = model.sample(5, labels, temperature=temperature, generator=generators(5), **path, **more)
        assert not drawn.any(), (path, more)
    logits = torch.zeros(4, vocab_size)
    logits[:, -1] = logits[:, vocab_size // 2] = 1.0
    assert (SamplingOptions(temperature=temperature).choose(logits, torch.rand(4, vocab_size)) == vocab_size // 2).all()


@pytest.mark.parametrize("temperature", [1e-39, 1e-42, 1e-45, GREEDY / 2, 2 * GREEDY])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.3}, {"top_k": 3}, {"top_k": 3, "top_p": 0.9}])
def test_next_to_no_temperature_takes_the_likeliest(temperature, settings):
    logits = 10 * torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    noise = gumbel(logits.shape, 2)
    assert torch.equal(SamplingOptions(temperature, **settings).choose(logits, noise), logits.argmax(1))
    model = make_prior("gpt")
    likeliest = model.sample(6, temperature=0.0)
    for path in PATHS:
        assert torch.equal(model.sample(6, temperature=temperature, **settings, **path), likeliest)


# Ids that are ruled out

RULED_OUT = [
    {},
    {"guidance_scale": 0.0},
    {"guidance_scale": 0.5},
    {"guidance_scale": 2.0},
    {"guidance_scale": 2.0, "temperature": 0.0},
    {"guidance_scale": 2.0, "top_k": 4},
    {"guidance_scale": 2.0, "top_p": 0.9},
    {"guidance_end": 3.0},
    {"top_k": 4, "top_p": 0.9},
]


@pytest.mark.parametrize("settings", RULED_OUT, ids=str)
def test_an_id_whose_logit_is_minus_infinity_is_never_drawn(settings):
    """4 with and without the class, 3 with it, 2 without it: what either rules out, guidance draws no more."""
    model, count = make_prior("marginal", shape=(2, 2), vocab_size=6), 500
    with torch.no_grad():
        model.table[..., 4] = model.table[1, :, 3] = model.table[-1, :, 2] = -torch.inf
    for path in PATHS:
        labels, seed = torch.ones(count, dtype=torch.long), torch.Generator().manual_seed(0)
        drawn = model.sample(count, labels, generator=seed, **settings, **path)
        allowed = {0, 1, 5} if "guidance_scale" in settings or "guidance_end" in settings else {0, 1, 2, 5}
        assert set(drawn.unique().tolist()) <= allowed


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_ids_that_are_not_ruled_out_are_as_frequent_as_ever(scale):
    model, count = make_prior("marginal", shape=(1, 1), vocab_size=5), 4000
    with torch.no_grad():
        model.table[..., 4] = -torch.inf
    drawn = model.sample(
        count, torch.ones(count).long(), guidance_scale=scale, generator=torch.Generator().manual_seed(0)
    )
    with_class, without = model.table[1, 0, :4], model.table[-1, 0, :4]
    expected = torch.zeros(5)
    expected[:4] = (without + scale * (with_class - without)).softmax(0)
    assert as_frequent(drawn.flatten(), expected)


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "steps": 2}], ids=str)
def test_what_a_network_rules_out_is_never_drawn(settings):
    """By each way of sampling."""
    model, labels = make_prior("masked", vocab_size=5), torch.arange(20) % 3
    model.head.register_forward_hook(
        lambda module, given, put_out: put_out.index_fill(-1, torch.tensor([4]), -torch.inf)
    )
    for path in [{}] if "steps" in settings else PATHS:
        assert int(model.sample(20, labels, generator=generators(20), **settings, **path).max()) < 4


# Several orders, where something is known


def conditional(model, known, given, labels, orders):
    """p(tokens | known) over all grids of `given` where known, of the mixture of `orders` with known tokens first, and
    of the mean of each one's own, which does not weigh them."""
    size, vocab = len(model.grid), model.grid.vocab_size
    grids = torch.tensor(list(itertools.product(range(vocab), repeat=size)))
    label, each = torch.full((len(grids),), labels), []
    for order in orders:
        walk = model.order if order is None else order
        first = torch.cat([walk[known[walk]], walk[~known[walk]]])
        each.append(model.log_prob(grids.reshape(-1, *model.grid.shape), label, first).detach().double().exp())
    fits = (grids[:, known] == given[known]).all(1)
    joint = torch.stack(each) * fits
    return joint.sum(0) / joint.sum(), (joint / joint.sum(1, keepdim=True)).mean(0)


@pytest.mark.parametrize(("name", "seed", "hidden"), [("gpt", 5, (0, 2)), ("made", 21, (0, 2))])
def test_an_order_is_as_likely_as_it_makes_what_is_known(name, seed, hidden):
    """Frequencies of the mixture's conditional, from all grids. The seeds are of models whose orders disagree much."""
    torch.manual_seed(seed)
    model, count = make_prior(name, (1, 4), 3, **ANY_ORDER[name]), 500
    if name == "gpt":
        model.head.weight.data *= 8
    given, known = torch.tensor([2, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    known[list(hidden)] = False
    orders = [None, *(make_order(f"random:{k}", (1, 4)) for k in (1, 2, 3))]
    expected, alike = conditional(model, known, given, 1, orders)
    drawn = model.sample(
        count,
        torch.ones(count, dtype=torch.long),
        generator=torch.Generator().manual_seed(5),
        tokens=given[None],
        known=known[None],
        num_orders=4,
    ).flatten(1)
    assert torch.equal(drawn[:, known], given[known].expand(count, -1))
    found = torch.bincount((drawn * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81).double() / count

    def apart(one, other):
        return float((one - other).abs().sum() / 2)

    assert apart(expected, alike) > 0.3, "too little to test anything"
    assert apart(found, expected) < 0.1 < 0.2 < apart(found, alike)


def test_where_nothing_is_known_all_orders_are_equally_likely():
    model = make_prior("gpt", any_order=True)
    chosen = gumbel_noise(draw_keys(generators(8), 8), ORDERS, 0, 3).argmax(1)
    assert chosen.unique().numel() > 1
    orders = torch.stack([model.order, *(make_order(f"random:{k}", (3, 4)) for k in (1, 2))])
    expected = model.sample(8, order=orders[chosen], generator=generators(8))
    nothing = {"tokens": torch.zeros(3, 4).long(), "known": torch.zeros(3, 4).bool()}
    for more in ({}, nothing):
        assert torch.equal(model.sample(8, num_orders=3, generator=generators(8), **more), expected)


# Batches


@pytest.mark.parametrize("kind", ["gpt", "masked"])
def test_steps_whose_tokens_are_all_known_need_no_pass(kind, monkeypatch):
    """A model with a cache has to see them; after the last unknown token nothing is left to do."""
    model, known = make_prior(kind), torch.zeros(3, 4, dtype=torch.bool)
    known.view(-1)[torch.tensor([2, 3, 4, 10, 11])] = True
    calls, real = [], type(model).next_logits
    monkeypatch.setattr(type(model), "next_logits", lambda self, *given: calls.append(1) or real(self, *given))
    tokens = draw_tokens(model, 2)
    plain = model.sample(2, generator=generators(2), tokens=tokens, known=known, order=None)
    assert len(calls) == (10 if kind == "gpt" else 7) and torch.equal(plain[:, known], tokens[:, known])


# Bars


def test_a_bar_has_the_arguments_of_the_caller(monkeypatch):
    bars = []
    monkeypatch.setattr(tqdm, "tqdm", lambda steps, **how: bars.append(how) or steps)
    steps, own = [1, 2, 3], {"desc": "sampling", "unit": "token", "leave": False, "disable": None}
    assert progress_bar(steps, False) is steps and bars == []
    assert progress_bar(steps, True) == steps and progress_bar(steps, {}, unit="pass") == steps
    assert progress_bar(steps, {"desc": "digits", "leave": True, "ncols": 3}) == steps
    assert bars == [own, {**own, "unit": "pass"}, {**own, "desc": "digits", "leave": True, "ncols": 3}]


# Lower precision


def test_weights_of_lower_precision_draw_from_nearly_the_same_distribution():
    """An image may differ (the same call draws the same); few decisions do, and float32 finds both as likely."""
    torch.manual_seed(0)
    fine, coarse = (make_prior("gpt", (4, 4), 9, depth=1) for _ in range(2))
    coarse.load_state_dict(fine.state_dict())
    coarse, count = coarse.bfloat16(), 400
    drawn, other, again = (model.sample(count, generator=generators(count)) for model in (fine, coarse, coarse))
    assert torch.equal(other, again)
    noise = TokenNoise(draw_keys(generators(count), count), 16, 9).of_ranks(0, 16)
    decisions = [(model(drawn).float() + noise).argmax(-1) for model in (fine, coarse)]
    assert torch.equal(decisions[0], drawn.flatten(1))
    assert 0 < (decisions[0] != decisions[1]).double().mean() < 0.03
    first, second = (fine.log_prob(tokens).detach().double() for tokens in (drawn, other))
    assert (first - second).mean().abs() < 4 * (first - second).std() / count**0.5 + 1e-3
    assert (coarse.log_prob(drawn) - fine.log_prob(drawn)).abs().mean() < 0.02 * first.abs().mean()
