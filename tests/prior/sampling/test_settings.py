"""Which token is chosen, how surely, and with whose generator.

Covers: prior/sampling/filters.py, prior/sampling/generators.py, prior/sampling/progress.py.
"""

import inspect
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from costs import all_steps
from frequencies import as_frequent
from prior.sampling.filters import Kept, keep_top_k, keep_top_p
from prior.sampling.generators import LOW_BITS, check_count, whole_number
from prior.sampling.settings import GREEDY
from small import ANY_ORDER, PRIORS, draw_tokens, generators, make_prior

from prior import Prior
from prior.orders import make_order
from prior.sampling import GumbelNoise, Sampler, gumbel, image_generators, image_seeds
from tokenizer import TokenGrid

# Rounding


def sharpened(model, deviation):
    """`model` with logits of that deviation, by the scale of what makes them."""
    tokens = torch.randint(model.grid.vocab_size, (2, *model.grid.shape))
    made_by = {"marginal": ("table",), "made": ("output", "biases.2", "head_bias")}.get(model.name, ("head.",))
    with torch.no_grad():
        factor = deviation / model(tokens).std()
        for name, parameter in model.named_parameters():
            if name.startswith(made_by):
                parameter.mul_(factor)
    return model


def ways_to_compute(model, tokens, labels):
    """Logits `(B, N, V)` in the model's order: by a pass over each image alone, and by steps of few and many rows."""

    def steps(rows):
        return all_steps(model, tokens[rows], labels[rows]).float()

    images = torch.arange(len(tokens))
    with torch.inference_mode():
        alone = torch.cat([model(tokens[k], labels[k]) for k in images.split(1)])[:, model.order]
        return alone, [
            steps(images),
            torch.cat([steps(k) for k in images.split(1)]),
            model(tokens, labels)[:, model.order],
        ]


def scales_of(sampler, model):
    """The scale of guidance at each rank of the model's own walk."""
    return sampler.scales_by_rank(model.blocks, model.device)


def turned(model, sampler, ways, draws):
    """How many of `draws` decisions per row come out otherwise, and how many of these with a lead above the tolerance.
    Guided rows are those of twice as many images."""
    alone, others = ways
    largest, scale = sampler.largest(alone).cummax(1).values.clamp(min=1), scales_of(sampler, model)
    tolerance, found = sampler.tolerance(model.rounding, scale) * largest, [0, 0]
    for other, _ in itertools.product(others, range(draws)):
        noise = gumbel(sampler.guide(alone, scale).shape, torch.default_generator)
        wanted = sampler.choose(sampler.guide(alone, scale), noise)
        ids, close = sampler.decide(sampler.guide(other, scale), noise, tolerance)
        found[0] += int((ids != wanted).sum())
        found[1] += int(((ids != wanted) & ~close).sum())
    return found


@pytest.mark.sparse
@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("deviation", [1.0, 15.0])
def test_rounding_turns_no_decision_with_a_lead_above_the_tolerance(name, deviation):
    """No noise whatever could: two logits of a row never differ by more. And in 30,000 draws none."""
    torch.manual_seed(0)
    model = sharpened(make_prior(name, shape=(4, 4), vocab_size=17), deviation)
    tokens, labels = torch.cat([draw_tokens(model, 4)] * 2), torch.tensor([0, 1, 2, 1, 3, 3, 3, 3])
    ways = ways_to_compute(model, tokens, labels)
    for sampler in (Sampler(), Sampler(guidance_scale=4.0), Sampler(guidance_scale=0.3), Sampler(guidance_end=4.0)):
        scale, largest = scales_of(sampler, model), sampler.largest(ways[0]).cummax(1).values.clamp(min=1)
        allowed = sampler.tolerance(model.rounding, scale) * largest
        for other in ways[1]:
            off = sampler.guide(other, scale) - sampler.guide(ways[0], scale)
            assert (off.amax(-1) - off.amin(-1) <= allowed / 2).all(), "less than half is to spare"
    for settings in ({}, {"temperature": 0.5, "top_p": 0.9, "top_k": 12}, {"guidance_scale": 4.0, "guidance_end": 1.0}):
        assert turned(model, Sampler(**settings), ways, 30)[1] == 0


@pytest.mark.slow
def test_rounding_of_a_deep_model_turns_decisions_but_none_above_the_tolerance():
    """A million of 512 x 12, whose logits have a deviation of 10."""
    torch.manual_seed(0)
    model = Prior.create("gpt", grid=TokenGrid((16, 16), 512), num_classes=3, dim=512, depth=12, heads=8).eval()
    ways = ways_to_compute(sharpened(model, 10.0), torch.randint(512, (2, 16, 16)), torch.arange(2))
    some, above = turned(model, Sampler(), ways, 660)
    assert some > 0 and above == 0


# The course of guidance


def test_guidance_goes_from_its_scale_to_its_end():
    """In t, the rank of a token's block as a share of the last one's; the two ends to the last bit."""
    chain, cut = [1] * 5, (1, 3, 4)
    assert Sampler(guidance_scale=0.1, guidance_end=0.7).scales(chain) == pytest.approx([0.1, 0.25, 0.4, 0.55, 0.7])
    for start, end, power in itertools.product((0.1, 1.0, 3.3), (0.0, 0.7, 4.1), (None, 0.5, 1.0, 2.75, 200.0)):
        sampler = Sampler(guidance_scale=start, guidance_end=end, guidance_power=power)
        scales = sampler.scales(chain)
        assert (scales[0], scales[-1]) == (start, end) and sampler.scales([7]) == [start]
        assert scales == sorted(scales, reverse=end < start), "it goes one way, so that none is larger than both ends"
        assert sampler.copies == 2 and sampler.scales(cut)[1] == pytest.approx(sampler.scales(chain)[1]), "1/4 of 4"
    sampler = Sampler(guidance_end=3.0, guidance_power=2.0)
    assert sampler.scales(chain) == pytest.approx([1 + (1 - math.cos(math.pi * (r / 4) ** 2)) for r in range(5)])
    by_rank = Sampler(guidance_end=3.0).scales_by_rank(cut, torch.device("cpu"))
    assert by_rank.tolist() == [1.0, 1.5, 1.5, 1.5, 3.0, 3.0, 3.0, 3.0], "tokens of a block are guided alike"


def test_a_course_that_ends_where_it_begins_is_constant():
    """The same numbers, not tensors of them: the same kernels, to the last bit."""
    for sampler in (Sampler(guidance_scale=1.7), Sampler(guidance_scale=1.7, guidance_end=1.7, guidance_power=2.0)):
        assert sampler.scales_by_rank((2, 3), torch.device("cpu")) == 1.7 and sampler.scales((2, 3)) == [1.7, 1.7]
    assert Sampler(guidance_end=1.0).copies == 1 and Sampler(guidance_scale=3.0, guidance_end=1.0).copies == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_end": -1.0}, r"guidance_end must be a finite number >= 0, or None \(got -1.0\)"),
        ({"guidance_end": float("nan")}, "guidance_end must be a finite number"),
        ({"guidance_end": float("inf")}, "guidance_end must be a finite number"),
        ({"guidance_end": 2.0, "guidance_power": 0.0}, "guidance_power must be a finite number > 0"),
        ({"guidance_end": 2.0, "guidance_power": float("inf")}, "guidance_power must be a finite number > 0"),
        ({"guidance_power": 2.0}, "guidance_power needs a guidance_end"),
    ],
)
def test_a_course_that_goes_nowhere_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampler(**settings)


# Filters


def test_the_examples_of_the_filters():
    """Those of their docstrings: what is kept, what might be, and what is in any case."""
    by_count = keep_top_k(torch.tensor([5.0, 3.0, 2.9, 1.0]), 2, torch.tensor([0.2]))
    assert [each.tolist() for each in by_count] == [
        [True, True, False, False],
        [True, True, True, False],
        [True, False, False, False],
    ]
    everything = Kept(*torch.ones(3, 3, dtype=torch.bool))
    by_mass = keep_top_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.7, torch.tensor([0.25]), everything)
    assert [each.tolist() for each in by_mass] == [[True, True, False], [True, True, True], [True, False, False]]


def test_the_mass_is_of_what_top_k_keeps():
    """Of 0.4, 0.3, 0.2 and 0.1 the first two have 0.7 of all mass, and all of it once only they are left."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    drawn = {Sampler(**given): set() for given in ({"top_p": 0.69}, {"top_k": 2, "top_p": 0.5}, {"top_k": 3})}
    for sampler, ids in drawn.items():
        noise = gumbel((2000, 4), torch.Generator().manual_seed(0))
        ids.update(sampler.choose(logits.expand(2000, 4), noise).tolist())
    assert list(drawn.values()) == [{0, 1}, {0}, {0, 1, 2}]


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
    assert (Sampler(temperature=temperature).choose(logits, torch.rand(4, vocab_size)) == vocab_size // 2).all()


@pytest.mark.parametrize("temperature", [1e-39, 1e-42, 1e-45, GREEDY / 2, 2 * GREEDY])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.3}, {"top_k": 3}, {"top_k": 3, "top_p": 0.9}])
def test_next_to_no_temperature_takes_the_likeliest(temperature, settings):
    logits = 10 * torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    noise = gumbel(logits.shape, torch.Generator().manual_seed(2))
    assert torch.equal(Sampler(temperature, **settings).choose(logits, noise), logits.argmax(1))
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
    """By each way of sampling; no decision counts as close for an infinite logit, so none is made again."""
    model, labels = make_prior("masked", vocab_size=5), torch.arange(20) % 3
    model.head.register_forward_hook(
        lambda module, given, put_out: put_out.index_fill(-1, torch.tensor([4]), -torch.inf)
    )
    for path in [{}] if "steps" in settings else PATHS:
        assert int(model.sample(20, labels, generator=generators(20), **settings, **path).max()) < 4
    sampler, logits = Sampler(**{"guidance_scale": 2.0}), torch.tensor([[[1.0, -torch.inf]], [[-3.0, -torch.inf]]])
    assert sampler.largest(logits).tolist() == [[3.0]]


# Generators


def test_no_two_images_of_one_generator_share_their_noise():
    """A generator on a CPU keeps the low 32 bits of a seed, of which 200,000 drawn seeds share some."""
    drawn = torch.randint((1 << 62) - 1, (200_000,), generator=torch.Generator().manual_seed(1)).tolist()
    assert len({seed & LOW_BITS for seed in drawn}) == 200_000 - 6
    seeds = image_seeds(torch.Generator().manual_seed(1), 200_000)
    assert len(seeds) == len({seed & LOW_BITS for seed in seeds}) == 200_000
    assert len(set(seeds) - set(drawn)) == 6, "all others are as drawn"


def test_the_seed_of_an_image_depends_on_those_before_it_alone():
    few, many = (image_seeds(torch.Generator().manual_seed(3), count) for count in (7, 500))
    assert few == many[:7]
    rows = [torch.rand(3, generator=g) for g in image_generators(torch.Generator().manual_seed(3), 7)]
    assert torch.equal(
        torch.stack(rows), torch.stack([torch.rand(3, generator=torch.Generator().manual_seed(seed)) for seed in few])
    )


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


def test_where_nothing_is_known_orders_are_drawn_alike_and_as_ever():
    model = make_prior("gpt", any_order=True)
    chosen = [int(torch.randint(3, (), generator=g)) for g in generators(8)]
    own = generators(8)
    for g in own:
        torch.randint(3, (), generator=g)
    orders = torch.stack([model.order, *(make_order(f"random:{k}", (3, 4)) for k in (1, 2))])
    expected = model.sample(8, order=orders[chosen], generator=own)
    nothing = {"tokens": torch.zeros(3, 4).long(), "known": torch.zeros(3, 4).bool()}
    for more in ({}, nothing):
        assert torch.equal(model.sample(8, num_orders=3, generator=generators(8), **more), expected)


# Lower precision


def test_weights_of_lower_precision_draw_from_nearly_the_same_distribution():
    """An image may differ (the same call draws the same); few decisions do, and float32 finds both as likely."""
    torch.manual_seed(0)
    fine, coarse = (make_prior("gpt", (4, 4), 9, depth=1) for _ in range(2))
    coarse.load_state_dict(fine.state_dict())
    coarse, count = coarse.bfloat16(), 400
    drawn, other, again = (model.sample(count, generator=generators(count)) for model in (fine, coarse, coarse))
    assert torch.equal(other, again)
    noise = GumbelNoise(generators(count), 16, 9, torch.device("cpu")).of(0, 16)
    decisions = [(model(drawn).float() + noise).argmax(-1) for model in (fine, coarse)]
    assert torch.equal(decisions[0], drawn.flatten(1))
    assert 0 < (decisions[0] != decisions[1]).double().mean() < 0.03
    first, second = (fine.log_prob(tokens).detach().double() for tokens in (drawn, other))
    assert (first - second).mean().abs() < 4 * (first - second).std() / count**0.5 + 1e-3
    assert (coarse.log_prob(drawn) - fine.log_prob(drawn)).abs().mean() < 0.02 * first.abs().mean()


@pytest.mark.parametrize("name", PRIORS)
def test_what_every_prior_takes_stands_in_the_signature_with_its_default(name):
    """So that an editor shows it, and help() does; `Sampling` and the signature say the same."""
    takes = inspect.signature(Prior.find(name).sample).parameters
    own = Prior.find(name).make_sampler()
    for setting in ("temperature", "top_k", "top_p", "guidance_scale"):
        assert takes[setting].kind is inspect.Parameter.KEYWORD_ONLY
        assert takes[setting].default == getattr(own, setting)
    model = make_prior(name)
    with pytest.raises(TypeError, match="'temprature' is no argument of sampling"):
        model.sample(2, temprature=2.0)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, torch.tensor([1, 2])])
def test_what_is_no_whole_number_is_told_in_full(value):
    with pytest.raises(ValueError) as caught:
        whole_number("steps", value)
    assert str(caught.value) == f"steps must be a whole number (got {value!r})"


def test_whole_numbers_of_any_kind_are_whole_numbers():
    for value in (3, torch.tensor(3), np.int64(3)):
        assert type(whole_number("steps", value)) is int and check_count(value) == 3
    assert check_count(1) == 1
    with pytest.raises(ValueError, match=r"^num_images must be at least 1 \(got 0\)$"):
        check_count(0)


def test_a_list_has_a_generator_for_each_image():
    own = generators(3)
    assert image_generators(own, 3) == own and image_generators(tuple(own), 3) is not own
    for given, count in ((own, 2), (own, 4), ([own[0]] * 2, 2), ([own[0]] * 3, 1)):
        said = f"got {len(set(map(id, given)))} generators for {count} images; each needs its own"
        with pytest.raises(ValueError, match=f"^{said}$"):
            image_generators(given, count)
    torch.manual_seed(5)
    first = [g.initial_seed() for g in image_generators(None, 2)]
    torch.manual_seed(5)
    assert first == image_seeds(None, 2) and all(seed < (1 << 62) - 1 for seed in first)


def test_seeds_are_drawn_where_their_generator_is(monkeypatch):
    asked, generator = [], SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch, "randint", lambda *given, **how: asked.append((given, how)) or torch.tensor(7))
    assert image_seeds(generator, 1) == [7] and image_seeds(None, 1) == [7]
    devices = (torch.device("cuda"), "cpu")
    most = ((1 << 62) - 1, ())
    assert asked == [(most, {"generator": g, "device": d}) for g, d in zip((generator, None), devices, strict=True)]


def test_rows_are_there_twice_where_guidance_needs_it():
    plain, guiding = Sampler(), Sampler(guidance_scale=2.0)
    labels, rows, order = torch.tensor([1, 2]), torch.arange(6).view(2, 3), torch.arange(3)
    assert plain.doubled(rows) is rows and plain.doubled(labels, 9) is labels
    assert guiding.doubled(None) is None and guiding.doubled(order) is order  # all rows share it
    assert guiding.doubled(rows).tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert guiding.doubled(labels, 9).tolist() == [1, 2, 9, 9]
    assert guiding.doubled(rows, 7).tolist() == [[0, 1, 2], [3, 4, 5], [7, 7, 7], [7, 7, 7]]


def test_guidance_goes_from_the_unconditional_logits_through_the_conditional_ones():
    logits, guiding = torch.randn(4, 3, 5), Sampler(guidance_scale=2.0)
    with_label, without = logits.chunk(2)
    assert Sampler().guide(logits, 3.0) is logits
    assert torch.equal(Sampler().largest(logits), logits.abs().amax(-1))
    assert torch.equal(guiding.largest(logits), torch.maximum(with_label.abs().amax(-1), without.abs().amax(-1)))
    for scale, by in ((0.0, 0.0), (1.0, 1.0), (2.5, 2.5), (torch.tensor([0.0, 1.0, 3.0]), [0.0, 1.0, 3.0])):
        found = guiding.guide(logits, scale)
        for at, each in enumerate(by if isinstance(by, list) else [by] * 3):
            torch.testing.assert_close(found[:, at], without[:, at] + each * (with_label - without)[:, at])
    each_image = guiding.guide(logits, torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(each_image, torch.stack([without[0], with_label[1]]))


@pytest.mark.parametrize("power", [None, 1.0, 2.5])
def test_the_scale_is_the_same_of_numbers_and_of_tensors(power):
    sampler = Sampler(guidance_scale=1.5, guidance_end=4.0, guidance_power=power)
    shares = [0.0, 0.25, 0.5, 1.0]
    expected = [scale({"guidance_scale": 1.5, "guidance_end": 4.0, "guidance_power": power}, t) for t in shares]
    assert [sampler.scale_at(t) for t in shares] == pytest.approx(expected)
    torch.testing.assert_close(sampler.scale_at(torch.tensor(shares)), torch.tensor(expected))
    assert sampler.scale_at(0.0) == 1.5 and sampler.scale_at(1.0) == pytest.approx(4.0)
    blocks = (2, 1, 3)
    assert sampler.scales(blocks) == pytest.approx([sampler.scale_at(t) for t in (0.0, 2 / 3, 1.0)])
    by_rank = sampler.scales_by_rank(blocks, torch.device("cpu"))
    assert by_rank.dtype == torch.float32
    torch.testing.assert_close(by_rank, torch.tensor([sampler.scales(blocks)[block] for block in (0, 0, 1, 2, 2, 2)]))
    assert sampler.scales((5,)) == [1.5]
    assert Sampler(guidance_scale=3.0).scales(blocks) == [3.0] * 3
    assert Sampler(guidance_scale=3.0).scales_by_rank(blocks, torch.device("cpu")) == 3.0


def scale(settings, t):
    """That of guidance after a share `t` of the tokens, by its definition."""
    begin, end, power = settings["guidance_scale"], settings["guidance_end"], settings["guidance_power"]
    weight = t if power is None else (1 - math.cos(math.pi * t**power)) / 2
    return (1 - weight) * begin + weight * end


def test_a_lead_is_safe_beyond_what_rounding_moves_both_by():
    """Twice the rounding; in the units of the temperature, if that is below 1; and s + |s - 1| times with guidance."""
    for temperature, times in ((1.0, 1), (2.0, 1), (0.5, 2), (0.0, 1)):
        for guidance, more in ((1.0, 1), (0.0, 1), (3.0, 5), (0.5, 1)):
            found = Sampler(temperature=temperature).tolerance(1e-3, guidance)
            assert found == pytest.approx(2e-3 * times * more)
    found = Sampler(temperature=0.5).tolerance(1e-3, torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(found, torch.tensor([4e-3, 2e-2]))


def test_filters_that_keep_everything_keep_everything():
    """Also an id whose share is lost in the rounding of the mass before it."""
    logits, noise = torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([[0.0, 100.0, 0.0]])
    for settings in ({}, {"top_p": 1.0}, {"top_k": 3}, {"top_k": 99}, {"top_k": 3, "top_p": 1.0}):
        assert Sampler(**settings).choose(logits, noise).tolist() == [1], settings
    for settings in ({"top_p": 0.9}, {"top_k": 1}, {"temperature": 0.0}, {"temperature": 0.0, "top_k": 3}):
        assert Sampler(**settings).choose(logits, noise).tolist() == [0], settings
    assert Sampler(temperature=0.25).choose(logits, noise).tolist() == [0]  # 200 against 100
