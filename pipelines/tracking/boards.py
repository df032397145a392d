"""TensorBoard and trackio as targets of mirrors: both keep what they get in the run folder."""

from __future__ import annotations

import json
import os
import struct
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import UserError
from ..config.arguments import write_yaml

PACKAGES = ("tensorboard", "trackio")  # trackers that are packages of their own, which not everyone wants


def require_installed(trackers: tuple[str, ...]) -> None:
    """Raise `UserError` for one whose package is not there: before the training, not somewhere in it."""
    missing = [name for name in trackers if name in PACKAGES and find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f'track.trackers: {" and ".join(missing)} {verb} not installed: pip install "smalti[trackers]"')


class Board:
    """A tracker that can be asked what it holds, so that a run that was killed in the middle of a step is completed.

    `found` is the highest step that it has, -1 for none, and the names that it has at that step.
    """

    def __init__(self, tracker: Any, found: tuple[int, set[str]]) -> None:
        self.tracker = tracker
        self.step, self.names = found
        self.held = self.step - 1

    def missing(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Those of the values that it does not have yet."""
        return {name: value for name, value in values.items() if step > self.step or name not in self.names}

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Numbers by name."""
        if values := self.missing(step, values):
            self.tracker.log(values, step=step)

    def finish(self) -> None:
        """Write what is queued, and close."""
        self.tracker.finish()


class TensorBoard(Board):
    """Event files in `<run>/tensorboard/`, written through accelerate's tracker; numbers as float32."""

    def images(self, step: int, values: dict[str, Path]) -> None:
        """PNG files by name."""
        for name, path in self.missing(step, values).items():
            pixels = np.asarray(Image.open(path))
            pixels = pixels[..., None] if pixels.ndim == 2 else pixels
            self.tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        self.tracker.tracker.flush()


def start_tensorboard(run: Path, run_config: dict[str, Any], *, resumed: bool) -> TensorBoard:
    """An event file that goes on after those of earlier processes, or that replaces them. Raises `OSError`."""
    from accelerate.tracking import TensorBoardTracker

    folder = run / "tensorboard"
    for path in [] if resumed else folder.glob("events.out.tfevents.*"):
        path.unlink()
    found = last_step(folder)
    tracker = TensorBoardTracker(folder.name, str(run))
    if hasattr(tracker, "start"):  # older versions of accelerate start in the constructor
        tracker.start()
    if (
        found[0] < 0
    ):  # as text: `store_init_configuration` would make two more runs in every comparison, without numbers
        tracker.log({"config": "    " + write_yaml(run_config).replace("\n", "\n    ")}, step=0)
    return TensorBoard(tracker, found)


def last_step(folder: Path) -> tuple[int, set[str]]:
    """The highest step in the event files of a folder, -1 for none, and the names of what they hold of it.

    A file is a row of records: length (uint64), its checksum, the event, its checksum (TensorFlow's TFRecord). What a
    killed process has half written at the end of a file is passed over, as TensorBoard does.
    """
    from tensorboard.compat.proto.event_pb2 import Event

    highest, names = -1, set[str]()
    for path in folder.glob("events.out.tfevents.*"):
        with path.open("rb") as file:
            while len(header := file.read(12)) == 12:
                (length,) = struct.unpack("<Q", header[:8])
                data = file.read(length)
                if len(data) < length or len(file.read(4)) < 4:
                    break
                event = Event.FromString(data)
                if event.summary.value and event.step >= highest:
                    names = names if event.step == highest else set()
                    highest, names = event.step, names | {value.tag for value in event.summary.value}
    return highest, names


class Trackio(Board):
    """A run in trackio's database, written through accelerate's tracker."""

    def images(self, step: int, values: dict[str, Path]) -> None:
        """PNG files by name; accelerate's tracker has no way of its own for them."""
        import trackio

        if values := self.missing(step, values):
            self.tracker.log({name: trackio.Image(str(path)) for name, path in values.items()}, step=step)


def trackio_folder(run: Path) -> Path:
    """Where trackio keeps its database: the run folder, or what TRACKIO_DIR says."""
    return Path(os.environ.get("TRACKIO_DIR") or run / "trackio")


def start_trackio(
    project: str, run_config: dict[str, Any], *, folder: Path, name: str, resumed: bool, sent: int
) -> Trackio:
    """The run of this name in `folder`, continued or new; `sent` is the highest step that a server may have.

    Raises `RuntimeError` if this process has used trackio with another folder, which it reads once.
    """
    theirs = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder)
    import trackio
    from accelerate.tracking import TrackioTracker
    from trackio.sqlite_storage import SQLiteStorage

    if theirs is None:  # read at the import; a later run in this process must not take it for the user's wish
        del os.environ["TRACKIO_DIR"]
    if trackio.TRACKIO_DIR.resolve() != folder.resolve():
        raise RuntimeError(f"this process writes to {trackio.TRACKIO_DIR} already; start another one")
    for module in ("trackio", "trackio.run", "trackio.utils"):
        # Its greeting names a command that would look elsewhere; redirecting stdout would take the trainer's lines too.
        setattr(sys.modules[module], "print", lambda *parts, **how: None)  # noqa: B010
    # The configuration at once: accelerate's `store_init_configuration` adds an entry "allow_val_change" to it.
    options = {"name": name, "config": flat(run_config), "resume": "allow" if resumed else "never"}
    tracker = TrackioTracker(project, **options)
    if hasattr(tracker, "start"):
        tracker.start()
    logs = SQLiteStorage.get_logs(project, name) if resumed else []
    elsewhere = any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))  # can not be asked
    step = max((log["step"] for log in logs), default=sent if elsewhere else -1)
    return Trackio(tracker, (step, {key for log in logs if log["step"] == step for key in log}))


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; what is no number, text or truth value, as JSON."""
    found: dict[str, int | float | str | bool] = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, (int, float, str, bool))
            found[prefix + key] = value if plain else json.dumps(value, default=str)
    return found
