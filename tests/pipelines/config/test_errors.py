"""Errors of a command line: one line for each, that a terminal only prints."""

from __future__ import annotations

import pytest

from pipelines import train_tokenizer
from pipelines.config import UserError


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
    assert lines_of(capsys, f"out={name}", "data.source=digits") == [f"error: {name}/config.yaml: File name too long"]
    found = lines_of(capsys, f"out={tmp_path}/run", f"data.source={name}", "track.wandb=disabled")
    assert found == [f"error: {name}: File name too long"]
