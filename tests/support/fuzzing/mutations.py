"""What a folder may suffer: a `Tree`, names to bytes or to what else can stand in a file's place, is damaged in place.

Each of `WAYS` takes a tree and a source of chance, and says in a few words what it did.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

Tree = dict[str, Any]
MANIFEST, CANARY = "manifest.json", "unpickled-canary"
CANARIES = [
    "pytorch_model.bin",
    "model.pt",
    "model.pth",
    "model.ckpt",
    "model.pkl",
    "optimizer.bin",
    "random_states_0.pkl",
    "diffusion_pytorch_model.bin",
    "custom_checkpoint_0.pkl",
    "training_args.bin",
    "scheduler.bin",
    "weights.npz",
]


@dataclass(frozen=True)
class Link:
    """A symbolic link; {foreign} is a folder outside."""

    target: str


@dataclass(frozen=True)
class Special:
    """A named "pipe", which blocks who opens it; a "folder" where a file belongs; or `size` zeros that take no room."""

    kind: str
    size: int = 0


class Canary:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path: str | Path = CANARY) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def files_of(tree: Tree, suffix: str = "") -> list[str]:
    """Names of the regular files."""
    return [name for name, node in tree.items() if isinstance(node, bytes) and name.endswith(suffix)]


# Bytes


def flip(data: bytes, chance: Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def cut(data: bytes, chance: Random) -> bytes:
    return data[: chance.choice([0, 1, 7, 8, 9, chance.randrange(len(data)), len(data) - 1])]


def extend(data: bytes, chance: Random) -> bytes:
    return data + chance.choice([b"\0", b" ", b"\n{}", bytes(4096), data])


def insert(data: bytes, chance: Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + chance.randbytes(chance.randrange(1, 9)) + data[place:]


def remove(data: bytes, chance: Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + data[place + chance.randrange(1, 40) :]


def repeat(data: bytes, chance: Random) -> bytes:
    place = chance.randrange(len(data))
    return data[: place + 30] + data[place:]


def blank(data: bytes, chance: Random) -> bytes:
    place, size = chance.randrange(len(data)), chance.randrange(1, 512)
    return data[:place] + (chance.choice([b"\0", b"\xff"]) * size)[: len(data) - place] + data[place + size :]


def noise(data: bytes, chance: Random) -> bytes:
    return chance.randbytes(chance.choice([0, 1, 8, 64, 5000]))


def damage_bytes(tree: Tree, chance: Random) -> str:
    """Any file, any bytes."""
    name, way = (
        chance.choice(files_of(tree)),
        chance.choice([flip, flip, flip, cut, extend, insert, remove, repeat, blank, noise]),
    )
    tree[name] = way(tree[name] or b" ", chance)
    return f"{way.__name__} {name}"


# JSON

TEXTS = [
    "",
    " ",
    "x" * 100_000,
    "\x1b[31mred\x1b[0m",
    "a\nb\rc",
    "\u202egnp",
    "ｇｐｔ",
    "../../etc/passwd",
    "a\0b",
    "/etc/passwd",
    "\ud800",
    "os.system",
    "random:" + "9" * 30,
    "random:²",
    "random:7",
    "hilbert",
    "{0.__class__}",
    "%s%n",
    "pytorch_model.bin",
    "gpt",
    "masked",
    "vqvae",
    "ema",
    "posthoc",
    "None",
    "NaN",
    "1e5",
    "тest",
]
NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    8,
    16,
    64,
    255,
    256,
    4096,
    16384,
    65536,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    1 << 40,
    (1 << 53) + 1,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    1 << 64,
    10**30,
    10**400,
    0.5,
    -0.5,
    -0.0,
    1e-320,
    1e-30,
    1e10,
    1e38,
    1e39,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
]


def nested(depth: int, kind: type) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if kind is dict else [value]
    return value


def another(now: Any, chance: Random) -> Any:
    """Another value where `now` stands."""
    if type(now) in (int, float) and chance.random() < 0.5:
        return chance.choice([now + 1, now - 1, now * 2, now // 2, -now, now * 1000, float(now), str(now), [now]])
    if isinstance(now, list) and now and chance.random() < 0.5:
        longer = [[*now, now[-1]], now * 100, now * 3000]
        return chance.choice([*longer, now[:-1], now[::-1], [now], {"a": now}, now[0]])
    return chance.choice(
        [
            chance.choice(NUMBERS),
            chance.choice(NUMBERS),
            chance.choice(TEXTS),
            chance.choice(TEXTS),
            None,
            True,
            False,
            [],
            {},
            [[]],
            [chance.choice(NUMBERS)] * chance.choice([1, 2, 3, 65, 5000]),
            {"kind": chance.choice(TEXTS)},
            nested(chance.choice([5, 15, 17, 300]), chance.choice([dict, list])),
            ["x" * 50_000, *[""] * 5000],
            {str(n): n for n in range(chance.choice([1, 30, 11_000]))},
        ]
    )


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in `value`; once of what it holds many times, as YAML's aliases do."""
    found, rest, seen = [], [value], set[int]()
    while rest:
        item = rest.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        for key in list(item) if isinstance(item, dict) else range(len(item)):
            found.append((item, key))
            if isinstance(item[key], (dict, list)) and item[key]:
                rest.append(item[key])
    return found


def change_value(value: Any, chance: Random) -> str:
    """One change somewhere in a JSON object; rather of fields than of the numbers in long lists."""
    places = places_in(value)
    if chance.random() < 0.8:
        places = [place for place in places if isinstance(place[0], dict)]
    container, key = chance.choice(places)
    way = chance.choice(["replace"] * 6 + ["delete", "rename", "add", "swap"])
    now = container[key]
    if way == "delete":
        del container[key]
    elif way == "swap":
        other, name = chance.choice(places)
        container[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(now)
    elif way in ("rename", "add") and isinstance(container, dict):
        name = chance.choice([*TEXTS, key.upper(), f"{key} ", key.replace("a", "а"), f"{key}2"])
        container[name] = container.pop(key) if way == "rename" else another(now, chance)
    else:
        container[key] = another(now, chance)
    return f"{way} {key!s:.40}"


def dumped(value: Any, chance: Random) -> bytes:
    """As JSON; once in a while in a form that is not quite it."""
    text = json.dumps(value)
    if chance.random() < 0.15:
        first = next(iter(value), "a") if isinstance(value, dict) else "a"
        text = chance.choice(
            [
                text.replace("{", f'{{"{first}": 1, ', 1),
                text.replace('"kind"', '"kind": "gpt", "kind"', 1),
                text[:-1],
                "\ufeff" + text,
                text.replace('"', "'"),
                text + text,
                text.replace(":", "::", 1),
                text.replace("1", "01"),
                text.replace("1", "+1"),
                f"[{text}]",
                f"// {text}",
                text.replace(",", ",,", 1),
                text.replace("1", "1e999", 1),
                text.replace("1", "9" * 5000, 1),
                text + " " * (1 << 20),
                '{"a":' * 50_000,
                "[" * 500_000,
            ]
        )
    return text.encode("utf-8", "surrogatepass")


def damage_json(tree: Tree, chance: Random) -> str:
    """A value of a JSON file; the manifest's less often."""
    names = files_of(tree, ".json")
    name = chance.choice([n for n in names if n != MANIFEST] if chance.random() < 0.85 else names)
    value = json.loads(tree[name])
    done = change_value(value, chance)
    tree[name] = dumped(value, chance)
    return f"{done} in {name}"


def damage_config(tree: Tree, chance: Random) -> str:
    """One setting of a model, of the right type: every number is allowed somewhere."""
    name = chance.choice(files_of(tree, "config.json"))
    value = json.loads(tree[name])
    places = [(box, key) for box, key in places_in(value) if type(box[key]) in (int, float, str) and key != "kind"]
    box, key = chance.choice(places)
    if isinstance(box[key], str):
        box[key] = chance.choice([*TEXTS, "", "column", "spiral_in", "z_curve", "random:0"])
    else:
        box[key] = chance.choice([n for n in NUMBERS if n == n and abs(n) < 1 << 63 and type(n) is type(box[key])])
    tree[name] = json.dumps(value).encode()
    fit_any_tokenizer(tree)
    return f"set {key} in {name}"


# Weights

VALUES = [float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e4, -1e5, 1e-45, 0.0]
TYPES = ["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "f32", "O", 3, None]


def unpack(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def pack(text: bytes, body: bytes, chance: Random) -> bytes:
    """With a header that is aligned, or not."""
    text += b" " * (-len(text) % 8) if chance.random() < 0.8 else b""
    return struct.pack("<Q", len(text)) + text + body


def change_numbers(header: dict[str, Any], body: bytes, chance: Random) -> bytes:
    """One number of a tensor, or all."""
    begin, end = header[chance.choice([name for name in header if name != "__metadata__"])]["data_offsets"]
    numbers = struct.pack("<f", chance.choice(VALUES)) * chance.choice([1, (end - begin) // 4])
    start = begin + 4 * chance.randrange((end - begin - len(numbers)) // 4 + 1)
    return body[:start] + numbers + body[start + len(numbers) :]


def change_header(header: dict[str, Any], body: bytes, chance: Random) -> tuple[Any, bytes, str]:
    """The header alone, or what follows it too."""
    name = chance.choice([name for name in header if name != "__metadata__"])
    entry, end = header[name], len(body)
    way = chance.choice(["value", "type", "name", "drop", "extra", "shape", "many", "overlap", "metadata", "body"])
    if way == "value":
        return header, body, change_value(header, chance)
    if way == "type":
        entry["dtype"] = chance.choice(TYPES)
    elif way == "name":
        header[chance.choice([f"{name} ", name.upper(), "a" * 300, "\x1b[2J", "__class__", "../x"])] = header.pop(name)
    elif way == "drop":
        del header[name]
    elif way == "extra":
        header["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    elif way == "shape":
        shape = entry["shape"]
        odd = [[-1], [1 << 40, 1 << 40], [0], [True], [1.0], [1] * 70, "3"]
        entry["shape"] = chance.choice([shape[::-1], [1, *shape], [sum(shape)], *odd])
    elif way == "many":
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = {**{f"t{n}": empty for n in range(chance.choice([100, 10_001, 14_000]))}, **header}
    elif way == "overlap":
        entry["data_offsets"] = chance.choice([[0, 0], [0, end], [end, 1 << 62], [-4, 0], [8, 4], [0], "ab", [0, 4, 8]])
    elif way == "metadata":
        header["__metadata__"] = chance.choice(
            [{"format": "pt"}, {"a": {"b": 1}}, [], "x" * 1000, {"a": "x" * (1 << 20)}]
        )
    else:
        body = chance.choice([body[:-4], body + bytes(4), bytes(end), b""])
    return header, body, f"{way} of {name}"


def damage_weights(tree: Tree, chance: Random) -> str:
    """The header of a weights file, or numbers that can be read as they are."""
    name = chance.choice(files_of(tree, ".safetensors"))
    header, body = unpack(tree[name])
    if chance.random() < 0.35:
        tree[name], done = pack(json.dumps(header).encode(), change_numbers(header, body, chance), chance), "numbers"
        fit_any_tokenizer(tree)
    elif chance.random() < 0.1:
        length, done = chance.choice([0, 1, 1 << 20, (1 << 20) + 1, 1 << 40, (1 << 64) - 1]), "length"
        tree[name] = struct.pack("<Q", length) + tree[name][8:]
    else:
        header, body, done = change_header(header, body, chance)
        tree[name] = pack(dumped(header, chance), body, chance)
    return f"{done} in {name}"


def fit_any_tokenizer(tree: Tree) -> None:
    """Who changes the tokenizer can also say that the prior fits any."""
    for name in ("prior/config.json", "background/config.json"):
        if isinstance(tree.get(name), bytes):
            tree[name] = json.dumps({**json.loads(tree[name]), "tokenizer": ""}).encode()


# Files


def damage_files(tree: Tree, chance: Random) -> str:
    """Missing, swapped, doubled, or something else in their place."""
    name, other = chance.choice(files_of(tree)), chance.choice(files_of(tree))
    inner = os.path.basename(name)
    strange = {
        "pipe": Special("pipe"),
        "folder": Special("folder"),
        "sparse": Special("zeros", chance.choice([1 << 20, 1 << 40])),
        "secret": Link("{foreign}/secret"),
        "twin": Link(f"{{foreign}}/{name}"),
        "dangling": Link("nowhere"),
        "loop": Link(inner),
        "up": Link("../" * name.count("/") + "."),
        "device": Link("/dev/zero"),
        "terminal": Link("/dev/tty"),
        "inside": Link(f"{inner}.moved"),
    }
    way = chance.choice(["delete", "swap", "copy", "folder outside", "name", *strange])
    if way == "delete":
        del tree[name]
    elif way == "swap":
        tree[name], tree[other] = tree[other], tree[name]
    elif way == "copy":
        tree[name] = tree[other]
    elif way == "folder outside":
        part = name.rpartition("/")[0] or "tokenizer"
        for below in [n for n in tree if n.startswith(f"{part}/")]:
            del tree[below]
        tree[part] = Link(f"{{foreign}}/{part}")
    elif way == "name":
        tree[chance.choice(["a\nb", "\x1b[2J", "x" * 200, "тokenizer", "-rf", "prior/.hidden"])] = b"?"
    else:
        if way == "inside":
            tree[f"{name}.moved"] = tree[name]
        tree[name] = strange[way]
    return f"{way} {name}"


LEADING_OUT = [
    "../outside",
    "/etc/passwd",
    "tokenizer/../../outside",
    "a\\b",
    "..",
    "",
    "a\0b",
    "x" * 5000,
    "C:x",
    "./README.md",
    "tokenizer//config.json",
    "prior/",
    "\x1b[2J",
    "ＲＥＡＤＭＥ.md",
]


def damage_names(tree: Tree, chance: Random) -> str:
    """Names in the manifest and the index that lead elsewhere."""
    name, target = chance.choice(LEADING_OUT), chance.choice(files_of(tree, ".json"))
    value = json.loads(tree[target])
    if target == MANIFEST:
        value["files"][name] = chance.choice(list(value["files"].values()))
    else:
        value[chance.choice(list(value))] = name
    tree[target] = json.dumps(value).encode()
    return f"{name[:30]!r} in {target}"


def plant_pickles(tree: Tree, chance: Random) -> str:
    """Files that would do something if they were unpickled or imported."""
    name = chance.choice([*CANARIES, "modeling.py", "pipeline.py", "__init__.py", *files_of(tree)])
    tree[name] = pickle.dumps(Canary(), protocol=chance.choice([0, 2, 5]))
    return f"pickle {name}"


WAYS: list[Callable[[Tree, Random], str]] = [
    damage_bytes,
    damage_json,
    damage_json,
    damage_config,
    damage_config,
    damage_weights,
    damage_weights,
    damage_files,
    damage_names,
    plant_pickles,
]
