"""A token dataset as parquet, which `datasets` reads: written for the Hub, fetched from it, and unpacked once.

README.md                         what `datasets.load_dataset` needs to know, and a card
data/train-00000-of-00003.parquet columns `tokens` (N ids of an image in raster order) and `label` (a class)
meta.json  tokenizer/             as in a token dataset, so that nothing is lost on the way
manifest.json                     sha256 and size of every file, checked when it is unpacked
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenizer import TokenGrid, Tokenizer
from tokenizer.files import (
    MANIFEST,
    MAX_JSON_BYTES,
    FormatError,
    IntegrityError,
    PathError,
    atomic_folder,
    find_folder,
    is_file,
    read_bytes,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
)

from ..config import UserError
from ..hub import is_reachable, push_folder, require_reachable
from ..images.origin import shareable
from .meta import META, TOKENS, Meta, check_labels, read_meta, seal
from .shards import ROWS_PER_SHARD, TokenSplit, bytes_per_row, chunks, shard_names, smallest_type, write_shard

if TYPE_CHECKING:
    import datasets

LAYOUT = "parquet"
FILE_BYTES = 256 << 20  # of tokens in a parquet file, before compression
Batches = Iterator[tuple[Tensor, Tensor | None]]
Splits = Mapping[str, TokenSplit]


# Written


def features_of(grid: TokenGrid, class_names: list[str]) -> datasets.Features:
    """The columns: `tokens`, a list of N small unsigned numbers, and `label`, where there are classes."""
    import datasets

    kind = str(smallest_type(grid.vocab_size)).removeprefix("torch.")
    columns: dict[str, Any] = {"tokens": datasets.List(datasets.Value(kind), length=len(grid))}
    if class_names:
        columns["label"] = datasets.ClassLabel(names=class_names)
    return datasets.Features(columns)


def write_parquet(meta: Meta, splits: Splits, tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a dataset as parquet, without the names of local folders of images; the folder appears whole or not at
    all. Raises `PathError` if something else is there, `UserError` for a split whose name `datasets` does not take."""
    if strange := [name for name in splits if not re.fullmatch(r"\w+", name)]:
        raise UserError(f"splits: the Hub takes names of letters, digits and _, not {strange[0]!r}")
    with atomic_folder(folder, kind=TOKENS) as target:
        (target / "data").mkdir()
        for name, split in splits.items():
            _write_split(target / "data", name, split, meta)
        tokenizer.save_pretrained(target / "tokenizer")
        write_json(target / META, {**shared(meta).to_dict(), "layout": LAYOUT})
        (target / "README.md").write_text(card(meta, splits), encoding="utf-8")
        write_manifest(target)


def shared(meta: Meta) -> Meta:
    """What is said of a dataset, as it may be uploaded."""
    told = shareable({**meta.source, "parts": meta.parts})
    return replace(meta, parts=told.pop("parts"), source=told)


def _write_split(folder: Path, name: str, split: TokenSplit, meta: Meta) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = features_of(meta.grid, meta.class_names).arrow_schema
    per_file = max(1, FILE_BYTES // bytes_per_row(meta.grid))
    count = max(1, -(-len(split) // per_file))
    for number in range(count):
        first, last = number * per_file, min((number + 1) * per_file, len(split))
        with pq.ParquetWriter(folder / f"{name}-{number:05d}-of-{count:05d}.parquet", schema) as writer:
            for part in chunks(last - first):
                here = slice(first + part.start, first + part.stop)
                tokens = split.tokens[here].to(smallest_type(meta.grid.vocab_size)).flatten().numpy()
                columns = [pa.FixedSizeListArray.from_arrays(pa.array(tokens), len(meta.grid))]
                if split.labels is not None and meta.class_names:
                    columns.append(pa.array(split.labels[here].long().numpy()))
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def card(meta: Meta, splits: Splits) -> str:
    """The README of the Hub: which files make which split, what the columns are, how to load them."""
    files = "\n".join(f"  - split: {name}\n    path: data/{name}-*.parquet" for name in splits)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    shape = " x ".join(map(str, meta.grid.shape))
    classes = f"`label` is one of {len(meta.class_names)} classes. " if meta.class_names else ""
    return f"""---
configs:
- config_name: default
  data_files:
{files}
tags:
- smalti
---

# Image tokens

{sizes} rows. `tokens` are the {len(meta.grid)} ids of an image, below {meta.grid.vocab_size}, a grid of {shape} in
raster order, made by the tokenizer in `tokenizer/`. {classes}`meta.json` says what they were made of.

```python
from datasets import load_dataset
rows = load_dataset("OWNER/NAME")  # the columns alone

from pipelines.tokens import load_tokens
data = load_tokens("OWNER/NAME")  # with the tokenizer; or `smalti train_prior tokens=OWNER/NAME`
```
"""


def push(
    meta: Meta,
    splits: Splits,
    tokenizer: Tokenizer,
    repo_id: str,
    *,
    token: str | None,
    private: bool | None,
    revision: str | None,
    commit_message: str,
) -> Any:
    """See `TokenDataset.push_to_hub`."""
    require_reachable(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "dataset"
        write_parquet(meta, splits, tokenizer, folder)
        return push_folder(
            folder,
            repo_id,
            repo_type="dataset",
            token=token,
            private=private,
            revision=revision,
            commit_message=commit_message,
        )


# Read


def local_folder(
    source: str | Path, *, revision: str | None, token: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> Path:
    """The token dataset `source` as a folder of shards: itself, or what was fetched and unpacked into the cache."""
    folder = Path(source)
    if not os.path.isdir(source):
        local_files_only = local_files_only or not is_reachable()  # a mistyped folder's name should not have to wait
        patterns = ["meta.json", MANIFEST, "README.md", "tokenizer/*", "data/*.parquet"]
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        try:
            folder = find_folder(source, patterns, repo_type="dataset", **options)
        except PathError as error:
            raise PathError(f"{error}; make a token dataset with `smalti encode`") from error
    if not is_file(folder / META) or read_json(folder / META).get("layout") != LAYOUT:
        return folder
    return unpacked(folder, cache_dir)


def unpacked(folder: Path, cache_dir: str | Path | None) -> Path:
    """The parquet dataset in `folder` as shards in the cache, written the first time that it is asked for.

    Raises a `PipelineLoadError` for files that are missing, changed or of another form.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    name = "unnamed"
    if (folder / MANIFEST).is_file():
        name = hashlib.sha256(read_bytes(folder / MANIFEST, MAX_JSON_BYTES)).hexdigest()
    out = Path(cache_dir or constants.HF_HUB_CACHE) / "smalti-tokens" / name[:32]
    if (out / META).is_file():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(out.with_suffix(".lock")):  # of several processes, one unpacks
        if not (out / META).is_file():
            unpack(folder, out)
    return out


def unpack(folder: Path, out: Path) -> None:
    """Write the parquet dataset in `folder` as shards into `out`, all files checked."""
    files, meta = verify_manifest(folder)["files"], read_meta(folder)
    tokenizer: Tokenizer = Tokenizer.load_folder(folder / "tokenizer")
    with atomic_folder(out, kind=TOKENS) as target:
        entries = {}
        for split, sizes in meta.shards.items():
            paths = [
                folder / name for name in sorted(files) if re.fullmatch(rf"data/{split}-\d+-of-\d+\.parquet", name)
            ]
            batches = (batch for path in paths for batch in read_parquet(path, meta))
            groups = regrouped(batches, [*sizes, 1], meta)  # the last one is to be empty
            for name, size in zip([*shard_names(split, len(sizes)), ""], [*sizes, 0], strict=True):
                tokens, labels = next(groups)
                if len(tokens) != size:
                    raise FormatError(f"{folder / 'data'}: {split}: not the {sum(sizes)} rows that {META} says")
                if name:
                    check_labels(folder / "data" / split, labels, len(meta.class_names))
                    entries[name] = _written(target / name, tokens, labels, meta.grid)
        seal(target, meta, tokenizer, entries)


def _written(path: Path, tokens: Tensor, labels: Tensor | None, grid: TokenGrid) -> dict[str, Any]:
    try:
        return write_shard(path, tokens, labels, grid)
    except ValueError as error:
        raise IntegrityError(f"{path.name}: {error}") from error


def read_parquet(path: Path, meta: Meta) -> Batches:
    """Tokens `(b, *grid.shape)` and labels `(b,)` of a file, some rows at a time. Raises `FormatError`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["tokens", "label"] if meta.class_names else ["tokens"]
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:  # some rows at a time
            kinds = [file.schema_arrow.field(name).type for name in columns]
            lists = pa.types.is_fixed_size_list(kinds[0]) and pa.types.is_integer(kinds[0].value_type)
            if not lists or kinds[0].list_size != len(meta.grid):
                raise FormatError(f"{path}: tokens: expected lists of {len(meta.grid)} ids, found {kinds[0]}")
            if not all(pa.types.is_integer(kind) for kind in kinds[1:]):
                raise FormatError(f"{path}: label: expected whole numbers, found {kinds[1]}")
            for batch in file.iter_batches(ROWS_PER_SHARD, columns=columns):
                if any(column.null_count for column in (*batch.columns, batch.column(0).flatten())):
                    raise FormatError(f"{path}: a value is missing")
                tokens = torch.from_numpy(batch.column(0).flatten().to_numpy(zero_copy_only=False).copy())
                labels = torch.from_numpy(batch.column(1).to_numpy().copy()).long() if meta.class_names else None
                yield tokens.reshape(len(batch), *meta.grid.shape), labels
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: not readable as a parquet file of tokens ({error})") from error


def regrouped(batches: Batches, sizes: list[int], meta: Meta) -> Batches:
    """The same rows in batches of these sizes, as far as there are rows."""
    tokens = torch.empty(0, *meta.grid.shape, dtype=torch.int64)
    labels = torch.empty(0, dtype=torch.int64) if meta.class_names else None
    for size in sizes:
        while len(tokens) < size and (batch := next(batches, None)) is not None:
            tokens = torch.cat([tokens, batch[0]]) if len(tokens) else batch[0]
            labels = torch.cat([labels, batch[1]]) if labels is not None and batch[1] is not None else batch[1]
        yield tokens[:size], None if labels is None else labels[:size]
        tokens, labels = tokens[size:], None if labels is None else labels[size:]
