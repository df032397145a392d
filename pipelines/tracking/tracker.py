"""Every number to `metrics.jsonl`, every preview to a PNG, and a copy of both to Weights & Biases, TensorBoard and
trackio when asked.

The local files are the record. Each tracker has a copy, which a thread of its own makes of them (see `mirror`).
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import numpy as np
from pydantic import Field

from tokenizer.files import PipelineLoadError, read_json

from ..config import Config, UserError
from ..files import replace_file
from . import mirror
from .lineage import Mark, note
from .mirror import Mirror
from .record import Record
from .tensorboard_run import start_tensorboard
from .trackio_run import start_trackio, trackio_folder
from .wandb_run import start_wandb, stop_wandb, wandb_folder, wandb_mode

TRACKERS = "trackers.json"  # which tracker has which steps, for the process that resumes
SNAPSHOTS = ("pipeline", "tokenizer")  # the folders of a run that are for the user
PACKAGES = ("tensorboard", "trackio")  # trackers that are packages of their own, which not everyone wants


class TrackConfig(Config):
    """Where the numbers of a run go besides `metrics.jsonl`."""

    trackers: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = Field(
        ("wandb",), description="who gets a copy of numbers and previews; the last two need the extra `trackers`"
    )
    wandb: Literal["online", "offline", "disabled"] | None = Field(
        None,
        description="the mode of Weights & Biases; default: WANDB_MODE if set, else online if an API key is found, "
        "else offline",
    )
    project: str | None = Field(
        None, description="the project of W&B and trackio; default: WANDB_PROJECT if set, else smalti"
    )
    name: str | None = Field(
        None, description="the name of the run there; default: WANDB_NAME if set, else that of the run folder"
    )
    artifact: bool = Field(
        False, description="at the end, send the tokenizer or pipeline to W&B as an artifact of type `model`"
    )


class Tracker:
    """Writes on the main process and does nothing on the others.

    With `resume_step` > 0 the lines of `metrics.jsonl` after that step, which the run is about to repeat, are removed,
    and the same runs of the trackers go on; with 0 all begin anew. Raises `UserError` for a tracker that is not
    installed (on every process), and `OSError` if the run folder cannot be written.
    """

    def __init__(
        self, run: Path, config: TrackConfig, run_config: dict[str, Any], *, accelerator: Any, resume_step: float
    ) -> None:
        require_installed(config.trackers)
        self.run, self.config = Path(run), named(config, Path(run))
        self.active = bool(accelerator.is_main_process)
        self._mirrors: dict[str, Mirror] = {}
        self._last: dict[str, Callable[[Any], None]] = {}  # what is done with W&B's run at its end
        self._sends = False
        if not self.active:
            return
        self._record = Record(self.run, resume_step)
        mode = _announce(self.run, self.config)
        names = [name for name in dict.fromkeys(config.trackers) if name != "wandb" or mode != "disabled"]
        if names or (self.run / TRACKERS).exists():
            self._identity, self._held = _identify(self.run, names, resume_step, self._record.highest)
            for name in names:
                self._mirrors[name] = self._mirror(name, mode, run_config, resumed=resume_step > 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line with `step` and `values`; what a full disk does not take is kept for the next time."""
        if self.active:
            self._record.log(step, {key: _number(value) for key, value in values.items()})
            self._wake_mirrors()

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Write uint8 `(H, W, C)` arrays to `previews/<name>-<step>.png`; a full disk costs the picture and a line."""
        if self.active:
            self._record.images(step, images)
            self._wake_mirrors()

    def flush(self) -> None:
        """Put all lines on the disk, with those that are still to be written. Raises `OSError` (path, needed and free
        bytes) and writes none, if it is full."""
        if self.active:
            self._record.flush()
            self._wake_mirrors()

    @property
    def run_url(self) -> str | None:
        """Where W&B shows the run, once it has been started there; None offline."""
        copy = self._mirrors.get("wandb")
        return None if copy is None else getattr(copy.target, "url", None)

    def conclude(self, step: int, summary: dict[str, Any], rows: list[list[Any]]) -> None:
        """Have `close` tell W&B how the run has ended: figures for its table of runs, and rows of (weights, split,
        figure, value) for a table of this one."""
        if self.active and "wandb" in self._mirrors:
            self._last["the summary was not made"] = lambda target: target.conclude(step, summary, rows)

    def artifact(
        self, step: int, evaluation: dict[str, float], used: Sequence[Mark] = (), made: Sequence[Mark] = ()
    ) -> None:
        """Have `close` send the run's snapshot to W&B, if `track.artifact` asks for it, with its evaluation.

        Once, at the end of a run: at every save it would fill a project with models that nobody asked for. used, made:
        what the run began with, and what it made, by their fingerprints; see `lineage`.
        """
        if not (self.active and self.config.artifact):
            return
        folder = next((self.run / name for name in SNAPSHOTS if (self.run / name).is_dir()), None)
        if folder is None or "wandb" not in self._mirrors:
            missing = "there is no snapshot" if "wandb" in self._mirrors else "W&B is disabled"
            mirror.warn("W&B", f"track.artifact: {missing}, no artifact is made")
            return
        name = str(self.config.name)
        values = {key: _number(value) for key, value in evaluation.items()}
        print(f"W&B: {folder} as an artifact, which may take up to {mirror.LAST_SECONDS:.0f} s", flush=True)
        self._sends = True
        if used or made:
            self._last["what was made from what is not noted"] = lambda target: note(target, list(used), list(made))
        self._last["the artifact was not made"] = lambda target: target.artifact(step, folder, name, values)

    def close(self) -> None:
        """Close the record and give the trackers some seconds to copy the rest of it; more for an artifact. Notes how
        far they have come, for the process that resumes the run."""
        if not self.active:
            return
        self._record.close()
        began = time.monotonic()
        for name, copy in self._mirrors.items():
            copy.end(self._last if name == "wandb" else None)
        for name, copy in self._mirrors.items():
            copy.join(began + (mirror.LAST_SECONDS if self._sends and name == "wandb" else mirror.CLOSE_SECONDS))
        if self._mirrors:
            copied = {name: copy.copied for name, copy in self._mirrors.items()}
            try:
                _note(self.run, self._identity, {**self._held, **copied}, active=[])
            except OSError as error:
                mirror.warn("trackers", f"how far they have come is not noted ({mirror.short(error)})")

    def _wake_mirrors(self) -> None:
        for copy in self._mirrors.values():
            copy.wake()

    def _mirror(self, name: str, mode: str, run_config: dict[str, Any], *, resumed: bool) -> Mirror:
        """A mirror of the record in the tracker of this name; `mode` is that of W&B."""
        held, project = self._held[name], str(self.config.project)
        if name == "tensorboard":
            board = partial(start_tensorboard, self.run, run_config, resumed=resumed)
            return Mirror("TensorBoard", self._record, {"starting": board}, held=held)
        if name == "trackio":
            # Its runs are found by their names, and a folder of several runs may hold others of this one.
            title, folder = f"{self.config.name}-{self._identity[:6]}", trackio_folder(self.run)
            database = partial(
                start_trackio, project, run_config, folder=folder, name=title, resumed=resumed, held=held
            )
            return Mirror("trackio", self._record, {"starting": database}, held=held)
        options = {"dir": str(wandb_folder(self.run)), "name": self.config.name, "id": self._identity}
        wandb = partial(start_wandb, project, run_config, held=held, **options)
        return Mirror(
            "W&B",
            self._record,
            {each: partial(wandb, mode=each) for each in dict.fromkeys((mode, "offline"))},
            held=held,
            between=stop_wandb,
            advice="`wandb sync` the newest folder in its wandb/ to complete it",
        )


def require_installed(trackers: tuple[str, ...]) -> None:
    """Raise `UserError` for one whose package is not there: before the training, not somewhere in it."""
    missing = [name for name in trackers if name in PACKAGES and find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f'track.trackers: {" and ".join(missing)} {verb} not installed: pip install "smalti[trackers]"')


def named(config: TrackConfig, run: Path) -> TrackConfig:
    """The configuration with the project and name that it leaves to the environment, which wandb reads them from, or to
    the run folder."""
    project = config.project or os.environ.get("WANDB_PROJECT") or "smalti"
    name = config.name or os.environ.get("WANDB_NAME") or run.resolve().name
    return config.model_copy(update={"project": project, "name": name})


def _announce(run: Path, config: TrackConfig) -> str:
    """Say where the copies go and how to look at them; returns the mode of W&B."""
    mode, reason = wandb_mode(config.wandb)
    if "wandb" not in config.trackers:
        mode, reason = "disabled", "not in track.trackers"
    offline = f"{quote(str(wandb_folder(run)))}/wandb/offline-run-*"
    later = f"; sync later with: wandb sync {offline}" if mode == "offline" else ""
    print(f"W&B: {mode} ({reason}){later}", flush=True)
    if "tensorboard" in config.trackers:
        print(f"TensorBoard: tensorboard --logdir {quote(str(run / 'tensorboard'))}", flush=True)
    if "trackio" in config.trackers:
        folder, project = quote(str(trackio_folder(run))), quote(str(config.project))
        print(f"trackio: TRACKIO_DIR={folder} trackio show --project {project}", flush=True)
    return mode


def _number(value: Any) -> int | float:
    return value if isinstance(value, (int, float)) else float(value)  # numpy scalars, tensors of one element


def _identify(run: Path, names: Sequence[str], resume_step: float, highest: int) -> tuple[str, dict[str, int]]:
    """The id that all resumes of this run share, and for each tracker the highest step that it may already have.

    W&B refuses steps that it has and cannot be asked offline. What it has is known if the process before this one was
    closed; else it may have all that was logged while it was on, up to `highest`.
    """
    path = run / TRACKERS
    identity, held = uuid.uuid4().hex[:16], dict[str, int]()
    if resume_step > 0 and path.exists():
        try:
            saved = read_json(path)
            held = {name: max(highest if name in saved["active"] else -1, step) for name, step in saved["sent"].items()}
            identity = str(saved["id"])
        except PipelineLoadError as error:
            print(f"warning: trackers begin anew: {mirror.short(error)}", file=sys.stderr)
        except (KeyError, TypeError, AttributeError) as error:
            print(f"warning: trackers begin anew: {path}: {mirror.short(error)}", file=sys.stderr)
            held = {}
    held = {name: held.get(name, -1) for name in dict.fromkeys([*held, *names])}
    _note(run, identity, held, active=names)
    return identity, held


def _note(run: Path, identity: str, held: dict[str, int], active: Sequence[str]) -> None:
    """Write down what each tracker has, and which are `active`, whose copies grow from now on."""
    replace_file(run / TRACKERS, json.dumps({"id": identity, "sent": held, "active": active}, indent=2).encode())
