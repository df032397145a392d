"""Parse a command line of YAML files and `key=value` words into nested mappings."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_origin

from tokenizer.config import Data, Settings, mapped_model, show_value, to_plain, type_options

from .errors import UserError, did_you_mean
from .schema import Config, rename_keys
from .yaml_text import read_yaml


class CommandLine(NamedTuple):
    """The words of a command line by kind. A missing file or module name is an empty string."""

    files: list[str]
    overrides: list[str]
    imports: list[str]
    help: str | None
    """The topic of `--help`: a key, a section, `all`, or empty for the short page. None: `--help` was not given."""
    dry_run: bool


class CommaText(str):
    """Unquoted text with commas, such as `3,8`: becomes a list if the key accepts one."""


def sort_words(argv: list[str]) -> CommandLine:
    """Sort the words of a command line. Options take the next word, or a value after `=`."""
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


def read_arguments(words: CommandLine, cls: type[Config] = Config) -> tuple[list[Data], list[str]]:
    """Return the contents of the files, then the overrides, each as a nested mapping; and a list of problems."""
    found, problems = [], []
    overrides = sorted(words.overrides, key=lambda argument: rank_override(argument, words.overrides))
    calls = [partial(read_preset, path, cls) for path in words.files]
    for read in [*calls, *(partial(read_override, argument) for argument in overrides)]:
        try:
            found.append(read())
        except UserError as error:
            problems += str(error).splitlines()
    return found, problems


def rank_override(argument: str, others: list[str]) -> float:
    """Return a sort key that puts kinds first, so that `a.kind=x` (or `a=x`) does not reset an earlier `a.b=1`."""
    key, _, text = argument.removeprefix("--").partition("=")
    if re.fullmatch(r"\w+", text) and any(other.removeprefix("--").startswith(f"{key}.") for other in others):
        key += ".kind"
    return key.count(".") if key.split(".")[-1] == "kind" else float("inf")


def read_override(argument: str) -> Data:
    """Parse `a.b=value`, or `--a.b=value` as W&B sweeps write it, into `{"a": {"b": value}}`. Raises `UserError`."""
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
        commas = "," in value and value == text.strip()  # YAML quotes make it plain text
        value = CommaText(value) if commas else os.path.expanduser(value)  # zsh does not expand `~` after `=`
    return nest(key, value)


def nest(key: str, value: Any) -> Any:
    """Return `{"a": {"b": value}}` for the key `a.b`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def nest_settings(settings: Data) -> Any:
    """Return keyword arguments, whose names may have dots, in any order, as a nested mapping of plain values."""
    nested: Any = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            value = nest_settings(value)
        elif isinstance(value, str | os.PathLike):
            value = os.path.expanduser(value)
        nested = combine(nested, nest(str(name), to_plain(value)))
    return nested


def combine(one: Any, other: Any) -> Any:
    """Combine two settings of the same key; a string beside a mapping is the kind of a node."""
    if isinstance(one, dict) != isinstance(other, dict):
        one, other = ({"kind": each} if isinstance(each, str) else each for each in (one, other))
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return other
    return {**one, **other, **{key: combine(one[key], other[key]) for key in one if key in other}}


def read_preset(name: str, cls: type[Config]) -> Data:
    """Read a YAML file, or the preset of this name. Raises `UserError`."""
    data = read_yaml_file(name if os.path.isfile(name) else str(find_preset(name, cls.presets)))
    return rename_keys(data, cls.renamed)


def read_yaml_file(path: str) -> Data:
    """Read a YAML file that holds a mapping. Raises `UserError`."""
    try:
        data = read_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except ValueError as error:
        raise UserError(f"{path}, {error}") from error
    if not isinstance(data, dict | None):
        raise UserError(f"{path}: expected a mapping of keys at the top level (got {show_value(data)})")
    return data or {}


def presets() -> dict[str, Path]:
    """Map each preset's name, such as `prior/gpt_digits`, to its file in the installed package or the checkout."""
    here = Path(__file__).parents[1]
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.yaml"))}


def find_preset(name: str, folder: str = "") -> Path:
    """Find a preset by a name such as `prior/gpt_digits`, `gpt_digits` or `configs/prior/gpt_digits.yaml`. folder: the
    only allowed folder, unless it is empty. Raises `UserError`, which suggests similar names."""
    if not name:
        raise UserError("--config: expected a file name")
    wanted = re.sub(r"^configs/|\.ya?ml$", "", name)
    found = {key: path for key, path in presets().items() if not key.startswith("accelerate/")}
    same = [key for key in found if wanted in (key, key.partition("/")[2])]
    if len(same) == 1:
        if folder and (other := same[0].partition("/")[0]) != folder:
            raise UserError(f"{name}: a preset of train_{other}, not of train_{folder}")
        return found[same[0]]
    if same:
        raise UserError(f"{name}: several presets have this name: {', '.join(same)}")
    known = [key.partition("/")[2] for key in found]
    hint = did_you_mean(wanted.rpartition("/")[2], known, "`smalti presets` lists them")
    raise UserError(f"{name[:400]}: cannot be read (no such file, no such preset); {hint}")


def split_lists(cls: type[Settings] | None, data: Data) -> Data:
    """Turn text with commas into a list where the key accepts one (zsh would expand brackets), and a single word or
    number where it accepts only lists."""
    found: Data = {}
    for name, value in data.items():
        field = cls.model_fields.get(name) if cls else None
        hints = [hint for hint in type_options(field.annotation) if hint is not type(None)] if field else []
        only_lists = bool(hints) and all(get_origin(hint) in (list, tuple) for hint in hints)
        if isinstance(value, dict) and field and (inner := mapped_model(field)):
            value = {key: split_lists(inner, each) if isinstance(each, dict) else each for key, each in value.items()}
        elif isinstance(value, dict):
            value = split_lists(cls.nested(name, value) if cls and field else None, value)
        elif isinstance(value, str):
            value = split_text(hints, value)
        if only_lists and isinstance(value, str | int | float) and not isinstance(value, bool):
            value = [value]
        found[name] = value
    return found


def split_text(hints: list[Any], text: str) -> Any:
    """Return `text` as a list if one of the types is a list, else unchanged. Where text is allowed too, text with a
    space beside a comma stays text, because class names look like that."""
    lists = any(get_origin(hint) in (list, tuple) for hint in hints)
    if isinstance(text, CommaText) and lists and not (str in hints and re.search(r",\s|\s,", text)):
        try:
            return [os.path.expanduser(part) if isinstance(part, str) else part for part in read_yaml(f"[{text}]")]
        except ValueError:  # such as a doubled comma
            pass
    return str(text)
