"""The notebooks: they are kept as text, run from top to bottom, and show pictures, and nothing that is no business of a
reader; what executes them says what went wrong; the Hub of the last one keeps to itself."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import subprocess
import sys
import threading
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from optional import Late

jupytext, made = Late("jupytext"), Late("nbformat.v4")
needed = [name for name in ("jupytext", "nbclient", "ipykernel") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(needed), reason=f"not installed: {', '.join(needed)}")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9]_*.py"))
PICTURES = {"1_chain_rule": 19, "2_two_stages": 10, "3_orders": 8, "4_density": 11, "5_own_images": 6}
SHARES = {"1_chain_rule": 0.2, "2_two_stages": 0.15}  # their models have to learn something, as they claim
every_notebook = pytest.mark.parametrize("name", NAMES)


def loaded(name: str) -> ModuleType:
    """A module beside the notebooks."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


executing = loaded("execute")


def executed(folder: Path, *sources: str) -> tuple[Any, str | None]:
    """`execute` of a notebook of these cells."""
    path = folder / "1_small.py"
    path.write_text("".join(f"# %%\n{source}\n\n" for source in sources))
    return executing.execute(path)


# As text


def test_there_are_five():
    assert list(PICTURES) == NAMES


@every_notebook
def test_a_notebook_is_kept_as_text(name):
    """With a title, no more than an idea a cell, and no outputs beside it."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert all(not cell.get("outputs") for cell in notebook.cells)
    assert max(len(cell.source.splitlines()) for cell in notebook.cells) <= 40
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    assert words >= 400, "the text is the point"
    assert not list(FOLDER.glob("*.ipynb"))


@every_notebook
def test_links_of_a_notebook_lead_somewhere(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    for target in targets:
        page, _, heading = target.partition("#")
        path = FOLDER / page
        assert path.is_file(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
        slugs = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}
        assert not heading or heading in slugs, target


@every_notebook
def test_a_notebook_uses_what_is_public(name):
    """No name of ours with an underscore in front, and nothing of the tests."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert not re.search(r"\b(?:from|import) (?:pipelines|prior|tokenizer)[\w.]*\._|\w\._[a-z]|fake_hub|tests", text)


# Executed


def outcome(name: str, share: float) -> tuple[str | None, bool]:
    """What went wrong, if anything did, and whether there are as many pictures as it takes."""
    notebook, problem = executing.execute(FOLDER / f"{name}.py", share)
    return problem, len(executing.pictures(notebook)) >= PICTURES[name]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SHARES)
def test_the_first_notebooks_run(name):
    """With a share of their trainings; what they claim has to hold all the same."""
    assert outcome(name, SHARES[name]) == (None, True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@every_notebook
def test_a_notebook_runs_whole(name):
    assert outcome(name, 1.0) == (None, True)


# The executor


def test_the_cell_that_fails_is_told(tmp_path):
    """With its number, how it begins, what it said and what was raised; pictures before it are there."""
    cells = [
        "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()",
        "import sys\nprint('why', file=sys.stderr)",
    ]
    cells[1] += "\nraise ValueError('a reason')"
    notebook, problem = executed(tmp_path, *cells, "1 / 0")
    assert problem == "cell 2 failed: import sys\n  why\n  ValueError: a reason"
    assert len(executing.pictures(notebook)) == 1


def test_a_kernel_that_dies_is_told(tmp_path):
    assert "died" in executed(tmp_path, "import os\nos._exit(3)")[1]


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("import warnings\nwarnings.warn('old ways')", "old ways"),
        ("import os\nprint(os.getcwd())", "shows a folder of this machine"),
        ("import sys\nsys.prefix", "shows a folder of this machine"),
    ],
)
def test_noise_is_told(tmp_path, cell, told):
    assert told in executed(tmp_path, "print('fine')", cell)[1]


def test_a_notebook_runs_here_and_in_an_empty_folder(tmp_path, monkeypatch):
    """In this Python, with this checkout and the share asked for; what it writes is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    lines = ["import os, sys, pathlib, pipelines, local_hub", f"assert sys.executable == {sys.executable!r}"]
    lines += [f"assert pathlib.Path(pipelines.__file__).is_relative_to({str(ROOT)!r})", "assert os.listdir() == []"]
    lines += ["assert os.environ['SMALTI_NOTEBOOK_SHARE'] == '1.0'", "pathlib.Path('mine').write_text('x')"]
    before = psutil.Process().children(recursive=True)
    _, problem = executed(tmp_path, "\n".join(lines))
    assert psutil.Process().children(recursive=True) == before, "the kernel is still there"
    assert problem is None and [path.name for path in tmp_path.iterdir()] == ["1_small.py"]


def test_pictures_and_outputs_are_found():
    png = made.new_output("display_data", {"image/png": "abc", "text/plain": "<Figure>"})
    cells = [made.new_markdown_cell("# Title"), made.new_code_cell("1", outputs=[png]), made.new_code_cell("2")]
    notebook = made.new_notebook(cells=cells)
    assert executing.pictures(notebook) == ["abc"] and executing.noise(notebook, "/nowhere") is None


def test_some_are_chosen():
    assert [path.stem for path in executing.chosen("2,1")] == ["2_two_stages", "1_chain_rule"]
    assert [path.stem for path in executing.chosen(None)] == NAMES
    with pytest.raises(SystemExit, match="there is no notebook '9'; there are 1, 2, 3, 4, 5"):
        executing.chosen("9")
    with pytest.raises(SystemExit, match="^onyl: unknown"):
        executing.options(["onyl=1"])


def test_what_is_executed_is_written(tmp_path, monkeypatch, capsys):
    """Also if a cell fails, which is told; the exit code says whether all went well."""
    cell = made.new_code_cell("1", outputs=[made.new_output("display_data", {"image/png": "abc"})])
    problems = {"1_chain_rule": None, "2_two_stages": "cell 3 failed: x"}
    monkeypatch.setattr(
        executing, "execute", lambda path, share: (made.new_notebook(cells=[cell]), problems[path.stem])
    )
    for only, code in (("1", 0), ("1,2", 1)):
        monkeypatch.setattr(sys, "argv", ["execute.py", f"only={only}", f"out={tmp_path}"])
        with pytest.raises(SystemExit) as ended:
            executing.main()
        assert ended.value.code == code
    told = capsys.readouterr()
    assert "1_chain_rule: 0 s, 1 pictures\n" in told.out and told.err == "2_two_stages.py: cell 3 failed: x\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1_chain_rule.ipynb", "2_two_stages.ipynb"]


# The Hub of notebook 5


def test_the_hub_comes_before_its_client(tmp_path):
    """It is the Hub of a process from its start on, or says that it comes too late."""
    script = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); {{}}from local_hub import start_hub; start_hub('hub')"
    late = [sys.executable, "-c", script.format("import huggingface_hub; ")]
    done = subprocess.run(late, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "RuntimeError: start_hub comes first" in done.stderr
    check = "; from huggingface_hub import constants; assert constants.ENDPOINT.startswith('http://127.0.0.1:')"
    subprocess.run([sys.executable, "-c", script.format("") + check], cwd=tmp_path, check=True)


def test_the_hub_keeps_files_inside_its_folder(tmp_path):
    """It listens on this machine alone, and a commit cannot lead out of its repository."""
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
