"""Encodes and sets of images that are killed at random moments, and continued by one, two or three processes.

python killed_verbs.py FOLDER KILLS SEED     # of each case; prints a line of JSON for each
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from failures.forked import Attempt, import_once, in_child, log_of, start_verb
from folders import written

SIDE, TRAIN, TEST = 8, 60, 20


@dataclass
class Case:
    """A command that makes `out`, and what it makes when one process runs it and nobody interrupts."""

    name: str
    verb: str
    folder: Path
    argv: list[str]
    suffix: str = ""
    earlier: list[str] = field(default_factory=list)
    seconds: float = 0.0
    expected: Any = None

    def start(self, out: Path, processes: int, argv: list[str] | None = None) -> Attempt:
        """Start it, or continue it."""
        return start_verb(self.verb, processes, out, [*(argv or self.argv), f"out={out}"])

    def finish(self, out: Path, processes: int, argv: list[str] | None = None) -> None:
        """Run it to its end."""
        codes = self.start(out, processes, argv).end()
        assert set(codes) == {0}, log_of(out).read_text()

    def place(self, name: str) -> Path:
        """Where a result goes, in a new folder of its own, with what is there before."""
        out = self.folder / name / f"out{self.suffix}"
        out.parent.mkdir(parents=True)
        if self.earlier:
            self.finish(out, 1, self.earlier)
        return out

    def prepare(self) -> None:
        """Make the result that others are compared with."""
        out = self.place("whole")
        began = time.monotonic()
        self.finish(out, 1)
        self.seconds, self.expected = time.monotonic() - began, written(out)


def kill_and_continue(case: Case, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill the command so often, each time one of its processes or all, and continue it with another number of them; at
    its end the files are those of a single uninterrupted process. Returns what was counted, and as `broken` what was
    wrong."""
    found, broken = Counter[str](kills=0, results=0), []
    while found["kills"] < kills:
        out, before = case.place(f"killed-{found['results']}"), None
        before = written(out) if case.earlier else None
        while found["kills"] < kills:
            processes = draw.randint(1, 3)
            attempt = case.start(out, processes)
            if attempt.wait(draw.uniform(0, case.seconds * 1.2)):
                attempt.end()
                break
            attempt.send(signal.SIGKILL, [draw.randrange(processes)] if draw.random() < 0.5 else None)
            attempt.end()
            found.update(["kills", f"of {processes}"])
            if not is_sound(case, out, before):
                broken.append(f"{case.name}: kill {found['kills']} left neither what was there nor the result")
        if not is_finished(case, out):
            case.finish(out, draw.randint(1, 3))
        if not is_finished(case, out):
            broken.append(f"{case.name}: result {found['results']} differs")
        found.update(["results"])
        shutil.rmtree(out.parent)
    return {"case": case.name, **found, "seconds": round(case.seconds, 2), "broken": broken}


def is_finished(case: Case, out: Path) -> bool:
    """Whether the result is there, and nothing else beside it."""
    others = [path.name for path in out.parent.iterdir() if path not in (out, log_of(out)) and ".lock" not in path.name]
    return out.exists() and written(out) == case.expected and not [name for name in others if not is_beside(name)]


def is_beside(name: str) -> bool:
    """Whether a process that is killed between two renames may leave a folder of this name beside its result."""
    return name.startswith(".del-")


def is_sound(case: Case, out: Path, before: Any) -> bool:
    """Whether the output is nothing, what was there or the result; or some of its files, if they come one by one."""
    if not out.exists():
        return True
    now = written(out)
    if case.name == "generate, folder":
        return all(case.expected.get(name) == data for name, data in now.items() if not name.startswith(".tmp-"))
    return now in (before, case.expected)


def make_cases(folder: Path) -> list[Case]:
    """A new dataset, one in the place of another, and both forms of a set of images."""
    in_child(partial(make_world, folder))
    common = [f"tokenizer={folder / 'tokenizer'}", f"data.source={folder / 'images'}", f"data.image_size={SIDE}"]
    encode = [*common, "data.augment.rotate=8", "augmentations=1", "batch_size=4", "rows_per_shard=6"]
    generate = [f"pipeline={folder / 'pipeline'}", "batch_size=4", "num_images=60"]
    return [
        Case("encode, new", "encode", folder / "new", encode),
        Case("encode, in place of another", "encode", folder / "again", encode, earlier=[*encode, "seed=1"]),
        Case("generate, folder", "generate", folder / "folder", generate),
        Case("generate, npz", "generate", folder / "npz", generate, ".npz"),
    ]


def make_world(folder: Path) -> None:
    """Pictures, a tokenizer and a pipeline."""
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


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill each case so often."""
    import_once("accelerate", "pipelines.encode", "pipelines.generate", "tqdm", "small_pipelines")
    for case in make_cases(folder):
        case.prepare()
        print(json.dumps(kill_and_continue(case, kills, random.Random(f"{case.name} {seed}"))), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
