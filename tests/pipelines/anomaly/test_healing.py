"""Anomaly maps and healing."""

from __future__ import annotations

import pytest
import torch
from givens.stripes import SIZE, constant, planted, stripes
from small import PLACED, PRIORS
from small_pipelines import make_conditioned, make_pipeline, pixels_for

from pipelines.anomaly.calibrating import calibrate
from pipelines.anomaly.examine import Examination
from pipelines.anomaly.healing import heal
from pipelines.anomaly.maps import anomaly_map
from pipelines.anomaly.scores import anomaly_score


@pytest.mark.parametrize(("tokenizer", "prior"), [*(("vqvae", prior) for prior in PRIORS), ("titok", "gpt")])
def test_every_prior_has_scores_and_healing_and_a_map_if_tokens_have_a_place(tokenizer, prior):
    pipe = make_pipeline(tokenizer, prior, labels=["cat", "dog"])
    images = torch.randint(0, 256, (43, 1, 8, 12), dtype=torch.uint8)
    calibrate(pipe, images[3:])
    nll = anomaly_score(pipe, images[:3], "nll", labels=1).float()
    assert anomaly_score(pipe, images[:3], p_values=True).shape == (3,)
    if prior != "next_scale":
        healed = heal(pipe, images[:2], draws=2)
        assert healed.images.shape == (2, 1, 8, 12) and healed.tokens.shape == healed.resampled.shape
    if prior == "next_scale" or tokenizer == "titok":
        with pytest.raises(ValueError):
            anomaly_map(pipe, images[:3], labels=1)
        return
    bits = anomaly_map(pipe, images[:3], labels=1)
    torch.testing.assert_close(bits.sum((1, 2)), nll, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tokenizer", PLACED)
def test_a_map_sums_to_the_bits_of_the_image_and_a_token_spreads_over_its_own_patch(tokenizer):
    pipe = make_pipeline(tokenizer, channels=3, size=(8, 12), labels=[])
    images = pixels_for(pipe)
    bits = anomaly_map(pipe, images, batch_size=2)
    assert bits.shape == images.select(-3, 0).shape and (bits >= -1e-5).all()
    nll = anomaly_score(pipe, images, "nll").float()
    torch.testing.assert_close(bits.flatten(1).sum(1), nll, rtol=1e-5, atol=1e-4)
    made, (rows, columns) = pipe.tokenizer, Examination.open(pipe, pixels_for(pipe, 1)).patches
    places = (1, *made.spec.shape[:-3], *made.spec.size)
    for index in range(0, len(made.grid), 5):
        patch = (rows[:, index, None] * columns[None, :, index]) > 0
        assert made.known_tokens(~patch.view(places)).flatten()[index] == 0
        assert made.known_tokens(patch.view(places)).flatten()[index]


def test_healing_removes_a_planted_patch_and_spares_clean_images(trained):
    clean = stripes(64, seed=6)
    marked = planted(clean)
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[4:10, 4:10] = True
    healed = heal(trained, marked)
    assert healed.images.shape == (64, 1, SIZE, SIZE) and healed.images.abs().max() <= 1
    assert healed.resampled.dtype == torch.bool and healed.resampled.shape == (64, *trained.prior.grid.shape)
    assert float(healed.difference[:, inside].mean() / healed.difference[:, ~inside].mean()) > 3
    tokens, touched = trained.encode(marked), healed.resampled.flatten(1).any(1)
    assert torch.equal(tokens[~healed.resampled], healed.tokens[~healed.resampled]) and touched.double().mean() > 0.5
    gain = (trained.prior.log_prob(healed.tokens) - trained.prior.log_prob(tokens))[touched]
    assert gain.mean() > 5 and (gain > 0).double().mean() > 0.75
    torch.testing.assert_close(healed.images, trained.decode(healed.tokens, output_type="pt"))
    shares = [float(heal(trained, clean, quantile=q, draws=1).resampled.float().mean()) for q in (0.995, 0.98, 0.9)]
    assert shares == sorted(shares) and shares[1] < 0.04


def test_large_images_are_healed_as_a_canvas():
    """A calibration of flat tiles: what a prior of these finds surprising is drawn again, and nothing else."""
    pipe = make_pipeline("pixels", "made", 1, size=(4, 4), sizes={"levels": 3}, labels=[], order_agnostic=True)
    with torch.no_grad():
        for parameter in pipe.prior.parameters():
            parameter.zero_()
        pipe.prior.biases[-1].shared.view(16, 3)[:] = torch.tensor([9.0, 4.0, 0.0])  # black, grey, white
    calibrate(pipe, torch.where(torch.rand(100, 1, 4, 4) < 0.1, 0.0, -1.0))
    images = torch.full((2, 1, 12, 8), -1.0)
    images[1, 0, 5:7, 3:6] = 1.0
    healed = heal(pipe, images, stride=2, draws=2)
    assert torch.equal(healed.resampled, images[:, 0] > 0)
    assert healed.images.shape == images.shape and healed.tokens.shape == (2, 12, 8)
    assert (healed.images == -1).all() and torch.equal(healed.difference > 0.5, images[:, 0] > 0)
    alone = heal(pipe, images[1:], stride=2, draws=2, seed=1)
    assert torch.equal(alone.tokens[0], healed.tokens[1])


def test_healing_depends_on_the_seed_of_the_image_only(trained):
    images = torch.cat([planted(stripes(5, seed=7)), constant()[:1]])
    one, two = (heal(trained, images, draws=1, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for k in range(6):
        alone = heal(trained, images[k : k + 1], draws=1, seed=3 + k)
        assert torch.equal(alone.tokens[0], one.tokens[k]) and torch.equal(alone.resampled[0], one.resampled[k])
    heal(trained, images[:2], draws=3, seed=(1 << 63) - 1)  # the largest seed of a verb
    for wrong in ({"quantile": 0.97}, {"draws": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            heal(trained, images[:2], **wrong)


def test_maps_and_healing_use_the_condition_of_each_image():
    torch.manual_seed(0)
    pipe = make_conditioned()
    with torch.no_grad():
        pipe.prior.class_embedding.columns.weight.mul_(200)
    calibrate(pipe, pixels_for(pipe, 43), condition={"age": [20 + number for number in range(43)]})
    new, ages = pixels_for(pipe, 8), [20, 25, 30, 40, 50, 60, 70, 80]
    maps = anomaly_map(pipe, new, condition={"age": ages}, batch_size=3)
    healed = heal(pipe, new, condition={"age": ages}, quantile=0.9, draws=4)
    assert healed.resampled.any()
    for row, age in enumerate(ages):
        one, condition = new[row : row + 1], {"age": age}
        torch.testing.assert_close(anomaly_map(pipe, one, condition=condition)[0], maps[row])
        each = [heal(pipe, one, condition=condition, quantile=0.9, draws=1, seed=4 * row + k) for k in range(4)]
        assert all(torch.equal(other.resampled[0], healed.resampled[row]) for other in each)
        tokens = torch.cat([other.tokens for other in each])
        likeliest = tokens[int(pipe.prior.log_prob(tokens, condition=condition).argmax())]
        assert torch.equal(likeliest, healed.tokens[row])
    assert (anomaly_map(pipe, new) - maps).abs().max() > 0.01
    turned = heal(pipe, new, condition={"age": ages[::-1]}, quantile=0.9, draws=4)
    assert not torch.equal(turned.resampled, healed.resampled)
