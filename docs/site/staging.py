"""The pages before they are written: which file of the repository is which page, and in which order they stand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import families
import formulas
import links
import notebook_pages
import references
import verb_pages

ROOT = Path(__file__).parents[2]
THEME = Path(__file__).parent / "theme"
HOME = "docs/site/home.md"

# The site's page of each file of the repository that is one, in the order in which a reader meets them.
TITLES = {
    "overview.md": "Overview",
    "guide.md": "A first day",
    "data.md": "Your own images",
    "orders.md": "Orders",
    "density.md": "What a density is for",
    "scaling.md": "Many devices",
    "extending.md": "Extending",
    "loop.md": "Your own training loop",
    "promises.md": "Promises",
    "formats.md": "Formats",
}
PROJECT = [{"Contributing": "contributing.md"}, {"Changelog": "changelog.md"}, {"Licence": "files/LICENSE.md"}]
NAMES = {
    **TITLES,
    "gallery.md": "Gallery",
    "results.md": "Results",
    "lab.md": "Laboratory notes",
    "contributing.md": "Contributing",
    "changelog.md": "Changelog",
}
PAGES = {
    HOME: "index.md",
    "README.md": "overview.md",
    **{f"docs/{page}": page for page in [*TITLES, "gallery.md", "results.md", "lab.md"] if page != "overview.md"},
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}


def stage(pages: Path, root: Path, executed: Path) -> list[Any]:
    """Write every page below `pages`; returns the navigation. executed: where notebooks that have run may be."""
    texts: dict[str, str] = {}
    scripts = {f"docs/notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in notebook_pages.scripts(root)}
    entries = navigation(notebook_pages.stage(pages, root, executed, texts))
    for origin, page in {**PAGES, **scripts}.items():
        source = texts.get(page) or (root / origin).read_text(encoding="utf-8")
        texts[page] = links.rewrite(
            source, origin, page, lambda path: scripts.get(path) or find(path, root, texts), NAMES
        )
    for path in (root / "docs").glob("*.md"):
        if f"docs/{path.name}" not in PAGES:
            raise SystemExit(f"docs/{path.name}: no place in the navigation; add it to docs/site/staging.py")
    find("LICENSE", root, texts)
    names = references.documented()
    texts = {page: links.refer(text, names) for page, text in texts.items()}
    entries += [
        {"Models": families.stage(texts, root)},
        {"API": references.stage(texts)},
        {"Commands": verb_pages.stage(texts, root)},
        {"Project": PROJECT},
    ]
    for page, text in texts.items():
        (pages / page).parent.mkdir(parents=True, exist_ok=True)
        (pages / page).write_text(formulas.typeset(text), encoding="utf-8")
    (pages.parent / "names.json").write_text(json.dumps(names), encoding="utf-8")
    shutil.copytree(root / "docs/images", pages / "images")
    shutil.copytree(THEME, pages / "assets")
    return entries


def find(path: str, root: Path, texts: dict[str, str]) -> str | None:
    """The site's page or picture of a path in the repository. Any other text file gets a page, when it is linked."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/images/") and (root / path).is_file():
        return path.removeprefix("docs/")
    if not (root / path).is_file():
        return None
    page = f"files/{path}.md"
    texts[page] = f"---\nhide: [navigation]\n---\n\n# {path}\n\n````text\n{(root / path).read_text('utf-8')}\n````\n"
    return page


def navigation(notebooks: list[Any]) -> list[Any]:
    """What the first tabs and the column beside a page show."""
    return [
        {"Home": "index.md"},
        {"Guide": [{title: page} for page, title in TITLES.items()]},
        *([{"Notebooks": notebooks}] if notebooks else []),
        {"Gallery": "gallery.md"},
        {"Results": "results.md"},
        {"Laboratory notes": "lab.md"},
    ]
