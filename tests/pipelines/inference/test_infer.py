"""Posteriors of columns: equal to Bayes' rule by hand, over classes, flags, numbers, angles, candidates and groups.

Covers: pipelines/inference/infer.py, pipelines/inference/posterior.py, pipelines/inference/evidence.py.
"""

import math

import pytest
import torch
from small_pipelines import LABELS, make_conditioned, make_pipeline, pixels_for
from torch.testing import assert_close

from pipelines.anomaly.distances import CalibrationError
from pipelines.frequencies import Frequencies
from pipelines.inference.posterior import RangePosterior, Scale
from prior.given import Given

ANGLE = {"turn": {"kind": "angle"}}
AGE = {"age": {"kind": "number", "mean": [50.0], "std": [20.0], "low": [18.0], "high": [90.0]}}
MANY = {"tags": {"kind": "flags", "names": [f"t{number}" for number in range(9)]}}


def strengthen(pipe, factor=30.0):
    """Make what is given matter more in an untrained prior."""
    with torch.no_grad():
        for name, weight in pipe.prior.named_parameters():
            if "condition" in name or "label" in name or "classes" in name:
                weight.mul_(factor)
    return pipe


def brute_force(pipe, images, column, values, condition=None, log_prior=0.0):
    """p(value | image) by Bayes' rule, one value after another."""
    each = [pipe.log_prob(images, condition={**(condition or {}), column: value}).double() for value in values]
    return (torch.stack(each, 1) + log_prior).softmax(1)


def test_the_posterior_of_a_prior_by_hand():
    pipe = make_pipeline(prior="marginal")
    tables = torch.randn(4, 1, pipe.prior.grid.vocab_size).double().log_softmax(-1)
    with torch.no_grad():
        pipe.prior.table.copy_(tables.expand(pipe.prior.table.shape))
    images = pixels_for(pipe)
    counts = torch.stack([row.flatten().bincount(minlength=tables.shape[-1]) for row in pipe.encode(images)]).double()
    weights = torch.tensor([0.5, 0.3, 0.2]).double()
    expected = (counts @ tables[:3, 0].T + weights.log()).softmax(1)
    assert_close(pipe.infer(images, "label", prior=weights.tolist()).probabilities, expected, rtol=1e-5, atol=1e-5)
    named = pipe.infer(images, "label", prior={"cat": 0.5, "dog": 0.3, "eel": 0.2})
    assert_close(named.probabilities, expected, rtol=1e-5, atol=1e-5)
    assert named.mode == [LABELS[place] for place in expected.argmax(1).tolist()]
    assert_close(named.entropy, torch.special.entr(expected).sum(1), rtol=1e-4, atol=1e-6)


def test_classes_and_flags_are_weighted_as_often_as_in_training():
    pipe = strengthen(make_conditioned(outline=False))
    count = 300
    rows = {name: column.draw(count) for name, column in pipe.columns.items() if column.is_counted}
    rows["view"] = torch.where(torch.rand(count) < 0.7, rows["label"], 1)
    pipe.frequencies = Frequencies.count(Given(pipe.columns, rows, count))
    images, others = pixels_for(pipe), {"label": "eel", "age": 30}
    given = pipe.read_given(None, others)
    names = pipe.columns["view"].names
    found = pipe.infer(images, "view", condition=others, batch_size=4)
    expected = brute_force(pipe, images, "view", names, others, pipe.frequencies.log_prob("view", given))
    assert_close(found.probabilities, expected, rtol=1e-4, atol=1e-5)
    assert found.prior == "frequencies of training given label"
    flags = pipe.infer(images, "findings", condition=others)
    assert len(flags.values) == 8 and flags.values[0] == [] and flags.values[5] == ["bone", "water"]
    share = torch.stack(
        [
            (rows["findings"] == value).all(1)[rows["label"] == 2].sum()
            for value in pipe.columns["findings"].list_values()
        ]
    )
    whole = torch.stack([(rows["findings"] == value).all(1).sum() for value in pipe.columns["findings"].list_values()])
    log_prior = (share + whole / count).double().log()
    assert_close(
        flags.probabilities,
        brute_force(pipe, images, "findings", flags.values, others, log_prior),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("columns", [AGE, ANGLE], ids=["number", "angle"])
def test_a_range_is_refined_until_it_is_as_good_as_a_dense_grid(columns):
    (name,) = columns
    pipe = strengthen(make_conditioned(columns=columns, outline=False), 60.0)
    images = pixels_for(pipe, 3)
    found = pipe.infer(images, name, prior="uniform")
    assert isinstance(found, RangePosterior) and found.points.diff(dim=1).min() > 0
    low, high = found.edges
    dense = torch.linspace(low, high, 1441, dtype=torch.float64)[:-1]
    weights = brute_force(pipe, images, name, dense.tolist())
    assert weights.max() > 3 / 1440  # the images say something
    if found.period is None:
        mean = weights @ dense
        assert_close(found.mean, mean, rtol=0, atol=0.003 * (high - low))
        assert_close(found.std, ((weights * (dense - mean[:, None]) ** 2).sum(1)).sqrt(), rtol=0.03, atol=0)
    else:
        turn = (weights * torch.polar(torch.ones_like(dense), dense * math.tau / 360)).sum(1)
        apart = (found.mean - turn.angle() * 360 / math.tau + 180).remainder(360) - 180
        assert apart.abs().max() < 2
    assert (found.error < 0.05).all()
    assert_close(found.probabilities.sum(1), torch.ones(3, dtype=torch.float64))
    inside = found.interval(0.8)
    drawn = torch.tensor(found.sample(4000, torch.Generator().manual_seed(0)))
    turned = drawn if found.period is None else inside[:, :1] + (drawn - inside[:, :1]).remainder(360)
    share = ((turned >= inside[:, :1]) & (turned <= inside[:, 1:])).double().mean(1)
    assert (share > 0.77).all()


def test_an_interval_of_angles_goes_across_zero():
    points = torch.arange(0, 360, 10.0)[None].double()
    peak = -((((points + 180) % 360 - 180) / 15) ** 2)
    found = RangePosterior(
        "turn", ["0"], peak, torch.zeros_like(peak), "uniform", [Scale()], points, (0, 360), 360.0, torch.zeros(1)
    )
    (low, high), mean = found.interval(0.9)[0].tolist(), float(found.mean)
    assert 335 <= low < 350 and 370 < high <= 385 and min(mean, 360 - mean) < 1e-6


def test_a_number_is_weighted_by_quantiles_of_its_class():
    pipe = make_conditioned(columns=AGE, outline=False)
    label = torch.arange(3).repeat(200)
    age = torch.stack([torch.randn(600) * 3 + 30, torch.randn(600) * 3 + 60, torch.rand(600) * 72 + 18])[
        label, range(600)
    ]
    pipe.frequencies = Frequencies.count(Given(pipe.columns, {"label": label, "age": age[:, None]}, 600))
    images = pixels_for(pipe, 2)
    weak = pipe.infer(images, "age", condition={"label": ["cat", "dog"]})
    assert weak.prior == "quantiles of training given label"
    assert 28 < weak.mean[0] < 33 and 55 < weak.mean[1] < 62 and weak.std.max() < 12
    assert pipe.infer(images, "age").prior == "quantiles of training"


def test_images_of_a_group_are_taken_together():
    pipe = strengthen(make_pipeline())
    images = pixels_for(pipe, 5)
    alone = pipe.infer(images, "label", prior="uniform").log_likelihood
    found = pipe.infer(images, "label", prior="uniform", groups=["b", "a", "b", "b", "a"])
    assert list(found.rows) == ["b", "a"]
    expected = torch.stack([alone[[0, 2, 3]].sum(0), alone[[1, 4]].sum(0)])
    assert_close(found.probabilities, expected.softmax(1), rtol=1e-5, atol=1e-6)


def test_candidates_are_compared():
    pipe = strengthen(make_conditioned(before=True))
    images = pixels_for(pipe, 3)
    vectors = torch.randn(4, 16)
    found = pipe.infer(images, "text", candidates=vectors)
    assert list(found.values) == [0, 1, 2, 3] and found.prior == "uniform"
    assert_close(found.probabilities, brute_force(pipe, images, "text", list(vectors)), rtol=1e-4, atol=1e-5)
    pictures = pixels_for(pipe, 2)
    assert pipe.infer(images, "before", candidates=pictures.numpy().transpose(0, 2, 3, 1)).probabilities.shape == (3, 2)
    assert pipe.infer(images, "motion", candidates=[[1.0, 0.5], [0.0, 0.0]]).probabilities.shape == (3, 2)


def test_many_flags_are_inferred_one_by_one():
    pipe = strengthen(make_conditioned(columns=MANY, outline=False))
    images = pixels_for(pipe, 2)
    with pytest.warns(UserWarning, match="9 flags; each is inferred alone"):
        found = pipe.infer(images, "tags")
    assert len(found) == 18 and found.rows[10] == "1: t1"
    one = torch.full((2, 9), math.nan)
    one[:, 1] = torch.tensor([0.0, 1.0])
    each = torch.stack([pipe.log_prob(images[1:], condition={"tags": row[None]})[0] for row in one])
    assert_close(found.probabilities[10], each.double().softmax(0), rtol=1e-4, atol=1e-6)


def test_evidence_sums_to_the_ratio_of_the_likelihoods():
    pipe = strengthen(make_conditioned(outline=False))
    images = pixels_for(pipe, 3)
    found = pipe.evidence_map(images, "label", "cat", ["dog", "eel", "eel"], condition={"age": 40})
    a, b = (pipe.log_prob(images, labels, condition={"age": 40}) for labels in ("cat", ["dog", "eel", "eel"]))
    assert_close(found.sum((1, 2)).double().cpu(), ((a - b) / math.log(2)).double(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_credible_sets_are_the_densest_values(level):
    pipe = strengthen(make_pipeline())
    found = pipe.infer(pixels_for(pipe), "label", prior=[0.4, 0.4, 0.2])
    for row, values in zip(found.probabilities.tolist(), found.credible(level), strict=True):
        ranked = sorted(zip(row, LABELS, strict=True), reverse=True)
        mass, expected = 0.0, []
        for share, name in ranked:
            if mass < level:
                expected.append(name)
            mass += share
        assert values == expected
    with pytest.raises(CalibrationError, match="not calibrated; run `smalti calibrate column=NAME`"):
        found.conformal(level)


def test_a_table_and_a_plot_can_be_shown():
    pipe = make_conditioned(columns={**AGE, **ANGLE}, outline=False)
    images = pixels_for(pipe, 3)
    for column in ("label", "age", "turn"):
        found = pipe.infer(images, column)
        assert len(found.table().splitlines()) == 4 and found.plot().shape[2] == 3
        assert f"{column}: 3 rows" in repr(found)


WRONG = {
    "no column": ({"column": "size"}, "column: unknown column 'size'"),
    "given": ({"column": "label", "condition": {"label": "cat"}}, "column: 'label' is given; leave it out"),
    "no list": ({"column": "text"}, r"column: the values of 'text' \(vector\) cannot be listed; give candidates"),
    "one candidate": ({"column": "text", "candidates": [0.0] * 16}, "candidates: give a list of at least two"),
    "short candidates": ({"column": "text", "candidates": [[0.0], [1.0]]}, "candidates: expected 16 numbers"),
    "groups": ({"column": "label", "groups": ["a"]}, "groups: got 1 names for 5 images; give one for each"),
    "prior sum": ({"column": "label", "prior": [0.5, 0.4, 0.4]}, "prior: expected 3 probabilities that sum to one"),
    "prior negative": ({"column": "label", "prior": [1.5, -0.5, 0]}, "prior: expected 3 probabilities that sum to one"),
    "prior name": (
        {"column": "label", "prior": {"cow": 1.0}},
        "prior: 'cow' is not a value; allowed are cat, dog, eel",
    ),
    "prior text": ({"column": "label", "prior": "flat"}, "prior: expected 'uniform' or 3 probabilities"),
    "prior list": ({"column": "age", "prior": [0.5, 0.5]}, "prior: expected 'uniform' or a function"),
    "prior density": ({"column": "age", "prior": lambda x: x * 0}, "prior: the density of each number must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_line(case):
    options, message = WRONG[case]
    pipe = make_conditioned(outline=False)
    with pytest.raises(ValueError, match=message) as caught:
        pipe.infer(pixels_for(pipe), **options)
    assert "\n" not in str(caught.value)
