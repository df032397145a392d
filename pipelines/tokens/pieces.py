"""An encode in progress: the pieces of a token dataset, see `pipelines.jobs`, and how they become the dataset."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer import TokenGrid, Tokenizer
from tokenizer.files import MANIFEST, atomic_folder, folders_aside, read_json

from ..config import UserError
from ..jobs import Job, Piece
from ..jobs.pieces import cut as cut_rows
from .meta import META, TOKENS, Meta, check_count, manifest_hash, seal
from .shards import ONE_FILE, ROWS_PER_SHARD, bytes_per_row, map_shard, shard_names, write_shard

PIECES = 64  # of a split, if it is not too large or too small: many processes share them, and little is made twice


def cut(split: str, first: int, rows: int, batch_size: int, rows_per_shard: int | None) -> list[Piece]:
    """Rows `first` to `rows` in pieces, the same for any number of processes; None: by the size of the split."""
    size = rows_per_shard
    if size is None:
        batches = -(-(rows - first) // (PIECES * batch_size))  # whole batches, so that no small ones are encoded
        size = min(max(1, batches) * batch_size, max(ROWS_PER_SHARD, batch_size))
    return cut_rows(split, first, rows, size)


@dataclass(frozen=True)
class TokenShard:
    """A file that becomes part of the dataset: where it is now, its number of rows, and its manifest entry."""

    path: Path
    rows: int
    entry: dict[str, Any]


class EncodeJob(Job):
    """An encode of these pieces into the dataset `out`.

    missing = job.begin()           # on one process
    job.keep_rows(piece, ...)       # for each missing one, on any process
    job.publish(...)                # on one process, when all are kept
    """

    verb, title = "encode", "an encode"

    def __init__(self, out: Path, grid: TokenGrid, pieces: list[Piece], depends_on: dict[str, Any]) -> None:
        """depends_on: all that the rows depend on, to the bit."""
        super().__init__(out, pieces, depends_on)
        self.grid = grid

    def keep_rows(self, piece: Piece, tokens: Tensor, labels: Tensor | None) -> None:
        """Write a piece as a shard of the dataset."""
        self.enter(piece, write_shard(self.work / piece.name, tokens, labels, self.grid))

    def sizes(self, before: dict[str, list[int]], merge: bool) -> dict[str, list[int]]:
        """The rows of each file of each split, after those that were there `before`; see `publish`. Raises `UserError`
        for more files than a dataset may have."""
        found = {split: list(sizes) for split, sizes in before.items()}
        for piece in self.pieces:
            found.setdefault(piece.split, []).append(piece.rows)
        if merge:
            small = {split for split, sizes in found.items() if sum(sizes) * bytes_per_row(self.grid) <= ONE_FILE}
            found = {split: [sum(sizes)] if split in small else sizes for split, sizes in found.items()}
        try:
            check_count(sum(map(len, found.values())))
        except ValueError as error:
            raise UserError(str(error)) from error
        return found

    def publish(self, meta: Meta, before: dict[str, list[TokenShard]], tokenizer: Tokenizer, merge: bool) -> Meta:
        """Give the dataset of all pieces, after the shards that were there `before`, its name in one step; what was
        there is replaced, and the work folder goes. merge: a split below 64 MiB becomes one file. Returns its meta.

        Files are linked, not copied, where the disk can. Raises `UserError` for a piece that cannot be seen from here.
        """
        splits = {split: list(shards) for split, shards in before.items()}
        for piece in self.pieces:
            splits.setdefault(piece.split, []).append(self._shard(piece))
        sizes = self.sizes({split: [shard.rows for shard in shards] for split, shards in before.items()}, merge)
        meta = replace(meta, shards=sizes)
        with atomic_folder(self.out, kind=TOKENS) as target:
            entries = {}
            for split, shards in splits.items():
                names = shard_names(split, len(sizes[split]))
                if len(names) < len(shards):
                    entries[names[0]] = _merged(target / names[0], shards, meta.grid)
                    continue
                for name, shard in zip(names, shards, strict=True):
                    _link(shard.path, target / name)
                    entries[name] = shard.entry
            seal(target, meta, tokenizer, entries)
        shutil.rmtree(self.work)
        return meta

    def _shard(self, piece: Piece) -> TokenShard:
        return TokenShard(self.work / piece.name, piece.rows, self.entry(piece))


def _merged(path: Path, shards: list[TokenShard], grid: TokenGrid) -> dict[str, Any]:
    parts = [map_shard(shard.path, shard.rows, grid) for shard in shards]
    labels = [labels for _, labels in parts if labels is not None]
    return write_shard(path, torch.cat([tokens for tokens, _ in parts]), torch.cat(labels) if labels else None, grid)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copyfile(source, target)


def shards_of(out: Path, meta: Meta) -> dict[str, list[TokenShard]]:
    """The files of a dataset's splits."""
    entries = read_json(out / MANIFEST)["files"]
    return {
        split: [
            TokenShard(out / name, rows, entries[name])
            for name, rows in zip(shard_names(split, len(sizes)), sizes, strict=True)
        ]
        for split, sizes in meta.shards.items()
    }


def recover(out: Path) -> None:
    """Tidy up after a process that was killed at the very end: give a dataset that was being replaced its name back,
    and drop pieces that have been added to it."""
    lost = folders_aside(out)
    if not out.exists() and len(lost) == 1 and (lost[0] / META).is_file():
        lost[0].rename(out)
    added_to = (EncodeJob.unfinished(out) or {}).get("added_to")
    if added_to is not None and (not (out / MANIFEST).is_file() or manifest_hash(out) != added_to):
        shutil.rmtree(EncodeJob.work_folder(out))
