"""A token dataset that is there already, as an encode would make it again."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizer.files import PipelineLoadError

from ..images import DataConfig
from .meta import META, Meta, read_meta, verify_files
from .pieces import EncodeJob


def made_before(
    out: Path,
    part: Mapping[str, Any],
    class_names: Sequence[str],
    tokenizer: str,
    rows_per_shard: int | None,
    data: DataConfig,
) -> Meta | None:
    """The dataset in `out`, if it is whole and of nothing but `part` (settings of the images, seed, variants and rows),
    of these classes, made by the tokenizer of this fingerprint, in files of so many rows (None: of any number), after
    the images of `data` were written; and no encode is under way."""
    if not (out / META).is_file() or EncodeJob.unfinished(out) is not None or changed_since(data, out):
        return None
    try:
        meta = read_meta(out)
        verify_files(out, meta, whole=False)
    except PipelineLoadError:
        return None
    same = meta.parts == [part] and meta.tokenizer == tokenizer and list(meta.class_names) == list(class_names)
    laid_out = rows_per_shard is None or all(
        list(counts) == sizes(sum(counts), rows_per_shard) for counts in meta.shards.values()
    )
    return meta if same and laid_out else None


def sizes(rows: int, each: int) -> list[int]:
    """The rows of the files that `rows` are cut into."""
    return [min(each, rows - start) for start in range(0, rows, each)]


def changed_since(data: DataConfig, out: Path) -> bool:
    """Whether a file or folder of images here was written after the dataset in `out` was."""
    pattern = os.path.expanduser(data.source) if glob.has_magic(data.source) else ""
    sources = [data.path] if data.path else [Path(name) for name in glob.glob(pattern, recursive=True)]
    when = (out / META).stat().st_mtime
    below = (Path(place, name) for top in sources for place, _, names in os.walk(top) for name in ("", *names))
    return any(path.stat().st_mtime > when for path in (*sources, *below) if path.exists())


def told(meta: Meta) -> str:
    """What a dataset holds, in words."""
    counts = ", ".join(f"{sum(counts)} {name}" for name, counts in meta.shards.items())
    return f"{counts} rows of {'x'.join(map(str, meta.grid.shape))} ids below {meta.grid.vocab_size}"
