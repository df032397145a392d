"""How decoders grow: of every factor, size and depth, beside every quantizer and likelihood, and as it was before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import QUANTIZERS, make_tokenizer, quantizer_of
from torch import Tensor, nn

from pipelines.training.blocks import checkpoint_blocks, repeated_blocks
from pipelines.training.optimizers import hidden_matrices
from tokenizer import Tokenizer
from tokenizer.files import ConfigError
from tokenizer.layers import NarrowBlock, Shuffle
from tokenizer.likelihoods import Likelihood
from tokenizer.losses import total_loss

FORMS = [(factor, count) for factor in (2, 4, 8, 16) for count in range(1, factor.bit_length() + 1)]
"""Factors, and how many resolutions have a width: with as many as halvings, and one more, a patch is one pixel."""


def form(factor: int, count: int, **more: Any) -> dict[str, Any]:
    """The settings of a small network of so many resolutions."""
    return {"factor": factor, "widths": (8,) * count, "blocks": (1,) * count, **more}


def images_for(tokenizer: Tokenizer, count: int = 2) -> Tensor:
    return torch.rand(count, *tokenizer.image_shape) * 2 - 1


def resolutions(tokenizer: Tokenizer, images: Tensor) -> list[tuple[int, int, int]]:
    """Channels, height and width of what each convolution of the decoder puts out."""
    found = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: found.append(tuple(out.shape[1:])))
        for module in tokenizer.decoder.modules()
        if isinstance(module, nn.Conv2d)
    ]
    tokenizer(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize(("factor", "count"), FORMS)
def test_every_factor_paints_every_size(factor, count):
    """Odd numbers of tokens, and sides that differ; every weight gets a gradient; decode is what forward gives."""
    channels = 3 if count % 2 else 1
    tokenizer = make_tokenizer("vqvae", (3 * factor, factor), channels, **form(factor, count)).train()
    images = images_for(tokenizer)
    output = tokenizer(images)
    assert output.images.shape == images.shape == (2, channels, 3 * factor, factor) and tokenizer.grid.shape == (3, 1)
    loss, _ = total_loss(output, images, {"l1": 1.0, "l2": 1.0, **tokenizer.loss_weights})
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tokenizer.parameters())
    tokenizer.eval()
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)
    doublings = factor.bit_length() - 1
    assert sum(isinstance(module, Shuffle) for module in tokenizer.decoder) == doublings
    narrow = max(0, doublings - count)  # of those inside a patch, all but that to the image's resolution
    assert sum(isinstance(module, NarrowBlock) for module in tokenizer.decoder) == narrow
    widths = [shuffle[0].out_channels // 4 for shuffle in tokenizer.decoder if isinstance(shuffle, Shuffle)]
    assert widths == [8] * (count - 1) + [96, 48, 24, 8][3 - narrow :] * (count <= doublings)


def test_convolutions_narrow_towards_the_image():
    """At the image's resolution there is one alone, from few channels: there it costs most."""
    tokenizer = make_tokenizer("vqvae", (16, 24), factor=8, widths=(16,), blocks=(0,), tail=(12, 10, 6)).eval()
    found = resolutions(tokenizer, images_for(tokenizer))
    assert found == [
        (16, 2, 3),
        (4 * 12, 2, 3),
        (12, 4, 6),
        (12, 4, 6),
        (4 * 10, 4, 6),
        (10, 8, 12),
        (10, 8, 12),
        (4 * 6, 8, 12),
        (3, 16, 24),
    ]


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_quantizer_goes_with_it(kind):
    tokenizer = make_tokenizer(
        "vqvae", (16, 24), 1, **form(8, 2, attention=True), quantizer=quantizer_of(kind, 2, 3)
    ).train()
    images = images_for(tokenizer)
    tokenizer(images).images.square().mean().backward()
    tokenizer.eval()
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)


@pytest.mark.parametrize("name", ["vqvae", "klvae"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("likelihood", Likelihood.available())
def test_a_likelihood_has_channels_enough(likelihood, channels, name):
    """More than an image has, as there is more to say of a pixel; a table of 256 values sums to 1."""
    node = {"kind": likelihood}
    tokenizer = make_tokenizer(name, (8, 12), channels, **form(4, 1, likelihood=node)).eval()
    outputs = tokenizer.likelihood.num_parameters
    assert tokenizer.last_layer.shape == (outputs, 32, 3, 3) and outputs == tokenizer.outputs
    images = (images_for(tokenizer) * 127.5).round() / 127.5
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        values = ((images + 1) * 127.5).round().long()
        table = tokenizer.value_log_probs(tokens, values, channels - 1)
    assert torch.allclose(table.exp().sum(1), torch.ones(2, 8, 12), atol=1e-4)


@pytest.mark.parametrize("name", ["vqvae", "klvae"])
def test_memory_stays_channels_last(name):
    tokenizer = make_tokenizer(name, (16, 16), **form(8, 1)).eval()
    layers = [module for module in tokenizer.decoder.modules() if isinstance(module, (nn.Conv2d, nn.PixelShuffle))]
    formats = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _, given, __: formats.append(given[0].is_contiguous(memory_format=torch.channels_last))
        )
    tokenizer(images_for(tokenizer))
    assert len(formats) == len(layers) and all(formats[1:])  # the first gets what the quantizer gives


def test_checkpointed_blocks_give_the_same_gradients():
    """Those near the image too, where maps are largest, from two on."""
    models = [make_tokenizer("vqvae", (16, 16), **form(16, 1)).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    images, blocks = images_for(models[0]), repeated_blocks(models[1])
    assert sum(isinstance(block, NarrowBlock) for block in blocks) == 3
    checkpoint_blocks(blocks)
    for model in models:
        model(images).images.square().mean().backward()
    pairs = zip(models[0].named_parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(mine.grad, theirs.grad) for (_, mine), theirs in pairs)


def test_muon_moves_the_kernels_that_are_large_enough():
    """Not the last one, which has a row for each channel of the image."""
    tokenizer = make_tokenizer("vqvae", (16, 16), factor=8, widths=(16, 32), blocks=(1, 1))
    moved = hidden_matrices(tokenizer)
    names = {name for name, p in tokenizer.named_parameters() if p in moved}
    kernels = {name for name, p in tokenizer.named_parameters() if p.ndim == 4}
    small = {name for name in kernels if tokenizer.get_parameter(name).shape[0] < 16}
    assert names == kernels - small and tokenizer.last_layer not in moved


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tail": (8,)}, "tail: needs 2 numbers, one per doubling inside a patch of 4 (got 1)"),
        ({"tail": (8, 8), "upsampling": "nearest"}, "tail: needs upsampling=subpixel"),
        ({"tail": (8, 0)}, "tail: must be >= 1 (got 0)"),
        ({"tail": (8,), **form(4, 3)}, "tail: needs 0 numbers, one per doubling inside a patch of 1 (got 1)"),
        ({"upsampling": "bilinear"}, "upsampling: must be one of 'nearest', 'subpixel' (got 'bilinear')"),
        ({"factor": 2, "widths": (8,) * 4, "blocks": (1,) * 4, "tail": ()}, "resolutions need a factor of 8 or more"),
    ],
)
def test_wrong_settings_are_named(config, message):
    with pytest.raises(ConfigError) as caught:
        make_tokenizer("vqvae", (16, 16), **config)
    assert message in str(caught.value) and "\n" not in str(caught.value) and "patch of 0" not in str(caught.value)


# As it was before


def without(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as it was saved before there was a choice, in nodes too."""
    found = {key: without(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in found.items() if key not in ("upsampling", "tail")}


def test_bins_are_not_fitted_to_a_vae_that_grows_otherwise():
    node = {"kind": "klvae", "widths": (16,), "blocks": (1,), "latent": 3}
    other = make_tokenizer("klvae", upsampling="nearest")
    with pytest.raises(ConfigError, match=r"vae.upsampling .*nearest there, subpixel here"):
        make_tokenizer("posthoc", vae=node).start_from(other)
