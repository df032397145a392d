"""Paint over a part of an image, and draw it again."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..controls import chosen_settings, classes_widget, labels_code, labels_for, settings_of
from ..elements import LARGE, canvas, painting, pictures, shown
from ..jobs import Job
from ..served import Served, as_floats, as_pixels, drawn, keywords
from ..uploads import images_of, painted, whole
from ..widgets import LAST_SEED, code_widget, image_picker, on_click, run_buttons, seed_widget

MOST_DRAWS = 16


def build(served: Served, gallery: gr.HTML) -> None:
    """The tab."""
    pipeline, (_, height, width) = served.pipeline, served.shape
    settings = settings_of(pipeline, served.described)
    most = min(MOST_DRAWS, served.bounds.max_images)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image = image_picker(served, "complete-image", gallery)
            canvas_ = painting("painting", width, height)
        with gr.Column(scale=1, min_width=300):
            label = classes_widget(pipeline, several=False) or gr.State(None)
            draws = gr.Slider(1, most, value=min(4, most), step=1, label="Draws")
            seed = seed_widget()
            button, stop = run_buttons("Complete")
            with gr.Accordion("Settings", open=False):
                widgets = [setting.widget(len(pipeline.prior.grid)) for setting in settings]
            completed = pictures("completed")
            line = code_widget(served)

    def load(job: Job, value: Any) -> str:
        if not value:
            return ""
        return canvas(as_pixels(as_floats(images_of(value, served.shape, served.bounds.max_upload)))[0])

    def work(job: Job, value: Any, label: Any, draws: Any, seed: Any, *values: Any) -> Any:
        pixels, known = painted(value, served.shape, served.bounds.max_upload)
        count, first = whole(draws, "draws", 1, most), whole(seed, "seed", 0, LAST_SEED)
        labels = labels_for(pipeline, label, 1)
        options = chosen_settings(settings, values, pipeline.prior.grid.vocab_size)
        out = drawn(
            job,
            pipeline.complete,
            as_floats(pixels),
            known,
            labels,
            draws=count,
            seed=first,
            output_type="pt",
            **options,
        )
        found = as_pixels(out.images.reshape(-1, *served.shape))
        options_code = f"{labels_code(pipeline, labels)}{keywords(options)}"
        lines = [
            "from PIL import Image",
            "# Save, below the painting, writes both; white is drawn again",
            'image, mask = Image.open("image.png"), Image.open("mask.png")',
            f"out = pipe.complete(image, mask=mask, seed={first}, draws={count}{options_code})",
        ]
        return shown(found, [f"draw {k + 1}" for k in range(len(found))], side=LARGE), served.code(*lines)

    on_click(served, button, stop, work, [canvas_, label, draws, seed, *widgets], [completed, line], "complete")
    image.change(
        served.jobs.handler(load), image, canvas_, concurrency_id="model", concurrency_limit=1, api_visibility="private"
    )
