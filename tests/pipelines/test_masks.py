"""`known` and `mask`, in every form, say which pixels of an image to keep or to redraw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_pipelines import make_pipeline, pixels_for

from pipelines.completion import find_known_pixels

HEIGHT, WIDTH = 8, 12


def hidden(count=2):
    """A different mask for each image, bool (count, H, W)."""
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
    "16 bits": lambda mask: mask.numpy().astype(np.uint16),
    "with a channel": lambda mask: mask[:, None].float(),
    "pictures": lambda mask: [picture(one) for one in mask],
    "pictures of bits": lambda mask: [picture(one, "1") for one in mask],
    "pictures of fractions": lambda mask: [Image.fromarray(one.float().numpy()) for one in mask],
    "list of arrays": lambda mask: list(mask.numpy()),
}


@pytest.mark.parametrize("form", FORMS)
def test_white_is_redrawn_in_every_form(form):
    pipe, mask = make_pipeline(prior="masked"), hidden()
    images = pixels_for(pipe, 2)
    wanted = pipe.complete(images, ~mask, seed=0, output_type="np")
    made = pipe.complete(images, mask=FORMS[form](mask), seed=0, output_type="np")
    assert made.tokens.equal(wanted.tokens) and np.array_equal(made.images, wanted.images)
    known = ~mask.numpy()
    assert np.array_equal(made.images[known], images.movedim(1, -1).numpy()[known])
    scores = pipe.conditional_log_prob(images, mask=FORMS[form](mask))
    assert scores.equal(pipe.conditional_log_prob(images, ~mask))


def test_one_mask_applies_to_all_images():
    pipe, mask = make_pipeline(), hidden(1)
    images = pixels_for(pipe, 3)
    wanted = pipe.complete(images, ~mask[0], seed=0).tokens
    for given in (mask[0], mask, picture(mask[0]), [picture(mask[0])], picture(mask[0]).convert("RGBA")):
        assert pipe.complete(images, mask=given, seed=0).tokens.equal(wanted)


def test_a_mask_of_the_size_of_its_image_is_cropped_like_it():
    """The picture is twice as large and wider, so the sides of both are cropped."""
    batch = torch.zeros(1, 1, HEIGHT, WIDTH)
    wide = np.zeros((2 * HEIGHT, 4 * WIDTH), np.uint8)
    wide[:, :WIDTH] = 255  # cropped
    image = Image.fromarray(np.zeros_like(wide))
    assert find_known_pixels(None, Image.fromarray(wide), image, batch).all()
    wide[:, WIDTH : 2 * WIDTH] = 255
    known = find_known_pixels(None, Image.fromarray(wide), [image], batch)
    assert not known[:, :, : WIDTH // 2].any() and known[:, :, WIDTH // 2 :].all()
    turned = Image.Exif()
    turned[0x0112] = 6
    image.info["exif"] = turned.tobytes()  # the mask is painted on the upright picture
    image.getexif()[0x0112] = 6
    assert find_known_pixels(None, Image.fromarray(np.zeros((4 * WIDTH, 2 * HEIGHT), np.uint8)), image, batch).all()


@pytest.mark.parametrize(
    ("mask", "key"),
    [
        (Image.new("L", (WIDTH, HEIGHT + 1)), "mask.*12 x 9.*12 x 8"),
        ([Image.new("L", (WIDTH, HEIGHT))] * 3, "mask.*got 3"),
        (torch.zeros(HEIGHT, WIDTH + 1), "mask.*shape"),
        (torch.full((HEIGHT, WIDTH), 300), "mask.*300"),
        (torch.full((HEIGHT, WIDTH), float("nan")), "mask.*nan"),
    ],
)
def test_bad_masks_are_one_line_of_error(mask, key):
    pipe = make_pipeline()
    with pytest.raises(ValueError, match=key) as caught:
        pipe.complete(pixels_for(pipe, 2), mask=mask)
    assert "\n" not in str(caught.value)
