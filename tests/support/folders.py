"""Names and contents of the files in a folder."""

from __future__ import annotations

import csv
from pathlib import Path

from pipelines.files import atomic_file


def files_in(folder: Path) -> list[str]:
    """Sorted relative paths of all files below the folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below the folder."""
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def written(path: Path) -> dict[str, bytes] | bytes:
    """The bytes of a file, or of every file below a folder."""
    return contents(path) if path.is_dir() else path.read_bytes()


def half_written(target: Path) -> Path:
    """The temporary path at which a process that is killed while writing `target` leaves a partial file."""
    with atomic_file(target) as temporary:
        temporary.touch()
    target.unlink()
    return temporary
