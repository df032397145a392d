"""The folder of a run: whose it is, and the state in it that a run continues from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tokenizer.storage import replace_file

from .arguments import read_file
from .checkpoint import latest_state
from .config import UserError, difference, to_yaml
from .heartbeat import FOLDER as SIGNS

if TYPE_CHECKING:
    from accelerate import Accelerator


CONFIG = "config.yaml"


def begun_data(run: Path) -> dict[str, Any] | None:
    """What `data` was when the run in this folder was begun; None where none was. Raises `UserError`."""
    data = read_file(str(run / CONFIG)).get("data") if (run / CONFIG).is_file() else None
    return data if isinstance(data, dict) else None


def check_folder(run: Path, config: Any) -> None:
    """Raise `UserError` for a folder that belongs to a run with another configuration, or to something else."""
    path = run / CONFIG
    if path.is_file():
        changes = difference(fixed(read_file(str(path)), config), fixed(config.model_dump(mode="json"), config))
        if changes:
            raise UserError(
                f"{run}: belongs to a run with another configuration; choose another out=, nothing was "
                "overwritten. What differs:\n" + "\n".join(changes)
            )
    elif run.is_dir() and any(not entry.name.startswith((".tmp-", SIGNS)) for entry in run.iterdir()):
        raise UserError(f"{run}: not empty and not a run folder; choose another out=, nothing was overwritten")


def fixed(given: dict[str, Any], config: Any) -> dict[str, Any]:
    """What a run may not change: all but where it lies, where its numbers go, how long its processes wait, and
    whether they save memory by computing twice, which gives the same bits.

    Settings that did not exist when the run was begun have their defaults.
    """
    try:
        data = type(config).model_validate(given).model_dump(mode="json")
    except ValidationError:  # of another version: the difference will tell
        data = given
    return {
        **data,
        "out": None,
        "track": None,
        "train": {**data.get("train", {}), "timeout": None, "checkpointing": None},
    }


def claim_folder(run: Path, config: Any, accelerator: Accelerator) -> None:
    """Write `config.yaml` into the run folder, once all processes have found it free."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        replace_file(run / CONFIG, to_yaml(config).encode())
    accelerator.wait_for_everyone()


def newest_state(run: Path, accelerator: Accelerator) -> Path | None:
    """The newest good state, as the main process finds it (it also tidies up), told to all."""
    from accelerate.utils import broadcast_object_list

    found = [latest_state(run) if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]
