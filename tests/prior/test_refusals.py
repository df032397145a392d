"""What priors do not take: an error of one line that names the setting or argument.

Covers: prior/base.py, prior/sampling.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from givens.headed import grid_with
from small import PRIORS, SMALL, draw_tokens, generators, make_prior

from prior import Prior
from prior.orders import Partition, make_partition
from tokenizer import TokenGrid
from tokenizer.model import ConfigError

LONG, LEVELS = TokenGrid((12,), 5), TokenGrid((6, 3), 32, levels=3)
GREY, SCALES = grid_with({"channels": 1}, (2, 2), 16), TokenGrid((5,), 5, ((1, 1), (2, 2)))
CONVOLUTIONAL = ("pixelcnn", "gated_pixelcnn", "pixelcnn_pp", "pixelsnail")

# Configurations: kind, settings, key

SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    *(("causal_conv", {key: value}, key) for key, value in (("max_dilation", 6), ("kernel", 1), ("depth", 0))),
    ("causal_conv", {"dropout": 1.0}, "dropout"),
    *((kind, {"order": order}, "order") for kind in CONVOLUTIONAL for order in ("snake", "random:3", "rows")),
    *((kind, {"grid": grid}, "grid") for kind in CONVOLUTIONAL for grid in (LONG, TokenGrid((2, 2, 3), 5))),
    *((kind, {key: 4}, key) for kind in ("pixelcnn", "gated_pixelcnn") for key in ("kernel", "first_kernel")),
    ("pixelcnn", {"kernel": 1}, "kernel"),
    ("pixelcnn", {"depth": 0}, "depth"),
    ("pixelcnn_pp", {"stages": 0}, "stages"),
    ("pixelcnn_pp", {"dropout": 1.0}, "dropout"),
    ("pixelsnail", {"kernel": 4}, "kernel"),
    ("pixelsnail", {"residual": 0}, "residual"),
    ("pixelsnail", {"key": 16, "value": 8}, "key"),
    ("made", {"masks": 3}, "masks"),
    ("made", {"direct": True, "grid": TokenGrid((64, 64), 16)}, "direct"),
    ("next_scale", {"grid": TokenGrid((7, 7), 5)}, "grid"),
    ("next_scale", {"grid": TokenGrid((70,), 5)}, "grid"),
    ("next_scale", {"grid": SCALES, "order": "random:1"}, "order"),
    ("next_scale", {"grid": SCALES, "blocks": (1, 4)}, "blocks"),
    ("next_scale", {"grid": SCALES, "attention": "half"}, "attention"),
    ("next_scale", {"grid": SCALES, "heads": 5}, "heads"),
    ("gpt", {"dim": 36, "heads": 4}, "heads"),
    ("gpt", {"dim": 4096, "heads": 1, "grid": TokenGrid((512, 512), 4)}, "heads"),
    *((kind, {"anneal": anneal}, "anneal") for kind in ("gpt", "blocks") for anneal in ((0.7, 0.5), (0.7,), (0, 1.5))),
    ("gpt", {"dilation": (2, 1)}, "dilation"),
    ("gpt", {"window": (1, 1), "dilation": (2,)}, "dilation"),
    ("gpt", {"window": (1, 1), "dilation": (1, 0)}, "dilation"),
    ("gpt", {"window": (1, 1), "any_order": True}, "window"),
    *(("gpt", {"window": window}, "window") for window in ((0, 3), (2, -1), (1, 2, 3), (1, 1 << 30))),
    *(("gpt", {"window": (1, 1), "grid": grid}, "window") for grid in (LONG, TokenGrid((2, 2, 3), 5))),
    ("gpt", {"window": (200, 200), "grid": TokenGrid((256, 256), 4)}, "window"),
    *((kind, {"order": "diagonal"}, "order") for kind in ("gpt", "made", "causal_conv")),
    *((kind, {"blocks": (6, 6)}, "blocks") for kind in ("gpt", "made", "causal_conv", "pixelcnn")),
    *(("blocks", {"blocks": sizes}, "blocks") for sizes in ((6, 5), (3, 3), (12, 0))),
    *(("blocks", {"order": order}, "order") for order in ("halton:13", "halton:0", "regions:11", "rows/2", "zigzag")),
    ("gpt", {"order": "hilbert", "grid": TokenGrid((2, 2, 2), 5)}, "order"),
    ("gpt", {"head": "depth"}, "head"),
    ("gpt", {"head": "logistic"}, "head"),
    ("gpt", {"head": "softmax", "grid": LEVELS}, "head"),
    ("gpt", {"head": "logistic", "grid": grid_with({"channels": 1}, (2, 2), 15)}, "head"),
    ("gpt", {"head": "depth", "grid": LEVELS, "any_order": True}, "any_order"),
    ("gpt", {"head": "depth", "grid": LEVELS, "order": "regions:5"}, "order"),
    ("gpt", {"head": "depth", "grid": LEVELS, "blocks": (6, 12)}, "blocks"),
    *((kind, {"head": "depth", "grid": LEVELS}, "head") for kind in ("made", "masked", "marginal")),
    ("masked", {"label_smoothing": 0.1, "head": "logistic", "grid": GREY}, "label_smoothing"),
]


@pytest.mark.parametrize(("kind", "settings", "key"), SETTINGS, ids=str)
def test_settings_that_do_not_fit_are_refused_by_name(kind, settings, key):
    with pytest.raises(ConfigError) as caught:
        Prior.create(kind, **{"grid": TokenGrid((3, 4), 5), "num_classes": 3, **SMALL.get(kind, {}), **settings})
    message = str(caught.value)
    assert message.startswith(f"{kind}: ") and f"{key}" in message.split(":")[1] and "\n" not in message


def test_unknown_names_list_what_there_is():
    with pytest.raises(ValueError, match="gpt.*marginal"):
        Prior.create("gtp", grid=TokenGrid((2, 2), 3))
    with pytest.raises(ValueError, match="spiral_in"):
        make_prior("gpt", order="zigzag")


# Requests: arguments of `sample`, and the word that the error has

TOKENS, ALL = torch.zeros(2, 3, 4).long(), torch.ones(2, 3, 4).bool()
BOTH = {"tokens": TOKENS, "known": ALL}
TOKENS_OF_NONE = (TOKENS + 5, TOKENS - 1, TOKENS.transpose(1, 2), TOKENS.flatten(1), TOKENS[0], TOKENS.float(), ALL)
LABELS = [[1.0, 2.0], [1, 2, 3], [1, 4], [-1, 2], [True, False], torch.tensor(1), torch.eye(2).long()]
ORDERS = [[1, 2], torch.arange(12.0), [0] * 12, torch.arange(12).expand(3, -1), torch.arange(11), torch.ones(12).bool()]
OUT_OF_RANGE: dict[str, list[Any]] = {
    "temperature": [-1.0, math.inf, math.nan, "hot", True, None],
    "top_k": [0, -1, 2.0, True, "3"],
    "top_p": [0.0, 1.1, -0.5, math.nan, "0.9", True],
    "guidance_scale": [-0.5, math.inf, math.nan, "2", [1, 2], None],
    "guidance_end": [-0.5, math.inf, math.nan, "2", True],
    "guidance_power": [0.0, -1.0, math.inf, "2"],
}
REQUESTS: list[tuple[dict[str, Any], str]] = [
    *(({"num_images": count}, "num_images") for count in (0, -1, 2.0, None, True)),
    *(({"labels": labels}, "labels") for labels in LABELS),
    *(({"order": order}, "order") for order in (*ORDERS, "strange")),
    *(({"num_orders": count}, "num_orders") for count in (0, 1.0, "2", None)),
    *(({name: value}, name) for name, values in OUT_OF_RANGE.items() for value in values),
    ({"guidance_scale": 2.0}, "guidance_scale"),
    ({"guidance_end": 2.0}, "guidance_end"),
    ({"guidance_scale": 2.0, "guidance_end": 1.0}, "guidance_scale"),
    ({"guidance_power": 2.0}, "guidance_power needs guidance_end"),
    ({"parallel": True, "cache": False}, "parallel"),
    ({"tokens": TOKENS}, "known"),
    ({"known": ALL}, "tokens"),
    *(({**BOTH, "known": known}, "known") for known in (ALL.float(), ALL[:, 0], ALL.transpose(1, 2))),
    *(({**BOTH, "tokens": tokens}, "tokens") for tokens in (TOKENS.float(), TOKENS[0, 0], TOKENS.transpose(1, 2))),
    *(({**BOTH, "tokens": tokens}, "token ids") for tokens in (TOKENS + 9, TOKENS - 1)),
    *(({"generator": generators(count)}, "generator") for count in (0, 1, 3)),
]


@pytest.mark.parametrize(
    ("request_", "word"), REQUESTS, ids=[f"{number}-{request[-1]}" for number, request in enumerate(REQUESTS)]
)
def test_requests_that_cannot_be_drawn_are_refused_by_name(request_, word):
    for kind in PRIORS:
        model = make_prior(kind)
        if model.grid.shape != (3, 4) and ("tokens" in request_ or "known" in request_ or "order" in request_):
            continue
        with pytest.raises(ValueError, match=word) as caught:
            model.sample(**{"num_images": 2, **request_})
        assert "\n" not in str(caught.value)


def test_the_ends_of_ranges_are_allowed():
    gpt = make_prior("gpt")
    kinds = (torch.int32, torch.uint8, torch.uint16, torch.uint32)
    for labels in ([0, 3], *(torch.tensor([2, 0], dtype=kind) for kind in kinds), None):
        assert gpt.sample(2, labels, tokens=TOKENS[0] + 4, known=ALL[0]).eq(4).all()
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1.0}, {"guidance_scale": 0.0}, {"guidance_end": 0}):
        assert gpt.sample(1, [1], **settings).shape == (1, 3, 4)


# Other calls: kind, settings, error, call, word

LOSSES = ("gpt", "made", "masked", "pixelcnn")
CALLS: list[tuple[str, dict[str, Any], type[Exception], Callable[[Any], Any], str]] = [
    *((kind, {}, TypeError, lambda m: m.sample(2, warmth=1), "warmth") for kind in PRIORS),
    ("gpt", {}, TypeError, lambda m: m.sample(2, steps=3), "steps"),
    *(
        ("gpt", {}, TypeError, lambda m, wrong=wrong: m.sample(2, generator=wrong), "generator")
        for wrong in (5, "cpu", [0, 1], [None, None])
    ),
    ("gpt", {}, ValueError, lambda m: m.sample(2, order="snake"), "order"),
    ("gpt", {}, ValueError, lambda m: m.sample(2, num_orders=2), "num_orders"),
    ("gpt", {}, ValueError, lambda m: m.log_prob(TOKENS, num_orders=2), "num_orders"),
    *(
        ("gpt", {}, ValueError, lambda m, count=count: m.log_prob(TOKENS, num_masks=count), "num_masks")
        for count in (2, 0, 2.5)
    ),
    *(
        ("made", {}, ValueError, lambda m, count=count: m.sample(2, num_masks=count), "num_masks")
        for count in (2, 0, 2.5, None)
    ),
    *(("gpt", {}, ValueError, lambda m, tokens=tokens: m.log_prob(tokens), "token") for tokens in TOKENS_OF_NONE),
    *(
        (kind, {}, ValueError, lambda m, tokens=tokens: m.loss(tokens), "token")
        for kind in LOSSES
        for tokens in TOKENS_OF_NONE
    ),
    *(
        (kind, {}, ValueError, lambda m, labels=labels: m.loss(TOKENS, labels), "labels")
        for kind in LOSSES
        for labels in LABELS
    ),
    ("masked", {}, ValueError, lambda m: m.loss(TOKENS, order=m.order), "known"),
    ("gpt", {}, ValueError, lambda m: m.log_prob(TOKENS, torch.tensor([7, 0])), "labels"),
    *(
        ("gpt", {}, ValueError, lambda m, layer=layer: m.features(TOKENS, layer=layer), "layer")
        for layer in (2, -1, True, 1.0)
    ),
    ("marginal", {}, ValueError, lambda m: m.features(TOKENS), "layer"),
    ("masked", {}, ValueError, lambda m: m.make_steps("rows", 3), "steps"),
    *(
        ("masked", {}, ValueError, lambda m, more=more: m.sample(2, steps=3, **more), "steps")
        for more in ({"num_orders": 2}, {"parallel": True}, {"cache": False})
    ),
    *(
        ("masked", {}, ValueError, lambda m, steps=steps: m.sample(2, steps=steps), "steps")
        for steps in (13, 0, 2.0, True)
    ),
    *(
        (
            *("masked", {}, ValueError),
            lambda m, value=value: m.sample(2, steps=2, confidence_temperature=value),
            "confidence_temperature",
        )
        for value in (-1.0, torch.inf, "1")
    ),
    *(
        ("masked", {}, ValueError, lambda m, value=value: m.sample(2, steps=2, schedule=value), "schedule")
        for value in ("sine", ["sine"])
    ),
    ("masked", {"exact": False}, ValueError, lambda m: m.log_prob(TOKENS, order="snake"), "order"),
    ("gpt", {"any_order": True}, ValueError, lambda m: m.sample(2, order="rows"), "order"),
    *(
        (
            *("blocks", {"any_order": True}, ValueError),
            lambda m, sizes=sizes: m.log_prob(TOKENS, order=Partition(torch.arange(12), sizes)),
            "blocks",
        )
        for sizes in ((6, 5), (6, 6.0), (0, 12), (4.5, 7.5))
    ),
    ("blocks", {"order": "rows"}, ValueError, lambda m: m.sample(2, order="halton:4"), "order"),
    ("blocks", {"blocks": (4, 4, 4)}, ValueError, lambda m: m.log_prob(TOKENS, order="raster"), "order"),
]


@pytest.mark.parametrize(
    ("kind", "settings", "error", "call", "word"),
    CALLS,
    ids=[f"{number}-{call[0]}-{call[-1]}" for number, call in enumerate(CALLS)],
)
def test_other_calls_are_refused_by_name(kind, settings, error, call, word):
    with pytest.raises(error, match=word) as caught:
        call(make_prior(kind, **settings))
    assert "\n" not in str(caught.value)


# Orders that are taken


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
    assert torch.equal(*(model.sample(2, generator=generators(2), **each) for each in (plain, named)))
    with pytest.raises(ValueError, match="order"):
        model.sample(2, order="random:7")


def test_names_partitions_and_lists_of_sizes_are_the_same_order():
    model = make_prior("blocks", any_order=True)
    for name in ("rows", "halton:3"):
        order, blocks = make_partition(name, (3, 4))
        drawn = model.sample(2, order=name, generator=generators(2))
        for same in (Partition(order, blocks), Partition(order, list(blocks)), Partition(order.numpy(), blocks)):
            assert torch.equal(drawn, model.sample(2, order=same, generator=generators(2)))
    for other in (model, make_prior("gpt")):
        own = Partition(other.order, list(other.blocks))
        assert other.check_order(own, 2) is None
        assert torch.equal(*(other.sample(2, order=each, generator=generators(2)) for each in (own, None)))
