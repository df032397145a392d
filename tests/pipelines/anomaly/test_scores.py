"""Anomaly scores: one sign, no blind side, and the formulas of their methods.

Covers: pipelines/anomaly/image_statistics.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from givens.stripes import SIZE, constant, planted, stripes, uniform
from small import TOKENIZERS
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.anomaly.calibrating import calibrate
from pipelines.anomaly.calibration import Calibration, CalibrationError
from pipelines.anomaly.image_statistics import codec_bits, statistics
from pipelines.anomaly.scores import METHODS, anomaly_score, score_of


def auroc(pipe, normal, anomalous, method="joint"):
    a, b = (anomaly_score(pipe, images, method) for images in (normal, anomalous))
    return float(((b[:, None] > a).double() + 0.5 * (b[:, None] == a)).mean())


@pytest.mark.sparse
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_statistics_do_not_depend_on_the_batch(tokenizer, channels):
    pipe = make_pipeline(tokenizer, channels=channels, labels=[])
    images = torch.randint(0, 256, (7, *pipe.tokenizer.image_shape), dtype=torch.uint8)
    together, apart = (statistics(pipe, images, batch_size=size) for size in (256, 2))
    assert set(together) >= {"token_bits", "codec_bits", "error", "surprise"}
    assert ("pixel_bits" in together) == pipe.tokenizer.has_likelihood
    for name, values in together.items():
        assert len(values) == 7 and values.dtype == torch.float64
        assert values.ndim == 2 if name == "features" else values.ndim == 1 and (values >= 0).all()
        torch.testing.assert_close(values, apart[name], rtol=1e-5, atol=1e-5)
    nats = pipe.prior.log_prob(pipe.encode(images)).double()
    torch.testing.assert_close(together["token_bits"] * math.log(2), -nats, rtol=1e-5, atol=1e-5)
    assert (together["surprise"] * len(pipe.prior.grid) >= together["token_bits"] - 1e-9).all()


def test_simple_images_are_short_for_the_codec_and_noise_is_not():
    bits = [float(codec_bits(images.movedim(1, -1).numpy()).max()) for images in (constant(), stripes(9), uniform(9))]
    assert bits[0] < 200 < bits[1] < bits[2] and bits[2] > 8 * SIZE**2


@pytest.mark.parametrize(("method", "least"), [("joint", 0.95), ("mahalanobis", 0.95), ("nll", 0.6), ("surprise", 0.6)])
def test_a_larger_score_is_more_anomalous(trained, method, least):
    normal = stripes(200, seed=3)
    assert auroc(trained, normal, uniform(100), method) > 0.98
    assert auroc(trained, normal, planted(normal[:100]), method) > least


def test_the_joint_score_has_no_blind_side(trained):
    normal = stripes(200, seed=3)
    for images in (constant(), uniform(100), 255 - normal, planted(normal)):
        assert auroc(trained, normal, images) > 0.95
    assert auroc(trained, normal, stripes(200, seed=4)) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_every_score_is_finite_for_constant_images(likely, method):
    likely.background = likely.prior if method == "ratio" else None
    try:
        images = torch.cat([constant()[:1], constant()[-1:]])
        assert anomaly_score(likely, images, method).isfinite().all()
    finally:
        likely.background = None


def test_a_background_prior_cancels_itself(trained):
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    with pytest.raises(CalibrationError, match="background"):
        anomaly_score(pipe, stripes(2), "ratio")
    pipe.set_background(pipe.prior)
    assert anomaly_score(pipe, stripes(5), "ratio").abs().max() == 0
    pipe.calibration = trained.calibration
    with pytest.raises(CalibrationError, match="without ratio.*calibrate"):
        anomaly_score(pipe, stripes(5), "ratio", p_values=True)
    assert torch.equal(anomaly_score(pipe, stripes(5)), anomaly_score(trained, stripes(5)))  # it changes no other


def test_methods_fit_their_formulas(likely):
    found = statistics(likely, stripes(6))
    score = {
        method: score_of(method, found, likely.calibration, labelled=False) for method in METHODS if method != "ratio"
    }
    assert torch.equal(score["nll"], found["token_bits"] + found["pixel_bits"]) and found["pixel_bits"].min() > 100
    assert torch.equal(score["complexity"], score["nll"] - found["codec_bits"])
    assert torch.equal(score["reconstruction"], found["error"]) and torch.equal(score["surprise"], found["surprise"])
    assert torch.equal(score["typicality"], (score["nll"] - likely.calibration.typical_bits).abs())


def test_without_a_likelihood_of_pixels_there_is_no_complexity(trained):
    """It would be the codec's bits of all pixels, less those of a few tokens: deflate, upside down."""
    assert "complexity" not in trained.calibration.scores and "complexity" not in trained.calibration.thresholds
    for p_values in (False, True):
        with pytest.raises(CalibrationError, match="^method: complexity needs a tokenizer with a likelihood of pixels"):
            anomaly_score(trained, stripes(3), "complexity", p_values=p_values)
    assert torch.equal(anomaly_score(trained, stripes(3), "nll"), statistics(trained, stripes(3))["token_bits"])


def test_joint_is_the_neighbours_until_the_statistics_are_unusual(trained):
    found, usual = statistics(trained, torch.cat([stripes(40, seed=3), constant()])), trained.calibration.usual
    joint, near, far = (
        score_of(method, found, trained.calibration, labelled=False)
        for method in ("joint", "neighbours", "mahalanobis")
    )
    inside = far <= usual["mahalanobis"]
    assert inside[:40].double().mean() > 0.9 and not inside[40:].any()
    torch.testing.assert_close(joint[inside], near[inside] / usual["neighbours"])
    over = far / usual["mahalanobis"] - 1
    torch.testing.assert_close(joint[~inside], (near / usual["neighbours"] + over)[~inside])


def test_usual_is_what_new_images_are(trained):
    """Which it would not be, if images were their own neighbours."""
    found = statistics(trained, stripes(600, seed=5))
    for method, limit in trained.calibration.usual.items():
        beyond = score_of(method, found, trained.calibration, labelled=False) > limit
        assert 0 < beyond.double().mean() < 0.06


def test_a_prior_without_layers_has_no_neighbours():
    pipe = make_pipeline(prior="marginal", labels=[])
    images = torch.randint(0, 256, (60, *pipe.tokenizer.image_shape), dtype=torch.uint8)
    fitted = calibrate(pipe, images[20:])
    assert fitted.neighbours is None and "neighbours" not in fitted.scores
    assert Calibration.from_dict(json.loads(json.dumps(fitted.to_dict())), Path("file")).neighbours is None
    distance = anomaly_score(pipe, images[:20], "mahalanobis") / fitted.usual["mahalanobis"]
    torch.testing.assert_close(anomaly_score(pipe, images[:20]), distance)
    with pytest.raises(CalibrationError, match="neighbours needs a prior with layers"):
        anomaly_score(pipe, images, "neighbours")
