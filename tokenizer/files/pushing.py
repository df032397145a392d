"""A single model on the Hub: its folder, and a card that says how to load it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .hub import refusal, replace_on_hub, require_reachable

CARD = "README.md"
PIPELINE = "model_index.json"
"""A repository with this is one of a pipeline, whose parts fit each other."""


def push_model(
    write: Callable[[Path], None], card: str, repo_id: str, names: list[str], commit_message: str, **options: Any
) -> Any:
    """Upload what `write` writes, in one commit, which removes those of our files `names` that are no more there.

    options: of `replace_on_hub`. Returns huggingface_hub's `CommitInfo`. Raises `PushError` in one line, also for a
    repository that holds a pipeline.
    """
    require_reachable(repo_id)

    def ours(there: list[str], fetch: Callable[[str], str]) -> list[str]:
        if PIPELINE in there:
            raise refusal(repo_id, "it holds a pipeline; push a pipeline, or to another repository")
        return names

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write(folder)
        (folder / CARD).write_text(card, encoding="utf-8")
        return replace_on_hub(folder, repo_id, ours, commit_message=commit_message, **options)


def model_card(family: str, name: str, parameters: int) -> str:
    """Markdown with a metadata header. family: as in `from tokenizer import Tokenizer`."""
    lines = [
        "---",
        "library_name: smalti",
        "tags:",
        "- image-generation",
        f"- {family}",
        f"- {name}",
        "---",
        "",
        f"# {name}, a {family}",
        "",
        f"{parameters:,} parameters, for Smalti.",
        "",
        "```python",
        f"from {family} import {family.title()}",
        f'model = {family.title()}.from_pretrained("this folder or Hub id")',
        "```",
        "",
    ]
    return "\n".join(lines)
