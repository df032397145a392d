"""Files that can be trusted: folders that appear whole or not at all, with manifests of sha256; what reads them again
is in `reading`.

Nothing here unpickles, and nothing is imported by a name found in a file. Every failure is a
`PipelineLoadError` whose message names the file, what was found and what is allowed.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import (
    PathError,
)
from .ownership import Inputs, Kind, Names, listed_in, require_apart, require_ours, require_own_file, says_ours
from .reading import MANIFEST, read_json

SWAP, NEW = 2, 1  # flags of renameat2: RENAME_EXCHANGE, RENAME_NOREPLACE
RESULTS = "results"  # what the manifest of a folder of figures and tables says it is


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON, one trailing newline."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def replace_file(path: Path, data: bytes) -> None:
    """Write `path`, a file of a folder that is known to be ours, whole or not at all.

    Raises `PathError` for a link, and `OSError` naming the path, the bytes needed and those that are free.
    """
    if path.is_symlink():
        raise PathError(f"{path}: a link, and nothing is written through a link")
    if path.is_file() and path.read_bytes() == data:
        return  # whoever goes on with what is there should not need room for it
    temporary = beside(path)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise OSError(error.errno, f"{path} needs {len(data):,} bytes, {free:,} are free ({error.strerror})") from error


def beside(path: Path, prefix: str = ".tmp", suffix: str = "") -> Path:
    """A name of its own in the same folder, for what is to become `path`, or was it."""
    return path.parent / f"{prefix}-{path.name}-{uuid.uuid4().hex[:8]}{suffix}"


def fsync(path: Path) -> None:
    """Ask the operating system to put a file or folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_folder(target: Path | str, *, kind: Kind | None, inputs: Inputs = ()) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` only when the block ends without an error.

    What is at `target` is replaced as a whole, if it is empty or a folder of this `kind`, and nothing else is in it,
    both at the beginning and when the names are exchanged; None: only if it is empty. Raises `PathError` otherwise, and
    if `target` is, holds or lies in one of the `inputs`. A killed process leaves at most a `.tmp-*` folder beside the
    target. Files are for everyone to read and for nobody else to write, unless the umask is stricter.
    """
    target = Path(target)
    require_apart(target, inputs)
    require_ours(target, kind)
    temporary = _made_beside(target)
    try:
        yield temporary
        readable = stat.S_IMODE(temporary.stat().st_mode) & 0o755
        for path in [temporary, *sorted(temporary.rglob("*"))]:
            path.chmod(readable if path.is_dir() else readable & 0o644)  # safetensors keeps its files to itself
            fsync(path)
        _put_in_place(temporary, target, kind)
        fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _made_beside(target: Path) -> Path:
    temporary = beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST):
            raise PathError(f"{target}: cannot be written ({error.strerror})") from error
        raise
    return temporary


def _put_in_place(temporary: Path, target: Path, kind: Kind | None) -> None:
    """Give the folder its name; what had it is deleted, unless something of somebody else's came into it meanwhile."""
    require_ours(target, kind)
    if not os.path.lexists(target):
        rename_new(temporary, target)
        return
    old = beside(target, ".del")
    swapped = exchange(temporary, target)
    if swapped:
        temporary.rename(old)
    else:
        target.rename(old)
    try:
        require_ours(old, kind, called=target)
    except PathError:
        if swapped:
            exchange(old, target)
            old.rename(temporary)
        else:
            old.rename(target)
        raise
    if not swapped:
        temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def check_file(target: Path | str, inputs: Inputs = ()) -> None:
    """Raise `PathError` now for what `atomic_file` would refuse, before hours of work."""
    require_apart(Path(target), inputs)
    require_own_file(Path(target))


@contextmanager
def atomic_file(target: Path | str, *, inputs: Inputs = ()) -> Iterator[Path]:
    """Yield the path of a temporary file that becomes `target` only when the block ends without an error.

    Raises `PathError` if the target is a file that does not say that it is ours, or a link, at the beginning or at the
    end, or is, holds or lies in one of the `inputs`.
    """
    target = Path(target)
    check_file(target, inputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(target, suffix=target.suffix)
    try:
        yield temporary
        place_file(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def place_file(temporary: Path, target: Path, listed: Names | None = None) -> None:
    """Give a file its name, in place of one of ours at most; see `require_own_file`."""
    require_own_file(target, listed)
    if os.path.lexists(target):
        temporary.replace(target)
    else:
        rename_new(temporary, target)


def check_results(target: Path | str, names: Iterable[str] = (), inputs: Inputs = ()) -> None:
    """Raise `PathError` now for what `results_folder` would refuse if it is to hold `names`, before hours of work."""
    require_apart(Path(target), inputs)
    listed = _results_in(Path(target))
    for name in names:
        require_own_file(Path(target) / name, listed)


@contextmanager
def results_folder(target: Path | str, *, inputs: Inputs = ()) -> Iterator[Path]:
    """Yield a temporary folder whose files (it has no folders) go into `target` when the block ends without an error,
    beside whatever else is there.

    A file replaces one of its name only if that is ours: a picture says so itself, the others are listed with their
    sha256 in `manifest.json`. Raises `PathError` naming one that is not, before any is replaced.
    """
    target = Path(target)
    check_results(target, inputs=inputs)
    listed = _results_in(target)
    temporary = _made_beside(target)
    try:
        yield temporary
        made, texts = sorted(temporary.iterdir()), {}
        for path in made:
            require_own_file(target / path.name, listed)
            if not says_ours(path):
                texts[path.name] = {"sha256": _sha256(path), "size": path.stat().st_size}
        target.mkdir(parents=True, exist_ok=True)
        for path in made:
            place_file(path, target / path.name, listed)
        kept = read_json(target / MANIFEST)["files"] if listed is not None else {}
        if texts:
            manifest = {"kind": RESULTS, "files": dict(sorted({**kept, **texts}.items()))}
            replace_file(target / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _results_in(target: Path) -> Names | None:
    """The results that the folder's manifest lists, None where there is none. Raises `PathError` for a folder that
    holds something else of which the whole is one thing: a model, a pipeline, a token dataset."""
    if target.is_symlink() or (os.path.lexists(target) and not target.is_dir()):
        what = "a link" if target.is_symlink() else "a file"
        raise PathError(f"{target} cannot be written: {what} has this name; nothing was overwritten")
    if not os.path.lexists(target / MANIFEST):
        return None
    if read_json(target / MANIFEST).get("kind") != RESULTS:
        raise PathError(
            f"{target}: its {MANIFEST} is not one of results; choose another folder, nothing was overwritten"
        )
    return listed_in(target)


def rename_new(one: Path, other: Path) -> None:
    """Rename, but never onto something: raises `PathError` where `other` has come to be."""
    done = _renameat2(one, other, NEW)
    if done is None and not os.path.lexists(other):
        one.rename(other)
        done = True
    if not done:
        raise PathError(f"{other}: something came to have this name meanwhile; nothing was overwritten")


def exchange(one: Path, other: Path) -> bool:
    """Let two folders swap their names in one step, of which a kill leaves all or nothing; False where the system or
    its file system cannot (Linux can)."""
    return bool(_renameat2(one, other, SWAP))


def _renameat2(one: Path, other: Path, flags: int) -> bool | None:
    """Whether it was done; None where the system or its file system has no such call. Raises `OSError`."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    here = -100  # AT_FDCWD
    if rename(here, os.fsencode(one), here, os.fsencode(other), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return None
    if number in (errno.EEXIST, errno.ENOTEMPTY):
        return False
    raise OSError(number, os.strerror(number), str(one))


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write `manifest.json`: sha256 and size of every other file below `folder`, and `facts` beside them."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST
    }
    write_json(folder / MANIFEST, {**facts, "files": files})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
