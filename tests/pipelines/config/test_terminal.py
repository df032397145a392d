"""What is told while something else goes on."""

import errno
import io
import os
import sys

import pytest

from pipelines.config.terminal import tell


class Full(io.StringIO):
    """A log on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_line_that_cannot_be_written_costs_no_more_than_itself(monkeypatch, capsys):
    tell("of a run")
    monkeypatch.setattr(sys, "stderr", Full())
    tell("lost")
    tell("on its stdout", sys.stdout)
    monkeypatch.undo()
    assert capsys.readouterr() == ("on its stdout\n", "of a run\n")


def test_a_pipe_that_nobody_reads_is_told(monkeypatch):
    """It ends a command as other commands end, see `config.command`."""

    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        tell("of a run")
