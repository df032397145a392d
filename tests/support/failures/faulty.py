"""A process that fails on purpose: `accelerate launch ... faulty.py FAULT PHASE RANK FOLDER VERB key=value ...`.

The verb runs as it is, but for one process that at step 8 is killed, raises, ends early or freezes: while it trains,
while the run is validated or while it is saved. What the processes print, which a launcher would mix with its own
report, goes to `FOLDER/printed`, and the time of the fault to `FOLDER/struck`.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from pipelines import train_prior, train_tokenizer
from pipelines.train_prior import PriorTask
from pipelines.train_tokenizer import TokenizerTask
from pipelines.training.heartbeat import Heartbeat

FAULTS, PHASES = ("kill", "exception", "exit", "frozen"), ("train", "validate", "save")
STEP = 8  # `train.evaluate_every` and `train.save_every` are this too


def strike(fault: str, folder: Path) -> None:
    """What befalls this process."""
    (folder / "struck").write_text(str(time.time()))
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "exit":
        os._exit(0)
    elif fault == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise RuntimeError("a fault that was planted")


def arm(fault: str, phase: str, unlucky: int, folder: Path, rank: int) -> None:
    """Lay the fault where the process `unlucky` will come by.

    All validate together. Only rank 0 saves, and another one waits meanwhile at a barrier.
    """

    def after(owner: Any, name: str, condition: Any) -> None:
        call = getattr(owner, name)

        def struck(*arguments: Any, **named: Any) -> Any:
            result = call(*arguments, **named)
            if condition(*arguments):
                strike(fault, folder)
            return result

        setattr(owner, name, struck)

    if rank != unlucky:
        return
    if phase == "save":
        if rank:
            after(Heartbeat, "beat", lambda self, step, phase: (step, phase) == (STEP, "save"))
        else:
            for task in (TokenizerTask, PriorTask):
                after(task, "save", lambda *_: True)
    elif phase == "validate":  # before its part is done, for which the others wait
        for owner in (train_tokenizer, train_prior):
            name = "evaluate_reconstruction" if owner is train_tokenizer else "bits_per_token"
            setattr(owner, name, lambda *_, **__: strike(fault, folder))
    else:
        for task in (TokenizerTask, PriorTask):
            after(task, "loss", lambda self, player, batch, step: step == STEP)


def main() -> None:
    fault, phase, unlucky, folder, verb, *argv = sys.argv[1:]
    output = os.open(Path(folder) / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    arm(fault, phase, int(unlucky), Path(folder), int(os.environ["RANK"]))
    importlib.import_module(f"pipelines.{verb}").main(argv)


if __name__ == "__main__":
    main()
