"""SSIM, precision and recall against their definitions, and the feature space of distances."""

from __future__ import annotations

import pytest
import torch
from givens.stripes import write_set
from optional import needs_torchmetrics

from pipelines.images import load_images
from pipelines.metrics.agreement import agreement, nearest_label
from pipelines.metrics.quality import (
    FEATURES,
    LONGEST_SIDE,
    Classifier,
    accuracy,
    compare_samples,
    feature_space,
    fixed_permutation,
    neighbourhoods,
    ssim,
    train_classifier,
)


def gaussian(count, dim, seed=0, scale=1.0):
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# SSIM


def test_ssim_of_small_images_is_one_for_the_same_and_falls_with_noise():
    images = torch.rand(3, 1, 5, 4) * 1.6 - 0.8
    noise = torch.randn_like(images)
    found = torch.stack([ssim(images, images + scale * noise) for scale in (0, 0.02, 0.05, 0.1, 0.3)])
    torch.testing.assert_close(found[0], torch.ones(3))
    assert (found.diff(dim=0) < 0).all() and float(found.min()) > -1


def test_ssim_of_flat_areas_is_never_above_one():
    """Flat images one grey level apart, for which variances cancel."""
    levels = torch.arange(256).reshape(-1, 1, 1, 1) / 127.5 - 1
    flat = levels.expand(256, 1, 16, 16)
    light, other = (flat[:, 0, 0, 0] + 1) / 2, (flat[:, 0, 0, 0] + 1) / 2 + 1 / 255
    found = ssim(flat, flat + 1 / 127.5)
    expected = (2 * light * other + 1e-4) / (light**2 + other**2 + 1e-4)
    torch.testing.assert_close(found, expected, atol=2e-7, rtol=0)
    assert float(found.max()) <= 1


@needs_torchmetrics
@pytest.mark.parametrize("shape", [(3, 20, 13)])
def test_ssim_is_torchmetrics_ssim_within_the_image(shape):
    """torchmetrics also averages windows that reach beyond the border; Wang et al. do not."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    images = (torch.randn(4, *shape) * 0.5).clamp(-1, 1)
    others = (images + 0.2 * torch.randn_like(images)).clamp(-1, 1)
    pair = ((others + 1) / 2, (images + 1) / 2)
    _, full = structural_similarity_index_measure(*pair, data_range=1.0, return_full_image=True)
    torch.testing.assert_close(ssim(images, others), full[..., 5:-5, 5:-5].flatten(1).mean(1), atol=1e-5, rtol=1e-5)


# Precision and recall


def test_precision_and_recall_are_those_of_their_definition():
    real, fake = gaussian(60, 4), gaussian(60, 4, 1, 1.4) + 0.5

    def share_inside(rows, centres):
        radii = [sorted(float((row - other).norm()) for other in centres)[3] for row in centres]
        inside = [any((row - c).norm() <= r for c, r in zip(centres, radii, strict=True)) for row in rows]
        return sum(inside) / len(rows)

    found = neighbourhoods(real, fake)
    assert found == {"precision": share_inside(fake, real), "recall": share_inside(real, fake)}
    assert 0 < found["precision"] < 1 and 0 < found["recall"] < 1
    for counts in ((20, 30), (3, 3)):
        with pytest.raises(ValueError, match="rows"):
            neighbourhoods(*(gaussian(count, 3, count) for count in counts))


def test_nearest_label_is_that_of_brute_force():
    images, known = gaussian(40, 12).reshape(40, 3, 2, 2).float(), gaussian(300, 12, 1).reshape(300, 3, 2, 2).float()
    labels = torch.arange(300) % 7
    nearest = (images[:, None] - known).flatten(2).norm(dim=2).argmin(1)
    assert torch.equal(nearest_label(images, known, labels), labels[nearest])
    right = torch.where(torch.arange(40) < 10, labels[nearest], -1)
    assert agreement(torch.arange(40).split(16), images.__getitem__, right, known, labels) == 0.25


# The feature space


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (4, 40)), (3, (300, 20))])
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


def test_without_labels_features_are_random_convolutions(tmp_path):
    config = write_set(tmp_path)
    unlabelled, one = config.model_copy(update={"label_column": None}), write_set(tmp_path / "one", classes=1)
    for images in map(load_images, (unlabelled, one)):
        space = feature_space(images.train, images.held_out, 30, "stripes")
        assert space.name == "random-conv-64" and "random weights" in space.origin
    labelled = load_images(config)
    assert feature_space(labelled.train, labelled.held_out, 0, "stripes").name == "random-conv-64"


def test_comparison_ranks_copies_first(tmp_path):
    images = load_images(write_set(tmp_path, per_class=40))
    space = feature_space(images.train, images.held_out, 0, "stripes")
    copied = fixed_permutation(len(images.train))[:40]
    samples = images.held_out.batch(fixed_permutation(len(images.held_out))).clone()
    samples[40:] = images.train.batch(copied)
    figures, order, originals = compare_samples(
        space, space(samples), images.train, images.held_out, lambda batch: batch
    )
    assert figures["num_compared"] == 80 == len(order) == len(originals)
    assert set(order[:40].tolist()) == set(range(40, 80))
    assert torch.equal(originals[:40], copied[order[:40] - 40])
    for name in ("frechet_distance", "precision", "recall"):  # reconstructions are the images
        assert figures[f"reconstruction_{name}"] == pytest.approx(figures[f"train_{name}"])
    assert figures["frechet_distance"] < figures["train_frechet_distance"]
    known = space.of(images.train, torch.arange(len(images.train)))
    for key, rows in (("", space(samples)), ("held_out_", space.of(images.held_out, torch.arange(80)))):
        nearest = (rows[:, None] - known).norm(dim=2).min(1).values
        assert figures[f"{key}nearest_distance"] == pytest.approx(float(nearest.median()))
