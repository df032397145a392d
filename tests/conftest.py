"""Set-up of all tests: no network, no W&B server, one thread, fixed seeds."""

import gc
import logging
import os
import random
import signal
import sys
import threading

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Child processes should reuse compiled bytecode, whatever the caller's environment says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).parents[1]
# Child processes import this tree rather than an installed one, and the test helpers.
PATHS = (str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", ""))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, PATHS))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import sparse  # noqa: E402
import torch  # noqa: E402

from tokenizer.model import Registered  # noqa: E402

# Background jobs (and nohup) ignore these signals, and so would every child process that a test stops by signal.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# fsync protects against a failure of the machine, which no test can simulate; files survive kill -9 without it.
os.fsync = lambda fd: None


def freeze_objects() -> None:
    """Exempt existing objects from garbage collection, which accelerate triggers in every run."""
    gc.collect()
    gc.freeze()


LONG = (
    "test_notebooks",
    "test_readme",
    "test_docs",
    "test_fake_gpu",
    "test_distributed",
    "test_sharding",
    "test_kills",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs before slow tests are deselected. Long files begin first, so that no worker waits for them at the end."""
    sparse.thin_out(items)
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish() -> None:
    """Freeze thousands of collected tests."""
    freeze_objects()


def pytest_runtest_logfinish() -> None:
    """Freeze modules that a test imported."""
    if len(gc.get_objects(generation=2)) > 50_000:
        freeze_objects()


@pytest.fixture
def shared_data() -> Path:
    """The folder of real image sets; skips the test if it is missing."""
    folder = Path(os.environ.get("SMALTI_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real image sets; set SMALTI_DATA to their folder")
    return folder


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """Seed each test, and restore global state that libraries may change."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # 100 times faster than torch.manual_seed, which seeds all devices
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    environment, folder, path, argv = dict(os.environ), os.getcwd(), list(sys.path), list(sys.argv)
    threads, dtype, precision = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    hooks, level = (sys.excepthook, threading.excepthook), logging.root.level
    models = {family: set(vars(family).get("_members", ())) for family in Registered.__subclasses__()}
    yield
    if dict(os.environ) != environment:
        os.environ.clear()
        os.environ.update(environment)
    os.chdir(folder)
    sys.path[:], sys.argv[:] = path, argv
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.excepthook, threading.excepthook = hooks
    logging.root.setLevel(level)
    if (state := sys.modules.get("accelerate.state")) is not None and state.AcceleratorState._shared_state:
        state.AcceleratorState._reset_state(reset_partial_state=True)
    if (plots := sys.modules.get("matplotlib.pyplot")) is not None:
        plots.close("all")
    for family in Registered.__subclasses__():  # models that a test defined
        for name in set(vars(family).get("_members", ())) - models.get(family, set()):
            if not family._members[name].__module__.startswith(("tokenizer", "prior", "pipelines")):
                del family._members[name]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests of torch.compile, which starts threads, extends `sys.path` and raises the recursion limit."""
    from torch._inductor import config

    monkeypatch.setattr(sys, "path", [*sys.path])
    limit = sys.getrecursionlimit()
    with config.patch(compile_threads=1):
        yield
    sys.setrecursionlimit(limit)


@pytest.fixture
def one_process() -> Iterator[None]:
    """Reset accelerate before and after the test: one process, on the CPU."""
    from one_process import one_process  # late: most tests do not need accelerate

    with one_process():
        yield
