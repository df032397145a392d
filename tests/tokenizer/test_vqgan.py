"""Promises of the VQGAN network, beyond those of every tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from small import QUANTIZERS, make_tokenizer, quantizer_of

from tokenizer import Tokenizer
from tokenizer.files import ConfigError
from tokenizer.losses import total_loss
from tokenizer.vqgan import Attention, Block, Downsample


def keys_of(**config):
    with torch.device("meta"):
        return set(make_tokenizer("vqgan", (16, 16), **config).state_dict())


@pytest.mark.parametrize(("widths", "grid"), [((8,), (16, 24)), ((8, 16), (8, 12)), ((8, 4, 8, 12), (2, 3))])
def test_every_level_but_one_halves_the_grid(widths, grid):
    tokenizer = make_tokenizer("vqgan", (16, 24), widths=widths).eval()
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    assert tokenizer.grid.shape == grid and tokenizer(images).images.shape == images.shape
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_quantizer_fits(kind):
    tokenizer = make_tokenizer("vqgan", (8, 8), quantizer=quantizer_of(kind, 4, 4)).train()
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    output = tokenizer(images)
    loss, _ = total_loss(output, images, {"l1": 1.0, "l2": 0.0, **tokenizer.loss_weights})
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in tokenizer.parameters())
    assert output.tokens.shape == (4, *tokenizer.quantizer.grid_shape(4, 4))


def test_attention_stands_where_it_is_asked_for():
    at_last = keys_of(widths=(8, 8, 16))
    assert at_last == keys_of(widths=(8, 8, 16), encoder_attention=(2,), decoder_attention=(2, -1))
    everywhere = keys_of(widths=(8, 8, 16), encoder_attention=(0, 1, 2), decoder_attention=(0, 1, 2))
    nowhere = keys_of(widths=(8, 8, 16), encoder_attention=None, decoder_attention=None, mid_attention=False)
    between = keys_of(widths=(8, 8, 16), encoder_attention=None, decoder_attention=None)
    decoder = keys_of(widths=(8, 8, 16), encoder_attention=None, decoder_attention=(0,))
    assert not any(".q." in key for key in nowhere) and nowhere < between < at_last < everywhere
    assert {key.rpartition(".q.weight")[0] for key in between if key.endswith(".q.weight")} == {
        "encoder.middle.1",
        "decoder.middle.1",
    }
    # The decoder has one more block, and its finest level runs last.
    found = {key.rpartition(".q.weight")[0] for key in decoder - between if key.endswith(".q.weight")}
    assert found == {"decoder.levels.2.attention.0", "decoder.levels.2.attention.1"}


def test_downsampling_is_padded_below_and_to_the_right():
    """Tap (i, j) of the kernel reads pixel (2 r + i, 2 c + j), and zeros beyond the last row and column."""
    layer, x = Downsample(1), torch.rand(1, 1, 6, 4)
    for row in range(3):
        for column in range(3):
            layer[1].weight.data.zero_()[0, 0, row, column] = 1
            expected = F.pad(x, (0, 2, 0, 2))[..., row::2, column::2][..., :3, :2]
            assert torch.allclose(layer(x) - layer[1].bias, expected, atol=1e-6)


def test_attention_treats_positions_alike_and_mixes_them():
    layer = Attention(8, 4).eval()
    x = torch.randn(2, 8, 3, 4)
    order = torch.randperm(12)
    shuffled = x.flatten(2)[..., order].reshape(x.shape)
    assert torch.allclose(layer(shuffled).flatten(2), layer(x).flatten(2)[..., order], atol=1e-5)
    x.requires_grad_()
    (layer(x) - x)[0, :, 0, 0].sum().backward()
    assert (x.grad[0].abs().sum(0) > 0).all() and not x.grad[1].any()


def test_only_a_block_that_widens_has_a_projection_on_its_short_cut():
    assert {key.split(".")[0] for key in Block(8, 8, 4).state_dict()} == {"norm1", "conv1", "norm2", "conv2"}
    block, x = Block(8, 12, 4), torch.randn(2, 8, 5, 5)
    for parameter in block.conv2.parameters():
        parameter.data.zero_()
    assert torch.equal(block(x), block.skip(x)) and block(x).shape == (2, 12, 5, 5)


def test_the_first_convolution_may_be_narrower():
    tokenizer = make_tokenizer("vqgan", widths=(16, 8), stem=4)
    assert tokenizer.encoder.stem.weight.shape == (4, 3, 3, 3) and tokenizer.decoder.head.weight.shape == (3, 16, 3, 3)
    assert tokenizer(torch.rand(1, 3, 12, 8)).images.shape == (1, 3, 12, 8)


def test_the_last_layer_puts_out_the_pixels():
    tokenizer = make_tokenizer("vqgan")
    assert tokenizer.last_layer is tokenizer.decoder.head.weight


def test_it_works_in_channels_last():
    tokenizer = make_tokenizer("vqgan")
    z = tokenizer._embed(torch.rand(2, 3, 12, 8))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert tokenizer.decoder.stem.weight.is_contiguous(memory_format=torch.channels_last)


def test_it_learns():
    tokenizer = make_tokenizer("vqgan", (8, 8), 1).train()
    images = torch.rand(8, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3) * 2 - 1
    optimizer = torch.optim.Adam(tokenizer.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss, terms = total_loss(tokenizer(images), images, {"l1": 0.0, "l2": 1.0, **tokenizer.loss_weights})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(terms["l2"].item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_size": (30, 32)}, "widths: .*30x32"),
        ({"widths": (8,) * 13}, "widths: 13 levels"),
        ({"widths": (8, 18, 8)}, "groups: 4 does not divide the width 18"),
        ({"stem": 6}, "groups: 4 does not divide the width 6"),
        ({"encoder_attention": (3,)}, r"encoder_attention: the levels are 0 to 2 \(got \[3\]\)"),
        ({"decoder_attention": (0, -4)}, r"decoder_attention: the levels are 0 to 2"),
        ({"image_size": (8,)}, "image_size: expected"),
        ({"blocks": 0}, "blocks: must be >= 1"),
        ({"quantizer": {"kind": "vqq"}}, "no Quantizer is called 'vqq'"),
    ],
)
def test_bad_configurations_are_named(config, message):
    choices = {"image_size": (32, 32), "channels": 3, "widths": (8, 8, 16), "groups": 4, **config}
    with pytest.raises(ConfigError, match=message):
        Tokenizer.create("vqgan", **choices)


def test_the_preset_is_llamagens_network():
    """71.88 million parameters, as its published weights have."""
    path = Path(__file__).parents[2] / "configs" / "tokenizer" / "vqgan_imagenet256.yaml"
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    with torch.device("meta"):
        tokenizer = Tokenizer.create(model.pop("kind"), image_size=(256, 256), channels=3, **model)
    assert sum(p.numel() for p in tokenizer.parameters()) == 71_883_403
    assert tokenizer.grid.shape == (16, 16) and tokenizer.grid.vocab_size == 16384
