"""Fixtures of the tests of token datasets."""

from __future__ import annotations

import pytest
import torch
from givens.images import write_classes
from small import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    make_tokenizer("vqvae", (28, 28), 1).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """30 training images and 30 test images of three classes."""
    return write_classes(tmp_path_factory.mktemp("images"), ["cat", "dog", "eel"], 10)
