"""Records of a run: `metrics.jsonl` and `previews/`, mirrored to W&B and TensorBoard.

A tracker that raises is switched off with a warning; it never ends a run.
"""

from __future__ import annotations

import errno
import json
import math
import netrc
import os
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from pydantic import Field

from tokenizer.files import PathError, PipelineLoadError, fsync, make_folder, read_json

from ..config import Config, UserError, tell
from ..config.yaml_text import write_yaml
from ..files import replace_file
from ..images.pictures import save_picture

STORED_ID = "trackers.json"  # the id of W&B's run, which a resumed run continues
SNAPSHOTS = ("pipeline", "tokenizer")  # the folders of a run that users load
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # newer clients use the second name
INIT_SECONDS, FINISH_SECONDS, ARTIFACT_SECONDS = 20, 30, 300  # time limits for W&B
CAPTIONS = {
    "reconstructions": "images not used for training, each row above its reconstructions",
    "codebook": "how often each id is used",
    "samples": "samples with the same seeds at every step, one class per column",
}
Mode = Literal["online", "offline", "disabled"]


class TrackConfig(Config):
    """Trackers that mirror `metrics.jsonl`."""

    trackers: tuple[Literal["wandb", "tensorboard"], ...] = Field(
        ("wandb",), description="trackers that receive numbers and previews; tensorboard needs the extra `trackers`"
    )
    wandb: Mode | None = Field(
        None,
        description="mode of Weights & Biases; default: WANDB_MODE if set, else online if an API key is found, else "
        "offline",
    )
    project: str | None = Field(None, description="project at W&B; default: WANDB_PROJECT if set, else smalti")
    name: str | None = Field(
        None, description="name of the run at W&B; default: WANDB_NAME if set, else the name of the run folder"
    )
    artifact: bool = Field(
        False, description="at the end, upload the tokenizer or pipeline to W&B as an artifact of type `model`"
    )


class Tracker:
    """Write the numbers and pictures of a run on the `active` process; do nothing on the others.

    resume_step: continue the trackers from this step, and remove later lines of `metrics.jsonl`, which will be written
    again; 0 starts afresh. Raises `UserError` for a tracker that is not installed (on every process), `OSError` if the
    run folder cannot be written, and `PathError` if `metrics.jsonl` is a link.
    """

    def __init__(
        self, run: Path, config: TrackConfig, run_config: dict[str, Any], *, active: bool, resume_step: float
    ) -> None:
        require_installed(config.trackers)
        self.run, self.config, self.active = Path(run), config, active
        self._trackers: dict[str, WandbRun | TensorBoardRun] = {}
        if not active:
            return
        self._metrics = MetricsFile(self.run, resume_step)
        if resume_step <= 0:
            (self.run / STORED_ID).unlink(missing_ok=True)
        mode, reason = wandb_mode(config.wandb)
        if "wandb" not in config.trackers or mode == "disabled":
            print(f"W&B: disabled ({reason if 'wandb' in config.trackers else 'not in track.trackers'})", flush=True)
        else:
            known = stored_id(self.run / STORED_ID)
            run_id = known or uuid.uuid4().hex[:16]
            what = f"{mode} ({reason}), {'continues run' if known else 'run'} {run_id}"
            where = f"in {wandb_folder(self.run)}/wandb; track.wandb=disabled turns it off"
            later = f"; upload it later with: {sync_command(self.run, run_id)}" if mode == "offline" else ""
            print(f"W&B: {what} {where}{later}", flush=True)
            self._start("W&B", lambda: WandbRun(self.run, config, run_config, mode, run_id))
        if "tensorboard" in config.trackers:
            folder = self.run / "tensorboard"
            print(f"TensorBoard: tensorboard --logdir {quote(str(folder))}", flush=True)
            self._start("TensorBoard", lambda: TensorBoardRun(folder, run_config, resume_step))

    @property
    def run_url(self) -> str | None:
        """The run's address at W&B; None if it is not online."""
        wandb = self._trackers.get("W&B")
        return wandb.url if isinstance(wandb, WandbRun) else None

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append a line with `step` and `values`; if the disk is full, retry with the next line."""
        if self.active:
            numbers = {name: v if isinstance(v, (int, float)) else float(v) for name, v in values.items()}
            self._metrics.append(step, numbers)
            for label, tracker in list(self._trackers.items()):
                self._call(label, partial(tracker.log, step, numbers))

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Write uint8 `(H, W, C)` arrays to `previews/<name>-<step>.png`; warn and skip on a full disk."""
        if not self.active:
            return
        pictures = {name: pixels[..., 0] if pixels.shape[-1] == 1 else pixels for name, pixels in images.items()}
        for name, picture in pictures.items():
            path = self.run / "previews" / f"{name}-{step:08d}.png"
            try:
                save_picture(picture, path, overwrite=True)
            except (OSError, PathError) as error:
                tell(f"warning: {path} was not written: {error}")
        for label, tracker in list(self._trackers.items()):
            self._call(label, partial(tracker.images, step, pictures))

    def flush(self) -> None:
        """Write and sync all lines, including pending ones. Raises `OSError` (path, bytes needed and free) if the disk
        is full."""
        if self.active:
            self._metrics.flush()

    def finish(
        self, step: int, summary: dict[str, Any], rows: list[list[Any]], artifact_metadata: dict[str, float]
    ) -> None:
        """Log the outcome at W&B: `summary` in its table of runs, `rows` of (weights, split, figure, value) as the
        table `evaluation`; and, if `track.artifact` is set, the snapshot with `artifact_metadata`."""
        wandb, metadata = self._trackers.get("W&B"), {"step": step, **artifact_metadata}
        if isinstance(wandb, WandbRun):
            self._call("W&B", lambda: wandb.finish(step, summary, rows, metadata if self.config.artifact else None))
        elif self.active and self.config.artifact:
            tell("warning: track.artifact: W&B is off, so no artifact was logged")

    def close(self) -> None:
        """Close `metrics.jsonl` and all trackers. W&B gets a limited time to upload the rest."""
        if self.active:
            self._metrics.close()
        while self._trackers:
            label, tracker = self._trackers.popitem()
            self._call(label, tracker.close)

    def _start(self, label: str, start: Callable[[], WandbRun | TensorBoardRun]) -> None:
        self._call(label, lambda: self._trackers.update({label: start()}))

    def _call(self, label: str, call: Callable[[], None]) -> None:
        """Call into a tracker; if that raises, warn, and close and drop the tracker."""
        try:
            call()
        except Exception as error:
            tell(f"warning: {label} is off: {summarize_error(error)}; {self._metrics.path} has every number")
            if label in self._trackers:
                with suppress(Exception):
                    self._trackers.pop(label).close()


class MetricsFile:
    """`metrics.jsonl`, with one line per logged step. Lines that do not fit on a full disk are retried with the next
    line."""

    def __init__(self, run: Path, resume_step: float) -> None:
        make_folder(run)
        self.path = run / "metrics.jsonl"
        if self.path.is_symlink():
            raise PathError(f"{self.path}: is a link; links are never written through")
        if self.path.exists():
            lines = self.path.read_bytes().split(b"\n")
            earlier = [line + b"\n" for line in lines if resume_step > 0 and 0 <= read_step(line) <= resume_step]
            replace_file(self.path, b"".join(earlier))
        self._file, self._unwritten = self.path.open("ab", buffering=0), b""
        fsync(run)

    def append(self, step: int, numbers: dict[str, int | float]) -> None:
        """Append a line; warn once if the disk is full."""
        is_first = not self._unwritten
        self._unwritten += (json.dumps({"step": step, **numbers}) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            if is_first:
                tell(f"warning: {error}; these lines will be written once there is room")

    def flush(self) -> None:
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self._write()
        except OSError as error:
            tell(f"warning: {error}; the remaining lines are lost")
        self._file.close()

    def _write(self) -> None:
        size, needed = os.fstat(self._file.fileno()).st_size, len(self._unwritten)
        try:
            if needed and self._file.write(self._unwritten) < needed:
                raise OSError(errno.ENOSPC, "partial write")
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)  # drop the partial line
            free = shutil.disk_usage(self.path.parent).free
            raise OSError(error.errno, f"{self.path}: needs {needed:,} bytes, {free:,} bytes are free") from error
        self._unwritten = b""


def read_step(line: bytes) -> int:
    """Return the step of a line of `metrics.jsonl`; -1 for a truncated or edited one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


class WandbRun:
    """A run of W&B, online or offline. Supports wandb 0.21 to 0.31.

    wandb cannot append to an offline folder: each command writes a folder of its own, with the same id. `wandb sync` of
    all of them uploads one run; steps that a killed process logged, and a later one repeats, come twice.
    """

    def __init__(self, run: Path, config: TrackConfig, run_config: dict[str, Any], mode: Mode, run_id: str) -> None:
        # No output and no questions. Error reporting would wait for its server at exit.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.run, self.name = run, config.name or os.environ.get("WANDB_NAME") or run.resolve().name
        limits = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
        # Older versions of wandb have no limit on `finish`.
        known = {key: value for key, value in limits.items() if key in wandb.Settings.model_fields}
        options: dict[str, Any] = {
            "project": config.project or os.environ.get("WANDB_PROJECT") or "smalti",
            "name": self.name,
            "id": run_id,
            "resume": "allow",
            "reinit": "create_new",  # do not continue a run that the user opened in this process
            "config": run_config,
            "dir": str(wandb_folder(run)),
            "settings": wandb.Settings(console="off", **known),
        }
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:
            if mode != "online":
                raise
            wandb.teardown()  # otherwise its service refuses the same id
            self._run, mode = wandb.init(mode="offline", **options), "offline"
            later = f"upload it later with: {sync_command(run, run_id)}"
            tell(f"warning: W&B continues offline: {summarize_error(error)}; {later}")
        self.online = mode == "online"
        self.url: str | None = self._run.url if self.online else None
        replace_file(run / STORED_ID, json.dumps({"wandb": self._run.id}).encode())

    def log(self, step: int, numbers: dict[str, int | float]) -> None:
        self._run.log(numbers, step=step)

    def images(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        import wandb

        captions = {name: f"{CAPTIONS.get(name, name)}; step {step:,}" for name in pictures}
        images = {name: [wandb.Image(Image.fromarray(p), caption=captions[name])] for name, p in pictures.items()}
        self._run.log(images, step=step)

    def finish(
        self, step: int, summary: dict[str, Any], rows: list[list[Any]], metadata: dict[str, Any] | None
    ) -> None:
        """Log the outcome. metadata: of the artifact to upload; None for no artifact."""
        import wandb

        self._run.summary.update(summary)
        table = wandb.Table(columns=["weights", "split", "figure", "value"], data=rows)
        self._run.log({"evaluation": table}, step=step)
        if metadata is not None:
            folder = next((self.run / name for name in SNAPSHOTS if (self.run / name).is_dir()), None)
            if folder is None:
                raise FileNotFoundError("track.artifact: no snapshot to upload")
            print(f"W&B: uploading {folder} as an artifact, for up to {ARTIFACT_SECONDS} s", flush=True)
            title = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{self.name}-{folder.name}")[-128:]
            artifact = wandb.Artifact(title, type="model", metadata=metadata)
            # Upload the folder in place; by default wandb first copies it to the user's home.
            artifact.add_dir(str(folder.resolve()), policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])
            if self.online:
                artifact.wait(timeout=ARTIFACT_SECONDS)

    def close(self) -> None:
        try:
            self._run.finish()
        except TimeoutError as error:
            command = f"wandb sync {quote(str(Path(self._run.dir).parent))}"
            raise TimeoutError(f"upload incomplete after {FINISH_SECONDS} s; complete it with: {command}") from error


class TensorBoardRun:
    """Event files of a run. TensorBoard drops the events that earlier processes wrote after `resume_step`."""

    def __init__(self, folder: Path, run_config: dict[str, Any], resume_step: float) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = math.floor(resume_step) + 1 if resume_step > 0 else 0
        self._writer = SummaryWriter(str(folder), purge_step=first)
        if resume_step <= 0:
            self._writer.add_text("config", "    " + write_yaml(run_config).replace("\n", "\n    "), 0)

    def log(self, step: int, numbers: dict[str, int | float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def images(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC" if picture.ndim == 3 else "HW")

    def close(self) -> None:
        self._writer.close()


def require_installed(trackers: tuple[str, ...]) -> None:
    if "tensorboard" in trackers and find_spec("tensorboard") is None:
        raise UserError('track.trackers: tensorboard is not installed: pip install "smalti[trackers]"')


def wandb_mode(chosen: Mode | None) -> tuple[Mode, str]:
    """Return the mode (`online`, `offline`, `disabled`) and the reason in a few words, without importing wandb.

    chosen: the configured mode, which overrides the environment's.
    """
    if chosen is not None:
        return chosen, "track.wandb"
    for mode in get_args(Mode):
        if os.environ.get("WANDB_MODE") == mode:
            return mode, "WANDB_MODE"
    source = find_api_key()
    return ("online", f"API key found in {source}") if source else ("offline", "no API key found")


def find_api_key() -> str | None:
    """Return where wandb will find an API key (the environment or a netrc file), or None."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(os.path.expanduser(name)) for name in files):
        try:
            entries = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        if any(entries.authenticators(name) for name in ([host] if host else HOSTS)):
            return str(path)
    return None


def stored_id(path: Path) -> str | None:
    """Return the id of this run folder's W&B run; None if it has no id yet, or the file is damaged."""
    try:
        return str(read_json(path)["wandb"])
    except (PipelineLoadError, KeyError):
        return None


def wandb_folder(run: Path) -> Path:
    return Path(os.environ.get("WANDB_DIR") or run)


def sync_command(run: Path, run_id: str) -> str:
    return f"wandb sync {quote(str(wandb_folder(run)))}/wandb/offline-run-*-{run_id}"


def summarize_error(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
