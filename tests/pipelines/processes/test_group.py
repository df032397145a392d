"""What several processes do together is what one does alone; an error in one ends all, and each says why.

What needs a group runs in two and three processes (`python test_group.py FOLDER`).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import join_group, leave_group, run_ranks

from pipelines.config import UserError
from pipelines.processes.group import ALONE, ProcessGroup

COUNTS = (0, 1, 2, 3, 7)
WORLDS = (2, 3)


@torch.inference_mode()
def worked(group: ProcessGroup) -> dict[str, Any]:
    """What the group finds, and who did what."""
    done: list[int] = []

    def act(item: int) -> tuple[torch.Tensor, int]:
        done.append(item)
        return torch.full((2,), float(item)).double(), group.rank

    found = {str(count): group.map(act, range(count)) for count in COUNTS}
    return {
        "values": {name: [value.tolist() for value, _ in each] for name, each in found.items()},
        "by": {name: [rank for _, rank in each] for name, each in found.items()},
        "done": done,
        "total": group.total(torch.tensor([1, 10 * group.rank])).tolist(),
        "first": group.on_main(lambda: f"of {group.rank}"),
        "small": [x.tolist() for x in group.map(lambda n: np.array([n], dtype=np.uint16), [7, 60000])],
    }


def order_of(group: ProcessGroup) -> list[list[float]]:
    """When each process began and ended what the first does alone."""
    times: list[float] = []

    def act() -> None:
        times.append(time.monotonic())
        time.sleep(0.05)
        times.append(time.monotonic())

    group.main_first(act)
    return group.gather(lambda: times)


def failing(group: ProcessGroup, error: Exception, rank: int) -> list[str]:
    """What each process raises if one of them fails; and that they still work together then."""

    def act(item: int) -> int:
        if group.rank == rank:
            raise error
        return item

    try:
        group.map(act, range(5))
        raised = "nothing"
    except Exception as caught:
        raised = f"{type(caught).__name__}: {caught}"
    return group.gather(lambda: raised)


def main(folder: Path) -> None:
    """What each process does."""
    rank = join_group(folder)
    group = ProcessGroup(rank, dist.get_world_size())
    found = worked(group)
    errors = [failing(group, UserError("no such thing"), 1), failing(group, RuntimeError("a bug"), 0)]
    errors += [failing(group, error, 0) for error in (UserError("no such file"), OSError("full"))]
    errors.append(order_of(group))
    (folder / f"{rank}.json").write_text(json.dumps([found, errors]))
    leave_group()


@pytest.fixture(scope="module")
def teams(tmp_path_factory) -> Path:
    """Where each process of each group has written what it has found."""
    folder = tmp_path_factory.mktemp("teams")
    for world in WORLDS:
        (folder / str(world)).mkdir()
        codes, printed = run_ranks([__file__, str(folder / str(world))], world)
        assert codes == [0] * world, printed
    return folder


@pytest.fixture(params=WORLDS)
def group(request, teams) -> list[list[Any]]:
    """What each process of a group has found."""
    return [json.loads((teams / str(request.param) / f"{rank}.json").read_text()) for rank in range(request.param)]


def test_a_team_finds_what_one_process_finds(group):
    alone, world = json.loads(json.dumps(worked(ALONE))), len(group)
    for rank, (found, _) in enumerate(group):
        for name in ("values", "first", "small"):
            assert found[name] == alone[name]
        assert found["total"] == [world, 10 * sum(range(world))]
        assert found["by"] == {str(count): [n % world for n in range(count)] for count in COUNTS}
        assert found["done"] == [n for count in COUNTS for n in range(count) if n % world == rank]


def test_an_error_in_one_ends_all_and_is_told_by_each(group):
    for _, (user, bug, *_) in group:
        assert user[1] == "UserError: no such thing" and bug[0] == "RuntimeError: a bug"
        assert {*user[:1], *user[2:]} == {"ProcessFailed: process 1 failed: UserError: no such thing"}
        assert set(bug[1:]) == {"ProcessFailed: process 0 failed: RuntimeError: a bug"}


def test_a_mistake_that_the_first_finds_is_its_own_to_tell(group):
    for _, (_, _, user, system, _) in group:
        assert user == ["UserError: no such file"] + ["ReportedElsewhere: no such file"] * (len(group) - 1)
        assert system == ["OSError: full"] + ["ReportedElsewhere: full"] * (len(group) - 1)


def test_the_first_alone_and_then_the_others(group):
    for _, (*_, (first, *others)) in group:
        assert len(first) == 2 and all(first[1] <= began for began, _ in others)


def test_one_process_asks_nobody(monkeypatch):
    monkeypatch.setattr(dist, "all_gather_object", None)
    monkeypatch.setattr(dist, "broadcast", None)
    assert worked(ALONE)["done"] == [n for count in COUNTS for n in range(count)]
    assert ALONE.is_main and not ProcessGroup(1, 2).is_main
    with pytest.raises(ZeroDivisionError):  # as it is
        ALONE.map(lambda item: item / 0, [1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
