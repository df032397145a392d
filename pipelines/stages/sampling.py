"""Sampling from both stages: what a call asks for, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prior.requests import Order
from prior.sampling import Generators, image_generators, progress_over

from ..images.pictures import check_output_type
from .base import Label, Stages
from .index import SamplerDefaults


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: a list of PIL images, uint8 (B, H, W, C), or float (B, C, H, W); `tokens`: (B, *grid.shape)."""

    images: Any
    tokens: Tensor


def sample(
    stages: Stages,
    num_images: int | None = None,
    labels: Label | Sequence[Label] = None,
    *,
    seed: int | None = None,
    generator: Generators = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance_scale: float | None = None,
    tokens: Tensor | None = None,
    known: Tensor | None = None,
    order: Order = None,
    num_orders: int = 1,
    cache: bool = True,
    parallel: bool = False,
    batch_size: int = 64,
    output_type: str = "pil",
    progress: bool = True,
    **own: Any,
) -> PipelineOutput:
    """Sample images; the arguments are those of `ImagePipeline.__call__`."""
    if unknown := set(own) - stages.prior_takes():
        raise TypeError(f"{sorted(unknown)[0]!r} is no argument of sampling from a {stages.prior.name!r} prior")
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.tolist()
    num_images = count_images(num_images, labels)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 (got {batch_size})")
    ids = stages.label_ids(labels, num_images)
    choices = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
    in_steps = order is None and num_orders == 1 and cache and not parallel
    own = settings_of(stages, choices, ids, steps=in_steps) | own
    check_output_type(output_type)
    generators = seeded(seed, generator, num_images)
    shape, parts = (num_images, *stages.prior.grid.shape), []
    check_shapes(shape, tokens=tokens, known=known)
    batches = range(0, num_images, batch_size)
    for start in progress_over(batches, progress and len(batches) > 1, unit="batch"):
        rows = slice(start, min(start + batch_size, num_images))
        kept = None if known is None else known.expand(shape)[rows]
        given = None if tokens is None else tokens.expand(shape)[rows]
        parts.append(
            stages.prior.sample(
                rows.stop - rows.start,
                None if ids is None else ids[rows],
                generator=generators[rows],
                tokens=given,
                known=kept,
                order=order_of(order, rows),
                num_orders=num_orders,
                cache=cache,
                parallel=parallel,
                progress=progress and len(batches) == 1,
                **own,
            )
        )
    drawn = torch.cat(parts)
    return PipelineOutput(stages.decode(drawn, output_type=output_type), drawn)


def settings_of(stages: Stages, choices: dict[str, Any], ids: Tensor | None, *, steps: bool) -> dict[str, Any]:
    """The sampling settings chosen, and the pipeline's own for the others. Raises `ValueError` out of range."""
    settings = stages.sampler.given() | {name: value for name, value in choices.items() if value is not None}
    if choices["guidance_scale"] is None and (ids is None or bool((ids == stages.prior.num_classes).all())):
        settings["guidance_scale"] = 1.0  # the default guides towards a class, and none was named
    if not steps:
        settings.pop("steps", None)
    SamplerDefaults(**settings)
    return settings


def seeded(seed: int | None, generator: Generators, count: int) -> list[torch.Generator]:
    """A generator per image: of seed + k, or from `generator`. Raises `ValueError` if both are given."""
    if seed is None:
        return image_generators(generator, count)
    if generator is not None:
        raise ValueError("give seed or generator, not both")
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def order_of(order: Order, rows: slice) -> Order:
    """The part of `order` that belongs to `rows`, where there is one per image."""
    return order if order is None or isinstance(order, str) or np.ndim(order) < 2 else order[rows]


def count_images(num_images: int | None, labels: Any) -> int:
    """`num_images`, or one per label. Raises `ValueError` below 1."""
    if num_images is None:
        num_images = len(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else 1
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1 (got {num_images})")
    return num_images


def check_shapes(shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Raise `ValueError` naming a tensor that has not the shape `(B, *grid.shape)`, or that of one image."""
    for name, value in tensors.items():
        if value is not None and tuple(value.shape) not in (shape, shape[1:]):
            raise ValueError(f"{name} should have shape {shape[1:]} or {shape}, got {tuple(value.shape)}")
