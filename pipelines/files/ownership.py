"""Which files may be replaced: those that are ours by their own bytes (`MARK`, or how a stream begins), or that the
manifest beside them lists with their present sha256. Nothing is written through a link, and inputs are never written
to. `tokenizer.files` says which folders may be replaced.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizer.files import MANIFEST, PathError, read_json

MARK = b"written by smalti"
"""A picture of ours has this among its first or last bytes."""
PICTURES = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"BM")
BEGINNINGS = (b"VQC1",)
"""First bytes of other files of ours: streams."""
ENTRY = b"\x18\x06smalti\x18" + bytes([len(MARK)]) + MARK
"""How the footer of a parquet file says so: the key `smalti`."""
ENDS = 4096  # bytes that are read at either end of a file

Inputs = Iterable[Any]
"""What a command reads: paths, and other things (a Hub id, None), which are ignored."""
Names = Mapping[str, str | None]
"""The files of a folder, each with its sha256 where that is known."""


def listed_in(folder: Path) -> dict[str, str | None]:
    """The files that `manifest.json` lists, with their sha256: the one that is there, of a file that was `replacing`
    another when its writer was killed. Raises a `PipelineLoadError` if it lists none."""
    manifest = read_json(folder / MANIFEST)
    files, before = manifest.get("files"), manifest.get("replacing")
    if not isinstance(files, dict):
        raise PathError(f"{folder / MANIFEST}: 'files' should list the files of the folder")
    listed = {name: entry.get("sha256") if isinstance(entry, dict) else None for name, entry in files.items()}
    kept = before.items() if isinstance(before, dict) else ()
    return listed | {name: sha256 for name, sha256 in kept if is_as_listed(folder / name, sha256)}


def is_as_listed(path: Path, sha256: str | None) -> bool:
    """Whether a file has this sha256; None: any."""
    try:
        return sha256 is None or hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Whether anything has this name. Raises `PathError` for one that is too long for anything, before hours of
    work."""
    try:
        os.lstat(path)
        return True
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise PathError(f"{path}: cannot be written ({error.strerror})") from error
        return False


def require_own_file(path: Path, listed: Names | None = None) -> None:
    """Raise `PathError` unless nothing is at `path`, or a file that is ours by its bytes, or that `listed` holds with
    its present sha256."""
    if not is_there(path):
        return
    if path.is_symlink():
        raise PathError(f"{path} cannot be written: it is a link, and nothing is written through a link")
    if not path.is_file():
        raise PathError(f"{path} cannot be written: something else has this name")
    sha256 = (listed or {}).get(path.name)
    if not says_ours(path) and not (sha256 is not None and is_as_listed(path, sha256)):
        changed = " as it is now" if listed and path.name in listed else ""
        raise PathError(
            f"{path} cannot be written: smalti did not write the file that is there{changed}; choose "
            "another name, or move it away; nothing was overwritten"
        )


def says_ours(path: Path) -> bool:
    """Whether the bytes of a file show that it is ours; an empty file counts as ours."""
    with path.open("rb") as file:
        start = file.read(ENDS)
        file.seek(max(0, path.stat().st_size - ENDS))
        end = file.read(ENDS)
    picture = start.startswith(PICTURES) and (MARK in start or MARK in end)
    return not start or start.startswith(BEGINNINGS) or picture or is_our_archive(start, end)


def is_our_archive(start: bytes, end: bytes) -> bool:
    """Whether a file that begins and ends so is an archive that we wrote: a zip with our comment, a tar that begins
    with it, a parquet file with our key. That one of our pictures is in it does not make it ours."""
    if start.startswith(b"PK\x03\x04"):
        return end.endswith(MARK)
    if start.startswith(b"PAR1"):
        return end.endswith(b"PAR1") and ENTRY in end
    return start.startswith(b"././@PaxHeader\0") and start[512:].startswith(b"29 comment=" + MARK + b"\n")


def require_apart(out: Path, inputs: Inputs) -> None:
    """Raise `PathError` if `out` is one of the `inputs`, lies in one, or contains one. Inputs that are not existing
    paths, such as a Hub id, are ignored."""
    for source in inputs:
        if source is not None and os.path.exists(source) and (how := how_they_touch(out, source)):
            raise PathError(
                f"{out} cannot be written: it {how} what is read, {source}; choose another place, nothing "
                "was overwritten"
            )


def how_they_touch(out: Path, source: Any) -> str | None:
    """How `out` stands to the existing `source`: it is it, lies in it, or holds it; None if it does neither."""
    there, here = os.path.realpath(out), os.path.realpath(source)
    if here == there or (os.path.exists(out) and os.path.samefile(out, source)):
        return "is"
    if is_inside(there, here):
        return "lies in"
    return "holds" if is_inside(here, there) else None


def is_inside(path: str, folder: str) -> bool:
    """Whether one resolved path is below another."""
    return path.startswith(os.path.join(folder, ""))
