"""YAML from anyone: what it may be, and that a few hundred bytes cost no more than they are."""

from __future__ import annotations

import os

import pytest

from pipelines.config import UserError
from pipelines.config.arguments import read_file, read_override, read_yaml
from pipelines.config.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_NODES, write_yaml


def aliases(node: str, first: str = "a0: &a0 [1]", levels: int = 12) -> str:
    """Each level holds the one before several times: `node` has {} for the alias of that."""
    below = [f"a{k}: &a{k} {node.replace('{}', f'*a{k - 1}')}" for k in range(1, levels)]
    return "\n".join([first, *below])


TOO_MUCH = {
    "lists of lists": (aliases("[{}, {}, {}, {}, {}, {}, {}, {}, {}]"), "aliases written out"),
    "mappings of mappings": (aliases("{x: {}, y: {}, z: {}}", "a0: &a0 {x: 1}"), "aliases written out"),
    "a chain": (aliases("[{}]", levels=40), "levels deep"),
    "itself in a list": ("a: &a [*a]", "holds itself"),
    "itself in a mapping": ("a: &a {b: *a}", "holds itself"),
    "itself, merged": ("a: &a\n  <<: *a", "holds itself"),
    "deep lists": ("a: " + "[" * 1500 + "]" * 1500, f"more than {MAX_DEPTH} levels deep"),
    "deep mappings": ("{a: " * 3000 + "1" + "}" * 3000, f"more than {MAX_DEPTH} levels deep"),
    "many keys": ("- 1\n" * (MAX_NODES + 1), f"more than {MAX_NODES}"),
    "a large number": ("a: 0xfffffffffffffffffff", "more than 64 bits"),
    "a long number": ("a: 0x" + "f" * 5000, "5002 characters"),
    "a number of base 60": ("a: 190:20:30" + ":59" * 3000, "9009 characters"),
    "a NUL": ('a: "b\\0c"', "NUL"),
    "half a character": ('a: "\\ud800"', "surrogate"),
    "no time": ("a: !!timestamp x", "not readable as YAML"),
    "no truth": ("a: !!bool x", "not readable as YAML"),
    "no such date": ("a: 2024-13-01", "not readable as YAML"),
    "a date for a key": ("a: {2024-01-01: 1}", "a key is date, and should be text"),
    "bytes for a key": ("!!binary aGk=: 1", "a key is bytes"),
    "code": ("a: !!python/object/apply:os.mkdir [b]", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_is_too_much_or_nothing_is_refused_in_a_line(name, tmp_path):
    text, reason = TOO_MUCH[name]
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        read_file(str(tmp_path / "a.yaml"))
    assert str(caught.value).startswith(f"{tmp_path}/a.yaml, ") and str(caught.value).isprintable()


def test_aliases_and_merges_of_reasonable_size_are_read():
    text = "base: &base {steps: 3, lr: 1e-3}\nmine: {<<: *base, steps: 4}\nlist: [*base, *base]"
    base = {"steps": 3, "lr": 0.001}
    assert read_yaml(text) == {"base": base, "mine": {"steps": 4, "lr": 0.001}, "list": [base, base]}
    data = {"a": [1, 2.5, "x: y", None, True, (1 << 64) - 1, -(1 << 63)], "b": {"c": {"d": "1e-3"}, "a\x85b": "\x85"}}
    assert read_yaml(write_yaml(data)) == data


def test_a_file_is_a_file_of_reasonable_size(tmp_path):
    """Neither a pipe, for which one would wait, nor a device without an end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_text("#" * (MAX_BYTES + 1))
    reasons = {tmp_path / "pipe": "not a regular", "/dev/zero": "not a regular", tmp_path / "large.yaml": "at most"}
    for path, reason in reasons.items():
        with pytest.raises(UserError, match=rf"^{path}: cannot be read \(.*{reason}"):
            read_file(str(path))


def test_a_key_of_a_thousand_parts_is_none():
    with pytest.raises(UserError, match="expected --config FILE, key=value"):
        read_override(".".join("a" * 3000) + "=1")
