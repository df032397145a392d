"""An encode under way: what it is to make, cut into pieces, and the pieces that are done.

The work folder `.tmp-NAME-encode` beside the dataset holds `job.json` (what the result depends on) and, for each piece
that is done, a shard and its manifest entry. Any number of processes make pieces; killed and started again they make
those that are missing. Only the finished dataset gets the name that was asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer import TokenGrid, Tokenizer
from tokenizer.files.claims import claimed
from tokenizer.files.errors import PipelineLoadError
from tokenizer.files.opening import read_json
from tokenizer.files.reading import MANIFEST
from tokenizer.files.writing import atomic_folder, write_json
from tokenizer.settings import as_saved

from ..config import UserError
from ..config.schema import difference
from ..images import DataConfig
from .meta import META, TOKENS, Meta, check_count, seal
from .shards import ONE_FILE, ROWS_PER_SHARD, bytes_per_row, map_shard, shard_names, write_shard

JOB = "job.json"
PIECES = 64  # of a split, if it is not too large or too small: many processes share them, and little is made twice


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of what is made of a split's images."""

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


def cut(split: str, first: int, rows: int, batch_size: int, rows_per_shard: int | None) -> list[Piece]:
    """Rows `first` to `rows` in pieces, the same for any number of processes; None: by the size of the split."""
    size = rows_per_shard
    if size is None:
        batches = -(-(rows - first) // (PIECES * batch_size))  # whole batches, so that no small ones are encoded
        size = min(max(1, batches) * batch_size, max(ROWS_PER_SHARD, batch_size))
    return [Piece(split, k, start, min(start + size, rows)) for k, start in enumerate(range(first, rows, size))]


@dataclass(frozen=True)
class Shard:
    """A file of the dataset to be, where it is now, and its manifest entry."""

    path: Path
    rows: int
    entry: dict[str, Any]


class EncodeJob:
    """An encode of these pieces into the dataset `out`.

    with job.begin() as missing:    # on one process
        job.keep(piece, ...)        # for each missing one, on any process
        job.publish(...)            # on one process, when all are kept
    """

    def __init__(self, out: Path, grid: TokenGrid, pieces: list[Piece], depends_on: dict[str, Any]) -> None:
        """depends_on: all that the rows depend on, to the bit."""
        self.out, self.work = out, work_folder(out)
        self.grid, self.pieces, self.depends_on = grid, pieces, depends_on

    @contextmanager
    def begin(self) -> Iterator[list[Piece]]:
        """Make the work folder, which belongs to this job from now on, and to no other process while the block lasts;
        gives the pieces that are not done. Raises `UserError` for a folder that another job began, or in which a
        process is at work."""
        self._check_begun()
        self.work.mkdir(parents=True, exist_ok=True)
        with claimed(self.work):
            if not (self.work / JOB).is_file():
                write_json(self.work / ".job.json", self.depends_on)
                (self.work / ".job.json").replace(self.work / JOB)
            yield [piece for piece in self.pieces if not self._is_done(piece)]

    def _check_begun(self) -> None:
        begun = unfinished(self.out)
        if begun is None:
            return
        begun = {**begun, "data": as_saved(DataConfig, begun.get("data", {}))}
        if changes := difference(begun, json.loads(json.dumps(self.depends_on))):
            raise UserError(
                f"out: an encode with another configuration was begun here and is not finished; give that one again, "
                f"or delete {self.work}. What differs:\n" + "\n".join(changes)
            )

    def _is_done(self, piece: Piece) -> bool:
        """Whether the file of a piece is the one that was written; a damaged one is forgotten."""
        entry = self._entry(piece)
        if entry is None:
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

    def keep(self, piece: Piece, tokens: Tensor, labels: Tensor | None) -> None:
        """Write a piece; it is done when its entry stands beside it."""
        entry = write_shard(self.work / piece.name, tokens, labels, self.grid)
        temporary = self.work / f".{piece.name}.json"
        write_json(temporary, entry)
        temporary.replace(self._entry_path(piece))

    def publish(self, meta: Meta, before: dict[str, list[Shard]], tokenizer: Tokenizer, merge: bool) -> Meta:
        """Give the dataset of all pieces, after the shards that were there `before`, its name in one step; what was
        there is replaced, and the work folder goes. merge: a split below 64 MiB becomes one file. Returns its meta.

        Files are linked, not copied, where the disk can. Raises `UserError` for a piece that cannot be seen from here.
        """
        splits = {split: list(shards) for split, shards in before.items()}
        for piece in self.pieces:
            splits.setdefault(piece.split, []).append(self._shard(piece))
        rows = {split: sum(shard.rows for shard in shards) for split, shards in splits.items()}
        merged = [split for split in splits if merge and rows[split] * bytes_per_row(meta.grid) <= ONE_FILE]
        sizes = {
            split: [rows[split]] if split in merged else [shard.rows for shard in shards]
            for split, shards in splits.items()
        }
        check_count(sum(map(len, sizes.values())))
        meta = replace(meta, shards=sizes)
        with atomic_folder(self.out, kind=TOKENS) as target:
            entries = {}
            for split, shards in splits.items():
                names = shard_names(split, len(sizes[split]))
                if split in merged and len(shards) > 1:
                    entries[names[0]] = _merged(target / names[0], shards, meta.grid)
                    continue
                for name, shard in zip(names, shards, strict=True):
                    _link(shard.path, target / name)
                    entries[name] = shard.entry
            seal(target, meta, tokenizer, entries)
        shutil.rmtree(self.work)
        return meta

    def _shard(self, piece: Piece) -> Shard:
        entry = self._entry(piece)
        if entry is None:
            raise UserError(f"out: {self.work / piece.name} is not there; all processes have to see the same disk")
        return Shard(self.work / piece.name, piece.rows, entry)


def _merged(path: Path, shards: list[Shard], grid: TokenGrid) -> dict[str, Any]:
    parts = [map_shard(shard.path, shard.rows, grid) for shard in shards]
    labels = [labels for _, labels in parts if labels is not None]
    return write_shard(path, torch.cat([tokens for tokens, _ in parts]), torch.cat(labels) if labels else None, grid)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copyfile(source, target)


def work_folder(out: Path) -> Path:
    """Where the pieces of `out` are kept."""
    return out.parent / f".tmp-{out.name}-encode"


def unfinished(out: Path) -> dict[str, Any] | None:
    """What the rows of an encode into `out` depend on that was begun and is not finished; None if there is none."""
    path = work_folder(out) / JOB
    return read_json(path) if path.is_file() else None


def shards_of(out: Path, meta: Meta) -> dict[str, list[Shard]]:
    """The files of a dataset's splits."""
    entries = read_json(out / MANIFEST)["files"]
    return {
        split: [
            Shard(out / name, rows, entries[name])
            for name, rows in zip(shard_names(split, len(sizes)), sizes, strict=True)
        ]
        for split, sizes in meta.shards.items()
    }


def manifest_hash(out: Path) -> str:
    """What changes when anything in the dataset does."""
    return hashlib.sha256((out / MANIFEST).read_bytes()).hexdigest()


def recover(out: Path) -> None:
    """Tidy up after a process that was killed at the very end: give a dataset that was being replaced its name back,
    and drop pieces that have been added to it."""
    lost = sorted(out.parent.glob(f".del-{out.name}-????????"))
    if not out.exists() and len(lost) == 1 and (lost[0] / META).is_file():
        lost[0].rename(out)
    added_to = (unfinished(out) or {}).get("added_to")
    if added_to is not None and (not (out / MANIFEST).is_file() or manifest_hash(out) != added_to):
        shutil.rmtree(work_folder(out))
