"""List the presets: names that `--config` takes from any folder, and what each is for."""

from __future__ import annotations

from functools import partial
from itertools import takewhile
from pathlib import Path

from pydantic import Field

from ..config import Config, UserError, run_command
from ..config.arguments import presets
from ..config.table import wrap_rows


class PresetsConfig(Config):
    """Which presets, and what is printed of them."""

    examples = ("", "name=digits")

    name: str = Field("", description="only those whose names hold this text, as name=digits or name=prior/")
    paths: bool = Field(
        False,
        description="print where their files are, and nothing else: "
        "accelerate launch --config_file $(smalti presets name=accelerate/fsdp paths=true)",
    )


def run(config: PresetsConfig) -> list[Path]:
    """Print a line for each preset; returns their files. Raises `UserError` if there is none of this name."""
    found = {name: path for name, path in presets().items() if config.name in name}
    if not found:
        raise UserError(f"name: no preset's name holds {config.name!r}; without it, all are listed")
    if config.paths:
        print(*found.values(), sep="\n")
    else:
        print("\n".join(wrap_rows([(name, describe(path)) for name, path in found.items()])))
    return list(found.values())


def describe(path: Path) -> str:
    """The comment that a preset's file begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines)]
    return " ".join(comment)


main = partial(run_command, PresetsConfig, run, verb="presets", description=__doc__)
