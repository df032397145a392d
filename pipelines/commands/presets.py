"""List the presets, which `--config` accepts by name in any folder."""

from __future__ import annotations

from functools import partial
from itertools import takewhile
from pathlib import Path

from pydantic import Field

from ..config import Config, UserError, run_command
from ..config.arguments import presets
from ..config.table import wrap_rows


class PresetsConfig(Config):
    examples = ("", "name=digits")

    name: str = Field("", description="list only names that contain this text, such as name=digits or name=prior/")
    paths: bool = Field(
        False, description="print only paths, as for --config_file $(smalti presets name=accelerate/fsdp paths=true)"
    )


def run(config: PresetsConfig) -> list[Path]:
    """Print a line for each preset and return their files. Raises `UserError` if no name matches."""
    found = {name: path for name, path in presets().items() if config.name in name}
    if not found:
        raise UserError(f"name: no preset name contains {config.name!r}; omit it to list all")
    if config.paths:
        print(*found.values(), sep="\n")
    else:
        lines = {name: path.read_text(encoding="utf-8").splitlines() for name, path in found.items()}
        comments = {name: takewhile(lambda line: line.startswith("#"), text) for name, text in lines.items()}
        rows = [(name, " ".join(line.removeprefix("#").strip() for line in text)) for name, text in comments.items()]
        print("\n".join(wrap_rows(rows)))
    return list(found.values())


main = partial(run_command, PresetsConfig, run, verb="presets", description=__doc__)
