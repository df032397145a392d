"""What a browser sends is read as it should be, or refused in a sentence."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from pipelines.app.uploads import files_of, images_of, painted, pictures_of, whole

SHAPE, MOST = (3, 6, 8), 50_000


def url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(width=8, height=6, seed=0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def picked(*files: str) -> str:
    return json.dumps({"files": files})


def test_files_come_as_they_were_sent():
    contents = [b"", b"one", bytes(range(256))]
    assert files_of(picked(*map(url, contents)), MOST, 3) == contents


def test_images_of_any_size_are_not_in_memory_together(monkeypatch):
    """34 bytes can be 8192 x 8192 pixels."""
    loaded, load = [], Image.Image.load
    monkeypatch.setattr(PngImageFile, "load", lambda image: loaded.append(image.size) or load(image))
    for number, _ in enumerate(pictures_of(picked(*[url(png())] * 3), MOST, 3), 1):
        assert len(loaded) == number


def test_images_have_the_shape_of_the_pipeline():
    images = images_of(picked(url(png()), url(png(30, 50))), SHAPE, MOST, 2)
    assert images.shape == (2, *SHAPE)
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(png()))))
    assert [image.size for image in pictures_of(picked(url(png()), url(png(30, 50))), MOST, 2)] == [(8, 6), (30, 50)]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("", "pick a file first"),
        (None, "pick a file first"),
        (picked(), "pick a file first"),
        ("[]", "should be a JSON object"),
        ("{", "should be JSON"),
        ("[" * 100_000, "should be JSON"),
        (3, "should be JSON"),
        (json.dumps({"files": "data:,"}), "pick a file first"),
        (json.dumps({"files": [3]}), "should be a data URL"),
        (json.dumps({"files": [{"path": "/etc/passwd"}]}), "should be a data URL"),
        (picked("/etc/passwd"), "should be a data URL in base64"),
        (picked("file:///etc/passwd"), "should be a data URL in base64"),
        (picked("http://127.0.0.1/x,y"), "should be a data URL in base64"),
        (picked("data:image/png,plain"), "should be a data URL in base64"),
        (picked("data:image/png;base64,@@@"), "should be a data URL in base64"),
        (picked(url(png()), url(png()), url(png())), "3 files; at most 2 are taken at once"),
        (picked(url(bytes(60_000))), "0.1 MB; at most 0.0 MB are taken at once"),
        (picked(url(b"no picture")), "image 1 cannot be read: not an image in one of the formats"),
        (picked(url(png()), url(png()[:80])), "image 2 cannot be read"),
        (picked(url(b"")), "image 1 cannot be read: the file is empty"),
    ],
)
def test_what_is_wrong_is_told(value, sentence):
    for read in (lambda: images_of(value, SHAPE, MOST, 2), lambda: list(pictures_of(value, MOST, 2))):
        with pytest.raises(ValueError) as caught:
            read()
        assert sentence in str(caught.value) and "passwd" not in str(caught.value)


def painting(mask, picture=None) -> str:
    return json.dumps({"picture": url(png()) if picture is None else picture, "mask": mask})


def test_what_is_painted_is_not_known():
    mask = "".join("1" if row < 2 and column == 5 else "0" for row in range(6) for column in range(8))
    image, known = painted(painting(mask), SHAPE, MOST)
    assert image.shape == (1, *SHAPE) and known.shape == SHAPE[1:]
    assert (~known).nonzero().tolist() == [[0, 5], [1, 5]]


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("", "pick an image first"),
        (painting("1" * 48, ""), "pick an image first"),
        (painting("0" * 48), "nothing is painted"),
        (painting("1" * 47), "48 digits"),
        (painting("2" * 48), "48 digits"),
        (painting(["1"] * 48), "48 digits"),
        (painting(None), "48 digits"),
        (painting("1" * 48, {"path": "/etc/passwd"}), "should be a data URL"),
    ],
)
def test_what_is_wrong_with_a_painting_is_told(value, sentence):
    with pytest.raises(ValueError, match=sentence):
        painted(value, SHAPE, MOST)


@pytest.mark.parametrize("value", [None, "3", 0, 9, 2.5, True, float("nan"), float("inf"), -1, 10**400, [3]])
def test_a_number_that_is_out_of_range(value):
    with pytest.raises(ValueError, match="seed should be a whole number from 1 to 8"):
        whole(value, "seed", 1, 8)


def test_a_whole_number():
    assert [whole(value, "seed", 1, 8) for value in (1, 8, 3.0)] == [1, 8, 3]
