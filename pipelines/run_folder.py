"""The folder of a run: whose it is, and the state in it that a run continues from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tokenizer.storage import PipelineLoadError, read_json, replace_file

from .arguments import read_file
from .checkpoint import STATE, latest_state
from .config import UserError, difference, to_yaml
from .heartbeat import FOLDER as SIGNS

if TYPE_CHECKING:
    from accelerate import Accelerator


END, RHYTHM = ("steps", "minutes"), ("log_every", "preview_every", "evaluate_every", "save_every")
FREE = {"train": (*END, *RHYTHM, "timeout", "checkpointing"), "data": ("cache_mb",)}
"""Settings that may change while a run goes on. But for the end, they change no weight, not by a bit."""
STREAMED = {"data": ("on_error", "max_bad_fraction")}
"""Likewise where images are read when they are due: these say which bad ones end the run."""


def check_folder(run: Path, config: Any) -> list[str]:
    """What `config` changes in the run in the folder, and may, as `train.steps: 1000 -> 2000`.

    Raises `UserError` for a folder that belongs to a run with another configuration, or to something else, and for a
    new end that the run is past.
    """
    path = run / "config.yaml"
    if path.is_file():
        old, new = settings(read_file(str(path)), config), settings(config.model_dump(mode="json"), config)
        if changes := difference(fixed(old), fixed(new)):
            raise UserError(
                f"{run}: belongs to a run with another configuration; nothing was overwritten. "
                f"{way_on(run, config, changes)}. What differs:\n" + "\n".join(changes)
            )
        require_ahead(run, config, difference(chosen(old, END), chosen(new, END)))
        return difference(chosen(old, END + RHYTHM), chosen(new, END + RHYTHM))
    if run.is_dir() and any(not entry.name.startswith((".tmp-", SIGNS)) for entry in run.iterdir()):
        raise UserError(f"{run}: not empty and not a run folder; choose another out=, nothing was overwritten")
    return []


def settings(given: dict[str, Any], config: Any) -> dict[str, Any]:
    """A configuration with the defaults of settings that did not exist when the run was begun."""
    try:
        return type(config).model_validate(given).model_dump(mode="json")
    except ValidationError:  # of another version, or stage: the difference will tell
        return given


def fixed(data: dict[str, Any]) -> dict[str, Any]:
    """What a run may not change: all but where it lies, where its numbers go, and what is listed above."""
    streaming = chosen(data, ("streaming",), "data") == {"data.streaming": True}
    found = {**data, "out": None, "track": None}
    for free in (FREE, STREAMED if streaming else {}):
        for node, keys in free.items():
            if isinstance(data.get(node), dict):
                found[node] = {**found[node], **dict.fromkeys(keys)}
    return found


def chosen(data: dict[str, Any], keys: tuple[str, ...], node: str = "train") -> dict[str, Any]:
    """These settings of a node, as `train.steps`."""
    values = data.get(node)
    return {f"{node}.{key}": values[key] for key in keys if key in values} if isinstance(values, dict) else {}


def way_on(run: Path, config: Any, changes: list[str]) -> str:
    """How one comes from the run in the folder to one that differs in this."""
    learned = run / "tokenizer"
    if "init" not in type(config).model_fields or not learned.is_dir():
        return "Choose another out=, where a run begins anew"
    if any(line.startswith(("model.", "data.image_size", "data.channels", "init")) for line in changes):
        return "Choose another out=: with such changes a run begins anew"
    return f"Choose another out=, with init={learned} to begin with its weights (optimizer and schedule begin anew)"


def require_ahead(run: Path, config: Any, changes: list[str]) -> None:
    """Raise `UserError` for a new end that the newest state is at, or past."""
    steps, minutes = done_so_far(run)
    past = steps >= (config.train.steps or math.inf) or minutes >= (config.train.minutes or math.inf)
    if steps and changes and past:
        raise UserError(
            f"{', '.join(changes)}: {run} has done {steps:,} steps in {minutes:.1f} minutes; its end may move, but "
            "has to lie ahead of that; nothing was changed"
        )


def done_so_far(run: Path) -> tuple[int, float]:
    """Steps and minutes of the newest state, none of whose tensors is looked at."""
    states = {int(path.name[5:]): path for path in (run / "state").glob("step-*") if path.name[5:].isdigit()}
    for step in sorted(states, reverse=True):
        try:
            state = read_json(states[step] / STATE)
            return int(state["step"]), float(state["counters"]["minutes"])
        except (PipelineLoadError, KeyError, TypeError, ValueError):  # damaged; whoever loads it will say so
            continue
    return 0, 0.0


def told_changes(changes: list[str]) -> str:
    """What it means for a run that these settings are no longer what they were."""
    text = ", ".join(line.replace(": ", " ", 1) for line in changes)
    if not any(line.startswith(tuple(f"train.{key}:" for key in END)) for line in changes):
        return f"{text} from here on"
    return (
        f"{text}: the learning rate follows the new schedule from here on; not the same to the bit as a run that "
        "began that way"
    )


def require_alike(train: Any) -> None:
    """Raise `UserError` on all processes if they were not given the same `train`: they would end at different steps."""
    from accelerate.utils import gather_object

    first, *others = gather_object([train.model_dump(mode="json")])
    for rank, other in enumerate(others, start=1):
        if changes := difference(first, other, "train."):
            raise UserError(f"process {rank} was started with other settings than process 0: {', '.join(changes)}")


def claim_folder(run: Path, config: Any, accelerator: Accelerator) -> None:
    """Write `config.yaml` into the run folder, once all processes have found it free."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        replace_file(run / "config.yaml", to_yaml(config).encode())
    accelerator.wait_for_everyone()


def newest_state(run: Path, accelerator: Accelerator) -> Path | None:
    """The newest good state, as the main process finds it (it also tidies up), told to all."""
    from accelerate.utils import broadcast_object_list

    found = [latest_state(run) if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0]
