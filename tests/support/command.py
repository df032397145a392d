"""Run commands with user errors in this process: they exit with code 2 and print lines of errors."""

from __future__ import annotations

import pytest

from pipelines.__main__ import main

NOTES = ("is divided anew", "is not recorded")
"""Ends of notes on the division of images, which come before an error."""


def errors_of(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """Run a command and return its error lines."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(NOTES)]
    assert caught.value.code == 2
    assert lines and all(line.startswith("error: ") for line in lines), lines
    return lines


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command and return its only error line."""
    (line,) = errors_of(capsys, *argv)
    return line
