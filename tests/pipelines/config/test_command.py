"""The grammar of every verb: what is read, what is refused, and how a command ends.

Covers: pipelines/config/arguments.py, pipelines/config/errors.py, pipelines/config/schema.py,
pipelines/config/yaml_text.py.
"""

from __future__ import annotations

import errno
import json
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optional import needs_digits
from pydantic import Field

from pipelines.__main__ import load_verb, main, verbs
from pipelines.config import Config, UserError, errors, run_command
from pipelines.config.command import build_config, parse
from pipelines.config.errors import ReportedElsewhere, at_a_shell
from pipelines.config.schema import to_yaml
from pipelines.config.yaml_text import read_yaml, write_yaml
from tokenizer.config import ModelConfig, Node
from tokenizer.model import Registered

ROOT = Path(__file__).parents[3]


class Coder(Registered, family="tokenizer.quantizers"):
    """A family of two, found where the quantizers are."""


class BookConfig(ModelConfig):
    codes: int = Field(512, ge=2, description="how many codes")
    beta: float = Field(0.25, ge=0, description="how they are pulled")


class StepsConfig(ModelConfig):
    levels: tuple[Annotated[int, Field(ge=2)], ...] = Field((8, 8), description="levels of each channel")


class TreeConfig(ModelConfig):
    codes: int = Field(64, ge=2, le=300, description="how many codes")
    beta: Literal["fixed"] = Field("fixed", description="how they are pulled")
    depth: int = Field(2, ge=1, description="how deep the tree is")


class Tree(Coder, name="tree"):
    """Codes in a tree."""

    Config = TreeConfig


class Book(Coder, name="book"):
    """Codes in a book."""

    Config = BookConfig


class Steps(Coder, name="steps"):
    """Codes on a lattice."""

    Config = StepsConfig


class Net(Registered, family="tokenizer.quantizers"):
    """A family whose members hold a coder."""


class ConvConfig(ModelConfig):
    width: int = Field(64, ge=8, le=4096, description="how wide the net is")
    coder: Annotated[ModelConfig, Node(f"{__name__}:Coder")] = Field(
        BookConfig(codes=256), description="vectors to ids"
    )


class PlainConfig(ModelConfig):
    depth: int = Field(2, description="how deep the net is")


class Conv(Net, name="conv"):
    """A net with a coder."""

    Config = ConvConfig


class Plain(Net, name="plain"):
    """A net without."""

    Config = PlainConfig


class Training(Config):
    steps: int = Field(100, ge=1, description="how many updates")
    lr: float = Field(1e-3, gt=0, le=1, description="learning rate")
    betas: tuple[float, float] = (0.9, 0.95)
    names: tuple[Literal["a", "b", "c"], ...] = ("a",)
    title: str = ""


Side = Annotated[int, Field(ge=4)]


class Run(Config):
    out: str = Field(description="where to")
    seed: int = Field(0, ge=0, description="chooses the noise")
    fast: bool = False
    mode: Literal["a", "b"] | None = None
    side: Side | tuple[Side, Side] = 8
    labels: int | str | list[int | str] | None = None
    paths: list[str] | None = None
    model: Annotated[dict[str, Any], Node(f"{__name__}:Net")] = Field({"kind": "conv"}, description="the net")
    train: Training = Field(Training(steps=7), description="how long")


def read(*argv: str, **options: Any) -> Run:
    return parse(Run, ["out=x", *argv], verb="try", description="Try.", **options)


def problems(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(*argv)
    return str(caught.value).splitlines()


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


# Round trips

plain_text = st.text(max_size=12).filter(lambda text: text.isprintable() and not text.startswith("~"))
yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | plain_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain_text, inner, max_size=3),
    max_leaves=8,
)
run_values = {
    "out": plain_text,
    "seed": st.integers(0, 10**9),
    "mode": st.sampled_from(["a", "b", None]),
    "side": st.integers(4, 99) | st.lists(st.integers(4, 99), min_size=2, max_size=2),
    "labels": st.integers() | plain_text | st.lists(st.integers() | plain_text, max_size=4),
    "paths": st.lists(plain_text, max_size=3),
    "train.lr": st.floats(1e-30, 1),
    "train.title": plain_text,
    "model.coder.beta": st.floats(0, 1e30),
    "model.coder": st.just("book"),
}


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(plain_text, yaml_values, max_size=4))
@example({"a": ["1e-3", "yes", "null", "12:30", "2024-01-01", "a, b", "# c"], "b": 1e-300})
def test_written_yaml_is_read_back(data: dict[str, Any]) -> None:
    assert read_yaml(write_yaml(data)) == data == yaml.safe_load(write_yaml(data))  # plain YAML for everyone else


@settings(max_examples=25, deadline=None)
@given(st.fixed_dictionaries({}, optional=run_values), st.randoms(use_true_random=False))
def test_words_in_any_order_give_a_configuration_that_is_itself_a_file(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any], random: Any
) -> None:
    words = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    config = read(*words)
    for key, value in values.items():
        if "." not in key:
            assert config.model_dump(mode="json")[key] == value
    random.shuffle(words)
    assert read(*(f"--{word}" for word in words)) == config  # as W&B sweeps write them
    path = write(tmp_path_factory.mktemp("round") / "a.yaml", to_yaml(config))
    assert parse(Run, ["--config", path], verb="try", description="") == config


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-30, 1), st.sampled_from(["{!r}", "{:e}", "{:E}", "+{!r}", "{:.17g}"]))
def test_every_spelling_of_a_float_is_read(number: float, spelling: str) -> None:
    text = spelling.format(number)
    assert read(f"train.lr={text}").train.lr == float(text) == read_yaml(text)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("side=32, 96", (32, 96)),
        ("labels=3,big dog,-1", [3, "big dog", -1]),  # zsh would expand brackets as a pattern
        ("paths=a", ["a"]),
        ("labels=tench, Tinca tinca", "tench, Tinca tinca"),  # the name of one class
        ("out=3,8", "3,8"),
        ("labels=~/a.png,3", ["/home/me/a.png", 3]),
    ],
)
def test_values(word: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert getattr(read(word), word.partition("=")[0]) == value


@needs_digits
@pytest.mark.parametrize("verb", sorted(verbs()))
def test_a_dry_run_of_every_example_is_a_file_that_gives_itself(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)

    def dry(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([verb, *words, "--dry-run"])
        assert ended.value.code == 0
        printed, warnings = capsys.readouterr()
        assert printed and not warnings
        return printed

    configs = [cls for cls in vars(load_verb(verb)).values() if isinstance(cls, type) and issubclass(cls, Config)]
    examples = [example for cls in configs if cls.__module__ == load_verb(verb).__name__ for example in cls.examples]
    assert examples
    for words in map(shlex.split, examples):
        printed = dry(*(word for word in words if word not in ("--import", "my_prior.py")))
        assert dry("--config", write(tmp_path / "a.yaml", printed)) == printed


# Files, defaults and kinds


def test_files_merge_left_to_right_and_overrides_come_last(tmp_path: Path) -> None:
    a = write(tmp_path / "a.yaml", "seed: 1\ntrain: {steps: 1, lr: 0.1}\n")
    b = write(tmp_path / "b.yaml", "train: {steps: 2}\n")
    assert read("--config", a, f"--config={b}").train == Training(steps=2, lr=0.1)
    assert read("--config", b, "--config", a).train.steps == 1
    config = read("train.steps=3", "--config", a, "seed=4", "seed=5")
    assert (config.train.steps, config.train.lr, config.seed) == (3, 0.1, 5)
    assert read("--config", write(tmp_path / "empty.yaml", "# nothing\n")) == read()


def test_an_override_keeps_the_other_defaults_of_its_node() -> None:
    assert read("train.lr=1").train == Training(steps=7, lr=1)
    assert read("model.coder.beta=1").model == {**read().model, "coder": {"kind": "book", "codes": 256, "beta": 1}}

    def defaults(given: dict[str, Any]) -> dict[str, Any]:
        return {"train": {"steps": 50 if given.get("model") == {"kind": "plain"} else 60, "lr": 0.5}}

    assert read("train.lr=0.25", "model=plain", defaults=defaults).train == Training(steps=50, lr=0.25)
    assert read(defaults=defaults).train == Training(steps=60, lr=0.5)


def test_another_kind_replaces_its_node(tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "a.yaml", "model: {width: 32, coder: {codes: 9}}\n")  # its kind is the default one
    config = read("--config", path, "model.coder.kind=steps")
    assert config.model == {"kind": "conv", "width": 32, "coder": {"kind": "steps", "levels": [8, 8]}}
    assert read("--config", path, "model.kind=plain").model == {"kind": "plain", "depth": 2}
    assert read("--config", path, "model.coder.kind=book").model["coder"]["codes"] == 9


def test_a_part_of_a_model_keeps_the_settings_that_its_new_kind_takes(tmp_path: Path, capsys: Any) -> None:
    """Those that were given: defaults are those of the new kind."""
    path = write(tmp_path / "a.yaml", "model: {coder: {kind: book, codes: 9, beta: 0.5}}\n")
    for words, coder, line in (
        ({"kind": "tree", "depth": 3}, {"codes": 9}, "tree with codes=9, depth=3; it does not take beta=0.5"),
        ({"kind": "steps"}, {"levels": [8, 8]}, "steps with its defaults; it does not take codes=9, beta=0.5"),
    ):
        config = read("--config", path, *(f"model.coder.{key}={value}" for key, value in words.items()))
        assert config.model["coder"].items() >= {**words, **coder}.items()
        assert capsys.readouterr().err == f"model.coder: {line}\n"
        written = {f"model.coder.{key}": value for key, value in words.items()}
        assert build_config(Run, [path], {"out": "x", **written}) == config
        capsys.readouterr()
    assert read("model.coder.kind=tree").model["coder"]["codes"] == 64, "a default is not kept"


def test_a_kind_may_follow_the_keys_of_its_node(tmp_path: Path) -> None:
    words = ["model.coder.levels=[3,3]", "model.coder=steps"]
    expected = read("model.coder.kind=steps", "model.coder.levels=[3,3]")
    assert read("model=conv", *words) == read(*words, "model=conv") == expected


# Refusals


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("train.lr=abc", "train.lr"),
        ("seed.x=1", "seed.x"),
        ("side=[8,2]", "side"),
        ("model=cnov", "model.kind"),
        ("labels=[1", "labels"),
        ("train={lr: 1, lr: 2}", "train"),
        ("model.coder.coeds=3", "model.coder.coeds"),
        ("a.yaml", "a.yaml"),
        ("--x", "--x"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_key(argument: str, key: str) -> None:
    (line,) = problems(argument)
    assert line.startswith(f"{key}: ")


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    lines = problems("--config", f"{tmp_path}/no.yaml", "junk", "seed=-1", "train.stesp=1", "model.width=x")
    starts = [line.split(":")[0] for line in lines]
    assert starts == [f"{tmp_path}/no.yaml", "junk", "seed", "model.width", "train.stesp"]
    with pytest.raises(UserError, match="^out: missing$"):
        parse(Run, [], verb="try", description="")


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("seed: 1\ntrain:\n  lr: 1\n  lr: 2\n", r"a.yaml, line 4: "),
        ("seed: 1\non: 2\n", r"a.yaml, line 2: "),  # which YAML reads as true
        ("out: !!python/object/apply:os.mkdir [b]", "a.yaml, "),
        ("train.lr: 0.1\n", "train.lr: .*nested"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, start: str) -> None:
    (line,) = problems("--config", write(tmp_path / "a.yaml", text))
    assert re.match(start, line.removeprefix(f"{tmp_path}/")) and line.isprintable()


def test_unprintable_characters_are_escaped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", '"\\e[2Jk": 1\n"a\\n error: forged": 3')
    lines = problems("--config", path, "\x1b[2Jx=1")
    assert len(lines) == 3 and all(line.isprintable() for line in lines)


class Part(Config):
    kind: Literal["square", "round"] | None = Field(None, description="form")
    sizes: tuple[int, ...] = Field((), description="sizes")


class Parts(Config):
    parts: dict[str, Part] = Field({}, description="a part of this name")


def read_parts(*argv: str) -> Parts:
    return parse(Parts, [*argv], verb="run", description=None)


class Renamed(Parts):
    renamed = {"pieces": "parts"}


def test_a_key_of_an_earlier_release_is_read_from_files_and_refused_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "old.yaml"
    path.write_text("pieces: {a: {kind: round}}")
    found = parse(Renamed, ["--config", str(path), "parts.b.kind=square"], verb="run", description=None)
    assert {name: part.kind for name, part in found.parts.items()} == {"a": "round", "b": "square"}
    assert build_config(Renamed, [path], {}).parts["a"].kind == "round"
    message = r"^pieces\.a\.kind: unknown key; it is called parts\.a\.kind now$"
    with pytest.raises(UserError, match=message):
        parse(Renamed, ["pieces.a.kind=round"], verb="run", description=None)
    with pytest.raises(UserError, match=message):
        build_config(Renamed, [], {"pieces": {"a": {"kind": "round"}}})


def test_names_of_a_mapping_are_chosen_by_the_user(tmp_path: Path) -> None:
    """A mapping of settings: inline, by dotted keys, in a file, and together."""
    expected = Parts(parts={"lid": Part(kind="round"), "box": Part(sizes=(3, 8))})
    file = write(tmp_path / "a.yaml", "parts: {box: {sizes: [5]}, lid: {kind: round}}")
    for words in (
        ["parts.lid={kind: round}", "parts.box.sizes=3,8"],
        ["parts.lid.kind=round", "parts.box={sizes: [3, 8]}"],
        ["parts={lid: {kind: round}, box: {sizes: [3, 8]}}"],
        ["--config", file, "parts.box.sizes=3,8"],
    ):
        assert read_parts(*words) == expected
    assert read_parts("parts.box.sizes=3").parts["box"].sizes == (3,)
    assert read_parts("--config", write(tmp_path / "b.yaml", to_yaml(expected))) == expected


# How a command ends


def ended(error: BaseException, *argv: str) -> Any:
    """The exit code of a run that raises this."""

    def run(config: Run) -> None:
        raise error

    options: dict[str, Any] = {"verb": "try", "description": "", "after_ctrl_c": lambda config: f"left {config.out}"}
    with pytest.raises(SystemExit) as caught:
        run_command(Run, run, ["out=x", *argv], **options)
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (UserError("one: a", "two: b"), 2, "error: one: a\nerror: two: b\n"),
        (PermissionError(errno.EACCES, "denied", "a/b"), 2, "error: a/b: denied\n"),
        (OSError(errno.ENOSPC, "No space left"), 1, "error: disk full: No space left\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; left x\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(error: BaseException, code: int, printed: str, capsys: Any) -> None:
    assert ended(error) == code
    assert capsys.readouterr() == ("", printed)
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        ended(ZeroDivisionError())


def test_one_process_of_several_prints(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("RANK", "1")
    assert [ended(AssertionError(), last) for last in ("--help", "--dry-run", "junk")] == [0, 0, 2]
    assert capsys.readouterr() == ("", "")
    assert ended(UserError("mine alone")) == 2  # other processes may not have this problem
    assert capsys.readouterr().err == "error on process 1: mine alone\n"
    pauses: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", pauses.append)  # the launcher ends this process meanwhile
    assert ended(ReportedElsewhere("all have it")) == 2 and pauses == [errors.HEAD_START]


def test_warnings_of_ours_are_one_line_in_the_installed_command_too(monkeypatch):
    """There, the user's line is that of the script which starts us."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/smalti", "generate"])
    with at_a_shell():
        for place in ("/usr/bin/smalti", str(Path(errors.__file__))):
            assert warnings.formatwarning("too small", UserWarning, place, 8) == "warning: too small\n"
        assert warnings.formatwarning("odd", UserWarning, "/home/me/script.py", 8).startswith("/home/me/script.py:8")
