"""Output files of verbs: what may be replaced, atomic writes, and one writer at a time.

`tokenizer.files` provides errors, JSON, manifests and the replacement of whole folders. This module adds single files,
files added to an existing folder, and locks.

    out = Output(config.out, inputs=[config.pipeline], overwrite=config.overwrite)
    out.check_file(PICTURE_SUFFIXES)             # fail before hours of work
    with lock_output(out.path), out.file() as path:
        write_picture(picture, path)             # a temporary name, renamed at the end
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Strict, TypeAdapter, ValidationError

from tokenizer.config import describe_problems
from tokenizer.files import (
    FULL,
    MANIFEST,
    FolderKind,
    FormatError,
    PathError,
    fsync,
    make_folder,
    quote,
    require_replaceable,
    temporary_name,
)

from .config import UserError, user_errors

if TYPE_CHECKING:
    from filelock import SoftFileLease

    from .processes.group import ProcessGroup

LOCK = ".lock"
LEASE, HEARTBEAT = 120.0, 5.0
"""Seconds without a heartbeat after which a lock is taken over, and seconds between heartbeats."""
MAX_LOCKED_NAME = 150  # bytes; the lock of a longer name is named after its hash
MOMENT = 1.0  # seconds within which a lock is written or released
STOPPED = 1  # exit code of a process whose lock was taken over

T = TypeVar("T")


# Checks ------------------------------------------------------------------------------


def require_apart(out: Path, inputs: Iterable[Any]) -> None:
    """Raise `PathError` if `out` equals, lies in or contains one of the `inputs`. Those that are no paths of this
    machine, such as Hub ids and None, are ignored."""
    there = os.path.realpath(out)
    for source in inputs:
        if source is None or not os.path.exists(source):
            continue
        here, relation = os.path.realpath(source), None
        if there == here or (os.path.exists(out) and os.path.samefile(out, source)):
            relation = "is"
        elif there.startswith(os.path.join(here, "")):
            relation = "lies in"
        elif here.startswith(os.path.join(there, "")):
            relation = "contains"
        if relation:
            raise PathError(f"{out} cannot be written: it {relation} an input, {source}; choose another path")


def require_writable(path: Path, overwrite: bool) -> None:
    """Raise `PathError` unless the path is free, or a regular file and `overwrite` is true."""
    if not _exists(path):
        return
    if path.is_symlink():
        raise PathError(f"{path} cannot be written: it is a link, and links are never written through")
    if not path.is_file():
        raise PathError(f"{path} cannot be written: it exists and is not a file")
    if not overwrite:
        raise PathError(f"{path} exists: choose another name, or replace it with overwrite=true")


def require_writable_in(folder: Path, names: Iterable[str], overwrite: bool) -> None:
    """Raise `PathError` unless files with these names can be written into `folder`, which may be missing."""
    if _exists(folder) and (folder.is_symlink() or not folder.is_dir()):
        what = "a link" if folder.is_symlink() else "a file"
        raise PathError(f"{folder} cannot be written: it is {what}, not a folder")
    if os.path.lexists(folder / MANIFEST):
        raise PathError(f"{folder}: it contains {MANIFEST}, so no other files may be added; choose another folder")
    for name in names:
        require_writable(folder / name, overwrite)


def _exists(path: Path) -> bool:
    """Whether the path exists, even as a broken link. Raises `PathError` for a name that is too long."""
    try:
        os.lstat(path)
        return True
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise PathError(f"{path}: cannot be written ({error.strerror})") from error
        return False


@dataclass(frozen=True)
class Output:
    """The output path of a verb; methods raise `UserError`s that name the `key`.

    inputs: what the verb reads; never written to. overwrite: whether existing files may be replaced.
    """

    place: Path | str
    inputs: Sequence[Any] = ()
    overwrite: bool = False
    key: str = "out"

    @property
    def path(self) -> Path:
        return Path(self.place)

    def check_file(self, suffixes: Collection[str] = ()) -> None:
        """Check that a file can be written here. suffixes: the allowed suffixes; empty allows all."""
        if suffixes and self.path.suffix.lower() not in suffixes:
            raise UserError(f"{self.key}: {str(self.place)!r} should end in {', '.join(suffixes)}")
        with self.errors():
            require_apart(self.path, self.inputs)
            require_writable(self.path, self.overwrite)

    def check_files(self, names: Iterable[str]) -> None:
        with self.errors():
            require_apart(self.path, self.inputs)
            require_writable_in(self.path, names, self.overwrite)

    def check_folder(self, kind: FolderKind | None) -> None:
        """Check that a folder of this kind can be written here, see `tokenizer.files.atomic_folder`."""
        with self.errors():
            require_apart(self.path, self.inputs)
            require_replaceable(self.path, kind)

    @contextmanager
    def file(self) -> Iterator[Path]:
        """Yield a temporary path that becomes this file, see `atomic_file`."""
        with self.errors(), atomic_file(self.path, overwrite=self.overwrite) as path:
            yield path

    @contextmanager
    def files(self) -> Iterator[Path]:
        """Yield a temporary folder whose files are moved into this one, see `atomic_files`."""
        with self.errors(), atomic_files(self.path, overwrite=self.overwrite) as folder:
            yield folder

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Convert write errors to a `UserError` that names the key."""
        try:
            yield
        except PathError as error:
            raise UserError(f"{self.key}: {error}") from error
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.key}: {self.place} cannot be written ({reason})") from error


# Writing ------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(target: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path that is flushed to the disk and renamed to `target` if the block ends without an error.

    Raises `PathError`, before and after the block, like `require_writable`."""
    target = Path(target)
    require_writable(target, overwrite)
    make_folder(target.parent)
    temporary = temporary_name(target, suffix=target.suffix)
    try:
        yield temporary
        fsync(temporary)
        require_writable(target, overwrite)
        temporary.replace(target)
        fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_files(target: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder whose files are renamed into `target` if the block ends without an error. Other files
    there stay. A missing target is created in one rename. If a file may not be replaced, raises a `PathError` that
    names it, before replacing any file."""
    target = Path(target)
    require_writable_in(target, (), overwrite)
    make_folder(target.parent)
    temporary = temporary_name(target)
    temporary.mkdir()
    try:
        yield temporary
        names = sorted(os.listdir(temporary))
        for path in (*(temporary / name for name in names), temporary):
            fsync(path)
        require_writable_in(target, names, overwrite)
        if not target.exists():
            temporary.rename(target)
            fsync(target.parent)
            return
        for name in names:
            (temporary / name).replace(target / name)
        fsync(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` atomically, in a folder that is known to be ours.

    Raises `PathError` for a link, and `OSError` with the path and, for a full disk, the bytes needed and free.
    """
    if path.is_file() and not path.is_symlink() and path.read_bytes() == data:
        return  # an unchanged file needs no free space
    try:
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        reason = error.strerror
        if error.errno in FULL:
            free = shutil.disk_usage(path.parent).free
            reason = f"needs {len(data):,} bytes, but only {free:,} are free; {reason}"
        raise OSError(error.errno, reason, str(path)) from error


# One writer at a time -----------------------------------------------------------------------------


@contextmanager
def lock_folder(run: Path, group: ProcessGroup | None = None) -> Iterator[None]:
    """Lock a run folder during the block; create the folder if it is missing.

    The main process of the group holds the lock. Raises `UserError` on all processes if another run holds it, or if the
    folder cannot be written. A holder without a heartbeat for `LEASE` seconds loses the lock, and exits when it wakes.
    """
    with _locked(run / LOCK, run, "out", group):
        yield


@contextmanager
def lock_output(out: Path | str | None, group: ProcessGroup | None = None, *, key: str = "out") -> Iterator[None]:
    """Lock a file, or a folder that is replaced as a whole, with a lock file beside it. See `lock_folder`.

    out: None locks nothing. key: the command line key, for messages. A verb that updates a pipeline hours after reading
    it must hold the lock throughout; otherwise two such verbs would overwrite each other's updates."""
    if out is None:
        yield
        return
    with _locked(lock_beside(out), Path(out), key, group):
        yield


def lock_beside(out: Path | str) -> Path:
    """Return the path of the lock of a file or replaced folder: `.NAME.lock`."""
    path = Path(os.path.realpath(out))
    name = os.fsencode(path.name)
    return path.with_name(f".{path.name if len(name) <= MAX_LOCKED_NAME else hashlib.sha256(name).hexdigest()}{LOCK}")


def is_lock(name: str) -> bool:
    return name == LOCK or name.startswith(f"{LOCK}.")


@contextmanager
def _locked(place: Path, out: Path, key: str, group: ProcessGroup | None) -> Iterator[None]:
    with ExitStack() as stack:

        def acquire() -> None:
            try:
                stack.enter_context(_hold(place, out))
            except OSError as error:
                raise UserError(f"{key}: {out} cannot be written ({error.strerror or error})") from error

        group.on_main(acquire) if group else acquire()
        yield


@contextmanager
def _hold(place: Path, out: Path) -> Iterator[None]:
    """Hold the lock `place` during the block. Folders that are created for it and are still empty are removed."""
    missing = [path for path in (place.parent, *place.parent.parents) if not path.exists()]
    try:
        lock = _acquire(place, out)
        try:
            yield
        finally:
            with suppress(OSError):  # otherwise the lock is stale once this process has ended
                lock.release(force=True)
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _acquire(place: Path, out: Path) -> SoftFileLease:
    """Acquire the lock `place`. Raises `UserError` that names the holder, and `OSError`.

    A dead process of this machine is replaced at once, any other holder after `LEASE` seconds without a heartbeat.
    """
    from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

    def stop(_: Any) -> None:
        """Exit at once: the main thread may be about to write, or be blocked where no exception reaches it."""
        try:
            line = f"error: {out}: another process took over the lock after {LEASE:g} s without a heartbeat; stopping"
            print(line, file=sys.stderr, flush=True)
        finally:  # even if the terminal is gone or the log's disk is full
            os._exit(STOPPED)

    options: dict[str, Any] = {"lease_duration": LEASE, "heartbeat_interval": HEARTBEAT, "on_compromise": stop}
    lock = SoftFileLease(place, timeout=0, thread_local=False, **options)
    start, first = time.monotonic(), 0.0
    while True:
        make_folder(place.parent)  # a process that did not get the lock may have removed it
        with suppress(Timeout), user_errors(LeaseSettingsMismatch, prefix=f"{out}: "):  # of another version
            lock.acquire()  # removes a stale lock
            break
        owner, heartbeat = lock.owner, _read_heartbeat(place)
        if owner is None:  # just released, or not written yet
            if heartbeat and time.monotonic() - start > MOMENT:
                if time.time() - heartbeat < LEASE or place.read_bytes().strip(b"\0"):
                    raise UserError(f"{out}: {place} names no holder; delete it if no process is writing here")
                place.unlink(missing_ok=True)  # empty, because power was lost while it was written
        elif heartbeat:
            host = quote(owner.hostname.partition("?")[0])[1:-1]  # the rest identifies the container
            holder = f"process {owner.pid} on {host}"
            recent = host == socket.gethostname() and abs(time.time() - heartbeat) < 3 * HEARTBEAT
            if recent or (first and heartbeat != first):
                raise UserError(f"{out}: {holder} is writing here; only one writer at a time, nothing was changed")
            if not first:
                wait = f"waiting up to {LEASE + HEARTBEAT:g} s for its heartbeat"
                print(f"{out}: {holder} may be writing here; {wait}", file=sys.stderr, flush=True)
                first = heartbeat
            start = time.monotonic()
        time.sleep(0.05)
    with suppress(OSError):  # after power loss, an unflushed lock would be empty
        fsync(place)
    return lock


def _read_heartbeat(place: Path) -> float:
    """Return the time of the last heartbeat; 0 without a lock."""
    try:
        return os.lstat(place).st_mtime
    except FileNotFoundError:
        return 0.0


# JSON against a class -----------------------------------------------------------------------------
# Strict: true is not a number, 1.0 is not an integer, and "1" is neither.

Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
"""Integers are converted to float."""
Bool = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]


class FieldError(ValueError):
    """An invalid field of an object, found by a check of several fields."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


def validate(cls: type[T], data: Any, path: Path) -> T:
    """Convert `data`, the content of the file `path`, to a `cls` (a pydantic model or a dataclass). Raises
    `FormatError` with the file, the first invalid field, the value found and what is allowed."""
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        names, cause = [str(part) for part in first["loc"]], first.get("ctx", {}).get("error")
        if isinstance(cause, FieldError):
            names.append(cause.field)
            first["ctx"]["error"] = cause.problem
        raise FormatError(f"{path}: {describe_problems('.'.join(names), [first]).removeprefix(': ')}") from error
    except UnicodeEncodeError as error:  # a `FieldError` with a lone surrogate, which pydantic cannot print
        raise FormatError(f"{path}: {error.object}") from error
