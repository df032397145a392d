"""A token dataset: the ids of a data set's images, their labels, and the tokenizer that made them, in one folder.

meta.json              grid, vocabulary, classes, rows of each file, source, augmentations, tokenizer fingerprint
train.safetensors      tokens (n, *grid.shape) in the smallest unsigned type, labels (n,); a large split is many files,
test.safetensors       train-00000.safetensors and so on
tokenizer/             the tokenizer, so that ids can become images again
manifest.json          sha256 and size of every file, written last

A small dataset is read into memory, a large one is mapped: its rows are read from the disk as they are asked for.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer import TokenGrid, Tokenizer
from tokenizer.reading import steadily
from tokenizer.storage import (
    MANIFEST,
    Folder,
    FormatError,
    IntegrityError,
    Kind,
    PathError,
    atomic_folder,
    write_json,
)

from .shards import (
    MAX_SHARDS,
    Indices,
    MappedRows,
    bytes_per_row,
    map_shard,
    shard_names,
    smallest_type,
    spans,
    write_shard,
)

__all__ = ["META", "Meta", "TokenDataset", "TokenSplit", "load_tokens", "read_meta", "seal", "smallest_type"]

META, FORMAT_VERSION = "meta.json", 2
TOKENS = Kind("a token dataset", META, lambda meta: {"format_version", "grid", "splits", "classes"} <= set(meta))
ONE_FILE_VERSION = 1  # what earlier versions wrote, and what datasets of one file per split still are
IN_MEMORY = 256 << 20  # bytes of tokens that are read into memory
HASHED = 2 << 30  # bytes of tokens that are hashed when they are loaded, in about two seconds


@dataclass(frozen=True)
class TokenSplit:
    """Rows of one split: `tokens` (n, *grid.shape) in a small unsigned type, in memory or on the disk; `labels` (n,)
    int64, or None."""

    tokens: Tensor | MappedRows
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, indices: Indices) -> Tensor:
        """Tokens `(B, *grid.shape)` int64 of the rows asked for; raises `IndexError` for one that is not there."""
        if isinstance(self.tokens, MappedRows) or isinstance(indices, slice):
            return self.tokens[indices].long()
        if self.tokens.device.type != "cpu":
            return self.tokens[torch.as_tensor(indices)].long()
        return torch.from_numpy(self.tokens.numpy()[np.asarray(indices)].astype(np.int64))


@dataclass(frozen=True)
class Meta:
    """What `meta.json` says. `shards`: the rows of each file of each split, in order."""

    grid: TokenGrid
    class_names: list[str]
    shards: dict[str, list[int]]
    source: dict[str, Any]
    augmentations: int
    tokenizer: str
    parts: list[dict[str, Any]] = field(default_factory=list)

    def files(self) -> list[str]:
        """The names of all shards."""
        return [name for split, sizes in self.shards.items() for name in shard_names(split, len(sizes))]

    def to_dict(self) -> dict[str, Any]:
        """As it is written; datasets of one file per split stay readable by earlier versions."""
        one_file = all(len(sizes) == 1 for sizes in self.shards.values())
        return {
            "format_version": ONE_FILE_VERSION if one_file else FORMAT_VERSION,
            "grid": {"shape": list(self.grid.shape), "vocab_size": self.grid.vocab_size},
            "classes": self.class_names,
            "splits": {name: sizes[0] if one_file else sizes for name, sizes in self.shards.items()},
            "source": self.source,
            "augmentations": self.augmentations,
            "tokenizer": self.tokenizer,
            **({"parts": self.parts} if self.parts else {}),
        }


@dataclass(frozen=True)
class TokenDataset:
    """What `pipelines.encode` wrote and `pipelines.train_prior` reads.

    `parts`: which images became rows, and how, in the order in which they were added.
    """

    grid: TokenGrid
    class_names: list[str]
    splits: dict[str, TokenSplit]
    tokenizer: Tokenizer
    source: dict[str, Any]
    augmentations: int = 0
    parts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        """0 when the source has no labels."""
        return len(self.class_names)

    def meta(self, shards: dict[str, list[int]]) -> Meta:
        """What `meta.json` is to say of files of these rows."""
        return Meta(
            self.grid,
            self.class_names,
            shards,
            self.source,
            self.augmentations,
            self.tokenizer.fingerprint(),
            self.parts,
        )

    def save(self, folder: str | Path, rows_per_shard: int | None = None) -> None:
        """Write everything; the folder appears whole or not at all. rows_per_shard: of a file; None: one file for a
        split below 64 MiB. Raises `PathError` if something else is there, `ValueError` for ids out of range."""
        cuts = {name: spans(len(split), self.grid, rows_per_shard) for name, split in self.splits.items()}
        check_count(sum(map(len, cuts.values())))
        with atomic_folder(folder, kind=TOKENS) as target:
            entries = {}
            for split, parts in cuts.items():
                tokens, labels = self.splits[split].tokens, self.splits[split].labels
                for name, (start, stop) in zip(shard_names(split, len(parts)), parts, strict=True):
                    some = None if labels is None else labels[start:stop]
                    entries[name] = write_shard(target / name, tokens[start:stop], some, self.grid)
            sizes = {name: [stop - start for start, stop in parts] for name, parts in cuts.items()}
            seal(target, self.meta(sizes), self.tokenizer, entries)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload token dataset",
    ) -> Any:
        """Create the Hub dataset if needed and upload this as parquet, which `datasets` reads too, with the tokenizer.

        In one commit, in which files of an earlier token dataset go; those of others stay. revision: the branch to
        write to. Returns huggingface_hub's `CommitInfo`. Raises `hub.PushError`, an `OSError`, with the reason in one
        line.
        """
        from .parquet import push

        return push(self, repo_id, token=token, private=private, revision=revision, commit_message=commit_message)


def check_count(shards: int) -> None:
    """Raise `ValueError` for more files than a manifest lists."""
    if shards > MAX_SHARDS:
        raise ValueError(f"rows_per_shard: makes {shards} files, at most {MAX_SHARDS} are allowed; choose a larger one")


def seal(folder: Path, meta: Meta, tokenizer: Tokenizer, entries: dict[str, dict[str, Any]]) -> None:
    """Write tokenizer, `meta.json` and last `manifest.json` beside the shards, whose manifest `entries` are known."""
    tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / META, meta.to_dict())
    small = [folder / META, *sorted((folder / "tokenizer").iterdir())]
    for path in small:
        data = path.read_bytes()
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        entries = {**entries, path.relative_to(folder).as_posix(): entry}
    write_json(folder / MANIFEST, {"files": dict(sorted(entries.items()))})


def read_meta(folder: Path) -> Meta:
    """What `meta.json` says. Raises `PathError` where there is none, `FormatError` for one of another form."""
    if not (folder / META).is_file():
        raise PathError(f"{folder}: not a token dataset (no {META}); make one with `smalti encode`")
    meta = Folder.at(folder).json(META)
    if meta.get("format_version") not in (ONE_FILE_VERSION, FORMAT_VERSION):
        raise FormatError(
            f"{folder / META}: format_version is {meta.get('format_version')!r}, this version reads {ONE_FILE_VERSION} "
            f"and {FORMAT_VERSION}"
        )
    try:
        grid = TokenGrid(tuple(meta["grid"]["shape"]), meta["grid"]["vocab_size"])
        sizes = {str(name): _counts(counts) for name, counts in meta["splits"].items()}
        found = Meta(
            grid,
            list(meta["classes"]),
            sizes,
            dict(meta["source"]),
            int(meta["augmentations"]),
            str(meta.get("tokenizer")),
            [dict(part) for part in meta.get("parts", [])],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{folder / META}: a field is missing or of the wrong kind ({error!r})") from error
    if not all(isinstance(name, str) and name.isprintable() for name in found.class_names):
        raise FormatError(f"{folder / META}: classes: expected a list of printable names")
    if strange := [name for name in sizes if not re.fullmatch(r"\w[\w-]*", name)]:
        raise FormatError(f"{folder / META}: splits: {strange[0][:80]!r} is not a name (letters, digits, _ and -)")
    return found


def _counts(value: Any) -> list[int]:
    counts = value if isinstance(value, list) else [value]
    if not counts or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"splits: expected the rows of each file, got {value!r:.80}")
    return counts


def load_tokens(
    source: str | Path,
    *,
    verify: bool | None = None,
    mapped: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> TokenDataset:
    """Read and check a token dataset: a folder, or the id of one on the Hub, fetched once and kept in the cache.

    verify: hash every file; None hashes all up to 2 GiB of tokens, and only what is small of a larger dataset, whose
    files are compared by size and whose ids are checked as they are read (`smalti verify` hashes it).
    mapped: leave tokens on the disk, shared by all processes; None does from 256 MiB on.
    revision: a branch, tag or commit of the Hub. Raises a `PipelineLoadError`: a file is missing or changed, the ids do
    not fit the grid, labels are out of range, or the tokenizer is not the one that made the ids.
    """
    from .parquet import local_folder  # which imports this module

    folder = local_folder(
        source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    return steadily(folder, lambda: _read_dataset(folder, verify, mapped))


def _read_dataset(folder: Path, verify: bool | None, mapped: bool | None) -> TokenDataset:
    meta = read_meta(folder)
    size = sum(sum(counts) for counts in meta.shards.values()) * bytes_per_row(meta.grid)
    files = verify_files(folder, meta, whole=size <= HASHED if verify is None else verify)
    tokenizer: Tokenizer = Tokenizer.read_from(files.part("tokenizer"))
    if tokenizer.fingerprint() != meta.tokenizer:
        raise IntegrityError(
            f"{folder / 'tokenizer'}: not the tokenizer that made these tokens (its fingerprint differs)"
        )
    if tokenizer.grid != meta.grid:
        raise IntegrityError(f"{folder / META}: grid {meta.grid} is not the tokenizer's, {tokenizer.grid}")
    mapped = size > IN_MEMORY if mapped is None else mapped
    splits = {name: _load_split(folder, name, meta, mapped) for name in meta.shards}
    return TokenDataset(meta.grid, meta.class_names, splits, tokenizer, meta.source, meta.augmentations, meta.parts)


def verify_files(folder: Path, meta: Meta, *, whole: bool) -> Folder:
    """Compare all files with `manifest.json`: by sha256, or, unless `whole`, the shards by their size alone."""
    files, shards = Folder.sealed(folder), set(meta.files())  # which compares the sizes
    listed = (files.manifest or {})["files"]
    if absent := sorted({META, *shards} - set(listed)):
        raise IntegrityError(f"{folder / absent[0]}: {MANIFEST} does not list it")
    if not whole:
        files.unread.difference_update(shards)
    files.read_rest()
    return files


def _load_split(folder: Path, split: str, meta: Meta, mapped: bool) -> TokenSplit:
    paths = [folder / name for name in shard_names(split, len(meta.shards[split]))]
    shards, labels = [], []
    for path, rows in zip(paths, meta.shards[split], strict=True):
        tokens, some = map_shard(path, rows, meta.grid)
        check_labels(path, some, len(meta.class_names))
        if not mapped:
            try:
                meta.grid.check(tokens.to(torch.int32))
            except ValueError as error:
                raise IntegrityError(f"{path}: {error}") from error
        shards.append(tokens)
        labels.append(some)
    known = [some for some in labels if some is not None]
    if 0 < len(known) < len(labels):
        raise FormatError(f"{folder}: labels: some files of {split!r} have them and others have not")
    found = MappedRows(shards, meta.grid, folder) if mapped else torch.cat(shards)
    return TokenSplit(found, torch.cat(known) if known else None)


def check_labels(path: Path, labels: Tensor | None, num_classes: int) -> None:
    """Raise `FormatError` for labels that are missing, `IntegrityError` for those that are no class."""
    if num_classes and labels is None:
        raise FormatError(f"{path}: labels: missing, though there are {num_classes} classes")
    if labels is not None and len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise IntegrityError(
            f"{path}: labels should lie in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}"
        )
