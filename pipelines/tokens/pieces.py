"""An encode under way: what it is to make, cut into pieces, and the pieces that are done.

The work folder `.tmp-NAME-encode` beside the dataset holds `job.json` (what the result depends on) and, for each piece
that is done, a shard and its manifest entry. Any number of processes make pieces; killed and started again they make
those that are missing. Only the finished dataset gets the name it was asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer import TokenGrid, Tokenizer
from tokenizer.files.claims import claimed
from tokenizer.files.errors import PipelineLoadError
from tokenizer.files.reading import MANIFEST, read_json
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


def work_folder(out: Path) -> Path:
    """Where the pieces of `out` are kept."""
    return out.parent / f".tmp-{out.name}-encode"


def check_job(work: Path, job: dict[str, Any]) -> None:
    """Raise `UserError` for a work folder that another job began."""
    if not (work / JOB).is_file():
        return
    old = read_json(work / JOB)
    changes = difference({**old, "data": as_saved(DataConfig, old.get("data", {}))}, json.loads(json.dumps(job)))
    if changes:
        raise UserError(
            f"out: an encode with another configuration was begun here and is not finished; give that one again, or "
            f"delete {work}. What differs:\n" + "\n".join(changes)
        )


@contextmanager
def begun(work: Path, job: dict[str, Any]) -> Iterator[None]:
    """Make the work folder, which belongs to `job` from now on, and to no other process while the block lasts. Raises
    `UserError` if one is at work in it."""
    work.mkdir(parents=True, exist_ok=True)
    with claimed(work):
        if not (work / JOB).is_file():
            write_json(work / ".job.json", job)
            (work / ".job.json").replace(work / JOB)
        yield


def entry_of(work: Path, piece: Piece) -> dict[str, Any] | None:
    """The manifest entry of a piece that is done, else None."""
    path = (work / piece.name).with_suffix(".json")
    try:
        return read_json(path) if (work / piece.name).is_file() else None
    except PipelineLoadError:  # killed while it was written
        return None


def drop_if_damaged(work: Path, piece: Piece) -> None:
    """Forget a piece whose file is not the one that was written."""
    entry = entry_of(work, piece)
    if entry is not None and hashlib.sha256((work / piece.name).read_bytes()).hexdigest() != entry.get("sha256"):
        (work / piece.name).with_suffix(".json").unlink()


def keep(work: Path, piece: Piece, tokens: Tensor, labels: Tensor | None, grid: TokenGrid) -> None:
    """Write a piece; it is done when its entry stands beside it."""
    entry = write_shard(work / piece.name, tokens, labels, grid)
    temporary = work / f".{piece.name}.json"
    write_json(temporary, entry)
    temporary.replace((work / piece.name).with_suffix(".json"))


@dataclass(frozen=True)
class Shard:
    """A file of the dataset to be, where it is now, and its manifest entry."""

    path: Path
    rows: int
    entry: dict[str, Any]


def publish(out: Path, splits: dict[str, list[Shard]], meta: Meta, tokenizer: Tokenizer, merge: bool) -> Meta:
    """Give the dataset of these shards its name, in one step; what was there before is replaced.

    Files are linked, not copied, where the disk can. merge: a split below 64 MiB becomes one file. Returns its meta.
    """
    small = {
        name: merge and sum(shard.rows for shard in shards) * bytes_per_row(meta.grid) <= ONE_FILE
        for name, shards in splits.items()
    }
    sizes = {
        name: [sum(shard.rows for shard in shards)] if small[name] else [shard.rows for shard in shards]
        for name, shards in splits.items()
    }
    check_count(sum(map(len, sizes.values())))
    found = Meta(meta.grid, meta.class_names, sizes, meta.source, meta.augmentations, meta.tokenizer, meta.parts)
    with atomic_folder(out, kind=TOKENS) as target:
        entries = {}
        for split, shards in splits.items():
            names = shard_names(split, len(sizes[split]))
            if small[split] and len(shards) > 1:
                entries[names[0]] = _merged(target / names[0], shards, meta.grid)
                continue
            for name, shard in zip(names, shards, strict=True):
                _link(shard.path, target / name)
                entries[name] = shard.entry
        seal(target, found, tokenizer, entries)
    return found


def _merged(path: Path, shards: list[Shard], grid: TokenGrid) -> dict[str, Any]:
    parts = [map_shard(shard.path, shard.rows, grid) for shard in shards]
    labels = [labels for _, labels in parts if labels is not None]
    return write_shard(path, torch.cat([tokens for tokens, _ in parts]), torch.cat(labels) if labels else None, grid)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copyfile(source, target)


def made(work: Path, piece: Piece) -> Shard:
    """A piece that is done. Raises `UserError` where it is not to be seen from here."""
    entry = entry_of(work, piece)
    if entry is None:
        raise UserError(f"out: {work / piece.name} is not there; all processes have to see the same disk")
    return Shard(work / piece.name, piece.stop - piece.start, entry)


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
    work = work_folder(out)
    added_to = read_json(work / JOB).get("added_to") if (work / JOB).is_file() else None
    if added_to is not None and (not (out / MANIFEST).is_file() or manifest_hash(out) != added_to):
        shutil.rmtree(work)
