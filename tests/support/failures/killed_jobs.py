"""Encodes and sets of images that are killed and started again, until they are done: by the hundred.

As in `interruptions`, each function makes one, which it kills `left` times at most.
"""

from __future__ import annotations

import hashlib
import json
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

from failures.forked import Attempt, Hook, draws, import_once, in_child, last_line, log_of, start_verb
from failures.interruptions import Found, count_calls, die, is_time

TRAIN, TEST, SIDE = 40, 44, 8
IMAGES = 48
ADDED = "added to one"


@dataclass
class Job:
    """A command whose result is a file or folder, made in pieces. earlier: a command that made what is there before.
    again: what it says, and ends with 2, where its result is there."""

    name: str
    verb: str
    processes: int
    folder: Path
    argv: list[str]
    suffix: str = ""
    earlier: list[str] = field(default_factory=list)
    again: str = ""
    seconds: float = 0.0
    calls: int = 0
    expected: dict[str, str] = field(default_factory=dict)

    def start(self, out: Path, *hooks: Hook) -> Attempt:
        """Start it, or go on with it."""
        return start_verb(self.verb, self.processes, out, [*self.argv, f"out={out}"], in_small_pieces, *hooks)

    def ready(self) -> None:
        """Have something to compare with: the result of one that nobody kills."""
        if self.expected:
            return
        out, counted, listed = self.place("whole"), self.folder / "counted", self.folder / "modules.json"
        self.lay(out)
        assert set(self.start(out, partial(list_modules, listed)).end()) == {0}, log_of(out).read_text()
        import_once(*json.loads(listed.read_text()))
        remove(out)
        self.lay(out)
        began = time.monotonic()
        assert set(self.start(out, partial(die_at_call, 0, False, counted)).end()) == {0}, log_of(out).read_text()
        self.seconds, self.calls, self.expected = time.monotonic() - began, int(counted.read_text()), content(out)

    def place(self, name: str) -> Path:
        """A result's place, in a folder of its own."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return self.folder / name / f"out{self.suffix}"

    def lay(self, out: Path) -> None:
        """What is there before."""
        if self.earlier:
            first = start_verb(self.verb, 1, out, [*self.earlier, f"out={out}"], in_small_pieces)
            assert first.end() == [0], log_of(out).read_text()

    def complete(self, out: Path) -> list[str]:
        """Let it come to its end; what is not as in the one that nobody killed, and what is left beside it."""
        there, codes, name = content(out) == self.expected, self.start(out).end(), out.parent.name
        if set(codes) != {0} and not (there and self.says_so(out, codes)):
            return [f"{name}: exit codes {codes}: {last_line(out)}"]
        found = content(out)
        parts = [part for part in sorted(self.expected | found) if found.get(part) != self.expected.get(part)]
        return [f"{name}: {part} differs" for part in parts] + [f"{name}: {left} is left" for left in work_of(out)]

    def says_so(self, out: Path, codes: list[int]) -> bool:
        """Whether the command ended as it does where its result is there."""
        ended = codes[0] == 2 and set(codes) <= {2, -signal.SIGTERM}  # which the first one's end brings the others
        return bool(self.again) and ended and self.again in last_line(out)


def in_small_pieces(rank: int) -> None:
    """Hook: few images are many enough to be made in pieces."""
    from pipelines import generate

    generate.AT_ONCE = 1


def list_modules(path: Path, rank: int) -> None:
    """Hook: note what is imported by the end."""
    import os

    end = os._exit

    def ended(code: int) -> None:
        if not rank:
            path.write_text(json.dumps([] if "pyarrow" in sys.modules else list(sys.modules)))  # it starts threads
        end(code)

    os._exit = ended  # type: ignore[assignment]


def die_at_call(at_call: int, before: bool, counted: Path | None, rank: int, victim: int = 0) -> None:
    """Hook: the process `victim` dies before or after its `at_call`-th call that writes; 0: it counts them."""
    calls = 0

    def called(after: bool) -> None:
        nonlocal calls
        calls += not after
        if is_time(calls, at_call, before, after):
            die()
        if counted is not None and after:
            with open(counted, "w") as file:  # not by a call that counts
                file.write(str(calls))

    if rank == victim:
        count_calls(called)


def remove(out: Path) -> None:
    """A result, and what a job has left beside it."""
    shutil.rmtree(out.parent)
    out.parent.mkdir()


def content(out: Path) -> dict[str, str]:
    """sha256 of the file, or of every file of the folder."""
    files = [out] if out.is_file() else [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def work_of(out: Path) -> list[str]:
    """Names of work folders."""
    return [path.name for path in out.parent.iterdir() if re.fullmatch(rf"\.tmp-{out.name}-[a-z]+", path.name)]


def pieces_of(out: Path) -> dict[str, int]:
    """The pieces of a job that are done, as their entries say, and of each file which one it is; 0 where it is gone, as
    when they are removed one by one."""
    entries = [path for work in work_of(out) for path in (out.parent / work).glob("[a-z]*-*.json")]
    files = {path.stem: path.with_suffix(".safetensors") for path in entries}
    return {name: path.stat().st_ino if path.exists() else 0 for name, path in files.items()}


def jobs(verb: str, folder: Path) -> list[Job]:
    """The cases of a campaign: one process and two, from nothing and onto something, every form of a result."""
    world = folder / "world"
    if not world.exists():
        in_child(partial(make_world, world))
    if verb == "encode":
        common = [f"tokenizer={world / 'tokenizer'}", f"data.source={world / 'images'}", f"data.image_size={SIDE}"]
        common += ["batch_size=8", "data.augment.rotate=8"]
        more = [*common, "augmentations=1"]
        kinds = {
            "a new dataset": (more, [], ""),
            "in place of another": ([*more, "seed=1", "rows_per_shard=8"], common, ""),
            ADDED: ([*more, "append=true"], common, ""),
        }
    else:
        common = [f"pipeline={world / 'pipeline'}", "batch_size=4", f"num_images={IMAGES}"]
        other, over = [*common, "seed=7"], [*common, "overwrite=true"]
        kinds = {
            "a folder": (common, [], ""),
            "a folder in place of another": (over, other, ""),
            "a tar in place of another": (over, other, ".tar"),
            "npz": (common, [], ".npz"),
        }
    return [
        Job(
            f"{name}, {number} process{'es' * (number > 1)}",
            verb,
            number,
            folder / f"{verb}-{place}-{number}",
            argv,
            suffix,
            earlier,
            "append: the dataset has these rows already" if name == ADDED else "overwrite=true" if not earlier else "",
        )
        for place, (name, (argv, earlier, suffix)) in enumerate(kinds.items())
        for number in (1, 2)
    ]


def make_world(folder: Path) -> None:
    """Pictures, a tokenizer and a pipeline of them."""
    import numpy as np
    import torch
    from PIL import Image
    from small_pipelines import make_pipeline

    draw = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for number in range(count):
            place = folder / "images" / split / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)).save(place / f"{number}.png")
    torch.manual_seed(0)
    pipe = make_pipeline(size=(SIDE, SIDE), labels=["a", "b"])
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    pipe.save_pretrained(folder / "pipeline")


def killed(job: Job, number: int, left: int) -> Found:
    """Kill a job again and again until it is done: at a moment, or before or after a call that writes. What was there
    before stays until the result is there; pieces that are done are not made again; at last all is as if nobody had
    killed it."""
    job.ready()
    draw, found, out = draws("killed", job.name, number), Counter[str](tried=0), job.place(f"killed-{number}")
    job.lay(out)
    before, broken, pieces = content(out), list[str](), dict[str, int]()
    while found["tried"] < left:
        there, (attempt, at_call) = content(out) == job.expected, strike(job, out, draw)
        codes = attempt.end()
        if set(codes) == {0} or (there and job.says_so(out, codes)):
            break
        if -signal.SIGKILL not in codes:
            broken.append(f"{out.parent.name}: exit codes {codes}: {last_line(out)}")
            break
        found.update(["tried", "at a call" if at_call else "at a moment"])
        now, kept = content(out), pieces_of(out)
        if not sound(now, before, job.expected, in_parts=job.verb == "generate"):
            broken.append(f"{out.parent.name}: kill {found['tried']} left neither what was there nor the result")
        if lost := [name for name, file in pieces.items() if kept.get(name) != file and work_of(out) and now == before]:
            broken.append(f"{out.parent.name}: kill {found['tried']}: lost or made again: {lost}")
        pieces = kept
        found["pieces there"] = max(found["pieces there"], len(pieces))
    broken += job.complete(out)
    shutil.rmtree(out.parent)
    return {**found, "results compared": 1, "broken": broken}


def sound(now: dict[str, str], before: dict[str, str], after: dict[str, str], *, in_parts: bool) -> bool:
    """Whether a result is what was there or what comes; each file of it, if files come one by one."""
    if in_parts:
        return (
            all(value in (before.get(name), after.get(name)) for name, value in now.items())
            and before.keys() <= now.keys()
        )
    return now in (before, after)


def strike(job: Job, out: Path, draw: Any) -> tuple[Attempt, int]:
    """Start the job and kill it: one of its processes, or all."""
    victim = draw.randrange(job.processes)
    if draw.random() < 0.6:
        at_call = draw.randint(1, job.calls)
        if draw.random() < 0.5:  # at the end, where the result gets its name
            at_call = draw.randint(1, 40) + max(0, job.calls - 40)
            victim = 0
        return job.start(out, partial(die_at_call, at_call, draw.random() < 0.5, None, victim=victim)), at_call
    attempt = job.start(out)
    attempt.wait(draw.uniform(0, job.seconds))
    attempt.send(signal.SIGKILL, [victim] if draw.random() < 0.5 else None)
    return attempt, 0
