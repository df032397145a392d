"""The record of a run: its numbers, a line a step, in `metrics.jsonl`, and its pictures in `previews/`.

The training writes it, and whoever keeps a copy reads it, from the beginning and while it grows.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from tokenizer.files import PathError, fsync, make_folder

from ..config.terminal import tell
from ..files import replace_file
from ..images.pictures import save_picture


class Entry(NamedTuple):
    """What was recorded at a step: numbers by name (`log`), or the paths of PNG files by name (`images`)."""

    step: int
    method: Literal["log", "images"]
    values: dict[str, Any]


class Record:
    """Written by one process, in the folder `run`.

    With `resume_step` > 0 the lines after that step, which the run is about to repeat, are removed; with 0 all are.
    Raises `OSError` if the folder cannot be written, and `PathError` for a link in place of the file.
    """

    def __init__(self, run: Path, resume_step: float) -> None:
        self.run, self.path = run, run / "metrics.jsonl"
        make_folder(run)
        self.highest = _rewind(self.path, resume_step)
        """The highest step that the process before this one has recorded, or -1."""
        if self.path.is_symlink():
            raise PathError(f"{self.path}: a link, and nothing is written through a link")
        self.pictures = _pictures_until(run / "previews", resume_step)
        """Step and files, in the order of steps; grows."""
        self._file, self._unwritten = self.path.open("ab", buffering=0), b""
        fsync(run)  # a line that is flushed has a file

    def log(self, step: int, numbers: dict[str, int | float]) -> None:
        """Append a line; what a full disk does not take is kept for the next time."""
        self._unwritten += (json.dumps({"step": step, **numbers}) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            tell(f"warning: {error}; these lines are kept for later")

    def images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Write uint8 `(H, W, C)` arrays to `previews/<name>-<step>.png`; a disk that is full, or gone, costs the
        picture and a line."""
        paths = {}
        for name, pixels in images.items():
            path = self.run / "previews" / f"{name}-{step:08d}.png"
            try:
                save_picture(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, path, overwrite=True)
                paths[name] = path
            except (OSError, PathError) as error:
                tell(f"warning: {path} is left out: {error}; {_room(self.run)}")
        if paths:
            self.pictures.append((step, paths))

    def flush(self) -> None:
        """Put all lines on the disk, with those that are still to be written. Raises `OSError` (path, needed and free
        bytes) and writes none, if it is full."""
        self._write()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing is recorded any more."""
        self._file.close()

    def _write(self) -> None:
        if not self._unwritten:
            return
        size = self.path.stat().st_size
        try:
            if self._file.write(self._unwritten) < len(self._unwritten):
                raise OSError(errno.ENOSPC, "only a part was written")
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)  # a line in two parts would be two broken lines
            needed = len(self._unwritten)
            raise OSError(error.errno, f"{self.path}: {needed:,} bytes are needed, {_room(self.run)}") from error
        self._unwritten = b""


class Reader:
    """Reads a record that grows: each entry once, in the order of steps, numbers before pictures."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._offset = self._shown = 0
        self._step = -1

    def read(self, to_the_end: bool = False) -> Iterator[Entry]:
        """What is new since the last call. Pictures of a step after the last line have to wait, as its numbers come
        first; not if this is the end. Raises `OSError`, and `ValueError` for a line that is none."""
        for step, numbers in self._lines():
            yield from self._pictures(step)  # a step's pictures are there before there is a line of a later one
            self._step = step
            yield Entry(step, "log", numbers)
        yield from self._pictures(math.inf if to_the_end else self._step + 1)

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """New lines; of one that has no end yet, the rest is to come."""
        with self._record.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                numbers = json.loads(line)
                yield numbers.pop("step"), numbers

    def _pictures(self, before: float) -> Iterator[Entry]:
        """New pictures of earlier steps than `before`."""
        pictures = self._record.pictures
        while self._shown < len(pictures) and pictures[self._shown][0] < before:
            step, paths = pictures[self._shown]
            self._shown += 1
            yield Entry(step, "images", paths)


def _room(run: Path) -> str:
    """What is free on the disk."""
    try:
        return f"{shutil.disk_usage(run).free:,} bytes are free"
    except OSError as error:
        return f"the disk is gone ({error.strerror})"


def _rewind(path: Path, resume_step: float) -> int:
    """Keep the lines up to `resume_step` (none for 0); return the highest step that stood in the file, or -1."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    steps = [_step_of(line) for line in lines]
    kept = [line + b"\n" for line, step in zip(lines, steps, strict=True) if 0 <= step <= resume_step and resume_step]
    if lines:
        replace_file(path, b"".join(kept))
    return max(steps, default=-1)


def _step_of(line: bytes) -> int:
    """The step of a line, -1 for a torn or damaged one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return -1
    return step if isinstance(step, int) else -1


def _pictures_until(folder: Path, resume_step: float) -> list[tuple[int, dict[str, Path]]]:
    """Pictures of earlier processes up to `resume_step` (none for 0); later ones are about to be written again."""
    found: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("*.png")) if resume_step > 0 else []:
        if (parts := re.fullmatch(r"(.+)-(\d{8,})", path.stem)) and int(parts[2]) <= resume_step:
            found.setdefault(int(parts[2]), {})[parts[1]] = path
    return sorted(found.items())
