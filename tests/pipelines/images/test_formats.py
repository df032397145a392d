"""Decoding: formats, grey and colour, transparency, 16 bits, CMYK, orientation, animations, size.

Covers: pipelines/images/formats.py.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from givens.images import encoded, noise, write_image
from ordinary import as_others
from PIL import Image

from pipelines.images.clip_files import cut_windows
from pipelines.images.folder import READ_SUFFIXES
from pipelines.images.formats import OWN_SIZE, WEB_FORMATS, decode_image, guess_type, read_values, try_decode
from pipelines.images.sources import of_files
from tokenizer.spec import ImageSpec


def decode(data, channels=1):
    """The pixels of an encoded image of 12 x 12 pixels; a message is an error."""
    pixels = try_decode(data, ImageSpec(channels, 12, 12))
    assert not isinstance(pixels, str), pixels
    return pixels


GREY = np.arange(144, dtype=np.uint8).reshape(12, 12)


def test_every_suffix_of_a_training_image_is_decoded_and_uploads_may_be_web_formats():
    for suffix in READ_SUFFIXES:
        format = Image.registered_extensions()[suffix]
        data = encoded(GREY, format)
        assert decode(data).shape == (1, 12, 12)
        assert isinstance(try_decode(data, ImageSpec(1, 12, 12), WEB_FORMATS), str) == (format in ("TIFF", "PPM"))


def ppm(magic: str, pixels: np.ndarray, white: int) -> bytes:
    """A PPM (P3, P6) or PGM (P2, P5), plain or in bytes."""
    head = f"{magic}\n# a comment\n{pixels.shape[1]} {pixels.shape[0]}\n{white}\n".encode()
    plain = " ".join(map(str, pixels.ravel())).encode()
    return head + (plain if magic in ("P2", "P3") else pixels.astype(">u2" if white > 255 else "u1").tobytes())


@pytest.mark.parametrize("white", [100, 1023])
@pytest.mark.parametrize("magic", ["P2", "P3", "P5", "P6"])
def test_white_of_a_ppm_is_white_and_its_greys_are_in_proportion(magic, white):
    channels = 3 if magic in ("P3", "P6") else 1
    pixels = np.random.default_rng(0).integers(0, white + 1, (12, 12, channels))
    found = decode(ppm(magic, pixels, white), channels)
    assert np.abs(found.transpose(1, 2, 0) - pixels / white * 255).max() <= 0.51  # rounded twice, through 16 bits


@pytest.mark.parametrize(("magic", "white"), [("P2", 1023), ("P5", 65_535)])
def test_a_pgm_of_more_than_eight_bits_is_read_as_sixteen_bits_like_a_png(magic, white):
    pixels = np.random.default_rng(0).integers(0, white + 1, (12, 12))
    data, spec = ppm(magic, pixels, white), ImageSpec(1, 12, 12, dtype="uint16", high=65_535)
    assert guess_type(data, 1) == "uint16"
    assert np.array_equal(read_values(data, spec)[0], np.rint(pixels / white * 65_535))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (ppm("P6", noise(12, 12, 3), 255)[:-1], "truncated"),
        (ppm("P5", noise(12, 12), 255)[:9], "header"),
        (b"P5\n70000 2\n255\n", "the limit is"),
    ],
)
def test_a_damaged_or_unusual_ppm_is_refused_in_one_line(data, reason):
    found = try_decode(data, ImageSpec(3, 12, 12))
    assert isinstance(found, str) and reason in found and "\n" not in found


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_white_is_white_in_every_mode_of_pillow(mode, channels):
    white = Image.new("L", (5, 3), 255)
    if mode == "LAB":
        image = Image.merge("LAB", [white, *[Image.new("L", white.size, 128)] * 2])
    elif mode.startswith("I"):
        image = Image.new(mode, white.size, 65535)
    else:
        for way in {"La": ["LA"], "RGBa": ["RGBA"], "PA": ["P"], "HSV": ["RGB"], "YCbCr": ["RGB"]}.get(mode, []):
            white = white.convert(way)
        image = white.convert(mode)
    assert image.mode == mode and (decode_image(image, ImageSpec(channels, 3, 5)) >= 254).all()


def test_an_unreadable_file_is_distinguished_from_a_missing_one(tmp_path):
    write_image(tmp_path / "a.png", GREY)
    (tmp_path / "a.png").chmod(0)
    with as_others():
        assert "Permission denied" in try_decode(tmp_path / "a.png", ImageSpec(1, 12, 12))
    assert "missing" in try_decode(tmp_path / "b.png", ImageSpec(1, 12, 12))


# Files whose pixels were recorded with release 0.3

FILES = Path(__file__).parents[2] / "fixtures" / "formats.zip"
"""Images of 9 x 11 pixels and clips of four frames in each format, also damaged ones."""
RECORDED = json.loads(FILES.with_suffix(".json").read_text())
"""For each file and reading, the hash of the pixels; what is refused is left out."""
GREY_SPEC, COLOUR_SPEC = ImageSpec(1, 9, 11), ImageSpec(3, 9, 11)
UINT16, FLOATS = {"dtype": "uint16", "low": 100.0, "high": 60_000.0}, {"dtype": "float32", "high": 200.0}
READINGS = {
    "grey": (GREY_SPEC, None),
    "colour": (COLOUR_SPEC, None),
    "small": (COLOUR_SPEC.at(6, 5), None),
    "large": (COLOUR_SPEC.at(14, 20), None),
    "own size": (COLOUR_SPEC, OWN_SIZE),
    "enlarged": (COLOUR_SPEC, (20, 31)),
    "six": (replace(GREY_SPEC, channels=6), None),
    **{f"{channels} of uint16": (ImageSpec(channels, 9, 11, **UINT16), None) for channels in (1, 2, 3, 4, 6)},
    "small of uint16": (ImageSpec(6, 5, 7, **UINT16), None),
    "enlarged of uint16": (ImageSpec(6, 9, 11, **UINT16), (20, 12)),
    "grey floats": (ImageSpec(1, 9, 11, **FLOATS), None),
    "six floats": (ImageSpec(6, 5, 7, **FLOATS), None),
}
CLIP_READINGS = ["grey", "colour", "small", "1 of uint16", "3 of uint16", "grey floats"]


def hash_pixels(found):
    return None if isinstance(found, str) else hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest()[:12]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", RECORDED)
def test_pixels_are_those_of_release_0_3(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(zipfile.ZipFile(FILES).read(name))
    readings = {key: (path, *READINGS[key]) for key in READINGS}
    if name.startswith(("clip", "cut_clip")):
        windows = cut_windows(of_files([str(path)]), 2)
        readings = {
            f"{key}, window {row}": (windows.payloads([row])[0], replace(READINGS[key][0], frames=2), None)
            for key in CLIP_READINGS
            for row in range(windows.size)
        }
    found = {key: try_decode(payload, spec, least=least) for key, (payload, spec, least) in readings.items()}
    assert {key: hash_pixels(pixels) for key, pixels in found.items() if hash_pixels(pixels)} == RECORDED[name]
    assert not any("\n" in pixels for pixels in found.values() if isinstance(pixels, str))
