"""The site: everything has its page, dead links end the build, and a browser is content with what it finds."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from servers.chromium import browser

from pipelines.__main__ import verbs
from prior import Prior
from prior.heads import Head
from prior.marginal import Marginal
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


def test_every_prior_draws_what_it_sees(built: Path) -> None:
    """In raster order 40 of 81 cells lie before the middle. Frequencies see none of them, and some have a blind spot, a
    reach, or coarser scales in their place."""
    for name in Prior.available():
        cells = text_of(built, f"models/priors/{name}.html").split('class="cells"')[1].split("</svg>")[0]
        seen = cells.count("<rect") - cells.count('fill-opacity="0.00"') - cells.count('class="target"')
        assert cells.count('class="target"') == 1, name
        after = cells.split('class="target"')[1]
        assert after.count("<rect") == after.count('fill-opacity="0.00"') >= 40, name
        assert seen <= 40 and (seen > 0) == (name != "marginal"), name
        assert (seen == 40) == (name not in ("marginal", "pixelcnn", "causal_conv", "next_scale")), name


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


def test_methods_that_are_functions_show_their_signatures(built: Path) -> None:
    page = text_of(built, "api/pipeline.html")
    parts = {part.split('"')[0]: part for part in page.split('id="pipelines.image_pipeline.ImagePipeline.')[1:]}
    for name, words in {
        "__call__": ("num_images", "output_type", "Sample images"),
        "complete": ("known", "draws", "Draw what"),
        "anomaly_score": ("method", "labels"),
        "embed": ("images", "pool"),
        "from_pretrained": ("revision", "verify"),
    }.items():
        assert all(word in parts[name] for word in words), name
        assert "pipe:" not in parts[name].split("</code>")[0]


def test_errors_and_presets_are_listed(built: Path) -> None:
    errors = text_of(built, "api/errors.html")
    for name in ("PathError", "WeightsError", "StreamError", "UserError", "CalibrationError"):
        assert f"{name}</code>" in errors
    presets = text_of(built, "commands/presets_of_models.html")
    assert all(path.stem in presets for path in (ROOT / "configs/prior").glob("*.yaml"))


def test_a_new_model_appears_by_itself(site_module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prior, "_members", dict(Prior._members))
    monkeypatch.setattr(Marginal, "name", Marginal.name)
    kind = type("Newcomer", (Marginal,), {"Config": type("NewcomerConfig", (Marginal.Config,), {})}, name="newcomer")
    kind.__module__ = __name__
    families = site_module("families")
    assert "(newcomer.md)" in families.index(Prior, "Priors", "")
    page = families.page(Prior, "newcomer", ["newcomer_digits"])
    assert f"::: {__name__}.Newcomer" in page and "newcomer_digits" in page and "<svg" in page


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


def test_code_spans_lead_to_the_reference(site_module: Any) -> None:
    refer = site_module("links").refer
    names = {"Prior": "prior.base.Prior", "Prior.sample": "prior.base.Prior.sample"}
    assert refer("`Prior.sample()` of `other`", names) == "[`Prior.sample()`][prior.base.Prior.sample] of `other`"
    for kept in ("# `Prior`", "[`Prior`](x.md)", "[`Prior`][x]", "```python\n`Prior`\n```", "``a `Prior` b``"):
        assert refer(kept, names) == kept


def test_formulas_become_mathml_and_dollars_of_shells_do_not(site_module: Any) -> None:
    typeset = site_module("formulas").typeset
    found = typeset(r"so $p(x_i \mid x_{<i})$ and $$\prod_i p_i$$ end")
    assert found.count("<math") == 2 and 'display="block"' in found and "$" not in found and "_" not in found
    assert "\n<math" not in typeset("a line, and\n$p$ begins another")  # Markdown would make it a paragraph
    for kept in ("costs $5 and $6", "`$x$` of a shell", '```sh\necho "$HOME $PATH"\n```', r"\$x$"):
        assert typeset(kept) == kept


def test_arguments_in_prose_become_a_list(site_module: Any) -> None:
    tidy = site_module("docstrings").tidy
    text = "Draws.\n\ntokens, known: where `known` holds. seed: any; of a * b. other: none. Raises `ValueError`: no."
    assert tidy(text, {"tokens", "known", "seed"}) == (
        "Draws.\n\n- `tokens, known`: where `known` holds.\n- `seed`: any; of a \\* b. other: none.\n\n"
        "Raises `ValueError`: no."
    )
    formula = "A product.\n\n    p(a * b) = prod_i p_i"
    assert tidy(formula, set()) == formula
    assert "](https://arxiv.org/abs/1606.05328)" in tidy("van den Oord et al. 2016 (arXiv 1606.05328).", set())


# Notebooks

SCRIPT = """# ---
# jupyter: {}
# ---

# %% [markdown]
# # A title
#
# See [the guide](../guide.md).

# %%
print(1)
"""


def notebook() -> str:
    """As nbclient leaves it: text, a stream, a picture, an error output of a progress bar."""
    file = io.BytesIO()
    Image.new("L", (2, 2)).save(file, "PNG")
    import base64

    outputs: list[dict[str, Any]] = [
        {"output_type": "stream", "name": "stdout", "text": ["\x1b[31m1\x1b[0m\n"]},
        {"output_type": "stream", "name": "stderr", "text": ["50%\r100%"]},
        {"output_type": "display_data", "data": {"image/png": base64.b64encode(file.getvalue()).decode()}},
        {"output_type": "execute_result", "data": {"text/plain": ["`quoted`"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# A title\n", "\n", "Text."]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": outputs},
    ]
    return json.dumps({"cells": cells})


def test_notebooks_show_their_outputs_where_they_have_run(site_module: Any, tmp_path: Path) -> None:
    root, pages, executed = tmp_path / "root", tmp_path / "pages", tmp_path / "executed"
    stage = site_module("notebook_pages").stage
    assert stage(pages, root, executed, {}) == []
    (root / "docs/notebooks").mkdir(parents=True)
    (root / "docs/notebooks/1_one.py").write_text(SCRIPT)
    (root / "docs/notebooks/execute.py").write_text("raise SystemExit\n")
    texts: dict[str, str] = {}
    assert stage(pages, root, executed, texts) == [{"A title": "notebooks/1_one.md"}]
    bare = texts["notebooks/1_one.md"]
    assert bare.startswith("# A title\n\n!!! note") and "```python\nprint(1)\n```" in bare and "jupyter" not in bare

    executed.mkdir()
    (executed / "1_one.ipynb").write_text(notebook())
    stage(pages, root, executed, texts)
    ran = texts["notebooks/1_one.md"]
    assert "!!! note" not in ran and "100%" not in ran and "\x1b" not in ran
    assert "{ .text .output }\n1\n```" in ran and "````" not in ran and "`quoted`" in ran
    (picture,) = pages.rglob("*.png")
    assert f"]({picture.name})" in ran and Image.open(picture).size == (2, 2)


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


def test_it_is_served_to_this_machine(address: str) -> None:
    with urllib.request.urlopen(f"{address}index.html") as answer:
        assert b"Smalti" in answer.read()
    assert address.startswith("http://127.0.0.1:")


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


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_browser_is_content_with_every_page(chromium: Any, address: str, built: Path) -> None:
    pages = sorted(path.relative_to(built / "site").as_posix() for path in (built / "site").rglob("*.html"))
    assert len(pages) > 70
    assert look(chromium, address, [page for page in pages if page != "404.html"]) == []


def test_a_browser_would_say_so(chromium: Any, address: str, built: Path) -> None:
    wrong = (
        '<body style="margin:0"><div style="width:2000px">x</div><img src="none.png">'
        '<script>console.error("planted")</script><img src="http://127.0.0.2:9/x.png"></body>'
    )
    (built / "site/planted.html").write_text(wrong)
    found = "\n".join(look(chromium, address, ["planted.html"]))
    (built / "site/planted.html").unlink()
    assert all(said in found for said in ("2000 wide of 390", "none.png", "planted", "asks for http://127.0.0.2"))


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_search_finds_without_a_network(chromium: Any, address: str, built: Path, scheme: str) -> None:
    tab = chromium.new_page()
    tab.goto(f"{address if scheme == 'http' else built.as_uri() + '/site/'}index.html")
    tab.keyboard.press("/")
    tab.keyboard.type("receptive field", delay=30)
    found = tab.wait_for_selector(r"text=/^\d+ results$/", timeout=20_000).inner_text()
    tab.close()
    assert int(found.split()[0]) >= 3
