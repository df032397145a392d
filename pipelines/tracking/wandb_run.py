"""Weights & Biases as the target of a mirror: its mode, its run, and a model as an artifact.

Written for wandb 0.21 to 0.31: `start_wandb` sets two variables of the environment that it reads, where its own values
are not set, and changes the handlers of its log. Nothing else here does.
"""

from __future__ import annotations

import logging
import netrc
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from . import mirror

ANSWER_SECONDS = 20.0
"""For its server: less than a start may take, as it is cleaner if wandb gives up by itself."""
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # the second is what newer clients call the first
TABLE: list[str | int] = ["weights", "split", "figure", "value"]
CAPTIONS = {
    "reconstructions": "images that are not trained on, each row above its reconstructions",
    "codebook": "how the ids are used",
    "samples": "samples with the same seeds at every step, one class per column",
}
"""What a preview shows."""


def caption(name: str, step: int) -> str:
    """The text below a picture."""
    return f"{CAPTIONS.get(name, name)}; step {step:,}"


def wandb_mode(chosen: str | None) -> tuple[str, str]:
    """The mode (`online`, `offline`, `disabled`) and, in a few words, why; found without importing wandb.

    `chosen` is the configuration's, before that of the environment.
    """
    if chosen is not None:
        return chosen, "track.wandb"
    from_environment = os.environ.get("WANDB_MODE", "")
    if from_environment in ("online", "offline", "disabled"):
        return from_environment, "WANDB_MODE"
    source = _key_source()
    return ("online", f"API key found in {source}") if source else ("offline", "no API key found")


def _key_source() -> str | None:
    """Where wandb will find an API key: the environment or a netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return "WANDB_API_KEY"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "")).netloc
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in (Path(os.path.expanduser(name)) for name in files):
        try:
            entries = netrc.netrc(path)
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        if any(entries.authenticators(name) for name in ([host] if host else HOSTS)):
            return str(path)
    return None


def wandb_folder(run: Path) -> Path:
    """Where wandb puts its `wandb/`: the run folder, or what WANDB_DIR says."""
    return Path(os.environ.get("WANDB_DIR") or run)


@dataclass
class WandbRun:
    """A started W&B run, seen through accelerate's tracker."""

    tracker: Any
    held: int
    online: bool

    @property
    def run(self) -> Any:
        """The run itself, wandb's."""
        return self.tracker.tracker

    @property
    def url(self) -> str | None:
        """Where it can be looked at; None offline."""
        return self.run.url

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Numbers by name."""
        self.tracker.log(values, step=step)

    def images(self, step: int, values: dict[str, Path]) -> None:
        """PNG files by name, with what they show and of which step."""
        import wandb

        shown = {name: [wandb.Image(str(path), caption=caption(name, step))] for name, path in values.items()}
        self.tracker.log(shown, step=step)

    def conclude(self, step: int, summary: dict[str, Any], rows: list[list[Any]]) -> None:
        """Figures for the table of runs, and the table `evaluation` of this one."""
        import wandb

        self.run.summary.update(summary)
        self.tracker.log({"evaluation": wandb.Table(columns=TABLE, data=rows)}, step=step)

    def artifact(self, step: int, folder: Path, name: str, metadata: dict[str, Any]) -> None:
        """The folder as version `step-<step>` of an artifact of type `model`; online, waits until W&B has it.

        Raises whatever wandb raises.
        """
        import wandb

        title = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{name}-{folder.name}")[-128:]
        artifact = wandb.Artifact(title, type="model", metadata={"step": step, **metadata})
        # Immutable: sent from where it lies. It would be copied to the user's home first, whatever its size.
        artifact.add_dir(str(folder.resolve()), policy="immutable", skip_cache=True)
        self.run.log_artifact(artifact, aliases=["latest", f"step-{step}"])
        if self.online:
            artifact.wait(timeout=int(mirror.LAST_SECONDS * 0.9))

    def finish(self) -> None:
        """End the run; online, wandb waits a limited time for its server."""
        self.tracker.finish()


def start_wandb(project: str, run_config: dict[str, Any], *, held: int, **options: Any) -> WandbRun:
    """A running W&B run; `options` are those of `wandb.init`. Raises whatever wandb raises.

    `held` is the highest step that it may have; online, the server knows better: what a killed process had not sent.
    """
    # Silent: wandb would ask a question on the terminal. Error reporting: its exit hook waits 20 s for a dead server.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb
    from accelerate.tracking import WandBTracker

    wanted: dict[str, Any] = {
        "init_timeout": ANSWER_SECONDS,
        "finish_timeout": mirror.CLOSE_SECONDS * 2 / 3,
        "finish_timeout_raises": True,  # or nobody would know that a part is missing
        "console": "off",
    }
    settings = wandb.Settings(**{key: value for key, value in wanted.items() if hasattr(wandb.Settings(), key)})
    tracker = WandBTracker(project, resume="allow", settings=settings, **options)
    tracker.start()
    for handler in logging.getLogger("wandb").handlers:  # on a full disk its debug log would print tracebacks
        handler.handleError = lambda record: None  # type: ignore[method-assign]
    tracker.store_init_configuration(run_config)
    online = options["mode"] == "online"
    following = getattr(tracker.tracker, "starting_step", None)
    waiting = any(Path(options["dir"], "wandb").glob(f"offline-run-*-{options['id']}"))  # for the user to sync
    return WandbRun(tracker, following - 1 if online and not waiting and following is not None else held, online)


def stop_wandb() -> None:
    """End wandb's service, which keeps the id of a run whose start failed and would refuse it offline."""
    import wandb

    wandb.teardown()
