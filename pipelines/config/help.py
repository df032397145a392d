"""What `--help` prints: a page that fits a screen, every key, or those of a section."""

from __future__ import annotations

import difflib
import shlex
from typing import Any, NamedTuple

from tokenizer.config import Data

from .arguments import UserError
from .keys import Row, Section, every_kind, sections
from .schema import Config
from .table import listed, row_lines, wrapped
from .terminal import heading, width

ALL = "all"
OPTIONS = (
    ("--config FILE", "a YAML file, or the name of a preset (`smalti presets`); several merge left to right"),
    (
        "key=value",
        "set one key, whatever the files say; the value is YAML, as in train.lr=1e-3 or sizes=1,2; "
        "another kind replaces its node with all that was set below it",
    ),
    ("--import FILE", "a Python file, or a module, with models of your own, whose kinds are then known"),
    ("--dry-run", "print the resulting configuration, itself a file for --config, and stop"),
)
CAPS = (40, 24, 16)  # columns that key, type and default take at most, unless a word is longer


class Known(NamedTuple):
    """What a command line says before it is checked: the values that keys would have, what was given for them, and the
    keys whose defaults only a model can tell that it does not name."""

    values: Data
    given: Data
    later: frozenset[str] = frozenset()


def help_page(
    cls: type[Config], verb: str, description: str | None, known: Known | None = None, topic: str = ""
) -> str:
    """The page about a topic: nothing, `all`, a section or a key. Raises `UserError` for another one."""
    known = known or Known({}, {})
    if topic == ALL:
        return all_page(cls, verb, description, known)
    return topic_page(cls, verb, known, topic) if topic else short_page(cls, verb, description, known)


# Pages --------------------------------------------------------------------------------------------


def short_page(cls: type[Config], verb: str, description: str | None, known: Known) -> str:
    """Examples, and the keys that people change; of a model whose kind was given, all that it has itself."""
    found = present(cls, known)
    rows = {row.key: row for section in found for row in section.rows}
    own = [row for section in found if not section.node for row in section.rows]
    often = [rows[key] for key in cls.often.split() if key in rows] or own
    chosen = [section for section in found if is_model(section) and is_given(section.node, known)]
    told = {row.key for row in [*often, *(row for section in chosen for row in section.rows)]}
    page = [*introduction(verb, description), *examples(cls, verb), "", *table_of([Section("", often), *chosen])]
    options = dict(OPTIONS)
    rest = [(option, options[option]) for option in ("--config FILE", "--import FILE", "--dry-run")]
    if left := len(rows.keys() - told):
        nodes = list(dict.fromkeys(section.node for section in found if section.node))
        about = f"{left} more keys: all, one section ({', '.join(nodes)}), or one key"
        rest.append(("--help WHAT", about if nodes else f"{left} more keys: all, or one key"))
    return "\n".join([*page, "", heading("more"), *listed(rest, width())])


def all_page(cls: type[Config], verb: str, description: str | None, known: Known) -> str:
    """The grammar and every key; of nodes whose kind was given, only those of that kind."""
    unique: list[Section] = []
    for section in sections(cls, known.values, lambda node: is_given(node, known), known.later):
        if section.rows and section not in unique:  # quantizers come back with every tokenizer that takes them
            unique.append(section)
    page = [*introduction(verb, description), *listed(OPTIONS, width()), "", *table_of(unique)]
    return "\n".join([*page, *examples(cls, verb)])


def topic_page(cls: type[Config], verb: str, known: Known, topic: str) -> str:
    """The keys at and below a section, or one key. Raises `UserError` with the nearest there is."""
    found = present(cls, known)
    chosen = [section for section in found if f"{section.node}.".startswith(f"{topic}.")]
    if not chosen:
        chosen = [Section("", [row for section in found for row in section.rows if row.key == topic])]
    if not chosen[0].rows:
        raise UserError(f"--help {topic}: no such section or key of {verb}; {nearest(cls, found, topic, verb)}")
    return "\n".join(table_of(chosen))


def nearest(cls: type[Config], found: list[Section], topic: str, verb: str) -> str:
    """What was probably meant: sections, keys, or a kind; or which sections there are."""
    nodes = list(dict.fromkeys(section.node for section in found if section.node))
    keys = list(dict.fromkeys([*nodes, *cls.often.split(), *(row.key for section in found for row in section.rows)]))
    kinds = {
        f"{section.node}.kind={kind} --help {section.node}": kind
        for section in sections(cls, {}, every_kind)
        if (kind := section.title.partition(":")[0].partition(".kind=")[2])
    }
    last = [key for key in keys if key.split(".")[-1] == topic.split(".")[-1]]
    last += [command for command, kind in kinds.items() if kind == topic]
    if near := last[:2] or difflib.get_close_matches(topic, keys, 1, 0.6):
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"there are {', '.join([*nodes, ALL])}" if nodes else f"`smalti {verb} --help all` lists the keys"


# Their parts --------------------------------------------------------------------------------------


def introduction(verb: str, description: str | None) -> list[str]:
    """How the verb is called, and what it does."""
    usage = f"smalti {verb} [--config FILE ...] [key=value ...] [--help [WHAT]]"
    about = [line for part in (description or "").split("\n\n") for line in wrapped(" ".join(part.split()), width())]
    first, *rest = wrapped(usage, width() - 7)
    return [f"{heading('usage:')} {first}", *(f"       {line}" for line in rest), "", *about, ""]


def examples(cls: type[Config], verb: str) -> list[str]:
    """Command lines that can be pasted; one that is too long goes on in the next line."""
    lines = [line for example in cls.examples for line in pasted(f"smalti {verb} {example}".rstrip(), width() - 2)]
    return [heading("examples" if len(cls.examples) > 1 else "example"), *(f"  {line}" for line in lines)]


def pasted(command: str, columns: int) -> list[str]:
    r"""A command in lines that a shell takes for one, each but the last ended by `\`."""
    lines = [""]
    for word in shlex.split(command):
        text = word if shlex.quote(word) == word or "=" in word and " " not in word else shlex.quote(word)
        if lines[-1] and len(lines[-1]) + len(text) + 3 > columns:
            lines[-1] += " \\"
            lines.append("    " + text)
        else:
            lines[-1] = f"{lines[-1]} {text}".strip() if len(lines) == 1 else f"{lines[-1]} {text}"
    return lines


def table_of(found: list[Section]) -> list[str]:
    """Sections below each other, in one table as wide as the terminal."""
    rows: list[Row] = [row for section in found for row in section.rows]
    widths = widths_of(rows)
    lines = [heading(line) for line in row_lines(("key", "type", "default", ""), widths)]
    for section in found:
        if section.title:
            lines += ["", *(heading(line) for line in wrapped(section.title, width()))]
        lines += [line for row in section.rows for line in row_lines(row.cells, widths)]
    return lines


def widths_of(rows: list[Row]) -> list[int]:
    """Of the columns; the sentence has the rest."""
    widths = []
    for column, (most, title) in enumerate(zip(CAPS, ("key", "type", "default"), strict=True)):
        widths.append(min(most, max([len(title), *(len(row[column]) for row in rows)])))
    return [*widths, width() - sum(widths) - 2 * len(widths) - 2]


# What a page is of --------------------------------------------------------------------------------


def present(cls: type[Config], known: Known) -> list[Section]:
    """The sections of a configuration as it is, of every node only its kind."""
    return [section for section in sections(cls, known.values, lambda _: True, known.later) if section.rows]


def is_given(node: str, known: Known) -> bool:
    """Whether the command line says something of a node."""
    value: Any = known.given
    for part in node.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value is not None


def is_model(section: Section) -> bool:
    """Whether a section is of the settings of a kind, and lies in no other's."""
    return "." not in section.node and section.title.startswith(f"{section.node}.kind=")
