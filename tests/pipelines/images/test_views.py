"""Images of any size: tiles cover them, what is cut can be pasted, maps are averages, scores are maxima, calibrations
are of tiles, and tokens of tiles give images without seams."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from givens.stripes import SIZE, statistics_of, stripes, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_pipelines import make_conditioned, make_pipeline

from pipelines import ImagePipeline
from pipelines.anomaly.calibrating import calibrate
from pipelines.anomaly.calibration import Calibration
from pipelines.anomaly.distances import CalibrationError
from pipelines.anomaly.maps import anomaly_map
from pipelines.anomaly.scores import anomaly_score, score_tiles
from pipelines.commands.reconstruct import main as reconstruct_verb
from pipelines.images.views import LazyImages, View, as_lazy, cut, list_images, paste, read_large, side_weights
from tokenizer.spec import ImageSpec


def larger(count, height=40, width=27, seed=0):
    """Normal images of stripes, larger than a tile, as arrays."""
    return [image[0, :height, :width].numpy() for image in stripes(count, seed, side=max(height, width))[:, None, 0]]


@settings(max_examples=60, deadline=None)
@given(tile=st.integers(1, 20), more=st.integers(0, 60), data=st.data())
def test_tiles_cover_a_side_without_gaps_and_end_with_it(tile, more, data):
    stride, side = data.draw(st.integers(1, tile)), tile + more
    starts, others = View((tile, 3), (stride, 1)).sides((side, 7))
    assert starts[0] == 0 and starts[-1] + tile == side and others == [0, 1, 2, 3, 4]
    assert starts == sorted(set(starts)) and all(0 < gap <= stride for gap in np.diff(starts))
    assert len(starts) == -(-more // stride) + 1


@pytest.mark.parametrize("stride", [4, 5, 6, 7, 8])
def test_weights_fall_linearly_over_the_overlap(stride):
    starts, _ = View((8, 8), (stride, stride)).sides((8 + 4 * stride, 8))
    overlap, weights = 8 - stride, side_weights(8 + 4 * stride, 8, starts)[2]
    rising = torch.arange(1, overlap + 1) / (overlap + 1)
    torch.testing.assert_close(weights, torch.cat([rising, torch.ones(8 - 2 * overlap), rising.flip(0)]))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=["map", "image", "clip"])
@pytest.mark.parametrize("weights", ["mean", "ramp", "last"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_cut_is_pasted(lead, weights, data):
    """Images of several sizes, in batches that span them; one of the size of a window is the same to the bit."""
    height, width = (data.draw(st.integers(1, 6)) for _ in range(2))
    view = View((height, width), (data.draw(st.integers(1, height)), data.draw(st.integers(1, width))))
    sizes = [
        (height, width),
        *((height + data.draw(st.integers(0, 9)), width + data.draw(st.integers(0, 9))) for _ in "ab"),
    ]
    images = [torch.rand(*lead, *size) for size in sizes]
    parts = cut(as_lazy(images), view, data.draw(st.integers(1, 9)), mixed=data.draw(st.booleans()))
    found = list(paste((windows for windows, _ in parts), sizes, view, weights))
    assert torch.equal(found[0], images[0])
    for image, other in zip(images, found, strict=True):
        torch.testing.assert_close(other, image)


def test_a_tile_says_where_it_is_and_a_whole_image_is_one_tile():
    image = torch.arange(6 * 7.0).reshape(1, 6, 7)
    for windows, tiles in cut(as_lazy([image, image]), View((4, 4), (2, 3)), 3):
        for window, (number, top, left, centre) in zip(windows, tiles, strict=True):
            assert torch.equal(window, image[:, top : top + 4, left : left + 4]) and number in (0, 1)
            assert centre == ((top + 2) / 6, (left + 2) / 7)
    ((windows, tiles),) = cut(as_lazy(image[None]), View((6, 7)), 3)
    assert torch.equal(windows[0], image) and tiles == [(0, 0, 0, (0.5, 0.5))]
    few = [tile for _, tiles in cut(as_lazy([image]), View((2, 2), (1, 1)), 4, most=3) for tile in tiles]
    assert [tile[1:3] for tile in few] == [(0, 0), (2, 2), (4, 5)]


def test_a_map_is_the_average_of_the_maps_of_all_tiles_that_cover_a_pixel():
    torch.manual_seed(0)
    pipe = make_pipeline(channels=3, size=(12, 8), labels=[])
    image = torch.randint(0, 256, (3, 33, 21), dtype=torch.uint8)
    total, count = torch.zeros(33, 21), torch.zeros(33, 21)
    for _, top, left, _ in View((12, 8), (5, 5)).tiles(0, (33, 21)):
        tile = image[:, top : top + 12, left : left + 8]
        total[top : top + 12, left : left + 8] += anomaly_map(pipe, tile[None])[0]
        count[top : top + 12, left : left + 8] += 1
    (found,) = anomaly_map(pipe, image[None], stride=5)
    assert count.min() == 1 and count.max() > 4
    torch.testing.assert_close(found, total / count)


def test_images_come_in_any_form_and_size_and_their_batch_does_not_matter(trained):
    arrays = [*larger(2), *larger(1, 16, 50), *larger(1, SIZE, SIZE)]
    tensors = [torch.from_numpy(one)[None] for one in arrays]
    forms = [
        arrays,
        [one[..., None] for one in arrays],
        [Image.fromarray(one) for one in arrays],
        tensors,
        [one.float() / 127.5 - 1 for one in tensors],
        LazyImages(list("abcd"), tensors.__getitem__),
    ]
    expected = [anomaly_map(trained, [one], stride=9, batch_size=256)[0] for one in arrays]
    assert [tuple(one.shape) for one in expected] == [one.shape for one in arrays]
    for images in forms:
        for size in (5, 256):
            for found, known in zip(anomaly_map(trained, images, stride=9, batch_size=size), expected, strict=True):
                torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-4)
    for images in (arrays[0], Image.fromarray(arrays[0]), np.stack(arrays[:2])[:1], tensors[0][None]):
        torch.testing.assert_close(anomaly_map(trained, images, stride=9)[0], expected[0], rtol=1e-4, atol=1e-4)


def test_each_tile_has_the_condition_of_its_image():
    torch.manual_seed(0)
    pipe = make_conditioned()
    with torch.no_grad():
        pipe.prior.class_embedding.columns.weight.mul_(200)
    images = [torch.randint(0, 256, (pipe.tokenizer.image_shape[0], side, 30), dtype=torch.uint8) for side in (20, 14)]
    maps = anomaly_map(pipe, images, condition={"age": [20, 80]}, stride=6, batch_size=7)
    for image, age, found in zip(images, (20, 80), maps, strict=True):
        (alone,) = anomaly_map(pipe, [image], condition={"age": age}, stride=6)
        torch.testing.assert_close(found, alone)
    (other,) = anomaly_map(pipe, images[:1], condition={"age": 80}, stride=6)
    assert (other - maps[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("images", "stride", "message"),
    [
        (np.zeros((40, 40), np.uint8), 17, "stride: must be from 1 to 16"),
        (np.zeros((40, 40), np.uint8), 2.5, "stride"),
        ([np.zeros((40, 40), np.uint8), np.zeros((40, 15), np.uint8)], 8, "image 1: 40 x 15 pixels"),
        ([torch.zeros(3, 40, 40)], 8, "images must be"),
        ([torch.full((1, 40, 40), 3.0)], 8, "-1, 1"),
        ([], 8, "at least one image"),
        ("image.png", 8, "images must be"),
    ],
)
def test_a_mistake_is_one_line(trained, images, stride, message):
    with pytest.raises(ValueError, match=message) as caught:
        anomaly_map(trained, images, stride=stride)
    assert "\n" not in str(caught.value)


# Scores -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiled(trained):
    """A pipeline that is calibrated on tiles."""
    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    calibrate(pipe, larger(60, seed=30), stride=8)
    return pipe


@pytest.mark.parametrize("method", ["joint", "neighbours", "nll", "reconstruction"])
def test_a_score_is_the_maximum_of_those_of_the_tiles(tiled, method):
    images = larger(2, seed=31)
    scores = anomaly_score(tiled, images, method, stride=8, batch_size=7)
    for image, score in zip(images, scores, strict=True):
        tiles = [
            image[top : top + 16, left : left + 16] for _, top, left, _ in View((16, 16), (8, 8)).tiles(0, image.shape)
        ]
        found = statistics_of(tiled, torch.from_numpy(np.stack(tiles))[:, None])
        (each,) = score_tiles(method, found, tiled.calibration.references)
        assert float(score) == pytest.approx(each.max(), rel=1e-4, abs=1e-4)


def test_p_values_are_of_images_and_a_small_defect_is_found(tiled):
    normal, bad = larger(60, seed=32), larger(20, seed=33)
    for number, image in enumerate(bad):
        image[20:30, 5:15] = uniform(20, 10)[number, 0].numpy()
    p = anomaly_score(tiled, normal, p_values=True, stride=8)
    assert (p <= 0.05).float().mean() <= 0.17  # 5 % on average over calibrations: at most 10 of 60
    assert (anomaly_score(tiled, bad, p_values=True, stride=8) <= 0.05).float().mean() > 0.9
    assert anomaly_map(tiled, bad, stride=8)[0][20:30, 5:15].mean() > 2 * anomaly_map(tiled, normal, stride=8)[0].mean()


def test_a_calibration_keeps_its_tiles_and_refuses_others(tiled, trained, tmp_path):
    calibration = tiled.calibration
    assert calibration.tile == [16, 16] and calibration.stride == 8 and calibration.count == 60
    assert len(calibration.scores["joint"].values) == 30
    tiled.save_pretrained(tmp_path / "pipe")
    assert ImagePipeline.from_pretrained(tmp_path / "pipe").calibration.to_json() == calibration.to_json()
    images = larger(1, SIZE, SIZE, seed=40)
    for pipe, options in ((tiled, {}), (tiled, {"stride": 4}), (trained, {"stride": 8})):
        for more in ({}, {"method": "nll", "p_values": True}):
            with pytest.raises(CalibrationError, match="^stride: calibrated with (tiles|whole)[^\n]*$"):
                anomaly_score(pipe, images, **options, **more)
    anomaly_score(tiled, images, "nll")  # needs no calibration
    with pytest.warns(UserWarning, match="1 of 2 images were used"):
        anomaly_score(tiled, [larger(60, seed=30)[5], *images], stride=8)


def test_a_calibration_does_not_depend_on_the_batch_and_reads_each_image_once(trained):
    images, read = larger(30, seed=34), []

    def load(number):
        read.append(number)
        return torch.as_tensor(images[number])[None]

    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    one = calibrate(pipe, LazyImages([str(k) for k in range(30)], load), stride=16, false_alarms=0.1)
    assert set(read) == set(range(30)) and np.bincount(read).max() == 1
    other = calibrate(pipe, images, stride=16, false_alarms=0.1, batch_size=5)
    assert isinstance(one, Calibration) and one.digests == other.digests
    for method, scores in one.scores.items():
        np.testing.assert_allclose(other.scores[method].values, scores.values, rtol=1e-3, atol=1e-3)


def test_arrays_of_more_bits_and_channels_keep_their_size():
    spec, rng = ImageSpec(6, 8, 8, dtype="uint16", high=4095), np.random.default_rng(0)
    array = rng.integers(0, 4096, (20, 31, 6), dtype=np.uint16)
    unit = spec.to_unit(array).movedim(-1, 0)
    for images in (array, array[None], [array], [unit], unit[None]):
        torch.testing.assert_close(list_images(images, spec).read(0), unit, rtol=0, atol=0)
    grey = replace(spec, channels=1)
    picture = list_images(Image.fromarray(array[..., 0]), grey)
    assert torch.equal(read_large(picture, 0, View.of(spec, 4)), unit[:1])
    with pytest.raises(ValueError, match="uint16"):
        list_images([array.astype(np.uint8)], spec).read(0)
    with pytest.raises(ValueError, match="clips are not cut into tiles"):
        View.of(replace(grey, frames=2), 1)


# Tokens -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return make_pipeline(channels=3, size=(12, 8), labels=[])


def noise(*sizes):
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, image: pipe.encode_tiles([image], 9), "stride: must be from 1 to 8"),
        (lambda pipe, image: pipe.reconstruct([image[:, :11]], stride=8), "image 0: 11 x 30 pixels"),
        (lambda pipe, image: pipe.reconstruct([image], stride=8, output_type="x"), "output_type"),
        (lambda pipe, image: pipe.decode_tiles(pipe.encode_tiles([image], 8), [], 8), "got 0 sizes"),
        (lambda pipe, image: pipe.decode_tiles(pipe.encode_tiles([image], 8), [(20, 30)], 7), "tokens of shape"),
        (lambda pipe, image: pipe.decode_tiles(pipe.encode_tiles([image], 8), [(2, 30)], 8), "at least"),
        (lambda pipe, image: pipe.decode_tiles([pipe.encode_tiles([image], 8)[0] + 9999], [(20, 30)], 8), "9999|ids"),
    ],
)
def test_a_mistake_in_tokens_of_tiles_is_one_line(pipe, call, message):
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
