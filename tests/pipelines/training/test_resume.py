"""A resumed run equals an uninterrupted one: every weight, moment, average, line and snapshot."""

from __future__ import annotations

from functools import partial

import pytest
from launch import EMA, GPT, VQVAE, losses, states, train_prior, train_tokenizer
from safetensors.torch import load_file
from tiny_task import TinyTask, assert_same_run, killed_at, stopped_at, train_tiny

from tokenizer.quantizers import price

pytestmark = pytest.mark.usefixtures("one_process")

EVERY = {"log_every": 3, "evaluate_every": 2, "preview_every": 4, "save_every": 3}
SCORES = {4: 3.0, 8: 1.0, 12: 2.0, 16: 4.0}  # by forward passes, two a step


def not_finite(group_name, step, loss, model):
    return loss * float("nan") if step in (0, 3, 4) else loss


TASKS = {
    "micro-batches, a layer without a gradient at first, best weights in the middle": (
        partial(TinyTask, late=5, scores=SCORES),
        {"accumulate": 2},
    ),
    "muon, and a critic that starts later": (partial(TinyTask, critic_start=5), {"optimizer": "muon"}),
    "no validation images, and non-finite steps": (
        partial(TinyTask, validation=False, change_loss=not_finite),
        {"ema_decay": 0.9},
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, name):
    """Stopped at every step, each time with something else due, and twice killed after the last checkpoint."""
    task, more = TASKS[name]
    whole, run = train_tiny(tmp_path / "whole", task, **EVERY, **more), tmp_path / "run"
    for step in (0, 2, 3, 3, 4):  # the second stop at 3 comes before the first step, and saves nothing again
        with stopped_at(step):
            train_tiny(run, task, **EVERY, **more)
        assert states(run)[-1].name == f"step-{step:08d}"
    for step in (5, 8):
        with killed_at(step):
            train_tiny(run, task, **EVERY, **more)
    assert states(run)[-1].name == "step-00000006"
    train_tiny(run, task, **EVERY, **more)
    assert_same_run(run, whole)


def test_runs_repeat_and_depend_on_the_seed(tmp_path):
    one, two, other = (train_tiny(tmp_path / str(number), seed=number // 2) for number in range(3))
    assert_same_run(one, two)
    assert losses(other) != losses(one)


# The two stages

CRITIC = {"weight": 0.5, "start": 3, "width": 8, "layers": 1, "warmup": 1, "ramp": 2, "lecam": 0.01}
OFTEN = {
    "train__steps": 6,
    "train__log_every": 2,
    "train__save_every": 2,
    "train__evaluate_every": 2,
    "train__preview_every": 4,
    "train__accumulate": 2,
}
STAGES = {
    "tokenizer": partial(
        train_tokenizer, model={**VQVAE, "quantizer": {**EMA, "revive_every": 2, "revive_below": 0.3}}, critic=CRITIC
    ),
    "tokenizer whose codes have a price": partial(
        train_tokenizer, model={**VQVAE, "quantizer": {**EMA, "rate": 0.5, "revive_every": 2, "revive_below": 0.3}}
    ),
    "prior": partial(train_prior, model={**GPT, "any_order": True, "dropout": 0.1}, train__optimizer="muon"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_both_stages_resume_to_the_bit(stage, tmp_path, tokens, monkeypatch):
    """Stopped before and after the critic has started, and killed."""
    monkeypatch.setattr(price, "WARM_UP", 3)
    given = {"tokens": tokens} if stage == "prior" else {}
    train = partial(STAGES[stage], **given, **OFTEN)
    whole, run = train(tmp_path / "whole"), tmp_path / "run"
    with stopped_at(2):
        train(run)
    with killed_at(5):
        train(run)
    assert states(run)[-1].name == "step-00000004"
    with stopped_at(5):
        train(run)
    train(run)
    assert_same_run(run, whole)
    if "price" in stage:
        assert load_file(run / "tokenizer" / "model.safetensors")["quantizer.price.distance"] > 0
