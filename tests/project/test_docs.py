"""The site: everything has its page, dead links end the build, and search works in a browser."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from optional import Late
from servers.chromium import browser

from pipelines.__main__ import verbs
from prior import Prior
from prior.heads import Head
from tokenizer import Tokenizer
from tokenizer.quantizers import Quantizer

ROOT = Path(__file__).parents[2]
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


def test_every_notebook_is_rendered_and_can_be_downloaded(built: Path) -> None:
    sources = sorted((ROOT / "docs/notebooks").glob("[1-9]_*.py"))
    assert len(sources) == 5
    for source in sources:
        page = read_page(built, f"docs/notebooks/{source.stem}.html")
        assert f'download="{source.stem}.ipynb"' in page
        notebook = nbformat.read(built / f"site/docs/notebooks/{source.stem}.ipynb", as_version=4)
        nbformat.validate(notebook)
        assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
            (cell.cell_type, cell.source) for cell in jupytext.read(source).cells
        ]
        assert "You will see" in page and "<math" in read_page(built, "docs/notebooks/1_chain_rule.html")


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


def test_search_works_without_a_network(built: Path) -> None:
    with browser() as chromium:
        asked: list[str] = []
        tab = chromium.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"{built.as_uri()}/site/index.html")
        tab.keyboard.press("/")
        tab.keyboard.type("receptive field", delay=30)
        results = tab.wait_for_selector(r"text=/^\d+ results$/", timeout=20_000).inner_text()
    assert int(results.split()[0]) >= 3 and not [url for url in asked if url.startswith("http")]
