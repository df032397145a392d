"""Images that a pipeline takes: every form gives the same tokens; invalid ones are refused or warned about."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_pipelines import as_pil, every_tokenizer, make_pipeline, pixels_for

from pipelines import from_unit
from pipelines.images import pictures


@pytest.mark.sparse
@every_tokenizer
@pytest.mark.parametrize("channels", [1, 3])
def test_pil_images_uint8_and_floats_give_the_same_tokens(tokenizer, channels):
    pipe = make_pipeline(tokenizer, "causal_conv", channels)
    pixels = pixels_for(pipe)
    tokens = pipe.encode(pixels)
    assert tokens.shape == (5, *pipe.tokenizer.grid.shape) and len(tokens.unique()) > 1
    pil = as_pil(pixels, pipe.frames)
    for images in (pil, pixels.float() / 127.5 - 1, pixels.double() / 127.5 - 1):
        assert torch.equal(pipe.encode(images), tokens)
        assert torch.equal(pipe.reconstruct(images, output_type="pt"), pipe.decode(tokens, output_type="pt"))
        assert torch.equal(pipe.log_prob(images), pipe.log_prob(pixels))
    assert torch.equal(pipe.encode(pil[0] if pipe.frames == 1 else pil[:1]), tokens[:1])
    assert torch.equal(pipe.encode(pixels, batch_size=2), tokens)
    array = pipe.decode(tokens, output_type="np")[0]
    shown = pipe.decode(tokens)[0]
    shown = np.asarray(shown) if pipe.frames == 1 else np.stack([np.asarray(frame) for frame in shown])
    assert np.array_equal(shown, array[..., 0] if channels == 1 else array)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_and_lists_of_images_give_the_same_tokens(channels):
    """Above all, those of `output_type="np"`."""
    pipe = make_pipeline(channels=channels)
    pil, array = (pipe(3, 1, seed=0, output_type=kind).images for kind in ("pil", "np"))
    pixels, tokens = torch.from_numpy(array).movedim(-1, 1), pipe.encode(pil)
    batches = [array, array / 127.5 - 1, (array / 127.5 - 1).astype(np.float32), array[::-1][::-1], pixels.contiguous()]
    batches += [list(array), list(pixels), [pixels[0], pil[1], array[2]], list(pixels / 127.5 - 1)]
    batches += [array[..., 0], list(array[..., 0])] if channels == 1 else []
    for images in batches:
        assert torch.equal(pipe.encode(images), tokens)
        assert torch.equal(pipe.log_prob(images), pipe.log_prob(pil))
    for image in [array[0], *([array[0, ..., 0]] if channels == 1 else [])]:
        assert torch.equal(pipe.encode(image), tokens[:1])
    array.flags.writeable = False
    assert torch.equal(pipe.encode(array), tokens)  # without a warning of torch
    assert pipe.compress(array) == pipe.compress(pil)


@pytest.fixture(autouse=True)
def new_process(monkeypatch):
    """A process warns about floats once."""
    monkeypatch.setattr(pictures, "_warned", False)


def warnings_of(call, *arguments):
    """The file and the text of each warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments)
    return [(Path(one.filename).name, str(one.message)) for one in caught]


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(0)
    pipe = make_pipeline(any_order=True)
    pipe.calibrate(pixels_for(pipe, 60))
    return pipe


KNOWN = torch.ones(8, 12, dtype=torch.bool)
KNOWN[2:6, 3:7] = False
METHODS = {
    "encode": lambda pipe, images: pipe.encode(images),
    "log_prob": lambda pipe, images: pipe.log_prob(images),
    "complete": lambda pipe, images: pipe.complete(images, KNOWN, seed=0),
    "conditional_log_prob": lambda pipe, images: pipe.conditional_log_prob(images, KNOWN),
    "calibrate": lambda pipe, images: pipe.calibrate(images, false_alarms=0.2),
    "anomaly_map": lambda pipe, images: pipe.anomaly_map(images, batch_size=5),
    "heal": lambda pipe, images: pipe.heal(images, draws=1),
    "embed": lambda pipe, images: pipe.embed(images, batch_size=5),
    "compress": lambda pipe, images: pipe.compress(images),
}


@pytest.mark.parametrize("method", METHODS)
def test_floats_in_zero_to_one_are_warned_about_once_at_the_users_line(calibrated, monkeypatch, method):
    unit = pixels_for(calibrated, 12) / 255
    for images in (unit, list(unit)):
        monkeypatch.setattr(pictures, "_warned", False)
        ((file, message),) = warnings_of(METHODS[method], calibrated, images)
        assert file == Path(__file__).name and "from_unit" in message and "\n" not in message
        assert warnings_of(METHODS[method], calibrated, images) == []


@pytest.mark.parametrize("method", ["encode", "complete", "calibrate"])
def test_bright_images_are_not_warned_about(calibrated, method):
    """No pixel is darker than the middle, nor in images that the method makes on the way."""
    bright = torch.randint(128, 256, (12, *calibrated.tokenizer.image_shape), dtype=torch.uint8)
    floats = bright.float() / 127.5 - 1
    mixed = torch.cat([pixels_for(calibrated, 10).float() / 127.5 - 1, 0.3 + 0.7 * torch.rand(5, 1, 8, 12)])
    for images in (bright, as_pil(bright), floats, floats.half(), torch.ones(12, 1, 8, 12), torch.zeros(12, 1, 8, 12)):
        assert warnings_of(METHODS[method], calibrated, images) == []
    assert warnings_of(METHODS[method], calibrated, mixed) == []  # though batches of it alone would be


def test_from_unit_converts_the_range_and_turns_the_warning_off():
    pipe = make_pipeline()
    pixels = pixels_for(pipe)
    assert torch.equal(pipe.encode(from_unit(pixels / 255)), pipe.encode(pixels))
    assert torch.equal(pipe.encode(from_unit(pixels.movedim(1, -1).numpy() / 255)), pipe.encode(pixels))
    assert warnings_of(pipe.encode, from_unit(0.6 + 0.4 * torch.rand(3, 1, 8, 12))) == []
    for wrong in (pixels, pixels / 1.0, pixels / 127.5 - 1, torch.full((2, 2), torch.nan), [pixels / 255], "x"):
        with pytest.raises(ValueError, match="from_unit"):
            from_unit(wrong)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (torch.zeros(2, 1, 8, 8), "(2, 1, 8, 8)"),
        (torch.zeros(2, 1, 8, 12, dtype=torch.int64), "torch.int64"),
        (Image.new("L", (0, 8)), "0 x 8 pixels"),
        (torch.full((2, 1, 8, 12), float("nan")), "[-1, 1]"),
        (np.zeros((8, 12, 3), np.uint8), "(B, 8, 12, 1), (B, 8, 12), (8, 12, 1), (8, 12)"),
        ([np.zeros((8, 12), np.uint8), np.zeros((8, 12))], "float64"),
        ("three.png", "str"),
    ],
)
def test_other_images_are_refused(images, named):
    pipe = make_pipeline()
    for method in (pipe.encode, pipe.log_prob):
        with pytest.raises(ValueError, match=re.escape(named)) as caught:
            method(images)
        assert "\n" not in str(caught.value)
