"""Thousands of damaged inputs for one parser, in forked workers: which of them end in anything but a load or an error
of the kinds that the parser promises.

A `Target` says what good inputs are, how they are damaged, and what a user does with one. Cases run by the dozen in a
worker, which is watched (`hostility.Watch`): signals, silence, time, memory, what is executed, what is written outside
of the worker's own folder. A worker that dies costs one case; the next goes on after it.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.hostility import FOREIGN, GROWTH, SECONDS, Outcome, Watch, attempt, content, limits, write_tree
from fuzzing.mutations import MANIFEST, Tree, damage_bytes, files_of

from tokenizer.files.errors import PipelineLoadError

HANGS = 60.0  # seconds by the clock in which a case has to end
BATCH = 50  # cases of a worker
TIMES = 10  # bytes that may be taken for each of the input's, besides `GROWTH`

Way = Callable[[Tree, Random], str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A parser.

    good: makes valid inputs in a folder, by name. use: what a user does with the input in a folder; it raises one of
    `errors`, or `AssertionError` for a result that is wrong. seal: makes checksums fit what was changed, for six cases
    of ten. lines: the error may have several. connects: to servers of its own. notices: whether only a manifest that
    fits may hide a change.
    """

    name: str
    good: Callable[[Path], dict[str, Tree]]
    use: Callable[[Path], Any]
    ways: tuple[Way, ...]
    errors: tuple[type[BaseException], ...] = (PipelineLoadError,)
    seal: Callable[[Tree, Tree, Random], None] | None = None
    lines: bool = False
    connects: bool = False
    notices: bool = False


@dataclass(frozen=True)
class Damaged:
    """Case `number`: what was done to a copy of the good input `base`."""

    number: int
    base: str
    tree: Tree
    ways: tuple[str, ...]
    sealed: bool

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(len(node) for node in self.tree.values() if isinstance(node, bytes))


def damaged(target: Target, number: int, good: dict[str, Tree], seed: int = 0) -> Damaged:
    """The case of this number: the same wherever it is asked for."""
    chance = Random(f"{target.name}:{seed}:{number}")
    base = chance.choice(sorted(good))
    tree: Tree = dict(good[base])
    ways = []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        before = dict(tree)
        try:
            ways.append(chance.choice(target.ways)(tree, chance))
        except Exception:  # a file that an earlier way damaged is not what this one expects
            tree = before
            ways.append(damage_bytes(tree, chance) if files_of(tree) else "nothing is left")
    sealed = target.seal is not None and chance.random() < 0.6
    if sealed and target.seal is not None:
        with suppress(Exception):  # what is no container any more cannot be closed
            target.seal(tree, good[base], chance)
    return Damaged(number, base, tree, tuple(ways), sealed)


# A worker


def work(target: Target, numbers: list[int], good: dict[str, Tree], seed: int, place: Path, pipe: int) -> None:
    """Run cases, each announced and told in a line of the pipe. For a process of its own."""
    os.environ.update(TMPDIR=str(place / "tmp"), HOME=str(place / "home"))
    tempfile.tempdir = str(place / "tmp")
    for name in ("tmp", "home", "work"):
        (place / name).mkdir(parents=True, exist_ok=True)
    os.chdir(place / "work")
    for base, tree in good.items():
        write_tree({**tree, "secret": b"secret"}, place / f"{FOREIGN}-{base}", place)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    watch = Watch(writable=str(place), connects=target.connects)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with limits(8 << 30):
        for number in numbers:
            case = damaged(target, number, good, seed)
            write_tree(case.tree, place / "folder", place / f"{FOREIGN}-{case.base}")
            os.write(pipe, b'{"begins": %d}\n' % number)
            outcome, loaded = attempt(target.use, place / "folder", watch, target.errors, lines=target.lines)
            del loaded
            row = {"number": number, "kind": outcome.kind, "seconds": round(outcome.seconds, 3)}
            problem = problem_of(case, outcome)
            if target.notices and outcome.kind == "loads" and not case.sealed and changed(case, good[case.base]):
                problem = problem or "the damage was not noticed"
            row |= {"growth": outcome.growth, "problem": problem, "message": outcome.message[:200]}
            os.write(pipe, json.dumps(row).encode() + b"\n")


def changed(case: Damaged, good: Tree) -> bool:
    """Whether a file that the manifest lists has another content."""
    return any(content(case.tree, name, good) != data for name, data in good.items() if name != MANIFEST)


def problem_of(case: Damaged, outcome: Outcome) -> str:
    """What is not allowed; memory goes by the size of the input."""
    if outcome.growth > GROWTH + TIMES * case.size:
        return outcome.problem or f"{outcome.growth >> 20} MiB for {case.size} bytes"
    only_memory = outcome.problem.endswith(" MiB") and outcome.seconds <= SECONDS
    return "" if only_memory else outcome.problem


@contextmanager
def worker(*arguments: Any) -> Iterator[tuple[int, Any]]:
    """A forked `work`: its process and the end of its pipe that is read."""
    end, start = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        os.close(end)
        code = 1
        try:
            work(*arguments, start)
            code = 0
        except BaseException:
            (arguments[-1] / "failed").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    os.close(start)
    with os.fdopen(end, "rb", buffering=0) as file:
        yield pid, file


def run_batch(target: Target, numbers: list[int], good: dict[str, Tree], seed: int, place: Path) -> list[Row]:
    """What became of each case, whatever became of the workers."""
    rows: list[Row] = []
    left = list(numbers)
    while left:
        at: int | None = None
        with worker(target, left, good, seed, place) as (pid, file):
            for line in told(file, HANGS * (5 if target.connects else 1)):
                row = json.loads(line)
                at = row.get("begins")
                rows += [] if "begins" in row else [row]
            with suppress(ProcessLookupError):
                hangs = not select.select([file], [], [], 0)[0]
                if hangs:
                    os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if at is not None:
            what = "hangs" if hangs else f"ended with {code}"
            rows.append({"number": at, "kind": "dead", "seconds": 0, "growth": 0, "problem": what, "message": ""})
        elif code and code != 1 and rows and rows[-1]["number"] in left:
            rows[-1]["problem"] = rows[-1]["problem"] or f"its worker ended with {code} after it"
        elif code:
            why = (place / "failed").read_text() if (place / "failed").exists() else "without a word"
            raise RuntimeError(f"{target.name}: a worker ended with {code}: {why}")
        done = {row["number"] for row in rows}
        left = [number for number in left if number not in done]
    return rows


def told(file: Any, seconds: float) -> Iterator[bytes]:
    """Lines as they come, until the other end is closed, or silent for so long."""
    rest = b""
    while select.select([file], [], [], seconds)[0]:
        data = file.read(1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


# A campaign


@dataclass
class Campaign:
    """Cases of a target by the thousand. kept: where the inputs of findings go."""

    target: Target
    place: Path
    seed: int = 0
    kept: Path | None = None
    good: dict[str, Tree] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the good inputs, in a process of its own: what that starts stays out of this one."""
        folder = self.place / "good"
        folder.mkdir(parents=True, exist_ok=True)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                import pickle

                os.chdir(folder)  # some keep a cache in the current folder
                made = self.target.good(folder)
                (self.place / "good.pickle").write_bytes(pickle.dumps(made))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(f"{self.target.name}: the good inputs could not be made")
        import pickle

        self.good = pickle.loads((self.place / "good.pickle").read_bytes())

    def require_good(self) -> None:
        """Raise `AssertionError` unless every good input loads, else nothing would be tried; imports here what that
        takes, so that workers need not."""
        listed, told_here = self.place / "modules", self.place / "failed"
        pid = os.fork()
        if not pid:
            code = 1
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                for name, tree in self.good.items():
                    write_tree(tree, self.place / "folder", self.place)
                    os.chdir(self.place)
                    try:
                        self.target.use(self.place / "folder")
                    except BaseException as error:
                        told_here.write_text(f"{name}: {type(error).__name__}: {error}")
                        raise
                listed.write_text(json.dumps(list(sys.modules)))
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        assert not status, f"{self.target.name}: {told_here.read_text() if told_here.exists() else status}"
        import importlib

        for name in json.loads(listed.read_text()):
            if name not in sys.modules and not name.startswith("_"):
                with suppress(BaseException):
                    importlib.import_module(name)

    def run(self, numbers: range) -> list[Row]:
        """What became of these cases. The inputs of findings are kept."""
        rows = []
        for first in range(numbers.start, numbers.stop, BATCH):
            rows += run_batch(
                self.target, list(range(first, min(first + BATCH, numbers.stop))), self.good, self.seed, self.place
            )
        for row in rows:
            if row["problem"]:
                case = damaged(self.target, row["number"], self.good, self.seed)
                row |= {"base": case.base, "ways": case.ways, "sealed": case.sealed}
                if self.kept:
                    folder = self.kept / f"{self.target.name}-{self.seed}-{row['number']}"
                    self.kept.mkdir(parents=True, exist_ok=True)
                    shutil.rmtree(folder, ignore_errors=True)
                    write_tree(case.tree, folder, self.place / f"{FOREIGN}-{case.base}")
        return rows


def summary(target: str, seed: int, numbers: range, rows: list[Row], seconds: float) -> Row:
    """A line for the file of a campaign."""
    slow, large = max(rows, key=lambda row: row["seconds"]), max(rows, key=lambda row: row["growth"])
    return {
        "target": target,
        "seed": seed,
        "first": numbers.start,
        "count": len(numbers),
        "kinds": dict(Counter(row["kind"] for row in rows)),
        "slowest": [slow["seconds"], slow["number"]],
        "largest": [large["growth"], large["number"]],
        "findings": [row for row in rows if row["problem"]],
        "seconds": round(seconds, 1),
        "at": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
