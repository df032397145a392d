"""Two processes of one group on this machine: how a test starts them, and how each of them meets the other and ends.

A file that needs two starts itself twice (`fork_twice(__file__, FOLDER)`, or `run_twice` where each has to be a new
interpreter), and each works under `__main__`.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

# From outside


def run_together(commands: list[list[str]], seconds: float = 200, code: int | None = 0) -> list[tuple[int, str]]:
    """The exit code and the output of each; fails if one hangs, or ends with another code than `code`."""
    from launch import end, free_port, output_of, start  # late: not for these, whom it would slow

    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(commands))}
    group = [start(command, RANK=str(rank), LOCAL_RANK=str(rank), **where) for rank, command in enumerate(commands)]
    try:
        printed = [output_of(process, seconds, code) for process in group]
    finally:
        for process in group:
            end(process)
    return [(process.returncode, text) for process, text in zip(group, printed, strict=True)]


def run_twice(*argv: str | Path, seconds: float = 200) -> None:
    """Run Python twice at once with these arguments; both have to end with success."""
    run_together([[sys.executable, *map(str, argv)]] * 2, seconds)


def fork_twice(file: str, folder: Path, seconds: float = 200) -> None:
    """Run a file twice at once, each in a fork of a process that has imported everything; both have to end with
    success."""
    import prepared

    found = prepared.run(
        [[file, str(folder)]] * 2, seconds, RANK=["0", "1"], LOCAL_RANK=["0", "1"], WORLD_SIZE=["2"] * 2
    )
    for code, printed in found:
        assert code == 0, f"exit code {code}:\n{printed}"


# In each of two processes


def join_group(folder: Path) -> int:
    """Meet the others in a file of the folder, where no port can be taken by somebody else; returns the rank."""
    rank, world, limit = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), datetime.timedelta(seconds=50)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=limit)
    return rank


def gathered(value: Any) -> list[Any]:
    """`value` of every process."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def digest(values: Iterable[Any]) -> str:
    """A hash of the bits of tensors, or of this process's pieces of them."""
    state = hashlib.sha256()
    for value in values:
        local = value.to_local() if hasattr(value, "to_local") else value
        state.update(local.detach().contiguous().numpy().tobytes())
    return state.hexdigest()


def leave_group() -> NoReturn:
    """Leave the group once the other is here too, and end with success: everything that was to be written is written.

    At once, as gloo's threads now and then abort an interpreter that ends by itself.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
