"""The gate in front of gradio, without gradio. `test_browser` asks a real server."""

from __future__ import annotations

import asyncio
import json

import pytest

from pipelines.app.bounds import API, Bounds, Gate, names_file

MOST = 1000


def asked(path, method="GET", body=b"", headers=None, hosts=(), chunk=None, kind="http"):
    """The status that a request gets, and the body that the application behind the gate got, or None."""
    got, sent = [], []
    parts = [body] if chunk is None else [body[at : at + chunk] for at in range(0, len(body), chunk)]
    messages = [
        {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts or [b""])
    ]
    headers = {"host": "localhost:7860", **(headers or {})}
    scope = {
        "type": kind,
        "path": path,
        "method": method,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    async def behind(scope, receive, send):
        data, more = b"", True
        while more:
            message = await receive()
            data += message.get("body", b"")
            more = message.get("more_body", False)
        got.append(data)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    asyncio.run(Gate(behind, MOST, hosts)(scope, receive, send))
    return (sent[0]["status"] if sent else None), (got[0] if got else None)


@pytest.mark.parametrize("path", ["/", "/config", "/assets/index.js", f"{API}/heartbeat/abc", f"{API}/queue/data"])
def test_what_the_page_reads(path):
    assert asked(path)[0] == 200 and asked(path, "HEAD")[0] == 200


@pytest.mark.sparse
@pytest.mark.parametrize(
    "path",
    [
        f"{API}/file=/etc/passwd",
        "/file=x",
        f"{API}/upload",
        f"{API}/proxy=http://x",
        "/assets/../x",
        f"{API}/run/sample",
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_what_it_does_not_is_not_there(path, method):
    assert asked(path, method) == (404, None)


def test_nothing_else_than_http_comes_through():
    assert asked("/", kind="websocket") == (None, None)


def test_a_body_comes_through_whole():
    body = json.dumps({"data": ["x" * 800], "fn_index": 1}).encode()
    assert asked(f"{API}/queue/join", "POST", body) == (200, body)
    assert asked(f"{API}/queue/join", "POST", body, chunk=7) == (200, body)


def test_a_body_that_is_too_long_is_not_read_to_its_end():
    long = b" " * (MOST + 1)
    assert asked(f"{API}/queue/join", "POST", headers={"content-length": str(MOST + 1)}) == (413, None)
    assert asked(f"{API}/queue/join", "POST", long, chunk=10) == (413, None)
    assert asked(f"{API}/queue/join", "POST", long, headers={"content-length": "5"}) == (413, None)
    assert asked(f"{API}/queue/join", "POST", long[:-1])[0] == 200


@pytest.mark.parametrize(
    "value",
    [{"path": "x"}, {"url": "http://x"}, [1, [{"a": {"path": None}}]], {"data": [{"meta": {}, "path": "/etc/passwd"}]}],
)
def test_a_value_that_names_a_file_is_refused(value):
    body = json.dumps(value).encode()
    assert names_file(body) and names_file(body.decode().encode("utf-16"))
    assert asked(f"{API}/queue/join", "POST", body) == (403, None)


def test_other_values_name_none():
    assert not any(names_file(body) for body in (b"", b"nonsense", b"3", b'{"data": ["path", "/x"]}', b"[" * 50_000))


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:7860", 200), ("localhost", 200), ("127.0.0.1:1", 200), ("evil.example:7860", 403), ("", 403)],
)
def test_a_local_server_is_called_by_a_local_name(host, status):
    assert asked("/", headers={"host": host}, hosts=("localhost", "127.0.0.1"))[0] == status
    assert asked("/", headers={"host": host})[0] == 200


def test_as_many_bytes_as_are_allowed_go_through_in_base64():
    bounds = Bounds(max_upload=3 * 2**20)
    assert bounds.max_body > 4 * 2**20 and bounds.megabytes == 3
