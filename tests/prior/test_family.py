"""Promises of every registered prior, with every output head, in every order it takes."""

import math
from itertools import accumulate

import counter_noise
import pytest
import torch
from costs import all_steps, flops
from frequencies import as_frequent
from givens.headed import CLIPS, HEADED, MODELS, MODELS_IN_ORDERS, make_model, make_tiny, numbers_of
from small import (
    PRIORS,
    PRIORS_IN_SOME_ORDERS,
    VARIANTS,
    draw_known,
    draw_tokens,
    generators,
    logits_of,
    make_prior,
    moved_by,
)

from prior import Prior
from prior.orders import make_partition

every_prior = pytest.mark.parametrize("name", [*PRIORS, *VARIANTS])
every_model = pytest.mark.parametrize("name", [*MODELS, *CLIPS])
every_order = pytest.mark.parametrize(
    ("name", "order"), [*MODELS_IN_ORDERS, *((name, "of the clip") for name in CLIPS)]
)
some_orders = pytest.mark.parametrize(("name", "order"), PRIORS_IN_SOME_ORDERS)


RASTER_ONLY = {"next_scale", "pixelcnn", "gated_pixelcnn", "pixelcnn_pp", "pixelsnail"}
TWO_AXES = RASTER_ONLY | {"windowed_blocks", "windowed_gpt"}


@pytest.mark.sparse
@every_order
def test_logits_depend_on_the_receptive_field_and_on_earlier_blocks_only(name, order):
    """Changing a token moves no logits of its block and of earlier ones, and all those that `receptive_field` says."""
    model = make_model(name, order).double()
    tokens, labels, count = draw_tokens(model, 24), torch.arange(24) % 4, len(model.grid)
    assert logits_of(model, tokens, labels).shape == (24, count, model.grid.vocab_size)
    field = model.receptive_field
    assert field.dtype == torch.bool and moved_by(model, tokens, labels, least=1e-13).equal(field)
    if name not in HEADED and name != "next_scale":
        expected = make_partition(model.config.order, model.grid.shape)
        assert model.order.equal(expected.order) and model.blocks == expected.blocks
    earlier = torch.zeros(count, dtype=torch.bool)
    for block in model.order.split(model.blocks):
        assert not field[block][:, ~earlier].any(), f"the block of {block.tolist()} sees itself or a later one"
        if name in ("blocks", "gpt", "made", "masked", "next_scale", "pixelsnail"):
            assert field[block].equal(earlier.expand(len(block), -1))
        earlier[block] = True
    assert earlier.all()


@pytest.mark.sparse
@every_order
@pytest.mark.parametrize("label", [None, 1])
def test_probabilities_sum_to_one_and_follow_from_the_logits(name, order, label):
    model, grids = make_tiny(name, order, max_grids=4096)
    labels = None if label is None else torch.full((len(grids),), label)
    with torch.no_grad():
        log_probs, logits = model.token_log_probs(grids, labels), logits_of(model, grids, labels)
    assert log_probs.dtype == torch.float64 and log_probs.shape == grids.shape
    assert abs(float(log_probs.flatten(1).sum(1).exp().sum()) - 1) < 1e-9
    expected = logits.log_softmax(-1).gather(-1, grids.flatten(1)[..., None]).view(grids.shape)
    assert (log_probs - expected).abs().max() < 1e-12


COURSE = {"guidance_scale": 0.5, "guidance_end": 3.5, "guidance_power": 1.5}
"""Guidance that changes along the order."""


def scale_at(settings, t):
    """The guidance scale after a share `t` of the tokens, by its definition."""
    start, end, power = (settings.get(f"guidance_{name}") for name in ("scale", "end", "power"))
    start = 1.0 if start is None else start
    weight = t if power is None else (1 - math.cos(math.pi * t**power)) / 2
    return start if end is None else start + weight * (end - start)


@pytest.mark.sparse
@every_order
def test_cached_uncached_and_parallel_sampling_draw_the_same_tokens(name, order):
    model = make_model(name, order)
    labels, tokens, known = torch.arange(6) % 4, draw_tokens(model, 6), draw_known(model, 6, 0.4)
    for settings in (
        {},
        {"guidance_scale": 2.5, "top_p": 0.9, "temperature": 0.8},
        {**COURSE, "tokens": tokens, "known": known},
    ):
        cached, uncached, parallel = (
            model.sample(6, labels, generator=generators(6), **settings, **path)
            for path in ({}, {"cache": False}, {"parallel": True})
        )
        assert torch.equal(cached, uncached), settings
        assert torch.equal(cached, parallel), settings
        assert cached.unique().numel() > 1
        if "known" in settings:
            assert torch.equal(cached[known], tokens[known])


@pytest.mark.sparse
@every_order
def test_step_logits_equal_forward_logits(name, order):
    model = make_model(name, order).double()
    tokens, labels = draw_tokens(model, 4), torch.arange(4)
    with torch.no_grad():
        whole, steps = logits_of(model, tokens, labels), all_steps(model, tokens, labels)
    assert (steps - whole[:, model.order]).abs().max() < 1e-9


@every_prior
def test_a_second_call_does_not_remember_the_first(name):
    model = make_prior(name)
    first = model.sample(4, generator=generators(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    second = model.sample(4, generator=generators(4))
    assert not second.is_inference(), "one may train on it"
    assert torch.equal(second, model.sample(4, generator=generators(4), cache=False))
    assert not torch.equal(first, second)


@pytest.mark.sparse
@every_order
def test_frequencies_match_log_prob(name, order):
    if name.endswith("logistic"):
        pytest.skip("three channels of 16 values have too many grids to count")
    model, grids = make_tiny(name, order, max_grids=64)
    expected = model.log_prob(grids, torch.ones(len(grids)).long()).exp()
    drawn = model.float().sample(2500, torch.ones(2500).long(), generator=torch.Generator().manual_seed(5))
    assert as_frequent(numbers_of(drawn, model.grid), expected)


def inputs_of_order(model, walk, known):
    """Arguments of `forward` for an order whose first tokens are known, in the model's blocks."""
    if not model.any_order or not model.config.takes_blocks:
        return {"order": walk} if model.any_order else {}
    numbers = torch.tensor([block for block, size in enumerate(model.blocks) for _ in range(size)])
    numbers[:known] = -1
    return {"block_of": torch.empty_like(walk).scatter_(0, walk, numbers)}


@pytest.mark.sparse
@some_orders
@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({}, 0.0),
        ({"temperature": 0.7, "top_k": 3}, 0.5),
        ({"temperature": 1.5, "top_k": 4, "top_p": 0.6, "guidance_scale": 1.7}, 0.5),
        (COURSE, 0.4),
    ],
)
def test_a_token_is_the_argmax_of_its_own_logits_and_noise(name, order, settings, part):
    """Compare with a sampler written from the definition: whole passes, one image at a time, with its own noise."""
    model = make_prior(name, order=order)
    labels, given, size = torch.tensor([0, 1, 3]), draw_tokens(model, 3), len(model.grid)
    known = draw_known(model, 3, part)
    drawn = model.sample(3, labels, generator=generators(3), tokens=given, known=known, **settings)
    for k in range(3):
        noise = counter_noise.gumbel(counter_noise.next_key(generators(3)[k]), 0, (size, 5))
        tokens, walk, count = torch.zeros(1, size, dtype=torch.long), model.order, 0
        if model.any_order:  # known tokens first, so that all others are conditioned on all of them
            walk, count = walk[torch.argsort(~known[k].flatten()[walk], stable=True)], int(known[k].sum())
        last = max(cut for cut in (0, count, *accumulate(model.blocks)) if cut < size)  # where the last block begins
        for rank, position in enumerate(walk.tolist()):
            begin = max(cut for cut in (0, count, *accumulate(model.blocks)) if cut <= rank)  # of its block
            seen = torch.zeros_like(tokens)
            seen[:, walk[:begin]] = tokens[:, walk[:begin]]
            both, classes = seen.expand(2, size).reshape(2, *model.grid.shape), torch.tensor([int(labels[k]), 3])
            pair = logits_of(model, both, classes, **inputs_of_order(model, walk, count)).detach()[:, position]
            logits = pair[1] + scale_at(settings, begin / max(1, last)) * (pair[0] - pair[1])  # 3 is the null class
            logits = logits / settings.get("temperature", 1.0)
            descending = logits.sort(descending=True)
            allowed = descending.indices[: settings.get("top_k", 5)].tolist()
            if "top_p" in settings:
                mass = descending.values[: len(allowed)].softmax(0).cumsum(0)
                allowed = allowed[: int((mass < settings["top_p"]).sum()) + 1]
            best = max(allowed, key=lambda token: float(logits[token] + noise[rank, token]))  # noqa: B023
            tokens[0, position] = given[k].flatten()[position] if known[k].flatten()[position] else best
        assert torch.equal(drawn[k].flatten(), tokens[0])


@pytest.mark.sparse
@every_model
@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 3, "top_p": 0.8}, {"guidance_scale": 2.0}, {"temperature": 0.0}, COURSE]
)
def test_an_image_does_not_depend_on_its_batch(name, settings):
    model, labels = make_model(name), torch.arange(7) % 3
    together = model.sample(7, labels, generator=generators(7), **settings)
    for size in (1, 5):
        parts = [
            model.sample(len(at), labels[at], generator=[generators(7)[k] for k in at], **settings)
            for at in torch.arange(7).split(size)
        ]
        assert torch.equal(torch.cat(parts), together), f"batches of {size}"


@every_model
def test_guidance_of_scale_one_is_no_guidance_and_a_course_begins_at_its_scale(name):
    model, labels = make_model(name), torch.arange(20) % 3

    def sample(labels=labels, **guidance):
        return model.sample(20, labels, generator=generators(20), **guidance).flatten(1)

    plain, guided = sample(), sample(guidance_scale=3.0)
    assert torch.equal(plain, sample(guidance_scale=1.0)) and not torch.equal(plain, guided)
    assert torch.equal(sample(None), sample(torch.full((20,), 3), guidance_scale=2.0)), "3 is the null class"
    assert torch.equal(guided, sample(guidance_scale=3.0, guidance_end=3.0, guidance_power=2.0))
    falling, first = sample(guidance_scale=3.0, guidance_end=0.0), model.order[: model.blocks[0]]
    assert torch.equal(falling[:, first], guided[:, first]) and not torch.equal(falling, guided)


@pytest.mark.sparse
@every_order
def test_known_tokens_come_back_and_nothing_else_depends_on_the_rest_of_tokens(name, order):
    model = make_model(name, order)
    known, tokens, others = draw_known(model, 8, 0.5), draw_tokens(model, 8), draw_tokens(model, 8)
    drawn = model.sample(8, generator=generators(8), tokens=tokens, known=known)
    assert torch.equal(drawn[known], tokens[known])
    others = torch.where(known, tokens, others)
    assert torch.equal(drawn, model.sample(8, generator=generators(8), tokens=others, known=known))
    assert torch.equal(model.sample(8, tokens=tokens, known=torch.ones_like(known[0])), tokens)


@pytest.mark.parametrize("name", [*PRIORS, *VARIANTS, "gpt, depth", "blocks, depth", "pixelcnn, logistic"])
def test_sampling_costs_one_forward_pass(name):
    """Compare the FLOPs of all steps, attention included, with those of one pass; without a cache, with one a step."""
    model = make_large(name)
    tokens = draw_tokens(model, 4)
    whole = flops(lambda: model(tokens))
    assert flops(lambda: all_steps(model, tokens)) <= 1.1 * whole
    state = model.start(model.encode_nothing(4), cache=False)
    assert flops(lambda: model.next_logits(state, None)) == whole


def make_large(name):
    """A prior on a grid of which the start of its cache is a small share."""
    return make_model(name, positions=(4, 4)) if name in HEADED else make_model(name, shape=(6, 6), vocab_size=16)


@pytest.mark.sparse
@every_model
def test_save_and_load(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path / "prior")
    loaded = Prior.from_pretrained(tmp_path / "prior")
    tokens = draw_tokens(model, 2)
    assert type(loaded) is type(model) and torch.equal(loaded(tokens), model(tokens))
    assert loaded.grid == model.grid and loaded.fingerprint() == model.fingerprint() and not loaded.training


@every_prior
def test_an_empty_batch_and_weights_of_lower_precision_work(name):
    """Rounding of bfloat16 is far above what the equality of paths is promised for, but each path works."""
    model = make_prior(name)
    tokens = draw_tokens(model, 0)
    for labels in (None, torch.zeros(0, dtype=torch.long)):
        assert logits_of(model, tokens, labels).shape == (0, len(model.grid), 5)
        assert model.token_log_probs(tokens, labels).shape == tokens.shape
        assert model.log_prob(tokens, labels).shape == (0,)
        assert not model.feature_layers or len(model.features(tokens, labels)) == 0
    model.bfloat16()
    for path in ({}, {"cache": False}, {"parallel": True}):
        drawn = model.sample(4, torch.arange(4), generator=generators(4), **path)
        assert drawn.shape == (4, *model.grid.shape) and drawn.min() >= 0 and drawn.max() < 5
    assert model.log_prob(drawn).isfinite().all()


@pytest.mark.parametrize("name", [name for name in PRIORS if "dropout" in make_prior(name).config.model_fields])
def test_dropout_is_for_training_only(name):
    model = make_prior(name, dropout=0.5)
    tokens = draw_tokens(model, 4)
    torch.manual_seed(0)
    expected, drawn = model(tokens), model.sample(4, generator=generators(4))
    assert torch.equal(model(tokens), expected)
    assert not torch.equal(model.train()(tokens), expected)
    for cache in (True, False):
        assert torch.equal(model.sample(4, generator=generators(4), cache=cache), drawn)
    assert model.training


@every_prior
def test_other_grids(name):
    for shape in ((1, 1), (1, 6), (6, 1), (5,), (2, 2, 3)):
        if name in TWO_AXES and len(shape) != 2:
            with pytest.raises(ValueError, match="grid"):
                make_prior(name, shape=shape)
            continue
        for vocab_size, num_classes in ((5, 3), (1, 0), (2, 0)) if shape in ((1, 1), (1, 6)) else ((5, 3),):
            model = make_prior(name, shape=shape, vocab_size=vocab_size, num_classes=num_classes)
            drawn = model.sample(4, generator=generators(4))
            assert drawn.shape == (4, *model.grid.shape) and drawn.max() < vocab_size
            for path in ({"cache": False}, {"parallel": True}):
                assert torch.equal(drawn, model.sample(4, generator=generators(4), **path))
            assert vocab_size > 1 or model.log_prob(drawn).abs().max() == 0


def test_marginal_is_fitted_by_counting():
    model = make_prior("marginal", shape=(1, 2), vocab_size=2, num_classes=2)
    tokens = torch.tensor([[[0, 1]], [[0, 0]], [[1, 1]], [[0, 1]]])
    model.initialize(tokens, model.read_given([0, 0, 1, 1], None, 4))
    p = logits_of(model, tokens[:1], torch.tensor([2])).softmax(-1)[0]
    assert torch.allclose(p, torch.tensor([[4 / 6, 2 / 6], [2 / 6, 4 / 6]]))
    p = logits_of(model, tokens[:1], torch.tensor([0])).softmax(-1)[0]
    assert torch.allclose(p, torch.tensor([[3 / 4, 1 / 4], [2 / 4, 2 / 4]]))
    before = model.table.detach().clone()
    model.initialize(tokens[[0, 1, 2, 3, 0]], model.read_given([0, 0, 1, 1, None], None, 5))
    assert torch.equal(model.table[:2], before[:2]) and not torch.equal(model.table[2], before[2]), "null is no class"


@pytest.mark.parametrize("name", [name for name in [*PRIORS, *VARIANTS] if name not in ("made", "marginal")])
def test_training_begins_with_equally_likely_ids(name):
    """`initialize` sets the output layer to zero; gradients still reach it. (`made` and `marginal` have none.)"""
    model = make_prior(name)
    tokens, labels = draw_tokens(model, 8), torch.arange(8) % 4
    model.initialize(tokens, model.read_given(labels, None, 8))
    assert logits_of(model, tokens, labels).abs().max() == 0
    model.loss(tokens, labels).backward()
    assert model.head.weight.grad.abs().max() > 0
