"""What is saved: with which modes, over what, and in how much memory it is loaded again."""

from __future__ import annotations

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
from tokenizer.files.reading import verify_manifest
from tokenizer.files.writing import atomic_folder, results_folder


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
