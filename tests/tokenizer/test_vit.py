"""The tokenizer of two transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import QUANTIZERS, make_tokenizer, quantizer_of
from torch.utils.flop_counter import FlopCounterMode

from pipelines.images import DataConfig, load_images
from tokenizer import Tokenizer, vit
from tokenizer.files import ConfigError
from tokenizer.losses import total_loss


def images_for(tokenizer, count=2):
    return torch.rand(count, *tokenizer.image_shape) * 2 - 1


@pytest.mark.parametrize(("size", "factor"), [((8, 6), 2), ((8, 12), 4), ((14, 21), 7), ((16, 8), 8), ((28, 14), 14)])
def test_every_patch_size(size, factor):
    tokenizer = make_tokenizer("vit", size, 3, factor=factor).train()
    images = images_for(tokenizer)
    assert tokenizer.encoder(images).shape == (2, 8, size[0] // factor, size[1] // factor)
    assert tokenizer(images).tokens.shape == (2, *tokenizer.grid.shape) == (2, size[0] // factor, size[1] // factor)
    tokenizer.eval()
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), tokenizer(images).images)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_quantizer(kind):
    tokenizer = make_tokenizer("vit", quantizer=quantizer_of(kind, 3, 2)).train()
    images = images_for(tokenizer)
    loss, _ = total_loss(tokenizer(images), images, {"l1": 1.0, "l2": 1.0, **tokenizer.loss_weights})
    loss.backward()
    assert all(parameter.grad is not None for parameter in tokenizer.parameters())
    tokenizer.eval()
    expected = tokenizer(images).images
    with torch.inference_mode():  # another path through attention or a norm would give other bits
        assert torch.equal(tokenizer.decode(tokenizer.encode(images)), expected)


def test_a_position_is_a_patch():
    """A pixel goes in and comes out at its patch: without attention, a position sees nothing else."""
    tokenizer = make_tokenizer("vit", (12, 8), 3, factor=4)
    for tower in (tokenizer.encoder[1], tokenizer.decoder[0]):
        for block in tower.blocks:
            torch.nn.init.zeros_(block.project.weight)
    images = images_for(tokenizer, 1)
    z = tokenizer.encoder(images)
    images[0, 1, 5, 6] += 1  # row 1, column 1 of the grid
    moved = (tokenizer.encoder(images) - z).abs().amax((0, 1)) > 0
    assert moved.nonzero().tolist() == [[1, 1]]
    painted = tokenizer.decoder(z)
    z[0, :, 2, 0] += 1
    moved = (tokenizer.decoder(z) - painted).abs().amax((0, 1)) > 0
    assert moved.nonzero().tolist() == [[row, column] for row in range(8, 12) for column in range(4)]


def test_every_position_sees_the_whole_image():
    tokenizer = make_tokenizer("vit", (12, 8), 3, factor=4)
    images = images_for(tokenizer, 1)
    z = tokenizer.encoder(images)
    images[0, 0, 0, 0] += 1
    assert ((tokenizer.encoder(images) - z).abs().amax((0, 1)) > 0).all()


def test_equal_patches_at_other_places_are_told_apart():
    tokenizer = make_tokenizer("vit", (12, 8), 3, factor=4)
    z = tokenizer.encoder(torch.full((1, 3, 12, 8), 0.5))[0].flatten(1).t()
    assert len(z.unique(dim=0)) == 6


def test_no_image_sees_another():
    """To the bit, and for every position, not only for the tokens."""
    tokenizer = make_tokenizer("vit").eval()
    images = images_for(tokenizer, 4)
    z = tokenizer.encoder(images)
    images[0] = -images[0]
    assert torch.equal(tokenizer.encoder(images)[1:], z[1:])
    painted = tokenizer.decoder(z)
    z = torch.cat([-z[:1], z[1:]])
    assert torch.equal(tokenizer.decoder(z)[1:], painted[1:])


def test_memory_formats_give_the_same_bits():
    tokenizer = make_tokenizer("vit").eval()
    z = torch.randn(2, 8, 3, 2)
    assert torch.equal(tokenizer.decoder(z), tokenizer.decoder(z.to(memory_format=torch.channels_last)))
    images = images_for(tokenizer)
    assert torch.equal(tokenizer.encoder(images), tokenizer.encoder(images.to(memory_format=torch.channels_last)))


def test_the_last_layer_puts_out_the_pixels():
    tokenizer = make_tokenizer("vit", (12, 8), 3, factor=4)
    assert tokenizer.last_layer is tokenizer.decoder[0].head.weight and tokenizer.last_layer.shape == (48, 16)


def test_encoding_in_bfloat16():
    tokenizer = make_tokenizer("vit", (16, 16), 1).eval()
    images = images_for(tokenizer, 8)
    with torch.no_grad():
        tokenizer.quantizer.codebook.copy_(tokenizer.encoder(images).movedim(1, -1).reshape(-1, 8)[:32])
        tokens = tokenizer.encode(images)
        with torch.autocast("cpu", torch.bfloat16):
            found = tokenizer.encode(images)
            assert tokenizer(images).images.dtype == torch.float32
    assert (found == tokens).float().mean() > 0.8


def test_attention_is_computed_in_float32_under_a_cpus_autocast(monkeypatch):
    """Where torch is slow in bfloat16; what it is given there by weights of this type stays so."""
    seen, real = [], vit.F.scaled_dot_product_attention
    monkeypatch.setattr(vit.F, "scaled_dot_product_attention", lambda q, k, v: (seen.append(q.dtype), real(q, k, v))[1])
    tokenizer = make_tokenizer("vit").eval()
    images = images_for(tokenizer)
    expected = tokenizer.encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = tokenizer.encoder(images)
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)
    tokenizer.bfloat16().encoder(images.bfloat16())
    assert seen == [torch.float32, torch.float32, torch.bfloat16]


def test_sizes_cost_what_they_should():
    """12 dim^2 multiplications a block and position, beside attention, which the counter does not see on a CPU."""
    tokenizer = Tokenizer.create("vit", image_size=(16, 16), channels=3, factor=4, dim=64, depth=3, heads=4)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        tokenizer.encoder(torch.zeros(1, 3, 16, 16))
    patches, width = 48, tokenizer.quantizer.dim
    expected = 2 * 16 * (3 * 12 * 64**2 + 64 * (patches + width))
    assert expected <= counter.get_total_flops() < 1.1 * expected
    blocks = sum(p.numel() for p in tokenizer.encoder[1].blocks.parameters())
    assert blocks == pytest.approx(3 * 12 * 64**2, rel=0.02)


def test_it_learns_digits():
    """A few seconds of one core: the error falls far below that of the mean image, and the codebook is used."""
    data = load_images(DataConfig()).train
    images = data.batch(np.arange(512))
    tokenizer = Tokenizer.create(
        "vit",
        image_size=(28, 28),
        channels=1,
        factor=7,
        dim=32,
        depth=1,
        heads=2,
        mlp=2,
        quantizer={"kind": "ema", "codes": 64, "dim": 16, "decay": 0.9},
    )
    optimizer = torch.optim.AdamW(tokenizer.train().parameters(), 4e-3)
    mean = float((images - images.mean(0)).square().mean())
    errors, used = [], 0
    for _ in range(120):
        batch = images[torch.randint(len(images), (32,))]
        output = tokenizer(batch)
        loss, terms = total_loss(output, batch, {"l1": 0.0, "l2": 1.0, **tokenizer.loss_weights})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(terms["l2"].item())
        used = len(output.tokens.unique())
    assert errors[0] > 2 * mean and sum(errors[-10:]) / 10 < 0.7 * mean
    assert used >= 32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"factor": 8}, "factor: 8 does not divide the image size 28x28"),
        ({"factor": 5}, "factor: must be one of 2, 4, 7"),
        ({"heads": 3}, "heads: dim must be a multiple of heads .got dim 128, heads 3"),
        ({"depth": 0}, "depth"),
        ({"width": 64}, "unknown key"),
        ({"quantizer": {"kind": "emma"}}, "ema, fsq"),
    ],
)
def test_bad_configurations_are_named(config, message):
    with pytest.raises(ConfigError, match=message):
        Tokenizer.create("vit", **{"image_size": (28, 28), "channels": 1, **config})
