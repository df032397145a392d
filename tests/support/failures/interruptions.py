"""Runs that are killed or stopped, by the hundred.

Each function makes one run, which it interrupts `left` times at most. It returns what it counted, `tried` interruptions
among it, and as `broken` what was wrong. What is drawn depends on the case and on the `number` of the run alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from failures.forked import Attempt, Case, Hook, draws, last_line, record_samples, steps_taken, verifying
from launch import states

from pipelines.training import loop as training
from pipelines.training import saving
from pipelines.training.checkpoints import states as checkpoint
from pipelines.training.checkpoints.writer import Writer
from tokenizer.files import PipelineLoadError

Found = dict[str, Any]


# kill -9 at any moment


def kills(case: Case, number: int, left: int) -> Found:
    """Kill a run at moments uniform in time (one process, or all, by turns), until it comes to its end."""
    draw, found, out = draws("kills", case.name, number), Counter[str](tried=0), case.folder / f"killed-{number}"
    broken, slowest = [], 0.0
    case.ready()
    while found["tried"] < left:
        attempt = case.start(out, record_samples(out))
        if attempt.wait(draw.uniform(0, window(case))):
            break  # it had come to its end
        one = case.processes > 1 and draw.random() < 0.5
        killed = time.monotonic()
        attempt.send(signal.SIGKILL, [draw.randrange(case.processes)] if one else None)
        codes = attempt.end()
        if -signal.SIGKILL not in codes:
            continue
        found.update(["tried", where(out)])
        if one and 0 in codes:  # of a process that was left alone
            broken.append(f"{out.name}: ended with exit codes {codes}: {last_line(out)}")
        slowest = max(slowest, *(at - killed for at in attempt.ended.values()))
    return completed(case, out, found, broken, slowest)


def completed(case: Case, out: Path, found: Counter[str], broken: list[str], slowest: float | None = None) -> Found:
    """Complete the run, and compare it with the one that nobody interrupts."""
    broken = broken + case.complete(out)
    shutil.rmtree(out)
    return {**found, "runs compared": 1, **({} if slowest is None else {"slowest end": slowest}), "broken": broken}


def window(case: Case) -> float:
    """Seconds from a start in which runs are interrupted: a part of a long run, so that it is again and again."""
    return case.seconds * (0.25 if case.more["train__steps"] > 100 else 0.9)


def where(out: Path) -> str:
    """What a killed run was doing."""
    if any(path.name.startswith((".tmp-", ".del-")) for place in (out, out / "state") for path in place.glob(".*")):
        return "in a save"
    return "in a step" if (out / "metrics.jsonl").exists() else "before the first step"


# kill -9 within a save


def saves(case: Case, number: int, left: int) -> Found:
    """Kill a run within `save`: at a random moment of it, or before or after a random call that writes. Of sharded
    saves, in which all write, any process dies."""
    draw, found, out = draws("saves", case.name, number), Counter[str](tried=0), case.folder / f"saved-{number}"
    broken: list[str] = []
    lengths = [0.02]
    case.ready()
    begin(case, out, draw)
    had = False
    while found["tried"] < left:
        reading, writing = os.pipe()
        at_call = draw.randint(1, 120) if draw.random() < 0.5 else 0
        victim = draw.randrange(case.processes) if case.sharded else 0
        attempt = case.start(out, record_samples(out), tell_of_saves(writing, victim, at_call, draw.random() < 0.5))
        os.close(writing)
        killed = [draw.randrange(case.processes)] if draw.random() < 0.5 else None
        inside = wait_for_save(attempt, reading, draw.randint(1, 3), draw, lengths, at_call, killed)
        os.close(reading)
        codes = attempt.end()
        if set(codes) == {0}:
            break
        if -signal.SIGKILL not in codes:
            broken.append(f"{out.name}: exit codes {codes}: {last_line(out)}")
            break
        if not inside:
            continue
        found.update(["tried", "at a call" if at_call else "at a moment"])
        loads = snapshot_loads(out)
        found["snapshot away"] += had and not loads  # between the two renames that replace it
        had = had or loads
        if not verifying(out):
            broken.append(f"{out.name}: kill {found['tried']} left no state that verifies")
    return completed(case, out, found, broken)


def begin(case: Case, out: Path, draw: Any) -> None:
    """The run with a first state or two."""
    first = case.start(out, record_samples(out), stop_after(draw.randint(1, 2) * case.more["train__save_every"]))
    assert set(first.end()) == {0} and verifying(out), last_line(out)


WRITERS = {
    "fsync": os,
    "open": os,
    "link": os,
    "rename": Path,
    "replace": Path,
    "mkdir": Path,
    "unlink": Path,
    "write_text": Path,
    "write_bytes": Path,
    "rmtree": shutil,
    "save_file": checkpoint,
}
"""Calls before and after which a process may die."""


def count_calls(called: Any) -> None:
    """Make these calls, of this process, call `called` before and after, with False and True."""

    def counted(call: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            called(False)
            result = call(*arguments, **named)
            called(True)
            return result

        return wrapped

    for name, owner in WRITERS.items():
        setattr(owner, name, counted(getattr(owner, name)))


def is_time(calls: int, at_call: int, before: bool, after: bool) -> bool:
    """Whether to die, `after` the `calls`-th call or not: before that number, or after it and those within it; never
    for 0."""
    return at_call > 0 and ((calls == at_call and not after) if before else (calls >= at_call and after))


def die() -> None:
    """As by the hand of another."""
    os.kill(os.getpid(), signal.SIGKILL)


def tell_of_saves(pipe: int, victim: int, at_call: int, before: bool) -> Hook:
    """Write ( and ) to `pipe` around each save of the first process, to the end of the thread's part; the process
    `victim` dies at the `at_call`-th writing call within saves, if that is not 0."""

    def hook(rank: int) -> None:
        save, prepare, inside, calls = training.save, saving.prepare, False, 0

        def called(after: bool) -> None:
            nonlocal calls
            calls += inside and not after
            if inside and rank == victim and is_time(calls, at_call, before, after):
                die()

        def told(run: Any, *arguments: Any, **named: Any) -> None:
            nonlocal inside
            run.writer.wait()
            if not rank:
                os.write(pipe, b"(")
            inside = True
            save(run, *arguments, **named)

        def prepared(run: Any) -> Any:
            write = prepare(run)

            def written() -> None:
                nonlocal inside
                write()
                inside = False
                if not rank:
                    os.write(pipe, b")")

            return written

        count_calls(called)
        training.save, saving.prepare = told, prepared

    return hook


def wait_for_save(
    attempt: Attempt, pipe: int, wanted: int, draw: Any, lengths: list[float], at_call: int, ranks: list[int] | None
) -> bool:
    """Kill these processes (None: all) at a moment of the `wanted`-th save, unless one does so itself; whether it died
    within a save."""
    told, began = b"", 0.0
    while letter := os.read(pipe, 1):
        told += letter
        if letter == b")":
            lengths.append(time.monotonic() - began)
            continue
        began = time.monotonic()
        if told.count(b"(") == wanted and not at_call:
            until = began + draw.uniform(0, sorted(lengths)[len(lengths) // 2])
            while time.monotonic() < until:
                pass
            attempt.send(signal.SIGKILL, ranks)
    return told.endswith(b"(") or (at_call > 0 and attempt.wait(30) and -signal.SIGKILL in attempt.codes.values())


# While the thread writes


def threads(case: Case, number: int, left: int) -> Found:
    """Kill or stop a run while its thread writes a state and steps are taken."""
    draw, found, out = draws("threads", case.name, number), Counter[str](tried=0), case.folder / f"thread-{number}"
    broken: list[str] = []
    case.ready()
    begin(case, out, draw)
    while found["tried"] < left:
        told = signal.SIGTERM if draw.random() < 0.25 else signal.SIGKILL
        hook = strike_in_thread(told, draw.randint(1, 2), draw.randint(1, 24), draw.random() < 0.5, out)
        codes = case.start(out, record_samples(out), hook).end()
        struck = out.with_name(f"{out.name}.struck")
        if not struck.exists():
            broken += [f"{out.name}: exit codes {codes}: {last_line(out)}"] if set(codes) != {0} else []
            break
        found.update(["tried", "stopped" if told == signal.SIGTERM else "killed", struck.read_text()])
        struck.unlink()
        saved = int(states(out)[-1].name[5:]) if states(out) else 0
        if told == signal.SIGTERM and (set(codes) != {0} or saved != steps_taken(out)):
            broken.append(f"{out.name}: exit codes {codes}, step {steps_taken(out)}, saved {saved}: {last_line(out)}")
        if told == signal.SIGKILL and -signal.SIGKILL not in codes:
            broken.append(f"{out.name}: exit codes {codes} of a run that was killed: {last_line(out)}")
        if not verifying(out):
            broken.append(f"{out.name}: strike {found['tried']} left no state that verifies")
    return completed(case, out, found, broken)


def strike_in_thread(told: signal.Signals, save: int, at_call: int, before: bool, out: Path) -> Hook:
    """The signal at the `at_call`-th writing call of the thread that writes the `save`-th state. At its first call, and
    now and then, the thread waits until a step was taken, unless none comes."""

    def hook(rank: int) -> None:
        take_step, prepare = training.take_step, saving.prepare
        number = calls = steps = 0
        struck: list[int] = []
        thread, stepped, blocked, wait = 0, threading.Event(), False, Writer.wait

        def called(after: bool) -> None:
            nonlocal calls
            if threading.get_ident() != thread:
                return
            if not after:
                calls += 1
                if calls % 10 == 1 and not blocked:
                    stepped.clear()
                    stepped.wait(2)
            if number == save and not struck and is_time(calls, at_call, before, after):
                struck.append(calls)
                what = "steps were taken meanwhile" if steps else "before a step was"
                with open(out.with_name(f"{out.name}.struck"), "w") as file:  # not by a call that counts
                    file.write(what)
                os.kill(os.getpid(), told)

        def step(*arguments: Any) -> None:
            nonlocal steps
            take_step(*arguments)
            steps += 1
            stepped.set()

        def prepared(run: Any) -> Any:
            write = prepare(run)

            def written() -> None:
                nonlocal thread, number, calls, steps
                thread, number, calls, steps = threading.get_ident(), number + 1, 0, 0
                try:
                    write()
                finally:
                    thread = 0

            return written

        def waited(writer: Writer) -> None:
            nonlocal blocked
            blocked = True  # no step comes
            stepped.set()
            wait(writer)
            blocked = False

        if not rank:
            count_calls(called)
            training.take_step, saving.prepare = step, prepared
            Writer.wait = waited  # type: ignore[method-assign]

    return hook


def snapshot_loads(out: Path) -> bool:
    """Whether the user's snapshot is there and whole."""
    folder = next((out / name for name in ("pipeline", "tokenizer") if (out / name).is_dir()), None)
    if folder is None:
        return False
    try:
        from pipelines import ImagePipeline
        from tokenizer import Tokenizer

        (ImagePipeline if folder.name == "pipeline" else Tokenizer).from_pretrained(str(folder))
    except PipelineLoadError:
        return False
    return True


def stop_after(steps: int) -> Hook:
    """SIGTERM, after so many steps more, or at each step for 1."""

    def hook(rank: int) -> None:
        take_step, taken = training.take_step, 0

        def told(*arguments: Any) -> None:
            nonlocal taken
            taken += 1
            if taken == steps:
                os.kill(os.getpid(), signal.SIGTERM)
            take_step(*arguments)

        training.take_step = told

    return hook


# SIGTERM and Ctrl-C

SIGNALS = {signal.SIGTERM: 0, signal.SIGINT: 130}
"""With what exit code a run ends that one of them has told to."""


def stops(case: Case, number: int, left: int, told: signal.Signals = signal.SIGTERM) -> Found:
    """A signal at moments uniform in time, to one process, or all, by turns: each time saved at that step.

    Ctrl-C comes to all.
    """
    draw, found = draws("stops", case.name, number, told), Counter[str](tried=0)
    out, slowest = case.folder / f"stopped-{number}", 0.0
    broken: list[str] = []
    case.ready()
    while found["tried"] < left:
        before, attempt = steps_taken(out), case.start(out, record_samples(out))
        if attempt.wait(draw.uniform(0, window(case))):
            break
        one = case.processes > 1 and draw.random() < 0.5 and told == signal.SIGTERM
        since = time.monotonic()
        attempt.send(told, [draw.randrange(case.processes)] if one else None)
        codes = attempt.end()
        if -signal.SIGTERM in codes or steps_taken(out) == before:
            found["before training"] += 1  # as any process that does nothing about it
            continue
        found["tried"] += 1
        slowest = max(slowest, *(at - since for at in attempt.ended.values()))
        saved = int(states(out)[-1].name[5:]) if states(out) else 0
        at_its_end = saved == case.more["train__steps"]  # one process may have ended before it could be told
        wrong = set(codes) - {SIGNALS[told], *([0] if at_its_end else [])}
        if wrong or SIGNALS[told] not in codes or saved != steps_taken(out) or not verifying(out):
            where_at = f"step {steps_taken(out)}, saved {saved}"
            broken.append(f"{out.name}: exit codes {codes}, {where_at}: {last_line(out)}")
    return completed(case, out, found, broken, slowest)


def ctrl_c(case: Case, number: int, left: int) -> Found:
    """The same of SIGINT."""
    return stops(case, number, left, signal.SIGINT)


def every_step(case: Case, number: int, left: int) -> Found:
    """Stop and continue a run at every step that it has."""
    case.ready()
    out, resumes = case.folder / f"by-steps-{number}", 0
    while steps_taken(out) < case.more["train__steps"]:
        before, codes = steps_taken(out), case.start(out, record_samples(out), stop_after(1)).end()
        resumes += 1
        if set(codes) != {0} or steps_taken(out) != before + 1:
            return {"tried": resumes, "broken": [f"exit codes {codes} at step {steps_taken(out)}: {last_line(out)}"]}
    return {"tried": resumes, "runs compared": 1, "broken": case.differences(out)}
