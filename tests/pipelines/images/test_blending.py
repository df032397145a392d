"""Large images from and to the tokens of their tiles: weights sum to one, and one tile is the image itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_pipelines import make_pipeline

from pipelines.commands.reconstruct import main as reconstruct_verb
from pipelines.images.blending import side_weights
from pipelines.images.tiles import tile_places, tile_starts


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return make_pipeline(channels=3, size=(12, 8), labels=[])


def noise(*sizes):
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]


@settings(max_examples=60, deadline=None)
@given(tile=st.integers(1, 20), more=st.integers(0, 60), data=st.data())
def test_weights_of_a_pixel_sum_to_one(tile, more, data):
    stride, side = data.draw(st.integers(1, tile)), tile + more
    weights, total = side_weights(side, tile, stride), torch.zeros(side)
    for start, own in zip(tile_starts(side, tile, stride), weights, strict=True):
        total[start : start + tile] += own
    torch.testing.assert_close(total, torch.ones(side))


@pytest.mark.parametrize("stride", [4, 5, 6, 7, 8])
def test_weights_fall_linearly_over_the_overlap(stride):
    overlap, weights = 8 - stride, side_weights(8 + 4 * stride, 8, stride)[2]
    rising = torch.arange(1, overlap + 1) / (overlap + 1)
    expected = torch.cat([rising, torch.ones(8 - 2 * overlap), rising.flip(0)])
    torch.testing.assert_close(weights, expected)


def test_the_image_is_the_weighted_average_of_its_tiles(pipe):
    (image,) = noise((31, 21))
    ramp = torch.outer(torch.tensor([1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1.0]), torch.tensor([1, 2, 3, 4, 4, 3, 2, 1.0]))
    total, weight = torch.zeros(3, 31, 21), torch.zeros(31, 21)
    for top, left in tile_places((31, 21), (3, 12, 8), 5):
        place = (..., slice(top, top + 12), slice(left, left + 8))
        total[place] += ramp * pipe.reconstruct(image[place][None], output_type="pt")[0]
        weight[place] += ramp
    torch.testing.assert_close(pipe.reconstruct([image], stride=5, output_type="pt")[0], total / weight)


def test_an_image_of_one_tile_is_reconstructed_as_without_a_stride(pipe):
    for image in noise((12, 8), (12, 8)):
        expected = pipe.reconstruct(image[None], output_type="pt")[0]
        (found,) = pipe.reconstruct([image], stride=5, output_type="pt")
        assert torch.equal(found, expected)


def test_reconstruct_is_decode_of_encode_and_tokens_are_those_of_the_tiles(pipe):
    images = noise((33, 21), (12, 8), (12, 30))
    sizes = [tuple(image.shape[1:]) for image in images]
    tokens = pipe.encode_tiles(images, 5, batch_size=7)
    assert [tuple(each.shape[:2]) for each in tokens] == [(6, 4), (1, 1), (1, 6)]
    torch.testing.assert_close(tokens[0][1, 2], pipe.encode(images[0][None, :, 5:17, 10:18])[0])
    assert torch.equal(tokens[0][5, 3], pipe.encode(images[0][None, :, 21:, 13:])[0])
    for kind in ("pt", "np", "pil"):
        found = pipe.decode_tiles(tokens, sizes, 5, output_type=kind)
        again = pipe.reconstruct(images, stride=5, output_type=kind, batch_size=7)
        for one, other, (height, width) in zip(found, again, sizes, strict=True):
            shape = {"pt": (3, height, width), "np": (height, width, 3), "pil": (height, width, 3)}[kind]
            assert np.asarray(one).shape == shape
            np.testing.assert_allclose(
                np.asarray(one, float), np.asarray(other, float), atol=1 if kind != "pt" else 1e-5
            )


def test_a_stride_of_a_tile_puts_tiles_side_by_side():
    torch.manual_seed(0)
    pipe = make_pipeline(channels=3, size=(8, 8), labels=[])
    (image,) = noise((16, 24))
    (found,) = pipe.reconstruct([image], stride=8, output_type="pt")
    tiles = [image[:, top : top + 8, left : left + 8] for top in (0, 8) for left in (0, 8, 16)]
    parts = pipe.reconstruct(torch.stack(tiles), output_type="pt")
    rows = [torch.cat(list(parts[row : row + 3]), 2) for row in (0, 3)]
    torch.testing.assert_close(found, torch.cat(rows, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, image: pipe.encode_tiles([image], 9), "stride: must be from 1 to 8"),
        (lambda pipe, image: pipe.reconstruct([image], stride=0), "stride: must be from 1 to 8"),
        (lambda pipe, image: pipe.reconstruct([image[:, :11]], stride=8), "image 0: 11 x 30 pixels"),
        (lambda pipe, image: pipe.reconstruct([image], stride=8, output_type="x"), "output_type"),
        (lambda pipe, image: pipe.decode_tiles(pipe.encode_tiles([image], 8), [], 8), "got 0 sizes"),
        (lambda pipe, image: pipe.decode_tiles(pipe.encode_tiles([image], 8), [(20, 30)], 7), "tokens of shape"),
        (lambda pipe, image: pipe.decode_tiles(pipe.encode_tiles([image], 8), [(2, 30)], 8), "at least"),
        (lambda pipe, image: pipe.decode_tiles([pipe.encode_tiles([image], 8)[0] + 9999], [(20, 30)], 8), "9999|ids"),
    ],
)
def test_a_mistake_is_one_line(pipe, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(pipe, *noise((20, 30)))
    assert "\n" not in str(caught.value)


def test_the_verb_reconstructs_whole_images(pipe, tmp_path, capsys):
    for number, image in enumerate(noise(*[(20 + k, 30) for k in range(12)])):
        path = tmp_path / "images" / ("test" if number < 3 else "train") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.movedim(0, -1).numpy()).save(path)
    pipe.tokenizer.save_pretrained(tmp_path / "tokenizer")
    argv = [f"tokenizer={tmp_path}/tokenizer", f"data.source={tmp_path}/images", f"out={tmp_path}/a.png", "device=cpu"]
    argv += ["data.label_column=null", "data.image_size=[12,8]", "data.channels=3"]
    figures = reconstruct_verb([*argv, "tile=true", "stride=4"])
    assert "3 held-out images" in capsys.readouterr().out and figures["psnr"] > 0
    assert min(Image.open(tmp_path / "a.png").size) > 40
    for more, message in (
        (["stride=4"], "needs tile=true"),
        (["tile=true", "stride=9"], "stride: must be from 1 to 8"),
    ):
        with pytest.raises(SystemExit):
            reconstruct_verb([*argv, "overwrite=true", *more])
        assert message in capsys.readouterr().err
