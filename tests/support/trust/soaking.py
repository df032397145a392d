"""What a process holds while it goes on for long, and whether that grows: memory, threads, handles, files, time."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import psutil

Row = dict[str, Any]
MB = 1 << 20
WARM = 0.25
"""The share of the rows that is left out: what is made once is made by then."""
LIMITS = {"memory_mb": 1.0, "objects": 500.0, "threads": 0.0, "handles": 0.0, "children": 0.0, "states": 0.0}
"""By how much each may grow per thousand steps, or rounds."""
LEAST = {"memory_mb": 3.0, "objects": 200.0}
"""Growth by less, in all, is none that could be told from what comes and goes."""
FLAT = ("threads", "handles", "children", "states")
KEPT = 2
"""Counts: they may change by one between two looks, and have to come back."""
SLOWER = 0.5
"""By which share of it a step may take longer of the processor at the end than at the beginning; others use it, too."""


def held(folder: Path | None = None) -> Row:
    """What this process holds now. `memory_mb` is what is left of its own memory when garbage is collected and what is
    free is given back; `before_mb` what it was before that; `objects` are those of Python that can hold others."""
    process = psutil.Process()
    before = memory_of(process)
    gc.collect()
    with suppress(OSError, AttributeError):  # not the C library of GNU
        ctypes.CDLL(None).malloc_trim(0)
    children = process.children(recursive=True)
    return {
        "memory_mb": memory_of(process) / MB,
        "before_mb": before / MB,
        "objects": len(gc.get_objects()),
        "threads": process.num_threads(),
        "handles": process.num_fds(),
        "children": len(children),
        "children_mb": sum(memory_of(child) for child in children) / MB,
        **({} if folder is None else lying_in(folder)),
    }


def memory_of(process: psutil.Process) -> int:
    """Bytes of its own, which are in no file; 0 if it has ended. Pages of libraries are left out, also those that no
    other process uses: that changes whenever one begins or ends."""
    with suppress(psutil.Error):
        info = process.memory_info()
        return int(info.rss - getattr(info, "shared", 0))
    return 0


def lying_in(folder: Path) -> Row:
    """Of a run folder: how many files and states, and the bytes of each part, in MB."""
    sizes: Counter[str] = Counter()
    count = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # it may go meanwhile
            if path.is_file():
                count += 1
                sizes[path.relative_to(folder).parts[0]] += path.stat().st_size
    states = len(list((folder / "state").glob("step-*")))
    return {"files": count, "states": states, **{f"disk/{name}": size / MB for name, size in sizes.items()}}


class Soak:
    """Takes a row every so many steps (or rounds), into memory and a file of JSON lines; and counts what there is of
    each type at rows from step `begin` on, if it is given."""

    def __init__(
        self, out: Path | None, case: str, every: int, folder: Path | None = None, begin: int | None = None
    ) -> None:
        self.out, self.case, self.every, self.folder, self.warm_at = out, case, every, folder, begin
        self.first: Counter[str] | None = None
        self.last: Counter[str] = Counter()
        self.rows: list[Row] = []
        self.walls = [0.0] * every
        self.begin()

    def begin(self) -> None:
        """A window begins: what was spent on looking is no part of it."""
        self.wall, self.cpu, self.at = time.perf_counter(), time.process_time(), 0

    def step(self, number: int) -> bool:
        """Step `number` is done; whether a row was taken."""
        now = time.perf_counter()
        self.walls[self.at], self.wall, self.at = now - self.wall, now, self.at + 1
        if self.at < self.every:
            return False
        times = {
            "step_ms": 1e3 * median(self.walls),
            "cpu_ms": 1e3 * (time.process_time() - self.cpu) / self.every,
        }
        row = {"case": self.case, "step": number, **held(self.folder), **times}
        self.rows.append(row)
        if self.warm_at is not None and number >= self.warm_at:
            self.last = kinds()
            self.first = self.first or self.last
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.begin()
        return True

    def more(self) -> list[str]:
        """The types of which there are more by now, most first."""
        return more_of(self.first or Counter(), self.last)


@contextmanager
def watching_steps(soak: Soak) -> Iterator[None]:
    """Count every step of a run in this process; wait for a checkpoint that is being written before a look."""
    from pipelines.training.trainer import Trainer

    take_step = Trainer.take_step

    def counted(trainer: Trainer, *rest: Any) -> None:
        take_step(trainer, *rest)
        if soak.at == soak.every - 1:
            trainer.finish_writing()
        soak.step(trainer.step)

    with patch.object(Trainer, "take_step", counted):
        yield


# What became of it


def warm(rows: Sequence[Row]) -> Sequence[Row]:
    """Those after the warm-up."""
    return rows[int(WARM * len(rows)) :]


def slope(rows: Sequence[Row], name: str, per: int) -> float:
    """By how much `name` grows per so many steps after the warm-up: the median over all pairs of rows (Theil 1950; Sen
    1968), which a few strange ones do not move."""
    points = [(row["step"], row.get(name, 0.0)) for row in warm(rows)]
    slopes = [(y - b) / (x - a) for (a, b), (x, y) in combinations(points, 2)]
    return per * median(slopes) if slopes else 0.0


def slopes(rows: Sequence[Row], per: int) -> dict[str, float]:
    """Of everything that was measured."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("case", "step"))
    return {name: slope(rows, name, per) for name in names}


def grown(rows: Sequence[Row], per: int) -> list[str]:
    """What grows, a line each; nothing where all is as promised."""
    found = []
    steady = warm(rows)
    third = max(1, len(steady) // 3)
    for name, limit in LIMITS.items():
        rate = slope(rows, name, per)
        first, last = (min(row.get(name, 0) for row in part) for part in (steady[:third], steady[-third:]))
        whole = rate / per * (steady[-1]["step"] - steady[0]["step"])
        more = last > first if name in FLAT else rate > limit and whole > LEAST[name]
        if name == "states":
            more = last > KEPT  # there are fewer until so many are saved
        if more:
            found.append(f"{name} grows by {rate:.3g} per {per:,}, from {first:.6g} to {last:.6g}")
    whole = slope(rows, "cpu_ms", steady[-1]["step"] - steady[0]["step"]) if len(steady) > 1 else 0.0
    usual = median(row["cpu_ms"] for row in steady)
    if whole > SLOWER * usual:
        found.append(f"a step takes {whole:.3g} ms longer at the end, {usual:.3g} in the median")
    return found


# Who holds it


def kinds() -> Counter[str]:
    """How many objects there are of each type; of tensors by their shapes."""
    import torch

    gc.collect()
    every = gc.get_objects()
    found = Counter({f"{kind.__module__}.{kind.__qualname__}": n for kind, n in Counter(map(type, every)).items()})
    tensors = (each for each in every if type(each) in (torch.Tensor, torch.nn.Parameter))
    return found + Counter(f"tensor {tuple(each.shape)} {each.dtype}" for each in tensors)


def more_of(before: Counter[str], after: Counter[str], least: int = 20) -> list[str]:
    """The types of which there are at least so many more, most first."""
    return [f"{count:+,} {name}" for name, count in (after - before).most_common(15) if count >= least]


# Not only a run


def repeat(soak: Soak, work: Callable[[int], Any], rounds: int | None = None, seconds: float | None = None) -> int:
    """Call `work` with 0, 1, ... so often, or for so long; returns how often."""
    until, number = time.monotonic() + (seconds or 0.0), 0
    soak.begin()
    while number < rounds if rounds is not None else time.monotonic() < until:
        work(number)
        number += 1
        soak.step(number)
    return number


def at_rest() -> tuple[int, int]:
    """Threads and handles of this process: threads of Python, as libraries keep some of their own."""
    import threading

    gc.collect()
    return threading.active_count(), len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
