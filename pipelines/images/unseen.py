"""Check that a model of 0.3, which divided images by position, was not trained on its evaluation images; and find the
part of files that a user gives."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tokenizer.config import show_value

from ..config import UserError
from .loading import open_source
from .origin import resolve_source
from .settings import DataConfig
from .splits import DIVISION, Inherited, choose_held_out, divide_images

SPLIT_SETTINGS = (*DIVISION, "limit", "streaming")


def require_unseen(config: DataConfig, trained: DataConfig | None, part: str) -> None:
    """Raise `UserError` if a model that was trained with the settings `trained` has seen images of this `part`
    ("validation" or "held_out") of `config`."""
    seen, count = count_seen(config, trained, part)
    if not seen or trained is None:
        return
    changed = [key for key in SPLIT_SETTINGS if getattr(config, key) != getattr(trained, key)]
    before = " ".join(f"data.{key}={show_value(getattr(trained, key))}" for key in changed)
    some = f"{seen:,} of these {count:,}" if count else "some of these"
    raise UserError(
        f"{', '.join(f'data.{key}' for key in changed)}: {some} {part.replace('_', '-')} images were trained on, "
        f"with {before}; keep that setting, or use other images (data.source=FOLDER)"
    )


def count_seen(config: DataConfig, trained: DataConfig | None, part: str) -> tuple[int, int]:
    """Return how many images of this `part` of `config` were in the training split of the settings `trained`, and the
    number of images in the part. (0, 0) if unknown or if the settings are equal (parts never overlap); (1, 0) if a
    stream, which is divided by files, takes both from one split, and if only one of the two reads clips."""
    same = trained is not None and all(getattr(config, key) == getattr(trained, key) for key in SPLIT_SETTINGS)
    if trained is None or same or resolve_source(config.source) != resolve_source(trained.source):
        return 0, 0
    before, splits = trained.model_copy(update={"source": config.source}), open_source(config)
    found = choose_held_out(splits, config)
    name = found if part == "held_out" and found is not None else config.split
    if config.is_stream or before.is_stream or (config.frames is None) != (before.frames is None):
        return int(name == before.split), 0
    try:
        learned = divide_images(splits, before, Inherited("position"), quiet=True).parts["train"].positions
    except UserError:  # the source has changed
        return 0, 0
    parts = divide_images(splits, config, Inherited("position"), quiet=True).parts
    if part not in parts:
        return 0, 0
    positions = parts[part].positions
    return int(np.isin(positions, learned).sum()) if name == before.split else 0, len(positions)


def find_parts(files: Sequence[Path], trained: DataConfig | None, inherited: Inherited) -> list[str | None]:
    """Return the part of the training images that each file belongs to ("train", "validation" or "held_out"), under
    any path and through links; None for a file that is not among them, and if they cannot be found. inherited: how the
    images that a model was `trained` with were divided."""
    root, paths = None if trained is None else trained.path, [os.path.realpath(file) for file in files]
    if trained is None or root is None or not any(Path(path).is_relative_to(os.path.realpath(root)) for path in paths):
        return [None] * len(files)
    everything = trained.model_copy(update={"limit": None})
    try:
        parts = divide_images(open_source(everything), everything, inherited, quiet=True).parts
    except UserError:  # the source has changed
        return [None] * len(files)
    known = {
        os.path.realpath(part.source.paths[position]): name
        for name, part in parts.items()
        if part.source.paths is not None
        for position in part.positions.tolist()
    }
    return [known.get(path) for path in paths]
