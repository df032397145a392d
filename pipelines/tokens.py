"""A token dataset: the ids of a data set's images, their labels, and the tokenizer that made them, in one folder.

meta.json              grid, vocabulary, classes, splits, source, augmentations, tokenizer fingerprint
train.safetensors      tokens (n, *grid.shape) in the smallest unsigned type, labels (n,)
test.safetensors
tokenizer/             the tokenizer, so that ids can become images again
manifest.json          sha256 and size of every file, written last
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenizer import TokenGrid, Tokenizer
from tokenizer.storage import (
    FormatError,
    IntegrityError,
    PathError,
    atomic_folder,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
)

META, FORMAT_VERSION = "meta.json", 1


@dataclass(frozen=True)
class TokenSplit:
    """Rows of one split: `tokens` (n, *grid.shape) in a small unsigned type; `labels` (n,) int64, or None."""

    tokens: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TokenDataset:
    """What `pipelines.encode` wrote and `pipelines.train_prior` reads, whole in memory."""

    grid: TokenGrid
    class_names: list[str]
    splits: dict[str, TokenSplit]
    tokenizer: Tokenizer
    source: dict[str, Any]
    augmentations: int = 0

    @property
    def num_classes(self) -> int:
        """0 when the source has no labels."""
        return len(self.class_names)

    def save(self, folder: str | Path) -> None:
        """Write everything; the folder appears whole or not at all. Raises `PathError` if something else is there."""
        meta = {
            "format_version": FORMAT_VERSION,
            "grid": {"shape": list(self.grid.shape), "vocab_size": self.grid.vocab_size},
            "classes": self.class_names,
            "splits": {name: len(split) for name, split in self.splits.items()},
            "source": self.source,
            "augmentations": self.augmentations,
            "tokenizer": self.tokenizer.fingerprint(),
        }
        with atomic_folder(folder, marker=META) as target:
            for name, split in self.splits.items():
                tensors = {"tokens": split.tokens.to(smallest_type(self.grid.vocab_size)).contiguous()}
                if split.labels is not None:
                    tensors["labels"] = split.labels.long().contiguous()
                save_file(tensors, target / f"{name}.safetensors")
            self.tokenizer.save_pretrained(target / "tokenizer")
            write_json(target / META, meta)
            write_manifest(target)


def smallest_type(vocab_size: int) -> torch.dtype:
    """The smallest unsigned integer type that holds ids below `vocab_size`."""
    return torch.uint8 if vocab_size <= 1 << 8 else torch.uint16 if vocab_size <= 1 << 16 else torch.uint32


def load_tokens(folder: str | Path) -> TokenDataset:
    """Read and check a token dataset. Raises a `PipelineLoadError`: a file is missing or changed, the ids do not fit
    the grid, labels are out of range, or the tokenizer is not the one that made the ids."""
    folder = Path(folder)
    if not (folder / META).is_file():
        raise PathError(f"{folder}: not a token dataset (no {META}); make one with `smalti encode`")
    verify_manifest(folder)
    meta = read_json(folder / META)
    if meta.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{folder / META}: format_version is {meta.get('format_version')!r}, this version reads {FORMAT_VERSION}"
        )
    try:
        grid = TokenGrid(tuple(meta["grid"]["shape"]), meta["grid"]["vocab_size"])
        names, source, augmentations = list(meta["classes"]), dict(meta["source"]), int(meta["augmentations"])
        sizes = {str(name): int(size) for name, size in meta["splits"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{folder / META}: a field is missing or of the wrong kind ({error!r})") from error
    if not all(isinstance(name, str) for name in names):
        raise FormatError(f"{folder / META}: classes: expected a list of names")
    if strange := [name for name in sizes if not re.fullmatch(r"\w[\w-]*", name)]:
        raise FormatError(f"{folder / META}: splits: {strange[0][:80]!r} is not a name (letters, digits, _ and -)")
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    if tokenizer.fingerprint() != meta.get("tokenizer"):
        raise IntegrityError(
            f"{folder / 'tokenizer'}: not the tokenizer that made these tokens (its fingerprint differs)"
        )
    if tokenizer.grid != grid:
        raise IntegrityError(f"{folder / META}: grid {grid} is not the tokenizer's, {tokenizer.grid}")
    splits = {name: _load_split(folder / f"{name}.safetensors", grid, len(names), size) for name, size in sizes.items()}
    return TokenDataset(grid, names, splits, tokenizer, source, augmentations)


def _load_split(path: Path, grid: TokenGrid, num_classes: int, size: int) -> TokenSplit:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise FormatError(f"{path}: missing, or not a readable safetensors file ({error})") from error
    tokens, labels = tensors.get("tokens"), tensors.get("labels")
    if tokens is None or tokens.shape[:1] != (size,) or tokens.dtype != smallest_type(grid.vocab_size):
        raise FormatError(f"{path}: tokens: should hold {size} rows of {smallest_type(grid.vocab_size)}")
    if labels is not None and (labels.shape != (size,) or labels.dtype != torch.int64):
        raise FormatError(f"{path}: labels: should be {size} numbers of type int64, one per row of tokens")
    try:
        grid.check(tokens.to(torch.int32))
    except ValueError as error:
        raise IntegrityError(f"{path}: {error}") from error
    if num_classes and labels is None:
        raise FormatError(f"{path}: labels: missing, though there are {num_classes} classes")
    if labels is not None and len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise IntegrityError(
            f"{path}: labels should lie in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}"
        )
    return TokenSplit(tokens, labels)
