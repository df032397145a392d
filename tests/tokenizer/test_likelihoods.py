"""Likelihoods of pixels: distributions over 256 values, in training, and the bits of images."""

import math

import pytest
import torch
from small import make_prior, make_tokenizer

from pipelines import ImagePipeline
from pipelines.train_tokenizer import TokenizerTask, TrainTokenizerConfig
from tokenizer.base import LikelihoodError
from tokenizer.likelihoods import Likelihood, to_intensities, to_values

LIKELIHOODS = Likelihood.available()
every_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)
each_channel_count = pytest.mark.parametrize("channels", [1, 3])


def likelihood_of(name, channels=1, **config):
    member = Likelihood.find(name)
    return member(member.Config(**config), channels)


def parameters_of(model, scale=3.0, dtype=torch.float64, size=(3, 4)):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, model.num_parameters, *size, generator=generator) * scale).to(dtype)


def values_of(channels, size=(3, 4)):
    return torch.randint(0, 256, (2, channels, *size), generator=torch.Generator().manual_seed(1))


@every_likelihood
@each_channel_count
@pytest.mark.parametrize("scale", [0.0, 5.0, 40.0])
def test_all_256_values_sum_to_one(name, channels, scale):
    model, values = likelihood_of(name, channels), values_of(channels)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 5e-4)):
        parameters = parameters_of(model, scale, dtype)
        for channel in range(channels):
            table = model.table(parameters, values, channel)
            assert table.shape == (2, 256, 3, 4) and table.dtype == dtype
            assert table.logsumexp(1).abs().max() < tolerance


@every_likelihood
@each_channel_count
def test_log_prob_is_the_tables_entry(name, channels):
    model, values = likelihood_of(name, channels), values_of(channels)
    parameters = parameters_of(model)
    picked = [model.table(parameters, values, c).gather(1, values[:, c, None]) for c in range(channels)]
    torch.testing.assert_close(model.log_prob(parameters, values), torch.cat(picked, 1))


@every_likelihood
def test_no_pixel_costs_more_than_24_bits(name):
    model = likelihood_of(name)
    table = model.table(parameters_of(model, 1000.0), values_of(1), 0)
    assert -24 - 1e-6 <= float(table.min()) / math.log(2) < -23


@every_likelihood
def test_channels_depend_only_on_earlier_channels(name):
    model, values = likelihood_of(name, 3), values_of(3)
    parameters = parameters_of(model)
    before = model.log_prob(parameters, values)
    for channel in range(3):
        other = values.clone()
        other[:, channel] = 255 - other[:, channel]
        changed = (model.log_prob(parameters, other) != before).flatten(2).any(2).any(0)
        assert not changed[:channel].any()
        if name == "discretized_logistic":
            assert changed[channel:].all()


@every_likelihood
@each_channel_count
def test_mean_is_the_mean_of_the_distribution(name, channels):
    """Of narrow logistics, because clamping at black and white changes the mean of wide ones."""
    model = likelihood_of(name, channels)
    parameters = parameters_of(model, 0.3 if name == "discretized_logistic" else 3.0)
    if name == "discretized_logistic":
        for part, size in zip(parameters.split(model.sizes, 1), model.sizes, strict=True):
            count = model.config.components
            part[:, count : 2 * count] = -model.spread.double() + 0.2
            part[:, 2 * count : 3 * count] = -2.5
            part[:, 3 * count : size] = 0
    intensities = to_intensities(torch.arange(256), torch.float64)[None, :, None, None]
    values = torch.zeros(2, channels, 3, 4, dtype=torch.long)
    expected = [(model.table(parameters, values, c).exp() * intensities).sum(1) for c in range(channels)]
    torch.testing.assert_close(model.mean(parameters).double(), torch.stack(expected, 1), atol=2e-3, rtol=0)


def test_blue_depends_on_the_channel_of_its_coefficient():
    model = likelihood_of("discretized_logistic", 3, components=1)
    red, green, blue = parameters_of(model, 0.0).split(model.sizes, 1)
    for part, mean in ((red, 0.6), (green, -0.6), (blue, 0.0)):
        part[:, 1], part[:, 2] = mean, -3.0  # scales e^-5
    blue[:, 3] = 10.0  # tanh: 1 times red, and nothing of green
    parameters, values = torch.cat([red, green, blue], 1), torch.tensor([200, 50, 0]).reshape(1, 3, 1, 1)
    likeliest = model.table(parameters, values.expand(2, 3, 3, 4), 2).argmax(1)
    assert (likeliest - 200).abs().max() <= 1
    torch.testing.assert_close(model.mean(parameters)[:, 2], torch.full((2, 3, 4), 0.6))


# In the tokenizer


def vqvae_with(name, **config):
    return make_tokenizer("vqvae", (8, 8), 1, likelihood={"kind": name}, **config)


def images_of(count=3, size=8, channels=1, seed=0):
    values = torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(seed))
    return values / 127.5 - 1


@every_likelihood
def test_vqvae_trains_its_likelihood(name):
    model, images = vqvae_with(name).train(), images_of()
    output = model(images)
    assert model.loss_weights["nll"] == 1
    output.losses["nll"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    model.eval()
    with torch.no_grad():
        each = model.pixel_log_probs(images, model.encode(images))
        torch.testing.assert_close(model(images).losses["nll"], -each.mean())
        torch.testing.assert_close(model.pixel_log_prob(images, model.encode(images)), each.flatten(1).sum(1))
        table = model.value_log_probs(model.encode(images), to_values(images), 0)
        torch.testing.assert_close(table.gather(1, to_values(images)), each)
    plain = make_tokenizer("vqvae", (8, 8), 1).eval()
    with pytest.raises(LikelihoodError, match="likelihood"):
        plain.pixel_log_probs(images, plain.encode(images))


# In the pipeline


def pipeline_of(tokenizer, kind="gpt"):
    prior = make_prior(kind, tokenizer.grid.shape, tokenizer.grid.vocab_size, tokenizer=tokenizer.fingerprint())
    return ImagePipeline(tokenizer, prior)


@every_likelihood
def test_two_part_bits_exceed_the_marginal_by_the_posterior(name):
    tokenizer = make_tokenizer(
        "vqvae", (4, 4), 1, likelihood={"kind": name}, quantizer={"kind": "ema", "codes": 6, "dim": 4}
    )
    pipe, images = pipeline_of(tokenizer), images_of(4, 4)
    every = torch.arange(6).reshape(6, 1, 1)
    with torch.no_grad():
        joint = torch.stack(
            [pipe.prior.log_prob(every) + tokenizer.pixel_log_prob(image.expand(6, 1, 4, 4), every) for image in images]
        ).double()
    marginal, chosen = joint.logsumexp(1), tokenizer.encode(images).flatten()
    two_part = -pipe.bits_per_dim(images).double() * 16 * math.log(2)
    assert (two_part <= marginal + 1e-4).all()
    posterior = (joint - marginal[:, None]).gather(1, chosen[:, None])[:, 0]
    torch.testing.assert_close(two_part - marginal, posterior, atol=1e-3, rtol=1e-5)


# In training


def test_the_likelihood_has_a_weight_of_its_own(tmp_path):
    """`loss.quantizer` is a factor on the quantizer's terms, not on the likelihood's."""
    given = {
        "out": str(tmp_path),
        "data": {"source": "digits", "limit": 8},
        "model": {"kind": "vqvae", "widths": [8], "blocks": [0], "likelihood": {"kind": "discretized_logistic"}},
        "loss": {"nll": 2.0, "quantizer": 3.0, "l2": 0.0},
    }
    weights = TokenizerTask(TrainTokenizerConfig(**given)).weights
    assert weights["nll"] == 2 and weights["commitment"] == pytest.approx(0.75) and weights["l2"] == 0
