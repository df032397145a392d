"""A tokenizer and its critic: who learns when, and that neither is lost on the way."""

from __future__ import annotations

import pytest
import torch
from launch import (
    VQVAE,
    losses,
    metrics,
    output_of,
    start,
    states,
    tokenizer_arguments,
    train_tokenizer,
    two_processes,
)
from one_process import one_process
from tiny_task import assert_same_run, killed_at, read_checkpoint, stopped_at

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
STEPS = {"train__steps": 14, "train__save_every": 4}


pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with a critic that nobody interrupts."""
    with one_process():
        return train_tokenizer(tmp_path_factory.mktemp("adversary") / "whole", **CRITIC, **STEPS)


def test_the_critic_learns_alone_before_it_is_heard(whole, tmp_path):
    """Until its warm-up is over the tokenizer is, figure for figure, the one that has no critic; then it is not."""
    alone = train_tokenizer(tmp_path / "alone", **STEPS)
    with_critic, without = losses(whole, "model/l2"), losses(alone, "l2")
    heard = START + WARMUP  # the first step it has a say in; what that changes shows in the loss of the next
    assert with_critic[: heard + 1] == without[: heard + 1]
    assert with_critic[heard + 1 :] != without[heard + 1 :]
    lines = [line for line in metrics(whole) if "model/loss" in line]
    assert [line["step"] for line in lines if "critic/critic" in line] == list(range(START + 1, 15))
    assert [line["step"] for line in lines if "model/adversarial" in line] == list(range(heard + 1, 15))


def test_its_weight_grows(whole):
    weights = losses(whole, "model/adversarial_weight")
    assert weights[: RAMP + 1] == pytest.approx([0.5 * share / RAMP for share in (1, 2, 3, 4, 4)])


def test_a_continued_run_keeps_critic_and_optimizers(whole, tmp_path):
    """Stopped before the critic has begun, and lost when it has its say."""
    run = tmp_path / "run"
    with stopped_at(START):
        train_tokenizer(run, **CRITIC, **STEPS)
    assert not [name for name in read_checkpoint(states(run)[-1]) if "optimizer.critic" in name]
    with killed_at(9):
        train_tokenizer(run, **CRITIC, **STEPS)
    train_tokenizer(run, **CRITIC, **STEPS)
    assert_same_run(run, whole)
    found = read_checkpoint(states(run)[-1])
    assert {int(value) for name, value in found.items() if "optimizer.critic" in name and name.endswith("/step")} == {
        12
    }
    assert any(name.startswith("average.critic") for name in found)


def test_what_users_get_has_no_critic(whole):
    saved = Tokenizer.from_pretrained(whole / "tokenizer")
    assert not [name for name in saved.state_dict() if "critic" in name]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_play_as_one_does(tmp_path):
    # Each process has its own draws.
    more = {**CRITIC, **STEPS, "critic__augment": None, "critic__adaptive": True, "critic__loss": "non_saturating"}
    printed = output_of(start(two_processes("train_tokenizer", tokenizer_arguments(tmp_path / "both", **more))))
    assert printed.count("2 processes on cpu") == 1
    alone = train_tokenizer(tmp_path / "alone", **more)
    # Not the hinge: it gives the bias of the critic's last layer a gradient of 0 at first, hence steps of either sign
    # from Adam. (A vector between two codes may go to either. The adaptive weight is held to 1e-4 in test_critic.)
    tolerances = {"model/l2": 2e-3, "model/adversarial_weight": 0.05, "critic/loss": 1e-2, "critic/gradient_norm": 0.05}
    for name, tolerance in tolerances.items():
        found, expected = losses(tmp_path / "both", name), losses(alone, name)
        assert len(found) >= 8 and found == pytest.approx(expected, rel=tolerance), name


def test_a_sick_critic_does_not_move_itself(tmp_path, monkeypatch):
    """Its step is skipped and counted; the tokenizer's is not."""
    term = Adversary.critic_term
    steps = iter(range(99))

    def sick(self, *arguments):
        loss, terms = term(self, *arguments)
        return loss * (float("nan") if next(steps) == 5 else 1.0), terms

    monkeypatch.setattr(Adversary, "critic_term", sick)
    run = train_tokenizer(tmp_path / "run", **CRITIC, **STEPS)
    assert metrics(run)[-1]["skipped_steps"] == 1
    assert all(torch.isfinite(value.float()).all() for value in read_checkpoint(states(run)[-1]).values())
    missing = {line["step"] for line in metrics(run) if "model/loss" in line and "critic/loss" not in line}
    assert missing == {1, 2, START + 5 + 1}


def test_micro_batches_meet_their_own_reconstructions(tmp_path, monkeypatch):
    pairs = []
    term, tokenizer_term = Adversary.critic_term, Adversary.tokenizer_term

    def shown(self, reconstruction, *rest):
        pairs.append(("shown", reconstruction.detach().sum().item()))
        return tokenizer_term(self, reconstruction, *rest)

    def judged(self, critic, images, reconstructions):
        pairs.append(("judged", reconstructions.sum().item()))
        return term(self, critic, images, reconstructions)

    monkeypatch.setattr(Adversary, "tokenizer_term", shown)
    monkeypatch.setattr(Adversary, "critic_term", judged)
    train_tokenizer(tmp_path / "run", **{**CRITIC, "critic__start": 0}, train__steps=3, train__accumulate=2)
    for step in range(3):
        first, second, third, fourth = pairs[4 * step : 4 * step + 4]
        assert [p[0] for p in (first, second, third, fourth)] == ["shown", "shown", "judged", "judged"]
        assert third[1] == first[1] and fourth[1] == second[1] != first[1]


def test_the_critic_has_its_own_learning_rate(tmp_path):
    """Almost none, and it stays where it was."""
    slow = train_tokenizer(tmp_path / "slow", **{**CRITIC, "critic__lr": 1e-9}, **STEPS)
    fast = train_tokenizer(tmp_path / "fast", **CRITIC, **STEPS)
    moved = {}
    for name, run in (("slow", slow), ("fast", fast)):
        first, last = (read_checkpoint(state) for state in states(run))
        keys = [
            key for key in first if key.startswith("model.") and "critic" in key and key.endswith(("original", "bias"))
        ]
        assert keys
        moved[name] = max(float((first[key] - last[key]).abs().max()) for key in keys)
    assert moved["slow"] < 1e-6 < 1e-4 < moved["fast"]


def test_the_onset():
    start, warmup, ramp = 10, 5, 4
    adversary = Adversary(CriticConfig(start=start, warmup=warmup, ramp=ramp), PatchCritic(1, 8, 2))
    assert [step for step in range(30) if adversary.plays(step)] == list(range(10, 30))
    shares = [adversary.share(step) for step in range(30)]
    assert shares[:15] == [0.0] * 15 and shares[15:18] == [0.25, 0.5, 0.75] and shares[18:] == [1.0] * 12
    trained = [sum(adversary.plays(s) for s in range(step)) for step in range(30)]
    assert all(turns >= warmup for turns, share in zip(trained, shares, strict=True) if share > 0)


@pytest.mark.parametrize("ramp", [0, 1])
def test_without_a_ramp_it_is_there_at_once(ramp):
    adversary = Adversary(CriticConfig(start=2, warmup=0, ramp=ramp), PatchCritic(1, 8, 2))
    assert [adversary.share(step) for step in range(4)] == [0.0, 0.0, 1.0, 1.0]


def test_images_too_small_for_the_critic_are_named(tmp_path):
    with pytest.raises(UserError, match="critic.layers"):
        train_tokenizer(tmp_path / "run", critic__weight=1.0, critic__layers=6)


def test_the_critic_sees_all_that_it_sees_changed(monkeypatch):
    """In both turns; without kinds, images and reconstructions as they are, bit for bit."""
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
    assert not torch.equal(changed[0][:4] == 0, changed[0][4:] == 0), "images and reconstructions have their own holes"


def test_the_adaptive_weight_evens_gradients_out():
    """At the decoder's last layer the critic's part of the gradient is `weight` times as long as the rest."""
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
