"""trackio as the target of a mirror: a database in the run folder. Written for trackio 0.43.

trackio takes some of what it needs from the process that it is in, and says things that are not so here; what is done
about that stands in `imported_for` and nowhere else.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


class TrackioRun:
    """A run in trackio's database, written through accelerate's tracker.

    `found` is the highest step that it has, -1 for none, and the names that it has at that step: of a run that was
    killed in the middle of a step, only what is missing is written.
    """

    def __init__(self, tracker: Any, found: tuple[int, set[str]]) -> None:
        self.tracker = tracker
        self.step, self.names = found
        self.held = self.step - 1

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Numbers by name."""
        if values := self._missing(step, values):
            self.tracker.log(values, step=step)

    def images(self, step: int, values: dict[str, Path]) -> None:
        """PNG files by name; accelerate's tracker has no way of its own for them."""
        import trackio

        if values := self._missing(step, values):
            self.tracker.log({name: trackio.Image(str(path)) for name, path in values.items()}, step=step)

    def finish(self) -> None:
        """Write what is queued, and close."""
        self.tracker.finish()

    def _missing(self, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Those of the values that it does not have yet."""
        return {name: value for name, value in values.items() if step > self.step or name not in self.names}


def trackio_folder(run: Path) -> Path:
    """Where trackio keeps its database: the run folder, or what TRACKIO_DIR says."""
    return Path(os.environ.get("TRACKIO_DIR") or run / "trackio")


def start_trackio(
    project: str, run_config: dict[str, Any], *, folder: Path, name: str, resumed: bool, held: int
) -> TrackioRun:
    """The run of this name in `folder`, continued or new; `held` is the highest step that a server may have.

    Raises `RuntimeError` if this process has used trackio with another folder, which it reads once.
    """
    imported_for(folder)
    from accelerate.tracking import TrackioTracker
    from trackio.sqlite_storage import SQLiteStorage

    # The configuration at once: accelerate's `store_init_configuration` adds an entry "allow_val_change" to it.
    resume = "allow" if resumed else "never"
    tracker = TrackioTracker(project, name=name, config=flat(run_config), resume=resume)
    tracker.start()
    logs = SQLiteStorage.get_logs(project, name) if resumed else []
    elsewhere = any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))  # cannot be asked
    step = max((log["step"] for log in logs), default=held if elsewhere else -1)
    return TrackioRun(tracker, (step, {key for log in logs if log["step"] == step for key in log}))


def imported_for(folder: Path) -> None:
    """Import trackio so that it writes to `folder` and prints nothing.

    trackio 0.43 reads TRACKIO_DIR once, when it is imported, and has no argument for it; a later run in this process
    must not take ours for the user's wish. Its greeting, which `init` has no argument against, names a command that
    would look elsewhere; to redirect stdout would take the trainer's lines, too. Raises `RuntimeError` if it was
    imported for another folder.
    """
    theirs = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder)
    import trackio

    if theirs is None:
        del os.environ["TRACKIO_DIR"]
    if trackio.TRACKIO_DIR.resolve() != folder.resolve():
        raise RuntimeError(f"this process writes to {trackio.TRACKIO_DIR} already; start another one")
    for module in ("trackio", "trackio.run", "trackio.utils"):
        setattr(sys.modules[module], "print", lambda *parts, **how: None)  # noqa: B010


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; what is no number, text or truth value, as JSON."""
    found: dict[str, int | float | str | bool] = {}
    for key, value in node.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, (int, float, str, bool))
            found[prefix + key] = value if plain else json.dumps(value, default=str)
    return found
