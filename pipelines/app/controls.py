"""Widgets for sampling settings and conditions, and the arguments of a call from their values. Gradio also checks
ranges and choices of sliders and dropdowns on the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr
import numpy as np

from prior import Prior
from prior.columns import LABEL
from prior.orders import CURVES, order_problem

from ..columns import ColumnFormat, formats_of
from ..image_pipeline import ImagePipeline
from ..options import Sampling
from .parts import make_condition_picker
from .served import Served, picked_image

UNCONDITIONAL = -1  # the class id that means "no class"
MAX_SEED = 2**32 - 1


def get_slider_values(pipeline: ImagePipeline) -> dict[str, float]:
    """Return the slider value of each sampling setting of the pipeline; guidance only if there is a condition."""
    off, own = {"top_k": pipeline.prior.grid.vocab_size, "top_p": 1.0, "steps": 0}, vars(pipeline.sampler)
    names = ["temperature", "top_k", "top_p", *["guidance_scale"] * bool(pipeline.columns), "steps"]
    return {name: off[name] if own[name] is None else own[name] for name in names if name in own}


def make_sliders(pipeline: ImagePipeline) -> list[Any]:
    """Make a slider for each of `get_slider_values`, and with columns other than the class, a choice for guidance."""
    ranges = {
        "temperature": (0, 2, 0.05),
        "top_k": (1, pipeline.prior.grid.vocab_size, 1),
        "top_p": (0.05, 1, 0.05),
        "guidance_scale": (0, 8, 0.1),
        "steps": (0, len(pipeline.prior.grid), 1),
    }
    sliders: list[Any] = []
    with gr.Accordion("Settings", open=False):
        for name, value in get_slider_values(pipeline).items():
            low, high, step = ranges[name]
            about = "number of passes; 0: one per token" if name == "steps" else Sampling.model_fields[name].description
            if name == "guidance_scale" and list_others(pipeline):
                about = "above 1 follows the class and the conditions more closely"
            title = name.replace("_", " ").capitalize()
            sliders.append(gr.Slider(low, max(high, value), step=step, value=value, label=title, info=about))
        if list_others(pipeline):
            own, about = list(pipeline.sampler.guidance_on or ()), "what guidance scale applies to; none: all"
            sliders.append(gr.CheckboxGroup([*pipeline.columns], value=own, label="Guidance on", info=about))
        return sliders


def make_condition_fields(served: Served, tab: str) -> list[Any]:
    every = list_others(served.pipeline)
    columns = {name: column for name, column in every.items() if column.field_count}
    if others := [name for name in every if name not in columns]:
        gr.Markdown(f"There is no field for {', '.join(others)}: values like these are computed elsewhere.")
    if not columns:
        return []
    about = "what the image is conditioned on; the rest is left open"
    given = gr.CheckboxGroup(list(columns), value=[], label="Conditions", info=about)
    fields = {name: column.make_fields(partial(make_condition_picker, served, tab)) for name, column in columns.items()}

    def show(names: list[str]) -> list[Any]:
        return [gr.update(visible=name in names) for name, own in fields.items() for _ in own]

    flat = [field for own in fields.values() for field in own]
    given.change(show, given, flat, queue=False)
    return [given, *flat]


def list_others(pipeline: ImagePipeline) -> dict[str, ColumnFormat[Any]]:
    """Return the columns other than the class, which has a menu of its own."""
    columns = {name: column for name, column in pipeline.columns.items() if name != LABEL}
    return formats_of(columns, pipeline.condition_tokenizers)


def sampling_arguments(
    pipeline: ImagePipeline, classes: Any, count: int, seed: float | None, *values: Any
) -> dict[str, Any]:
    """Return the arguments to sample `count` images. values: of `make_sliders`, then of `make_condition_fields`."""
    # Checked here rather than by gr.Number, whose error does not name the field and prints a traceback on the server.
    seed = seed or 0
    if not 0 <= seed <= MAX_SEED or seed != int(seed):
        raise ValueError(f"seed: expected a whole number from 0 to {MAX_SEED} (got {seed:g})")
    own = get_slider_values(pipeline)
    sliders, others = values[: len(own)], values[len(own) :]
    chosen: dict[str, Any] = {name: value for name, value in zip(own, sliders, strict=True) if value != own[name]}
    for name in {"top_k", "steps"} & set(chosen):
        chosen[name] = int(chosen[name]) or None
    if others and (guided := others[0]) != list(pipeline.sampler.guidance_on or ()):
        chosen["guidance_on"] = guided or None
    return {"seed": int(seed), **condition_arguments(pipeline, classes, others[1:], count), **chosen}


def condition_arguments(pipeline: ImagePipeline, classes: Any, fields: Sequence[Any], count: int = 1) -> dict[str, Any]:
    """Return the labels and the condition as arguments. fields: of `make_condition_fields`."""
    chosen, *rest = fields or [[]]
    condition = dict[str, Any]()
    for name, column in list_others(pipeline).items():
        own, rest = rest[: column.field_count], rest[column.field_count :]
        if name in chosen:
            condition[name] = column.read_fields(own, picked_image)
    return {"labels": cycle_labels(pipeline, classes, count), **({"condition": condition} if condition else {})}


def format_arguments(arguments: Mapping[str, Any]) -> str:
    """Format arguments as Python source, each after a comma."""
    text = ""
    for name, value in arguments.items():
        if name == "labels" and value is not None and len(set(value)) == 1:
            value = value[0]
        if name != "labels" or value is not None:
            text += f", {name}={repr(value) if name != 'condition' else '{' + format_values(value) + '}'}"
    return text


def format_values(condition: dict[str, Any]) -> str:
    """Format the values of a condition as Python source, in which pixels (..., H, W, C) are files."""
    return ", ".join(
        f"{name!r}: {format_open(name, v.shape[:-3], v.shape[-1]) if isinstance(v, np.ndarray) else repr(v)}"
        for name, v in condition.items()
    )


def format_open(name: str, frames: tuple[int, ...], channels: int) -> str:
    """Return Python code that opens a picture, or a clip of (T,) frames, as a pipeline takes it."""
    opened, mode = f'Image.open("{name}.png")', "L" if channels == 1 else "RGB"
    for count in frames:
        opened = f'np.stack([frame.convert("{mode}") for frame in ImageSequence.Iterator({opened})][:{count}])'
    return opened


def make_class_menu(pipeline: ImagePipeline, several: bool) -> gr.Dropdown | gr.State:
    """Make a menu of classes, or an empty state for an unconditional prior. several: allow several classes."""
    if not pipeline.prior.num_classes:
        return gr.State(None)
    names = pipeline.labels or map(str, range(pipeline.prior.num_classes))
    choices: Any = [*((name, number) for number, name in enumerate(names)), ("(no class)", UNCONDITIONAL)]
    if several:
        about = "images cycle through these classes, or through all classes if empty"
        return gr.Dropdown(choices, value=[], multiselect=True, label="Classes", info=about)
    return gr.Dropdown(choices, value=UNCONDITIONAL, label="Class", info="the class to assume")


def cycle_labels(pipeline: ImagePipeline, chosen: Any, count: int) -> list[int | str | None] | None:
    """Return classes for `count` images, by name if they have names, cycling through those chosen or all."""
    total = pipeline.prior.num_classes
    if not total:
        return None
    names = [*(pipeline.labels or range(total)), None]  # the last is UNCONDITIONAL, -1
    ids = (chosen if isinstance(chosen, list) else [chosen]) or range(total)
    labels = [names[ids[k % len(ids)]] for k in range(count)]
    return None if all(label is None for label in labels) else labels


def make_order_menu(prior: Prior) -> gr.Dropdown | gr.State:
    """Make a menu of orders if the prior supports any order. Other orders can be typed."""
    if not prior.any_order:
        return gr.State("")
    names, about = ["raster", *CURVES, "random:0", "halton", "spread"], "order in which tokens are generated"
    if prior.config.takes_blocks:
        names += ["diagonal", "rows", "dyadic", "regions:4"]
        about += "; raster/7: 7 tokens per pass, halton:8: 8 passes (faster, but lower quality)"
    fitting = [(name, name) for name in names if order_problem(name, prior.config.positions.shape) is None]
    choices: Any = [(f"default ({prior.config.order})", ""), *fitting]
    return gr.Dropdown(choices, value="", label="Order", info=about, allow_custom_value=True)


def make_seed_field() -> gr.Number:
    seed = gr.Number(0, label="Seed", info="the same seed gives the same images; image k uses seed + k")
    random = gr.Button("Random seed", size="sm")
    random.click(None, None, seed, js="() => Math.floor(Math.random() * 1e6)", queue=False)
    return seed
