"""What a claim says of the process that writes somewhere, and what this machine knows of that process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tokenizer.files import PathError, quote

SIZE = 1024  # bytes of a claim, which is written in place
LONGEST_HOST = 64  # characters
GONE, OVER = -1, -2  # the start of a process that has ended, and of one that has let go of its claim
State = Literal["held", "gone", "unknown", "changed"]


@dataclass(frozen=True)
class Claim:
    """What is in the file. nonce: the name of this claim among all that there ever were. machine: where its pid means
    this process; empty where that cannot be told. start: of the process, see `started`. inode: the number of the file,
    which that of a copy is not; 0 if it is not known."""

    nonce: str
    pid: int
    host: str
    since: str
    machine: str
    start: int
    count: int = 0
    inode: int = 0

    @classmethod
    def new(cls) -> Claim:
        """Of this process, from now on."""
        pid, here, since = os.getpid(), machine(), time.strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(uuid.uuid4().hex, pid, host(), since, here, (started(pid) or 0) if here else 0)

    def to_bytes(self) -> bytes:
        """The file, which keeps its size."""
        return json.dumps(asdict(self)).ljust(SIZE - 1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Claim:
        """The file may be anyone's. One that is not whole, or of an earlier version, is known by its bytes, and of no
        machine."""
        facts: Any = None
        with suppress(ValueError, RecursionError):
            facts = json.loads(data)
        found = {name: facts.get(name) for name in cls.__dataclass_fields__} if isinstance(facts, dict) else {}
        texts = {name: str(found.get(name) or "") for name in ("nonce", "host", "since", "machine")}
        if not re.fullmatch("[0-9a-f]{32}", texts["nonce"]):
            texts |= {"nonce": hashlib.sha256(data).hexdigest()[:32], "machine": ""}
        numbers = ("pid", "start", "count", "inode")
        pid, start, count, inode = (n if type(n := found.get(name)) is int else 0 for name in numbers)
        return cls(**texts, pid=max(0, pid), start=start, count=count, inode=inode)

    def state(self, gone: Collection[str] = ()) -> State:
        """What this machine knows of the process. gone: the nonces of claims that other machines know of."""
        if self.nonce in gone:
            return "gone"
        here = self.machine == machine() and self.host == host()  # a copy of a running machine has its boot, too
        now = started(self.pid) if here and self.machine and self.pid else None
        if now is None:
            return "unknown"
        return "held" if now == self.start else "gone"

    @property
    def holder(self) -> str:
        """`process 4242 on desk`."""
        return f"process {self.pid} on {quote(self.host)[1:-1]}" if self.pid and self.host else "another process"


NOBODY = Claim("", 0, "", "", "", 0)


def read_claim(place: Path) -> Claim | None:
    """The claim at a place. Raises `PathError` for what cannot be read, or is no file.

    Of a copy, as of a folder that was copied while a process writes in it, it is not known whose it is: that process
    lives, and counts in another file.
    """
    try:
        file = open_claim(place, os.O_RDONLY)
        try:
            facts = os.fstat(file)
            if not stat.S_ISREG(facts.st_mode):
                raise PathError(f"{place}: it is to say who writes here, and is not a file; nothing was changed")
            found = Claim.from_bytes(os.read(file, SIZE))
        finally:
            os.close(file)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno == errno.ESTALE:  # replaced meanwhile, over NFS
            return None
        what = f"it says who writes here, and cannot be read ({error.strerror})"
        raise PathError(f"{place}: {what}; nothing was changed") from error
    copied = found.inode not in (0, facts.st_ino)
    return replace(found, machine="") if copied and found.state() == "held" else found


def note(file: int, claim: Claim) -> None:
    """Write a claim at the beginning of an open file. Raises `OSError`."""
    os.lseek(file, 0, os.SEEK_SET)
    data = replace(claim, inode=os.fstat(file).st_ino).to_bytes()
    if os.write(file, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_claim(path: Path, flags: int) -> int:
    """Open what is to be a claim: nothing that a link leads to, and no pipe that would block. Raises `OSError`."""
    more = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    return os.open(path, flags | more, 0o666)


def host() -> str:
    """The name of this machine, or of this container."""
    return socket.gethostname()[:LONGEST_HOST]


def machine() -> str:
    """Where a pid means the same process as here: this boot of this kernel, and this pid namespace, of which each
    container has one, whatever its host is called. Empty where the system does not tell (only Linux does)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def started(pid: int) -> int | None:
    """When the process was started, in ticks since the boot: a later one of the same pid has another. `GONE` where
    there is none; None where the system does not tell."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return GONE if facts[0] in (b"Z", b"X") else int(facts[19])
    except OSError:
        pass
    try:
        os.kill(pid, 0)  # another user's may be hidden in /proc
    except (ProcessLookupError, OverflowError):
        return GONE
    except OSError:
        pass
    return None
