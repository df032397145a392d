"""The grammar of every verb: what is read, what is refused, and how a command ends.

Covers: pipelines/config/arguments.py, pipelines/config/errors.py, pipelines/config/schema.py,
pipelines/config/yaml_text.py.
"""

from __future__ import annotations

import difflib
import errno
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from command import fails
from hypothesis import example, given, settings
from hypothesis import strategies as st
from optional import needs_digits
from ordinary import as_others
from pydantic import Field

from pipelines.__main__ import load, main, verbs
from pipelines.config import Config, UserError, choose_device, errors, run_command, tell
from pipelines.config.command import parse
from pipelines.config.errors import Interrupted, ProcessFailed, ReportedElsewhere, did_you_mean
from pipelines.config.help import keys_of
from pipelines.config.schema import difference, to_yaml
from pipelines.config.yaml_text import read_yaml, write_yaml
from tokenizer.config import ModelConfig, Node
from tokenizer.files import PathError
from tokenizer.model import Registered

ROOT = Path(__file__).parents[3]


class Coder(Registered, family="tokenizer.quantizers"):
    """A family of two, found where the quantizers are."""


class BookConfig(ModelConfig):
    codes: int = Field(512, ge=2, description="how many codes")
    beta: float = Field(0.25, ge=0, description="how they are pulled")


class StepsConfig(ModelConfig):
    levels: tuple[Annotated[int, Field(ge=2)], ...] = Field((8, 8), description="levels of each channel")


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


# What is read


def test_files_merge_left_to_right_and_overrides_come_last(tmp_path: Path) -> None:
    a = write(tmp_path / "a.yaml", "seed: 1\ntrain: {steps: 1, lr: 0.1}\n")
    b = write(tmp_path / "b.yaml", "train: {steps: 2}\n")
    assert read("--config", a, f"--config={b}").train == Training(steps=2, lr=0.1)
    assert read("--config", b, "--config", a).train.steps == 1
    config = read("train.steps=3", "--config", a, "seed=4", "seed=5")
    assert (config.train.steps, config.train.lr, config.seed) == (3, 0.1, 5)
    assert read("--config", write(tmp_path / "empty.yaml", "# nothing\n")) == read()


def test_an_override_keeps_the_rest_of_a_default() -> None:
    assert read("train.lr=1").train == Training(steps=7, lr=1)
    assert read("model.coder.beta=1").model == {**read().model, "coder": {"kind": "book", "codes": 256, "beta": 1}}


def test_an_override_may_be_written_with_two_dashes() -> None:
    """As `wandb agent` writes it; kinds still come first."""
    mixed = ["model.coder.levels=[8,5,5]", "--model.coder.kind=steps"]
    assert read(*mixed) == read(*(word.removeprefix("--") for word in reversed(mixed))) != read()


@pytest.mark.parametrize("text", ["1e-3", "'\"1e-3\"'", "1.0e-3", "0.001", "1E-3", ".1e-2", "+1e-3"])
def test_every_spelling_of_a_float(text: str, tmp_path: Path) -> None:
    assert read(f"train.lr={text.strip(chr(39))}").train.lr == 1e-3
    path = write(tmp_path / "a.yaml", f"model: {{coder: {{beta: {text.strip(chr(39))}}}}}\n")
    assert text.startswith("'") or read("--config", path).model["coder"]["beta"] == 1e-3


def test_values_are_yaml() -> None:
    config = read("side=[8,16]", "fast=true", "mode=null", "train.betas=[0, 0.5]", "out=a=b", "labels=[1e3x, 3]")
    assert (config.side, config.fast, config.mode, config.out) == ((8, 16), True, None, "a=b")
    assert config.train.betas == (0, 0.5) and config.labels == ["1e3x", 3]


def test_home_is_found_where_the_shell_leaves_it_to_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert read("out=~/run").out == "/home/me/run"
    assert read("labels=~/a.png,3").labels == ["/home/me/a.png", 3]
    assert read("out=run~/a").out == "run~/a" and read("mode=~").mode is None


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("labels", "3,8"),
        ("labels", "cat,3,big dog"),
        ("labels", "3,"),
        ("side", "32,96"),
        ("side", "32, 96"),
        ("train.betas", "0.8,1e-1"),
        ("train.names", "a,c"),
        ("train.names", "c"),
        ("paths", "a,b"),
        ("paths", "a"),
    ],
)
def test_a_list_needs_no_brackets(key: str, plain: str) -> None:
    """Which zsh would take for a pattern."""
    assert read(f"{key}={plain}") == read(f"{key}=[{plain}]") == read(f"--{key}={plain}") != read()


@pytest.mark.parametrize("text", ["3", "cat", "tench, Tinca tinca", '"a,b"'])  # one class of ImageNet, one file
def test_what_is_one_value_stays_one(text: str) -> None:
    value = read(f"labels={text}").labels
    assert value == yaml.safe_load(text) and type(value) in (int, str)
    assert read("out=3,8").out == "3,8"


def test_a_kind_replaces_the_node(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "model: {width: 32, coder: {codes: 9}}\n")  # its kind is the default one
    config = read("--config", path, "model.coder.kind=steps")
    assert config.model == {"kind": "conv", "width": 32, "coder": {"kind": "steps", "levels": [8, 8]}}
    assert read("--config", path, "model.kind=plain").model == {"kind": "plain", "depth": 2}
    assert read("--config", path, "model.coder.kind=book").model["coder"]["codes"] == 9
    plain = write(tmp_path / "b.yaml", "model: {kind: plain}\n")
    back = write(tmp_path / "c.yaml", "model: {kind: conv, coder: {codes: 9}}\n")  # again a kind left to its default
    assert read("--config", plain, "--config", back).model["coder"] == {"kind": "book", "codes": 9, "beta": 0.25}


@pytest.mark.parametrize(
    "words", [["coder=book"], ["coder.beta=1", "coder=book"], ["coder.levels=[3,3]", "coder=steps"]]
)
def test_a_kind_discards_nothing_to_its_left_and_may_stand_for_its_node(words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "model: {width: 32, coder: {codes: 9}}\n")
    words = [f"model.{word}" for word in words]
    expected = read("--config", path, *(word.replace("coder=", "coder.kind=") for word in reversed(words)))
    assert read("--config", path, "model=conv", *words) == read("--config", path, *words, "model=conv") == expected


def test_defaults_that_depend_on_what_was_given() -> None:
    def defaults(given: dict[str, Any]) -> dict[str, Any]:
        return {"train": {"steps": 50 if given.get("model") == {"kind": "plain"} else 60, "lr": 0.5}}

    assert read("train.lr=0.25", "model=plain", defaults=defaults).train == Training(steps=50, lr=0.25)
    assert read(defaults=defaults).train == Training(steps=60, lr=0.5)


# Round trips

plain_text = st.text(max_size=12).filter(str.isprintable)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False) | plain_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain_text, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(plain_text, values, max_size=4))
@example({"a": ["1e-3", "yes", "null", "12:30", "2024-01-01", "a, b", "# c"], "b": 1e-300})
def test_what_is_written_as_yaml_is_read_back(data: dict[str, Any]) -> None:
    assert read_yaml(write_yaml(data)) == data == yaml.safe_load(write_yaml(data))  # plain YAML for everyone else


@settings(deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "out": plain_text,
            "seed": st.integers(0, 10**9),
            "mode": st.sampled_from(["a", "b", None]),
            "side": st.integers(4, 99) | st.tuples(st.integers(4, 99), st.integers(4, 99)).map(list),
            "labels": st.integers() | plain_text | st.lists(st.integers() | plain_text, max_size=4),
            "train.lr": st.floats(1e-30, 1),
            "train.title": plain_text,
            "model.coder.beta": st.floats(0, 1e30),
            "model.coder": st.just("book"),
        },
    )
)
def test_a_configuration_is_itself_a_file(
    tmp_path_factory: pytest.TempPathFactory, given_values: dict[str, Any]
) -> None:
    """Whatever the command line says, by YAML in quotes."""
    config = read(*(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given_values.items()))
    for key, value in given_values.items():
        if "." not in key and key != "model.coder":
            assert config.model_dump(mode="json")[key] == value
    path = write(tmp_path_factory.mktemp("round") / "a.yaml", to_yaml(config))
    assert parse(Run, ["--config", path], verb="try", description="") == config


@needs_digits
@pytest.mark.parametrize("verb", sorted(verbs()))
def test_a_dry_run_is_a_file_that_gives_itself(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every example that the help of a verb shows, presets among them."""
    monkeypatch.chdir(ROOT)

    def dry(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([verb, *words, "--dry-run"])
        assert ended.value.code == 0
        printed, warnings = capsys.readouterr()
        assert printed and not warnings
        return printed

    examples = [shlex.split(example) for example in example_lines(verb)]
    assert examples
    for words in examples:
        printed = dry(*(word for word in words if word not in ("--import", "my_prior.py")))  # a user's own file
        assert dry("--config", write(tmp_path / "a.yaml", printed)) == printed


def example_lines(verb: str) -> list[str]:
    """The examples of a verb's configurations."""
    found = [cls for cls in vars(load(verb)).values() if isinstance(cls, type) and issubclass(cls, Config)]
    return [example for cls in found if cls.__module__ == load(verb).__name__ for example in cls.examples]


# What is refused


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        ("train.lr=-1", "train.lr"),
        ("train.lr=abc", "train.lr"),
        ("train.lr=true", "train.lr"),
        ("seed=true", "seed"),
        ('seed="5"', "seed"),
        ("seed=", "seed"),
        ("seed.x=1", "seed.x"),
        ("fast=1", "fast"),
        ("out=5", "out"),
        ("mode=c", "mode"),
        ("side=2", "side"),
        ("side=[8,2]", "side"),
        ("train=3", "train"),
        ("model=3", "model"),
        ("model=cnov", "model.kind"),
        ("train.betas=[1]", "train.betas"),
        ("train.betas=1,,2", "train.betas"),
        ("train.names=a,d", "train.names"),
        ("model.width=4", "model.width"),
        ("model.coder.kind=vq", "model.coder.kind"),
        ("labels=[1", "labels"),
        ("labels=2024-13-01", "labels"),
        ("train={lr: 1, lr: 2}", "train"),
        ("train={1: 2}", "train"),
    ],
)
def test_one_line_names_the_key(argument: str, key: str) -> None:
    (line,) = problems(argument)
    assert line.startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("train.stesp=3", "train.steps"),
        ("trian.steps=3", "train.steps"),
        ("lr=3", "train.lr"),
        ("sides=1,2", "side"),
        ("model.widht=9", "model.width"),
        ("model.coder.coeds=4", "model.coder.codes"),
        ("zzzzz=3", None),
    ],
)
def test_an_unknown_key_suggests_the_nearest(argument: str, meant: str | None) -> None:
    (line,) = problems(argument)
    assert line.startswith(f"{argument.partition('=')[0]}: unknown key; ")
    assert f"did you mean '{meant}'?" in line if meant else "did you mean" not in line


@settings(deadline=None)
@given(st.sampled_from(keys_of(Run)), st.integers(0, 99), st.sampled_from(["", "x", "xy"]))
def test_what_is_suggested_is_as_near_as_what_was_meant(key: str, at: int, slip: str) -> None:
    at %= len(key)
    typed = key[:at] + slip + key[at + 1 :]
    suggested = re.findall(r"'([^']+)'", did_you_mean(typed, keys_of(Run), ""))

    def nearness(other: str) -> float:
        return difflib.SequenceMatcher(None, other, typed).ratio()

    if nearness(key) >= 0.75:
        assert len(suggested) == 1 and nearness(suggested[0]) >= nearness(key) - 1e-9


@pytest.mark.parametrize(
    "word", ["train", "-x", "--x", "---x=1", "a..b=1", "=3", ".a=1", "a.=1", "a.yaml", "gpt_digits"]
)
def test_a_word_that_is_neither(word: str) -> None:
    (line,) = problems(word)
    assert line.startswith(f"{word}: expected --config FILE, key=value")
    assert line.endswith(f"write --config {word}") == (word in ("a.yaml", "gpt_digits"))


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    lines = problems("--config", f"{tmp_path}/no.yaml", "junk", "seed=-1", "train.stesp=1", "model.width=x")
    starts = [line.split(":")[0] for line in lines]
    assert starts == [f"{tmp_path}/no.yaml", "junk", "seed", "model.width", "train.stesp"]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("seed: 1\ntrain: [1\nfast: true\n", r"a.yaml, line [23]: "),
        ("seed: 1\nseed: 2\n", r"a.yaml, line 2: "),
        ("seed: 1\ntrain:\n  lr: 1\n  lr: 2\n", r"a.yaml, line 4: "),
        ("seed: 1\non: 2\n", r"a.yaml, line 2: "),  # which YAML reads as true
        ("- 1\n- 2\n", r"a.yaml: "),
        ("\0", "a.yaml, "),
        ("out: !!python/object/apply:os.mkdir [b]", "a.yaml, "),
        ("seed: {[1]: 2}\n", "a.yaml, "),  # a key that no set of keys can hold
        ("seed: !!timestamp soon", "a.yaml, "),
        ("seed: !!bool perhaps", "a.yaml, "),
        ("seed: !!int ''", "a.yaml, "),
        ("[" * 5000, "a.yaml, "),
        ("train.lr: 0.1\n", "train.lr: .*nested"),
        ("model: {zzz: 1}\n", "model.zzz: "),
    ],
)
def test_a_file_that_cannot_be_used_is_reported_in_a_line(tmp_path: Path, text: str, start: str) -> None:
    (line,) = problems("--config", write(tmp_path / "a.yaml", text))
    assert re.match(start, line.removeprefix(f"{tmp_path}/")) and line.isprintable()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"out: \xe9\n")
    closed = write(tmp_path / "closed.yaml", "out: x")
    Path(closed).chmod(0)
    with as_others():
        for path in (str(tmp_path), f"{tmp_path}/latin.yaml", closed):
            assert problems("--config", path)[0].startswith(f"{path}: cannot be read")
    assert problems("--config")[0].startswith("--config: expected a file")


def test_a_key_is_missing_unless_its_file_could_not_be_read() -> None:
    with pytest.raises(UserError, match="^out: missing$"):
        parse(Run, [], verb="try", description="")
    with pytest.raises(UserError, match=r"^no\.yaml: [^\n]*$"):
        parse(Run, ["--config", "no.yaml"], verb="try", description="")


def test_unprintable_characters_are_escaped_wherever_they_come_from(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", '"\\e[2Jk": 1\n"\\x9b\\u202e": 2\n"a\\n error: forged": 3')
    lines = problems("--config", path, "\x1b[2Jx=1")
    assert len(lines) == 4 and all(line.isprintable() for line in lines)
    assert str(UserError("a\x1b[2J\nb\u2028c")) == "a\\x1b[2J\nb\\u2028c"


CLOSED = [
    ("generate", "pipeline={closed}/pipeline"),
    ("decompress", "pipeline=digits", "stream={closed}/stream", "out={tmp}/out"),
    ("train_tokenizer", "out={closed}/run"),
    ("train_tokenizer", "out={tmp}/run", "data.source={closed}", "track.wandb=disabled"),
    ("train_prior", "out={tmp}/run", "tokens={closed}", "track.wandb=disabled"),
]


@pytest.mark.parametrize("words", CLOSED, ids=" ".join)
def test_a_folder_that_may_not_be_entered_is_reported_in_a_line(tmp_path: Path, capsys: Any, words: list[str]) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    with as_others():
        line = fails(capsys, *(word.format(closed=closed, tmp=tmp_path) for word in words))
    assert str(closed) in line
    assert {path.name for path in tmp_path.iterdir()} <= {"closed", "run"}


def test_an_unknown_verb_suggests_the_nearest(capsys: Any) -> None:
    for typed, verb in (("genrate", "generate"), ("train-piror", "train_prior"), ("encoder", "encode")):
        assert f"did you mean '{verb}'?" in fails(capsys, typed)
    assert all(verb in fails(capsys, "xyzzy") for verb in verbs())


def test_a_device_without_numbers_is_refused() -> None:
    for name in ("meta", "toaster"):
        with pytest.raises(UserError, match="^device: "):
            choose_device(name)


def test_difference_names_dotted_keys() -> None:
    old = {"a": 1, "t": {"lr": 0.1, "b": [1, 2]}, "gone": None}
    assert difference(old, {"a": 1.0, "t": {"lr": 0.2, "b": (1, 2)}, "new": {"x": 1}}) == [
        "t.lr: 0.1 -> 0.2",
        "gone: null -> (absent)",
        'new: (absent) -> {"x": 1}',
    ]
    assert difference(old, old) == []
    (line,) = difference({"\x1b" + "k" * 9999: 1}, {})
    assert len(line) < 200 and line.isprintable()


# How it ends


def ended(error: BaseException, *argv: str) -> Any:
    """The exit code of a run that raises this."""

    def run(config: Run) -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(
            Run, run, ["out=x", *argv], verb="try", description="", after_ctrl_c=lambda config: f"left {config.out}"
        )
    return caught.value.code


NO_ROOM = OSError(errno.ENOSPC, "No space left")


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (UserError("one: a\ntwo: b"), 2, "error: one: a\nerror: two: b\n"),
        (PathError("no such folder"), 2, "error: no such folder\n"),
        (PermissionError(errno.EACCES, "denied", "a/b"), 2, "error: a/b: denied\n"),
        (NO_ROOM, 1, "error: disk full: No space left\n"),
        (ProcessFailed("process 1 failed: no"), 1, "error on process 0: process 1 failed: no\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; left x\n"),
        (Interrupted(), 130, ""),  # the run has said all
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(error: BaseException, code: int, printed: str, capsys: Any) -> None:
    assert ended(error) == code
    assert capsys.readouterr() == ("", printed)


@pytest.mark.parametrize("bug", [ZeroDivisionError(), ConnectionResetError(), PermissionError(1, "no file is named")])
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)):
        ended(bug)


def test_one_process_of_several_prints(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("RANK", "1")
    assert [ended(AssertionError(), last) for last in ("--help", "--dry-run", "junk")] == [0, 0, 2]
    assert capsys.readouterr() == ("", "")
    assert ended(UserError("mine alone")) == 2  # other processes may not have met it
    assert capsys.readouterr().err == "error on process 1: mine alone\n"
    pauses: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", pauses.append)  # in which the launcher ends this process
    assert ended(ReportedElsewhere("all have met it")) == 2 and pauses == [errors.HEAD_START]


class Full(io.StringIO):
    """A log on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_line_that_cannot_be_written_costs_no_more_than_itself(monkeypatch: Any, capsys: Any) -> None:
    tell("of a run")
    monkeypatch.setattr(sys, "stderr", Full())
    tell("lost")
    tell("on its stdout", sys.stdout)
    monkeypatch.undo()
    assert capsys.readouterr() == ("on its stdout\n", "of a run\n")
