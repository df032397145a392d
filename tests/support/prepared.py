"""A process that has imported everything and forks whatever Python files tests run: none has to import torch again.

    outcome = run([[__file__, FOLDER], [__file__, FOLDER]], RANK=["0", "1"])
    printed = run_file("-m", "pipelines.train_prior", "--help")

Each process of pytest has at most one, from its first use on; it ends when nobody can write to it any more. What is
run begins as in a new interpreter, but that its modules are loaded and that those that run at once hash alike: what
depends on either belongs in a process of its own (`launch.start`). With `bare=True` torch alone is loaded, so that what
reads the environment when it is imported, as huggingface_hub does, reads that of the test.
"""

from __future__ import annotations

import gc
import importlib
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
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]
BARE = ("torch", "torch.distributed", "numpy", "safetensors.torch", "psutil", "pydantic", "yaml", "PIL.Image", "pytest")
SERVERS: dict[int, subprocess.Popen[str]] = {}
"""By the number of the process that started it: a fork of a process has none yet."""

# From outside


def run(
    commands: list[list[str]], seconds: float = 200, bare: bool = False, **more: list[str | None]
) -> list[tuple[int, str]]:
    """Files with their arguments, or `-m` and modules, all at once, where this process works; the exit code of each,
    and what it says on stderr and then on stdout. more: variables of their environment, a value for each, None for
    none. Raises `AssertionError` if one does not end."""
    from launch import environment

    begun: list[tuple[int, Path]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number, argv in enumerate(commands):
                output, mine = Path(folder, str(number)), {name: values[number] for name, values in more.items()}
                variables = {name: value for name, value in {**environment(), **mine}.items() if value is not None}
                asked = {"argv": argv, "environment": variables, "output": str(output), "folder": os.getcwd()}
                begun.append((ask(**asked, bare=bare), output))
            until = time.monotonic() + seconds
            codes = [ask(wait=pid, seconds=max(0.0, until - time.monotonic())) for pid, _ in begun]
            printed = [said_in(output) for _, output in begun]
            assert None not in codes, f"no end after {seconds} s: {commands}: {printed}"
        finally:
            for pid, _ in begun:
                ask(end=pid)
    return list(zip(codes, printed, strict=True))


def said_in(output: Path) -> str:
    """What a process has written so far, its errors first."""
    return "".join(path.read_text(errors="replace") for path in (errors_of(output), output) if path.exists())


def errors_of(output: Path) -> Path:
    """Where stderr goes."""
    return output.with_suffix(".errors")


def run_file(*argv: str | Path, seconds: float = 200, bare: bool = False, **more: str | None) -> str:
    """One file or module with its arguments, which has to end with success; what it says."""
    variables = {name: [value] for name, value in more.items()}
    ((code, printed),) = run([[*map(str, argv)]], seconds, bare, **variables)
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
    try:
        return exchange(server.stdin, server.stdout, json.dumps(what) + "\n")
    except BaseException:  # an answer that nobody has read is no answer to the next question
        os.killpg(SERVERS.pop(os.getpid()).pid, signal.SIGKILL)
        raise


def exchange(questions: TextIO, answers: TextIO, line: str) -> Any:
    """The answer to a question."""
    questions.write(line)
    questions.flush()
    answer = answers.readline()
    assert answer, "the process that forks for tests has ended"
    return json.loads(answer)


# In the process, which has loaded torch alone, and in a fork of it, which has loaded everything


class Forks:
    """Answers questions line by line; the first for which everything has to be loaded makes a fork that loads it."""

    def __init__(self, questions: TextIO, answers: TextIO, loaded: bool) -> None:
        self.questions, self.answers, self.loaded = questions, answers, loaded
        self.running: set[int] = set()
        self.other: tuple[TextIO, TextIO] | None = None

    def serve(self) -> dict[str, Any] | None:
        """Until nobody asks any more; in a fork that is to run something, what that is."""
        for line in self.questions:
            asked = json.loads(line)
            if "argv" in asked and (self.loaded or asked["bare"]):
                answer: Any = os.fork()
                if not answer:
                    return asked
                self.running.add(answer)
            elif {asked.get("wait"), asked.get("end")} & self.running:
                answer = self.code_of(asked["wait"], asked["seconds"]) if "wait" in asked else self.end(asked["end"])
            elif self.loaded or "end" in asked and not self.other:
                answer = None  # it has ended
            else:
                if not self.other and self.fork_loaded():
                    return self.serve()
                assert self.other
                answer = exchange(*self.other, line)
            self.answers.write(json.dumps(answer) + "\n")
            self.answers.flush()
        return None

    def fork_loaded(self) -> bool:
        """Make the fork that loads everything and answers what this one asks it; whether this is that fork."""
        to, back = os.pipe(), os.pipe()
        if os.fork():
            os.close(to[0]), os.close(back[1])
            self.other = os.fdopen(to[1], "w"), os.fdopen(back[0])
            return False
        os.close(to[1]), os.close(back[0])
        os.dup2(2, 1)  # what an import says is no answer
        from failures.forked import import_once

        import_once("accelerate", "torchvision.utils", "small_pipelines")
        self.questions, self.answers = os.fdopen(to[0]), os.fdopen(back[1], "w")
        self.loaded, self.running = True, set()
        return True

    def code_of(self, pid: int, seconds: float) -> int | None:
        """Its exit code, negative for a signal; None if it does not end within so many seconds."""
        until = time.monotonic() + seconds
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > until:
                return None
            time.sleep(0.001)
        self.running.discard(pid)
        return os.waitstatus_to_exitcode(done[1])

    def end(self, pid: int) -> None:
        """Kill it, and what it has started."""
        import psutil

        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.code_of(pid, 60)


def become(argv: list[str], environment: dict[str, str], output: str, folder: str, bare: bool) -> None:
    """Run this file or module, with nothing to read and what it says where it belongs."""
    kept = [
        os.open(os.devnull, os.O_RDONLY),
        *(os.open(path, os.O_WRONLY | os.O_CREAT) for path in (output, errors_of(Path(output)))),
    ]
    for number, into in enumerate(kept):
        os.dup2(into, number)
        os.close(into)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    sys.modules["numpy"].random.seed()
    if argv[0] == "-m":
        sys.argv, sys.path[0] = argv[1:], folder
        sys.modules.pop(argv[1], None)  # it becomes `__main__`, as in a new interpreter
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    for module in BARE:
        importlib.import_module(module)
    gc.freeze()  # forks look for garbage among their own alone
    if asked := Forks(sys.stdin, sys.stdout, False).serve():
        become(**asked)
