"""Which states a run has: the newest that is whole, those that go as new ones come, and what killed processes left."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import sys
import uuid
from pathlib import Path

from tokenizer.files import IntegrityError, PipelineLoadError, UnreadableError, verify_manifest

from .sharded import Tensors

LEFT = re.compile(
    r"\.(tmp|del)-(step-\d{8,}|(\.tmp-)?(tokenizer|pipeline)(-[0-9a-f]{8})?|(config|metrics|trackers)\.(yaml|jsonl|json)"
    r"|\w+-\d{8,}\.png)-[0-9a-f]{8}(\.png)?"
)
"""What a killed process may leave of its own in a run folder."""
NAME = re.compile(r"step-\d{8,}")
SPARE = 1.2  # a new state may be a little larger than the last, and the disk has other users


def latest_state(run: Path) -> Path | None:
    """The newest state whose manifest verifies, or None where there is none; what killed processes left is removed.

    A newer state that does not verify is passed over with a warning on stderr. Raises `IntegrityError` where there are
    states and none verifies, and `UnreadableError` where the system does not let one be read, or looked for, which may
    be a good one: nothing begins at zero over good work. Call it on the main process only.
    """
    folder = Path(run) / "state"
    try:
        states = states_in(folder)
    except OSError as error:
        told = f"{folder}: cannot be read, so it is not known which states there are; nothing was changed ({error})"
        raise UnreadableError(told) from error
    newest = next((path for path in reversed(states) if _verifies(path)), None) or _restore_set_aside(folder)
    if newest is None and states:
        raise IntegrityError(
            f"{folder}: none of its {len(states)} states is whole; nothing was changed. To begin again at zero, choose "
            f"another out=, or delete {run}"
        )
    for leftover in [path for place in (Path(run), folder, Path(run) / "previews") for path in place.glob(".[td]*")]:
        if LEFT.fullmatch(leftover.name):
            _remove(leftover)
    return newest


def _remove(leftover: Path) -> None:
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def require_space(folder: Path, parts: dict[str, Tensors]) -> None:
    """The old states stay until the new one is complete, so there must be room for one more."""
    states = states_in(folder)
    last = sum(path.stat().st_size for path in states[-1].rglob("*") if path.is_file()) if states else 0
    coming = sum(value.nbytes for tensors in parts.values() for value in tensors.values())
    needed, free = int(SPARE * max(last, coming)), shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{folder}: a state needs {needed} bytes, {free} are free; nothing was written")


def states_in(folder: Path) -> list[Path]:
    """The step folders, oldest first. Raises `OSError` where the system does not let them be looked at, of which glob
    and `Path.is_dir` would say that there are none."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((folder / name for name in names if NAME.fullmatch(name) and _is_folder(folder / name)), key=step_of)


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:  # deleted meanwhile
        return False


def step_of(state: Path) -> int:
    """The step of a step folder, by its name."""
    return int(state.name.removeprefix("step-"))


def _verifies(path: Path) -> bool:
    try:
        verify_manifest(path)
        return True
    except (UnreadableError, OSError) as error:
        raise UnreadableError(
            f"{path}: cannot be read, which is not to say that it is damaged; nothing was changed. Try again, or move "
            f"that state away ({error})"
        ) from error
    except PipelineLoadError as error:
        print(f"warning: state {path.name} is passed over: {error}", file=sys.stderr)
        return False


def rotate(saved: Path, keep: int) -> None:
    """Delete the oldest states up to `saved`; a later one can only be damaged, and must not push `saved` out."""
    until = [path for path in states_in(saved.parent) if step_of(path) <= step_of(saved)]
    for path in until[: -max(keep, 1)]:
        _discard(path)


def _discard(path: Path) -> None:
    """Rename first: a kill in the middle of deleting must not leave half a state under its name."""
    discarded = path.parent / f".del-{path.name}-{uuid.uuid4().hex[:8]}"
    path.rename(discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def _restore_set_aside(folder: Path) -> Path | None:
    """A kill between the two renames that replace the only state leaves it complete under its `.del-*` name."""
    for path in folder.glob(".del-step-*"):
        target = folder / path.name.removeprefix(".del-").rpartition("-")[0]
        if not target.exists() and _verifies(path):
            path.rename(target)
            return target
    return None
