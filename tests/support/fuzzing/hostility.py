"""Case number -> damaged folder -> outcome: what loading it ends in, watched.

Half of the cases make the manifest fit the damage, as an attacker would. Allowed are a load, and a `PipelineLoadError`
of one printable line; watched are the files that are opened, the network, processes, pickles, time and memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from fuzzing.mutations import CANARIES, CANARY, MANIFEST, WAYS, Link, Special, Tree, damage_bytes, files_of

from tokenizer.files.errors import PipelineLoadError

SECONDS, GROWTH = 2.0, 500 << 20
PATIENCE = 20  # seconds by the clock, for what waits; what works is timed by its work
FOREIGN, FOREIGN_PLACES = "foreign-files", ("/dev/zero", "/dev/tty", "/etc/passwd")
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.",
    "pickle.find_class",
    "ftplib.",
)
WRITES = {  # which of their arguments are paths
    "os.rename": 2,
    "os.link": 2,
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.truncate", "os.utime"), 1),
}


def read_tree(folder: Path) -> Tree:
    """All files below `folder`."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_tree(tree: Tree, folder: Path, foreign: Path) -> None:
    """`folder` anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, node in tree.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(node, bytes):
                path.write_bytes(node)
            elif isinstance(node, Link):
                path.symlink_to(node.target.format(foreign=foreign))
            elif node.kind == "pipe":
                os.mkfifo(path)
            elif node.kind == "folder":
                path.mkdir()
            else:
                path.touch()
                os.truncate(path, node.size)
        except (FileExistsError, NotADirectoryError):  # below what is no folder any more
            continue


def content(tree: Tree, name: str, outside: Tree) -> bytes | None:
    """What opening `name` would give to someone who follows links."""
    node: Any = tree.get(name)
    for _ in range(2):
        if isinstance(node, Link):
            target = node.target.removeprefix("{foreign}/")
            node = (
                outside.get(target) if target != node.target else tree.get(os.path.join(os.path.dirname(name), target))
            )
    if isinstance(node, Special):
        return bytes(node.size) if 0 < node.size <= 1 << 20 else None
    return node if isinstance(node, bytes) else None


def seal(tree: Tree, outside: Tree, facts: dict[str, Any]) -> None:
    """Make the manifest fit."""
    found = {name: content(tree, name, outside) for name in tree if name != MANIFEST}
    files = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in found.items()
        if data is not None
    }
    tree[MANIFEST] = json.dumps({**facts, "files": files}).encode()


@dataclass(frozen=True)
class Case:
    """What was done to a copy of `base`; `sealed`: the manifest was made to fit."""

    number: int
    base: str
    tree: Tree
    sealed: bool
    ways: tuple[str, ...]

    def changed(self, bases: dict[str, Tree]) -> bool:
        """Whether a file of the good folder now has another content."""
        before = bases[self.base]
        return any(content(self.tree, name, before) != data for name, data in before.items() if name != MANIFEST)


def make_case(number: int, bases: dict[str, Tree], seed: int = 0) -> Case:
    """The case of this number: the same wherever it is asked for."""
    chance = Random(f"{seed}:{number}")
    base = chance.choice(sorted(bases))
    tree, ways = dict(bases[base]), []
    outside = {**tree, "secret": b"secret"}
    sealed = MANIFEST in tree and chance.random() < 0.6
    facts = {key: value for key, value in json.loads(tree.get(MANIFEST, b"{}")).items() if key != "files"}
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        before = dict(tree)
        try:
            ways.append(chance.choice(WAYS)(tree, chance))
        except Exception:  # a file that an earlier way damaged is not what this one expects
            tree.clear()
            tree.update(before)
            ways.append(damage_bytes(tree, chance) if files_of(tree) else "nothing is left")
    if sealed and not any(way.endswith(MANIFEST) for way in ways):
        seal(tree, outside, facts)
    return Case(number, base, tree, sealed, tuple(ways))


# Watching


class TooSlow(BaseException):
    """Not an `Exception`, so that nothing catches it on its way."""


class Watch:
    """Python's own audit of what is opened, imported, executed, written and connected to, while `on`.

    writable: the folder that may be written into; None: nothing is looked at. connects: whether that is allowed.
    """

    def __init__(self, writable: str | None = None, connects: bool = False) -> None:
        self.on, self.seen = False, []
        self.writable = writable
        self.forbidden = FORBIDDEN + (() if connects else ("socket.",)) + (() if writable else ("shutil.",))
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Remember what must not happen."""
        if not self.on:
            return
        if event.startswith(self.forbidden):
            self.seen.append(f"{event} {arguments}"[:200])
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.fsdecode(arguments[0])
            if FOREIGN in path or os.path.basename(path) in CANARIES or path in FOREIGN_PLACES:
                self.seen.append(f"open {path}"[:200])
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self.written(event, path)
        elif event == "os.symlink":  # what it leads to is only text
            self.written(event, arguments[1], arguments[2])
        elif event in WRITES:
            for path in arguments[: WRITES[event]]:
                descriptor = arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
                self.written(event, path, descriptor)
        elif self.writable and event in ("exec", "import", "ctypes.dlopen"):
            file = getattr(arguments[0], "co_filename", arguments[1] if event == "import" else arguments[0])
            if isinstance(file, str) and file.startswith(self.writable):
                self.seen.append(f"{event} {file}"[:200])

    def written(self, event: str, path: Any, descriptor: int = -1) -> None:
        """Remember what is written outside."""
        if self.writable is None or not isinstance(path, (str, bytes, os.PathLike)):
            return
        folder = os.readlink(f"/proc/self/fd/{descriptor}") if descriptor not in (-1, None) else os.getcwd()
        place = os.path.normpath(os.path.join(folder, os.fsdecode(path)))
        if not place.startswith((self.writable, os.devnull)):
            self.seen.append(f"{event} {place}"[:200])


@dataclass(frozen=True)
class Outcome:
    """`kind`: "loads", or the class of the error; `problem`: what is not allowed to happen, or empty."""

    kind: str
    message: str
    seconds: float
    growth: int
    problem: str


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, VmHWM (the most so far), VmSize."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10


def give_back() -> None:
    """Give memory that was freed back to the system, or what is taken next would not be seen."""
    with suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def limits(more: int = 2 << 30) -> Iterator[None]:
    """At most 2 GiB more of address space, as a bound that holds even for what is not touched; threads take some."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + more, before[1]))
    alarm = signal.signal(signal.SIGALRM, too_slow)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, alarm)
        resource.setrlimit(resource.RLIMIT_AS, before)


def too_slow(*arguments: Any) -> None:
    raise TooSlow


def attempt(
    load: Callable[[Path], Any],
    folder: Path,
    watch: Watch,
    errors: tuple[type[BaseException], ...] = (PipelineLoadError,),
    lines: bool = False,
) -> tuple[Outcome, Any]:
    """Load `folder`: what it ended in, and what was loaded. errors: those that are allowed; lines: of several lines."""
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start, loaded, problem = memory("VmRSS"), time.process_time(), None, ""
    watch.seen, watch.on = [], True
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        loaded, kind, message = load(folder), "loads", ""
    except errors as error:
        kind, message = type(error).__name__, str(error)
    except (Exception, TooSlow) as error:
        kind, message, problem = type(error).__name__, str(error), f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        watch.on = False
    seconds, growth = time.process_time() - start, memory("VmHWM") - before
    if watch.seen:
        problem = watch.seen[0]
    elif len(message) >= (1000, 30_000)[lines] or not message.replace("\n", "" if lines else "\n").isprintable():
        problem = problem or f"message: {message!r}"
    elif seconds > SECONDS or growth > GROWTH:
        problem = problem or f"{seconds:.2f} s, {growth >> 20} MiB"
    elif os.path.exists(CANARY):
        problem = problem or "unpickled"
    return Outcome(kind, message, seconds, growth, problem), loaded


def run(
    numbers: range,
    bases: dict[str, Tree],
    load: Callable[[Path], Any],
    place: Path,
    watch: Watch,
    check: Callable[[Case, Any], str] | None = None,
    seed: int = 0,
) -> list[tuple[Case, Outcome]]:
    """The outcome of each case, made in `place`; `check` says what is wrong with what was loaded."""
    found = []
    for base, tree in bases.items():
        write_tree({**tree, "secret": b"secret"}, place / f"{FOREIGN}-{base}", place)
    with limits():
        for number in numbers:
            case = make_case(number, bases, seed)
            write_tree(case.tree, place / "folder", place / f"{FOREIGN}-{case.base}")
            outcome, loaded = attempt(load, place / "folder", watch)
            if loaded is not None and not outcome.problem and check:
                try:
                    outcome = replace(outcome, problem=check(case, loaded))
                except Exception as error:
                    outcome = replace(outcome, problem=f"loads, then {type(error).__name__}: {error}")
            found.append((Case(number, case.base, {}, case.sealed, case.ways), outcome))
    return found


def table(found: list[tuple[Case, Outcome]]) -> str:
    """How often each outcome occurred, the slowest case and the largest."""
    counts = Counter(outcome.kind for _, outcome in found)
    slow, slowest = max(found, key=lambda pair: pair[1].seconds)
    large, largest = max(found, key=lambda pair: pair[1].growth)
    lines = [f"{kind:16} {count:6}" for kind, count in counts.most_common()]
    lines += [f"{'not allowed':16} {sum(bool(outcome.problem) for _, outcome in found):6}"]
    lines += [f"{'slowest':16} {slowest.seconds:6.2f} s    case {slow.number}: {'; '.join(slow.ways)}"]
    lines += [f"{'largest':16} {largest.growth >> 20:6} MiB  case {large.number}: {'; '.join(large.ways)}"]
    return "\n".join(lines)
