"""Sampling on the GPU draws the same tokens with a CUDA graph, without one, without a cache, in parallel passes, and in
any batch, and they equal those of the CPU.

Two ways of computing the same logits in float32 differ by about 1e-6, and choose another of two candidates that are as
close once in a million tokens. A test of 25,000 tokens therefore allows one image that differs; wrong sampling would
change images in every call."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from givens.columns import draw_given, make_conditioned
from small import PRIORS, draw_known, draw_tokens, generators, make_prior
from torch import Tensor

from prior import Prior
from prior.compiling import can_compile
from prior.cuda_graph import Graph
from prior.noise import TOKEN_NOISE, TokenNoise, draw_keys, gumbel_noise, uniform_noise
from tokenizer import TokenGrid

pytestmark = pytest.mark.gpu
COUNT, NEAR_TIES = 9, 1
EAGER = {"on_step": lambda step: None}  # a step callback disables the graph


def count_differing(found: Tensor, expected: Tensor) -> int:
    """Number of images of which any token differs."""
    return int((found.cpu() != expected.cpu()).flatten(1).any(1).sum())


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.5, "guidance_end": 3.0, "top_p": 0.9}])
@pytest.mark.parametrize("name", PRIORS)
def test_all_modes_draw_the_same_tokens(name, settings, device, graphs):
    """Labels, known tokens, noise and weights change between calls that share a graph."""
    prior, differing = make_prior(name).to(device), 0
    for call in range(3):
        known = draw_known(prior, COUNT, 0.2 * call).to(device)
        request = {"tokens": draw_tokens(prior, COUNT).to(device), "known": known, **settings}
        labels = (torch.arange(COUNT) % (call + 1)).to(device)

        drawn = [
            prior.sample(COUNT, labels, generator=generators(COUNT, 100 * call), **request, **mode)
            for mode in ({}, EAGER, {"cache": False}, {"parallel": True})
        ]
        assert drawn[0].device.type == device.type and torch.equal(drawn[0][known], request["tokens"][known])
        differing += sum(count_differing(other, drawn[1]) for other in drawn)
        with torch.no_grad():
            next(iter(prior.parameters())).mul_(1.1)
    assert differing <= NEAR_TIES and len(graphs) == prior.supports_cuda_graphs


@pytest.mark.parametrize("name", [name for name in PRIORS if name != "marginal"])
def test_columns_of_every_kind_are_those_of_the_cpu(name, device, graphs, elsewhere):
    """They change between calls that share a graph: given once or per image, or null in some images."""
    here = make_conditioned(name, "all").float()
    there, differing = copy.deepcopy(here).to(device), 0
    for call in range(3):
        condition = {"age": 30.0} if call == 1 else draw_given(here, COUNT, "some null")
        request = {"condition": condition, "guidance_scale": 2.0, "guidance_on": ["age", "outline"]}
        expected = here.sample(COUNT, generator=generators(COUNT, 100 * call), **request, **EAGER)
        with elsewhere():
            found = there.sample(COUNT, generator=generators(COUNT, 100 * call), **request)
        differing += count_differing(found, expected)
    assert differing <= NEAR_TIES and len(graphs) == there.supports_cuda_graphs


@pytest.mark.parametrize("name", PRIORS)
def test_image_k_is_the_same_in_any_batch(name, device):
    prior = make_prior(name).to(device)
    whole, differing = prior.sample(64, generator=generators(64)), 0
    for size in (1, 3):
        some = [
            prior.sample(len(part), generator=generators(len(part), int(part[0])))
            for part in torch.arange(64).split(size)
        ]
        differing += count_differing(torch.cat(some), whole)
    assert differing <= NEAR_TIES


@pytest.mark.parametrize("name", PRIORS)
def test_bfloat16_draws_valid_tokens(name, device, graphs):
    """The graph draws the same tokens as the eager call it was captured from."""
    prior = make_prior(name).to(device, torch.bfloat16)
    first, second, third = (prior.sample(COUNT, generator=generators(COUNT)) for _ in range(3))
    assert int(first.min()) >= 0 and int(first.max()) < prior.grid.vocab_size
    assert torch.equal(first, second) and torch.equal(first, third) and len(graphs) == prior.supports_cuda_graphs


@pytest.mark.parametrize("use", range(4))
def test_noise_is_that_of_the_cpu(use, device):
    """Uniform variates to the bit, Gumbel variates within float32 rounding."""
    keys = draw_keys(generators(3), 3)
    assert torch.equal(uniform_noise(keys, use, 5, 4000), uniform_noise(keys.to(device), use, 5, 4000).cpu())
    torch.testing.assert_close(gumbel_noise(keys, use, 5, 4000), gumbel_noise(keys.to(device), use, 5, 4000).cpu())


def test_fused_noise_is_that_of_the_cpu(device, compiler):
    """With a compiler; without one, and on the CPU, numbers come from the same kernels as in small batches."""
    keys, size = draw_keys(generators(64), 64), 1 << 14
    noise = TokenNoise(keys.to(device), 2, size)
    assert (noise.draw is gumbel_noise) != can_compile(device)
    with torch.inference_mode():
        for rank in range(2):
            expected = gumbel_noise(keys, TOKEN_NOISE, rank * size, size)[:, None]
            torch.testing.assert_close(noise.of_ranks(rank, rank + 1).cpu(), expected)


def large_gpt(device: torch.device) -> Prior:
    """A GPT over 16x16 tokens of 1,024 (on the CPU 4x4 of 64) whose logits have standard deviation 3, as if trained."""
    side, vocab_size, dim, depth = (16, 1024, 256, 4) if device.type == "cuda" else (4, 64, 32, 2)
    prior = Prior.create("gpt", grid=TokenGrid((side, side), vocab_size), num_classes=3, dim=dim, depth=depth, heads=2)
    with torch.no_grad():
        prior.head.weight.mul_(3 / prior.eval()(draw_tokens(prior, 8)).std())
    return prior


@pytest.mark.timeout(900)
def test_a_gpt_draws_the_tokens_of_the_cpu(device, graphs, elsewhere):
    """64 images of 256 tokens of 1,024. The graph is used from the second call on.

    Logits differ from the CPU's by about 1e-5, which flips about one token in 100,000, and with it the rest of its
    image. The test allows one in 10,000: two images of 64. Wrong sampling would change most images.
    """
    here, count = large_gpt(device), 64 if device.type == "cuda" else 8
    there, labels = copy.deepcopy(here).to(device), torch.arange(count) % 3
    allowed = math.ceil(count * len(here.grid) / 10_000)
    for call in range(3):
        expected = here.sample(count, labels, generator=generators(count, 1000 * call), **EAGER)
        with elsewhere():
            found = there.sample(count, labels.to(device), generator=generators(count, 1000 * call))
        differing = count_differing(found, expected)
        assert differing <= allowed, f"call {call}: {differing} of {count} images differ"
    assert len(graphs) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_than_the_current_card_draws_new_tokens_in_each_call(graphs):
    prior = make_prior("gpt").to("cuda:1")
    for call in range(4):
        drawn, eager = (prior.sample(COUNT, generator=generators(COUNT, 100 * call), **mode) for mode in ({}, EAGER))
        assert torch.equal(drawn, eager)
    assert len(graphs) == 1 and torch.cuda.current_device() == 0


def test_a_graph_follows_its_weights_and_is_freed_with_its_model(device, graphs):
    prior, count = large_gpt(device).to(device), 16
    expected = [prior.sample(count, generator=generators(count)) for _ in range(2)][0]
    with torch.no_grad():
        for parameter in prior.parameters():
            old, parameter.data = parameter.data, parameter.data.clone()
            old.zero_()  # the graph read this memory
    assert all(torch.equal(prior.sample(count, generator=generators(count)), expected) for _ in range(2))
    assert len(graphs) == 2
    alive = weakref.ref(prior)
    del prior, parameter, old
    gc.collect()
    assert alive() is None and Graph.last is None
