"""The controls of a request, from what a prior declares: the settings of its `Sampling`, its classes, and the orders
that it takes; and from their values the arguments of a call."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from prior import Prior
from prior.masked import SCHEDULES
from prior.orders import CURVES, make_partition, order_problem
from prior.sampling import GUIDANCE

from ..image_pipeline import ImagePipeline
from ..options import Sampling

UNCONDITIONAL = -1
"""The choice of no class, among ids of classes."""
SLIDERS = {"temperature": (0.0, 2.0, 0.05), "guidance_scale": (0.0, 8.0, 0.1), "top_p": (0.05, 1.0, 0.05)}
"""The useful range of some settings, and the step between their values."""
LAST_SEED = 2**32 - 1


# Settings of sampling


@dataclass(frozen=True)
class Setting:
    """A setting that the prior declares. own: the pipeline's value of it."""

    name: str
    own: Any
    whole: bool

    @property
    def title(self) -> str:
        """What the page calls it."""
        return self.name.replace("_", " ").capitalize()

    def widget(self, tokens: int) -> gr.components.Component:
        """Its control; tokens: how many an image has, and passes there may be."""
        field = Sampling.model_fields.get(self.name)
        about = "" if field is None else (field.description or "").split("; default")[0]
        shared: dict[str, Any] = {"label": self.title, "info": about, "value": self.own}
        if self.name == "schedule":
            return gr.Dropdown(list(SCHEDULES), **shared)
        if self.name == "steps":
            shared |= {"value": self.own or 0, "info": "0: a pass for each token"}
            return gr.Slider(0, tokens, step=1, **shared)
        if self.name in SLIDERS:
            low, high, step = SLIDERS[self.name]
            shared["value"] = 1.0 if self.own is None else self.own
            return gr.Slider(low, max(high, shared["value"]), step=step, **shared)
        shared["value"] = "" if self.own is None else f"{self.own:g}"
        return gr.Textbox(placeholder="none", max_length=20, **shared)  # gr.Number shows 0 for no value

    def read(self, value: Any) -> Any:
        """What a visitor has set. Raises `ValueError` for what is no number."""
        if self.name == "schedule":
            return value
        if value in (None, "") or (self.name, value) in (("top_p", 1), ("steps", 0)):
            return None
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.title} should be a number (got {str(value)[:40]!r})") from error
        return int(number) if self.whole and number.is_integer() else number


def settings_of(pipeline: ImagePipeline) -> list[Setting]:
    """The settings that the prior declares; those of guidance only where there are classes to guide towards."""
    sampler, found = pipeline.sampler, []
    hints = typing.get_type_hints(type(sampler))
    for name in type(sampler).names():
        if pipeline.prior.num_classes or name not in GUIDANCE:
            whole = int in (hints[name], *typing.get_args(hints[name]))
            found.append(Setting(name, getattr(sampler, name), whole))
    return found


def settings_widgets(pipeline: ImagePipeline) -> list[gr.components.Component]:
    """The controls of all settings, folded away."""
    with gr.Accordion("Settings", open=False):
        return [setting.widget(len(pipeline.prior.grid)) for setting in settings_of(pipeline)]


def chosen_settings(pipeline: ImagePipeline, values: Sequence[Any]) -> dict[str, Any]:
    """The settings of a call: those that differ from the pipeline's own, and of guidance all, which is one choice. A
    filter that is cleared, though the pipeline has one, keeps everything. Raises `ValueError`."""
    settings = settings_of(pipeline)
    everything = {"top_k": pipeline.prior.grid.vocab_size, "top_p": 1.0}
    given = {setting.name: setting.read(value) for setting, value in zip(settings, values, strict=True)}
    changed = {setting.name for setting in settings if given[setting.name] != setting.own}
    if changed & set(GUIDANCE):
        changed = changed - set(GUIDANCE) | {name for name in GUIDANCE if given[name] is not None}
    found = {name: value for name, value in given.items() if name in changed}
    for name, value in found.items():
        if value is None and name != "steps":
            if name not in everything:
                raise ValueError(f"{name.replace('_', ' ')} needs a value")
            found[name] = everything[name]
    return found


def sampling_arguments(
    pipeline: ImagePipeline, classes: Any, count: int, seed: Any, values: Sequence[Any]
) -> dict[str, Any]:
    """The arguments of a call that draws `count` images, from the values of the controls. Raises `ValueError`."""
    found = {"seed": whole(seed, "seed", 0, LAST_SEED), "labels": labels_for(pipeline, classes, count)}
    return {**found, **chosen_settings(pipeline, values)}


def written(pipeline: ImagePipeline, arguments: Mapping[str, Any]) -> str:
    """Arguments as Python writes them in a call, each after a comma."""
    others = "".join(f", {name}={value!r}" for name, value in arguments.items() if name != "labels")
    return others + labels_code(pipeline, arguments["labels"])


# Classes


def class_names(pipeline: ImagePipeline) -> list[str]:
    """The names of the classes, or their numbers."""
    return pipeline.labels or [str(number) for number in range(pipeline.prior.num_classes)]


def classes_widget(pipeline: ImagePipeline, several: bool) -> Any:
    """A choice of classes, or of one; for a prior without, a state that holds none."""
    if not pipeline.prior.num_classes:
        return gr.State(None)
    choices = [*((name, number) for number, name in enumerate(class_names(pipeline))), ("(no class)", UNCONDITIONAL)]
    if several:
        about = "taken in turn; none chosen: every class in turn"
        return gr.Dropdown(choices, value=[], multiselect=True, label="Classes", info=about)
    return gr.Dropdown(choices, value=UNCONDITIONAL, label="Class", info="the condition of the prior")


def labels_for(pipeline: ImagePipeline, chosen: Any, count: int) -> list[int | str | None] | None:
    """The classes of `count` images, by name where they have names: those chosen, or else every class, in turn."""
    total = pipeline.prior.num_classes
    if not total:
        return None
    ids = (list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]) or list(range(total))
    if not all(type(number) is int and UNCONDITIONAL <= number < total for number in ids):
        raise ValueError(f"a class should be one of {', '.join(class_names(pipeline)[:20])}")
    named = [None if k == UNCONDITIONAL else pipeline.labels[k] if pipeline.labels else k for k in ids]
    labels = [named[k % len(named)] for k in range(count)]
    return None if all(label is None for label in labels) else labels


def labels_code(pipeline: ImagePipeline, labels: Sequence[int | str | None] | None) -> str:
    """The argument `labels` of a call as it is written, after a comma."""
    if labels is None:
        return ""
    count = len(labels)
    period = next(k for k in range(1, count + 1) if all(labels[i] == labels[i % k] for i in range(count)))
    if period == 1:
        return f", labels={labels[0]!r}"
    turn = list(labels[:period])
    code = "pipe.labels" if turn == pipeline.labels else repr(turn)
    return f", labels={code}" if period == count else f", labels=({code} * {-(-count // period)})[:{count}]"


# Orders and seeds


def orders_of(prior: Prior) -> list[str]:
    """The orders that a prior of any order can be asked for on its grid; none of a prior of one order."""
    if not prior.any_order:
        return []
    shape, several = prior.config.positions.shape, prior.config.takes_blocks
    names = [
        "raster",
        *CURVES,
        "random:0",
        "halton",
        "spread",
        *(["diagonal", "rows", "dyadic", "regions:4"] * several),
    ]
    names = [name for name in names if order_problem(name, shape) is None]
    return [name for name in names if several or max(make_partition(name, shape).blocks) == 1]


def order_widget(prior: Prior) -> Any:
    """A choice of orders, where the prior takes any; a visitor may write others."""
    if not (names := orders_of(prior)):
        return gr.State("")
    about = "in which the tokens are drawn"
    if prior.config.takes_blocks:
        about += "; raster/7 draws 7 tokens in a pass, halton:8 all in 8 passes: quicker, and costs likelihood"
    choices = [(f"its own ({prior.config.order})", ""), *((name, name) for name in names)]
    return gr.Dropdown(choices, value="", label="Order", info=about, allow_custom_value=True)


def seed_widget() -> gr.Number:
    """A number that makes the same images again."""
    seed = gr.Number(0, precision=0, minimum=0, maximum=LAST_SEED, label="Seed", info="image k uses seed + k")
    other = gr.Button("Another seed", size="sm")
    other.click(None, None, seed, js="() => Math.floor(Math.random() * 1e6)", queue=False)
    return seed


def whole(value: Any, name: str, low: int, high: int) -> int:
    """A whole number in this range. Raises `ValueError`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or value != int(value):
        raise ValueError(f"{name} should be a whole number from {low} to {high:,} (got {str(value)[:40]})")
    return int(value)
