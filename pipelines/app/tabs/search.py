"""The training images nearest to an image."""

from __future__ import annotations

from typing import Any

import gradio as gr
import torch
from torch import Tensor

from ...images.dataset import ImageDataset
from ...representation import embed, nearest_neighbours
from ...shuffling import random_rows
from ..elements import pictures, shown
from ..jobs import Job
from ..served import Served, as_floats, as_pixels
from ..uploads import images_of, whole
from ..widgets import image_picker, on_click, run_buttons

AT_A_TIME = 64
MOST_FOUND = 24


class Index:
    """Vectors of the training images, made when they are first needed."""

    def __init__(self, served: Served, train: ImageDataset) -> None:
        self.served, self.train = served, train
        self.rows = random_rows(len(train), served.num_index or len(train), 0)
        self.parts: list[Tensor] = []

    def vectors(self, job: Job) -> Tensor:
        """`(n, dim)`; those that are made stay if the job is stopped."""
        for part in self.rows.split(AT_A_TIME)[len(self.parts) :]:
            job.step(AT_A_TIME * len(self.parts), len(self.rows), "training images")
            self.parts.append(embed(self.served.pipeline, self.train.pixels(part), batch_size=AT_A_TIME))
        return torch.cat(self.parts)

    def named(self, row: int) -> str:
        """The class of a training image, if it has one, and what it is called in the source."""
        labels, (name,) = self.train.labels, self.train.names([row])
        return name if labels is None else f"{self.train.class_names[int(labels[row])]}, {name}"


def build(served: Served, gallery: gr.HTML, train: ImageDataset) -> None:
    """The tab."""
    index = Index(served, train)
    most = min(MOST_FOUND, len(index.rows))
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = image_picker(served, "search-image", gallery)
            number = gr.Slider(1, most, value=min(9, most), step=1, label="Neighbours")
            button, stop = run_buttons("Search")
        with gr.Column(scale=2, min_width=300):
            found = pictures("found")
            gr.Markdown(
                f"The nearest of {len(index.rows):,} training images, by what the middle of the prior sees in them."
            )

    def work(job: Job, value: Any, number: Any) -> str:
        batch = as_floats(images_of(value, served.shape, served.bounds.max_upload))
        count = whole(number, "the number of neighbours", 1, most)
        vectors = index.vectors(job)
        near, distances = nearest_neighbours(vectors, embed(served.pipeline, batch), count)
        rows = index.rows[near[0].cpu()]
        pixels = [*as_pixels(batch), *as_pixels(as_floats(train.pixels(rows)))]
        named = [
            f"{index.named(row)}, {distance:.3f} away"
            for row, distance in zip(rows.tolist(), distances[0].tolist(), strict=True)
        ]
        return shown(pixels, ["what is searched for", *named])

    on_click(served, button, stop, work, [image, number], [found], "search")
