"""Read and write model folders: typed errors, JSON, sha256 manifests and atomic replacement.

Folders are untrusted. Nothing is unpickled, and no file decides what is imported. Any problem with a file raises one
`PipelineLoadError` that names the file, its content and what is allowed.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape as escape_pattern
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

MANIFEST = "manifest.json"
READS = 5  # attempts to read a folder that is being replaced
ASIDE = ".del"  # name prefix of a folder while it is being replaced
MAX_JSON_BYTES = 1 << 20
MAX_MESSAGE, MAX_QUOTED, MAX_PATH = 900, 80, 300  # characters
MAX_NAME = 255  # bytes of a file's name
FULL = (errno.ENOSPC, errno.EDQUOT)  # error numbers of a full disk
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)  # of calls that a file system lacks
EDITABLE = (".json", ".md")  # texts that users may edit; not overwritten if they differ from the manifest
# Files created by desktops and `hf download`, which may be deleted with the folder.
LITTER, HUB_CACHE = (".DS_Store", "Thumbs.db", "desktop.ini"), ".cache/huggingface/"


# Errors -------------------------------------------------------------------------------------------


class PipelineLoadError(ValueError):
    """Base class of errors about a saved model, token dataset or pipeline. The message is one printable line."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class FormatError(PipelineLoadError):
    """The format of a folder or file is not supported by this version."""


class PathError(PipelineLoadError):
    """A file is missing, or its path is not allowed."""


class UnreadableError(PathError):
    """A file could not be read (a disk error, missing permission); the file itself may be intact."""


class ConfigError(PipelineLoadError):
    """A configuration key is unknown, or a value has the wrong type or is out of range."""

    details: ValueError | None = None  # pydantic's error, if any


class IntegrityError(PipelineLoadError):
    """A file differs from its manifest, or two parts of a pipeline do not match."""


class WeightsError(PipelineLoadError):
    """A weight is missing, unexpected, misshapen or not finite."""


class LimitError(PipelineLoadError):
    """A file exceeds its size limit."""


def one_line(text: str) -> str:
    """Truncate `text` to 900 characters, and escape unprintable ones."""
    line = escape(text[: MAX_MESSAGE + 1])
    return line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - 4]} ..."


def escape(text: str, keep: str = "") -> str:
    """Escape unprintable characters (terminal escape sequences), except those in `keep`."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def quote(value: Any, limit: int = MAX_QUOTED) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


# Reading ------------------------------------------------------------------------------------------


def read_bytes(path: Path | str, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes. Raises `PathError`, `UnreadableError` or `LimitError`."""
    size = stat_file(path).st_size
    if size > limit:
        raise LimitError(f"{path}: {size} bytes, at most {limit} are allowed")
    with reading(path):
        return Path(path).read_bytes()


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn operating-system errors about `path` into `PathError` or `UnreadableError`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PathError(f"{path}: no such file") from error
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read ({error.strerror})") from error


def stat_file(path: Path | str) -> os.stat_result:
    """Return the `stat` of a regular file. Raises `PathError` for anything else, such as a pipe, which would block."""
    if "\0" in str(path):
        raise PathError(f"{path}: no such file")
    with reading(path):
        info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise PathError(f"{path}: not a regular file")
    return info


def is_file(path: Path | str) -> bool:
    try:
        stat_file(path)
    except UnreadableError:
        raise
    except PathError:
        return False
    return True


def read_json(path: Path | str) -> dict[str, Any]:
    """Read a JSON object from a file of at most 1 MiB. Raises `PathError`, `LimitError` or `FormatError`."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path)


def parse_json(data: bytes, path: Path | str) -> dict[str, Any]:
    """Parse `data`, the content of `path`, as a JSON object. Raises `FormatError`, also for NaN and Infinity."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def check_format_version(data: dict[str, Any], expected: int, path: Path) -> None:
    found = data.get("format_version")
    if type(found) is not int or found != expected:
        newer = "; a newer Smalti is needed" if type(found) is int and found > expected else ""
        raise FormatError(f"{path}: format_version: found {quote(found)}, this Smalti reads {expected}{newer}")


def check_name(name: str, path: Path | str) -> None:
    """Raise `PathError` unless `name`, found in the file `path`, is a relative path that stays inside its folder."""
    pure = PurePosixPath(name)
    if pure.as_posix() != name or pure.is_absolute() or ".." in pure.parts or re.search(r"\\|^[A-Za-z]:|^\.$", name):
        raise PathError(f"{path}: {quote(name)} is not the name of a file inside the folder")


def hash_file(path: Path) -> str:
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read `manifest.json`; `files` maps each name to its `sha256` and `size`. Raises a `PipelineLoadError`."""
    path = folder / MANIFEST
    manifest = read_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise FormatError(f"{path}: 'files' should list the files of the folder")
    for name, entry in files.items():
        check_name(name, path)
        sha256, size = (entry.get("sha256"), entry.get("size")) if isinstance(entry, dict) else (None, None)
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256) or type(size) is not int:
            raise FormatError(f"{path}: {quote(name)} should have a sha256 and a size in bytes, found {quote(entry)}")
    return manifest


def verify_manifest(folder: Path | str, *, unhashed: Collection[str] = ()) -> dict[str, Any]:
    """Check the size and sha256 of every file in `manifest.json`, and return the manifest. unhashed: files to check by
    size only. Raises `PathError` for a missing file, `IntegrityError` for a changed one, `FormatError` for a bad
    manifest."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if (size := stat_file(path).st_size) != entry["size"]:
            raise IntegrityError(f"{path}: {size} bytes, {MANIFEST} says {entry['size']}")
        if name not in unhashed and hash_file(path) != entry["sha256"]:
            raise IntegrityError(f"{path}: its sha256 differs from {MANIFEST}; the file was changed after saving")
    return manifest


def find_local_folder(path: Path) -> bool:
    """Return whether `path` is a folder; wait while it is being replaced. Raises `PathError` if that never ended."""
    for _ in range(20):
        if os.path.isdir(path):  # unlike `stat`, accepts null characters
            return True
        if not (aside := folders_aside(path)):
            return False
        time.sleep(0.05)
    raise PathError(f"{path}: a process was killed while it replaced the folder; rename {aside[0]} to {path.name}")


def folders_aside(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{ASIDE}-{escape_pattern(path.name)}-????????")) if path.name else []


def read_folder(folder: Path, read: Callable[[], T]) -> T:
    """Return `read()`, which reads files of `folder`; retry a few times if a run replaces the folder meanwhile."""
    for _ in range(READS):
        find_local_folder(folder)
        before = _identity(folder)
        try:
            found = read()
            if _identity(folder) == before:
                return found
        except PipelineLoadError:
            if _identity(folder) == before:
                raise
    raise UnreadableError(f"{folder}: replaced during each of {READS} attempts to read it; try again")


def _identity(folder: Path) -> tuple[int, ...] | None:
    try:
        info = os.stat(folder)
    except OSError:
        return None
    return info.st_dev, info.st_ino, info.st_mtime_ns


# Writing ------------------------------------------------------------------------------------------


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_manifest(folder: Path, **facts: Any) -> None:
    """Write `manifest.json` with `facts` and the sha256 and size of every other file in `folder`."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths.pop(MANIFEST, None)
    files = {name: {"sha256": hash_file(path), "size": path.stat().st_size} for name, path in paths.items()}
    write_json(folder / MANIFEST, {**facts, "files": files})


def temporary_name(path: Path, prefix: str = ".tmp", suffix: str = "") -> Path:
    """Return an unused hidden name next to `path` that keeps as much of its name as fits."""
    name, end = path.name, f"-{uuid.uuid4().hex[:8]}{suffix}"
    while name and len(os.fsencode(f"{prefix}-{name}{end}")) > MAX_NAME:
        name = name[:-1]
    return path.parent / f"{prefix}-{name}{end}"


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk, if the file system supports it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, and flush them to the disk."""
    if path.is_dir():
        with suppress(OSError):  # another user's parent may not be readable
            fsync(path.parent)
    else:
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync(path.parent)


@dataclass(frozen=True)
class FolderKind:
    """How to recognise a folder that we wrote and may replace as a whole.

    title: for messages, such as "a pipeline". marker: a JSON file whose content `is_ours` checks. may_hold: whether the
    folder may contain a file of this name; None allows the files listed in the manifest.
    """

    title: str
    marker: str | None
    is_ours: Callable[[dict[str, Any]], bool] = bool
    may_hold: Callable[[str], bool] | None = None

    def find_problem(self, folder: Path, names: list[str]) -> str | None:
        try:
            if self.marker and not self.is_ours(read_json(folder / self.marker)):
                return f"it holds {summarize(names)}, and its {self.marker} is not that of {self.title}"
            files = {} if self.may_hold else read_manifest(folder)["files"]
        except PipelineLoadError:
            return f"it holds {summarize(names)}, and no {self.marker or MANIFEST} of {self.title}"
        belongs = self.may_hold or {MANIFEST, *files}.__contains__
        if strange := [name for name in names if not belongs(name) or (folder / name).is_symlink()]:
            return f"it holds {summarize(strange)}, not written by smalti"
        texts = [name for name in names if name in files and name.endswith(EDITABLE)]
        if edited := [name for name in texts if hash_file(folder / name) != files[name]["sha256"]]:
            return f"{summarize(edited)} changed since it was written"
        return None


def require_replaceable(folder: Path, kind: FolderKind | None, *, title: Path | None = None) -> None:
    """Raise `PathError` if `folder` exists, unless it is empty or an unchanged folder of this kind.

    kind None: only an empty folder may be replaced. title: the folder's name in the message.
    """
    title = title or folder
    if folder.name in ("", ".."):  # includes ".", whose `name` is empty
        raise PathError(f"{title} cannot be written: use the folder's full path, {os.path.realpath(folder)}")
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:  # the name is too long, or the parent is closed to us
        raise PathError(f"{title}: cannot be written ({error.strerror})") from error
    if folder.is_symlink() or not folder.is_dir():
        what = "a link" if folder.is_symlink() else "a file"
        raise PathError(f"{title} cannot be written: {what} with this name exists; nothing was overwritten")
    names = list_contents(folder)
    problem = None if not names else kind.find_problem(folder, names) if kind else f"it holds {summarize(names)}"
    if problem:
        what = f"is not empty and not {kind.title}" if kind else "exists and is not empty"
        raise PathError(f"{title} {what}: {problem}; choose another folder, nothing was overwritten")


def list_contents(folder: Path) -> list[str]:
    """List files, links, and empty or unreadable folders below `folder`, except `LITTER` and the Hub cache."""
    found: list[Path] = []

    def keep(error: OSError) -> None:
        found.append(Path(error.filename))

    for parent, folders, files in os.walk(folder, onerror=keep):
        inside = Path(parent)
        links = [name for name in folders if (inside / name).is_symlink()]
        found += [inside / name for name in (*files, *links) if name not in LITTER]
        if not folders and not files and inside != folder:
            found.append(inside)
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    return [name for name in names if not name.startswith(HUB_CACHE)]


def summarize(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{quote(names[0])}{more}"


@contextmanager
def atomic_folder(target: Path | str, *, kind: FolderKind | None) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `target` if the block ends without an error.

    An existing folder is replaced as a whole if `require_replaceable` allows it both before and after the block. A
    killed process leaves at most a hidden `.tmp-*` folder; power loss leaves the old folder, perhaps as `.del-*`, or
    the new one. The files are readable by all users unless the umask is stricter. Raises `PathError`, also for a parent
    that cannot be a folder.
    """
    target = Path(target)
    require_replaceable(target, kind)
    temporary = temporary_name(target)
    try:
        make_folder(target.parent)
        temporary.mkdir()
    except (NotADirectoryError, FileExistsError) as error:
        raise PathError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        yield temporary
        publish_folder(temporary, target, kind=kind)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(temporary: Path, target: Path, *, kind: FolderKind | None) -> None:
    """Flush `temporary` to the disk, then rename it to `target` as `atomic_folder` does; between two renames, the old
    folder is `.del-NAME-*`. Raises `PathError`, and keeps `temporary`, if `target` may not be replaced."""
    readable = stat.S_IMODE(temporary.stat().st_mode) & 0o755
    for path in [temporary, *sorted(temporary.rglob("*"))]:
        with suppress(PermissionError):  # a file system without permissions
            path.chmod(readable if path.is_dir() else readable & 0o644)  # safetensors creates private files
        fsync(path)
    require_replaceable(target, kind)
    if not os.path.lexists(target):
        temporary.rename(target)
        return fsync(target.parent)
    old = temporary_name(target, ASIDE)
    try:
        target.rename(old)
        require_replaceable(old, kind, title=target)
        temporary.rename(target)
    except BaseException:  # restore the old folder, also after Ctrl-C
        if os.path.lexists(old) and not os.path.lexists(target):
            old.rename(target)
        raise
    fsync(target.parent)  # before deleting the old folder, as file systems may reorder operations
    shutil.rmtree(old, ignore_errors=True)


# The Hub ------------------------------------------------------------------------------------------

PIPELINE_INDEX = "model_index.json"
HUB_ID = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"


def find_folder(source: str | Path, patterns: list[str], **options: Any) -> Path:
    """Return the local folder `source`, or download files matching `patterns` from a Hub repository into the cache.
    options: those of huggingface_hub's `snapshot_download`. Raises `PathError`."""
    if str(source) and find_local_folder(Path(source)):
        return Path(source)
    name = quote(str(source), MAX_PATH)
    if os.path.exists(source):
        raise PathError(f"{name} is a file; give its folder, or a Hub id")
    if not re.fullmatch(HUB_ID, str(source)):
        raise PathError(f"{name} is neither an existing folder nor a Hub id of the form 'owner/name'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns, **options))
    except Exception as error:  # the client, httpx and json raise many types
        raise PathError(
            f"{str(source)!r} is not an existing folder and cannot be fetched from the Hub: "
            f"{_reason(error).rstrip('.')}{_suggest_folder(Path(source))}"
        ) from error


def _suggest_folder(path: Path) -> str:
    folders = [other.name for other in path.parent.glob("*/")]
    near = difflib.get_close_matches(path.name, folders, 1, 0.75)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


class PushError(OSError):
    """Writing to the Hub failed; `__cause__` is huggingface_hub's error, if any."""


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    repo_type: str = "model",
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
) -> Any:
    """Upload `folder` with a manifest in one commit; create the repository if needed.

    The commit deletes files of an earlier upload: those in the repository's `manifest.json` that `folder` lacks. Other
    files stay. revision: the branch. create_pr: open a pull request. Returns huggingface_hub's `CommitInfo`. Raises
    `PushError`, also if the repository holds a pipeline and `folder` does not.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if not (folder / MANIFEST).exists():
        write_manifest(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    api = HfApi(token=token)
    place: dict[str, Any] = {"repo_id": repo_id, "repo_type": repo_type}
    try:
        api.create_repo(**place, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(**place, branch=revision, exist_ok=True)
        there = set(api.list_repo_files(**place, revision=revision))
        if PIPELINE_INDEX in there and PIPELINE_INDEX not in paths:
            raise PushError(f"{repo_id} holds a pipeline; push a pipeline, or choose another repository")
        listed = set[str]()
        if MANIFEST in there:
            with suppress(PipelineLoadError):  # not our manifest, so delete nothing
                cached = api.hf_hub_download(filename=MANIFEST, revision=revision, **place)
                listed = set(read_manifest(Path(cached).parent)["files"])
        operations: list[Any] = [CommitOperationDelete(name) for name in sorted(listed & there - set(paths))]
        operations += [CommitOperationAdd(name, path) for name, path in paths.items()]
        # Not `upload_folder`: it may split the upload into several commits, and the repository would not load between
        # them.
        place["revision"] = revision
        return api.create_commit(operations=operations, commit_message=commit_message, create_pr=create_pr, **place)
    except PushError:
        raise
    except Exception as error:  # the client, httpx and json raise many types
        raise PushError(one_line(f"{repo_id} cannot be written to: {_reason(error)}")) from error


def _reason(error: Exception) -> str:
    if type(error).__name__ == "LocalEntryNotFoundError":  # its message has several lines of advice for programmers
        return "it is not in the cache, and the Hub was not reached"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
