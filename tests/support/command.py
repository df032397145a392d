"""A command that a user gets wrong, run in this process: it ends with exit code 2, and says in lines why."""

from __future__ import annotations

import pytest

from pipelines.__main__ import main


def errors_of(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """The lines of error of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert lines and all(line.startswith("error: ") for line in lines), lines
    return lines


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The line of error of a command that has one thing to say."""
    (line,) = errors_of(capsys, *argv)
    return line
