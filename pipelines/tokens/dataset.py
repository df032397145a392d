"""A token dataset: the ids of a data set's images, their labels, and the tokenizer that made them, in one folder.

meta.json              grid, vocabulary, classes, rows of each file, source, augmentations, tokenizer fingerprint
train.safetensors      tokens (n, *grid.shape) in the smallest unsigned type, labels (n,); a larger split is many files,
test.safetensors       train-00000-of-00016.safetensors and so on
tokenizer/             the tokenizer, so that ids can become images again
job.json               what `pipelines.encode` made it of; not in one that `TokenDataset.save` wrote
manifest.json          sha256 and size of every file, written last

A small dataset is read into memory, a large one is mapped: its rows are read from the disk as they are asked for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenizer import TokenGrid, Tokenizer
from tokenizer.files import (
    FormatError,
    IntegrityError,
    PathError,
    atomic_folder,
    find_folder,
    read_folder,
)

from ..hub import is_reachable, push_folder, require_reachable
from ..images.origin import shareable
from .meta import META, TOKENS, Meta, check_labels, check_meta, manifest_hash, read_meta, verify_files, write_meta
from .shards import MappedRows, TokenSplit, bytes_per_row, cut_shards, map_shard, shard_names, write_shard
from .tables import from_tables, to_tables

if TYPE_CHECKING:
    import datasets

IN_MEMORY = 256 << 20  # bytes of tokens that are read into memory
HASHED = 2 << 30  # bytes of tokens that are hashed when they are loaded, in about two seconds


@dataclass(frozen=True)
class TokenDataset:
    """What `pipelines.encode` wrote and `pipelines.train_prior` reads.

    `source`: facts about the images. `augmentations`: further variants of each training image, which are rows after all
    images as they are. `digest`: sha256 of the manifest, hence of every file, where it was loaded.
    """

    grid: TokenGrid
    class_names: list[str]
    splits: dict[str, TokenSplit]
    tokenizer: Tokenizer
    source: dict[str, Any]
    augmentations: int = 0
    digest: str = ""

    @property
    def num_classes(self) -> int:
        """0 when the source has no labels."""
        return len(self.class_names)

    def save(self, folder: str | Path, rows_per_shard: int | None = None) -> None:
        """Write everything; the folder appears whole or not at all, and replaces an older token dataset.

        rows_per_shard: of a file; None: chosen by the size of the split, see `cut_shards`. Raises `PathError` if
        something else is there, `ValueError` for ids out of range, and a `PipelineLoadError` for what could not be
        loaded again: names of splits or classes that cannot be used, and labels that are no class.
        """
        shards = cut_shards({name: len(split) for name, split in self.splits.items()}, rows_per_shard)
        fingerprint = self.tokenizer.fingerprint()
        meta = Meta(self.grid, self.class_names, shards, self.source, self.augmentations, fingerprint)
        check_meta(meta, Path(META))
        for name, split in self.splits.items():
            check_labels(Path(name), split.labels, self.num_classes)
        with atomic_folder(folder, kind=TOKENS) as target:
            for name, split in self.splits.items():
                sizes = shards[name]
                for file, size, stop in zip(shard_names(name, len(sizes)), sizes, accumulate(sizes), strict=True):
                    rows = slice(stop - size, stop)
                    labels = None if split.labels is None else split.labels[rows]
                    write_shard(target / file, split.tokens[rows], labels, self.grid)
            write_meta(target, meta, self.tokenizer)

    def to_datasets(self) -> datasets.DatasetDict:
        """The rows as tables of `datasets`, one for each split: `tokens` of the grid's shape in the smallest unsigned
        type, and `label`, a `ClassLabel`, where there are classes. In memory."""
        return to_tables(self.splits, self.grid, self.class_names)

    @classmethod
    def from_datasets(
        cls,
        tables: Mapping[Any, Any],
        tokenizer: Tokenizer,
        *,
        tokens: str = "tokens",
        label: str | None = "label",
        source: dict[str, Any] | None = None,
    ) -> TokenDataset:
        """Tables of `datasets` by split (training asks for `train` and `test`), such as `to_datasets` or a `map` of
        `pipe.encode` makes, as a dataset that `save` writes and `train_prior` reads.

        tokens, label: names of the columns; the label's is a `ClassLabel`, and None, or no such column, means no
        classes. source: facts about the images. Raises `UserError` for ids that are not `tokenizer`'s, and for labels
        without names.
        """
        splits, class_names = from_tables(tables, tokenizer, tokens, label)
        return cls(tokenizer.grid, class_names, splits, tokenizer, source or {})

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload token dataset",
    ) -> Any:
        """Create the Hub dataset if needed and upload this: the files that `save` writes, in one commit.

        Names of local folders of images are left out. Files of an earlier token dataset go, those of others stay.
        revision: the branch to write to. Returns huggingface_hub's `CommitInfo`. Raises `PushError`, an `OSError`, with
        the reason in one line.
        """
        require_reachable(repo_id)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "dataset"
            replace(self, source=shareable(self.source)).save(folder)
            return push_folder(
                folder,
                repo_id,
                repo_type="dataset",
                token=token,
                private=private,
                revision=revision,
                commit_message=commit_message,
            )


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
    folder = Path(source)
    if not os.path.isdir(source):
        local_files_only = local_files_only or not is_reachable()  # a mistyped folder's name should not have to wait
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        try:
            folder = find_folder(source, ["*.json", "*.safetensors", "tokenizer/*"], repo_type="dataset", **options)
        except PathError as error:
            raise PathError(f"{error}; make a token dataset with `smalti encode`") from error
    return read_folder(folder, lambda: _read_dataset(folder, verify, mapped))


def _read_dataset(folder: Path, verify: bool | None, mapped: bool | None) -> TokenDataset:
    meta = read_meta(folder)
    size = sum(sum(counts) for counts in meta.shards.values()) * bytes_per_row(meta.grid)
    verify_files(folder, meta, whole=size <= HASHED if verify is None else verify)
    tokenizer: Tokenizer = Tokenizer.load_folder(folder / "tokenizer")
    if tokenizer.fingerprint() != meta.tokenizer:
        raise IntegrityError(
            f"{folder / 'tokenizer'}: not the tokenizer that made these tokens (its fingerprint differs)"
        )
    if tokenizer.grid != meta.grid:
        raise IntegrityError(f"{folder / META}: grid {meta.grid} is not the tokenizer's, {tokenizer.grid}")
    mapped = size > IN_MEMORY if mapped is None else mapped
    splits = {name: _load_split(folder, name, meta, mapped) for name in meta.shards}
    facts = meta.source, meta.augmentations, manifest_hash(folder)
    return TokenDataset(tokenizer.grid, meta.class_names, splits, tokenizer, *facts)


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
