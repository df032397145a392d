"""`smalti evaluate`: its figures in files, in print and on the card, and what is said where some cannot be had."""

from __future__ import annotations

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
from pipelines import evaluate as evaluation
from pipelines.__main__ import main
from pipelines.card import COUNTS, FIGURES
from pipelines.images import load_images
from pipelines.metrics.quality import LEAST, shuffled
from prior import Prior

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
LOOKS = {"ssim", "texture_flat", "texture_grid", "texture_white", "texture_background"}
BITS = {"bits_per_dim", "bits_per_dim_error", "prior_bits_per_dim", "pixel_bits_per_dim"}
CLASSES = {"class_agreement", "real_class_agreement", "reconstruction_class_agreement"}


def save_pipeline(root, config, tokenizer, prior, num_classes):
    """A small pipeline for these images, untrained."""
    channels, height, width = config.image_shape
    settings = {"num_classes": num_classes, **({"exact": False} if prior == "masked" else {})}
    pipe = make_pipeline(tokenizer, prior, channels, size=(height, width), labels=[], **settings)
    pipe.provenance = {"data": config.model_dump(mode="json")}
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
    expected = KEYS | LOOKS | (BITS if tokenizer == "pixels" else set()) | (CLASSES if num_classes else set())
    assert expected <= set(figures) and not (BITS | CLASSES | {"fid"}) - expected & set(figures)
    assert figures["num_compared"] == 30 and figures["feature_space"] == "classifier-64"
    for name in ("frechet_distance", "train_frechet_distance", "precision", "recall", "density", "coverage"):
        assert f"{figures[name]:.3f}" in text
    assert "Frechet distance [classifier-64]" in text and "FID" not in text + card and figures["feature_origin"] in text
    for name in expected & set(FIGURES):
        value = "-" if figures[name] is None else figures[name]
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
    figures, _, _ = evaluate(tmp_path, "num_images=0")
    assert figures["bits_per_dim"] == pytest.approx(float(bits.mean()), rel=1e-6)
    assert figures["bits_per_dim_error"] == pytest.approx(float(bits.std()) / len(bits) ** 0.5, rel=0.05)


def test_figures_of_some_images_say_of_how_many(tmp_path, monkeypatch):
    config = write_set(tmp_path / "images", (4, 6))
    pipe = save_pipeline(tmp_path, config, "pixels", "masked", 2)
    held_out = load_images(config).held_out
    monkeypatch.setattr("pipelines.evaluate.SOME", 7)
    monkeypatch.setattr("pipelines.metrics.likelihood.FEW", 3)
    figures, text, card = evaluate(tmp_path, "num_images=20")
    counts = {name: figures[name] for name in set(COUNTS.values())}
    assert counts == {
        "num_images": len(held_out),
        "ssim_images": 7,
        "class_agreement_images": 7,
        "num_samples": 20,
        "order_spread_images": 3,
    }
    lines = {line.split("  ")[0].strip() or line.split("  ")[1]: line for line in text.splitlines()}
    assert "7 images" in lines["SSIM"] and "3 images" in lines["spread over orders"]
    assert "of 20 samples; 7 real held-out images" in lines["class agreement"]
    assert f", of {len(held_out)} |" in card and ", of 7 |" in card and ", of 20 |" in card and ", of 3 |" in card
    some = shuffled(len(held_out))[:3]
    spread = pipe.prior.order_spread(pipe.encode(held_out.batch(some)), held_out.labels[some])
    assert figures["order_spread"] == pytest.approx(float(spread.detach().double().mean()), rel=1e-6)


def test_the_report_names_the_device_that_was_measured(tmp_path, monkeypatch):
    """It is made before the weights go to the CPU, for the card."""
    save_pipeline(tmp_path, write_set(tmp_path / "images"), "vqvae", "marginal", 2)
    events, to, report = [], ImagePipeline.to, evaluation.report
    monkeypatch.setattr(ImagePipeline, "to", lambda self, **place: (events.append("moved"), to(self, **place))[1])

    def reported(*given, **more):
        events.append("reported")
        return report(*given, **more)

    monkeypatch.setattr(evaluation, "report", reported)
    evaluate(tmp_path, "num_images=5")
    assert events[-2:] == ["reported", "moved"]


@pytest.mark.parametrize("options", [["num_images=9"], ["num_images=0"], ["data.limit=9"]])
def test_too_few_images_are_said_and_not_compared(tmp_path, options):
    config = write_set(tmp_path / "images")
    save_pipeline(tmp_path, config, "vqvae", "marginal", 2)
    figures, text, card = evaluate(tmp_path, *options)
    assert not {"frechet_distance", "precision", "copying_z", "feature_space"} & set(figures)
    assert f"needs {LEAST} samples, training images and held-out images" in text and "Frechet" not in card
    assert ("samples_per_second" in figures) == (options != ["num_images=0"])
    assert not (tmp_path / "evaluation" / "nearest.png").exists()


def test_samples_have_the_classes_of_the_training_images(tmp_path, monkeypatch):
    """Three in four training images are of one class, and so should samples be."""
    config = write_set(tmp_path / "images")
    for path in sorted((tmp_path / "images" / "train" / "kind1").iterdir())[13:]:
        path.unlink()
    save_pipeline(tmp_path, config, "vqvae", "marginal", 2)
    asked, call = {}, ImagePipeline.__call__

    def watched(self, num_images=None, labels=None, *, seed, **kwargs):
        asked[seed] = labels
        return call(self, num_images, labels, seed=seed, **kwargs)

    monkeypatch.setattr(ImagePipeline, "__call__", watched)
    evaluate(tmp_path, "num_images=106", "update_card=false", "seed=5")
    assert [(seed, len(labels)) for seed, labels in asked.items()] == [(5, 64), (69, 42)]  # sample k has seed + k
    assert np.bincount(asked[5] + asked[69]).tolist() == [80, 26]


def test_fid_wants_its_packages_and_its_weights(tmp_path, capsys, monkeypatch):
    """And says so before the work: another file's distances are no FID, and would be unpickled."""
    save_pipeline(tmp_path, write_set(tmp_path / "images"), "vqvae", "marginal", 2)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"other")
    for found, message in (
        (None, "FID needs torch_fidelity: pip install"),
        (
            True,
            f"{weights} is not torch-fidelity's weights-inception-2015-12-05-6726825d.pth (its "
            "sha256 begins with d9298a10)",
        ),
    ):
        monkeypatch.setattr("pipelines.metrics.inception.find_spec", lambda name, found=found: found)
        with pytest.raises(SystemExit):
            evaluate(tmp_path, f"inception_weights={weights}")
        assert message in capsys.readouterr().err
    assert not (tmp_path / "evaluation").exists()


@needs_torch_fidelity
@pytest.mark.parametrize("reference", ["held_out", "train"])
def test_fid_is_taken_with_inception_weights_alone(tmp_path, monkeypatch, reference):
    from torch_fidelity import feature_extractor_inceptionv3

    seen = []

    class Net(torch.nn.Module):
        def __init__(self, name, features, file):
            super().__init__()
            seen.append((name, features, file.read()))

        def forward(self, images):
            assert images.dtype == torch.uint8 and images.shape[1:] == (3, 8, 12)
            corner = images.float()[:, 0, :2, :3].flatten(1) / 20
            return corner, corner

    save_pipeline(tmp_path, write_set(tmp_path / "images"), "vqvae", "marginal", 2)
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"right")
    monkeypatch.setattr("pipelines.metrics.inception.find_spec", lambda name: True)
    monkeypatch.setattr("pipelines.metrics.inception.SHA256", hashlib.sha256(b"right").hexdigest())
    monkeypatch.setattr(feature_extractor_inceptionv3, "FeatureExtractorInceptionV3", Net)
    given = (f"inception_weights={weights}", "num_images=30", f"reference={reference}")
    figures, text, card = evaluate(tmp_path, *given)
    assert seen == [("inception-v3-compat", ["2048", "logits_unbiased"], b"right")]
    real = figures["train_fid" if reference == "held_out" else "held_out_fid"]
    assert figures["fid"] > real > 0 and figures["rfid"] > 0 and figures["inception_score"] > 1
    for name in ("fid", "rfid", "inception_score"):  # beside each figure, how it was taken
        protocol = figures[f"{name}_protocol"]
        assert protocol.endswith("as TensorFlow 1 does; weights-inception-2015-12-05-6726825d.pth")
        assert f"| {FIGURES[name]} | {figures[name]:.4g} |" in card
        assert f"| {FIGURES[name + '_protocol']} | {protocol} |" in card
        assert f"{figures[name]:.2f}  " in text and protocol in text
    images = {"held_out": "30 samples against 30 held-out images", "train": "30 samples against all 80 training images"}
    assert figures["fid_protocol"].startswith(images[reference])


def test_a_table_of_all_classes_that_is_too_large_is_not_made(tmp_path, monkeypatch):
    """Then position frequencies are those of all classes together, which is said beside the figure; or there are
    none."""
    config = write_set(tmp_path / "images")
    pipe = save_pipeline(tmp_path, config, "vqvae", "marginal", 2)
    figures, text, _ = evaluate(tmp_path, "num_images=0")
    size = len(pipe.prior.grid) * pipe.prior.grid.vocab_size
    assert "marginal_note" not in figures
    made, create = [], Prior.create

    def watched(name, **config):
        made.append(create(name, **config))
        return made[-1]

    monkeypatch.setattr(Prior, "create", watched)
    monkeypatch.setattr("pipelines.metrics.likelihood.TABLE", 3 * size - 1)
    less, told, card = evaluate(tmp_path, "num_images=0")
    assert [prior.table.numel() for prior in made] == [size]
    note = f"of all classes together: a table of 2 would have {2 * size:,} numbers"
    assert less["marginal_note"] == note and note in told and note in card
    assert less["marginal_bits_per_token"] != figures["marginal_bits_per_token"]
    images, made[:] = load_images(config), []
    tokens = [pipe.encode(part.batch(range(len(part)))) for part in (images.train, images.held_out)]
    alone = create("marginal", grid=pipe.prior.grid, num_classes=0)
    alone.initialize(tokens[0], None)
    bits = -alone.log_prob(tokens[1]).double().mean() / np.log(2) / len(pipe.prior.grid)
    assert less["marginal_bits_per_token"] == pytest.approx(float(bits.detach()), rel=1e-6)
    monkeypatch.setattr("pipelines.metrics.likelihood.TABLE", size - 1)
    none, told, _ = evaluate(tmp_path, "num_images=0")
    assert not made and "marginal_bits_per_token" not in none and "position frequencies" not in told
    assert f"uniform {none['uniform_bits_per_token']:.3f}" in told


def test_pixels_are_compared_to_as_many_training_images_as_fit(tmp_path, monkeypatch):
    save_pipeline(tmp_path, write_set(tmp_path / "images"), "vqvae", "marginal", 2)
    figures, text, _ = evaluate(tmp_path, "num_images=20")
    assert "class_agreement_known" not in figures
    monkeypatch.setattr("pipelines.evaluate.KNOWN", 12 * 96 + 95)
    less, told, _ = evaluate(tmp_path, "num_images=20")
    assert less["class_agreement_known"] == 12 and "; by 12 training images" in told and "training images" in text
    assert less["real_class_agreement"] > 0.6  # stripes of two kinds are told apart by a few
