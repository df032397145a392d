"""Adversarial training: the schedule and the losses of a critic."""

from __future__ import annotations

import pytest
import torch
from launch import VQVAE, losses, metrics, output_of, start, tokenizer_arguments, train_tokenizer, two_processes
from one_process import one_process

from pipelines.config import UserError
from pipelines.training.adversary import Adversary, CriticConfig
from tokenizer import Tokenizer
from tokenizer.critic import PatchCritic

START, WARMUP, RAMP = 2, 3, 4
CRITIC = {
    "critic__weight": 0.5,
    "critic__start": START,
    "critic__warmup": WARMUP,
    "critic__ramp": RAMP,
    "critic__width": 8,
    "critic__layers": 2,
    "critic__lecam": 0.01,
    "critic__augment": ["color", "translation", "cutout"],
}
STEPS = {"train__steps": 12, "train__save_every": 4}


pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a critic."""
    with one_process():
        return train_tokenizer(tmp_path_factory.mktemp("adversary") / "whole", **CRITIC, **STEPS)


def test_the_critic_trains_alone_before_it_affects_the_tokenizer(whole, tmp_path):
    """Until the end of the warm-up the tokenizer trains exactly as without a critic."""
    alone = train_tokenizer(tmp_path / "alone", **STEPS)
    with_critic, without = losses(whole, "model/l2"), losses(alone, "l2")
    heard = START + WARMUP  # the first step it affects; the loss changes at the next
    assert with_critic[: heard + 1] == without[: heard + 1]
    assert with_critic[heard + 1 :] != without[heard + 1 :]
    lines = [line for line in metrics(whole) if "model/loss" in line]
    assert [line["step"] for line in lines if "critic/critic" in line] == list(range(START + 1, 13))
    assert [line["step"] for line in lines if "model/adversarial" in line] == list(range(heard + 1, 13))

    saved = Tokenizer.from_pretrained(whole / "tokenizer")
    assert not [name for name in saved.state_dict() if "critic" in name]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_play_as_one_does(tmp_path):
    # Not augmented: processes have their own random numbers.
    more = {**CRITIC, **STEPS, "critic__augment": None, "critic__adaptive": True, "critic__loss": "non_saturating"}
    printed = output_of(start(two_processes("train_tokenizer", tokenizer_arguments(tmp_path / "both", **more))))
    assert printed.count("2 processes on cpu") == 1
    alone = train_tokenizer(tmp_path / "alone", **more)
    # Not the hinge loss: its gradient for the critic's last bias is 0 at first, so that the sign of Adam's step is
    # rounding. (A latent between two codes may go to either. test_critic holds the adaptive weight to 1e-4.)
    tolerances = {"model/l2": 2e-3, "model/adversarial_weight": 0.05, "critic/loss": 1e-2, "critic/gradient_norm": 0.05}
    for name, tolerance in tolerances.items():
        found, expected = losses(tmp_path / "both", name), losses(alone, name)
        assert len(found) >= 7 and found == pytest.approx(expected, rel=tolerance), name


def test_the_weight_is_zero_until_the_warmup_is_over_and_then_grows(whole):
    critic = PatchCritic(1, 8, 2)
    adversary = Adversary(CriticConfig(start=10, warmup=5, ramp=4), critic)
    assert [step for step in range(30) if adversary.is_active(step)] == list(range(10, 30))
    shares = [adversary.share(step) for step in range(30)]
    assert shares[:15] == [0.0] * 15 and shares[15:18] == [0.25, 0.5, 0.75] and shares[18:] == [1.0] * 12
    for ramp in (0, 1):
        adversary = Adversary(CriticConfig(start=2, warmup=0, ramp=ramp), critic)
        assert [adversary.share(step) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]
    weights = losses(whole, "model/adversarial_weight")
    assert weights[: RAMP + 1] == pytest.approx([0.5 * share / RAMP for share in (1, 2, 3, 4, 4)])


def test_images_too_small_for_the_critic_are_refused(tmp_path):
    with pytest.raises(UserError, match="critic.layers"):
        train_tokenizer(tmp_path / "run", critic__weight=1.0, critic__layers=6)


def test_all_inputs_of_the_critic_are_augmented():
    """In both losses; without kinds, images and reconstructions arrive unchanged."""
    images, reconstructions = (torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    reconstructions.requires_grad_()
    seen = {}
    for kinds in ((), ("cutout",)):
        critic = PatchCritic(1, 8, 2).eval()
        adversary = Adversary(CriticConfig(weight=1, warmup=0, ramp=0, augment=kinds), critic)
        shown: list[torch.Tensor] = []
        critic.register_forward_pre_hook(lambda _, given, shown=shown: shown.append(given[0]))
        torch.manual_seed(0)
        adversary.critic_term(critic, images, reconstructions.detach())
        added, _ = adversary.tokenizer_term(reconstructions, reconstructions.sum(), reconstructions, 3)
        seen[kinds] = shown
        (gradient,) = torch.autograd.grad(added, reconstructions)
        assert bool((gradient.flatten(1).abs().amax(1) > 0).all())
        hidden = shown[1] == 0
        assert hidden.any() == bool(kinds) and not gradient[hidden].any()
    plain, changed = seen.values()
    assert torch.equal(plain[0], torch.cat([images, reconstructions])) and torch.equal(plain[1], reconstructions)
    for before, after in zip(plain, changed, strict=True):
        holes = (after == 0).flatten(1).float().mean(1)
        assert bool((holes > 0).all()) and torch.equal(after[after != 0], before[after != 0])
    assert not torch.equal(changed[0][:4] == 0, changed[0][4:] == 0), "images and reconstructions share their holes"


def test_the_adaptive_weight_balances_gradients():
    """At the decoder's last layer the adversarial gradient is `weight` times as long as the others'."""
    tokenizer = Tokenizer.create(
        "vqvae", image_size=(28, 28), channels=1, **{k: v for k, v in VQVAE.items() if k != "kind"}
    )
    config = CriticConfig(weight=0.25, adaptive=True, warmup=0, ramp=0, augment=("color", "cutout"))
    adversary = Adversary(config, PatchCritic(1, 8, 2))
    images = torch.rand(4, 1, 28, 28) * 2 - 1
    output = tokenizer.train()(images)
    others = (output.images - images).square().mean()
    added, _ = adversary.tokenizer_term(output.images, others, tokenizer.last_layer, 3)
    lengths = [torch.autograd.grad(term, tokenizer.last_layer, retain_graph=True)[0].norm() for term in (added, others)]
    assert float(lengths[0] / lengths[1]) == pytest.approx(0.25, rel=1e-3)
