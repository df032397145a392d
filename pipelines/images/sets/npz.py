"""A set as one `.npz`, as ADM's evaluator reads samples and the field exchanges them (Dhariwal & Nichol 2021,
github.com/openai/guided-diffusion): `arr_0` uint8 (N, H, W, 3), and `arr_1` (N,) classes.

It is written as a stream, so that it may be larger than memory; uncompressed, as `numpy.savez` does.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from .parts import Facts, Part


def raw_pixels(pixels: np.ndarray) -> bytes:
    """uint8 pixels (H, W, C) as those of an RGB image; grey ones are repeated, since readers want three channels."""
    return np.ascontiguousarray(pixels.repeat(3, -1) if pixels.shape[-1] == 1 else pixels).tobytes()


def write_npz(path: Path, parts: Iterable[Part], facts: Facts) -> None:
    """Write the file; parts hold raw pixels, see `raw_pixels`."""
    labels: list[int] = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with member(archive, "arr_0", (facts.count, facts.height, facts.width, 3), np.uint8) as file:
            for part in parts:
                file.write(b"".join(part.images))
                labels += part.labels or []
        if facts.class_names is not None:
            with member(archive, "arr_1", (facts.count,), np.int64) as file:
                file.write(np.array(labels, np.int64).tobytes())


@contextmanager
def member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: Any) -> Iterator[IO[bytes]]:
    """An array of the archive, whose header is written and whose values follow, in C order."""
    info = zipfile.ZipInfo(f"{name}.npy")  # of 1980, so that the same images are the same file
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with archive.open(info, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        yield file
