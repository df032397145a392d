"""Images in parquet files: a column of bytes or {bytes, path}, as `datasets` writes it; row groups are the blocks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import UserError
from ..base import MAX_FILE, DataConfig, Payload
from ..stamps import FileChanged
from .shard import Index, Shard

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

MAX_GROUP = 2 << 30  # bytes of the images of a row group, which is read whole


def make_index(shard: Shard, config: DataConfig) -> Index:
    """Row groups, labels and classes, from the footer and the label column. Raises `UserError`."""
    with shard.reading() as source:
        file = opened(source, shard)
        require_images(file.schema_arrow, config)
        schema, footer = file.schema_arrow, file.metadata
        groups = [footer.row_group(k) for k in range(footer.num_row_groups)]
        # Of all columns: at a damaged entry for one, pyarrow (26) ends the process.
        weights = [int(group.total_byte_size) for group in groups]
        if any(min(group.num_rows, weight) < 0 for group, weight in zip(groups, weights, strict=True)):
            raise UserError(f"{shard.name}: damaged: a row group of a negative size")
        if max(weights, default=0) > MAX_GROUP:
            raise UserError(
                f"{shard.name}: a row group with {max(weights)} bytes; the limit is {MAX_GROUP}, "
                "write the file again with smaller row groups"
            )
        labels, column = None, config.label_column
        if column is not None and column in schema.names:
            labels = labels_in(file, column)
        elif column not in (None, DataConfig.model_fields["label_column"].default):
            raise UserError(f"data.label_column: no column {column!r}; there are {schema.names}")
    starts = np.cumsum([0, *(group.num_rows for group in groups)], dtype=np.int64)
    if labels is not None and len(labels) != starts[-1]:
        raise UserError(f"{shard.name}: damaged: {len(labels)} labels for {starts[-1]} rows")
    none = np.empty(0, np.int64)
    names = None if labels is None else class_names(schema, str(column))
    return Index(starts, np.array(weights, np.int64), none, none, np.empty(0, np.uint8), labels, names)


def read_block(shard: Shard, index: Index, block: int, column: str) -> list[Payload]:
    """The encoded images of a row group. Raises what pyarrow raises, and `FileChanged`."""
    with shard.reading() as source:
        file = opened(source, shard)
        leaf = "bytes" if is_struct(file.schema_arrow.field(column).type) else ""
        array = file.read_row_group(block, columns=[f"{column}.{leaf}" if leaf else column], use_threads=False)
    payloads = array.column(0).to_pylist()
    if len(payloads) != index.starts[block + 1] - index.starts[block]:
        raise FileChanged(shard.name)
    return [bounded((value or {}).get("bytes") if leaf else value) for value in payloads]


def bounded(data: bytes | None) -> Payload:
    """The image, or why there is none."""
    if data is None:
        return "no image"
    return data if len(data) <= MAX_FILE else f"a file of {len(data)} bytes; the limit is {MAX_FILE}"


def opened(source: Any, shard: Shard) -> pq.ParquetFile:
    """The file, whose footer is read. Raises `UserError` if it has none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(source, pre_buffer=True)
    except pa.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{shard.name}: not a whole parquet file: {reason}") from error


def require_images(schema: pa.Schema, config: DataConfig) -> None:
    """Raise `UserError` without a column of bytes, or of structs with `bytes`, in which the images are."""
    import pyarrow as pa

    name = config.image_column
    if name not in schema.names:
        raise UserError(f"data.image_column: no column {name!r}; there are {schema.names}")
    kind = schema.field(name).type
    inner = kind.field("bytes").type if is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise UserError(f"data.image_column: {name!r} does not hold images: it is {str(kind)[:100]}")


def is_struct(kind: pa.DataType) -> bool:
    """Whether a column is a struct."""
    import pyarrow as pa

    return bool(pa.types.is_struct(kind))


def labels_in(file: pq.ParquetFile, column: str) -> list[Any]:
    """The labels of all rows. Raises `UserError` for a column of another type."""
    import pyarrow.types as kinds

    kind = file.schema_arrow.field(column).type
    allowed = (kinds.is_integer, kinds.is_string, kinds.is_large_string, kinds.is_boolean, kinds.is_dictionary)
    if not any(is_one(kind) for is_one in (*allowed, kinds.is_null)):
        raise UserError(f"data.label_column: {column!r} holds {str(kind)[:100]}; labels are strings or whole numbers")
    labels: list[Any] = file.read(columns=[column]).column(0).to_pylist()
    return labels


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """The names that `datasets` keeps of a `ClassLabel`."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
