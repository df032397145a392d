"""Every number to `metrics.jsonl`, every preview to a PNG, both mirrored to Weights & Biases, TensorBoard and trackio
when asked.

The local files are the record. Each tracker has a copy, made by a daemon thread behind a bounded queue, so that a
tracker being slow, away or broken costs the run at most a line of warning.
"""

from __future__ import annotations

import errno
import heapq
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from tokenizer.files.errors import PathError, PipelineLoadError
from tokenizer.files.reading import read_json
from tokenizer.files.writing import replace_file

from ..config import Config
from ..images.pictures import save_picture
from . import mirror
from .boards import require_installed, start_tensorboard, start_trackio, trackio_folder
from .mirror import Entry, Mirror
from .wandb_run import start_wandb, stop_wandb, wandb_folder, wandb_mode

TRACKERS = "trackers.json"  # who has had what, for the process that resumes
SNAPSHOTS = ("pipeline", "tokenizer")  # the folders of a run that are for the user


class TrackConfig(Config):
    """Where the numbers of a run go besides `metrics.jsonl`."""

    trackers: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = Field(
        ("wandb",), description="who gets a copy of numbers and previews; the last two need the extra `trackers`"
    )
    wandb: Literal["online", "offline", "disabled"] | None = Field(
        default=None,
        description="Mirror to Weights & Biases; default: WANDB_MODE if set, else online if an API key is found, "
        "else offline.",
    )
    project: str | None = Field(
        default=None, description="The project of W&B and trackio; default: WANDB_PROJECT if set, else smalti."
    )
    name: str | None = Field(
        default=None, description="The name of the run there; default: WANDB_NAME if set, else that of the run folder."
    )
    artifact: bool = Field(
        default=False, description="At the end, send the tokenizer or pipeline to W&B as an artifact of type `model`."
    )


class Tracker:
    """Writes on the main process and does nothing on the others.

    With `resume_step` > 0 the lines of `metrics.jsonl` after that step, which the run is about to repeat, are removed,
    and the same runs of the trackers go on; with 0 all begin anew. Raises `UserError` for a tracker that is not
    installed (on every process), and `OSError` if the run folder cannot be written.
    """

    def __init__(
        self, run: Path, config: TrackConfig, run_config: dict[str, Any], *, accelerator: Any, resume_step: int
    ) -> None:
        require_installed(config.trackers)
        self.run, self.config = Path(run), named(config, Path(run))
        self.active = bool(accelerator.is_main_process)
        self._mirrors: dict[str, Mirror] = {}
        self._last: Callable[[Any], None] | None = None
        if not self.active:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        highest = _rewind(self.run / "metrics.jsonl", resume_step)
        self._path, self._unwritten = self.run / "metrics.jsonl", b""
        if self._path.is_symlink():
            raise PathError(f"{self._path}: a link, and nothing is written through a link")
        self._file = self._path.open("ab", buffering=0)
        mode = _announce(self.run, self.config)
        names = [name for name in dict.fromkeys(config.trackers) if name != "wandb" or mode != "disabled"]
        if names or (self.run / TRACKERS).exists():
            identity, sent = _identify(self.run, names, resume_step, highest)
            starts = _ways_to_start(self.run, self.config, run_config, mode, identity, sent, resumed=resume_step > 0)
            past = partial(_past, self.run, resume_step)
            self._mirrors = {name: Mirror(**starts[name], past=past) for name in names}

    @property
    def dropped(self) -> int:
        """How many entries trackers did not get because they were too slow; `metrics.jsonl` has them all."""
        return sum(mirror.dropped for mirror in self._mirrors.values())

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line with `step` and `values`; what a full disk does not take is kept for the next time."""
        if not self.active:
            return
        numbers = {key: _number(value) for key, value in values.items()}
        self._unwritten += (json.dumps({"step": step, **numbers}) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            print(f"warning: {error}; these lines are kept for later", file=sys.stderr, flush=True)
        for copy in self._mirrors.values():
            copy.put(Entry(step, "log", numbers))

    def flush(self) -> None:
        """Put all lines on the disk, with those that are still to be written. Raises `OSError` (path, needed and free
        bytes) and writes none, if it is full."""
        if not self.active:
            return
        self._write()
        os.fsync(self._file.fileno())

    def _write(self) -> None:
        if not self._unwritten:
            return
        size = self._path.stat().st_size
        try:
            if self._file.write(self._unwritten) < len(self._unwritten):
                raise OSError(errno.ENOSPC, "only a part was written")
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)  # a line in two parts would be two broken lines
            needed, free = len(self._unwritten), shutil.disk_usage(self.run).free
            raise OSError(error.errno, f"{self._path}: {needed:,} bytes are needed, {free:,} are free") from error
        self._unwritten = b""

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Write uint8 `(H, W, C)` arrays to `previews/<name>-<step>.png`; a full disk costs the picture and a line."""
        if not self.active:
            return
        paths = {name: self.run / "previews" / f"{name}-{step:08d}.png" for name in images}
        for name, path in list(paths.items()):
            pixels = images[name]
            try:
                save_picture(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, path)
            except (OSError, PathError) as error:
                free = shutil.disk_usage(self.run).free
                print(f"warning: {path} is left out: {error}; {free:,} bytes are free", file=sys.stderr, flush=True)
                del paths[name]
        for copy in self._mirrors.values():  # paths, not arrays: a full queue must not hold a thousand previews
            copy.put(Entry(step, "images", paths))

    def artifact(self, step: int, evaluation: dict[str, float]) -> None:
        """Have `close` send the run's snapshot to W&B, if `track.artifact` asks for it, with its evaluation.

        Once, at the end of a run: at every save it would fill a project with models that nobody asked for.
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
        self._last = lambda target: target.artifact(step, folder, name, values)

    def close(self) -> None:
        """Close the file and give the trackers some seconds to receive what is queued; more for an artifact."""
        if not self.active:
            return
        self._file.close()
        began = time.monotonic()
        for name, copy in self._mirrors.items():
            copy.end(self._last if name == "wandb" else None)
        for name, copy in self._mirrors.items():
            copy.join(began + (mirror.LAST_SECONDS if self._last and name == "wandb" else mirror.CLOSE_SECONDS))


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
    later = f"; sync later with: wandb sync {wandb_folder(run)}/wandb/offline-run-*" if mode == "offline" else ""
    print(f"W&B: {mode} ({reason}){later}", flush=True)
    if "tensorboard" in config.trackers:
        print(f"TensorBoard: tensorboard --logdir {run / 'tensorboard'}", flush=True)
    if "trackio" in config.trackers:
        print(f"trackio: TRACKIO_DIR={trackio_folder(run)} trackio show --project {config.project}", flush=True)
    return mode


def _ways_to_start(
    run: Path,
    config: TrackConfig,
    run_config: dict[str, Any],
    mode: str,
    identity: str,
    sent: dict[str, int],
    *,
    resumed: bool,
) -> dict[str, dict[str, Any]]:
    """What a `Mirror` of each tracker is made of."""
    project = str(config.project)
    options = {"dir": str(wandb_folder(run)), "name": config.name, "id": identity}
    wandb = {
        mode: partial(start_wandb, project, run_config, held=sent.get("wandb", -1), mode=mode, **options)
        for mode in dict.fromkeys((mode, "offline"))
    }
    # Its runs are found by their names, and a folder of several runs may hold others of this one.
    trackio = partial(
        start_trackio,
        project,
        run_config,
        folder=trackio_folder(run),
        resumed=resumed,
        name=f"{config.name}-{identity[:6]}",
        sent=sent.get("trackio", -1),
    )
    return {
        "wandb": {
            "label": "W&B",
            "starts": wandb,
            "between": stop_wandb,
            "advice": "`wandb sync` the newest folder in its wandb/ to complete it",
        },
        "tensorboard": {
            "label": "TensorBoard",
            "starts": {"starting": partial(start_tensorboard, run, run_config, resumed=resumed)},
        },
        "trackio": {"label": "trackio", "starts": {"starting": trackio}},
    }


# The record


def _number(value: Any) -> int | float:
    return value if isinstance(value, (int, float)) else float(value)  # numpy scalars, tensors of one element


def _rewind(path: Path, resume_step: int) -> int:
    """Keep the lines up to `resume_step` (none for 0); return the highest step that stood in the file, or -1."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    steps = [_step_of(line) for line in lines]
    kept = [line + b"\n" for line, step in zip(lines, steps, strict=True) if 0 <= step <= resume_step and resume_step]
    if lines:
        replace_file(path, b"".join(kept))
    return max(steps, default=-1)


def _step_of(line: bytes) -> int:
    """The step of a line, -1 for a torn one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def _past(run: Path, resume_step: int) -> Iterator[Entry]:
    """What the record holds up to `resume_step`, in the order of steps, numbers before pictures."""
    if resume_step <= 0:
        return

    def numbers() -> Iterator[Entry]:
        with (run / "metrics.jsonl").open(encoding="utf-8") as file:
            for line in file:
                values = json.loads(line)
                if (step := values.pop("step")) > resume_step:  # what follows is being written, and put, now
                    return
                yield Entry(step, "log", values)

    pictures: dict[int, dict[str, Path]] = {}
    for path in sorted((run / "previews").glob("*.png")):
        if (parts := re.fullmatch(r"(.+)-(\d{8,})", path.stem)) and int(parts[2]) <= resume_step:
            pictures.setdefault(int(parts[2]), {})[parts[1]] = path
    shown = (Entry(step, "images", pictures[step]) for step in sorted(pictures))
    yield from heapq.merge(numbers(), shown, key=lambda entry: entry.step)


def _identify(run: Path, names: Sequence[str], resume_step: int, highest: int) -> tuple[str, dict[str, int]]:
    """The id that all resumes of this run share, and for each tracker the highest step that it may already have.

    W&B refuses steps that it has and can not be asked offline: what it may have is what was logged while it was on.
    `highest` is the highest step that the process before this one has logged.
    """
    path = run / TRACKERS
    identity, sent = uuid.uuid4().hex[:16], {}
    if resume_step > 0 and path.exists():
        try:
            saved = read_json(path)
            sent = {name: max(highest if name in saved["active"] else -1, step) for name, step in saved["sent"].items()}
            identity = str(saved["id"])
        except (PipelineLoadError, KeyError, TypeError, AttributeError) as error:
            print(f"warning: trackers begin anew: {path}: {mirror.short(error)}", file=sys.stderr)
            sent = {}
    sent = {name: sent.get(name, -1) for name in dict.fromkeys([*sent, *names])}
    replace_file(path, json.dumps({"id": identity, "sent": sent, "active": names}, indent=2).encode())
    return identity, sent
