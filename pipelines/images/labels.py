"""The classes of images: which labels can be one, their numbers, and which names they may have."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenizer.files import one_line, quote

from ..config import UserError
from .base import Rows

LONGEST, JOINER = 200, "\u200d"  # a joiner, which is not printable by itself, makes one emoji of two
WITHOUT = "data.label_column=null uses all images without labels"


def number_labels(parts: list[Rows]) -> tuple[list[NDArray[np.int64] | None], list[str]]:
    """The class ids of the rows of every part, and the names of the classes, which all parts share. Raises
    `UserError`."""
    names = parts[0].class_names
    if len({tuple(rows.class_names) for rows in parts if rows.class_names is not None}) > 1:
        raise UserError(f"data.label_column: splits have other classes than each other; {WITHOUT}")
    if names is not None:
        known: list[Any] = list(range(len(names)))
    else:
        found = {label for rows in parts for label in rows.labels or [] if is_label(label)}
        known = sorted(found, key=lambda label: (isinstance(label, str), label))  # a tar may have numbers and words
    called = list(dict.fromkeys(names or map(str, known)))  # the number 1 and the word "1" are one class
    for name in called:
        if not is_class_name(name):
            raise UserError(f"the class {quote(name)} is no name: at most {LONGEST} printable characters; {WITHOUT}")
    places = {name: place for place, name in enumerate(called)}
    ids = {label: places[names[label] if names else str(label)] for label in known}
    for rows in parts:
        for row, label in enumerate(rows.labels or []):
            if not is_label(label) or label not in ids:
                told = wrong_label(label, names, some=bool(ids))
                raise UserError(one_line(f"{rows.read([row])[0][0]}: {told}"))
    numbered = [None if r.labels is None else np.array([ids[label] for label in r.labels], np.int64) for r in parts]
    return numbered, called


def wrong_label(label: Any, names: list[str] | None, some: bool) -> str:
    """What is wrong with what cannot be a class. some: whether any image has one."""
    if label is None:
        other = "while other images have one: in folders, each image lies in that of its class"
        return f"no class, {other if some else 'as no image has one'}; {WITHOUT}"
    allowed = f"0 to {len(names) - 1}" if names is not None else "a string, or an integer from 0"
    return f"the label is {label!r}, allowed is {allowed}; {WITHOUT}"


def is_label(label: Any) -> bool:
    """Whether a value can be a class: a string, or an integer from 0."""
    return isinstance(label, str) or (isinstance(label, int) and label >= 0)


def is_class_name(name: str) -> bool:
    """Whether a class may be called so: pipelines and token datasets refuse a name that a terminal would obey."""
    return len(name) <= LONGEST and is_printable(name)


def is_printable(name: str) -> bool:
    """Whether a name can be printed as it is: a terminal would obey another one."""
    return name.replace(JOINER, "").isprintable()
