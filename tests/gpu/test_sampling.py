"""Sampling on the GPU draws the same tokens with a CUDA graph, without one, without a cache, in parallel passes, and in
any batch, and they equal those of the CPU."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from small import PRIORS, draw_known, draw_tokens, generators, make_prior

from prior import Prior
from prior.cuda_graph import Graph
from prior.sampling import draw_keys, gumbel_noise, uniform_noise
from tokenizer import TokenGrid

pytestmark = pytest.mark.gpu
COUNT = 9
EAGER = {"on_step": lambda step: None}  # a step callback disables the graph


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.5, "guidance_end": 3.0, "top_p": 0.9}])
@pytest.mark.parametrize("name", PRIORS)
def test_all_modes_draw_the_same_tokens(name, settings, device, graphs):
    """Labels, known tokens, noise and weights change between calls that share a graph."""
    prior = make_prior(name).to(device)
    for call in range(3):
        known = draw_known(prior, COUNT, 0.2 * call).to(device)
        request = {"tokens": draw_tokens(prior, COUNT).to(device), "known": known, **settings}
        labels = (torch.arange(COUNT) % (call + 1)).to(device)

        drawn = [
            prior.sample(COUNT, labels, generator=generators(COUNT, 100 * call), **request, **mode)
            for mode in ({}, EAGER, {"cache": False}, {"parallel": True})
        ]
        assert drawn[0].device.type == device.type and torch.equal(drawn[0][known], request["tokens"][known])
        assert all(torch.equal(drawn[0], other) for other in drawn[1:])
        with torch.no_grad():
            next(iter(prior.parameters())).mul_(1.1)
    assert len(graphs) == prior.supports_cuda_graphs


@pytest.mark.parametrize("name", PRIORS)
def test_image_k_is_the_same_in_any_batch(name, device):
    prior = make_prior(name).to(device)
    whole = prior.sample(64, generator=generators(64))
    for size in (1, 3):
        some = [
            prior.sample(len(part), generator=generators(len(part), int(part[0])))
            for part in torch.arange(64).split(size)
        ]
        assert torch.equal(torch.cat(some), whole), size


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
        differ = (found.cpu() != expected).flatten(1).any(1)
        assert int(differ.sum()) <= allowed, f"call {call}: {int(differ.sum())} of {count} images differ"
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
