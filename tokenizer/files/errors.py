"""Errors in saved models, token datasets and pipeline folders.

A message names the file, what was found and what is allowed. The file may come from anyone, so a message is one line of
printable characters, of bounded length, whatever the file holds.
"""

from __future__ import annotations

from typing import Any

LONGEST_MESSAGE, LONGEST_VALUE = 900, 80


class PipelineLoadError(ValueError):
    """Base of all errors in a saved model, token dataset or pipeline folder."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class FormatError(PipelineLoadError):
    """The folder or file is not in a format that this version reads."""


class PathError(PipelineLoadError):
    """A file is missing, or is where it may not be."""


class UnreadableError(PathError):
    """The system could not read a file (a disk error, no permission); the file itself may be intact."""


class ConfigError(PipelineLoadError):
    """A configuration value is unknown, of the wrong type or out of range. details: what pydantic found, with the
    places of wrong values, where a configuration was made."""

    details: Exception | None = None


class IntegrityError(PipelineLoadError):
    """A file is not the one that was written: its size or sha256 differs, or two parts do not belong together."""


class WeightsError(PipelineLoadError):
    """A weight is missing, unexpected, of the wrong shape, or not finite."""


class LimitError(PipelineLoadError):
    """A file is larger than it may be."""


def one_line(text: str) -> str:
    """`text`, cut to 900 characters, with unprintable ones escaped."""
    line = escaped(text[: LONGEST_MESSAGE + 1])
    return line if len(line) <= LONGEST_MESSAGE else f"{line[: LONGEST_MESSAGE - 4]} ..."


def escaped(text: str, keep: str = "") -> str:
    """`text` with unprintable characters escaped, for a terminal would obey them; except for those in `keep`."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def shown(value: Any) -> str:
    """The start of a value found in a file, for a message."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 4]} ..."
