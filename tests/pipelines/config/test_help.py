"""The help pages: one that fits a screen, every key, those of a section; and that verbs say what is so.

Covers: pipelines/config/keys.py, pipelines/config/terminal.py, pipelines/config/table.py.
"""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
from optional import needs_digits

from pipelines.__main__ import configs_of, load, main, verbs
from pipelines.config import terminal
from pipelines.config.keys import sections
from pipelines.config.table import row_lines

ROOT = Path(__file__).parents[3]
VERBS = sorted(verbs())
PAGES = [[], ["all"], ["data"], ["train"], ["model"]]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "RANK", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def printed(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> tuple[str, str]:
    """What a command prints on stdout and stderr before it ends with this code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == code
    return capsys.readouterr()


def keys_of(page: str) -> list[str]:
    """The keys that have a row of their own."""
    return re.findall(r"^  ([a-z_]+(?:\.[a-z_]+)*) +\S", page.partition("\nmore\n")[0].partition("  key ")[2], re.M)


# What is said is so


@pytest.mark.parametrize("verb", VERBS)
def test_keys_that_help_names_first_exist(verb: str) -> None:
    for cls in configs_of(load(verb)):
        there = {row.key for section in sections(cls, {}) for row in section.rows}
        often = cls.often.split()
        assert set(often) <= there, set(often) - there
        assert len(set(often)) == len(often) <= 12


@needs_digits
@pytest.mark.parametrize("verb", VERBS)
def test_examples_are_understood(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    examples = {example for cls in configs_of(load(verb)) for example in cls.examples}
    assert examples
    for example in examples:
        words = [word for word in shlex.split(example) if word not in ("--import", "my_prior.py")]  # a user's own file
        assert not printed(capsys, verb, *words, "--dry-run")[1]


@pytest.mark.parametrize("verb", VERBS)
def test_examples_can_be_pasted(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """However narrow the terminal, what is printed is the command: lines are joined as a shell does."""
    monkeypatch.setenv("COLUMNS", "50")
    page = printed(capsys, verb, "--help")[0]
    block = textwrap.dedent(re.search(r"^examples?\n((?:  .*\n)+)", page, re.M)[1])  # type: ignore[index]
    found = [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]
    (cls, *_) = configs_of(load(verb))
    assert found == [["smalti", verb, *shlex.split(example)] for example in cls.examples]


@pytest.mark.parametrize("verb", VERBS)
def test_the_short_page_fits_a_screen(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    page = printed(capsys, verb, "--help")[0]
    assert len(page.splitlines()) <= 45 and page.startswith(f"usage: smalti {verb} ")
    assert "--help WHAT" in page or len(keys_of(page)) <= 12


# Widths


@pytest.mark.parametrize("columns", [60, 80, 100, 120])
@pytest.mark.parametrize("verb", ["train_tokenizer", "encode", "plan", "presets"])
def test_pages_are_as_wide_as_the_terminal_and_words_stay_whole(
    verb: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = {}
    for width in (columns, 110):
        monkeypatch.setenv("COLUMNS", str(width))
        pages[width] = [printed(capsys, verb, "--help", *topic)[0] for topic in ([], ["all"])]
    for page, other in zip(pages[columns], pages[110], strict=True):
        assert max(map(len, page.splitlines())) <= columns
        assert set(page.split()) - {"\\"} == set(other.split()) - {"\\"}


def test_the_width_has_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, wide in ("1", 40), ("77", 77), ("999", 120), ("", 100):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr(terminal.os, "get_terminal_size", lambda _: os.terminal_size((0, 0)))
        assert terminal.width() == wide


def test_a_word_that_is_too_wide_moves_the_sentence_down() -> None:
    assert row_lines(("key", "a-very-long-default", "what it is " * 3), (5, 8, 40)) == [
        "  key    a-very-long-default",
        "                   what it is what it is what it is",
    ]
    assert row_lines(("key", "type", "what it is"), (5, 8, 20))[1] == "      what it is"  # no room beside it


# Kinds, presets, sections


def test_only_the_keys_of_the_kind_that_is_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "train_tokenizer", "model.kind=vit", "--help", "all")[0]
    assert "model.registers" not in page and "model.heads" in page and "model.kind=vqvae" not in page
    short = printed(capsys, "train_tokenizer", "model.kind=vit", "--help")[0]
    assert re.search(r"^  model.kind +kind +vit ", short, re.M) and "model.heads" in keys_of(short)
    assert "model.heads" not in keys_of(printed(capsys, "train_tokenizer", "--help")[0])
    every = printed(capsys, "train_tokenizer", "--help", "all")[0]
    assert {"model.registers", "model.heads", "model.colors"} <= set(keys_of(every))


def test_a_preset_gives_its_defaults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = printed(capsys, "train_prior", "--config", "gpt_digits", "train.lr=0.5", "--help")[0]
    for row in [
        r"out +text +runs/gpt_digits",
        r"train.minutes +\S.* 2$",
        r"train.lr +\S.* 0.5$",
        r"model.dim +\S.* 64$",
    ]:
        assert re.search(rf"^  {row}", page, re.M), row


@pytest.mark.parametrize("argv", [["train_prior", "--help"], ["help", "train_prior"], ["train-prior", "help"]])
def test_ways_to_ask_for_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, *argv)[0].startswith("usage: smalti train_prior")
    page = printed(capsys, *argv, "sampler")[0]
    assert set(keys_of(page)) == {f"sampler.{name}" for name in SAMPLER} and "sampler: default" in page
    assert keys_of(printed(capsys, *argv, "train.lr")[0]) == ["train.lr"]


SAMPLER = ("temperature", "top_k", "top_p", "guidance_scale", "guidance_end", "guidance_power", "steps")


def test_a_node_within_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "train_tokenizer", "model.quantizer.kind=fsq", "--help", "model.quantizer")[0]
    assert keys_of(page) == ["model.quantizer.levels"] and "[8, 8, 8]" in page
    page = printed(capsys, "train_tokenizer", "--help", "model")[0]
    assert {"model.kind", "model.factor", "model.quantizer.kind", "model.quantizer.codes"} <= set(keys_of(page))


@pytest.mark.parametrize(
    ("topic", "hint"),
    [
        ("trian", "did you mean 'train'?"),
        ("quantizer", "did you mean 'model.quantizer' or 'loss.quantizer'?"),
        ("lr", "did you mean 'train.lr' or 'critic.lr'?"),
        ("vit", "did you mean 'model.kind=vit --help model'?"),
        ("zzzz", "there are data, data.augment, model, model.quantizer, loss, critic, train, track, all"),
    ],
)
def test_an_unknown_section(topic: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "train_tokenizer", "--help", topic, code=2)
    assert found == ("", f"error: --help {topic}: no such section or key of train_tokenizer; {hint}\n")


def test_help_says_what_is_wrong_with_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    page, warnings = printed(capsys, "train_prior", "model.kind=unigram", "train.lrr=1", "nonsense", "--help")
    assert page.startswith("usage:") and len(warnings.splitlines()) == 3
    assert "no Prior is called 'unigram'" in warnings and "did you mean 'train.lr'?" in warnings
    assert not printed(capsys, "train_prior", "--help")[1]  # what is missing is not wrong yet


def test_defaults_that_a_model_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Until it is named they are called its own, and then they are shown."""
    page = printed(capsys, "encode", "--help", "data")[0]
    assert re.search(r"^  data.image_size +\S.* tokenizer's ", page, re.M)
    assert re.search(r"^  data.augment.flip +\S.* tokenizer's ", page, re.M)
    (tmp_path / "provenance.json").write_text('{"data": {"image_size": 64, "channels": 3}}')
    page = printed(capsys, "encode", f"tokenizer={tmp_path}", "--help", "data")[0]
    assert re.search(r"^  data.image_size +\S.* 64 ", page, re.M) and "tokenizer's" not in page
    page = printed(capsys, "complete", "data.image_size=32", "--help", "data")[0]
    assert re.search(r"^  data.image_size +\S.* 32 ", page, re.M)
    assert re.search(r"^  data.channels +\S.* pipeline's ", page, re.M)
    assert "tokenizer's" not in printed(capsys, "train_tokenizer", "--help", "data")[0]


# Colours


@pytest.mark.parametrize(
    ("environment", "terminal_there", "colored"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
    ],
)
def test_colors_are_for_terminals(
    environment: dict[str, str],
    terminal_there: bool,
    colored: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: terminal_there)
    page: Any = printed(capsys, "verify", "--help")[0]
    assert page.startswith("\033[1musage:\033[0m smalti" if colored else "usage: smalti")
    line = printed(capsys, "verify", "folder=1", code=2)[1]
    assert line.startswith("\033[1;31merror:\033[0m folder" if colored else "error: folder")


# Long lines


@pytest.mark.parametrize(
    ("columns", "there", "parted"), [("40", True, True), ("40", False, False), ("99", True, False)]
)
def test_a_long_line_is_parted_at_its_semicolons_in_a_terminal(
    columns: str, there: bool, parted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", type("Out", (), {"isatty": lambda self: there})())
    line = "runs/mine: done: 12 steps; next: smalti encode tokenizer=runs/mine"
    assert terminal.by_clause(line) == (line.replace("; ", "\n  ") if parted else line)


def test_an_error_in_a_narrow_terminal_is_cut_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("NO_COLOR", "1")
    text = "runs/a-folder: not a token dataset (no meta.json); did you mean runs/another-folder_tokens?"
    for there in (True, False):
        monkeypatch.setattr("sys.stderr", type("Err", (), {"isatty": lambda self, there=there: there})())
        lines = terminal.error_line("error:", text).splitlines()
        assert " ".join(line.strip() for line in lines) == f"error: {text}" and (len(lines) > 1) == there
        assert not there or max(map(len, lines)) <= 60
