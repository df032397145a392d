"""What TAB offers in bash, zsh and fish, asked of these shells themselves.

Covers: pipelines/config/shells.py.
"""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from pipelines.__main__ import BESIDES, completion, configs_of, load, main, verbs
from pipelines.config.completion import SHELLS, preset_names, words_of
from pipelines.config.keys import sections
from prior import Prior
from tokenizer import Tokenizer

BASH_ASKS = r"""
source {script}
COMP_WORDBREAKS={breaks}
COMP_LINE={line}
COMP_POINT=${{#COMP_LINE}}
_smalti 2> errors
printf '%s\n' "${{COMPREPLY[@]}}"
"""


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"no {shell} here")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script of each shell, in a folder with a few files."""
    folder = tmp_path_factory.mktemp("scripts")
    for shell in SHELLS:
        (folder / f"smalti.{shell}").write_text(completion([shell]))
    (folder / "runs" / "with space").mkdir(parents=True)
    (folder / "mine.yaml").touch()
    (folder / "my_prior.py").touch()
    return folder


def in_bash(folder: Path, line: str, breaks: str = r"$' \t\n\"\'><=;|&(:'") -> list[str]:
    """What bash offers for a line that is not finished."""
    code = BASH_ASKS.format(script="smalti.bash", breaks=breaks, line=f"'{line}'")
    result = subprocess.run(
        ["bash", "--norc", "-c", code], cwd=folder, capture_output=True, text=True, check=True, timeout=120
    )
    assert not result.stderr
    return [word for word in result.stdout.splitlines() if word]


def in_fish(folder: Path, line: str) -> list[str]:
    """What fish offers, by its own `complete -C`; a description follows a tab."""
    code = f"source smalti.fish; complete -C '{line}'"
    result = subprocess.run(
        ["fish", "--no-config", "-c", code], cwd=folder, capture_output=True, text=True, check=True, timeout=120
    )
    return [word.partition("\t")[0] for word in result.stdout.splitlines()]


def in_zsh(folder: Path, line: str) -> str:
    """What `smalti` is given when TAB is pressed at the end of a line, which there is to be one way to go on with."""
    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        os.environ.update(TERM="dumb", COLUMNS="200")
        os.execvp("zsh", ["zsh", "-f"])
    told = ""

    def read_until(end: str) -> None:
        nonlocal told
        limit = time.monotonic() + 120  # a busy machine may be silent for seconds
        while end not in told and time.monotonic() < limit:
            if select.select([terminal], [], [], 1)[0]:
                told += os.read(terminal, 65536).decode()

    def tell(text: str) -> None:
        os.write(terminal, text.encode())

    try:
        tell(
            "autoload -Uz compinit; compinit -u -D; source ./smalti.zsh\n"
            "smalti() { print -r -- \"<$*>\" }; echo rea''dy\n"
        )
        read_until("ready")
        told = ""
        tell(f"{line}\t\n")
        read_until(">\r")
    finally:
        os.close(terminal)
        os.waitpid(process, 0)
    return told.rpartition("<")[2].partition(">")[0]


# What all offer


def test_every_verb_and_key_is_in_the_scripts(scripts: Path) -> None:
    for shell in SHELLS:
        text = (scripts / f"smalti.{shell}").read_text()
        for verb in verbs():
            assert verb in text
            for cls in configs_of(load(verb)):
                assert all(row.key in text for section in sections(cls, {}) for row in section.rows)
        assert all(name in text for name in preset_names())


def test_values_are_choices_kinds_and_truths() -> None:
    words = words_of(configs_of(load("train_prior")))
    assert set(words.keys["model.kind"]) == set(Prior.available())
    assert words.keys["track.wandb"] == ("online", "offline", "disabled", "null")
    assert words.keys["train.compile"] == ("true", "false") and words.keys["train.lr"] == ()
    assert words.keys["tokens"] == ("/",) and words.topics[:2] == ["all", "model"]
    assert set(Tokenizer.available()) | set(Prior.available()) == set(
        words_of(configs_of(load("plan"))).keys["model.kind"]
    )


@pytest.mark.parametrize(
    ("line", "offered", "not_offered"),
    [
        ("smalti tr", ["train_prior", "train_tokenizer"], ["tune"]),
        ("smalti --v", ["--version"], []),
        ("smalti completion ", list(SHELLS), ["bash2"]),
        ("smalti help gen", ["generate"], ["verify"]),
        ("smalti help train_prior sam", ["sampler"], ["train"]),
        ("smalti train_prior train.l", ["train.lr=", "train.log_every="], ["train.steps="]),
        ("smalti train-prior --config gpt_digits train.min", ["train.minutes="], ["train.muon_lr="]),
        ("smalti train_prior --config gpt_d", ["gpt_digits"], ["gpt_openmoji"]),
        ("smalti train_prior --config m", ["mine.yaml", "made_digits"], []),
        ("smalti train_prior --help ", ["all", "model", "train"], ["train.lr="]),
        ("smalti train_prior --dr", ["--dry-run"], []),
        ("smalti train_prior --import my", ["my_prior.py"], []),
    ],
)
def test_words(line: str, offered: list[str], not_offered: list[str], scripts: Path) -> None:
    asked = [ask for shell, ask in (("bash", in_bash), ("fish", in_fish)) if shutil.which(shell)]
    for ask in asked:
        found = ask(scripts, line)
        assert set(offered) <= set(found) and not set(not_offered) & set(found), (ask, found)


VALUES = [
    ("smalti train_prior model.kind=gat", "model.kind=", ["gated_pixelcnn"], ["gpt"]),
    ("smalti train_tokenizer model.quantizer.kind=f", "model.quantizer.kind=", ["fsq"], ["vq"]),
    ("smalti train_tokenizer data.on_error=", "data.on_error=", ["skip", "fail"], []),
    ("smalti evaluate update_card=", "update_card=", ["true", "false"], []),
    ("smalti generate pipeline=ru", "pipeline=", ["runs"], ["mine.yaml"]),
    ("smalti generate pipeline=runs/w", "pipeline=", ["runs/with space"], []),
    ("smalti generate seed=", "seed=", [], ["runs"]),
    ("smalti train_prior model.kind=vq", "model.kind=", [], ["vqvae"]),  # which `plan` takes
]


@pytest.mark.parametrize(("line", "before", "offered", "not_offered"), VALUES)
@needs("bash")
def test_values_in_bash(line: str, before: str, offered: list[str], not_offered: list[str], scripts: Path) -> None:
    """Where `=` parts words, as it does by default, only what follows it is the word; else all of it is."""
    found = in_bash(scripts, line)
    assert set(offered) <= set(found) and not set(not_offered) & set(found)
    whole = in_bash(scripts, line, breaks=r"$' \t\n'")
    assert whole == [before + word for word in found]


@pytest.mark.parametrize(("line", "before", "offered", "not_offered"), VALUES)
@needs("fish")
def test_values_in_fish(line: str, before: str, offered: list[str], not_offered: list[str], scripts: Path) -> None:
    found = [word.rstrip("/").replace("\\", "") for word in in_fish(scripts, line)]
    assert {before + word for word in offered} <= set(found)
    assert not {before + word for word in not_offered} & set(found)


@pytest.mark.parametrize(
    ("line", "whole"),
    [
        ("smalti train_t", "train_tokenizer"),
        ("smalti train_prior model.kind=gat", "train_prior model.kind=gated_pixelcnn"),
        ("smalti train_prior train.log", "train_prior train.log_every="),
        ("smalti generate pipeline=ru", "generate pipeline=runs"),  # zsh takes the last slash back
        ("smalti help train_prior sam", "help train_prior sampler"),
    ],
)
@needs("zsh")
def test_lines_in_zsh(line: str, whole: str, scripts: Path) -> None:
    assert in_zsh(scripts, line) == whole


@needs("bash")
def test_pressing_tab_is_quick(scripts: Path) -> None:
    """No Python starts: at most 0.3 s, with the script read anew."""
    began = time.monotonic()
    in_bash(scripts, "smalti train_tokenizer model.")
    assert time.monotonic() - began < 0.3


@needs("bash")
def test_bash_completes_by_itself(scripts: Path) -> None:
    """The function is tied to the command."""
    code = "source smalti.bash; complete -p smalti"
    told = subprocess.run(["bash", "--norc", "-c", code], cwd=scripts, capture_output=True, text=True, check=True)
    assert told.stdout == "complete -F _smalti smalti\n"


@pytest.mark.parametrize("names", [[], ["tcsh"], ["bash", "zsh"]])
def test_another_shell(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", *names])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: completion: expected a shell, one of bash, zsh, fish")


def test_what_stands_beside_the_verbs_is_none() -> None:
    assert not set(BESIDES) & set(verbs())
