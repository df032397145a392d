"""Shared by all tests: no network, no W&B server, one thread, one seed."""

import gc
import logging
import os
import random
import signal
import sys
import threading

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", WANDB_SILENT="true", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The many processes that tests start need not compile the tree again, whatever is set outside.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).parents[1]
# For the processes that tests start: this tree before an installed one, and the helpers of the tests.
PATHS = (str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", ""))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, PATHS))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import sparse  # noqa: E402
import torch  # noqa: E402

from tokenizer.model import Registered  # noqa: E402

# A job in the background (or under nohup) is deaf to these, and so would be every process that a test starts and stops.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# Files outlive a process that is killed without it; only a machine that fails needs it, and no test can have one.
os.fsync = lambda fd: None


def leave_out_what_stays() -> None:
    """Later collections of garbage, of which accelerate makes one a run, do not look through what there is now."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before those that are slow are left out."""
    sparse.thin_out(items)


def pytest_collection_finish() -> None:
    """There are thousands of collected tests."""
    leave_out_what_stays()


def pytest_runtest_logfinish() -> None:
    """What a test was the first to import stays, too."""
    if len(gc.get_objects(generation=2)) > 50_000:
        leave_out_what_stays()


@pytest.fixture
def shared_data() -> Path:
    """Real image sets, where they are at hand."""
    folder = Path(os.environ.get("SMALTI_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real image sets are not here; set SMALTI_DATA to their folder")
    return folder


@pytest.fixture(autouse=True)
def starts_afresh() -> Iterator[None]:
    """Start each test from the same seeds; restore afterwards what a library may set for the whole process."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # a hundredth of the time of torch.manual_seed, which thinks of every device
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
    for family in Registered.__subclasses__():  # models that a test has defined
        for name in set(vars(family).get("_members", ())) - models.get(family, set()):
            if not family._members[name].__module__.startswith(("tokenizer", "prior", "pipelines")):
                del family._members[name]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch's compiler, which leaves threads, a folder in `sys.path` and a higher limit of recursion."""
    from torch._inductor import config

    monkeypatch.setattr(sys, "path", [*sys.path])
    limit = sys.getrecursionlimit()
    with config.patch(compile_threads=1):
        yield
    sys.setrecursionlimit(limit)


@pytest.fixture
def one_process() -> Iterator[None]:
    """Accelerate is set up anew for the test, and again after it: one process, on the CPU."""
    from one_process import one_process  # late: most tests do without accelerate

    with one_process():
        yield
