"""The notebooks run from top to bottom in an empty folder, show their pictures and print no warnings."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from optional import Late

jupytext, nbclient = Late("jupytext"), Late("nbclient")
missing = [name for name in ("jupytext", "nbconvert", "ipykernel") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("[1-9]_*.py"))
PICTURES = 5  # at least, in each
SHORTER = {  # short trainings, still long enough for what the text claims
    "1_chain_rule": {"    optimizer = torch": "    steps //= 5\n    optimizer = torch"},
    "2_two_stages": {'"steps": 400': '"steps": 60', '"steps": 500': '"steps": 75'},
}


def execute(name: str, folder: Path, changes: dict[str, str]) -> tuple[list[str], int]:
    """Run a notebook in `folder`. Returns what a reader should not see, and the number of pictures."""
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    for before, after in changes.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    notebook = jupytext.reads(text, fmt="py:percent")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    unwanted, pictures = [], 0
    for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
        pictures += "image/png" in output.get("data", {})
        printed = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        if output.get("name") == "stderr" or re.search("|".join(map(re.escape, (str(folder), str(ROOT)))), printed):
            unwanted.append(printed)
    return unwanted, pictures


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [*SHORTER, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)])
def test_a_notebook_runs(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """At full length if it is slow."""
    slow = request.node.get_closest_marker("slow") is not None
    unwanted, pictures = execute(name, tmp_path, {} if slow else SHORTER[name])
    assert unwanted == [] and pictures >= PICTURES
