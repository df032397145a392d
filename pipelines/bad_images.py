"""The record of images that can not be decoded: `bad_images.jsonl` in the run folder, one line for each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .decoding import Problem

REPORT = "bad_images.jsonl"


def append_report(folder: Path, split: str, problems: list[Problem]) -> None:
    """Add the lines `{"split", "path", "row", "reason", "replaced_by"}` that are not there yet.

    Processes may add lines at the same time: each is written at once. What can not be written is said on stderr.
    """
    path = Path(folder) / REPORT
    try:
        known = {(line["split"], line["row"]) for line in read_report(folder)}
        with open(path, "a", encoding="utf-8") as file:
            for problem in problems:
                if (split, problem.row) not in known:
                    file.write(json.dumps({"split": split, **problem._asdict()}) + "\n")
                    file.flush()
    except OSError as error:
        print(f"warning: {path} is not written: {error}", file=sys.stderr)


def read_report(folder: Path) -> list[dict[str, Any]]:
    """The lines of a report, without one that is half written; none where there is no report."""
    path, found = Path(folder) / REPORT, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
