"""A stand-in for the parts of the `wandb` package that a run uses. Records calls, and raises errors on request."""

from __future__ import annotations

import sys
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
