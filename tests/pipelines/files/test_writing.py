"""Files, and folders of results, that are written whole or not at all.

Covers: pipelines/files/calls.py.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

import pytest
from small import make_prior

import pipelines.files.writing as writing
from pipelines.files.writing import atomic_file, atomic_folder, check_file, check_results, replace_file, results_folder
from tokenizer.files import PathError


@pytest.mark.parametrize("placed", [0, 1, 2])
def test_results_that_a_killed_process_was_replacing_are_ours(tmp_path, monkeypatch, placed):
    """Those that it has replaced, and those that it has not; of another's file nothing is lost."""

    def write(text: str) -> None:
        with results_folder(tmp_path / "out") as folder:
            for name in ("a.csv", "b.csv"):
                (folder / name).write_text(text)

    def until(path, *rest):
        if len(done) == placed:
            raise KeyboardInterrupt
        done.append(path)
        place(path, *rest)

    place = writing.place_file
    for text in ("first", "second"):  # into nothing, and over what is there
        done = []
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(writing, "place_file", until)
            write(text)
        write(f"{text}, whole")
        assert {path.name: path.read_text() for path in (tmp_path / "out").glob("*.csv")} == dict.fromkeys(
            ("a.csv", "b.csv"), f"{text}, whole"
        )
        assert "replacing" not in (tmp_path / "out" / "manifest.json").read_text()
    (tmp_path / "out" / "b.csv").write_text("mine")
    with pytest.raises(PathError, match=r"b\.csv"):
        write("third")


@pytest.mark.parametrize("before", [False, True])
def test_a_manifest_that_comes_while_results_are_made_stays(tmp_path, before):
    """Where there was none, and where there was one of results."""
    out, theirs = tmp_path / "out", '{"kind": "mine"}'
    if before:
        with results_folder(out) as folder:
            (folder / "a.csv").write_text("first")
    with pytest.raises(PathError, match=r"its manifest\.json is not one of results"), results_folder(out) as folder:
        (folder / "a.csv").write_text("second")
        out.mkdir(exist_ok=True)
        (out / "manifest.json").write_text(theirs)
    assert (out / "manifest.json").read_text() == theirs
    assert [path.read_text() for path in out.glob("*.csv")] == ["first"] * before


@pytest.mark.parametrize("suffix", ["", ".png"])
@pytest.mark.parametrize("letter", ["a", "ü"])
def test_whatever_name_a_file_can_have_it_can_be_written_by(tmp_path, letter, suffix):
    """While it is made it has a longer one, which its own is cut for; one that is too long is refused before the
    work."""
    longest = letter * ((255 - len(suffix)) // len(os.fsencode(letter))) + suffix
    for _ in range(2):  # over nothing, and over what is ours
        with atomic_file(tmp_path / longest) as file:
            file.touch()
        assert [path.name for path in tmp_path.iterdir()] == [longest]
    (tmp_path / longest).unlink()
    with atomic_folder(tmp_path / longest, kind=None):
        pass
    with results_folder(tmp_path / longest) as folder:
        (folder / "a.csv").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [longest]
    for refuses in (check_file, check_results, lambda path: atomic_folder(path, kind=None).__enter__()):
        with pytest.raises(PathError, match=rf"^{tmp_path}/{letter}+: cannot be written \(File name too long\)$"):
            refuses(tmp_path / (letter * 256))


def test_file_systems_that_keep_no_modes_and_do_not_fsync_folders_will_do(tmp_path, monkeypatch):
    """Those of shared folders of virtual machines and Windows; a file that cannot be fsynced is an error."""

    def chmod(path, *_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode) or failing:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    failing = []
    monkeypatch.setattr(os, "chmod", chmod)
    monkeypatch.setattr(os, "fsync", fsync)
    for _ in range(2):
        make_prior("marginal").save_pretrained(tmp_path / "new" / "prior")
    with results_folder(tmp_path / "results") as folder:
        (folder / "a.csv").write_text("x")
    failing.append(True)
    with pytest.raises(OSError, match="Invalid argument"), atomic_file(tmp_path / "a.csv") as file:
        file.write_text("x")


def test_a_file_that_is_not_replaced_leaves_nothing_and_is_told_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("before")
    for error in (KeyboardInterrupt(), OSError(errno.EROFS, os.strerror(errno.EROFS))):

        def fails(path, error=error):
            raise error

        monkeypatch.setattr(writing, "fsync", fails)
        with pytest.raises(type(error)) as caught:
            replace_file(tmp_path / "a.json", b"after")
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert str(caught.value) == f"[Errno 30] Read-only file system: '{tmp_path / 'a.json'}'"
    assert (tmp_path / "a.json").read_text() == "before"
