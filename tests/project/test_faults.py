"""When a process is lost, or a disk fills up, the job says so, ends in time, and goes on from where it was."""

from __future__ import annotations

import pytest
from launch import faults
from mishaps import can_mount

pytestmark = pytest.mark.timeout(300)

CELLS = 4  # which have every fault, phase and rank


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What happens to two processes without a launcher, and to one whose disk is full."""
    disks = {"disks": 2} if can_mount() else {}
    return faults(tmp_path_factory.mktemp("faults"), matrix=CELLS, launched="false", **disks)


@pytest.mark.parametrize("place", range(CELLS))
def test_a_lost_process_is_named_by_those_left(found, place):
    """Killed, raising, ending early or frozen: within seconds, with rank, step, phase and cause as the last line."""
    cell = found["matrix"][place]
    assert not cell["broken"] and cell["exit code"] == 1


def test_the_cells_are_of_every_fault_phase_and_rank(found):
    for column, values in {"fault": 4, "while": 3, "on rank": 2}.items():
        assert len({cell[column] for cell in found["matrix"]}) == values


@pytest.mark.skipif(not can_mount(), reason="no file system of a given size can be mounted here")
def test_a_full_disk_costs_lines_and_at_most_the_end_of_the_run(found):
    """The last good state is whole; with room again the run, or else the same command, ends as if nothing had been."""
    rows = found["disks"]
    assert sum(row["tried"] for row in rows) == 2 and sum(row["ended with 0"] for row in rows) == 1
    assert not [text for row in rows for text in row["broken"]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "what", ["matrix=24", "disks=20", "sick=20", "uneven=3", "encodes=100", "generates=100", "power=600"]
)
def test_dozens_of_faults(tmp_path, what):
    """All under `accelerate launch`, all levels of free space, losses that are not finite, images that are none, killed
    encodes and sets of images, power loss."""
    name, count = what.split("=")
    rows = faults(tmp_path, **{name: count})[name]
    print(*rows, sep="\n")
    assert rows and not [text for row in rows for text in row["broken"]]
