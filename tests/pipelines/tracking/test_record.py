"""Who reads a record while it grows gets each entry once, in the order of steps, numbers before pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.tracking.record import Entry, Reader, Record

PIXELS = {"a": np.zeros((2, 2, 3), np.uint8)}


def pictures(run: Path, step: int) -> Entry:
    return Entry(step, "images", {"a": run / "previews" / f"a-{step:08d}.png"})


def test_a_reader_follows(tmp_path):
    record = Record(tmp_path, 0)
    reader = Reader(record)
    assert list(reader.read()) == []
    record.images(0, PIXELS)
    assert list(reader.read()) == []  # before the first line; numbers of this step could still come
    record.log(1, {"loss": 0.1})
    assert list(reader.read()) == [pictures(tmp_path, 0), Entry(1, "log", {"loss": 0.1})]
    record.images(1, PIXELS)
    assert list(reader.read()) == [pictures(tmp_path, 1)]
    record.images(2, PIXELS)
    assert list(reader.read()) == [] and list(reader.read(to_the_end=True)) == [pictures(tmp_path, 2)]
    assert list(reader.read(to_the_end=True)) == []


def test_a_reader_that_is_behind_gets_the_same_order(tmp_path):
    record = Record(tmp_path, 0)
    for step in (1, 2, 3):
        record.log(step, {"loss": step})
        record.images(step, PIXELS)
    found = [(entry.step, entry.method) for entry in Reader(record).read()]
    assert found == [(step, method) for step in (1, 2, 3) for method in ("log", "images")]


def test_a_line_without_its_end_is_read_when_it_is_there(tmp_path):
    record = Record(tmp_path, 0)
    reader = Reader(record)
    with record.path.open("a") as file:
        file.write('{"step": 1, "lo')
        file.flush()
        assert list(reader.read()) == []
        file.write('ss": 2}\n')
    assert list(reader.read()) == [Entry(1, "log", {"loss": 2})]


@pytest.mark.parametrize("step", ["1e999", "NaN", "null", '"3"', "[3]", "1.5"])
def test_a_line_whose_step_is_no_whole_number_is_dropped(tmp_path, step):
    first, bad, last = '{"step": 1, "loss": 2}\n', f'{{"step": {step}}}\n', '{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(first + bad + last)
    record = Record(tmp_path, 2)
    assert record.highest == 2 and record.path.read_text() == first + last


def test_what_a_resumed_run_repeats_is_read_when_it_is_there_again(tmp_path):
    """Lines after the step are gone; pictures after it are there, and may be about to be overwritten."""
    first = Record(tmp_path, 0)
    for step in (1, 2, 3):
        first.log(step, {"loss": step})
        first.images(step, PIXELS)
    first.close()
    (tmp_path / "previews" / "holiday.png").write_bytes(b"of somebody else")
    second = Record(tmp_path, 2)
    reader = Reader(second)
    expected = [(1, "log"), (1, "images"), (2, "log"), (2, "images")]
    assert [(entry.step, entry.method) for entry in reader.read()] == expected
    second.log(3, {"loss": 3})
    assert list(reader.read()) == [Entry(3, "log", {"loss": 3})]
    second.images(3, PIXELS)
    assert list(reader.read()) == [pictures(tmp_path, 3)] and second.highest == 3


def test_lines_that_are_none_are_left_out_when_a_run_goes_on(tmp_path):
    lines = ['{"step": 1, "loss": 0.5}', '{"step": 1, "loss":', "[" * 5000 + "]" * 5000, "[1]", '{"step": {}}']
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in [*lines, '{"step": 2, "loss": 0.4}']))
    record = Record(tmp_path, 2)
    assert [entry.step for entry in Reader(record).read()] == [1, 2] and record.highest == 2


@pytest.mark.parametrize("rows", [5000])
def test_a_long_record_is_read_once(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, rows + 1)))
    reader = Reader(Record(tmp_path, rows))
    assert [entry.step for entry in reader.read()] == list(range(1, rows + 1)) and not list(reader.read())
