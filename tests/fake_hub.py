"""A Hub on this machine: serves `root/<owner>/<name>/<revision>/...` over HTTP, read-only, and remembers who asked."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FakeHub(ThreadingHTTPServer):
    """`url` is what `HF_ENDPOINT` should be; `requests` collects (path, Authorization header); with `secret`, requests
    without that token are told that there is no such repository, as the Hub does."""

    daemon_threads = True

    def __init__(self, root: Path, secret: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.secret = root, secret
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """The three questions that `snapshot_download` asks: what is this repository, what is in it, and a file of it."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, token = unquote(urlsplit(self.path).path), self.headers.get("Authorization")
        self.server.requests.append((path, token))
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        facts = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)
        asked = file or tree or facts
        if asked is None:
            return self.answer(404)
        repository = self.server.root / asked[1]
        if not repository.is_dir() or self.server.secret not in (None, (token or "").removeprefix("Bearer ")):
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        folder = self.revision(repository, asked[2] or "main")
        if folder is None:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if file:
            return self.send_file(folder, file[3])
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if tree:
            entries = [{"type": "file", "path": n, "oid": "0", "size": (folder / n).stat().st_size} for n in names]
            return self.answer(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())
        about = {"id": asked[1], "modelId": asked[1], "sha": commit(folder), "private": False, "tags": [],
                 "siblings": [{"rfilename": name} for name in names]}  # fmt: skip
        return self.answer(200, {"Content-Type": "application/json"}, json.dumps(about).encode())

    do_HEAD = do_GET

    def revision(self, repository: Path, name: str) -> Path | None:
        """The folder of a branch, or of a commit."""
        return next((folder for folder in repository.iterdir() if name in (folder.name, commit(folder))), None)

    def send_file(self, folder: Path, name: str) -> None:
        if not (folder / name).is_file():
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit(folder)})
        data = (folder / name).read_bytes()
        return self.answer(200, {"X-Repo-Commit": commit(folder), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data)

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""


def commit(folder: Path) -> str:
    """The commit hash of a revision's folder."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


@contextmanager
def serve(root: Path, secret: str | None = None) -> Iterator[FakeHub]:
    """A running Hub."""
    hub = FakeHub(root, secret)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
