"""Output heads, alone and in every prior that takes them; test_family.py has the promises that these priors keep."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from prior.heads import (
    FLOOR,
    Depth,
    DepthConfig,
    Head,
    Logistic,
    LogisticConfig,
    Softmax,
)
from tokenizer import TokenGrid

ALONE: dict[str, Head] = {
    "softmax": Softmax(TokenGrid((2, 5), 20)),
    "softmax over levels": Softmax(TokenGrid((6, 5), 20, levels=3)),
    "depth of two": Depth(DepthConfig(dim=8), TokenGrid((4, 5), 20, levels=2)),
    "depth of three": Depth(DepthConfig(dim=8), TokenGrid((6, 5), 20, channels=3)),
    "logistic of grey": Logistic(LogisticConfig(components=2), TokenGrid((2, 5), 20, channels=1)),
    "logistic of colours": Logistic(LogisticConfig(components=4), TokenGrid((6, 5), 20, channels=3)),
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_logits_probabilities_and_losses_of_a_head_agree(name, dtype):
    torch.manual_seed(0)
    head = copy.deepcopy(ALONE[name])
    head = head if dtype == torch.bfloat16 and isinstance(head, Logistic) else head.to(dtype)
    outputs, ids = torch.randn(2, 5, head.size).to(dtype), torch.randint(20, (2, 5, head.ids_per_position))
    logits = head.logits(outputs, ids).detach()
    assert logits.shape == (2, 5, head.ids_per_position, 20)
    for level in range(head.ids_per_position):
        torch.testing.assert_close(head.next_logits(outputs, ids[..., :level]).detach(), logits[..., level, :])
    found = head.log_probs(outputs, ids).detach()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide and found.shape == ids.shape
    expected = logits.to(wide).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    nats = head.nats(outputs, ids).detach()
    assert nats.dtype == torch.float32 and nats.shape == ids.shape
    torch.testing.assert_close(nats, -found.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.mean_nats(outputs, ids).detach(), nats.mean(), rtol=1e-5, atol=1e-5)
    for moved in range(head.ids_per_position):
        changed = ids.clone()
        changed[..., moved] = (changed[..., moved] + 7) % 20
        before = [
            (head.logits(outputs, changed) - logits)[..., level, :].abs().max() == 0
            for level in range(head.ids_per_position)
        ]
        assert all(before[: moved + 1]), "an id is seen by those after it alone"


VALUES = 256


def make_logistic(channels=1, components=3, vocab_size=VALUES):
    return Logistic(
        LogisticConfig(components=components), TokenGrid((channels, 1), vocab_size, channels=channels)
    ).double()


def by_definition(weights, means, scales, value, top=VALUES - 1):
    """P(value) of a mixture, from differences of the two tails, whichever is the smaller number."""
    half, x, total = 1 / top, 2 * value / top - 1, 0.0
    for weight, mean, scale in zip(weights, means, scales, strict=True):
        upper, lower = (x + half - mean) / scale, (x - half - mean) / scale
        below = lambda z: 1 / (1 + math.exp(-z)) if z > -700 else 0.0  # noqa: E731
        if value == 0:
            share = below(upper)
        elif value == top:
            share = below(-lower)
        elif lower > 0:
            share = below(-lower) - below(-upper)
        else:
            share = below(upper) - below(lower)
        total += weight * share
    return total * (1 - FLOOR) + FLOOR / (top + 1)


def outputs_of(head, weights, means, scales):
    """What a network has to put out for this mixture of grey values."""
    weights, means, scales = torch.tensor([weights, means, scales], dtype=torch.float64)
    return torch.stack([weights.log(), means - head.spread, 2 + scales.log()]).flatten()


def test_a_table_is_the_mixture_by_definition():
    head, mixture = make_logistic(), ([0.2, 0.5, 0.3], [-0.7, 0.1, 0.95], [0.02, 0.3, 0.004])
    table = head.next_logits(outputs_of(head, *mixture)[None], torch.zeros(1, 0).long())[0]
    expected = torch.tensor([by_definition(*mixture, value) for value in range(VALUES)], dtype=torch.float64).log()
    assert (table - expected).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [16, 256])
def test_far_from_all_components_nothing_is_lost(dtype, vocab_size):
    """The narrowest logistics at one end: at the other the floor is left, to the last bit, and gradients are finite."""
    head, small = make_logistic(vocab_size=vocab_size).to(dtype), 1e-4
    outputs = torch.tensor([0.0, 0, 0, -3, -3, -3, -300.0, -300, -300], dtype=dtype, requires_grad=True)
    table = head.next_logits(outputs[None], torch.zeros(1, 0).long())[0]
    assert torch.isfinite(table).all() and abs(float(table.detach().exp().sum()) - 1) < 1e-5
    assert (table[2:] - math.log(FLOOR / vocab_size)).abs().max() < small
    every = head.log_probs(outputs.expand(vocab_size, -1), torch.arange(vocab_size)[:, None])[:, 0]
    assert (every - table).abs().max() < small
    every.sum().backward()
    assert outputs.grad is not None and torch.isfinite(outputs.grad).all()


@pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_tables_sum_to_one_and_hold_what_single_values_have(size, channels):
    head, generator = make_logistic(channels), torch.Generator().manual_seed(0)
    outputs = size * torch.randn(64, head.size, generator=generator, dtype=torch.float64)
    ids = torch.randint(VALUES, (64, channels), generator=generator)
    tables = head.logits(outputs, ids)
    assert (tables.exp().sum(-1) - 1).abs().max() < 1e-9
    assert (tables.gather(-1, ids[..., None])[..., 0] - head.log_probs(outputs, ids)).abs().max() < 1e-9


def test_channels_share_the_components():
    """p(r, g, b) = sum_k w_k p_k(r) p_k(g | r) p_k(b | r, g), except for the floor: the joint of one mixture."""
    head, generator = make_logistic(3, components=2), torch.Generator().manual_seed(1)
    outputs = torch.randn(head.size, generator=generator, dtype=torch.float64)
    w, means, scales, slopes = outputs.view(-1, 2).split([1, 3, 3, 3])
    scales += 1  # so wide that the floor is far below
    w, means = w[0].softmax(-1), means + head.spread
    ids = torch.tensor([100, 140, 90])
    x, each = 2 * ids.double() / 255 - 1, []
    for k in range(2):
        a = slopes[:, k].tanh()
        at = [means[0, k], means[1, k] + a[0] * x[0], means[2, k] + a[1] * x[0] + a[2] * x[1]]
        shares = [
            (by_definition([1.0], [float(mean)], [float((scale - 2).exp())], int(value)) - FLOOR / 256) / (1 - FLOOR)
            for mean, scale, value in zip(at, scales[:, k], ids, strict=True)
        ]
        each.append(float(w[k]) * math.prod(shares))
    assert float(head.log_probs(outputs[None], ids[None]).sum()) == pytest.approx(math.log(sum(each)), abs=1e-3)


def test_a_large_table_is_made_in_parts(monkeypatch):
    head = make_logistic(3)
    outputs, ids = torch.randn(2, 9, head.size, dtype=torch.float64), torch.randint(VALUES, (2, 9, 3))
    whole = head.logits(outputs, ids)
    monkeypatch.setattr("prior.heads.AT_ONCE", 4 * VALUES * 3)
    assert torch.equal(head.logits(outputs, ids), whole)
