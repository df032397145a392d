"""Runs that are killed or stopped, by the hundred: each returns what it counted and, as `broken`, what was wrong."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from forked import Attempt, Case, Hook, draws, last_line, record_samples, steps_taken, verifying
from launch import states

from pipelines.training import loop as training
from pipelines.training import saving
from pipelines.training.checkpoints import states as checkpoint
from tokenizer.files.errors import PipelineLoadError

Found = dict[str, Any]


# kill -9 at any moment


def kills(case: Case, count: int) -> Found:
    """Kill runs at moments uniform in time (one process, or all, by turns) and complete them, until `count` kills."""
    draw, found = draws("kills", case.name), Counter[str]()
    broken, slowest, number = [], 0.0, 0
    case.whole()
    while found["kills"] < count:
        out = case.folder / f"killed-{(number := number + 1)}"
        while found["kills"] < count:
            attempt = case.start(out, record_samples(out))
            if attempt.wait(draw.uniform(0, window(case))):
                break  # it had come to its end
            one = case.processes > 1 and not found["kills"] % 2
            killed = time.monotonic()
            attempt.send(signal.SIGKILL, [draw.randrange(case.processes)] if one else None)
            codes = attempt.end()
            if -signal.SIGKILL not in codes:
                continue
            found.update(["kills", where(out)])
            if one and 0 in codes:  # of a process that was left alone
                broken.append(f"{out.name}: ended with exit codes {codes}: {last_line(out)}")
            slowest = max(slowest, *(at - killed for at in attempt.ended.values()))
        broken += case.complete(out)
        shutil.rmtree(out)
    return {**found, "runs compared": number, "slowest end": slowest, "broken": broken}


def window(case: Case) -> float:
    """Seconds from a start in which runs are interrupted: a part of a long run, so that it is again and again."""
    return case.seconds * (0.25 if case.more["train__steps"] > 100 else 0.9)


def where(out: Path) -> str:
    """What a killed run was doing."""
    if any(path.name.startswith((".tmp-", ".del-")) for place in (out, out / "state") for path in place.glob(".*")):
        return "in a save"
    return "in a step" if (out / "metrics.jsonl").exists() else "before the first step"


# kill -9 within a save


def saves(case: Case, count: int) -> Found:
    """Kill runs within `save`: at a random moment of it, or before or after a random call that writes."""
    draw, found, number, lengths = draws("saves", case.name), Counter[str](), 0, [0.02]
    broken: list[str] = []
    case.whole()
    while found["kills"] < count:
        out = case.folder / f"saved-{(number := number + 1)}"
        first = case.start(out, record_samples(out), stop_after(draw.randint(1, 2) * case.more["train__save_every"]))
        assert first.end() == [0] and verifying(out)
        had = False
        while found["kills"] < count:
            reading, writing = os.pipe()
            at_call = draw.randint(1, 90) if draw.random() < 0.5 else 0
            attempt = case.start(out, record_samples(out), tell_of_saves(writing, at_call, draw.random() < 0.5))
            os.close(writing)
            inside = wait_for_save(attempt, reading, draw.randint(1, 3), draw, lengths, at_call)
            os.close(reading)
            if attempt.end() == [0]:
                break
            if not inside:
                continue
            found.update(["kills", "at a call" if at_call else "at a moment"])
            loads = snapshot_loads(out)
            found["snapshot away"] += had and not loads  # between the two renames that replace it
            had = had or loads
            if not verifying(out):
                broken.append(f"{out.name}: kill {found['kills']} left no state that verifies")
        broken += case.complete(out)
        shutil.rmtree(out)
    return {**found, "runs compared": number, "broken": broken}


WRITERS = {
    "fsync": os,
    "open": os,
    "rename": Path,
    "mkdir": Path,
    "write_text": Path,
    "rmtree": shutil,
    "save_file": checkpoint,
}


def tell_of_saves(pipe: int, at_call: int, before: bool) -> Hook:
    """Write ( and ) to `pipe` around each save, to the end of the thread's part; die at the `at_call`-th writing call
    within saves, if not 0."""

    def hook(rank: int) -> None:
        save, prepare, inside, calls = training.save, saving.prepare, False, 0

        def counted(call: Any) -> Any:
            def wrapped(*arguments: Any, **named: Any) -> Any:
                nonlocal calls
                calls += inside
                here = inside and calls == at_call
                if here and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*arguments, **named)
                if here:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return wrapped

        def told(run: Any, *arguments: Any, **named: Any) -> None:
            nonlocal inside
            run.writer.wait()
            os.write(pipe, b"(")
            inside = True
            save(run, *arguments, **named)

        def prepared(run: Any) -> Any:
            write = prepare(run)

            def written() -> None:
                nonlocal inside
                write()
                inside = False
                os.write(pipe, b")")

            return written

        for name, owner in WRITERS.items():
            setattr(owner, name, counted(getattr(owner, name)))
        training.save, saving.prepare = told, prepared

    return hook


def wait_for_save(attempt: Attempt, pipe: int, wanted: int, draw: Any, lengths: list[float], at_call: int) -> bool:
    """Kill the attempt at a moment of its `wanted`-th save, unless it does so itself; whether it died within a save."""
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
            attempt.send(signal.SIGKILL)
    return told.endswith(b"(")


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


def stops(case: Case, count: int, number: signal.Signals = signal.SIGTERM) -> Found:
    """A signal at moments uniform in time, to one process, or all, by turns: each time saved at that step.

    Ctrl-C comes to all.
    """
    draw, found, runs, slowest = draws("stops", case.name, number), Counter[str](), 0, 0.0
    broken: list[str] = []
    case.whole()
    while found["stops"] < count:
        out = case.folder / f"stopped-{(runs := runs + 1)}"
        while found["stops"] < count:
            before, attempt = steps_taken(out), case.start(out, record_samples(out))
            if attempt.wait(draw.uniform(0, window(case))):
                break
            one = case.processes > 1 and not found["stops"] % 2 and number == signal.SIGTERM
            told = time.monotonic()
            attempt.send(number, [draw.randrange(case.processes)] if one else None)
            codes = attempt.end()
            if -signal.SIGTERM in codes or steps_taken(out) == before:
                found["before training"] += 1  # as any process that does nothing about it
                continue
            found["stops"] += 1
            slowest = max(slowest, *(at - told for at in attempt.ended.values()))
            saved = int(states(out)[-1].name[5:]) if states(out) else 0
            at_its_end = saved == case.more["train__steps"]  # one process may have ended before it could be told
            wrong = set(codes) - {SIGNALS[number], *([0] if at_its_end else [])}
            if wrong or SIGNALS[number] not in codes or saved != steps_taken(out) or not verifying(out):
                where_at = f"step {steps_taken(out)}, saved {saved}"
                broken.append(f"{out.name}: exit codes {codes}, {where_at}: {last_line(out)}")
        broken += case.complete(out)
        shutil.rmtree(out)
    return {**found, "runs compared": runs, "slowest end": slowest, "broken": broken}


def ctrl_c(case: Case, count: int) -> Found:
    """The same of SIGINT."""
    return stops(case, count, signal.SIGINT)


def every_step(case: Case) -> Found:
    """Stop and continue a run at every step that it has."""
    case.whole()
    out, resumes, broken = case.folder / "by-steps", 0, []
    while steps_taken(out) < case.more["train__steps"]:
        before, codes = steps_taken(out), case.start(out, record_samples(out), stop_after(1)).end()
        resumes += 1
        if set(codes) != {0} or steps_taken(out) != before + 1:
            return {"resumes": resumes, "broken": [f"exit codes {codes} at step {steps_taken(out)}: {last_line(out)}"]}
    broken += case.differences(out)
    return {"resumes": resumes, "broken": broken}
