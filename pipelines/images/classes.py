"""Classes: which names are valid, and how the classes of a data set are numbered."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenizer.files import quote

from ..config import UserError, is_first_process, tell
from .sources import Source

LONGEST, JOINER = 200, "\u200d"  # zero-width joiner of composed emoji, not printable by itself
WITHOUT = "data.label_column=null uses all images without labels"


def number_labels(sources: list[Source]) -> tuple[dict[Source, NDArray[np.int64] | None], list[str]]:
    """Return the class ids of each source's images, and the class names that all share. Raises `UserError` for invalid
    labels, and for one class in two spellings."""
    names = sources[0].class_names
    if len({tuple(each.class_names) for each in sources if each.class_names is not None}) > 1:
        raise UserError(f"data.label_column: splits have different classes; {WITHOUT}")
    found = {label for each in sources for label in each.labels or [] if is_label(label)} if names is None else set()
    class_names = order_classes(found) if names is None else list(dict.fromkeys(names))
    check_class_names(class_names, spellings=names is None)
    places = {name: place for place, name in enumerate(class_names)}
    texts = {label: str(label) for label in found} if names is None else dict(enumerate(names))
    ids = {label: places[text] for label, text in texts.items()}
    for each in sources:
        for row, label in enumerate(each.labels or []):
            if not is_label(label) or label not in ids:
                raise UserError(f"{each.name(row)}: {describe_label(label, names, some=bool(ids))}")
    numbered = {
        each: None if each.labels is None else np.array([ids[label] for label in each.labels], np.int64)
        for each in sources
    }
    return numbered, class_names


def order_classes(labels: Iterable[Any]) -> list[str]:
    """Return the names of classes in their order: numbers ascend, and come before words. The number 1 and the word "1"
    are one class."""
    return list(dict.fromkeys(map(str, sorted(labels, key=lambda label: (isinstance(label, str), label)))))


def check_class_names(names: list[str], spellings: bool) -> None:
    """Raise `UserError` for an invalid class name and, with `spellings`, for names that differ only in case,
    surrounding spaces or Unicode form. Single letters in two cases are two classes."""
    known: dict[str, str] = {}
    for name in names:
        if not is_class_name(name):
            raise UserError(f"invalid class name {quote(name)}: at most {LONGEST} printable characters; {WITHOUT}")
        plain = unicodedata.normalize("NFC", name).strip()
        other = known.setdefault(plain.casefold() if len(plain) > 1 else plain, name)
        if spellings and other != name:
            raise UserError(f"the classes {quote(other)} and {quote(name)} are two spellings of one name; use one")


def warn_about_absent(names: list[str], trained: Collection[int]) -> None:
    """Print one line if some classes are not among the ids of the training images."""
    absent = [name for number, name in enumerate(names) if number not in trained]
    if absent and is_first_process():
        some = f"{', '.join(absent[:10])}{', ...' if len(absent) > 10 else ''}"
        tell(f"warning: {len(absent)} of {len(names)} classes have no training image: {some}")


def describe_label(label: Any, names: list[str] | None, some: bool) -> str:
    """Return why a label is invalid. some: whether any image has a class."""
    if label is None:
        other = "unlike other images (in a folder data set, put each image into the folder of its class)"
        return f"no class, {other if some else 'like all images'}; {WITHOUT}"
    allowed = f"0 to {len(names) - 1}" if names is not None else "a string, or an integer from 0"
    return f"invalid label {label!r}: must be {allowed}; {WITHOUT}"


def is_label(label: Any) -> bool:
    return isinstance(label, str) or (isinstance(label, int) and label >= 0)


def is_class_name(name: str) -> bool:
    return len(name) <= LONGEST and is_printable(name)


def is_printable(name: str) -> bool:
    """Whether a name has no control characters (terminal escape sequences)."""
    return name.replace(JOINER, "").isprintable()
