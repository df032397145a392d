"""What a reader would stumble over in a finished site: dead links and anchors, missing pictures, other hosts."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect ids, links and sources."""
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if (tag, name) in LOADED and value:
                self.loads.append(value)
            elif (tag, name) == ("a", "href") and value:
                self.links.append(value)


def problems(site: Path) -> list[str]:
    """A line for each dead link, each missing file and each file of another host."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    return [
        f"{path.relative_to(site)}: {problem}"
        for path, page in pages.items()
        if path.name != "404.html"  # its links are those of a server's root
        for problem in of_page(path, page, pages)
    ]


def of_page(path: Path, page: Page, pages: dict[Path, Page]) -> Iterator[str]:
    """What is wrong with the links of one page."""
    for target in page.loads:
        if is_elsewhere(target):
            yield f"loads {target}, from another host"
        elif not target.startswith("data:") and not place(path, target)[0].is_file():
            yield f"loads {target}, which is not there"
    for target in page.links:
        if is_elsewhere(target) or target.startswith("mailto:"):
            continue
        there, anchor = place(path, target)
        if not there.is_file():
            yield f"links to {target}, which is not there"
        elif anchor and there in pages and anchor not in pages[there].anchors | {"__top"}:
            yield f"links to {target}, which has no such anchor"


def is_elsewhere(target: str) -> bool:
    """Whether a link names a host."""
    return target.startswith(("http://", "https://", "//"))


def place(path: Path, target: str) -> tuple[Path, str]:
    """The file that a link on the page `path` leads to, and the anchor in it."""
    name, anchor = urldefrag(target)
    there = (path.parent / unquote(name.partition("?")[0])).resolve() if name else path
    return (there / "index.html" if there.is_dir() else there), unquote(anchor)
