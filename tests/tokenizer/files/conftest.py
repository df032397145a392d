"""Shared by the tests of files: a pipeline that may be damaged, and what is opened."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from fuzzing.hostile_bases import save_pipeline


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "pipeline"
    save_pipeline(folder, "vqvae", "gpt", background="marginal", widths=(8,))
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "pipeline"))


@pytest.fixture(scope="session")
def hook():
    """Every path that Python opens while `hook[0]` is a list."""
    hook = [None]

    def hear(event, arguments):
        if event == "open" and hook[0] is not None and isinstance(arguments[0], (str, bytes)):
            hook[0].append(os.fsdecode(arguments[0]))

    sys.addaudithook(hear)
    return hook


@pytest.fixture
def opens(hook):
    hook[0] = []
    yield hook[0]
    hook[0] = None
