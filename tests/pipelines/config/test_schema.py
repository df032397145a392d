"""The grammar of every verb: what is read, what is refused and how it is said, and what the help page shows.

Covers: pipelines/config/arguments.py, pipelines/config/command.py, pipelines/config/errors.py,
pipelines/config/help.py, pipelines/config/keys.py.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field, ValidationError

import pipelines
from pipelines.__main__ import help_page as verb_page
from pipelines.__main__ import main, module_of, verbs
from pipelines.config import Config, UserError, command, run_command
from pipelines.config.arguments import ReportedElsewhere, read_override
from pipelines.config.command import Interrupted, parse
from pipelines.config.help import help_page
from pipelines.config.schema import difference, to_yaml
from tokenizer.config import Fact, ModelConfig, Node, merge
from tokenizer.files import PathError
from tokenizer.model import Registered


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
    size: Fact[tuple[int, ...]] = Field(description="secret of the data")
    width: int = Field(64, ge=8, le=4096, description="how wide the net is")
    act: Literal["silu", "gelu"] = Field("silu", description="the nonlinearity")
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
    steps: int = Field(
        100,
        ge=1,
        description="how many updates of the weights there are in the whole run of training before it comes to its end",
    )
    lr: float = Field(1e-3, gt=0, le=1, description="learning rate")
    betas: tuple[float, float] = (0.9, 0.95)
    minutes: float | None = Field(None, gt=0, description="a limit")


Side = Annotated[int, Field(ge=4)]


class Run(Config):
    out: str = Field(description="where to")
    seed: int = Field(0, ge=0, description="chooses the noise")
    fast: bool = False
    mode: Literal["a", "b"] | None = None
    side: Side | tuple[Side, Side] = 8
    labels: list[int | str] | None = None
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
    monkeypatch.setenv("COLUMNS", "110")


# What is read


def test_files_merge_left_to_right_and_overrides_come_last(tmp_path: Path) -> None:
    a = write(tmp_path / "a.yaml", "seed: 1\ntrain: {steps: 1, lr: 0.1}\n")
    b = write(tmp_path / "b.yaml", "train: {steps: 2}\n")
    assert read("--config", a, f"--config={b}").train == Training(steps=2, lr=0.1)
    assert read("--config", b, "--config", a).train.steps == 1
    config = read("train.steps=3", "--config", a, "seed=4", "seed=5")
    assert (config.train.steps, config.train.lr, config.seed) == (3, 0.1, 5)


def test_an_override_may_be_written_with_two_dashes() -> None:
    """As `wandb agent` and other programs do; kinds still come first."""
    assert read("--train.steps=3", "seed=4") == read("train.steps=3", "seed=4")
    mixed = ["model.coder.levels=[8,5,5]", "--model.coder.kind=steps"]
    assert read(*mixed) == read(*(word.removeprefix("--") for word in reversed(mixed)))


def test_an_override_keeps_the_rest_of_a_default_node() -> None:
    assert read("train.lr=1").train == Training(steps=7, lr=1)
    assert read("model.width=32").model == {**read().model, "width": 32}
    assert read("model.coder.beta=1").model["coder"] == {"kind": "book", "codes": 256, "beta": 1}


@pytest.mark.parametrize("text", ["1e-3", "'\"1e-3\"'", "1.0e-3", "0.001", "1E-3", ".1e-2"])
def test_every_spelling_of_a_float(text: str) -> None:
    assert read(f"train.lr={text.strip(chr(39))}").train.lr == 1e-3


def test_floats_in_model_nodes_and_files_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "model: {coder: {beta: 1e-3}}\n")
    assert read("--config", path).model["coder"]["beta"] == 1e-3
    assert read("labels=[1e3x, 3]").labels == ["1e3x", 3]


def test_values_are_yaml() -> None:
    config = read("side=[8,16]", "fast=true", "mode=null", "train.betas=[0, 0.5]", "out=a=b")
    assert (config.side, config.fast, config.mode, config.train.betas, config.out) == (
        (8, 16),
        True,
        None,
        (0, 0.5),
        "a=b",
    )


def test_home_is_found_also_where_the_shell_leaves_it_to_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert read_override("out=~/run") == {"out": "/home/me/run"}
    assert read_override("images=[~/a.png,3]") == {"images": ["/home/me/a.png", 3]}
    for other in ("out=run~/a", "out=~run", "track.name=~/a"):  # the last is no path
        key, _, text = other.partition("=")
        assert str(read_override(other)).count(text) == 1
    assert read_override("limit=~") == {"limit": None}


def test_an_override_of_kind_replaces_the_node(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "model: {coder: {codes: 9}}\n")  # its kind is the default one
    config = read("--config", path, "model.coder.kind=steps", "model.coder.levels=[8,5,5]")
    assert config.model["coder"] == {"kind": "steps", "levels": [8, 5, 5]}
    assert read("--config", path, "model.kind=plain").model == {"kind": "plain", "depth": 2}
    assert read("--config", path, "model.coder.kind=book").model["coder"]["codes"] == 9
    other = write(tmp_path / "b.yaml", "model: {coder: {kind: steps}}\n")
    assert read("--config", path, "--config", other).model["coder"] == {"kind": "steps", "levels": [8, 8]}
    plain = write(tmp_path / "c.yaml", "model: {kind: plain}\n")
    back = write(tmp_path / "d.yaml", "model: {kind: conv, coder: {codes: 9}}\n")  # again a kind left to its default
    assert read("--config", plain, "--config", back, "--config", other).model["coder"]["kind"] == "steps"


def test_a_kind_does_not_throw_away_what_stands_to_its_left() -> None:
    config = read("model.coder.levels=[3,3]", "model.coder.kind=steps", "model.width=32", "model.kind=conv")
    assert config.model["coder"] == {"kind": "steps", "levels": [3, 3]} and config.model["width"] == 32


def test_a_kind_alone_does_what_a_kind_does(tmp_path: Path) -> None:
    """Neither what stands to its left is thrown away, nor what a preset says of a node of the same kind."""
    path = write(tmp_path / "a.yaml", "model: {width: 32, coder: {codes: 9}}\n")
    for argv in (["coder=book"], ["coder.beta=1", "coder=book"], ["coder.levels=[3,3]", "coder=steps"]):
        words = [f"model.{word}" for word in argv]
        expected = read("--config", path, *(word.replace("coder=", "coder.kind=") for word in words))
        assert read("--config", path, "model=conv", *words) == read("--config", path, *words, "model=conv") == expected
    with pytest.raises(UserError, match=r"model\.kind"):
        read("model=cnov")


def test_merge_leaves_its_arguments_alone() -> None:
    old, new = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(old, new) == {"a": {"b": 1, "c": 2}}
    assert (old, new) == ({"a": {"b": 1}}, {"a": {"c": 2}})


def test_defaults_that_depend_on_what_was_given() -> None:
    def defaults(given: dict[str, Any]) -> dict[str, Any]:
        return {"train": {"steps": 50 if given["out"] == "x" else 60, "lr": 0.5}}

    assert read("train.lr=0.25", defaults=defaults).train == Training(steps=50, lr=0.25)


def test_a_configuration_is_frozen_and_checked_without_a_command_line() -> None:
    with pytest.raises(ValidationError):
        read().seed = 3  # type: ignore[misc]
    for wrong in ({"seed": True}, {"seed": "5"}, {"fast": 1}, {"model": {"kind": "no"}}):
        with pytest.raises(ValidationError):
            Run(out="x", **wrong)
    with pytest.raises(ValidationError, match="coder.codse"):
        Run(out="x", model={"kind": "conv", "coder": {"codse": 3}})
    assert Run(out="x", model={"kind": "conv", "coder": {"codes": 3}}).model["coder"]["codes"] == 3


# What is refused


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("train.stesp=3", "train.stesp: unknown key; did you mean 'train.steps'?"),
        ("trian.steps=3", "trian.steps: unknown key; did you mean 'train.steps'?"),
        ("lr=3", "lr: unknown key; did you mean 'train.lr'?"),
        ("zzzzz=3", "zzzzz: unknown key; --help lists what there is"),
        ("train.lr=-1", "train.lr: must be > 0 (got -1)"),
        ("train.lr=2", "train.lr: must be <= 1 (got 2)"),
        ("train.lr=abc", "train.lr: expected a number (got 'abc')"),
        ("train.lr=true", "train.lr: expected a number (got true)"),
        ("train.lr=.nan", "train.lr: must be finite (got NaN)"),
        ("seed=true", "seed: expected a whole number (got true)"),
        ("seed=1.5", "seed: expected a whole number (got 1.5)"),
        ('seed="5"', "seed: expected a whole number (got '5')"),
        ("seed=", "seed: expected a whole number (got null)"),
        ("seed.x=1", "seed.x: seed has no keys of its own, it is a whole number"),
        ("fast=1", "fast: expected true or false (got 1)"),
        ("out=5", "out: expected text (got 5; text that looks like something else needs quotes)"),
        ("mode=c", "mode: must be one of 'a', 'b' (got 'c')"),
        ("side=2", "side: must be >= 4 (got 2)"),
        ("side=[8,2]", "side: must be >= 4 (got 2)"),
        ("side=x", "side: expected a whole number or a list (got 'x')"),
        ("train=3", "train: expected a mapping of keys (got 3)"),
        ("model=3", "model: expected a mapping of keys (got 3)"),
        ("train.betas=[1]", "train.betas: too few values (got [1])"),
        ("train.betas=[1,2,3]", "train.betas: expected at most 2 values (got [1, 2, 3])"),
        ("model.kind=cnv", f"model.kind: {Net.describe_unknown('cnv')}"),
        ("model.widht=9", "model.widht: unknown key; did you mean 'model.width'?"),
        ("model.width=4", "model.width: must be >= 8 (got 4)"),
        ("model.act=tanh", "model.act: must be one of 'silu', 'gelu' (got 'tanh')"),
        ("model.size=[8]", "model.size: a fact of the data, it cannot be set here"),
        ("model.coder.coeds=4", "model.coder.coeds: unknown key; did you mean 'model.coder.codes'?"),
        ("model.coder.codes=1", "model.coder.codes: must be >= 2 (got 1)"),
        ("model.coder.kind=vq", f"model.coder.kind: {Coder.describe_unknown('vq')}"),
    ],
)
def test_one_line_says_what_is_wrong(argument: str, problem: str) -> None:
    assert problems(argument) == [problem]


@pytest.mark.parametrize(
    "argument", ["train", "-train.steps=3", "-x", "--x", "---x=1", "a..b=1", "=3", ".a=1", "a.=1", "a.yaml"]
)
def test_an_argument_that_is_neither(argument: str) -> None:
    (line,) = problems(argument)
    assert line.startswith(f"{argument}: expected --config FILE, key=value")


def test_hints_for_what_other_programs_take() -> None:
    assert problems("-train.steps=3")[0].endswith("write train.steps=3")
    assert problems("--train.steps")[0].endswith("write train.steps=value")
    assert problems("a.yaml")[0].endswith("write --config a.yaml")
    assert problems("gpt_digits")[0].endswith("write --config gpt_digits")  # a preset


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    lines = problems("--config", str(tmp_path / "no.yaml"), "junk", "seed=-1", "train.stesp=1", "model.width=x")
    assert [line.split(":")[0] for line in lines] == [
        str(tmp_path / "no.yaml"),
        "junk",
        "seed",
        "model.width",
        "train.stesp",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: 1\ntrain: [1\nfast: true\n", r"a.yaml, line [23]: not readable as YAML"),
        ("seed: 1\nseed: 2\n", r"a.yaml, line 2: not readable as YAML: 'seed' appears twice"),
        ("- 1\n- 2\n", r"a.yaml: expected a mapping of keys at the top level \(got \[1, 2\]\)"),
        ("train.lr: 0.1\n", r"train.lr: not a key .* nested"),
        ("\0", "a.yaml, not readable as YAML"),
    ],
)
def test_a_file_that_can_not_be_used(tmp_path: Path, text: str, problem: str) -> None:
    (line,) = problems("--config", write(tmp_path / "a.yaml", text))
    assert re.search(problem, line)


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    assert problems("--config", str(tmp_path / "no.yaml")) == [
        f"{tmp_path / 'no.yaml'}: cannot be read (no such file, no such preset); `smalti presets` lists them"
    ]
    assert "(a folder, not a file, no such preset)" in problems("--config", str(tmp_path))[0]
    (tmp_path / "latin.yaml").write_bytes(b"out: \xe9\n")
    assert "latin.yaml: cannot be read" in problems("--config", str(tmp_path / "latin.yaml"))[0]
    assert problems("--config") == ["--config: expected a file after it"]
    assert read("--config", write(tmp_path / "empty.yaml", "# nothing\n")) == read()


def test_a_missing_key_is_told_unless_its_file_could_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^out: missing$"):
        parse(Run, [], verb="try", description="")
    with pytest.raises(UserError) as caught:
        parse(Run, ["--config", "no.yaml"], verb="try", description="")
    assert "out" not in str(caught.value)


def test_an_unreadable_value_names_its_key() -> None:
    (line,) = problems("labels=[1")
    assert line.startswith("labels: not readable as YAML")


# What is printed


def test_a_dry_run_prints_what_a_file_may_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train.lr=1e-5", "model.coder.kind=steps", 'out="1e3"', "labels=[3, '1e3', 'yes', é]"]
    config = read(*argv)
    with pytest.raises(SystemExit) as caught:
        read(*argv, "--dry-run")
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    again = parse(Run, ["--config", write(tmp_path / "a.yaml", printed)], verb="try", description="")
    assert again == config and config.out == "1e3" and config.labels == [3, "1e3", "yes", "é"]
    assert printed.strip() == to_yaml(config).strip()
    assert yaml.safe_load(printed) == config.model_dump(mode="json")  # plain YAML for everyone else


def test_the_help_page_has_every_key_with_type_default_range_and_sentence() -> None:
    page = help_page(Run, "try", "Try things.\n\nAnd more.", topic="all")
    assert page.startswith("usage: smalti try [--config FILE ...] [key=value ...]") and "Try things.\nAnd more." in page
    for row in [
        r"out +text +required +where to",
        r"seed +int >= 0 +0 +chooses the noise",
        r"side +int >= 4 or \[int >= 4, +8",
        r"mode +a \| b or null +null",
        r"train.steps +int >= 1 +7 +how many updates",
        r"train.lr +float > 0, <= 1 +0.001 +learning rate",
        r"train.betas +\[float, float\] +\[0.9, 0.95\]",
        r"train.minutes +float > 0 or null +null +a limit",
        r"model.kind +conv \| plain +conv",
        r"model.width +int 8..4096 +64 +how wide the net is",
        r"model.act +silu \| gelu +silu +the nonlinearity",
        r"model.coder.kind +book \| steps +book +vectors to ids",
        r"model.coder.codes +int >= 2 +256 +how many codes",  # the net's default, not the coder's
        r"model.coder.levels +\[int >= 2, ...\] +\[8, 8\] +levels of each channel",
        r"model.depth +int +2 +how deep",
    ]:
        assert re.search(rf"^  {row}", page, re.M), row
    for title in [
        "model: the net",
        "model.kind=plain: A net without.",
        "model.coder.kind=steps: Codes on a lattice.",
        "train: how long",
    ]:
        assert f"\n\n{title}\n" in page
    assert "model.size" not in page and "secret" not in page  # a fact of the data


def test_the_help_page_fits_and_lines_up() -> None:
    lines = help_page(Run, "try", "Try. " * 50, topic="all").splitlines()
    assert max(map(len, lines)) <= 110
    sentences = ("where to", "chooses the noise", "learning rate", "how wide the net is", "how many updates")
    starts = {line.index(sentence) for line in lines for sentence in sentences if line.endswith(sentence)}
    first = next(number for number, line in enumerate(lines) if "how many updates" in line)
    starts.add(lines[first].index("how many"))
    starts.add(len(lines[first + 1]) - len(lines[first + 1].lstrip()))  # the sentence goes on below itself
    assert len(starts) == 1


def test_help_wins_over_everything_else(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as caught:
            parse(Run, ["nonsense", flag, "all"], verb="try", description="Try.")
        assert caught.value.code == 0 and "train.steps" in capsys.readouterr().out


def test_difference_names_dotted_keys() -> None:
    old = {"a": 1, "t": {"lr": 0.1, "b": [1, 2]}, "gone": None}
    assert difference(old, {"a": 1.0, "t": {"lr": 0.2, "b": (1, 2)}, "new": {"x": 1}}) == [
        "t.lr: 0.1 -> 0.2",
        "gone: null -> (absent)",
        'new: (absent) -> {"x": 1}',
    ]
    assert difference(old, old) == []
    assert difference({"x": "a" * 999 + "b"}, {"x": "a" * 999 + "c"})
    (line,) = difference({"\x1b" + "k" * 9999: 1}, {})
    assert len(line) < 200 and line.startswith("'\\x1bkkk")


# How it ends


def raising(error: BaseException) -> Any:
    def run(config: Run) -> None:
        raise error

    return run


def code_of(run: Any, *argv: str) -> Any:
    with pytest.raises(SystemExit) as caught:
        run_command(Run, run, ["out=x", *argv], verb="try", description="")
    return caught.value.code


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Run, lambda config: config.out * 2, ["out=x"], verb="try", description="") == "xx"
    assert code_of(raising(UserError("one: a\ntwo: b"))) == 2
    assert capsys.readouterr().err == "error: one: a\nerror: two: b\n"
    assert code_of(raising(PathError("no such folder"))) == 2
    assert capsys.readouterr().err == "error: no such folder\n"
    assert code_of(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert code_of(raising(Interrupted())) == 130 and not capsys.readouterr().err  # the run has said all
    assert code_of(raising(AssertionError()), "sed=1", "--bogus") == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    with pytest.raises(ZeroDivisionError):  # a bug
        run_command(Run, raising(ZeroDivisionError()), ["out=x"], verb="try", description="")


def test_one_process_of_several_talks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert [code_of(raising(AssertionError()), last) for last in ("--help", "--dry-run", "junk")] == [0, 0, 2]
    assert capsys.readouterr() == ("", "")
    assert code_of(raising(UserError("mine alone"))) == 2  # other processes may not have met it
    assert capsys.readouterr().err == "error on process 1: mine alone\n"
    pauses: list[float] = []
    monkeypatch.setattr(command.time, "sleep", pauses.append)  # in which the launcher ends this process
    assert code_of(raising(ReportedElsewhere("all have met it"))) == 2 and pauses == [command.TELLING]
    assert capsys.readouterr().err == "error on process 1: all have met it\n"  # nobody has
    monkeypatch.setenv("RANK", "0")
    assert code_of(raising(AssertionError()), "junk") == 2 and capsys.readouterr().err


# Verbs


def test_verbs_are_the_modules_with_a_main() -> None:
    folder = Path(pipelines.__file__).parent
    files = [*folder.glob("*.py"), *folder.glob("commands/*.py")]
    with_main = {path for path in files if re.search(r"^(def main\(|main = )", path.read_text(), re.M)}
    found = verbs()
    paths = {name: folder / f"{module_of(name).replace('.', '/')}.py" for name in found}
    assert set(paths.values()) == with_main - {folder / "__main__.py"}
    assert {"train_tokenizer", "train_prior", "import"} <= set(found)
    for name, sentence in found.items():
        assert sentence.endswith(".") and sentence in (ast.get_docstring(ast.parse(paths[name].read_text())) or "")
        assert re.search(rf"^  {name} +{re.escape(sentence[:30])}", verb_page(found), re.M)


def test_finding_verbs_imports_nothing(tmp_path: Path) -> None:
    write(tmp_path / "good.py", '"""Does good.\n\nMore."""\nraise ImportError\ndef main(): ...\n')
    write(tmp_path / "library.py", '"""No verb."""\nclass A:\n    def main(self): ...\n')
    write(tmp_path / "__main__.py", "def main(): ...\n")
    assert verbs(tmp_path) == {"good": "Does good."}


def test_a_verb_gets_the_rest_of_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train_tokenizer", "train-tokenizer"):
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0 and "usage: smalti train_tokenizer" in capsys.readouterr().out


def test_an_unknown_verb_suggests_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train_piror"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: train_piror: no such verb; did you mean 'train_prior'?\n"
    for argv, code in ([], 2), (["--help"], 0):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == code and "train_prior" in capsys.readouterr().out
