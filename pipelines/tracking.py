"""Every number to `metrics.jsonl`, every preview to a PNG, both mirrored to Weights & Biases when asked.

The local file is the record. W&B is a copy made by a daemon thread behind a bounded queue, so that W&B being slow,
away or broken costs the run at most a line of warning.
"""

from __future__ import annotations

import json
import netrc
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from pydantic import Field

from tokenizer.storage import PipelineLoadError, read_json, write_json

from .config import Config

QUEUE_SIZE = 1000
INIT_SECONDS = 30.0
CLOSE_SECONDS = 15.0
WANDB_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # the second is what newer clients call the first


class TrackConfig(Config):
    """Where the numbers of a run go besides `metrics.jsonl`."""

    wandb: Literal["online", "offline", "disabled"] | None = Field(
        default=None,
        description="Mirror to Weights & Biases; default: WANDB_MODE if set, else online if an API key is found, "
        "else offline.",
    )
    project: str = Field(default="smalti", description="The W&B project that the run belongs to.")
    name: str | None = Field(default=None, description="The name of the run in W&B; default: that of the run folder.")


class Tracker:
    """Writes on the main process and does nothing on the others.

    With `resume_step` > 0 the lines of `metrics.jsonl` after that step, which the run is about to repeat, are removed,
    and the same W&B run goes on; with 0 both begin anew. Raises `OSError` if the run folder cannot be written.
    """

    def __init__(
        self, run: Path, config: TrackConfig, run_config: dict[str, Any], *, accelerator: Any, resume_step: int
    ) -> None:
        self.run = Path(run)
        self.active = bool(accelerator.is_main_process)
        self._mirror: _Mirror | None = None
        if not self.active:
            return
        self.run.mkdir(parents=True, exist_ok=True)
        highest = _rewind(self.run / "metrics.jsonl", resume_step)
        self._file = (self.run / "metrics.jsonl").open("a", encoding="utf-8")
        mode, reason = wandb_mode(config)
        later = f"; sync later with: wandb sync {self.run}/wandb/offline-run-*" if mode == "offline" else ""
        print(f"W&B: {mode} ({reason}){later}", flush=True)
        if mode != "disabled":
            identity, sent = _wandb_run(self.run, resume_step, highest)
            options = {"dir": str(self.run), "name": config.name or self.run.resolve().name, "id": identity}
            self._mirror = _Mirror(
                mode, lambda mode: _start_wandb(config.project, run_config, mode=mode, **options), after=sent
            )

    @property
    def dropped(self) -> int:
        """How many entries W&B did not get because it was too slow; `metrics.jsonl` has them all."""
        return self._mirror.dropped if self._mirror else 0

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line with `step` and `values`. Raises `OSError` if the disk is full."""
        if not self.active:
            return
        line = {"step": step, **{key: _number(value) for key, value in values.items()}}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._mirror:
            self._mirror.put(step, "log", {key: value for key, value in line.items() if key != "step"})

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Write uint8 `(H, W, C)` arrays to `previews/<name>-<step>.png`. Raises `OSError` if the disk is full."""
        if not self.active:
            return
        paths = {name: self.run / "previews" / f"{name}-{step:08d}.png" for name in images}
        for name, path in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = images[name]
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path)
        if self._mirror:  # paths, not arrays: a full queue must not hold a thousand previews in memory
            self._mirror.put(step, "log_images", {name: [str(path)] for name, path in paths.items()})

    def close(self) -> None:
        """Close the file and give W&B some seconds to receive what is queued."""
        if not self.active:
            return
        self._file.close()
        if self._mirror:
            self._mirror.close(CLOSE_SECONDS)


def _number(value: Any) -> int | float:
    return value if isinstance(value, (int, float)) else float(value)  # numpy scalars, tensors of one element


def _rewind(path: Path, resume_step: int) -> int:
    """Keep the lines up to `resume_step` (none for 0); return the highest step that stood in the file, or -1."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    steps = [_step_of(line) for line in lines]
    kept = [line + b"\n" for line, step in zip(lines, steps, strict=True) if 0 <= step <= resume_step and resume_step]
    if lines:
        temporary = path.with_name(".tmp-metrics.jsonl")
        temporary.write_bytes(b"".join(kept))
        temporary.replace(path)
    return max(steps, default=-1)


def _step_of(line: bytes) -> int:
    """The step of a line, -1 for a torn one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


# Weights & Biases


def wandb_mode(config: TrackConfig) -> tuple[str, str]:
    """The mode (`online`, `offline`, `disabled`) and, in a few words, why; found without importing wandb."""
    if config.wandb is not None:
        return config.wandb, "track.wandb"
    from_environment = os.environ.get("WANDB_MODE", "")
    if from_environment in ("online", "offline", "disabled"):
        return from_environment, "WANDB_MODE"
    source = _key_source()
    return ("online", f"API key found in {source}") if source else ("offline", "no API key found")


def _key_source() -> str | None:
    """Where wandb will find an API key: the environment or a netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in files):
        try:
            entries = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        if any(entries.authenticators(name) for name in ([host] if host else WANDB_HOSTS)):
            return str(path)
    return None


def _wandb_run(run: Path, resume_step: int, highest: int) -> tuple[str, int]:
    """The id that all resumes of this run share, and the highest step that W&B may already have.

    W&B refuses steps that it has, so the mirror goes on after the highest step that any earlier process wrote.
    """
    path = run / "wandb_run.json"
    saved: dict[str, Any] = {}
    if resume_step > 0 and path.exists():
        try:
            saved = read_json(path)
        except PipelineLoadError as error:
            print(f"warning: W&B run begins anew: {error}", file=sys.stderr)
    identity, sent = str(saved.get("id", uuid.uuid4().hex[:16])), saved.get("sent", -1)
    sent = max(highest, sent if isinstance(sent, int) else -1) if resume_step > 0 else -1
    temporary = path.with_name(".tmp-wandb_run.json")
    write_json(temporary, {"id": identity, "sent": sent})
    temporary.replace(path)
    return identity, sent


def _start_wandb(project: str, run_config: dict[str, Any], **options: Any) -> Any:
    """accelerate's tracker of a running W&B run. Raises whatever wandb raises."""
    # Silent: wandb would ask a question on the terminal. Error reporting: its exit hook waits 20 s for a dead server.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb
    from accelerate.tracking import WandBTracker

    # Limits of its own below ours: a start that wandb gives up is cleaner than one that is abandoned.
    wanted: dict[str, Any] = {
        "init_timeout": INIT_SECONDS * 2 / 3,
        "finish_timeout": CLOSE_SECONDS * 2 / 3,
        "console": "off",
    }
    settings = wandb.Settings(**{key: value for key, value in wanted.items() if hasattr(wandb.Settings(), key)})
    tracker = WandBTracker(project, resume="allow", settings=settings, **options)
    if hasattr(tracker, "start"):  # older versions of accelerate start in the constructor
        tracker.start()
    tracker.store_init_configuration(run_config)
    return tracker


def _stop_wandb() -> None:
    """End wandb's service, which keeps the id of a run whose start failed and would refuse it offline."""
    import wandb

    wandb.teardown()


class _Mirror:
    """A daemon thread that starts a tracker and hands it what was put, in order; nothing here blocks or raises."""

    def __init__(self, mode: str, start: Callable[[str], Any], *, after: int) -> None:
        self.dropped = 0
        self._next = after + 1
        self._closing = False
        self._queue: queue.Queue[tuple[int, str, dict[str, Any]] | None] = queue.Queue(QUEUE_SIZE)
        self._thread = threading.Thread(target=self._work, args=(mode, start), name="wandb-mirror", daemon=True)
        self._thread.start()

    def put(self, step: int, method: str, values: dict[str, Any]) -> None:
        """Queue `tracker.<method>(values, step=step)`, or count it as dropped when the queue is full."""
        if step < self._next:
            return
        self._next = step
        try:
            self._queue.put_nowait((step, method, values))
        except queue.Full:
            self.dropped += 1

    def close(self, seconds: float) -> None:
        """Wait at most `seconds` for the queue to drain and the tracker to finish."""
        deadline = time.monotonic() + seconds
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            pass
        self._thread.join(max(0.0, deadline - time.monotonic()))
        self._closing = True
        if self._thread.is_alive():
            _warn(f"not done after {seconds:.0f} s; `wandb sync` the newest folder in the run's wandb/ to complete it")
        if self.dropped:
            _warn(f"{self.dropped} entries were dropped because it was too slow; metrics.jsonl has them all")

    def _work(self, mode: str, start: Callable[[str], Any]) -> None:
        tracker = self._connect(mode, start)
        failed = False
        while (entry := self._queue.get()) is not None:
            step, method, values = entry
            try:
                if tracker is not None:
                    getattr(tracker, method)(values, step=step)
            except Exception as error:
                if not failed:
                    self._warn(f"step {step} was not logged ({_short(error)}); later failures are not reported")
                failed = True
        try:
            if tracker is not None:
                tracker.finish()
        except Exception as error:
            self._warn(f"the run was not finished ({_short(error)})")

    def _connect(self, mode: str, start: Callable[[str], Any]) -> Any:
        """A tracker in `mode`, else offline, else None."""
        try:
            return _within(INIT_SECONDS, lambda: start(mode))
        except Exception as error:
            reason = _short(error)
        if mode == "online":
            try:
                _within(INIT_SECONDS, _stop_wandb)
                tracker = _within(INIT_SECONDS, lambda: start("offline"))
                self._warn(f"online failed ({reason}); going on offline")
                return tracker
            except Exception as error:
                reason = f"{reason}; then offline: {_short(error)}"
        self._warn(f"could not start ({reason}); going on without it, metrics.jsonl has every number")
        return None

    def _warn(self, message: str) -> None:
        if not self._closing:  # the interpreter may be going down, and the run is over
            _warn(message)


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """The result of `function`, run in a thread that is abandoned after `seconds`; raises what it raised, or
    `TimeoutError`."""
    outcome: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def call() -> None:
        try:
            outcome.put((function(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=call, name="wandb-start", daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:.0f} s") from None
    if error is not None:
        raise error if isinstance(error, Exception) else RuntimeError(repr(error))
    return result


def _warn(message: str) -> None:
    print(f"warning: W&B: {message}", file=sys.stderr, flush=True)


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__
