"""Runs of both stages that are killed or interrupted at random moments, and whether they end as one that was not.

What is drawn depends on the case and the seed alone; where a signal strikes also on the machine.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from failures.forked import Attempt, Hook, import_once, in_child, log_of, start_verb
from launch import VQVAE, exact, make_tokens, prior_arguments, states, tensors, tokenizer_arguments

ROWS = 75  # batches of 16 run across the ends of epochs
# Images are augmented and codes revived, a critic plays, gradients of two micro-batches are added, dropout draws, a
# line of metrics is half gathered when a checkpoint is saved, and checkpoints are saved all the time: all that a resume
# could lose.
RUN = {
    "train__batch_size": 16,
    "train__timeout": 20,
    "train__log_every": 7,
    "train__save_every": 6,
    "train__evaluate_every": 40,
    "train__preview_every": 100,
}
TOKENIZER = {
    "data__limit": ROWS,
    "data__augment__rotate": 8,
    "train__accumulate": 2,
    "model": {**VQVAE, "quantizer": {"kind": "ema", "codes": 32, "dim": 8, "revive_every": 3, "revive_below": 0.3}},
    "critic": {"weight": 0.5, "start": 4, "warmup": 4, "ramp": 8, "width": 8, "layers": 1},
}
PRIOR = {
    "train__optimizer": "muon",
    "model": {"kind": "gpt", "dim": 16, "depth": 2, "heads": 2, "dropout": 0.2, "attention_dropout": 0.1},
}
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` tells its processes, of all that a run reads."""
IMPORTED: set[str] = set()


@dataclass
class Case:
    """A stage on so many processes, and the folder for its runs."""

    stage: str
    processes: int
    folder: Path
    steps: int
    sharded: bool = False
    seconds: float = 0.0
    expected: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As in a table."""
        count = f"{self.processes} process{'es' if self.processes > 1 else ''}"
        return f"{self.stage}, {count}{', FSDP2' * self.sharded}"

    @property
    def window(self) -> float:
        """Seconds from a start in which it is interrupted: a part of a long run, so that it is several times."""
        return self.seconds * (0.9 if self.steps < 100 else 0.3)

    def start(self, out: Path, *hooks: Hook, steps: int | None = None) -> Attempt:
        """Start the run `out`, or continue it; each process first calls the hooks with its rank."""
        if self.stage == "prior":
            argv = prior_arguments(out, self.folder / "tokens", **RUN, **PRIOR, train__steps=steps or self.steps)
        else:
            argv = tokenizer_arguments(out, **RUN, **TOKENIZER, train__steps=steps or self.steps)
        places = SHARDED if self.sharded else {}
        return start_verb(f"train_{self.stage}", self.processes, out, argv, *hooks, places=places)

    def prepare(self) -> None:
        """Import what runs import, and train the run that nobody interrupts."""
        self.folder.mkdir(parents=True)
        if self.stage == "prior":
            in_child(partial(make_tokens, self.folder / "tokens", rows=ROWS))
        if self.stage + str(self.sharded) not in IMPORTED:
            IMPORTED.add(self.stage + str(self.sharded))
            listed = self.folder / "modules.json"
            assert set(self.start(self.folder / "imports", partial(list_modules, listed), steps=7).end()) == {0}
            import_once(*json.loads(listed.read_text()))
        out, began = self.folder / "whole", time.monotonic()
        codes = self.start(out).end()
        assert set(codes) == {0}, log_of(out).read_text()
        self.seconds, self.expected = time.monotonic() - began, contents(out)

    def complete(self, out: Path) -> list[str]:
        """Run it to its end; the parts that are not as in the uninterrupted run."""
        codes = self.start(out).end()
        if set(codes) != {0}:
            return [f"{out.name}: exit codes {codes}: {last_line(out)}"]
        found = contents(out)
        parts = [part for part in sorted(self.expected | found) if found.get(part) != self.expected.get(part)]
        return [f"{out.name}: {part}: {found.get(part)}, not {self.expected.get(part)}"[:500] for part in parts]


def list_modules(path: Path, rank: int) -> None:
    """Write down, as this process ends, what it has imported."""
    exit_now = os._exit

    def ended(code: int) -> None:
        if not rank:
            path.write_text(json.dumps(list(sys.modules)))
        exit_now(code)

    os._exit = ended  # type: ignore[assignment]


def contents(out: Path) -> dict[str, str]:
    """All of a finished run that no clock is in: tensors of the newest checkpoint and of the snapshot, the record,
    lines, pictures, and the names of its files; not of the checkpoint before, which may be that of a signal."""
    record = json.loads((states(out)[-1] / "state.json").read_text())
    del record["minutes"]
    found = {"record": json.dumps(record), "metrics.jsonl": json.dumps(exact(out))}
    folders = [path for path in (states(out)[-1], out / "tokenizer", out / "pipeline") if path.is_dir()]
    for folder in folders:
        found |= {f"{folder.name}/{name}": digest(value.numpy().tobytes()) for name, value in tensors(folder).items()}
    found |= {f"previews/{path.name}": digest(path.read_bytes()) for path in out.glob("previews/*")}
    names = [*sorted(path.name for path in out.iterdir()), states(out)[-1].name]
    assert all(path in states(out) for path in (out / "state").iterdir())
    return found | {"files": " ".join(names)}


def digest(data: bytes) -> str:
    """A short hash."""
    return hashlib.sha256(data).hexdigest()[:16]


def last_line(out: Path) -> str:
    """The last that its processes printed."""
    return (log_of(out).read_text().strip().splitlines() or ["(nothing was printed)"])[-1]


def interrupt(case: Case, seed: int, count: int, number: signal.Signals) -> dict[str, Any]:
    """Interrupt runs of a case `count` times, and complete each; what was counted, and as `broken` what was wrong.

    SIGKILL strikes all processes or one of them, by turns, Ctrl-C all.
    """
    draw, found = random.Random(f"{case.name} {seed} {number.name}"), Counter[str]()
    broken: list[str] = []
    slowest = 0.0
    while found["interrupted"] < count:
        out = case.folder / f"run-{found['runs compared']}"
        while found["interrupted"] < count:
            attempt = case.start(out)
            if attempt.wait(draw.uniform(0, case.window)):
                break  # it had come to its end
            one = number == signal.SIGKILL and case.processes > 1 and draw.random() < 0.5
            began = time.monotonic()
            attempt.send(number, [draw.randrange(case.processes)] if one else None)
            codes = attempt.end()
            slowest = max(slowest, *(at - began for at in attempt.ended.values()))
            if number == signal.SIGKILL and -signal.SIGKILL not in codes:
                break  # it had come to its end just before
            found["interrupted"] += 1
            if number == signal.SIGKILL:
                found[what_it_did(out)] += 1
                if one and 0 in codes and ": done: " not in last_line(out):
                    broken.append(f"{out.name}: exit codes {codes} after a kill: {last_line(out)}")
            else:
                found[how_it_stopped(out, codes, broken)] += 1
        broken += case.complete(out)
        found["runs compared"] += 1
        shutil.rmtree(out)
        log_of(out).unlink()
    return {**found, "slowest end": slowest, "broken": broken}


def what_it_did(out: Path) -> str:
    """What a killed run was doing."""
    if any(path.name.startswith((".tmp-", ".del-")) for place in (out, out / "state") for path in place.glob(".*")):
        return "while saving"
    return "while training" if states(out) else "before the first save"


def how_it_stopped(out: Path, codes: list[int], broken: list[str]) -> str:
    """Where Ctrl-C met a run; a run that was training says at which step it stopped, and that is what is saved."""
    line, saved = last_line(out), [path.name for path in states(out)]
    log_of(out).write_text("")
    if stopped := re.search(r"stopped at step (\d+);", line):
        if set(codes) != {130} or saved[-1:] != [f"step-{int(stopped[1]):08d}"]:
            broken.append(f"{out.name}: exit codes {codes}, saved {saved[-1:]}: {line}")
        return "while training"
    if ": done:" in line or ": already finished" in line:
        return "at its end"
    if 0 in codes:
        broken.append(f"{out.name}: exit codes {codes}: {line}")
    return "before training"


def make_case(stage: str, processes: int, folder: Path, steps: int, sharded: bool = False) -> Case:
    """A case that is ready to be interrupted."""
    case = Case(stage, processes, folder / f"{stage}-{processes}{'-sharded' * sharded}", steps, sharded)
    case.prepare()
    return case


def warm_up() -> None:
    """Import what every case needs."""
    for name in ("pipelines.train_prior", "pipelines.train_tokenizer"):
        importlib.import_module(name)
