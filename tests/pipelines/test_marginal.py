"""The mixture over a class in a pipeline: densities, scores, and the frequencies beside the models.

Covers: pipelines/image_pipeline.py, pipelines/saving.py, pipelines/anomaly/, pipelines/tokens/, pipelines/metrics/.
"""

import csv
import math
import shutil

import numpy as np
import pytest
import torch
from command import fails
from givens.stripes import SIZE, stripes
from givens.token_datasets import add_columns, make_dataset
from launch import train_prior
from PIL import Image
from small import draw_tokens, make_prior
from small_pipelines import LABELS, make_conditioned, make_pipeline, pixels_for

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.anomaly.distances import CalibrationError
from pipelines.frequencies import FREQUENCIES, Frequencies
from pipelines.metrics.likelihood import evaluate_open_class
from pipelines.tokens import TokenSplit, load_tokens
from prior.given import Given
from tokenizer.files import write_manifest

OTHERS = {"findings": ["bone"], "age": 63}


def count_split(pipe, count=200):
    """Set the frequencies of a training split in which the view depends on the class."""
    rows = {name: column.draw(count) for name, column in pipe.columns.items() if column.is_counted}
    rows["label"] = (torch.rand(count) * 1.5).long() * 2
    rows["view"] = torch.where(torch.rand(count) < 0.7, rows["label"], 1)
    pipe.frequencies = Frequencies.count(Given(pipe.columns, rows, count))
    return pipe


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("column", ["label", "view"])
def test_the_density_is_the_sum_over_the_classes_as_often_as_in_training(column, counted):
    pipe = make_conditioned(outline=False)
    if counted:
        count_split(pipe)
    images, condition = pixels_for(pipe), {**OTHERS, **({"view": "lateral"} if column == "label" else {"label": "eel"})}
    found = pipe.log_prob(images, condition=condition, marginal=column, batch_size=2)
    weights = pipe.frequencies.log_prob(column, pipe.read_given(None, condition))[0]
    assert (weights.exp().std() > 0.1) == counted and abs(float(weights.exp().sum()) - 1) < 1e-9
    names = pipe.columns[column].names
    each = torch.stack([pipe.log_prob(images, condition={**condition, column: name}).double() for name in names])
    torch.testing.assert_close(found.double(), (each + weights[:, None]).logsumexp(0), rtol=1e-5, atol=1e-5)
    null = pipe.log_prob(images, condition=condition)
    assert (null - found).abs().max() > 1e-3


def test_bits_per_dim_sum_over_the_classes():
    pipe = make_pipeline("pixels", sizes={"levels": 256})
    images = pixels_for(pipe)
    each = torch.stack([pipe.bits_per_dim(images, label) for label in LABELS])
    scale = images[0].numel() * math.log(2)
    expected = -((-each.double() * scale).logsumexp(0) - math.log(3)) / scale
    torch.testing.assert_close(pipe.bits_per_dim(images, marginal="label").double(), expected, rtol=1e-5, atol=1e-6)


# Files


def test_frequencies_are_stored_beside_the_models_and_read_again(tmp_path):
    pipe = count_split(make_conditioned(outline=False))
    pipe.save_pretrained(tmp_path / "pipe")
    again = ImagePipeline.from_pretrained(tmp_path / "pipe")
    images = pixels_for(pipe)
    assert torch.equal(again.log_prob(images, marginal="label"), pipe.log_prob(images, marginal="label"))
    again.prior = pipe.prior
    assert not again.frequencies.tables


# Anomalies


@pytest.mark.parametrize("stride", [None, 8])
def test_scores_and_calibrations_agree_on_the_class_that_is_open(stride, tmp_path):
    pipe = make_pipeline(size=(SIZE, SIZE))
    normal, new = stripes(60), stripes(4, seed=9)
    pipe.calibrate(normal, marginal="label", stride=stride)
    pipe.save_pretrained(tmp_path / "pipe")
    again = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert again.calibration.marginal == "label"
    options = {"marginal": "label", "stride": stride}
    assert torch.equal(again.anomaly_score(new, **options), pipe.anomaly_score(new, **options))
    for other in ({}, {"labels": "cat"}):
        with pytest.raises(CalibrationError, match="^marginal: calibrated with marginal=label"):
            again.anomaly_score(new, stride=stride, **other)
    if stride is None:
        tokens, mixture = again.encode(new), again.read_given(count=4, marginal="label")
        bits = -again.prior.token_log_probs(tokens, condition=mixture) / math.log(2)
        limit = torch.from_numpy(again.calibration.surprise[0]).float().reshape(tokens.shape[1:])
        assert torch.equal(again.heal(new, draws=1, quantile=0.9).resampled, bits > limit)
    else:
        assert len(again.anomaly_map(new, method="hidden", stride=stride)) == 4
    pipe.calibrate(normal, stride=stride)
    with pytest.raises(CalibrationError, match="^marginal: calibrated with nothing given, but now with marginal=label"):
        pipe.anomaly_score(new, **options)


def test_a_background_prior_without_the_column_has_no_mixture():
    pipe = make_conditioned(outline=False)
    facts = {"grid": pipe.prior.grid, "num_classes": len(LABELS), "tokenizer": pipe.tokenizer.fingerprint()}
    pipe.set_background(make_prior("gpt", **facts))
    images, found = pixels_for(pipe), []
    for column in ("label", "view"):
        ratio = pipe.anomaly_score(images, "ratio", marginal=column)
        given = pipe.read_given(count=len(images), marginal=column).without(["view"])
        background = pipe.background.log_prob(pipe.encode(images), condition=given.of_columns(pipe.background.columns))
        found.append(background)
        expected = (background - pipe.log_prob(images, marginal=column)).double() / math.log(2)
        torch.testing.assert_close(ratio, expected, rtol=1e-3, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_verbs_calibrate_and_detect_with_an_open_class(tmp_path, capsys):
    for part, images in (("images/train/a", stripes(4)), ("images/test/a", stripes(40)), ("new", stripes(3, seed=9))):
        (tmp_path / part).mkdir(parents=True)
        for number, image in enumerate(images.numpy()):
            Image.fromarray(image[0]).save(tmp_path / part / f"{number}.png")
    pipe = make_pipeline(size=(SIZE, SIZE))
    pipe.provenance = {"data": {"source": str(tmp_path / "images"), "image_size": SIZE}}
    pipe.save_pretrained(tmp_path / "pipe")
    verb = [f"pipeline={tmp_path}/pipe", "every=1"]
    main(["calibrate", *verb, "marginal=label"])
    capsys.readouterr()
    verb = ["detect", verb[0], f"images={tmp_path}/new", "method=nll", f"out={tmp_path}/found"]
    assert "marginal: calibrated with marginal=label given, but now with nothing" in fails(capsys, *verb)
    main([*verb, "marginal=label"])
    with (tmp_path / "found/scores.csv").open() as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(scores, pipe.anomaly_score(stripes(3, seed=9), "nll", marginal="label"), rtol=1e-3)


# From images to figures


def tables_of(frequencies):
    """The columns, values and counts of each table."""
    return [(list(table.columns), table.values.tolist(), table.counts.tolist()) for table in frequencies.tables]


def test_frequencies_go_from_the_training_split_to_the_pipeline_and_are_counted_if_they_are_missing(tmp_path):
    data = add_columns(make_dataset(rows=60), only=("view", "tags", "age"))
    data.save(tmp_path / "tokens", rows_per_shard=7)
    counted = Frequencies.count(data.splits["train"].given)
    loaded = load_tokens(tmp_path / "tokens").frequencies
    assert tables_of(loaded) == tables_of(counted) and len(loaded.tables) == 1
    shutil.copytree(tmp_path / "tokens", tmp_path / "older")
    (tmp_path / "older" / FREQUENCIES).unlink()
    write_manifest(tmp_path / "older")
    for name in ("tokens", "older"):
        run = train_prior(tmp_path / f"run_{name}", tmp_path / name, train__steps=2, attributes=["tags"])
        pipe = ImagePipeline.from_pretrained(run / "pipeline")
        some = {name: column for name, column in data.columns.items() if name in ("label", "tags")}
        assert tables_of(pipe.frequencies) == tables_of(counted.of_columns(some))
    without = train_prior(tmp_path / "run_without", tmp_path / "tokens", train__steps=2, label_dropout=1, attributes=[])
    assert not ImagePipeline.from_pretrained(without / "pipeline").frequencies.tables


def test_encode_counts_the_training_split(tmp_path):
    for number, image in enumerate(stripes(40).numpy()):
        (folder := tmp_path / "images" / "ab"[number % 4 == 0]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(folder / f"{number}.png")
    make_pipeline(size=(SIZE, SIZE)).tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = [f"data.source={tmp_path}/images", f"data.image_size={SIZE}", "data.channels=1", "data.augment.flip=true"]
    main(["encode", f"tokenizer={tmp_path}/tokenizer", *data, "augmentations=1", f"out={tmp_path}/tokens"])
    tokens = load_tokens(tmp_path / "tokens", verify=True)
    labels = tokens.splits["train"].given.rows["label"]
    assert tables_of(tokens.frequencies) == [(["label"], [[0], [1]], torch.bincount(labels).tolist())]


def test_evaluate_leaves_out_the_mixture_where_it_costs_too_much_or_is_a_bound():
    for prior in (make_prior("gpt", num_classes=101), make_prior("masked", exact=False)):
        split = TokenSplit(draw_tokens(prior, 3), Given(prior.columns, {}, 3))
        assert not evaluate_open_class(prior, split, Frequencies())
