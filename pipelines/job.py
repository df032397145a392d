"""Work that takes long: `job.json`, written first, says all that its files depend on, so the same command continues.

begin_job(folder, job, is_result)     # on one process, which has locked the output
...                                   # make those files that are missing, each by `atomic_file`
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizer.files import LITTER, PathError, is_file, make_folder, quote, read_json, summarize

from .config import UserError
from .config.schema import difference
from .files import replace_file

JOB = "job.json"
MAX_DIFFERENCES = 4  # that an error quotes
TEMPORARY = re.compile(r"\.(?:tmp|del)-(?P<name>.+)-[0-9a-f]{8}(?:\.\w+)?")
"""Names that `tokenizer.files.temporary_name` makes of a name."""


class OtherJobError(PathError):
    """The files in a folder depend on something else than this job's would."""


def work_folder(out: Path, verb: str) -> Path:
    """Where the work on `out` is until it is finished: beside it."""
    path = Path(os.path.realpath(out))
    return path.with_name(f".{path.name}.{verb}")


def read_job(folder: Path) -> dict[str, Any] | None:
    """Read what the files in a folder depend on; None without `job.json`. Raises `FormatError` for a damaged one."""
    return read_json(folder / JOB) if is_file(folder / JOB) else None


def begin_job(folder: Path, job: dict[str, Any], is_result: Callable[[str], bool], *, anew: bool = False) -> None:
    """Write `job.json`, unless the same job was begun in the folder before; make the folder if it is missing.

    Results that a killed process was writing are removed. is_result: whether the job makes a file or folder of this
    name. anew: replace what another job of this verb had written. Raises `OtherJobError` for that one's otherwise, and
    `PathError` for a folder that holds something else.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        what = "a link" if folder.is_symlink() else "a file"
        raise PathError(f"{folder} cannot be written: it should be a folder, and {what} has this name")
    make_folder(folder)
    remove_temporary(folder, lambda name: name == JOB or is_result(name))
    found, before = sorted(set(os.listdir(folder)) - {*LITTER}), read_job(folder)
    job = json.loads(json.dumps(job))
    if before is None and found:
        raise PathError(f"{folder}: it holds {summarize(found)}, and no {JOB}; choose another folder")
    if before is not None and not anew and (changes := difference(before, job)):
        if (verb := before.get("verb")) != job["verb"]:
            raise PathError(f"{folder}: its {JOB} is of another verb ({quote(verb)}); choose another folder")
        more = f", and {len(changes) - MAX_DIFFERENCES} more" if len(changes) > MAX_DIFFERENCES else ""
        raise OtherJobError(
            f"{folder} was begun with other settings: {', '.join(changes[:MAX_DIFFERENCES])}{more}; give those again"
        )
    replace_file(folder / JOB, (json.dumps(job, indent=2) + "\n").encode())


def require_begun(folder: Path) -> None:
    """Raise `UserError` unless this process sees the folder that the first one has begun."""
    if not (folder / JOB).is_file():
        raise UserError(f"out: {folder} cannot be seen from here; all processes have to see the same disk")


def remove_temporary(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove what a killed process was writing, of files and folders with these names."""
    for path in folder.iterdir():
        if (match := TEMPORARY.fullmatch(path.name)) and is_ours(match["name"]):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
