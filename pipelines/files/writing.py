"""Writing files, and folders of results, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizer import files
from tokenizer.files import MANIFEST, FolderKind, PathError, fsync, hash_file, make_folder, read_json, temporary_name

from .calls import FULL, NEW, renameat2
from .ownership import Inputs, Names, is_there, listed_in, require_apart, require_own_file, says_ours

RESULTS = "results"  # kind in the manifest of a folder of figures and tables


def replace_file(path: Path, data: bytes) -> None:
    """Write `path`, a file of a folder that is known to be ours, whole or not at all, even if power is lost.

    Raises `PathError` for a link, and `OSError` that names the path and, of a full disk, the bytes needed and free.
    """
    if path.is_symlink():
        raise PathError(f"{path}: a link, and nothing is written through a link")
    if path.is_file() and path.read_bytes() == data:
        return  # an unchanged file needs no free space
    temporary = temporary_name(path)
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


@contextmanager
def atomic_folder(target: Path | str, *, kind: FolderKind | None, inputs: Inputs = ()) -> Iterator[Path]:
    """`tokenizer.files.atomic_folder`, which also raises `PathError` if `target` is, contains or lies in one of the
    `inputs`."""
    require_apart(Path(target), inputs)
    with files.atomic_folder(target, kind=kind) as folder:
        yield folder


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
    temporary = temporary or temporary_name(target, suffix=target.suffix)
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
        temporary = temporary_name(target)
        make_folder(target.parent)
        temporary.mkdir()
    else:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        yield temporary
        made, texts, listed = sorted(temporary.iterdir()), {}, _results_in(target)  # which may have come meanwhile
        for path in made:
            require_own_file(target / path.name, listed)
            if not says_ours(path):
                texts[path.name] = {"sha256": hash_file(path), "size": path.stat().st_size}
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
