"""A set of images in progress: its pieces, see `pipelines.jobs`, and how each process makes its share of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer.files import fsync, read_json

from ...files import Output
from ...jobs import Job
from ...jobs.pieces import JOB, PLACED, cut
from ...jobs.sharing import Share
from .forms import Form, identity
from .parts import Drawn, Part

PIECES, IN_PIECE, MOST_PIECES = 64, 64, 2048

Draw = Callable[[Sequence[int]], tuple[np.ndarray, list[int] | None]]
"""Images of these numbers, uint8 (B, H, W, C), and their classes, or None without labels."""


class GenerateJob(Job):
    """The work on a set of so many images, the file or folder `out`."""

    verb, title = "generate", "a set of images"

    def __init__(self, out: Path, form: Form, count: int, depends_on: dict[str, Any]) -> None:
        """depends_on: all that the pixels depend on."""
        size = max(min(-(-count // PIECES), IN_PIECE), -(-count // MOST_PIECES))
        super().__init__(out, cut("images", 0, count, size), {**depends_on, "num_images": count, "form": form.name})
        self.form = form

    def make(self, share: Share, batch_size: int, draw: Draw) -> None:
        """Make this process's share, and wait until all pieces are there; see `Share.make`."""
        drawn, queue = Drawn(self.form.keep), deque(share.mine)

        def keep(made: tuple[np.ndarray, list[int] | None]) -> None:
            drawn.add(*made)
            while queue and queue[0].rows <= len(drawn.images):
                piece = queue.popleft()
                with Output(self.out).errors():
                    self.keep(piece, drawn.take(piece.start, piece.rows).to_bytes())

        share.make(batch_size, draw, keep, "generating")

    def parts(self) -> Iterator[Part]:
        """All images, a piece at a time. Raises what `read` raises."""
        return (Part.from_bytes(self.read(piece), piece.start) for piece in self.pieces)

    @classmethod
    def is_placed(cls, out: Path) -> bool:
        """Whether a process was killed while it gave a set its name, or before it had removed the pieces."""
        return (cls.work_folder(out) / PLACED).is_file()

    def take_back(self) -> None:
        """Remove what this job has given its name, since the pieces make it again; nothing else."""
        placed = read_json(self.work / PLACED)
        for name, known in placed.items():
            path = self.out / name if name else self.out
            if identity(path) == known:
                path.unlink()
        if "" not in placed:
            with suppress(OSError):
                self.out.rmdir()

    def end(self) -> None:
        """Remove the work folder: the set has its name."""
        (self.work / JOB).unlink()  # first: from now on nothing goes on from here
        fsync(self.work)
        self.tidy_up(self.out)

    @classmethod
    def tidy_up(cls, out: Path) -> None:
        """Remove the work folder of a job that has ended, also if a process was killed while it did so."""
        if cls.is_placed(out) and cls.unfinished(out) is None:
            work = cls.work_folder(out)
            for path in sorted(work.iterdir(), key=lambda path: path.name == PLACED):  # which is last
                path.unlink()
            work.rmdir()
