"""Scripts by which bash, zsh and fish complete verbs, keys and values.

All words are in the script, which is written once: pressing TAB starts no Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from string import Template
from typing import NamedTuple

from .arguments import presets
from .keys import sections
from .schema import Config
from .shells import BASH, FISH, ZSH

SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
FILES = "/"  # instead of values: what stands there is text, perhaps a path
OPTIONS = ("--config", "--import", "--dry-run", "--help")


class Words(NamedTuple):
    """What may follow a verb: keys, each with its values or `FILES`, and what help can be asked about."""

    keys: dict[str, tuple[str, ...]]
    topics: list[str]


def words_of(configs: Iterable[type[Config]]) -> Words:
    """The words of a verb with these configurations, of all kinds of their nodes."""
    keys: dict[str, dict[str, None]] = {}
    topics: dict[str, None] = {"all": None}
    for section in (section for cls in configs for section in sections(cls, {})):
        topics |= {section.node: None} if section.node else {}
        for row in section.rows:
            text = (FILES,) if "text" in row.type.replace("|", " ").split() else ()
            keys.setdefault(row.key, {}).update(dict.fromkeys(row.values or text))
    return Words({key: tuple(values) for key, values in keys.items()}, list(topics))


def preset_names() -> list[str]:
    """What `--config` takes: the name alone where no other preset has it."""
    names = [name for name in presets() if not name.startswith("accelerate/")]
    count = Counter(name.partition("/")[2] for name in names)
    return [last if count[last := name.partition("/")[2]] == 1 else name for name in names]


def script(shell: str, verbs: Mapping[str, Words], besides: Mapping[str, str]) -> str:
    """What the shell should read."""
    fish = shell == "fish"
    return Template(SHELLS[shell]).substitute(
        verbs=" ".join([*verbs, *besides]),
        names=" ".join(verbs),
        shells=" ".join(SHELLS),
        presets=" ".join(preset_names()),
        options=" ".join(OPTIONS),
        keys=cases({verb: words.keys for verb, words in verbs.items()}, fish),
        topics=cases({verb: words.topics for verb, words in verbs.items()}, fish),
        values=cases(values_by_place(verbs), fish),
    )


def values_by_place(verbs: Mapping[str, Words]) -> dict[str, tuple[str, ...]]:
    """The values of `VERB:key`, or of `*:key` where all verbs that have the key agree. Without those that have none."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for verb, words in verbs.items():
        for key, values in words.keys.items():
            found.setdefault(key, {})[verb] = values
    places: dict[str, tuple[str, ...]] = {}
    for key, by_verb in found.items():
        alike = len(set(by_verb.values())) == 1
        places |= {f"*:{key}": next(iter(by_verb.values()))} if alike else {f"{v}:{key}": w for v, w in by_verb.items()}
    return {place: values for place, values in places.items() if values}


def cases(words: Mapping[str, Iterable[str]], fish: bool) -> str:
    """The branches of a `case`, or of fish's `switch`, that print words; those that print the same are one."""
    by_words: dict[str, list[str]] = {}
    for place, found in words.items():
        by_words.setdefault(" ".join(found), []).append(place)
    lines = []
    for text, places in by_words.items():
        if fish:
            quoted = " ".join(f"'{place}'" for place in places)
            lines.append(f"        case {quoted}\n            echo {text}")
        else:
            lines.append(f'        {"|".join(places)}) echo "{text}" ;;')
    return "\n".join(lines)
