"""Execute the notebooks: texts in jupytext's percent format become build/notebooks/N_name.ipynb, pictures included.

    pip install -e ".[notebooks]"
    python docs/notebooks/execute.py            # all; make notebooks
    python docs/notebooks/execute.py only=1,2   # some; make notebooks ARGS="only=1,2"

Each runs from top to bottom in the Python that runs this file and in an empty folder. A cell that fails, or that prints
warnings or the path of a folder of this machine, is told with its notebook and its number, and the exit code is 1.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 600  # seconds that a cell may take
SHOWN = 1500  # characters of an error


def texts() -> list[Path]:
    """The notebooks, in order."""
    return sorted(HERE.glob("[0-9]_*.py"))


def chosen(only: str | None) -> list[Path]:
    """Those whose numbers are in `only`, as in `1,2`; all without it. Exits for a number that there is not."""
    found = {path.name.partition("_")[0]: path for path in texts()}
    wanted = [number.strip() for number in only.split(",")] if only else list(found)
    if unknown := [number for number in wanted if number not in found]:
        raise SystemExit(f"only: there is no notebook {unknown[0]!r}; there are {', '.join(found)}")
    return [found[number] for number in wanted]


def execute(path: Path, share: float = 1.0) -> tuple[Any, str | None]:
    """The executed notebook, and what went wrong in it, if anything did.

    share: of the steps of its trainings; below 1 for a test.
    """
    import jupytext
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = jupytext.read(path)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        settings = {"timeout": LIMIT, "resources": resources, "record_timing": False}
        client = NotebookClient(notebook, kernel_manager_class=kernel_class(), **settings)
        try:
            client.execute(env=environment(share))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            return notebook, told(notebook, error)
        return notebook, noise(notebook, folder)


def kernel_class() -> Any:
    """What starts a kernel of this very Python, whatever others are installed on the machine."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            argv = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR", "-f", "{connection_file}"]
            return KernelSpec(argv=argv, display_name="Python 3", language="python")

    return ThisPython


def environment(share: float) -> dict[str, str]:
    """Of the kernel: it finds this checkout, and what lies beside the notebooks."""
    paths = [str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SMALTI_NOTEBOOK_SHARE": str(share)}


def code_cells(notebook: Any) -> list[tuple[int, Any]]:
    """The cells of code, each with its number among all cells, from 1."""
    return [(number, cell) for number, cell in enumerate(notebook.cells, 1) if cell.cell_type == "code"]


def told(notebook: Any, error: Exception) -> str:
    """Which cell failed, how it begins, what it printed on stderr and what was raised."""
    failed = [(n, cell) for n, cell in code_cells(notebook) if any(out.output_type == "error" for out in cell.outputs)]
    if not failed:
        return str(error).strip()[-SHOWN:]
    number, cell = failed[0]
    printed = "".join(out.text for out in cell.outputs if out.get("name") == "stderr")
    raised = next(out for out in cell.outputs if out.output_type == "error")
    lines = [f"cell {number} failed: {first_line(cell)}", printed.strip()[-SHOWN:], f"{raised.ename}: {raised.evalue}"]
    return "\n  ".join(filter(None, lines))


def first_line(cell: Any) -> str:
    """How a cell begins."""
    return next((line for line in cell.source.splitlines() if line.strip()), "")


def written(cell: Any) -> str:
    """All that a cell printed or showed as text."""
    texts = [out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in cell.outputs]
    return re.sub(r"\x1b\[[0-9;]*m", "", "".join(texts))


def noise(notebook: Any, folder: str) -> str | None:
    """What a reader should not see, told: lines on stderr, and folders of the machine."""
    places = {folder, str(ROOT), str(Path.home()), sys.prefix, tempfile.gettempdir()} - {"/"}
    for number, cell in code_cells(notebook):
        stderr = "".join(out.text for out in cell.outputs if out.get("name") == "stderr")
        if stderr:
            return f"cell {number} printed on stderr: {first_line(cell)}\n  {stderr.strip()[:SHOWN]}"
        if named := [place for place in places if place in written(cell)]:
            return f"cell {number} shows a folder of this machine, {named[0]}: {first_line(cell)}"
    return None


def pictures(notebook: Any) -> list[str]:
    """The pictures of all cells, PNG in base64."""
    outputs = [out for _, cell in code_cells(notebook) for out in cell.outputs]
    return [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]


def options(argv: list[str]) -> dict[str, str]:
    """`key=value` arguments. Exits for others."""
    known = {"only", "out", "share"}
    pairs = dict(argument.partition("=")[::2] for argument in argv)
    if unknown := [key for key in pairs if key not in known]:
        raise SystemExit(f"{unknown[0]}: unknown; there are {', '.join(sorted(known))}\n\n{__doc__}")
    return pairs


def main() -> None:
    """The command line."""
    import nbformat

    given = options(sys.argv[1:])
    out, share, failed = Path(given.get("out", ROOT / "build" / "notebooks")), float(given.get("share", 1)), 0
    out.mkdir(parents=True, exist_ok=True)
    for path in chosen(given.get("only")):
        start = time.perf_counter()
        notebook, problem = execute(path, share)
        nbformat.write(notebook, out / f"{path.stem}.ipynb")
        seconds, count = time.perf_counter() - start, len(pictures(notebook))
        print(f"{path.stem}: {seconds:.0f} s, {count} pictures{', but' if problem else ''}", flush=True)
        if problem:
            failed += 1
            print(f"{path.name}: {problem}", file=sys.stderr, flush=True)
    raise SystemExit(min(failed, 1))


if __name__ == "__main__":
    main()
