"""What may be done to YAML, streams, and JSON by other names, besides the `WAYS` of `mutations`; and what makes
checksums fit."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml
from fuzzing.hostility import seal
from fuzzing.made_streams import reseal
from fuzzing.mutations import MANIFEST, NUMBERS, TEXTS, Tree, change_value, dumped, files_of, flip

# JSON by any name


def json_files(tree: Tree) -> list[str]:
    """Names of files that begin as JSON does."""
    return [name for name in files_of(tree) if tree[name][:1] in (b"{", b"[")]


def damage_any_json(tree: Tree, chance: Random) -> str:
    """A value in a file of JSON, or in a line of one that has lines."""
    name = chance.choice(json_files(tree))
    lines = tree[name].splitlines() if name.endswith(".jsonl") else [tree[name]]
    at = chance.randrange(len(lines))
    value = json.loads(lines[at])
    done = change_value(value, chance)
    lines[at] = dumped(value, chance)
    tree[name] = b"\n".join(lines)
    return f"{done} in {name}"


def cross_json(tree: Tree, chance: Random) -> str:
    """A value of one file in a place of another."""
    one, other = chance.choice(json_files(tree)), chance.choice(json_files(tree))
    values = {name: json.loads(tree[name].splitlines()[0]) for name in (one, other)}
    key, theirs = chance.choice(sorted(values[one])), chance.choice(sorted(values[other]))
    values[one][key] = values[other][theirs]
    tree[one] = json.dumps(values[one]).encode()
    return f"cross {theirs} of {other} into {key} of {one}"


def seal_manifest(tree: Tree, good: Tree, chance: Random) -> None:
    """Make the manifest fit, if it was not what was changed."""
    if tree.get(MANIFEST) == good[MANIFEST]:
        facts = {key: value for key, value in json.loads(good[MANIFEST]).items() if key != "files"}
        seal(tree, {**good, "secret": b"secret"}, facts)


# YAML


def bomb(chance: Random) -> str:
    """Aliases of aliases: lists, mappings or merges; or a node that holds itself."""
    width, depth = chance.choice([1, 2, 3, 9]), chance.choice([1, 5, 9, 20, 60])
    form = chance.choice(["[{}]", "{{{}}}", "merge", "itself"])
    lines = ["a0: &a0 {x: 1}" if form != "[{}]" else "a0: &a0 [1, 2]"]
    for level in range(1, depth + 1):
        names = [f"*a{level - 1}" for _ in range(width)]
        if form == "merge":
            lines.append(f"a{level}: &a{level}\n  <<: [{', '.join(names)}]\n  k{level}: 1")
        elif form == "itself":
            lines.append(f"a{level}: &a{level} [*a{level}]")
        else:
            inner = names if form == "[{}]" else [f"k{k}: {name}" for k, name in enumerate(names)]
            lines.append(f"a{level}: &a{level} {form.format(', '.join(inner))}")
    return "\n".join(lines)


ODD_YAML: list[Callable[[Random], str]] = [
    bomb,
    lambda chance: "k: " + "[" * chance.choice([10, 17, 900, 5000]),
    lambda chance: "{a: " * chance.choice([17, 900, 4000]) + "1",
    lambda chance: "\n".join(" " * depth + f"k{depth}:" for depth in range(chance.choice([17, 900]))),
    lambda chance: "\n".join(f"k{k}: {k}" for k in range(chance.choice([30, 3000, 30_000]))),
    lambda chance: "- 1\n" * chance.choice([3, 20_000, 80_000]),
    lambda chance: "? " * chance.choice([3, 500]) + "1",
    lambda chance: "- " * chance.choice([3, 500, 5000]) + "1",
    lambda chance: f"train: {{steps: 0x{'f' * chance.choice([3, 17, 5000])}}}",
    lambda chance: f"train: {{steps: 1{'_' * chance.choice([3, 200_000])}}}",
    lambda chance: "train: {steps: 1" + ":59" * chance.choice([3, 60_000]) + "}",
    lambda chance: "train: {lr: " + chance.choice([".inf", "-.inf", ".nan", "1e999", "1" * 5000 + ".0", "-0.0"]) + "}",
    lambda chance: chance.choice(["2024-01-01", "~", ".nan", "1", "yes", "[1, 2]", "? {a: 1}\n"]) + ": 1",
    lambda chance: (
        "!!" + chance.choice(["python/object/apply:os.system [ls]", "binary ????", "set {a}", "omap [a: 1]"])
    ),
    lambda chance: "k: !!" + chance.choice(["int x", "float x", "timestamp x", "bool x", "null x", "map 1", "seq 1"]),
    lambda chance: "k: !!" + chance.choice(["str {a: 1}", "int {=: 1}", "pairs [1]", "set [1]", "merge 1", "value 1"]),
    lambda chance: "%YAML 9.9\n---\na: 1\n...\n---\nb: 2",
    lambda chance: '"' + chance.choice(["\\e[2Jk", "\\x9b", "\\u202e", "\\0", "\\ud800", "a\\n error: b"]) + '": 1',
    lambda chance: 'out: "' + chance.choice(["\\e[2J", "a\\0b", "\\ud800", "x\\n error: y", "x" * 100_000]) + '"',
    lambda chance: "data: {source: " + chance.choice(TEXTS[:1] + ["/dev/zero", "x" * 5000, "ftp://127.0.0.1/a"]) + "}",
    lambda chance: "k: |\n" + "  x\n" * chance.choice([3, 50_000]),
    lambda chance: "#" * chance.choice([3, 200_000]),
    lambda chance: "k" * chance.choice([3, 1200, 200_000]) + ": 1",
    lambda chance: "&a" * chance.choice([1, 3000]) + " 1",
    lambda chance: "\t- a\n\tb: c",
    lambda chance: "a: 'b",
    lambda chance: "a: {b: [c, {d",
]


def damage_yaml(tree: Tree, chance: Random) -> str:
    """A value, or something odd before or after all, or in place of it."""
    name = chance.choice(files_of(tree, ".yaml"))
    text = tree[name].decode()
    if chance.random() < 0.5:
        value = yaml.safe_load(text)
        done = change_value(value, chance)
        dumped_value = yaml.safe_dump(value, allow_unicode=chance.random() < 0.5)
        tree[name] = dumped_value.encode("utf-8", "surrogatepass")
        return f"{done} in {name}"
    number = chance.randrange(len(ODD_YAML))
    odd = ODD_YAML[number](chance)
    whole = chance.choice([f"{odd}\n{text}", f"{text}\n{odd}", odd])
    tree[name] = whole.encode("utf-8", "surrogatepass")
    return f"odd {number} in {name}"


# Streams

HEADER = {"version": (4, 1), "profile": (5, 1), "coder": (6, 1), "flags": (7, 1), "model": (8, 1), "codes": (24, 4)}
HEADER |= {name: (28 + 2 * k, 2) for k, name in enumerate(("rows", "columns", "channels", "height", "width"))}
HEADER |= {"images": (38, 4), "chunk": (42, 2), "answer": (44, 1)}


def damage_header(tree: Tree, chance: Random) -> str:
    """A field of the header, whose checksum is then made to fit."""
    name, (field, (at, size)) = chance.choice(files_of(tree)), chance.choice(sorted(HEADER.items()))
    now = int.from_bytes(tree[name][at : at + size], "little")
    number = chance.choice([now + 1, now - 1, now * 2, 0, 1, (1 << 8 * size) - 1, chance.randrange(1 << 8 * size)])
    whole = (number % (1 << 8 * size)).to_bytes(size, "little")
    tree[name] = reseal(tree[name][:at] + whole + tree[name][at + size :], 0, 56)
    return f"{field}={number} in {name}"


def damage_chunks(tree: Tree, chance: Random) -> str:
    """Bits or a word at one place behind the header; rather near its beginning, where the fields of a chunk are."""
    name = chance.choice(files_of(tree))
    data = tree[name]
    at = min(len(data) - 1, 56 + int(chance.expovariate(1 / 30)))
    way = chance.choice(["flip", "word", "varint"])
    if way == "flip":
        data = data[:at] + flip(data[at:], chance)
    else:
        word = b"\xff\xff\xff\xff\x7f" if way == "varint" else struct.pack("<I", chance.randrange(1 << 32))
        data = data[:at] + word[: chance.randrange(1, 6)] + data[at + 4 :]
    tree[name] = data
    return f"{way} in {name}"


def seal_stream(tree: Tree, good: Tree, chance: Random) -> None:
    """Make every checksum fit that is where it was."""
    from pipelines.compression.streams import parse

    for name in files_of(tree):
        starts = [0, *parse(good[name])._starts, len(good[name])]
        for start, end in zip(starts, starts[1:], strict=False):
            if end - start > 4 and end <= len(tree[name]):
                tree[name] = reseal(tree[name], start, end)


# Images


def seal_png(tree: Tree, good: Tree, chance: Random) -> None:
    """Make the checksums of a PNG's parts fit, as far as there are parts."""
    for name in files_of(tree, ".png"):
        data, at = bytearray(tree[name]), 8
        while at + 12 <= len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            if at + 12 + size > len(data):
                break
            sum_ = zlib.crc32(bytes(data[at + 4 : at + 8 + size]))
            data[at + 8 + size : at + 12 + size] = sum_.to_bytes(4, "big")
            at += 12 + size
        tree[name] = bytes(data)


def damage_sizes(tree: Tree, chance: Random) -> str:
    """A number of the first bytes, where formats keep sizes, at its limits."""
    name = chance.choice(files_of(tree))
    data, size = tree[name], chance.choice([1, 2, 4])
    at = chance.randrange(min(len(data), 64))
    number = int(chance.choice([n for n in NUMBERS if isinstance(n, int)])) % (1 << 8 * size)
    tree[name] = data[:at] + number.to_bytes(size, chance.choice(["little", "big"])) + data[at + size :]
    return f"{number} at {at} of {name}"


# HTTP

FAULTS = (
    "status",
    "length",
    "no length",
    "redirect",
    "etag",
    "no parts",
    "range",
    "short",
    "long",
    "other",
    "chunks",
    "drip",
    "silence",
    "reset",
    "headers",
    "garbage",
    "endless",
    "encoding",
)
PLACES = (
    "/loop",
    "ftp://127.0.0.1:9/a.tar",
    "file:///etc/passwd",
    "http://127.0.0.1:9/a.tar",
    "javascript:1",
    "",
    "//",
    "http://[::1",
    "http://a\x1b[2J/",
    "/" + "x" * 5000,
    "data:,1",
)
LENGTHS = ("-1", "x", "", "1e3", "99999999999999999999", "0", "1", "18446744073709551616", "1, 2")
STATUSES = (100, 199, 204, 206, 304, 400, 401, 403, 404, 408, 416, 429, 500, 502, 503, 599, 999)


def damage_answers(tree: Tree, chance: Random) -> str:
    """From some request on, or at one: another fault of the server."""
    plan = json.loads(tree["plan.json"])
    fault, at = chance.choice(FAULTS), chance.choice([0, 0, 1, 2, 3, 5, 8])
    detail: Any = {
        "status": chance.choice(STATUSES),
        "redirect": [chance.choice([301, 302, 303, 307, 308]), chance.choice(PLACES)],
        "length": chance.choice(LENGTHS),
        "range": chance.choice(["", "bytes", "bytes 0-1/2", "bytes 5-1/9", "bytes */9", "bytes 0-99999999999/*", "x"]),
    }.get(fault, chance.randrange(1 << 30))
    plan.append({"at": at, "for": chance.choice([1, 1, 2, 1000]), "fault": fault, "detail": detail})
    tree["plan.json"] = json.dumps(plan).encode()
    return f"{fault} {detail!r:.40} at {at}"


def read_plan(folder: Path) -> list[dict[str, Any]]:
    """The faults of a case."""
    found: list[dict[str, Any]] = json.loads((folder / "plan.json").read_bytes())
    return found
