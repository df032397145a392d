"""Widgets for the columns of a condition, and the condition from their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from PIL import Image

from prior.conditions import LABEL, ClassColumn, Column, FlagsColumn, GridColumn, NumberColumn, VectorColumn

from ..condition_values import takes_text
from ..image_pipeline import ImagePipeline
from .parts import make_picker, pick_last
from .served import Served, as_picture, picked_image

MAX_TEXT = 1000  # characters


def make_condition_fields(served: Served, tab: str) -> list[Any]:
    """Make a choice of the columns that are given, and fields for each, which appear when it is chosen; none for a
    pipeline without columns. tab: prefix of the names of pictures."""
    columns = list_columns(served.pipeline)
    if others := [name for name in served.pipeline.conditions if name not in columns]:
        gr.Markdown(f"There is no field for {', '.join(others)}: values like these are computed elsewhere.")
    if not columns:
        return []
    about = "what the image is conditioned on; the rest is left open"
    given = gr.CheckboxGroup(list(columns), value=[], label="Conditions", info=about)
    fields = {name: make_fields(served, tab, name, column) for name, column in columns.items()}

    def show(names: list[str]) -> list[Any]:
        return [gr.update(visible=name in names) for name, own in fields.items() for _ in own]

    every = [field for own in fields.values() for field in own]
    given.change(show, given, every, queue=False)
    return [given, *every]


def make_guidance_menu(pipeline: ImagePipeline) -> list[Any]:
    """Make a choice of the columns that guidance applies to; none for a pipeline without columns."""
    if not pipeline.conditions:
        return []
    names = [*[LABEL] * bool(pipeline.prior.num_classes), *pipeline.conditions]
    own = list(pipeline.sampler.guidance_on or ())
    return [gr.CheckboxGroup(names, value=own, label="Guidance on", info="what guidance scale applies to; none: all")]


def list_columns(pipeline: ImagePipeline) -> dict[str, Column]:
    """Return the columns that have a field."""
    return {
        name: column
        for name, column in pipeline.conditions.items()
        if name in pipeline.condition_tokenizers
        or takes_text(column)
        or not isinstance(column, (GridColumn, VectorColumn))
    }


def make_fields(served: Served, tab: str, name: str, column: Column) -> list[Any]:
    """Make the invisible fields of a column."""
    if isinstance(column, ClassColumn):
        choices: Any = [*zip(column.names, range(len(column.names)), strict=True)]
        return [gr.Dropdown(choices, value=0, label=name, visible=False)]
    if isinstance(column, FlagsColumn):
        return [gr.CheckboxGroup(column.names, value=[], label=name, visible=False)]
    if isinstance(column, NumberColumn):
        several = len(column.mean) > 1
        return [
            make_number(low, high, mean, f"{name} {k}" if several else name)
            for k, (low, high, mean) in enumerate(zip(column.low, column.high, column.mean, strict=True), 1)
        ]
    if isinstance(column, GridColumn):
        picture = make_picker(served, f"{tab}-{name}", name, visible=False)
        picture.upload(pick_last, picture, picture, queue=False)
        return [picture]
    return [gr.Textbox("", label=name, max_length=MAX_TEXT, visible=False)]


def make_number(low: float, high: float, mean: float, label: str) -> gr.Slider:
    """Make a slider over the range of the training images, which starts at their mean."""
    high = max(high, low + 1e-6)
    start = min(max(float(f"{mean:.3g}"), low), high)
    return gr.Slider(low, high, value=start, label=label, visible=False)


def read_fields(pipeline: ImagePipeline, values: Sequence[Any]) -> dict[str, Any]:
    """Return the condition from the values of `make_condition_fields`. Raises `ValueError` for a missing or broken
    picture."""
    given, *rest = values or [[]]
    found = {}
    for name, column in list_columns(pipeline).items():
        size = len(column.mean) if isinstance(column, NumberColumn) else 1
        own, rest = rest[:size], rest[size:]
        if name in given:
            found[name] = read_field(pipeline, name, column, own)
    return found


def read_field(pipeline: ImagePipeline, name: str, column: Column, values: Sequence[Any]) -> Any:
    """Return the value of a column from its fields."""
    if isinstance(column, ClassColumn):
        return column.names[values[0]]
    if isinstance(column, GridColumn):
        try:
            return as_picture(picked_image(values[0], pipeline.condition_tokenizers[name].image_shape)[0])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return list(values) if len(values) > 1 else values[0]


def format_condition(condition: dict[str, Any]) -> str:
    """Format a condition as Python source, in which pictures are files."""
    values = {
        name: f'Image.open("{name}.png")' if isinstance(value, Image.Image) else repr(value)
        for name, value in condition.items()
    }
    return "{" + ", ".join(f"{name!r}: {value}" for name, value in values.items()) + "}"


def import_pictures(arguments: dict[str, Any]) -> list[str]:
    """Return the line of Python that the pictures of a condition need, if any."""
    pictures = any(isinstance(value, Image.Image) for value in arguments.get("condition", {}).values())
    return ["from PIL import Image"] * pictures
