"""Images that a pipeline takes: every kind gives the same tokens, and what cannot be one is refused or told of."""

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
def test_images_come_in_four_kinds(tokenizer, channels):
    pipe = make_pipeline(tokenizer, "causal_conv", channels)
    pixels = pixels_for(pipe)
    tokens = pipe.encode(pixels)
    assert tokens.shape == (5, *pipe.tokenizer.grid.shape) and len(tokens.unique()) > 1
    for images in (as_pil(pixels), pixels.float() / 127.5 - 1, pixels.double() / 127.5 - 1):
        assert torch.equal(pipe.encode(images), tokens)
        assert torch.equal(pipe.reconstruct(images, output_type="pt"), pipe.decode(tokens, output_type="pt"))
        assert torch.equal(pipe.log_prob(images), pipe.log_prob(pixels))
    assert torch.equal(pipe.encode(as_pil(pixels)[0]), tokens[:1])
    assert torch.equal(pipe.encode(pixels, batch_size=2), tokens)
    assert np.array_equal(
        np.asarray(pipe.decode(tokens)[0]),
        pipe.decode(tokens, output_type="np")[0].squeeze(-1)
        if channels == 1
        else pipe.decode(tokens, output_type="np")[0],
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_as_arrays_and_in_lists(channels):
    """What `output_type="np"` gives, above all."""
    pipe = make_pipeline(channels=channels)
    drawn = {kind: pipe(3, 1, seed=0, output_type=kind).images for kind in ("pil", "np")}
    pixels = torch.from_numpy(drawn["np"]).movedim(-1, 1)
    tokens, array = pipe.encode(drawn["pil"]), drawn["np"]
    kinds = [
        array,
        array / 127.5 - 1,
        (array / 127.5 - 1).astype(np.float32),
        list(array),
        list(pixels),
        [*pixels[:1], drawn["pil"][1], array[2]],
        list(pixels / 127.5 - 1),
        array[::-1][::-1],
        pixels.contiguous(),
    ]
    kinds += [array[..., 0], list(array[..., 0])] if channels == 1 else []
    for images in kinds:
        assert torch.equal(pipe.encode(images), tokens)
        torch.testing.assert_close(pipe.embed(images, batch_size=2), pipe.embed(drawn["pil"]))  # rounding may differ
        assert torch.equal(pipe.log_prob(images), pipe.log_prob(drawn["pil"]))
    for image in [array[0], *([array[0, ..., 0]] if channels == 1 else [])]:
        assert torch.equal(pipe.encode(image), tokens[:1]) and torch.equal(pipe.embed(image), pipe.embed(array[:1]))
    array.flags.writeable = False
    assert torch.equal(pipe.encode(array), tokens)  # and torch does not complain
    assert pipe.compress(array) == pipe.compress(drawn["pil"])


class Watch:
    """Collects warnings of floats, of which a process gives one."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.anew()

    def anew(self):
        """As if in another process."""
        self.monkeypatch.setattr(pictures, "_warned", False)

    def __call__(self, call, *arguments, **options):
        """Where `call` warns, and of what."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(*arguments, **options)
        return [(Path(one.filename).name, str(one.message)) for one in caught]


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


@pytest.fixture(scope="module")
def calibrated():
    torch.manual_seed(0)
    pipe = make_pipeline(any_order=True)
    pipe.calibrate(pixels_for(pipe, 60))
    return pipe


KNOWN = torch.ones(8, 12, dtype=torch.bool)
KNOWN[2:6, 3:7] = False
DOORS = {
    "encode": lambda pipe, images: pipe.encode(images),
    "reconstruct": lambda pipe, images: pipe.reconstruct(images),
    "log_prob": lambda pipe, images: pipe.log_prob(images),
    "complete": lambda pipe, images: pipe.complete(images, KNOWN, seed=0),
    "conditional_log_prob": lambda pipe, images: pipe.conditional_log_prob(images, KNOWN),
    "calibrate": lambda pipe, images: pipe.calibrate(images, false_alarms=0.2),
    "anomaly_score": lambda pipe, images: pipe.anomaly_score(images, "nll", batch_size=5),
    "anomaly_map": lambda pipe, images: pipe.anomaly_map(images, batch_size=5),
    "heal": lambda pipe, images: pipe.heal(images, draws=1),
    "embed": lambda pipe, images: pipe.embed(images, batch_size=5),
    "compress": lambda pipe, images: pipe.compress(images),
}


@pytest.mark.parametrize("door", DOORS)
def test_floats_that_look_like_unit_ones_are_told_of_once(calibrated, watch, door):
    """At the line of the user, through whatever method they come."""
    unit = pixels_for(calibrated, 12) / 255
    for images in (unit, unit.movedim(1, -1).numpy(), list(unit), unit.half()):
        watch.anew()
        ((file, message),) = watch(DOORS[door], calibrated, images)
        assert file == Path(__file__).name and "from_unit" in message and "\n" not in message
        assert watch(DOORS[door], calibrated, images) == []


@pytest.mark.parametrize("door", DOORS)
def test_bright_images_are_not_told_of(calibrated, watch, door):
    """Nor what is made of them on the way: no pixel is darker than the middle."""
    bright = torch.randint(128, 256, (12, *calibrated.tokenizer.image_shape), dtype=torch.uint8)
    floats = bright.float() / 127.5 - 1
    mixed = torch.cat([pixels_for(calibrated, 10).float() / 127.5 - 1, 0.3 + 0.7 * torch.rand(5, 1, 8, 12)])
    for images in (bright, as_pil(bright), floats, floats.half(), torch.ones(12, 1, 8, 12), torch.zeros(12, 1, 8, 12)):
        assert watch(DOORS[door], calibrated, images) == []
    if door != "compress":
        assert watch(DOORS[door], calibrated, mixed) == []  # which has slices that alone would be told of


def test_from_unit_says_so(watch):
    pipe = make_pipeline()
    pixels = pixels_for(pipe)
    assert torch.equal(pipe.encode(from_unit(pixels / 255)), pipe.encode(pixels))
    assert torch.equal(pipe.encode(from_unit(pixels.movedim(1, -1).numpy() / 255)), pipe.encode(pixels))
    assert watch(pipe.encode, from_unit(0.6 + 0.4 * torch.rand(3, 1, 8, 12))) == []
    for wrong in (pixels, pixels / 1.0, pixels / 127.5 - 1, torch.full((2, 2), torch.nan), [pixels / 255], "x"):
        with pytest.raises(ValueError, match="from_unit takes"):
            from_unit(wrong)


def test_other_pil_images_are_made_to_fit():
    pipe = make_pipeline()
    large = Image.new("RGB", (60, 40), (255, 255, 255))
    assert torch.equal(pipe.encode(large), pipe.encode(torch.ones(1, 1, 8, 12)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 8, 8), "(2, 1, 8, 8)"),
        (torch.zeros(1, 8, 12), "(1, 8, 12)"),
        (torch.zeros(2, 3, 8, 12), "(2, 3, 8, 12)"),
        (torch.zeros(2, 1, 8, 12, dtype=torch.int64), "torch.int64"),
        (torch.zeros(0, 1, 8, 12, dtype=torch.int64), "uint8, 0 to 255, or float in [-1, 1]; got torch.int64"),
        (torch.zeros(2, 1, 8, 12, dtype=torch.complex64), "torch.complex64"),
        (Image.new("L", (0, 8)), "0 x 8 pixels"),
        (torch.full((2, 1, 8, 12), 255.0), "[-1, 1]"),
        (torch.full((2, 1, 8, 12), float("nan")), "[-1, 1]"),
        (np.zeros((2, 1, 8, 12), np.uint8), "ndarray of shape (2, 1, 8, 12), uint8"),
        (np.zeros((8, 12, 3), np.uint8), "(B, 8, 12, 1), (B, 8, 12), (8, 12, 1), (8, 12) as arrays"),
        (np.zeros((8, 12), np.int64), "int64"),
        (np.zeros((8, 12), bool), "bool"),
        (np.full((8, 12), 255.0), "[-1, 1]"),
        ([np.zeros((8, 12), np.uint8), np.zeros((8, 12))], "list of float64 and uint8"),
        ([torch.zeros(1, 1, 8, 12)], "(1, 1, 8, 12)"),
        ([], "list of nothing"),
        ("three.png", "str"),
    ],
)
def test_other_images_are_refused(images, message):
    pipe = make_pipeline()
    for method in (pipe.encode, pipe.reconstruct, pipe.log_prob, pipe.bits_per_dim):
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            method(images)
        assert "\n" not in str(caught.value)
