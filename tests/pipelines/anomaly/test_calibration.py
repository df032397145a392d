"""The file of a calibration round-trips, and a damaged one is a one-line error."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from givens.stripes import stripes

from pipelines import ImagePipeline
from pipelines.anomaly.calibration import MAX_CALIBRATION_BYTES, Calibration, NormalScores
from pipelines.anomaly.distances import Distance, round_digits
from pipelines.anomaly.scores import METHODS
from tokenizer.files import FormatError, parse_json


@pytest.fixture(scope="module")
def folded(trained):
    """A calibration with three folds."""
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    return pipe.calibrate(stripes(30, seed=2), folds=3)


WHOLE = [
    ("count", "del", "count"),
    ("columns", ["a\nb"], "columns.0"),
    ("fitted", None, "fitted"),
    ("fitted.typical_bits", 10**400, "fitted.typical_bits"),
    ("fitted.statistics.mean", lambda mean: mean[1:], "fitted.statistics.whitener"),
    ("fitted.statistics.mean", lambda mean: [float("inf"), *mean[1:]], "fitted.statistics.mean"),
    ("fitted.features.points", lambda rows: [row[1:] for row in rows], "fitted.features.points"),
    ("scores", {}, "scores"),
    ("scores.nll.values", [], "scores.nll.values"),
    ("scores.nll.threshold", None, "scores.nll.threshold"),
    ("surprise", lambda rows: rows[1:], "surprise"),
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


def test_a_calibration_of_many_images_can_be_read_again(trained, folded):
    """With 2,000 scores and the digests of 50,000 images, or 8 folds of features of 128 channels and 10,000 digests."""
    chance, file = np.random.default_rng(0), Path("calibration.json")
    values, digests = 1e6 + np.sort(chance.normal(size=2000)).round(3), [f"{number:016x}" for number in range(50_000)]
    rows = chance.normal(size=(2000, 128))
    for calibration, few in ((trained.calibration, 1), (folded, 8)):
        threshold, features = None if few > 1 else 1e6, Distance.fit(rows, 1000 // few)
        scores = dict.fromkeys(METHODS, NormalScores(values=values, tie=1e-3, threshold=threshold))
        update = {"scores": scores, "digests": digests[: 10_000 if few > 1 else None]}
        update |= {"surprise": round_digits(chance.random((5, 4096))), "error": round_digits(chance.random((64, 64)))}
        if few == 1:
            update["fitted"] = calibration.fitted.model_copy(update={"features": features})
        else:
            fitted = calibration.folds[0].fitted.model_copy(update={"features": features})
            scores = dict.fromkeys(METHODS, values[: 2000 // few])
            update["folds"] = [calibration.folds[0].model_copy(update={"fitted": fitted, "scores": scores})] * few
        text = calibration.model_copy(update=update).to_json()
        assert len(text) < MAX_CALIBRATION_BYTES
        assert Calibration.from_dict(parse_json(text.encode(), file), file).to_json() == text
