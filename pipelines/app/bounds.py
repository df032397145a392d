"""What the server takes: which addresses, how large a request, and values that name no file.

gradio serves and takes files by their paths. The page needs neither, as it shows and sends files in values; so all
those routes are closed here, before gradio sees a request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from .uploads import MEGABYTE

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

API = "/gradio_api"
READ = (
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"),
    *(f"{API}/{name}" for name in ("info", "app_id", "startup-events", "queue/data", "queue/status", "theme.css")),
)
READ_BELOW = ("/assets/", "/static/", "/svelte/", f"{API}/heartbeat/")
WRITE = tuple(f"{API}/{name}" for name in ("queue/join", "cancel", "reset", "run/predict"))
SMALL = 64 * 1024
"""Bytes of a request besides files: numbers, names, and a mask."""
LOCAL = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Bounds:
    """Most images of a request, most bytes of the files in one, and how many requests may wait."""

    max_images: int = 64
    max_upload: int = 8 * MEGABYTE
    queue: int = 8

    @property
    def megabytes(self) -> float:
        """`max_upload` as people say it."""
        return self.max_upload / MEGABYTE

    @property
    def max_body(self) -> int:
        """Bytes of a request: base64 makes 4 of 3."""
        return self.max_upload * 4 // 3 + SMALL


class Gate:
    """Lets through what the page needs, and answers everything else with a line. hosts: names by which the server may
    be called, empty for any: a page elsewhere could have its own name lead here, and then read what we answer."""

    def __init__(self, app: Any, max_body: int, hosts: tuple[str, ...] = ()) -> None:
        self.app, self.max_body, self.hosts = app, max_body, hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        if problem := self.problem(scope):
            return await answer(send, *problem)
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        body = await read_body(receive, self.max_body)
        if body is None:
            return await answer(send, 413, f"a request may have at most {self.max_body / MEGABYTE:.1f} MB")
        if names_file(body):
            return await answer(send, 403, "a request of this page names no file and no address")
        return await self.app(scope, replayed(body, receive), send)

    def problem(self, scope: MutableMapping[str, Any]) -> tuple[int, str] | None:
        """Why a request is refused before it is read, if it is: status and reason."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if self.hosts and re.sub(r":\d*$", "", headers.get("host", "")) not in self.hosts:
            return 403, "this server is called by the name of this machine"
        path, reads = scope["path"], scope["method"] in ("GET", "HEAD")
        below = path.startswith(READ_BELOW) and ".." not in path.split("/")
        if not (reads and (path in READ or below)) and not (scope["method"] == "POST" and path in WRITE):
            return 404, "there is nothing of this name"
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_body:
            return 413, f"a request may have at most {self.max_body / MEGABYTE:.1f} MB"
        return None


async def read_body(receive: Receive, most: int) -> bytes | None:
    """The body of a request, or None if it is longer than `most` bytes, whatever its header says."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        part = message.get("body", b"")
        more = message["type"] == "http.request" and message.get("more_body", False)
        parts.append(part)
        size += len(part)
        if size > most:
            return None
    return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read, and then what comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def names_file(body: bytes) -> bool:
    """Whether JSON holds what gradio would take for a file: a mapping with a path or an address."""
    try:
        found = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return False  # which gradio refuses
    while found:
        value = found.pop()
        if isinstance(value, dict):
            if {"path", "url"} & set(value):
                return True
            found += value.values()
        elif isinstance(value, list):
            found += value
    return False


async def answer(send: Send, status: int, text: str) -> None:
    """Send a line, in the form in which gradio's page shows it."""
    body = json.dumps({"detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
