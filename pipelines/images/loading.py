"""Loads the images of a configuration: finds the source, chooses or carves the splits, numbers the classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tokenizer.config import show_value

from ..config import UserError
from ..shuffling import splitmix64
from .bad import judge
from .base import DataConfig, Rows, SplitRows
from .dataset import ImageDataset, Splits
from .decoding import decode_all
from .labels import number_labels
from .origin import place_of
from .shards.order import drawn_by_blocks
from .sources import open_source
from .splits import held_out_split, tell_splits, validation_count


def load_images(config: DataConfig, *, together: bool = False) -> Splits:
    """Find the source, decode every image once and return its splits.

    together:
    whether all processes that were launched are here, of which each then decodes a share of what memory cannot keep.
    Raises `UserError` for a source that is missing, empty or lacks a split, for labels that are missing or negative,
    and for images that cannot be decoded (with `on_error=skip`, only if there are more than `max_bad_fraction`).
    """
    parts = choose_splits(open_source(config), config)
    opened = {id(rows): rows for rows, _ in parts.values()}
    numbered, class_names = number_labels(list(opened.values()))
    labels = dict(zip(opened, numbered, strict=True))
    if config.streaming:
        from .streamed import StreamedImages

        streamed = {
            name: StreamedImages(config, rows, positions, chosen(labels[id(rows)], positions), class_names)
            for name, (rows, positions) in parts.items()
        }
        return Splits(**streamed)
    decoded, room = {}, config.cache_mb * 2**20
    for name, (rows, positions) in parts.items():
        decoded[name] = decode_all(rows, positions, config.image_shape, room, together)
        room -= part.nbytes if (part := decoded[name].pixels) is not None else 0
    judge([part.report for part in decoded.values()], config)
    read = {
        name: ImageDataset(config, rows, decoded[name], chosen(labels[id(rows)], decoded[name].positions), class_names)
        for name, (rows, _) in parts.items()
    }
    return Splits(**read)


def chosen(labels: NDArray[np.int64] | None, positions: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """The labels of the rows at `positions`, if there are labels."""
    return None if labels is None else labels[positions]


def check_shape(config: DataConfig, shape: tuple[int, int, int], whose: str = "pipeline") -> None:
    """Raise `UserError` unless the images will have the `shape` (C, H, W) that the tokenizer or pipeline takes."""
    if config.image_shape != shape:
        raise UserError(
            f"data.image_size, data.channels: the {whose}'s images are {shape} (channels, height, width), these are "
            f"{config.image_shape}"
        )


DIVIDES = ("split", "held_out", "held_out_fraction", "validation_fraction", "limit", "streaming")
"""The settings that say which images of a source are trained on."""


def require_unseen(config: DataConfig, trained: DataConfig | None, part: str) -> None:
    """Raise `UserError` if a model that was trained with the settings `trained` has seen images of this `part` of
    `config`, "validation" or "held_out": what chooses or measures would take training images for new ones."""
    seen, count = count_seen(config, trained, part)
    if not seen or trained is None:
        return
    changed = [key for key in DIVIDES if getattr(config, key) != getattr(trained, key)]
    before = " ".join(f"data.{key}={show_value(getattr(trained, key))}" for key in changed)
    raise UserError(
        f"{', '.join(f'data.{key}' for key in changed)}: {seen:,} of these {count:,} {part.replace('_', '-')} images "
        f"were trained on, with {before}; leave that as it was, or give images of your own (data.source=FOLDER)"
    )


def count_seen(config: DataConfig, trained: DataConfig | None, part: str) -> tuple[int, int]:
    """How many images of this `part` of `config` were in the training split of the settings `trained`, and how many
    there are; (0, 0) where nothing can be said, and where the settings are the same, as parts do not overlap."""
    same = trained is not None and all(getattr(config, key) == getattr(trained, key) for key in DIVIDES)
    if trained is None or same or place_of(config.source) != place_of(trained.source):
        return 0, 0
    before = trained.model_copy(update={"source": config.source})
    try:
        learned = choose_splits(open_source(before), before, quiet=True)["train"][1]
    except UserError:  # the source is no longer what it was
        return 0, 0
    splits = open_source(config)
    parts = choose_splits(splits, config, quiet=True)
    if part not in parts:
        return 0, 0
    found, positions = held_out_split(splits, config), parts[part][1]
    name = found if part == "held_out" and found is not None else config.split
    return int(np.isin(positions, learned).sum()) if name == before.split else 0, len(positions)


def choose_splits(
    splits: SplitRows, config: DataConfig, quiet: bool = False
) -> dict[str, tuple[Rows, NDArray[np.int64]]]:
    """The rows of `train`, `held_out` and, if there are any, `validation`, each with the positions to use; `quiet`:
    without a line about what is not as expected. Raises `UserError`."""
    if config.split not in splits:
        raise UserError(f"data.split: the source has no split {config.split!r}; it has {', '.join(splits)}")
    fraction, found = config.held_out_fraction, held_out_split(splits, config)
    if not quiet:
        tell_splits(splits, config, found, f"{100 * fraction:.3g}% of {config.split!r}", "held out")
    rows = splits[config.split]()
    count = 0 if found is not None else min(max(1, round(rows.size * fraction)), rows.size)
    positions = carve(rows, count, validation_count(rows.size, config.validation_fraction))
    parts = {name: (rows, part) for name, part in positions.items()}
    if found is not None:
        other = splits[found]()
        parts["held_out"] = other, np.arange(other.size)
    for part, name in (("train", config.split), ("held_out", found or "held_out")):
        if not len(parts[part][1]):
            raise UserError(f"data: no images for {name!r} (the split {config.split!r} has {rows.size})")
    return {name: (source, part[: config.limit]) for name, (source, part) in parts.items() if len(part)}


def carve(rows: Rows, held_out: int, validation: int) -> dict[str, NDArray[np.int64]]:
    """The positions of `rows` divided into `train`, `validation` and `held_out` in a fixed random way; each part
    ascends. `held_out` is the start and `validation` the end of one random order, so that neither depends on the size
    of the other. Rows in blocks are divided by whole blocks, except for one block at each cut.
    """
    order = drawn(rows.size) if rows.blocks is None else drawn_by_blocks(rows.blocks)
    parts = {
        "train": order[held_out : max(held_out, rows.size - validation)],
        "validation": order[max(held_out, rows.size - validation) :],
        "held_out": order[:held_out],
    }
    return {name: np.sort(part) for name, part in parts.items()}


def drawn(size: int) -> NDArray[np.int64]:
    """The positions below `size` in a fixed random order."""
    return np.argsort(splitmix64(np.arange(size, dtype=np.uint64)), kind="stable")
