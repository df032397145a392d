"""Files on a web server, read in parts by `fsspec`; each answer is compared to what the server said of the file first.

That is its ETag, Last-Modified and length, as far as the server sends them. If the data change and none of these does,
the change goes unnoticed.
"""

from __future__ import annotations

import re
from typing import Any

from aiohttp import ClientResponse, ClientTimeout, NonHttpUrlClientError
from fsspec.asyn import sync_wrapper
from fsspec.implementations.http import HTTPFileSystem
from fsspec.spec import AbstractBufferedFile

from ..stamps import FileChanged
from .shard import Unable

SILENCE = 30.0
"""Seconds that a server may send nothing."""
SLOWEST = 1 << 14
"""Bytes per second that a server has to send on average, after the first `SILENCE` seconds."""
VALIDATORS = ("ETag", "Last-Modified")


class HttpFiles(HTTPFileSystem):
    """One file on a web server, as `info` finds it.

    Reading raises `OSError`, and `FileChanged` if the server has another file by now.
    """

    cachable = False  # each has facts of its own: the next one may find another file at the same URL

    def __init__(self) -> None:
        headers = {"Accept-Encoding": "identity"}  # ranges of the file itself, not of a compressed one
        super().__init__(client_kwargs={"headers": headers, "trust_env": True, "timeout": patience(0)})
        self.size = 0
        self.validators: dict[str, str] = {}
        self.sends_parts = False

    async def _info(self, url: str, **options: Any) -> dict[str, Any]:
        """What the server says of the file now. Raises `OSError` if that is no size."""
        try:
            info: dict[str, Any] = await super()._info(url, **options)
        except FileNotFoundError as error:  # which `fsspec` raises for any failure
            if isinstance(error.__cause__, TimeoutError):
                raise OSError("the server did not answer in time") from error
            if isinstance(error.__cause__, NonHttpUrlClientError):
                raise Unable(
                    f"the server leads to {str(error.__cause__)[:200]!r}, which is not on a web server"
                ) from error
            raise error.__cause__ or error from None
        if info["size"] is None:
            raise Unable("the server does not say how large the file is")
        self.size = info["size"]
        self.validators = {name: info[name] for name in VALIDATORS if info.get(name)}
        return info

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> HttpFile:
        """The file; each request asks for `block_size` bytes more than are read, and its answer is kept until the
        next."""
        return HttpFile(self, path, mode, block_size or 0, cache_type="readahead", size=self.size)

    async def _part(self, url: str, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, in one request."""
        session = await self.set_session()
        headers = {"Range": f"bytes={start}-{end - 1}", **self.condition()}
        timeout = patience(end - start)
        try:
            async with session.get(self.encode_url(url), headers=headers, timeout=timeout) as answer:
                if answer.status == 416:  # there is no such part any more
                    raise FileChanged(url)
                answer.raise_for_status()
                self.check_file(url, answer)
                self.check_part(answer, start, end)
                data = await answer.content.readexactly(end - start)
                if await answer.content.read(1):
                    raise Unable(f"more bytes came than the {end - start} from byte {start}")
                return bytes(data)
        except NonHttpUrlClientError as error:
            raise Unable(f"the server leads to {str(error)[:200]!r}, which is not on a web server") from error
        except TimeoutError as error:
            raise OSError(f"the bytes from {start} to {end - 1} did not come in time") from error
        except EOFError as error:
            raise OSError(f"fewer bytes came than the {end - start} from byte {start}") from error

    part = sync_wrapper(_part)

    def condition(self) -> dict[str, str]:
        """The header that asks for a part of this very file only; none for a weak ETag, which it must not hold."""
        etag = self.validators.get("ETag", "")
        return {"If-Range": etag} if etag.startswith('"') else {}

    def check_file(self, url: str, answer: ClientResponse) -> None:
        """Raise `FileChanged` if an answer is of another file.

        A validator that comes for the first time is kept, and has to stay as it is. A server that has sent parts, and
        now sends the whole file without its ETag, does so because `If-Range` does not hold any more.
        """
        found = {name: answer.headers[name] for name in VALIDATORS if answer.headers.get(name)}
        known = {**found, **self.validators}
        self.validators = known
        differs = any(plain(known[name]) != plain(value) for name, value in found.items())
        refused = answer.status == 200 and self.sends_parts and self.condition() and "ETag" not in found
        if differs or refused or whole_size(answer) not in (None, self.size):
            raise FileChanged(url)

    def check_part(self, answer: ClientResponse, start: int, end: int) -> None:
        """Raise `OSError` if an answer is another part than the bytes from `start` to `end`."""
        if answer.status != 206:
            if (start, end) != (0, self.size):
                raise Unable("the server does not send parts of files")
            return
        sent = re.match(r"bytes (\d+)-(\d+)/", answer.headers.get("Content-Range", ""))
        if sent is None or (int(sent[1]), int(sent[2])) != (start, end - 1):
            which = "does not say which" if sent is None else f"are those from {sent[1]} to {sent[2]}"
            raise Unable(f"the bytes from {start} to {end - 1} were asked for, what came {which}")
        self.sends_parts = True


class HttpFile(AbstractBufferedFile):
    """A file that can be read anywhere."""

    def _fetch_range(self, start: int, end: int) -> bytes:
        data: bytes = self.fs.part(self.path, start, end)
        return data


def patience(size: int) -> ClientTimeout:
    """How long an answer of `size` bytes may take."""
    return ClientTimeout(total=SILENCE + size / SLOWEST, sock_connect=SILENCE, sock_read=SILENCE)


def plain(validator: str) -> str:
    """A validator without its mark of weakness, which some servers set in some answers only."""
    return validator.removeprefix("W/")


def whole_size(answer: ClientResponse) -> int | None:
    """The length of the whole file according to an answer, or None."""
    if answer.status == 206:
        sent = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", "").strip())
        return int(sent[1]) if sent else None
    return answer.content_length
