"""Run Python files in other processes, alone or as ranks of a group. They are forked from a server that has imported
the commands, which saves seconds per process.

    printed = run_file("-m", "pipelines.train_prior", "--help")
    fork_twice(__file__, FOLDER)    # a test file whose `__main__` runs as each of two ranks

A process starts like a new interpreter, except that modules are loaded, and that PYTHONHASHSEED has no effect.
"""

from __future__ import annotations

import datetime
import hashlib
import multiprocessing
import os
import random
import runpy
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

FORKS = multiprocessing.get_context("forkserver")
VERBS = [f"pipelines.{verb}" for verb in ("train_prior", "train_tokenizer", "encode", "generate")]
FORKS.set_forkserver_preload(
    [*VERBS, "accelerate", "torch.distributed.checkpoint", "torchvision.utils", "matplotlib.figure", "pytest"]
)
HUB = ("huggingface_hub", "accelerate", "pipelines", "prior", "tokenizer")
"""Packages that read variables of the Hub when they are imported."""

# In the test process


def start_file(argv: list[str], output: Path, **variables: str | None) -> ForkServerProcess:
    """Start a file or `-m MODULE` with arguments in the working directory. Output is appended to `output`, stderr to a
    file beside it. variables: changes to the environment; None removes one."""
    from launch import environment  # late: child processes should not import it

    values = {name: value for name, value in {**environment(), **variables}.items() if value is not None}
    process = FORKS.Process(target=become, args=(argv, values, output, os.getcwd()))
    process.start()
    return process


def start_ranks(argv: list[str], world: int, output: Path, **variables: str | None) -> list[ForkServerProcess]:
    """Start a file in `world` processes, with the variables that a launcher sets."""
    from launch import free_port

    if world == 1:
        return [start_file(argv, output, **variables)]
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **variables}
    return [start_file(argv, output, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(world)]


def printed_in(output: Path) -> str:
    """The output so far, errors first."""
    return "".join(path.read_text(errors="replace") for path in (errors_of(output), output) if path.exists())


def errors_of(output: Path) -> Path:
    """The file of stderr."""
    return output.with_name(f"{output.name}.errors")


def become(argv: list[str], variables: dict[str, str], output: Path, folder: str) -> None:
    """Run the file. Called in the new process."""
    for number, path in ((1, output), (2, errors_of(output))):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    if any(variables.get(name) != os.environ.get(name) for name in {*variables, *os.environ} if name[:3] == "HF_"):
        for name in [name for name in sys.modules if name.partition(".")[0] in HUB]:
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(variables)
    random.seed()
    sys.modules["numpy"].random.seed()
    try:
        if argv[0] == "-m":
            sys.argv, sys.path[0] = argv[1:], folder
            sys.modules.pop(argv[1], None)  # it runs as `__main__`
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
            runpy.run_path(argv[0], run_name="__main__")
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells report SIGINT


def run_ranks(argv: list[str], world: int, seconds: float = 200, **variables: str | None) -> tuple[list[int], str]:
    """Run a file in `world` processes; returns exit codes (negative for a signal) and output. Raises `AssertionError`
    on a timeout."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "printed")
        processes = start_ranks(argv, world, output, **variables)
        until = time.monotonic() + seconds
        try:
            for process in processes:
                process.join(max(0.0, until - time.monotonic()))
            codes = [process.exitcode for process in processes]
            assert None not in codes, f"no end after {seconds} s: {argv}: {printed_in(output)}"
        finally:
            for process in processes:
                kill(process)
        return codes, printed_in(output)  # type: ignore[return-value]


def kill(process: ForkServerProcess) -> None:
    """Kill a process and its children, if it still runs."""
    if process.is_alive():
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.join()


def run_file(*argv: str | Path, seconds: float = 200, **variables: str | None) -> str:
    """Run a file or module, which must succeed; returns its output, errors first."""
    (code,), printed = run_ranks([*map(str, argv)], 1, seconds, **variables)
    assert code == 0, f"exit code {code}:\n{printed}"
    return printed


def fork_twice(file: str, *arguments: str | Path, seconds: float = 200) -> str:
    """Run a file as each of two ranks, which must succeed; returns their output."""
    codes, printed = run_ranks([file, *map(str, arguments)], 2, seconds)
    assert codes == [0, 0], f"exit codes {codes}:\n{printed}"
    return printed


# In each rank


def join_group(folder: Path) -> int:
    """Join the group through a file in the folder; returns the rank."""
    rank, world, limit = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), datetime.timedelta(seconds=50)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=limit)
    return rank


def gathered(value: Any) -> list[Any]:
    """The `value` of each rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def digest(values: Iterable[Any]) -> str:
    """Hash the bits of tensors, or of their shards in this process."""
    state = hashlib.sha256()
    for value in values:
        local = value.to_local() if hasattr(value, "to_local") else value
        state.update(local.detach().contiguous().numpy().tobytes())
    return state.hexdigest()


def leave_group() -> NoReturn:
    """Leave the group together with the other ranks, and exit immediately with success: gloo's threads occasionally
    abort an interpreter that shuts down normally."""
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
