"""Shared by all tests: no network, no W&B server, one thread, one seed."""

import gc
import os
import random
import signal
import sys

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

import leaks  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import sparse  # noqa: E402
import torch  # noqa: E402

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


@pytest.fixture(scope="session")
def names_in_modules() -> leaks.Names:
    """What modules and classes held when they were last looked at."""
    return leaks.Names()


@pytest.fixture(scope="module", autouse=True)
def leaves_modules_as_they_were(names_in_modules) -> Iterator[None]:
    """A file of tests that leaves something replaced or open fails, at its last test, with the name of it."""
    files = leaks.open_files()
    yield
    if found := [*names_in_modules.left(), *leaks.files_left(files)]:
        pytest.fail(f"this file of tests leaves behind: {'; '.join(found)}", pytrace=False)


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """Every test starts from the same global seeds; one that leaves something behind fails, with the name of it."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # a hundredth of the time of torch.manual_seed, which thinks of every device
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
    before = leaks.quick()
    yield
    if found := leaks.left(before):
        pytest.fail(f"this test leaves behind: {'; '.join(found)}", pytrace=False)


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
