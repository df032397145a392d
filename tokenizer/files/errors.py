"""What can be wrong with a saved model, token dataset or pipeline folder, and how it is said.

A message names the file, what was found and what is allowed. What is found was written by whoever made the file, so a
message is one line of printable characters, of bounded length, whatever the file holds.
"""

from __future__ import annotations

from typing import Any

LONGEST_MESSAGE, LONGEST_VALUE = 900, 80


class PipelineLoadError(ValueError):
    """The root of everything that can be wrong with a saved model, token dataset or pipeline folder."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class FormatError(PipelineLoadError):
    """The folder or file is not in a format that this version reads."""


class PathError(PipelineLoadError):
    """A file is missing, or is not where it may be."""


class UnreadableError(PathError):
    """The system did not let a file be read (an error of the disk, no permission): the file itself may be as it was."""


class ConfigError(PipelineLoadError):
    """A configuration value is unknown, of the wrong type or out of range."""


class IntegrityError(PipelineLoadError):
    """A file is not the one that was written: its size or sha256 differs, or two parts do not belong together."""


class WeightsError(PipelineLoadError):
    """A weight is missing, superfluous, of the wrong shape, or not finite."""


class LimitError(PipelineLoadError):
    """A file is larger than it may be."""


def one_line(text: str) -> str:
    """`text`, of at most 900 characters, with escapes for those that are not printable: a terminal would obey them."""
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: LONGEST_MESSAGE + 1])
    return escaped if len(escaped) <= LONGEST_MESSAGE else f"{escaped[: LONGEST_MESSAGE - 4]} ..."


def shown(value: Any) -> str:
    """The start of what stands in a file, for a message."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 4]} ..."
