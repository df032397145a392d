"""A set as one tar, as webdataset lays it out: `00000.png` and, with labels, `00000.cls`, its class as a number."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from .parts import Facts, Part


def write_tar(path: Path, parts: Iterable[Part], facts: Facts) -> None:
    """Write the file; parts hold PNG files."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for part in parts:
            for index, image in enumerate(part.images):
                key = facts.key(part.first + index)
                add(tar, f"{key}.png", image)
                if part.labels is not None:
                    add(tar, f"{key}.cls", str(part.labels[index]).encode())
            tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file of this name and content, of no date, so that the same images are the same tar."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
