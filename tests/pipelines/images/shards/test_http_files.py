"""Shards on a web server: parts of files, servers that fail, lie or take for ever, and files that change."""

from __future__ import annotations

import http.server
import re
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from givens.image_files import (
    CHANGED,
    KINDS,
    change,
    load,
    read_epochs,
    rows_of,
    small_blocks,
    two_files,
    write_parquet,
    write_shards,
    write_tar,
)

from pipelines.config import UserError
from pipelines.images.shards import http_files, shard
from pipelines.images.shards.tar import SCAN_AHEAD


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, or parts of them; every third answer is an error."""

    failing, count = False, 0

    def do_GET(self) -> None:
        Ranges.count += 1
        data = (Path(self.directory) / self.path.strip("/")).read_bytes()
        if self.failing and Ranges.count % 3 == 0:
            return self.send_error(503)
        first, last, validators = 0, len(data) - 1, self.validators(data)
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and int(asked[1]) > last:
            return self.send_error(416)
        if asked and self.gives_part(validators):
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            self.send_response(206)
            if told := self.range_told(first, last, len(data)):
                self.send_header("Content-Range", told)
        else:
            self.send_response(200)
        sent = self.body(data[first : last + 1])
        self.send_header("Content-Length", str(len(sent)))
        self.send_header("Accept-Ranges", "bytes")
        for name, value in validators.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)

    do_HEAD = do_GET  # type: ignore[assignment]

    def validators(self, data: bytes) -> dict[str, str]:
        return {"ETag": f'"{hash(data)}"'}

    def gives_part(self, validators: dict[str, str]) -> bool:
        """Whatever `If-Range` says."""
        return True

    def body(self, data: bytes) -> bytes:
        """What is sent of the part."""
        return data

    def range_told(self, first: int, last: int, length: int) -> str | None:
        return f"bytes {first}-{last}/{length}"

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


@contextmanager
def served(folder: Path, failing: bool = False, **behaviour: Any):
    handler = type("Handler", (Ranges,), {"failing": failing, **behaviour})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(folder)))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that gave up
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_on_a_server_is_read_in_parts(tmp_path, kind, monkeypatch):
    path = write_shards(tmp_path, kind, rows_of(40), 1) / f"train-00000-of-00001.{kind}"
    expected = load(path)
    with served(tmp_path, failing=True) as url:  # which is tried again
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        found = load(f"{url}/{path.name}")
        assert torch.equal(found.train.pixels(range(36)), expected.train.pixels(range(36)))
        assert torch.equal(found.train.labels, expected.train.labels)
    found.train._rows.read.__self__.cache.clear()
    with pytest.raises(UserError, match=rf"^http://.*{path.name}: cannot be read: "):
        found.train.pixels([0])  # a server that is gone is no bad image


def refusal(url: str) -> str:
    """In one line, why a shard is not read."""
    with pytest.raises(UserError) as caught:
        load(url)
    assert str(caught.value).startswith(f"{url}: cannot be read: ") and "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{url}: cannot be read: ")


def not_allowed(self: Ranges) -> None:
    self.send_error(405)


def without_length(self: Ranges) -> None:
    self.send_response(200)
    self.end_headers()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"gives_part": lambda s, validators: False}, "the server does not send parts of files"),
        ({"body": lambda s, data: data[:-1] if s.command == "GET" else data}, "fewer bytes came than the "),
        ({"body": lambda s, data: data + b"1" if s.command == "GET" else data}, "more bytes came than the "),
        ({"do_HEAD": without_length, "do_GET": without_length}, "the server does not say how large the file is"),
    ],
    ids=["no parts", "too short", "too long", "no length"],
)
def test_a_server_that_does_not_send_what_was_asked_for_is_refused(tmp_path, monkeypatch, behaviour, message):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(shard, "RETRIES", 1)
    path = write_tar(tmp_path / "a.tar", rows_of(40))
    with path.open("ab") as file:
        file.write(bytes(SCAN_AHEAD))  # so that a scan asks for a part, and not for all of it
    with served(tmp_path, **behaviour) as url:
        assert refusal(f"{url}/a.tar").startswith(message)


def test_a_server_that_sends_no_headers_alone_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write_tar(tmp_path / "a.tar", rows_of(10))
    with served(tmp_path, do_HEAD=not_allowed) as url:
        assert len(load(f"{url}/a.tar").train) == 9


def test_what_is_not_there_is_asked_for_once(tmp_path, monkeypatch):
    """And not again after pauses: the fault is ours. Something that fails there may pass."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    asked: list[int] = []
    for status, tries in ((404, 1), (403, 1), (503, 3)):

        def answer(self: Ranges, status: int = status) -> None:
            asked.append(status)
            self.send_error(status)

        monkeypatch.setattr(shard, "RETRIES", 2)
        with served(tmp_path, do_HEAD=answer, do_GET=answer) as url:
            assert refusal(f"{url}/a.tar").startswith(f"{status}, ")
        assert asked.count(status) == 2 * tries  # by HEAD and by GET


def says_nothing(self: Ranges) -> None:
    time.sleep(5)


def drips_headers(self: Ranges) -> None:
    self.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(50):
        self.wfile.write(b"X-%d: 1\r\n" % number)
        time.sleep(0.1)


def drips_data(self: Ranges) -> None:
    asked = re.match(r"bytes=(\d+)-(\d+)", self.headers["Range"])
    assert asked
    self.send_response(206)
    self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/*")
    self.send_header("Content-Length", str(int(asked[2]) + 1 - int(asked[1])))
    self.end_headers()
    for _ in range(50):
        self.wfile.write(b"1")
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ({"do_HEAD": says_nothing, "do_GET": says_nothing}, "the server did not answer in time"),
        ({"do_HEAD": drips_headers, "do_GET": drips_headers}, "the server did not answer in time"),
        ({"do_GET": says_nothing}, "the bytes from 0 to "),
        ({"do_GET": drips_data}, "the bytes from 0 to "),
    ],
    ids=["silent", "headers drip", "silent then", "data drip"],
)
def test_a_server_that_drips_for_ever_is_given_up(tmp_path, monkeypatch, behaviour, message):
    """Each byte comes in time, and all of them would not come for days."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(shard, "RETRIES", 0)
    monkeypatch.setattr(http_files, "SILENCE", 0.4)
    monkeypatch.setattr(http_files, "SLOWEST", 1 << 20)
    write_tar(tmp_path / "a.tar", rows_of(10))
    with served(tmp_path, **behaviour) as url:
        began = time.monotonic()
        assert refusal(f"{url}/a.tar").startswith(message)
        assert time.monotonic() - began < 3


# Files that change


def weak(self: Ranges, data: bytes) -> dict[str, str]:
    return {"ETag": f'W/"{hash(data)}"', "Last-Modified": "Tue, 01 Jul 2025 00:00:00 GMT"}


def dated(self: Ranges, data: bytes) -> dict[str, str]:
    return {"ETag": '"1"', "Last-Modified": f"Tue, 01 Jul 2025 00:00:{zlib.crc32(data) % 60:02} GMT"}


def same(self: Ranges, data: bytes) -> dict[str, str]:
    return {"ETag": '"1"', "Last-Modified": "Tue, 01 Jul 2025 00:00:00 GMT"}


def silent(self: Ranges, data: bytes) -> dict[str, str]:
    return {}


def only_when_asked_for_parts(self: Ranges, data: bytes) -> dict[str, str]:
    return {} if self.command == "HEAD" else {"ETag": f'"{hash(data)}"'}


def only_when_asked_for_all(self: Ranges, data: bytes) -> dict[str, str]:
    return {"ETag": f'"{hash(data)}"'} if self.command == "HEAD" else {}


def honest(self: Ranges, validators: dict[str, str]) -> bool:
    """What RFC 9110 asks for: a part, unless the file has another strong ETag than `If-Range` says."""
    asked, data = self.headers.get("If-Range"), (Path(self.directory) / self.path.strip("/")).read_bytes()
    return asked is None or (asked == f'"{hash(data)}"' and validators.get("ETag", asked) == asked)


SERVERS: dict[str, dict[str, Any]] = {
    "ETag, If-Range ignored": {},
    "ETag, If-Range honoured": {"gives_part": honest},
    "If-Range alone": {"validators": only_when_asked_for_all, "gives_part": honest},
    "weak ETag": {"validators": weak, "gives_part": honest},
    "date": {"validators": dated},
    "ETag in parts alone": {"validators": only_when_asked_for_parts, "gives_part": honest},
    "length": {"validators": same},
    "length, nothing else": {"validators": silent},
    "length, in no answer": {"validators": silent, "range_told": lambda s, first, last, _: f"bytes {first}-{last}/*"},
}


@pytest.mark.sparse
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_that_changes_on_a_server_ends_the_run(tmp_path, monkeypatch, kind, server):
    """And one that stays is read, whatever the server says of it. Other lengths are longer or shorter ones."""
    small_blocks(monkeypatch)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path, other = two_files(tmp_path, kind)
    if "length" in server:
        path, other = other.replace(path), path.with_name("c")
        (write_tar if kind == "tar" else write_parquet)(path, rows_of(40))
        (write_tar if kind == "tar" else write_parquet)(other, rows_of(48)[8:])
        if "no answer" in server:
            other.write_bytes(other.read_bytes()[:1500])
        else:
            other.write_bytes(other.read_bytes() + bytes(10240))
    with served(tmp_path, **SERVERS[server]) as url:
        train = load(f"{url}/{path.name}", cache_mb=0, on_error="skip", max_bad_fraction=1.0).train
        read_epochs(train, seed=0)
        change(path, other, "replaced")
        seen = CHANGED if (kind, server) != ("parquet", "length, in no answer") else "cannot be read: .*"
        with pytest.raises(UserError, match=f"^{url}/{path.name}: {seen}$"):
            train.pixels([30])
    assert not train.report.problems


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (lambda s, first, last, length: f"bytes {first + 512}-{last + 512}/{length}", "are those from "),
        (lambda s, first, last, length: f"bytes {first}-{last - 1}/{length}", "are those from "),
        (lambda s, first, last, length: f"items {first}-{last}/{length}", "does not say which"),
        (lambda s, first, last, length: None, "does not say which"),
    ],
)
def test_another_part_than_was_asked_for_is_refused(tmp_path, monkeypatch, told, message):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path = write_tar(tmp_path / "a.tar", rows_of(40))
    with served(tmp_path) as url:
        train = load(f"{url}/a.tar", cache_mb=0).train
        train.pixels([0])
    with served(tmp_path, range_told=told) as url, pytest.raises(UserError) as caught:
        load(f"{url}/a.tar")
    assert re.fullmatch(
        rf"{url}/{path.name}: cannot be read: the bytes from 0 to \d+ were asked for, what came "
        rf"{message}.*",
        str(caught.value),
    )


def test_what_no_retry_can_mend_is_told_at_once(tmp_path, monkeypatch):
    """A server that leads to what is no web server, or cannot send parts: it would do the same a second later."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(shard, "FIRST_PAUSE", 100)
    path = write_tar(tmp_path / "a.tar", rows_of(40))
    with path.open("ab") as file:
        file.write(bytes(SCAN_AHEAD))

    def leads_away(self: Ranges) -> None:
        self.send_response(302)
        self.send_header("Location", "ftp://127.0.0.1:9/a.tar")
        self.send_header("Content-Length", "0")
        self.end_headers()

    with served(tmp_path, do_HEAD=leads_away, do_GET=leads_away) as url:
        assert refusal(f"{url}/a.tar") == "the server leads to 'ftp://127.0.0.1:9/a.tar', which is not on a web server"
    with served(tmp_path, gives_part=lambda self, validators: False) as url:
        assert refusal(f"{url}/a.tar") == "the server does not send parts of files"
