"""`smalti evaluate`: its figures in files, in print and on the card, for one process or several."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from givens.stripes import write_set
from givens.token_datasets import COLUMNS, make_conditioned, make_split
from optional import needs_torch_fidelity
from PIL import Image
from ranks import Several
from small import make_prior
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines import evaluate as evaluation
from pipelines.__main__ import main
from pipelines.images import dataset, load_images
from pipelines.metrics import fid, likelihood, quality, reconstruction, samples
from pipelines.metrics.fid import Inception
from pipelines.metrics.figures import format_rows
from pipelines.tokens import TokenDataset, TokenSplit
from pipelines.tokens.meta import label_column
from prior import Prior

COMPARED = {
    f"{of}{name}" for of in ("", "train_", "reconstruction_") for name in ("frechet_distance", "precision", "recall")
} | {"feature_space", "feature_origin", "num_compared", "nearest_distance", "held_out_nearest_distance"}
BITS = {"bits_per_dim", "bits_per_dim_error", "prior_bits_per_dim", "pixel_bits_per_dim"}
CLASSES = {"class_agreement", "real_class_agreement", "reconstruction_class_agreement"}


def save_pipeline(root, config, tokenizer="vqvae", prior="marginal", num_classes=2, **facts):
    """Save a small untrained pipeline for these images, with provenance `facts`."""
    channels, height, width = config.spec.shape
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
    for row in format_rows(figures, exact=pipe.prior.exact):
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


def test_too_few_samples_are_not_compared(tmp_path):
    save_pipeline(tmp_path, write_set(tmp_path / "images"))
    figures, text, card = evaluate(tmp_path, "num_images=9")
    assert not COMPARED & set(figures) and "Frechet" not in text + card and "samples_per_second" in figures
    assert not (tmp_path / "evaluation" / "nearest.png").exists()


def test_samples_have_the_classes_of_the_training_images(tmp_path, monkeypatch):
    """Three in four training images are of one class, and so are the samples."""
    config = write_set(tmp_path / "images")
    for path in sorted((tmp_path / "images" / "train" / "kind1").iterdir())[13:]:
        path.unlink()
    save_pipeline(tmp_path, config)
    asked, call = {}, ImagePipeline.__call__

    def watched(self, num_images=None, labels=None, *, seed, condition=None, **kwargs):
        asked[seed] = labels if condition is None else condition.raw("label").tolist()
        return call(self, num_images, labels, seed=seed, condition=condition, **kwargs)

    monkeypatch.setattr(ImagePipeline, "__call__", watched)
    evaluate(tmp_path, "num_images=106", "update_card=false", "seed=5")
    assert [(seed, len(labels)) for seed, labels in asked.items()] == [(5, 64), (69, 42)]  # sample k has seed + k
    assert np.bincount(asked[5] + asked[69]).tolist() == [80, 26]


# The baseline of position frequencies


def bits_of_frequencies(grid, train, test, num_classes):
    """Bits per token of `Marginal` fitted to the tokens and labels of training images."""
    prior = Prior.create("marginal", grid=grid, num_classes=num_classes)
    prior.initialize(train.tokens, train.given)
    nats = prior.log_prob(test.tokens.long(), condition=test.of_columns(prior.columns).given).double()
    return -float(nats.detach().mean()) / np.log(2) / len(grid)


def split_of(pipe, images):
    tokens = pipe.encode(images.batch(range(len(images))))
    return make_split(tokens, label_column(images.class_names), label=images.labels)


def test_position_frequencies_are_those_of_the_token_dataset_that_the_prior_was_trained_on(
    tmp_path, monkeypatch, capsys
):
    config, tokens = write_set(tmp_path / "images"), tmp_path / "tokens"
    pipe = save_pipeline(tmp_path, config, tokens=str(tokens))
    images, grid = load_images(config), pipe.prior.grid
    train, test = (split_of(pipe, part) for part in (images.train, images.held_out))
    few = TokenSplit(train.tokens[:9], train.given[:9])

    def bits(*options):
        figures, _, _ = evaluate(tmp_path, "num_images=0", "update_card=false", *options)
        return figures["marginal_bits_per_token"], figures["marginal_rows"], figures.get("marginal_note")

    sampled = pytest.approx(bits_of_frequencies(grid, train, test, 2), rel=1e-6), len(train), None
    assert bits() == sampled  # there is no such dataset: training images are encoded
    monkeypatch.setattr("pipelines.evaluate.MOST_TRAINING", 20)
    assert bits()[1] == 20
    TokenDataset(grid, train.given.columns, {"train": few, "test": test}, pipe.tokenizer, {}).save(tokens)
    assert bits() == (pytest.approx(bits_of_frequencies(grid, few, test, 2), rel=1e-6), 9, None)
    other = copy.deepcopy(pipe.tokenizer)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    TokenDataset(grid, train.given.columns, {"train": few, "test": test}, other, {}).save(tmp_path / "other")
    with pytest.raises(SystemExit):
        bits(f"tokens={tmp_path / 'other'}")
    assert "error: tokens: " in capsys.readouterr().err


# Several processes


def as_inception(pixels):
    """Features and logits of 8-bit images `(B, 3, H, W)`."""
    rows = pixels.float().flatten(1) / 50
    chance = torch.Generator().manual_seed(0)
    features = (rows @ torch.randn(rows.shape[1], 24, generator=chance)).relu()
    return features, features @ torch.randn(24, 10, generator=chance) / 50


@needs_torch_fidelity
def test_several_processes_share_the_images_and_find_the_same_figures(tmp_path, monkeypatch):
    """Each process is a thread here. Each held-out image is decoded by one of them."""
    several, decoded = Several(3), [[], [], []]
    config = write_set(tmp_path / "images", (8, 8), per_class=24)
    sizes = {"quantizer": {"kind": "vq", "codes": 300, "dim": 4}, "likelihood": {"kind": "categorical"}}
    pipe = make_pipeline("vqvae", "masked", size=(8, 8), labels=[], sizes=sizes, num_classes=2)
    pipe.provenance = {"data": config.model_dump(mode="json")}
    pipe.save_pretrained(tmp_path / "pipeline")
    for owner in (quality, samples, evaluation, fid):  # small parts, several for each process
        monkeypatch.setattr(owner, "AT_A_TIME", 16)
    for owner, name, value in (
        (samples, "SAMPLED_AT_A_TIME", 5),
        (likelihood, "LOGITS", 1 << 15),
        (reconstruction, "EVALUATED_PIXELS", 16 * 64),
        (dataset, "CHUNK", 8),
        (evaluation, "MOST_TRAINING", 60),
        (evaluation, "load_inception", lambda weights, reference, device: Inception(as_inception, device, reference)),
    ):
        monkeypatch.setattr(owner, name, value)

    def run(name):
        options = {"feature_steps": 2, "num_images": 70, "update_card": False, "out": str(tmp_path / name)}
        evaluation.run(evaluation.EvaluateConfig(pipeline=str(tmp_path / "pipeline"), data=config, **options))

    run("alone")
    decode = dataset.decode_in_threads

    def noted(payloads, *options):
        payloads = list(payloads)
        decoded[several.own.rank] += map(str, payloads)
        return decode(payloads, *options)

    monkeypatch.setattr(dataset, "decode_in_threads", noted)
    monkeypatch.setattr(evaluation, "join_group", several.joined)
    several.run(lambda: run("group"))

    expected, figures = (json.loads((tmp_path / out / "evaluation.json").read_text()) for out in ("alone", "group"))
    assert expected.pop("samples_per_second") > 0 and figures.pop("samples_per_second") > 0
    assert {"fid", "rfid", "inception_score", "class_agreement", "marginal_bits_per_token"} | COMPARED <= set(figures)
    numbers = {name: value for name, value in expected.items() if isinstance(value, int | float)}
    near = {name: pytest.approx(value, rel=1e-6, abs=1e-9) for name, value in numbers.items()}
    assert figures == {**expected, **near}
    for name in ("samples", "reconstructions", "nearest"):
        one, other = ((tmp_path / out / f"{name}.png").read_bytes() for out in ("alone", "group"))
        assert one == other
    held_out = [[path for path in paths if "/test/" in path] for paths in decoded]
    assert sum(map(len, held_out)) == len(set().union(*held_out)) == 48 and min(map(len, held_out)) >= 8


# Columns of conditions


def save_with_columns(root, config):
    """Save a pipeline with a column of each kind, and the token dataset of its images with these columns."""
    pipe = make_pipeline("vqvae", "gpt", config.spec.shape[0], size=config.spec.shape[1:], labels=[], num_classes=2)
    images, given = load_images(config), make_conditioned(rows=500)
    others, grids = {name: given.columns[name] for name in COLUMNS}, given.condition_tokenizers
    prior = make_prior("gpt", grid=pipe.prior.grid, num_classes=2, conditions=others, condition_width=16)
    prior = type(prior)(prior.config.model_copy(update={"tokenizer": pipe.tokenizer.fingerprint()}))
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pipe = ImagePipeline(pipe.tokenizer, prior, condition_tokenizers=grids)
    splits, columns = {}, {**label_column(images.train.class_names), **others}
    for name, part in (("train", images.train), ("test", images.held_out)):
        some, split = slice(len(part)), split_of(pipe, part)
        rows = {**given.splits["train"].given[some].rows, "label": split.given.raw("label")[some]}
        splits[name] = make_split(split.tokens[some], columns, **rows)
    data = TokenDataset(pipe.prior.grid, columns, splits, pipe.tokenizer, {}, condition_tokenizers=grids)
    data.save(root / "tokens")
    pipe.provenance = {"data": config.model_dump(mode="json"), "tokens": str(root / "tokens")}
    pipe.save_pretrained(root / "pipeline")
    return pipe, data


def test_a_prior_with_columns_is_evaluated_with_and_without_each(tmp_path, capsys):
    pipe, data = save_with_columns(tmp_path, write_set(tmp_path / "images"))
    figures, text, card = evaluate(tmp_path, "num_images=30")
    test, size = data.splits["test"], len(pipe.prior.grid)

    def bits(*without):
        nats = pipe.prior.log_prob(test.tokens.long(), condition=test.given.without(without)).detach().double()
        return pytest.approx(-float(nats.mean()) / (np.log(2) * size), rel=1e-5)

    assert figures["bits_per_token"] == bits()
    assert figures["unconditional_bits_per_token"] == bits("label", *COLUMNS)
    for name in ("label", *COLUMNS):
        assert figures[f"bits_per_token_without_{name}"] == bits(name)
        assert f"bits per token, no {name}" in text and f"bits per token, no {name}" in card
    assert figures["null_class_bits_per_token"] == bits("label")
    open_class = test.given.without(["label"]).over("label")
    nats = pipe.prior.log_prob(test.tokens.long(), condition=open_class).detach().double()
    assert figures["class_unknown_bits_per_token"] == pytest.approx(-float(nats.mean()) / (np.log(2) * size), rel=1e-5)
    assert len({figures[key] for key in figures if "bits_per_token" in key and "marginal" not in key}) == 11
    with Image.open(tmp_path / "evaluation" / "samples.png") as picture:  # rows of outlines, real images and samples
        assert picture.height / picture.width > 3 * 8 / (16 * 12) * 0.9


def test_conditions_of_other_images_are_those_of_a_permutation_without_fixed_points():
    split, own = make_conditioned(rows=50).splits["train"], torch.arange(50)
    numbered = replace(split, given=split.given.with_rows(label=own, age=own.float()[:, None]))
    shuffled = dict(likelihood.vary_given(numbered))["shuffled_bits_per_token"].given
    found = shuffled.raw("label")
    assert sorted(found.tolist()) == own.tolist() and not (found == own).any()
    assert torch.equal(shuffled.raw("age")[:, 0].long(), found)


def test_tune_and_probe_take_priors_with_columns(tmp_path):
    """`tune` draws samples with the columns of the training tokens; `probe` gives the prior none."""
    images = write_set(tmp_path / "images", per_class=80).model_copy(update={"validation_fraction": 0.3})
    save_with_columns(tmp_path, images)
    tune = ["tune", f"pipeline={tmp_path}/pipeline", "num_samples=50", "feature_steps=1", "store=false"]
    main(tune)
    assert "guidance" in (tmp_path / "tuning" / "tuning.json").read_text()
    (tmp_path / "tokens").rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit):
        main(tune)
    pytest.importorskip("sklearn")
    main(["probe", f"pipeline={tmp_path}/pipeline", "num_train=40", "num_test=20"])
    assert "prior.0" in (tmp_path / "probe" / "probe.json").read_text()


def test_missing_columns_are_one_line_of_error(tmp_path, capsys):
    _, data = save_with_columns(tmp_path, write_set(tmp_path / "images"))
    test, plain = data.splits["test"], data.of_columns({"label": data.columns["label"]})
    mixed = replace(test, tokens=test.tokens.flip(0))
    short = TokenSplit(test.tokens[:-1], test.given[:-1])
    (tmp_path / "tokens").rename(tmp_path / "elsewhere")
    for given, message in (
        (None, "tokens: give the token dataset with the columns view, tags, age, text, outline"),
        (plain, "tokens: .* has no class column 'view' with the prior's meaning"),
        (replace(data, splits={**data.splits, "test": mixed}), "the rows of its test split are not those"),
        (replace(data, splits={**data.splits, "test": short}), "tokens: has columns of .* test images, but there are"),
    ):
        options = []
        if given is not None:
            given.save(tmp_path / "given")
            options = [f"tokens={tmp_path / 'given'}"]
        with pytest.raises(SystemExit):
            evaluate(tmp_path, "num_images=0", *options)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert re.search(message, line)
