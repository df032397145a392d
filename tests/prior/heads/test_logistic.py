"""The mixture of logistics: against the definition in exact arithmetic, in the tails, and channel by channel."""

import math

import pytest
import torch
from givens.headed import make_headed
from prior.heads.logistic import FLOOR, Logistic, LogisticConfig
from small import draw_tokens

from prior import Prior
from prior.sampling import Sampler, gumbel
from tokenizer import TokenGrid

VALUES = 256


def make(channels=1, components=3, vocab_size=VALUES):
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
    head, mixture = make(), ([0.2, 0.5, 0.3], [-0.7, 0.1, 0.95], [0.02, 0.3, 0.004])
    table = head.next_logits(outputs_of(head, *mixture)[None], torch.zeros(1, 0).long())[0]
    expected = torch.tensor([by_definition(*mixture, value) for value in range(VALUES)], dtype=torch.float64).log()
    assert (table - expected).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [16, 256])
def test_far_from_all_components_nothing_is_lost(dtype, vocab_size):
    """The narrowest logistics at one end: at the other the floor is left, to the last bit, and gradients are finite."""
    head, small = make(vocab_size=vocab_size).to(dtype), 1e-4
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
    head, generator = make(channels), torch.Generator().manual_seed(0)
    outputs = size * torch.randn(64, head.size, generator=generator, dtype=torch.float64)
    ids = torch.randint(VALUES, (64, channels), generator=generator)
    tables = head.logits(outputs, ids)
    assert (tables.exp().sum(-1) - 1).abs().max() < 1e-9
    assert (tables.gather(-1, ids[..., None])[..., 0] - head.log_probs(outputs, ids)).abs().max() < 1e-9


def test_float32_is_as_exact_as_its_numbers():
    head, generator = make(3), torch.Generator().manual_seed(0)
    outputs, ids = 4 * torch.randn(64, head.size, generator=generator), torch.randint(VALUES, (64, 3))
    exact = head.logits(outputs.double(), ids)
    assert (head.float().logits(outputs, ids) - exact).abs().max() < 2e-3
    assert (head.logits(outputs.bfloat16(), ids) - head.logits(outputs.bfloat16().float(), ids)).abs().max() == 0


def test_channels_share_the_components():
    """p(r, g, b) = sum_k w_k p_k(r) p_k(g | r) p_k(b | r, g), but for the floor: the joint of one mixture."""
    head, generator = make(3, components=2), torch.Generator().manual_seed(1)
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


def test_red_moves_what_green_is_expected_to_be():
    head = make(3, components=2)
    outputs = torch.randn(1, head.size, dtype=torch.float64)
    tables = [head.next_logits(outputs, torch.tensor([[red]])) for red in (10, 240)]
    assert (tables[0] - tables[1]).abs().max() > 0.1


def test_the_network_puts_out_few_numbers():
    assert make(1, components=5).size == 15 and make(3, components=10).size == 100  # as in the paper
    model = make_headed("gpt", "logistic", {"channels": 1}, vocab_size=256)
    assert model(draw_tokens(model, 1), raw=True).shape == (1, 6, 6)


def test_a_large_table_is_made_in_parts(monkeypatch):
    head = make(3)
    outputs, ids = torch.randn(2, 9, head.size, dtype=torch.float64), torch.randint(VALUES, (2, 9, 3))
    whole = head.logits(outputs, ids)
    monkeypatch.setattr("prior.heads.logistic.AT_ONCE", 4 * VALUES * 3)
    assert torch.equal(head.logits(outputs, ids), whole)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sharper", [0.0, 6.0])
def test_rounding_that_a_narrow_logistic_multiplies_is_told(channels, sharper):
    """What the network puts out differs by a rounding in each number; every decision that this turns is said to be
    close. A mean of a narrow logistic moves log P thousands of times as far as itself."""
    head = make(channels, components=5).float()
    outputs = torch.randn(4000, head.size)
    outputs[:, 5 * (1 + channels) : 5 * (1 + 2 * channels)] -= sharper
    ids = torch.randint(VALUES, (4000, channels - 1))
    others = outputs + Prior.rounding * (2 * torch.rand_like(outputs) - 1)
    logits, moved = head.next_logits(outputs, ids), head.next_logits(others, ids)
    sampler = Sampler()
    tolerance = sampler.tolerance(Prior.rounding, 1.0)
    largest, widths = sampler.largest(logits), sampler.widths(tolerance, head.steepness(logits))
    turned, missed, close, generator = 0, [0, 0], 0, torch.Generator().manual_seed(0)
    for _ in range(40):
        noise = gumbel(logits.shape, generator)
        other = sampler.choose(moved, noise)
        for number, some in enumerate([widths, None]):
            chosen, could_turn = sampler.decide(logits, noise, tolerance * largest, some)
            missed[number] += int(((chosen != other) & ~could_turn).sum())
            close += 0 if number else int(could_turn.sum())
        turned += int((chosen != other).sum())
    assert missed[0] == 0 and close < 0.03 * 40 * 4000
    assert not sharper or missed[1] > 0.5 * turned > 5, "too little to test anything"


def test_guidance_goes_by_the_steeper_row():
    sampler, steep = Sampler(guidance_scale=2.0), torch.tensor([[[5.0, 1.0]], [[3.0, 7.0]]])
    assert sampler.widths(0.5, steep).tolist() == [[[1.25, 1.75]]] and sampler.widths(0.5, None) is None
    assert Sampler().widths(torch.tensor([[0.5], [2.0]]), steep).tolist() == [[[1.25, 0.25]], [[3.0, 7.0]]]


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}])
def test_a_decision_is_close_where_both_logits_may_move_as_far_as_their_lead(filters):
    logits, nothing = torch.tensor([[1.0, 0.8, -5.0]]), torch.zeros(1, 3)
    sampler = Sampler(**filters)
    for widths, close in (([0.05, 0.05, 0.0], False), ([0.05, 0.2, 0.0], True), ([0.2, 0.05, 0.0], True)):
        ids, turns = sampler.decide(logits, nothing, torch.tensor([0.01]), torch.tensor([widths]))
        assert ids.tolist() == [0] and turns.tolist() == [close]
    far = torch.tensor([[0.0, 0.0, 5.7]])  # moves further than others, but not so far
    assert sampler.decide(logits, nothing, torch.tensor([0.01]), far)[1].tolist() == [bool(filters)]
