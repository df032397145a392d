"""Files that can be trusted: folders that appear whole or not at all, with manifests of sha256; what reads them again
is in `reading`.

Nothing here unpickles, and nothing is imported by a name found in a file. Every failure is a
`PipelineLoadError` whose message names the file, what was found and what is allowed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import (
    ConfigError,
    FormatError,
    IntegrityError,
    LimitError,
    PathError,
    PipelineLoadError,
    WeightsError,
    one_line,
    shown,
)
from .json_text import MAX_JSON_BYTES, parse_json
from .reading import MANIFEST, Folder, read_bytes, read_json, verify_manifest

__all__ = [
    "MANIFEST", "MAX_JSON_BYTES", "ConfigError", "Folder", "FormatError", "IntegrityError", "LimitError", "PathError",
    "PipelineLoadError", "WeightsError", "atomic_folder", "exchange", "fsync", "one_line", "parse_json", "read_bytes",
    "read_json", "replace_file", "shown", "verify_manifest", "write_json", "write_manifest",
]  # fmt: skip


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON, one trailing newline."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def replace_file(path: Path, data: bytes) -> None:
    """Write `path` whole or not at all. Raises `OSError` naming it, the bytes needed and those that are free."""
    if path.is_file() and path.read_bytes() == data:
        return  # whoever goes on with what is there should not need room for it
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise OSError(error.errno, f"{path} needs {len(data):,} bytes, {free:,} are free ({error.strerror})") from error


def fsync(path: Path) -> None:
    """Ask the operating system to put a file or folder on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_folder(target: Path | str, *, marker: str) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` only when the block ends without an error.

    An existing `target` is replaced as a whole, and only if it is empty or holds the file `marker` (so it is one of
    ours); anything else raises `PathError`. A killed process leaves at most a `.tmp-*` folder beside the target. Files
    are for everyone to read and for nobody else to write, unless the umask is stricter.
    """
    target = Path(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise PathError(f"{target}: a folder is to be written here, but something else has this name")
    if target.is_dir() and any(target.iterdir()) and not _is_file(target / marker):
        raise PathError(f"{target}: not empty and without a {marker}; choose another folder, nothing was overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{target.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        readable = stat.S_IMODE(temporary.stat().st_mode) & 0o755
        for path in [temporary, *sorted(temporary.rglob("*"))]:
            path.chmod(readable if path.is_dir() else readable & 0o644)  # safetensors keeps its files to itself
            fsync(path)
        if not (target.exists() and exchange(temporary, target)):
            discarded = target.parent / f".del-{target.name}-{uuid.uuid4().hex[:8]}"
            if target.exists():
                target.rename(discarded)
            temporary.rename(target)
            shutil.rmtree(discarded, ignore_errors=True)
        fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders swap their names in one step, of which a kill leaves all or nothing; False where the system or
    its file system can not (Linux can)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


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
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
