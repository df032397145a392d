"""A Hub on this machine, so that a notebook can push and load without an account or a network.

It speaks as much of the protocol of huggingface.co as `push_to_hub` and `from_pretrained` use: one branch, no
passwords, files below a folder, `ROOT/owner/name`. It listens on 127.0.0.1 alone, and ends with the Python that started
it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def start_hub(root: str | Path) -> LocalHub:
    """A running Hub that keeps its files in `root`, and is from here on *the* Hub of this process.

    huggingface_hub reads where the Hub is when it is imported. Raises `RuntimeError` where that has happened.
    """
    if "huggingface_hub" in sys.modules:
        raise RuntimeError("start_hub comes first: huggingface_hub is imported, and has taken the real Hub for its own")
    hub = LocalHub(Path(root).resolve())
    os.environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(hub.root / ".cache"),  # what is downloaded stays here, and leaves your own cache alone
        "HF_TOKEN": "anything",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # a protocol of its own for large files
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    return hub


class LocalHub(ThreadingHTTPServer):
    """`url` is its address, `root` the folder of its repositories."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.url = root, f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str) -> dict[str, Path]:
        """The files of `owner/name` by their names in it. Raises `KeyError` if there is no such repository."""
        folder = self.root / repository
        if not folder.is_dir():
            raise KeyError(repository)
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def commit(self, repository: str) -> str:
        """A hash of all that is in a repository."""
        digest = hashlib.sha1()
        for name, path in self.files(repository).items():
            digest.update(name.encode() + path.read_bytes())
        return digest.hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers what is asked before, while and after files travel."""

    server: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """What a repository holds, or a file of it."""
        path = unquote(urlsplit(self.path).path)
        try:
            if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)", path):
                return self.send_file(found[1], found[2])
            if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/[^/]+", path):
                files = self.server.files(found[1])
                sizes = [(name, file.stat().st_size) for name, file in files.items()]
                return self.say([{"type": "file", "path": name, "oid": "0", "size": size} for name, size in sizes])
            if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/revision/[^/]+)?", path):
                names = [{"rfilename": name} for name in self.server.files(found[1])]
                about = {"id": found[1], "sha": self.server.commit(found[1]), "private": False, "tags": []}
                return self.say({**about, "siblings": names})
        except KeyError:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        self.answer(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Make a repository, agree on how to send files, and take them."""
        path, body = unquote(urlsplit(self.path).path), self.body()
        if path == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            (self.server.root / name).mkdir(parents=True, exist_ok=True)
            return self.say({"url": f"{self.server.url}/{name}"})
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(preupload|commit)/[^/]+", path)
        if found is None:
            return self.answer(404)
        if found[2] == "preupload":
            files = json.loads(body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self.say({"files": [{"path": file["path"], **plain} for file in files]})
        self.take(found[1], body)
        address = f"{self.server.url}/{found[1]}"
        self.say({"commitUrl": f"{address}/commit/main", "commitOid": self.server.commit(found[1])})

    def take(self, repository: str, body: bytes) -> None:
        """The files of a commit, lines of JSON."""
        folder = (self.server.root / repository).resolve()
        for line in map(json.loads, body.splitlines()):
            target = (folder / line["value"].get("path", "")).resolve()
            if folder not in target.parents:
                continue  # the header, or a path that leads out of the repository
            if line["key"] == "file":
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "deletedFile":
                target.unlink(missing_ok=True)

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

    def send_file(self, repository: str, name: str) -> None:
        """A file, with its hash, by which it is cached."""
        files, commit = self.server.files(repository), self.server.commit(repository)
        if name not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[name].read_bytes()
        self.answer(200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data)

    def say(self, value: object) -> None:
        """Answer with JSON."""
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        """Status, headers and, unless only these were asked for, the body."""
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing is printed."""
