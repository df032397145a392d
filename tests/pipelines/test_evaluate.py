"""`smalti evaluate`: its figures in files, in print and on the card, and what is left out where it cannot be had."""

from __future__ import annotations

import copy
import hashlib
import json

import numpy as np
import pytest
import torch
from givens.striped_sets import write_set
from optional import needs_torch_fidelity
from PIL import Image
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.images import load_images
from pipelines.metrics.figures import rows_of
from pipelines.tokens import TokenDataset, TokenSplit
from prior import Prior

COMPARED = {
    f"{of}{name}" for of in ("", "train_", "reconstruction_") for name in ("frechet_distance", "precision", "recall")
} | {"feature_space", "feature_origin", "num_compared", "nearest_distance", "held_out_nearest_distance"}
BITS = {"bits_per_dim", "bits_per_dim_error", "prior_bits_per_dim", "pixel_bits_per_dim"}
CLASSES = {"class_agreement", "real_class_agreement", "reconstruction_class_agreement"}


def save_pipeline(root, config, tokenizer="vqvae", prior="marginal", num_classes=2, **facts):
    """A small pipeline for these images, untrained."""
    channels, height, width = config.image_shape
    settings = {"num_classes": num_classes, **({"exact": False} if prior == "masked" else {})}
    pipe = make_pipeline(tokenizer, prior, channels, size=(height, width), labels=[], **settings)
    pipe.provenance = {"data": config.model_dump(mode="json"), **facts}
    pipe.save_pretrained(root / "pipeline")
    return pipe


def evaluate(root, *options):
    main(["evaluate", f"pipeline={root}/pipeline", "feature_steps=3", "overwrite=true", *options])
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
    figures, text, card = evaluate(tmp_path, "num_images=30")
    assert text.strip() in capsys.readouterr().out
    optional = (BITS if tokenizer == "pixels" else set()) | (CLASSES if num_classes else set())
    assert COMPARED | {"psnr", "ssim"} | optional <= set(figures)
    assert not ((BITS | CLASSES) - optional | {"fid"}) & set(figures)
    held_out = len(load_images(config).held_out)
    assert (figures["num_compared"], figures["num_images"], figures["ssim_images"]) == (30, held_out, held_out)
    rows = rows_of(figures, exact=pipe.prior.exact)
    assert len(text.splitlines()) == len(rows) >= 9
    for row in rows:
        assert all(part in text for part in (row.title, row.value, row.beside))
        assert row.title in card and f"| {row.value} | {row.beside} |" in card
    bound = "at most " if prior == "masked" else ""
    assert f"{bound}{figures['bits_per_token']:.3f}" in text
    with Image.open(tmp_path / "evaluation" / "nearest.png") as picture:
        assert picture.width > picture.height > 0


def test_bits_per_dim_is_the_pipelines(tmp_path):
    config = write_set(tmp_path / "images")
    pipe = save_pipeline(tmp_path, config, "pixels", "made", 2)
    held_out = load_images(config).held_out
    bits = pipe.bits_per_dim(held_out.batch(range(len(held_out))), held_out.labels.tolist()).double()
    figures, _, _ = evaluate(tmp_path, "num_images=0")
    assert figures["bits_per_dim"] == pytest.approx(float(bits.mean()), rel=1e-6)
    assert figures["bits_per_dim"] == pytest.approx(figures["prior_bits_per_dim"] + figures["pixel_bits_per_dim"])
    assert figures["bits_per_dim_error"] == pytest.approx(float(bits.std()) / len(bits) ** 0.5, rel=0.05)


@pytest.mark.parametrize("options", [["num_images=9"], ["num_images=0"], ["data.limit=9"]])
def test_too_few_images_are_not_compared(tmp_path, capsys, options):
    save_pipeline(tmp_path, write_set(tmp_path / "images"))
    figures, text, card = evaluate(tmp_path, *options)
    assert not COMPARED & set(figures) and "Frechet" not in text + card
    assert "samples are not compared" in capsys.readouterr().out
    assert ("samples_per_second" in figures) == (options != ["num_images=0"])
    assert not (tmp_path / "evaluation" / "nearest.png").exists()


def test_samples_have_the_classes_of_the_training_images(tmp_path, monkeypatch):
    """Three in four training images are of one class, and so should samples be."""
    config = write_set(tmp_path / "images")
    for path in sorted((tmp_path / "images" / "train" / "kind1").iterdir())[13:]:
        path.unlink()
    save_pipeline(tmp_path, config)
    asked, call = {}, ImagePipeline.__call__

    def watched(self, num_images=None, labels=None, *, seed, **kwargs):
        asked[seed] = labels
        return call(self, num_images, labels, seed=seed, **kwargs)

    monkeypatch.setattr(ImagePipeline, "__call__", watched)
    evaluate(tmp_path, "num_images=106", "update_card=false", "seed=5")
    assert [(seed, len(labels)) for seed, labels in asked.items()] == [(5, 64), (69, 42)]  # sample k has seed + k
    assert np.bincount(asked[5] + asked[69]).tolist() == [80, 26]


@needs_torch_fidelity
def test_fid_is_taken_with_inception_weights_alone(tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3

    class Net(torch.nn.Module):
        def __init__(self, name, features, path):
            super().__init__()
            assert (name, features, path) == ("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))

        def forward(self, images):
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 12)
            corner = images.float()[:, 0, :2, :3].flatten(1) / 20
            return corner, corner

    save_pipeline(tmp_path, write_set(tmp_path / "images"))
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"right")
    monkeypatch.setattr(feature_extractor_inceptionv3, "FeatureExtractorInceptionV3", Net)
    with pytest.raises(SystemExit):
        evaluate(tmp_path, f"inception_weights={weights}")
    assert not (tmp_path / "evaluation").exists()
    monkeypatch.setattr("pipelines.metrics.fid.SHA256", hashlib.sha256(b"right").hexdigest())
    figures, text, card = evaluate(tmp_path, f"inception_weights={weights}", "num_images=30")
    assert figures["fid"] > figures["train_fid"] > 0 and figures["rfid"] > 0 and figures["inception_score"] > 1
    for name in ("fid", "rfid", "inception_score"):  # beside each figure, how it was taken
        assert (
            f"{figures[name]:.2f}" in card
            and figures[f"{name}_protocol"] in text
            and figures[f"{name}_protocol"] in card
        )


# The baseline of position frequencies


def bits_of_frequencies(grid, train, test, num_classes):
    """Bits per token of `Marginal` fitted to the tokens and labels of training images."""
    prior = Prior.create("marginal", grid=grid, num_classes=num_classes)
    prior.initialize(train.tokens, train.labels if num_classes else None)
    nats = prior.log_prob(test.tokens.long(), test.labels if num_classes else None).double()
    return -float(nats.detach().mean()) / np.log(2) / len(grid)


def split_of(pipe, images):
    return TokenSplit(pipe.encode(images.batch(range(len(images)))), images.labels)


def test_position_frequencies_are_those_of_the_token_dataset_that_the_prior_was_trained_on(
    tmp_path, monkeypatch, capsys
):
    config, tokens = write_set(tmp_path / "images"), tmp_path / "tokens"
    pipe = save_pipeline(tmp_path, config, tokens=str(tokens))
    images, grid = load_images(config), pipe.prior.grid
    train, test = (split_of(pipe, part) for part in (images.train, images.held_out))
    few = TokenSplit(train.tokens[:9], train.labels[:9])

    def bits(*options):
        figures, _, _ = evaluate(tmp_path, "num_images=0", "update_card=false", *options)
        return figures["marginal_bits_per_token"], figures["marginal_rows"], figures.get("marginal_note")

    sampled = pytest.approx(bits_of_frequencies(grid, train, test, 2), rel=1e-6), len(train), None
    assert bits() == sampled  # there is no such dataset: training images are encoded
    monkeypatch.setattr("pipelines.evaluate.MOST_TRAINING", 20)
    assert bits()[1] == 20
    names = [images.train.class_names[k] for k in range(2)]
    TokenDataset(grid, names, {"train": few, "test": test}, pipe.tokenizer, {}).save(tokens)
    assert bits() == (pytest.approx(bits_of_frequencies(grid, few, test, 2), rel=1e-6), 9, None)
    other = copy.deepcopy(pipe.tokenizer)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    TokenDataset(grid, names, {"train": few, "test": test}, other, {}).save(tmp_path / "other")
    with pytest.raises(SystemExit):
        bits(f"tokens={tmp_path / 'other'}")
    assert "error: tokens: " in capsys.readouterr().err
    # Where a table of all classes would be too large, it is of all together, or not at all.
    size = len(grid) * grid.vocab_size
    monkeypatch.setattr("pipelines.metrics.likelihood.TABLE", 3 * size - 1)
    value, _, note = bits()
    assert value == pytest.approx(bits_of_frequencies(grid, few, test, 0), rel=1e-6) and note
    monkeypatch.setattr("pipelines.metrics.likelihood.TABLE", size - 1)
    assert "marginal_bits_per_token" not in evaluate(tmp_path, "num_images=0")[0]
