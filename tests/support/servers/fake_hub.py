"""A stand-in for the Hugging Face Hub: serves `root/<owner>/<name>/<revision>/...`, and datasets from
`root/datasets/...`, accepts commits atomically, and records requests."""

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
from urllib.parse import parse_qs, unquote, urlsplit

from processes import run_file

REFUSED = {"stranger": 401, "forbidden": 403, "missing": 404, "broken": 500}
"""Status codes of owners that refuse to create a repository."""


class FakeHub(ThreadingHTTPServer):
    """`url` is the value for `HF_ENDPOINT`; `requests` records (path, Authorization header). With `secret`, requests
    without that token get "repository not found", like private repositories on the Hub."""

    daemon_threads = True

    def __init__(self, root: Path, secret: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.secret = root, secret
        self.requests: list[tuple[str, str | None]] = []
        self.commits: list[dict[str, object]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """The requests of `snapshot_download` and `upload_folder`."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, token = unquote(urlsplit(self.path).path), self.headers.get("Authorization")
        self.server.requests.append((path, token))
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        path = path.replace("/api/models/", "/api/")
        facts = re.fullmatch(r"/api/((?:datasets/)?[^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        tree = re.fullmatch(r"/api/((?:datasets/)?[^/]+/[^/]+)/tree/([^/]+)", path)
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
        """An upload: create the repository, validate the card, create a branch, choose upload modes, commit."""
        path, body, token = unquote(urlsplit(self.path).path), self.body(), self.headers.get("Authorization")
        self.server.requests.append((path, token))
        path = path.replace("/api/models/", "/api/")
        if self.server.secret not in (None, (token or "").removeprefix("Bearer ")):
            return self.answer(401)
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
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
            return self.send_json({"url": f"{self.server.url}/{name}"})
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
            return self.send_json({})
        if found[2] == "preupload":
            names = [entry["path"] for entry in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.send_json({"files": files})
        lines = list(map(json.loads, body.splitlines()))
        listed: dict[str, list[str]] = {key: [] for key in ("header", "file", "deletedFile")}
        for line in lines:
            listed[line["key"]].append(line["value"].get("path", line["value"].get("summary")))
        added, deleted = listed["file"], listed["deletedFile"]
        if set(added) & set(deleted) or len(added) > len(set(added)):
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
        url = f"{self.server.url}/{found[1]}/commit/x"
        return self.send_json({"commitUrl": url, "commitOid": commit(folder), **request})

    def body(self) -> bytes:
        """The request body, which may be chunked."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send_json(self, value: object) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def revision(self, repository: Path, name: str) -> Path | None:
        """The folder of a branch or commit."""
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


class DatasetHandler(Handler):
    """Serves data sets instead of models, and parts of files."""

    def do_GET(self) -> None:
        self.path = self.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
        if re.search(r"/tree/[^/?]+/", self.path):
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})  # there are no folders
        super().do_GET()

    do_HEAD = do_GET  # type: ignore[assignment]

    def do_POST(self) -> None:
        """Answer with the sizes of some paths."""
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        folder = self.server.root / "me" / "shards" / "main"
        found = [
            {"type": "file", "path": p, "oid": "0", "size": (folder / p).stat().st_size}
            for p in asked
            if (folder / p).is_file()
        ]
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(found).encode())

    def send_file(self, folder: Path, name: str) -> None:
        asked = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked or not (folder / name).is_file():
            return super().send_file(folder, name)
        part = (folder / name).read_bytes()[int(asked[1]) : int(asked[2]) + 1]
        self.server.requests.append((f"{name} {len(part)}", None))
        self.answer(206, {"X-Repo-Commit": commit(folder), "ETag": '"1"'}, part)


def commit(folder: Path) -> str:
    """The commit hash of a revision's folder and its files."""
    digest = hashlib.sha1(str(folder).encode())
    for path in sorted(folder.rglob("*")):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


@contextmanager
def serve(root: Path, secret: str | None = None) -> Iterator[FakeHub]:
    """Run a Hub."""
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
    """Run `script` in a process that uses `server` as the Hub; returns the JSON in its last line of output."""
    environment = {**places_of(server, home), "HF_TOKEN": token}
    return json.loads(run_file(script, *arguments, seconds=120, **environment).splitlines()[-1])


def places_of(server: FakeHub, home: Path) -> dict[str, str]:
    """Environment variables with which a process uses `server` as the Hub."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
