"""A prior that begins with the weights of a trained pipeline's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prior import Prior
from tokenizer.files import PipelineLoadError, read_json
from tokenizer.model import CONFIG

from .config import UserError
from .provenance import file_of
from .stages.base import Stages

FREE = ("dropout", "attention_dropout", "label_smoothing", "anneal", "random_share")
"""Settings of priors that say how they are trained, and not what they are."""


def model_of(source: str) -> dict[str, Any] | None:
    """The settings of the prior of the pipeline `source`, a folder or a Hub id, as a preset holds them; None where they
    cannot be read: loading the pipeline will say why."""
    path = file_of(source, f"prior/{CONFIG}")
    saved = read_json(path) if path else {}
    if not Prior.has(saved.get("kind")):
        return None
    member: Any = Prior.find(saved["kind"])
    facts = member.choices().facts
    return {key: value for key, value in saved.items() if key not in facts}


def start_from(prior: Prior, class_names: Sequence[str], source: str) -> Prior:
    """Copy the weights of the prior of the pipeline `source` into `prior`; returns that prior, for a copy that stays.

    Raises `UserError` for one over the tokens of another tokenizer, of other classes, or with other settings than those
    of training alone; a `PipelineLoadError` for what is no good pipeline.
    """
    try:
        pipeline = Stages.from_pretrained(source, dtype=torch.float32)
    except PipelineLoadError as error:
        raise type(error)(f"init: {error}") from error
    theirs = pipeline.prior
    if theirs.config.tokenizer != prior.config.tokenizer or theirs.grid != prior.grid:
        ids = f"{theirs.config.tokenizer[:12]}..., that of tokens= is {prior.config.tokenizer[:12]}..."
        raise UserError(f"init: {source}: its prior was trained on the tokens of another tokenizer ({ids})")
    if (theirs.num_classes, pipeline.labels) != (prior.num_classes, list(class_names)):
        raise UserError(f"init: {source}: {told(theirs, pipeline.labels)}, and tokens= {told(prior, class_names)}")
    if theirs.name != prior.name:
        raise UserError(f"init: {source}: its prior is of model.kind={theirs.name}, not {prior.name}; leave that out")
    mine, other = prior.config.to_dict(), theirs.config.to_dict()
    differing = [key for key in {**mine, **other} if key not in FREE and mine.get(key) != other.get(key)]
    if differing:
        pairs = ", ".join(f"model.{key}: {other.get(key)!r} there, {mine.get(key)!r} here" for key in differing)
        raise UserError(f"init: {source}: a prior of another configuration ({pairs})")
    prior.load_state_dict(theirs.state_dict())
    return theirs


def told(prior: Prior, names: Sequence[str]) -> str:
    """The classes of a prior, in words."""
    return f"has {prior.num_classes} classes" + (f" ({', '.join(names)})" if names else "")
