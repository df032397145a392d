"""Power loss at any moment: what was not fsynced may be gone, or there in part, in any order (see `power_loss`).

Here are the ways of writing that all writers share, cut at every operation; runs and verbs are cut at random by
`benchmarks/trust/faults.py power=600`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from failures.power_journal import Journal
from failures.power_loss import WAYS, cut_points, lose_power

import pipelines.files as writing
from pipelines.job import OtherJobError, begin_job
from pipelines.training.tracking import MetricsFile
from tokenizer import files
from tokenizer.files import FolderKind, PipelineLoadError, verify_manifest

OURS = FolderKind("a thing", "thing.json")


def lost(tmp_path: Path, write: Callable[[Path], Any], draws: int = 3) -> Iterator[tuple[Path, list[str]]]:
    """The folder in which `write` has written, as it could be after each of its operations, and what it had marked."""
    root, target = tmp_path / "root", tmp_path / "left"
    journal = Journal(root, tmp_path / "journal")
    journal.begin()
    with journal.recorded():
        write(root, journal)
    operations, ways = journal.operations(), set()
    target.mkdir()
    for place in cut_points(operations):
        for number in range(draws):
            ways.add(lose_power(journal, operations, place, Random(f"{place} {number}"), target))
            yield target, [operation["mark"] for operation in operations[:place] if "mark" in operation]
    assert ways == set(WAYS)


def write_thing(out: Path, text: str) -> None:
    with files.atomic_folder(out, kind=OURS) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a.bin").write_text(text * 100)
        files.write_json(folder / "thing.json", {"text": text})
        files.write_manifest(folder)


def thing(out: Path) -> str | None:
    """Which one is there, whole; None without any. Raises `PipelineLoadError` for one that is damaged."""
    if not out.exists():
        return None
    verify_manifest(out)
    return json.loads((out / "thing.json").read_text())["text"]


def thing_or_aside(out: Path) -> str | None:
    """The same; for an instant the old one has another name."""
    aside = files.folders_aside(out)
    return thing(aside[0] if not out.exists() and len(aside) == 1 else out)


def test_a_folder_is_the_old_one_or_the_new_one(tmp_path):
    """The old one is set aside for a moment, whole."""
    (tmp_path / "root").mkdir()
    write_thing(tmp_path / "root" / "out", "old")

    def write(root: Path, journal: Journal) -> None:
        write_thing(root / "out", "new")
        journal.mark("written")
        write_thing(root / "runs" / "deep" / "out", "deep")
        journal.mark("deep")

    for left, marks in lost(tmp_path, write):
        found = thing_or_aside(left / "out")
        assert found == "new" if "written" in marks else found in ("old", "new")
        assert thing(left / "runs" / "deep" / "out") in (["deep"] if "deep" in marks else [None, "deep"])


def test_a_folder_that_a_killed_process_made_stays(tmp_path):
    """It had no time to see to that itself."""
    (tmp_path / "root").mkdir()

    def write(root: Path, journal: Journal) -> None:
        (root / "runs").mkdir()
        write_thing(root / "runs" / "out", "new")
        journal.mark("written")

    for left, marks in lost(tmp_path, write):
        assert thing(left / "runs" / "out") in (["new"] if "written" in marks else [None, "new"])


def write_tables(out: Path, text: str) -> None:
    with writing.atomic_files(out, overwrite=True) as folder:
        for name in ("a.csv", "b.csv"):
            (folder / name).write_text(text)


def test_files_and_results_are_old_or_new(tmp_path):
    (tmp_path / "root" / "results").mkdir(parents=True)
    write_tables(tmp_path / "root" / "tables", "old")
    for name in ("file", "replaced", "results/a.smalti", "results/b.smalti"):
        (tmp_path / "root" / name).write_text("VQC1 old")

    def write(root: Path, journal: Journal) -> None:
        with writing.atomic_file(root / "file", overwrite=True) as path:
            path.write_text("VQC1 new" * 50)
        journal.mark("file")
        writing.replace_file(root / "replaced", b"VQC1 new" * 50)
        journal.mark("replaced")
        with writing.atomic_files(root / "results", overwrite=True) as folder:
            for name in ("a.smalti", "b.smalti", "c.smalti"):
                (folder / name).write_text("VQC1 new" * 50)
        journal.mark("results/a.smalti results/b.smalti results/c.smalti")
        write_tables(root / "tables", "new")

    for left, marks in lost(tmp_path, write):
        assert {path.read_text() for path in (left / "tables").iterdir()} <= {"old", "new"}
        for name in ("file", "replaced", "results/a.smalti", "results/b.smalti", "results/c.smalti"):
            found = (left / name).read_text() if (left / name).exists() else ""
            done = name in " ".join(marks).split()
            assert found == "VQC1 new" * 50 or (not done and found == ("" if "c." in name else "VQC1 old"))


def test_a_job_is_continued_by_its_own_settings_alone(tmp_path):
    """What its files depend on is known before the first of them, and those that are there are whole."""
    (tmp_path / "root").mkdir()
    names = ["a.bin", "b.bin"]

    def write(root: Path, journal: Journal) -> None:
        begin_job(root / "work", {"verb": "encode", "seed": 0}, names.__contains__)
        for name in names:
            with writing.atomic_file(root / "work" / name) as path:
                path.write_text(name * 100)

    for left, _ in lost(tmp_path, write):
        before = {name for name in names if (left / "work" / name).exists()}
        try:
            begin_job(left / "work", {"verb": "encode", "seed": 1}, names.__contains__)
            assert not before
        except OtherJobError:
            begin_job(left / "work", {"verb": "encode", "seed": 0}, names.__contains__)
        assert all((left / "work" / name).read_text() == name * 100 for name in before)
        assert {path.name for path in (left / "work").iterdir()} == before | {"job.json"}


def test_lines_that_a_record_has_flushed_are_there(tmp_path):
    """From the first one on, after the lines were cut to where a state was, too."""
    (tmp_path / "root").mkdir()

    def write(root: Path, journal: Journal) -> None:
        record = MetricsFile(root / "run", 0)
        for step in (1, 2, 3):
            record.append(step, {"loss": 0.5})
        record.flush()
        journal.mark("3")
        record.append(4, {"loss": 0.5})
        record.close()
        again = MetricsFile(root / "run", 3)
        again.append(4, {"loss": 0.25})
        again.flush()
        journal.mark("4")
        again.close()

    for left, marks in lost(tmp_path, write):
        path = left / "run" / "metrics.jsonl"
        lines = [line for line in path.read_text().split("\n") if '"loss"' in line] if path.exists() else []
        assert len(lines) >= max([0, *(int(mark) for mark in marks if mark.isdigit())])


PLANTED = {
    "no file is fsynced": lambda path: path.is_dir(),
    "no folder is fsynced": lambda path: path.is_file(),
    "no manifest is fsynced": lambda path: path.name != "manifest.json",
}


@pytest.mark.parametrize("bug", PLANTED)
def test_it_is_seen_when_nothing_reaches_the_disk(tmp_path, monkeypatch, bug):
    """The same as above, with a bug planted."""
    (tmp_path / "root").mkdir()
    write_thing(tmp_path / "root" / "out", "old")
    fsync = files.fsync
    monkeypatch.setattr(files, "fsync", lambda path: fsync(path) if PLANTED[bug](path) else None)

    def write(root: Path, journal: Journal) -> None:
        write_thing(root / "out", "new")
        journal.mark("written")

    wrong = 0
    for left, marks in lost(tmp_path, write):
        try:
            found = thing_or_aside(left / "out")
            wrong += found is None or ("written" in marks and found != "new")
        except PipelineLoadError:
            wrong += 1
    assert wrong
