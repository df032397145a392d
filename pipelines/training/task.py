"""What the trainer knows of what it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from tokenizer.files import FolderKind

from ..processes.group import ALONE, ProcessGroup
from ..shuffling import samples_of
from .optimizers import decaying_weights, hidden_matrices

Split = Literal["validation", "held_out"]
"""Of images that are not trained on: `validation` chooses the best weights, `held_out` is evaluated at the end."""


class Task:
    """What is trained. `nets` holds what DDP wraps; the trainer puts the wrapped modules there, and `loss` calls
    them."""

    model: nn.Module
    """Saved, averaged and evaluated."""
    nets: dict[str, nn.Module]
    players: dict[str, list[nn.Parameter]]
    """Each takes turns with an optimizer of its own; without any, the model is saved as it is."""
    rates: dict[str, float] = {}
    """Learning rates of players as shares of `train.lr`, where not 1."""
    betas: dict[str, tuple[float, float]] = {}
    """AdamW's betas of players, where not `train.betas`."""
    init: dict[str, Any] | None = None
    """`source` and `fingerprint` of the model that training begins with, if any; the same when the run goes on."""
    rows: int
    """Size of the training set; 0 where it is not known."""
    evaluated: dict[Split, int]
    """How many images the figures of a split are of; `validation` is there only if there are any."""
    shardable: bool = False
    """Whether `model` is all that is trained, as a whole, so that FSDP may shard it."""
    snapshots: dict[str, FolderKind] = {}
    """The folders in the run folder that `save` writes."""
    tokens_per_row: int
    shows_preview: bool = False
    """Whether `save` shows the pictures of `preview`, which are then made for it as well."""
    progress: float = 0.0
    """Share of training done, in [0, 1], set before each step."""

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> Any:
        """Return the training samples at `indices` in their `epochs`, a tuple of tensors on the CPU, in as few bytes as
        possible; a pure function, called in another thread."""
        raise NotImplementedError

    def prepare(self, batch: Any) -> Any:
        """Return what `loss` takes, from what `batch` returned, on the device; a pure function."""
        return batch

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row indices and epochs, each `(batch_size,)`, of one step's global batch: a function of its
        arguments."""
        return samples_of(self.rows, batch_size, seed, step)

    @property
    def watched(self) -> Split:
        """The split that is evaluated during training: `validation`, if there is one and there is anything to train."""
        return "validation" if self.players and "validation" in self.evaluated else "held_out"

    def playing(self, step: int) -> list[str]:
        """Return the players that take a turn in this step, in their order: all, unless a task says otherwise."""
        return list(self.players)

    def loss(self, player: str, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a scalar to minimise for `player`, and scalars to log."""
        raise NotImplementedError

    def matrices(self) -> dict[nn.Parameter, int]:
        """Return what `train.optimizer=muon` moves by Muon, as `hidden_matrices` does."""
        return hidden_matrices(self.model)

    def decaying(self) -> set[nn.Parameter]:
        """Return what has a weight decay, of all players."""
        return set().union(*(decaying_weights(net) for net in self.nets.values()))

    def preview(self, model: nn.Module, group: ProcessGroup = ALONE) -> dict[str, np.ndarray]:
        """Return pictures of what `model` (averaged weights) can do, uint8 (H, W, 3); the group shares the work."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, split: Split, group: ProcessGroup = ALONE) -> dict[str, float]:
        """Return figures of `model` (averaged weights) on a split that is not trained on, the same on all processes of
        the group, which share the work."""
        raise NotImplementedError

    def score(self, evaluation: dict[str, float]) -> float | None:
        """Return how good weights with these figures are, more is better; None where no figure tells."""
        return None

    def quality(self, evaluation: dict[str, float]) -> str:
        """Return the figure that matters most of those that `evaluate` gave, in words; empty where there is none."""
        return ""

    def outcome(self, run: Path) -> str:
        """Return where users find what a finished run has made, and what to do with it next."""
        return f"all is in {run}"

    def save(self, model: nn.Module, run: Path, facts: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        """Write the snapshot for users into `run`. facts: steps, minutes, figures, and of how many images they are;
        pictures: what `preview` made of these weights, or nothing."""
        raise NotImplementedError
