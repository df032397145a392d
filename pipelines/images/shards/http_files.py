"""Files on a web server, read in parts: what `fsspec` offers with a further package, from the standard library.

Each answer is compared to what the server said of the file first: ETag, Last-Modified and length, as far as it says
them. A file whose data change while none of these does is not noticed: nothing tells it.
"""

from __future__ import annotations

import io
import re
from http.client import HTTPResponse
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from ..stamps import FileChanged

SECONDS = 30.0  # of silence
VALIDATORS = ("ETag", "Last-Modified")

Facts = dict[str, Any]
"""`size` in bytes, the `VALIDATORS` that the server says, and `parts`: whether it has sent a part before."""


class HttpFiles:
    """The two questions that shards ask of a file system: what is known of a file, and parts of it."""

    def __init__(self) -> None:
        self.known: dict[str, Facts] = {}

    def info(self, url: str) -> Facts:
        """What the server says of the file now, to which later answers are compared. Raises `OSError` where it says no
        size."""
        with urlopen(Request(url, method="HEAD"), timeout=SECONDS) as answer:
            headers = answer.headers
        if not (headers.get("Content-Length") or "").isdecimal():
            raise OSError("the server does not say how large the file is")
        told = {name: headers[name] for name in VALIDATORS if headers.get(name)}
        return self.known.setdefault(url, {"size": int(headers["Content-Length"]), **told})

    def open(self, url: str, mode: str = "rb", *, block_size: int = 0, cache_type: str = "") -> HttpFile:
        """The file as it was when `info` was asked first; at least `block_size` bytes are read at a time."""
        return HttpFile(url, self.known.get(url) or self.info(url), block_size)


class HttpFile(io.RawIOBase):
    """A file that can be read anywhere, `ahead` bytes or more at a time.

    Reading raises `OSError`, and `FileChanged` if the server has another file by now than `facts` are of.
    """

    def __init__(self, url: str, facts: Facts, ahead: int) -> None:
        super().__init__()
        self.url, self.facts, self.size, self.ahead = url, facts, int(facts["size"]), ahead
        self.place, self.start, self.data = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place; nothing is read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = max(0, base + offset)
        return self.place

    def read(self, size: int | None = -1) -> bytes:
        """Up to `size` bytes, fewer only at the end of the file."""
        wanted = self.size if size is None or size < 0 else size
        end = min(self.size, self.place + wanted)
        if end <= self.place:
            return b""
        if not self.start <= self.place <= end <= self.start + len(self.data):
            self.start, self.data = (
                self.place,
                self.fetch(self.place, min(self.size, max(end, self.place + self.ahead))),
            )
        found = self.data[self.place - self.start : end - self.start]
        self.place = end
        return found

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def fetch(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, asked for in one request."""
        request = Request(self.url, headers={"Range": f"bytes={start}-{end - 1}", **self.condition()})
        try:
            with urlopen(request, timeout=SECONDS) as answer:
                self.compare(answer)
                self.check_part(answer, start, end)
                data = answer.read(end - start + 1)
        except HTTPError as error:
            if error.code == 416:  # there is no such part any more
                raise FileChanged(self.url) from error
            raise
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes came of the {end - start} from byte {start}")
        return bytes(data)

    def condition(self) -> dict[str, str]:
        """The header by which a part is sent of this very file alone; none where the ETag is weak, as it may not be."""
        known = self.facts.get("ETag", "")
        return {"If-Range": known} if known.startswith('"') else {}

    def compare(self, answer: HTTPResponse) -> None:
        """Raise `FileChanged` if an answer is of another file.

        What a server did not say of it before, it has to say the same way from now on. One that has sent parts, and now
        sends the whole and not its ETag, does so because `If-Range` does not hold any more.
        """
        told = {name: str(value) for name in VALIDATORS if (value := answer.headers.get(name))}
        others = [name for name in told if plain(self.facts.setdefault(name, told[name])) != plain(told[name])]
        refused = answer.status == 200 and self.facts.get("parts") and self.condition() and "ETag" not in told
        if others or refused or part_of(answer)[2] not in (None, self.size):
            raise FileChanged(self.url)

    def check_part(self, answer: HTTPResponse, start: int, end: int) -> None:
        """Raise `OSError` if an answer is another part than the bytes from `start` to `end`."""
        if answer.status != 206:
            if (start, end) != (0, self.size):
                raise OSError("the server does not send parts of files")
            return
        first, last, _ = part_of(answer)
        if (first, last) != (start, end - 1):
            sent = "does not say which" if first is None else f"are those from {first} to {last}"
            raise OSError(f"the bytes from {start} to {end - 1} were asked for, what came {sent}")
        self.facts["parts"] = True


def plain(validator: str) -> str:
    """A validator, strong or weak: some servers call it weak in some answers."""
    return validator.removeprefix("W/")


def part_of(answer: HTTPResponse) -> tuple[int | None, int | None, int | None]:
    """The first byte that an answer has, the last one, and the length of the whole file; None where it is not said."""
    length = answer.headers.get("Content-Length") or ""
    if answer.status != 206:
        return None, None, int(length) if length.isdecimal() else None
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", (answer.headers.get("Content-Range") or "").strip())
    if not found:
        return None, None, None
    return int(found[1]), int(found[2]), None if found[3] == "*" else int(found[3])
