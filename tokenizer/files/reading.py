"""Untrusted files: each is opened once, only in allowed places, up to an allowed size, and checked while it is read, so
that the bytes whose sha256 was verified are the bytes that are parsed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .errors import FormatError, IntegrityError, LimitError, PathError, PipelineLoadError, UnreadableError, shown
from .json_text import MAX_JSON_BYTES, parse_json

MANIFEST = "manifest.json"
BLOCK = 1 << 20
TRIES = 50  # for reading a folder that is replaced again and again
CODE = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".zip", ".py")

T = TypeVar("T")
Roots = tuple[str, ...]
"""Resolved folders; a file has to be in one of them. Empty: it may be anywhere."""


class ReadOnce:
    """An open file of `size` bytes, read from front to back; `finish` compares its hash to `sha256`, if not None."""

    def __init__(self, file: FileIO, path: Path, size: int, sha256: str | None) -> None:
        self.path, self.size = path, size
        self._file, self._sha256, self._digest, self._position = file, sha256, hashlib.sha256(), 0

    def read(self, count: int) -> bytes:
        """The next `count` bytes. Raises `IntegrityError` if there are fewer."""
        data = bytearray(count)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, buffer: memoryview) -> None:
        """Fill `buffer` with the next bytes. Raises `IntegrityError` if there are fewer."""
        done = 0
        while done < len(buffer):  # in blocks, each of which is hashed while it is in the processor's cache
            part = buffer[done : done + BLOCK]
            count = self._file.readinto(part)
            if not count:
                raise IntegrityError(f"{self.path}: ended after {self._position} of {self.size} bytes")
            self._take(part[:count])
            done += count

    def status(self) -> os.stat_result:
        """The system's present facts about the open file."""
        return os.fstat(self._file.fileno())

    def finish(self) -> None:
        """Read the rest, and raise `IntegrityError` unless the whole file is the one that the manifest lists."""
        while (rest := self._file.read(BLOCK)) and self._position <= self.size:
            self._take(rest)
        if self._position != self.size:
            raise IntegrityError(f"{self.path}: {self._position} bytes, {self.size} when it was opened")
        if self._sha256 is not None and self._digest.hexdigest() != self._sha256:
            raise IntegrityError(
                f"{self.path}: its sha256 differs from the manifest; the file was changed after saving"
            )

    def _take(self, data: bytes | memoryview) -> None:
        self._position += len(data)
        if self._sha256 is not None:
            self._digest.update(data)


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
    def sealed(cls, path: Path, sha256: str | None = None) -> Folder:
        """A folder with a manifest. The manifest must have this `sha256`, if given, and every file that it lists must
        be there and have its size. A file's sha256 is verified when it is read; `read_rest` verifies the others.

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
        for name, entry in files.items():
            _check_entry(path, name, entry)
        return cls(path, roots, manifest, unread=set(files))

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
        if _of_the_system(error) is UnreadableError:
            raise UnreadableError(f"{folder}: {shown(name)}: {error}") from error
        raise PathError(f"{folder}: {shown(name)} is missing, though {MANIFEST} lists it") from error
    if not stat.S_ISREG(info.st_mode) or pure.as_posix() != name:  # "a//b" and "./a/b" are other names of a/b
        raise PathError(f"{folder}: {shown(name)} is not a file, but {MANIFEST} lists it")
    if info.st_size != size:
        raise IntegrityError(f"{folder / name}: {info.st_size} bytes, the manifest says {size}")


def _of_the_system(error: Exception) -> type[PathError]:
    """`UnreadableError` if the file may exist nevertheless, `PathError` if there cannot be a file of this name."""
    names = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR)
    return UnreadableError if isinstance(error, OSError) and error.errno not in names else PathError


# Opening


def roots_of(folder: Path) -> Roots:
    """Where the files of `folder` may be: in the folder itself and, in the Hub's cache, among the blobs of the same
    repository."""
    real = Path(os.path.realpath(folder))
    for place in real.parents:
        if place.name == "snapshots" and place.parent.name.startswith(("models--", "datasets--")):
            return str(real), str(place.parent / "blobs")
    return (str(real),)


@contextmanager
def opened(path: Path, limit: int, roots: Roots = (), entry: dict[str, Any] | None = None) -> Iterator[ReadOnce]:
    """Open a regular file of at most `limit` bytes; it must have the size and, at the end, the sha256 of the manifest's
    `entry`.

    Raises `PathError` if it is missing, leads out of the `roots` or is not a regular file (reading a pipe would block,
    reading a device would have effects), `LimitError` if it is larger, `IntegrityError` if it changes meanwhile.
    """
    try:
        file = os.fdopen(_descriptor(path, roots), "rb", buffering=0)
    except ValueError as error:
        raise error if isinstance(error, PipelineLoadError) else PathError(f"{path}: no such file") from error
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise PathError(f"{path}: no such file") from error
        raise _of_the_system(error)(f"{path}: {error.strerror}") from error
    with file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise PathError(f"{path}: not a regular file")
        if info.st_size > limit:
            raise LimitError(f"{path}: {info.st_size} bytes, at most {limit} allowed")
        if entry and info.st_size != entry["size"]:
            raise IntegrityError(f"{path}: {info.st_size} bytes, the manifest says {entry['size']}")
        once = ReadOnce(file, path, info.st_size, entry["sha256"] if entry else None)
        try:
            try:
                yield once
            except PipelineLoadError:
                if entry:
                    once.finish()
                raise
            once.finish()
        except OSError as error:
            raise UnreadableError(f"{path}: cannot be read ({error.strerror})") from error


def _descriptor(path: Path, roots: Roots) -> int:
    """Open `path`: links are resolved once, and the target is opened without following further links."""
    real = os.path.realpath(path, strict=True)
    root = next((root for root in roots if real.startswith(os.path.join(root, ""))), None)
    if roots and root is None:
        raise PathError(f"{path}: a link that leads out of the folder, to {shown(real)}; `cp -L` makes files of links")
    if not stat.S_ISREG(os.lstat(real).st_mode):
        raise PathError(f"{path}: not a regular file")
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    if root is None or os.open not in os.supports_dir_fd:
        return os.open(real, flags)
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in Path(real).relative_to(root).parts:
        try:
            inner = os.open(name, flags, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor


def read_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes, read once.

    Raises `PathError` if it is missing or not a regular file, `LimitError` if it is larger.
    """
    with opened(Path(path), limit) as file:
        return file.read(file.size)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 1 MiB; see `parse_json`. Raises `PathError`, `LimitError` or
    `FormatError`."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path)
