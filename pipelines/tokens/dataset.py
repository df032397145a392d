"""A token dataset: the token ids of images, their labels, and the tokenizer that made them, in one folder.

meta.json              grid, vocabulary, classes, rows of each file, source, augmentations, tokenizer fingerprint
train.safetensors      tokens (n, *grid.shape) in the smallest unsigned type, labels (n,); a large split has many files:
test.safetensors       train-00000-of-00016.safetensors and so on
tokenizer/             the tokenizer, which decodes the ids
conditions/NAME/       the tokenizer of the grid column NAME, if it is another one; columns lie in the files of splits
job.json               the settings of `pipelines.encode`; missing if `TokenDataset.save` wrote the folder
manifest.json          sha256 and size of every file, written last

The tokens of a `stochastic` split are grey values, uint8 (n, *grid.shape, k): the chances of each binary digit of an
id, lowest first, to be 1. The ids are sampled on access.

A small dataset is read into memory. A large one is memory-mapped, and rows are read from the disk on access."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prior.columns import LABEL, Column
from prior.given import Given
from tokenizer import TokenGrid, Tokenizer
from tokenizer.files import FormatError, IntegrityError, PathError, atomic_folder, find_folder, read_folder

from ..frequencies import Frequencies
from ..hub import is_reachable, push_folder, require_reachable
from ..images.origin import shareable
from .meta import (
    CONDITIONS,
    META,
    TOKEN_FOLDER,
    Meta,
    check_meta,
    check_tokenizers,
    class_names,
    manifest_hash,
    read_meta,
    verify_files,
    write_meta,
)
from .shards import (
    MappedRows,
    TokenSplit,
    bytes_per_row,
    check_ids,
    check_labels,
    cut_shards,
    join_columns,
    map_shard,
    pack_columns,
    shard_names,
    stored_grid,
    write_shard,
)
from .tables import from_tables, to_tables

if TYPE_CHECKING:
    import datasets

IN_MEMORY = 256 << 20  # largest dataset that is read into memory, in bytes of tokens
FILES = ["*.json", "*.jsonl", "*.safetensors", "tokenizer/*", f"{CONDITIONS}/*/*"]
HASHED = 2 << 30  # largest dataset that is hashed on loading (about two seconds), in bytes of tokens


@dataclass(frozen=True)
class TokenDataset:
    """Tokens of images by split, written by `pipelines.encode` and read by `pipelines.train_prior`.

    `source`: facts about the images. `augmentations`: extra variants of each training image; their rows follow those of
    the unchanged images (of a stream, those of its shard). `columns`: of all splits, the class first, as `label`;
    `condition_tokenizers`: of the grids among them; `condition_sources`: facts about the origin of each. Of a folder
    that was loaded, `frequencies`: how often the classes occur in training; `digest`: sha256 of the manifest, and so of
    every file."""

    grid: TokenGrid
    columns: Mapping[str, Column]
    splits: dict[str, TokenSplit]
    tokenizer: Tokenizer
    source: dict[str, Any]
    augmentations: int = 0
    digest: str = ""
    condition_tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)
    condition_sources: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    frequencies: Frequencies = Frequencies()

    @property
    def class_names(self) -> list[str]:
        return class_names(self.columns)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def of_columns(self, columns: Mapping[str, Column]) -> TokenDataset:
        splits = {name: split.of_columns(columns) for name, split in self.splits.items()}
        tokenizers = {name: one for name, one in self.condition_tokenizers.items() if name in columns}
        counted = self.frequencies.of_columns(columns)
        return replace(self, columns=columns, splits=splits, condition_tokenizers=tokenizers, frequencies=counted)

    def save(self, folder: str | Path, rows_per_shard: int | None = None) -> None:
        """Write the folder atomically; replace an older token dataset.

        rows_per_shard: rows per file; None: chosen by the size of the split, see `cut_shards`. Raises `PathError` if
        the folder holds something else, `ValueError` for ids out of range, and a `PipelineLoadError` for anything that
        could not be loaded again: invalid names of splits, classes or columns, labels out of range, missing columns."""
        shards = cut_shards({name: len(split) for name, split in self.splits.items()}, rows_per_shard)
        fingerprint = self.tokenizer.fingerprint()
        stochastic = [name for name, split in self.splits.items() if split.stochastic]
        facts = shards, self.source, self.augmentations, fingerprint
        meta = Meta(self.grid, self.columns, *facts, dict(self.condition_sources), stochastic)
        check_meta(meta, Path(META))
        check_tokenizers(meta, self.condition_tokenizers, CONDITIONS)
        for name, split in self.splits.items():
            check_labels(Path(name), split.given.rows.get(LABEL), self.columns.get(LABEL))
        with atomic_folder(folder, kind=TOKEN_FOLDER) as target:
            for name, split in self.splits.items():
                sizes, grid = shards[name], stored_grid(self.grid, split.stochastic)
                for file, size, stop in zip(shard_names(name, len(sizes)), sizes, accumulate(sizes), strict=True):
                    rows = slice(stop - size, stop)
                    try:
                        packed = pack_columns(self.columns, split.given, rows)
                    except ValueError as error:
                        raise FormatError(f"{name}: {error}") from error
                    write_shard(target / file, split.tokens[rows], grid, packed)
            write_meta(target, meta, self.tokenizer, self.condition_tokenizers)

    def to_datasets(self) -> datasets.DatasetDict:
        """Return one in-memory table of `datasets` for each split: `tokens` of the grid's shape in the smallest
        unsigned type, and each column by its name: a `ClassLabel`, a list of flags, numbers, or ids in which -1 is
        null; None is null. Stochastic tokens become a fixed sample."""
        return to_tables(self.splits, self.grid, self.columns)

    @classmethod
    def from_datasets(
        cls,
        tables: Mapping[Any, Any],
        tokenizer: Tokenizer,
        *,
        tokens: str = "tokens",
        label: str | None = "label",
        source: dict[str, Any] | None = None,
        columns: Mapping[str, Column] | None = None,
        condition_tokenizers: Mapping[str, Tokenizer] | None = None,
    ) -> TokenDataset:
        """Convert tables of `datasets` by split (training needs `train` and `test`), made by `to_datasets` or by a
        `map` of `pipe.encode`, to a dataset for `save` and `train_prior`.

        tokens, label: names of the columns; the label is a `ClassLabel`, and None, or a missing column, means no
        classes. source: facts about the images. columns: the others to read, by their names in the table; a label
        among them is ignored. condition_tokenizers: those of grids. Raises `UserError` for ids that do not fit
        `tokenizer`, for labels without class names, and for values that a column does not allow."""
        others = {name: column for name, column in (columns or {}).items() if name != LABEL}
        splits, found = from_tables(tables, tokenizer, tokens, label, others)
        tokenizers = dict(condition_tokenizers or {})
        return cls(tokenizer.grid, found, splits, tokenizer, source or {}, condition_tokenizers=tokenizers)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload token dataset",
    ) -> Any:
        """Create the Hub dataset if needed, and upload the files that `save` writes in one commit.

        Paths of local images are removed. Files of an earlier token dataset are deleted, other files stay.
        revision: the branch to write to. Returns huggingface_hub's `CommitInfo`. Raises `PushError`, an `OSError`, with
        the reason in one line."""
        require_reachable(repo_id)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "dataset"
            sources = {name: shareable(facts) for name, facts in self.condition_sources.items()}
            replace(self, source=shareable(self.source), condition_sources=sources).save(folder)
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
    """Load and check a token dataset from a folder, or from the Hub, where it is downloaded once and cached.

    verify: hash every file. None hashes datasets of up to 2 GiB of tokens; for larger ones it compares the shards by
    size, and ids are checked when they are read (`smalti verify` hashes everything). mapped: leave tokens on the disk,
    shared by all processes; None does so above 256 MiB. revision: a branch, tag or commit of the Hub. Raises a
    `PipelineLoadError` if a file is missing or changed, ids do not fit the grid, labels are out of range, or the
    tokenizer is not the one that made the ids."""
    folder = Path(source)
    if not os.path.isdir(source):
        local_files_only = local_files_only or not is_reachable()  # fail fast on a mistyped folder
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        try:
            folder = find_folder(source, FILES, repo_type="dataset", **options)
        except PathError as error:
            raise PathError(f"{error}; make a token dataset with `smalti encode`") from error
    return read_folder(folder, lambda: _read_dataset(folder, verify, mapped))


def _read_dataset(folder: Path, verify: bool | None, mapped: bool | None) -> TokenDataset:
    meta = read_meta(folder)
    size = sum(sum(counts) for counts in meta.shards.values()) * bytes_per_row(meta.grid, meta.columns)
    verify_files(folder, meta, whole=size <= HASHED if verify is None else verify)
    tokenizer: Tokenizer = Tokenizer.load_folder(folder / "tokenizer")
    if tokenizer.fingerprint() != meta.tokenizer:
        raise IntegrityError(f"{folder / 'tokenizer'}: not the tokenizer that made these tokens (fingerprints differ)")
    if tokenizer.grid != meta.grid:
        raise IntegrityError(f"{folder / META}: grid {meta.grid} differs from the tokenizer's, {tokenizer.grid}")
    own = {name: Tokenizer.load_folder(folder / CONDITIONS / name) for name in meta.own_tokenizers()}
    tokenizers = {name: own.get(name, tokenizer) for name, fingerprint in meta.grids().items() if fingerprint}
    check_tokenizers(meta, tokenizers, folder / CONDITIONS)
    mapped = size > IN_MEMORY if mapped is None else mapped
    splits = {name: _load_split(folder, name, meta, mapped) for name in meta.shards}
    facts = meta.source, meta.augmentations, manifest_hash(folder)
    return TokenDataset(
        tokenizer.grid,
        meta.columns,
        splits,
        tokenizer,
        *facts,
        condition_tokenizers=tokenizers,
        condition_sources=meta.condition_sources,
        frequencies=Frequencies.load(folder, meta.columns),
    )


def _load_split(folder: Path, split: str, meta: Meta, mapped: bool) -> TokenSplit:
    paths = [folder / name for name in shard_names(split, len(meta.shards[split]))]
    grid, files = stored_grid(meta.grid, split in meta.stochastic), list[dict[str, Tensor]]()
    for path, rows in zip(paths, meta.shards[split], strict=True):
        files.append(map_shard(path, rows, grid, meta.columns))
        if not mapped:
            try:
                grid.check(files[-1]["tokens"].to(torch.int32))
            except ValueError as error:
                raise IntegrityError(f"{path}: {error}") from error
    tokens = [file["tokens"] for file in files]
    found = MappedRows(tokens, partial(check_ids, grid.vocab_size), folder) if mapped else torch.cat(tokens)
    given = Given(meta.columns, join_columns(files, meta.columns, folder, mapped), len(found))
    return TokenSplit(found, given, split in meta.stochastic)
