"""Anomaly scores: one sign, honest p-values, nothing learned from anomalies; and where in an image they are.

Covers: pipelines/anomaly/calibrating.py, pipelines/anomaly/healing.py, pipelines/anomaly/image_statistics.py,
pipelines/commands/calibrate.py, pipelines/commands/detect.py, pipelines/metrics/likelihood.py,
pipelines/stages/calibration.py.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import fails
from launch import make_tokens, prior_arguments
from PIL import Image
from small import PRIORS, TOKENIZERS, make_prior, make_tokenizer

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.anomaly.calibrating import calibrate
from pipelines.anomaly.healing import anomaly_map, heal, patches
from pipelines.anomaly.image_statistics import codec_bits, statistics
from pipelines.anomaly.scores import FITTED, METHODS, anomaly_score, p_value_of, score_of
from pipelines.config.command import parse
from pipelines.images import DataConfig, load_images
from pipelines.metrics.likelihood import bits_per_token
from pipelines.stages.calibration import Calibration, CalibrationError
from pipelines.stages.distances import Neighbours, rounded
from pipelines.train_prior import PriorTask, TrainPriorConfig
from tokenizer.files.errors import FormatError
from tokenizer.files.writing import write_json, write_manifest

SIZE = 16


def stripes(count, seed=0, side=SIZE):
    """Normal images: soft stripes of a random phase, wave length and direction, with a little noise; uint8."""
    generator = torch.Generator().manual_seed(seed)
    phase, length = (torch.rand(count, 1, 1, generator=generator) for _ in range(2))
    upright = torch.rand(count, 1, 1, generator=generator) < 0.5
    across = torch.arange(side, dtype=torch.float32).expand(side, side)
    position = torch.where(upright, across, across.t())
    waves = 70 + 50 * (2 * math.pi * (position / (5 + 4 * length) + phase)).sin()
    noise = 4 * torch.randn(count, side, side, generator=generator)
    return (waves + noise).round().clamp(0, 255).to(torch.uint8)[:, None]


def constant(side=SIZE):
    return torch.arange(0, 256, 5, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, side, side)


def uniform(count, side=SIZE):
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (count, 1, side, side), generator=generator, dtype=torch.uint8)


def planted(images):
    """With 6x6 of noise at (4, 4)."""
    images = images.clone()
    images[:, :, 4:10, 4:10] = uniform(len(images), 6)
    return images


@pytest.fixture(scope="module")
def likely():
    """An untrained pipeline with a likelihood of pixels, calibrated; tests do not change it."""
    torch.manual_seed(0)
    pipe = small(size=(SIZE, SIZE), likelihood={"kind": "discretized_logistic"})
    calibrate(pipe, stripes(100, seed=2))
    return pipe


@pytest.fixture(scope="module")
def trained():
    """A small pipeline trained on stripes, and calibrated; tests do not change it."""
    torch.manual_seed(0)
    images = stripes(512, seed=1).float() / 127.5 - 1
    tokenizer = make_tokenizer("vqvae", (SIZE, SIZE), 1).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 4e-3)
    for step in range(120):
        batch = images[torch.arange(64) + 64 * (step % 8)]
        out = tokenizer(batch)
        loss = (out.images - batch).square().mean() + sum(
            weight * out.losses[name] for name, weight in tokenizer.loss_weights.items()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = tokenizer.eval().encode(images)
    prior = make_prior("gpt", tokenizer.grid.shape, tokenizer.grid.vocab_size, num_classes=0, any_order=True)
    prior.initialize(tokens, None)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.AdamW(prior.parameters(), 5e-3)
    for step in range(150):
        batch = tokens[torch.arange(64) + 64 * (step % 8)]
        loss = prior.loss(prior(batch), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipe = ImagePipeline(tokenizer, prior)
    calibrate(pipe, stripes(1000, seed=2))
    return pipe


def small(tokenizer="vqvae", prior="gpt", channels=1, classes=0, size=(8, 12), **config):
    """An untrained pipeline."""
    first = make_tokenizer(tokenizer, size, channels, **config).eval()
    second = make_prior(prior, first.grid.shape, first.grid.vocab_size, num_classes=classes)
    return ImagePipeline(first, second)


def auroc(pipe, normal, anomalous, method="joint"):
    a, b = (anomaly_score(pipe, images, method) for images in (normal, anomalous))
    return float(((b[:, None] > a).double() + 0.5 * (b[:, None] == a)).mean())


# Statistics and scores


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_statistics_do_not_depend_on_the_batch(tokenizer, channels):
    pipe = small(tokenizer, channels=channels)
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
    assert auroc(trained, normal, uniform(100), method) > 0.99
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
    pipe = small("vqvae", "marginal")
    images = torch.randint(0, 256, (60, *pipe.tokenizer.image_shape), dtype=torch.uint8)
    fitted = calibrate(pipe, images[20:])
    assert fitted.neighbours is None and "neighbours" not in fitted.scores
    assert Calibration.from_dict(json.loads(json.dumps(fitted.to_dict())), Path("file")).neighbours is None
    distance = anomaly_score(pipe, images[:20], "mahalanobis") / fitted.usual["mahalanobis"]
    torch.testing.assert_close(anomaly_score(pipe, images[:20]), distance)
    with pytest.raises(CalibrationError, match="neighbours needs a prior with layers"):
        anomaly_score(pipe, images, "neighbours")


# p-values


@pytest.fixture(scope="module")
def fresh(trained):
    """Statistics of normal images that nothing has seen."""
    return statistics(trained, stripes(1500, seed=11))


@pytest.mark.parametrize("method", ["joint", "neighbours", "nll", "typicality", "reconstruction"])
def test_p_values_of_normal_images_are_uniform(trained, fresh, method):
    found = score_of(method, fresh, trained.calibration, labelled=False)
    scores, normal = np.sort(found.numpy()), trained.calibration.scores[method]
    every = np.sort(np.concatenate([scores, normal]))
    n, m = len(normal), len(scores)
    distance = np.abs(np.searchsorted(normal, every, "right") / n - np.searchsorted(scores, every, "right") / m).max()
    assert distance < 1.95 * math.sqrt((n + m) / (n * m))  # two-sample Kolmogorov-Smirnov, p = 0.001
    p = p_value_of(method, found, trained.calibration, labelled=False).numpy()
    assert p.min() >= 1 / (n + 1) and p.max() <= 1
    rank = math.floor(0.05 * (n + 1))
    chance = np.random.default_rng(0)  # of the calibration a Beta, of the images given it a binomial
    rates = chance.binomial(m, chance.beta(rank, n + 1 - rank, 100_000)) / m
    low, high = np.quantile(rates, [0.0005, 0.9995])
    assert low <= (p <= 0.05).mean() <= high
    flagged = scores > trained.calibration.thresholds[method]
    assert flagged.sum() == (p <= trained.calibration.false_alarms).sum()


def test_p_values_count_ties_against_detection_and_fall_with_the_score(trained):
    images = torch.cat([stripes(30, seed=5), constant(), uniform(9)])
    scores = anomaly_score(trained, images)
    p = anomaly_score(trained, images, p_values=True)
    order = scores.argsort()
    assert (p[order].diff() <= 0).all()
    normal, tie = torch.from_numpy(trained.calibration.scores["joint"]), trained.calibration.ties["joint"]
    expected = (1 + (normal + tie >= scores[:, None]).sum(1)) / (len(normal) + 1)
    torch.testing.assert_close(p, expected.double())
    tied = p_value_of("joint", normal[-1:], trained.calibration, labelled=False)
    assert float(tied) == pytest.approx(2 / (len(normal) + 1))


BLANK = torch.full((1, 1, SIZE, SIZE), 255, dtype=torch.uint8)


def test_p_values_hold_where_many_normal_images_are_the_same(likely):
    """8 % of them are a blank page, and no copy of it is stranger than the others are: where it is the strangest image,
    p is .08, which rounding made 1 / (n + 1) by chance."""
    pipe, smallest = ImagePipeline(likely.tokenizer, likely.prior), []
    for seed in range(12):
        images = torch.cat([stripes(184, seed=seed), BLANK.expand(16, -1, -1, -1)])
        fitted = calibrate(pipe, images, seed=seed, batch_size=1 + 37 * seed)
        copies = int((np.random.default_rng(seed).permutation(200)[100:] >= 184).sum())
        found = statistics(pipe, BLANK)
        for method in fitted.scores:
            score = score_of(method, found, fitted, labelled=False)
            p = float(p_value_of(method, score, fitted, labelled=False))
            assert p >= (1 + copies) / 101
            assert (p <= 0.05) == bool(score > fitted.thresholds[method])
            smallest.append(p == (1 + copies) / 101)
    assert sum(smallest) >= 24


def test_a_calibration_with_a_confidence_has_higher_thresholds_and_the_same_p_values(trained):
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    usual, sure = (calibrate(pipe, stripes(400, seed=2), confidence=confidence) for confidence in (None, 0.95))
    assert (usual.confidence, sure.confidence) == (None, 0.95)
    for method, scores in usual.scores.items():
        np.testing.assert_array_equal(scores, sure.scores[method])
        assert (
            scores > usual.thresholds[method] - 2 * usual.ties[method]
        ).sum() >= 10  # of 200: 5 % of 201, itself too
        assert (scores > sure.thresholds[method]).sum() <= 5 < (scores > usual.thresholds[method]).sum()
    assert "in 0.95 of calibrations" in sure.promise and "on average" in usual.promise
    with pytest.raises(ValueError, match="with a confidence of 0.95 needs at least 118 images"):
        calibrate(pipe, stripes(117), confidence=0.95)
    with pytest.raises(ValueError, match="confidence should lie between 0 and 1"):
        calibrate(pipe, stripes(40), confidence=1)


def test_what_is_fitted_is_a_function_of_the_normal_images_alone(trained):
    pipe, again = (ImagePipeline(trained.tokenizer, trained.prior) for _ in range(2))
    normal = stripes(300, seed=2)
    calibrate(pipe, normal)
    anomaly_score(pipe, uniform(50))
    before = json.dumps(pipe.calibration.to_dict())
    anomaly_score(again, uniform(50), "nll")
    heal(pipe, constant()[:2], draws=1)
    calibrate(again, normal)
    assert json.dumps(pipe.calibration.to_dict()) == before == json.dumps(again.calibration.to_dict())
    calibrate(again, normal, batch_size=300)  # which may round otherwise
    for method, scores in pipe.calibration.scores.items():
        np.testing.assert_allclose(again.calibration.scores[method], scores, rtol=1e-4, atol=1e-4)
    other = calibrate(again, normal, seed=1)
    assert other.data == pipe.calibration.data and other.typical_bits != pipe.calibration.typical_bits
    assert calibrate(again, stripes(300, seed=3)).data != other.data


def test_a_calibration_needs_images_enough(trained):
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    with pytest.raises(ValueError, match="at least 40 images"):
        calibrate(pipe, stripes(39))
    with pytest.raises(ValueError, match="false_alarms"):
        calibrate(pipe, stripes(40), false_alarms=1.0)
    assert pipe.calibration is None
    calibrate(pipe, stripes(40))
    with pytest.raises(ValueError, match="at least one image"):
        anomaly_score(pipe, stripes(1)[:0])
    with pytest.raises(ValueError, match="at most 50,000 images"):
        calibrate(pipe, stripes(1).expand(50_001, -1, -1, -1))


def test_images_of_the_calibration_are_recognised(trained, recwarn):
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    mine, others = stripes(60, seed=2), stripes(30, seed=3)
    calibrate(pipe, mine)
    mixed = torch.cat([others, mine[40:], mine[:1]])
    known = pipe.calibration.includes(mixed.movedim(1, -1).numpy())
    assert known.tolist() == [False] * 30 + [True] * 21
    for method, p_values in (("nll", False), ("reconstruction", False)):
        anomaly_score(pipe, mixed, method, p_values=p_values)
    anomaly_score(pipe, others, p_values=True)
    assert not recwarn.list
    for method, p_values in (("joint", False), ("nll", True)):
        with pytest.warns(UserWarning, match="^21 of 51 images are among those that the pipeline was calibrated with"):
            anomaly_score(pipe, mixed.float() / 127.5 - 1, method, p_values=p_values)


@pytest.mark.parametrize("what", [*FITTED, "p_values", "heal"])
def test_without_a_calibration_it_says_how_to_get_one(trained, what):
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    with pytest.raises(CalibrationError, match="smalti calibrate"):
        if what == "heal":
            heal(pipe, stripes(2))
        else:
            anomaly_score(pipe, stripes(2), "nll" if what == "p_values" else what, p_values=what == "p_values")
    assert anomaly_score(pipe, stripes(2), "nll").shape == (2,)
    with pytest.raises(ValueError, match="no score is called 'likelihood'; there are joint"):
        anomaly_score(pipe, stripes(2), "likelihood")


def test_with_labels_is_another_calibration():
    pipe = small(classes=3, size=(SIZE, SIZE))
    calibrate(pipe, stripes(60), labels=1)
    assert anomaly_score(pipe, stripes(4), labels=[0, 1, 2, 0]).shape == (4,)
    with pytest.raises(CalibrationError, match="labels: the pipeline was calibrated with them"):
        anomaly_score(pipe, stripes(4))


# The file


def test_a_saved_pipeline_gives_the_same_scores(trained, tmp_path):
    trained.save_pretrained(tmp_path / "pipe")
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    images = torch.cat([stripes(20), constant(), uniform(5)])
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
        ("digests", [1], "digests: should be null, or 16 hexadecimal digits"),
        ("digests", "0" * 17, "digests: should be null, or 16 hexadecimal digits"),
        ("digests", "", "digests: should be null, or 16 hexadecimal digits"),
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


def older(calibration):
    """As it would have been written before there were ties, confidences and digests."""
    data = json.loads(json.dumps(calibration.to_dict()))
    for name in ("ties", "confidence", "digests"):
        del data[name]
    data["scores"] = {name: [float(f"{v:.6g}") for v in values] for name, values in data["scores"].items()}
    data["thresholds"] = {name: float(f"{value:.6g}") for name, value in data["thresholds"].items()}
    return data


def test_an_older_calibration_loads_and_holds(trained, fresh, tmp_path):
    read = Calibration.from_dict(older(trained.calibration), Path("file"))
    assert read.confidence is None and read.digests is None
    assert not read.includes(stripes(3, seed=2).movedim(1, -1).numpy()).any()
    for method in ("joint", "nll", "reconstruction"):
        new, old = (score_of(method, fresh, c, labelled=False) for c in (trained.calibration, read))
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)
        p, q = (p_value_of(method, new, c, labelled=False) for c in (trained.calibration, read))
        assert (p - q).abs().max() < 0.01
    again = Calibration.from_dict(json.loads(read.to_json()), Path("file"))
    assert again.to_dict() == read.to_dict()


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


def test_a_calibration_of_another_grid_is_noticed(trained):
    pipe = small(size=(SIZE + 4, SIZE + 4))
    pipe.calibration = trained.calibration
    with pytest.raises(CalibrationError, match="a grid of 16 tokens, this one has 25"):
        heal(pipe, stripes(1, side=SIZE + 4))


# Where


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_map_sums_to_the_bits_of_the_image(tokenizer, smooth):
    pipe = small(tokenizer, channels=3, size=(12, 8))
    images = torch.randint(0, 256, (5, 3, 12, 8), dtype=torch.uint8)
    bits = anomaly_map(pipe, images, smooth=smooth, batch_size=2)
    assert bits.shape == (5, 12, 8) and (bits >= -1e-5).all()
    nll = anomaly_score(pipe, images, "nll").float()
    torch.testing.assert_close(bits.sum((1, 2)), nll, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_has_scores_and_maps(prior):
    pipe = small("vqvae", prior, classes=2)
    images = torch.randint(0, 256, (43, 1, 8, 12), dtype=torch.uint8)
    calibrate(pipe, images[3:])
    bits = anomaly_map(pipe, images[:3], labels=1)
    nll = anomaly_score(pipe, images[:3], "nll", labels=1).float()
    torch.testing.assert_close(bits.sum((1, 2)), nll, rtol=1e-5, atol=1e-4)
    assert anomaly_score(pipe, images[:3], p_values=True).shape == (3,)
    assert heal(pipe, images[:2], draws=2).images.shape == (2, 1, 8, 12)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_token_spreads_over_its_own_patch(tokenizer):
    made = make_tokenizer(tokenizer, (8, 12), 3)
    rows, columns = patches(made)
    for index in range(0, len(made.grid), 5):
        patch = (rows[:, index, None] * columns[None, :, index]) > 0
        assert made.known_tokens(~patch[None]).flatten()[index] == 0
        hidden = patch & torch.zeros(8, 12, dtype=torch.bool)
        assert made.known_tokens(~hidden[None]).all()
        elsewhere = ~patch  # all of it hidden, the token is still known
        assert made.known_tokens(~elsewhere[None]).flatten()[index]


def test_a_smooth_map_is_smoother(trained):
    images = planted(stripes(8))
    sharp, smooth = (anomaly_map(trained, images, smooth=smooth) for smooth in (False, True))
    assert smooth.diff(dim=2).abs().max() < sharp.diff(dim=2).abs().max() / 2


def test_healing_removes_what_was_planted_and_leaves_clean_images_alone(trained):
    clean = stripes(64, seed=6)
    marked = planted(clean)
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[4:10, 4:10] = True
    healed = heal(trained, marked)
    assert healed.images.shape == (64, 1, SIZE, SIZE) and healed.images.abs().max() <= 1
    assert healed.resampled.dtype == torch.bool and healed.resampled.shape == (64, *trained.prior.grid.shape)
    assert float(healed.difference[:, inside].mean() / healed.difference[:, ~inside].mean()) > 3
    tokens, touched = trained.encode(marked), healed.resampled.flatten(1).any(1)
    assert torch.equal(tokens[~healed.resampled], healed.tokens[~healed.resampled]) and touched.double().mean() > 0.5
    gain = (trained.prior.log_prob(healed.tokens) - trained.prior.log_prob(tokens))[touched]
    assert gain.mean() > 5 and (gain > 0).double().mean() > 0.75
    torch.testing.assert_close(healed.images, trained.decode(healed.tokens, output_type="pt"))
    assert heal(trained, clean, draws=1).resampled.float().mean() < 0.04
    shares = [float(heal(trained, clean, quantile=q, draws=1).resampled.float().mean()) for q in (0.9, 0.98, 0.995)]
    assert shares == sorted(shares, reverse=True)


def test_healing_keeps_the_other_tokens_and_is_a_function_of_the_seed(trained):
    images = torch.cat([planted(stripes(5, seed=7)), constant()[:1]])
    one, two = (heal(trained, images, draws=1, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for k in range(6):
        alone = heal(trained, images[k : k + 1], draws=1, seed=3 + k)
        assert torch.equal(alone.tokens[0], one.tokens[k]) and torch.equal(alone.resampled[0], one.resampled[k])
    untouched = ~one.resampled.flatten(1).any(1)
    kept = trained.reconstruct(images, output_type="pt")
    torch.testing.assert_close(one.images[untouched], kept[untouched])
    with pytest.raises(ValueError, match="quantile should be one of 0.9, 0.95"):
        heal(trained, images, quantile=0.97)


# The background prior's training


def task_of(tokens, run, **more):
    return PriorTask(
        parse(TrainPriorConfig, prior_arguments(run, tokens, **more), verb="train_prior", description=None)
    )


def test_perturbed_tokens_are_a_function_of_seed_epoch_and_row(tmp_path):
    tokens = make_tokens(tmp_path / "tokens", rows=2000)
    rows, zeros = np.arange(2000), np.zeros(2000, np.int64)
    clean, labels = task_of(tokens, tmp_path / "a").batch(rows, zeros, 0)
    task = task_of(tokens, tmp_path / "b", perturb=0.3)
    whole, same_labels = task.batch(rows, zeros, 0)
    assert torch.equal(labels, same_labels) and whole.dtype == torch.int64
    vocab = task.data.grid.vocab_size
    task.data.grid.check(whole)
    changed = float((whole != clean).double().mean())
    assert changed == pytest.approx(0.3 * (1 - 1 / vocab), abs=0.005)
    ids = torch.bincount(whole[whole != clean], minlength=vocab).double()
    assert (ids / ids.sum()).max() < 2.5 / vocab  # uniform, whatever the tokens are
    parts = torch.cat([task.batch(part, zeros[: len(part)], 0)[0] for part in np.array_split(rows, 7)])
    assert torch.equal(parts, whole)
    assert torch.equal(task.batch(rows[::-1].copy(), zeros, 0)[0].flip(0), whole)
    epochs = np.arange(2000) % 3
    mixed = task.batch(rows, epochs, 0)[0]
    for epoch in range(3):
        alone = task.batch(rows, zeros + epoch, 0)[0]
        assert torch.equal(mixed[epochs == epoch], alone[epochs == epoch])
        assert (epoch == 0) == torch.equal(alone, whole)
    assert not torch.equal(task.batch(rows, zeros, 1)[0], whole)


def test_evaluation_sees_clean_tokens(tmp_path):
    task = task_of(make_tokens(tmp_path / "tokens"), tmp_path / "run", perturb=1.0)
    clean = bits_per_token(task.model.eval(), task.data.splits["test"], 2000)
    assert task.evaluate(task.model.eval(), "held_out") == {"bits_per_token": clean}


# The verbs


def write(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images[:, 0].numpy()):
        Image.fromarray(image).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="module")
def world(trained, tmp_path_factory):
    """A pipeline that is not calibrated yet, and folders of images."""
    root = tmp_path_factory.mktemp("world")
    write(root / "normal/train/a", stripes(4))
    write(root / "normal/test/a", stripes(80, seed=20))
    write(root / "fresh", stripes(30, seed=21))
    write(root / "noise", uniform(12))
    write(root / "classes/stripes", stripes(20, seed=22))
    write(root / "classes/flat", constant()[:10])
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    pipe.provenance = {"data": {"source": str(root / "normal"), "image_size": SIZE}}
    pipe.save_pretrained(root / "bare")
    shutil.copytree(root / "bare", root / "pipe")
    main(["calibrate", f"pipeline={root}/pipe", "background=" + str(root / "bare")])
    return root


def words(text):
    """With one space where a table has more."""
    return re.sub(" +", " ", text)


def rows_of(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_calibrating_writes_into_the_folder(world, capsys):
    loaded = ImagePipeline.from_pretrained(world / "pipe")
    assert loaded.calibration.count == 40 and loaded.background is not None
    assert set(loaded.calibration.scores) == set(METHODS) - {"complexity"}
    assert (world / "pipe" / "calibration.json").stat().st_size < 1 << 20
    assert ImagePipeline.from_pretrained(world / "bare").calibration is None


def test_detect_two_sources(world, tmp_path, capsys):
    main(
        [
            "detect",
            f"pipeline={world}/pipe",
            f"images={world}/noise",
            f"normal={world}/fresh",
            f"out={tmp_path}/found",
            "num_shown=3",
        ]
    )
    printed = capsys.readouterr().out
    rows = rows_of(tmp_path / "found" / "scores.csv")
    assert len(rows) == 42 and rows[0]["file"].endswith("noise/000.png")
    assert list(rows[0])[:5] == ["file", "anomalous", "score", "p_value", "flagged"]
    assert {"token_bits", "codec_bits", "error", "surprise", "background_bits"} <= set(rows[0])
    assert [row["anomalous"] for row in rows] == ["1"] * 12 + ["0"] * 30
    assert all(row["flagged"] == "1" for row in rows[:12]) and sum(row["flagged"] == "1" for row in rows[12:]) < 8
    figures = json.loads((tmp_path / "found" / "figures.json").read_text())
    assert figures["auroc"][0] > 0.99 and figures["prevalence"] == pytest.approx(12 / 42)
    assert "AUROC" in printed and "by chance 0.2857" in printed
    assert Image.open(tmp_path / "found" / "sheet.png").size == (8 * (SIZE * 4 + 2) + 2, 3 * (SIZE * 4 + 2) + 2)


def test_detect_classes_and_nothing_known(world, tmp_path, capsys):
    main(
        [
            "detect",
            f"pipeline={world}/pipe",
            f"images={world}/classes",
            "normal_labels=[stripes]",
            f"out={tmp_path}/a",
            "fdr=0.2",
        ]
    )
    rows = rows_of(tmp_path / "a" / "scores.csv")
    assert [(row["class"], row["anomalous"]) for row in rows] == [("flat", "1")] * 10 + [("stripes", "0")] * 20
    capsys.readouterr()
    main(["detect", f"pipeline={world}/pipe", f"out={tmp_path}/b", "method=nll"])  # the pipeline's own held-out images
    printed = capsys.readouterr().out
    names = [Path(row["file"]).name for row in rows_of(tmp_path / "b" / "scores.csv")]
    assert names == [f"{number:03d}.png" for number in range(1, 80, 2)]  # the others were calibrated with
    assert "left out 40 images that the pipeline was calibrated with\n" in words(printed)
    assert "promised at most 0.05 of new normal images are above, on average over calibrations\n" in words(printed)
    assert "AUROC" not in printed and not (tmp_path / "b" / "figures.json").exists()


def test_no_image_is_scored_by_a_calibration_that_was_fitted_to_it(world, tmp_path, capsys):
    """Neither as normal nor as one to look through, wherever it lies and whatever it is called."""
    again = torch.cat([stripes(80, seed=20)[[0, 2, 4]], stripes(6, seed=24)])
    write(tmp_path / "again", again)
    main(
        [
            "detect",
            f"pipeline={world}/pipe",
            f"images={world}/noise",
            f"normal={tmp_path}/again",
            f"out={tmp_path}/found",
        ]
    )
    assert "left out 3 images" in words(capsys.readouterr().out)
    rows = rows_of(tmp_path / "found/scores.csv")
    assert [row["anomalous"] for row in rows] == ["1"] * 12 + ["0"] * 6
    assert [Path(row["file"]).name for row in rows[12:]] == [f"00{number}.png" for number in range(3, 9)]
    write(tmp_path / "none", again[:3])
    for given in (["images={}/none"], ["images={}/again", "normal={}/none"]):
        line = fails(
            capsys,
            "detect",
            f"pipeline={world}/pipe",
            f"out={tmp_path}/not",
            *(part.format(tmp_path) for part in given),
        )
        assert f"{tmp_path}/none: the pipeline was calibrated with all 3 images" in line
    assert not (tmp_path / "not").exists()


def test_an_older_calibration_is_told_of(world, tmp_path, capsys):
    shutil.copytree(world / "pipe", tmp_path / "pipe")
    data = older(ImagePipeline.from_pretrained(world / "pipe").calibration)
    write_json(tmp_path / "pipe/calibration.json", data)
    write_manifest(tmp_path / "pipe")
    main(["detect", f"pipeline={tmp_path}/pipe", f"out={tmp_path}/found"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "calibration  an older one, whose images cannot be told from new ones: run `smalti calibrate` again"
    )
    assert len(rows_of(tmp_path / "found/scores.csv")) == 80 and not any("left out" in line for line in lines)


def test_what_was_trained_on_is_not_looked_through(trained, tmp_path, capsys):
    """Where a source has no held-out split, training took most of the only one; of other sources all is new."""
    write(tmp_path / "mine", stripes(900, seed=25))
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    pipe.provenance = {"data": {"source": str(tmp_path / "mine"), "image_size": SIZE}}
    pipe.save_pretrained(tmp_path / "pipe")
    config = DataConfig(source=str(tmp_path / "mine"), image_size=SIZE)
    held_out = load_images(config).held_out.pixels(range(90))
    main(["calibrate", f"pipeline={tmp_path}/pipe"])
    main(["detect", f"pipeline={tmp_path}/pipe", f"out={tmp_path}/a"])
    printed = capsys.readouterr().out
    assert "calibrated with 45 of 90 images" in printed and "left out 45 images" in words(printed)
    images = torch.stack(
        [torch.from_numpy(np.asarray(Image.open(row["file"])).copy()) for row in rows_of(tmp_path / "a/scores.csv")]
    )[:, None]
    assert torch.equal(images, held_out[1::2])
    main(["detect", f"pipeline={tmp_path}/pipe", f"images={tmp_path}/mine", f"out={tmp_path}/b"])
    assert rows_of(tmp_path / "b/scores.csv") == rows_of(tmp_path / "a/scores.csv")
    (tmp_path / "mine").rename(tmp_path / "moved")
    main(["detect", f"pipeline={tmp_path}/pipe", f"images={tmp_path}/moved", f"out={tmp_path}/c"])
    assert len(rows_of(tmp_path / "c/scores.csv")) == 855


def test_a_confidence_is_kept_and_told(world, tmp_path, capsys):
    shutil.copytree(world / "bare", tmp_path / "pipe")
    line = fails(capsys, "calibrate", f"pipeline={tmp_path}/pipe", "confidence=0.9")
    assert "a share of 0.05 false alarms with a confidence of 0.9 needs at least 90 images (got 40); every=2" in line
    main(["calibrate", f"pipeline={tmp_path}/pipe", "confidence=0.9", "false_alarms=0.2"])
    promise = "at most 0.2 of new normal images are above, in 0.9 of calibrations\n"
    assert f"thresholds: {promise}" in capsys.readouterr().out
    main(["detect", f"pipeline={tmp_path}/pipe", f"images={world}/fresh", f"out={tmp_path}/found"])
    assert f"promised {promise}" in words(capsys.readouterr().out)
    fitted = ImagePipeline.from_pretrained(tmp_path / "pipe").calibration
    flagged = [row["flagged"] == "1" for row in rows_of(tmp_path / "found/scores.csv")]
    scores = [float(row["score"]) for row in rows_of(tmp_path / "found/scores.csv")]
    assert fitted.confidence == 0.9 and flagged == [score > fitted.thresholds["joint"] for score in scores]
    assert fitted.thresholds["joint"] > np.sort(fitted.scores["joint"])[-2]  # of 20 scores, 3 could be above on average


def test_methods_that_are_left_out_are_listed(world, tmp_path, capsys):
    shutil.copytree(world / "bare", tmp_path / "pipe")
    main(["calibrate", f"pipeline={tmp_path}/pipe"])
    printed = capsys.readouterr().out
    assert "left out: complexity, which needs a tokenizer with a likelihood of pixels (`model.likelihood`)\n" in printed
    assert "left out: ratio, which needs a background prior" in printed and "left out: neighbours" not in printed
    assert "method: complexity needs a tokenizer with a likelihood of pixels" in fails(
        capsys, "detect", f"pipeline={tmp_path}/pipe", f"out={tmp_path}/found", "method=complexity"
    )


def test_detect_looks_where_the_other_verbs_do(world, tmp_path, capsys):
    write(tmp_path / "new/train", stripes(4))
    write(tmp_path / "new/val", stripes(3, seed=23))
    argv = ["detect", f"pipeline={world}/pipe", f"images={tmp_path}/new", f"out={tmp_path}/found"]
    main(argv)
    assert {Path(row["file"]).parent.name for row in rows_of(tmp_path / "found/scores.csv")} == {"val"}
    assert capsys.readouterr().err == (
        f"data.held_out: {tmp_path}/new: there is no 'test', so 'val' is looked through\n"
    )
    main([*argv, "data.held_out=test"])
    assert {Path(row["file"]).parent.name for row in rows_of(tmp_path / "found/scores.csv")} == {"train"}
    assert "so all of 'train' is looked through; not used: val" in capsys.readouterr().err
    assert "no split 'vla'; it has train, val; did you mean 'val'?" in fails(capsys, *argv, "data.held_out=vla")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["detect", "pipeline={world}/bare"], "smalti calibrate pipeline="),
        (["detect", "data.image_size=20"], "data.image_size, data.channels: the pipeline's images are (1, 16, 16)"),
        (["detect", "data.channels=3"], "data.image_size, data.channels"),
        (["detect", "images={world}/nowhere"], "data.source: there is no file or folder"),
        (["detect", "images={world}/fresh", "normal_labels=[a]"], "these images have no classes"),
        (
            ["detect", "images={world}/classes", "normal_labels=[round]"],
            "normal_labels: none of the images is a 'round'",
        ),
        (["detect", "images={world}/classes", "normal_labels=[flat, stripes]"], "nothing to tell apart"),
        (["detect", "normal={world}/fresh", "normal_labels=[a]"], "give one of the two"),
        (["detect", "method=guess"], "method: must be one of"),
        (["detect", "out={world}/fresh/000.png"], "out: "),
        (["calibrate", "pipeline=some/hub-id"], "is not a folder"),
        (["calibrate", "data.image_size=20"], "data.image_size, data.channels"),
        (["calibrate", "data.limit=12"], "data: calibrating for a share of 0.05 false alarms needs at least 40"),
        (["calibrate", "false_alarms=0"], "false_alarms: must be > 0"),
        (["calibrate", "background={world}/other"], "background/config.json: not a prior over the same tokens"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(world, capsys, argv, message):
    if "other" in argv[-1] and not (world / "other").exists():
        small(size=(SIZE, SIZE)).save_pretrained(world / "other")
    own = [] if any(part.startswith("pipeline=") for part in argv) else [f"pipeline={world}/pipe"]
    before = (world / "pipe" / "calibration.json").read_bytes()
    line = fails(capsys, argv[0], *own, *(part.format(world=world) for part in argv[1:]))
    assert message in line
    assert (world / "pipe" / "calibration.json").read_bytes() == before
