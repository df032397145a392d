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
    ("validation" or "held_out") of `config`. Nothing is known of other sources, and of one that has changed. A stream,
    which is divided by files, and a source of which only one of the two reads clips may not share a split."""
    changed = [] if trained is None else [k for k in SPLIT_SETTINGS if getattr(config, k) != getattr(trained, k)]
    if trained is None or not changed or resolve_source(config.source) != resolve_source(trained.source):
        return  # with equal settings, parts never overlap
    then, splits = trained.model_copy(update={"source": config.source}), open_source(config)
    found = choose_held_out(splits, config)
    name = found if part == "held_out" and found is not None else config.split
    if name != then.split:
        return
    some = "some of these"
    if not (config.is_stream or then.is_stream or (config.frames is None) != (then.frames is None)):
        try:
            learned = divide_images(splits, then, Inherited("position"), quiet=True).parts["train"].positions
        except UserError:  # the source has changed
            return
        now = divide_images(splits, config, Inherited("position"), quiet=True).parts
        seen = int(np.isin(now[part].positions, learned).sum()) if part in now else 0
        if not seen:
            return
        some = f"{seen:,} of these {len(now[part].positions):,}"
    before = " ".join(f"data.{key}={show_value(getattr(trained, key))}" for key in changed)
    raise UserError(
        f"{', '.join(f'data.{key}' for key in changed)}: {some} {part.replace('_', '-')} images were trained on, "
        f"with {before}; keep that setting, or use other images (data.source=FOLDER)"
    )


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
