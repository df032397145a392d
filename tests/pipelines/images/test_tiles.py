"""Images larger than the model: tiles cover them, maps are averages, scores are maxima, calibrations are of tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from givens.stripes import SIZE, stripes, uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_pipelines import make_conditioned, make_pipeline

from pipelines import ImagePipeline
from pipelines.anomaly.calibrating import calibrate
from pipelines.anomaly.calibration import Calibration
from pipelines.anomaly.distances import CalibrationError
from pipelines.anomaly.healing import anomaly_map
from pipelines.anomaly.image_statistics import measure
from pipelines.anomaly.scores import anomaly_score, score_of
from pipelines.images.arrays import Values
from pipelines.images.tiles import LazyImages, list_images, load_image, tile_places, tile_starts
from tokenizer import Tokenizer
from tokenizer.frame_by_frame import FrameByFrame


def larger(count, height=40, width=27, seed=0):
    """Normal images of stripes, larger than a tile, as arrays."""
    return [image[0, :height, :width].numpy() for image in stripes(count, seed, side=max(height, width))[:, None, 0]]


@settings(max_examples=60, deadline=None)
@given(tile=st.integers(1, 20), more=st.integers(0, 60), data=st.data())
def test_tiles_cover_a_side_without_gaps_and_end_with_it(tile, more, data):
    stride, side = data.draw(st.integers(1, tile)), tile + more
    starts = tile_starts(side, tile, stride)
    assert starts[0] == 0 and starts[-1] + tile == side
    assert starts == sorted(set(starts)) and all(0 < gap <= stride for gap in np.diff(starts))
    assert len(starts) == -(-more // stride) + 1


def test_a_map_is_the_average_of_the_maps_of_all_tiles_that_cover_a_pixel():
    torch.manual_seed(0)
    pipe = make_pipeline(channels=3, size=(12, 8), labels=[])
    image = torch.randint(0, 256, (3, 33, 21), dtype=torch.uint8)
    total, count = torch.zeros(33, 21), torch.zeros(33, 21)
    for top, left in tile_places((33, 21), (3, 12, 8), 5):
        tile = image[:, top : top + 12, left : left + 8]
        total[top : top + 12, left : left + 8] += anomaly_map(pipe, tile[None])[0]
        count[top : top + 12, left : left + 8] += 1
    (found,) = anomaly_map(pipe, image[None], stride=5)
    assert count.min() == 1 and count.max() > 4
    torch.testing.assert_close(found, total / count)


def test_an_image_of_the_size_of_a_tile_has_the_plain_map(trained):
    images = stripes(7, seed=3)
    plain = anomaly_map(trained, images)
    assert all(
        torch.equal(one, other) for one, other in zip(plain, anomaly_map(trained, images, stride=4), strict=True)
    )


def test_images_come_in_any_form_and_size_and_their_batch_does_not_matter(trained):
    arrays = [*larger(2), *larger(1, 16, 50), *larger(1, SIZE, SIZE)]
    tensors = [torch.from_numpy(one)[None] for one in arrays]
    forms = [
        arrays,
        [one[..., None] for one in arrays],
        [Image.fromarray(one) for one in arrays],
        tensors,
        [one.float() / 127.5 - 1 for one in tensors],
        LazyImages(4, tensors.__getitem__),
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
        (np.zeros((40, 40), np.uint8), 0, "stride: must be from 1 to 16"),
        (np.zeros((40, 40), np.uint8), 2.5, "stride"),
        ([np.zeros((40, 40), np.uint8), np.zeros((40, 15), np.uint8)], 8, "image 1: 40 x 15 pixels"),
        (np.zeros((40, 40, 3), np.uint8), 8, "image"),
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
        tiles = [image[top : top + 16, left : left + 16] for top, left in tile_places(image.shape, (1, 16, 16), 8)]
        batch = tiled.to_images(torch.from_numpy(np.stack(tiles))[:, None])
        measured = measure(tiled, batch, tiled.read_given(count=len(batch)))
        each = score_of(method, measured.statistics, tiled.calibration, tiling=((16, 16), 8))
        torch.testing.assert_close(score, each.max(), rtol=1e-4, atol=1e-4)


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


def test_a_calibration_of_whole_images_is_saved_as_before(trained):
    saved = trained.calibration.to_json()
    assert '"tile"' not in saved and '"stride"' not in saved
    assert "columns" not in saved and saved.startswith('{"count":1000,"labels":false,"false_alarms":0.05,')


def test_a_calibration_does_not_depend_on_the_batch_and_reads_few_images_again(trained):
    images, read = larger(30, seed=34), []

    def load(number):
        read.append(number)
        return torch.as_tensor(images[number])[None]

    pipe = ImagePipeline(trained.tokenizer, trained.prior)
    one = calibrate(pipe, LazyImages(30, load), stride=16, false_alarms=0.1)
    assert set(read) == set(range(30)) and np.bincount(read).max() <= 4  # statistics, ids, responses, pixels
    other = calibrate(pipe, images, stride=16, false_alarms=0.1, batch_size=5)
    assert isinstance(one, Calibration) and one.digests == other.digests
    for method, scores in one.scores.items():
        np.testing.assert_allclose(other.scores[method].values, scores.values, rtol=1e-3, atol=1e-3)


def test_arrays_of_more_bits_and_channels_keep_their_size():
    values, rng = Values("uint16", 0, 4095), np.random.default_rng(0)
    array = rng.integers(0, 4096, (20, 31, 6), dtype=np.uint16)
    unit = torch.from_numpy(values.to_unit(array)).movedim(-1, 0)
    facts = {"image_size": 8, "dtype": "uint16", "range": (0, 4095)}
    several, grey = (Tokenizer.create("vqvae", channels=channels, **facts) for channels in (6, 1))
    for images in (array, array[None], [array], [unit], unit[None]):
        torch.testing.assert_close(load_image(list_images(images, several), 0, (6, 8, 8)), unit, rtol=0, atol=0)
    picture = list_images(Image.fromarray(array[..., 0]), grey)
    assert torch.equal(load_image(picture, 0, (1, 8, 8)), unit[:1])
    with pytest.raises(ValueError, match="uint16"):
        load_image(list_images([array.astype(np.uint8)], several), 0, (6, 8, 8))
    with pytest.raises(ValueError, match="clips are not cut into tiles"):
        list_images(array[..., 0], FrameByFrame.wrap(grey, 2))
