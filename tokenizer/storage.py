"""Files that can be trusted: bounded JSON, folders that appear whole or not at all, manifests of sha256.

Nothing here unpickles, and nothing is imported by a name found in a file. Every failure is a
`PipelineLoadError` whose message names the file, what was found and what is allowed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

MAX_JSON_BYTES = 1 << 20
MANIFEST = "manifest.json"


class PipelineLoadError(ValueError):
    """The root of everything that can be wrong with a saved model, token dataset or pipeline folder."""


class FormatError(PipelineLoadError):
    """The folder or file is not in a format that this version reads."""


class PathError(PipelineLoadError):
    """A file is missing, or is not where it may be."""


class ConfigError(PipelineLoadError):
    """A configuration value is unknown, of the wrong type or out of range."""


class IntegrityError(PipelineLoadError):
    """A file is not the one that was written: its size or sha256 differs, or two parts do not belong together."""


class WeightsError(PipelineLoadError):
    """A weight is missing, superfluous, of the wrong shape, or not finite."""


class LimitError(PipelineLoadError):
    """A file is larger than it may be."""


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes once, so that what was verified is what is parsed.

    Raises `PathError` when it is missing or not a regular file, `LimitError` when it is larger.
    """
    try:
        info = path.stat()
    except (OSError, ValueError) as error:
        raise PathError(f"{path}: no such file") from error
    if not stat.S_ISREG(info.st_mode):
        raise PathError(f"{path}: not a regular file")
    if info.st_size > limit:
        raise LimitError(f"{path}: {info.st_size} bytes, at most {limit} allowed")
    return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most 1 MiB; duplicate keys, NaN and Infinity are refused.

    Raises `PathError`, `LimitError` or `FormatError`.
    """
    data = read_bytes(path, MAX_JSON_BYTES)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise FormatError(f"{path}: a key stands twice in {sorted(keys)[:10]}")
        return dict(pairs)

    def refuse(constant: str) -> NoReturn:
        raise FormatError(f"{path}: {constant} is not a JSON number")

    def finite(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse(text)  # 1e999 would be infinite

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a plain ValueError
        raise FormatError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON, one trailing newline."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


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
    ours); anything else raises `PathError`. A killed process leaves at most a `.tmp-*` folder beside the target.
    """
    target = Path(target)
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise PathError(f"{target}: a folder is to be written here, but something else has this name")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).exists():
        raise PathError(f"{target}: not empty and without a {marker}; choose another folder, nothing was overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".tmp-{target.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            fsync(path)
        fsync(temporary)
        discarded = target.parent / f".del-{target.name}-{uuid.uuid4().hex[:8]}"
        if target.exists():
            target.rename(discarded)
        temporary.rename(target)
        fsync(target.parent)
        shutil.rmtree(discarded, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write `manifest.json`: sha256 and size of every other file below `folder`, and `facts` beside them."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST
    }
    write_json(folder / MANIFEST, {**facts, "files": files})


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Check every file that `manifest.json` lists; return the manifest.

    Raises `PathError` for a missing file, `IntegrityError` for a changed one, `FormatError` for a bad manifest.
    """
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise FormatError(f"{folder / MANIFEST}: 'files' should list the files of the folder")
    for name, entry in files.items():
        path = folder / name
        if name.startswith("/") or ".." in Path(name).parts or "\\" in name:
            raise PathError(f"{folder / MANIFEST}: {name!r} leads out of the folder")
        if not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
            raise FormatError(f"{folder / MANIFEST}: the entry of {name!r} should hold sha256 and size")
        if not os.path.isfile(path):  # unlike Path.is_file, also for a name that no file can have
            raise PathError(f"{folder}: {name[:200]!r} is missing, though {MANIFEST} lists it")
        size = path.stat().st_size
        if size != entry["size"]:
            raise IntegrityError(f"{path}: {size} bytes, the manifest says {entry['size']}")
        if _sha256(path) != entry["sha256"]:
            raise IntegrityError(f"{path}: its sha256 differs from the manifest; the file was changed after saving")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
