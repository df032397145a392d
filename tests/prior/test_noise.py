"""Noise is a function of the image's key, its use, the rank and the id, and of nothing else."""

from __future__ import annotations

import itertools
from functools import partial
from shutil import which
from unittest import mock

import counter_noise
import pytest
import torch
from frequencies import as_frequent
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small import generators

from prior import noise as noise_module
from prior.noise import (
    CONFIDENCE_NOISE,
    MASK_NOISE,
    ORDER_NOISE,
    TOKEN_NOISE,
    TokenNoise,
    draw_keys,
    draw_numbers,
    fused_gumbel_noise,
    gumbel_noise,
    hash_counters,
    uniform_noise,
)

USES = (TOKEN_NOISE, ORDER_NOISE, CONFIDENCE_NOISE, MASK_NOISE)
examples = settings(deadline=None, max_examples=60, derandomize=True)
all_keys = st.lists(st.integers(0, (1 << 63) - 2), min_size=1, max_size=3)


def keys_of(count: int, seed: int = 0) -> torch.Tensor:
    return draw_keys(torch.Generator().manual_seed(seed), count)


def test_the_reference_has_the_published_numbers():
    """Of splitmix64 with seed 1234567, as in Rosetta Code."""
    assert counter_noise.splitmix64(1234567, 0, 5) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@examples
@given(all_keys, st.sampled_from(USES), st.integers(0, 1 << 41))
def test_hashes_and_variates_are_those_of_unsigned_arithmetic(keys, use, first):
    found = hash_counters(torch.tensor(keys), use, first, 20)
    assert found.dtype == torch.int64 and found.shape == (len(keys), 20)
    expected = [counter_noise.hashes(key, use, first, 20) for key in keys]
    assert [[number % (1 << 64) for number in row] for row in found.tolist()] == expected
    uniform = uniform_noise(torch.tensor(keys), use, first, 20)
    assert uniform.dtype == torch.float64
    assert uniform.tolist() == [counter_noise.uniforms(key, use, first, 20) for key in keys]
    gumbel = gumbel_noise(torch.tensor(keys), use, 0, 20)
    assert gumbel.dtype == torch.float32
    expected = torch.stack([counter_noise.gumbel(key, use, (20,)) for key in keys])
    torch.testing.assert_close(gumbel, expected, rtol=1e-6, atol=1e-6)


@examples
@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(1, 1 << 20))
@example(-1, 3)  # the largest hash
def test_a_uniform_variate_is_never_zero_or_one_and_draws_a_number_in_range(number, count):
    key = torch.tensor([0])
    with mock.patch.object(noise_module, "hash_counters", lambda *given: torch.tensor([[number]])):
        assert 0 < float(uniform_noise(key, TOKEN_NOISE, 0, 1)) < 1
        assert gumbel_noise(key, TOKEN_NOISE, 0, 1).isfinite().all()
        assert 0 <= int(draw_numbers(key, ORDER_NOISE, count)) < count


@pytest.mark.parametrize(("images", "count"), [(1000, 1000), (1, 1_000_000)])
def test_noise_has_the_distribution_of_gumbel(images, count):
    """The largest distance of the distribution function (Kolmogorov and Smirnov) of a million."""
    drawn = gumbel_noise(keys_of(images), TOKEN_NOISE, 0, count).flatten().double()
    below, total = (-(-drawn.sort().values).exp()).exp(), len(drawn)
    steps = torch.arange(1, total + 1) / total
    assert float((below - steps).abs().max()) * total**0.5 < 2.3  # above it once in 20,000


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


def test_uses_images_ranks_and_consecutive_keys_are_independent():
    """Also for keys that differ by one, which no generator draws."""
    for drawn in (uniform_noise(keys, TOKEN_NOISE, 0, 400) for keys in (keys_of(500), torch.arange(500))):
        for one, other in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
            assert abs(correlation(one, other)) < 5 / one.numel() ** 0.5
        assert drawn.unique().numel() == drawn.numel()
    for one, other in itertools.combinations([uniform_noise(keys_of(500), use, 0, 400) for use in USES], 2):
        assert abs(correlation(one, other)) < 5 / one.numel() ** 0.5 and not (one == other).any()


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_numbers_are_equally_likely(count):
    keys = keys_of(30_000)
    drawn = draw_numbers(keys, ORDER_NOISE, count)
    assert drawn.dtype == torch.int64 and drawn.shape == keys.shape
    assert as_frequent(drawn, torch.full((count,), 1 / count))
    assert torch.equal(draw_numbers(keys[5:9], ORDER_NOISE, count), drawn[5:9])
    assert count == 1 or not torch.equal(drawn, draw_numbers(keys, MASK_NOISE, count))


@examples
@given(st.sets(st.integers(1, 11)), st.permutations(range(4)), st.integers(1, 100), st.booleans())
def test_any_ranks_of_any_images_have_the_same_noise(cuts, rows, at_once, backwards):
    """However many numbers are computed at a time, and in whichever sequence ranks are requested."""
    keys, ends = keys_of(4), [0, *sorted(cuts), 12]
    whole = gumbel_noise(keys, TOKEN_NOISE, 0, 60)[rows].view(4, 12, 5)
    with mock.patch.object(noise_module, "NUMBERS_AT_ONCE", at_once):
        noise = TokenNoise(keys[rows], 12, 5)
        for begin, end in list(itertools.pairwise(ends))[:: -1 if backwards else 1]:
            assert torch.equal(noise.of_ranks(begin, end), whole[:, begin:end])


def test_without_float64_numbers_are_computed_on_the_cpu(monkeypatch):
    expected = gumbel_noise(keys_of(3), TOKEN_NOISE, 0, 50), draw_numbers(keys_of(30), MASK_NOISE, 7)
    moved = []
    monkeypatch.setattr(noise_module, "finest", lambda device: torch.float32)
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda self, real=torch.Tensor.cpu: moved.append(self.numel()) or real(self)
    )
    assert torch.equal(gumbel_noise(keys_of(3), TOKEN_NOISE, 0, 50), expected[0]) and moved[-1] == 3
    assert torch.equal(draw_numbers(keys_of(30), MASK_NOISE, 7), expected[1]) and moved[-1] == 30


def test_the_key_of_an_image_is_drawn_from_its_generator_which_advances():
    own = generators(3, seed=7)
    first, second = draw_keys(own, 3), draw_keys(own, 3)
    assert first.dtype == torch.int64 and first.device.type == "cpu" and (first >= 0).all()
    assert first.tolist() == [counter_noise.next_key(g) for g in generators(3, seed=7)]
    assert not (first == second).any()
    assert torch.equal(draw_keys(tuple(generators(3, seed=7)), 3), first)
    assert torch.equal(draw_keys(torch.Generator().manual_seed(7), 1), first[:1]), "a seed is an image"


INDUCTOR = pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(not which("g++"), reason="no g++")])


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_a_fused_kernel_draws_the_same_noise_for_any_batch_and_rank(backend, compiler, monkeypatch):
    """Hashes to the bit. It is compiled once, as it cannot be while a graph is captured."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    monkeypatch.setattr(noise_module, "can_compile", lambda device: True)
    monkeypatch.setattr(noise_module, "NUMBERS_AT_ONCE", 15)
    noise_module._compiled_noise.cache_clear()
    hashes = torch.compile(noise_module._hash, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
        for count in (3, 4, 6):
            keys, counters = keys_of(count), torch.arange(7 * count, 9 * count)
            assert torch.equal(hashes(keys, TOKEN_NOISE, counters), noise_module._hash(keys, TOKEN_NOISE, counters))
            noise = TokenNoise(keys, 12, 5)
            assert noise.draw is fused_gumbel_noise and noise.at_once == 1
            for rank in range(12):
                expected = gumbel_noise(keys, TOKEN_NOISE, 5 * rank, 5)[:, None]
                torch.testing.assert_close(noise.of_ranks(rank, rank + 1), expected, rtol=1e-6, atol=1e-6)
    noise_module._compiled_noise.cache_clear()
    assert TokenNoise(keys_of(2), 12, 5).draw is gumbel_noise  # small batches do not wait for a compiler


def test_a_kernel_that_cannot_be_compiled_is_replaced_with_one_warning(compiler, monkeypatch):
    def broken(*_: object) -> None:
        raise OSError("gcc: not found")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    noise_module._compiled_noise.cache_clear()
    with pytest.warns(UserWarning, match="gcc: not found") as warned:
        for first in (0, 5):
            found = fused_gumbel_noise(keys_of(3), TOKEN_NOISE, first, 5)
            assert torch.equal(found, gumbel_noise(keys_of(3), TOKEN_NOISE, first, 5))
    assert len(warned) == 1
    noise_module._compiled_noise.cache_clear()
