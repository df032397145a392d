"""Sampling from both stages: what a call asks for, and what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from prior.sampling import (
    GUIDANCE,
    DecodingOptions,
    Generators,
    SamplingOptions,
    check_count,
    check_known,
    choose_orders,
    make_batch,
    progress_bar,
    whole_number,
)

from ..images.pictures import check_output_type
from .base import Label, Stages
from .output import PipelineOutput
from .synonyms import IN_A_CALL, check_names, named
from .watching import Callback, Watcher, serialized

LATENT = "latent"
LOWEST_SEED, LAST_SEED = -(1 << 63), (1 << 64) - 1  # of torch


@overload
def sample(
    pipeline: Stages,
    num_images: int | None = None,
    labels: Label | Sequence[Label] = None,
    *,
    return_dict: Literal[False],
    **options: Any,
) -> tuple[Any, Tensor]:
    """Images and tokens."""


@overload
def sample(
    pipeline: Stages,
    num_images: int | None = None,
    labels: Label | Sequence[Label] = None,
    *,
    num_images_per_label: int | None = None,
    seed: int | None = None,
    generator: Generators = None,
    tokens: Tensor | None = None,
    known: Tensor | None = None,
    batch_size: int = 64,
    output_type: str = "pil",
    return_dict: Literal[True] = True,
    progress: bool = True,
    callback_on_step_end: Callback | None = None,
    **options: Any,
) -> PipelineOutput:
    """Images and tokens, by name."""


@serialized
def sample(
    pipeline: Stages,
    num_images: int | None = None,
    labels: Label | Sequence[Label] = None,
    *,
    num_images_per_label: int | None = None,
    seed: int | None = None,
    generator: Generators = None,
    tokens: Tensor | None = None,
    known: Tensor | None = None,
    batch_size: int = 64,
    output_type: str = "pil",
    return_dict: bool = True,
    progress: bool = True,
    callback_on_step_end: Callback | None = None,
    **options: Any,
) -> Any:
    """Sample images; returns a `PipelineOutput`, or its tuple `(images, tokens)` without `return_dict`.

    labels (or class_labels): one class (id or name) for all, or one per image; None is unconditional.
    num_images_per_label (or num_images_per_prompt): so many images of each of the labels, those of one after another,
    in place of `num_images`. seed: image k uses seed + k, whatever `batch_size` is. tokens, known: as in
    `Prior.sample`. output_type: "pil", "np" (uint8), "pt" (float in [-1, 1]), or "latent": the tokens, not decoded.
    progress: False shows no bar, whatever `set_progress_bar_config` says.

    callback_on_step_end: called as `f(pipe, step, rank, {"tokens": ..., "known": ...})` after each step of whatever
    path draws the images: step counts from 0 over all batches; rank is how far along their order the images being drawn
    have come; tokens `(B, *grid.shape)` are those of all images so far (0 where none is drawn) and known says which
    these are. Both are copies, to look at: it returns the dictionary as it is, or None. What it raises ends the call,
    and so does `pipe.interrupt = True`, from it or from another thread: after the current step `Interrupted` is raised,
    which has the tokens so far.

    options: how the grid is walked (`order`, `num_orders`, `cache`, `parallel`), as in
    `Prior.sample`; and the settings that the prior's `Sampling` declares, by name (`temperature`, `top_k`, `top_p`,
    `guidance_scale`, `guidance_end`, `guidance_power`; `steps`, `confidence_temperature` and `schedule` of a
    masked-token prior). Settings default to the pipeline's own (`pipeline.sampler`), `steps` only where none of
    `order`, `num_orders`, `cache` and `parallel` is given, as these do not go with it. The course of guidance is one
    choice: a `guidance_scale` that is given is constant unless `guidance_end` is given too, and a `guidance_end` is
    linear unless `guidance_power` is. Raises `ValueError` for arguments out of range, `TypeError` for a setting that
    the prior does not have.
    """
    labels, num_images_per_label = named(IN_A_CALL, options, labels=labels, num_images_per_label=num_images_per_label)
    num_images, labels = count_images(num_images, labels, num_images_per_label)
    check_count(batch_size, "batch_size")
    ids = pipeline.label_ids(labels, num_images)
    decoding = DecodingOptions(**{name: options.pop(name) for name in DecodingOptions.names() if name in options})
    check_names(options, pipeline.prior.Sampling.names(), ARGUMENTS, pipeline.prior.name)
    sampler = choose_sampler(pipeline, options, ids, decoding)
    check_output_type(output_type, LATENT)
    generator = seeded(seed, generator, num_images)
    shape = (num_images, *pipeline.prior.grid.shape)
    given = (each.reshape(shape) for each in check_known(pipeline.prior, tokens, known, num_images))
    watcher = Watcher(pipeline, callback_on_step_end, *given)
    with pipeline._watched(watcher):
        drawn = draw_batches(pipeline, watcher, ids, num_images, generator, batch_size, decoding, sampler, progress)
    images = drawn if output_type == LATENT else pipeline.decode(drawn, output_type=output_type, progress=progress)
    names = [] if ids is None else pipeline.class_names(ids)
    made = PipelineOutput(images, drawn, names if any(names) else None)
    return made if return_dict else made.to_tuple()


ARGUMENTS = [*list(inspect.signature(sample).parameters)[1:-1], *DecodingOptions.names()]
"""Names that a call knows beside the settings of sampling."""


def draw_batches(
    pipeline: Stages,
    watcher: Watcher,
    ids: Tensor | None,
    count: int,
    generator: Generators,
    batch_size: int,
    decoding: DecodingOptions,
    sampler: SamplingOptions,
    progress: bool,
) -> Tensor:
    """Draw tokens `(B, *grid.shape)`, given the known ones of `watcher`; with a bar over the batches, or over the steps
    of one."""
    parts = []
    batches = range(0, count, batch_size)
    bar: Any = pipeline.progress_bar_config if progress else False
    # A part is a copy: the watcher goes on writing in its own.
    tokens, known = watcher.tokens.clone(), watcher.known.clone()
    some = bool(known.any())
    # On a GPU a batch without a callback is one CUDA graph: an interrupt then takes effect after the batch.
    by_step = watcher.callback is not None or pipeline.device.type != "cuda"
    for start in progress_bar(batches, bar if len(batches) > 1 else False, unit="batch"):
        rows = slice(start, min(start + batch_size, count))
        watcher.begin(rows)
        drawn = pipeline.prior.sample(
            rows.stop - rows.start,
            None if ids is None else ids[rows],
            generator=generator[rows] if isinstance(generator, Sequence) else generator,
            tokens=tokens[rows] if some else None,
            known=known[rows] if some else None,
            progress=bar if len(batches) == 1 else False,
            on_step=watcher.report if by_step else None,
            **vars(decoding.select(rows, count)),
            **vars(sampler),
        )
        watcher.end(drawn)
        parts.append(drawn)
    return torch.cat(parts)


def choose_sampler(
    pipeline: Stages, settings: dict[str, Any], ids: Tensor | None, decoding: DecodingOptions
) -> SamplingOptions:
    """The sampling settings given, and the pipeline's own for the others. None stands for the pipeline's own of those
    that every prior has. Raises `TypeError` for a setting that the prior does not have, `ValueError` out of range."""
    own = pipeline.sampler.for_given_order() if not decoding.is_default else pipeline.sampler
    labelled = ids is not None and bool((ids != pipeline.prior.num_classes).any())
    if not labelled:
        own = own.unguided()  # the default guides towards a class, and none was named
    shared = SamplingOptions.names()
    chosen = {name: value for name, value in settings.items() if value is not None or name not in shared}
    kept = dict(vars(own))
    for number, name in enumerate(GUIDANCE, 1):
        if name in chosen:  # the pipeline's course of guidance is not the one that is asked for
            kept.update(dict.fromkeys(GUIDANCE[number:]))
    sampler = pipeline.prior.make_sampling_options(**{**kept, **chosen})
    sampler.check_guidance(labelled)
    return sampler


def check_request(
    pipeline: Stages, settings: dict[str, Any], ids: Tensor | None, decoding: DecodingOptions
) -> SamplingOptions:
    """The settings with which these are sampled, without sampling. Raises what `sample` raises for a request that does
    not fit the prior, as far as a prior's own `draw` does not."""
    prior, sampler = pipeline.prior, choose_sampler(pipeline, settings, ids, decoding)
    prior.check_sampling_options(sampler)
    decoding.check()
    batch = make_batch(prior, 1, None if ids is None else ids[:1], sampler, torch.Generator(), None, None)
    choose_orders(prior, decoding, batch)
    return sampler


def seeded(seed: int | None, generator: Generators, count: int) -> Generators:
    """Return a generator per image, of seed + k; without a seed, `generator`. Raises `ValueError` if both are given,
    for a seed that torch does not take, and for a list of another length."""
    if seed is None:
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(f"got {len(generator)} generators for {count} images; give one, or one per image")
        return generator
    if generator is not None:
        raise ValueError("give seed or generator, not both")
    first = whole_number("seed", seed)
    if not LOWEST_SEED <= first <= LAST_SEED + 1 - count:
        raise ValueError(f"seed: that of each image, seed + k, must be from -2^63 to 2^64 - 1 (got {first})")
    return [torch.Generator().manual_seed(first + k) for k in range(count)]


def count_images(num_images: int | None, labels: Any, per_label: int | None = None) -> tuple[int, Any]:
    """How many images, and the label of each or of all: `num_images`, or one per label, or `per_label` of each label.
    Raises `ValueError` below 1, and for both counts."""
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.tolist()
    several = isinstance(labels, Iterable) and not isinstance(labels, str)
    labels = list(labels) if several else labels
    if per_label is not None:
        if num_images is not None:
            raise ValueError("give num_images (of all) or num_images_per_label (of each label), not both")
        per_label = check_count(per_label, "num_images_per_label")
        labels = [label for label in labels for _ in range(per_label)] if several else labels
        num_images = len(labels) if several else per_label
    if num_images is None:
        num_images = len(labels) if several else 1
    return check_count(num_images), labels
