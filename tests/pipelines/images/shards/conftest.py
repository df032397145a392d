"""Shared by the tests of shards: caches of their own, and short pauses."""

import pytest

from pipelines.images.shards import shard


@pytest.fixture(autouse=True)
def private_caches(tmp_path_factory, monkeypatch, one_process) -> None:
    """Neither indices nor copies of tables in the user's cache; and accelerate is set up anew."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setattr(shard, "FIRST_PAUSE", 0.001)
