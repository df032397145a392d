"""Formats: grey and colour, transparency, 16 bits, CMYK, orientation, animations, and the size asked for."""

import numpy as np
import pytest
from givens.image_files import encoded, noise
from givens.image_folders import config, write_image
from ordinary import as_others
from PIL import Image

from pipelines.config import UserError
from pipelines.images import load_images
from pipelines.images.decoding import WEB_FORMATS, pixels_of, try_decode
from pipelines.images.folder import READ_SUFFIXES


def one(path, **options):
    """The pixels that `path` has as a training image."""
    folder = path.parent
    write_image(folder / "z.png", noise(12, 12))  # a second image, because one is held out
    splits = load_images(config(folder, held_out_fraction=0.5, **options))
    for part in (splits.train, splits.held_out):
        if part.names([0]) == [path.name]:
            return part.pixels([0])[0].numpy()
    raise AssertionError("the image is in neither part")


@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "WEBP", "JPEG", "TIFF"])
def test_formats_in_grey_and_colour(tmp_path, format):
    smooth = np.linspace(0, 255, 144).reshape(12, 12).astype(np.uint8)
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "JPEG" else {}
    (tmp_path / f"a.{format.lower()}").write_bytes(encoded(Image.fromarray(smooth), format, **options))
    path = tmp_path / f"a.{format.lower()}"
    tolerance = 3 if format == "JPEG" else 0
    for channels in (1, 3):
        pixels = one(path, channels=channels)
        assert pixels.shape == (channels, 12, 12)
        assert np.abs(pixels.astype(int) - smooth).max() <= tolerance


GREY = np.arange(144, dtype=np.uint8).reshape(12, 12)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "group4"])
def test_a_tiff_is_read_as_a_png_is(compression):
    options = {} if compression is None else {"compression": compression}
    image = Image.fromarray(GREY)
    for each in [image.convert("1")] if compression == "group4" else [image, image.convert("RGBA"), image.convert("P")]:
        found = try_decode(encoded(each, "TIFF", **options), (3, 12, 12))
        assert np.array_equal(found, try_decode(encoded(each), (3, 12, 12)))


def test_a_tiff_of_sixteen_bits_is_scaled_as_a_png_is():
    levels = GREY.astype(np.uint16) * 257
    for format in ("PNG", "TIFF"):
        assert np.array_equal(try_decode(encoded(Image.fromarray(levels), format), (1, 12, 12))[0], GREY)


@pytest.mark.parametrize(
    ("image", "options", "reason"),
    [
        (Image.fromarray(GREY), {"save_all": True, "append_images": [Image.fromarray(GREY)]}, "several pages"),
        (Image.fromarray(GREY.astype(np.float32)), {}, "8 or 16 bits"),
        (Image.fromarray(GREY.astype(np.int32)), {}, "8 or 16 bits"),
        (Image.fromarray(GREY.astype(np.uint16)), {"tiffinfo": {262: 0}}, "8 or 16 bits"),  # 0 is white
    ],
)
def test_a_tiff_without_one_picture_or_without_a_known_white_is_refused(image, options, reason):
    assert reason in try_decode(encoded(image, "TIFF", **options), (1, 12, 12))


def test_a_tiff_is_not_read_of_what_somebody_uploads():
    assert "not an image in one of" in try_decode(encoded(Image.fromarray(GREY), "TIFF"), (1, 12, 12), WEB_FORMATS)


def test_every_suffix_that_is_looked_for_is_of_a_format_that_is_read(tmp_path):
    with pytest.raises(UserError) as caught:
        load_images(config(tmp_path))
    asked = str(caught.value).partition("looked for ")[2].strip(")").split(", ")
    assert set(asked) == READ_SUFFIXES
    for suffix in asked:
        data = encoded(Image.fromarray(GREY), Image.registered_extensions()[suffix])
        assert not isinstance(try_decode(data, (1, 12, 12)), str), suffix


def test_colour_becomes_grey_and_stays_colour(tmp_path):
    colour = noise(12, 12, 3)
    write_image(tmp_path / "a.png", colour)
    assert np.array_equal(one(tmp_path / "a.png", channels=3), colour.transpose(2, 0, 1))
    grey = one(tmp_path / "a.png")[0].astype(float)
    assert np.abs(grey - colour @ [0.299, 0.587, 0.114]).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_white(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", (12, 12), 1)
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.paste(0, (0, 0, 6, 12))
        data = encoded(image, transparency=0)
        solid = (10, 20, 30)
    else:
        colour = noise(1, 1, 3)[0, 0].tolist() if mode == "RGBA" else [40]
        image = Image.new(mode, (12, 12), (*colour, 255))
        image.paste((*colour, 0), (0, 0, 6, 12))
        data, solid = encoded(image), tuple(colour if mode == "RGBA" else colour * 3)
    write_image(tmp_path / "a.png", data)
    pixels = one(tmp_path / "a.png", channels=3)
    assert (pixels[:, :, :6] == 255).all()
    assert tuple(pixels[:, 5, 9]) == solid


def test_transparency_of_a_palette_is_composited_as_in_a_file(tmp_path):
    """A picture that was quantized and not saved has no `transparency`; its palette has alpha."""
    image = Image.new("RGBA", (12, 12), (10, 20, 30, 255))
    image.paste((0, 0, 0, 0), (0, 0, 6, 12))
    image = image.quantize(2, method=Image.Quantize.FASTOCTREE)
    write_image(tmp_path / "a.png", encoded(image))
    pixels = pixels_of(image, (3, 12, 12))
    assert (pixels[:, :, :6] == 255).all() and (pixels[:, :, 6:] < 40).all()
    assert np.array_equal(pixels, one(tmp_path / "a.png", channels=3))


def test_a_transparent_grey_of_sixteen_bits_is_white(tmp_path):
    levels = np.arange(144, dtype=np.uint16).reshape(12, 12) * 257
    write_image(tmp_path / "a.png", encoded(Image.fromarray(levels), transparency=40 * 257))
    pixels = one(tmp_path / "a.png")[0].flatten()
    assert pixels[40] == 255 and np.array_equal(np.delete(pixels, 40), np.delete(np.arange(144), 40))


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    levels = np.arange(144, dtype=np.uint16).reshape(12, 12)
    write_image(tmp_path / "a.png", encoded(Image.fromarray(levels * 257)))
    assert np.array_equal(one(tmp_path / "a.png")[0], levels)


def test_cmyk_becomes_rgb(tmp_path):
    write_image(tmp_path / "a.jpg", encoded(Image.new("CMYK", (12, 12), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = one(tmp_path / "a.jpg", channels=3)[:, 6, 6]
    assert red > 240 and green < 15 and blue < 15


def test_exif_orientation_is_applied(tmp_path):
    upright = np.zeros((12, 24), dtype=np.uint8)
    upright[:, :12] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying down: turn clockwise to see it
    write_image(tmp_path / "a.jpg", encoded(Image.fromarray(np.rot90(upright)), "JPEG", exif=exif, quality=100))
    seen = one(tmp_path / "a.jpg", image_size=[12, 24])[0]
    assert np.abs(seen.astype(int) - upright).max() < 5


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("L", (12, 12), level) for level in (50, 150, 250)]
    for name, format in (("a.gif", "GIF"), ("b.webp", "WEBP")):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        write_image(tmp_path / name[0] / name, data)
        assert np.abs(one(tmp_path / name[0] / name).astype(int) - 50).max() <= 2


def test_fifty_megapixels_are_read_and_more_than_64_are_not():
    for side, read in ((7_100, True), (8_200, False)):
        found = try_decode(encoded(Image.new("1", (side, side), 1)), (1, 12, 12))
        assert (found == 255).all() if read else "the limit is" in found


def test_resize_covers_the_shape_and_crops_the_centre(tmp_path):
    wide = np.zeros((20, 60), dtype=np.uint8)
    wide[:, 20:40] = 255
    write_image(tmp_path / "a.png", wide)
    square = one(tmp_path / "a.png")[0]
    assert square.shape == (12, 12) and (square[:, 1:-1] > 235).all()
    write_image(tmp_path / "a.png", np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255)
    assert np.abs(one(tmp_path / "a.png", image_size=8)[0].astype(int) - 127).max() < 20  # antialiased


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
    assert image.mode == mode and (pixels_of(image, (channels, 3, 5)) >= 254).all()


def test_an_image_that_may_not_be_read_is_not_called_missing(tmp_path):
    write_image(tmp_path / "a.png", noise(12, 12))
    (tmp_path / "a.png").chmod(0)
    with as_others():
        assert "Permission denied" in try_decode(tmp_path / "a.png", (1, 12, 12))
    assert try_decode(tmp_path / "b.png", (1, 12, 12)) == "no such file, or not a regular one"
