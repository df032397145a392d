"""Check the contents of a run folder, and define which settings may change on resume."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokenizer.files import FolderKind, make_folder, read_json, require_replaceable

from ..config import UserError
from ..config.schema import difference, rename_keys
from ..files import is_lock, replace_file, require_apart
from ..images.splits import SPLITS, SplitFacts

CONFIG = "config.json"
END = ("train.steps", "train.minutes")
RHYTHM = ("train.log_every", "train.preview_every", "train.evaluate_every", "train.save_every")
MAY_CHANGE = {"out", "track", *END, *RHYTHM, "train.timeout", "train.checkpointing", "data.cache_mb"}
"""Settings that may change on resume. Only the end affects the weights, through the learning rate schedule."""
HALF_WRITTEN = re.compile(rf"\.tmp-({re.escape(CONFIG)}|{re.escape(SPLITS)})-[0-9a-f]{{8}}\.json")


def check_run_folder(run: Path, config: Any, snapshots: dict[str, FolderKind] | None = None) -> list[str]:
    """Return the permitted changes from the run in the folder to `config`, such as `train.steps: 1000 -> 2000`.

    snapshots: the folders that the run will write into it. Raises `UserError` if the folder is not a run folder or has
    another configuration, and `PathError` if it contains an input or lies inside an input.
    """
    if os.path.lexists(run) and (run.is_symlink() or not run.is_dir()):
        what = "a link" if run.is_symlink() else "a file"
        raise UserError(f"{run}: is {what}, not a run folder; nothing was overwritten")
    for name, kind in (snapshots or {}).items():
        require_replaceable(run / name, kind)
    if (run / CONFIG).is_file():
        old, new = read_config(run, config), config.model_dump(mode="json")
        if changes := difference(select_fixed(old), select_fixed(new)):
            raise UserError(
                f"{run}: belongs to a run with another configuration; nothing was overwritten. "
                f"{suggest_remedy(run, config, changes)}. Differences:",
                *changes,
            )
        return [line for line in difference(old, new) if line.split(":")[0] in (*END, *RHYTHM)]
    # A run that was killed at its start has left only these.
    found = os.listdir(run) if run.is_dir() else []
    ours = {name for name in found if name == SPLITS or is_lock(name) or HALF_WRITTEN.fullmatch(name)}
    if strange := sorted(set(found) - ours):
        raise UserError(
            f"{run}: not empty ({', '.join(strange[:3])}) and not a run folder; choose another out=; nothing was "
            "overwritten"
        )
    inputs = [config.data.path] if hasattr(config, "data") else [config.tokens]
    require_apart(run, [*inputs, config.init])
    return []


def read_config(run: Path, config: Any) -> dict[str, Any]:
    """Read the configuration of the run in a folder, filling in defaults of missing settings."""
    saved = rename_keys(read_json(run / CONFIG), config.renamed)
    try:
        return type(config).model_validate(saved).model_dump(mode="json")
    except ValidationError:  # a configuration of the other stage: the caller reports the differences
        return saved


def write_config(run: Path, config: Any, divided: SplitFacts | None = None) -> None:
    """Write `config.json`, which `--config` also accepts, and create `state/`, so that a snapshot without `state/`
    shows that a user deleted it. divided: how the images are divided, written first, as runs of 0.3 lack it."""
    if divided is not None:
        replace_file(run / SPLITS, (json.dumps(divided.to_dict(), indent=2) + "\n").encode())
    replace_file(run / CONFIG, (json.dumps(config.model_dump(mode="json"), indent=2) + "\n").encode())
    make_folder(run / "state")  # last, because a folder without a configuration must be empty


def select_fixed(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    fixed: dict[str, Any] = {}
    for key, value in settings.items():
        if prefix + key not in MAY_CHANGE:
            fixed[key] = select_fixed(value, f"{prefix}{key}.") if isinstance(value, dict) else value
    return fixed


def suggest_remedy(run: Path, config: Any, changes: list[str]) -> str:
    snapshot = run / ("tokenizer" if hasattr(config, "data") else "pipeline")
    rebuilt = any(line.startswith(("model.", "data.image_size", "data.channels", "tokens", "init")) for line in changes)
    if rebuilt or not snapshot.is_dir():
        return "Choose another out= to train from scratch"
    return f"Choose another out=, with init={snapshot} to start from its weights (optimizer and schedule start over)"
