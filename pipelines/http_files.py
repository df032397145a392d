"""Files on a web server, read in parts: what `fsspec` offers with a further package, from the standard library."""

from __future__ import annotations

import io
from typing import Any
from urllib.request import Request, urlopen

SECONDS = 30.0  # of silence


class HttpFiles:
    """The two questions that shards ask of a file system: what is known of a file, and parts of it."""

    def info(self, url: str) -> dict[str, Any]:
        """`size` in bytes, and `ETag` or `Last-Modified`. Raises `OSError` where the server says none."""
        with urlopen(Request(url, method="HEAD"), timeout=SECONDS) as answer:
            headers = answer.headers
        if not (headers.get("Content-Length") or "").isdecimal():
            raise OSError("the server does not say how large the file is")
        known = {name: headers[name] for name in ("ETag", "Last-Modified") if headers.get(name)}
        return {"size": int(headers["Content-Length"]), **known}

    def open(self, url: str, mode: str = "rb", *, size: int, block_size: int = 0, cache_type: str = "") -> HttpFile:
        """The file, of which at least `block_size` bytes are read at a time."""
        return HttpFile(url, size, block_size)


class HttpFile(io.RawIOBase):
    """A file of `size` bytes that can be read anywhere, `ahead` bytes or more at a time. Reading raises `OSError`."""

    def __init__(self, url: str, size: int, ahead: int) -> None:
        super().__init__()
        self.url, self.size, self.ahead = url, size, ahead
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
        request = Request(self.url, headers={"Range": f"bytes={start}-{end - 1}"})
        with urlopen(request, timeout=SECONDS) as answer:
            if answer.status != 206 and (start, end) != (0, self.size):
                raise OSError("the server does not send parts of files")
            data = answer.read(end - start + 1)
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes came of the {end - start} from byte {start}")
        return bytes(data)
