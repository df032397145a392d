"""A process that has imported everything and forks whatever Python files tests run: none has to import torch again.

    outcome = run([[__file__, FOLDER], [__file__, FOLDER]], RANK=["0", "1"])
    printed = run_file("-m", "pipelines.train_prior", "--help")

Each process of pytest has at most one, from its first use on; it ends when nobody can write to it any more. What is
run begins as in a new interpreter, but that its modules are loaded and that those that run at once hash alike: what
depends on either belongs in a process of its own (`launch.start`).
"""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SERVERS: dict[int, subprocess.Popen[str]] = {}
"""By the number of the process that started it: a fork of a process has none yet."""

# From outside


def run(commands: list[list[str]], seconds: float = 200, **more: list[str]) -> list[tuple[int, str]]:
    """Files with their arguments, or `-m` and modules, all at once, where this process works; the exit code and the
    output of each. more: variables of their environment, a value for each. Raises `AssertionError` if one does not
    end."""
    from launch import environment

    begun: list[tuple[int, Path]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, argv in enumerate(commands):
                output = Path(folder, str(number))
                variables = environment(**{name: values[number] for name, values in more.items()})
                asked = {"argv": argv, "environment": variables, "output": str(output), "folder": os.getcwd()}
                begun.append((ask(**asked), output))
            until = time.monotonic() + seconds
            codes = [ask(wait=pid, seconds=max(0.0, until - time.monotonic())) for pid, _ in begun]
            printed = [output.read_text(errors="replace") for _, output in begun]
            assert None not in codes, f"no end after {seconds} s: {commands}: {printed}"
        finally:
            for pid, _ in begun:
                ask(end=pid)
    return list(zip(codes, printed, strict=True))


def run_file(*argv: str | Path, seconds: float = 200, **more: str) -> str:
    """One file or module with its arguments, which has to end with success; its output."""
    ((code, printed),) = run([[*map(str, argv)]], seconds, **{name: [value] for name, value in more.items()})
    assert code == 0, f"exit code {code}:\n{printed}"
    return printed


def ask(**what: Any) -> Any:
    """What this process's server answers; the first question starts it."""
    server = SERVERS.get(os.getpid())
    if server is None or server.poll() is not None:
        from launch import environment

        server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        SERVERS[os.getpid()] = server
    assert server.stdin and server.stdout
    server.stdin.write(json.dumps(what) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, "the process that forks for tests has ended"
    return json.loads(answer)


# In the process


def main() -> None:
    """Do what is asked, line by line; in a fork, what the fork is for, and then end as any script does."""
    from forked import import_once

    import_once("accelerate", "torchvision.utils", "pytest", "small_pipelines")
    running: set[int] = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if "argv" in asked:
            answer: Any = os.fork()
            if not answer:
                become(**asked)
                return
            running.add(answer)
        elif "wait" in asked:
            answer = code_of(asked["wait"], asked["seconds"], running)
        else:
            answer = end(asked["end"], running)
        print(json.dumps(answer), flush=True)


def become(argv: list[str], environment: dict[str, str], output: str, folder: str) -> None:
    """Run this file or module, with nothing to read and its output where it belongs."""
    file, nothing = os.open(output, os.O_WRONLY | os.O_CREAT), os.open(os.devnull, os.O_RDONLY)
    for number, into in enumerate((nothing, file, file)):
        os.dup2(into, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    random.seed()
    sys.modules["numpy"].random.seed()
    if argv[0] == "-m":
        sys.argv, sys.path[0] = argv[1:], folder
        sys.modules.pop(argv[1], None)  # it becomes `__main__`, as in a new interpreter
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
        runpy.run_path(argv[0], run_name="__main__")


def code_of(pid: int, seconds: float, running: set[int]) -> int | None:
    """Its exit code, negative for a signal; None if it does not end within so many seconds."""
    until = time.monotonic() + seconds
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > until:
            return None
        time.sleep(0.001)
    running.discard(pid)
    return os.waitstatus_to_exitcode(done[1])


def end(pid: int, running: set[int]) -> None:
    """Kill it, if it still runs, and what it has started."""
    import psutil

    if pid not in running:
        return
    for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    code_of(pid, 60, running)


if __name__ == "__main__":
    main()
