"""Notebooks as pages: `build/notebooks/NAME.ipynb`, which has run, where it is there; else the text and code alone."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PERCENT = re.compile(r"^# %%(.*)$", re.MULTILINE)
NOTE = '!!! note "Not run"\n    This page has no outputs. `make notebooks` executes it for the next build.'


def stage(pages: Path, root: Path, executed: Path, texts: dict[str, str]) -> list[Any]:
    """Write a page for each notebook; returns the navigation's entries."""
    entries: list[Any] = []
    for source in scripts(root):
        ran = executed / f"{source.stem}.ipynb"
        if ran.is_file():
            cells = json.loads(ran.read_text(encoding="utf-8"))["cells"]
            text = "\n\n".join(part for n, cell in enumerate(cells) for part in shown(cell, n, source.stem, pages))
        else:
            text = "\n\n".join(from_percent(source.read_text(encoding="utf-8")))
            text = re.sub(r"(?m)\A(# .+)$", rf"\1\n\n{NOTE}", text, count=1)
        page = f"notebooks/{source.stem}.md"
        texts[page] = text
        heading = re.search(r"^# (.+)$", text, re.MULTILINE)
        entries.append({heading[1] if heading else source.stem: page})
    return entries


def scripts(root: Path) -> list[Path]:
    """The notebooks as they are kept, in order."""
    return sorted((root / "docs/notebooks").glob("[0-9]*_*.py"))


def from_percent(text: str) -> list[str]:
    """The cells of a script in jupytext's percent format as Markdown."""
    _, *rest = PERCENT.split(text)
    parts = []
    for mark, body in zip(rest[::2], rest[1::2], strict=True):
        if "[markdown]" in mark:
            body = re.sub(r'^\s*(?:r?"""|\'\'\')\n?|\n?(?:"""|\'\'\')\s*$', "", body)
            parts.append(re.sub(r"^# ?", "", body.strip("\n"), flags=re.MULTILINE))
        elif body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    return parts


def shown(cell: dict[str, Any], number: int, name: str, pages: Path) -> list[str]:
    """A cell of a notebook and its outputs as Markdown; its pictures become files."""
    text = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        return [text]
    if cell["cell_type"] != "code" or not text:
        return []
    parts = [f"```python\n{text}\n```"]
    for n, output in enumerate(cell.get("outputs", ())):
        parts += output_parts(output, f"{name}-{number}-{n}", pages)
    return parts


def output_parts(output: dict[str, Any], name: str, pages: Path) -> list[str]:
    """One output: a picture, if there is one, a table, or text. What went to stderr is left out."""
    if output["output_type"] == "stream":
        return [] if output["name"] == "stderr" else [printed("".join(output["text"]))]
    data = output.get("data", {})
    if "image/png" in data:
        file = pages / f"notebooks/{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode("".join(data["image/png"])))
        return [f"![output of the cell above]({file.name})"]
    if "<table" in "".join(data.get("text/html", "")):
        return [f'<div class="output">\n{"".join(data["text/html"])}\n</div>']
    return [printed("".join(data["text/plain"]))] if "text/plain" in data else []


def printed(text: str) -> str:
    """Text that a cell printed, without a terminal's colours and without what a progress bar wrote over."""
    lines = [line.rpartition("\r")[2] for line in ESCAPES.sub("", text).rstrip().split("\n")]
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    body = "\n".join(lines)
    return f"{fence}{{ .text .output }}\n{body}\n{fence}" if body.strip() else ""
