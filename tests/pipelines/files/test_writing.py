"""Files, alone or into a folder, are written atomically.

Covers: pipelines/files.py.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from small import make_prior

import pipelines.files as files
from pipelines.config import UserError
from pipelines.files import Output, atomic_file, atomic_files, lock_output, replace_file
from tokenizer.files import PathError, atomic_folder


def write_both(out: Path, text: str, **options: Any) -> None:
    with atomic_files(out, **options) as folder:
        for name in ("a.csv", "b.csv"):
            (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_all_files_are_written_or_none(tmp_path):
    out = tmp_path / "out"
    with atomic_files(out) as folder:
        (folder / "b.csv").write_text("mine")
        assert not out.exists()
    with pytest.raises(PathError, match=r"b\.csv"):
        write_both(out, "new")
    (out / "b.csv").unlink()
    (out / "b.csv").mkdir()
    with pytest.raises(PathError, match=r"b\.csv"):
        write_both(out, "new", overwrite=True)
    assert [path.name for path in out.iterdir()] == ["b.csv"] and len(list(tmp_path.iterdir())) == 1


def test_an_error_leaves_the_old_files(tmp_path):
    write_both(tmp_path / "out", "old")
    (tmp_path / "a.txt").write_text("old")
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises(error), atomic_files(tmp_path / "out", overwrite=True) as folder:
            (folder / "a.csv").write_text("new")
            raise error
        with pytest.raises(error), atomic_file(tmp_path / "a.txt", overwrite=True) as path:
            path.write_text("new")
            raise error
    assert contents(tmp_path / "out") == {"a.csv": "old", "b.csv": "old"}
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


NEW = "new" * 1000


def write_all(root: Path) -> None:
    with atomic_file(root / "one.csv", overwrite=True) as path:
        path.write_text(NEW)
    for name in ("there", "new"):
        write_both(root / name, NEW, overwrite=True)


def write_and_die(root: Path, last: int) -> None:
    """Write everything; die of SIGKILL at the last of these calls that change the disk, or exit."""
    calls = iter(range(1, 100))

    def counted(call):
        def count(*arguments, **options):
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return count

    try:
        os.fsync, Path.replace, Path.rename = map(counted, (os.fsync, Path.replace, Path.rename))
        write_all(root)
        os._exit(0)
    finally:
        os._exit(1)


def test_a_kill_leaves_each_file_old_or_new(tmp_path):
    """At each call that changes the disk; and the same command then completes."""
    for last in range(1, 100):
        root = tmp_path / str(last)
        (root / "there").mkdir(parents=True)
        for path in (root / "one.csv", root / "there" / "a.csv", root / "there" / "mine.txt"):
            path.write_text("old")
        with warnings.catch_warnings(action="ignore"):  # of threads, which the child does not use
            child = os.fork()
        if child == 0:
            write_and_die(root, last)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = {path.read_text() for path in root.rglob("*.csv") if ".tmp-" not in str(path)}
        assert found <= {"old", NEW} and (root / "there" / "mine.txt").read_text() == "old"
        assert not (root / "new").exists() or len(list((root / "new").iterdir())) == 2
        write_all(root)
        assert {path.read_text() for path in root.rglob("*.csv") if ".tmp-" not in str(path)} == {NEW}
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert last > 12


@pytest.mark.parametrize("letter", ["a", "ü"])
def test_the_longest_file_names_can_be_locked_and_written(tmp_path, letter):
    """Temporary names are cut; a name that is too long is refused before the work."""
    longest = letter * (255 // len(os.fsencode(letter)))
    with lock_output(tmp_path / longest), atomic_file(tmp_path / longest) as file:
        file.touch()
    (tmp_path / longest).unlink()
    with atomic_folder(tmp_path / longest, kind=None):
        pass
    write_both(tmp_path / longest, "x")
    assert [path.name for path in tmp_path.iterdir()] == [longest]
    out = Output(tmp_path / (letter * 256))
    for check in (out.check_file, lambda: out.check_files(["a"]), lambda: out.check_folder(None)):
        with pytest.raises(UserError, match=rf"^out: {out.path}"):
            check()


def test_file_systems_without_modes_and_fsync_of_folders_are_supported(tmp_path, monkeypatch):
    """Such as shared folders of virtual machines."""

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "chmod", Mock(side_effect=PermissionError(errno.EPERM, os.strerror(errno.EPERM))))
    monkeypatch.setattr(os, "fsync", fsync)
    for _ in range(2):
        make_prior("marginal").save_pretrained(tmp_path / "new" / "prior")
    write_both(tmp_path / "results", "x")


def test_a_full_disk_is_an_error_of_the_key_and_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("before")

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "fsync", full)
    out = Output(tmp_path / "a.csv", overwrite=True, key="table")
    with pytest.raises(UserError, match=rf"^table: {out.path} .*No space left"), out.file() as path:
        path.write_text("after")
    assert contents(tmp_path) == {"a.csv": "before"}


def test_a_file_is_replaced_but_not_a_link(tmp_path):
    (tmp_path / "a.json").write_text("before")
    replace_file(tmp_path / "a.json", b"after")
    (tmp_path / "link.json").symlink_to("a.json")
    with pytest.raises(PathError, match=r"link\.json"):
        replace_file(tmp_path / "link.json", b"later")
    assert contents(tmp_path) == {"a.json": "after", "link.json": "after"}


@pytest.mark.parametrize("name", ["data/inner", "data", "data/inner/deep/new", "link/inner", "again.png", "link.png"])
def test_an_output_cannot_be_an_input(tmp_path, name):
    """Nor hold one, lie in one, or be the same folder or file by a link."""
    (tmp_path / "data" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("data")
    picture, out = tmp_path / "a.png", tmp_path / name
    picture.write_text("x")
    os.link(picture, tmp_path / "again.png")
    (tmp_path / "link.png").symlink_to(picture)
    source = picture if out.suffix else tmp_path / "data" / "inner"
    output = Output(out, [None, "owner/name", source], overwrite=True)
    for check in (output.check_file, lambda: output.check_files(["a"]), lambda: output.check_folder(None)):
        with pytest.raises(UserError, match=str(out)):
            check()
    Output(tmp_path / "data2", [source], overwrite=True).check_folder(None)
    with pytest.raises(UserError, match=r"^out: 'a\.txt'"):
        Output("a.txt").check_file([".png"])
    Output("a.PNG").check_file([".png"])
