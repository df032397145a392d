"""Shared by the tests of images: caches of their own."""

import pytest


@pytest.fixture(autouse=True)
def private_caches(tmp_path_factory, monkeypatch) -> None:
    """Neither indices nor copies of tables in the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path_factory.mktemp("home")))
