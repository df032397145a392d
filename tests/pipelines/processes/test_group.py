"""Several processes get the results of one; an error in one ends all, and each reports it.

The group is three processes that run `python test_group.py FOLDER`.
"""

from __future__ import annotations

import json
import sys
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
WORLD = 3


@torch.inference_mode()
def use(group: ProcessGroup) -> dict[str, Any]:
    """Call the methods of a group; return their results, and which process did what."""
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


def failing(group: ProcessGroup, error: Exception, rank: int) -> list[str]:
    """What each process raises if one fails; afterwards the group still works."""

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
    """What each process runs."""
    rank = join_group(folder)
    group = ProcessGroup(rank, dist.get_world_size())
    found = use(group)
    errors = [failing(group, UserError("no such thing"), 1), failing(group, RuntimeError("a bug"), 0)]
    errors += [failing(group, error, 0) for error in (UserError("no such file"), OSError("full"))]
    (folder / f"{rank}.json").write_text(json.dumps([found, errors]))
    leave_group()


@pytest.fixture(scope="module")
def group(tmp_path_factory) -> list[list[Any]]:
    """The results and errors of each process."""
    folder = tmp_path_factory.mktemp("group")
    codes, printed = run_ranks([__file__, str(folder)], WORLD)
    assert codes == [0] * WORLD, printed
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def test_a_group_gets_the_results_of_one_process(group):
    alone = json.loads(json.dumps(use(ALONE)))
    for rank, (found, _) in enumerate(group):
        for name in ("values", "first", "small"):
            assert found[name] == alone[name]
        assert found["total"] == [WORLD, 10 * sum(range(WORLD))]
        assert found["by"] == {str(count): [n % WORLD for n in range(count)] for count in COUNTS}
        assert found["done"] == [n for count in COUNTS for n in range(count) if n % WORLD == rank]


def test_an_error_in_one_process_is_raised_in_all(group):
    for _, (user, bug, *_) in group:
        assert user[1] == "UserError: no such thing" and bug[0] == "RuntimeError: a bug"
        assert {*user[:1], *user[2:]} == {"ProcessFailed: process 1 failed: UserError: no such thing"}
        assert set(bug[1:]) == {"ProcessFailed: process 0 failed: RuntimeError: a bug"}


def test_a_users_mistake_is_reported_by_the_main_process_alone(group):
    for _, (_, _, user, system) in group:
        assert user == ["UserError: no such file"] + ["ReportedElsewhere: no such file"] * (WORLD - 1)
        assert system == ["OSError: full"] + ["ReportedElsewhere: full"] * (WORLD - 1)


def test_one_process_needs_no_communication(monkeypatch):
    monkeypatch.setattr(dist, "all_gather_object", None)
    monkeypatch.setattr(dist, "broadcast", None)
    assert use(ALONE)["done"] == [n for count in COUNTS for n in range(count)]
    assert ALONE.is_main and not ProcessGroup(1, 2).is_main
    with pytest.raises(ZeroDivisionError):
        ALONE.map(lambda item: item / 0, [1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
