"""What may change in a run that goes on: how long it is and how often it reports; and what to do where more differs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokenizer.files import PipelineLoadError, read_json

from ..config import UserError
from ..config.schema import difference
from .checkpoints.counters import PRECISIONS
from .checkpoints.rotation import states_in
from .checkpoints.states import STATE

END, RHYTHM = ("steps", "minutes"), ("log_every", "preview_every", "evaluate_every", "save_every")
FREE = {"train": (*END, *RHYTHM, "timeout", "checkpointing"), "data": ("cache_mb",)}
"""Settings that may change while a run goes on. But for the end, they change no weight, not by a bit."""
STREAMED = {"data": ("on_error", "max_bad_fraction")}
"""Likewise where images are read when they are due: these say which bad ones end the run."""


def settings(given: dict[str, Any], config: Any) -> dict[str, Any]:
    """A saved configuration with the defaults of what it leaves out."""
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
    """What to do to train with these changes, given the run in the folder."""
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
    for folder in reversed(states_in(run / "state")):
        try:
            state = read_json(folder / STATE)
            return int(state["step"]), float(state["counters"]["minutes"])
        except (PipelineLoadError, KeyError, TypeError, ValueError):  # damaged; whoever loads it will say so
            continue
    return 0, 0.0


def begun_precision(run: Path) -> str | None:
    """What the run in the folder has computed in until now, by its newest state; None where none tells."""
    for folder in reversed(states_in(run / "state")):
        try:
            found = read_json(folder / STATE)["counters"].get("precision")
            return found if found in PRECISIONS else None
        except (PipelineLoadError, KeyError, TypeError, AttributeError):  # damaged; whoever loads it will say so
            continue
    return None


def told_changes(changes: list[str]) -> str:
    """What a change of these settings means for the run."""
    text = ", ".join(line.replace(": ", " ", 1) for line in changes)
    if not any(line.startswith(tuple(f"train.{key}:" for key in END)) for line in changes):
        return f"{text} from here on"
    return (
        f"{text}: the learning rate follows the new schedule from here on; not the same to the bit as a run that "
        "began that way"
    )


def require_alike(train: dict[str, Any]) -> None:
    """Raise `UserError` on all processes if they were not given the same `train` (they would end at different steps),
    or have found another precision on their machines."""
    from accelerate.utils import gather_object

    first, *others = gather_object([train])
    for rank, other in enumerate(others, start=1):
        if changes := difference(first, other, "train."):
            raise UserError(f"process {rank} was started with other settings than process 0: {', '.join(changes)}")
