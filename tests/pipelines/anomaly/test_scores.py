"""Anomaly scores: larger is more anomalous, and every method fits its formula.

Covers: pipelines/anomaly/examine.py.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from givens.stripes import constant, planted, stripes, uniform
from givens.stripes import statistics_of as statistics
from small import TOKENIZERS, make_prior
from small_pipelines import make_conditioned, make_pipeline, pixels_for

from pipelines import ImagePipeline
from pipelines.anomaly.calibrating import calibrate
from pipelines.anomaly.distances import CalibrationError
from pipelines.anomaly.examine import Examination
from pipelines.anomaly.scores import anomaly_score, list_methods, log_statistics, score_tiles


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
    assert set(together) >= {"token_bits", "error"}
    assert ("pixel_bits" in together) == pipe.tokenizer.has_likelihood
    for name, values in together.items():
        assert len(values) == 7 and values.dtype == torch.float64
        assert values.ndim == 2 if name == "features" else values.ndim == 1 and (values >= 0).all()
        torch.testing.assert_close(values, apart[name], rtol=1e-5, atol=1e-5)
    nats = pipe.prior.log_prob(pipe.encode(images)).double()
    torch.testing.assert_close(together["token_bits"] * math.log(2), -nats, rtol=1e-5, atol=1e-5)
    for number, each in enumerate(Examination.open(pipe, images, batch_size=3).examine(["statistics", "error"])):
        surprise = each.rows["surprise"].double()
        torch.testing.assert_close(surprise.sum(), together["token_bits"][number], rtol=1e-5, atol=1e-5)
        top = surprise.sort().values[:, -max(1, round(surprise.shape[1] / 20)) :].mean()
        torch.testing.assert_close(top, together["top_bits"][number], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(each.rows["errors"].mean(), together["error"][number], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("method", "least"), [("joint", 0.95), ("nll", 0.6)])
def test_a_larger_score_is_more_anomalous(trained, method, least):
    normal = stripes(200, seed=3)
    assert auroc(trained, normal, uniform(100), method) > 0.98
    assert auroc(trained, normal, planted(normal[:100]), method) > least
    assert auroc(trained, normal, stripes(200, seed=4), method) == pytest.approx(0.5, abs=0.1)
    if method == "joint":  # which also finds what is simpler than normal images
        assert min(auroc(trained, normal, images) for images in (constant(), 255 - normal)) > 0.95


@pytest.mark.parametrize("method", ["joint", "typicality", "ratio", "top_bits"])
def test_every_score_is_finite_for_constant_images(likely, method):
    pipe = copy.copy(likely)
    pipe.background = pipe.prior if method == "ratio" else None
    pipe.calibration = likely.calibration
    assert anomaly_score(pipe, torch.cat([constant()[:1], constant()[-1:]]), method).isfinite().all()


def test_a_background_prior_cancels_itself(trained):
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    with pytest.raises(CalibrationError, match="background"):
        anomaly_score(pipe, stripes(2), "ratio")
    pipe.set_background(pipe.prior)
    assert anomaly_score(pipe, stripes(5), "ratio").abs().max() == 0
    pipe.calibration = trained.calibration
    with pytest.raises(CalibrationError, match="ratio"):
        anomaly_score(pipe, stripes(5), "ratio", p_values=True)
    assert torch.equal(anomaly_score(pipe, stripes(5)), anomaly_score(trained, stripes(5)))


@pytest.mark.parametrize("prior", ["gpt", "blocks"])
def test_statistics_are_given_the_condition_of_each_image(prior):
    """Also those of a background prior, which has the same columns or none."""
    torch.manual_seed(0)
    pipe = make_conditioned(prior, before=True)
    with torch.no_grad():
        pipe.prior.class_embedding.columns.weight.mul_(30)
    images = pixels_for(pipe, 5)
    condition = {"age": [20, 30, None, 50, 60], "before": pixels_for(pipe, 5), "label": [0, 1, 2, 0, 1]}
    for background in (
        pipe.prior,
        make_prior("gpt", grid=pipe.prior.grid, num_classes=3, tokenizer=pipe.tokenizer.fingerprint()),
    ):
        pipe.set_background(background)
        together, apart = (statistics(pipe, images, batch_size=size, condition=condition) for size in (256, 2))
        for name, values in together.items():
            torch.testing.assert_close(values, apart[name], rtol=1e-4, atol=1e-4)
        bits = -pipe.log_prob(images, condition=condition).double() / math.log(2)
        torch.testing.assert_close(together["token_bits"], bits, rtol=1e-5, atol=1e-5)
        assert (
            together["token_bits"] - statistics(pipe, images, labels=[0, 1, 2, 0, 1])["token_bits"]
        ).abs().min() > 1e-4
        given = pipe.read_given(condition=condition)
        given = given.without(set(given.names) - background.columns.keys())
        behind = -background.log_prob(pipe.encode(images), condition=given) / math.log(2)
        torch.testing.assert_close(together["background_bits"], behind.double(), rtol=1e-5, atol=1e-5)
        ratio = anomaly_score(pipe, images, "ratio", condition=condition)
        torch.testing.assert_close(ratio, together["token_bits"] - together["background_bits"])


def test_an_estimated_density_has_no_bits_of_single_tokens():
    pipe = make_pipeline(prior="masked", labels=[], exact=False)
    calibration = calibrate(pipe, pixels_for(pipe, 40))
    assert "top_bits" not in calibration.scores and calibration.fitted.names == ["token_bits", "error"]
    with pytest.raises(CalibrationError, match="^method: top_bits needs a prior with an exact density"):
        anomaly_score(pipe, pixels_for(pipe, 3), "top_bits")


def test_methods_fit_their_formulas(likely):
    found, fitted = statistics(likely, torch.cat([stripes(400, seed=3), constant()])), likely.calibration.fitted
    score = {
        method: torch.from_numpy(score_tiles(method, found, likely.calibration.references)[0])
        for method in list_methods(likely)
    }
    assert torch.equal(score["nll"], found["token_bits"] + found["pixel_bits"]) and found["pixel_bits"].min() > 100
    assert torch.equal(score["reconstruction"], found["error"])
    assert torch.equal(score["top_bits"], found["top_bits"])
    assert torch.equal(score["typicality"], (score["nll"] - fitted.typical_bits).abs())
    far = fitted.statistics.of(log_statistics(found, fitted.names))
    inside = far <= 1
    assert inside[:400].mean() > 0.85 and inside[400:].mean() < 0.1
    np.testing.assert_array_equal(score["joint"][inside], score["neighbours"][inside])
    np.testing.assert_allclose(score["joint"][~inside], (score["neighbours"] + far - 1)[~inside])


def test_a_prior_without_layers_has_no_neighbours():
    pipe = make_pipeline(prior="marginal", labels=[])
    images = torch.randint(0, 256, (60, *pipe.tokenizer.image_shape), dtype=torch.uint8)
    calibration = calibrate(pipe, images[20:])
    assert calibration.fitted.features is None and "neighbours" not in calibration.scores
    distance = calibration.fitted.statistics.of(log_statistics(statistics(pipe, images[:20]), calibration.fitted.names))
    np.testing.assert_array_equal(anomaly_score(pipe, images[:20]), distance)
    with pytest.raises(CalibrationError, match="neighbours"):
        anomaly_score(pipe, images, "neighbours")
