"""Commands at any moment of which power is lost: a run of either stage, and whatever else writes for a user.

A case is recorded once (see `power_journal`); a number cuts it somewhere, and builds what could be left of it. Nothing
that was saved may be lost, nothing may be taken for whole that is not, and the same command must come to the same end.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from failures.forked import Attempt, Case, Hook, draws, fork, import_once, in_child, last_line, record_samples
from failures.interruptions import Found, snapshot_loads
from failures.killed_jobs import die_at_call, in_small_pieces, list_modules, make_world, sound
from failures.power_journal import Journal, Operation
from failures.power_loss import clear, cut_points, lose_power
from launch import states

from pipelines import files as output_locks
from pipelines.training import loop as training
from pipelines.training import saving
from tokenizer.files import MANIFEST, folders_aside, verify_manifest

LOOKS = (
    8  # at what is left, each after another cut; only from the last one the same command goes on, which takes longer
)


WAIT = 2.0  # seconds for a lock of which nothing is left that says whose it was


@dataclass
class Recorded:
    """What a case did, and where."""

    journal: Journal
    operations: list[Operation]

    def cut(self, draw: Random, target: Path) -> tuple[int, str]:
        """Lose power somewhere: after how many operations, and in words."""
        place = draw.choice(cut_points(self.operations))
        way = lose_power(self.journal, self.operations, place, draw, target)
        return place, f"cut {place} of {len(self.operations)}, {way}"

    def marks(self, until: int | None = None) -> list[str]:
        """What had happened by then."""
        return [operation["mark"] for operation in self.operations[:until] if "mark" in operation]


def record(root: Path, place: Path) -> Journal:
    """A journal of the folder `root`, which begins with what is there."""
    journal = Journal(root, place)
    journal.begin()
    return journal


# Runs


def lose_power_of_run(case: Case, number: int, left: int) -> Found:
    """Cut a run of a stage, which is killed at its middle and goes on: its states, its snapshot and its record."""
    output_locks.LEASE, output_locks.HEARTBEAT = WAIT, WAIT / 4
    case.ready()
    recorded, out = recorded_run(case), case.folder / "power" / "run"
    draw, broken = draws("power", case.name, number), []
    for _ in range(LOOKS):
        cut, what = recorded.cut(draw, case.folder / "power")
        broken += [f"{what}: {text}" for text in state_of_run(out, recorded.marks(cut), recorded.marks())]
    broken += [f"{what}: {text}" for text in case.complete(out)]
    return {"tried": 1, "cuts": LOOKS, "broken": broken}


RECORDED: dict[str, Recorded] = {}


def recorded_run(case: Case) -> Recorded:
    """The run, recorded once."""
    name = str(case.folder)
    if name not in RECORDED:
        root = case.folder / "power"
        root.mkdir()
        journal, out = record(root, case.folder / "journal"), root / "run"
        samples = record_samples(out)
        codes = case.start(
            out, samples, partial(mark_saves, journal), partial(kill_at, case.more["train__steps"] // 2 + 1)
        ).end()
        assert -signal.SIGKILL in codes, last_line(out)
        codes = case.start(out, samples, partial(mark_saves, journal)).end()
        assert set(codes) == {0}, last_line(out)
        assert not case.differences(out), case.differences(out)
        RECORDED[name] = Recorded(journal, journal.operations())
    return RECORDED[name]


def kill_at(step: int, rank: int) -> None:
    """Hook: all processes die at a step."""
    take_step = training.take_step

    def dying(run: Any, *rest: Any) -> None:
        if run.step == step:
            run.writer.wait()
            import os

            os.kill(os.getpid(), signal.SIGKILL)
        take_step(run, *rest)

    training.take_step = dying  # type: ignore[assignment]


def mark_saves(journal: Journal, rank: int) -> None:
    """Hook: record what this process does, and when a state or a snapshot is saved."""
    prepare, save_snapshot = saving.prepare, saving.save_snapshot

    def prepared(run: Any) -> Any:
        write, step = prepare(run), run.step

        def written() -> None:
            write()
            manifest = (run.run / "state" / f"step-{step:08d}" / MANIFEST).read_bytes()
            journal.mark(f"state {step} {hashlib.sha256(manifest).hexdigest()}")

        return written

    def saved(run: Any, *rest: Any) -> None:
        save_snapshot(run, *rest)
        journal.mark("snapshot")

    if not rank:
        saving.prepare, saving.save_snapshot = prepared, saved
    journal.patch()


def state_of_run(out: Path, marks: list[str], ever: list[str]) -> list[str]:
    """What is wrong with a run after power loss, of which `marks` had been saved, and `ever` is in the end."""
    wrong, whole = [], {}
    for state in states(out):
        try:
            verify_manifest(state)
        except ValueError:
            continue
        whole[int(state.name[5:])] = hashlib.sha256((state / MANIFEST).read_bytes()).hexdigest()
    saved = [int(mark.split()[1]) for mark in marks if mark.startswith("state")]
    if saved and max(whole, default=0) < max(saved):
        wrong.append(f"step {max(saved)} was saved, and of states {sorted(whole)} are whole")
    known = {tuple(mark.split()[1:]) for mark in ever if mark.startswith("state")}
    wrong += [
        f"state {step} is not as it was written" for step, found in whole.items() if (str(step), found) not in known
    ]
    there = any((out / name).exists() for name in ("tokenizer", "pipeline"))
    if (there or "snapshot" in marks) and not snapshot_loads(out):
        wrong.append("the snapshot is damaged" if there else "the snapshot is gone")
    return wrong


# Whatever else writes


@dataclass
class Work:
    """Something that writes `out`, by `write(world, out)` in a process of its own.

    there: whether something was written before, by `earlier` if that is given. parts: whether files of the result come
    one by one. killed: after how many calls it is killed, to go on. once: it refuses to write where its result is.
    reads: what of the world it changes.
    """

    name: str
    folder: Path
    write: Any
    earlier: Any = None
    file: str = "out"
    there: bool = False
    parts: bool = False
    killed: int = 0
    once: bool = False
    reads: str = ""
    recorded: Recorded | None = None
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """Where it writes: two folders deep, of which the second is new."""
        return self.folder / "power" / "results" / self.file

    def comparable(self, found: dict[str, str]) -> dict[str, str]:
        """Without the manifest of results, which says more while they are replaced."""
        return {name: value for name, value in found.items() if not self.parts or Path(name).name != MANIFEST}

    def start(self, *hooks: Hook, write: Any = None) -> Attempt:
        """Do it; or `write` in place of what is to be done."""

        def act(rank: int) -> None:
            in_small_pieces(rank)
            world = open_world(self.folder.parent / "world")
            for hook in hooks:
                hook(rank)
            (write or self.write)(world, self.out)

        return fork(1, act, self.folder / "log")

    def ready(self) -> Recorded:
        """Record it, once."""
        if self.recorded is None:
            root, listed = self.folder / "power", self.folder / "modules.json"
            root.mkdir(parents=True)
            if self.reads:
                shutil.copytree(self.folder.parent / "world" / self.reads, self.out)
            else:
                self.finish(partial(list_modules, listed), write=self.earlier)
                import_once(*json.loads(listed.read_text()))
            if not self.there:
                clear(root)
            self.before = files(self.out)
            journal = record(root, self.folder / "journal")
            if self.killed:
                codes = self.start(partial(patched, journal), partial(die_at_call, self.killed, True, None)).end()
                assert codes == [-signal.SIGKILL], codes
            self.finish(partial(patched, journal))
            journal.mark("done")
            self.after, self.recorded = files(self.out), Recorded(journal, journal.operations())
        return self.recorded

    def finish(self, *hooks: Hook, write: Any = None) -> None:
        """The same, to its end."""
        codes = self.start(*hooks, write=write).end()
        assert codes == [0], (self.folder / "log").read_text()


def patched(journal: Journal, rank: int) -> None:
    """Hook: record what this process does."""
    journal.patch()


def lose_power_of_work(work: Work, number: int, left: int) -> Found:
    """Cut it somewhere."""
    output_locks.LEASE, output_locks.HEARTBEAT = WAIT, WAIT / 4
    recorded, draw, wrong = work.ready(), draws("power", work.name, number), []
    for _ in range(LOOKS):
        cut, what = recorded.cut(draw, work.folder / "power")
        if not work.out.exists() and len(aside := folders_aside(work.out)) == 1:
            aside[0].rename(work.out)  # as loading it says
        now = files(work.out)
        if "done" in recorded.marks(cut) and now != work.after:
            wrong.append(f"{what}: it was done, and is damaged: {difference(now, work.after)}")
        elif not sound(*map(work.comparable, (now, work.before, work.after)), in_parts=work.parts):
            wrong.append(f"{what}: neither what was there nor the result: {difference(now, work.before)}")
    codes = [0] if work.once and now == work.after else work.start().end()
    if codes != [0]:
        wrong.append(
            f"{what}: the same command ends with {codes}: {(work.folder / 'log').read_text().splitlines()[-1]}"
        )
    elif files(work.out) != work.after:
        wrong.append(f"{what}: the same command comes to another end: {difference(files(work.out), work.after)}")
    return {"tried": 1, "cuts": LOOKS, "broken": wrong}


def files(out: Path) -> dict[str, str]:
    """sha256 of the file, or of the files of the folder, but for what a killed process may leave there."""
    paths = [out] if out.is_file() else [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {str(path.relative_to(out.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def difference(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """The names of files that differ."""
    return sorted(name for name in found | expected if found.get(name) != expected.get(name))


def open_world(folder: Path) -> SimpleNamespace:
    """What writers read, as `tests/project/test_writers.py` has it."""
    from pipelines import ImagePipeline

    world = SimpleNamespace(root=folder, **{path.name: path for path in folder.iterdir()})
    world.pipe = ImagePipeline.from_pretrained(folder / "pipeline")
    world.tokenizer_model, world.prior_model = world.pipe.tokenizer, world.pipe.prior
    world.picture, world.stream = folder / "images" / "test" / "a" / "0.png", folder / "stream.smalti"
    return world


def make_whole_world(folder: Path) -> None:
    """The same, with what encode, compress and calibrate make of it."""
    from failures.writers import WRITERS, run

    from pipelines.commands import calibrate

    make_world(folder)
    world = open_world(folder)
    WRITERS["encode"].write(world, folder / "tokens")
    WRITERS["compress"].write(world, world.stream)
    shutil.copytree(folder / "pipeline", folder / "calibrated")
    argv = ["data.image_size=8", "false_alarms=0.1"]
    run(calibrate, [f"pipeline={folder / 'calibrated'}", f"data.source={folder / 'images'}", *argv])


NAMES = (
    "ImagePipeline.save_pretrained",
    "Tokenizer.save_pretrained",
    "TokenDataset.save",
    "encode",
    "generate, a folder",
    "generate, a grid",
    "generate, npz",
    "generate, tar",
    "compress",
    "detect",
    "decompress",
)
"""Of the writers of `writers.WRITERS`, at least one of each way of writing."""
IN_PIECES = {"encode": 30, "generate, a folder": 12, "generate, tar": 12}
"""Those that are killed and go on, and after how many calls."""


def works(folder: Path) -> list[Work]:
    """Every writer into nothing, and where something of its own is; and `calibrate`, which changes a pipeline."""
    from failures.writers import DATA, WRITERS, run, verb

    from pipelines import encode, generate
    from pipelines.commands import calibrate, compress

    another = verb(generate, "pipeline={pipeline}", "num_images=2", "seed=7")
    others = dict.fromkeys([name for name in NAMES if name.startswith("generate")], another)
    others["encode"] = verb(encode, "tokenizer={tokenizer}", *DATA, "augmentations=1", "data.augment.rotate=8")
    others["compress"] = verb(compress, "pipeline={pipeline}", "images={images}")
    if not (folder / "world").exists():
        in_child(partial(make_whole_world, folder / "world"))
    found = []
    for number, name in enumerate(NAMES):
        writer = WRITERS[name]
        for there in (False, True)[: 1 if writer.kind == "new" else 2]:
            place = folder / f"{number}-{'again' if there else 'new'}"
            title = f"{name}, {'over what is there' if there else 'new'}"
            killed = 0 if there else IN_PIECES.get(name, 0)
            write = writer.replace if there else writer.write
            work = Work(title, place, write, others.get(name), f"out{writer.suffix}", there)
            work.parts, work.killed = writer.kind == "results", killed
            work.once = writer.kind == "new" or (not there and writer.kind in ("file", "results"))
            found.append(work)

    def calibrated(world: Any, out: Path) -> None:
        run(calibrate, [f"pipeline={out}", f"data.source={world.images}", "data.image_size=8", "false_alarms=0.1"])

    return [*found, Work("calibrate", folder / "calibrate", calibrated, there=True, reads="pipeline")]
