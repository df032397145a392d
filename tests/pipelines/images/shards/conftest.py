"""Shared by the tests of shards: short pauses before another attempt, and accelerate set up anew."""

import pytest

from pipelines.images.shards import shard


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch, one_process) -> None:
    monkeypatch.setattr(shard, "FIRST_PAUSE", 0.001)
