"""The lines of `smalti evaluate` about inferred columns.

Covers: pipelines/metrics/inferred.py, pipelines/metrics/figures.py.
"""

import pytest
import torch
from small_pipelines import make_conditioned

from pipelines.metrics.figures import format_report
from pipelines.metrics.inferred import evaluate_columns
from pipelines.tokens import TokenSplit
from prior.given import Given


def test_each_column_has_a_line_with_its_calibration_on_other_images():
    pipe = make_conditioned(
        columns={"age": {"kind": "number", "mean": [50.0], "std": [20.0], "low": [18.0], "high": [90.0]}}, outline=False
    )
    images = torch.randint(0, 256, (60, 1, 8, 12), dtype=torch.uint8)
    rows = {"label": torch.arange(60) % 3, "age": torch.rand(60, 1) * 72 + 18}
    test = TokenSplit(pipe.encode(images), Given(pipe.columns, rows, 60))
    pipe.calibrate_column(images[:40], "label", rows["label"][:40])
    found = evaluate_columns(pipe, test)
    posterior = pipe.infer(images, "label")
    right = torch.tensor(
        [value == pipe.labels[label] for value, label in zip(posterior.mode, rows["label"], strict=True)]
    )
    assert found["inferred_label_accuracy"] == pytest.approx(float(right.double().mean()))
    at = torch.arange(60)
    assert found["inferred_label_log_score"] == pytest.approx(
        float(posterior.log_density[at, rows["label"]].mean()), rel=1e-4
    )
    names = [pipe.labels[label] for label in rows["label"]]
    inside = [name in values for name, values in zip(names, posterior.conformal(0.9), strict=True)]
    assert found["inferred_label_coverage"] == pytest.approx(sum(inside[40:]) / 20)
    pipe.calibrate_column(images, "label", rows["label"])
    assert "inferred_label_coverage" not in evaluate_columns(pipe, test)  # no image is new
    apart = (pipe.infer(images[:50], "age").mean - rows["age"][:50, 0]).abs()
    assert abs(found["inferred_age_error"] - float(apart.mean())) < 6 and "inferred_age_coverage" not in found
    text = format_report(found, exact=True)
    assert "label inferred" in text and "age inferred, mean error" in text and text.count("\n") == 1
