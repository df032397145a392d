"""Lists on a command line without brackets, which many shells read as a pattern: `labels=3,8` is `labels=[3,8]`."""

from __future__ import annotations

import os
import re
from typing import Any, get_origin

from pydantic.fields import FieldInfo

from tokenizer.config import Data, Settings, type_options

from .arguments import CommaText, UserError, at_home, read_yaml


def split_lists(cls: type[Settings], data: Data, *, at_top: bool = True) -> Data:
    """`data`, in which each text with commas is a list where its key takes one, and plain text elsewhere.

    at_top: whether these are the keys of a command, whose paths may begin with `~/`.
    """
    found: Data = {}
    for name, value in data.items():
        field = cls.model_fields.get(name)
        model = cls.nested(name, value) if field is not None and isinstance(value, dict) else None
        if model is not None:
            found[name] = split_lists(model, value, at_top=False)
        elif isinstance(value, CommaText):
            value = str(value) if field is None else list_or_text(field, value)
            found[name] = at_home(value) if at_top else value
        elif isinstance(value, str) and field is not None and takes_lists_alone(field):
            found[name] = [value]
        else:
            found[name] = as_plain_text(value)
    return found


def takes_lists_alone(field: FieldInfo) -> bool:
    """Return whether a field takes a list, or null, and nothing else: one word is then a list of one."""
    hints = [hint for hint in type_options(field.annotation) if hint is not type(None)]
    return bool(hints) and all(get_origin(hint) in (list, tuple) for hint in hints)


def list_or_text(field: FieldInfo, text: CommaText) -> Any:
    """The list that `text` is for a field, or the text.

    A field that takes both a text and a list reads a text with a space beside a comma, and the name of a file that
    exists, as they are: names of classes and files may have commas.
    """
    hints = type_options(field.annotation)
    takes_list = any(get_origin(hint) in (list, tuple) for hint in hints)
    is_one_name = str in hints and (re.search(r",\s|\s,", text) is not None or os.path.exists(os.path.expanduser(text)))
    if not takes_list or is_one_name:
        return str(text)
    try:
        return read_yaml(f"[{text}]")
    except UserError:  # a comma too many
        return str(text)


def as_plain_text(value: Any) -> Any:
    """`value` with plain text in the place of each `CommaText`."""
    if isinstance(value, dict):
        return {name: as_plain_text(part) for name, part in value.items()}
    return str(value) if isinstance(value, CommaText) else value
