"""Resumable jobs: `job.json`, written first, records everything that their files depend on.

begin_job(folder, job, is_result)     # on one process, which has locked the output
...                                   # write the missing files, each with `atomic_file`
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizer.files import LITTER, PathError, is_file, make_folder, quote, read_json, summarize

from .config import UserError
from .config.schema import difference, rename_keys
from .files import replace_file

JOB = "job.json"
MAX_DIFFERENCES = 4  # quoted in an error
TEMPORARY = re.compile(r"\.(?:tmp|del)-(?P<name>.+)-[0-9a-f]{8}(?:\.\w+)?")
"""Names made by `tokenizer.files.temporary_name`."""


class OtherJobError(PathError):
    """Raised if the files in a folder belong to a job with other settings."""


def work_folder(out: Path, verb: str) -> Path:
    """Return the folder for unfinished work: `.NAME.VERB` beside `out`."""
    path = Path(os.path.realpath(out))
    return path.with_name(f".{path.name}.{verb}")


def read_job(folder: Path, renamed: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """Read `job.json` in a folder; None if missing. renamed: see `Config`. Raises `FormatError` if damaged."""
    return rename_keys(read_json(folder / JOB), renamed or {}) if is_file(folder / JOB) else None


def begin_job(
    folder: Path,
    job: dict[str, Any],
    is_result: Callable[[str], bool],
    *,
    anew: bool = False,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Create the folder and `job.json`, or continue the same job there; delete partial files.

    is_result: returns whether the job writes a file or folder of this name. anew: replace another job of this verb,
    which otherwise raises `OtherJobError`. renamed: see `Config`. Raises `PathError` if the folder holds anything else.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        what = "a link" if folder.is_symlink() else "a file"
        raise PathError(f"{folder} cannot be written: it is {what}, not a folder")
    make_folder(folder)
    for path in folder.iterdir():
        if (match := TEMPORARY.fullmatch(path.name)) and (match["name"] == JOB or is_result(match["name"])):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    found, before = sorted(set(os.listdir(folder)) - {*LITTER}), read_job(folder, renamed)
    job = json.loads(json.dumps(job))
    if before is None and found:
        raise PathError(f"{folder}: contains {summarize(found)} but no {JOB}; choose another folder")
    if before is not None and not anew and (changes := difference(before, job)):
        if (verb := before.get("verb")) != job["verb"]:
            raise PathError(f"{folder}: its {JOB} belongs to another verb ({quote(verb)}); choose another folder")
        more = f", and {len(changes) - MAX_DIFFERENCES} more" if len(changes) > MAX_DIFFERENCES else ""
        raise OtherJobError(
            f"{folder} was started with other settings: {', '.join(changes[:MAX_DIFFERENCES])}{more}; use those again"
        )
    replace_file(folder / JOB, (json.dumps(job, indent=2) + "\n").encode())


def require_work_folder(folder: Path) -> None:
    """Raise `UserError` unless this process sees the folder that the main process created."""
    if not (folder / JOB).is_file():
        raise UserError(f"out: {folder} is not visible to every process; all processes must share the same disk")
