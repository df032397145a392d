"""Distances between sets of images: closed forms, extremes, chance, and the space they are measured in.

Covers: pipelines/metrics/agreement.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from givens.striped_sets import write_set
from optional import needs_torchmetrics

from pipelines.images import load_images
from pipelines.metrics.quality import (
    FEATURES,
    LONGEST_SIDE,
    Classifier,
    accuracy,
    compare,
    copying,
    feature_space,
    nearest_rows,
    neighbourhoods,
    shuffled,
    ssim,
    train_classifier,
)


def gaussian(count, dim, seed=0, scale=1.0):
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# SSIM


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 12, 8), (1, 5, 4), (3, 4, 40)])
def test_ssim_is_one_for_the_same_and_falls_with_noise(shape):
    images = torch.rand(3, *shape) * 1.6 - 0.8
    torch.testing.assert_close(ssim(images, images), torch.ones(3))
    noise = torch.randn_like(images)
    found = torch.stack([ssim(images, images + scale * noise) for scale in (0.02, 0.05, 0.1, 0.3)])
    assert (found.diff(dim=0) < 0).all() and float(found.min()) > -1
    torch.testing.assert_close(ssim(images, images + noise), ssim(images + noise, images))
    alone = torch.cat([ssim(a[None], b[None]) for a, b in zip(images, images + noise, strict=True)])
    torch.testing.assert_close(ssim(images, images + noise), alone)


def test_ssim_of_flat_images_is_that_of_their_light():
    """Equation 6 with variances 0; the constants keep black against black at 1."""
    levels = torch.tensor([0.0, 0.25, 1.0]).reshape(3, 1, 1, 1)
    a, b = (2 * levels.expand(3, 1, 12, 12) - 1), torch.full((3, 1, 12, 12), 0.0)
    expected = (2 * levels * 0.5 + 1e-4) / (levels**2 + 0.25 + 1e-4)
    torch.testing.assert_close(ssim(a, b), expected.flatten(), atol=1e-5, rtol=0)
    torch.testing.assert_close(ssim(a[:1], a[:1]), torch.ones(1))


def test_ssim_of_flat_areas_is_never_above_one():
    """Where variances cancel: flat images a grey level apart, and drawings that are off by a little noise."""
    levels = torch.arange(256).reshape(-1, 1, 1, 1) / 127.5 - 1
    flat = levels.expand(256, 1, 16, 16)
    light, other = (flat[:, 0, 0, 0] + 1) / 2, (flat[:, 0, 0, 0] + 1) / 2 + 1 / 255
    found = ssim(flat, flat + 1 / 127.5)
    assert found.dtype == torch.float32 and float(found.max()) <= 1
    expected = (2 * light * other + 1e-4) / (light**2 + other**2 + 1e-4)
    torch.testing.assert_close(found, expected, atol=2e-7, rtol=0)
    disc = ((torch.arange(64) - 32) ** 2 + (torch.arange(64)[:, None] - 32) ** 2 < 300).expand(20, 3, 64, 64)
    drawings = torch.where(disc, torch.rand(20, 3, 1, 1) * 2 - 1, torch.ones(()))
    noisy = (drawings + 0.01 * torch.randn_like(drawings)).clamp(-1, 1)
    found = ssim(drawings, noisy)
    assert float(found.max()) <= 1
    torch.testing.assert_close(found, ssim(drawings.double(), noisy.double()).float(), atol=1e-7, rtol=0)


@needs_torchmetrics
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 13)])
def test_ssim_is_torchmetrics_ssim_within_the_image(shape):
    """Its mean goes over windows that reach beyond the border too, Wang's own does not."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    images = (torch.randn(4, *shape) * 0.5).clamp(-1, 1)
    others = (images + 0.2 * torch.randn_like(images)).clamp(-1, 1)
    pair = ((others + 1) / 2, (images + 1) / 2)
    _, full = structural_similarity_index_measure(*pair, data_range=1.0, return_full_image=True)
    torch.testing.assert_close(ssim(images, others), full[..., 5:-5, 5:-5].flatten(1).mean(1), atol=1e-5, rtol=1e-5)


# Frechet distance


# Precision, recall, density, coverage


def test_the_same_set_is_perfect():
    rows = gaussian(200, 8)
    found = neighbourhoods(rows, rows[torch.randperm(200)])
    assert found["precision"] == found["recall"] == found["coverage"] == 1.0
    # Each row lies in its own ball and in those of the rows whose fifth neighbour is no nearer: 6 of 5 on average.
    assert found["density"] == pytest.approx(6 / 5, abs=1e-9)


def test_disjoint_sets_share_nothing():
    found = neighbourhoods(gaussian(100, 8), gaussian(100, 8, 1) + 100)
    assert set(found.values()) == {0.0}


def test_samples_spread_too_wide_have_recall_alone():
    found = neighbourhoods(gaussian(1000, 64, 0), gaussian(1000, 64, 1, 1.6))
    assert found["recall"] > 0.99 and found["precision"] < 0.02 and found["coverage"] < 0.02


def test_samples_all_alike_have_precision_alone():
    real = gaussian(300, 4)
    fake = real[real.norm(dim=1).argmin()] + 1e-3 * gaussian(300, 4, 1)
    found = neighbourhoods(real, fake)
    assert found["precision"] == 1.0 and found["recall"] < 0.02 and found["coverage"] < 0.1 and found["density"] > 1


def test_what_chance_makes_of_neighbourhoods():
    """Coverage of a perfect model is 1 - 2^-5: each fifth-nearest real row is as likely as not beaten; density is 1."""
    draws = [neighbourhoods(gaussian(500, 16, 2 * k), gaussian(500, 16, 2 * k + 1)) for k in range(6)]
    mean = {name: np.mean([draw[name] for draw in draws]) for name in draws[0]}
    assert mean["coverage"] == pytest.approx(1 - 2**-5, abs=0.02) and mean["density"] == pytest.approx(1, abs=0.1)
    assert mean["precision"] == pytest.approx(mean["recall"], abs=0.05)


def test_neighbourhoods_want_equal_sizes():
    for counts in ((20, 30), (5, 5)):
        with pytest.raises(ValueError, match="equally many rows, more than 5"):
            neighbourhoods(*(gaussian(count, 3, count) for count in counts))


def test_nearest_is_the_nearest():
    rows, others = gaussian(600, 5), gaussian(30, 5, 1)
    distances = (rows[:, None] - others).norm(dim=2)
    found, indices = nearest_rows(rows, others, 3)
    torch.testing.assert_close(found, distances.sort(dim=1).values[:, :3])
    assert torch.equal(indices[:, 0], distances.argmin(1))
    assert float(nearest_rows(others, others)[0].max()) == 0.0


# Copies


def distances_to_training(rows, dim=16):
    return nearest_rows(rows, gaussian(2000, dim, 99))[0][:, 0]


@pytest.mark.parametrize("seed", range(3))
def test_fresh_samples_are_no_copies(seed):
    held_out, fresh = (distances_to_training(gaussian(500, 16, 2 * seed + k)) for k in (0, 1))
    found = copying(fresh, held_out)
    assert abs(found["copying_z"]) < 4
    assert found["nearest_ratio"] == pytest.approx(1, abs=0.05) and found["nearest_share"] < 0.04
    assert copying(held_out, fresh)["copying_z"] == pytest.approx(-found["copying_z"])


def test_copies_are_found():
    train = gaussian(2000, 16, 99)
    held_out = distances_to_training(gaussian(500, 16))
    near = copying(distances_to_training(train[:500] + 0.05 * gaussian(500, 16, 7)), held_out)
    assert near["copying_z"] < -10 and near["nearest_share"] == 1.0 and near["nearest_ratio"] < 0.2
    wide = copying(distances_to_training(gaussian(500, 16, 8, 1.6)), held_out)
    assert wide["copying_z"] > 10 and wide["nearest_ratio"] > 1.2 and wide["nearest_share"] == 0.0
    some = torch.cat([train[:50], gaussian(450, 16, 5)])
    assert 0.09 < copying(distances_to_training(some), held_out)["nearest_share"] < 0.15


def test_ties_are_no_evidence():
    zeros = torch.zeros(40)
    assert copying(zeros, zeros)["copying_z"] == 0.0
    steps = torch.arange(40.0) // 10
    assert copying(steps, steps)["copying_z"] == 0.0
    assert copying(steps, steps + 1)["copying_z"] == -copying(steps + 1, steps)["copying_z"] < -3


# The feature space


@pytest.mark.parametrize(
    ("channels", "size"), [(1, (28, 28)), (3, (64, 64)), (1, (8, 8)), (3, (4, 40)), (3, (300, 20))]
)
def test_classifier_takes_images_of_any_shape(channels, size):
    net = Classifier(channels, 3).eval()
    images = torch.rand(2, channels, *size)
    assert net.features(images).shape == (2, FEATURES) and net(images).shape == (2, 3)
    if max(size) > LONGEST_SIDE:
        assert net.body[0](torch.rand(1, channels, 64, 4)).shape[2] == 32


def test_classifier_learns_and_is_a_function_of_the_data(tmp_path):
    images = load_images(write_set(tmp_path, channels=3))
    state = torch.get_rng_state()
    net, again = (train_classifier(images.train, 30) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert accuracy(net, images.held_out) > 0.95 and accuracy(train_classifier(images.train, 0), images.held_out) < 0.9
    space = feature_space(images.train, images.held_out, 30, "stripes")
    assert space.name == "classifier-64" and "30 steps" in space.origin and "stripes" in space.origin
    assert f"accuracy {accuracy(net, images.held_out):.1%}" in space.origin
    rows = space.of(images.train, torch.arange(len(images.train)))
    assert rows.dtype == torch.float64 and float(rows.var(0, correction=0).mean()) == pytest.approx(1)


def test_features_do_not_depend_on_labels_where_there_are_none(tmp_path):
    config = write_set(tmp_path)
    unlabelled, one = config.model_copy(update={"label_column": None}), write_set(tmp_path / "one", classes=1)
    for images in map(load_images, (unlabelled, one)):
        space = feature_space(images.train, images.held_out, 30, "stripes")
        assert space.name == "random-conv-64" and "random weights" in space.origin
    labelled = load_images(config)
    assert feature_space(labelled.train, labelled.held_out, 0, "stripes").name == "random-conv-64"


def test_comparison_knows_copies_from_samples(tmp_path):
    images = load_images(write_set(tmp_path, per_class=40))
    space = feature_space(images.train, images.held_out, 0, "stripes")
    copied = shuffled(len(images.train))[:40]
    samples = images.held_out.batch(shuffled(len(images.held_out))).clone()
    samples[40:] = images.train.batch(copied)
    figures, suspects, originals = compare(space, space(samples), images.train, images.held_out, lambda batch: batch)
    assert figures["num_compared"] == 80 == len(suspects) == len(originals)
    assert set(suspects[:40].tolist()) == set(range(40, 80))
    assert torch.equal(originals[:40], copied[suspects[:40] - 40])
    for name in ("frechet_distance", "precision", "recall", "density", "coverage"):  # reconstructions are the images
        assert figures[f"reconstruction_{name}"] == pytest.approx(figures[f"train_{name}"])
    assert figures["reconstruction_copying_z"] == 0.0 and figures["nearest_share"] >= 0.5 and figures["copying_z"] < -3
    assert figures["frechet_distance"] < figures["train_frechet_distance"]


def test_a_permutation_is_a_permutation():
    assert torch.equal(shuffled(100), shuffled(100)) and sorted(shuffled(100).tolist()) == list(range(100))
    assert not torch.equal(shuffled(100), torch.arange(100))
