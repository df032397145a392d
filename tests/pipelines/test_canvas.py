"""Canvases of a pipeline: sizes, conditions of windows, completion, decoding, files and bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from small import ANY_ORDER, make_prior, make_tokenizer
from small_pipelines import LABELS, make_pipeline

from pipelines import ImagePipeline
from pipelines.canvas import (
    decode_canvas_batch,
    encode_large_batch,
    load_canvas,
    make_chain,
    save_canvas,
)
from prior.columns import GridColumn, NumberColumn, VectorColumn


@pytest.fixture
def pipe():
    return make_pipeline("vqvae", "gpt", 3, size=(16, 16), any_order=True)


@pytest.fixture
def exact():
    """A pipeline whose pixels are its tokens, in float64."""
    made = make_pipeline("pixels", "made", 1, size=(4, 4), sizes={"levels": 3}, order_agnostic=True, labels=[])
    made.prior.double()
    return made


def images_of(out):
    return torch.stack([torch.from_numpy(np.array(image)) for image in out.images])


def test_a_call_with_a_size_returns_images_and_the_canvas_that_scores_them(pipe):
    out = pipe(3, size=(32, 24), labels=[0, 1, None], seed=4)
    assert [image.size for image in out.images] == [(24, 32)] * 3
    assert out.tokens.shape == (3, 8, 6)
    assert torch.equal(out.canvas.tokens, out.tokens)
    nats = pipe.canvas_log_prob(out.canvas, [0, 1, None])
    assert nats.shape == (3,) and (nats < 0).all()
    second = pipe(1, size=(32, 24), labels=[1], seed=5)
    assert np.array_equal(second.images[0], out.images[1]), "image k uses seed + k"
    assert pipe(2, size=(32, 24), output_type="pt").images.shape == (2, 3, 32, 24)
    assert pipe(2, size=(32, 24), output_type="latent").images.shape == (2, 8, 6)


@pytest.mark.parametrize("tokenizer", ["vqvae", "vit", "pixels", "vqgan"])
@pytest.mark.parametrize("prior", ANY_ORDER)
def test_every_any_order_prior_draws_canvases_of_every_placed_tokenizer(tokenizer, prior):
    made = make_pipeline(tokenizer, prior, 3, size=(8, 8), **ANY_ORDER[prior])
    out = made(1, size=(16, 12), seed=0, wrap="x")
    assert out.images[0].size == (12, 16)
    assert torch.isfinite(made.canvas_log_prob(out.canvas)).all()


def test_the_log_prob_is_the_sum_over_what_was_drawn(exact):
    """Sampling at temperature 0 of a peaked prior would hide a wrong factor; a sum over continuations does not."""
    out = exact(2, size=(8, 6), seed=0)
    known = torch.zeros(2, 8, 6, dtype=torch.bool)
    known[:, :3] = True
    part = exact(2, size=(8, 6), tokens=out.tokens, known=known, seed=0)
    whole, first, rest = (
        exact.canvas_log_prob(canvas) for canvas in (out.canvas, exact(2, size=(8, 6), seed=0).canvas, part.canvas)
    )
    assert torch.equal(whole, first)
    assert (rest > whole).all(), "known tokens are not part of the density"
    assert torch.equal(part.tokens[:, :3], out.tokens[:, :3])


# Decoding -----------------------------------------------------------------------------------------


def test_pixels_of_a_canvas_are_its_tokens_and_large_images_are_read_back(exact):
    images = torch.randint(3, (2, 1, 12, 8)).float() - 1
    canvas = exact.encode_canvas(images)
    assert torch.equal(canvas.tokens, (images[:, 0] + 1).long())
    assert torch.equal(exact.decode_canvas(canvas, output_type="pt"), images)


def test_a_decoder_of_convolutions_decodes_the_whole_canvas(pipe):
    out = pipe(1, size=(32, 48), seed=0)
    chain, large = out.canvas.chain, pipe.tokenizer.resize(32, 48)
    assert torch.equal(decode_canvas_batch(pipe, out.tokens, chain), large.decode(out.tokens))
    blended = decode_canvas_batch(pipe, out.tokens, chain, whole=False)
    assert blended.shape == (1, 3, 32, 48)
    single = pipe.encode_canvas(torch.rand(1, 3, 16, 16) * 2 - 1)
    images = pipe.decode_canvas(single, output_type="pt")
    assert torch.allclose(images, pipe.tokenizer.decode(single.tokens).cpu(), atol=1e-5)


@pytest.mark.parametrize("wrap", [False, True, "x"])
def test_a_decoder_without_global_layers_decodes_parts_like_the_whole(monkeypatch, wrap):
    made = make_pipeline("vqvae", "gpt", 3, size=(16, 16), any_order=True, sizes={"local": True})
    assert made.tokenizer.halo is not None and make_pipeline("vqvae", "gpt").tokenizer.halo is None
    chain = make_chain(made, (80, 64), wrap=wrap)
    tokens = torch.randint(32, (1, 20, 16))
    whole = decode_canvas_batch(made, tokens, chain)
    if wrap is False:
        torch.testing.assert_close(whole, made.tokenizer.resize(80, 64).decode(tokens))
    monkeypatch.setattr("pipelines.canvas.PART", 5)
    torch.testing.assert_close(decode_canvas_batch(made, tokens, chain), whole)
    moved = decode_canvas_batch(made, tokens.roll((7, 3), (1, 2)), chain)
    equal = torch.allclose(moved, whole.roll((28, 12), (2, 3)), atol=1e-5)
    assert equal == (wrap is True), "a canvas that wraps has no border"


def test_pixels_at_a_border_that_wraps_depend_on_the_other_side():
    """Without halos from the other side, convolutions see zeros at the border, and copies have a seam."""
    made = make_pipeline("vqvae", "gpt", 1, size=(16, 16), any_order=True)
    tokens = torch.randint(32, (1, 4, 16))
    other = tokens.clone()
    other[..., -1] = (tokens[..., -1] + 1) % 32
    for wrap in (False, "x"):
        chain = make_chain(made, (16, 64), wrap=wrap)
        one, two = (decode_canvas_batch(made, ids, chain, whole=False) for ids in (tokens, other))
        assert torch.equal(one[..., 0], two[..., 0]) == (wrap is False)
        assert torch.equal(one[..., 24:40], two[..., 24:40])


def test_a_tokenizer_of_another_size_shares_its_weights_and_leaves_the_first_as_it_was(pipe):
    large = pipe.tokenizer.resize(64, 32)
    assert large.grid.shape == (16, 8) and large.spec.size == (64, 32)
    assert pipe.tokenizer.grid.shape == (4, 4) and pipe.tokenizer.spec.size == (16, 16)
    assert large.decoder is pipe.tokenizer.decoder
    assert make_tokenizer("vit").resize(24, 16) is None


# What is given ------------------------------------------------------------------------------------


def test_a_value_for_each_window_is_an_array(pipe):
    where = np.array([[[0, 1, 1], [0, 0, 2], [1, 1, 1]]])
    out = pipe(labels=where, size=(32, 32), seed=0)
    named = np.array(LABELS)[where]
    for condition in ({"label": named.tolist()}, {"label": torch.from_numpy(where)}):
        assert torch.equal(pipe(condition=condition, size=(32, 32), seed=0).tokens, out.tokens)
    assert len(pipe(labels=where.repeat(2, 0), size=(32, 32)).images) == 2
    assert not torch.equal(out.tokens, pipe(labels=0, size=(32, 32), seed=0).tokens)
    with pytest.raises(ValueError, match=r"label: a value for each window is an array \(count, 3, 3\) here"):
        pipe(labels=where[:, :2], size=(32, 32))


def make_conditioned():
    """A pipeline with a grid of half the image's scale, a number, and the place of a window."""
    small = make_tokenizer("pixels", (8, 8), 1, levels=4)
    first = make_tokenizer("vqvae", (16, 16), 3).eval()
    columns = {
        "low": GridColumn(grid=small.grid, tokenizer=small.fingerprint()),
        "age": NumberColumn(mean=[0.0], std=[1.0], low=[-9.0], high=[9.0]),
        "where": VectorColumn(size=2, encoder="place"),
    }
    prior = make_prior(
        "gpt", grid=first.grid, any_order=True, tokenizer=first.fingerprint(), conditions=columns, num_classes=0
    )
    return ImagePipeline(first, prior, condition_tokenizers={"low": small})


def test_grids_are_cut_like_the_canvas_and_places_are_found():
    made = make_conditioned()
    low = Image.fromarray(np.arange(24 * 16, dtype=np.uint8).reshape(24, 16) % 251)
    chain = make_chain(made, (48, 32))
    from pipelines.canvas import read_canvas_given

    given = read_canvas_given(made, chain, condition={"low": low, "age": 3})
    assert len(given) == len(chain.corners) == 5 * 3
    assert given.rows["age"].unique().tolist() == [3]
    pixels = np.asarray(low)
    for row, (top, left) in enumerate(chain.corners):
        tile = pixels[top * 2 : top * 2 + 8, left * 2 : left * 2 + 8]
        expected = made.condition_tokenizers["low"].encode(torch.from_numpy(tile.copy())[None, None] / 127.5 - 1)[0]
        assert torch.equal(given.rows["low"][row], expected)
    assert given.rows["where"][0].tolist() == pytest.approx([8 / 48, 8 / 32])
    assert given.rows["where"][-1].tolist() == pytest.approx([40 / 48, 24 / 32])
    ages = torch.arange(15).view(1, 5, 3) / 2
    for each in (ages, ages.numpy(), ages.tolist()):
        assert torch.equal(read_canvas_given(made, chain, condition={"age": each}).rows["age"], ages.view(15, 1))
    assert len(made(condition={"low": [low, low]}, size=(48, 32)).images) == 2
    with pytest.raises(ValueError, match="low: a map of this canvas has 24 x 16 pixels \\(got 16 x 24\\)"):
        made(condition={"low": low.transpose(Image.Transpose.ROTATE_90)}, size=(48, 32))
    with pytest.raises(ValueError, match="where: is the place of each window"):
        made(condition={"where": [0.5, 0.5]}, size=(48, 32))


# Completion ---------------------------------------------------------------------------------------


def test_an_image_is_continued_beyond_its_borders(pipe):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8))
    out = pipe.complete(picture, size=(32, 48), at=(8, 16), seed=1)
    assert out.images[0].size == (48, 32)
    assert np.array_equal(np.array(out.images[0])[8:24, 16:40], np.array(picture)), "known pixels are unchanged"
    assert out.canvas.known.sum() == 4 * 6
    middle = pipe.complete(picture, size=(32, 48), seed=1)
    assert np.array_equal(np.array(middle.images[0])[8:24, 12:36], np.array(picture))
    several = pipe.complete(picture, size=(32, 48), at=(8, 16), draws=2, seed=1)
    assert len(several.images) == 1 and len(several.images[0]) == 2
    assert np.array_equal(several.images[0][0], out.images[0]), "draw d of image k uses seed + k * draws + d"
    both = pipe.complete([picture] * 2, size=(32, 48), labels=[0, 1], draws=2, seed=1, output_type="np").images
    for k in (0, 1):
        alone = pipe.complete(picture, size=(32, 48), labels=[k], draws=2, seed=1 + 2 * k, output_type="np").images
        assert np.array_equal(both[k], alone[0])


def test_a_large_image_is_repaired_where_a_mask_is_white(pipe):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 32, 3), dtype=np.uint8)
    mask = np.zeros((40, 32), dtype=bool)
    mask[10:20, 5:25] = True
    out = pipe.complete(pixels, mask=mask, stride=8, labels=[0, 1], seed=3, output_type="np")
    assert np.array_equal(out.images[:, ~mask], pixels[:, ~mask])
    assert (out.images[:, mask] != pixels[:, mask]).any()
    keep = torch.ones(10, 8, dtype=torch.bool)
    keep[2:5, 1:7] = False  # tokens of which any pixel is hidden
    assert torch.equal(out.canvas.known, keep.expand(2, -1, -1))
    changed = pixels.copy()
    changed[:, mask] = 0
    again = pipe.complete(changed, mask=mask, stride=8, labels=[0, 1], seed=3, output_type="np")
    assert np.array_equal(again.images, out.images), "hidden pixels do not leak"


def test_encoding_takes_each_token_from_the_window_in_which_it_lies_deepest(pipe):
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    chain = make_chain(pipe, (32, 32))
    tokens = encode_large_batch(pipe, images, chain)
    corner, middle = pipe.encode(images[..., :16, :16])[0], pipe.encode(images[..., 8:24, 8:24])[0]
    assert torch.equal(tokens[0, :2, :2], corner[:2, :2])
    assert torch.equal(tokens[0, 3:5, 3:5], middle[1:3, 1:3])


# Files and bad input ------------------------------------------------------------------------------


def test_a_canvas_is_saved_and_loaded(pipe, tmp_path):
    out = pipe(2, size=(32, 24), seed=0, wrap="y", order="hilbert")
    save_canvas(out.canvas, tmp_path / "canvas.safetensors")
    loaded = load_canvas(tmp_path / "canvas.safetensors")
    assert torch.equal(loaded.tokens, out.tokens) and loaded.chain == out.canvas.chain
    assert torch.equal(pipe.canvas_log_prob(loaded), pipe.canvas_log_prob(out.canvas))
    with pytest.raises(ValueError, match="canvas: was made with another prior"):
        make_pipeline("vqvae", "masked", 3, size=(16, 16)).canvas_log_prob(loaded)
    (tmp_path / "bad").write_bytes(b"bad")
    for path in (tmp_path / "bad", tmp_path / "missing"):
        with pytest.raises(ValueError, match="not a canvas"):
            load_canvas(path)


BAD = [
    ({"size": (33, 32)}, "33 x 32 does not fit tokens of 4 x 4 pixels; the nearest that does is 32 x 32"),
    ({"size": (8, 32)}, "8 x 32 is smaller than the model's 16 x 16; the nearest that does is 16 x 32"),
    ({"size": 32}, r"expected \(height, width\)"),
    ({"size": (32, 32), "stride": 0}, "stride: must be a multiple of the 4 x 4 pixels of a token, up to 16"),
    ({"size": (32, 32), "stride": 20}, "stride: must be a multiple"),
    ({"size": (32, 32), "stride": 6}, "stride: must be a multiple"),
    ({"size": (32, 32), "wrap": "z"}, "wrap must be True, False, 'x'"),
    ({"size": (16, 32), "wrap": True}, "wrap: 16 x 32 must be larger than the model's 16 x 16 where it wraps"),
    ({"size": (32, 32), "order": "spiral"}, "no order is called 'spiral'"),
    ({"size": (32, 32), "order": torch.arange(16)}, "the name of an order"),
    ({"size": (32, 32), "num_orders": 2}, "num_orders: a canvas has one chain"),
    ({"stride": 8}, "stride and wrap are those of a canvas"),
    ({"size": (32, 32), "tokens": torch.zeros(4, 4).long(), "known": torch.ones(4, 4).bool()}, "tokens of a canvas"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[str(case[0])[:40] for case in BAD])
def test_bad_input_is_one_line(pipe, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        pipe(1, **arguments)
    assert "\n" not in str(caught.value)


def test_priors_and_tokenizers_without_canvases_are_named(pipe):
    raster = make_pipeline("vqvae", "gpt", 3, size=(16, 16))
    with pytest.raises(ValueError, match="this gpt prior has one order, 'raster'"):
        raster(1, size=(32, 32))
    assert raster(1, size=(32, 16)).images[0].size == (16, 32), "a raster prior continues downwards"
    with pytest.raises(ValueError, match="tokens of a 'titok' tokenizer have no places"):
        make_pipeline("titok", "gpt", 3, size=(16, 16))(1, size=(32, 32))
    with pytest.raises(ValueError, match="clips have no places"):
        make_pipeline("frame_by_frame", "gpt", 3, size=(16, 16))(1, size=(32, 32))
    with pytest.raises(TypeError, match="or a size larger than the images"):
        pipe.complete(torch.zeros(1, 3, 32, 32), stride=8)
    with pytest.raises(ValueError, match="do not lie within a canvas"):
        pipe.complete(torch.zeros(1, 3, 32, 32), size=(48, 48), at=(20, 0))
    with pytest.raises(ValueError, match="must have one size"):
        pipe.encode_canvas([np.zeros((32, 32, 3), np.uint8), np.zeros((32, 48, 3), np.uint8)])


def test_a_pipeline_of_whole_images_warns(pipe):
    pipe.provenance = {"data": {"source": "photos", "image_size": 16, "channels": 3}}
    with pytest.warns(UserWarning, match="trained on whole images"):
        pipe(1, size=(32, 32))
    pipe.provenance = {"data": {"source": "photos", "image_size": 16, "channels": 3, "crop": "random"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(1, size=(32, 32))
