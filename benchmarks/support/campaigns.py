"""What `benchmarks.trust.faults` tries: which runs and jobs, and what becomes of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TIMEOUT, GRACE = 5, 40  # seconds for a frozen process, and what a launcher may take to end it

Row = dict[str, Any]
Unit = Callable[[Any, int, int], Row]
"""From a case, a number by which all is drawn, and how many are left to try, to what was counted."""


@dataclass(frozen=True)
class Campaign:
    """cases(count, steps, launched, folder): of which each is tried `count` times, or a share of that if `shared`; in
    `units`: it is units that are counted, and not what they try."""

    cases: Callable[[int, int, bool, Path], list[Any]]
    unit: Unit
    shared: bool = True
    units: bool = False


# Cases


def every(steps: int, save: int) -> dict[str, int]:
    """How often a run of so many steps does what it does, if it is saved `save` times."""
    return {
        "train__steps": steps,
        "train__save_every": max(6, steps // save),
        "train__evaluate_every": steps // 3,
        "train__preview_every": steps // 2,
    }


def runs(
    more: Callable[[int, int], dict[str, Any]],
    processes: tuple[int, ...] = (1, 2),
    sharded: bool = False,
    first: int = 0,
    least: int = 1,
) -> Callable[[int, int, bool, Path], list[Any]]:
    """Runs of both stages on so many processes, or of the second with shared weights; each is tried at least `least`
    times, so few tries are of the case `first` and those after it. more(count, steps): their settings."""

    def cases(count: int, steps: int, launched: bool, folder: Path) -> list[Any]:
        from failures.forked import STAGES, new_case

        places = [(verb, number, sharded) for verb in STAGES[sharded:] for number in processes]
        places = [*places[first:], *places[:first]][: max(1, count // least)]
        return [new_case(verb, number, folder, shared, **more(count, steps)) for verb, number, shared in places]

    return cases


def one_run(folder: Path) -> list[Any]:
    """The run in which processes are lost."""
    from failures.forked import STAGES, new_case

    more = {
        "train__steps": 20,
        "train__save_every": 8,
        "train__evaluate_every": 8,
        "train__timeout": TIMEOUT,
        "train__accumulate": 1,
        "critic": {"weight": 0},
    }
    return [new_case(STAGES[0], 2, folder, **more)]


def faults(count: int, steps: int, launched: bool, folder: Path) -> list[Any]:
    """A case for each cell of the matrix."""
    (case,) = one_run(folder)
    return [
        SimpleNamespace(name=", ".join(map(str, place)), case=case, place=place, launched=launched)
        for place in matrix(count)
    ]


def matrix(count: int) -> list[tuple[str, str, int]]:
    """The first so many of fault x phase x rank: each fault in each phase on one of the ranks, then on the other; all
    faults, phases and ranks are among the first four."""
    from failures import faulty

    phases = len(faulty.PHASES)  # no divisor of the number of faults: so every pair comes, each at its turn
    pairs = [(place % len(faulty.FAULTS), place % phases) for place in range(len(faulty.FAULTS) * phases)]
    return [
        (faulty.FAULTS[fault], faulty.PHASES[phase], (fault * phases + phase + turn) % 2)
        for turn in (1, 0)
        for fault, phase in pairs
    ][:count]


def jobs(verb: str, count: int, steps: int, launched: bool, folder: Path) -> list[Any]:
    """Encodes or sets of images."""
    from failures import killed_jobs

    found = killed_jobs.jobs(verb, folder)
    return found[:: max(1, len(found) // count)][:count]


def everything(count: int, steps: int, launched: bool, folder: Path) -> list[Any]:
    """Runs of both stages, on one process, on two, with shared weights; and all that writes."""
    from failures import power_cases

    more = {**every(12, 3), "train__save_every": 4, "train__log_every": 1}
    settings = lambda count, steps: more  # noqa: E731
    found = runs(settings)(4, steps, launched, folder) + runs(settings, (2,), sharded=True)(1, steps, launched, folder)
    found += power_cases.works(folder / "works")
    return found[:: max(1, len(found) // count)][:count]


# Units


def of(module: str, function: str) -> Unit:
    """A function of a module of `tests/support/failures`, which is imported late: it is slow."""
    return lambda *arguments: getattr(import_module(f"failures.{module}"), function)(*arguments)


def fault(cell: Any, number: int, left: int) -> Row:
    """A cell of the matrix."""
    from failures import mishaps

    found = mishaps.Cell(*cell.place)
    (mishaps.launched_fault if cell.launched else mishaps.forked_fault)(cell.case, found)
    end = {"exit code": found.codes[0], "seconds to end": round(found.seconds, 1), "last line": found.line}
    where = {"fault": found.fault, "while": found.phase, "on rank": found.rank}
    return {"tried": 1, **where, **end, "broken": found.broken(TIMEOUT, GRACE)}


def uneven(case: Any, number: int, left: int) -> Row:
    """A run of three processes with bad images."""
    from failures import mishaps

    return mishaps.uneven_data(case.folder, number)


def power(case: Any, number: int, left: int) -> Row:
    """Cut a run, or something else that writes."""
    from failures import power_cases

    function = power_cases.lose_power_of_work if isinstance(case, power_cases.Work) else power_cases.lose_power_of_run
    return function(case, number, left)


def on_disk(count: int, steps: int) -> dict[str, Any]:
    """The settings of runs that a disk is too small for."""
    return {**every(20, 5), "train__save_every": 4, "train__log_every": 1}


CAMPAIGNS = {
    "kills": Campaign(runs(lambda count, steps: every(steps, 15), first=1), of("interruptions", "kills")),
    "saves": Campaign(runs(lambda count, steps: every(steps, 30)), of("interruptions", "saves")),
    "sharded": Campaign(runs(lambda count, steps: every(steps, 30), (2,), True), of("interruptions", "saves")),
    "threads": Campaign(runs(lambda count, steps: every(steps, 30)), of("interruptions", "threads")),
    "stops": Campaign(runs(lambda count, steps: every(steps, 15), first=3), of("interruptions", "stops")),
    "ctrl_c": Campaign(runs(lambda count, steps: every(steps, 15), first=3), of("interruptions", "ctrl_c")),
    "resumes": Campaign(runs(lambda count, steps: every(count, 4)), of("interruptions", "every_step"), shared=False),
    "encodes": Campaign(partial(jobs, "encode"), of("killed_jobs", "killed")),
    "generates": Campaign(partial(jobs, "generate"), of("killed_jobs", "killed")),
    "power": Campaign(everything, power, units=True),
    "disks": Campaign(runs(on_disk, least=2), of("mishaps", "full_disks"), shared=False, units=True),
    "matrix": Campaign(faults, fault),
    "sick": Campaign(runs(lambda count, steps: every(3 * count, 3), (2,)), of("mishaps", "sick_steps"), shared=False),
    "uneven": Campaign(
        lambda count, steps, launched, folder: [SimpleNamespace(name="tokenizer, 3 processes", folder=folder)], uneven
    ),
}
