"""The interface between the trainer and a model with its data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor, nn

from tokenizer.files import FolderKind

from ..processes.group import ALONE, ProcessGroup
from ..shuffling import samples_of
from .optimizers import decaying_weights, hidden_matrices

if TYPE_CHECKING:
    from ..images.splits import SplitFacts

Split = Literal["validation", "held_out"]
"""Images not used for training: `validation` selects the best weights, `held_out` is evaluated at the end."""


class Task:
    """A model, its data and its losses."""

    model: nn.Module
    """The module that is saved, averaged and evaluated."""
    nets: dict[str, nn.Module]
    """The modules that `loss` calls. The trainer wraps them in DDP."""
    param_groups: dict[str, list[nn.Parameter]]
    """The parameters of the tokenizer and of its critic, for example. Each group has its own optimizer, and they take
    turns. Without groups, nothing is trained."""
    rates: dict[str, float] = {}
    """Learning rates by group, relative to `train.lr`; default 1."""
    betas: dict[str, tuple[float, float]] = {}
    """AdamW's betas by group; default `train.betas`."""
    init: dict[str, Any] | None = None
    """`source` and `fingerprint` of the model that training starts from, if any; they must not change on resume."""
    notes: tuple[str, ...] = ()
    """Lines to print when training starts."""
    facts: Mapping[str, Any] = {}
    """Facts about the data that trackers show beside the configuration."""
    divided: SplitFacts | None = None
    """How the images are divided, which the run folder keeps; None for tokens, and runs of 0.3."""
    rows: int
    """Size of the training set; 0 if unknown."""
    evaluated: dict[Split, int]
    """Number of images evaluated per split; `validation` is missing without such images."""
    shardable: bool = False  # whether FSDP can shard `model`: it must be the only trained network
    snapshots: dict[str, FolderKind] = {}
    """Folders that `save` writes into the run folder."""
    tokens_per_row: int
    shows_preview: bool = False
    """Whether `save` needs the pictures of `preview`."""
    progress: float = 0.0
    """Fraction of training done, in [0, 1]; set before each step."""

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> Any:
        """Return the training samples at `indices` in their `epochs` as a tuple of compact CPU tensors, which may hold
        a `Given`. A pure function, called in another thread."""
        raise NotImplementedError

    def prepare(self, batch: Any) -> Any:
        """Convert the output of `batch`, on the device, to the input of `loss`. A pure function."""
        return batch

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row indices and epochs, each `(batch_size,)`, of one step's global batch. A pure function."""
        return samples_of(self.rows, batch_size, seed, step)

    @property
    def watched(self) -> Split:
        """The split evaluated during training: `validation` if it exists and there is anything to train, else
        `held_out`."""
        return "validation" if self.param_groups and "validation" in self.evaluated else "held_out"

    def active_groups(self, step: int) -> list[str]:
        """Return the names of the groups that take this step, in order; all by default."""
        return list(self.param_groups)

    def loss(self, group_name: str, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar that the group of parameters minimises, and scalars to log."""
        raise NotImplementedError

    def matrices(self) -> dict[nn.Parameter, int]:
        """Return the weights that Muon updates with `train.optimizer=muon`; see `hidden_matrices`."""
        return hidden_matrices(self.model)

    def decaying(self) -> set[nn.Parameter]:
        """Return the weights that decay."""
        return set().union(*(decaying_weights(net) for net in self.nets.values()))

    def preview(self, model: nn.Module, group: ProcessGroup = ALONE) -> dict[str, np.ndarray]:
        """Return pictures of what `model` (averaged weights) produces, uint8 (H, W, 3). The group shares the work."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, split: Split, group: ProcessGroup = ALONE) -> dict[str, float]:
        """Evaluate `model` (averaged weights) on a split. The processes of the group share the work and return the same
        figures."""
        raise NotImplementedError

    def finish(self, model: nn.Module, group: ProcessGroup = ALONE) -> dict[str, Tensor]:
        """Return new values of weights of `model` (averaged weights), by name, for the model that a finished run
        delivers; equal on all processes. The run's own weights stay as they are."""
        return {}

    def accepts(self, finished: dict[str, float], evaluation: dict[str, float]) -> bool:
        """Return whether to deliver the weights that `finish` returned, given the figures on validation images with
        them and without them."""
        return True

    def score(self, evaluation: dict[str, float]) -> float | None:
        """Return a score that ranks weights with these figures, higher is better; None if no figure ranks them."""
        return None

    def quality(self, evaluation: dict[str, float]) -> str:
        """Describe the main figure of `evaluate`; empty if it is missing."""
        return ""

    def outcome(self, run: Path) -> str:
        """Describe where the result of a finished run is, and the next command."""
        return f"results are in {run}"

    def save(self, model: nn.Module, run: Path, facts: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        """Write the snapshot for users into `run`. facts: steps, minutes, figures and the number of evaluated images.
        pictures: from `preview`; may be empty."""
        raise NotImplementedError
