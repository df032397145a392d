"""The folder as it could look after power loss: what was fsynced, and of the rest anything that could be there.

An entry of a folder is durable once the folder was fsynced after it (a rename: one of its two folders), a content once
the file was. Of what is not, a file system may have kept nothing, all, or some, and the names without the contents.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

from failures.power_journal import BESIDE, ROOT, Journal, Operation

WAYS = ("only what is durable", "names without contents", "as far as it came", "some of it", "all names")
"""What becomes of names that are not durable: none, all, the first ones, any of them, all."""


def cut_points(operations: list[Operation]) -> list[int]:
    """After how many operations power can be lost: not before the recorded run began."""
    first = next(place for place, operation in enumerate(operations) if operation.get("mark") == "begin")
    return list(range(first + 1, len(operations) + 1))


def lose_power(journal: Journal, operations: list[Operation], cut: int, draw: Random, target: Path) -> str:
    """Build the folder at `target`, which is emptied, as it could be if power is lost after `cut` operations; returns
    in which way."""
    way = draw.choice(WAYS)
    done, begun = operations[:cut], cut_points(operations)[0]
    synced = {}  # the last fsync of each node
    for place, operation in enumerate(done):
        if "fsync" in operation:
            synced[operation["fsync"]] = place
    folders: dict[int, dict[str, int]] = {ROOT: {}, **{o["folder"]: {} for o in done if "folder" in o}}
    pending = [
        place
        for place, operation in enumerate(done)
        if "entries" in operation
        and place >= begun
        and not any(synced.get(f, -1) > place for f, *_ in operation["entries"])
    ]
    lost = set(pending[draw.randrange(len(pending) + 1) :] if way == "as far as it came" else [])
    if way == "only what is durable":
        lost = set(pending)
    elif way == "some of it":
        lost = {place for place in pending if draw.random() < 0.5}
    for place, operation in enumerate(done):
        if "entries" not in operation or place in lost:
            continue
        changes, certain = operation["entries"], place not in pending
        if certain or all(folders[folder].get(name) == before for folder, name, before, _ in changes):
            for folder, name, _, node in changes:
                folders[folder].pop(name, None)
                if node is not None:
                    folders[folder][name] = node
    contents = {
        node: kept(
            journal,
            [(p, o["sha256"]) for p, o in enumerate(done) if o.get("data") == node],
            synced.get(node, begun),
            draw,
            way,
        )
        for node in {operation["data"] for operation in done if "data" in operation}
    }
    clear(target)
    build(target, folders, contents)
    return way


def kept(journal: Journal, written: list[tuple[int, str]], synced: int, draw: Random, way: str) -> bytes:
    """A content that a file may have: the last that is durable, a later one, or a part of that."""
    durable = next((sha256 for place, sha256 in reversed(written) if place < synced), None)
    later = [sha256 for place, sha256 in written if place > synced]
    before = journal.content(durable) if durable else b""
    if not later or way == "names without contents":
        return before
    data = journal.content(draw.choice(later))
    least = len(before) if data.startswith(before) else 0  # what was appended to does not lose its beginning
    length = draw.randint(least, len(data))
    return draw.choice([before, data, data[:length], data[:length] + bytes(len(data) - length)])


def clear(folder: Path) -> None:
    """Remove what is in it, but for files of the test itself."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not path.name.endswith(BESIDE):
            path.unlink()


def build(target: Path, folders: dict[int, dict[str, int]], contents: dict[int, bytes]) -> None:
    """Write files and folders into `target`, with links where a file has several names."""
    made: dict[int, Path] = {}

    def write(path: Path, node: int) -> None:
        if node in folders:
            path.mkdir()
            for name, child in folders[node].items():
                write(path / name, child)
        elif node in made:
            os.link(made[node], path)
        else:
            path.write_bytes(contents.get(node, b""))
            made[node] = path

    for name, node in folders[ROOT].items():
        write(target / name, node)
