"""The record of images that cannot be decoded: `bad_images.jsonl` in the run folder, one line for each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tokenizer.files import one_line

from ..config import UserError, is_first_process
from ..config.terminal import tell
from .base import DataConfig

REPORT = "bad_images.jsonl"


def append_report(folder: Path, split: str, problems: list[Problem]) -> None:
    """Append a line `{"split", "path", "row", "reason", "replaced_by"}` for each problem that is not in the file yet.

    Processes may append at the same time: each line is written at once. Prints a warning if the file cannot be written.
    """
    path = Path(folder) / REPORT
    try:
        known = [(line["split"], line["row"]) for line in read_report(folder)]
        with open(path, "a", encoding="utf-8") as file:
            for problem in problems:
                if (split, problem.row) not in known:
                    file.write(json.dumps({"split": split, **problem._asdict()}) + "\n")
                    file.flush()
    except OSError as error:
        tell(f"warning: {path} cannot be written: {error}")


def read_report(folder: Path) -> list[dict[str, Any]]:
    """The lines of a report, without those that are none, such as half-written ones; none if there is no report."""
    path, found = Path(folder) / REPORT, []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            facts = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(facts, dict) and {"split", "row"} <= set(facts):
            found.append(facts)
    return found


class Problem(NamedTuple):
    """A bad image: its path (or shard and name), its row in the split, the reason, and the path of its replacement."""

    path: str
    row: int
    reason: str
    replaced_by: str | None = None


@dataclass(frozen=True)
class Report:
    """The number of images that were looked at, and the bad ones among them."""

    found: int
    problems: list[Problem]

    @property
    def bad(self) -> int:
        return len(self.problems)


def judge(reports: list[Report], config: DataConfig) -> None:
    """Raise `UserError` if bad images are not allowed or too many; else warn if there are any."""
    found, problems = sum(r.found for r in reports), [problem for r in reports for problem in r.problems]
    if not problems:
        return
    counted = f"{len(problems)} of {found} images cannot be decoded"
    if config.on_error == "fail":
        raise UserError(f"{counted} (data.on_error=skip leaves them out):{listed(problems)}")
    if len(problems) > config.max_bad_fraction * found:
        raise UserError(
            f"{counted}, more than data.max_bad_fraction={config.max_bad_fraction} allows (raise it to leave them all "
            f"out):{listed(problems)}"
        )
    if any(r.found == r.bad for r in reports):
        raise UserError(f"{counted}, all of a part that is trained on or held out:{listed(problems)}")
    if is_first_process():
        first = problems[0]
        line = one_line(f"warning: {counted} and are left out; the first is {first.path}: {first.reason}")
        tell(line)


def listed(problems: list[Problem]) -> str:
    """A line for each of the first ten problems, and the number of further ones."""
    more = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
    return "".join("\n  " + one_line(f"{problem.path}: {problem.reason}") for problem in problems[:10]) + more
