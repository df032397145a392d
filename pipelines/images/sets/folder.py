"""A set as a folder of PNG files and, with labels, a sheet `metadata.jsonl` with the name of the class of each, as
`datasets` and `data.source` read it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizer.files import FormatError

from .parts import Facts, Part

SHEET = "metadata.jsonl"


def write_folder(folder: Path, parts: Iterable[Part], facts: Facts, before: dict[str, Any] | None) -> None:
    """Write the files; parts hold PNG files. before: the rows of the sheet in the folder that these will join, by file
    name, None without a sheet; those of other images stay."""
    known, others = facts.class_names or [], dict(before or {})
    sheet = folder / SHEET
    with sheet.open("w", encoding="utf-8") as rows:
        for part in parts:
            for index, image in enumerate(part.images):
                name = f"{facts.key(part.first + index)}.png"
                (folder / name).write_bytes(image)
                label = part.labels[index] if part.labels is not None else None
                named = {"label": known[label]} if label is not None and label < len(known) else {}  # the null class
                rows.write(json.dumps({"file_name": name, **named}, ensure_ascii=False) + "\n")
                others.pop(name, None)
        rows.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in others.values())
    if facts.class_names is None and before is None:
        sheet.unlink()


def rows_there(folder: Path) -> dict[str, Any] | None:
    """The rows of the sheet in a folder, by the name of the file, of those files that are there; None without a sheet.
    Raises `FormatError` for one that is not JSON."""
    sheet = folder / SHEET
    if not sheet.is_file():
        return None
    try:
        rows = [json.loads(line) for line in sheet.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{sheet}: not a sheet of images ({error})") from error
    named = {row["file_name"]: row for row in rows if isinstance(row, dict) and isinstance(row.get("file_name"), str)}
    return {name: row for name, row in named.items() if (folder / name).is_file()}
