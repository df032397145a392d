"""Write images as files, parquet shards and tar shards, and read them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.images import DataConfig, Splits, load_images

KINDS = ["parquet", "tar"]

Row = tuple[str, bytes, Any]
"""Key, encoded image, label or None."""


def noise(*shape: int, seed: int | list[int] = 0) -> np.ndarray:
    """Random pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, format: str = "PNG", **options: Any) -> bytes:
    """Encode an image."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, format, **options)
    return file.getvalue()


def write_pictures(folder: Path, count: int = 3, *shape: int) -> None:
    """Write PNGs of random pixels, by default 28 x 28 grey. Each depends on its number only."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(noise(*(shape or (28, 28)), seed=number)).save(folder / f"{number}.png")


def rows_of(count: int, classes: int = 3, size: int = 12) -> list[Row]:
    """Distinct images with classes in turn."""
    return [(f"{k:05d}", encoded(noise(size, size, seed=k)), k % classes if classes else None) for k in range(count)]


def write_tar(path: Path, rows: list[Row], suffix: str = "png", label: str = "cls") -> Path:
    """Write a webdataset shard."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, data, value in rows:
            parts = {suffix: data} | ({} if value is None else {label: str(value).encode()})
            for name, content in parts.items():
                member = tarfile.TarInfo(f"{key}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path: Path, rows: list[Row], group: int = 5, names: list[str] | None = None) -> Path:
    """Write a shard like `datasets`, with row groups of `group` rows."""
    import datasets
    import pyarrow.parquet as pq

    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    images = [None if data is None else {"bytes": data, "path": f"{key}.png"} for key, data, _ in rows]
    table = datasets.Dataset.from_dict({"image": images, "label": [label for _, _, label in rows]}, features=features)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.data.table, path, row_group_size=group)
    return path


def write_shards(folder: Path, kind: str, rows: list[Row], shards: int, split: str = "train", **options: Any) -> Path:
    """Write rows to several files, in order."""
    for number, part in enumerate(np.array_split(np.arange(len(rows)), shards)):
        path = folder / f"{split}-{number:05d}-of-{shards:05d}.{kind}"
        some = [rows[k] for k in part]
        write_tar(path, some, **options) if kind == "tar" else write_parquet(path, some, **options)
    return folder


def load(source: Any, **options: Any) -> Splits:
    """Load the images of a source, as a stream if it is one."""
    return load_images(DataConfig(**{"source": str(source), "image_size": 12, **options}), stream=True)


def identities(pixels: torch.Tensor) -> list[int]:
    """The index of each image in `rows_of`."""
    known = {noise(12, 12, seed=k).tobytes(): k for k in range(200)}
    return [known[image.numpy().tobytes()] for image in pixels]
