"""Sampling on the GPU draws the same tokens with a CUDA graph, without one, without a cache, in parallel passes, and in
any batch, and they equal those of the CPU.

Logits in float32 differ by about 1e-6, which chooses another of two close candidates once in a million tokens. A test
of 25,000 tokens therefore allows one image that differs; wrong sampling would change images in every call."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from givens.columns import draw_given, make_conditioned
from small import PRIORS, draw_known, draw_tokens, generators, make_prior
from torch import Tensor

from prior.compiling import can_compile
from prior.cuda_graph import Graph
from prior.noise import TOKEN_NOISE, TokenNoise, draw_keys, gumbel_noise, uniform_noise

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
    whole, differing = prior.sample(24, generator=generators(24)), 0
    for size in (1, 3):
        some = [
            prior.sample(len(part), generator=generators(len(part), int(part[0])))
            for part in torch.arange(24).split(size)
        ]
        differing += count_differing(torch.cat(some), whole)
    assert differing <= NEAR_TIES


@pytest.mark.parametrize("name", PRIORS)
def test_bfloat16_draws_valid_tokens(name, device, graphs):
    """The graph draws the same tokens as the eager call it was captured from."""
    prior = make_prior(name).to(device, torch.bfloat16)
    first, *others = (prior.sample(COUNT, generator=generators(COUNT)) for _ in range(3))
    prior.grid.check(first)
    assert all(torch.equal(first, each) for each in others) and len(graphs) == prior.supports_cuda_graphs


@pytest.mark.parametrize("use", range(4))
def test_noise_is_that_of_the_cpu(use, device):
    """Uniform variates to the bit, Gumbel variates within float32 rounding."""
    keys = draw_keys(generators(3), 3)
    there = keys.to(device)
    assert torch.equal(uniform_noise(keys, use, 5, 4000), uniform_noise(there, use, 5, 4000).cpu())
    torch.testing.assert_close(gumbel_noise(keys, use, 5, 4000), gumbel_noise(there, use, 5, 4000).cpu())


def test_fused_noise_is_that_of_the_cpu(device, compiler):
    """With a compiler; without one, and on the CPU, numbers come from the same kernels as in small batches."""
    keys, size = draw_keys(generators(64), 64), 1 << 14
    noise = TokenNoise(keys.to(device), 2, size)
    assert (noise.draw is gumbel_noise) != can_compile(device)
    with torch.inference_mode():
        found = noise.of_ranks(1, 2).cpu()
    torch.testing.assert_close(found, gumbel_noise(keys, TOKEN_NOISE, size, size)[:, None])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_than_the_current_card_draws_new_tokens_in_each_call(graphs):
    prior = make_prior("gpt").to("cuda:1")
    for call in range(4):
        drawn, eager = (prior.sample(COUNT, generator=generators(COUNT, 100 * call), **mode) for mode in ({}, EAGER))
        assert torch.equal(drawn, eager)
    assert len(graphs) == 1 and torch.cuda.current_device() == 0


def test_a_graph_follows_its_weights_and_is_freed_with_its_model(device, graphs):
    prior = make_prior("gpt").to(device)
    expected = [prior.sample(COUNT, generator=generators(COUNT)) for _ in range(2)][0]
    with torch.no_grad():
        for parameter in prior.parameters():
            old, parameter.data = parameter.data, parameter.data.clone()
            old.zero_()  # the graph read this memory
    assert all(torch.equal(prior.sample(COUNT, generator=generators(COUNT)), expected) for _ in range(2))
    assert len(graphs) == 2
    alive = weakref.ref(prior)
    del prior, parameter, old
    gc.collect()
    assert alive() is None and Graph.last is None
