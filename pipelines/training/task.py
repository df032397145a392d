"""What the loop knows of what it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from tokenizer.files import FolderKind

from ..processes.sharing import ALONE, Team
from ..shuffling.epochs import samples_of
from .optimizers import decaying_weights, hidden_matrices

Split = Literal["validation", "held_out"]
"""Of images that are not trained on: `validation` chooses the best weights, `held_out` is evaluated at the end."""


class Task:
    """What is trained. `nets` holds what DDP wraps; the loop puts the wrapped modules there, and `loss` calls them."""

    model: nn.Module
    """Saved, averaged and evaluated."""
    nets: dict[str, nn.Module]
    players: dict[str, list[nn.Parameter]]
    """Each takes turns with an optimizer of its own; without any, the model is saved as it is."""
    rates: dict[str, float] = {}
    """Learning rates of players as shares of `train.lr`, where not 1."""
    betas: dict[str, tuple[float, float]] = {}
    """AdamW's betas of players, where not `train.betas`."""
    begun: dict[str, Any] | None = None
    """`source` and `fingerprint` of another run's model that training begins with, if any. Each process reads it, also
    when the run goes on, and has to find the same one."""
    rows: int
    """Size of the training set."""
    evaluated: dict[Split, int]
    """How many images the figures of a split are of; `validation` is there only if there are any."""
    shardable: bool = False
    """Whether `model` is all that is trained, as a whole, so that FSDP may shard it."""
    snapshots: dict[str, FolderKind] = {}
    """The folders in the run folder that `save` may write, and what an earlier run may have left there."""
    tokens_per_row: int
    team: Team = ALONE
    """The processes that call `evaluate` and `preview` together, as set by the loop."""
    shows: bool = False
    """Whether `save` shows the pictures of `preview`, which are then made for it as well."""
    shown: dict[str, np.ndarray] = {}
    """Pictures that `preview` has made of the very weights that `save` is given, or nothing."""
    progress: float = 0.0
    """Share of training done, in [0, 1], told by the loop before each step."""

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> Any:
        """The training samples at `indices` in their `epochs`, a tuple of tensors on the CPU, as few bytes as can be; a
        pure function, called in another thread."""
        raise NotImplementedError

    def prepare(self, batch: Any) -> Any:
        """What `loss` takes, of what `batch` returned, after that has been sent to the device; a pure function."""
        return batch

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Row indices and epochs, each `(batch_size,)`, of one step's global batch: a function of its arguments."""
        return samples_of(self.rows, batch_size, seed, step)

    @property
    def watched(self) -> Split:
        """The split that is evaluated during training: `validation`, if there is one and there is anything to train."""
        return "validation" if self.players and "validation" in self.evaluated else "held_out"

    def playing(self, step: int) -> list[str]:
        """The players that take a turn in this step, in their order: all, unless a task says otherwise."""
        return list(self.players)

    def loss(self, player: str, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar to minimise for `player`, and scalars to log."""
        raise NotImplementedError

    def matrices(self) -> set[nn.Parameter]:
        """What `train.optimizer=muon` moves by Muon."""
        return hidden_matrices(self.model)

    def decaying(self) -> set[nn.Parameter]:
        """What has a weight decay, of all players."""
        return set().union(*(decaying_weights(net) for net in self.nets.values()))

    def preview(self, model: nn.Module) -> dict[str, np.ndarray]:
        """Pictures of what `model` (averaged weights) can do, uint8 (H, W, 3); the `team` may share the work."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, split: Split) -> dict[str, float]:
        """Figures of `model` (averaged weights) on a split that is not trained on, the same on all of the `team`, which
        may share the work."""
        raise NotImplementedError

    def score(self, evaluation: dict[str, float]) -> float | None:
        """How good weights are that have these figures, more is better; None where no figure tells."""
        return None

    def quality(self, evaluation: dict[str, float]) -> str:
        """The figure that matters most of those that `evaluate` gave, in words; empty where there is none."""
        return ""

    def outcome(self, run: Path) -> str:
        """Where users find what a finished run has made, and what to do with it next."""
        return f"all is in {run}"

    def save(self, model: nn.Module, run: Path, facts: dict[str, Any]) -> None:
        """Write the snapshot for users into `run`; `facts` are steps, minutes, figures, and how many images they are
        of."""
        raise NotImplementedError
