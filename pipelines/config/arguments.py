"""Reads a command line, YAML files and `key=value`, into nested mappings."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple, get_origin

from pydantic.fields import FieldInfo

from tokenizer.config import Data, Settings, show_value, type_options

from .errors import UserError, did_you_mean
from .yaml_text import read_yaml


class CommandLine(NamedTuple):
    """The words of a command line, sorted by what they are; a file or module that is missing is empty."""

    files: list[str]
    overrides: list[str]
    imports: list[str]
    help: str | None
    """What help is asked about: a key or section, `all`, or nothing, for the short page. None: no help."""
    dry_run: bool


class CommaText(str):
    """A text of the command line with commas and without quotes, such as `3,8`: a list for a key that takes one."""


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
    files, overrides, problems = [], [], []
    for path in words.files:
        try:
            files.append(read_file(path if os.path.isfile(path) else str(find_preset(path))))
        except UserError as error:
            problems.append(str(error))
    for argument in sorted(words.overrides, key=lambda argument: kinds_first(argument, words.overrides)):
        try:
            overrides.append(read_override(argument))
        except UserError as error:
            problems.append(str(error))
    return files + overrides, problems


def kinds_first(argument: str, others: list[str]) -> float:
    """The sort key of an override: kinds come first, so that `a.kind=x`, or `a=x` alone, does not discard an `a.b=1` to
    its left."""
    key, _, text = argument.removeprefix("--").partition("=")
    if re.fullmatch(r"\w+", text) and any(other.removeprefix("--").startswith(f"{key}.") for other in others):
        key += ".kind"
    return key.count(".") if key.split(".")[-1] == "kind" else float("inf")


def read_override(argument: str) -> Data:
    """`a.b=value` as `{"a": {"b": value}}`; `--a.b=value`, which sweeps of W&B write, is the same. Raises
    `UserError`."""
    key, equals, text = argument.removeprefix("--").partition("=")
    if not equals or not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", key):
        is_file = argument.endswith((".yaml", ".yml")) or argument in {name.rpartition("/")[2] for name in presets()}
        hint = f"; write --config {argument}" if is_file else ""
        raise UserError(f"{argument}: expected --config FILE, key=value, --import FILE, --dry-run or --help{hint}")
    try:
        value = read_yaml(text)
    except ValueError as error:
        raise UserError(f"{key}: {error} (got {text!r}; for plain text write {key}='\"...\"')") from error
    if isinstance(value, str):
        commas = "," in value and value == text.strip()  # quotes in the YAML keep it a text
        value = CommaText(value) if commas else os.path.expanduser(value)  # zsh leaves the `~` after `=` as it is
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def read_file(path: str) -> Data:
    """The mapping in a YAML file. Raises `UserError`."""
    try:
        data = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except ValueError as error:
        raise UserError(f"{path}, {error}") from error
    if not isinstance(data, dict | None):
        raise UserError(f"{path}: expected a mapping of keys at the top level (got {show_value(data)})")
    return data or {}


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
    if not name:
        raise UserError("--config: expected a file after it")
    wanted = re.sub(r"^configs/|\.ya?ml$", "", name)
    found = {key: path for key, path in presets().items() if not key.startswith("accelerate/")}
    same = [key for key in found if wanted in (key, key.partition("/")[2])]
    if len(same) == 1:
        return found[same[0]]
    if same:
        raise UserError(f"{name}: several presets have this name: {', '.join(same)}")
    known = [key.partition("/")[2] for key in found]
    hint = did_you_mean(wanted.rpartition("/")[2], known, "`smalti presets` lists them")
    raise UserError(f"{name[:400]}: cannot be read (no such file, no such preset); {hint}")


# Lists without brackets, which many shells read as a pattern --------------------------------------


def split_lists(cls: type[Settings] | None, data: Data) -> Data:
    """Make of each text with commas a list where its key takes one, and of one word where it takes nothing else."""
    found: Data = {}
    for name, value in data.items():
        field = cls.model_fields.get(name) if cls else None
        if isinstance(value, dict):
            found[name] = split_lists(cls.nested(name, value) if cls and field else None, value)
        elif isinstance(value, str):
            found[name] = list_or_text(field, value)
        else:
            found[name] = value
    return found


def list_or_text(field: FieldInfo | None, text: str) -> Any:
    """The list that `text` is for a field, or the text. A field that takes both keeps a text with a space beside a
    comma: names of classes have them."""
    hints = type_options(field.annotation) if field else []
    lists = [hint for hint in hints if get_origin(hint) in (list, tuple)]
    if isinstance(text, CommaText) and lists and not (str in hints and re.search(r",\s|\s,", text)):
        try:
            return [os.path.expanduser(part) if isinstance(part, str) else part for part in read_yaml(f"[{text}]")]
        except ValueError:  # a comma too many
            return str(text)
    only_lists = lists and all(hint in (*lists, type(None)) for hint in hints)
    return [str(text)] if only_lists else str(text)
