"""Fixtures of the tests of images."""

import pytest


@pytest.fixture(autouse=True)
def private_caches(tmp_path_factory, monkeypatch) -> None:
    """Keep copies of tables out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("home")))
