"""A web server that serves a folder, and misbehaves at the requests that a plan names (`ways.damage_answers`)."""

from __future__ import annotations

import hashlib
import http.server
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

DRIP, SILENCE = 0.02, 0.8  # seconds between bytes, and without any


class Answers(http.server.BaseHTTPRequestHandler):
    """Files by path, or parts of them; `find` gives status, headers and body of what would be right."""

    protocol_version = "HTTP/1.1"
    plan: list[dict[str, Any]]
    asked: list[str]
    once: bool
    """Whether a connection is for one request: a client that outlives this server would go on with it."""
    find: Callable[[str, Any], tuple[int, dict[str, str], bytes]]

    def do_GET(self) -> None:
        number = len(self.asked)
        self.asked.append(self.path)
        faults = [fault for fault in self.plan if fault["at"] <= number < fault["at"] + fault["for"]]
        status, headers, body = type(self).find(self.path, self.headers)
        headers = {"Content-Length": str(len(body)), **headers}
        if self.once:
            headers["Connection"] = "close"
            self.close_connection = True
        for fault in faults:
            chance = random.Random(repr(fault))
            kind, detail = fault["fault"], fault["detail"]
            if kind == "status":
                status = detail
            elif kind == "redirect":
                status, headers["Location"] = detail[0], detail[1]
            elif kind == "length":
                headers["Content-Length"] = detail
            elif kind == "no length":
                headers.pop("Content-Length")
            elif kind == "etag":
                headers["ETag"] = chance.choice([f'"{number}"', "", "x" * 9000, 'W/"1"', '"'])
            elif kind == "range":
                headers["Content-Range"] = detail
            elif kind == "short":
                body = body[: chance.randrange(len(body) + 1)]
            elif kind == "long":
                body += bytes(chance.choice([1, 100_000]))
            elif kind == "other":
                body = chance.randbytes(len(body))
            elif kind == "encoding":
                headers["Content-Encoding"] = chance.choice(["gzip", "deflate", "br", "x"])
            elif kind == "no parts":
                self.headers.replace_header("Range", "") if self.headers["Range"] else None
                status, headers, body = type(self).find(self.path, {})
                headers = {"Content-Length": str(len(body)), **headers}
            elif kind == "headers":
                headers |= {f"X-{k}": "x" * chance.choice([1, 9000]) for k in range(chance.choice([1, 200, 1000]))}
            else:
                return self.break_off(kind, chance, headers, body)
        self.say(status, headers, body)

    do_HEAD = do_GET

    def say(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.wfile.write(b"HTTP/1.1 %d x\r\n" % status)
        self.wfile.write("".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() + b"\r\n")
        if self.command != "HEAD":
            self.wfile.write(body)
        if str(len(body)) != headers.get("Content-Length"):
            self.close_connection = True

    def break_off(self, kind: str, chance: random.Random, headers: dict[str, str], body: bytes) -> None:
        """What is no answer, or none that ends as it should."""
        self.close_connection = True
        if kind == "garbage":
            self.wfile.write(chance.choice([b"\0" * 9000, b"HTTP/9.9 x\r\n\r\n", b"x" * 100_000, b"HTTP/1.1 200\r\n"]))
            return
        if kind == "chunks":
            headers = {"Transfer-Encoding": "chunked"}
            body = chance.choice([b"-1\r\nx", b"fffffffffffffff\r\nx", b"zz\r\n", b"3\r\nab", b"0\r\n\r\n"])
        self.wfile.write(b"HTTP/1.1 200 x\r\n")
        if kind == "drip":
            for byte in "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()[:40]:
                self.wfile.write(bytes([byte]))
                time.sleep(DRIP)
            return
        self.wfile.write("".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() + b"\r\n")
        self.wfile.write(body[: len(body) // 2] if kind != "chunks" else body)
        if kind == "silence":
            time.sleep(SILENCE)
        elif kind == "endless":
            for _ in range(2000):
                self.wfile.write(bytes(1 << 16))

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


def part_of(data: bytes, headers: Any) -> tuple[int, dict[str, str], bytes]:
    """A file, or the part that is asked for."""
    told = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
    asked = re.match(r"bytes=(\d+)-(\d*)", headers.get("Range", "") or "")
    if not asked:
        return 200, told, data
    first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
    if first > last:
        return 416, {}, b""
    return 206, {**told, "Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]


@contextmanager
def served(find: Any, plan: list[dict[str, Any]], port: int = 0) -> Iterator[tuple[str, list[str]]]:
    """The server's address, and the paths that are asked for, which grow."""
    asked: list[str] = []
    handler = type("Handler", (Answers,), {"plan": plan, "asked": asked, "once": port > 0, "find": staticmethod(find)})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    server.block_on_close = False
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that gave up
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
