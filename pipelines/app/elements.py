"""The parts of the page that gradio does not have as they are needed here: pictures in crisp pixels, a picker of files,
a painting.

Their values are JSON: the page shows and sends pictures as data URLs, so that no request has to name a file, and a mask
as a digit for each pixel. What a visitor may send is read by `uploads`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import numpy as np

from ..images.pictures import png_bytes

BROWSER = Path(__file__).parent / "browser"
SIDE = 112  # screen pixels that a picture is wide, or the nearest whole multiple of its own width
MEDIUM, LARGE = 168, 224
PICKER = (
    '<label class="smalti-picker" tabindex="0"><input type="file"><span>Pick, drop or paste ${what}</span>'
    '<div class="shown"></div><div class="problem" role="alert"></div></label>'
)
PAINTING = (
    '<div class="smalti-painting"><p class="empty">Pick an image, or take a sample, and paint over what is to be drawn '
    'again.</p><canvas></canvas><div class="bar">'
    '<button type="button" data-action="paint" class="on">Paint</button>'
    '<button type="button" data-action="erase">Erase</button>'
    '<label>size <input type="range" min="1" aria-label="size of the brush"></label>'
    '<button type="button" data-action="clear">Clear</button>'
    '<button type="button" data-action="invert">Invert</button>'
    '<button type="button" data-action="save" title="image.png and mask.png">Save</button>'
    "</div></div>"
)


def code(name: str) -> str:
    """A file that the browser runs or reads."""
    return (BROWSER / name).read_text(encoding="utf-8")


def pictures(name: str) -> gr.HTML:
    """A place for pictures; its value is made by `shown`."""
    return gr.HTML(
        "",
        elem_id=name,
        html_template='<div class="smalti-pictures"></div>',
        js_on_load=code("pictures.js"),
        apply_default_css=False,
        elem_classes="smalti-flat",
        min_height=180,
    )


def picker(name: str, most: int, count: int = 1, what: str = "an image", accept: str = "image/*") -> gr.HTML:
    """A place where a visitor picks up to `count` files of at most `most` bytes together."""
    return gr.HTML(
        "",
        elem_id=name,
        html_template=PICKER,
        js_on_load=code("picker.js"),
        apply_default_css=False,
        elem_classes="smalti-flat",
        most=most,
        count=count,
        what=what,
        accept=accept,
    )


def painting(name: str, width: int, height: int) -> gr.HTML:
    """A picture of this many pixels with a mask that is painted over it; its value is made by `canvas`."""
    return gr.HTML(
        "",
        elem_id=name,
        html_template=PAINTING,
        js_on_load=code("painting.js"),
        apply_default_css=False,
        elem_classes="smalti-flat",
        width=width,
        height=height,
    )


def data_url(pixels: np.ndarray) -> str:
    """uint8 (H, W, C) as a picture in a text."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(pixels)).decode()


def shown(images: Sequence[np.ndarray], captions: Sequence[str], side: int = SIDE, chosen: int | None = None) -> str:
    """The value of `pictures`: each uint8 (H, W, C); chosen: which is marked, where a visitor may choose one."""
    parts = [{"src": data_url(image), "caption": caption} for image, caption in zip(images, captions, strict=True)]
    return json.dumps({"pictures": parts, "side": side, "chosen": chosen})


def canvas(pixels: np.ndarray) -> str:
    """The value of `painting`: a picture uint8 (H, W, C), with nothing painted."""
    return json.dumps({"picture": data_url(pixels), "mask": "0" * pixels[..., 0].size})


TAKE_CHOSEN = """(gallery) => {
  const value = gallery ? JSON.parse(gallery) : { pictures: [] };
  const picture = value.pictures[value.chosen || 0];
  return picture ? JSON.stringify({ files: [picture.src] }) : "";
}"""
"""Makes of a gallery's value the value of a picker that has its chosen picture; in the browser."""

TAKE_ALL = """(gallery) => {
  const value = gallery ? JSON.parse(gallery) : { pictures: [] };
  return value.pictures.length ? JSON.stringify({ files: value.pictures.map((picture) => picture.src) }) : "";
}"""
"""The same with all of them."""
