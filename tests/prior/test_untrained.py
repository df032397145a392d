"""Priors as they are made: what they know before they have weights, and that all ids are about as likely to them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from givens.headed import HEADS, TOGETHER, grid_with
from small import PRIORS, SMALL, VARIANTS, draw_tokens, grid_of, logits_of

from prior import Prior

NAMES = [*PRIORS, *VARIANTS]
every_prior = pytest.mark.parametrize("name", NAMES)


def made(name: str, shape: tuple[int, int] = (4, 4), vocab_size: int = 16, **config: Any) -> Prior:
    kind, settings = VARIANTS.get(name, (name, {}))
    known = {"grid": grid_of(kind, shape, vocab_size), "num_classes": 3, **SMALL.get(kind, {}), **settings}
    return Prior.create(kind, **{**known, **config}).eval()


ELSEWHERE = {"mask", "background"}  # of convolutions: multiplied with weights, and wherever these are


ORDERED = [("gpt", order) for order in ("hilbert", "random:3", "halton", "spread", "spiral_in")]
ORDERED += [("blocks", order) for order in ("diagonal", "halton:4", "random:3:4", "regions:4", "raster/3")]
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    *((name, {"order": order}) for name, order in ORDERED),
    *((name, {"grid": grid_with({"levels": 3}, (2, 4), 8), "head": HEADS["depth"]}) for name in TOGETHER),
]


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=str)
def test_its_receptive_field_is_known_before_it_has_weights(name, settings):
    """Its buffers are computed on the CPU, whatever the default device is."""
    plain = made(name, **settings)
    with torch.device("meta"):
        planned = made(name, **settings)
    expected = dict(plain.named_buffers())
    for key, value in planned.named_buffers():
        if key.rpartition(".")[2] not in ELSEWHERE:
            assert value.device.type == "cpu" and torch.equal(value, expected[key]), key
    assert all(parameter.is_meta for parameter in planned.parameters())
    if not any(value.is_meta for value in planned.buffers()):
        planned.load_state_dict(plain.state_dict(), assign=True)
        tokens, labels = draw_tokens(plain, 3), torch.arange(3)
        assert torch.equal(logits_of(planned, tokens, labels), logits_of(plain, tokens, labels))


LIKELIER = {"marginal": 0.7, "made": 0.15, "pixelcnn_pp": 0.15}  # which begin further from it


@every_prior
def test_all_ids_are_about_as_likely_to_it_and_all_weights_are_moved(name):
    """Neither so large that it has much to unlearn, nor so small that nothing reaches the logits."""
    model = made(name).train()
    tokens, labels = draw_tokens(model, 32), torch.arange(32) % 4
    logits = logits_of(model, tokens, labels)
    nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert abs(float(nats.detach()) - math.log(16)) < LIKELIER.get(name, 0.04)
    assert 0.05 < float(logits.detach().std()) < 1.5
    assert float(logits.detach().std(1).mean()) > 0.02 or name == "marginal"  # positions differ
    nats.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all())]
    assert still == []
