"""Kill or interrupt commands at random moments, continue them, and compare the results with uninterrupted ones.

Random numbers depend on the case and the seed; the step at which a signal arrives also depends on the machine.

    python -m kills FOLDER KILLS SEED     # `encode` and `generate`; prints a line of JSON for each case
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from processes import FORKS, kill, printed_in, start_ranks

Contents = dict[str, str]

ROWS = 75  # batches of 16 cross the ends of epochs
# Everything that a resume could lose: augmentation, revived codes, a critic, accumulated gradients, dropout, a line of
# metrics that is half gathered when a checkpoint is saved, and frequent checkpoints.
RUN = {
    "train__batch_size": 16,
    "train__timeout": 20,
    "train__log_every": 7,
    "train__save_every": 6,
    "train__evaluate_every": 40,
    "train__preview_every": 100,
}
EMA = {"kind": "ema", "codes": 32, "dim": 8, "revive_every": 3, "revive_below": 0.3}
TOKENIZER = {
    "data__limit": ROWS,
    "data__augment__rotate": 8,
    "train__accumulate": 2,
    "model": {"kind": "vqvae", "widths": [16], "blocks": [1], "quantizer": EMA},
    "critic": {"weight": 0.5, "start": 4, "warmup": 4, "ramp": 8, "width": 8, "layers": 1},
}
PRIOR = {
    "train__optimizer": "muon",
    "model": {"kind": "gpt", "dim": 16, "depth": 2, "heads": 2, "dropout": 0.2, "attention_dropout": 0.1},
}
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""Variables that `accelerate launch --use_fsdp --fsdp_version 2` sets and a run reads."""


class Attempt:
    """The processes of one start of a command; `ended`: time at which each rank ended."""

    def __init__(self, processes: list[ForkServerProcess], output: Path) -> None:
        self.processes, self.output, self.ended = processes, output, dict[int, float]()

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; returns whether all have ended."""
        until = time.monotonic() + seconds
        while len(self.ended) < len(self.processes):
            for rank, process in enumerate(self.processes):
                if rank not in self.ended and process.exitcode is not None:
                    self.ended[rank] = time.monotonic()
            if time.monotonic() > until:
                break
            time.sleep(min(0.0005, seconds))
        return len(self.ended) == len(self.processes)

    def send(self, number: int, ranks: list[int] | None = None) -> None:
        """Send a signal to these ranks (default: all) if they still run."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            process = self.processes[rank]
            if process.exitcode is None and process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def end(self) -> list[int]:
        """Wait for the exit codes, negative for a signal. Like a launcher, terminate the others after one has failed.

        Raises `AssertionError` if a process then takes half a minute, or two minutes in any case.
        """
        until, failed = time.monotonic() + 120, False
        while not self.wait(0.05) and time.monotonic() < until:
            if not failed and any(process.exitcode for process in self.processes):
                self.send(signal.SIGTERM)
                failed, until = True, time.monotonic() + 30
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            kill(process)
        assert None not in codes, f"a process hangs: exit codes {codes}: {printed_in(self.output)}"
        return codes  # type: ignore[return-value]


def written(path: Path) -> Contents:
    """Hash the file at `path`, or each file below it."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@dataclass
class Case:
    """A command that writes `out` with a number of processes (None: a random number each time).

    earlier: arguments of the command whose result is replaced, if any. contents: hashes a result. window: seconds after
    the start within which the command is interrupted. expected: contents of the uninterrupted result.
    """

    name: str
    verb: str
    folder: Path
    argv: list[str]
    processes: int | None = None
    suffix: str = ""
    earlier: list[str] = field(default_factory=list)
    variables: dict[str, str | None] = field(default_factory=dict)
    contents: Callable[[Path], Contents] = written
    window: float = 0.0
    expected: Contents = field(default_factory=dict)

    def start(self, out: Path, processes: int, argv: list[str] | None = None) -> Attempt:
        """Start or continue the command."""
        command = ["-m", f"pipelines.{self.verb}", *(argv or self.argv), f"out={out}"]
        return Attempt(start_ranks(command, processes, log_of(out), **self.variables), log_of(out))

    def finish(self, out: Path, processes: int, argv: list[str] | None = None) -> list[str]:
        """Run the command to its end; returns errors."""
        codes = self.start(out, processes, argv).end()
        return [f"{out}: exit codes {codes}: {printed_in(log_of(out))[-500:]}"] if any(codes) else []

    def place(self, name: str) -> Path:
        """Create a new folder for a result, with the earlier result in it; returns the path of the result."""
        out = self.folder / name / f"out{self.suffix}"
        out.parent.mkdir(parents=True)
        assert not (self.finish(out, 1, self.earlier) if self.earlier else [])
        return out

    def prepare(self, share: float) -> Case:
        """Create the expected result; the window is a `share` of the time that it takes."""
        out, warm = self.place("whole"), FORKS.Process()
        warm.start(), warm.join()  # the fork server imports everything first
        began = time.monotonic()
        wrong = self.finish(out, self.processes or 1)
        assert not wrong, wrong
        self.window, self.expected = share * (time.monotonic() - began), self.contents(out)
        return self

    def differences(self, out: Path) -> list[str]:
        """Parts that differ from the uninterrupted result, and files left beside it. (A process killed between two
        renames may leave a folder `.del-*`.)"""
        found = self.contents(out) if out.exists() else {}
        wrong = [name for name in sorted(self.expected | found) if found.get(name) != self.expected.get(name)]
        wrong = [f"{name} ({found[name]})" if name == "files" and name in found else name for name in wrong]
        beside = [path.name for path in out.parent.iterdir() if not path.name.startswith((out.name, ".del-"))]
        return [f"{out}: {name} differs" for name in [*wrong, *(name for name in beside if ".lock" not in name)]]

    def is_sound(self, out: Path, before: Contents | None) -> bool:
        """Whether a killed command left nothing, the earlier result or the new one; `generate` into a folder may leave
        some of its files."""
        if self.contents is not written or not out.exists():
            return True
        now = written(out)
        if self.name == "generate, folder":
            return all(self.expected.get(name) == data for name, data in now.items() if not name.startswith(".tmp-"))
        return now in (before, self.expected)


def log_of(out: Path) -> Path:
    """The file of the output of a run."""
    return out.with_name(f"{out.name}.log")


def interrupt(case: Case, seed: int, count: int, number: signal.Signals) -> dict[str, Any]:
    """Interrupt commands of a case `count` times, and complete each; returns counts, and errors as `broken`.

    SIGKILL is sent to all processes or to one, Ctrl-C to all.
    """
    draw, found, broken, slowest = random.Random(f"{case.name} {seed} {number.name}"), Counter[str](), list[str](), 0.0
    while found["interrupted"] < count:
        out = case.place(f"run-{number.name}-{found['runs compared']}")
        before = written(out) if case.earlier else None
        while found["interrupted"] < count:
            processes = case.processes or draw.randint(1, 3)
            attempt = case.start(out, processes)
            if attempt.wait(draw.uniform(0, case.window)):
                attempt.end()
                break  # it finished before the signal
            one = number == signal.SIGKILL and processes > 1 and draw.random() < 0.5
            began = time.monotonic()
            attempt.send(number, [draw.randrange(processes)] if one else None)
            codes = attempt.end()
            slowest = max(slowest, *(at - began for at in attempt.ended.values()))
            if number == signal.SIGKILL and -signal.SIGKILL not in codes:
                break  # it finished just before the signal
            found.update(["interrupted", *what_it_did(case, out, codes, number, broken)])
            if not case.is_sound(out, before):
                broken.append(f"{out}: a kill left neither the earlier result nor the new one")
        broken += case.finish(out, case.processes or draw.randint(1, 3)) or case.differences(out)
        found["runs compared"] += 1
        shutil.rmtree(out.parent)
    return {**found, "slowest end": slowest, "broken": broken}


def what_it_did(case: Case, out: Path, codes: list[int], number: int, broken: list[str]) -> list[str]:
    """What a training run was doing when it was interrupted. After Ctrl-C, a run prints the step at which it stopped,
    and has saved that step."""
    if case.contents is written:
        return []
    saved = sorted((out / "state").glob("step-*"))
    if number == signal.SIGKILL:
        places = [path.name for place in (out, out / "state") for path in place.glob(".*")]
        saving = any(name.startswith((".tmp-", ".del-")) for name in places)
        return ["while saving" if saving else "while training" if saved else "before the first save"]
    printed = printed_in(log_of(out))
    for path in out.parent.glob("*.log*"):
        path.write_text("")
    if stopped := re.search(r"stopped at step (\d+);", printed):
        if set(codes) != {130} or not saved or saved[-1].name != f"step-{int(stopped[1]):08d}":
            broken.append(f"{out}: exit codes {codes}, saved {saved[-1:]}: {stopped[0]}")
        return ["while training"]
    if ": done:" in printed or ": already finished" in printed:
        return ["at its end"]
    if 0 in codes:
        broken.append(f"{out}: exit codes {codes}: {printed[-500:]}")
    return ["before training"]


# Runs of both stages


def run_contents(out: Path) -> Contents:
    """Hash a finished run without timings: tensors of the newest checkpoint and of the snapshot, counters, metrics,
    pictures, and file names. The checkpoint before may be that of a signal, and is left out."""
    from launch import exact, states, tensors

    record = json.loads((states(out)[-1] / "state.json").read_text())
    del record["minutes"]
    found = {"record": json.dumps(record), "metrics.jsonl": json.dumps(exact(out))}
    for folder in (states(out)[-1], out / "tokenizer", out / "pipeline"):
        if folder.is_dir():
            hashes = {name: hashlib.sha256(value.numpy().tobytes()) for name, value in tensors(folder).items()}
            found |= {f"{folder.name}/{name}": each.hexdigest() for name, each in hashes.items()}
    found |= {f"previews/{name}": each for name, each in written(out / "previews").items()}
    found["files"] = " ".join([*sorted(path.name for path in out.iterdir()), states(out)[-1].name])
    return found


def make_case(stage: str, processes: int, folder: Path, steps: int, sharded: bool = False) -> Case:
    """A training run of `tokenizer` or `prior`, ready to be interrupted."""
    from launch import make_tokens, prior_arguments, tokenizer_arguments

    folder = folder / f"{stage}-{processes}{'-sharded' * sharded}"
    if stage == "prior":
        tokens = make_tokens(folder / "tokens", rows=ROWS)
        argv = prior_arguments(folder, tokens, **RUN, **PRIOR, train__steps=steps)
    else:
        argv = tokenizer_arguments(folder, **RUN, **TOKENIZER, train__steps=steps)
    name = f"{stage}, {processes} process{'es' * (processes > 1)}{', FSDP2' * sharded}"
    argv = [argument for argument in argv if not argument.startswith("out=")]
    case = Case(name, f"train_{stage}", folder, argv, processes, variables={**SHARDED} if sharded else {})
    case.contents = run_contents
    return case.prepare(0.9 if steps < 100 else 0.3)  # early in a long run, so that it is interrupted several times


# `encode` and `generate`


def make_verb_cases(folder: Path) -> list[Case]:
    """A new token dataset, one that replaces another, one of a stream, and generated images in both formats."""
    import torch
    from givens.images import rows_of, write_folder, write_shards
    from small_pipelines import make_pipeline

    for split, count in (("train", 30), ("test", 10)):
        write_folder(folder / "images" / split, count=count, classes=("a", "b"), shape=(8, 8))
    torch.manual_seed(0)
    pipe = make_pipeline(size=(8, 8), labels=["a", "b"])
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    pipe.save_pretrained(folder / "pipeline")
    common = [f"tokenizer={folder / 'tokenizer'}", f"data.source={folder / 'images'}", "data.image_size=8"]
    encode = [*common, "data.augment.rotate=8", "augmentations=1", "batch_size=4", "rows_per_shard=6"]
    shards = write_shards(folder / "shards", "parquet", rows_of(60), 10)
    stream = [*common[::2], f"data.source={shards}", "data.streaming=true", *encode[3:-1], "attributes.number=label"]
    generate = [f"pipeline={folder / 'pipeline'}", "batch_size=4", "num_images=60"]
    return [
        Case("encode, new", "encode", folder / "new", encode),
        Case("encode, in place of another", "encode", folder / "again", encode, earlier=[*encode, "seed=1"]),
        Case("encode, of a stream", "encode", folder / "stream", stream),
        Case("generate, folder", "generate", folder / "folder", generate),
        Case("generate, npz", "generate", folder / "npz", generate, suffix=".npz"),
    ]


if __name__ == "__main__":
    for each in make_verb_cases(Path(sys.argv[1])):
        result = interrupt(each.prepare(1.2), int(sys.argv[3]), int(sys.argv[2]), signal.SIGKILL)
        print(json.dumps({"case": each.name, **result}), flush=True)
