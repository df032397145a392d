"""The site: everything has its page, dead links end the build, and a browser reports no errors."""

from __future__ import annotations

import functools
import importlib
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from optional import Late
from servers.chromium import browser

from pipelines.__main__ import verbs
from prior import Prior
from prior.heads import Head
from tokenizer import Tokenizer
from tokenizer.quantizers import Quantizer

ROOT = Path(__file__).parents[2]
WIDTHS = (1400, 390)

jupytext, nbformat = Late("jupytext"), Late("nbformat")
pytestmark = pytest.mark.timeout(900)  # a build takes 20 s of one core
for name in ("zensical", "mkdocstrings", "latex2mathml", "nbconvert", "jupytext"):
    pytest.importorskip(name)


@pytest.fixture(scope="module")
def build() -> Iterator[ModuleType]:
    """The module docs/site/build.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs/site"))
        yield importlib.import_module("build")


@pytest.fixture(scope="module")
def built(build: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the site of this repository is built, once."""
    out = tmp_path_factory.mktemp("docs")
    assert build.build(out) == ""
    return out


def read_page(built: Path, page: str) -> str:
    return (built / "site" / page).read_text(encoding="utf-8")


def test_every_model_has_its_page_with_a_figure_and_its_settings(built: Path) -> None:
    families = {"priors": Prior, "heads": Head, "tokenizers": Tokenizer, "quantizers": Quantizer}
    for folder, family in families.items():
        for name in family.available():
            page = read_page(built, f"models/{folder}/{name}.html")
            assert family.find(name).__name__ in page and ('class="keys"' in page or "None." in page)
            assert '<figure class="drawn">' in page, name
            assert f'href="{name}.html"' in read_page(built, f"models/{folder}/index.html")


def test_every_command_has_its_page_with_an_example_and_its_keys(built: Path) -> None:
    for verb in verbs():
        page = read_page(built, f"commands/{verb}.html")
        assert f"smalti {verb}" in re.sub("<[^>]+>", "", page) and 'class="keys"' in page, verb
    assert "<code>pipeline</code>" in read_page(built, "commands/generate.html")


def test_methods_defined_elsewhere_and_formulas_are_rendered(built: Path) -> None:
    assert "ImagePipeline.complete" in read_page(built, "api/pipeline.html")
    assert "<math" in read_page(built, "docs/notebooks/1_chain_rule.html")


def test_every_notebook_says_what_one_will_see_and_can_be_downloaded(built: Path) -> None:
    sources = sorted((ROOT / "docs/notebooks").glob("[1-9]_*.py"))
    assert len(sources) == 5
    for source in sources:
        page = read_page(built, f"docs/notebooks/{source.stem}.html")
        link = re.search(rf'<a[^>]*href="{source.stem}.ipynb"[^>]*>', page)
        assert link is not None and f'download="{source.stem}.ipynb"' in link[0]
        notebook = nbformat.read(built / f"site/docs/notebooks/{source.stem}.ipynb", as_version=4)
        nbformat.validate(notebook)
        assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
            (cell.cell_type, cell.source) for cell in jupytext.read(source).cells
        ]
        assert "**You will see** " in notebook.cells[0].source and "You will see" in page
        assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.slow
def test_dead_links_end_the_build(build: ModuleType, built: Path) -> None:
    """Each of them is named. Builds in the folder of the fixture, so it restores the pages."""
    planted = {"[here](nowhere.md)": "nowhere.md", "[`Prior`][prior.base.NoSuchPrior]": "NoSuchPrior"}
    page = built / "pages/docs/guide.md"
    text = page.read_text(encoding="utf-8")
    try:
        page.write_text("\n\n".join([text, *planted]), encoding="utf-8")
        problems = build.run_zensical(built, ROOT)
        assert all(target in problems for target in planted.values())
    finally:
        page.write_text(text, encoding="utf-8")
        assert build.run_zensical(built, ROOT) == ""


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    """Where the site is served."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(built / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


def find_problems(chromium: Any, address: str, pages: list[str]) -> list[str]:
    """Errors, requests to other hosts, missing pictures and sideways scrolling, on a wide screen and on a phone."""
    problems: list[str] = []
    for width in WIDTHS:
        context = chromium.new_context(viewport={"width": width, "height": 900}, is_mobile=width < 500)
        tab = context.new_page()
        tab.on("console", lambda event: problems.append(event.text) if event.type == "error" else None)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda request: problems.append(request.url) if is_elsewhere(request.url, address) else None)
        for page in pages:
            tab.goto(address + page, wait_until="load")
            if (wide := tab.evaluate("document.documentElement.scrollWidth")) > width:
                problems.append(f"{page}: {wide} wide of {width}")
            if missing := tab.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"):
                problems.append(f"{page}: {missing}")
        context.close()
    return problems


def is_elsewhere(url: str, address: str) -> bool:
    return not url.startswith((address, "data:", "blob:"))


def test_a_browser_finds_no_problem_with_some_pages(chromium: Any, address: str) -> None:
    pages = ["index", "docs/results", "api/pipeline", "models/priors/gpt"]  # wide tables, signatures, and a figure
    assert find_problems(chromium, address, [f"{page}.html" for page in pages]) == []


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_search_works_without_a_network(chromium: Any, address: str, built: Path, scheme: str) -> None:
    tab = chromium.new_page()
    tab.goto(f"{address if scheme == 'http' else built.as_uri() + '/site/'}index.html")
    tab.keyboard.press("/")
    tab.keyboard.type("receptive field", delay=30)
    results = tab.wait_for_selector(r"text=/^\d+ results$/", timeout=20_000).inner_text()
    tab.close()
    assert int(results.split()[0]) >= 3
