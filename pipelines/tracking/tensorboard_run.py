"""TensorBoard as the target of a mirror: event files in the run folder. Written for tensorboard 2.18 to 2.21."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config.yaml_text import write_yaml


class TensorBoardRun:
    """Event files in `<run>/tensorboard/`, written through accelerate's tracker; numbers as float32."""

    def __init__(self, tracker: Any, held: int) -> None:
        self.tracker, self.held = tracker, held

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Numbers by name."""
        self.tracker.log(values, step=step)

    def images(self, step: int, values: dict[str, Path]) -> None:
        """PNG files by name."""
        for name, path in values.items():
            pixels = np.asarray(Image.open(path))
            pixels = pixels[..., None] if pixels.ndim == 2 else pixels
            self.tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        self.tracker.tracker.flush()

    def finish(self) -> None:
        """Write what is queued, and close."""
        self.tracker.finish()


def start_tensorboard(run: Path, run_config: dict[str, Any], *, resumed: bool) -> TensorBoardRun:
    """An event file that goes on after those of earlier processes, or that replaces them. Raises `OSError`.

    Of the last step that they hold a part may be missing: it is written again, and TensorBoard is told to forget what
    it has from that step on.
    """
    from accelerate.tracking import TensorBoardTracker

    folder = run / "tensorboard"
    for path in [] if resumed else folder.glob("events.out.tfevents.*"):
        path.unlink()
    last = last_step(folder)
    tracker = TensorBoardTracker(folder.name, str(run), purge_step=last if last >= 0 else None)
    tracker.start()
    if last < 0:  # as text: `store_init_configuration` would make two more runs in every comparison, without numbers
        tracker.log({"config": "    " + write_yaml(run_config).replace("\n", "\n    ")}, step=0)
    return TensorBoardRun(tracker, held=last - 1)


def last_step(folder: Path) -> int:
    """The highest step in the event files of a folder, -1 for none.

    A file is a row of records: length (uint64), its checksum, the event, its checksum (TensorFlow's TFRecord). What a
    killed process has half written at the end of a file is passed over. (TensorBoard's own loader adds up every byte
    of every picture in Python, 0.6 s for a MB, while the training waits for the interpreter.)
    """
    from tensorboard.compat.proto.event_pb2 import Event

    highest = -1
    for path in folder.glob("events.out.tfevents.*"):
        with path.open("rb") as file:
            while len(header := file.read(12)) == 12:
                (length,) = struct.unpack("<Q", header[:8])
                data = file.read(length)
                if len(data) < length or len(file.read(4)) < 4:
                    break
                event = Event.FromString(data)
                if event.summary.value:
                    highest = max(highest, event.step)
    return highest
