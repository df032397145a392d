"""The critic: receptive field, norms, losses, running means and the adaptive weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import of_ranks
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from tokenizer.critic import (
    DECAY,
    PatchCritic,
    adaptive_weight,
    hinge_critic_loss,
    hinge_generator_loss,
    lecam,
    non_saturating_critic_loss,
    non_saturating_generator_loss,
)

# The network


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("norm", ["spectral", "none"])
def test_a_logit_sees_its_patch_and_nothing_else(layers, norm):
    critic = PatchCritic(1, width=2, layers=layers, norm=norm)
    field = {1: 16, 2: 34, 3: 70}[layers]  # as in the paper's appendix
    side = 3 * field
    images = torch.randn(1, 1, side, side, requires_grad=True)
    logits = critic(images)
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    rows, columns = ((images.grad[0, 0] != 0).any(axis).nonzero().squeeze(1) for axis in (1, 0))
    for seen in (rows, columns):
        assert int(seen[0]) > 0 and int(seen[-1]) < side - 1  # not cut off by the border
        assert int(seen[-1] - seen[0]) + 1 == field


@pytest.mark.parametrize("layers", [1, 3])
def test_images_below_the_smallest_size_are_refused(layers):
    critic = PatchCritic(1, width=2, layers=layers)
    side = critic.smallest
    assert critic(torch.zeros(1, 1, side, side + 3)).shape[2] == critic.map_size(side, side)[0] == 1
    for height, width in ((side - 1, side + 9), (side + 9, side - 1)):
        with pytest.raises(ValueError, match=f"at least {side} .*{height} x {width}"):
            critic(torch.zeros(1, 1, height, width))


def test_the_power_iteration_is_float32_under_autocast(monkeypatch):
    """On a GPU, autocast would run it in bfloat16; a CPU would not, so this asserts that autocast is off."""
    critic, seen = PatchCritic(3, width=8, layers=2), []
    normalise = _SpectralNorm.forward

    def watched(self: _SpectralNorm, weight: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), weight.dtype))
        return normalise(self, weight)

    monkeypatch.setattr(_SpectralNorm, "forward", watched)
    with torch.autocast("cpu", torch.bfloat16):
        assert critic(torch.randn(2, 3, 16, 16)).dtype == torch.float32
    assert seen == [(False, torch.float32)] * 4


# Losses

REAL, FAKE = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.5, -0.25])


def test_hinge_by_hand():
    expected = 0.5 * ((0 + 0.5 + 2.0) / 3 + (0 + 1.0 + 2.5 + 0.75) / 4)
    assert float(hinge_critic_loss(REAL, FAKE)) == pytest.approx(expected)
    assert float(hinge_generator_loss(FAKE)) == pytest.approx(1.75 / 4)


def test_the_arguments_of_the_cross_entropy_are_in_the_right_order():
    """LlamaGen has the ones as input and the logits as target. That is linear and unbounded in the logits of real
    images, and constant in those of fakes."""
    bce, ones, zeros = F.binary_cross_entropy_with_logits, torch.ones_like, torch.zeros_like
    right = 0.5 * (bce(REAL, ones(REAL)) + bce(FAKE, zeros(FAKE)))
    assert float(non_saturating_critic_loss(REAL, FAKE)) == pytest.approx(float(right))
    assert float(non_saturating_generator_loss(FAKE)) == pytest.approx(float(bce(FAKE, ones(FAKE))))


# Running means


def test_lecam_by_hand():
    value = lecam(REAL, FAKE, torch.tensor(0.5), torch.tensor(-1.0))
    real = ((2 + 1) ** 2 + (0.5 + 1) ** 2 + 0) / 3
    fake = (3.5**2 + 0.5**2 + 1.0**2 + 0.75**2) / 4
    assert float(value) == pytest.approx(real + fake)


def test_running_means_start_at_the_first_logits():
    critic = PatchCritic(1, width=2, layers=1)
    critic.track(REAL.clone().requires_grad_(), FAKE)
    assert float(critic.real_mean) == pytest.approx(0.5) and float(critic.fake_mean) == pytest.approx(-1.75 / 4)
    critic.track(torch.full((5,), 10.5), torch.zeros(2))
    assert float(critic.real_mean) == pytest.approx(0.5 + (1 - DECAY) * 10, rel=1e-5)
    assert float(critic.fake_mean) == pytest.approx(DECAY * -1.75 / 4, rel=1e-5)
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    critic.track(REAL, FAKE * math.nan)
    with torch.no_grad():
        critic.track(2 * REAL, FAKE)
    critic.eval().track(2 * REAL, FAKE)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())


# The adaptive weight


def new_pair() -> tuple[nn.Sequential, PatchCritic]:
    """A small generator and a critic, the same for every call."""
    torch.manual_seed(3)
    generator = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))
    critic = PatchCritic(1, width=4, layers=1).requires_grad_(False)
    for _ in range(3):
        critic(torch.zeros(1, 1, 12, 12))
    return generator, critic.eval()


def batch() -> Tensor:
    """Eight images whose two halves differ much."""
    images = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(5))
    images[4:] = images[4:] * 3 + 2
    return images


def two_losses(generator: nn.Module, critic: PatchCritic, images: Tensor) -> tuple[Tensor, Tensor]:
    fake = generator(images)
    return F.mse_loss(fake, images), non_saturating_generator_loss(critic(fake))


@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_a_critic_without_gradients_gives_a_bounded_weight(scale):
    generator, critic = new_pair()
    reconstruction, adversarial = two_losses(generator, critic, batch())
    weight = adaptive_weight(1e3 * reconstruction, scale * adversarial, generator[-1].weight)
    assert float(weight) == 1e4
    assert float(adaptive_weight(0 * reconstruction, 0 * adversarial, generator[-1].weight)) == 0


def weighted(pair: tuple[Any, PatchCritic], images: Tensor, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """The adaptive weight, and the gradient of the weighted sum of losses at the generator's first layer."""
    generator, critic = pair
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        reconstruction, adversarial = two_losses(generator, critic, images)
        weight = adaptive_weight(reconstruction, adversarial, generator[-1].weight)
    assert all(p.grad is None for p in [*generator.parameters(), *critic.parameters()])
    (reconstruction + weight * adversarial).backward()
    return weight, generator[0].weight.grad


@pytest.mark.parametrize("autocast", [False, True])
def test_the_adaptive_weight_is_the_ratio_of_gradients(autocast):
    norms = []
    for index in range(2):
        generator, critic = new_pair()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = two_losses(generator, critic, batch())
        losses[index].backward()
        norms.append(float(generator[-1].weight.grad.norm()))
    weight, gradient = weighted(new_pair(), batch(), autocast)
    assert weight.dtype == torch.float32 and weight.shape == () and not weight.requires_grad
    assert float(weight) == pytest.approx(norms[0] / (norms[1] + 1e-6), rel=1e-5) and weight > 0
    assert bool(gradient.isfinite().all()) and bool(gradient.any())


def test_ranks_weigh_and_track_as_one_process_does():
    """The average of the halves' own weights would be another weight."""
    weight, gradient = weighted(new_pair(), batch())
    halves = [float(weighted(new_pair(), part)[0]) for part in batch().split(4)]
    assert all(abs(half / float(weight) - 1) > 0.05 for half in [*halves, sum(halves) / 2])
    pairs = [new_pair() for _ in range(3)]
    found = of_ranks(2, lambda rank: weighted(pairs[1 + rank], batch()[4 * rank :][:4]))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][0], weight, rtol=1e-4, atol=0)
    torch.testing.assert_close((found[0][1] + found[1][1]) / 2, gradient, rtol=1e-3, atol=1e-6)

    real, fake = REAL.repeat(2), torch.cat([FAKE[:3], 2 * FAKE[:3]])
    for _ in range(2):
        pairs[0][1].train().track(real, fake)
        of_ranks(2, lambda rank: pairs[1 + rank][1].train().track(real[3 * rank :][:3], fake[3 * rank :][:3]))
    for name in ("real_mean", "fake_mean"):
        one, first, second = (getattr(critic, name) for _, critic in pairs)
        assert torch.equal(first, second) and float(first) == pytest.approx(float(one), rel=1e-4)
