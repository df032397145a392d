"""The notebooks run from top to bottom and draw their pictures; failing cells are reported; their Hub is confined."""

from __future__ import annotations

import base64
import importlib.util
import json
import sys
import threading
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

needed = [name for name in ("jupytext", "nbclient", "ipykernel") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(needed), reason=f"not installed: {', '.join(needed)}")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9]_*.py"))
PICTURES = {"1_chain_rule": 19, "2_two_stages": 10, "3_orders": 8, "4_density": 11, "5_own_images": 6}
SHARES = {"1_chain_rule": 0.2, "2_two_stages": 0.15}  # share of the training; the claims in the text must still hold
every_notebook = pytest.mark.parametrize("name", NAMES)


def loaded(name: str) -> ModuleType:
    """Import a module beside the notebooks."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


executing = loaded("execute")


def executed(folder: Path, *sources: str) -> tuple[Any, str | None]:
    """Execute a notebook with these cells."""
    path = folder / "1_small.py"
    path.write_text("".join(f"# %%\n{source}\n\n" for source in sources))
    return executing.execute(path)


# Executed


def outcome(name: str, share: float) -> tuple[str | None, bool]:
    """The error, if any, and whether all pictures were drawn."""
    notebook, problem = executing.execute(FOLDER / f"{name}.py", share)
    return problem, len(executing.pictures(notebook)) >= PICTURES[name]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SHARES)
def test_the_first_notebooks_run(name):
    """With shortened training."""
    assert outcome(name, SHARES[name]) == (None, True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@every_notebook
def test_a_notebook_runs_whole(name):
    assert outcome(name, 1.0) == (None, True)


# The executor


def test_a_failing_cell_is_reported_with_its_number_output_and_error(tmp_path):
    cells = [
        "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
        "import sys\nprint('why', file=sys.stderr)",
    ]
    cells[1] += "\nraise ValueError('a reason')"
    notebook, problem = executed(tmp_path, *cells, "1 / 0")
    assert problem.startswith("cell 2 ") and "why" in problem and problem.endswith("ValueError: a reason")
    assert len(executing.pictures(notebook)) == 1


def test_a_notebook_runs_here_and_in_an_empty_folder(tmp_path, monkeypatch):
    """With this interpreter and checkout, in a temporary folder; the kernel is stopped afterwards."""
    monkeypatch.chdir(tmp_path)
    lines = ["import os, sys, pathlib, pipelines, local_hub", f"assert sys.executable == {sys.executable!r}"]
    lines += [f"assert pathlib.Path(pipelines.__file__).is_relative_to({str(ROOT)!r})", "assert os.listdir() == []"]
    lines += ["assert os.environ['SMALTI_NOTEBOOK_SHARE'] == '1.0'", "pathlib.Path('mine').write_text('x')"]
    before = psutil.Process().children(recursive=True)
    _, problem = executed(tmp_path, "\n".join(lines))
    assert psutil.Process().children(recursive=True) == before, "the kernel is still running"
    assert problem is None and [path.name for path in tmp_path.iterdir()] == ["1_small.py"]


# The Hub of notebook 5


def test_the_hub_writes_only_into_its_folder_and_listens_only_locally(tmp_path):
    hub = loaded("local_hub").LocalHub(tmp_path / "hub")
    assert hub.server_address[0] == "127.0.0.1"
    try:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        content = base64.b64encode(b"x").decode()
        names = ["fine.txt", "../outside.txt", "../../outside.txt", f"{tmp_path}/outside.txt"]
        lines = [{"key": "header", "value": {"summary": "s"}}]
        lines += [{"key": "file", "value": {"path": name, "content": content}} for name in names]
        body = "\n".join(map(json.dumps, lines)).encode()
        urllib.request.urlopen(f"{hub.url}/api/models/me/mine/commit/main", body).read()
        assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.txt")] == ["hub/me/mine/fine.txt"]
        assert urllib.request.urlopen(f"{hub.url}/me/mine/resolve/main/fine.txt").read() == b"x"
    finally:
        hub.shutdown()
        hub.server_close()
