"""Which files and folders may be replaced: one rule for every writer.

A folder or file is ours by its content, never by a common name. A folder is ours by a marker, a JSON file with our own
words, and by its files: those that its manifest lists, or the few that a model can have. A file is ours by its own
bytes (`MARK`, or how a stream begins), or if the manifest beside it lists it with its present sha256. Only what is ours
is replaced, nothing is written through a link, and inputs are never written to. Anything else is refused by name.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PathError, PipelineLoadError, shown
from .opening import read_json
from .reading import MANIFEST

MARK = b"written by smalti"
"""A picture of ours has this among its first or last bytes."""
PICTURES = (b"\x89PNG", b"\xff\xd8", b"RIFF", b"BM")
BEGINNINGS = (b"VQC1",)
"""First bytes of other files of ours: streams."""
ENTRY = b"\x18\x06smalti\x18" + bytes([len(MARK)]) + MARK
"""How the footer of a parquet file says so: the key `smalti`."""
ENDS = 4096  # bytes that are read at either end of a file
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
BOOKKEEPING = ".cache/huggingface/"
"""Files that a desktop, and the Hub's client, leave in folders: nobody misses them."""
EDITED = (".json", ".md")
"""Files of a sealed folder that people edit: they are replaced only if they are as we wrote them."""

Inputs = Iterable[Any]
"""What a command reads: paths, and other things (a Hub id, None), which are ignored."""
Names = Mapping[str, str | None]
"""The files of a folder, each with its sha256 where that is known."""


@dataclass(frozen=True)
class Kind:
    """A kind of folder that is written as a whole. title: as in "a pipeline". says: whether the object in the JSON file
    `marker` can only be ours; without a marker, the folder's place is enough. names: whether the folder may hold a file
    of this name; None: the files that its manifest lists."""

    title: str
    marker: str | None
    says: Callable[[dict[str, Any]], bool] = bool
    names: Callable[[str], bool] | None = None

    def reason_against(self, folder: Path, found: list[str]) -> str | None:
        """The reason why `folder`, which holds the files `found`, is not ours; None if it is."""
        try:
            if self.marker and not self.says(read_json(folder / self.marker)):
                return f"it holds {named(found)}, and its {self.marker} is not that of {self.title}"
            listed = dict.fromkeys(found) if self.names else listed_in(folder)
        except PipelineLoadError:
            return f"it holds {named(found)}, and no {self.marker} of {self.title}"
        allowed = self.names or (listed | {MANIFEST: None}).__contains__
        if strange := [name for name in found if not allowed(name) or (folder / name).is_symlink()]:
            return f"it holds {named(strange)}, which smalti did not write"
        changed = [
            name for name in found if name.endswith(EDITED) and not is_as_listed(folder / name, listed.get(name))
        ]
        return f"{named(changed)} changed since it was written" if changed else None


def require_ours(folder: Path, kind: Kind | None, *, called: Path | None = None) -> None:
    """Raise `PathError` unless nothing is at `folder`, or an empty folder, or a folder of this kind without other
    files, and it is called by its name; None: no kind is allowed. called: the name of the folder in the message."""
    called = called or folder
    if folder.name in ("", ".."):  # `.`, too: what is beside a folder is by this name in it
        raise PathError(
            f"{called} cannot be written: a folder is replaced as a whole, by its name, which this is not; write "
            f"{os.path.realpath(folder)} in its place"
        )
    if not is_there(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        what = "a link" if folder.is_symlink() else "a file"
        raise PathError(f"{called} cannot be written: {what} has this name; nothing was overwritten")
    if not (found := contents(folder)):
        return
    reason = kind.reason_against(folder, found) if kind else f"it holds {named(found)}"
    if reason:
        what = f"is not empty and not {kind.title}" if kind else "is there and not empty"
        raise PathError(f"{called} {what}: {reason}; choose another folder, nothing was overwritten")


def contents(folder: Path) -> list[str]:
    """The names of everything in a folder: files, links, empty folders and those that cannot be looked into, without
    litter."""
    found: list[str] = []

    def keep(error: OSError) -> None:
        found.append(os.path.relpath(error.filename, folder))

    for parent, folders, files in os.walk(folder, onerror=keep):
        inside = os.path.relpath(parent, folder)
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [os.path.normpath(os.path.join(inside, name)) for name in (*files, *links) if name not in LITTER]
        if not folders and not files and inside != ".":
            found.append(inside)
    names = sorted(name.replace(os.sep, "/") for name in found)
    return [name for name in names if not name.startswith(BOOKKEEPING)]


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


def named(names: list[str]) -> str:
    """The first name, and the number of further ones."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{shown(names[0])}{more}"


# Files


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
