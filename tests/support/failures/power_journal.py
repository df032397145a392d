"""What processes do below a folder, in order: entries of folders, contents of files, fsyncs. For simulated power loss.

`recording` patches the calls of a process by which names change or reach the disk; between them the folder is looked
at, so what native code writes (safetensors, torch) is seen as well, and is durable only from an fsync on. Several
processes and threads may record into one journal.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = 0  # the node of the folder itself
RECENT = 30_000_000  # ns: the clock of files is so coarse that a second write may leave no trace in it
BESIDE = (".log", ".samples")
"""Files of the test itself, which are not looked at."""
CALLS = ("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "truncate", "ftruncate")
SYNCS = ("fsync", "fdatasync")
Operation = dict[str, Any]
"""`entries`: changes [folder, name, node before, node after], all at once; `data`: a content of a node; `fsync` of a
node; `mark`: what a test says, at this moment."""


@dataclass
class Known:
    """The folder when it was last looked at. A node is a file or a folder, whatever its names."""

    nodes: dict[int, int] = field(default_factory=dict)  # by inode
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    contents: dict[int, tuple[int, int, str]] = field(default_factory=dict)  # size, time, sha256
    next: int = ROOT + 1


class Journal:
    """The journal of the folder `root`, kept in the folder `place`, which is elsewhere."""

    def __init__(self, root: Path, place: Path) -> None:
        self.root, self.place = root, place
        self._inside, self._lock = threading.local(), threading.RLock()

    def begin(self) -> None:
        """Take what is there for durable."""
        (self.place / "data").mkdir(parents=True)
        (self.place / "lock").touch()
        (self.place / "known").write_bytes(pickle.dumps(Known()))
        with self.step():
            pass
        self.mark("begin")

    def operations(self) -> list[Operation]:
        """All of it."""
        return [json.loads(line) for line in (self.place / "operations").read_text().splitlines()]

    def content(self, sha256: str) -> bytes:
        """What a `data` operation wrote."""
        return (self.place / "data" / sha256).read_bytes()

    def mark(self, what: str) -> None:
        """Note that something has happened by now."""
        with self.step() as (_, add):
            add({"mark": what})

    @contextmanager
    def step(self) -> Iterator[tuple[Known, Callable[[Operation], None]]]:
        """One operation, which is done in the block: what was written before it, and what it changes, are noted."""
        with self._lock, (self.place / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = pickle.loads((self.place / "known").read_bytes())
            with (self.place / "operations").open("a") as file:

                def add(operation: Operation) -> None:
                    file.write(json.dumps(operation) + "\n")

                self._look(known, add)
                try:
                    yield known, add
                finally:
                    self._look(known, add)
                    (self.place / "known").write_bytes(pickle.dumps(known))

    def _look(self, known: Known, add: Callable[[Operation], None]) -> None:
        """Note what has changed since the last look. What has moved did so in one operation."""
        new, found = known.next, None
        while found is None:
            with suppress(FileNotFoundError):  # native code has renamed a file meanwhile
                found = self._found(known)
        folders, files = found
        known.nodes = {inode: node for inode, node in known.nodes.items() if node in folders or node in files}
        for folder in folders:
            if folder not in known.folders:
                add({"folder": folder})
        changes = []
        for folder, entries in folders.items():
            before = known.folders.get(folder, {})
            for name in {**before, **entries}:
                if before.get(name) != entries.get(name):
                    changes.append([folder, name, before.get(name), entries.get(name)])
        made = [change for change in changes if change[2] is None and change[3] >= new]
        for change in made:
            add({"entries": [change]})
        if moved := [change for change in changes if change not in made]:
            add({"entries": moved})
        known.folders.update(folders)
        for node, place in files.items():
            self._look_at(place, node, known, add)

    def _found(self, known: Known) -> tuple[dict[int, dict[str, int]], dict[int, Path]]:
        """Nodes by name in each folder, and a place of each file."""
        folders: dict[int, dict[str, int]] = {}
        files: dict[int, Path] = {}

        def walk(path: Path, folder: int) -> None:
            entries = folders[folder] = {}
            for entry in os.scandir(path):
                if entry.name.endswith(BESIDE):
                    continue
                info = entry.stat(follow_symlinks=False)
                if info.st_ino not in known.nodes:
                    known.nodes[info.st_ino], known.next = known.next, known.next + 1
                node = entries[entry.name] = known.nodes[info.st_ino]
                if stat.S_ISDIR(info.st_mode):
                    walk(Path(entry.path), node)
                else:
                    files[node] = Path(entry.path)

        walk(self.root, ROOT)
        return folders, files

    def _look_at(self, path: Path, node: int, known: Known, add: Callable[[Operation], None]) -> None:
        with suppress(FileNotFoundError), path.open("rb") as file:
            info = os.fstat(file.fileno())
            size, changed, sha256 = known.contents.get(node, (-1, -1, ""))
            if (size, changed) == (info.st_size, info.st_mtime_ns) and time.time_ns() - changed > RECENT:
                return
            content = file.read()
            found = hashlib.sha256(content).hexdigest()
            known.contents[node] = info.st_size, info.st_mtime_ns, found
            if found != sha256:
                kept = self.place / "data" / found
                if not kept.exists():
                    kept.write_bytes(content)
                add({"data": node, "sha256": found})

    # Of one process

    def patch(self) -> None:
        """Record what this process does from now on."""
        for name in CALLS:
            setattr(os, name, self._recorded(getattr(os, name)))
        for name in SYNCS:
            setattr(os, name, self._synced(getattr(os, name)))

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record what this process does in the block."""
        before = {name: getattr(os, name) for name in (*CALLS, *SYNCS)}
        self.patch()
        try:
            yield
        finally:
            for name, call in before.items():
                setattr(os, name, call)

    def _recorded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def recorded(*arguments: Any, **named: Any) -> Any:
            if getattr(self._inside, "step", False):
                return call(*arguments, **named)
            with self._once(), self.step():
                return call(*arguments, **named)

        return recorded

    def _synced(self, call: Callable[[int], None]) -> Callable[[Any], None]:
        @wraps(call)
        def synced(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            with self._once(), self.step() as (known, add):
                call(number)
                node = self._node(number, known)
                if node is not None:
                    add({"fsync": node})

        return synced

    def _node(self, number: int, known: Known) -> int | None:
        """Of an open file or folder, if it is one of the journal's."""
        info, root = os.fstat(number), os.stat(self.root)
        if os.path.samestat(info, root):
            return ROOT
        return known.nodes.get(info.st_ino) if info.st_dev == root.st_dev else None

    @contextmanager
    def _once(self) -> Iterator[None]:
        self._inside.step = True
        try:
            yield
        finally:
            self._inside.step = False
