"""Files that a verb writes: what may be replaced, writing whole or not at all, and one writer at a time.

`tokenizer.files` has the errors, JSON, manifests and the replacement of whole folders; this adds single files, files
that go into a folder beside others, and locks.

    out = Output(config.out, inputs=[config.pipeline], overwrite=config.overwrite)
    out.check_file(SUFFIXES)                     # before hours of work
    with lock_output(out.path), out.file() as path:
        write_picture(picture, path)             # under a temporary name, renamed at the end
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

from .config import UserError

if TYPE_CHECKING:
    from filelock import SoftFileLease
    from pydantic_core import ErrorDetails

    from .processes.group import ProcessGroup

LOCK = ".lock"
LEASE, HEARTBEAT = 120.0, 5.0
"""Seconds of silence after which a lock's holder is replaced, and between two of its signs of life."""
MAX_LOCKED_NAME = 150  # bytes of a name that its lock is called after
MOMENT = 1.0  # seconds in which a lock that is being made or released is there or gone
STOPPED = 1  # exit code of a process whose lock another one has taken over

Inputs = Iterable[Any]
"""What a verb reads: paths, and other things (a Hub id, None), which are ignored."""
T = TypeVar("T")


# What may be written ------------------------------------------------------------------------------


def require_apart(out: Path, inputs: Inputs) -> None:
    """Raise `PathError` if `out` is one of the `inputs`, lies in one, or contains one."""
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
            relation = "holds"
        if relation:
            raise PathError(f"{out} cannot be written: it {relation} what is read, {source}; choose another place")


def require_writable(path: Path, overwrite: bool) -> None:
    """Raise `PathError` unless nothing has this name, or a regular file that `overwrite` allows to replace."""
    if not _exists(path):
        return
    if path.is_symlink():
        raise PathError(f"{path} cannot be written: it is a link, and nothing is written through a link")
    if not path.is_file():
        raise PathError(f"{path} cannot be written: it exists and is not a file")
    if not overwrite:
        raise PathError(f"{path} exists: choose another name, or replace it with overwrite=true")


def require_writable_in(folder: Path, names: Iterable[str], overwrite: bool) -> None:
    """Raise `PathError` unless files of these names can be written into `folder`, which need not exist."""
    if _exists(folder) and (folder.is_symlink() or not folder.is_dir()):
        what = "a link" if folder.is_symlink() else "a file"
        raise PathError(f"{folder} cannot be written: it should be a folder, and {what} has this name")
    if os.path.lexists(folder / MANIFEST):
        raise PathError(f"{folder}: it holds a {MANIFEST}, so nothing else may be put into it; choose another folder")
    for name in names:
        require_writable(folder / name, overwrite)


def _exists(path: Path) -> bool:
    """Whether anything has this name. Raises `PathError` for one that is too long for anything."""
    try:
        os.lstat(path)
        return True
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise PathError(f"{path}: cannot be written ({error.strerror})") from error
        return False


@dataclass(frozen=True)
class Output:
    """Where a verb writes, and what it may replace there; each method raises `UserError` that names the `key`.

    inputs: what the verb reads, which is never written to. overwrite: whether existing files may be replaced.
    """

    place: Path | str
    inputs: Sequence[Any] = ()
    overwrite: bool = False
    key: str = "out"

    @property
    def path(self) -> Path:
        """The file or folder."""
        return Path(self.place)

    def check_file(self, suffixes: Collection[str] = ()) -> None:
        """Check that a file can be written here. suffixes: the allowed ones; empty: all."""
        if suffixes and self.path.suffix.lower() not in suffixes:
            raise UserError(f"{self.key}: {str(self.place)!r} should end in {', '.join(suffixes)}")
        with self.errors():
            require_apart(self.path, self.inputs)
            require_writable(self.path, self.overwrite)

    def check_files(self, names: Iterable[str]) -> None:
        """Check that files of these names can be written into this folder."""
        with self.errors():
            require_apart(self.path, self.inputs)
            require_writable_in(self.path, names, self.overwrite)

    def check_folder(self, kind: FolderKind | None) -> None:
        """Check that a folder of this kind can be written here as a whole, see `tokenizer.files.atomic_folder`."""
        with self.errors():
            require_apart(self.path, self.inputs)
            require_replaceable(self.path, kind)

    @contextmanager
    def file(self, temporary: Path | None = None) -> Iterator[Path]:
        """Yield the path of a temporary file that becomes this file, see `atomic_file`."""
        with self.errors(), atomic_file(self.path, overwrite=self.overwrite, temporary=temporary) as path:
            yield path

    @contextmanager
    def files(self, temporary: Path | None = None) -> Iterator[Path]:
        """Yield a temporary folder whose files are moved into this one, see `atomic_files`."""
        with self.errors(), atomic_files(self.path, overwrite=self.overwrite, temporary=temporary) as folder:
            yield folder

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn an error of writing into a `UserError` that names the key."""
        try:
            yield
        except PathError as error:
            raise UserError(f"{self.key}: {error}") from error
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{self.key}: {self.place} cannot be written ({reason})") from error


# Writing ------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(target: Path | str, *, overwrite: bool = False, temporary: Path | None = None) -> Iterator[Path]:
    """Yield the path of a temporary file that becomes `target` when the block ends without an error, and then is on the
    disk.

    temporary: where it is, on the same disk; None: beside `target`. Raises `PathError`, at the beginning and at the
    end, for what `require_writable` refuses.
    """
    target = Path(target)
    require_writable(target, overwrite)
    make_folder(target.parent)
    temporary = temporary or temporary_name(target, suffix=target.suffix)
    try:
        yield temporary
        fsync(temporary)
        require_writable(target, overwrite)
        temporary.replace(target)
        fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_files(target: Path | str, *, overwrite: bool = False, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved into `target` when the block ends without an error, each by one
    rename; other files there stay. A folder that does not exist yet appears as a whole.

    temporary: where it is, on the same disk; what a killed process left there is removed. Raises `PathError` that names
    a file that may not be replaced, before any is.
    """
    target = Path(target)
    require_writable_in(target, (), overwrite)
    make_folder(target.parent)
    temporary = temporary or temporary_name(target)
    shutil.rmtree(temporary, ignore_errors=True)
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
    """Write `path`, a file of a folder that is known to be ours, whole or not at all.

    Raises `PathError` for a link, and `OSError` that names the path and, of a full disk, the bytes needed and free.
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
            reason = f"needs {len(data):,} bytes, {free:,} are free; {reason}"
        raise OSError(error.errno, reason, str(path)) from error


# One writer at a time -----------------------------------------------------------------------------


@contextmanager
def lock_folder(run: Path, group: ProcessGroup | None = None) -> Iterator[None]:
    """Be the only writer in a run's folder, by a lock in it; the folder is made if it is missing.

    The first process of the group holds the lock. Raises `UserError`, on all of them, where another one does, and where
    the folder cannot be written. A process that was silent for `LEASE` seconds is replaced; it stops when it wakes.
    """
    with _locked(run / LOCK, run, "out", group):
        yield


@contextmanager
def lock_output(out: Path | str | None, group: ProcessGroup | None = None, *, key: str = "out") -> Iterator[None]:
    """Be the only writer of a file, or of a folder that is replaced as a whole, by a lock beside it; see `lock_folder`.

    None: nothing is written. key: that of the command line, for messages. Lock a pipeline that is read and written
    again hours later, too: of two such verbs one would drop what the other has found.
    """
    if out is None:
        yield
        return
    with _locked(lock_beside(out), Path(out), key, group):
        yield


def lock_beside(out: Path | str) -> Path:
    """The lock of a file, or of a folder that is replaced as a whole: `.NAME.lock`."""
    path = Path(os.path.realpath(out))
    name = os.fsencode(path.name)
    return path.with_name(f".{path.name if len(name) <= MAX_LOCKED_NAME else hashlib.sha256(name).hexdigest()}{LOCK}")


def is_lock(name: str) -> bool:
    """Whether a file of this name in a run's folder is its lock, or is left of one."""
    return name == LOCK or name.startswith(f"{LOCK}.")


@contextmanager
def _locked(place: Path, out: Path, key: str, group: ProcessGroup | None) -> Iterator[None]:
    with ExitStack() as stack:

        def acquire() -> None:
            try:
                stack.enter_context(_folder_for_lock(place.parent))
                lock = _acquire(place, out)
                stack.callback(_release, lock)
            except OSError as error:
                raise UserError(f"{key}: {out} cannot be written ({error.strerror or error})") from error

        group.on_main(acquire) if group else acquire()
        yield


@contextmanager
def _folder_for_lock(folder: Path) -> Iterator[None]:
    """Make a folder and its missing parents; remove those that are empty in the end."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _acquire(place: Path, out: Path) -> SoftFileLease:
    """Lock `place`. Raises `UserError` that names the process which has the lock, and `OSError`.

    A live process of this machine is refused at once. Of one elsewhere, or one that has been silent, a sign of life is
    waited for: it comes within `HEARTBEAT` seconds, or its lock is taken over after `LEASE` seconds.
    """
    from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

    def stop(_: Any) -> None:
        """End at once: the main thread may be about to write, or wait where no exception reaches it."""
        try:
            line = f"error: {out}: another process has taken over, as this one was silent for {LEASE:g} s; it stops"
            print(line, file=sys.stderr, flush=True)
        finally:  # the terminal may be gone, or a log's disk full
            os._exit(STOPPED)

    options: dict[str, Any] = {"lease_duration": LEASE, "heartbeat_interval": HEARTBEAT, "on_compromise": stop}
    lock = SoftFileLease(place, timeout=0, thread_local=False, **options)
    began, waits = time.monotonic(), False
    while True:
        try:
            make_folder(place.parent)  # which another process, that had made it, may have removed as it was refused
            lock.acquire()
            break
        except LeaseSettingsMismatch as error:
            raise UserError(f"{out}: {error}") from error
        except Timeout:
            if lock.owner is not None:
                _wait_for_silence(lock, place, out)
                break
        waited = time.monotonic() - began  # while another process makes its lock, or releases it
        if waited > MOMENT and os.path.lexists(place):
            if not _is_half_written(place):
                raise UserError(f"{out}: {place} should say which process writes here, and is something else")
            if waited > LEASE:
                place.unlink(missing_ok=True)
            elif not waits:
                waits = _say_waiting(lock, out)
        time.sleep(0.05)
    with suppress(OSError):  # an empty lock, which is left after power loss, would say nothing
        fsync(place)
    return lock


def _is_half_written(place: Path) -> bool:
    """Whether a lock is the beginning of one, or nothing: its process was killed, or power was lost, as it was made."""
    if place.is_symlink() or not place.is_file():
        return False
    data = place.read_bytes()
    whole = data.rstrip(b"\0")
    return not whole or (whole.startswith(b"filelock/2\n") and not (whole.endswith(b"\n") and whole == data))


def _wait_for_silence(lock: SoftFileLease, place: Path, out: Path) -> None:
    """Take the lock over once its holder has been silent for `LEASE` seconds. Raises `UserError` where it lives."""
    from filelock import Timeout

    def last_sign() -> float:
        try:
            return os.lstat(place).st_mtime
        except OSError:
            return 0.0

    first, (host, _) = last_sign(), _describe_holder(lock)
    if host == socket.gethostname() and abs(time.time() - first) < 3 * HEARTBEAT:
        raise _refusal(lock, out)
    _say_waiting(lock, out)
    pause = min(1.0, LEASE / 4)

    def is_alive() -> bool:
        return last_sign() not in (first, 0.0)  # 0: it was just released or broken

    try:
        lock.acquire(timeout=LEASE + 2 * pause + 1, poll_interval=pause, cancel_check=is_alive)
    except Timeout:
        raise _refusal(lock, out) from None


def _say_waiting(lock: SoftFileLease, out: Path) -> bool:
    _, holder = _describe_holder(lock)
    line = f"{out}: {holder} may be writing here; waiting at most {LEASE + HEARTBEAT:g} s for a sign of it"
    print(line, file=sys.stderr, flush=True)
    return True


def _refusal(lock: SoftFileLease, out: Path) -> UserError:
    _, holder = _describe_holder(lock)
    return UserError(f"{out}: {holder} is writing here; one writer at a time, nothing was changed")


def _describe_holder(lock: SoftFileLease) -> tuple[str, str]:
    """The host of the process that has the lock, and `process 4242 on HOST`."""
    if (owner := lock.owner) is None:
        return "", "another process"
    host = quote(owner.hostname.partition("?")[0])[1:-1]  # what follows says in which container
    return host, f"process {owner.pid} on {host}"


def _release(lock: SoftFileLease) -> None:
    """Release, where the file system allows it: what is left is stale once this process is gone."""
    with suppress(OSError):
        lock.release(force=True)


# JSON against a class -----------------------------------------------------------------------------
# Strict: true is not a number, 1.0 is not a whole number, and "1" is neither.

Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
"""A whole number too, which becomes a float."""
Bool = Annotated[bool, Strict()]
Text = Annotated[str, Strict()]

EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a mapping",
    "dict_type": "a mapping",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "none_required": "null",
    "string_type": "text",
}


class FieldError(ValueError):
    """One field of an object is wrong; raised by checks that look at several fields."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


def validate(cls: type[T], data: Any, path: Path) -> T:
    """Return `data`, the content of the file `path`, as a `cls` (a pydantic model or a dataclass). Raises `FormatError`
    that names the file, the first wrong field, what was found and what is allowed."""
    try:
        return TypeAdapter(cls).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise FormatError(f"{path}: {_describe(first)}") from error
    except UnicodeEncodeError as error:  # a `FieldError` that quotes half of a character, which pydantic cannot print
        raise FormatError(f"{path}: {error.object}") from error


def _describe(detail: ErrorDetails) -> str:
    """The field, and what is wrong with it."""
    kind, context = detail["type"], detail.get("ctx", {})
    names = [str(part) for part in detail["loc"]]
    problem = f"{detail['msg']} (found {quote(detail['input'])})"
    if kind == "missing":
        problem = "missing"
    elif kind in ("extra_forbidden", "unexpected_keyword_argument"):
        problem = "no such field"
    elif kind in EXPECTED:
        problem = f"should be {EXPECTED[kind]} (found {quote(detail['input'])})"
    elif kind == "greater_than_equal":
        problem = f"should be at least {context['ge']} (found {quote(detail['input'])})"
    elif isinstance(error := context.get("error"), FieldError):
        names, problem = [*names, error.field], error.problem
    elif error is not None:
        problem = str(error)
    return f"{'.'.join(names)}: {problem}" if names else problem
