"""Reads a command line, YAML files and `key=value`, into nested mappings."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizer.config import Data, show_value
from tokenizer.files import PipelineLoadError, escape, read_bytes

from .yaml_text import MAX_BYTES, read_yaml_text

LONGEST_NAME = 400  # characters of the name of a preset in a message


class UserError(Exception):
    """A user's mistake. Each line of the message is one problem; unprintable characters are escape."""

    def __init__(self, message: object = "") -> None:
        super().__init__(escape(str(message), keep="\n"))


class ReportedElsewhere(UserError):
    """A mistake that the main process has found and tells; this is another process."""


class CommaText(str):
    """A text of the command line with commas and without quotes, such as `3,8`: a list for a key that takes one, see
    `lists`."""


class CommandLine(NamedTuple):
    """The words of a command line, sorted by what they are; a file or module that is missing is empty."""

    files: list[str]
    overrides: list[str]
    imports: list[str]
    help: str | None
    """What help is asked about: a key or section, `all`, or nothing, for the short page. None: no help."""
    dry_run: bool


def sorted_words(argv: list[str]) -> CommandLine:
    """What stands in a command line. `--config`, `--import` and `--help` take the next word, or `--config=FILE`."""
    files: list[str] = []
    overrides: list[str] = []
    imports: list[str] = []
    topic: str | None = None
    words = list(argv)
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if option in ("--config", "--import"):
            found = value if equals else words.pop(0) if words else ""
            (files if option == "--config" else imports).append(found)
        elif option in ("--help", "-h"):
            takes_next = bool(words) and re.fullmatch(r"\w[\w.]*", words[0]) is not None
            topic = value if equals else words.pop(0) if takes_next else topic or ""
        elif word != "--dry-run":
            overrides.append(word)
    return CommandLine(files, overrides, imports, topic, "--dry-run" in argv)


def read_arguments(words: CommandLine) -> tuple[list[Data], list[str]]:
    """The contents of the files and then the overrides, each a nested mapping; and the problems."""
    files, problems, overrides = [], [], []
    for path in words.files:
        try:
            if not path:
                raise UserError("--config: expected a file after it")
            files.append(read_file(path if is_there(path) else str(find_preset(path))))
        except UserError as error:
            problems.append(str(error))
    for argument in words.overrides:
        try:
            overrides.append((kinds_first(argument, words.overrides), read_override(argument)))
        except UserError as error:
            problems.append(str(error))
    overrides.sort(key=lambda override: override[0])
    return files + [data for _, data in overrides], problems


def kinds_first(argument: str, others: Iterable[str] = ()) -> float:
    """The sort key of an override: kinds come first, so that `a.kind=x`, or `a=x` alone, does not discard an `a.b=1`
    among the others, to its left."""
    key, _, text = argument.removeprefix("--").partition("=")
    if re.fullmatch(r"\w+", text) and any(other.removeprefix("--").startswith(f"{key}.") for other in others):
        key += ".kind"
    return key.count(".") if key.split(".")[-1] == "kind" else float("inf")


def read_override(argument: str) -> Data:
    """`a.b=value` as `{"a": {"b": value}}`; so is `--a.b=value`, which is how other programs write it, a sweep of W&B
    among them. Raises `UserError`."""
    key, equals, text = argument.removeprefix("--").partition("=")
    if not equals or not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*){,15}", key):
        bare = re.fullmatch(r"--?(\w[\w.-]*)(=.*)?", argument)
        hint = f"; write {bare[1]}{bare[2] or '=value'}" if bare else ""
        named = argument.endswith((".yaml", ".yml")) or argument in {key.rpartition("/")[2] for key in presets()}
        hint = f"; write --config {argument}" if named and not equals else hint
        raise UserError(f"{argument}: expected --config FILE, key=value, --import FILE, --dry-run or --help{hint}")
    try:
        value = read_yaml(text)
    except UserError as error:
        raise UserError(f"{key}: {error} (got {text!r}; for plain text write {key}='\"...\"')") from error
    if isinstance(value, str) and "," in value and value == text.strip():  # quotes in the YAML keep it a text
        value = CommaText(value)
    else:
        value = value if "." in key else at_home(value)
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def at_home(value: Any) -> Any:
    """A text, or those in a list, that begins with `~/` as a path: after `key=` zsh leaves it as it is, and a folder
    called ~ would be made here."""
    if isinstance(value, list):
        return [at_home(part) for part in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


# Presets ------------------------------------------------------------------------------------------


def presets() -> dict[str, Path]:
    """The files of the presets by name, such as `prior/gpt_digits`: in the installed package, or beside it in a
    checkout."""
    here = Path(__file__).parents[1]
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.yaml"))}


def find_preset(name: str) -> Path:
    """The preset called `name`: `prior/gpt_digits`, `gpt_digits` or `configs/prior/gpt_digits.yaml`. Raises `UserError`
    that names similar presets."""
    wanted = re.sub(r"^configs/|\.ya?ml$", "", name)
    found = {key: path for key, path in presets().items() if not key.startswith("accelerate/")}
    named = [key for key in found if wanted in (key, key.partition("/")[2])]
    if len(named) == 1:
        return found[named[0]]
    last_parts = {key.partition("/")[2]: key for key in found}
    similar = difflib.get_close_matches(wanted.rpartition("/")[2], last_parts, 2, 0.7)
    near = named or [last_parts[part] for part in similar]
    hint = f"did you mean {' or '.join(near)}?" if near else "`smalti presets` lists them"
    kind = "a folder, not a file" if os.path.isdir(name) else "no such file"
    reason = "several presets have this name" if named else f"{kind}, no such preset"
    called = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 4]} ..."
    raise UserError(f"{called}: cannot be read ({reason}); {hint}")


def is_there(path: str) -> bool:
    """Whether `path` is a file; a run may have left a folder with the name of its preset."""
    return os.path.exists(path) and not os.path.isdir(path)


# YAML ---------------------------------------------------------------------------------------------


def read_yaml(text: str) -> Any:
    """The value of the YAML `text`. Raises `UserError` that names the line, if there are several."""
    try:
        return read_yaml_text(text)
    except ValueError as error:
        raise UserError(error) from error


def read_file(path: str) -> Data:
    """The mapping in a YAML file of at most 256 KiB; raises `UserError`."""
    try:
        data = read_yaml(read_bytes(Path(path), MAX_BYTES).decode())
    except PipelineLoadError as error:
        raise UserError(f"{path}: cannot be read ({str(error).removeprefix(f'{path}: ')})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    except UserError as error:
        raise UserError(f"{path}, {error}") from error
    if not isinstance(data, dict | None):
        raise UserError(f"{path}: expected a mapping of keys at the top level (got {show_value(data)})")
    return data or {}
