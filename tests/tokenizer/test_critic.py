"""The critic: what it sees, what both players minimise, and that two processes agree with one.

What needs two processes runs in two that this file starts of itself (`python test_critic.py FOLDER`).
"""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import fork_twice, join_group, leave_group
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm

from tokenizer.critic import (
    CRITIC_LOSSES,
    DECAY,
    GENERATOR_LOSSES,
    NORMS,
    PatchCritic,
    adaptive_weight,
    hinge_critic_loss,
    hinge_generator_loss,
    lecam,
    non_saturating_critic_loss,
    non_saturating_generator_loss,
)

every_loss = pytest.mark.parametrize("kind", CRITIC_LOSSES)
every_norm = pytest.mark.parametrize("norm", NORMS)


def strokes(count: int, seed: int = 0) -> Tensor:
    """Sharp pictures `(count, 1, 28, 28)` in [-1, 1]: a few bars each, somewhat like digits."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.full((count, 1, 28, 28), -1.0)
    for image in images:
        for _ in range(3):
            y, x, length, flat = torch.randint(4, 18, (4,), generator=generator).tolist()
            height, width = (2, length) if flat % 2 else (length, 2)
            image[:, y : y + height, x : x + width] = 1.0
    return images


def blurred(images: Tensor, seed: int = 1) -> Tensor:
    noise = 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False) + noise


# The network


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("norm", ["spectral", "none"])
def test_a_logit_sees_its_patch_and_nothing_else(layers, norm):
    critic = PatchCritic(1, width=2, layers=layers, norm=norm)
    side = 3 * critic.receptive_field
    images = torch.randn(1, 1, side, side, requires_grad=True)
    logits = critic(images)
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    rows, columns = ((images.grad[0, 0] != 0).any(axis).nonzero().squeeze(1) for axis in (1, 0))
    for seen in (rows, columns):
        assert int(seen[0]) > 0 and int(seen[-1]) < side - 1  # not cut off by the border
        assert int(seen[-1] - seen[0]) + 1 == critic.receptive_field
    assert critic.receptive_field == {1: 16, 2: 34, 3: 70}[layers]  # as in the paper's appendix


@every_norm
def test_a_map_of_logits_in_float32(norm):
    critic = PatchCritic(3, width=4, layers=2, norm=norm)
    images = torch.rand(2, 3, 28, 40) * 2 - 1
    logits = critic(images)
    assert logits.shape == (2, 1, *critic.map_size(28, 40)) and logits.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert critic(images).dtype == torch.float32


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_image_and_one_pixel_less(layers):
    critic = PatchCritic(1, width=2, layers=layers)
    side = critic.smallest
    assert critic(torch.zeros(1, 1, side, side + 3)).shape[2] == critic.map_size(side, side)[0] == 1
    for height, width in ((side - 1, side + 9), (side + 9, side - 1)):
        with pytest.raises(ValueError, match=rf"{layers} layers needs .*at least {side} .*got {height} x {width}"):
            critic(torch.zeros(1, 1, height, width))


def test_what_is_refused():
    with pytest.raises(ValueError, match="norm: must be one of spectral, batch, none .got 'group'"):
        PatchCritic(3, norm="group")
    with pytest.raises(ValueError, match=">= 1"):
        PatchCritic(3, layers=0)


def test_spectral_norm_holds_the_largest_singular_value_at_one():
    critic = PatchCritic(3, width=8, layers=2)
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=3.0)
    for _ in range(30):
        critic(torch.randn(2, 3, 16, 16))
    convolutions = [layer for layer in critic.body if hasattr(layer, "stride")]
    assert len(convolutions) == 4
    for layer in convolutions:
        largest = torch.linalg.svdvals(layer.weight.detach().flatten(1))[0]
        assert float(largest) == pytest.approx(1.0, abs=0.05)


def test_the_power_iteration_is_float32_under_autocast(monkeypatch):
    """On a GPU, autocast would run it in bfloat16; on a CPU it would not, so what is asserted is that it is off."""
    critic, images = PatchCritic(3, width=8, layers=2), torch.randn(2, 3, 16, 16)
    same, seen = copy.deepcopy(critic), []
    critic(images)
    normalise = _SpectralNorm.forward

    def watched(self: _SpectralNorm, weight: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), weight.dtype))
        return normalise(self, weight)

    monkeypatch.setattr(_SpectralNorm, "forward", watched)
    with torch.autocast("cpu", torch.bfloat16):
        same(images)
    assert seen == [(False, torch.float32)] * 4
    for name, value in critic.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name


def test_batch_norm_keeps_nothing_that_ranks_could_differ_in():
    critic = PatchCritic(3, width=4, layers=2, norm="batch")
    assert [name for name, _ in critic.named_buffers()] == ["real_mean", "fake_mean", "tracked"]
    layers = [layer for layer in critic.body if isinstance(layer, nn.BatchNorm2d)]
    assert [layer.num_features for layer in layers] == [8, 16]  # not after the first convolution, not after the last
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(critic.eval()(images), critic.train()(images))


@every_norm
def test_what_a_state_dict_holds_is_all_there_is(norm):
    torch.manual_seed(1)
    critic, fresh = (PatchCritic(1, width=4, layers=1, norm=norm) for _ in range(2))
    images = torch.randn(2, 1, 12, 12)
    for _ in range(3):
        critic.track(critic(images), critic(-images))
    fresh.load_state_dict(critic.state_dict())
    assert torch.equal(fresh(images), critic(images)) and torch.equal(fresh.real_mean, critic.real_mean)


# What is minimised

REAL, FAKE = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.5, -0.25])


def test_hinge_by_hand():
    expected = 0.5 * ((0 + 0.5 + 2.0) / 3 + (0 + 1.0 + 2.5 + 0.75) / 4)
    assert float(hinge_critic_loss(REAL, FAKE)) == pytest.approx(expected)
    assert float(hinge_generator_loss(FAKE)) == pytest.approx(1.75 / 4)


def test_the_arguments_of_the_cross_entropy_stand_the_right_way_round():
    """LlamaGen has the ones as input and the logits as target. That is linear in the logits of real images, without
    bound, and says nothing at all of fakes."""
    bce, ones, zeros = F.binary_cross_entropy_with_logits, torch.ones_like, torch.zeros_like
    real, fake = (torch.tensor([8.0, -8.0], requires_grad=True) for _ in range(2))
    loss = non_saturating_critic_loss(real, fake)
    with torch.no_grad():
        right = 0.5 * (bce(real, ones(real)) + bce(fake, zeros(fake)))
        swapped = 0.5 * (bce(ones(real), real) + bce(zeros(fake), fake))
        assert float(loss) == pytest.approx(float(right)) and abs(float(loss - swapped)) > 1
        assert float(non_saturating_generator_loss(fake)) == pytest.approx(float(bce(fake, ones(fake))))
    loss.backward()  # 1/4 where the critic is wrong, nothing where it is sure and right
    torch.testing.assert_close(real.grad, torch.tensor([0.0, -0.25]), atol=1e-3, rtol=0)
    torch.testing.assert_close(fake.grad, torch.tensor([0.25, 0.0]), atol=1e-3, rtol=0)


@every_loss
def test_real_is_to_be_high_and_fake_low(kind):
    real, fake = (torch.linspace(-0.9, 0.9, 7).requires_grad_() for _ in range(2))
    CRITIC_LOSSES[kind](real, fake).backward()
    assert bool((real.grad < 0).all()) and bool((fake.grad > 0).all())
    fake.grad = None
    GENERATOR_LOSSES[kind](fake).backward()
    assert bool((fake.grad < 0).all())


@pytest.mark.sparse
@every_loss
@every_norm
def test_a_critic_learns_to_tell_blurred_from_sharp(kind, norm):
    critic = PatchCritic(1, width=8, layers=2, norm=norm)
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.5, 0.9))
    held_out = strokes(64, seed=999)

    def ranked() -> float:
        """How often a sharp picture has a higher logit than a blurred one; no threshold, so that it is steady."""
        with torch.no_grad():
            real, fake = (critic(images).flatten(1).mean(1) for images in (held_out, blurred(held_out, seed=998)))
        return float((real[:, None] > fake).double().mean())

    assert ranked() < 0.8
    for step in range(40):
        images = strokes(16, seed=step)
        loss = CRITIC_LOSSES[kind](critic(images), critic(blurred(images, seed=step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ranked() > 0.98


# The regulariser


def test_lecam_by_hand():
    value = lecam(REAL, FAKE, torch.tensor(0.5), torch.tensor(-1.0))
    real = ((2 + 1) ** 2 + (0.5 + 1) ** 2 + 0) / 3
    fake = (3.5**2 + 0.5**2 + 1.0**2 + 0.75**2) / 4
    assert float(value) == pytest.approx(real + fake)


def test_running_means_begin_at_the_first_logits():
    critic = PatchCritic(1, width=2, layers=1)
    critic.track(REAL.requires_grad_(), FAKE)
    assert float(critic.real_mean) == pytest.approx(0.5) and float(critic.fake_mean) == pytest.approx(-1.75 / 4)
    critic.track(torch.full((5,), 10.5), torch.zeros(2))
    assert float(critic.real_mean) == pytest.approx(0.5 + (1 - DECAY) * 10, rel=1e-5)
    assert float(critic.fake_mean) == pytest.approx(DECAY * -1.75 / 4, rel=1e-5)
    assert int(critic.tracked) == 2 and not critic.real_mean.requires_grad


def test_logits_that_are_not_finite_move_no_running_mean():
    critic = PatchCritic(1, width=2, layers=1)
    critic.track(REAL, FAKE)
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    critic.track(REAL, FAKE * math.nan)
    critic.track(REAL * math.inf, FAKE)
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())


def test_running_means_move_in_training_only():
    critic = PatchCritic(1, width=2, layers=1)
    with torch.no_grad():
        found = critic.track(REAL, FAKE)
    assert torch.equal(critic.eval().track(REAL, FAKE), found) and found.tolist() == [0.5, -1.75 / 4]
    assert int(critic.tracked) == 0 and float(critic.real_mean) == 0


# The adaptive weight


def new_pair() -> tuple[nn.Sequential, PatchCritic]:
    """A small generator and a critic, the same ones whenever they are asked for."""
    torch.manual_seed(3)
    generator = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))
    critic = PatchCritic(1, width=4, layers=1).requires_grad_(False)
    for _ in range(3):
        critic(torch.zeros(1, 1, 12, 12))
    return generator, critic.eval()


def batch() -> Tensor:
    """Eight images whose two halves are as different as can be."""
    images = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(5))
    images[4:] = images[4:] * 3 + 2
    return images


def two_losses(generator: nn.Module, critic: PatchCritic, images: Tensor) -> tuple[Tensor, Tensor]:
    fake = generator(images)
    return F.mse_loss(fake, images), non_saturating_generator_loss(critic(fake))


def weigh(images: Tensor) -> tuple[float, Tensor]:
    """The weight of one process, and the gradient of the weighted sum at the first layer."""
    generator, critic = new_pair()
    reconstruction, adversarial = two_losses(generator, critic, images)
    weight = adaptive_weight(reconstruction, adversarial, generator[-1].weight)
    (reconstruction + weight * adversarial).backward()
    return float(weight), generator[0].weight.grad


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    norms = []
    for index in range(2):
        generator, critic = new_pair()
        two_losses(generator, critic, batch())[index].backward()
        norms.append(float(generator[-1].weight.grad.norm()))
    weight, gradient = weigh(batch())
    assert weight == pytest.approx(norms[0] / (norms[1] + 1e-6), rel=1e-5) and weight > 0
    assert bool(gradient.any())  # the graph is still there for the backward pass


def test_the_adaptive_weight_has_no_gradient_and_touches_none():
    generator, critic = new_pair()
    weight = adaptive_weight(*two_losses(generator, critic, batch()), generator[-1].weight)
    assert not weight.requires_grad and weight.shape == ()
    assert all(p.grad is None for p in [*generator.parameters(), *critic.parameters()])


@pytest.mark.parametrize("scale", [0.0, 1e-12])
def test_a_critic_that_says_nothing_gives_no_infinite_weight(scale):
    generator, critic = new_pair()
    reconstruction, adversarial = two_losses(generator, critic, batch())
    weight = adaptive_weight(1e3 * reconstruction, scale * adversarial, generator[-1].weight)
    assert float(weight) == 1e4
    assert float(adaptive_weight(0 * reconstruction, 0 * adversarial, generator[-1].weight)) == 0


def test_the_adaptive_weight_under_autocast():
    generator, critic = new_pair()
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, adversarial = two_losses(generator, critic, batch())
        weight = adaptive_weight(reconstruction, adversarial, generator[-1].weight)
    norms = []
    for loss in (reconstruction, adversarial):
        generator.zero_grad()
        loss.backward(retain_graph=True)
        norms.append(float(generator[-1].weight.grad.norm()))
    assert weight.dtype == torch.float32 and float(weight) == pytest.approx(norms[0] / (norms[1] + 1e-6), rel=1e-5)
    assert float(weight) == pytest.approx(weigh(batch())[0], rel=0.2)  # bfloat16 gradients are that coarse
    (reconstruction + weight * adversarial).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in generator.parameters())


def critic_turn(critic: nn.Module, images: Tensor) -> list[float]:
    """The gradient at the critic's first layer, and its power iteration's vector, after a turn of its own."""
    hinge_critic_loss(critic(images), critic(-images)).backward()
    first = getattr(critic, "module", critic).body[0].parametrizations.weight
    return [*first.original.grad.flatten().tolist(), *first[0]._u.tolist()]


# Two processes


def one_of_two(folder: Path) -> None:
    """What each process does: its half of the batch, through a generator that DDP wraps."""
    rank = join_group(folder)
    generator, critic = new_pair()
    wrapped = nn.parallel.DistributedDataParallel(generator)
    mine = batch()[4 * rank : 4 * rank + 4]
    reconstruction, adversarial = two_losses(wrapped, critic, mine)
    weight = adaptive_weight(reconstruction, adversarial, generator[-1].weight)
    (reconstruction + weight * adversarial).backward()
    for _ in range(2):
        critic.track(critic(mine), critic(-mine))
    means = [float(critic.real_mean), float(critic.fake_mean)]
    wrapped = nn.parallel.DistributedDataParallel(critic.train().requires_grad_(), broadcast_buffers=False)
    found = {
        "world": dist.get_world_size(),
        "weight": float(weight),
        "gradient": generator[0].weight.grad.tolist(),
        "means": means,
        "turn": critic_turn(wrapped, mine),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    leave_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("pair")
    fork_twice(__file__, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_weigh_as_one_does(pair):
    weight, gradient = weigh(batch())
    halves = [weigh(part)[0] for part in batch().split(4)]
    assert all(abs(half / weight - 1) > 0.05 for half in [*halves, sum(halves) / 2])  # so that averaging is needed
    assert [found["world"] for found in pair] == [2, 2]
    assert pair[0]["weight"] == pair[1]["weight"] == pytest.approx(weight, rel=1e-4)
    for found in pair:  # and DDP's own averaging is not disturbed
        torch.testing.assert_close(torch.tensor(found["gradient"]), gradient, rtol=1e-3, atol=1e-6)


def test_two_processes_track_as_one_does(pair):
    _, critic = new_pair()
    for _ in range(2):
        critic.track(critic(batch()), critic(-batch()))
    expected = [float(critic.real_mean), float(critic.fake_mean)]
    assert pair[0]["means"] == pair[1]["means"] == pytest.approx(expected, rel=1e-4)


def test_two_critics_take_the_turn_of_one(pair):
    expected = critic_turn(new_pair()[1].train().requires_grad_(), batch())
    assert pair[0]["turn"] == pair[1]["turn"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
