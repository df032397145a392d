"""The controls of a request, and from their values the arguments of a call. That a value is in its range, or one of the
choices, gradio checks on the server as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from prior import Prior
from prior.orders import CURVES, order_problem

from ..image_pipeline import ImagePipeline
from ..options import Sampling

UNCONDITIONAL = -1
"""The choice of no class, among ids of classes."""
LAST_SEED = 2**32 - 1


def own_settings(pipeline: ImagePipeline) -> dict[str, float]:
    """The pipeline's settings of sampling that have a slider, as it shows them; guidance only where there are
    classes."""
    none = {"top_k": pipeline.prior.grid.vocab_size, "top_p": 1.0, "steps": 0}
    names = ["temperature", "top_k", "top_p", *["guidance_scale"] * bool(pipeline.prior.num_classes), "steps"]
    own = vars(pipeline.sampler)
    return {name: none[name] if own[name] is None else own[name] for name in names if name in own}


def settings_widgets(pipeline: ImagePipeline) -> list[gr.Slider]:
    """A slider for each of these settings, folded away."""
    ranges = {
        "temperature": (0, 2, 0.05),
        "top_k": (1, pipeline.prior.grid.vocab_size, 1),
        "top_p": (0.05, 1, 0.05),
        "guidance_scale": (0, 8, 0.1),
        "steps": (0, len(pipeline.prior.grid), 1),
    }
    sliders = []
    with gr.Accordion("Settings", open=False):
        for name, value in own_settings(pipeline).items():
            low, high, step = ranges[name]
            about = "0: a pass for each token" if name == "steps" else Sampling.model_fields[name].description
            title = name.replace("_", " ").capitalize()
            sliders.append(gr.Slider(low, max(high, value), step=step, value=value, label=title, info=about))
    return sliders


def sampling_arguments(
    pipeline: ImagePipeline, classes: Any, count: int, seed: float | None, values: Sequence[float]
) -> dict[str, Any]:
    """The arguments of a call that draws `count` images: the seed, the classes, and the settings that differ from the
    pipeline's own."""
    own = own_settings(pipeline)
    chosen: dict[str, Any] = {name: value for name, value in zip(own, values, strict=True) if value != own[name]}
    for name in {"top_k", "steps"} & set(chosen):
        chosen[name] = int(chosen[name]) or None
    return {"seed": int(seed or 0), "labels": labels_for(pipeline, classes, count), **chosen}


def written(arguments: Mapping[str, Any]) -> str:
    """Arguments as Python writes them in a call, each after a comma."""
    text = ""
    for name, value in arguments.items():
        if name == "labels" and value is not None and len(set(value)) == 1:
            value = value[0]
        if name != "labels" or value is not None:
            text += f", {name}={value!r}"
    return text


def classes_widget(pipeline: ImagePipeline, several: bool) -> gr.Dropdown | gr.State:
    """A choice of classes, or of one; for a prior without, a state that holds none."""
    if not pipeline.prior.num_classes:
        return gr.State(None)
    names = pipeline.labels or map(str, range(pipeline.prior.num_classes))
    choices: Any = [*((name, number) for number, name in enumerate(names)), ("(no class)", UNCONDITIONAL)]
    if several:
        about = "taken in turn; none chosen: every class in turn"
        return gr.Dropdown(choices, value=[], multiselect=True, label="Classes", info=about)
    return gr.Dropdown(choices, value=UNCONDITIONAL, label="Class", info="the condition of the prior")


def labels_for(pipeline: ImagePipeline, chosen: Any, count: int) -> list[int | str | None] | None:
    """The classes of `count` images, by name where they have names: those chosen, or else every class, in turn."""
    total = pipeline.prior.num_classes
    if not total:
        return None
    names = [*(pipeline.labels or range(total)), None]  # the last is that of UNCONDITIONAL, -1
    ids = (chosen if isinstance(chosen, list) else [chosen]) or range(total)
    labels = [names[ids[k % len(ids)]] for k in range(count)]
    return None if all(label is None for label in labels) else labels


def order_widget(prior: Prior) -> gr.Dropdown | gr.State:
    """A choice of orders, where the prior takes any; a visitor may write others."""
    if not prior.any_order:
        return gr.State("")
    names, about = ["raster", *CURVES, "random:0", "halton", "spread"], "in which the tokens are drawn"
    if prior.config.takes_blocks:
        names += ["diagonal", "rows", "dyadic", "regions:4"]
        about += "; raster/7 draws 7 tokens in a pass, halton:8 all in 8 passes: quicker, and costs likelihood"
    fitting = [(name, name) for name in names if order_problem(name, prior.config.positions.shape) is None]
    choices: Any = [(f"its own ({prior.config.order})", ""), *fitting]
    return gr.Dropdown(choices, value="", label="Order", info=about, allow_custom_value=True)


def seed_widget() -> gr.Number:
    """A number that makes the same images again."""
    seed = gr.Number(0, precision=0, minimum=0, maximum=LAST_SEED, label="Seed", info="image k uses seed + k")
    other = gr.Button("Another seed", size="sm")
    other.click(None, None, seed, js="() => Math.floor(Math.random() * 1e6)", queue=False)
    return seed
