"""The controls of a request, from what a prior declares: the settings of its `Sampling`, its classes, and the orders
that it takes; and from their values the arguments of a call.

What a setting means, and its range, is said once, by the keys of `smalti generate`; they are handed in as `described`.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr
from pydantic.fields import FieldInfo

from prior import Prior
from prior.masked import SCHEDULES
from prior.orders import CURVES, OWN_BLOCKS, make_partition, order_problem, parse_name
from prior.sampling import GUIDANCE

from ..image_pipeline import ImagePipeline
from .uploads import whole

UNCONDITIONAL = -1
"""The choice of no class, among ids of classes."""
CHOICES = {"schedule": tuple(SCHEDULES)}
"""What settings that are words may be."""
SLIDERS = {"temperature": (0.0, 2.0, 0.05), "guidance_scale": (0.0, 8.0, 0.1), "top_p": (0.05, 1.0, 0.05)}
"""From where to where settings are of use; the pipeline's own lies within, or the slider is longer."""
TITLES = {"steps": "Passes", "guidance_scale": "Guidance", "top_k": "Top-k", "top_p": "Top-p"}
CUT_BY_NUMBER = ("halton", "spread", "random")
"""The orders whose names say how many blocks there are; others say how many tokens a block has."""


@dataclass(frozen=True)
class Setting:
    """A setting of sampling: what the prior declares, and the pipeline's own value."""

    name: str
    kind: type
    optional: bool
    own: Any
    about: str

    @property
    def title(self) -> str:
        """What the page calls it."""
        return TITLES.get(self.name, self.name.replace("_", " ").capitalize())

    def widget(self, tokens: int) -> gr.components.Component:
        """Its control; tokens: how many an image has, hence how many passes there may be."""
        shared: dict[str, Any] = {"label": self.title, "info": self.about, "value": self.own}
        if self.name in CHOICES:
            return gr.Dropdown(list(CHOICES[self.name]), **shared)
        if self.name == "steps":
            about = "0: a pass for each token"
            return gr.Slider(0, tokens, step=1, **{**shared, "value": self.own or 0, "info": about})
        if self.name in SLIDERS:
            low, high, step = SLIDERS[self.name]
            value = 1.0 if self.own is None else self.own
            return gr.Slider(low, max(high, value), step=step, **{**shared, "value": value})
        # Not gr.Number, which shows 0 for no value.
        shared["value"] = "" if self.own is None else f"{self.own:g}"
        return gr.Textbox(placeholder="none" if self.optional else "", max_length=20, **shared)

    def read(self, value: Any) -> Any:
        """What a visitor has set. Raises `ValueError` for what is no number."""
        if self.name in CHOICES:
            return value
        if value in (None, "") or (self.name, value) in (("top_p", 1.0), ("steps", 0)):
            return None
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.title} should be a number (got {str(value)[:40]!r})") from error
        return int(number) if self.kind is int and number.is_integer() else number


def settings_of(pipeline: ImagePipeline, described: Mapping[str, FieldInfo]) -> list[Setting]:
    """The settings that the prior declares; those of guidance only where there are classes to guide towards."""
    sampling = type(pipeline.sampler)
    hints, found = typing.get_type_hints(sampling), []
    for field in fields(sampling):
        if field.name in GUIDANCE and not pipeline.prior.num_classes:
            continue
        hint = hints[field.name]
        kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
        about = described[field.name].description or "" if field.name in described else ""
        own, optional = getattr(pipeline.sampler, field.name), len(kinds) < len(typing.get_args(hint))
        found.append(Setting(field.name, kinds[0], optional, own, about.split("; default")[0]))
    return found


def chosen_settings(settings: Sequence[Setting], values: Sequence[Any], vocab_size: int) -> dict[str, Any]:
    """The settings of a call: those that differ from the pipeline's own, and of guidance all, which is one choice. A
    filter that is cleared, though the pipeline has one, keeps everything."""
    everything = {"top_k": vocab_size, "top_p": 1.0}
    given = {setting.name: setting.read(value) for setting, value in zip(settings, values, strict=True)}
    changed = {s.name: given[s.name] for s in settings if given[s.name] != s.own}
    if set(changed) & set(GUIDANCE):
        changed |= {name: given[name] for name in GUIDANCE}
        changed = {name: value for name, value in changed.items() if name not in GUIDANCE or value is not None}
    found = {}
    for name, value in changed.items():
        if value is not None or name == "steps":
            found[name] = value
        elif name in everything:
            found[name] = everything[name]
        else:
            raise ValueError(f"{name.replace('_', ' ')} needs a value")
    return found


# Classes


def class_names(pipeline: ImagePipeline) -> list[str]:
    """The names of the classes, or their numbers."""
    return pipeline.labels or [str(number) for number in range(pipeline.prior.num_classes)]


def classes_widget(pipeline: ImagePipeline, several: bool) -> gr.Dropdown | None:
    """A choice of classes, or of one; None for a prior without."""
    if not pipeline.prior.num_classes:
        return None
    choices = [(name, number) for number, name in enumerate(class_names(pipeline))]
    about = "taken in turn; none chosen: every class in turn" if several else "what the prior is told"
    choices = [*choices, ("(no class)", UNCONDITIONAL)]
    value: Any = [] if several else UNCONDITIONAL
    label = "Classes" if several else "Class"
    return gr.Dropdown(choices, value=value, multiselect=several, label=label, info=about)


def labels_code(pipeline: ImagePipeline, labels: Sequence[int | str | None] | None) -> str:
    """The argument `labels` of a call as it is written, after a comma."""
    if labels is None:
        return ""
    period = next(k for k in range(1, len(labels) + 1) if all(labels[i] == labels[i % k] for i in range(len(labels))))
    if period == 1:
        return f", labels={labels[0]!r}"
    every = list(labels[:period]) == pipeline.labels
    turn = "pipe.labels" if every else repr(list(labels[:period]))
    return (
        f", labels={turn}"
        if period == len(labels)
        else f", labels=({turn} * {-(-len(labels) // period)})[:{len(labels)}]"
    )


def labels_for(pipeline: ImagePipeline, chosen: Any, count: int) -> list[int | str | None] | None:
    """The classes of `count` images, by name where they have names: those chosen, or else every class, in turn."""
    total = pipeline.prior.num_classes
    if not total:
        return None
    ids = list(chosen) if isinstance(chosen, (list, tuple)) else [chosen]
    ids = ids or list(range(total))
    for number in ids:
        if type(number) is not int or not UNCONDITIONAL <= number < total:
            raise ValueError(f"a class should be one of {', '.join(class_names(pipeline)[:20])}")
    named = [None if k == UNCONDITIONAL else pipeline.labels[k] if pipeline.labels else k for k in ids]
    labels = [named[k % len(named)] for k in range(count)]
    return None if all(label is None for label in labels) else labels


# Orders


def orders_of(prior: Prior) -> list[str]:
    """The orders that a prior of any order can be asked for on its grid; none of a prior of one order."""
    if not prior.any_order:
        return []
    shape = prior.config.positions.shape
    single = ["raster", *CURVES, "random:0", "halton", "spread"]
    several = ["diagonal", "rows", "dyadic", "regions:4"] if prior.config.takes_blocks else []
    names = [name for name in [*single, *several] if order_problem(name, shape) is None]
    return [name for name in names if prior.config.takes_blocks or max(make_partition(name, shape).blocks) == 1]


def cuts_orders(prior: Prior) -> bool:
    """Whether the number of passes is a choice of blocks, and no setting of sampling."""
    return prior.any_order and prior.config.takes_blocks and "steps" not in prior.Sampling.names()


def order_for(prior: Prior, order: Any, passes: Any) -> str | None:
    """The order in so many passes, where that is a choice. None: the prior's own. Raises `ValueError` for another name
    or number than a prior takes."""
    if not order and not passes:
        return None
    shape = prior.config.positions.shape
    name = str(order or prior.config.order)
    if name != prior.config.order and name not in orders_of(prior):
        raise ValueError(f"order should be one of {', '.join(orders_of(prior)) or prior.config.order}")
    if not passes:
        return name
    count = whole(passes, "passes", 1, math.prod(shape))
    kind, numbers, _ = parse_name(name)
    if kind in OWN_BLOCKS:
        raise ValueError(f"passes cannot be chosen for the order {name}, which has its own")
    if kind in CUT_BY_NUMBER:
        return ":".join([kind, *numbers[: kind == "random"], str(count)])
    return f"{kind}/{-(-math.prod(shape) // count)}"
