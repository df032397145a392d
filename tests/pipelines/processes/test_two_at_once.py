"""Real commands: the same one started twice at once, and a run that its launcher restarts."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from folders import contents, written
from givens.stripes import write_set
from launch import (
    end,
    output_of,
    start,
    tokenizer_arguments,
    verb,
    wait_for,
)
from small_pipelines import make_pipeline

from pipelines.files import LOCK, lock_beside

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, list[str]]:
    """Arguments of commands that take some seconds, by verb."""
    data = write_set(tmp_path / "images", (8, 12))
    make_pipeline().tokenizer.save_pretrained(tmp_path / "tokenizer")
    images = [f"data.source={data.source}", "data.image_size=[8,12]", "data.channels=1"]
    return {
        "encode": [f"tokenizer={tmp_path}/tokenizer", *images],
        "train_tokenizer": tokenizer_arguments(tmp_path)[1:],
    }


def compared(out: Path) -> dict[str, bytes]:
    """The contents of an output, without times and paths."""
    folder = out / "state" / "step-00000012" if (out / "state").is_dir() else out
    left = ("manifest.json", "state.json", "tensors/.metadata")  # the last has a random id
    return {name: data for name, data in contents(folder).items() if name not in left}


@pytest.mark.parametrize("name", ["encode", "train_tokenizer"])
def test_the_second_is_refused_and_the_first_unaffected(tmp_path, commands, name):
    """The first is stopped while it holds its lock, until the second has ended."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    output_of(start(verb(name, [*commands[name], f"out={alone}"])))
    command, lock = verb(name, [*commands[name], f"out={out}"]), out / LOCK if "train" in name else lock_beside(out)
    first = start(command)
    try:
        assert wait_for(lambda: lock.exists() and lock.stat().st_size, first)
        os.kill(first.pid, signal.SIGSTOP)
        there = written(out) if out.exists() else None
        line = output_of(start(command), code=2)
        assert (written(out) if out.exists() else None) == there
        os.kill(first.pid, signal.SIGCONT)
        output_of(first)
    finally:
        end(first)
    assert line.startswith(f"error: {out}: process {first.pid} on {os.uname().nodename}") and not lock.exists()
    assert len(line.splitlines()) == 1
    found, expected = (compared(folder) for folder in (out, alone))
    assert list(found) == list(expected) and found == expected
