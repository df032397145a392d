"""Hidden tokens: what their surprisal depends on, its means by id, its maps of any size, and scores of these."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from givens.stripes import stripes
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.anomaly.calibrating import divide_objects
from pipelines.anomaly.calibration import Calibration
from pipelines.anomaly.conformal import p_values_of
from pipelines.anomaly.distances import CalibrationError
from pipelines.anomaly.examine import Examination
from pipelines.anomaly.filters import filter_responses, largest_changes, nearest_distances, smooth, spread_cells
from pipelines.anomaly.hidden import SHRINK, can_hide, hidden_bits, hidden_masks, mean_of_codes
from pipelines.anomaly.maps import (
    HANDICAP,
    MAPPED,
    Roles,
    blur_maps,
    map_hidden,
    peak_and_changes,
    peak_of,
    score_map,
    standard_cells,
)
from pipelines.completion import region_log_prob

ANY_ORDER = [("masked", {}), ("blocks", {"any_order": True}), ("gpt", {"any_order": True})]
IMAGES = torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make(prior="masked", size=(16, 16), **config):
    torch.manual_seed(0)
    pipe = make_pipeline(prior=prior, size=size, labels=[], **config)
    for weight in pipe.prior.requires_grad_(False).parameters():  # an untrained head may be zero
        torch.nn.init.normal_(weight, std=0.3)
    return pipe


def tokens_of(pipe, count=3):
    return torch.randint(pipe.prior.grid.vocab_size, (count, *pipe.prior.grid.shape))


def nothing(pipe, tokens):
    return pipe.read_given(count=len(tokens))


@given(rows=st.integers(1, 20), columns=st.integers(1, 20), size=st.integers(1, 7))
def test_each_token_is_hidden_once_with_its_block_and_without_the_blocks_beside_it(rows, columns, size):
    masks = hidden_masks(rows, columns, size)
    assert (masks.sum(0) == 1).all()
    for mask in masks:
        row, column = (torch.arange(side) // min(size, -(-3 * side // 4)) for side in (rows, columns))
        own = torch.stack(torch.meshgrid(row, column, indexing="ij"), -1)[mask]
        assert len({tuple(each) for each in (own % 2).tolist()}) == 1


@pytest.mark.parametrize(("prior", "config"), ANY_ORDER)
def test_a_single_hidden_token_has_its_conditional_probability_which_sums_to_one(prior, config):
    pipe = make(prior, size=(8, 8), **config)
    tokens, vocab = tokens_of(pipe, 1), pipe.prior.grid.vocab_size
    bits = hidden_bits(pipe.prior, tokens, nothing(pipe, tokens), size=1)
    for cell in range(4):
        every = tokens.flatten(1).repeat(vocab, 1)
        every[:, cell] = torch.arange(vocab)
        every = every.unflatten(1, (2, 2))
        total = torch.exp2(-hidden_bits(pipe.prior, every, nothing(pipe, every), size=1).flatten(1)[:, cell]).sum()
        known = torch.arange(4) != cell
        expected = region_log_prob(pipe.prior, tokens, known.reshape(2, 2), nothing(pipe, tokens))
        assert float(total) == pytest.approx(1, abs=1e-4)
        if prior != "blocks":  # its known tokens form a single block here, and blocks of one token there
            assert float(bits.flatten()[cell]) == pytest.approx(-float(expected) / math.log(2), abs=1e-4)


@pytest.mark.parametrize(("prior", "config"), [*ANY_ORDER, ("made", {"order_agnostic": True}), ("gpt", {})])
def test_only_priors_whose_hidden_tokens_do_not_explain_one_another_can_hide(prior, config):
    """On a grid of which a pass hides several tokens of a block."""
    pipe = make(prior, **config)
    tokens, other = tokens_of(pipe, 8), tokens_of(pipe, 8)
    inside = hidden_masks(4, 4, 2)[0]
    before, changes = hidden_bits(pipe.prior, tokens, nothing(pipe, tokens), size=2), 0.0
    for cell in inside.nonzero().tolist():
        mixed = tokens.clone()
        mixed[:, *cell] = other[:, *cell]
        others = inside.clone()
        others[*cell] = False
        changes = max(
            changes,
            float((hidden_bits(pipe.prior, mixed, nothing(pipe, mixed), size=2) - before).abs()[:, others].max()),
        )
    assert can_hide(pipe.prior) == (changes < 1e-5)


def test_a_prior_of_one_order_gives_the_bits_after_earlier_tokens():
    pipe = make("gpt")
    tokens = tokens_of(pipe)
    torch.testing.assert_close(
        hidden_bits(pipe.prior, tokens, nothing(pipe, tokens)), -pipe.prior.token_log_probs(tokens) / math.log(2)
    )


def test_means_are_of_each_id_and_those_of_rare_ids_near_the_mean_of_all():
    tokens = torch.tensor([0] * 5000 + [1] * 5000 + [2])
    bits = torch.cat([torch.full((5000,), 2.0), torch.full((5000,), 6.0), torch.tensor([30.0])])
    means = mean_of_codes(bits, tokens, 4)
    average = float(bits.mean())
    assert means[:2] == pytest.approx([2, 6], abs=0.02)
    assert means[2] == pytest.approx((30 + SHRINK * average) / (1 + SHRINK), rel=1e-4)
    assert means[3] == pytest.approx(average, rel=1e-4)


# Maps ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mapped():
    pipe = make()
    pipe.calibrate(IMAGES)
    return pipe


def test_the_map_of_one_tile_is_the_map_of_the_image(mapped):
    tiled = ImagePipeline(mapped.tokenizer, mapped.prior)
    tiled.calibration = mapped.calibration.model_copy(update={"tile": [16, 16], "stride": 5})
    for method in ("hidden", "combined"):
        whole = mapped.anomaly_map(IMAGES[:5], method=method)
        for one, other in zip(whole, tiled.anomaly_map(IMAGES[:5], method=method, stride=5), strict=True):
            torch.testing.assert_close(one, other)
    with pytest.warns(UserWarning, match="used to calibrate"):
        found = tiled.anomaly_score(IMAGES[:5], "hidden", stride=5)
    with pytest.warns(UserWarning, match="used to calibrate"):
        torch.testing.assert_close(mapped.anomaly_score(IMAGES[:5], "hidden"), found)


def test_a_calibration_keeps_its_maps_and_one_without_them_reads_as_before(mapped, tmp_path):
    mapped.save_pretrained(tmp_path / "pipe")
    loaded = ImagePipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(*(pipe.anomaly_map(IMAGES[:3], method="combined") for pipe in (mapped, loaded)))
    data = json.loads(mapped.calibration.to_json())
    assert data.pop("maps")
    data["scores"] = {name: each for name, each in data["scores"].items() if name not in ("hidden", "map")}
    old = Calibration.from_dict(data, tmp_path)
    assert json.loads(old.to_json()) == data
    loaded.calibration = old
    with pytest.raises(CalibrationError, match="calibrated without hidden"):
        loaded.anomaly_score(IMAGES, "hidden")
    with pytest.raises(CalibrationError, match="calibrated without maps"):
        loaded.anomaly_map(IMAGES, method="combined")


def test_both_parts_of_the_combined_map_are_standardized_over_normal_pixels(mapped):
    reference, examination, parts = mapped.calibration.maps, Examination.open(mapped, IMAGES), []
    chosen = Roles.choose(divide_objects(np.arange(60), 60, 0)[0].fitting).of_pixels
    for evidence in examination.examine(MAPPED, chosen):
        surprisal = map_hidden(examination, reference.codes, evidence)
        parts.append(blur_maps(examination, reference, standard_cells(reference, evidence), surprisal).flatten(1))
    values = torch.cat(parts, 1).numpy()
    np.testing.assert_allclose(values.mean(1), reference.pixel_mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(values.std(1), reference.pixel_deviation, rtol=1e-3)


def test_a_prior_of_one_order_has_maps_of_tiles_only():
    pipe = make("gpt")
    pipe.calibrate(IMAGES)
    assert pipe.calibration.maps is None
    pipe.calibrate(IMAGES, stride=8)
    assert {"hidden", "map"} <= set(pipe.calibration.scores)


def test_p_values_hold_for_whole_images_of_larger_size():
    pipe = make()
    images = [image[0, :24, :20].numpy() for image in stripes(180, 0, side=24)[:, None, 0]]
    pipe.calibrate(images[:100], stride=8)
    heats = pipe.anomaly_map(images[100:], method="combined", stride=8)
    regions = pipe.calibration.scores["map"]
    highest = np.array([float(heat.max()) for heat in heats])
    for p in (
        pipe.anomaly_score(images[100:], "hidden", stride=8, p_values=True).numpy(),
        p_values_of(highest, regions.values, regions.tie),
    ):
        for share in (0.05, 0.2, 0.5):
            assert abs((p <= share).mean() - share) < 4 * math.sqrt(share * (1 - share) * (1 / 80 + 1 / 50))
    assert (highest > regions.threshold).tolist() == (p <= 0.05).tolist()


def test_the_score_of_a_map_is_its_top_less_its_median():
    values = torch.arange(1000.0)[torch.randperm(1000)].reshape(20, 50)
    tops = [999, 998, 994.5, 984.5, 949.5]  # the mean of the highest 1, 3, 10, 30 and 100
    assert peak_of(values) == pytest.approx(np.mean(tops) - 499)


def test_an_image_is_as_unusual_as_its_peak_or_its_change_along_the_calmer_axis(mapped):
    heat, cells = torch.zeros(16, 16), torch.zeros(8, 6, 21)
    heat[3, 4], cells[4:] = 3, 0.5
    peak, down, across = peak_and_changes(heat, cells)
    assert down == pytest.approx(math.log(0.501)) and across == pytest.approx(math.log(1e-3))
    for mean, expected in (
        ([peak - 3, down - 1, across], 3),
        ([peak + 1, down - 2, across + 9], 2 - HANDICAP),
        ([peak + 1, down + 9, across - 9], 9 - HANDICAP),  # rows of normal images differ, columns do not
    ):
        update = {"image_mean": np.array(mean), "image_deviation": np.ones(3)}
        assert score_map(mapped.calibration.maps.model_copy(update=update), heat, cells) == pytest.approx(expected)


# Filters ------------------------------------------------------------------------------------------


def test_exposure_does_not_matter_and_a_spot_does():
    torch.manual_seed(0)
    levels = 0.3 + 0.2 * torch.rand(1, 64, 48)
    first, brighter = (filter_responses(2 * levels * gain - 1) for gain in (1.0, 1.6))
    assert float((first - brighter).abs().max()) < 0.2 * float(first.abs().max())
    spotted = levels.clone()
    spotted[:, 20:26, 30:36] *= 0.3
    change = (filter_responses(2 * spotted - 1) - first).abs().amax(-1)
    assert divmod(int(change.argmax()), 6) == (2, 4) or change[2:4, 3:5].max() == change.max()


@settings(max_examples=30, deadline=None)
@given(height=st.integers(3, 70), width=st.integers(3, 70), channels=st.integers(1, 4))
def test_every_pixel_has_a_distance_at_any_size(height, width, channels):
    found = filter_responses(torch.rand(channels, height, width) * 2 - 1)
    assert found.isfinite().all()
    far = spread_cells(nearest_distances(found.flatten(0, 1), torch.zeros(2, found.shape[2])).reshape(found.shape[:2]),
                       (height, width))  # fmt: skip
    assert far.shape == (height, width) and (far >= 0).all()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 40), columns=st.integers(1, 9), step=st.floats(0.1, 0.9), data=st.data())
def test_the_largest_change_is_the_step_at_a_border(rows, columns, step, data):
    border = data.draw(st.integers(1, rows - 1))
    cells = torch.zeros(rows, columns, 3)
    cells[border:] = step
    reach = min(8, rows // 2)
    nearest = min(max(border, reach), rows - reach)  # borders nearer to the rim are within one of its windows
    expected = step * (1 - abs(border - nearest) / reach)
    for turned in (cells, cells.transpose(0, 1)):
        down, across = largest_changes(turned).tolist()
        assert max(down, across) == pytest.approx(expected, abs=1e-6) and min(down, across) == pytest.approx(
            0, abs=1e-6
        )
    cells[:, 0] *= 100  # a few large responses
    assert float(largest_changes(cells).max()) <= 1


def test_a_blur_keeps_the_mean_of_flat_regions_and_spreads_a_point():
    point = torch.zeros(41, 41)
    point[20, 20] = 1
    found = smooth(point, 2.0)
    assert float(found.sum()) == pytest.approx(1, abs=1e-4)
    assert float(found[20, 20] / found[20, 22]) == pytest.approx(math.exp(0.5), rel=1e-3)
    torch.testing.assert_close(smooth(torch.full((5, 9), 3.0), 4.0), torch.full((5, 9), 3.0))
