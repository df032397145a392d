"""What was made from what, for W&B's graph of artifacts: small ones that name a thing by its fingerprint.

The things themselves, gigabytes of tokens, stay where they are. An artifact of the same name and content is the same
one, whichever run says so; so a tokenizer's training, an encoding and a prior's training meet in the graph.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizer import Tokenizer

from . import mirror
from .wandb_run import WandbRun, start_wandb, wandb_folder, wandb_mode

PROJECT = "smalti"


@dataclass(frozen=True)
class Mark:
    """kind: `tokenizer` or `tokens`; fingerprint: hexadecimal; facts: shown beside it, without any path."""

    kind: str
    fingerprint: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the artifact."""
        return f"{self.kind}-{self.fingerprint[:12]}"

    def artifact(self) -> Any:
        """An artifact of this mark, not yet logged; of the same mark it has the same digest."""
        import wandb

        made = wandb.Artifact(self.name, type=self.kind, metadata=self.facts)
        with made.new_file("fingerprint.json") as file:
            json.dump({"kind": self.kind, "fingerprint": self.fingerprint}, file)
        return made


def note(run: WandbRun, used: list[Mark], made: list[Mark]) -> None:
    """Tell W&B that this run used and made these. Offline, `wandb sync` tells it. Raises whatever wandb raises."""
    for mark in used:
        if run.online:
            run.run.use_artifact(mark.artifact())
        else:  # `use_artifact` refuses, though the record of a run has a place for it
            run.run._log_artifact(mark.artifact(), aliases=[], is_user_created=True, use_after_commit=True)
    for mark in made:
        run.run.log_artifact(mark.artifact())


def note_encoding(tokens: Path, tokenizer: Tokenizer, digest: str) -> None:
    """Tell W&B, in a run of its own, that `tokenizer` made the token dataset in the folder `tokens`, whose manifest has
    this digest. Whatever goes wrong costs a line of warning and some seconds. Offline, the run lies in `wandb/` beside
    the folder, or where WANDB_DIR says."""
    mode, _ = wandb_mode(None)
    if mode == "disabled":
        return
    project, folder = os.environ.get("WANDB_PROJECT") or PROJECT, wandb_folder(tokens.parent)
    options = {"dir": str(folder), "name": tokens.name, "id": uuid.uuid4().hex[:16], "mode": mode}

    def tell() -> None:
        run = start_wandb(project, {}, held=-1, job_type="encode", **options)
        used = Mark("tokenizer", tokenizer.fingerprint(), {"kind": tokenizer.name})
        note(run, [used], [Mark("tokens", digest)])
        run.finish()

    try:
        folder.mkdir(parents=True, exist_ok=True)
        mirror.within(2 * mirror.INIT_SECONDS, tell)
    except Exception as error:
        mirror.warn("W&B", f"which tokenizer made these tokens is not noted ({mirror.short(error)})")
