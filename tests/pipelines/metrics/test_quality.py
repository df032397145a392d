"""Distances between sets of images: closed forms, extremes, chance, and the verb that prints them.

Covers: pipelines/evaluate.py, pipelines/metrics/agreement.py.
"""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small import make_prior, make_tokenizer

from pipelines import ImagePipeline
from pipelines import evaluate as evaluation
from pipelines.__main__ import main
from pipelines.evaluate import EvaluateConfig, evaluate_samples
from pipelines.images import DataConfig, load_images
from pipelines.metrics.quality import (
    FEATURES,
    LEAST,
    LONGEST_SIDE,
    Classifier,
    accuracy,
    compare,
    copying,
    feature_space,
    frechet_distance,
    nearest_rows,
    neighbourhoods,
    shuffled,
    ssim,
    train_classifier,
)
from pipelines.stages.card import COUNTS, FIGURES

needs_torchmetrics = pytest.mark.skipif(find_spec("torchmetrics") is None, reason="torchmetrics is not installed")


def gaussian(count, dim, seed=0, scale=1.0):
    return scale * torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows_with(mean, covariance, count=50, seed=0):
    """Rows whose sample mean and covariance are exactly these."""
    rows = gaussian(count, len(mean), seed)
    rows = rows - rows.mean(0)
    white = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.t() @ rows / (count - 1))).t()
    return white @ torch.linalg.cholesky(covariance).t() + mean


def random_covariance(dim, seed):
    factor = gaussian(2 * dim, dim, seed)
    return factor.t() @ factor / dim


def square_root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.t()


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


@pytest.mark.parametrize("dim", [1, 4, 30])
def test_frechet_distance_of_known_gaussians(dim):
    means, covariances = gaussian(2, dim, 1), [random_covariance(dim, seed) for seed in (2, 3)]
    a, b = (rows_with(mean, cov, seed=seed) for seed, (mean, cov) in enumerate(zip(means, covariances, strict=True)))
    root = square_root(covariances[0])
    cross = square_root(root @ covariances[1] @ root).trace()
    expected = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(9 * dim, rel=1e-9)
    assert frechet_distance(a, 2 * (a - means[0]) + means[0]) == pytest.approx(float(covariances[0].trace()), rel=1e-9)


@pytest.mark.parametrize("count", [2, 10, 64, 300])
def test_frechet_distance_to_itself_is_zero(count):
    """With fewer rows than features the covariance is singular, and nothing may be lost for that."""
    rows = gaussian(count, 64, scale=10)
    assert abs(frechet_distance(rows, rows)) < 1e-8 and abs(frechet_distance(rows, rows.flip(0))) < 1e-8
    assert abs(frechet_distance(rows.float(), rows.float())) < 1e-6


@needs_torchmetrics
def test_frechet_distance_is_torchmetrics_with_our_features():
    from torchmetrics.image.fid import FrechetInceptionDistance

    net = torch.nn.Flatten()
    net.num_features = 16  # type: ignore[assignment]
    metric = FrechetInceptionDistance(net, normalize=True)
    a, b = gaussian(100, 16, 0).reshape(-1, 1, 4, 4), gaussian(80, 16, 1, 1.3).reshape(-1, 1, 4, 4)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a.flatten(1), b.flatten(1)) == pytest.approx(float(metric.compute()), rel=1e-9)


def test_frechet_bias_falls_with_the_number_of_rows():
    """Of the same distribution, and yet not 0: hence equally many on both sides, and the row of training images."""
    found = [frechet_distance(gaussian(n, 32, 2 * n), gaussian(n, 32, 2 * n + 1)) for n in (100, 200, 400, 800, 3200)]
    assert all(more > 1.6 * fewer > 0 for more, fewer in zip(found, found[1:], strict=False))


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


def write_set(root, shape=(8, 12), channels=1, per_class=20, classes=2):
    """Light stripes, upright or lying, of random phase, in noise."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 2 * per_class), ("test", per_class)):
        for label in range(classes):
            for number in range(count):
                along = np.arange(shape[1 - label % 2]) + chance.integers(4)
                stripes = 200 * (along // 2 % 2)
                image = np.broadcast_to(stripes if label % 2 == 0 else stripes[:, None], shape)
                image = image[..., None] + chance.integers(0, 50, (*shape, channels))
                path = root / split / f"kind{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.squeeze().astype(np.uint8)).save(path)
    return DataConfig(source=str(root), image_size=shape, channels=channels)


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
    figures, suspects, originals = compare(space, samples, images.train, images.held_out, lambda batch: batch)
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


# The verb

KEYS = {
    "feature_space",
    "feature_origin",
    "num_compared",
    "nearest_ratio",
    "nearest_share",
    "copying_z",
    "reconstruction_copying_z",
    "samples_per_second",
    *(
        f"{of}{name}"
        for of in ("", "train_", "reconstruction_")
        for name in ("frechet_distance", "precision", "recall", "density", "coverage")
    ),
}
BITS = {"bits_per_dim", "bits_per_dim_error", "prior_bits_per_dim", "pixel_bits_per_dim"}
CLASSES = {"class_agreement", "real_class_agreement", "reconstruction_class_agreement"}


def save_pipeline(root, config, tokenizer, prior, num_classes):
    """A small pipeline for these images, untrained."""
    channels, height, width = config.image_shape
    model = make_tokenizer(tokenizer, (height, width), channels).eval()
    settings = {
        "num_classes": num_classes,
        "tokenizer": model.fingerprint(),
        **({"exact": False} if prior == "masked" else {}),
    }
    pipe = ImagePipeline(model, make_prior(prior, model.grid.shape, model.grid.vocab_size, **settings))
    pipe.provenance = {"data": config.model_dump(mode="json")}
    pipe.save_pretrained(root / "pipeline")
    return pipe


def evaluate(root, *options):
    main(["evaluate", f"pipeline={root}/pipeline", "feature_steps=3", *options])
    folder = root / "evaluation"
    card = (root / "pipeline" / "README.md").read_text()
    return json.loads((folder / "evaluation.json").read_text()), (folder / "evaluation.txt").read_text(), card


@pytest.mark.parametrize(
    ("tokenizer", "prior", "shape", "channels", "num_classes"),
    [
        ("vqvae", "marginal", (8, 12), 3, 2),
        ("pixels", "masked", (4, 4), 1, 2),
        ("pixels", "made", (8, 6), 1, 0),
        ("palette", "marginal", (12, 8), 3, 0),
    ],
)
def test_all_figures_are_written_printed_and_on_the_card(
    tmp_path, capsys, tokenizer, prior, shape, channels, num_classes
):
    config = write_set(tmp_path / "images", shape, channels)
    pipe = save_pipeline(tmp_path, config, tokenizer, prior, num_classes)
    figures, text, card = evaluate(tmp_path, "num_samples=30")
    assert text.strip() in capsys.readouterr().out
    expected = KEYS | {"ssim"} | (BITS if tokenizer == "pixels" else set()) | (CLASSES if num_classes else set())
    assert expected <= set(figures) and not (BITS | CLASSES | {"fid"}) - expected & set(figures)
    assert figures["num_compared"] == 30 and figures["feature_space"] == "classifier-64"
    for name in ("frechet_distance", "train_frechet_distance", "precision", "recall", "density", "coverage"):
        assert f"{figures[name]:.3f}" in text
    assert "Frechet distance [classifier-64]" in text and "FID" not in text + card and figures["feature_origin"] in text
    for name in expected & set(FIGURES):
        value = figures[name]
        label = FIGURES[name].format(space="classifier-64")
        bound = "at most " * (name in ("bits_per_dim", "prior_bits_per_dim") and not pipe.prior.exact)
        count = figures.get(COUNTS.get(name, ""))
        of = f", of {count:,}" if count else ""
        assert f"| {label} | {bound}{value if isinstance(value, str) else format(value, '.4g')}{of} |" in card
    held_out = len(load_images(config).held_out)
    assert figures["num_images"] == held_out == figures["ssim_images"] and f"{held_out} images" in text
    assert f"| {FIGURES['psnr']} | {figures['psnr']:.4g}, of {held_out} |" in card
    assert ("order_spread" in figures) == pipe.prior.any_order == ("spread over orders" in text)
    if num_classes:
        assert (figures["num_samples"], figures["class_agreement_images"]) == (30, held_out)
    if tokenizer == "pixels":
        assert figures["bits_per_dim"] == pytest.approx(figures["prior_bits_per_dim"] + figures["pixel_bits_per_dim"])
        assert ("<= " if not pipe.prior.exact else "") + f"{figures['bits_per_dim']:.3f}" in text
    else:
        assert "this decoder has no likelihood" in text and "bits per dim" not in card
    with Image.open(tmp_path / "evaluation" / "nearest.png") as picture:
        assert picture.width > picture.height > 0


def test_bits_per_dim_is_the_pipelines(tmp_path):
    config = write_set(tmp_path / "images")
    pipe = save_pipeline(tmp_path, config, "pixels", "made", 2)
    held_out = load_images(config).held_out
    bits = pipe.bits_per_dim(held_out.batch(range(len(held_out))), held_out.labels.tolist()).double()
    figures, _, _ = evaluate(tmp_path, "num_samples=0")
    assert figures["bits_per_dim"] == pytest.approx(float(bits.mean()), rel=1e-6)
    assert figures["bits_per_dim_error"] == pytest.approx(float(bits.std()) / len(bits) ** 0.5, rel=0.05)


def test_figures_of_some_images_say_of_how_many(tmp_path, monkeypatch):
    config = write_set(tmp_path / "images")
    pipe = save_pipeline(tmp_path, config, "pixels", "masked", 2)
    held_out = load_images(config).held_out
    monkeypatch.setattr("pipelines.evaluate.SOME", 7)
    monkeypatch.setattr("pipelines.metrics.likelihood.FEW", 5)
    figures, text, card = evaluate(tmp_path, "num_samples=20")
    counts = {name: figures[name] for name in set(COUNTS.values())}
    assert counts == {
        "num_images": len(held_out),
        "ssim_images": 7,
        "class_agreement_images": 7,
        "num_samples": 20,
        "order_spread_images": 5,
    }
    lines = {line.split("  ")[0].strip() or line.split("  ")[1]: line for line in text.splitlines()}
    assert "7 images" in lines["SSIM"] and "5 images" in lines["spread over orders"]
    assert "of 20 samples; 7 real held-out images" in lines["class agreement"]
    assert f", of {len(held_out)} |" in card and ", of 7 |" in card and ", of 20 |" in card and ", of 5 |" in card
    some = shuffled(len(held_out))[:5]
    spread = pipe.prior.order_spread(pipe.encode(held_out.batch(some)), held_out.labels[some])
    assert figures["order_spread"] == pytest.approx(float(spread.detach().double().mean()), rel=1e-6)


def test_the_clock_waits_for_the_last_image(tmp_path, monkeypatch):
    """On a GPU, a call returns before its work is done: it is when its result is fetched."""
    config = write_set(tmp_path / "images")
    pipe = save_pipeline(tmp_path, config, "vqvae", "marginal", 0)
    clock = [0.0]

    class Late(torch.Tensor):
        """Images that are ready, ten seconds later, on whatever asks for them on the CPU."""

        def cpu(self):
            clock[0] += 10.0
            return self.as_subclass(torch.Tensor)

    monkeypatch.setattr("pipelines.evaluate.time.monotonic", lambda: clock[0])
    drawn = torch.zeros(20, *config.image_shape).as_subclass(Late)
    monkeypatch.setattr(ImagePipeline, "__call__", lambda self, **_: SimpleNamespace(images=drawn))
    monkeypatch.setattr("pipelines.evaluate.LEAST", 1000)
    asked = EvaluateConfig(pipeline="", data=config, num_samples=20)
    figures, _ = evaluate_samples(pipe, load_images(config), asked, None)
    assert figures["samples_per_second"] == 2.0


def test_the_report_names_the_device_that_was_measured(tmp_path, monkeypatch):
    """It is made before the weights go to the CPU, for the card."""
    save_pipeline(tmp_path, write_set(tmp_path / "images"), "vqvae", "marginal", 2)
    events, to, report = [], ImagePipeline.to, evaluation.report
    monkeypatch.setattr(ImagePipeline, "to", lambda self, **place: (events.append("moved"), to(self, **place))[1])

    def reported(*given, **more):
        events.append("reported")
        return report(*given, **more)

    monkeypatch.setattr(evaluation, "report", reported)
    evaluate(tmp_path, "num_samples=5")
    assert events[-2:] == ["reported", "moved"]


@pytest.mark.parametrize("options", [["num_samples=9"], ["num_samples=0"], ["data.limit=9"]])
def test_too_few_images_are_said_and_not_compared(tmp_path, options):
    config = write_set(tmp_path / "images")
    save_pipeline(tmp_path, config, "vqvae", "marginal", 2)
    figures, text, card = evaluate(tmp_path, *options)
    assert not {"frechet_distance", "precision", "copying_z", "feature_space"} & set(figures)
    assert f"needs {LEAST} samples, training images and held-out images" in text and "Frechet" not in card
    assert ("samples_per_second" in figures) == (options != ["num_samples=0"])
    assert not (tmp_path / "evaluation" / "nearest.png").exists()


def test_samples_have_the_classes_of_the_training_images(tmp_path, monkeypatch):
    """Three in four training images are of one class, and so should samples be."""
    config = write_set(tmp_path / "images")
    for path in sorted((tmp_path / "images" / "train" / "kind1").iterdir())[13:]:
        path.unlink()
    save_pipeline(tmp_path, config, "vqvae", "marginal", 2)
    asked, call = [], ImagePipeline.__call__

    def watched(self, num_images=None, labels=None, **kwargs):
        asked.append(labels)
        return call(self, num_images, labels, **kwargs)

    monkeypatch.setattr(ImagePipeline, "__call__", watched)
    evaluate(tmp_path, "num_samples=106", "update_card=false")
    assert np.bincount(asked[-1]).tolist() == [80, 26]


def test_fid_wants_its_packages_and_its_weights(tmp_path, capsys, monkeypatch):
    """And says so before the work: another file's distances are no FID, and would be unpickled."""
    save_pipeline(tmp_path, write_set(tmp_path / "images"), "vqvae", "marginal", 2)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"other")
    for found, message in (
        (None, "FID needs torchmetrics and torch_fidelity: pip install"),
        (
            True,
            f"{weights} is not torch-fidelity's weights-inception-2015-12-05-6726825d.pth (its "
            "sha256 begins with d9298a10)",
        ),
    ):
        monkeypatch.setattr("pipelines.metrics.quality.find_spec", lambda name, found=found: found)
        with pytest.raises(SystemExit):
            evaluate(tmp_path, f"inception_weights={weights}")
        assert message in capsys.readouterr().err
    assert not (tmp_path / "evaluation").exists()


@needs_torchmetrics
def test_fid_is_taken_with_inception_weights_alone(tmp_path, monkeypatch):
    import torchmetrics.image.fid

    seen = []

    class Net(torch.nn.Module):
        def __init__(self, name, features, path):
            super().__init__()
            seen.append((name, features, path))

        def forward(self, images):
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 12)
            return images.float().mean((2, 3)) / 100

    save_pipeline(tmp_path, write_set(tmp_path / "images"), "vqvae", "marginal", 2)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"right")
    monkeypatch.setattr("pipelines.metrics.quality.find_spec", lambda name: True)
    monkeypatch.setattr("pipelines.metrics.quality.INCEPTION_SHA256", hashlib.sha256(b"right").hexdigest())
    monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", Net)
    figures, text, card = evaluate(tmp_path, f"inception_weights={weights}", "num_samples=30")
    assert seen == [("inception-v3-compat", ["2048"], str(weights))]
    assert figures["fid"] > figures["train_fid"] > 0 and f"| FID | {figures['fid']:.4g} |" in card
    assert f"{figures['fid']:.2f}  training images {figures['train_fid']:.2f}" in text
