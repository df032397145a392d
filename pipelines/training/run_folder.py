"""The folder of a run: whose it is, and the state in it that a run continues from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tokenizer.files import FolderKind, make_folder, read_json, require_replaceable

from ..config import UserError
from ..config.arguments import read_file
from ..config.schema import difference, to_yaml
from ..files import is_lock, lock_folder, replace_file, require_apart
from ..processes.launched import team_of
from .checkpoints.rotation import latest_state
from .checkpoints.states import STATE
from .extending import END, RHYTHM, chosen, fixed, require_ahead, settings, way_on
from .heartbeat import FOLDER as SIGNS

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
CONFIG = "config.yaml"
HALF = re.compile(rf"\.tmp-{re.escape(CONFIG)}-[0-9a-f]{{8}}")
"""Names of configurations that were being written when a process was killed, or power was lost."""
BEGUN_WITH = "init.fingerprint"
"""Among the configuration that a state keeps: no setting, but what one of them meant."""


def check_folder(run: Path, config: Any) -> list[str]:
    """What `config` changes in the run in the folder, and may, as `train.steps: 1000 -> 2000`.

    Raises `UserError` for a folder that belongs to a run with another configuration, or to something else, and for a
    new end that the run is past.
    """
    if os.path.lexists(run) and (run.is_symlink() or not run.is_dir()):
        what = "a link" if run.is_symlink() else "a file"
        raise UserError(f"{run}: a run folder is to be here, and {what} has this name; nothing was overwritten")
    path, changes = run / CONFIG, list[str]()
    if path.is_file():
        old, new = settings(read_file(str(path)), config), settings(config.model_dump(mode="json"), config)
        if differing := difference(fixed(old), fixed(new)):
            raise UserError(
                f"{run}: belongs to a run with another configuration; nothing was overwritten. "
                f"{way_on(run, config, differing)}. What differs:\n" + "\n".join(differing)
            )
        require_ahead(run, config, difference(chosen(old, END), chosen(new, END)))
        changes = difference(chosen(old, END + RHYTHM), chosen(new, END + RHYTHM))
    elif run.is_dir() and (strange := strangers(run)):
        raise UserError(
            f"{run}: not empty ({', '.join(strange[:3])}) and not a run folder; choose another out=, nothing was "
            "overwritten"
        )
    else:
        read = [config.data.path] if hasattr(config, "data") else [config.tokens]
        require_apart(run, [*read, config.init])
    return changes


def strangers(run: Path) -> list[str]:
    """What is in a folder, and no run leaves there before it has written its configuration."""
    names = [entry.name for entry in run.iterdir()]
    return sorted(name for name in names if name != SIGNS and not is_lock(name) and not HALF.fullmatch(name))


@contextmanager
def claimed_folder(run: Path, config: Any, accelerator: Accelerator) -> Iterator[list[str]]:
    """Be the only run in this folder while the block lasts; yields what `check_folder` returns. Raises what that raises
    before anything is touched, and `UserError`, on all processes, where another run is in it."""
    team = team_of(accelerator)
    team.first_alone(lambda: check_folder(run, config))
    with lock_folder(run, team):
        yield team.first(lambda: check_folder(run, config))  # again: the other run has perhaps just ended


def take_folder(run: Path, config: Any, accelerator: Accelerator, snapshots: Mapping[str, FolderKind]) -> None:
    """Write `config.yaml`, on the main process. Raises `PathError`, on all processes, where something that is not ours
    is where a snapshot is to be."""

    def take() -> None:
        for name, kind in snapshots.items():
            require_replaceable(run / name, kind)
        for path in run.iterdir():
            if HALF.fullmatch(path.name):
                path.unlink()
        replace_file(run / CONFIG, to_yaml(config).encode())

    team_of(accelerator).first(take)


def newest_state(run: Path, config: Any, accelerator: Accelerator, begun: dict[str, Any] | None = None) -> Path | None:
    """The newest good state, as the main process finds it (it also tidies up), told to all. begun: `Task.begun`.

    Raises `UserError`, on all processes, where there are states and none can be read, where the states are gone but the
    snapshot is there, for a state of another run, and where processes began with different models.
    """
    team = team_of(accelerator)
    everywhere = team.gather(lambda: begun)

    def find() -> Path | None:
        if any(other != begun for other in everywhere):
            raise UserError("init: processes found different models there; it has to be the same one on all machines")
        state = latest_state(run)
        snapshot = next((run / name for name in ("tokenizer", "pipeline") if (run / name).is_dir()), None)
        if state is None and snapshot is not None and not (run / "state").is_dir():
            raise UserError(
                f"{run}: there is {snapshot.name}/ and no state to continue from; nothing was overwritten. To begin "
                f"again at zero, choose another out=, or delete {run}"
            )
        make_folder(run / "state")  # from now on, if it is missing, somebody has removed it
        if state is not None:
            require_same_run(state, config, begun)
        return state

    return team.first(find)


def require_same_run(state: Path, config: Any, begun: dict[str, Any] | None = None) -> None:
    """Raise `UserError` for a state that a run with another configuration wrote, or one that began with another
    model."""
    saved = read_json(state / STATE).get("config")
    if not isinstance(saved, dict):
        return
    then = saved.pop(BEGUN_WITH, None)
    if begun is not None and then not in (None, begun["fingerprint"]):
        raise UserError(
            f"init: {begun['source']} holds another model than when the run began (its fingerprint was "
            f"{str(then)[:12]}... and is {begun['fingerprint'][:12]}...); {state} was left as it was"
        )
    if changes := difference(saved, identity_of(config)):
        raise UserError(
            f"{state}: of a run with another configuration; nothing was changed. What differs:\n" + "\n".join(changes)
        )


def identity_of(config: Any, begun: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a run may not change of its configuration, and the fingerprint of the model that it began with (`begun`, see
    `Task`), by which its states are known."""
    found = fixed(settings(config.model_dump(mode="json"), config))
    return found if begun is None else {**found, BEGUN_WITH: begun["fingerprint"]}
