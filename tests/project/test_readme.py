"""The code of the pages runs, and their commands, settings, files and links exist."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from givens.token_datasets import make_split
from PIL import Image
from small import make_prior, make_tokenizer
from small_pipelines import make_conditioned

from pipelines import ImagePipeline
from pipelines.__main__ import OTHER, main, verbs
from pipelines.tokens import TokenDataset
from pipelines.tokens.meta import label_column
from prior import Prior
from tokenizer import TokenGrid, Tokenizer
from tokenizer.checks import check_quantizer
from tokenizer.frame_by_frame import FrameByFrame
from tokenizer.quantizers import Quantizer

ROOT = Path(__file__).parents[2]
STEPS = ("train_tokenizer", "encode", "train_prior", "generate", "evaluate")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
        *sorted((ROOT / "docs").glob("*.md")),
        ROOT / "docs/site/home.md",
    ]
}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
every_page = pytest.mark.parametrize("page", PAGES)

# The columns of docs/conditions.md.
FACES: dict[str, Any] = {
    "age": {"kind": "number", "mean": [45.0], "std": [20.0], "low": [18.0], "high": [90.0]},
    "view": {"kind": "class", "names": ["frontal", "profile"]},
    "tags": {"kind": "flags", "names": ["beard", "glasses"]},
    "caption": {"kind": "vector", "size": 256, "encoder": "ngrams:256"},
}

# The examples of docs/extending.md: file and family.
EXAMPLES: dict[str, Any] = {
    "prior/unigram.py": Prior,
    "tokenizer/quantizers/frozen.py": Quantizer,
    "tokenizer/quantizers/priced.py": Quantizer,
    "tokenizer/mosaic.py": Tokenizer,
}


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return [code for kind, code in FENCE.findall(PAGES[page]) if kind == language]


@cache
def prose(page: str) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", PAGES[page])


@cache
def spans(page: str) -> list[str]:
    """The inline code of a page."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def is_whole(command: str) -> bool:
    """Whether a command has no placeholders, such as VERB or `...`."""
    return not re.search(r"\.\.\.|\b[A-Z]{3,}\b", command)


# Code


def compiled(code: str, name: str) -> CodeType:
    """Compile without the `__future__` imports of this file."""
    return compile(code, name, "exec", dont_inherit=True)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the untrained pipelines and the token dataset that the pages use."""
    tokenizer = make_tokenizer("vqvae", (28, 28), 1, quantizer={"kind": "fsq", "levels": (4, 4, 4)})
    for name in ("gpt", "gpt_any_order"):
        prior = make_prior("gpt", shape=(7, 7), vocab_size=64, num_classes=10, any_order=name == "gpt_any_order")
        pipeline = ImagePipeline(tokenizer, prior, labels=[str(digit) for digit in range(10)])
        pipeline.save_pretrained(tmp_path / f"runs/{name}_digits/pipeline")
    pixels = make_tokenizer("pixels", (28, 28), 1)
    prior = make_prior("causal_conv", grid=pixels.grid, num_classes=10, tokenizer=pixels.fingerprint())
    ImagePipeline(pixels, prior).save_pretrained(tmp_path / "runs/pixelcnn_pp_fashion_8bit/pipeline")
    columns = label_column(["zero"])
    split = make_split(torch.zeros(4, 7, 7, dtype=torch.uint8), columns, label=torch.zeros(4, dtype=torch.int64))
    dataset = TokenDataset(tokenizer.grid, columns, {"train": split}, tokenizer, {})
    dataset.save(tmp_path / "runs/digits_tokens")
    clips = FrameByFrame.wrap(make_tokenizer("vqvae", (8, 8), 1).eval(), 4)
    prior = make_prior("gpt", grid=clips.grid, num_classes=0, tokenizer=clips.fingerprint())
    ImagePipeline(clips, prior).save_pretrained(tmp_path / "runs/clips/pipeline")
    parts = make_tokenizer("vqvae", (64, 64), 3, factor=16, local=True).eval()
    prior = make_prior("masked", grid=parts.grid, num_classes=2, tokenizer=parts.fingerprint())
    ImagePipeline(parts, prior, labels=["wall", "floor"]).save_pretrained(tmp_path / "runs/parts_masked/pipeline")
    for name in ("photo.png", "spot.png"):
        Image.linear_gradient("L").resize((128, 128)).convert("RGB").save(tmp_path / name)
    make_conditioned(columns=FACES).save_pretrained(tmp_path / "runs/faces_gpt/pipeline")
    (tmp_path / "outlines").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "outlines/0001.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != "docs/extending.md"])
def test_the_code_of_a_page_runs(page, runs):
    """All blocks of a page run in order, in one namespace. The first of loop.md has a test of its own."""
    names: dict[str, Any] = {}
    for code in blocks(page, "python")[page == "docs/loop.md" :]:
        exec(compiled(code, page), names)


def test_thirty_lines_train_both_stages_without_the_pipelines():
    """Samples are what the classes ask for: bars that lie or stand."""
    (code, *_) = blocks("docs/loop.md", "python")
    assert len([line for line in code.splitlines() if line]) <= 30
    assert set(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)) == {"torch", "prior", "tokenizer"}
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compiled(code, "docs/loop.md"), names)
    assert float(names["terms"]["l2"].detach()) < 0.1 and float(names["loss"].detach()) < 0.3
    lying, standing = names["samples"].detach()[:, 0].split(2)  # uniform along rows, and along columns
    assert lying.std(2).mean() < 0.2 < 0.6 < lying.std(1).mean()
    assert standing.std(1).mean() < 0.2 < 0.6 < standing.std(2).mean()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the models of docs/extending.md."""
    for (path, family), code in zip(EXAMPLES.items(), blocks("docs/extending.md", "python"), strict=True):
        monkeypatch.setattr(family, "_members", dict(family._members))
        exec(compiled(code, path), {"__name__": path.removesuffix(".py").replace("/", ".")})


def test_the_example_prior_sums_to_one_and_samples(registered):
    model = Prior.create("unigram", grid=TokenGrid((1, 2), 3))
    grids = torch.cartesian_prod(torch.arange(3), torch.arange(3)).reshape(-1, 1, 2)
    assert float(model.log_prob(grids).detach().exp().sum()) == pytest.approx(1, abs=1e-6)
    assert model.sample(4).shape == (4, 1, 2)


def test_the_example_quantizers_keep_their_promises(registered):
    for name in ("frozen", "priced"):
        assert not any(dict(check_quantizer(Quantizer.create(name, codes=16, dim=4))).values())


def test_the_example_tokenizer_decodes_what_it_encodes(registered):
    model = Tokenizer.create("mosaic", image_size=(8, 12), channels=3)
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    output = model(images)
    assert output.tokens.shape == (2, 2, 3) and torch.equal(model.encode(images), output.tokens)
    assert output.images.shape == images.shape and torch.equal(model.decode(output.tokens), output.images)


# Commands


def commands(page: str) -> list[str]:
    """The lines of the page's shell blocks, without comments."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", "").splitlines()]
    return [line.partition(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = sorted({command for page in PAGES for command in commands(page)})
INLINE = sorted({span for page in PAGES for span in spans(page) if re.match("(smalti|make|pytest) ", span)})


def check_words(words: list[str]) -> None:
    """Check a command other than `smalti` or `accelerate`."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "python":
        script, options = (words[1], words[2:]) if words[1] != "-m" else (f"{words[2].replace('.', '/')}.py", words[3:])
        path = ROOT / script
        if not path.parent.exists():  # in a folder that an earlier command writes
            return
        assert path.is_file()
        text = path.read_text(encoding="utf-8")
        for option in options:
            assert re.search(rf"\b{option.partition('=')[0]}\b", text), f"{script} has no option {option}"
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word)
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(\w+)\]", " ".join(words))) <= set(extras)


def verb_of(words: list[str]) -> tuple[str, list[str]]:
    """The verb and arguments of a `smalti` or `accelerate launch` command; checks the launcher's options."""
    if words[0] == "smalti":
        return words[1], words[2:]
    from accelerate.commands.launch import launch_command_parser

    at = words.index("-m")
    options = launch_command_parser().parse_args(words[2 : at + 2])
    assert options.config_file is None or Path(options.config_file).is_file()
    package, _, step = words[at + 1].partition(".")
    assert package == "pipelines" and step in STEPS
    return step, words[at + 2 :]


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the files that pages load with `--import`; what they register is undone afterwards."""
    (tmp_path / "my_prior.py").write_text(blocks("docs/extending.md", "python")[0])
    (tmp_path / "my_text.py").write_text("def embed(texts): ...")
    monkeypatch.setattr(Prior, "_members", dict(Prior._members))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("pipelines.config.importing.IMPORTED", [])
    yield tmp_path
    for name in ("my_prior", "my_text"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_valid(command, monkeypatch, capsys, outside):
    """Verbs, keys, values, files and launch options exist."""
    monkeypatch.chdir(ROOT)
    command = command.replace("--import my_", f"--import {outside}/my_")
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if words[0] not in ("smalti", "accelerate"):
        check_words(words)
        return
    verb, arguments = verb_of(words)
    with pytest.raises(SystemExit) as ended:
        main([verb, *arguments, "--dry-run"])
    assert not ended.value.code, capsys.readouterr().err


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    """The full help of each verb, which lists all of its keys."""
    found = {}
    for verb in verbs():
        with contextlib.redirect_stdout(io.StringIO()) as page, pytest.raises(SystemExit):
            main([verb, "--help", "all"])
        found[verb] = page.getvalue()
    return found


def is_key(key: str, page: str) -> bool:
    """Whether a help page lists `key` or keys below it."""
    return re.search(rf"^  {re.escape(key)}(\.| |$)", page, re.MULTILINE) is not None


@pytest.mark.parametrize("command", INLINE)
def test_every_command_in_a_sentence_exists(command, keys):
    """It may leave out required keys."""
    words = shlex.split(command)
    if words[0] != "smalti":
        check_words([word for word in words if is_whole(word)])
    elif words[1] != "VERB" and not words[1].startswith("-"):
        assert words[1] in verbs() or words[1] in OTHER
        options = [word for word in words[2:] if words[1] in verbs()]
        while options:
            argument = options.pop(0)
            key = argument.partition("=")[0]
            if argument in ("--help", "--import", "--config") and options:
                options.pop(0)  # its value
            assert argument == "..." or key.startswith("--") or is_key(key, keys[words[1]]), argument


def test_every_setting_in_a_sentence_exists(keys):
    """Such as `train.steps` or `data.source=folder`, in any verb."""
    setting = re.compile(r"((?:train|data|track|model|critic|loss)\.(?!safetensors|fp16|bf16)[a-z_.0-9]+)(=.*)?")
    words = {(page, word) for page in PAGES for span in spans(page) for word in span.split()}
    named = {(page, found[1]) for page, word in words if (found := setting.fullmatch(word))}
    assert len(named) >= 40
    for page, name in named:
        assert any(is_key(name, help_page) for help_page in keys.values()), f"{page}: {name}"


# Files, modules, links


def anchors(page: str) -> set[str]:
    """The anchors that GitHub generates for headings."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_links_are_not_dead(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for target in targets:
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.is_file(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(there.resolve().relative_to(ROOT.resolve()).as_posix()), f"{page}: {target}"
