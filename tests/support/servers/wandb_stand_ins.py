"""Stand-ins for W&B: the package, its server, and a reader of offline logs."""

from __future__ import annotations

import json
import re
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest


class FakeWandb(SimpleNamespace):
    """Replaces the module. failing: errors by call, which is a method of the run, `images`, `init online` or
    `init offline`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: dict[str, Exception] | None = None) -> None:
        self.failing = failing or {}
        self.starts: list[dict[str, Any]] = []
        """The options of each `init`."""
        self.history: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.artifacts: list[tuple[Any, list[str]]] = []
        self.finished = self.teardowns = 0
        self.Settings = type("Settings", (FakeSettings,), {})
        self.Artifact = FakeArtifact
        self.Image = lambda image, caption: SimpleNamespace(image=image, caption=caption)
        self.Table = lambda columns, data: SimpleNamespace(columns=columns, data=data)
        monkeypatch.setitem(sys.modules, "wandb", self)

    def init(self, **options: Any) -> FakeRun:
        self.starts.append(options)
        self.call(f"init {options['mode']}")
        return FakeRun(self, options)

    def teardown(self) -> None:
        self.teardowns += 1

    def call(self, name: str) -> None:
        """Raise the error requested for this call, if any."""
        if name in self.failing:
            raise self.failing[name]


class FakeRun:
    """A run of the stand-in."""

    def __init__(self, wandb: FakeWandb, options: dict[str, Any]) -> None:
        self.wandb, self.id, self.summary = wandb, options["id"], wandb.summary
        self.url = f"https://wandb.example/runs/{self.id}" if options["mode"] == "online" else None

    def log(self, values: dict[str, Any], step: int) -> None:
        self.wandb.call("images" if any(isinstance(value, list) for value in values.values()) else "log")
        self.wandb.history.append((step, values))

    def log_artifact(self, artifact: FakeArtifact, aliases: list[str]) -> None:
        self.wandb.call("log_artifact")
        self.wandb.artifacts.append((artifact, aliases))

    def finish(self) -> None:
        self.wandb.finished += 1
        self.wandb.call("finish")


class FakeSettings(SimpleNamespace):
    """Accepts any settings."""

    model_fields = {"init_timeout": None, "finish_timeout": None, "finish_timeout_raises": None}


class FakeArtifact:
    """Records how an artifact was created."""

    def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
        self.name, self.type, self.metadata, self.folder, self.waited = name, type, metadata, "", 0

    def add_dir(self, folder: str, policy: str, skip_cache: bool) -> None:
        self.folder = folder

    def wait(self, timeout: int) -> None:
        self.waited = timeout


HISTORY = "wandb-history.jsonl"


class WandbServer:
    """Listens on a free port during the `with` block, or until it is killed."""

    def __init__(self) -> None:
        self.history: dict[str, list[dict[str, Any]]] = {}
        """The history lines of each run, in order of arrival."""
        self.offsets: dict[str, int] = {}
        self.started = False
        self.connections: set[socket.socket] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"owner": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> WandbServer:
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()

    def kill(self) -> None:
        """Close the port and all connections, as if the process died."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def take(self, run: str, files: dict[str, Any]) -> None:
        """Record history lines; they must follow those received before."""
        part = files.get(HISTORY)
        if part:
            assert part["offset"] == self.offsets.get(run, 0), "the client writes over its own lines"
            self.history.setdefault(run, []).extend(json.loads(line) for line in part["content"])
            self.offsets[run] = part["offset"] + len(part["content"])

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The response to a GraphQL query of the kinds that a run needs."""
        operation = re.match(r"\s*(?:query|mutation)\s+(\w+)", query)
        name = variables.get("name") or ""
        project = {"id": "p", "name": "smalti", "entity": {"id": "e", "name": "someone"}}
        match operation and operation[1]:
            case "UpsertBucket":
                self.started = True
                bucket = {"id": "b", "name": name, "displayName": name, "project": project, "historyLineCount": 0}
                return {"upsertBucket": {"bucket": bucket, "inserted": True}}
            case "RunResumeStatus":
                return {"model": {**project, "bucket": self.resumed(name)}}
            case "Viewer":
                return {"viewer": {"id": "v", "entity": "someone", "username": "someone", "flags": "{}"}}
            case "ArtifactType":  # tables are sent as artifacts
                return {"project": None}
            case "CreateArtifact":  # pretend that its files are uploaded
                artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
                return {"createArtifact": {"artifact": artifact}}
            case "CreateRunFiles":
                return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        return {}

    def resumed(self, run: str) -> dict[str, Any] | None:
        """The state from which a client resumes a run, None for a new run."""
        lines = self.history.get(run)
        if not lines:
            return None
        return {
            "id": "b",
            "name": run,
            "displayName": run,
            "summaryMetrics": "{}",
            "config": "{}",
            "tags": [],
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "historyLineCount": self.offsets[run],
            "historyTail": json.dumps([json.dumps(lines[-1])]),
            "wandbConfig": '{"t": 1}',
        }


class Handler(BaseHTTPRequestHandler):
    """GraphQL and the file stream."""

    protocol_version = "HTTP/1.1"
    owner: WandbServer

    def setup(self) -> None:
        super().setup()
        self.owner.connections.add(self.connection)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
        if self.path.startswith("/graphql"):
            self.reply({"data": self.owner.answer(body["query"], body.get("variables") or {})})
        else:
            if parts := re.fullmatch(r"/files/.+/(\w+)/file_stream", self.path):
                self.owner.take(parts[1], body.get("files") or {})
            self.reply({})

    def reply(self, value: dict[str, Any]) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass
