"""The real command started twice at once."""

from __future__ import annotations

import os
import signal

import pytest
from folders import contents
from launch import assert_equal_tensors, end, exact, output_of, start, tensors, tokenizer_arguments, verb, wait_for

from pipelines.files import LOCK


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_second_is_refused_and_the_first_unaffected(tmp_path):
    """The first is stopped while it holds its lock, until the second has ended."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    output_of(start(verb("train_tokenizer", tokenizer_arguments(alone))))
    command = verb("train_tokenizer", tokenizer_arguments(out))
    first = start(command)
    try:
        assert wait_for(lambda: (out / LOCK).exists() and (out / LOCK).stat().st_size, first)
        os.kill(first.pid, signal.SIGSTOP)
        before = contents(out)
        line = output_of(start(command), code=2)
        assert contents(out) == before
        os.kill(first.pid, signal.SIGCONT)
        output_of(first)
    finally:
        end(first)
    assert line.startswith(f"error: {out}: process {first.pid} on {os.uname().nodename}")
    assert len(line.splitlines()) == 1 and not (out / LOCK).exists()
    assert exact(out) == exact(alone)
    assert_equal_tensors(tensors(out), tensors(alone))
