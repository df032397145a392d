"""`meta.json`: what a token dataset holds, every field checked."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenizer import TokenGrid, Tokenizer
from tokenizer.files.errors import FormatError, IntegrityError, PathError
from tokenizer.files.ownership import Kind
from tokenizer.files.reading import MANIFEST, Folder
from tokenizer.files.writing import write_json

from .shards import MAX_SHARDS, shard_names

META, FORMAT_VERSION = "meta.json", 2
TOKENS = Kind("a token dataset", META, lambda meta: {"format_version", "grid", "splits", "classes"} <= set(meta))
ONE_FILE_VERSION = 1  # what earlier versions wrote, and what datasets of one file per split still are


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


def check_labels(path: Path, labels: Tensor | None, num_classes: int) -> None:
    """Raise `FormatError` for labels that are missing, `IntegrityError` for those that are no class."""
    if num_classes and labels is None:
        raise FormatError(f"{path}: labels: missing, though there are {num_classes} classes")
    if labels is not None and len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise IntegrityError(
            f"{path}: labels should lie in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}"
        )
