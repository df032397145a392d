"""What a test may not leave behind, so that tests can run in any order: all that a process has one of.

`quick` looks after every test and takes tens of microseconds, `Names` and `open_files` after every file. What can be
put back is put back, so that the next test does not fail for another's fault.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch

from tokenizer.model import Registered

ENVIRON = os.environ
"""The one that all hold. `datasets` leaves a copy in its place when it has mapped in processes."""
OURS = ("tokenizer", "prior", "pipelines")
OTHERS = set(
    """
    builtins io json os pathlib random shutil signal socket subprocess tempfile threading time urllib.request
    numpy torch torch.cuda torch.distributed torch.nn.functional torch.utils.data
    accelerate datasets huggingface_hub PIL.Image PIL.ImageFile psutil safetensors safetensors.torch wandb yaml
    """.split()  # noqa: SIM905
)
"""Modules of others whose functions tests replace."""
LIBRARIES = (
    "PYTEST_",
    "ACCELERATE_",
    "CUDA_",
    "GRADIO_",
    "KMP_",
    "MPL",
    "TORCH",
    "_TORCH",
    "PYTORCH_",
    "TF_",
    "WANDB_",
    "_WANDB",
)
"""Variables that libraries set once, of their own accord, are no test's fault if they had no value before."""
SIGNALS = [getattr(signal, f"SIG{name}") for name in ["INT", "TERM", "HUP", "CHLD", "PIPE", "USR1", "USR2", "XFSZ"]]
LIMITS = [getattr(resource, f"RLIMIT_{name}") for name in ["AS", "NOFILE", "FSIZE", "CORE"]]
FOR_LIFE = ("asyncio_", "AnyIO")
"""Threads of pools that are kept on purpose by libraries."""
QUIET = {"accelerate's state", "hooks for exceptions"}
"""Any verb that runs in this process sets up accelerate, and trackers their hooks: put back, and nobody is blamed."""
SERVANTS = ("resource_tracker", "forkserver", "wandb-core", "wandb.sdk", "node", "prepared.py")
"""Processes that libraries keep for as long as theirs lives, and ours that forks for tests."""
CALLED = {FunctionType, BuiltinFunctionType, property, classmethod, staticmethod, functools.partial}
PATIENCE = 60.0  # seconds that a thread or process may take to end: none of it if there is none

State = dict[str, Any]


def quick() -> State:
    """What there is one of, by the words in which it is told; each value compares with another."""
    return {
        "os.environ": dict(ENVIRON._data),  # type: ignore[attr-defined]  # fifty times as quick as its items
        "the working folder": os.getcwd(),
        "torch's threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the recording of gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "the precision of products": torch.get_float32_matmul_precision(),
        "oneDNN": torch.backends.mkldnn.enabled,
        "handlers of signals": [signal.getsignal(number) for number in SIGNALS],
        "limits of the process": [resource.getrlimit(limit) for limit in LIMITS],
        "levels of logging": (logging.root.level, logging.root.manager.disable),
        "sys.path": list(sys.path),
        "sys.argv": list(sys.argv),
        "hooks for exceptions": (sys.excepthook, threading.excepthook),
        "the limit of recursion": sys.getrecursionlimit(),
        "garbage collection": gc.isenabled(),
        "timeouts of sockets": socket.getdefaulttimeout(),
        "the folder for temporary files": tempfile.tempdir,
        "accelerate's state": accelerate_state(),
        "families": outsiders(),
        "figures": figures(),
        "threads": [thread for thread in threading.enumerate() if not thread.daemon],
        "processes": children(),
    }


def accelerate_state() -> list[int]:
    """How much accelerate's three shared states hold: nothing, until it is set up."""
    state = sys.modules.get("accelerate.state")
    if state is None:
        return [0, 0]
    return [len(state.AcceleratorState._shared_state), len(state.PartialState._shared_state)]


def outsiders() -> list[type]:
    """Models in our families that are not of our packages."""
    return [
        member for family in families() for member in family._members.values() if not member.__module__.startswith(OURS)
    ]


def families() -> list[type[Registered]]:
    """Tokenizers, quantizers, priors and so on."""
    return [family for family in Registered.__subclasses__() if "_members" in vars(family)]


def figures() -> tuple[Any, list[int]]:
    """What matplotlib draws with, once it is imported, and the open figures."""
    if "matplotlib.pyplot" not in sys.modules:
        return None, []
    plots, settings = sys.modules["matplotlib._pylab_helpers"], sys.modules["matplotlib"].rcParams
    return dict.__getitem__(settings, "backend"), list(plots.Gcf.figs)


def children() -> list[int]:
    """Processes that this one has started and that run, but for libraries' own."""
    if not Path("/proc/self/task").is_dir():  # no Linux
        return []
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # one call, which mostly says there is none
    except ChildProcessError:
        return []
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended has none
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return sorted(pid for pid in found if runs(pid))


def runs(pid: int) -> bool:
    """Whether it is neither over nor a library's own."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        over = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return False
    return not over and not any(name in command for name in SERVANTS)  # one that has just begun has no command yet


def left(before: State) -> list[str]:
    """What has changed since `before`, each in a few words; and all that can be is as it was again."""
    if os.environ is not ENVIRON:
        copy, os.environ = os.environ, ENVIRON  # type: ignore[misc]
        for key in set(ENVIRON) - set(copy):
            del ENVIRON[key]
        ENVIRON.update(copy)
    now = quick()
    if now == before:
        return []
    found = []
    for name, value in before.items():
        if now[name] != value:
            found += [] if name in QUIET else TOLD.get(name, told)(name, value, now[name])
            if name in BACK:
                BACK[name](value)
    return found


def told(name: str, before: Any, now: Any) -> list[str]:
    """The usual words."""
    return [f"{name}: {before!r} became {now!r}"]


def told_environment(name: str, before: dict[bytes, bytes], now: dict[bytes, bytes]) -> list[str]:
    """Which variables; not those that libraries set once."""
    changed = sorted(os.fsdecode(key) for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    known = [key for key in changed if os.fsencode(key) in before or not key.startswith(LIBRARIES)]
    return [f"{name}: {key}" for key in known if key != "PYTEST_CURRENT_TEST"]


def told_first_figures(name: str, before: tuple[Any, list[int]], now: tuple[Any, list[int]]) -> list[str]:
    """An import of matplotlib is no change, if nothing is left open."""
    return told(name, before, now) if now[1] or isinstance(before[0], str) and before[0] != now[0] else []


def told_threads(name: str, before: list[threading.Thread], now: list[threading.Thread]) -> list[str]:
    """New ones that do not end soon."""
    found = [thread for thread in now if thread not in before and not thread.name.startswith(FOR_LIFE)]
    until = time.monotonic() + PATIENCE
    for thread in found:
        thread.join(max(0.0, until - time.monotonic()))
    return [f"{name}: {thread.name}" for thread in found if thread.is_alive()]


def told_children(name: str, before: list[int], now: list[int]) -> list[str]:
    """New ones that do not end soon; they are ended."""
    new, until = set(now) - set(before), time.monotonic() + PATIENCE
    while new & set(children()) and time.monotonic() < until:
        time.sleep(0.01)
    found = []
    for pid in sorted(new & set(children())):
        with contextlib.suppress(OSError):  # it ended at last
            found.append(f"{name}: {Path(f'/proc/{pid}/cmdline').read_bytes().decode(errors='replace')[:200]!r}")
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # who started it may wait for it, too
    return found


def told_shorter(name: str, before: list[Any], now: list[Any]) -> list[str]:
    """By its new parts."""
    more = [part for part in now if part not in before]
    return [f"{name}: {part!r}" for part in more] or told(name, len(before), len(now))


def set_environment(values: dict[bytes, bytes]) -> None:
    """All variables as they were."""
    now = ENVIRON._data  # type: ignore[attr-defined]
    for key in [os.fsdecode(key) for key in now if key not in values and not os.fsdecode(key).startswith(LIBRARIES)]:
        del ENVIRON[key]
    for key, value in values.items():
        if now.get(key) != value:
            ENVIRON[os.fsdecode(key)] = os.fsdecode(value)


def set_handlers(handlers: list[Any]) -> None:
    """The handlers of `SIGNALS`."""
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


def set_logging(levels: tuple[int, int]) -> None:
    """The level of the root, and the one up to which nothing is told."""
    logging.root.setLevel(levels[0])
    logging.disable(levels[1])


def set_families(members: list[type]) -> None:
    """Without those that came."""
    for member in set(outsiders()) - set(members):
        for family in families():
            family._members = {name: each for name, each in family._members.items() if each is not member}


def set_accelerate(_: object) -> None:
    """As if nobody had set it up."""
    from one_process import begin_anew

    begin_anew()


def set_limits(limits: list[tuple[int, int]]) -> None:
    """The soft limits."""
    for limit, value in zip(LIMITS, limits, strict=True):
        resource.setrlimit(limit, value)


def set_hooks(hooks: tuple[Any, Any]) -> None:
    """What is called with an exception that nobody catches, in the main thread and in others."""
    sys.excepthook, threading.excepthook = hooks


def set_figures(_: object) -> None:
    """None open."""
    sys.modules["matplotlib.pyplot"].close("all")


TOLD: dict[str, Callable[[str, Any, Any], list[str]]] = {
    "os.environ": told_environment,
    "figures": told_first_figures,
    "threads": told_threads,
    "processes": told_children,
    "sys.path": told_shorter,
    "families": told_shorter,
}
BACK: dict[str, Callable[[Any], object]] = {
    "os.environ": set_environment,
    "the working folder": os.chdir,
    "torch's threads": torch.set_num_threads,
    "torch's default dtype": torch.set_default_dtype,
    "deterministic algorithms": lambda value: torch.set_deterministic_debug_mode(2 * value),  # which imports nothing
    "the recording of gradients": lambda value: torch.set_grad_enabled(value[0]),
    "autocast": lambda value: torch.set_autocast_enabled("cpu", value),
    "the precision of products": torch.set_float32_matmul_precision,
    "handlers of signals": set_handlers,
    "limits of the process": set_limits,
    "levels of logging": set_logging,
    "oneDNN": lambda value: setattr(torch.backends.mkldnn, "enabled", value),
    "hooks for exceptions": set_hooks,
    "sys.path": lambda value: sys.path.__setitem__(slice(None), value),
    "sys.argv": lambda value: sys.argv.__setitem__(slice(None), value),
    "the limit of recursion": sys.setrecursionlimit,
    "garbage collection": lambda value: gc.enable() if value else gc.disable(),
    "timeouts of sockets": socket.setdefaulttimeout,
    "the folder for temporary files": lambda value: setattr(tempfile, "tempdir", value),
    "accelerate's state": set_accelerate,
    "families": set_families,
    "figures": set_figures,
}


# After each file


class Names:
    """What our modules and classes, and some modules of others, call by their names; and levels of loggers."""

    def __init__(self) -> None:
        self.seen: dict[Any, dict[str, Any]] = {}
        self.look()

    def left(self) -> list[str]:
        """Names that mean something else since the last look, which are put back."""
        found = []
        for owner, names in self.seen.items():
            now = vars(owner)
            for name, value in names.items():
                if now.get(name) is not value and not by_itself(owner, now.get(name)):
                    if type(value) is not bool:  # which says what was told once in a process
                        found.append(f"{getattr(owner, '__module__', '')} {owner.__name__}.{name} is replaced".strip())
                    setattr(owner, name, value)
        for module in self.seen:
            if isinstance(module, ModuleType) and sys.modules.get(module.__name__) is not module:
                found.append(f"sys.modules: {module.__name__} is another or none")
                sys.modules[module.__name__] = module
        self.look()
        return found + self.left_of_loggers()

    def look(self) -> None:
        """Owner, name, value, of modules that came since the last look; a class's after those of its module."""
        for name, module in list(sys.modules.items()):
            if not isinstance(module, ModuleType) or module in self.seen:
                continue
            if name.partition(".")[0] in OURS:
                self.seen[module] = {key: each for key, each in vars(module).items() if not key.startswith("__")}
                for value in vars(module).values():
                    if isinstance(value, type) and value.__module__ == name:
                        self.seen[value] = {key: each for key, each in vars(value).items() if is_called(key, each)}
            elif name in OTHERS:
                self.seen[module] = {key: each for key, each in vars(module).items() if is_called(key, each)}

    def left_of_loggers(self) -> list[str]:
        """Loggers of ours that say more or less than before."""
        found = []
        for name, logger in list(logging.root.manager.loggerDict.items()):
            if name.startswith(OURS) and isinstance(logger, logging.Logger) and (logger.level or logger.disabled):
                found.append(f"logging: {name} has the level {logger.level}")
                logger.setLevel(logging.NOTSET)
                logger.disabled = False
        return found


def by_itself(owner: Any, value: Any) -> bool:
    """Whether another's module has it replaced by one of its own, as torch does when more of it is imported; and the
    step of an optimizer's class when the first of it is made."""
    if getattr(value, "hooked", False) is True:
        return True
    package = owner.__name__.partition(".")[0]
    return package not in OURS and str(getattr(value, "__module__", None)).partition(".")[0] == package


def is_called(name: str, value: Any) -> bool:
    """Whether it is a function or a class that somebody calls; pydantic makes some of its own anew."""
    kind = type(value)  # not isinstance: one of torch's warns when it is asked for its class
    return (kind in CALLED or issubclass(kind, type)) and "pydantic" not in name


def open_files() -> dict[str, str]:
    """Files that this process has open, by number; not those of libraries and devices."""
    found: dict[str, str] = {}
    if not Path("/proc/self/fd").is_dir():
        return found
    for number in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if path.startswith(tempfile.gettempdir()) and not path.startswith(sys.prefix):  # fonts, of matplotlib
            found[number] = path
    return found


def files_left(before: dict[str, str]) -> list[str]:
    """Files below the folder for temporary ones that are still open after garbage is collected."""
    if open_files().items() <= before.items():
        return []
    gc.collect()
    return [f"open: {path}" for number, path in open_files().items() if before.get(number) != path]
