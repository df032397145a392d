"""Calibration: uniform p-values, nothing learned from anomalies, and its own images are recognised."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from givens.stripes import SIZE, constant, statistics_of, stripes, uniform
from small_pipelines import make_conditioned, make_pipeline, pixels_for

from pipelines import ImagePipeline
from pipelines.anomaly.calibrating import calibrate, divide_objects, worst_of_objects
from pipelines.anomaly.calibration import Calibration, digest_image
from pipelines.anomaly.conformal import cross_bound
from pipelines.anomaly.distances import CalibrationError, Distance
from pipelines.anomaly.healing import heal
from pipelines.anomaly.scores import FITTED, anomaly_score, log_statistics, p_values_by, score_tiles


@pytest.mark.parametrize("method", ["joint", "neighbours", "nll", "top_bits", "typicality", "reconstruction"])
def test_p_values_of_normal_images_are_uniform(trained, fresh, method):
    found = score_tiles(method, fresh, trained.calibration.references)
    fitted = trained.calibration.scores[method]
    scores, normal = np.sort(found[0]), fitted.values
    every = np.sort(np.concatenate([scores, normal]))
    n, m = len(normal), len(scores)
    distance = np.abs(np.searchsorted(normal, every, "right") / n - np.searchsorted(scores, every, "right") / m).max()
    assert distance < 1.95 * math.sqrt((n + m) / (n * m))  # two-sample Kolmogorov-Smirnov, p = 0.001
    p = p_values_by(method, found, trained.calibration).numpy()
    assert p.min() >= 1 / (n + 1) and p.max() <= 1
    rank = math.floor(0.05 * (n + 1))
    chance = np.random.default_rng(0)  # Beta over calibrations, binomial over images given a calibration
    rates = chance.binomial(m, chance.beta(rank, n + 1 - rank, 100_000)) / m
    low, high = np.quantile(rates, [0.0005, 0.9995])
    assert low <= (p <= 0.05).mean() <= high
    flagged = scores > fitted.threshold
    assert flagged.sum() == (p <= trained.calibration.false_alarms).sum()


def test_p_values_count_ties_against_detection_and_fall_with_the_score(trained):
    images = torch.cat([stripes(30, seed=5), constant(), uniform(9)])
    scores = anomaly_score(trained, images)
    p = anomaly_score(trained, images, p_values=True)
    order = scores.argsort()
    assert (p[order].diff() <= 0).all()
    fitted = trained.calibration.scores["joint"]
    normal, tie = torch.from_numpy(fitted.values), fitted.tie
    expected = (1 + (normal + tie >= scores[:, None]).sum(1)) / (len(normal) + 1)
    torch.testing.assert_close(p, expected.double())
    tied = p_values_by("joint", fitted.values[None, -1:], trained.calibration)
    assert float(tied) == pytest.approx(2 / (len(normal) + 1))


def test_a_confidence_raises_the_thresholds_and_leaves_the_scores(trained):
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    usual, sure = (calibrate(pipe, stripes(400, seed=2), confidence=confidence) for confidence in (None, 0.95))
    assert (usual.confidence, sure.confidence) == (None, 0.95)
    for method, one in usual.scores.items():
        scores, other = one.values, sure.scores[method]
        np.testing.assert_array_equal(scores, other.values)
        assert (scores > one.threshold - 2 * one.tie).sum() >= 10  # of 200: 5 % of 201, itself too
        assert (scores > other.threshold).sum() <= 5 < (scores > one.threshold).sum()


def test_a_calibration_depends_on_the_normal_images_only(trained):
    pipe, again = (ImagePipeline(trained.tokenizer, trained.prior) for _ in range(2))
    normal = stripes(100, seed=2)
    calibrate(pipe, normal)
    anomaly_score(pipe, uniform(50))
    before = pipe.calibration.to_json()
    anomaly_score(again, uniform(50), "nll")
    heal(pipe, constant()[:2], draws=1)
    calibrate(again, normal)
    assert pipe.calibration.to_json() == before == again.calibration.to_json()
    calibrate(again, normal, batch_size=100)  # with other rounding
    for method, scores in pipe.calibration.scores.items():
        np.testing.assert_allclose(again.calibration.scores[method].values, scores.values, rtol=1e-4, atol=1e-4)
    other = calibrate(again, normal, seed=1)
    assert other.digests == pipe.calibration.digests
    assert other.fitted.typical_bits != pipe.calibration.fitted.typical_bits


@pytest.mark.parametrize("stride", [None, 8])
def test_what_is_fitted_depends_on_one_half_only(trained, stride):
    """Healing and maps of new images use it, for which images that gave the scores would not be new."""
    pipe, normal = ImagePipeline(trained.tokenizer, trained.prior), stripes(60, seed=2)
    other, scoring = normal.clone(), divide_objects(np.arange(60), 60, 0)[0].scoring
    other[scoring] = uniform(len(scoring))
    one, two = (calibrate(pipe, images, stride=stride) for images in (normal, other))
    assert np.abs(one.scores["nll"].values - two.scores["nll"].values).max() > 1
    fitted = {"fitted", "surprise", "error", "maps"}
    assert one.model_dump_json(include=fitted) == two.model_dump_json(include=fitted)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (37, {}, "38 images"),
        (117, {"confidence": 0.95}, "118 images"),
        (40, {"false_alarms": 1.0}, "false_alarms"),
        (50_001, {}, "50,000 images"),
        (80, {"groups": ["a"]}, "groups: expected one for each of 80 images"),
        (80, {"groups": [str(number // 4) for number in range(80)]}, r"needs at least 38 objects \(got 20\)"),
        (60, {"folds": 9}, "folds: must be from 1 to 8"),
        (200, {"folds": 5, "confidence": 0.9}, "confidence: can be promised with folds=1 only"),
        (18, {"folds": 5}, r"needs at least 19 images \(got 18\)"),
        (10_001, {"folds": 5}, "with folds can use at most 10,000 images"),
    ],
)
def test_a_promise_that_cannot_be_given_is_one_line(trained, count, options, message):
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    with pytest.raises(ValueError, match=message) as caught:
        calibrate(pipe, stripes(1).expand(count, -1, -1, -1), **options)
    assert "\n" not in str(caught.value) and pipe.calibration is None


def test_fitted_scores_need_a_calibration_and_an_image(trained):
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    for method in (*FITTED, "nll"):
        with pytest.raises(CalibrationError):
            anomaly_score(pipe, stripes(2), method, p_values=method == "nll")
    with pytest.raises(CalibrationError):
        heal(pipe, stripes(2))
    assert anomaly_score(pipe, stripes(2), "nll").shape == (2,)
    for images, method in ((stripes(2), "likelihood"), (stripes(1)[:0], "nll")):
        with pytest.raises(ValueError):
            anomaly_score(pipe, images, method)


def test_images_of_the_calibration_are_recognised(trained, recwarn):
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    mine, others = stripes(60, seed=2), stripes(30, seed=3)
    calibrate(pipe, mine)
    mixed = torch.cat([others, mine[40:], mine[:1]])
    known = pipe.calibration.find_used([digest_image(image) for image in mixed.movedim(1, -1).numpy()])
    assert known.tolist() == [False] * 30 + [True] * 21
    for method, p_values in (("nll", False), ("reconstruction", False)):
        anomaly_score(pipe, mixed, method, p_values=p_values)
    anomaly_score(pipe, others, p_values=True)
    assert not recwarn.list
    for method, p_values in (("joint", False), ("nll", True)):
        with pytest.warns(UserWarning, match="^21 of 51 images "):
            anomaly_score(pipe, mixed.float() / 127.5 - 1, method, p_values=p_values)


def test_a_calibration_with_labels_scores_with_labels_only():
    pipe = make_pipeline(size=(SIZE, SIZE))
    calibrate(pipe, stripes(60), labels=1)
    assert anomaly_score(pipe, stripes(4), labels=[0, 1, 2, 0]).shape == (4,)
    with pytest.raises(CalibrationError, match="^labels: "):
        anomaly_score(pipe, stripes(4))


def test_a_calibration_with_columns_scores_with_these_columns_only(tmp_path):
    pipe = make_conditioned()
    images, new = pixels_for(pipe, 60), pixels_for(pipe, 4)
    calibrate(pipe, images, condition={"age": list(range(20, 80)), "view": "lateral", "label": "dog", "text": None})
    pipe.save_pretrained(tmp_path / "pipe")
    pipe = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert pipe.calibration.columns == ["age", "view"] and pipe.calibration.labels
    good = {"age": [30, None, 50, 60], "view": "frontal", "label": [0, 1, 2, 0]}
    assert anomaly_score(pipe, new, condition=good, p_values=True).shape == (4,)
    for more, now in (({"view": None}, "age, label"), ({"motion": [1, 1]}, "age, label, motion, view")):
        pattern = rf"^condition: [^\n]*\bage, label, view given[^\n]*\bnow with {now},[^\n]*$"
        for method, p_values in (("joint", False), ("nll", True)):
            with pytest.raises(CalibrationError, match=pattern):
                anomaly_score(pipe, new, method, condition={**good, **more}, p_values=p_values)
    with pytest.raises(CalibrationError, match="^condition: "):
        heal(pipe, new, draws=1)


def test_a_calibration_of_other_models_is_one_error(trained):
    """With other statistics, or other features."""
    for other in (
        make_pipeline(size=(SIZE, SIZE), sizes={"likelihood": {"kind": "discretized_logistic"}}, labels=[]),
        make_pipeline(prior="marginal", size=(SIZE, SIZE), labels=[]),
    ):
        other.calibration = trained.calibration
        with pytest.raises(CalibrationError, match=r"^[^\n]*smalti calibrate[^\n]*$"):
            anomaly_score(other, stripes(4))


# Objects


def photographed(count, views, seed):
    """Stripes, each photographed `views` times with a brightness of the object and a little noise; and their names."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-9, 10, (count * views, 1, SIZE, SIZE), generator=generator)
    images = (stripes(count, seed).repeat_interleave(views, 0) + noise).clamp(0, 255).to(torch.uint8)
    order = torch.randperm(len(images), generator=generator)
    return images[order], [f"tile{number}" for number in (order // views).tolist()]


def test_an_object_has_one_score_that_of_its_worst_image(trained):
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    images, names = photographed(60, 4, seed=3)
    found = calibrate(pipe, images, groups=names)
    assert (found.count, found.objects) == (240, 60) and all(len(each.values) == 30 for each in found.scores.values())
    bits = anomaly_score(trained, images, "nll").numpy()
    worst = {name: max(bits[row] for row, other in enumerate(names) if other == name) for name in names}
    nearest = [min(abs(score - value) for score in worst.values()) for value in found.scores["nll"].values]
    assert max(nearest) <= found.scores["nll"].tie
    assert "objects have an image that exceeds it" in found.promise and "60 objects" in str(found)


def test_groups_of_one_image_change_nothing_but_the_count(trained):
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    images = stripes(80, seed=3)
    alone = calibrate(pipe, images)
    single = calibrate(pipe, images, groups=[f"{number:02}" for number in range(80)])
    assert single.model_copy(update={"objects": None, "object_digests": None}).to_json() == alone.to_json()
    assert type(single).from_dict(json.loads(single.to_json()), Path("calibration.json")).objects == 80


# Folds --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folded(trained):
    """A pipeline that is calibrated with five folds of objects, and its images and their objects."""
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    images, names = photographed(24, 3, seed=3)
    calibrate(pipe, images, groups=names, folds=5)
    return pipe, images, names


def test_every_object_is_scored_by_what_was_fitted_without_its_fold(folded):
    pipe, images, names = folded
    found, numbers = pipe.calibration, np.unique(names, return_inverse=True)[1]
    statistics, parts = statistics_of(pipe, images), divide_objects(numbers, 24, 0, 5)
    assert sorted(len({numbers[row] for row in part.scoring}) for part in parts) == [4, 5, 5, 5, 5]
    assert not any({*numbers[part.fitting]} & {*numbers[part.scoring]} for part in parts)
    for method, each in found.scores.items():
        assert each.threshold is None and len(each.values) == 24
        np.testing.assert_array_equal(
            np.sort(np.concatenate([each.scores[method] for each in found.references])), each.values
        )
        for part, fold in zip(parts, found.folds, strict=True):
            own = {name: rows[part.scoring] for name, rows in statistics.items()}
            scores = worst_of_objects(score_tiles(method, own, [fold])[0], part.owners)
            np.testing.assert_allclose(fold.scores[method], np.sort(scores), atol=1.01 * each.tie)


def test_what_is_fitted_depends_on_the_other_folds_only(folded):
    pipe, images, names = folded
    numbers = np.unique(names, return_inverse=True)[1]
    part, other = divide_objects(numbers, 24, 0, 5)[2], images.clone()
    other[part.scoring] = uniform(len(part.scoring))
    one, two = pipe.calibration, calibrate(ImagePipeline(pipe.tokenizer, pipe.prior), other, groups=names, folds=5)
    pairs = zip(one.folds, two.folds, strict=True)
    same = [first.fitted.model_dump_json() == second.fitted.model_dump_json() for first, second in pairs]
    assert same == [False, False, True, False, False]


def test_p_values_of_folds_pool_the_ranks_and_scores_are_means(folded, tmp_path):
    pipe, _, _ = folded
    pipe.save_pretrained(tmp_path / "pipe")
    loaded, new = ImagePipeline.from_pretrained(tmp_path / "pipe"), torch.cat([stripes(20, seed=77), uniform(4)])
    assert loaded.calibration.to_json() == pipe.calibration.to_json() and loaded.calibration.fitted is None
    found = statistics_of(pipe, new)
    for method in pipe.calibration.scores:
        scores, p = anomaly_score(loaded, new, method), anomaly_score(loaded, new, method, p_values=True)
        each = np.stack([score_tiles(method, found, [fold])[0] for fold in pipe.calibration.folds])
        np.testing.assert_allclose(scores, each.mean(0))
        tie, higher = pipe.calibration.scores[method].tie, 0
        for own, fold in zip(each, pipe.calibration.folds, strict=True):
            higher = higher + (fold.scores[method] + tie >= own[:, None]).sum(1)
        np.testing.assert_allclose(p, (1 + higher) / 25)
    assert (anomaly_score(loaded, uniform(4), p_values=True) <= 0.05).all()
    assert pipe.calibration.bound == cross_bound(0.05, 24, 5)
    assert heal(loaded, new[:2], draws=1).images.shape == (2, 1, SIZE, SIZE)


@pytest.mark.parametrize("stride", [None, 8])
def test_maps_of_folds_are_means_and_have_no_threshold(stride):
    torch.manual_seed(0)
    pipe = make_pipeline(prior="masked", size=(SIZE, SIZE), labels=[])
    calibrate(pipe, stripes(24, seed=3), folds=4, stride=stride)
    found, new = pipe.calibration, stripes(3, seed=8)
    assert "hidden" in found.scores and "map" not in found.scores and found.has_maps and len(found.references) == 4
    maps, parts = pipe.anomaly_map(new, method="combined", stride=stride), []
    hidden = pipe.anomaly_score(new, "hidden", stride=stride, p_values=True)
    assert hidden.shape == (3,) and len(found.scores["hidden"].values) == 24
    for fold in found.folds:
        scores = {name: each.model_copy(update={"threshold": 0.0}) for name, each in found.scores.items()}
        own = {"fitted": fold.fitted, "maps": fold.maps, "folds": None, "scores": scores}
        pipe.calibration = found.model_copy(update=own)
        parts.append(pipe.anomaly_map(new, method="combined", stride=stride))
    for number in range(3):
        torch.testing.assert_close(maps[number], torch.stack([part[number] for part in parts]).mean(0))


# Statistics of 0.3 --------------------------------------------------------------------------------


def test_a_calibration_of_0_3_has_its_own_statistics(trained):
    """All but `top_bits`, which its file does not name."""
    images, fitted = stripes(60, seed=9), trained.calibration.fitted
    assert fitted.names == ["token_bits", "error", "top_bits"]
    found = statistics_of(trained, images)
    old = fitted.model_copy(update={"names": None, "statistics": Distance.fit(log_statistics(found, None))})
    assert len(old.statistics.mean) == 2 and "names" not in old.model_dump_json()
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    scores = {name: each for name, each in trained.calibration.scores.items() if name != "top_bits"}
    pipe.calibration = trained.calibration.model_copy(update={"fitted": old, "scores": scores})
    pipe.calibration = Calibration.from_dict(json.loads(pipe.calibration.to_json()), Path("calibration.json"))
    bits = np.stack([np.log(found["token_bits"].numpy() + 1), np.log(found["error"].numpy() + 2 / 255)], 1)
    far, near = old.statistics.of(bits), old.features.of(found["features"].numpy())
    np.testing.assert_array_equal(anomaly_score(pipe, images), near + np.maximum(0, far - 1))
    with pytest.raises(CalibrationError, match="calibrated without top_bits: run"):
        anomaly_score(pipe, images, "top_bits", p_values=True)
    assert anomaly_score(pipe, images, "top_bits").shape == (60,)
