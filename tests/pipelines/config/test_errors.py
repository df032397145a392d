"""Errors of a command line: one line for each, that a terminal only prints."""

from __future__ import annotations

import pytest
from command import fails
from ordinary import as_others

from pipelines import train_tokenizer
from pipelines.config import UserError, choose_device
from pipelines.config.command import is_for_users


def lines_of(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        train_tokenizer.main(list(argv))
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()


def test_unprintable_characters_are_escaped_wherever_they_come_from(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text('"\\e[2Jk": 1\n"\\x9b\\u202e": 2\n"a\\n error: forged": 3')
    found = lines_of(capsys, "--config", str(tmp_path / "a.yaml"), "\x1b[2Jx=1", "out=run")
    assert len(found) == 4 and all(line.startswith("error: ") and line.isprintable() for line in found)
    assert [r"\x1b[2Jk" in line for line in found] == [False, True, False, False]
    assert r"\x9b\u202e" in found[2] and r"a\n error: forged" in found[3]
    assert str(UserError("a\x1b[2J\nb\u2028c")) == "a\\x1b[2J\nb\\u2028c"


def test_of_thousands_of_unknown_keys_some_are_told(tmp_path, capsys):
    """Looking for what each was meant to be would take minutes."""
    (tmp_path / "flat.yaml").write_text("".join(f"key{k}: {k}\n" for k in range(2000)))
    (tmp_path / "below.yaml").write_text("train:\n" + "".join(f"  key{k}: {k}\n" for k in range(2000)))
    (tmp_path / "long.yaml").write_text(f"? {'k' * 5000}\n: 1")
    for name in ("flat", "below"):
        found = lines_of(capsys, "--config", str(tmp_path / f"{name}.yaml"), "out=run")
        assert 20 <= len(found) <= 22 and "key0: unknown key" in found[0] and found[-1] == "error: and more"
    assert len(lines_of(capsys, "--config", str(tmp_path / "long.yaml"), "out=run")[0]) < 300


def test_a_name_that_is_too_long_is_told_in_a_line(tmp_path, capsys):
    name = tmp_path / ("x" * 300)
    assert lines_of(capsys, f"out={name}", "data.source=digits") == [f"error: {name}/state: File name too long"]
    found = lines_of(capsys, f"out={tmp_path}/run", f"data.source={name}", "track.wandb=disabled")
    assert found == [f"error: {name}: File name too long"]


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "pipeline={closed}/pipeline"),
        ("generate", "pipeline={closed}"),
        ("generate", "pipeline=digits", "num_images=1", "out={closed}/images"),
        ("complete", "pipeline=digits", "images={closed}/inner"),
        ("reconstruct", "tokenizer={closed}"),
        ("decompress", "pipeline=digits", "stream={closed}/stream", "out={tmp}/out"),
        ("verify", "folder={closed}"),
        ("push", "folder={closed}", "to=owner/name"),
        ("import", "source={closed}", "out={tmp}/out"),
        ("train_tokenizer", "out={closed}/run"),
        ("train_tokenizer", "out={tmp}/run", "data.source={closed}", "track.wandb=disabled"),
        ("train_prior", "out={tmp}/run", "tokens={closed}", "track.wandb=disabled"),
    ],
)
def test_a_folder_that_may_not_be_looked_into_is_told_in_a_line(tmp_path, capsys, words):
    closed = tmp_path / "closed"
    (closed / "inner").mkdir(parents=True)
    closed.chmod(0)
    with as_others():
        line = fails(capsys, *(word.format(closed=closed, tmp=tmp_path) for word in words))
    closed.chmod(0o755)
    assert str(closed) in line and "Permission denied" in line
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "run") == ["closed"]


def test_a_refusal_that_names_no_file_is_a_bug():
    assert not is_for_users(PermissionError(1, "Operation not permitted"))
    assert is_for_users(PermissionError(13, "Permission denied", "folder/file"))


def test_a_device_without_numbers_is_refused():
    with pytest.raises(UserError, match=r"^device: 'meta' holds shapes and no numbers; there are cpu, [^\n]*auto$"):
        choose_device("meta")
