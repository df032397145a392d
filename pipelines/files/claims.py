"""One writer at a time for each folder or file: a claim, which is a file that says which process writes there.

It needs no locks of the system, and so works where several machines share files. A claim is made by giving a finished
file a second name (`link`), which one of all that try can do, also over NFS (open(2), O_EXCL). Its holder counts in it
every few seconds. It is stale where its process is known to be gone (by pid and start, under the same boot and in the
same pid namespace), or where it did not change for `SILENCE` seconds by the reader's own clock; clocks of two machines
are never compared.

Who takes a stale claim over first claims that claim, by a file whose name holds the stale one's nonce, and then looks
again: so of all that find it stale one replaces it, and a holder that was only silent removes nobody else's. Where its
file is gone when it wakes up, another one has come and gone meanwhile: it does not go on.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from tokenizer.files import PathError, quote

from .holders import NOBODY, OVER, SIZE, Claim, State, note, open_claim, read_claim

LOCK = ".lock"
PERIOD, SILENCE, LOOK = 5.0, 120.0, 1.0
"""Seconds between two signs of life of a holder; of silence, after which it is given up; between two looks at it."""
TRIES, PAUSE = 200, 0.05  # for a stale claim that another process is taking over; seconds between two
TAIL = re.compile(r"[.-][0-9a-f]{32}$")  # of the names of claims on claims, and of claims not yet in place
LONGEST = 150  # bytes of the name of a file whose claim is called after it
NO_LINKS = (errno.EPERM, errno.EXDEV, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EMLINK)
LOST = 1  # exit code of a process whose claim another one has taken over


def inside(folder: Path) -> Path:
    """Where the claim on a folder is that stays, whatever becomes of its files."""
    return folder / LOCK


def beside(path: Path | str) -> Path:
    """Where the claim is on a file, on a folder that is replaced as a whole, or on one that others look through."""
    real = Path(os.path.realpath(path))
    name = os.fsencode(real.name)
    return real.parent / f".{real.name if len(name) <= LONGEST else hashlib.sha256(name).hexdigest()}{LOCK}"


def is_claim(name: str) -> bool:
    """Whether a file of this name in a folder can be of a claim on that folder."""
    return TAIL.sub("", name) == LOCK


@contextmanager
def claimed(place: Path, called: Path | str, gone: Collection[str] = ()) -> Iterator[Callable[[], None]]:
    """Keep all other processes from writing what is `called` so during the block, by a claim at `place`, whose folder
    exists; yields what removes it earlier. gone: the nonces of claims whose processes other machines of this run know
    to be gone.

    Raises `PathError` that names the process that writes there already. Where this machine knows nothing of that
    process, the claim is watched: some seconds where it is alive, `SILENCE` seconds where it is not. A process that was
    silent for so long that another one has taken over ends at once, in a line.
    """
    held = _Held(place, called)
    held.take(gone)
    try:
        yield held.release
    finally:
        held.release()


def known_gone(place: Path) -> str | None:
    """The nonce of a claim whose process this machine knows to be gone; None where there is no such claim."""
    with suppress(PathError):
        found = read_claim(place)
        return found.nonce if found is not None and found.state() == "gone" else None
    return None


class _HeldBy(Exception):
    """Another process has the claim."""

    def __init__(self, claim: Claim) -> None:
        super().__init__(claim.holder)
        self.claim = claim


class _Held:
    """This process's claim at a place, renewed by a thread between `take` and `release`."""

    def __init__(self, place: Path, called: Path | str) -> None:
        self.place, self.called, self.own = place, called, Claim.new()
        self._ended, self._released = threading.Event(), False

    def take(self, gone: Collection[str]) -> None:
        """Raises `PathError`, see `claimed`."""
        try:
            _take(self.place, self.own, gone, self.called)
            _remove_leftovers(self.place, self.own)
            threading.Thread(target=self._stay, name="claim", daemon=True).start()
        except _HeldBy as error:
            since = quote(error.claim.since)[1:-1]
            raise PathError(
                f"{self.called}: {error.claim.holder} has been writing here{since and f' since {since}'}; one writer "
                "at a time, nothing was changed"
            ) from None
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Remove the claim, if it is still there, and nobody is taking it over."""
        if self._released or os.getpid() != self.own.pid:  # a forked process has claimed nothing
            return
        self._released = True  # first: a signal that releases, too, may come while the event's lock is held
        self._ended.set()
        guard = _guard_of(self.place, self.own)
        try:
            if _put(guard, replace(self.own, nonce=uuid.uuid4().hex)):  # with its own, the guard would guard itself
                try:
                    if _holds(self.place, self.own):
                        self.place.unlink()
                finally:
                    guard.unlink(missing_ok=True)
        except (OSError, PathError):
            with suppress(OSError, PathError):  # the disk is full: what is there can say that it means nothing
                self._renew(replace(self.own, start=OVER))

    def _stay(self) -> None:
        count, last = 0, (time.time(), time.monotonic())
        while not self._ended.wait(PERIOD):
            count += 1
            with suppress(OSError, PathError):  # the disk is full, or away: nothing can be said
                other = self._renew(replace(self.own, count=count), _since(last))
                if other is not None and not self._ended.is_set():
                    self._end(other)
                last = time.time(), time.monotonic()

    def _renew(self, now: Claim, silence: float = 0.0) -> Claim | None:
        """Write the claim as it is now, and return None; or the claim that another has put there, also where it has
        ended since. The file is opened anew: what was written is sent to other machines when it is closed."""
        try:
            file = open_claim(self.place, os.O_RDWR)
        except FileNotFoundError:
            if silence > SILENCE and self.place.parent.is_dir():
                return NOBODY
            if self.place.parent.is_dir() and not self._ended.is_set():  # somebody has removed it
                _put(self.place, self.own)
            return None
        try:
            found = Claim.from_bytes(os.read(file, SIZE))
            if found.nonce != self.own.nonce and found.pid:  # and not only damaged
                return found
            note(file, now)
        finally:
            os.close(file)
        return None

    def _end(self, other: Claim) -> None:
        """The main thread may be about to write, or wait where no exception reaches it."""
        line = f"error: {self.called}: {other.holder} has taken over, as this process was silent for {SILENCE:g} s"
        try:
            print(f"{line}; it ends, and leaves what is there to the other", file=sys.stderr, flush=True)
        finally:  # the terminal may be gone, or a log's disk full
            os._exit(LOST)


# How a claim is taken


def _take(place: Path, own: Claim, gone: Collection[str], called: Path | str) -> None:
    """Put `own` at the place, in that of a stale one if need be. Raises `_HeldBy`."""
    while not _put(place, own):
        if (found := read_claim(place)) is None:
            continue
        state = found.state(gone)
        if state == "unknown":
            line = f"{called}: {found.holder} may be writing here; waiting {SILENCE:g} s at most for a sign of it"
            print(line, file=sys.stderr, flush=True)
            state = _watched(place, found)
        if state == "held":
            raise _HeldBy(found)
        if state == "gone" and _replaced(place, found, own, gone, called):
            return


def _watched(place: Path, first: Claim) -> State:
    """What becomes of a claim of which this machine cannot tell. Looks are counted: where this machine itself has
    slept, the time is not the other's silence."""
    for _ in range(max(1, round(SILENCE / LOOK))):
        time.sleep(LOOK)
        found = read_claim(place)
        if found is None or found.nonce != first.nonce:
            return "changed"
        if found.count != first.count:
            return "held"
    return "gone"


def _replaced(place: Path, stale: Claim, own: Claim, gone: Collection[str], called: Path | str) -> bool:
    """Put `own` in the place of a stale claim, unless another process does. Raises `_HeldBy` where one has begun to,
    and does not come to an end."""
    guard = _guard_of(place, stale)
    for left in reversed(range(TRIES)):
        try:
            _take(guard, own, gone, called)
            break
        except _HeldBy:
            if not left:
                raise
            time.sleep(PAUSE)
            if not _holds(place, stale):
                return False
    try:
        if not _holds(place, stale, stale.count):
            return False
        with _written(place, own) as temporary:
            temporary.replace(place)
        return True
    finally:
        guard.unlink(missing_ok=True)


def _guard_of(place: Path, claim: Claim) -> Path:
    """Who has this file may remove or replace the claim: the holder, at its end, and who takes over."""
    return place.with_name(f"{TAIL.sub('', place.name)}-{claim.nonce}")


def _put(place: Path, own: Claim) -> bool:
    """Give `own` the name, if nothing has it: of all that try at once, one does."""
    if os.path.lexists(place):
        return False
    with _written(place, own) as temporary:
        try:
            os.link(temporary, place)
            return True
        except FileExistsError:
            return _holds(place, own)  # over NFS: the answer to a request that was sent twice
        except FileNotFoundError:  # who has the claim by now has tidied up
            if not place.parent.is_dir():
                raise
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
    try:
        _write(place, own)
    except FileExistsError:
        return False
    return True


def _write(path: Path, own: Claim) -> None:
    """A new file, whole or not at all. Raises `FileExistsError`."""
    file = open_claim(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        try:
            note(file, own)
        finally:
            os.close(file)
    except BaseException:  # the disk is full
        path.unlink(missing_ok=True)
        raise


@contextmanager
def _written(place: Path, own: Claim) -> Iterator[Path]:
    temporary = place.with_name(f"{TAIL.sub('', place.name)}.{uuid.uuid4().hex}")
    try:
        _write(temporary, own)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _holds(place: Path, claim: Claim, count: int | None = None) -> bool:
    """Whether the claim is there; count: and says so, as one does that its holder has left alone since."""
    found = read_claim(place)
    return found is not None and found.nonce == claim.nonce and count in (None, found.count)


def _since(then: tuple[float, float]) -> float:
    """Seconds, by the clock that says more: one goes on while the machine sleeps, the other cannot be set."""
    return max(time.time() - then[0], time.monotonic() - then[1])


def _remove_leftovers(place: Path, own: Claim) -> None:
    """Of processes that were killed while they took a claim, which this process has by now: what is not yet in place is
    of no use to anybody."""
    for name in os.listdir(place.parent):
        path = place.with_name(name)
        ours = TAIL.sub("", name) == place.name != name and path != _guard_of(place, own)
        if ours and (name.startswith(f"{place.name}.") or known_gone(path)):
            path.unlink(missing_ok=True)
