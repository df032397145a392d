"""Which states a run has and which it keeps: what is said of each that cannot be used, and what stays untouched."""

from __future__ import annotations

import errno
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from ordinary import as_others

from pipelines.training.checkpoints import rotation
from pipelines.training.checkpoints.rotation import latest_state, require_space, rotate, states_in
from tokenizer.files import IntegrityError, PathError, UnreadableError, write_manifest


def make_state(run: Path, step: int, name: str | None = None, size: int = 10) -> Path:
    folder = run / "state" / (name or f"step-{step:08d}")
    folder.mkdir(parents=True)
    (folder / "state.json").write_bytes(b"x" * size)
    write_manifest(folder, step=step)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_no_states_are_none(tmp_path):
    assert latest_state(tmp_path) is None and latest_state(tmp_path / "none") is None
    (tmp_path / "state").mkdir()
    assert latest_state(tmp_path) is None and states_in(tmp_path / "none") == []


def test_of_states_none_of_which_is_whole_none_is_deleted(tmp_path, capsys):
    for step in (1, 2):
        (make_state(tmp_path, step) / "state.json").write_bytes(b"damaged")
    (tmp_path / "state" / ".tmp-step-00000003-01234567").mkdir()
    said = (
        f"{tmp_path / 'state'}: none of its 2 states is whole; nothing was changed. To begin again at zero, choose "
        f"another out=, or delete {tmp_path}"
    )
    with pytest.raises(IntegrityError, match=f"^{re.escape(said)}$"):
        latest_state(tmp_path)
    assert len(names(tmp_path / "state")) == 3
    warned = capsys.readouterr().err.splitlines()
    for line, step in zip(warned, (2, 1), strict=True):  # the newest first
        assert line.startswith(f"warning: state step-{step:08d} is passed over: {tmp_path / 'state'}")


@pytest.mark.parametrize("error", [UnreadableError("a bad sector"), OSError(errno.EIO, "a bad sector")])
def test_one_that_cannot_be_read_now_ends_it(tmp_path, monkeypatch, error):
    """It may be a good one."""
    make_state(tmp_path, 1)
    newest = make_state(tmp_path, 2)

    def unreadable(path: Path) -> None:
        if path == newest:
            raise error

    monkeypatch.setattr(rotation, "verify_manifest", unreadable)
    said = (
        f"{newest}: cannot be read, which is not to say that it is damaged; nothing was changed. Try again, or move "
        f"that state away ({error})"
    )
    with pytest.raises(UnreadableError, match=f"^{re.escape(said)}$"):
        latest_state(tmp_path)


@pytest.mark.parametrize("mode", [0o000, 0o300, 0o600])
def test_states_that_may_not_be_looked_at_are_not_none(tmp_path, mode):
    """A run would begin at zero, and put its snapshot in the place of the good one."""
    state = make_state(tmp_path, 1)
    state.parent.chmod(mode)
    refused = pytest.raises(UnreadableError, match=f"^{tmp_path}/state: cannot be read, so it is not known which")
    try:
        with as_others(), refused:
            latest_state(tmp_path)
    finally:
        state.parent.chmod(0o755)
    assert latest_state(tmp_path) == state


def test_what_a_killed_process_left_is_deleted_and_nothing_else(tmp_path):
    """Folders, files and links, of every kind that is written; not those that only look like them."""
    state = make_state(tmp_path, 1)
    (tmp_path / "previews").mkdir()
    left = [
        "state/.tmp-step-00000002-0123abcd",
        "state/.del-step-123456789-0123abcd",
        ".tmp-tokenizer-0123abcd",
        ".del-pipeline-01234567-0123abcd",
        ".tmp-.tmp-pipeline-01234567-0123abcd",
        ".tmp-config.yaml-0123abcd",
        ".tmp-metrics.jsonl-0123abcd",
        ".del-trackers.json-0123abcd",
        "previews/.tmp-samples-00000010.png-0123abcd",
        "previews/.tmp-samples-00000010.png-0123abcd.png",
    ]
    others = [
        "state/.tmp-step-0000002-0123abcd",
        "state/.tmp-step-00000002-0123abc",
        "state/.tmp-step-00000002-0123ABCD",
        "state/.old-step-00000002-0123abcd",
        "state/tmp-step-00000002-0123abcd",
        ".tmp-notes-0123abcd",
        ".tmp-config.toml-0123abcd",
        "previews/.tmp-samples-00000010.jpg-0123abcd",
        "previews/samples-00000010.png",
    ]
    for number, name in enumerate([*left, *others]):
        if number % 3 == 0:
            (tmp_path / name).write_text("a file")
        elif number % 3 == 1:
            (tmp_path / name).mkdir()
            (tmp_path / name / "inside").touch()
        else:
            (tmp_path / name).symlink_to(state)
    assert latest_state(tmp_path) == state
    assert [name for name in left if (tmp_path / name).is_symlink() or (tmp_path / name).exists()] == []
    assert [name for name in others if not (tmp_path / name).exists()] == []
    assert names(state) == ["manifest.json", "state.json"]  # a link is deleted, not what it points to


def test_states_are_folders_of_that_name(tmp_path):
    folder = tmp_path / "state"
    made = [make_state(tmp_path, step) for step in (30, 4, 123456789)]
    (folder / "step-00000050").touch()
    for name in ("step-0000001", "step-00000001x", "step-", "steps-00000001", ".tmp-step-00000060-0123abcd"):
        (folder / name).mkdir()
    assert states_in(folder) == [made[1], made[0], made[2]]


@pytest.mark.parametrize(("keep", "kept"), [(0, [3]), (1, [3]), (2, [2, 3]), (3, [1, 2, 3]), (9, [1, 2, 3])])
def test_so_many_are_kept_with_the_one_just_saved(tmp_path, keep, kept):
    """And those of later steps, which can only be damaged, do not count."""
    made = {step: make_state(tmp_path, step) for step in (1, 2, 3, 4, 5)}
    rotate(made[3], keep)
    assert [rotation.step_of(path) for path in states_in(tmp_path / "state")] == [*kept, 4, 5]
    assert len(names(tmp_path / "state")) == len(kept) + 2


def test_one_that_was_set_aside_gets_its_name_back_if_it_is_whole_and_the_name_free(tmp_path, capsys):
    good = make_state(tmp_path, 7, ".del-step-00000007-0123abcd")
    bad = make_state(tmp_path, 8, ".del-step-00000008-0123abcd")
    (bad / "state.json").write_bytes(b"damaged")
    (tmp_path / "state" / "step-00000009").touch()
    make_state(tmp_path, 9, ".del-step-00000009-0123abcd")
    assert latest_state(tmp_path) == good.with_name("step-00000007")
    assert names(tmp_path / "state") == ["step-00000007", "step-00000009"]
    assert "warning: state .del-step-00000008-0123abcd is passed over" in capsys.readouterr().err or not bad.exists()


def test_there_is_room_for_one_more_or_nothing_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    folder, asked = tmp_path / "state", []

    def set_free(number: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage(10**9, 0, number))

    def needs(number: int) -> None:
        set_free(number)
        require_space(folder, parts)
        set_free(number - 1)
        said = f"{folder}: a state needs {number} bytes, {number - 1} are free; nothing was written"
        with pytest.raises(OSError, match=re.escape(said)) as caught:
            require_space(folder, parts)
        assert caught.value.errno == errno.ENOSPC and caught.value.strerror == said

    folder.mkdir()
    parts = {"a": {"x": torch.zeros(100), "y": torch.zeros(10).double()}, "b": {"z": torch.zeros(5, dtype=torch.int8)}}
    needs(int(1.2 * 485))  # as large as what is coming
    make_state(tmp_path, 1, size=9000)
    last = make_state(tmp_path, 2, size=1000)
    (last / "model").mkdir()
    (last / "model" / "shard").write_bytes(bytes(500))
    size = 1500 + (last / "manifest.json").stat().st_size
    needs(int(1.2 * size))  # as the last state, with what is in its folders
    assert set(asked) == {folder}


def test_a_missing_manifest_is_no_bad_disk(tmp_path):
    (make_state(tmp_path, 1) / "manifest.json").unlink()
    make_state(tmp_path, 2)
    assert latest_state(tmp_path) == tmp_path / "state" / "step-00000002"
    with pytest.raises(PathError):
        rotation.verify_manifest(tmp_path / "state" / "step-00000001")
