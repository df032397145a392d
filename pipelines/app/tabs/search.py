"""The Search tab: the training images nearest to an image."""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from ...images.dataset import ImageDataset
from ...representation import embed, nearest_neighbours
from ...shuffling import random_rows
from ..parts import SampleGallery, make_gallery, make_image_picker, make_run_buttons, on_click
from ..served import Picked, ReportStep, Served, picked_image, to_gallery

AT_A_TIME = 64
MOST_FOUND = 24


class SearchIndex:
    """Embeddings of the training images, computed on first use."""

    def __init__(self, served: Served, train: ImageDataset) -> None:
        self.served, self.train = served, train
        self.rows = random_rows(len(train), served.num_index or len(train), 0)
        self.parts: list[Tensor] = []

    def vectors(self, step: ReportStep) -> Tensor:
        """Return the embeddings `(n, dim)`; if the visitor stops, the next search continues from there."""
        for part in self.rows.split(AT_A_TIME)[len(self.parts) :]:
            step(AT_A_TIME * len(self.parts), len(self.rows), "training images")
            self.parts.append(embed(self.served.pipeline, self.train.pixels(part), batch_size=AT_A_TIME))
        return torch.cat(self.parts)

    def caption(self, row: int) -> str:
        """Return the class of a training image, if any, and its name in the source."""
        labels, (name,) = self.train.labels, self.train.names([row])
        return name if labels is None else f"{self.train.class_names[int(labels[row])]}, {name}"


def build_search_tab(served: Served, samples: SampleGallery, train: ImageDataset) -> None:
    index = SearchIndex(served, train)
    most = min(MOST_FOUND, len(index.rows))
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image, _ = make_image_picker(served, "search-image", samples)
            number = gr.Slider(1, most, value=min(9, most), step=1, label="Neighbours")
            buttons = make_run_buttons("Search")
        with gr.Column(scale=2, min_width=300):
            found = make_gallery("found")
            gr.Markdown(
                f"The nearest of {len(index.rows):,} training {served.spec.noun}s, by features of the prior's middle "
                "layer."
            )

    on_click(served, buttons, partial(find_neighbours, index), [image, number], [found])


def find_neighbours(index: SearchIndex, served: Served, step: ReportStep, picked: Picked, number: Any) -> Any:
    """Return the image and its neighbours with captions."""
    batch = picked_image(picked, served.spec)
    near, distances = nearest_neighbours(index.vectors(step), embed(served.pipeline, batch), int(number))
    rows = index.rows[near[0].cpu()]
    captions = [
        f"{index.caption(row)}, distance {distance:.3f}"
        for row, distance in zip(rows.tolist(), distances[0].tolist(), strict=True)
    ]
    pixels = torch.cat([batch, index.train.pixels(rows)])
    return list(zip(map(to_gallery, pixels), ["query", *captions], strict=True))
