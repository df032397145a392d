"""The site: everything has its page, dead links end the build, and a browser is content with what it finds."""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from servers.chromium import browser

from pipelines.__main__ import verbs
from prior import Prior
from prior.heads import Head
from tokenizer import Tokenizer
from tokenizer.quantizers import Quantizer

ROOT = Path(__file__).parents[2]
WIDTHS = (1400, 390)
PLANTED = {
    "guide.md": "[here](nowhere.md)",
    "data.md": "[there](guide.md#no-such-heading)",
    "scaling.md": "[`Prior`][prior.base.NoSuchPrior]",
}

pytestmark = pytest.mark.timeout(900)  # a build is 20 s of one core, which others may share
pytest.importorskip("zensical")
pytest.importorskip("mkdocstrings")
pytest.importorskip("latex2mathml")


@pytest.fixture(scope="module")
def site_module() -> Iterator[Any]:
    """A module of docs/site by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs/site"))

        def module(name: str) -> ModuleType:
            return importlib.import_module(name)

        yield module


@pytest.fixture(scope="module")
def built(site_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the site of this repository was built, once."""
    out = tmp_path_factory.mktemp("docs")
    assert site_module("build").build(out) == []
    return out


def text_of(built: Path, page: str) -> str:
    return (built / "site" / page).read_text(encoding="utf-8")


# What is there


def test_every_model_has_its_page_with_a_figure(built: Path) -> None:
    families = {"priors": Prior, "heads": Head, "tokenizers": Tokenizer, "quantizers": Quantizer}
    for folder, family in families.items():
        for name in family.available():
            page = text_of(built, f"models/{folder}/{name}.html")
            assert f"{family.find(name).__name__}" in page and 'class="keys"' in page or "None." in page
            assert '<figure class="drawn">' in page, name
            assert f'href="{name}.html"' in text_of(built, f"models/{folder}/index.html")


def test_every_verb_has_its_page_with_its_keys(built: Path) -> None:
    from pipelines.__main__ import main

    for verb in ("encode", "generate", "train_prior", "plan", "import"):
        assert verb in verbs()
        page = text_of(built, f"commands/{verb}.html")
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
            main([verb, "--help"])
        names = [line.split()[0] for line in printed.getvalue().splitlines() if line.startswith("  ") and line.split()]
        found = [name for name in names if f"<code>{name}</code>" in page]
        assert len(found) >= 3, verb
    assert all((built / "site/commands" / f"{verb}.html").is_file() for verb in verbs())


def test_a_page_without_a_place_is_told(site_module: Any, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(ROOT / "docs", root / "docs")
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, root)
    (root / "docs/stray.md").write_text("# Stray\n")
    with pytest.raises(SystemExit, match=r"docs/stray\.md: no place in the navigation"):
        site_module("staging").stage(tmp_path / "pages", root, tmp_path)


# What ends it


@pytest.mark.slow
def test_what_is_dead_ends_the_build(site_module: Any, built: Path, tmp_path: Path) -> None:
    """The pages that were fine are not with these in them, and each of them is named."""
    out = tmp_path / "out"
    shutil.copytree(built, out)
    for page, planted in PLANTED.items():
        with (out / "pages" / page).open("a", encoding="utf-8") as file:
            file.write(f"\n\n{planted}\n")
    found = "\n".join(site_module("build").write(out, ROOT))
    assert [page for page in PLANTED if page.removesuffix("md") not in found] == []
    assert all(said in found for said in ("nowhere.md", "#no-such-heading", "NoSuchPrior"))


# Links, formulas, docstrings


def test_links_of_the_repository_become_those_of_the_site(site_module: Any) -> None:
    rewrite = site_module("links").rewrite
    pages = {"README.md": "overview.md", "docs/guide.md": "guide.md", "docs/site/home.md": "index.md"}
    kept = "[b](guide.md) `[c](../README.md)` [d](#here) [e](https://x.y/README.md) [f](no.md)"
    said, there = f"[a](../README.md#the-models) {kept}", f"[a](overview.md#the-models) {kept}"
    assert rewrite(said, "docs/data.md", "data.md", pages.get) == there
    assert rewrite("[`x`](docs/guide.md#y)", "README.md", "overview.md", pages.get) == "[`x`](guide.md#y)"
    assert rewrite(
        "[docs/guide.md](docs/guide.md#y)", "README.md", "overview.md", pages.get, {"guide.md": "A day"}
    ) == ("[A day](guide.md#y)")
    assert rewrite("[g](../guide.md)", "docs/site/home.md", "index.md", pages.get) == "[g](guide.md)"
    assert rewrite("[g](../guide.md)", "docs/notebooks/1.py", "notebooks/1.md", pages.get) == "[g](../guide.md)"
    fenced = "```text\n[a](README.md)\n```\n"
    assert rewrite(fenced, "README.md", "overview.md", pages.get) == fenced


# Notebooks


# A browser


@pytest.fixture(scope="module")
def address(site_module: Any, built: Path) -> Iterator[str]:
    """Where the site is served."""
    with site_module("build").server_of(built / "site", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as started:
        yield started


def look(chromium: Any, address: str, pages: list[str]) -> list[str]:
    """What a reader would see to be wrong with pages, wide and on a phone."""
    wrong: list[str] = []
    for width in WIDTHS:
        context = chromium.new_context(viewport={"width": width, "height": 900}, is_mobile=width < 500)
        tab = context.new_page()
        listen(tab, address, wrong)
        for page in pages:
            tab.goto(address + page, wait_until="load")
            if (wide := tab.evaluate("document.documentElement.scrollWidth")) > width:
                wrong.append(f"{page}: {wide} wide of {width}")
            if missing := tab.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"):
                wrong.append(f"{page}: {missing}")
        context.close()
    return wrong


def listen(tab: Any, address: str, wrong: list[str]) -> None:
    """Add to `wrong` what a page says to be wrong, and what it asks others for."""
    tab.on("console", lambda said: wrong.append(f"{tab.url}: {said.text}") if said.type == "error" else None)
    tab.on("pageerror", lambda error: wrong.append(f"{tab.url}: {error}"))
    tab.on("request", lambda asked: None if is_near(asked.url, address) else wrong.append(f"asks for {asked.url}"))


def is_near(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def test_a_browser_is_content_with_some_pages(chromium: Any, address: str) -> None:
    pages = ["results", "api/pipeline", "models/priors/gpt"]  # the widest tables, signatures, and a figure
    assert look(chromium, address, [f"{page}.html" for page in pages]) == []


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_search_finds_without_a_network(chromium: Any, address: str, built: Path, scheme: str) -> None:
    tab = chromium.new_page()
    tab.goto(f"{address if scheme == 'http' else built.as_uri() + '/site/'}index.html")
    tab.keyboard.press("/")
    tab.keyboard.type("receptive field", delay=30)
    found = tab.wait_for_selector(r"text=/^\d+ results$/", timeout=20_000).inner_text()
    tab.close()
    assert int(found.split()[0]) >= 3
