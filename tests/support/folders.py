"""Which files a folder has, and what is in them."""

from __future__ import annotations

from pathlib import Path

from pipelines.files import atomic_file


def files_in(folder: Path) -> list[str]:
    """The names of all files, in order, as they lie below the folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, to the bit."""
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


def written(path: Path) -> dict[str, bytes] | bytes:
    """What is at `path`, a file or a folder, to the bit."""
    return contents(path) if path.is_dir() else path.read_bytes()


def half_written(target: Path) -> Path:
    """Where a process that is killed while it writes the file `target` leaves a part of it; the folder is made."""
    with atomic_file(target) as temporary:
        temporary.touch()
    target.unlink()
    return temporary
