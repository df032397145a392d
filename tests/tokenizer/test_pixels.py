"""Tokenizers of single pixels: intensities (`pixels`) and learned colours (`palette`)."""

from __future__ import annotations

import json
import math

import pytest
import torch
from launch import metrics, train_prior, train_tokenizer
from small import make_prior, make_tokenizer

from pipelines import ImagePipeline, encode
from pipelines.config.command import parse
from pipelines.provenance import tokenizer_defaults
from tokenizer import Tokenizer
from tokenizer.files import ConfigError
from tokenizer.palette import distinct_colors, lattice
from tokenizer.quantizers import codebook
from tokenizer.spec import to_float, to_uint8

LEVELS = [2, 7, 256]
BYTES = torch.arange(256, dtype=torch.uint8)


pytestmark = pytest.mark.usefixtures("one_process")


def pixels_of(levels: int, image_size=(16, 16), channels=1):
    return Tokenizer.create("pixels", image_size=image_size, channels=channels, levels=levels).eval()


def bytes_for(tokenizer, count=3) -> torch.Tensor:
    return torch.randint(0, 256, (count, *tokenizer.image_shape), dtype=torch.uint8)


# Pixels


def test_256_levels_keep_every_byte():
    for channels in (1, 3):
        tokenizer = pixels_of(256, (16, 16), channels)
        pixels = BYTES.reshape(1, 1, 16, 16).repeat(1, channels, 1, 1)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            tokens = tokenizer.encode(to_float(pixels).to(dtype))
            assert torch.equal(to_uint8(tokenizer.decode(tokens)), pixels)
        assert torch.equal(tokens.unflatten(1, (16, channels))[:, :, 0].flatten(), torch.arange(256))


@pytest.mark.parametrize("levels", LEVELS)
def test_an_id_is_the_nearest_of_evenly_spaced_levels(levels):
    tokenizer = pixels_of(levels, (1, levels))
    values = tokenizer.decode(torch.arange(levels).reshape(1, 1, -1)).flatten()
    torch.testing.assert_close(values, torch.linspace(-1, 1, levels))
    images = torch.cat([to_float(BYTES), torch.rand(1000) * 2 - 1])
    tokens = tokenizer._nearest(images)
    assert torch.equal(tokens, (images.unsqueeze(1) - values).abs().argmin(1))
    halves = (values[1:] + values[:-1]) / 2
    assert torch.equal(tokenizer._nearest(halves + 1e-5), torch.arange(1, levels))
    assert torch.equal(tokenizer._nearest(halves - 1e-5), torch.arange(levels - 1))
    assert int(tokenizer.sizes.sum()) == 256 and int(tokenizer.sizes.min()) > 0


def test_a_known_pixel_is_known_in_each_channel():
    tokenizer = make_tokenizer("pixels", (4, 5), 3)
    known = torch.rand(2, 4, 5) < 0.5
    mask = tokenizer.known_tokens(known)
    assert mask.dtype == torch.bool and mask.shape == (2, 12, 5)
    assert torch.equal(mask.unflatten(1, (4, 3)).all(2), known) and torch.equal(mask.unflatten(1, (4, 3)).any(2), known)
    assert torch.equal(make_tokenizer("palette", (4, 5), 3).known_tokens(known), known)
    changed = torch.where(known.unsqueeze(1), 0.0, 1.0).expand(2, 3, 4, 5)  # known tokens are those of known pixels
    assert torch.equal(tokenizer.encode(torch.zeros(2, 3, 4, 5)) == tokenizer.encode(changed), mask)


@pytest.mark.parametrize("levels", LEVELS)
def test_probabilities_of_all_images_sum_to_one(levels):
    tokenizer = pixels_of(levels, (1, 1))
    pipe = ImagePipeline(tokenizer, make_prior("marginal", grid=tokenizer.grid, num_classes=0))
    bits = pipe.bits_per_dim(BYTES.reshape(256, 1, 1, 1)).double()
    assert float(torch.exp2(-bits).sum()) == pytest.approx(1, abs=1e-5)


def test_pixels_are_a_function_of_256_levels_alone():
    for levels in (256, 7):
        tokenizer = make_tokenizer("pixels", (4, 5), 3, levels=levels)
        images = to_float(bytes_for(tokenizer, 4))
        tokens = tokenizer.encode(images)
        inside = tokenizer.pixel_log_prob(images, tokens)
        expected = [0.0] * 4 if levels == 256 else (-tokenizer.sizes[tokens].double().log().flatten(1).sum(1)).tolist()
        assert inside.tolist() == pytest.approx(expected, rel=1e-6) and inside.shape == (4,)
        tokens[2, 11, 4] = (tokens[2, 11, 4] + 1) % levels
        other = tokenizer.pixel_log_prob(images, tokens)
        assert other[2] == -math.inf and torch.equal(other[[0, 1, 3]], inside[[0, 1, 3]])


@pytest.mark.parametrize(("levels", "patch"), [(2, 4), (5, 2)])
def test_an_id_names_the_levels_of_a_square(levels, patch):
    """Each id decodes to one square, whose levels are its digits, and encodes to itself."""
    one = Tokenizer.create("pixels", image_size=(patch, patch), channels=1, levels=levels, patch=patch)
    every = torch.arange(levels ** (patch * patch)).reshape(-1, 1, 1)
    assert one.grid.vocab_size == len(every) and torch.equal(one.encode(one.decode(every)), every)
    tokenizer = Tokenizer.create("pixels", image_size=(2 * patch, 3 * patch), channels=1, levels=levels, patch=patch)
    single = pixels_of(levels, (2 * patch, 3 * patch))
    images = to_float(bytes_for(tokenizer, 5))
    tokens = tokenizer.encode(images)
    assert tokens.shape == (5, 2, 3) and tokenizer.grid.channels == 0
    assert torch.equal(tokenizer.decode(tokens), single.decode(single.encode(images)))
    corner = single.encode(images)[:, :patch, patch : 2 * patch].flatten(1)  # the second square
    assert torch.equal((corner * levels ** torch.arange(patch * patch)).sum(1), tokens[:, 0, 1])
    known = torch.rand(2, 2 * patch, 3 * patch) < 0.9
    whole = known.unflatten(2, (3, patch)).unflatten(1, (2, patch)).all(4).all(2)
    assert torch.equal(tokenizer.known_tokens(known), whole)


# Palette


def flat_images(colors: torch.Tensor, reach: int, size=(16, 16)) -> torch.Tensor:
    """8-bit images whose pixels lie within `reach` of one of `colors` (k, C), a byte each."""
    ids = torch.arange(4 * size[0] * size[1]).remainder(len(colors)).reshape(4, *size)
    noise = torch.randint(-reach, reach + 1, (4, *size, colors.shape[1]))
    return to_float((colors[ids] + noise).movedim(-1, 1).to(torch.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_planted_colors_are_found(channels):
    planted = torch.tensor([[20, 30, 220], [90, 200, 40], [130, 90, 30], [170, 30, 160], [240, 240, 240]])[:, :channels]
    images = flat_images(planted, 3)
    tokenizer = make_tokenizer("palette", (16, 16), channels, colors=5)
    tokenizer.initialize(images)
    distances = (tokenizer.table.unsqueeze(1) - to_float(planted)).norm(dim=2)
    assert sorted(distances.argmin(1).tolist()) == [0, 1, 2, 3, 4] and float(distances.min(1).values.max()) < 0.01
    pixels = images.movedim(1, -1)[tokenizer.encode(images) == 2]
    torch.testing.assert_close(tokenizer.table[2], pixels.mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_palette_of_all_colors_is_exact(channels):
    pixels = torch.randint(0, 256, (1, channels, 1, 40), dtype=torch.uint8)
    images = to_float(pixels[..., torch.cat([torch.arange(40), torch.zeros(88).long()])].reshape(1, channels, 8, 16))
    count = len(distinct_colors(images)[0])
    tokenizer = make_tokenizer("palette", (8, 16), channels, colors=count)
    tokenizer.initialize(images)
    assert torch.equal(tokenizer.decode(tokenizer.encode(images)), images)
    with pytest.raises(ConfigError, match=rf"colors: .*{count}\D.*{count + 1}"):
        make_tokenizer("palette", (8, 16), channels, colors=count + 1).initialize(images)


@pytest.mark.parametrize("count", [2, 512])
def test_a_palette_that_is_not_fitted_is_a_lattice_of_distinct_colors(count):
    for channels in (1, 3):
        assert lattice(count, channels).shape == (count, channels) == lattice(count, channels).unique(dim=0).shape


def shaded_images(count=4, size=16) -> torch.Tensor:
    coarse = torch.nn.functional.interpolate(torch.randn(count, 3, 4, 4), (size, size), mode="bilinear")
    return to_float(to_uint8(coarse.clamp(-1, 1)))


def fitted(images: torch.Tensor, colors=30, **config):
    tokenizer = make_tokenizer("palette", tuple(images.shape[2:]), images.shape[1], colors=colors, **config)
    tokenizer.initialize(images)
    return tokenizer


def test_a_palette_is_a_function_of_its_images_and_seed(monkeypatch):
    images = shaded_images()
    state = torch.get_rng_state()
    one = fitted(images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert torch.equal(fitted(images.flip(0)).table, one.table)
    assert not torch.equal(fitted(images, seed=1).table, one.table) and fitted(images, seed=1 << 70)
    monkeypatch.setattr(codebook, "SEARCH_ELEMENTS", 30 * 100)  # 11 chunks
    assert torch.equal(fitted(images).table, one.table)


def test_every_color_is_used_and_different():
    """Even if most pixels are white."""
    images = torch.where(torch.rand(4, 1, 16, 16) < 0.9, 1.0, shaded_images())
    for iterations in (0, 1, 2, 50):
        tokenizer = fitted(images, 60, iterations=iterations)
        tokens = tokenizer.encode(images)
        assert len(tokenizer.table.unique(dim=0)) == 60 == len(tokens.unique())
        assert torch.equal(tokenizer.encode(tokenizer.decode(tokens)), tokens)


def test_a_palette_is_precise_in_every_dtype():
    images = shaded_images()
    tokenizer, half = fitted(images, 200), fitted(images, 200).to(dtype=torch.bfloat16)
    tokens = tokenizer.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), tokens)
        assert torch.equal(tokenizer(images).images, tokenizer.decode(tokens))
    near = half.decode(half.encode(images))
    assert near.dtype == torch.float32 and float((near - tokenizer.decode(tokens)).abs().median()) < 0.01


# In the steps of a pipeline

PALETTE = {"kind": "palette", "colors": 9, "seed": 3}


def test_from_pixels_to_a_pipeline(tmp_path):
    """Fit, encode, train a prior, save, load and sample."""
    run = train_tokenizer(tmp_path / "tokenizer", model=PALETTE, data__image_size=8)
    (line,) = metrics(run)
    assert line["step"] == 0 and 20 < line["held_out/psnr"] < 60
    argv = [f"tokenizer={run / 'tokenizer'}", f"out={tmp_path / 'tokens'}"]
    config = parse(encode.EncodeConfig, argv, verb="encode", description=None, defaults=tokenizer_defaults)
    assert config.data.limit == 72 and config.data.image_size == 8
    encode.run(config)
    trained = train_prior(tmp_path / "prior", tmp_path / "tokens", model={"kind": "marginal"})
    pipe = ImagePipeline.from_pretrained(trained / "pipeline")
    assert pipe.tokenizer.fingerprint() == Tokenizer.from_pretrained(run / "tokenizer").fingerprint()
    images = pipe(num_images=3, labels=[1, 2, None], seed=0, output_type="pt").images
    assert torch.equal(pipe.reconstruct(images, output_type="pt"), images) and images.shape == (3, 1, 8, 8)
    facts = json.loads((trained / "pipeline" / "provenance.json").read_text())
    assert facts["tokenizer"]["evaluation"]["psnr"] == line["held_out/psnr"]
