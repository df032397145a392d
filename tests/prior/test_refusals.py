"""Settings, requests and calls that priors refuse: an error of one line that names the setting or argument."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from givens.headed import grid_with
from small import SMALL, draw_tokens, generators, make_prior

from prior import Prior
from prior.orders import Partition
from tokenizer import TokenGrid
from tokenizer.model import ConfigError

LONG, LEVELS, CLIP = TokenGrid((12,), 5), TokenGrid((6, 3), 32, levels=3), TokenGrid((2, 2, 3), 5)
GREY, SCALES = grid_with({"channels": 1}, (2, 2), 16), TokenGrid((5,), 5, ((1, 1), (2, 2)))
SETTINGS: list[tuple[str, dict[str, Any], str]] = [
    ("causal_conv", {"max_dilation": 6}, "max_dilation"),
    ("pixelcnn", {"order": "snake"}, "order"),
    ("gated_pixelcnn", {"grid": LONG}, "grid"),
    ("pixelcnn", {"first_kernel": 4}, "first_kernel"),
    ("pixelsnail", {"key": 16, "value": 8}, "key"),
    ("made", {"masks": 3}, "masks"),
    ("made", {"direct": True, "grid": TokenGrid((64, 64), 16)}, "direct"),
    ("next_scale", {"grid": TokenGrid((7, 7), 5)}, "grid"),
    ("next_scale", {"grid": SCALES, "order": "random:1"}, "order"),
    ("gpt", {"dim": 36, "heads": 4}, "heads"),
    ("gpt", {"dim": 4096, "heads": 1, "grid": TokenGrid((512, 512), 4)}, "heads"),
    ("gpt", {"anneal": (0.7, 0.5)}, "anneal"),
    ("gpt", {"dilation": (2, 1)}, "dilation"),
    ("gpt", {"window": (1, 1), "dilation": (2,)}, "dilation"),
    ("gpt", {"window": (1, 1), "any_order": True}, "window"),
    ("gpt", {"window": (0, 3)}, "window"),
    ("gpt", {"window": (1, 1), "grid": CLIP}, "window"),
    ("gpt", {"window": (200, 200), "grid": TokenGrid((256, 256), 4)}, "window"),
    ("gpt", {"order": "diagonal"}, "order"),
    ("gpt", {"blocks": (6, 6)}, "blocks"),
    ("blocks", {"blocks": (6, 5)}, "blocks"),
    ("blocks", {"order": "halton:13"}, "order"),
    ("gpt", {"head": "depth"}, "head"),
    ("gpt", {"head": "softmax", "grid": LEVELS}, "head"),
    ("gpt", {"head": "logistic", "grid": grid_with({"channels": 1}, (2, 2), 15)}, "head"),
    ("gpt", {"head": "depth", "grid": LEVELS, "any_order": True}, "any_order"),
    ("masked", {"head": "depth", "grid": LEVELS}, "head"),
    ("masked", {"label_smoothing": 0.1, "head": "logistic", "grid": GREY}, "label_smoothing"),
]


@pytest.mark.parametrize(("kind", "settings", "key"), SETTINGS, ids=str)
def test_settings_that_do_not_fit_are_refused_by_name(kind, settings, key):
    with pytest.raises(ConfigError) as caught:
        Prior.create(kind, **{"grid": TokenGrid((3, 4), 5), "num_classes": 3, **SMALL.get(kind, {}), **settings})
    message = str(caught.value)
    assert message.startswith(f"{kind}: ") and key in message.split(":")[1] and "\n" not in message


TOKENS, ALL = torch.zeros(2, 3, 4).long(), torch.ones(2, 3, 4).bool()
BOTH = {"tokens": TOKENS, "known": ALL}
WRONG_TOKENS = (TOKENS + 5, TOKENS - 1, TOKENS.transpose(1, 2), TOKENS.float())
WRONG_ORDERS = ["strange", [1, 2], torch.arange(12.0), [0] * 12, torch.arange(12).expand(3, -1)]
OUT_OF_RANGE: dict[str, list[Any]] = {
    "num_images": [0, 2.0],
    "labels": [[1, 4], torch.eye(2).long()],
    "order": [*WRONG_ORDERS, "snake"],
    "num_orders": [0, 2],
    "temperature": [-1.0, math.nan, "hot"],
    "top_k": [0, 2.0],
    "top_p": [0.0, 1.1, math.nan],
    "guidance_scale": [-0.5, math.inf, 2.0],
    "guidance_end": [-0.5, 2.0],
    "guidance_power": [0.0, 2.0],
    "generator": [generators(3), [0, 1]],
    "warmth": [1],
}
SAMPLED: list[tuple[str, list[dict[str, Any]]]] = [
    *((name, [{name: value} for value in values]) for name, values in OUT_OF_RANGE.items()),
    ("parallel", [{"parallel": True, "cache": False}]),
    ("known", [{"tokens": TOKENS}, *({**BOTH, "known": known} for known in (ALL.float(), ALL[:, 0]))]),
    ("tokens", [{"known": ALL}]),
    ("token", [{**BOTH, "tokens": tokens} for tokens in (TOKENS.float(), TOKENS[0, 0], TOKENS + 9)]),
]
STEPS = [{"num_orders": 2}, {"parallel": True}, {"cache": False}, {"steps": 13}, {"steps": True}]
SIZES = [Partition(torch.arange(12), sizes) for sizes in ((6, 5), (0, 12), (4.5, 7.5))]
CALLS: list[tuple[str, dict[str, Any], str, list[dict[str, Any]], str]] = [
    *(("gpt", {}, "sample", requests, word) for word, requests in SAMPLED),
    ("gpt", {}, "log_prob", [{"tokens": tokens} for tokens in WRONG_TOKENS], "token"),
    ("gpt", {}, "log_prob", [{"num_masks": count} for count in (2, 0, 2.5)], "num_masks"),
    ("masked", {}, "loss", [{"order": torch.arange(12)}], "known"),
    ("made", {}, "sample", [{"num_masks": count} for count in (2, 0)], "num_masks"),
    ("gpt", {}, "features", [{"layer": layer} for layer in (2, -1)], "layer"),
    ("marginal", {}, "features", [{}], "layer"),
    ("masked", {}, "make_steps", [{"order": "rows", "steps": 3}], "steps"),
    ("masked", {}, "sample", [{"steps": 3, **more} for more in STEPS], "steps"),
    ("masked", {}, "sample", [{"steps": 2, "confidence_temperature": -1.0}], "confidence_temperature"),
    ("masked", {}, "sample", [{"steps": 2, "schedule": "sine"}], "schedule"),
    ("gpt", {"any_order": True}, "sample", [{"order": "rows"}], "order"),
    ("blocks", {"any_order": True}, "log_prob", [{"order": order} for order in SIZES], "blocks"),
    ("blocks", {"order": "rows"}, "sample", [{"order": "halton:4"}], "order"),
]


@pytest.mark.parametrize(
    ("kind", "settings", "method", "arguments", "word"),
    CALLS,
    ids=[f"{number}-{call[0]}-{call[2]}-{call[-1]}" for number, call in enumerate(CALLS)],
)
def test_wrong_arguments_are_refused_by_name(kind, settings, method, arguments, word):
    model = make_prior(kind, **settings)
    needed = {"sample": {"num_images": 2}, "make_steps": {}}.get(method, {"tokens": TOKENS})
    for each in arguments:
        with pytest.raises((ValueError, TypeError), match=word) as caught:
            getattr(model, method)(**{**needed, **each})
        assert "\n" not in str(caught.value)


def test_the_ends_of_ranges_are_allowed():
    gpt = make_prior("gpt")
    for labels in ([0, 3], torch.tensor([2, 0], dtype=torch.uint16), None):
        assert gpt.sample(2, labels, tokens=TOKENS[0] + 4, known=ALL[0]).eq(4).all()
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1.0}, {"guidance_scale": 0.0}, {"guidance_end": 0}):
        assert gpt.sample(1, [1], **settings).shape == (1, 3, 4)


@pytest.mark.parametrize(
    ("kind", "settings"), [("blocks", {"order": "halton:3", "grid": LEVELS, "head": "depth"}), ("next_scale", {})]
)
def test_a_prior_of_one_order_takes_it_by_its_name(kind, settings):
    """Also where the name orders positions of several ids, or scales."""
    model = make_prior(kind, **settings)
    tokens = draw_tokens(model, 2)
    assert torch.equal(model.log_prob(tokens, order=model.config.order), model.log_prob(tokens))
    with pytest.raises(ValueError, match="order"):
        model.sample(2, order="random:7")
