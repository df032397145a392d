"""The learning rate, and the average of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from launch import states, train_tokenizer
from safetensors.torch import load_file
from small import make_tokenizer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.train_tokenizer import Stage, TrainTokenizerConfig
from pipelines.training import loop as training
from pipelines.training.schedule import TrainConfig, copy_buffers, learning_rate, move_average

pytestmark = pytest.mark.usefixtures("one_process")


def test_learning_rate():
    config = TrainConfig(steps=100, lr=2.0, final_lr=0.1, warmup_steps=10)
    rates = [learning_rate(config, step, step / 100) for step in range(130)]
    assert rates[:10] == pytest.approx([2.0 * (step + 1) / 10 for step in range(10)])
    assert rates[50] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert all(a > b for a, b in zip(rates[10:100], rates[11:101], strict=True))
    assert rates[100:] == pytest.approx([0.2] * 30)  # a cosine that went on would rise again
    assert learning_rate(TrainConfig(warmup_steps=0, lr=1.0), 0, 0.0) == 1.0
    assert learning_rate(TrainConfig(warmup_steps=0, final_lr=0.0), 5, 1.0) == 0.0


@pytest.mark.parametrize("argument", ["train.betas=[1.5,0.9]", "critic.betas=[0.9,1]", "train.timeout=1e18"])
def test_what_torch_would_refuse_is_refused_before_it(argument):
    """Its errors would be tracebacks, after images were read."""
    with pytest.raises(UserError, match=f"{argument.partition('=')[0]}: must be <"):
        parse(TrainTokenizerConfig, ["out=x", argument], verb="train_tokenizer", description=None)


def test_the_average_is_what_it_says_and_copies_buffers():
    model = nn.BatchNorm1d(3)
    averaged = AveragedModel(model)
    expected = model.weight.detach().double()
    for n in range(12):
        with torch.no_grad():
            model.weight.normal_()
            model.running_mean.normal_()
        move_average(averaged, model, 0.6)
        copy_buffers(averaged, model)
        decay = min(0.6, (1 + n) / (10 + n))
        expected = model.weight.double() if n == 0 else decay * expected + (1 - decay) * model.weight.double()
        assert torch.allclose(averaged.module.weight.double(), expected, atol=1e-6)
        assert torch.equal(averaged.module.running_mean, model.running_mean)
    assert (1 + 11) / (10 + 11) < 0.6 < (1 + 20) / (10 + 20)


def test_a_run_averages_its_weights_and_copies_its_codebook(tmp_path, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    take_step = training.take_step

    def watched(run, *rest):
        if not seen:
            seen.append(copy.deepcopy(run.task.model.state_dict()))
        take_step(run, *rest)
        seen.append(copy.deepcopy(run.task.model.state_dict()))

    monkeypatch.setattr(training, "take_step", watched)
    run = train_tokenizer(tmp_path / "run", train__ema_decay=0.3)
    found = load_file(states(run)[-1] / "ema.safetensors")
    buffers = {name for name, _ in Stage(make_tokenizer("vqvae"), None).named_buffers()}
    for key, start in seen[0].items():
        expected = start.double()
        for n, state in enumerate(seen[1:]):
            decay = 0.0 if n == 0 else min(0.3, (1 + n) / (10 + n))
            expected = decay * expected + (1 - decay) * state[key].double()
        if key in buffers:
            assert torch.equal(found[f"module.{key}"], seen[-1][key])
        else:
            assert torch.allclose(found[f"module.{key}"].double(), expected, atol=1e-6)
            assert not torch.equal(found[f"module.{key}"], seen[-1][key])
    assert {f"tokenizer.quantizer.{name}" for name in ("codebook", "counts", "sums")} <= buffers
