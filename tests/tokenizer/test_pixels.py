"""Tokenizers of single pixels: intensities (`pixels`) and learned colours (`palette`).

Covers: tokenizer/palette.py.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from folders import contents
from launch import metrics, output_of, start, tensors, tokenizer_arguments, train_prior, train_tokenizer, two_processes
from PIL import Image
from small import make_prior, make_tokenizer

from pipelines import ImagePipeline, encode
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.images import DataConfig, load_images, to_float, to_uint8
from pipelines.provenance import tokenizer_defaults
from tokenizer import Tokenizer
from tokenizer.files import ConfigError
from tokenizer.losses import psnr
from tokenizer.palette import distinct_colors, kmeans_plus_plus, lattice, weighted_kmeans
from tokenizer.quantizers import codebook

LEVELS = [2, 3, 4, 7, 16, 100, 255, 256]
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


def test_two_levels_are_a_threshold_at_mid_grey():
    tokenizer = pixels_of(2)
    tokens = tokenizer.encode(to_float(BYTES.reshape(1, 1, 16, 16))).flatten()
    assert torch.equal(tokens, (torch.arange(256) >= 128).long())
    assert tokenizer.decode(tokens.reshape(1, 16, 16)).unique().tolist() == [-1, 1]
    near = torch.tensor([-1e-6, 0.0, 1e-6]).expand(1, 1, 4, 3)
    assert pixels_of(2, (4, 3)).encode(near)[0, 0].tolist() == [0, 1, 1]  # half is rounded up


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
    for name in ("pixels", "palette"):
        grey = make_tokenizer(name, (4, 5), 1)
        assert torch.equal(grey.known_tokens(known), known)
    assert torch.equal(make_tokenizer("palette", (4, 5), 3).known_tokens(known), known)
    changed = torch.where(known.unsqueeze(1), 0.0, 1.0).expand(2, 3, 4, 5)  # known tokens are those of known pixels
    assert torch.equal(tokenizer.encode(torch.zeros(2, 3, 4, 5)) == tokenizer.encode(changed), mask)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("levels", LEVELS)
def test_uniform_pixels_cost_eight_bits(levels, channels):
    """The prior under which all 256 values are equally likely gives 8 bits to every image, whatever the levels."""
    tokenizer = pixels_of(levels, (3, 4), channels)
    prior = make_prior("marginal", grid=tokenizer.grid, num_classes=0)
    with torch.no_grad():
        prior.table.copy_((tokenizer.sizes / 256).log().expand_as(prior.table))
    pipe = ImagePipeline(tokenizer, prior)
    bits = pipe.bits_per_dim(bytes_for(tokenizer, 20))
    torch.testing.assert_close(bits, torch.full((20,), 8.0), atol=2e-6, rtol=0)


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


def test_pixels_have_no_weights(tmp_path):
    tokenizer = make_tokenizer("pixels")
    assert not tokenizer.state_dict() and not list(tokenizer.parameters())
    assert tokenizer.device == torch.device("cpu") and tokenizer.to("meta").device.type == "meta"
    tokenizer = pixels_of(256, (16, 16))
    half = tokenizer.to(dtype=torch.bfloat16)
    pixels = BYTES.reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(half.decode(half.encode(to_float(pixels)))), pixels)
    assert half.fingerprint() == pixels_of(256, (16, 16)).fingerprint() != pixels_of(255, (16, 16)).fingerprint()
    half.save_pretrained(tmp_path / "tokenizer")
    assert tensors(tmp_path / "tokenizer") == {}
    assert Tokenizer.from_pretrained(tmp_path / "tokenizer").fingerprint() == half.fingerprint()
    pipe = ImagePipeline(half, make_prior("marginal", grid=half.grid), labels=["a", "b", "c"])
    assert pipe.to(dtype=torch.bfloat16, device="cpu").dtype == torch.float32  # images keep their precision
    assert torch.equal(pipe.reconstruct(pixels, output_type="pt"), to_float(pixels))


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
    assert (tokenizer.table.sum(1).diff() >= 0).all()
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
    more = make_tokenizer("palette", (8, 16), channels, colors=count + 1)
    before = more.table.clone()
    with pytest.raises(ConfigError, match=rf"colors: .*{count}\D.*{count + 1}"):
        more.initialize(images)
    assert torch.equal(more.table, before)


def test_distinct_colors_are_counted():
    pixels = torch.randint(0, 3, (2, 3, 4, 5), dtype=torch.uint8) * 127
    points, counts = distinct_colors(to_float(pixels))
    rows = to_float(pixels).movedim(1, -1).reshape(-1, 3)
    expected, times = rows.unique(dim=0, return_counts=True)
    order = sorted(range(len(points)), key=lambda k: points[k].tolist())
    assert torch.equal(points[order], expected) and torch.equal(counts[order], times.double())


@pytest.mark.parametrize("count", [2, 3, 7, 8, 27, 100, 125, 512, 1000])
def test_a_fresh_palette_is_a_lattice(count):
    for channels in (1, 3):
        colors = lattice(count, channels)
        assert colors.shape == (count, channels) and len(colors.unique(dim=0)) == count
        assert colors[0].tolist() == [-1] * channels and colors[-1].tolist() == [1] * channels
        assert float(colors.abs().max()) == 1
    tokenizer = make_tokenizer("palette", (8, 8), 3, colors=count)
    tokens = torch.randint(0, count, (3, 8, 8))
    assert torch.equal(tokenizer.encode(tokenizer.decode(tokens)), tokens)


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
    tokens = one.encode(images)
    monkeypatch.setattr(codebook, "SEARCH_ELEMENTS", 30 * 100)  # 11 chunks
    assert torch.equal(fitted(images).table, one.table) and torch.equal(one.encode(images), tokens)


def test_distances_are_taken_in_chunks(monkeypatch):
    """At no time are there more of them than allowed; a million pixels and 512 colours would not fit."""
    largest = [0]
    addmm = torch.addmm

    def watched(*arguments, **options):
        found = addmm(*arguments, **options)
        largest[0] = max(largest[0], found.numel())
        return found

    monkeypatch.setattr(torch, "addmm", watched)
    fitted(shaded_images(64, 32), 512, iterations=1)
    assert 512 < largest[0] <= codebook.SEARCH_ELEMENTS


def test_every_color_is_used_and_different():
    """Most pixels are white: a colour that lost its pixels has to find others."""
    for seed in range(5):
        torch.manual_seed(seed)
        images = torch.where(torch.rand(4, 1, 16, 16) < 0.9, 1.0, shaded_images())
        for iterations in (0, 1, 2, 50):
            tokenizer = fitted(images, 60, iterations=iterations, seed=seed)
            tokens = tokenizer.encode(images)
            assert len(tokenizer.table.unique(dim=0)) == 60 == len(tokens.unique())
            assert torch.equal(tokenizer.encode(tokenizer.decode(tokens)), tokens)


def test_a_color_without_pixels_moves_to_where_the_error_is(monkeypatch):
    points = torch.tensor([[0.0], [0.1], [0.9], [1.0]])
    counts = torch.tensor([1.0, 1, 1, 5]).double()
    monkeypatch.setattr("tokenizer.palette.kmeans_plus_plus", lambda *_: torch.tensor([[0.05], [7.0], [7.0]]))
    assert weighted_kmeans(points, counts, 3, 0, 0)[1:].flatten().sort().values.tolist() == pytest.approx([0.9, 1.0])
    found = weighted_kmeans(points, counts, 3, 10, 0).flatten().sort().values
    assert found.tolist() == pytest.approx([0.05, 0.9, 1.0])
    monkeypatch.setattr("tokenizer.palette.kmeans_plus_plus", lambda *_: torch.tensor([[1.0], [7.0], [7.0]]))
    assert weighted_kmeans(points, counts, 3, 0, 0).flatten().sort().values.tolist() == pytest.approx([0.0, 0.1, 1.0])
    monkeypatch.setattr("tokenizer.palette.kmeans_plus_plus", lambda *_: torch.tensor([[0.05], [0.9]]))
    assert weighted_kmeans(points, counts, 2, 10, 0).flatten().tolist() == pytest.approx(
        [0.05, 5.9 / 6]
    )  # counts are weights


def test_a_spread_start_never_takes_a_color_twice():
    points = torch.randn(50, 3)
    counts = torch.ones(50).double().index_fill(0, torch.tensor([3]), 1e6)
    for seed in range(20):
        assert len(kmeans_plus_plus(points, counts, 50, torch.Generator().manual_seed(seed)).unique(dim=0)) == 50
    first = [kmeans_plus_plus(points, counts, 2, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert sum(torch.equal(pair[0], points[3]) for pair in first) >= 19  # drawn in proportion to the counts


def mean_psnr(tokenizer, images) -> float:
    return float(psnr(tokenizer.decode(tokenizer.encode(images)), images).mean())


def test_lloyd_only_improves():
    images = shaded_images(8)
    errors = []
    for iterations in (0, 1, 2, 4, 8, 50):
        tokenizer = fitted(images, 30, iterations=iterations)
        errors.append(float((tokenizer.decode(tokenizer.encode(images)) - images).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0]


def test_learned_greys_show_digits_best():
    splits = load_images(DataConfig(limit=400))
    train, held_out = (part.batch(np.arange(len(part))) for part in (splits.train, splits.held_out))
    for colors in (3, 12):
        tokenizer = make_tokenizer("palette", (28, 28), 1, colors=colors)
        even = mean_psnr(tokenizer, held_out)
        tokenizer.table.copy_(torch.rand(colors, 1) * 2 - 1)
        chance = mean_psnr(tokenizer, held_out)
        tokenizer.initialize(train)
        assert mean_psnr(tokenizer, held_out) > max(even, chance) + 0.3


def test_a_palette_is_precise_whatever_the_type_around_it():
    images = shaded_images()
    tokenizer, half = fitted(images, 200), fitted(images, 200).to(dtype=torch.bfloat16)
    tokens = tokenizer.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), tokens)
        assert torch.equal(tokenizer(images).images, tokenizer.decode(tokens))
    near = half.decode(half.encode(images))
    assert near.dtype == torch.float32 and float((near - tokenizer.decode(tokens)).abs().median()) < 0.01


def test_a_palette_has_no_likelihood():
    tokenizer = make_tokenizer("palette")
    images = torch.zeros(2, *tokenizer.image_shape)
    assert tokenizer.pixel_log_prob(images, tokenizer.encode(images)) is None


# Configurations


# The verbs

PIXELS = {"kind": "pixels", "levels": 4}
PALETTE = {"kind": "palette", "colors": 9, "seed": 3}
both_kinds = pytest.mark.parametrize("model", [PIXELS, PALETTE], ids=["pixels", "palette"])


@both_kinds
def test_a_run_evaluates_shows_and_saves(tmp_path, model, capsys):
    run = train_tokenizer(tmp_path / "run", model=model)
    (line,) = metrics(run)
    figures = ("psnr", "l1", "l2", "codebook_usage", "codebook_perplexity")
    assert set(line) == {"step", *(f"held_out/{name}" for name in figures)} and line["step"] == 0
    assert 20 < line["held_out/psnr"] < 60
    saved = Tokenizer.from_pretrained(run / "tokenizer")
    held_out = load_images(DataConfig(limit=72)).held_out
    images = held_out.batch(np.arange(len(held_out)))
    assert mean_psnr(saved, images) == pytest.approx(line["held_out/psnr"], rel=1e-6)
    facts = json.loads((run / "tokenizer" / "provenance.json").read_text())
    assert facts["data"]["limit"] == 72 and facts["tokenizer"]["steps"] == 0
    assert facts["tokenizer"]["evaluation"] == {name: line[f"held_out/{name}"] for name in figures}
    previews = sorted((run / "previews").iterdir())
    assert [path.name for path in previews] == ["codebook-00000000.png", "reconstructions-00000000.png"]
    preview = previews[1]
    with Image.open(preview) as picture:
        assert np.asarray(picture).std() > 5
    assert "starting; 0 parameters, 72 training rows" in capsys.readouterr().out
    before = contents(run)
    assert "config.json" in before
    train_tokenizer(tmp_path / "run", model=model)
    assert contents(run) == before
    with pytest.raises(UserError, match=r"model\.(levels|colors): \d -> 5"):
        train_tokenizer(run, model={**model, "levels" if model is PIXELS else "colors": 5})
    assert contents(run) == before


def test_what_a_palette_starts_from(tmp_path, monkeypatch):
    """A sample of the training images that the seed chooses: enough pixels, and never few images."""
    seen = []
    monkeypatch.setattr(Tokenizer.find("palette"), "initialize", lambda self, images: seen.append(images))
    train_tokenizer(tmp_path / "all", model=PALETTE)
    splits = load_images(DataConfig(limit=72))
    rows = {tuple(image.flatten().tolist()) for image in splits.train.batch(np.arange(72))}
    assert {tuple(image.flatten().tolist()) for image in seen[0]} == rows and len(seen[0]) == 72
    monkeypatch.setattr("pipelines.train_tokenizer.INITIAL_PIXELS", 28 * 28 * 30)
    monkeypatch.setattr("pipelines.train_tokenizer.INITIAL_IMAGES", 10)
    for name, seed in (("few", 0), ("again", 0), ("other", 1)):
        train_tokenizer(tmp_path / name, model=PALETTE, train__seed=seed)
    few, again, other = seen[1:]
    assert few.shape == (30, 1, 28, 28) and torch.equal(few, again) and not torch.equal(few, other)
    monkeypatch.setattr("pipelines.train_tokenizer.INITIAL_IMAGES", 50)
    train_tokenizer(tmp_path / "more", model=PALETTE)
    assert len(seen[-1]) == 50


@both_kinds
def test_from_pixels_to_a_pipeline(tmp_path, model):
    """Fit, encode, train a prior, sample, complete, save and load."""
    run = train_tokenizer(tmp_path / "tokenizer", model=model, data__image_size=8)
    argv = [f"tokenizer={run / 'tokenizer'}", f"out={tmp_path / 'tokens'}"]
    config = parse(encode.EncodeConfig, argv, verb="encode", description=None, defaults=tokenizer_defaults)
    assert config.data.limit == 72 and config.data.image_size == 8
    encode.run(config)
    trained = train_prior(tmp_path / "prior", tmp_path / "tokens", model={"kind": "marginal"})
    pipe = ImagePipeline.from_pretrained(trained / "pipeline")
    assert pipe.tokenizer.fingerprint() == Tokenizer.from_pretrained(run / "tokenizer").fingerprint()
    images = pipe(num_images=3, labels=[1, 2, None], seed=0, output_type="pt").images
    assert torch.equal(pipe.reconstruct(images, output_type="pt"), images) and images.shape == (3, 1, 8, 8)
    known = torch.arange(8).expand(8, 8) < 4
    filled = pipe.complete(images, known, seed=1, output_type="pt")
    assert torch.equal(filled.images[..., :4], images[..., :4]) and not torch.equal(filled.images, images)
    assert torch.equal(filled.tokens[..., :4], pipe.encode(images)[..., :4])
    if model is PIXELS:
        assert 0 < float(pipe.bits_per_dim(images).mean()) < 8.5
    facts = json.loads((trained / "pipeline" / "provenance.json").read_text())
    assert facts["tokenizer"]["evaluation"]["psnr"] == metrics(run)[0]["held_out/psnr"]


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_two_processes_make_what_one_does(tmp_path):
    alone = train_tokenizer(tmp_path / "alone" / "run", model=PALETTE)
    argv = tokenizer_arguments(tmp_path / "both" / "run", model=PALETTE)
    printed = output_of(start(two_processes("train_tokenizer", argv)))
    assert printed.count("2 processes on cpu") == 1, printed
    found, expected = contents(tmp_path / "both" / "run"), contents(alone)
    assert set(found) == set(expected) and len(found) > 5
    for name in ("tokenizer/model.safetensors", "tokenizer/config.json"):
        assert found[name] == expected[name], name
    for own, other in zip(metrics(tmp_path / "both" / "run"), metrics(alone), strict=True):
        assert own == pytest.approx(other, rel=1e-6)  # means over images are summed by other numbers of threads
