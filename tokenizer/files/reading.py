"""Untrusted folders: a file is read through `opening`, and compared to the folder's manifest if there is one."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .errors import FormatError, IntegrityError, LimitError, PathError, PipelineLoadError, UnreadableError, shown
from .json_text import MAX_JSON_BYTES, parse_json
from .opening import ReadOnce, Roots, kind_of_failure, opened, roots_of

MANIFEST = "manifest.json"
TRIES = 50  # for reading a folder that is replaced again and again
CODE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".zip", ".py")

T = TypeVar("T")


@dataclass(frozen=True)
class Folder:
    """The files of the folder `path`, or of its part `prefix`, by their names there.

    A link may lead to another file of the folder, or, in the Hub's cache, to the repository's files there; not
    elsewhere. `manifest`: the content of `manifest.json`; None: files are not compared to a manifest.
    """

    path: Path
    roots: Roots
    manifest: dict[str, Any] | None = None
    prefix: str = ""
    unread: set[str] = field(default_factory=set)

    @classmethod
    def at(cls, path: Path) -> Folder:
        """A folder without a manifest."""
        return cls(path, roots_of(path))

    @classmethod
    def sealed(cls, path: Path, sha256: str | None = None, without: Collection[str] = ()) -> Folder:
        """A folder with a manifest. The manifest must have this `sha256`, if given, and every file that it lists must
        be there and have its size. A file's sha256 is verified when it is read; `read_rest` verifies the others.
        without: folders of it whose files are not looked at, and need not be there.

        Raises `PathError` for a missing file, `IntegrityError` for a changed one, `FormatError` for a bad manifest.
        """
        roots, place = roots_of(path), path / MANIFEST
        with opened(place, MAX_JSON_BYTES, roots) as file:
            data = file.read(file.size)
        found = hashlib.sha256(data).hexdigest()
        if sha256 is not None and found != sha256.lower():
            raise IntegrityError(f"{place}: its sha256 is {found}, expected {shown(sha256)}")
        manifest = parse_json(data, place)
        files = manifest.get("files")
        if not isinstance(files, dict) or not files:
            raise FormatError(f"{place}: 'files' should list the files of the folder")
        wanted = [name for name in files if name.split("/")[0] not in without]
        for name in wanted:
            _check_entry(path, name, files[name])
        return cls(path, roots, manifest, unread=set(wanted))

    def part(self, name: str) -> Folder:
        """The files below the folder `name`."""
        return replace(self, prefix=f"{self.prefix}{name}/")

    def place(self, name: str) -> Path:
        """The path of the file `name`."""
        return self.path / (self.prefix + name)

    def __contains__(self, name: str) -> bool:
        return os.path.lexists(self.place(name))

    @contextmanager
    def open(self, name: str, limit: int) -> Iterator[ReadOnce]:
        """The file `name` of at most `limit` bytes. At the end of the block, or at a `PipelineLoadError` in it, its
        sha256 is compared to the manifest's: "the file was damaged" explains more than an error in its content.

        Raises `PathError`, `LimitError` or `IntegrityError`.
        """
        place, full, entry = self.place(name), self.prefix + name, None
        if self.manifest is not None and name in self:
            entry = self.manifest["files"].get(full)
            if entry is None:
                raise IntegrityError(f"{self.path / MANIFEST}: files: does not list {full}")
        with opened(place, limit, self.roots, entry) as file:
            yield file
        self.unread.discard(full)

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of the file `name`; raises what `open` raises."""
        with self.open(name, limit) as file:
            return file.read(file.size)

    def json(self, name: str) -> dict[str, Any]:
        """The object in the JSON file `name`; raises what `open` raises, and `FormatError`."""
        return parse_json(self.read(name, MAX_JSON_BYTES), self.place(name))

    def read_rest(self, limit: int | None = None) -> None:
        """Verify the listed files that were not read, which may have `limit` bytes in total. Files that may hold code
        are never opened. Raises `IntegrityError`, `PathError` or `LimitError`."""
        files = self.manifest["files"] if self.manifest else {}
        sizes = {name: files[name]["size"] for name in sorted(self.unread) if not name.lower().endswith(CODE)}
        total = sum(sizes.values())
        if limit is not None and total > limit:
            raise LimitError(f"{self.path}: {total} bytes in files that are not read, at most {limit} allowed")
        for name, size in sizes.items():
            with replace(self, prefix="").open(name, size):
                pass


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Check every file that `manifest.json` lists; returns the manifest.

    Raises `PathError` for a missing file, `IntegrityError` for a changed one, `FormatError` for a bad manifest.
    """
    files = Folder.sealed(Path(folder))
    files.read_rest()
    return files.manifest or {}


def steadily(folder: Path, read: Callable[[], T]) -> T:
    """The result of `read`, for a folder that another process may replace as a whole while it is read.

    If reading failed and the folder was replaced meanwhile, it is read again. Raises what `read` raises.
    """
    for _ in range(TRIES):
        before = _identity(folder)
        try:
            return read()
        except (PipelineLoadError, OSError):
            if _identity(folder) == before:
                raise
    return read()


def _identity(folder: Path) -> tuple[int, ...] | None:
    """A value that differs for another folder that got the same name."""
    try:
        info = os.stat(folder)
    except OSError:
        return None
    return info.st_dev, info.st_ino, info.st_mtime_ns


def _check_entry(folder: Path, name: str, entry: Any) -> None:
    """Check the manifest's `entry` of the file `name`, and that the file is there and has the listed size."""
    place, pure = folder / MANIFEST, PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or re.match("[A-Za-z]:", name):
        raise PathError(f"{place}: {shown(name)} leads out of the folder")
    if not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
        raise FormatError(f"{place}: the entry of {shown(name)} should hold sha256 and size")
    sha256, size = entry["sha256"], entry["size"]
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256) or type(size) is not int:
        raise FormatError(f"{place}: the entry of {shown(name)} should hold a sha256 and a whole number of bytes")
    try:
        info = os.stat(folder / name)
    except (OSError, ValueError) as error:
        if kind_of_failure(error) is UnreadableError:
            raise UnreadableError(f"{folder}: {shown(name)}: {error}") from error
        raise PathError(f"{folder}: {shown(name)} is missing, though {MANIFEST} lists it") from error
    if not stat.S_ISREG(info.st_mode) or pure.as_posix() != name:  # "a//b" and "./a/b" are other names of a/b
        raise PathError(f"{folder}: {shown(name)} is not a file, but {MANIFEST} lists it")
    if info.st_size != size:
        raise IntegrityError(f"{folder / name}: {info.st_size} bytes, the manifest says {size}")
