"""Reading and writing the folders of models: typed errors, manifests, and atomic replacement."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
from ordinary import as_others
from small import make_prior

from tokenizer import files
from tokenizer.files import (
    MANIFEST,
    ConfigError,
    FolderKind,
    FormatError,
    IntegrityError,
    PathError,
    UnreadableError,
    atomic_folder,
    find_folder,
    one_line,
    parse_json,
    read_bytes,
    read_folder,
    read_json,
    verify_manifest,
    write_json,
    write_manifest,
)

NOTES = FolderKind("a folder of notes", "notes.json", lambda notes: notes.get("ours") is True)


@pytest.fixture
def notes(tmp_path):
    """A folder of ours with a manifest."""
    with atomic_folder(tmp_path / "notes", kind=NOTES) as folder:
        write_json(folder / "notes.json", {"ours": True})
        (folder / "inner").mkdir()
        (folder / "inner" / "data.bin").write_bytes(b"data")
        write_manifest(folder, title="x")
    return tmp_path / "notes"


# Reading


def test_an_error_is_one_line_of_printable_text():
    error = ConfigError("a\x1b[2Jb\nc\u202ed\ud800" + "x" * 5000)
    assert str(error).isprintable() and len(str(error)) <= 900 and str(error).startswith(r"a\x1b[2Jb\nc\u202ed\ud800x")
    assert one_line("grüße, 日本語 🦑") == "grüße, 日本語 🦑"


@pytest.mark.parametrize("text", ["", "[1]", '{"a": NaN}', "[" * 100_000, "\udcff"])
def test_anything_but_a_json_object_is_a_format_error(text):
    with pytest.raises(FormatError, match=r"^some\.json: "):
        parse_json(text.encode("utf-8", "surrogateescape"), "some.json")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev", "/nowhere", "a\0b", "x" * 5000])
def test_only_regular_files_are_read(path):
    with pytest.raises(PathError):
        read_bytes(path, 1 << 20)


def test_a_manifest_finds_the_file_that_changed(notes):
    path = notes / "inner" / "data.bin"
    path.write_bytes(b"Data")
    with pytest.raises(IntegrityError, match=r"inner/data\.bin"):
        verify_manifest(notes)
    assert verify_manifest(notes, unhashed=["inner/data.bin"])["title"] == "x"
    path.write_bytes(b"datax")
    with pytest.raises(IntegrityError, match=r"inner/data\.bin"):
        verify_manifest(notes, unhashed=["inner/data.bin"])


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "", "a\0b"])
def test_a_source_is_a_folder_or_a_hub_id(source, tmp_path):
    with pytest.raises(PathError, match="neither"):
        find_folder(source, ["*"])
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(PathError, match="is a file"):
        find_folder(tmp_path / "model.safetensors", ["*"])


def test_every_error_of_the_hub_is_a_path_error_that_suggests_a_folder(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("peer closed\nconnection")

    (tmp_path / "runs/mine_gpt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(PathError, match="peer closed; did you mean runs/mine_gpt"):
        find_folder("runs/mine_gtp", ["*"])


def test_a_reader_waits_while_a_folder_is_being_replaced(notes):
    aside = notes.rename(notes.with_name(".del-notes-0123abcd"))
    back = threading.Timer(0.2, aside.rename, [notes])
    back.start()
    assert find_folder(notes, ["*"]) == notes
    back.join()


def test_after_an_interrupted_replacement_the_error_names_the_old_folder(notes, monkeypatch):
    """As when a process is killed between two renames."""
    monkeypatch.setattr(files, "publish_folder", lambda *_, **__: notes.rename(notes.with_name(".del-notes-0123abcd")))
    with atomic_folder(notes, kind=NOTES) as folder:
        write_json(folder / "notes.json", {"ours": True})
    with pytest.raises(PathError, match=r"\.del-notes-0123abcd"):
        find_folder(notes, ["*"])
    (folder := files.folders_aside(notes)[0]).rename(notes)
    assert find_folder(notes, ["*"]) == notes and verify_manifest(notes) and not folder.exists()


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(notes, fails):
    reads = []

    def read(replacements):
        reads.append(read_json(notes / "notes.json"))
        if len(reads) <= replacements:
            with atomic_folder(notes, kind=NOTES) as folder:
                write_json(folder / "notes.json", {"ours": True, "number": len(reads)})
                write_manifest(folder)
            if fails:
                raise IntegrityError("half of each")
        return reads[-1]

    assert read_folder(notes, lambda: read(1)) == {"ours": True, "number": 1} and len(reads) == 2
    with pytest.raises(UnreadableError):
        read_folder(notes, lambda: read(99))


# Writing


def put_a_link(folder: Path) -> None:
    shutil.move(folder / "inner" / "data.bin", folder.parent / "data.bin")
    (folder / "inner" / "data.bin").symlink_to(folder.parent / "data.bin")


CHANGES = {
    "a file more": lambda folder: (folder / "inner" / "thesis.tex").write_text("years of work"),
    "an edited text": lambda folder: (folder / "notes.json").write_text('{"ours": true, "mine": 1}'),
    "no marker": lambda folder: (folder / "notes.json").write_text('{"ours": false}'),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "a link": put_a_link,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_folder_with_files_of_the_user_is_not_replaced(notes, change, when):
    if when == "before":
        change(notes)
    with pytest.raises(PathError, match="notes"), atomic_folder(notes, kind=NOTES) as folder:
        assert when == "meanwhile", "refused before the work"
        (folder / "new").touch()
        change(notes)
    assert not (notes / "new").exists() and (notes / "notes.json").exists()
    assert {path.name for path in notes.parent.iterdir()} <= {"notes", "data.bin"}


@pytest.mark.parametrize(("mask", "mode"), [(0o000, 0o644), (0o077, 0o600)])
def test_others_may_read_files_but_not_write_them(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        make_prior("marginal").save_pretrained(tmp_path / "prior")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "prior").stat().st_mode) == 0o755 & ~mask
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "prior").iterdir()} == {mode}


def test_links_and_folders_of_others_are_not_replaced(tmp_path, notes):
    model = make_prior("marginal")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "link").symlink_to(notes)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "disguised").mkdir()
    (tmp_path / "disguised" / "config.json").symlink_to(tmp_path / "mine" / "thesis.tex")
    for name in ("mine", "link", "dangling", "disguised", "mine/thesis.tex"):
        with pytest.raises(PathError):
            model.save_pretrained(tmp_path / name)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work" and verify_manifest(notes)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "half", kind=None) as half:
        (half / "a").write_text("x")
        raise ZeroDivisionError
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["mine", "link", "dangling", "disguised", "notes"])


def test_a_folder_that_cannot_be_listed_is_not_empty(tmp_path):
    (tmp_path / "mine" / "inner").mkdir(parents=True)
    (tmp_path / "mine" / "inner" / "thesis.tex").write_text("years of work")
    (tmp_path / "mine" / "inner").chmod(0o300)
    with as_others(), pytest.raises(PathError, match="mine"), atomic_folder(tmp_path / "mine", kind=None):
        pass
    (tmp_path / "mine" / "inner").chmod(0o755)
    assert (tmp_path / "mine" / "inner" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_ctrl_c_while_a_folder_is_replaced_leaves_the_old_folder(tmp_path, monkeypatch, moment):
    kind = FolderKind("a folder of a test", None, may_hold=lambda name: name == "a")
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
        monkeypatch.setattr(files, "require_replaceable", interrupted(files.require_replaceable))
        monkeypatch.setattr(type(tmp_path), "rename", interrupted(type(tmp_path).rename))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "before"


def test_a_folder_has_to_be_given_by_its_own_name(notes, monkeypatch):
    monkeypatch.chdir(notes)
    with pytest.raises(PathError, match=str(notes)), atomic_folder(".", kind=NOTES):
        pytest.fail("refused before the work")
