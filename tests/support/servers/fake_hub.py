"""A Hub on this machine: serves `root/<owner>/<name>/<revision>/...` over HTTP, datasets from `root/datasets/...`,
takes uploads, each commit as a whole or not at all, and remembers who asked."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from processes import run_file

REFUSED = {"stranger": 401, "forbidden": 403, "missing": 404, "broken": 500}
"""What owners get who may not write."""

EMPTY = {"title": "t", "owner": {"name": "me"}, "items": [], "private": True, "lastUpdated": "2026-01-01T00:00:00.000Z"}
EMPTY |= {"position": 0, "theme": "blue", "upvotes": 0}
"""What is told of any collection."""


class FakeHub(ThreadingHTTPServer):
    """`url` is what `HF_ENDPOINT` should be; `requests` collects (path, Authorization header); with `secret`, requests
    without that token are told that there is no such repository, as the Hub does."""

    daemon_threads = True

    def __init__(self, root: Path, secret: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.secret = root, secret
        self.requests: list[tuple[str, str | None]] = []
        self.created: list[dict[str, object]] = []
        self.commits: list[dict[str, object]] = []
        self.collections: dict[str, list[str]] = {}

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
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        path = path.replace("/api/models/", "/api/")
        facts = re.fullmatch(r"/api/((?:datasets/)?[^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(r"/api/((?:datasets/)?[^/]+/[^/]+)/tree/([^/]+)", path)
        if path.startswith("/api/collections/"):
            return self.say({"slug": path.removeprefix("/api/collections/"), **EMPTY})
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
        name = asked[1].removeprefix("datasets/")
        about = {
            "id": name,
            "modelId": name,
            "sha": commit(folder),
            "private": False,
            "tags": [],
            "siblings": [{"rfilename": name} for name in names],
        }
        return self.answer(200, {"Content-Type": "application/json"}, json.dumps(about).encode())

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """What an upload asks: make the repository; is the card in order; a branch; how to send; and the files."""
        path, body, token = unquote(urlsplit(self.path).path), self.body(), self.headers.get("Authorization")
        self.server.requests.append((path, token))
        path = path.replace("/api/models/", "/api/")
        if self.server.secret not in (None, (token or "").removeprefix("Bearer ")):
            return self.answer(401)
        if path == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        if path.startswith("/api/collections"):
            return self.collect(path, json.loads(body))
        if path == "/api/repos/create":
            asked = json.loads(body)
            if asked["organization"] == "dropped":
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if status := REFUSED.get(asked["organization"]):
                return self.answer(status, {"X-Error-Message": f"this is {asked['organization']}"})
            name = f"{asked['organization']}/{asked['name']}"
            name = f"{asked['type']}s/{name}" if asked.get("type") == "dataset" else name
            main = self.server.root / name / "main"
            if not main.is_dir():
                main.mkdir(parents=True)
                (main / ".gitattributes").write_text("*.safetensors filter=lfs")
            self.server.created.append(asked)
            return self.say({"url": f"{self.server.url}/{name}"})
        found = re.fullmatch(r"/api/((?:datasets/)?[^/]+/[^/]+)/(branch|preupload|commit)/([^/]+)", path)
        if found is None:
            return self.answer(404)
        folder = self.server.root / found[1] / found[3]
        as_request = "create_pr=1" in urlsplit(self.path).query
        if as_request and found[2] == "commit":
            shutil.copytree(folder, folder.parent / "pr-1", dirs_exist_ok=True)
            folder = folder.parent / "pr-1"
        if found[2] == "branch":
            shutil.copytree(folder.parent / "main", folder, dirs_exist_ok=True)
            return self.say({})
        if found[2] == "preupload":
            names = [entry["path"] for entry in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.say({"files": files})
        lines = list(map(json.loads, body.splitlines()))
        told: dict[str, list[str]] = {key: [] for key in ("header", "file", "deletedFile")}
        for line in lines:
            told[line["key"]].append(line["value"].get("path", line["value"].get("summary")))
        added, deleted = told["file"], told["deletedFile"]
        if "refuse this" in told["header"] or set(added) & set(deleted) or len(added) > len(set(added)):
            return self.answer(403, {"X-Error-Message": "not this commit"})
        if missing := [name for name in deleted if not (folder / name).is_file()]:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": f"no file {missing[0]}"})
        for line in lines:
            target = folder / line["value"].get("path", "")
            if line["key"] == "file":
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "deletedFile":
                target.unlink()
        self.server.commits.append({"repository": found[1], "added": added, "deleted": deleted})
        request = {"pullRequestUrl": f"{self.server.url}/{found[1]}/discussions/1"} if as_request else {}
        return self.say({"commitUrl": f"{self.server.url}/{found[1]}/commit/x", "commitOid": commit(folder), **request})

    def collect(self, path: str, asked: dict[str, Any]) -> None:
        """Make a collection, or put a repository into one; either is a conflict if it is there."""
        if path == "/api/collections":
            slug = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}-1"
            items = self.server.collections.setdefault(slug, [])
            status = 409 if items else 200
        else:
            slug = path.removeprefix("/api/collections/").removesuffix("/items")
            items, name = self.server.collections[slug], asked["item"]["id"]
            status = 409 if name in items else 200
            items += [name] if status == 200 else []
        self.answer(status, {"Content-Type": "application/json"}, json.dumps({"slug": slug, **EMPTY}).encode())

    def body(self) -> bytes:
        """What was sent, whole or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def say(self, value: object) -> None:
        """Answer with JSON."""
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

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
    """The commit hash of a revision's folder and its files."""
    digest = hashlib.sha1(str(folder).encode())
    for path in sorted(folder.rglob("*")):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


@contextmanager
def serve(root: Path, secret: str | None = None) -> Iterator[FakeHub]:
    """A running Hub."""
    hub = FakeHub(root, secret)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def run_client(script: str, server: FakeHub, home: Path, *arguments: str, token: str | None = None) -> Any:
    """What a process of its own prints in its last line, as JSON: it runs `script`, and takes `server` for the Hub."""
    environment = {**places_of(server, home), "HF_TOKEN": token}
    return json.loads(run_file(script, *arguments, seconds=120, **environment).splitlines()[-1])


def places_of(server: FakeHub, home: Path) -> dict[str, str]:
    """What makes a new process take `server` for the Hub."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
