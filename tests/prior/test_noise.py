"""Noise is a function of the image's key, its use, the rank and the id: nothing else decides it.

Covers: prior/sampling.py.
"""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import counter_noise
import pytest
import torch
from frequencies import as_frequent
from small import generators, make_prior

from prior import sampling
from prior.sampling import (
    CONFIDENCE,
    MASKS,
    ORDERS,
    TOKENS,
    TokenNoise,
    draw_keys,
    draw_numbers,
    gumbel_noise,
    hash_counters,
    uniform_noise,
)

USES = (TOKENS, ORDERS, CONFIDENCE, MASKS)
KEYS = [0, 1, 2, (1 << 63) - 2, 0x123456789ABCDEF]


def keys_of(count: int, seed: int = 0) -> torch.Tensor:
    return draw_keys(torch.Generator().manual_seed(seed), count)


# The hash


def test_the_reference_has_the_published_numbers():
    """Of splitmix64 with seed 1234567, as in Rosetta Code."""
    assert counter_noise.splitmix64(1234567, 0, 5) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("first", [0, 7, 1 << 20, (1 << 40) + 3])
def test_hashes_are_those_of_unsigned_arithmetic(use, first):
    found = hash_counters(torch.tensor(KEYS), use, first, 40)
    assert found.dtype == torch.int64 and found.shape == (len(KEYS), 40)
    expected = [counter_noise.hashes(key, use, first, 40) for key in KEYS]
    assert [[number % (1 << 64) for number in row] for row in found.tolist()] == expected


def test_variates_are_those_of_the_reference():
    uniform = uniform_noise(torch.tensor(KEYS), TOKENS, 5, 60)
    assert uniform.dtype == torch.float64
    assert uniform.tolist() == [counter_noise.uniforms(key, TOKENS, 5, 60) for key in KEYS]
    gumbel = gumbel_noise(torch.tensor(KEYS), CONFIDENCE, 0, 60)
    assert gumbel.dtype == torch.float32
    expected = torch.stack([counter_noise.gumbel(key, CONFIDENCE, (60,)) for key in KEYS])
    torch.testing.assert_close(gumbel, expected, rtol=1e-6, atol=1e-6)


# Distribution


@pytest.mark.parametrize("use", USES)
def test_noise_has_the_distribution_of_gumbel(use):
    """Moments, and the largest distance of the distribution function (Kolmogorov and Smirnov), of a million numbers:
    of many images, and of one."""
    for keys, count in ((keys_of(1000), 1000), (keys_of(1, 5), 1_000_000)):
        drawn = gumbel_noise(keys, use, 0, count).flatten().double()
        total, scale = len(drawn), math.pi / 6**0.5
        centred = (drawn - drawn.mean()) / drawn.std()
        assert abs(float(drawn.mean()) - 0.5772156649) < 5 * scale / total**0.5
        assert abs(float(drawn.var()) - scale**2) < 5 * (4.4 * scale**4 / total) ** 0.5  # kurtosis 5.4
        assert abs(float((centred**3).mean()) - 1.1395470994) < 0.04
        assert abs(float((centred**4).mean()) - 5.4) < 0.4
        below = (-(-drawn.sort().values).exp()).exp()
        steps = torch.arange(1, total + 1) / total
        assert float((below - steps).abs().max()) * total**0.5 < 2.3  # above it once in 20,000


def test_ids_are_drawn_with_their_probabilities():
    logits = torch.tensor([1.0, -0.5, 0.2, -3.0, 0.0])
    for use in USES:
        drawn = (logits + gumbel_noise(keys_of(1), use, 0, 5 * 50_000).view(-1, 5)).argmax(1)
        assert as_frequent(drawn, logits.softmax(0))


@pytest.mark.parametrize(("one", "other"), itertools.combinations(USES, 2))
def test_uses_of_a_key_are_independent(one, other):
    first, second = (uniform_noise(keys_of(500), use, 0, 400).flatten() for use in (one, other))
    assert abs(correlation(first, second)) < 5 / len(first) ** 0.5
    assert not (first == second).any()


def test_images_ranks_and_consecutive_keys_are_independent():
    """Also of keys that differ by one, or in one bit, as no generator draws them."""
    noise = uniform_noise(keys_of(500), TOKENS, 0, 400)
    consecutive = uniform_noise(torch.arange(500), TOKENS, 0, 400)
    bits = uniform_noise(torch.tensor([1 << bit for bit in range(63)]), TOKENS, 0, 4000)
    for drawn in (noise, consecutive, bits):
        for one, other in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
            assert abs(correlation(one.flatten(), other.flatten())) < 5 / one.numel() ** 0.5
        assert drawn.unique().numel() == drawn.numel()


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])


@pytest.mark.parametrize("number", [0, -1, 1, (1 << 63) - 1, -(1 << 63), (1 << 12) - 1, -(1 << 12)])
def test_a_uniform_variate_is_never_zero_or_one(number, monkeypatch):
    monkeypatch.setattr(sampling, "hash_counters", lambda *given: torch.tensor([[number]]))
    uniform = uniform_noise(torch.tensor([0]), TOKENS, 0, 1)
    assert 0 < float(uniform) < 1
    assert gumbel_noise(torch.tensor([0]), TOKENS, 0, 1).isfinite().all()


# Any part, on any device


def test_any_part_of_an_image_has_the_same_noise():
    keys = keys_of(6)
    whole = gumbel_noise(keys, TOKENS, 0, 60)
    for begin, end in ((0, 1), (7, 20), (59, 60), (0, 60)):
        assert torch.equal(gumbel_noise(keys, TOKENS, begin, end - begin), whole[:, begin:end])
    for rows in (slice(2, 3), torch.tensor([5, 0, 3])):
        assert torch.equal(gumbel_noise(keys[rows], TOKENS, 0, 60), whole[rows])


@pytest.mark.parametrize("at_once", [1, 2 * 5, 4 * 3 * 5, 1 << 20])
@pytest.mark.parametrize("cuts", [range(13), [0, 1, 4, 12], [0, 12], [3, 8, 9]])
def test_blocks_of_ranks_have_the_same_noise(at_once, cuts, monkeypatch):
    """However many numbers are computed at a time, and in whatever sequence ranks are asked for."""
    monkeypatch.setattr(sampling, "NUMBERS_AT_ONCE", at_once)
    keys, cuts = keys_of(4), list(cuts)
    whole = gumbel_noise(keys, TOKENS, 0, 60).view(4, 12, 5)
    noise = TokenNoise(keys, 12, 5)
    for begin, end in itertools.pairwise(cuts):
        assert torch.equal(noise.of_ranks(begin, end), whole[:, begin:end])
    for begin, end in reversed(list(itertools.pairwise(cuts))):
        assert torch.equal(noise.of_ranks(begin, end), whole[:, begin:end])


def test_without_float64_numbers_are_computed_on_the_cpu(monkeypatch):
    expected = gumbel_noise(keys_of(3), TOKENS, 0, 50), draw_numbers(keys_of(30), MASKS, 7)
    moved = []
    monkeypatch.setattr(sampling, "finest", lambda device: torch.float32)
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda self, real=torch.Tensor.cpu: moved.append(self.numel()) or real(self)
    )
    assert torch.equal(gumbel_noise(keys_of(3), TOKENS, 0, 50), expected[0]) and moved[-1] == 3
    assert torch.equal(draw_numbers(keys_of(30), MASKS, 7), expected[1]) and moved[-1] == 30


def test_the_default_device_of_torch_does_not_matter():
    """A generator of one device draws for no other. (`meta` is a device that holds nothing.)"""
    model = make_prior("gpt")
    drawn = model.sample(2, generator=generators(2))
    with torch.device("meta"):
        assert torch.equal(model.sample(2, generator=generators(2)), drawn)
        assert keys_of(3).device.type == "cpu"


# Keys


def test_the_key_of_an_image_is_drawn_from_its_generator_which_advances():
    own = generators(3, seed=7)
    first, second = draw_keys(own, 3), draw_keys(own, 3)
    assert first.dtype == torch.int64 and first.device.type == "cpu" and (first >= 0).all()
    assert first.tolist() == [counter_noise.next_key(g) for g in generators(3, seed=7)]
    assert not (first == second).any()
    assert torch.equal(draw_keys(tuple(generators(3, seed=7)), 3), first)
    assert torch.equal(draw_keys(torch.Generator().manual_seed(7), 1), first[:1]), "a seed is an image"


def test_one_generator_draws_keys_in_turn():
    few, many = keys_of(7), keys_of(200_000)
    assert torch.equal(few, many[:7]) and many.unique().numel() == len(many)
    torch.manual_seed(5)
    first, second = draw_keys(None, 4), draw_keys(None, 4)
    assert torch.equal(first, draw_keys(torch.Generator().manual_seed(5), 4)) and not torch.equal(first, second)


def test_keys_are_drawn_on_the_device_of_their_generator(monkeypatch):
    asked: list[dict[str, object]] = []
    fake = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(sampling.torch, "Generator", SimpleNamespace)
    monkeypatch.setattr(torch, "randint", lambda *given, **how: asked.append(how) or torch.tensor(7))
    assert draw_keys(fake, 1).tolist() == [7] == draw_keys(None, 1).tolist()
    assert asked[0] == {"generator": fake, "device": torch.device("cuda")}
    assert asked[1]["generator"] is None and str(asked[1]["device"]) == "cpu"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
def test_numbers_are_equally_likely(count):
    keys = keys_of(30_000)
    drawn = draw_numbers(keys, ORDERS, count)
    assert drawn.dtype == torch.int64 and drawn.shape == keys.shape
    assert as_frequent(drawn, torch.full((count,), 1 / count))
    assert torch.equal(draw_numbers(keys[5:9], ORDERS, count), drawn[5:9])
    assert count == 1 or not torch.equal(drawn, draw_numbers(keys, MASKS, count))


def test_the_largest_variate_still_draws_one_of_them(monkeypatch):
    monkeypatch.setattr(sampling, "uniform_noise", lambda *given: torch.tensor([[1 - 2.0**-53]]).double())
    for count in (1, 3, (1 << 20) - 1):
        assert draw_numbers(torch.tensor([0]), ORDERS, count).tolist() == [count - 1]
