"""The file of a calibration round-trips, and a damaged one is a one-line error."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from givens.stripes import constant, stripes, uniform

from pipelines import ImagePipeline
from pipelines.anomaly.calibration import (
    MAX_CALIBRATION_BYTES,
    MAX_FOLDED,
    MAX_FOLDS,
    Calibration,
    Fitted,
    MapReference,
    NormalScores,
    NormalStatistics,
)
from pipelines.anomaly.distances import Distance, round_digits
from pipelines.anomaly.scores import METHODS, anomaly_score
from tokenizer.files import FormatError, parse_json


def test_a_saved_pipeline_gives_the_same_scores(trained, tmp_path):
    trained.save_pretrained(tmp_path / "pipe")
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    images = torch.cat([stripes(8), constant()[::8], uniform(3)])
    for method in METHODS.keys() & trained.calibration.scores.keys():
        for p_values in (False, True):
            a, b = (anomaly_score(pipe, images, method, p_values=p_values) for pipe in (trained, loaded))
            assert torch.equal(a, b)
    assert loaded.calibration.to_json() == trained.calibration.to_json()
    assert "columns" not in json.loads(trained.calibration.to_json())


@pytest.fixture(scope="module")
def folded(trained):
    """A calibration with three folds."""
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    return pipe.calibrate(stripes(30, seed=2), folds=3)


WHOLE = [
    ("count", "del", "count"),
    ("more", 1, "more"),
    ("labels", 1, "labels"),
    ("columns", ["a\nb"], "columns.0"),
    ("digests", ["0" * 17], "digests.0"),
    ("fitted", None, "fitted"),
    ("fitted.typical_bits", 10**400, "fitted.typical_bits"),
    ("fitted.statistics.mean", lambda mean: mean[1:], "fitted.statistics.whitener"),
    ("fitted.statistics.mean", lambda mean: ["a", *mean[1:]], "fitted.statistics.mean"),
    ("fitted.statistics.mean", lambda mean: [float("inf"), *mean[1:]], "fitted.statistics.mean"),
    ("fitted.features.points", lambda rows: [row[1:] for row in rows], "fitted.features.points"),
    ("scores", {}, "scores"),
    ("scores.nll.values", [], "scores.nll.values"),
    ("scores.nll.threshold", None, "scores.nll.threshold"),
    ("surprise", lambda rows: rows[1:], "surprise"),
    ("error", lambda rows: [[-value for value in row] for row in rows], "error"),
]
FOLDED = [
    ("folds", "del", "fitted"),
    ("folds", lambda folds: folds[:1], "folds"),
    ("folds.1.scores.nll", "del", "folds.1"),
    ("folds.1.scores.nll", [], "folds.1.scores.nll"),
    ("scores.nll.threshold", 1.0, "scores.nll.threshold"),
    ("confidence", 0.9, "confidence"),
]


@pytest.mark.parametrize(
    ("has_folds", "path", "value", "field"), [(False, *c) for c in WHOLE] + [(True, *c) for c in FOLDED]
)
def test_a_damaged_calibration_is_one_line_that_names_the_field(trained, folded, has_folds, path, value, field):
    data = whole = json.loads((folded if has_folds else trained.calibration).to_json())
    *parents, last = path.split(".")
    for parent in parents:
        data = data[int(parent) if isinstance(data, list) else parent]
    if value == "del":
        del data[last]
    else:
        data[last] = value(data[last]) if callable(value) else value
    file = Path("somewhere/calibration.json")
    with pytest.raises(FormatError, match=f"^{re.escape(f'{file}: {field}: ')}[^\\n]+$"):
        Calibration.from_dict(whole, file)


def test_a_calibration_of_many_images_can_be_read_again(trained):
    """With 1,000 points of 128 features, 2,000 scores and the digests of 50,000 images."""
    chance = np.random.default_rng(0)
    scores = NormalScores(values=1e6 + np.sort(chance.normal(size=2000)).round(3), tie=1e-3, threshold=1e6)
    features = Distance.fit(chance.normal(size=(2000, 128)), 1000)
    large = trained.calibration.model_copy(
        update={
            "fitted": Fitted(typical_bits=1.0, statistics=trained.calibration.fitted.statistics, features=features),
            "scores": dict.fromkeys(METHODS, scores),
            "surprise": round_digits(chance.random((5, 4096))),
            "error": round_digits(chance.random((64, 64))),
            "digests": [f"{number:016x}" for number in range(50_000)],
        }
    )
    text, file = large.to_json(), Path("calibration.json")
    assert len(text) < MAX_CALIBRATION_BYTES
    assert Calibration.from_dict(parse_json(text.encode(), file), file).to_json() == text
    share = Distance.fit(chance.normal(size=(200, 128)), 100)
    points = np.round(chance.normal(size=(400, 21)), 3)
    maps = {"response_mean": np.zeros(21), "response_deviation": np.ones(21), "pixel_mean": np.zeros(2)}
    maps |= {"pixel_deviation": np.ones(2), "image_mean": np.zeros(3), "image_deviation": np.ones(3)}
    fitted = Fitted(typical_bits=1.0, statistics=large.fitted.statistics, features=share)
    fold = NormalStatistics(
        fitted=fitted,
        maps=MapReference(codes=round_digits(chance.random(1024)), points=points, **maps),
        scores=dict.fromkeys(METHODS, scores.values[:200]),
    )
    digests = [f"{number:016x}" for number in range(MAX_FOLDED)]
    whole = {"threshold": None}
    update = {"fitted": None, "folds": [fold] * MAX_FOLDS, "digests": digests, "object_digests": digests}
    update["scores"] = {name: each.model_copy(update=whole) for name, each in large.scores.items()}
    text = large.model_copy(update=update).to_json()
    assert len(text) < MAX_CALIBRATION_BYTES
    assert Calibration.from_dict(parse_json(text.encode(), file), file).to_json() == text
