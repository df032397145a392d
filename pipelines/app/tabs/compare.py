"""An image beside what the tokenizer keeps of it, its tokens, and how surprising each part of it is."""

from __future__ import annotations

import math
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ...commands.detect import colored
from ...images import to_uint8
from ..controls import classes_widget, labels_for, written
from ..parts import Samples, code_widget, image_picker, on_click, pictures
from ..served import Picked, Served, Step, as_picture, picked_image


def build(served: Served, samples: Samples) -> None:
    """The tab."""
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image, _ = image_picker(served, "compare-image", samples)
            label = classes_widget(served.pipeline, several=False)
            button = gr.Button("Compare", variant="primary")
        with gr.Column(scale=2, min_width=300):
            compared = pictures("compared", "medium")
            facts = gr.Markdown(elem_id="compare-facts")
            line = code_widget(served)

    on_click(served, [button], compare, [image, label], [compared, facts, line])


def compare(served: Served, step: Step, picked: Picked, label: Any) -> Any:
    """The pictures with captions, figures in Markdown, and the lines of Python."""
    pipeline, batch = served.pipeline, picked_image(picked, served.shape)
    labels = labels_for(pipeline, label, 1)
    tokens = pipeline.encode(batch)
    (again,) = pipeline.decode(tokens)
    colors = color_tokens(tokens[0], pipeline.prior.grid.vocab_size)
    images = [
        (as_picture(batch[0]), "the image"),
        (again, "its reconstruction"),
        (as_picture(colors), f"its {tokens[0].numel()} tokens, a colour for each id"),
        *surprise_of(served, batch, labels),
    ]
    others = written({"labels": labels})
    lines = [
        "from PIL import Image",
        'image = Image.open("image.png")',
        "pipe.reconstruct(image)",
        f"pipe.log_prob(image{others})  # nats",
    ]
    return images, figures(served, batch, again, labels), served.code(*lines)


def color_tokens(tokens: Tensor, vocab_size: int) -> Tensor:
    """The ids `(*grid.shape)` of an image as a picture, uint8 `(3, H, W)`, with a random colour for each id: levels and
    scales lie below each other, and a row of tokens is folded."""
    palette = torch.randint(256, (3, vocab_size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tokens = tokens.cpu()
    if tokens.ndim > 1:
        return palette[:, tokens.flatten(0, -2)]
    width = math.ceil(math.sqrt(len(tokens)))
    rest = -len(tokens) % width
    return functional.pad(palette[:, tokens], (0, rest)).view(3, -1, width)


def surprise_of(served: Served, batch: Tensor, labels: Any) -> list[tuple[Image.Image, str]]:
    """The map of an image's bits with its caption; none where tokens have no place in the image."""
    tokenizer = served.pipeline.tokenizer
    if not tokenizer.placed or tokenizer.grid.scales:
        return []
    bits = served.pipeline.anomaly_map(batch, labels).cpu()
    low, high = min(0.0, float(bits.min())), float(bits.max())
    (picture,) = to_uint8(colored((bits - low) / max(high - low, 1e-6)))
    return [(as_picture(picture), f"bits of each pixel: black {low:.2g}, white {high:.2g}")]


def figures(served: Served, batch: Tensor, again: Image.Image, labels: Any) -> str:
    """Figures of an image in Markdown."""
    pipeline = served.pipeline
    count = len(pipeline.prior.grid)
    bits = -float(pipeline.log_prob(batch, labels)) / math.log(2)
    about = "" if pipeline.prior.exact else " (an estimate of a bound)"
    error = np.asarray(as_picture(batch[0]), np.float64) - np.asarray(again, np.float64)
    psnr = 10 * math.log10(255**2 / np.square(error).mean()) if error.any() else math.inf
    lines = [
        f"- bits of the tokens: **{bits:.1f}, {bits / count:.2f} a token{about}**",
        f"- reconstruction: **PSNR {psnr:.1f} dB**",
    ]
    if pipeline.tokenizer.has_likelihood:
        lines.append(f"- bits per dim, pixels included: **{float(pipeline.bits_per_dim(batch, labels)):.3f}**")
    return "\n".join(lines)
