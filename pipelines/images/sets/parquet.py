"""A set as one parquet file, as `datasets` writes and reads it: `image` ({bytes, path}) and `label`, a class label."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .parts import Facts, Part, regrouped

GROUP = 100  # rows of a row group, which readers take at once: as many as the Hub's own data sets of images have


def write_parquet(path: Path, parts: Iterable[Part], facts: Facts) -> None:
    """Write the file, which is the same however the images are cut; parts hold PNG files."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features: dict[str, Any] = {"image": datasets.Image()}
    if facts.class_names is not None:
        features["label"] = datasets.ClassLabel(names=facts.class_names)
    schema = datasets.Features(features).arrow_schema
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}  # PNG is compressed
    with pq.ParquetWriter(path, schema, store_schema=False, **options) as writer:
        for part in regrouped(parts, GROUP):
            rows = [
                {"bytes": image, "path": f"{facts.key(number)}.png"}
                for number, image in enumerate(part.images, part.first)
            ]
            columns = [pa.array(rows, schema.field("image").type)]
            if facts.class_names is not None:
                columns.append(pa.array(part.labels, pa.int64()))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        writer.add_key_value_metadata({"huggingface": schema.metadata[b"huggingface"]})
