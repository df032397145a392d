"""What priors do not take, and in which words they say so: the whole line.

Covers: prior/base.py, prior/requests.py, prior/mixtures.py, prior/features.py, prior/layers.py, prior/transformer.py,
prior/causal_conv.py, prior/made.py, prior/masked.py, prior/next_scale.py, prior/pixelsnail.py, prior/heads/base.py,
prior/heads/depth.py, prior/heads/logistic.py, prior/masks/windows.py, prior/sampling/settings.py,
prior/sampling/generators.py, prior/sampling/confidence.py, prior/orders/sizes.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from givens.headed import grid_with
from prior.sampling.confidence import MaskedSampler
from small import SMALL, draw_tokens, make_prior

from prior import Prior
from prior.orders import Partition, make_partition
from prior.sampling import Sampler
from tokenizer import TokenGrid
from tokenizer.files import ConfigError

LONG, LEVELS = TokenGrid((12,), 5), TokenGrid((6, 3), 32, levels=3)
PIXELS = grid_with({"channels": 1}, (2, 2), 8)


def words(text: str) -> str:
    return f"^{re.escape(text)}$"


SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("causal_conv", {"max_dilation": 6}, "max_dilation: must be a power of two (got 6)"),
    ("pixelcnn", {"order": "snake"}, "order: pixelcnn walks the grid in raster order only (got 'snake')"),
    ("gated_pixelcnn", {"grid": LONG}, "grid: gated_pixelcnn needs a grid of two axes (got (12,))"),
    ("pixelcnn", {"first_kernel": 4}, "first_kernel: must be odd (got 4)"),
    ("pixelcnn", {"kernel": 4}, "kernel: must be odd (got 4)"),
    ("gated_pixelcnn", {"first_kernel": 4}, "first_kernel: must be odd (got 4)"),
    ("pixelsnail", {"key": 8, "value": 4}, "key: must be at most value (got key 8, value 4)"),
    ("made", {"masks": 3}, "masks: needs order_agnostic or connectivity_agnostic, which draw them"),
    (
        "made",
        {"direct": True, "grid": TokenGrid((64, 64), 16)},
        "direct: needs 65536 squared weights; set a smaller embedding",
    ),
    (
        "masked",
        {"label_smoothing": 0.1, "head": "logistic", "grid": grid_with({"channels": 1}, (2, 2), 16)},
        "label_smoothing: must be 0 with head 'logistic' (got 0.1)",
    ),
    (
        "next_scale",
        {},
        "grid: needs a tokenizer with quantizer.kind=multiscale (got tokens of 3x4, without scales)",
    ),
    (
        "next_scale",
        {"grid": TokenGrid((5,), 5, ((1, 1), (2, 2))), "order": "random:1"},
        "order: must be raster, which is from coarse to fine (got 'random:1')",
    ),
    (
        "next_scale",
        {"grid": TokenGrid((5,), 5, ((1, 1), (2, 2))), "blocks": (1, 4)},
        "blocks: must be null, as the blocks are the tokenizer's scales (got [1, 4])",
    ),
    ("gpt", {"dim": 36, "heads": 4}, "heads: dim must be a multiple of 2 * heads (got dim 36, heads 4)"),
    (
        "gpt",
        {"dim": 4096, "heads": 1, "grid": TokenGrid((512, 512), 4)},
        "heads: a grid of 262144 positions and heads of width 4096 are too large",
    ),
    ("gpt", {"anneal": (0.7, 0.5)}, "anneal: expected two ascending shares (got [0.7, 0.5])"),
    ("blocks", {"anneal": (0.7,)}, "anneal: expected two ascending shares (got [0.7])"),
    ("gpt", {"dilation": (2, 1)}, "dilation: only a window has one; set window, too (got [2, 1])"),
    ("gpt", {"window": (1, 1), "dilation": (2,)}, "dilation: expected one for each of the 2 layers (got [2])"),
    (
        "gpt",
        {"window": (1, 1), "any_order": True},
        "window: does not go with any_order, where what is near would have another past in each order",
    ),
    ("gpt", {"window": (1, 1), "grid": LONG}, "window: needs a grid of two axes (got (12,))"),
    ("gpt", {"window": (0, 3)}, "window: rows and columns must be at least 1 (got [0, 3])"),
    (
        "gpt",
        {"window": (200, 200), "grid": TokenGrid((256, 256), 4)},
        "window: [200, 200] is too large for a grid of 65536 tokens; null sees all earlier ones",
    ),
    (
        "gpt",
        {"order": "rows"},
        "order: this kind draws one token at a time; kinds that draw blocks of several are blocks, marginal, masked, "
        "next_scale",
    ),
    (
        "made",
        {"blocks": (6, 6)},
        "blocks: this kind draws one token at a time; kinds that draw blocks of several are blocks, marginal, masked, "
        "next_scale",
    ),
    ("blocks", {"blocks": (6, 5)}, "blocks: sizes sum to 11, the grid has 12 tokens"),
    ("gpt", {"order": "wave"}, "order: 'wave' is written wave:S (got 'wave')"),
    (
        "gpt",
        {"head": "depth"},
        "head: depth is for grids of several ids at a position (rvq, klvae, posthoc, lfq and bsq of several levels, "
        "pixels in colour), and this grid has one",
    ),
    (
        "gpt",
        {"head": "logistic"},
        "head: logistic is for grids of pixels, whose ids are intensities, and this grid's are codes",
    ),
    (
        "gpt",
        {"head": "logistic", "grid": PIXELS},
        "head: logistic is for pixels of at least 16 levels, and this grid has 8",
    ),
    (
        "gpt",
        {"head": "depth", "grid": LEVELS, "any_order": True},
        "any_order: does not go with head 'depth' of several ids at a position",
    ),
    (
        "made",
        {"head": "depth", "grid": LEVELS},
        "head: made takes none for several ids at a position, of which this grid has 3",
    ),
    (
        "marginal",
        {"head": "depth", "grid": LEVELS},
        "head: marginal has none but a logit for each id; leave it null (got 'depth')",
    ),
]


@pytest.mark.parametrize(("kind", "settings", "said"), SETTINGS, ids=lambda value: value if type(value) is str else "")
def test_settings_that_do_not_go_together_are_told_in_full(kind, settings, said):
    with pytest.raises(ConfigError, match=words(f"{kind}: {said}")):
        Prior.create(kind, **{"grid": TokenGrid((3, 4), 5), "num_classes": 3, **SMALL.get(kind, {}), **settings})


TOKENS = torch.zeros(2, 3, 4).long()
ALL = torch.ones(2, 3, 4).bool()
BOTH = {"tokens": TOKENS, "known": ALL}
ALONE = "cache=False does not go with parallel=True: whole passes have no cache"
SHAPES = "(3, 4) or (2, 3, 4)"
REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"num_images": 0}, "num_images must be at least 1 (got 0)"),
    ({"num_images": 2.0}, "num_images must be a whole number (got 2.0)"),
    ({"guidance_scale": 2.0}, "guidance_scale other than 1 needs labels to guide towards"),
    ({"guidance_end": 2.0}, "guidance_end other than 1 needs labels to guide towards"),
    ({"labels": [1.0, 2.0]}, "labels should be 2 whole numbers, got torch.float32 of (2,)"),
    ({"labels": [1, 2, 3]}, "labels should be 2 whole numbers, got torch.int64 of (3,)"),
    ({"labels": [1, 4]}, "labels should lie in [0, 3) (and 3 is the null class), got 1 to 4"),
    ({"labels": [-1, 2]}, "labels should lie in [0, 3) (and 3 is the null class), got -1 to 2"),
    ({"order": "snake"}, "order: this gpt prior goes in one order, 'raster', as it was made"),
    ({"order": [1, 2]}, "order should hold each of 0 to 11 once, for all images or for each of 2"),
    ({"order": torch.arange(12.0)}, "order should hold each of 0 to 11 once, for all images or for each of 2"),
    ({"order": [0] * 12}, "order should hold each of 0 to 11 once, for all images or for each of 2"),
    (
        {"order": torch.arange(12).expand(3, 12)},
        "order should hold each of 0 to 11 once, for all images or for each of 2",
    ),
    ({"order": "strange"}, ""),
    ({"parallel": True, "cache": False}, ALONE),
    ({"num_orders": 2}, "num_orders: gpt as it was made has one order"),
    ({"num_orders": 1.0}, "num_orders must be a whole number (got 1.0)"),
    ({"num_orders": "2"}, "num_orders must be a whole number (got '2')"),
    ({"num_orders": None}, "num_orders must be a whole number (got None)"),
    ({"num_orders": 0}, "num_orders must be at least 1 (got 0)"),
    ({"tokens": TOKENS}, "`tokens` and `known` go together: known says which of the tokens to keep"),
    ({"known": ALL}, "`tokens` and `known` go together: known says which of the tokens to keep"),
    ({**BOTH, "known": ALL.float()}, f"known should be bool of shape {SHAPES}, got torch.float32 of (2, 3, 4)"),
    ({**BOTH, "known": ALL[:, 0]}, f"known should be bool of shape {SHAPES}, got torch.bool of (2, 4)"),
    (
        {**BOTH, "tokens": TOKENS.float()},
        f"tokens should be whole numbers of shape {SHAPES}, got torch.float32 of (2, 3, 4)",
    ),
    ({**BOTH, "tokens": TOKENS[0, 0]}, f"tokens should be whole numbers of shape {SHAPES}, got torch.int64 of (4,)"),
    ({**BOTH, "tokens": TOKENS + 5}, "token ids should lie in [0, 5), got 5 to 5"),
    ({"generator": [torch.Generator()]}, "got 1 generators for 2 images; each needs its own"),
    ({"temperature": -1.0}, "temperature must be a finite number >= 0 (got -1.0)"),
    ({"temperature": torch.inf}, "temperature must be a finite number >= 0 (got inf)"),
    ({"temperature": "hot"}, "temperature must be a finite number >= 0 (got hot)"),
    ({"temperature": True}, "temperature must be a finite number >= 0 (got True)"),
    ({"temperature": None}, "temperature must be a finite number >= 0 (got None)"),
    ({"top_k": True}, "top_k must be a whole number >= 1, or None for all (got True)"),
    ({"top_k": 0}, "top_k must be a whole number >= 1, or None for all (got 0)"),
    ({"top_k": 2.0}, "top_k must be a whole number >= 1, or None for all (got 2.0)"),
    ({"top_p": 0.0}, "top_p must be in (0, 1], or None for all (got 0.0)"),
    ({"top_p": 1.1}, "top_p must be in (0, 1], or None for all (got 1.1)"),
    ({"top_p": "0.9"}, "top_p must be in (0, 1], or None for all (got 0.9)"),
    ({"guidance_scale": [1, 2]}, "guidance_scale must be a finite number >= 0 (got [1, 2])"),
    ({"guidance_end": "2"}, "guidance_end must be a finite number >= 0, or None (got 2)"),
    ({"guidance_end": 2, "guidance_power": "2"}, "guidance_power must be a finite number > 0, or None (got 2)"),
    ({"guidance_scale": -0.5}, "guidance_scale must be a finite number >= 0 (got -0.5)"),
    ({"guidance_scale": torch.inf}, "guidance_scale must be a finite number >= 0 (got inf)"),
    ({"guidance_end": -0.5}, "guidance_end must be a finite number >= 0, or None (got -0.5)"),
    ({"guidance_end": torch.inf}, "guidance_end must be a finite number >= 0, or None (got inf)"),
    (
        {"guidance_power": 0.0, "guidance_end": 1.0},
        "guidance_power must be a finite number > 0, or None (got 0.0)",
    ),
    (
        {"guidance_power": torch.inf, "guidance_end": 1.0},
        "guidance_power must be a finite number > 0, or None (got inf)",
    ),
    ({"guidance_power": 1.0}, "guidance_power needs a guidance_end for the scale to go to"),
]


@pytest.fixture(scope="module")
def gpt() -> Prior:
    return make_prior("gpt")


@pytest.mark.parametrize(("request_", "said"), REQUESTS, ids=lambda value: value if type(value) is str else "")
def test_requests_that_cannot_be_drawn_are_told_in_full(gpt, request_, said):
    with pytest.raises(ValueError, match=words(said) if said else "^no order is called 'strange'; there are raster, "):
        gpt.sample(**{"num_images": 2, **request_})


def test_what_lies_at_the_end_of_a_range_is_taken(gpt):
    kinds = (torch.int32, torch.uint8, torch.uint16, torch.uint32)
    for labels in ([0, 3], *(torch.tensor([2, 0], dtype=kind) for kind in kinds), None):
        assert gpt.sample(2, labels, tokens=TOKENS[0] + 4, known=ALL[0]).eq(4).all()
    for settings in (
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_p": 1.0},
        {"guidance_scale": 0.0},
        {"guidance_end": 0.0},
    ):
        assert gpt.sample(1, [1], **settings).shape == (1, 3, 4)


OTHERS: list[tuple[str, type[Exception], Callable[[Prior], Any], str]] = [
    ("gpt", TypeError, lambda m: m.sample(2, warmth=1), "'warmth' is no argument of sampling from a 'gpt' prior"),
    *(
        (
            "gpt",
            ValueError,
            guessing,
            "guess should be a prior over the same grid and classes, and goes with parallel=True",
        )
        for guessing in (
            lambda m: m.sample(2, guess=make_prior("marginal")),
            lambda m: m.sample(2, guess=make_prior("marginal", num_classes=2), parallel=True),
            lambda m: m.sample(2, guess=make_prior("marginal", vocab_size=6), parallel=True),
        )
    ),
    (
        "gpt",
        ValueError,
        lambda m: m.log_prob(TOKENS, num_masks=2),
        "num_masks: gpt as it was made has one connectivity",
    ),
    ("gpt", ValueError, lambda m: m.log_prob(TOKENS, num_masks=0), "num_masks must be at least 1 (got 0)"),
    ("gpt", ValueError, lambda m: m.log_prob(TOKENS, num_masks=2.5), "num_masks must be a whole number (got 2.5)"),
    ("made", ValueError, lambda m: m.sample(2, num_masks=2.5), "num_masks must be a whole number (got 2.5)"),
    ("made", ValueError, lambda m: m.sample(2, num_masks=None), "num_masks must be a whole number (got None)"),
    ("made", ValueError, lambda m: m.sample(2, num_masks=2), "num_masks: made as it was made has one connectivity"),
    (
        "gpt",
        ValueError,
        lambda m: m.order_spread(TOKENS, num_orders=1),
        "num_orders must be at least 2 to see a spread (got 1)",
    ),
    ("gpt", ValueError, lambda m: m.log_prob(TOKENS + 5), "token ids should lie in [0, 5), got 5 to 5"),
    (
        "gpt",
        ValueError,
        lambda m: m.features(TOKENS, layer=2),
        "layer must be a whole number from 0 to 1 of this gpt (got 2)",
    ),
    (
        "gpt",
        ValueError,
        lambda m: m.features(TOKENS, layer=-1),
        "layer must be a whole number from 0 to 1 of this gpt (got -1)",
    ),
    (
        "gpt",
        ValueError,
        lambda m: m.features(TOKENS, layer=True),
        "layer must be a whole number from 0 to 1 of this gpt (got True)",
    ),
    ("marginal", ValueError, lambda m: m.features(TOKENS), "layer: a marginal prior has no layers, hence no features"),
    (
        "masked",
        ValueError,
        lambda m: m.stepwise("rows", 3),
        "steps: the order has blocks of its own; give one of them, not both",
    ),
    *(
        (
            "masked",
            ValueError,
            walked,
            "steps without an order finds one of its own: num_orders, parallel and cache=False do not go with it",
        )
        for walked in (
            lambda m: m.sample(2, steps=3, num_orders=2),
            lambda m: m.sample(2, steps=3, parallel=True),
            lambda m: m.sample(2, steps=3, cache=False),
        )
    ),
    ("masked", ValueError, lambda m: m.sample(2, steps=13), "steps must be a whole number from 1 to 12 (got 13)"),
    ("masked", ValueError, lambda m: m.sample(2, steps=0), "steps must be a whole number from 1 to 12 (got 0)"),
    ("masked", ValueError, lambda m: m.sample(2, steps=2.0), "steps must be a whole number from 1 to 12 (got 2.0)"),
    (
        "masked",
        ValueError,
        lambda m: m.sample(2, steps=2, confidence_temperature=-1.0),
        "confidence_temperature must be a finite number >= 0 (got -1.0)",
    ),
    (
        "masked",
        ValueError,
        lambda m: m.sample(2, steps=2, confidence_temperature=torch.inf),
        "confidence_temperature must be a finite number >= 0 (got inf)",
    ),
    (
        "masked",
        ValueError,
        lambda m: m.sample(2, steps=2, schedule="sine"),
        "schedule must be one of linear, cosine, arccos, square (got 'sine')",
    ),
    (
        "masked",
        ValueError,
        lambda m: m.sample(2, steps=2, schedule=["sine"]),
        "schedule must be one of linear, cosine, arccos, square (got ['sine'])",
    ),
    (
        "masked",
        ValueError,
        lambda m: m.sample(2, steps=2, confidence_temperature="1"),
        "confidence_temperature must be a finite number >= 0 (got 1)",
    ),
]


@pytest.mark.parametrize(
    ("kind", "error", "ask", "said"), OTHERS, ids=lambda value: value if type(value) is str else ""
)
def test_what_else_a_prior_does_not_do_is_told_in_full(kind, error, ask, said):
    with pytest.raises(error, match=words(said)):
        ask(make_prior(kind))


def test_without_exact_no_order_is_taken():
    model = make_prior("masked", exact=False)
    said = "order: without `exact`, log_prob bounds the mean over all orders; no order can be given"
    with pytest.raises(ValueError, match=words(said)):
        model.log_prob(draw_tokens(model, 2), order="snake")


def test_walks_that_do_not_cut_a_grid_are_told_in_full():
    one, many = make_prior("gpt", any_order=True), make_prior("blocks", any_order=True)
    with pytest.raises(
        ValueError, match=words("order: this gpt draws one token at a time; blocks are for kinds that take them")
    ):
        one.sample(2, order="rows")
    for sizes, said in (
        ((6, 5), "order: blocks: sizes sum to 11, the grid has 12 tokens"),
        ((6, 6.0), "order: blocks must be a whole number (got 6.0)"),
        ((0, 12), "order: blocks: each size is at least 1 (got 0)"),
    ):
        with pytest.raises(ValueError, match=words(said)):
            many.sample(2, order=Partition(torch.arange(12), sizes))
    for name in ("rows", "halton:3"):
        drawn = many.sample(2, order=make_partition(name, (3, 4)), generator=torch.Generator().manual_seed(0))
        assert torch.equal(drawn, many.sample(2, order=name, generator=torch.Generator().manual_seed(0)))


def test_numbers_of_numpy_and_torch_are_plain_numbers_in_settings(gpt):
    """So that a pipeline can hold them as its defaults, and save them."""
    given = {"temperature": np.float32(0.5), "top_k": np.int64(3), "top_p": torch.tensor(0.75)}
    settings = MaskedSampler(**given, steps=np.int64(2))
    assert settings == MaskedSampler(0.5, 3, 0.75, steps=2)
    assert json.loads(json.dumps(settings.saved())) == settings.saved()
    drawn = [
        gpt.sample(2, generator=torch.Generator().manual_seed(0), **each)
        for each in (given, {"temperature": 0.5, "top_k": 3, "top_p": 0.75})
    ]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt", {"order": "snake"}),
        ("gpt", {"order": "snake", "grid": LEVELS, "head": "depth"}),
        ("blocks", {"order": "halton:3", "grid": LEVELS, "head": "depth"}),
        ("next_scale", {}),
    ],
)
def test_a_prior_of_one_order_takes_it_by_its_name(kind, settings):
    """Also where it names positions, of several ids each, or scales."""
    model = make_prior(kind, **settings)
    tokens, (plain, named) = draw_tokens(model, 2), ({}, {"order": model.config.order})
    assert torch.equal(model.log_prob(tokens, **named), model.log_prob(tokens, **plain))
    drawn = [model.sample(2, generator=torch.Generator().manual_seed(0), **each) for each in (plain, named)]
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="goes in one order"):
        model.sample(2, order="random:7")


def test_an_order_that_the_prior_cuts_otherwise_than_its_name_says_is_another_one():
    model = make_prior("blocks", blocks=(4, 4, 4))
    with pytest.raises(ValueError, match="goes in one order"):
        model.log_prob(TOKENS, order="raster")


def test_settings_say_what_they_are():
    assert Sampler.names() == [
        *("temperature", "top_k", "top_p", "guidance_scale"),
        *("guidance_end", "guidance_power"),
    ]
    assert MaskedSampler.names() == [*Sampler.names(), "steps", "confidence_temperature", "schedule"]
    always = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance_scale": 1.0}
    assert Sampler().saved() == Sampler().told() == always
    given = Sampler(0.5, 3, 0.9, 2.0, 3.0, 1.5)
    assert given.saved() == given.told() == {**vars(given)}
    assert MaskedSampler().saved() == always and MaskedSampler(steps=3).saved() == {**always, "steps": 3}
    assert MaskedSampler().told() == {**always, "steps": None, "confidence_temperature": 4.5, "schedule": "cosine"}
    assert given.unguided() == Sampler(0.5, 3, 0.9)
    assert [each.filters for each in (Sampler(), Sampler(top_k=1), Sampler(top_p=0.5))] == [False, True, True]
    guiding = [Sampler(guidance_scale=2.0), Sampler(guidance_end=2.0), Sampler(guidance_end=1.0), Sampler()]
    assert [each.guides for each in guiding] == [True, True, False, False]
    assert [each.constant for each in guiding] == [True, False, True, True]
    assert [each.copies for each in guiding] == [2, 2, 1, 1]
