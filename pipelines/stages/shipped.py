"""Pipelines that come with the package, found by their names: `ImagePipeline.from_pretrained("digits")`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tokenizer.files import PathError, UnreadableError, find_folder

from .index import INDEX

HERE = Path(__file__).parents[1] / "shipped"


def shipped() -> list[str]:
    """The names of the pipelines in the package."""
    return sorted(path.parent.name for path in HERE.glob(f"*/{INDEX}"))


def located(source: str | Path) -> str | Path:
    """The folder of the pipeline of that name in the package, and else `source` itself. A folder of the user's that is
    called so goes first, as it does before a Hub id."""
    return HERE / source if source in shipped() and not os.path.isdir(source) else source


def resolve_pipeline(source: str | Path, names: list[str], **options: Any) -> Path:
    """`resolve_folder` of a pipeline, which may be one that comes with the package. Raises `PathError`."""
    try:
        return find_folder(located(source), names, **options)
    except UnreadableError:
        raise
    except PathError as error:
        bare = re.fullmatch(r"\w+", str(source))
        raise PathError(
            f"{error}; these come with the package: {', '.join(shipped())}" if bare else str(error)
        ) from error
