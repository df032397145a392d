"""What befalls runs from outside, by the dozen: full disks, lost processes, bad images, losses that are not finite.

Each returns what it counted and, as `broken`, what was wrong.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from failures import faulty
from failures.forked import (
    Case,
    Hook,
    draws,
    in_child,
    last_line,
    log_of,
    new_case,
    record_samples,
    samples_of_run,
    steps_taken,
    verifying,
)
from launch import end, metrics, output_of, start, tensors, two_processes
from PIL import Image

from pipelines.train_prior import PriorTask
from pipelines.train_tokenizer import TokenizerTask
from pipelines.training import loop as training

Found = dict[str, Any]
ENDS_WITHIN = 10.0  # seconds that a job has to end after a process of it is dead


# Full disks

FULL_FROM, FULL_UNTIL = 6, 14  # steps; the run is saved before, meanwhile and after
DISK = 16 << 20


def full_disks(case: Case, number: int, levels: int) -> Found:
    """A disk that fills up in mid-run, to the end or for some steps, at level `number` of `levels` of free space.

    From none to room for all that the run writes. The disk is a tmpfs: call `in_own_mounts` first.
    """
    case.ready()
    size = sum(path.stat().st_size for path in (case.folder / "whole").rglob("*") if path.is_file())
    found, broken = Counter[str](), []
    lines: dict[str, list[str]] = {}
    free, level = int(1.25 * size * (number % levels) / levels), number % levels
    for until in (0, FULL_UNTIL) if levels > 3 else (FULL_UNTIL * (1 - level % 2),):
        out = case.folder / f"full-{level}-{until}"
        out.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(out)], check=True)
        codes = case.start(out, record_samples(out), fill_disk(out, free, until)).end()
        what = f"{free:,} bytes free, {f'until step {until}' if until else 'to the end'}"
        found["tried"] += 1
        found["ended with 0"] += codes == [0] * case.processes
        if not verifying(out):
            broken.append(f"{what}: no state verifies")
        told = warnings_of(out)
        lines[what] = [f"{codes[0]} at step {steps_taken(out)}", *told]
        if codes != [0] * case.processes:  # started again, with the disk as full as before
            again = case.start(out, record_samples(out)).end()
            lines[what] += ["again:", *warnings_of(out)[len(told) :]]
            said = re.compile(r"error.*: .*/full-.*(needs [\d,]+ .*[\d,]+ are free|cannot be written \(No space left)")
            wrong = [line for line in (told[-1], last_line(out)) if not said.search(line)]
            broken += [f"{what}: ended with {codes}, then {again}: {line}" for line in wrong]
            if not verifying(out):
                broken.append(f"{what}: started again, it left no state that verifies")
        with suppress(FileNotFoundError):
            (out / "filler").unlink()
        left_out = [line.split()[1] for line in told if "is left out" in line]  # pictures, which nobody repeats
        different = [text for text in case.complete(out) if not any(text.endswith(Path(p).name) for p in left_out)]
        broken += [f"{what}: {text}" for text in different]
        subprocess.run(["umount", str(out)], check=True)
    return {**found, "lines": lines, "broken": broken}


def fill_disk(out: Path, free: int, until: int) -> Hook:
    """Leave `free` bytes on the disk of the run from one step on; to the end, or until another one."""

    def hook(rank: int) -> None:
        take_step = training.take_step

        def filling(run: Any, *rest: Any) -> None:
            if run.step == FULL_FROM and not rank:
                with (out / "filler").open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(out).free - free))
            if until and run.step == until and not rank:
                (out / "filler").unlink()
            take_step(run, *rest)

        training.take_step = filling

    return hook


def warnings_of(out: Path) -> list[str]:
    """What was printed that says what is wrong."""
    return [line for line in log_of(out).read_text().splitlines() if line.startswith(("error", "warning"))]


def in_own_mounts() -> None:
    """Start this command again where it may mount a file system that nobody else sees; unless it was."""
    if os.environ.get("OWN_MOUNTS"):
        return
    command = ["unshare", "--map-root-user", "--mount", sys.executable, *sys.orig_argv[1:]]
    os.execvpe("unshare", command, {**os.environ, "OWN_MOUNTS": "1"})


def can_mount() -> bool:
    """Whether this machine lets us."""
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(
            ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
        ).returncode
    )


# Faults of one process of two


@dataclass
class Cell:
    """A fault of the matrix, and how the job ended."""

    fault: str
    phase: str
    rank: int
    codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    line: str = ""

    def broken(self, timeout: float, grace: float) -> list[str]:
        """What is not as promised: an exit code, the time it took, or a last line that does not say what happened.

        timeout: `train.timeout`, after which a frozen process is given up; grace: what a launcher then gives it.
        """
        limit = timeout + grace if self.fault == "frozen" else ENDS_WITHIN
        cause = {"kill": "killed", "exit": "ended", "exception": "planted", "frozen": "frozen|silent"}[self.fault]
        wrong = {
            "exit code 0": 0 in self.codes,
            f"{self.seconds:.1f} s": self.seconds > limit,
            "no rank": f"process {self.rank}" not in self.line,
            "no step and phase": f"step {faulty.STEP} ({self.phase})" not in self.line,
            "no cause": not re.search(cause, self.line),
        }
        return [f"{self.fault} in {self.phase} on {self.rank}: {what}: {self.line}" for what, so in wrong.items() if so]


def forked_fault(case: Case, cell: Cell) -> None:
    """Let the fault happen in forked processes. As launchers do, tell those left to end when one has failed; again and
    again, as it may find them anywhere."""
    out = case.folder / f"{cell.fault}-{cell.phase}-{cell.rank}"
    place = case.folder / f"{out.name}.struck"
    place.mkdir()
    attempt = case.start(out, partial(faulty.arm, cell.fault, cell.phase, cell.rank, place))
    left = set(range(case.processes)) - {cell.rank}
    if cell.fault == "frozen":
        assert attempt.wait(among=left), f"{out.name}: hung"
        attempt.send(signal.SIGKILL)
    elif attempt.wait(among={cell.rank}) and attempt.codes[cell.rank]:
        while not attempt.wait(0.001) and time.monotonic() < attempt.ended[cell.rank] + 2 * ENDS_WITHIN:
            attempt.send(signal.SIGTERM)
    attempt.end()
    ended = time.time() - time.monotonic() + max(attempt.ended[rank] for rank in left)
    cell.seconds = ended - float((place / "struck").read_text())
    cell.codes, cell.line = [attempt.codes[rank] for rank in left], last_line(out)


def launched_fault(case: Case, cell: Cell) -> None:
    """Let it happen under `accelerate launch`, by the documented command of two processes."""
    place = case.folder / f"launched-{cell.fault}-{cell.phase}-{cell.rank}"
    place.mkdir()
    command = two_processes(case.verb, case.arguments(place / "run"))
    at = command.index("-m")
    script = [str(Path(faulty.__file__)), cell.fault, cell.phase, str(cell.rank), str(place), case.verb]
    job = start([*command[:at], *script, *command[at + 2 :]])
    try:
        output_of(job, 120, code=None)
    finally:
        end(job)
    cell.seconds, cell.codes = time.time() - float((place / "struck").read_text()), [job.returncode]
    cell.line = (place / "printed").read_text().strip().splitlines()[-1]


# What processes must agree on


def uneven_data(folder: Path, number: int, images: int = 1000, bad: int = 37) -> Found:
    """Three processes, and images of which some cannot be decoded: the run ends, each good image once an epoch."""
    source = folder / "images"
    if not source.exists():
        in_child(lambda: write_split(source, images, bad))
    good = images - bad
    more = {
        "data__source": str(source),
        "data__image_size": 16,
        "data__channels": 1,
        "data__limit": None,
        "data__validation_fraction": 0,  # or the good images would not all be trained on
        "data__max_bad_fraction": 0.05,
        "data__on_error": "skip",
        "train__steps": 2 * good // 15 + 1,
        "train__batch_size": 15,
        "train__accumulate": 1,
        "train__seed": number,
    }
    case = new_case("train_tokenizer", 3, folder / str(number), **more)
    case.rows, run = good, case.folder / "run"
    codes, printed = case.start(run, record_samples(run)).end(), log_of(run).read_text()
    broken = samples_of_run(case, run)
    if set(codes) != {0} or f"{good} training rows" not in printed:
        broken.append(f"exit codes {codes}: {last_line(run)}")
    return {"tried": 1, "good images": good, "broken": [f"run {number}: {text}" for text in broken]}


def write_split(source: Path, images: int, bad: int) -> None:
    """A split to train on, some of whose files are cut short, empty or text; and a small one to evaluate on."""
    generator = np.random.default_rng(0)
    sick = set(generator.choice(images, bad, replace=False).tolist())
    for split, count in (("train", images), ("test", 16)):
        (source / split).mkdir(parents=True)
        for number in range(count):
            path = source / split / f"{number:04d}.png"
            Image.fromarray(generator.integers(0, 256, (16, 16), dtype=np.uint8)).save(path)
            if split == "train" and number in sick:
                whole = path.read_bytes()
                path.write_bytes([whole[: len(whole) // 2], b"", b"not a picture"][number % 3])


def sick_steps(case: Case, number: int, count: int) -> Found:
    """A loss that is not finite at `count` random (step, rank): the step changes nothing, on any process."""
    draw, steps = draws("sick", case.name, number), case.more["train__steps"]
    sick = {step: draw.randrange(case.processes) for step in draw.sample(range(1, steps - 1), count)}
    out = case.folder / f"sick-{number}"
    codes = case.start(out, record_samples(out), partial(make_sick, sick, case.folder)).end()
    if set(codes) != {0}:
        return {"tried": count, "steps": steps, "broken": [f"exit codes {codes}: {last_line(out)}"]}
    kept = [json.loads((case.folder / f"weights-{rank}").read_text()) for rank in range(case.processes)]
    broken = []
    for step, hashes in enumerate(zip(*kept, strict=True)):
        if len(set(hashes)) > 1:
            broken.append(f"after step {step} the processes differ")
        if step and (hashes[0] == kept[0][step - 1]) != (step in sick):
            broken.append(f"step {step}: weights {'changed' if step in sick else 'did not change'}")
    finite = all(bool(torch.isfinite(value.float()).all()) for value in tensors(out).values())
    skipped = metrics(out)[-1]["skipped_steps"]
    if not finite or skipped != count or len(kept[0]) != steps:
        broken.append(f"finite files: {finite}; {skipped} of {len(kept[0])} steps were counted as skipped")
    return {"tried": count, "steps": steps, "broken": broken}


def make_sick(sick: dict[int, int], folder: Path, rank: int) -> None:
    """Hook: make the loss NaN or infinite at these steps of these ranks, and keep a hash of all weights after each."""
    take_step, hashes = training.take_step, []
    for task in (TokenizerTask, PriorTask):

        def loss(self: Any, player: str, batch: Any, step: int, well: Any = task.loss) -> Any:
            value, terms = well(self, player, batch, step)
            if sick.get(step) != rank:
                return value, terms
            return (value * math.nan, value + math.inf)[step % 2], terms  # the second has finite gradients

        task.loss = loss  # type: ignore[method-assign]

    def hashed(run: Any, *rest: Any) -> None:
        take_step(run, *rest)
        digest = hashlib.sha256()
        for module in (run.task.model, run.averaged.module):
            for value in module.state_dict().values():
                digest.update(value.contiguous().numpy().tobytes())
        hashes.append(digest.hexdigest())
        (folder / f"weights-{rank}").write_text(json.dumps(hashes))

    training.take_step = hashed  # type: ignore[assignment]
