"""AUROC is the rank statistic with an interval, PRO is its definition, regions are joined by edges and corners."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.metrics.localization import (
    auroc,
    auroc_by_object,
    auroc_interval,
    label_regions,
    per_region_overlap,
    separation,
)


def draw(seed, shape=(3, 5, 6), levels=6, share=0.3):
    """Maps with ties, and masks."""
    chance = np.random.default_rng(seed)
    masks = chance.random(shape) < share
    masks[0] = False
    masks[1, 2, 2] = True
    return chance.integers(levels, size=shape) / 4, masks


def flood(masks):
    """Return the pixels of each region, found by walking."""
    left, regions = set(map(tuple, np.argwhere(masks).tolist())), []
    while left:
        region, edge = set(), [next(iter(left))]
        while edge:
            image, y, x = edge.pop()
            if (image, y, x) in left:
                left.remove((image, y, x))
                region.add((image, y, x))
                edge += [(image, y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        regions.append(region)
    return regions


def slow_overlap(maps, masks, limit):
    """The area under the curve, from the rates at each threshold and many points between them."""
    regions, outside = flood(masks), maps[~masks]
    curve = [(0.0, 0.0)]
    for level in sorted(set(maps.ravel().tolist()), reverse=True):
        overlaps = [np.mean([maps[pixel] >= level for pixel in region]) for region in regions]
        curve.append((float(np.mean(outside >= level)), float(np.mean(overlaps))))
    area = 0.0
    for (x, y), (next_x, next_y) in zip(curve, curve[1:], strict=False):
        if x < limit and next_x > x:
            end = min(next_x, limit)
            area += (end - x) * (y + y + (next_y - y) * (end - x) / (next_x - x)) / 2
    return area / limit


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.1, 0.3, 0.5, 1.0]), st.sampled_from([0.1, 0.3, 0.6]))
def test_overlap_is_its_definition(seed, limit, share):
    maps, masks = draw(seed, share=share)
    assert per_region_overlap(maps, masks, limit) == pytest.approx(slow_overlap(maps, masks, limit), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9))
def test_auroc_counts_pairs_and_half_of_ties(seed, levels):
    scores, positive = draw(seed, levels=levels)
    pairs = np.sign(scores[positive][:, None] - scores[~positive])
    assert auroc(scores, positive) == pytest.approx((pairs + 1).mean() / 2, abs=1e-12)
    assert auroc(-scores, positive) == pytest.approx(1 - auroc(scores, positive), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.2, 0.4, 0.7]))
def test_regions_are_connected_pixels(seed, share):
    _, masks = draw(seed, (3, 9, 11), share=share)
    found, regions = np.stack(label_regions(masks)), flood(masks)
    assert found.max() == len(regions) and ((found > 0) == masks).all()
    assert sorted(len(set(found[tuple(np.array(list(each)).T)])) for each in regions) == [1] * len(regions)
    assert np.bincount(found.ravel())[1:].sum() == masks.sum()


def test_a_long_winding_region_is_one():
    masks = np.zeros((1, 41, 41), bool)
    masks[0, ::2] = True
    masks[0, 1::4, -1] = masks[0, 3::4, 0] = True
    assert label_regions(masks)[0].max() == 1


def test_a_perfect_map_gives_one_and_a_constant_one_chance():
    _, masks = draw(0)
    assert per_region_overlap(masks.astype(float), masks) == auroc(masks.astype(float), masks) == 1
    assert per_region_overlap(np.zeros(masks.shape), masks) == pytest.approx(0.15)  # the diagonal up to 0.3
    assert np.isnan(per_region_overlap(masks.astype(float), ~masks | True))
    assert np.isnan(auroc(np.zeros(3), np.zeros(3, bool)))


def test_the_interval_is_by_object():
    """Six copies of each image are no more evidence than one."""
    chance = np.random.default_rng(3)
    positive = np.arange(60) < 30
    scores = chance.normal(size=60) + positive
    objects = [str(number) for number in range(60)]
    alone = auroc_by_object(scores, positive, objects)
    copied = auroc_by_object(np.tile(scores, 6), np.tile(positive, 6), objects * 6)
    images = auroc_by_object(np.tile(scores, 6), np.tile(positive, 6), [str(k) for k in range(360)])
    assert alone == pytest.approx(copied) and alone[0] < auroc(scores, positive) < alone[1]
    assert images[1] - images[0] < 0.6 * (copied[1] - copied[0])
    assert alone == auroc_by_object(scores, positive, objects)


# Separation of images


def test_figures_agree_with_their_definitions():
    chance = np.random.default_rng(0)
    scores = chance.integers(0, 12, 60).astype(float)  # many ties
    anomalous = chance.random(60) < 0.3
    figures = separation(scores, anomalous)
    a, b = scores[anomalous], scores[~anomalous]
    assert figures["auroc"][0] == pytest.approx(((a[:, None] > b) + 0.5 * (a[:, None] == b)).mean())
    limits = sorted(set(scores), reverse=True)
    steps = [((a >= t).mean(), (a >= t).sum() / (scores >= t).sum(), (b >= t).mean()) for t in limits]
    recalls = [0.0, *(recall for recall, _, _ in steps)]
    assert figures["auprc"] == pytest.approx(
        sum((r - before) * p for (r, p, _), before in zip(steps, recalls, strict=False))
    )
    assert figures["fpr95"] == pytest.approx(next(false for recall, _, false in steps if recall >= 0.95))
    assert figures["prevalence"] == anomalous.mean()
    assert separation(-scores, anomalous)["auroc"][0] == pytest.approx(1 - figures["auroc"][0])
    apart = separation(anomalous * 1.0, anomalous)
    assert (apart["auroc"][0], apart["auprc"], apart["fpr95"]) == (1, 1, 0)


@pytest.mark.parametrize(("truth", "normal", "anomalous"), [(0.998, 50, 50), (0.76, 200, 15)])
def test_intervals_of_auroc_cover_the_truth(truth, normal, anomalous):
    """Two unit normals. A bootstrap would cover only 68 to 76 % at .998. At 1 there is a width: of 50 of 50, Wilson's
    interval of a share begins at .929."""
    low, high = auroc_interval(1.0, 50, 50)
    assert 0.93 < low < 0.97 and auroc_interval(0.0, 50, 50) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    chance, inside, rounds = np.random.default_rng(1), 0, 60
    apart = math.sqrt(2) * NormalDist().inv_cdf(truth)
    for _ in range(rounds):
        scores = np.concatenate([chance.normal(size=normal), chance.normal(apart, size=anomalous)])
        _, low, high = separation(scores, np.arange(len(scores)) >= normal)["auroc"]
        inside += low <= truth <= high
    assert inside >= 0.9 * rounds
