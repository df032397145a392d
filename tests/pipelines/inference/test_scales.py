"""Temperatures and levels: fitted to held-out images, kept in the pipeline folder, and right for new images.

Covers: pipelines/inference/scales.py, pipelines/commands/calibrate.py, pipelines/commands/infer.py.
"""

import json

import numpy as np
import pytest
import torch
from small_pipelines import LABELS, make_conditioned, make_pipeline

from pipelines import ImagePipeline
from pipelines.inference.scales import INFERENCE
from tokenizer.files import FormatError, write_manifest


def make_informed(sharpness=1.0):
    """A pipeline whose images say which class they are, but not with certainty."""
    pipe = make_pipeline(prior="marginal", tokenizer="pixels", size=(4, 4), sizes={"levels": 8})
    chances = torch.linspace(-1, 1, 8)[None, :] * torch.tensor([-1.0, 0.0, 1.0, 0.0])[:, None] * sharpness
    with torch.no_grad():
        pipe.prior.table.copy_(chances.log_softmax(1)[:, None].expand(pipe.prior.table.shape))
    return pipe


def draw_known(pipe, count, seed=0):
    labels = torch.arange(count) % 3
    return pipe(count, labels.tolist(), seed=seed, output_type="pt").images, labels


def test_the_temperature_of_true_likelihoods_is_one_and_of_repeated_images_their_number():
    pipe = make_informed(0.4)
    images, labels = draw_known(pipe, 600)
    alone = pipe.calibrate_column(images, "label", labels)
    assert 0.75 < alone.sizes[0].temperature < 1.35 and not alone.objects and len(alone.sizes[0].denser) == 300
    several, truth = images.repeat_interleave(4, 0), labels.repeat_interleave(4)
    objects = torch.arange(600).repeat_interleave(4).tolist()
    fit = pipe.calibrate_column(several, "label", truth, groups=objects)
    assert [each.size for each in fit.sizes] == [1, 2, 4] and fit.objects
    for each in fit.sizes:  # the same image again says nothing new
        assert 0.75 * each.size < each.temperature < 1.35 * each.size


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_sets_contain_the_true_value_as_often_as_promised(level):
    pipe = make_informed(0.4)
    with torch.no_grad():
        pipe.prior.table.mul_(3)  # overconfident
    honest = make_informed(0.4)
    images, labels = draw_known(honest, 1000)
    pipe.calibrate_column(images, "label", labels)
    new, truth = draw_known(honest, 1000, seed=5000)
    found = pipe.infer(new, "label")
    names = [LABELS[label] for label in truth.tolist()]
    share = np.mean([name in values for name, values in zip(names, found.conformal(level), strict=True)])
    assert level - 0.04 < share < level + 0.08  # sets have whole values
    plain = pipe.inference.fits.clear() or pipe.infer(new, "label")
    at = torch.arange(1000)
    assert found.log_density[at, truth].mean() > plain.log_density[at, truth].mean() + 0.05


def test_numbers_are_calibrated_given_other_columns():
    pipe = make_conditioned(outline=False)
    images = torch.randint(0, 256, (80, 1, 8, 12), dtype=torch.uint8)
    ages = torch.rand(80, 1) * 72 + 18
    given = {"label": [LABELS[k % 3] for k in range(80)]}
    fit = pipe.calibrate_column(images, "age", ages, condition=given)
    assert fit.given == ["label"]
    found = pipe.infer(images[:3], "age", condition={"label": LABELS})
    assert found.scales[0].temperature == fit.sizes[0].temperature
    (low, high) = found.conformal(0.8)[0]
    assert 18 <= low < high <= 90
    assert not pipe.infer(images[:3], "age").scales[0].denser  # without the label it is another question
    assert not pipe.infer(images[:3], "age", condition={"label": LABELS}, prior="uniform").scales[0].denser
    with pytest.raises(ValueError, match="label: 12 images have a value; at least 20 are needed|column 'label': 12"):
        pipe.calibrate_column(images[:12], "label", torch.zeros(12, dtype=torch.long))
    with pytest.raises(ValueError, match=r"column: 'text' \(vector\) cannot be calibrated"):
        pipe.calibrate_column(images, "text", torch.zeros(80, 16))


def test_fits_are_stored_beside_the_models(tmp_path):
    pipe = make_informed()
    images, labels = draw_known(pipe, 60)
    pipe.calibrate_column(images, "label", labels)
    pipe.save_pretrained(tmp_path / "pipe")
    again = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert again.inference == pipe.inference
    again.prior = pipe.prior
    assert not again.inference.fits
    path = tmp_path / "pipe" / INFERENCE
    facts = json.loads(path.read_text())
    facts["fits"][0]["sizes"][0]["temperature"] = -1
    path.write_text(json.dumps(facts))
    write_manifest(tmp_path / "pipe")
    with pytest.raises(FormatError, match=r"inference.json: fits.0.sizes.0.temperature"):
        ImagePipeline.from_pretrained(tmp_path / "pipe")
