"""An image beside what the tokenizer keeps of it, its tokens, and how surprising each part of it is."""

from __future__ import annotations

import math
from typing import Any

import gradio as gr
from torch import Tensor

from ...anomaly.healing import anomaly_map
from ..colours import heat, token_picture
from ..controls import classes_widget, labels_code, labels_for
from ..elements import MEDIUM, pictures, shown
from ..jobs import Job
from ..served import Served, as_floats, as_pixels
from ..uploads import images_of
from ..widgets import code_widget, image_picker, on_click, run_buttons


def build(served: Served, gallery: gr.HTML) -> None:
    """The tab."""
    pipeline = served.pipeline
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = image_picker(served, "compare-image", gallery)
            label = classes_widget(pipeline, several=False) or gr.State(None)
            button, stop = run_buttons("Compare")
        with gr.Column(scale=2, min_width=300):
            compared = pictures("compared")
            facts = gr.Markdown(elem_id="compare-facts")
            line = code_widget(served)

    def work(job: Job, value: Any, label: Any) -> Any:
        batch = as_floats(images_of(value, served.shape, served.bounds.max_upload))
        labels = labels_for(pipeline, label, 1)
        job.step(0, 3, "steps")
        tokens = pipeline.encode(batch)
        again = pipeline.decode(tokens, output_type="pt").cpu()
        job.step(1, 3, "steps")
        bits = -float(pipeline.log_prob(batch, labels)) / math.log(2)
        job.step(2, 3, "steps")
        panels = [as_pixels(batch)[0], as_pixels(again)[0], token_picture(tokens[0])]
        names = ["the image", "its reconstruction", f"its {tokens[0].numel()} tokens, a colour for each id"]
        if surprise := surprise_of(served, batch, labels):
            panels.append(surprise[0])
            names.append(surprise[1])
        told = table(served, batch, again, bits, labels)
        lines = [
            "from PIL import Image",
            'image = Image.open("image.png")',
            "pipe.reconstruct(image)",
            f"pipe.log_prob(image{labels_code(pipeline, labels)})  # nats",
        ]
        return shown(panels, names, side=MEDIUM), told, served.code(*lines)

    on_click(served, button, stop, work, [image, label], [compared, facts, line], "compare")


def surprise_of(served: Served, batch: Tensor, labels: Any) -> tuple[Any, str] | None:
    """The surprise map of an image, and what it shows; None where tokens have no place in the image."""
    tokenizer = served.pipeline.tokenizer
    if not tokenizer.placed or tokenizer.grid.scales:
        return None
    bits = anomaly_map(served.pipeline, batch, labels)[0].cpu()
    low, high = float(bits.min()), float(bits.max())
    scaled = (bits - min(0.0, low)) / max(high - min(0.0, low), 1e-6)
    return heat(scaled), f"bits of each pixel: black {min(0.0, low):.2g}, white {high:.2g}"


def table(served: Served, batch: Tensor, again: Tensor, bits: float, labels: Any) -> str:
    """Figures of an image in Markdown."""
    pipeline, mean = served.pipeline, float((again - batch).square().mean())
    count = len(pipeline.prior.grid)
    about = "" if pipeline.prior.exact else " (an estimate of a bound)"
    psnr = 10 * math.log10(4 / mean) if mean else math.inf
    rows = [
        ("bits of the tokens", f"{bits:.1f}, {bits / count:.2f} a token{about}"),
        ("reconstruction", f"PSNR {psnr:.1f} dB"),
    ]
    if pipeline.tokenizer.has_likelihood:
        rows.append(("bits per dim, pixels included", f"{float(pipeline.bits_per_dim(batch, labels)):.3f}"))
    return "\n".join(f"- {name}: **{figure}**" for name, figure in rows)
