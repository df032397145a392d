"""A task with a few hundred weights that trains in milliseconds, and ways to interrupt its runs."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from launch import assert_equal_tensors as assert_same_tensors
from launch import checkpoint_tensors, exact, states
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.config import Config
from pipelines.processes.group import ALONE
from pipelines.processes.launch import build_accelerator
from pipelines.training.schedule import TrainConfig
from pipelines.training.task import Task
from pipelines.training.tracking import TrackConfig
from pipelines.training.trainer import Trainer, train
from tokenizer.layers import FusedLinear

ROWS, IDS = 40, 8


class TinyConfig(Config):
    """A configuration like that of stage two."""

    out: str
    tokens: str = "nowhere"
    init: str | None = None
    train: TrainConfig = TrainConfig()
    track: TrackConfig = TrackConfig(wandb="disabled")


class Net(nn.Module):
    """Predicts a number from an id. Has a fused layer, statistics in buffers, dropout, and a layer that the first steps
    do not use."""

    def __init__(self, plain: bool = False) -> None:
        """plain: without statistics and dropout, so that an output does not depend on the batch."""
        super().__init__()
        self.table, self.hidden = nn.Embedding(IDS, 16), FusedLinear(16, 16, parts=2)
        self.norm, self.dropout = nn.Identity() if plain else nn.BatchNorm1d(32), nn.Dropout(0.0 if plain else 0.1)
        self.late, self.head = nn.Linear(32, 32), nn.Linear(32, 1)

    def forward(self, ids: Tensor, late: bool = True) -> Tensor:
        """ids: `(B,)`; returns `(B,)`."""
        h = self.dropout(self.norm(self.hidden(self.table(ids))))
        return self.head(h + self.late(h) if late else h).squeeze(1)


class Both(nn.Module):
    """The net and an optional critic."""

    def __init__(self, net: nn.Module, critic: nn.Module | None) -> None:
        super().__init__()
        self.net, self.critic = net, critic


class TinyTask(Task):
    """Trains the net, and optionally a critic."""

    rows, tokens_per_row = ROWS, 1

    def __init__(
        self,
        critic_start: int | None = None,
        late: int = 0,
        validation: bool = True,
        scores: dict[int, float] | None = None,
        change_loss: Callable[[str, int, Tensor, nn.Module], Tensor] | None = None,
        net: nn.Module | None = None,
        init: dict[str, Any] | None = None,
    ) -> None:
        """critic_start, late: first steps that train the critic and use the layer `late`. scores: validation errors to
        report, by step. change_loss: changes the loss of a parameter group at a step."""
        self.critic_start, self.late, self.scores, self.init = critic_start, late, scores, init
        self.change_loss = change_loss or (lambda group_name, step, loss, model: loss)
        critic = None if critic_start is None else nn.Sequential(nn.Linear(1, 16), nn.GELU(), nn.Linear(16, 1))
        self.model = Both(net or Net(), critic)
        self.nets: dict[str, nn.Module] = {"model": self.model.net}
        self.param_groups = {"model": list(self.model.net.parameters())}
        if critic is not None:
            self.nets["critic"], self.param_groups["critic"] = critic, list(critic.parameters())
        self.evaluated = {"held_out": 4, "validation": 4} if validation else {"held_out": 4}
        self.predictions: deque[Tensor] = deque()
        self.evaluations: list[tuple[str, dict[str, Tensor]]] = []

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> tuple[Tensor, ...]:
        rows = torch.from_numpy(indices)
        return rows % IDS, (rows * 0.7 + torch.from_numpy(epochs)).sin().float()

    def active_groups(self, step: int) -> list[str]:
        return [name for name in self.param_groups if name != "critic" or step >= (self.critic_start or 0)]

    def loss(self, group_name: str, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        ids, targets = batch
        if group_name == "model":
            found = self.nets["model"](ids, late=step >= self.late)
            loss = (found - targets).square().mean()
            terms = {"l1": (found - targets).abs().mean()}
            if self.model.critic is not None and "critic" in self.active_groups(step):
                self.predictions.append(found.detach())
                loss = loss - 0.01 * self.model.critic(found[:, None]).mean()
        else:
            logits = self.nets["critic"](torch.cat([targets, self.predictions.popleft()])[:, None]).squeeze(1)
            real = torch.arange(len(logits)) < len(targets)
            loss, terms = nn.functional.binary_cross_entropy_with_logits(logits, real.float()), {}
        return self.change_loss(group_name, step, loss, self.model), terms

    def evaluate(self, model: nn.Module, split: Any, group: Any = ALONE) -> dict[str, float]:
        assert not model.training
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.evaluations.append((split, weights))
        found = float(model.net(torch.arange(IDS)).square().mean())
        if self.scores is None or split == "held_out":
            return {"error": found}
        return {"error": self.scores[int(weights["net.norm.num_batches_tracked"])]}

    def score(self, evaluation: dict[str, float]) -> float | None:
        return -evaluation["error"] if "error" in evaluation else None

    def preview(self, model: nn.Module, group: Any = ALONE) -> dict[str, np.ndarray]:
        shade = int(1000 * float(model.net(torch.arange(IDS)).abs().mean())) % 256
        return {"shade": np.full((4, 4, 3), shade, np.uint8)}

    def save(self, model: nn.Module, run: Path, facts: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, run / "net.safetensors")
        self.facts = facts


def tiny_config(out: Path, **settings: Any) -> TinyConfig:
    """Settings of a run of eight steps of eight rows."""
    more = {name: settings.pop(name) for name in ("init", "tokens") if name in settings}
    base = {"steps": 8, "batch_size": 8, "lr": 1e-2, "warmup_steps": 2, "ema_decay": 0.5, "log_every": 1}
    return TinyConfig(out=str(out), train=TrainConfig(**{**base, **settings}), **more)


def train_tiny(out: Path, task: Callable[[], TinyTask] = TinyTask, **settings: Any) -> Path:
    """Train; `settings` are keys of `train`."""
    return train(lambda accelerator: task(), tiny_config(out, **settings))


@contextmanager
def trainer_of(out: Path, task: TinyTask | None = None, **settings: Any) -> Iterator[Trainer]:
    """A trainer at step 0, closed at the end of the block."""
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    trainer = Trainer(task or TinyTask(), tiny_config(out, **settings), build_accelerator())
    trainer.task.model.train()
    try:
        yield trainer
    finally:
        trainer.close()


# Interruptions


class Killed(BaseException):
    """Stands for the death of a process, after pending writes."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Kill the run in this block after a step, before it evaluates or saves."""
    take_step = Trainer.take_step

    def killed(trainer: Trainer, *given: Any) -> None:
        take_step(trainer, *given)
        if trainer.step == step:
            raise Killed

    with patch.object(Trainer, "take_step", killed), pytest.raises(Killed):
        yield


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Request the run in this block to stop, as a signal does, during a step; 0: before the first."""
    take_step, fit = Trainer.take_step, Trainer.fit

    def ask(trainer: Trainer, *given: Any) -> None:
        take_step(trainer, *given)
        trainer.stop.requested |= trainer.step == step

    def ask_at_once(trainer: Trainer) -> None:
        trainer.stop.requested |= trainer.step == step
        fit(trainer)

    with patch.object(Trainer, "take_step", ask), patch.object(Trainer, "fit", ask_at_once):
        yield


# Results of a run


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by name, the best weights as `best.*`."""
    found = checkpoint_tensors(folder / "tensors")
    best = folder / "best.safetensors"
    found |= {f"best.{name}": value for name, value in load_file(best).items()} if best.exists() else {}
    return dict(sorted(found.items()))


def assert_same_run(run: Path, expected: Path) -> None:
    """Assert equal metrics, newest checkpoints, snapshots, previews and names of files, to the bit."""
    assert exact(run) == exact(expected) != []
    newest, expected_newest = states(run)[-1], states(expected)[-1]
    assert newest.name == expected_newest.name
    records = [json.loads((state / "state.json").read_text()) for state in (newest, expected_newest)]
    assert {**records[0], "minutes": 0} == {**records[1], "minutes": 0}
    assert_same_tensors(read_checkpoint(newest), read_checkpoint(expected_newest))
    assert sorted(os.listdir(run)) == sorted(os.listdir(expected)) and not list((run / "state").glob(".*"))
    for path in expected.rglob("*"):
        name = path.relative_to(expected)
        if path.suffix in (".png", ".safetensors") and name.parts[0] != "state":
            assert (run / name).read_bytes() == path.read_bytes(), name


def copy_run(run: Path, target: Path) -> Path:
    """Copy a run, to be continued in another folder."""
    return Path(shutil.copytree(run, target))
