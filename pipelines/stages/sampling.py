"""Sampling from both stages: what a call asks for, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prior import Prior
from prior.requests import Walk, choose_walk, known_tokens, make_rows
from prior.sampling import GUIDANCE, Generators, Sampler, image_generators, progress_over

from ..images.pictures import check_output_type
from .base import Label, Stages
from .watching import Callback, Watcher


@dataclass(frozen=True)
class PipelineOutput:
    """`images`: a list of PIL images, uint8 (B, H, W, C), or float (B, C, H, W); `tokens`: (B, *grid.shape)."""

    images: Any
    tokens: Tensor


def sample(
    pipeline: Stages,
    num_images: int | None = None,
    labels: Label | Sequence[Label] = None,
    *,
    seed: int | None = None,
    generator: Generators = None,
    tokens: Tensor | None = None,
    known: Tensor | None = None,
    batch_size: int = 64,
    output_type: str = "pil",
    progress: bool = True,
    callback_on_step_end: Callback | None = None,
    **options: Any,
) -> PipelineOutput:
    """Sample images.

    labels: one class (id or name) for all, or one per image; None is unconditional. seed: image k uses seed + k,
    whatever `batch_size` is. tokens, known: as in `Prior.sample`. output_type: "pil", "np" (uint8) or "pt" (float in
    [-1, 1]).

    callback_on_step_end: called as `f(pipe, step, rank, {"tokens": ..., "known": ...})` after each step of whatever
    path draws the images: step counts from 0 over all batches; rank is how far along their order the images being drawn
    have come; tokens `(B, *grid.shape)` are those of all images so far (0 where none is drawn) and known says which
    these are. Both are copies, to look at: it returns the dictionary as it is, or None. What it raises ends the call,
    and so does `pipe.interrupt = True`, from it or from another thread: then after the step that is under way
    `Interrupted` is raised, which has the tokens so far. Each call sets `pipe.interrupt` to False when it begins.

    options: how the grid is walked (`order`, `num_orders`, `cache`, `capture`, `parallel`, `guess`), as in
    `Prior.sample`; and the settings that the prior's `Sampling` declares, by name (`temperature`, `top_k`, `top_p`,
    `guidance_scale`, `guidance_end`, `guidance_power`; `steps`, `confidence_temperature` and `schedule` of a
    masked-token prior). Settings default to the pipeline's own (`pipeline.sampler`), `steps` only where none of
    `order`, `num_orders`, `cache` and `parallel` is given, as these do not go with it. The course of guidance is one
    choice: a `guidance_scale` that is given is constant unless `guidance_end` is given too, and a `guidance_end` is
    linear unless `guidance_power` is. Raises `ValueError` for arguments out of range, `TypeError` for a setting that
    the prior does not have.
    """
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.tolist()
    num_images = count_images(num_images, labels)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 (got {batch_size})")
    ids = pipeline.label_ids(labels, num_images)
    walk = Walk(**{name: options.pop(name) for name in Walk.names() if name in options})
    sampler = choose_sampler(pipeline, options, ids, walk)
    check_output_type(output_type)
    generators = seeded(seed, generator, num_images)
    shape, parts = (num_images, *pipeline.prior.grid.shape), []
    check_shapes(shape, tokens=tokens, known=known)
    given = (each.reshape(shape) for each in known_tokens(pipeline.prior, tokens, known, num_images))
    watcher = Watcher(pipeline, callback_on_step_end, *given)
    batches = range(0, num_images, batch_size)
    for start in progress_over(batches, progress and len(batches) > 1, unit="batch"):
        rows = slice(start, min(start + batch_size, num_images))
        watcher.begin(rows)
        parts.append(
            pipeline.prior.sample(
                rows.stop - rows.start,
                None if ids is None else ids[rows],
                generator=generators[rows],
                tokens=None if tokens is None else tokens.expand(shape)[rows],
                known=None if known is None else known.expand(shape)[rows],
                progress=progress and len(batches) == 1,
                on_step=watcher.saw,
                **vars(walk.of(rows)),
                **vars(sampler),
            )
        )
        watcher.end(parts[-1])
    drawn = torch.cat(parts)
    return PipelineOutput(pipeline.decode(drawn, output_type=output_type), drawn)


def choose_sampler(pipeline: Stages, settings: dict[str, Any], ids: Tensor | None, walk: Walk) -> Sampler:
    """The sampling settings given, and the pipeline's own for the others. None stands for the pipeline's own of those
    that every prior has. Raises `TypeError` for a setting that the prior does not have, `ValueError` out of range."""
    own = pipeline.sampler.for_a_walk() if walk.is_chosen else pipeline.sampler
    if ids is None or bool((ids == pipeline.prior.num_classes).all()):
        own = own.unguided()  # the default guides towards a class, and none was named
    shared = Sampler.names()
    chosen = {name: value for name, value in settings.items() if value is not None or name not in shared}
    kept = dict(vars(own))
    for number, name in enumerate(GUIDANCE, 1):
        if name in chosen:  # the pipeline's course of guidance is not the one that is asked for
            kept.update(dict.fromkeys(GUIDANCE[number:]))
    return pipeline.prior.make_sampler(**{**kept, **chosen})


def check_request(pipeline: Stages, settings: dict[str, Any], ids: Tensor | None, walk: Walk) -> Sampler:
    """The settings with which these are sampled, without sampling. Raises what `sample` raises for a request that does
    not fit the prior, as far as a prior's own `draw` does not."""
    prior, sampler = pipeline.prior, choose_sampler(pipeline, settings, ids, walk)
    sampler.check(prior.grid)
    walk.check(prior)
    rows = make_rows(prior, 1, None if ids is None else ids[:1], sampler, torch.Generator(), None, None)
    choose_walk(prior, walk.order, walk.num_orders, rows)
    return sampler


def settings_in(keys: dict[str, Any]) -> dict[str, Any]:
    """Of a verb's keys those that are given and that some prior declares as settings of sampling."""
    declared = {name for kind in Prior.available() for name in Prior.find(kind).Sampling.names()}
    return {name: value for name, value in keys.items() if name in declared and value is not None}


def seeded(seed: int | None, generator: Generators, count: int) -> list[torch.Generator]:
    """A generator per image: of seed + k, or from `generator`. Raises `ValueError` if both are given."""
    if seed is None:
        return image_generators(generator, count)
    if generator is not None:
        raise ValueError("give seed or generator, not both")
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def count_images(num_images: int | None, labels: Any) -> int:
    """`num_images`, or one per label. Raises `ValueError` below 1."""
    if num_images is None:
        num_images = len(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else 1
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1 (got {num_images})")
    return num_images


def check_shapes(shape: tuple[int, ...], **tensors: Tensor | None) -> None:
    """Raise `ValueError` naming a tensor whose shape is neither `(B, *grid.shape)` nor that of one image."""
    for name, value in tensors.items():
        if value is not None and tuple(value.shape) not in (shape, shape[1:]):
            raise ValueError(f"{name} should have shape {shape[1:]} or {shape}, got {tuple(value.shape)}")
