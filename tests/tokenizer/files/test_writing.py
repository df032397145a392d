"""What is saved: with which modes, over what, and in how much memory it is loaded again.

Covers: tokenizer/files/calls.py.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from contextlib import suppress

import pytest
from ordinary import as_others
from small import make_prior, make_tokenizer

import tokenizer.files.writing as writing
from tokenizer.files.errors import PathError
from tokenizer.files.ownership import Kind
from tokenizer.files.reading import verify_manifest
from tokenizer.files.writing import atomic_file, atomic_folder, check_file, check_results, replace_file, results_folder


@pytest.mark.parametrize(("mask", "mode"), [(0o000, 0o644), (0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_files_are_for_others_to_read_but_not_to_write(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        make_tokenizer("pixels", (8, 8), 1).save_pretrained(tmp_path / "tokenizer")
        make_prior("marginal").save_pretrained(tmp_path / "prior")
    finally:
        os.umask(before)
    for path in (tmp_path / "tokenizer", tmp_path / "prior"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755 & ~mask
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {mode}


def test_nothing_is_saved_over_links_and_strangers(tmp_path, folder):
    model = make_prior("marginal")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "link").symlink_to(folder / "prior")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "disguised").mkdir()
    (tmp_path / "disguised" / "config.json").symlink_to(tmp_path / "mine" / "thesis.tex")
    for name in ("mine", "link", "dangling", "disguised", "mine/thesis.tex"):
        with pytest.raises(PathError):
            model.save_pretrained(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work" and verify_manifest(folder)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "half", kind=None) as half:
        (half / "a").write_text("x")
        raise ZeroDivisionError
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["mine", "link", "dangling", "disguised", "pipeline"])


@pytest.mark.parametrize("called", [".", "inner/.."])
@pytest.mark.parametrize("filled", [False, True])
def test_a_folder_that_is_not_called_by_its_name_is_refused_before_any_work(tmp_path, monkeypatch, called, filled):
    """It is written beside its place, which of `.` is in it, and the names are exchanged."""
    model, mine = make_prior("marginal"), tmp_path / "mine"
    model.save_pretrained(mine) if filled else mine.mkdir()
    monkeypatch.chdir(mine)
    expected = rf"^{re.escape(called)} cannot be written: [^\n]*; write {mine} in its place$"
    with pytest.raises(PathError, match=expected), atomic_folder(called, kind=model.folder_kind()):
        pytest.fail("work was done")
    assert len(list(mine.iterdir())) == 2 * filled
    model.save_pretrained(mine)


@pytest.mark.parametrize("closed", ["mine", "mine/inner"])
def test_a_folder_that_cannot_be_looked_into_is_not_empty(tmp_path, closed):
    (tmp_path / "mine" / "inner").mkdir(parents=True)
    (tmp_path / "mine" / "inner" / "thesis.tex").write_text("years of work")
    (tmp_path / closed).chmod(0o300)
    refused = pytest.raises(PathError, match=f"^{tmp_path}/mine is there and not empty: ")
    with as_others(), refused, atomic_folder(tmp_path / "mine", kind=None):
        pass
    (tmp_path / closed).chmod(0o755)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "inner" / "thesis.tex").read_text() == "years of work"


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


@pytest.mark.parametrize("moment", [1, 2, 3])
@pytest.mark.parametrize("swaps", [True, False])
def test_ctrl_c_while_names_are_exchanged_leaves_one_whole_folder(tmp_path, monkeypatch, swaps, moment):
    """What was there or what comes, under its name and no other."""
    kind = Kind("a folder of a test", None, names=lambda name: name == "a")
    with atomic_folder(tmp_path / "out", kind=kind) as folder:
        (folder / "a").write_text("before")
    calls = []

    def interrupted(function):
        def call(*arguments, **options):
            calls.append(function)
            if len(calls) == moment:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out", kind=kind) as folder:
        (folder / "a").write_text("after")
        if not swaps:
            monkeypatch.setattr(writing, "exchange", lambda *_: False)
        monkeypatch.setattr(writing, "require_ours", interrupted(writing.require_ours))
        monkeypatch.setattr(type(tmp_path), "rename", interrupted(type(tmp_path).rename))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "before"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_the_memory_of_the_model_and_little_more(tmp_path, dtype):
    """300 million parameters: the file, in float32, has 1.2 GB."""
    code = (
        "import sys, torch; from tokenizer import TokenGrid; from prior import Prior\n"
        "model = Prior.create('gpt', grid=TokenGrid((4, 4), 512), dim=1024, depth=24, heads=16)\n"
        "model.to(getattr(torch, sys.argv[2])).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "prior"), dtype], check=True)
    code = (
        "import resource, sys, time, torch; from prior import Prior; Prior.available()\n"
        "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before, start = rss(), time.perf_counter()\n"
        "model = Prior.from_pretrained(sys.argv[1])\n"
        "size, seconds = sum(p.nbytes for p in model.parameters()), time.perf_counter() - start\n"
        "print(rss() - before, size, seconds)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "prior")], capture_output=True, text=True, check=True
    )
    grown, size, seconds = map(float, result.stdout.split())
    print(f"{dtype}: {grown / 2**20:.0f} MiB for a model of {size / 2**20:.0f} MiB, {seconds:.1f} s")
    assert grown < size + (200 << 20)
