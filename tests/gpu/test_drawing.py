"""Sampling on the card: every route to an image gives the same tokens, in any batch."""

from __future__ import annotations

import pytest
import torch
from small import PRIORS, draw_known, draw_tokens, generators, make_prior

from prior.sampling import draw_keys, gumbel_noise, uniform_noise

pytestmark = pytest.mark.gpu
COUNT = 9
ROUTES = [{"cache": False}, {"parallel": True}]


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.5, "top_p": 0.9}], ids=["plain", "guided"])
@pytest.mark.parametrize("name", PRIORS)
def test_all_routes_give_the_same_tokens(name, settings, device):
    prior = make_prior(name).to(device)
    labels = (torch.arange(COUNT) % 3).to(device)

    def drawn(**route) -> torch.Tensor:
        return prior.sample(COUNT, labels, generator=generators(COUNT), **settings, **route)

    first = drawn()
    assert first.device.type == device.type
    assert torch.equal(first, drawn())
    assert all(torch.equal(first, drawn(**route)) for route in ROUTES)


@pytest.mark.parametrize("name", PRIORS)
def test_image_k_is_the_same_in_any_batch(name, device):
    prior, count = make_prior(name).to(device), 64
    labels = (torch.arange(count) % 3).to(device)
    whole = prior.sample(count, labels, generator=generators(count))
    for size in (1, 3):
        some = [
            prior.sample(len(part), part, generator=generators(len(part), seed=start))
            for start, part in zip(range(0, count, size), labels.split(size), strict=False)
        ]
        assert torch.equal(torch.cat(some), whole), size


@pytest.mark.parametrize("name", PRIORS)
def test_known_tokens_stay_on_every_route(name, device):
    prior = make_prior(name)
    tokens, known = draw_tokens(prior, COUNT).to(device), draw_known(prior, COUNT, 0.4).to(device)
    prior = prior.to(device)
    given = {"tokens": tokens, "known": known}
    first = prior.sample(COUNT, generator=generators(COUNT), **given)
    slow = prior.sample(COUNT, generator=generators(COUNT), cache=False, **given)
    assert torch.equal(first, slow) and torch.equal(first[known], tokens[known])


@pytest.mark.parametrize("name", PRIORS)
def test_bfloat16_draws_valid_tokens(name, device):
    prior = make_prior(name).to(device, torch.bfloat16)
    drawn = prior.sample(COUNT, generator=generators(COUNT))
    assert int(drawn.min()) >= 0 and int(drawn.max()) < prior.grid.vocab_size
    assert torch.equal(drawn, prior.sample(COUNT, generator=generators(COUNT)))


@pytest.mark.parametrize("use", range(4))
def test_noise_is_that_of_the_cpu(use, device):
    """To a unit in the last place of float32: hashes and uniform variates are equal."""
    keys = draw_keys(generators(3), 3)
    assert torch.equal(uniform_noise(keys, use, 5, 4000), uniform_noise(keys.to(device), use, 5, 4000).cpu())
    torch.testing.assert_close(gumbel_noise(keys, use, 5, 4000), gumbel_noise(keys.to(device), use, 5, 4000).cpu())
