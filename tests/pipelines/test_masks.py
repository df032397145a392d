"""What is known of images, told by `known` or by `mask`, in every form: one polarity for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_pipelines import make_pipeline, pixels_for

from pipelines.completion import hidden_pixels, known_pixels

HEIGHT, WIDTH = 8, 12


def hidden(count=2):
    """bool (count, H, W), another one for each image."""
    mask = torch.zeros(count, HEIGHT, WIDTH, dtype=torch.bool)
    for k in range(count):
        mask[k, 4:, : 4 * (k + 1)] = True
    return mask


def picture(mask, mode="L"):
    return Image.fromarray(np.asarray(mask).astype(np.uint8) * 255).convert(mode)


FORMS = {
    "bool tensor": lambda mask: mask,
    "bool array": lambda mask: mask.numpy(),
    "flipped array": lambda mask: mask.flip(1).numpy()[:, ::-1],
    "bytes": lambda mask: (mask * 255).to(torch.uint8),
    "bytes of 0 and 1": lambda mask: mask.to(torch.uint8).numpy(),
    "floats": lambda mask: mask.float(),
    "with a channel": lambda mask: mask[:, None].float(),
    "pictures": lambda mask: [picture(one) for one in mask],
    "pictures of colours": lambda mask: [picture(one, "RGB") for one in mask],
    "pictures of bits": lambda mask: [picture(one, "1") for one in mask],
    "pictures of numbers": lambda mask: [picture(one).convert("I") for one in mask],
    "pictures of fractions": lambda mask: [Image.fromarray(one.float().numpy()) for one in mask],
    "list of arrays": lambda mask: list(mask.numpy()),
    "list of tensors": lambda mask: list(mask),
}


@pytest.mark.parametrize("form", FORMS)
def test_white_is_drawn_again_in_every_form(form):
    pipe, mask = make_pipeline(), hidden()
    images = pixels_for(pipe, 2)
    wanted = pipe.complete(images, ~mask, seed=0, output_type="np")
    made = pipe.complete(images, mask=FORMS[form](mask), seed=0, output_type="np")
    assert made.tokens.equal(wanted.tokens) and np.array_equal(made.images, wanted.images)
    kept = ~mask.numpy()
    assert np.array_equal(made.images[kept], images.movedim(1, -1).numpy()[kept])


def test_one_mask_is_for_all_images():
    pipe, mask = make_pipeline(), hidden(1)
    images = pixels_for(pipe, 3)
    wanted = pipe.complete(images, ~mask[0], seed=0).tokens
    for given in (mask[0], mask, picture(mask[0]), [picture(mask[0])], picture(mask[0]).convert("RGBA")):
        assert pipe.complete(images, mask=given, seed=0).tokens.equal(wanted)


def test_whole_numbers_are_of_any_type():
    """A picture in 16 bits is one of uint16, in which torch compares nothing."""
    for kind in (np.uint8, np.uint16, np.int64):
        mask = np.array([[0, 1], [1, 0]], kind)
        assert hidden_pixels(mask, None, torch.zeros(1, 3, 2, 2)).tolist() == [[[False, True], [True, False]]]
    assert hidden_pixels(np.zeros((0, 2, 2)), None, torch.zeros(0, 3, 2, 2)).shape == (0, 2, 2)


def test_scores_take_masks_too():
    pipe, mask = make_pipeline(prior="masked"), hidden()
    images = pixels_for(pipe, 2)
    scores = pipe.conditional_log_prob(images, mask=[picture(one) for one in mask])
    assert scores.equal(pipe.conditional_log_prob(images, ~mask))


def test_a_mask_of_the_size_of_its_image_is_cropped_as_that_is():
    """The picture is 2 x as large and wider, so that its sides are cut off: the mask's sides are, too."""
    batch = torch.zeros(1, 1, HEIGHT, WIDTH)
    wide = np.zeros((2 * HEIGHT, 4 * WIDTH), np.uint8)
    wide[:, :WIDTH] = 255  # all of it is cut off
    image = Image.fromarray(np.zeros_like(wide))
    assert known_pixels(None, Image.fromarray(wide), image, batch).all()
    wide[:, WIDTH : 2 * WIDTH] = 255
    known = known_pixels(None, Image.fromarray(wide), [image], batch)
    assert not known[:, :, : WIDTH // 2].any() and known[:, :, WIDTH // 2 :].all()
    turned = Image.Exif()
    turned[0x0112] = 6
    image.info["exif"] = turned.tobytes()  # it is shown upright, and painted on as it is shown
    image.getexif()[0x0112] = 6
    assert known_pixels(None, Image.fromarray(np.zeros((4 * WIDTH, 2 * HEIGHT), np.uint8)), image, batch).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (WIDTH, HEIGHT + 1)), "mask has 12 x 9 pixels; it should have 12 x 8"),
        ([Image.new("L", (WIDTH, HEIGHT))] * 3, "a list of 2, one for each image .got 3"),
        (torch.zeros(HEIGHT, WIDTH + 1), "mask should have shape"),
        (torch.full((HEIGHT, WIDTH), -1.0), "floats in .0, 1. .got torch.float32, -1.0"),
        (torch.full((HEIGHT, WIDTH), 255.0), "floats in .0, 1."),
        (torch.full((HEIGHT, WIDTH), 300), "whole numbers of 0 to 255"),
        (torch.full((HEIGHT, WIDTH), float("nan")), "mask should be bool"),
    ],
)
def test_wrong_masks_are_refused_in_a_line(mask, message):
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=message) as caught:
        pipe.complete(pixels_for(pipe, 2), mask=mask)
    assert "\n" not in str(caught.value)


def test_one_of_the_two_is_given():
    pipe = make_pipeline()
    images, mask = pixels_for(pipe, 2), hidden()
    for given in ({}, {"known": ~mask, "mask": mask}):
        for ask in (pipe.complete, pipe.conditional_log_prob):
            with pytest.raises(TypeError, match="give known .* or mask .*: one of the two"):
                ask(images, **given)
    with pytest.raises(ValueError, match="not a picture; give mask=picture"):
        pipe.complete(images, picture(mask[0]))
