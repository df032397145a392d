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
NOT_EXECUTED = '!!! note "No outputs"\n    Execute the notebooks with `make notebooks`, then build again.'
GUIDE = {
    "Overview": "overview.md",
    "A first day": "docs/guide.md",
    "Your own images": "docs/data.md",
    "Orders": "docs/orders.md",
    "What a density is for": "docs/density.md",
    "Many devices": "docs/scaling.md",
    "Extending": "docs/extending.md",
    "Your own training loop": "docs/loop.md",
    "Promises": "docs/promises.md",
    "Formats": "docs/formats.md",
}
RESULTS = {"Gallery": "docs/gallery.md", "Results": "docs/results.md", "Laboratory notes": "docs/lab.md"}
PROJECT = {"Contributing": "CONTRIBUTING.md", "Changelog": "CHANGELOG.md", "Security": "SECURITY.md"}
API = {"ImagePipeline": "pipeline", "Tokenizer": "tokenizer", "Prior": "prior", "Data": "data", "Errors": "errors"}


def build(out: Path, root: Path = ROOT) -> str:
    """Build the site of the repository at `root` in `out`/site. Returns the problems that Zensical reports, or ''."""
    pages = out / "pages"
    for folder in (pages, out / "site"):
        shutil.rmtree(folder, ignore_errors=True)
    navigation = yaml.safe_dump({"nav": stage(pages, root, out / "notebooks")}, sort_keys=False)
    config = (HERE / "site.yml").read_text(encoding="utf-8").replace("ROOT", str(root))
    (out / "site.yml").write_text(f"{config}\n{navigation}", encoding="utf-8")
    return run_zensical(out, root)


def run_zensical(out: Path, root: Path) -> str:
    """Write the pages staged in `out` as a site. Returns the problems that Zensical reports, or ''."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", "site.yml"]
    paths = os.pathsep.join(map(str, (HERE, root)))  # for our Markdown and docstring extensions, and the packages
    env = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, env=env)
    return COLOURS.sub("", done.stdout + done.stderr).partition("Traceback")[0] if done.returncode else ""


def stage(pages: Path, root: Path, executed: Path) -> list[Any]:
    """Write all pages below `pages`. Returns the navigation. executed: where notebooks with outputs may be."""
    texts: dict[str, str] = {}
    for path in [*root.glob("*.md"), *root.glob("docs/*.md")]:
        texts[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8")
    if missing := texts.keys() - {"README.md"} - {*GUIDE.values(), *RESULTS.values(), *PROJECT.values()}:
        raise SystemExit(f"{min(missing)}: not in the navigation; add it to docs/site/build.py")
    texts["overview.md"] = texts.pop("README.md")  # a README.md would be the site's first page
    home = (HERE / "home.md").read_text(encoding="utf-8")
    texts["index.md"] = home.replace("](../../", "](").replace("](../", "](docs/")
    for page in API.values():
        texts[f"api/{page}.md"] = (HERE / f"api/{page}.md").read_text(encoding="utf-8")
    notebooks = stage_notebooks(texts, pages, root, executed)
    navigation: list[Any] = [
        {"Home": "index.md"},
        {"Guide": as_entries(GUIDE)},
        {"Notebooks": notebooks},
        *as_entries(RESULTS),
        {"Models": models.stage(texts, root)},
        {"API": as_entries({title: f"api/{page}.md" for title, page in API.items()})},
        {"Commands": commands.stage(texts)},
        {"Project": as_entries(PROJECT)},
    ]
    for page, text in texts.items():
        text = NOTEBOOK.sub(r"\1.md", text).replace("](docs/site/home.md)", "](index.md)")
        text = README.sub(r"\1overview.md", text)
        (pages / page).parent.mkdir(parents=True, exist_ok=True)
        (pages / page).write_text(text, encoding="utf-8")
        copy_linked_files(text, Path(page).parent, pages, root)
    shutil.copytree(HERE / "theme", pages / "assets")
    return navigation


def as_entries(pages: dict[str, str]) -> list[dict[str, str]]:
    """Titles and pages as Zensical's navigation has them."""
    return [{title: page} for title, page in pages.items()]


def copy_linked_files(text: str, folder: Path, pages: Path, root: Path) -> None:
    """Copy the pictures and other files to which a page links, if the repository has them."""
    for link in LINK.findall(text):
        path = Path(os.path.normpath(folder / link))
        if path.suffix != ".md" and (root / path).is_file():
            (pages / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / path, pages / path)


def stage_notebooks(texts: dict[str, str], pages: Path, root: Path, executed: Path) -> list[Any]:
    """Convert the notebooks to pages, with their outputs if they have been executed. Returns their navigation."""
    entries: list[Any] = []
    for source in sorted((root / "docs/notebooks").glob("[1-9]_*.py")):
        ran = executed / f"{source.stem}.ipynb"
        notebook = nbformat.read(ran, as_version=4) if ran.is_file() else jupytext.read(source)
        for cell in notebook.cells:
            cell.outputs = [output for output in cell.get("outputs", ()) if output.get("name") != "stderr"]
        text, resources = MarkdownExporter().from_notebook_node(
            notebook, resources={"unique_key": source.stem, "output_files_dir": "outputs"}
        )
        for name, data in resources["outputs"].items():
            file = pages / "docs/notebooks" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        title = text.partition("# ")[2].partition("\n")[0]
        page = f"docs/notebooks/{source.stem}.md"
        texts[page] = text if ran.is_file() else text.replace("\n", f"\n\n{NOT_EXECUTED}\n", 1)
        entries.append({title: page})
    return entries


if __name__ == "__main__":
    if problems := build(ROOT / "build"):
        raise SystemExit(problems)
    print(ROOT / "build/site/index.html")
