"""Writing files and folders whole or not at all, and manifests of sha256; `reading` reads them.

Nothing here unpickles, and nothing is imported by a name found in a file. What may not be written raises a
`PipelineLoadError` whose message names the file, what was found and what is allowed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .calls import FULL, LONGEST, NEW, NOT_KNOWN, SWAP, renameat2
from .errors import PathError
from .opening import read_json
from .ownership import (
    Inputs,
    Kind,
    Names,
    is_there,
    listed_in,
    require_apart,
    require_ours,
    require_own_file,
    says_ours,
)
from .reading import MANIFEST

RESULTS = "results"  # kind in the manifest of a folder of figures and tables


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON with a trailing newline."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def replace_file(path: Path, data: bytes) -> None:
    """Write `path`, a file of a folder that is known to be ours, whole or not at all, even if power is lost.

    Raises `PathError` for a link, and `OSError` that names the path and, of a full disk, the bytes needed and free.
    """
    if path.is_symlink():
        raise PathError(f"{path}: a link, and nothing is written through a link")
    if path.is_file() and path.read_bytes() == data:
        return  # an unchanged file needs no free space
    temporary = beside(path)
    try:
        temporary.write_bytes(data)
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    except OSError as error:
        if error.errno not in FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        free = shutil.disk_usage(path.parent).free
        raise OSError(error.errno, f"{path} needs {len(data):,} bytes, {free:,} are free ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def beside(path: Path, prefix: str = ".tmp", suffix: str = "") -> Path:
    """An unused name in the same folder, for what will become `path`, or was it: with as much of its name as fits."""
    name, end = path.name, f"-{uuid.uuid4().hex[:8]}{suffix}"
    while name and len(os.fsencode(f"{prefix}-{name}{end}")) > LONGEST:
        name = name[:-1]
    return path.parent / f"{prefix}-{name}{end}"


def fsync(path: Path) -> None:
    """Ask the operating system to write a file or folder to the disk; not every file system does so with folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_KNOWN or not path.is_dir():
            raise
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, so that power loss does not take them with what is in them:
    nor the first that is there, which a process may have made that was killed before it could see to that."""
    if path.is_dir():
        with suppress(OSError):  # it is another's, and may not be read
            fsync(path.parent)
    else:
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync(path.parent)


@contextmanager
def atomic_folder(target: Path | str, *, kind: Kind | None, inputs: Inputs = ()) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` only when the block ends without an error.

    A folder at `target` is replaced as a whole if it is empty, or of this `kind` and holds nothing else, both at the
    beginning and when the names are exchanged; kind None: only if it is empty. Raises `PathError` otherwise, and if
    `target` is, contains or lies in one of the `inputs`. A killed process leaves at most a `.tmp-*` folder beside the
    target; power loss leaves the old folder or the new one. Everyone may read the files and only the owner may write
    them, unless the umask is stricter.
    """
    target = Path(target)
    require_apart(target, inputs)
    require_ours(target, kind)
    temporary = _made_beside(target)
    try:
        yield temporary
        readable = stat.S_IMODE(temporary.stat().st_mode) & 0o755
        for path in [temporary, *sorted(temporary.rglob("*"))]:
            with suppress(PermissionError):  # a file system that keeps no modes
                path.chmod(readable if path.is_dir() else readable & 0o644)  # safetensors makes its files private
            fsync(path)
        _put_in_place(temporary, target, kind)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _made_beside(target: Path) -> Path:
    temporary = beside(target)
    try:
        make_folder(target.parent)
        temporary.mkdir()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST):
            raise PathError(f"{target}: cannot be written ({error.strerror})") from error
        raise
    return temporary


def _put_in_place(temporary: Path, target: Path, kind: Kind | None) -> None:
    """Rename the folder to `target`. The old folder of that name is deleted, unless someone else put something into it
    meanwhile."""
    require_ours(target, kind)
    if not os.path.lexists(target):
        rename_new(temporary, target)
        fsync(target.parent)
        return
    old = beside(target, ".del")
    swapped = exchange(temporary, target)
    try:
        (temporary if swapped else target).rename(old)
        require_ours(old, kind, called=target)
        if not swapped:
            temporary.rename(target)
    except BaseException:  # at Ctrl-C, too, what was there is there
        if swapped:
            aside = old if os.path.lexists(old) else temporary
            exchange(aside, target)
            aside.rename(temporary)
        elif not os.path.lexists(target):
            old.rename(target)
        raise
    fsync(target.parent)  # before anything goes: file systems may do what they are told in another order
    shutil.rmtree(old, ignore_errors=True)


def check_file(target: Path | str, inputs: Inputs = ()) -> None:
    """Raise `PathError` for what `atomic_file` would refuse, to be called before hours of work."""
    require_apart(Path(target), inputs)
    require_own_file(Path(target))


@contextmanager
def atomic_file(target: Path | str, *, inputs: Inputs = (), temporary: Path | None = None) -> Iterator[Path]:
    """Yield the path of a temporary file that becomes `target` only when the block ends without an error, and then is
    on the disk. temporary: where it is, on the same disk; what a killed process left there is written over.

    Raises `PathError` if the target, at the beginning or at the end, is a link or a file that is not ours, or if it is,
    contains or lies in one of the `inputs`.
    """
    target = Path(target)
    check_file(target, inputs)
    make_folder(target.parent)
    temporary = temporary or beside(target, suffix=target.suffix)
    try:
        yield temporary
        fsync(temporary)
        place_file(temporary, target)
        fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def place_file(temporary: Path, target: Path, listed: Names | None = None) -> None:
    """Rename a file to `target`; replaces only a file of ours, see `require_own_file`."""
    require_own_file(target, listed)
    if os.path.lexists(target):
        temporary.replace(target)
    else:
        rename_new(temporary, target)


def check_results(target: Path | str, names: Iterable[str] = (), inputs: Inputs = ()) -> None:
    """Raise `PathError` for what `results_folder` would refuse to write under `names`, to be called before hours of
    work."""
    require_apart(Path(target), inputs)
    listed = _results_in(Path(target))
    for name in names:
        require_own_file(Path(target) / name, listed)


@contextmanager
def results_folder(target: Path | str, *, inputs: Inputs = (), temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder whose files (it has no subfolders) are moved into `target` when the block ends without
    an error, and then are on the disk; other files there are kept. temporary: where it is, on the same disk; what a
    killed process left there is removed.

    A file replaces one of the same name only if that is ours: a picture is marked, other files are listed with their
    sha256 in `manifest.json`. Raises `PathError` that names a file that is not ours, before any is replaced.
    """
    target = Path(target)
    check_results(target, inputs=inputs)
    listed = _results_in(target)
    if temporary is None:
        temporary = _made_beside(target)
    else:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        yield temporary
        made, texts, listed = sorted(temporary.iterdir()), {}, _results_in(target)  # which may have come meanwhile
        for path in made:
            require_own_file(target / path.name, listed)
            if not says_ours(path):
                texts[path.name] = {"sha256": _sha256(path), "size": path.stat().st_size}
            fsync(path)
        make_folder(target)
        kept = read_json(target / MANIFEST)["files"] if listed is not None else {}
        manifest = {"kind": RESULTS, "files": dict(sorted({**kept, **texts}.items()))}
        replaced = {name: sha256 for name, sha256 in (listed or {}).items() if name in texts}
        if texts:  # first, so that what is there is ours at any moment
            _write_results(target, {**manifest, **({"replacing": replaced} if replaced else {})})
        for path in made:
            place_file(path, target / path.name, listed)
        fsync(target)
        if replaced:
            _write_results(target, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_results(target: Path, manifest: dict[str, Any]) -> None:
    replace_file(target / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def _results_in(target: Path) -> Names | None:
    """The results that the folder's manifest lists; None without a manifest. Raises `PathError` for a folder with a
    manifest of another kind: a model, a pipeline, a token dataset."""
    if is_there(target) and (target.is_symlink() or not target.is_dir()):
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
    """Rename `one` to `other`. Raises `PathError` if `other` exists by now."""
    done = renameat2(one, other, NEW)
    if done is None and not os.path.lexists(other):
        one.rename(other)
    elif not done:
        raise PathError(f"{other}: something came to have this name meanwhile; nothing was overwritten")


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step, so that a kill leaves all or nothing; False if the system or its file
    system cannot (Linux can)."""
    return bool(renameat2(one, other, SWAP))


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write `manifest.json`: `facts`, and the sha256 and size of every other file below `folder`."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST
    }
    write_json(folder / MANIFEST, {**facts, "files": files})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
