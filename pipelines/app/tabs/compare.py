"""The Compare tab: an image, its reconstruction, its tokens, and how surprising each part is."""

from __future__ import annotations

import math
from typing import Any

import gradio as gr
import torch
from torch import Tensor
from torch.nn import functional

from tokenizer.spec import to_uint8

from ...anomaly.sheets import apply_colormap
from ..controls import condition_arguments, format_arguments, format_open, make_class_menu, make_condition_fields
from ..parts import SampleGallery, make_code_field, make_gallery, make_image_picker, on_click
from ..served import Picked, ReportStep, Served, picked_image, to_gallery


def build_compare_tab(served: Served, samples: SampleGallery) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image, _ = make_image_picker(served, "compare-image", samples)
            label = make_class_menu(served.pipeline, several=False)
            fields = make_condition_fields(served, "compare")
            button = gr.Button("Compare", variant="primary")
        with gr.Column(scale=2, min_width=300):
            compared = make_gallery("compared", "medium")
            facts = gr.Markdown(elem_id="compare-facts")
            line = make_code_field(served)

    on_click(served, [button], compare_image, [image, label, *fields], [compared, facts, line])


def compare_image(served: Served, step: ReportStep, picked: Picked, label: Any, *fields: Any) -> Any:
    """Return pictures with captions, figures in Markdown, and Python code."""
    pipeline, batch = served.pipeline, picked_image(picked, served.spec)
    given = condition_arguments(pipeline, label, fields)
    tokens = pipeline.encode(batch)
    again = to_uint8(pipeline.decode(tokens, output_type="pt").cpu())
    lead = served.spec.shape[:-3]
    frames = [color_tokens(ids, pipeline.prior.grid.vocab_size) for ids in tokens.flatten(0, len(lead))]
    images = [
        (to_gallery(batch[0]), served.spec.noun),
        (to_gallery(again[0]), "reconstruction"),
        (
            to_gallery(torch.stack(frames).unflatten(0, (1, *lead))[0]),
            f"its {tokens.numel()} tokens, one colour per id",
        ),
        *draw_surprise(served, batch, **given),
    ]
    others = format_arguments(given)
    lines = [
        f"image = {format_open('image', lead, served.spec.channels)}",
        "pipe.reconstruct(image)",
        f"pipe.log_prob(image{others})  # nats",
    ]
    return images, format_figures(served, batch, again, given), served.code(*lines)


def color_tokens(tokens: Tensor, vocab_size: int) -> Tensor:
    """Draw the ids of an image, or a frame, uint8 `(3, H, W)`, in a random colour per id. Levels and scales are
    stacked vertically, and a sequence of tokens is folded into a square."""
    palette = torch.randint(256, (3, vocab_size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tokens = tokens.cpu()
    if tokens.ndim > 1:
        return palette[:, tokens.flatten(0, -2)]
    width = math.ceil(math.sqrt(len(tokens)))
    return functional.pad(palette[:, tokens], (0, -len(tokens) % width)).view(3, -1, width)


def draw_surprise(served: Served, batch: Tensor, **given: Any) -> list[tuple[Any, str]]:
    """Draw the bits per pixel, with a caption; empty if tokens have no position in the image."""
    tokenizer = served.pipeline.tokenizer
    if not tokenizer.placed or tokenizer.grid.scales:
        return []
    bits = served.pipeline.anomaly_map(batch, **given).cpu()
    low, high = min(0.0, float(bits.min())), float(bits.max())
    (picture,) = to_uint8(apply_colormap((bits - low) / max(high - low, 1e-6)))
    return [(to_gallery(picture), f"surprise: {low:.2g} (black) to {high:.2g} (white) bits per pixel")]


def format_figures(served: Served, batch: Tensor, again: Tensor, given: dict[str, Any]) -> str:
    """Format the figures of an image and its reconstruction, uint8 `(1, *spec.shape)`, in Markdown."""
    pipeline, count = served.pipeline, len(served.pipeline.prior.grid)
    bits = -float(pipeline.log_prob(batch, **given)) / math.log(2)
    about = "" if pipeline.prior.exact else " (estimated bound)"
    error = (batch.double() - again).square().mean()
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    lines = [
        f"- code length of the tokens: **{bits:.1f} bits, {bits / count:.2f} per token{about}**",
        f"- reconstruction: **PSNR {psnr:.1f} dB**",
    ]
    if pipeline.tokenizer.has_likelihood:
        lines.append(f"- bits per dim, including pixels: **{float(pipeline.bits_per_dim(batch, **given)):.3f}**")
    return "\n".join(lines)
