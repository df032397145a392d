"""VAEs as tokenizers: bins of equal probability, the KL and its free bits, and bins fitted to a trained VAE."""

import math

import pytest
import torch
from small import make_tokenizer

from tokenizer import Tokenizer
from tokenizer.files import ConfigError
from tokenizer.klvae import Bins, gaussian_bins, gaussian_kl, sample_gaussian


def pictures(count=64, channels=3, size=(12, 8)):
    """Smooth random images `(count, channels, *size)`."""
    noise = torch.randn(count, channels, *(side // 4 for side in size))
    return torch.nn.functional.interpolate(noise, scale_factor=4, mode="bilinear").tanh()


def frequencies(tokens, levels, bins):
    """How often each id of each dimension occurs, (levels, bins), of tokens `(B, levels * rows, ...)`."""
    return torch.stack([torch.bincount(level.flatten(), minlength=bins) for level in tokens.chunk(levels, 1)])


def fitted(rows, bins):
    """Bins of `rows` (n, dim), and their tokens (n, dim)."""
    quantizer = Bins(rows.shape[1], bins)
    quantizer.fit(rows)
    return quantizer, quantizer.quantize(rows[:, :, None]).tokens


# Bins


@pytest.mark.parametrize("bins", [2, 3, 4096])
def test_gaussian_centres_are_conditional_means(bins):
    """Centres against a numerical integral, edges against the error function."""
    edges, centres = gaussian_bins(bins)
    assert torch.allclose(torch.special.ndtr(edges), torch.arange(1, bins).double() / bins, atol=1e-12)
    ends = torch.tensor([-9.0, 9.0], dtype=torch.float64)
    bounds = torch.cat([ends[:1], edges, ends[1:]])
    for k in {0, 1, bins // 2, bins - 1}:
        z = torch.linspace(float(bounds[k]), float(bounds[k + 1]), 20_001, dtype=torch.float64)
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        assert float(centres[k]) == pytest.approx(bins * float(torch.trapezoid(z * density, z)), abs=1e-5)
    assert (Bins(1, bins).centres.diff() > 0).all(), "distinct in float32 too"


def test_fitted_bins_are_equally_frequent_and_their_centres_are_means():
    rows = torch.cat([torch.randn(1000, 1).exp(), torch.rand(1000, 1) * 0.1 + 5, torch.randn(1000, 1) ** 3], 1)
    quantizer, tokens = fitted(rows, 7)
    counts = frequencies(tokens, 3, 7)
    assert counts.min() == 142 and counts.max() == 143
    for dimension in range(3):
        means = torch.stack([rows[tokens[:, dimension].flatten() == k, dimension].mean() for k in range(7)])
        torch.testing.assert_close(quantizer.centres[dimension], means)


def test_ties_and_collapsed_dimensions():
    constant, half = torch.full((100, 1), -3.0), torch.cat([torch.zeros(50), torch.randn(50).abs() + 1])[:, None]
    quantizer, tokens = fitted(torch.cat([constant, half, 0 * constant], 1), 8)
    assert (quantizer.edges.diff() >= 0).all() and (quantizer.centres.diff() > 0).all()
    counts = frequencies(tokens, 3, 8)
    assert counts[0].max() == 100 and counts[2].max() == 100 and counts[1].max() == 50
    found = quantizer.lookup(tokens)[:, :, 0]
    assert torch.allclose(found[:, 0], constant[:, 0]) and found[:50, 1].abs().max() < 1e-6
    with pytest.raises(ValueError, match="8 bins"):
        quantizer.fit(torch.randn(7, 3))


def test_bins_stay_float32_and_pass_gradients():
    quantizer, z = Bins(3, 16), torch.randn(4, 3, 8, 8)
    tokens = quantizer.quantize(z).tokens
    assert torch.equal(quantizer.bfloat16().quantize(z).tokens, tokens) and quantizer.edges.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.quantize(z).z_q, quantizer.lookup(tokens))
    z.requires_grad_()
    quantizer.quantize(z).z_q.square().sum().backward()
    assert (z.grad.abs().sum((0, 2, 3)) > 0).all()


# The VAE


def test_kl_is_the_integral():
    """Against a Monte Carlo estimate of E_q[log q - log p]."""
    mean, log_variance = torch.tensor([0.0, 1.5, -0.3, 0.0]), torch.tensor([0.0, -2.0, 1.0, -9.0])
    exact = gaussian_kl(mean, log_variance)
    z = sample_gaussian(mean.double().expand(200_000, 4), log_variance.double())
    q, p = torch.distributions.Normal(mean, (log_variance / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    assert torch.allclose((q.log_prob(z) - p.log_prob(z)).mean(0).float(), exact, atol=0.02)
    assert exact[0] == 0 and (gaussian_kl(torch.zeros(999), torch.randn(999) * 1e-4) >= -1e-8).all()


def test_the_unit_is_nats_per_pixel_channel():
    vae = make_tokenizer("klvae")
    mean, log_variance = vae.posterior(pictures())
    assert mean.shape == log_variance.shape == (64, 3, 3, 2)
    per_image = gaussian_kl(mean, log_variance).sum().detach() / 64
    assert vae.kl(mean, log_variance).item() == pytest.approx(per_image.item() / (3 * 12 * 8), rel=1e-5)
    assert vae.loss_weights == {"kl": vae.config.beta}


def test_free_bits_cost_nothing():
    """A dimension whose batch mean is below the floor gets no gradient; the others get the usual one."""
    gradients = {}
    for free_bits in (0.0, 0.5):
        vae = make_tokenizer("klvae", free_bits=free_bits)
        mean = torch.zeros(4, 3, 3, 2)
        mean[:, 0], mean[0, 1], mean[:, 2] = 2.0, 1.9, 0.1  # 2 nats; 1.8 of one image are 0.45 on average; 0.005
        mean.requires_grad_()
        loss = vae.kl(mean, torch.zeros_like(mean))
        loss.backward()
        gradients[free_bits] = mean.grad
        floors = [2.0, max(0.45125, free_bits), max(0.005, free_bits)]
        assert loss.item() == pytest.approx(sum(floors) / (3 * 16), rel=1e-5)
    assert (gradients[0.5][:, 1:] == 0).all() and (gradients[0.0][:, 2] != 0).all() and gradients[0.0][0, 1, 0, 0] != 0
    assert torch.equal(gradients[0.5][:, 0], gradients[0.0][:, 0]) and gradients[0.5][:, 0].abs().min() > 0


def test_only_training_adds_noise():
    vae, images = make_tokenizer("klvae"), pictures(4)
    first, other = vae.train()(images), vae(images)
    assert not torch.equal(first.images, other.images) and torch.equal(first.tokens, other.tokens)
    assert torch.equal(vae.eval()(images).tokens, first.tokens), "tokens are those of the mean"
    mean, log_variance = vae.posterior(images)
    standard = (sample_gaussian(mean.expand(2000, *mean.shape), log_variance) - mean) / (log_variance / 2).exp()
    assert standard.mean().abs() < 0.01 and (standard.std() - 1).abs() < 0.01


# Post-hoc bins


def trained(**config):
    """A VAE whose latents are far from standard normal, as after training with a small beta."""
    vae = make_tokenizer("klvae", **config)
    with torch.no_grad():
        vae.encoder[-1].weight[:3] *= torch.tensor([8.0, 3.0, 0.3])[:, None, None, None]
        vae.encoder[-1].bias[:3] += torch.tensor([5.0, 0.0, 0.0])
        vae.encoder[-1].bias[3:] -= 8.0
    return vae.eval()


def test_bins_are_those_of_samples_of_the_posterior():
    """q(z) is wider than the distribution of the means. The global seed does not matter."""
    vae, images, edges = trained(), pictures(256), []
    with torch.no_grad():
        vae.encoder[-1].weight[2].zero_()
        vae.encoder[-1].weight[5].zero_()
        vae.encoder[-1].bias[[2, 5]] = 0.0  # collapsed: its posterior is N(0, 1) for every image
    for seed in (0, 1):
        model = make_tokenizer("posthoc", bins=8)
        model.start_from(vae)
        torch.manual_seed(seed)
        model.train(bool(seed)).initialize(images)
        edges.append(model.vae.quantizer.edges)
    assert torch.equal(*edges)
    standard, _ = gaussian_bins(8)
    assert (edges[0][2] - standard).abs().max() < 0.2
    collapsed = frequencies(model.encode(images), 3, 8)[2]
    assert collapsed.max() == collapsed.sum(), "it costs a prior nothing"
    expected = vae.posterior(images)[0].movedim(1, -1).reshape(-1, 3)[:, 0].quantile(0.5)
    assert edges[0][0, 3].item() == pytest.approx(expected.item(), abs=0.2)


def test_a_vae_that_is_not_trained_is_refused():
    model, images = make_tokenizer("posthoc"), pictures(8)
    with pytest.raises(ConfigError, match="init=FOLDER"):
        model.initialize(images)
    model.start_from(trained())
    model.initialize(images)
    with pytest.raises(ConfigError, match="bins: .*1 training images"):
        model.initialize(images[:1])


def test_a_loaded_tokenizer_remembers_that_its_vae_is_trained(tmp_path):
    vae, images = trained(), pictures(16)
    vae.save_pretrained(tmp_path / "vae")
    model = make_tokenizer("posthoc")
    model.start_from(Tokenizer.from_pretrained(tmp_path / "vae"))
    model.initialize(images)
    model.save_pretrained(tmp_path / "posthoc")
    loaded = Tokenizer.from_pretrained(tmp_path / "posthoc")
    assert torch.equal(loaded.encode(images), model.encode(images))
    loaded.initialize(pictures(16))  # to other images
    other = make_tokenizer("posthoc", bins=30)  # the same network in other bins
    other.start_from(loaded)
    other.initialize(images)
    assert torch.equal(other.vae.posterior(images)[0], vae.posterior(images)[0])
    assert loaded.config == model.config


@pytest.mark.parametrize(
    ("kind", "config", "key"),
    [
        ("vqvae", {}, "klvae"),
        ("klvae", {"widths": (16, 8), "blocks": (1, 1)}, r"vae\.widths .*vae\.blocks"),
    ],
)
def test_a_vae_of_other_sizes_is_refused(kind, config, key):
    model = make_tokenizer("posthoc")
    with pytest.raises(ConfigError, match=key):
        model.start_from(make_tokenizer(kind, **config))
    model.start_from(make_tokenizer("klvae", beta=7.0, free_bits=1.0, bins=33))  # settings of training do not matter


def test_a_posthoc_tokenizer_has_nothing_to_train():
    model, images = make_tokenizer("posthoc").train(), pictures(4)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(images).images, model.decode(model.encode(images))), "in training mode too"
