"""Write images as files, folders, tables and shards, good and bad, and read them."""

from __future__ import annotations

import csv
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipelines.images import DataConfig, Splits, load_images
from pipelines.images.augment import AugmentConfig

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
    for number in range(count):
        write_image(folder / f"{number}.png", noise(*(shape or (28, 28)), seed=number))


def rows_of(count: int, classes: int = 3, size: int = 12) -> list[Row]:
    """Distinct images with classes in turn."""
    return [(f"{k:05d}", encoded(noise(size, size, seed=k)), k % classes if classes else None) for k in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]], write_list: Callable[[list], str] = json.dumps) -> Path:
    """Write rows as CSV, TSV, JSON lines or parquet. write_list: writes lists in CSV and TSV, where null is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        cells = [{name: write_list(c) if isinstance(c, list) else c for name, c in row.items()} for row in rows]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(cells)
    return path


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


ALL = AugmentConfig(flip=True, shift=3, rotate=15, zoom=0.2)


def write_image(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else encoded(data))
    return str(path)


def write_folder(root, *, count=20, classes=("cat", "dog"), shape=(12, 12)):
    """Write `count` distinct images of each class below `root`."""
    return [
        write_image(root / name / f"{k:03}.png", noise(*shape, seed=1000 * i + k))
        for i, name in enumerate(classes)
        for k in range(count)
    ]


def write_classes(folder, names, count):
    """Write `count` training and test images of each class, 28 x 28; returns the `data` setting."""
    for seed, split in enumerate(("train", "test")):
        for number, name in enumerate(names):
            for index in range(count):
                write_image(folder / split / name / f"{index}.png", noise(28, 28, seed=[seed, number, index]))
    return {"source": str(folder)}


def config(source, **options):
    return DataConfig(**{"source": str(source), "image_size": 12, **options})


def png_of(width, height, lines=bytes(1000), bits=8, colours=0):
    """A PNG with these bytes, by default fewer than its header claims."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


BAD = {
    "empty": (b"", "empty"),
    "text": (b"this is not an image", "not an image"),
    "truncated": (encoded(noise(40, 40))[:600], "truncated"),
    "bomb": (png_of(9000, 9000), "limit"),
    "huge": (png_of(60000, 60000), "exceeds limit"),
    "long": (png_of(20000, 10), "limit"),
    "pcx": (encoded(noise(12, 12), "PCX"), "not an image"),
}


def write_splits(root, *folders):
    """Write a folder per split, with 10, 3, 4, ... images."""
    for place, name in enumerate(folders):
        write_folder(root / name, count=10 if place == 0 else 2 + place, classes=("",))
    return root


def bytes_of_each(images):
    """The pixels of each image as bytes."""
    return [pixels.numpy().tobytes() for pixels in images.pixels(range(len(images)))]


def write_table(path, images, labels, *, feature=None, columns=("image", "label")):
    import datasets

    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: feature or datasets.Value("int64")})
    rows = {columns[0]: [data and {"bytes": data, "path": None} for data in images], columns[1]: labels}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


PNGS = [encoded(noise(12, 12, seed=k)) for k in range(10)]
