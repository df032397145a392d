"""Work in progress: the pieces that it has to make, and those that are done.

The work folder `.tmp-NAME-VERB` beside the result `NAME` holds `job.json` (what the result depends on) and, for each
piece that is done, a file and its entry, size and sha256. Any number of processes make pieces; killed and started again
they make those that are missing. Only the finished result gets the name that was asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer.files import LITTER, PathError, PipelineLoadError, fsync, make_folder, read_json, summarize, write_json

from ..config import UserError
from ..config.schema import difference
from ..files import LOCK

JOB, RESULT, PLACED = "job.json", "result", "placed.json"
OURS = r"(\.tmp-|\.)?\w+-\d{5,}\.(safetensors|json)(\.json|-[0-9a-f]{8})?"
"""Names of the files of pieces in a work folder, and of those that are being written."""


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of what is made of a split."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many it is to hold."""
        return self.stop - self.start

    @property
    def name(self) -> str:
        """Of its file in the work folder."""
        return f"{self.split}-{self.number:05d}.safetensors"


def cut(split: str, first: int, rows: int, size: int) -> list[Piece]:
    """Rows `first` to `rows` in pieces of `size`."""
    return [Piece(split, k, start, min(start + size, rows)) for k, start in enumerate(range(first, rows, size))]


class Job:
    """Work on these pieces for the result `out`.

    missing = job.begin()       # on one process, which has locked `out`, see `files.lock_output`
    job.keep(piece, data)       # for each missing one, on any process
    job.read(piece)             # on one process, when all are kept
    """

    verb = "work"
    title = "work"

    def __init__(self, out: Path, pieces: list[Piece], depends_on: dict[str, Any]) -> None:
        """depends_on: all that the rows depend on, to the bit."""
        self.out, self.pieces, self.depends_on = out, pieces, depends_on
        self.work = self.work_folder(out)

    @classmethod
    def work_folder(cls, out: Path) -> Path:
        """Where the pieces of `out` are kept."""
        return out.parent / f".tmp-{out.name}-{cls.verb}"

    @classmethod
    def unfinished(cls, out: Path) -> dict[str, Any] | None:
        """What the rows of a job for `out` depend on that was begun and is not finished; None if there is none."""
        path = cls.work_folder(out) / JOB
        return read_json(path) if path.is_file() else None

    def begin(self) -> list[Piece]:
        """Make the work folder, which belongs to this job from now on; returns the pieces that are not done. Raises
        `UserError` for a folder that another job began, `PathError` for one that is not ours."""
        self._check_ours()
        make_folder(self.work)
        self._check_begun()
        if self.unfinished(self.out) is None:
            self._begin_anew()
        return [piece for piece in self.pieces if not self._is_done(piece)]

    def _begin_anew(self) -> None:
        """Say, on the disk, what the pieces will depend on. Those of a job of which it is not known by now, as only a
        part of it is left (it was killed while it tidied up, say), are forgotten."""
        for piece in self.pieces:
            self._entry_path(piece).unlink(missing_ok=True)
        fsync(self.work)
        write_json(self.work / f".{JOB}", self.depends_on)
        fsync(self.work / f".{JOB}")
        (self.work / f".{JOB}").replace(self.work / JOB)
        fsync(self.work)

    def _check_ours(self) -> None:
        """Only what a job has written is in a work folder, which goes at the end of the job."""
        if self.work.is_symlink() or (os.path.lexists(self.work) and not self.work.is_dir()):
            raise PathError(f"{self.work}: not a folder, and it is where the pieces of {self.out} are to be kept")
        found = sorted(path.name for path in self.work.iterdir()) if self.work.is_dir() else []
        known = {JOB, f".{JOB}", LOCK, RESULT, PLACED, *LITTER}
        if strange := [name for name in found if name not in known and not re.fullmatch(OURS, name)]:
            raise PathError(
                f"{self.work} is not the folder of {self.title}: it holds {summarize(strange)}; choose another out=, "
                "nothing was overwritten"
            )

    def _check_begun(self) -> None:
        begun = self.unfinished(self.out)
        if begun is None:
            return
        changes = difference(begun, json.loads(json.dumps(self.depends_on)))
        if not changes:
            return
        if not self.kept() and not any(self.work.glob("*.safetensors")):  # nothing was made
            (self.work / JOB).unlink()
            return
        raise UserError(
            f"out: {self.title} with another configuration was begun here and is not finished; give that one again, "
            f"or delete {self.work}. What differs:\n" + "\n".join(changes)
        )

    def kept(self) -> list[Piece]:
        """The pieces that are there, whoever made them; they are not read."""
        there = set(os.listdir(self.work))
        return [piece for piece in self.pieces if self._entry_path(piece).name in there]

    def keep(self, piece: Piece, data: bytes) -> None:
        """Write a piece, of this content."""
        temporary = self.work / f".{piece.name}"
        temporary.write_bytes(data)
        temporary.replace(self.work / piece.name)
        self.enter(piece, {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})

    def enter(self, piece: Piece, entry: dict[str, Any]) -> None:
        """Write the entry of a piece whose file is written: it is done when its entry stands beside it."""
        temporary = self.work / f".{piece.name}.json"
        write_json(temporary, entry)
        temporary.replace(self._entry_path(piece))

    def entry(self, piece: Piece) -> dict[str, Any]:
        """Size and sha256 of a piece that is done. Raises `UserError` if it cannot be seen from here."""
        entry = self._entry(piece)
        if entry is None:
            raise UserError(f"out: {self.work / piece.name} is not there; all processes have to see the same disk")
        return entry

    def read(self, piece: Piece) -> bytes:
        """The content of a piece. Raises `UserError` for one that is not there, or not as it was kept."""
        entry, data = self.entry(piece), (self.work / piece.name).read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
            raise UserError(f"out: {self.work / piece.name} was changed; the same command makes it again")
        return data

    def _is_done(self, piece: Piece) -> bool:
        """Whether the file of a piece is the one that was written; a damaged one is forgotten."""
        entry = self._entry(piece)
        if entry is None:
            self._entry_path(piece).unlink(missing_ok=True)
            return False
        if hashlib.sha256((self.work / piece.name).read_bytes()).hexdigest() == entry.get("sha256"):
            return True
        self._entry_path(piece).unlink()
        return False

    def _entry_path(self, piece: Piece) -> Path:
        return (self.work / piece.name).with_suffix(".json")

    def _entry(self, piece: Piece) -> dict[str, Any] | None:
        """The manifest entry of a piece that is there, else None."""
        try:
            return read_json(self._entry_path(piece)) if (self.work / piece.name).is_file() else None
        except PipelineLoadError:  # killed while it was written
            return None
