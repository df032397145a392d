"""The tests themselves: one that leaves something behind fails with the name of it; alone and in any order they pass.

Every leak is planted in a small file of tests, which runs in a process of its own under the conftest of all.
"""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import leaks
import pytest
import torch
from each import of_each

from benchmarks.trust import mutants

assert gc and logging and resource and signal and socket and tempfile and torch  # for the lines below

ROOT = Path(__file__).parents[2]
LEAKS = {  # what a test does, and what it is told
    "os.environ['SMALTI_LEFT'] = '1'": "os.environ: SMALTI_LEFT",
    "os.environ.pop('HF_HUB_OFFLINE')": "os.environ: HF_HUB_OFFLINE",
    "os.chdir('/')": "the working folder: ",
    "torch.set_num_threads(2)": "torch's threads: 1 became 2",
    "torch.set_default_dtype(torch.float64)": "torch's default dtype: torch.float32 became torch.float64",
    "torch.set_deterministic_debug_mode(2)": "deterministic algorithms: False became True",
    "torch.set_grad_enabled(False)": "the recording of gradients: (True, False) became (False, False)",
    "torch.set_autocast_enabled('cpu', True)": "autocast: False became True",
    "torch.set_float32_matmul_precision('high')": "the precision of products: 'highest' became 'high'",
    "torch.backends.mkldnn.enabled = False": "oneDNN: True became False",
    "signal.signal(signal.SIGUSR1, lambda *_: None)": "handlers of signals: ",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (77, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))": "limits of",
    "logging.root.setLevel(1)": "levels of logging: ",
    "logging.disable(50)": "levels of logging: ",
    "sys.path.insert(0, '/left')": "sys.path: '/left'",
    "sys.argv.append('left')": "sys.argv: ",
    "sys.setrecursionlimit(4321)": "the limit of recursion: ",
    "gc.disable()": "garbage collection: True became False",
    "socket.setdefaulttimeout(7)": "timeouts of sockets: None became 7.0",
    "tempfile.tempdir = '/left'": "the folder for temporary files: ",
    "type('Left', (VQ,), {'__module__': 'left'}, name='left')": "families: ",
    "pyplot.figure()": "figures: ",
    "threading.Thread(target=event.wait, name='left').start()": "threads: left",
    "processes.append(subprocess.Popen(['sleep', '60']))": "processes: 'sleep",
}
OF_A_FILE = {
    "prior.sampling.gumbel_noise = print": "prior.sampling.gumbel_noise is replaced",
    "TokenNoise.of_ranks = print": "prior.sampling TokenNoise.of_ranks is replaced",
    "os.replace = print": "os.replace is replaced",
    "torch.nn.functional.linear = print": "torch.nn.functional.linear is replaced",
    "sys.modules.pop('prior.sampling')": "sys.modules: prior.sampling is another or none",
    "logging.getLogger('prior.left').setLevel(10)": "logging: prior.left has the level 10",
    "kept.append(tempfile.NamedTemporaryFile())": "open: ",
}
HEAD = """
import logging, os, sys, time
import torch
import leaks
import prior.sampling

KEPT = []
"""


def file_of(folder: Path, name: str, lines: list[str]) -> Path:
    """A file of tests of these lines, one each, under the conftest of all."""
    folder.mkdir(exist_ok=True)
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    path = folder / name
    path.write_text(HEAD + "".join(f"\n\ndef test_{k}():\n    {line}\n" for k, line in enumerate(lines)))
    return path


def run(*command: object, code: int) -> str:
    """What it prints, if it ends so."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def released():
    """What a thread or process that is left waits for; the former's patience is short."""
    event, processes = threading.Event(), []
    yield event, processes
    event.set()
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("leak", LEAKS)
def test_what_is_left_is_told_and_put_back(leak, released, monkeypatch):
    """All is as it was at the second look, a thread apart."""
    monkeypatch.setattr(leaks, "PATIENCE", 0.05)
    from matplotlib import pyplot

    from tokenizer.quantizers.vq import VQ

    before = leaks.quick()
    exec(leak, {**globals(), **locals(), "event": released[0], "processes": released[1]})
    found = leaks.left(before)
    assert len(found) == 1 and found[0].startswith(LEAKS[leak])
    assert leaks.left(before) == [] or "Thread" in leak
    assert pyplot and VQ


def test_a_thread_that_ends_while_it_is_looked_at_is_no_fault(monkeypatch):
    """Threads of pools come and go, and with them what the kernel tells of them."""
    with subprocess.Popen(["sleep", "60"]) as process:
        threads = [Path("/proc/self/task/0"), *Path("/proc/self/task").iterdir()]
        monkeypatch.setattr(leaks.Path, "iterdir", lambda folder: iter(threads))
        until = time.monotonic() + 30
        while process.pid not in leaks.children() and time.monotonic() < until:  # it has not begun
            time.sleep(0.01)
        found = leaks.children()
        process.kill()
    assert process.pid in found


@pytest.mark.parametrize("leak", OF_A_FILE)
def test_what_a_file_of_tests_replaces_is_told_and_put_back(leak):
    import prior.sampling
    from prior.sampling import TokenNoise

    names, files, kept = leaks.Names(), leaks.open_files(), []
    assert names.left() == leaks.files_left(files) == []
    exec(leak, {**globals(), **locals()})
    found = [*names.left(), *leaks.files_left(files)]
    for each in kept:
        each.close()
    assert len(found) == 1 and found[0].startswith(OF_A_FILE[leak])
    assert [*names.left(), *leaks.files_left(files)] == [] and prior and TokenNoise


def test_what_libraries_do_is_nobodys_fault(monkeypatch):
    """`datasets` replaces the environment after a map in processes, and it is put back; so is accelerate's state."""
    import accelerate

    monkeypatch.setenv("SMALTI_HERE", "1")
    before = leaks.quick()
    os.environ = copy.deepcopy(os.environ)  # noqa: B003
    os.environ["TORCHINDUCTOR_LEFT"] = "1"
    os.environ.pop("SMALTI_HERE")
    assert leaks.left(before) == ["os.environ: SMALTI_HERE"] and os.environ is leaks.ENVIRON
    assert os.environ["SMALTI_HERE"] == "1" and leaks.left(before) == []
    del os.environ["TORCHINDUCTOR_LEFT"]
    accelerate.PartialState(cpu=True)
    sys.excepthook = print
    assert leaks.left(before) == [] and leaks.accelerate_state() == [0, 0] and sys.excepthook is not print
    noise = threading.Thread(target=time.sleep, args=(0.2,), name="asyncio_0")
    noise.start()
    soon = threading.Thread(target=time.sleep, args=(0.1,))
    soon.start()
    assert leaks.left(before) == [] and not soon.is_alive()
    noise.join()


def test_what_torch_does_to_a_class_of_optimizers_is_nobodys_fault(monkeypatch):
    """It wraps the step of the class when the first of it is made, and marks it so."""
    from pipelines.training.optimizers import Muon

    names, step = leaks.Names(), Muon.step
    wrapped = lambda *given: step(*given)  # noqa: E731
    wrapped.hooked = True
    monkeypatch.setattr(Muon, "step", wrapped)
    assert names.left() == []


def test_who_leaves_something_behind_fails_with_its_name(tmp_path):
    """And the test that comes after it does not."""
    lines = ["os.chdir('/')", "assert os.getcwd() != '/'", "KEPT.append(1)", "prior.sampling.gumbel_noise = print"]
    path = file_of(tmp_path / "tests", "test_leaks.py", lines)
    said = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-c", ROOT / "pyproject.toml", path, code=1
    )
    told = re.findall(r"ERROR at teardown of (test_\d+) _+\n(.*)", said)
    assert "4 passed, 2 errors" in said and [name for name, _ in told] == ["test_0", "test_3"]
    assert told[0][1].startswith("this test leaves behind: the working folder: ")
    assert told[1][1] == "this file of tests leaves behind: prior.sampling.gumbel_noise is replaced"


SPARSE = """

@pytest.fixture(params=[True, False])
def both(request):
    return request.param


@pytest.mark.sparse
@pytest.mark.parametrize("order", ["raster", "snake", "column"])
@pytest.mark.parametrize("name", ["gpt", "made", pytest.param("slow", marks=pytest.mark.slow)])
def test_some(name, order, both, request):
    print(f"<{name} {order} {both} {'slow' if request.node.get_closest_marker('slow') else 'quick'}>")
"""


def test_each_value_of_each_parameter_comes_and_the_rest_is_slow(tmp_path):
    """None comes twice, and none never."""
    path = file_of(tmp_path / "tests", "test_some.py", [])
    path.write_text(path.read_text() + "import pytest" + SPARSE)
    options = ("-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "-m", "")  # all, which say what they are
    seen = re.findall(r"<(\w+) (\w+) (\w+) (\w+)>", run("-m", "pytest", "-q", "-s", *options, path, code=0))
    quick = [case for case in seen if case[3] == "quick"]
    for place, values in enumerate([{"gpt", "made"}, {"raster", "snake", "column"}, {"True", "False"}]):
        assert {case[place] for case in quick} == values
    assert len(quick) == 3 and len({case[:3] for case in seen}) == len(seen) == 18


def test_a_test_of_each_tells_all_that_fail():
    """And what is said of the first."""

    @of_each(range(4))
    def test_small(number):
        """The doc."""
        assert number < 2, f"{number} is large"

    with pytest.raises(AssertionError, match="2 is large") as caught:
        test_small()
    assert caught.value.__notes__ == ["of: 2, 3"]


@pytest.mark.slow
def test_each_test_runs_alone_and_what_was_told_is_not_run_again(tmp_path):
    """One that needs the one before it fails; one that hangs is ended; one that crashes is told."""
    lines = ["KEPT.append(1)", "assert KEPT", "time.sleep(60)", "os._exit(3)", "import pytest; pytest.skip('no')"]
    path = file_of(tmp_path / "tests", "test_some.py", lines)
    out = tmp_path / "out.jsonl"
    command = ("-m", "benchmarks.trust.suite", "alone=true", f"paths={path}", f"out={out}", "files=false", "limit=5")
    run(*command, code=1)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    outcomes = [row["outcome"] for row in rows if "test" in row]
    assert outcomes == ["passed", "failed", "hung", "crashed", "skipped"] and rows[-1]["done"]
    assert "assert []" in next(row["text"] for row in rows if row["outcome"] == "failed")
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    run(*command, code=1)
    assert [json.loads(line)["outcome"] for line in out.read_text().splitlines()][4:] == ["skipped", "passed"]


@pytest.mark.slow
def test_runs_in_random_order_find_who_needs_another(tmp_path):
    """Two of them: with the same seed the same order, and a third is added to them."""
    pytest.importorskip("pytest_randomly")
    lines = ["KEPT.append(1)", *["assert KEPT"] * 3]
    path, out = file_of(tmp_path / "tests", "test_some.py", lines), tmp_path / "out.jsonl"
    command = ("-m", "benchmarks.trust.suite", f"paths={path}", f"out={out}", "workers=0")
    run(*command, "random=2", code=1)
    run(*command, "random=3", code=1)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["seed"] for row in rows] == [1, 2, 3] and {row["outcome"] for row in rows} >= {"failed"}
    assert any("test_some.py::test_" in line for row in rows for line in row["failed"])


# Mutants


def test_mutants_of_a_file_meet_its_own_tests():
    """Those that mirror it, and those that say so; a star is for a folder, and not for those below it."""
    assert mutants.tests_of("tokenizer/quantizers/fsq.py") == ["tests/tokenizer/quantizers/test_family.py"]
    assert {"tests/prior/test_noise.py", "tests/prior/test_sampling.py"} <= {*mutants.tests_of("prior/sampling.py")}
    assert "tests/pipelines/compression/test_coding.py" in mutants.tests_of("pipelines/compression/codec.py")
    files = mutants.files_of("prior/*.py,tokenizer/quantizers/*.py,prior/gpt.py")
    assert {"prior/gpt.py", "tokenizer/quantizers/fsq.py"} < set(files) and len(files) == len(set(files))
    assert "pipelines/generate.py" not in files and not [name for name in files if "__init__" in name]
    with pytest.raises(SystemExit, match="modules=prior/nothing.py: no file of ours"):
        mutants.files_of("prior/nothing.py")


def test_a_score_is_of_all_mutants_of_which_some_are_tried():
    """Of 100 with half of 4 noticed, and of 300 with all of 300: 350 of 400, and the first file alone is uncertain."""
    ends = [("a", "killed"), ("a", "ended"), ("a", "survived"), ("a", "no tests"), *[("b", "killed")] * 300]
    rows = [{"file": name, "mutant": f"{name}_{k}", "outcome": end} for k, (name, end) in enumerate(ends)]
    rows[2]["diff"] = ["-    a < b", "+    a <= b"]
    rows += [{"file": name, "done": True, "mutants": count} for name, count in (("a", 100), ("b", 300), ("c", 0))]
    said = mutants.report(rows)
    assert "| a | 100 | 4 | 1 | 1 | 1 | 1 | 50.0% |" in said and "| b | 300 | 300 | 300 | 0 | 0 | 0 | 100.0% |" in said
    deviation = 100 * math.sqrt(0.96 * 0.25 / 3) / 400
    assert f"all: 87.5% +- {1.96 * deviation:.1%} of 400 mutants" in said
    assert "survived: a_2\n    -    a < b\n    +    a <= b" in said and "nothing to change" in said
