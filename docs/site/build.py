"""Build the site in build/site: the repository's pages, the notebooks, and a page for each model and command.

    python docs/site/build.py

Pages are staged in build/pages at the paths they have in the repository, so that their links hold in both places. A
warning or a dead link ends the build with exit code 1. The site loads nothing from other hosts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import commands
import jupytext
import models
import nbformat
import yaml
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LINK = re.compile(r"\]\(([^)#:\s]+)")
NOTEBOOK = re.compile(r"(\]\((?:[\w./]*/)?[1-9]_\w+)\.py")
README = re.compile(r"(\]\((?:\.\./)*)README\.md")
DOWNLOAD = '[Download this notebook]({name}){{ .md-button download="{name}" }}'
NOT_EXECUTED = '!!! note "No outputs"\n    Execute the notebooks with `make notebooks`, then build again.'


def build(out: Path, root: Path = ROOT) -> str:
    """Build the site of the repository at `root` in `out`/site. Returns the problems that Zensical reports, or ''."""
    pages = out / "pages"
    for folder in (pages, out / "site"):
        shutil.rmtree(folder, ignore_errors=True)
    config = yaml.safe_load((HERE / "site.yml").read_text(encoding="utf-8").replace("ROOT", str(root)))
    generated = stage(pages, root, out / "notebooks")
    config["nav"] = [generated.get(entry, entry) if isinstance(entry, str) else entry for entry in config["nav"]]
    (out / "site.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return run_zensical(out, root)


def run_zensical(out: Path, root: Path) -> str:
    """Write the pages staged in `out` as a site. Returns the problems that Zensical reports, or ''."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", "site.yml"]
    paths = os.pathsep.join(map(str, (HERE, root)))  # for our Markdown and docstring extensions, and the packages
    env = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, env=env)
    return COLOURS.sub("", done.stdout + done.stderr).partition("Traceback")[0] if done.returncode else ""


def stage(pages: Path, root: Path, executed: Path) -> dict[str, Any]:
    """Write all pages below `pages`. Returns the generated parts of the navigation. executed: where notebooks with
    outputs may be."""
    texts = {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in (root / "docs").glob("*.md")}
    listed = (HERE / "site.yml").read_text(encoding="utf-8")
    if missing := [page for page in texts if page not in listed]:
        raise SystemExit(f"{missing[0]}: not in the navigation; add it to docs/site/site.yml")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        texts[name] = (root / name).read_text(encoding="utf-8")
    texts["overview.md"] = (root / "README.md").read_text(encoding="utf-8")  # README.md would become index.html
    home = (HERE / "home.md").read_text(encoding="utf-8")
    texts["index.md"] = home.replace("](../../", "](").replace("](../", "](docs/")
    texts |= {f"api/{path.name}": path.read_text(encoding="utf-8") for path in (HERE / "api").glob("*.md")}
    generated = {
        "Notebooks": {"Notebooks": stage_notebooks(texts, pages, root, executed)},
        "Models": {"Models": models.stage(texts, root)},
        "Commands": {"Commands": commands.stage(texts)},
    }
    for page, text in texts.items():
        text = NOTEBOOK.sub(r"\1.md", text).replace("](docs/site/home.md)", "](index.md)")
        text = README.sub(r"\1overview.md", text)
        (pages / page).parent.mkdir(parents=True, exist_ok=True)
        (pages / page).write_text(text, encoding="utf-8")
        copy_linked_files(text, Path(page).parent, pages, root)
    shutil.copytree(HERE / "theme", pages / "assets")
    return generated


def copy_linked_files(text: str, folder: Path, pages: Path, root: Path) -> None:
    """Copy the pictures and other files to which a page links, if the repository has them."""
    for link in LINK.findall(text):
        path = Path(os.path.normpath(folder / link))
        if path.suffix != ".md" and (root / path).is_file():
            (pages / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / path, pages / path)


def stage_notebooks(texts: dict[str, str], pages: Path, root: Path, executed: Path) -> list[Any]:
    """Convert the notebooks to pages and `.ipynb` files, with their outputs if they have been executed. Returns their
    navigation."""
    entries: list[Any] = []
    for source in sorted((root / "docs/notebooks").glob("[1-9]_*.py")):
        ran = executed / f"{source.stem}.ipynb"
        notebook = nbformat.read(ran, as_version=4) if ran.is_file() else jupytext.read(source)
        for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        text, resources = MarkdownExporter().from_notebook_node(
            notebook, resources={"unique_key": source.stem, "output_files_dir": "outputs"}
        )
        (pages / "docs/notebooks").mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, pages / f"docs/notebooks/{source.stem}.ipynb")
        for name, data in resources["outputs"].items():
            file = pages / "docs/notebooks" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        title = text.partition("# ")[2].partition("\n")[0]
        page = f"docs/notebooks/{source.stem}.md"
        head = [DOWNLOAD.format(name=f"{source.stem}.ipynb"), *([] if ran.is_file() else [NOT_EXECUTED])]
        texts[page] = text.replace("\n", "\n".join(["", "", *head, ""]), 1)
        entries.append({title: page})
    return entries


if __name__ == "__main__":
    if problems := build(ROOT / "build"):
        raise SystemExit(problems)
    print(ROOT / "build/site/index.html")
