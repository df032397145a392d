"""Adding rows to a token dataset: which may be added, and which are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer import Tokenizer
from tokenizer.config import show_value

from ..config import UserError
from ..images import DataConfig, ImageDataset
from ..images.origin import place_of
from .meta import Meta, read_meta, verify_files
from .pieces import EncodeJob

Data = dict[str, Any]
NO_CHOICE = ("augment", "cache_mb", "shuffle_window", "on_error", "max_bad_fraction")
"""Settings of images that do not change which ones are encoded, but whether any are."""


def existing(out: Path, tokenizer: Tokenizer) -> Meta:
    """The dataset that rows are to be added to. Raises `UserError` where another tokenizer made it."""
    meta = read_meta(out)
    verify_files(out, meta, whole=False)
    if meta.tokenizer != tokenizer.fingerprint():
        raise UserError(f"tokenizer: not the one that made {out} (its fingerprint differs); rows cannot be added")
    return meta


def missing_variants(old: Meta | None, data: Data, seed: int, wanted: dict[str, int]) -> dict[str, tuple[int, int]]:
    """For each split that gets rows, its first variant and the end; variant 0 is the image as it is, the others are
    augmented.

    data: the configuration of the images. wanted: the number of variants of each split. Existing rows are not made
    again. Raises `UserError` if nothing would be added.
    """
    if old is None:
        return {split: (0, count) for split, count in wanted.items()}
    if not wanted:
        raise UserError("only: of these images none are kept for validation (data.validation_fraction)")
    if not old.parts and same_images(old.source.get("data") or {}, data):
        raise UserError("append: this dataset does not say which augmentations it has; encode it again")
    found = {}
    for split, count in wanted.items():
        same = [part for part in old.parts if split in part["variants"] and same_images(part["data"], data)]
        alike = [p for p in same if p["seed"] == seed and p["data"].get("augment") == data.get("augment")]
        start = max([part["variants"][split] for part in alike], default=1 if same else 0)
        if start < count:
            found[split] = (start, count)
    if not found:
        raise UserError(
            "append: the dataset has these rows already; give other images (data.*), more augmentations or "
            "another seed for them"
        )
    return found


def same_images(one: Data, other: Data) -> bool:
    """Whether two data configurations name the same images, before they are augmented."""
    first, second = (
        {
            **{key: value for key, value in data.items() if key not in NO_CHOICE},
            "source": place_of(str(data.get("source"))),
        }
        for data in (one, other)
    )
    return first == second


def earlier_settings(out: Path, old: Meta | None) -> list[Data]:
    """The settings of images that this encode may continue with: those of an unfinished encode, and those of the
    dataset to which rows are added."""
    begun = EncodeJob.unfinished(out)
    parts = [] if begun is None else [begun]
    if old is not None:
        parts += [*old.parts, old.source]
    return [data for part in parts if isinstance(data := part.get("data"), dict)]


def match_validation_split(data: DataConfig, befores: list[Data], old: Meta | None) -> DataConfig:
    """`data`, with the validation split that the same images had before.

    Further images add no validation split to a dataset that has none, unless one is asked for. Raises `UserError` for
    the same images divided in another way: images for validation would become training images.
    """
    for before in befores:
        fraction = before.get("validation_fraction")
        matched = data.model_copy(update={"validation_fraction": fraction})
        if same_images(before, matched.model_dump(mode="json")):
            if data.validation_fraction not in (None, fraction):
                raise UserError(
                    f"data.validation_fraction: {show_value(fraction)} of these images before, "
                    f"{data.validation_fraction} now: images for validation would be trained on; give "
                    "what it was, or another out="
                )
            return matched
    if old is not None and "validation" not in old.shards and data.validation_fraction is None:
        return data.model_copy(update={"validation_fraction": 0.0})
    return data


def class_numbers(images: ImageDataset, old: Meta | None) -> Tensor | None:
    """The dataset's number of each class of `images`, found by its name. Raises `UserError` for one it lacks."""
    if images.labels is None:
        if old is not None and old.class_names:
            raise UserError(f"append: the dataset has {len(old.class_names)} classes, and these images have no labels")
        return None
    names = images.class_names if old is None else old.class_names
    if strange := [name for name in images.class_names if name not in names]:
        there = f"it has {', '.join(names[:20])}" if names else "it has none; data.label_column=null leaves them out"
        raise UserError(f"append: {strange[0]!r} is not a class of the dataset, {there}")
    return torch.tensor([names.index(name) for name in images.class_names])
