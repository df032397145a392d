"""The file of a calibration: what is read is what was written, and what is damaged is named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from givens.stripes import constant, stripes, uniform

from pipelines import ImagePipeline
from pipelines.anomaly.calibration import Calibration
from pipelines.anomaly.distances import Neighbours, rounded
from pipelines.anomaly.scores import METHODS, anomaly_score
from tokenizer.files import FormatError


def test_a_saved_pipeline_gives_the_same_scores(trained, tmp_path):
    trained.save_pretrained(tmp_path / "pipe")
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    images = torch.cat([stripes(8), constant()[::8], uniform(3)])
    for method in trained.calibration.scores:
        for p_values in (False, True):
            a, b = (anomaly_score(pipe, images, method, p_values=p_values) for pipe in (trained, loaded))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert loaded.calibration.to_dict() == trained.calibration.to_dict()


def broken(path, value):
    """A change of the value at a dotted path; a function of the old one, or "del"."""

    def change(data):
        *parents, last = path.split(".")
        for parent in parents:
            data = data[parent]
        if value == "del":
            del data[last]
        else:
            data[last] = value(data.get(last)) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("count", "del", "count: missing"),
        ("more", 1, "more: no such field"),
        ("count", 3.5, "count: should be a whole number"),
        ("count", True, "count: should be a whole number"),
        ("false_alarms", 1.0, "false_alarms: should lie between"),
        ("confidence", 0, "confidence: should be null, or lie between 0 and 1"),
        ("ties", None, "ties: should be a mapping"),
        ("ties.nll", "del", "ties: should be of the same methods"),
        ("ties.nll", -1, "ties: should not be negative"),
        ("digests", [1], "digests: should be 16 hexadecimal digits"),
        ("digests", "0" * 17, "digests: should be 16 hexadecimal digits"),
        ("digests", "", "digests: should be 16 hexadecimal digits"),
        ("digests", "0" * 16 * 50_001, "digests: should be of at most 50,000 images"),
        ("labels", 1, "labels: should be true or false"),
        ("data", "abc", "data: is no sha256"),
        ("statistics", ["token_bits", 3], "statistics.1: should be text (found 3)"),
        ("statistics", "token_bits", "statistics: should be a list (found 'token_bits')"),
        ("statistics", ["token_bits"], "mahalanobis.mean: should hold 1 numbers"),
        ("mahalanobis", None, "mahalanobis: should be a mapping (found None)"),
        ("mahalanobis.mean", "del", "mahalanobis.mean: missing"),
        ("mahalanobis.mean", lambda mean: mean[1:], "mahalanobis.whitener: should be 3 x 3"),
        ("mahalanobis.whitener", lambda rows: [rows[0], *rows[2:]], "mahalanobis.whitener: should be 4 x 4"),
        (
            "mahalanobis.whitener",
            lambda rows: [rows[0][1:], *rows[1:]],
            "mahalanobis.whitener: should be numbers along 2 axes",
        ),
        ("mahalanobis.mean", lambda mean: ["a", *mean[1:]], "mahalanobis.mean: should be numbers"),
        ("neighbours", "del", "neighbours: missing"),
        ("neighbours.axes", lambda rows: [row[1:] for row in rows], "neighbours.axes: should have"),
        ("neighbours.points", lambda rows: [row[1:] for row in rows], "neighbours.points: should have"),
        ("usual", {}, "usual: should be positive numbers for mahalanobis, neighbours"),
        ("usual.mahalanobis", 0, "usual: should be positive"),
        ("scores", {}, "scores: is empty"),
        ("scores", [1], "scores: should be a mapping"),
        ("scores.nll", lambda values: values[::-1], "scores.nll: should ascend"),
        ("scores.nll", [], "scores.nll: should be numbers"),
        ("scores.nll", "much", "scores.nll: should be numbers"),
        ("thresholds.nll", "del", "thresholds: should be of the same methods"),
        ("thresholds.nll", None, "thresholds.nll: should be a number"),
        ("surprise", lambda rows: rows[1:], "surprise: should have 5 rows"),
        ("error", lambda rows: [[-value for value in row] for row in rows], "error: should not be negative"),
        ("typical_bits", "none", "typical_bits: should be a number"),
    ],
)
def test_a_damaged_calibration_is_named(trained, path, value, message):
    data = json.loads(json.dumps(trained.calibration.to_dict()))
    broken(path, value)(data)
    file = Path("somewhere/calibration.json")
    with pytest.raises(FormatError, match=f"^{re.escape(str(file))}: {re.escape(message)}"):
        Calibration.from_dict(data, file)


def test_a_calibration_of_many_images_can_be_read_again(trained, tmp_path):
    """With 1,000 points on 64 axes of 512 features, 2,000 scores and the digests of 50,000 images."""
    chance = np.random.default_rng(0)
    large = dataclasses.replace(
        trained.calibration,
        neighbours=Neighbours.fit(chance.normal(size=(1000, 512))),
        scores={name: 1e6 + np.sort(chance.normal(size=2000)) for name in METHODS},
        ties=dict.fromkeys(METHODS, 1e-3),
        thresholds=dict.fromkeys(METHODS, 1e6),
        surprise=rounded(chance.random((5, 4096))),
        error=rounded(chance.random((64, 64))),
        digests=np.sort(chance.integers(1 << 60, (1 << 64) - 1, 50_000, np.uint64)),
    )
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    pipe.calibration = large
    pipe.save_pretrained(tmp_path / "pipe")
    assert (tmp_path / "pipe/calibration.json").stat().st_size < 3 << 20
    found = ImagePipeline.from_pretrained(tmp_path / "pipe").calibration
    assert found.to_json() == large.to_json() and len(found.to_json().splitlines()) == len(large.to_dict()) + 2
