"""The help pages: common keys, all keys, one section; and that they tell the truth."""

from __future__ import annotations

import re
import shlex
import textwrap

import pytest

from pipelines.__main__ import OTHER, load_verb, main, verbs
from pipelines.config import Config
from pipelines.config.help import list_sections

VERBS = sorted(verbs())
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("COLUMNS", "300")  # pages are at most 100 wide anyway


def printed(capsys: Captured, *argv: str, code: int = 0) -> tuple[str, str]:
    """The stdout and stderr of a command that exits with this code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert ended.value.code == code
    return capsys.readouterr()


def keys_of(page: str) -> list[str]:
    """The keys that have a row."""
    table = re.split(r"\nmore\n", page.partition("  key ")[2])[0]
    return re.findall(r"^  ([a-z_0-9]+(?:\.(?:[a-z_0-9]+|NAME))*) +\S", table, re.M)


def configs_of(verb: str) -> list[type[Config]]:
    """The configurations that a verb's module defines."""
    if verb == "plan":  # without a model kind, of a prior
        return [load_verb(verb).PlanPriorConfig]
    found = [cls for cls in vars(load_verb(verb)).values() if isinstance(cls, type) and issubclass(cls, Config)]
    return [cls for cls in found if cls.__module__ == load_verb(verb).__name__ and cls.examples]


@pytest.mark.parametrize("verb", VERBS)
def test_the_short_page_fits_a_screen_and_its_examples_can_be_pasted(verb: str, capsys: Captured) -> None:
    page = printed(capsys, verb, "--help")[0]
    assert page.startswith(f"usage: smalti {verb} ") and len(page.splitlines()) <= 45
    assert max(map(len, page.splitlines())) <= 100
    assert "--help WHAT" in page or len(keys_of(page)) <= 12
    block = textwrap.dedent(re.search(r"^examples\n((?:  .*\n)+)", page, re.M)[1])  # type: ignore[index]
    found = [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]
    assert found == [["smalti", verb, *shlex.split(example)] for example in configs_of(verb)[0].examples]
    assert not re.search(r"[\[\]*?]", block), "zsh would expand it as a pattern"


@pytest.mark.parametrize("verb", VERBS)
def test_the_page_of_all_has_every_key_with_a_sentence(verb: str, capsys: Captured) -> None:
    page = printed(capsys, verb, "--help", "all")[0]
    rows = [row for section in list_sections(configs_of(verb)[0], {}) for row in section.rows]
    assert {row.key for row in rows} == {*keys_of(page)} and all(row.sentence for row in rows)
    assert max(map(len, page.splitlines())) <= 100
    for row in rows:
        assert " ".join(row.sentence.split())[:15] in " ".join(page.split()), row.key
    often = configs_of(verb)[0].often.split()
    assert {*often} <= {row.key for row in rows} and len({*often}) == len(often)


def test_the_page_follows_the_rest_of_the_command_line(capsys: Captured) -> None:
    page = printed(capsys, "train_tokenizer", "model.kind=vit", "--help", "all")[0]
    assert "model.registers" not in page and "model.heads" in page and "model.kind=vqvae" not in page
    page = printed(capsys, "train_prior", "--config", "gpt_digits", "train.lr=0.5", "--help")[0]
    for row in [r"out +text +runs/gpt_digits ", r"train.lr +\S.* 0.5 "]:
        assert re.search(rf"^  {row}", page, re.M), row
    page, warnings = printed(capsys, "train_prior", "model.kind=unigram", "train.lrr=1", "nonsense", "--help")
    keys = [line.split(":")[1].strip() for line in warnings.splitlines()]
    assert page.startswith("usage:") and sorted(keys) == ["model.kind", "nonsense", "train.lrr"]
    assert not printed(capsys, "train_prior", "--help")[1]  # a missing key is not an error yet


def test_ways_to_ask_for_help(capsys: Captured) -> None:
    for argv in (["train_prior", "--help"], ["help", "train_prior"], ["train-prior", "-h"]):
        assert printed(capsys, *argv)[0].startswith("usage: smalti train_prior")
        assert keys_of(printed(capsys, *argv, "train.lr")[0]) == ["train.lr"]
    page, error = printed(capsys, *argv, "trian", code=2)
    assert not page and "'train'" in error and error.count("\n") == 1


def test_every_verb_is_a_module_and_is_listed(capsys: Captured) -> None:
    from pathlib import Path

    import pipelines
    from pipelines.__main__ import STEPS

    files = Path(pipelines.__file__).parent.glob("commands/[!_]*.py")
    assert {*verbs()} == {*STEPS, *(path.stem.removesuffix("_") for path in files)}
    page = printed(capsys, "--help")[0]
    for verb, sentence in (verbs() | OTHER).items():
        assert re.search(rf"^  {verb} +{re.escape(sentence[:30])}", page, re.M)
    assert all(sentence == (load_verb(verb).__doc__ or "").splitlines()[0] for verb, sentence in verbs().items())
    assert printed(capsys, code=2)[0] == page == printed(capsys, "help")[0]
    assert re.fullmatch(r"smalti \d\S+\n", printed(capsys, "--version")[0])
