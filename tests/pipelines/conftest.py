"""Fixtures shared by several folders; tests do not modify them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    """A token dataset of 72 rows of 7 x 7 ids in 3 classes."""
    from launch import make_tokens  # imported late, like those below, because few tests need it

    return make_tokens(tmp_path_factory.mktemp("tokens") / "tokens")


@pytest.fixture(scope="session")
def trained():
    """A small calibrated pipeline trained on stripes."""
    from givens.stripes import trained_on_stripes

    return trained_on_stripes()


@pytest.fixture(scope="session")
def fresh(trained):
    """Statistics of normal images used in neither training nor calibration."""
    from givens.stripes import statistics_of, stripes

    return statistics_of(trained, stripes(1500, seed=11))


@pytest.fixture(scope="session")
def likely():
    """A calibrated untrained pipeline with a pixel likelihood."""
    from givens.stripes import SIZE, stripes
    from small_pipelines import make_pipeline

    from pipelines.anomaly.calibrating import calibrate

    torch.manual_seed(0)
    pipe = make_pipeline(labels=[], size=(SIZE, SIZE), sizes={"likelihood": {"kind": "discretized_logistic"}})
    calibrate(pipe, stripes(100, seed=2))
    return pipe
