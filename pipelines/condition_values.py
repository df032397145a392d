"""Values of a condition as users write them (by column, with pictures and text), and the raw columns of a prior."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image as Picture
from torch import Tensor

from prior import Prior
from prior.conditions import (
    LABEL,
    Column,
    Condition,
    GridColumn,
    NumberColumn,
    VectorColumn,
    describe_columns,
    find_column,
    make_condition,
    select_rows,
    shorten,
)
from tokenizer import Tokenizer

from .images.clips import clip_shapes, frame_shape, read_images
from .images.pictures import find_user_stacklevel, single_shapes
from .images.tiles import PLACE, Place
from .text import NGRAMS, encode_text

if TYPE_CHECKING:
    from .image_pipeline import ImagePipeline, Label

GivenCondition = Mapping[str, Any] | Picture | Tensor | np.ndarray | list[Any] | tuple[Any, ...] | None
"""Values by column, one for all images or one per image; or images or tokens for the only grid."""
AT_ONCE = 256  # pictures encoded together


def choose_labels(labels: Any, condition: GivenCondition) -> Any:
    """Return `labels`, or those in `condition`. Raises `ValueError` if both are given."""
    within = condition.get(LABEL) if isinstance(condition, Mapping) else None
    if labels is not None and within is not None:
        raise ValueError(f"give labels, or {LABEL!r} in condition, not both")
    return within if labels is None else labels


def read_condition(pipeline: ImagePipeline, condition: GivenCondition, count: int) -> Condition:
    """Return raw columns for `count` images, null where `condition` has no value; {} for a prior without columns.

    condition: values by column, one for all images or one per image, as in `Column.parse`. A grid also takes images, in
    any form that `ImagePipeline.encode` accepts, and a vector of n-grams takes text. Images or tokens alone stand for
    the only grid. `label` is left to `ImagePipeline.label_ids`. Numbers outside those of the training data become the
    nearest of these, with a warning, except for tensors, which hold raw values. Raises `ValueError`, which names the
    column and what is allowed.
    """
    return limit_numbers(pipeline.conditions, read_numbers_as_given(pipeline, condition, count))


def read_numbers_as_given(pipeline: ImagePipeline, condition: GivenCondition, count: int) -> Condition:
    """Like `read_condition`, but without a limit for numbers."""
    return make_condition(pipeline.conditions, parse_condition(pipeline, condition), count, pipeline.device)


def limit_numbers(columns: Mapping[str, Column], condition: Condition) -> Condition:
    """Replace numbers outside those of the training data by the nearest of these. A model does not do this itself: it
    has seen no such number, and weights of 0.3 must keep their meaning for every raw value."""
    limited = dict(condition)
    for name, values in condition.items():
        if isinstance(column := columns[name], NumberColumn):
            limited[name] = values.clamp(*torch.tensor([column.low, column.high]).to(values).unbind())
    return limited


def parse_condition(pipeline: ImagePipeline, condition: GivenCondition) -> Condition:
    """Like `read_condition`, but return only the given columns, each with one value or one per image."""
    columns = pipeline.conditions
    if isinstance(condition, (Picture, Tensor, np.ndarray, list, tuple)):
        grids = [name for name, column in columns.items() if isinstance(column, GridColumn)]
        if len(grids) != 1:
            found = f"the grids are {', '.join(grids)}" if grids else f"there is no grid; {describe_columns(columns)}"
            raise ValueError(f"condition: images alone stand for the only grid, but {found}")
        condition = {grids[0]: condition}
    if not isinstance(condition, (Mapping, type(None))):
        found = f"expected values by column (got {shorten(condition)})"
        raise ValueError(f"condition: {found}; {describe_columns(columns)}")
    raw: Condition = {}
    for name, value in (condition or {}).items():
        if name != LABEL:
            column = find_column(columns, name)
            try:
                raw[name] = column.parse(convert_value(column, value, pipeline.condition_tokenizers.get(name)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"condition: {name}: {error}") from error
            if not isinstance(value, Tensor) and (line := describe_outside(name, column, raw[name])):
                warnings.warn(line, stacklevel=find_user_stacklevel())
    return raw


def count_rows(columns: Mapping[str, Column], raw: Condition) -> int | None:
    """Return the number of images of the first column with a value per image; None without one."""
    counts = (len(values) for name, values in raw.items() if values.ndim > len(columns[name].shape))
    return next(counts, None)


def name_given(prior: Prior, ids: Tensor | None, condition: Condition) -> list[str]:
    """Return the names of columns that are not null in every row, and `label` if this holds for class ids."""
    labelled = ids is not None and bool((ids != prior.num_classes).any())
    names = [name for name, raw in condition.items() if not bool(prior.conditions[name].is_null(raw).all())]
    return [*([LABEL] if labelled else []), *names]


def describe_outside(name: str, column: Column, raw: Tensor) -> str:
    """Return a warning if there are numbers outside those of the training data, else nothing."""
    if not isinstance(column, NumberColumn):
        return ""
    low, high = torch.tensor([column.low, column.high]).to(raw).unbind()
    if not bool(((raw < low) | (raw > high)).any()):
        return ""
    about = f"numbers outside those of the training data, {describe_range(column)}"
    return f"condition: {name}: {about}, count as the nearest of these"


def describe_range(column: NumberColumn) -> str:
    """Return the range of each number in the training data."""
    return ", ".join(f"{low:g} to {high:g}" for low, high in zip(column.low, column.high, strict=True))


# Pictures and text


def convert_value(column: Column, value: Any, tokenizer: Tokenizer | None) -> Any:
    """Replace images in the value of a grid by tokens, and text in the value of a vector by numbers. Raises
    `ValueError`."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "OU":
        value = value.tolist()
    several = isinstance(value, (list, tuple))
    if isinstance(column, VectorColumn):
        if several:
            return [encode_one(column, one) if isinstance(one, str) else one for one in value]
        return encode_one(column, value) if isinstance(value, str) else value
    if not isinstance(column, GridColumn):
        return value
    if any(isinstance(one, (str, Path)) for one in (value if several else [value])):
        raise ValueError("expected images or token ids, not paths; open pictures with PIL.Image.open")
    if several:
        pictures = [one for one in value if is_picture(one)]
        tokens = iter(encode_pictures(column, pictures, tokenizer) if pictures else ())
        return [next(tokens) if is_picture(one) else one for one in value]
    return encode_pictures(column, value, tokenizer) if is_picture(value) else value


def is_picture(value: Any) -> bool:
    """Return whether `value` is an image or a batch of images, which are bytes or floats, rather than ids or None."""
    if isinstance(value, (Tensor, np.ndarray)):
        return any(kind in str(value.dtype) for kind in ("uint8", "float"))
    return isinstance(value, Picture)


def encode_pictures(column: GridColumn, images: Any, tokenizer: Tokenizer | None) -> Tensor:
    """Encode one image to tokens of the column's shape, or several to a batch, on the CPU. Raises `ValueError`."""
    if tokenizer is None:
        raise ValueError(f"this grid has no tokenizer for images; give token ids (int64) of shape {column.shape}")
    shape = tokenizer.image_shape
    singles = [shape] if isinstance(images, Tensor) else single_shapes(shape)
    if not isinstance(images, (list, Picture)) and tokenizer.frames > 1:
        singles += clip_shapes(images, frame_shape(tokenizer), tokenizer.frames)
    is_one = isinstance(images, Picture) or (not isinstance(images, list) and tuple(images.shape) in singles)
    tokens = encode_images(tokenizer, [images] if is_one else images)
    return tokens[0] if is_one else tokens


@torch.no_grad()
def encode_images(tokenizer: Tokenizer, images: Any) -> Tensor:
    """Encode images or clips in any form that `read_images` accepts, in batches; return tokens on the CPU."""
    parts = read_images(images, tokenizer).split(AT_ONCE)
    return torch.cat([tokenizer.encode(part.to(tokenizer.device, tokenizer.dtype)).cpu() for part in parts])


def takes_text(column: Column) -> bool:
    """Return whether a value of this column may be text that is encoded here."""
    return isinstance(column, VectorColumn) and NGRAMS.fullmatch(column.encoder) is not None


def encode_one(column: VectorColumn, text: str) -> Tensor:
    """Encode a text. Raises `ValueError` if another encoder made the column."""
    if not takes_text(column):
        by = f"encoded by {column.encoder!r}, which is not built in" if column.encoder else "not encoded"
        raise ValueError(f"text is {by}; give a vector of {column.size} numbers")
    return encode_text(column.encoder, [text])[0]


# Tiles


def list_place_columns(columns: Mapping[str, Column]) -> list[str]:
    """Return the names of the columns that hold the place of a tile in its image."""
    return [name for name, column in columns.items() if isinstance(column, VectorColumn) and column.encoder == PLACE]


def rows_of_tiles(condition: Condition, places: Sequence[Place], place_columns: Sequence[str]) -> Condition:
    """Return the raw columns of tiles: the rows of their images in `condition`, and their centres."""
    rows = select_rows(condition, [place.image for place in places])
    centres = torch.tensor([place.centre for place in places], dtype=torch.float32).view(-1, 2)
    return {**rows, **{name: centres.to(rows[name].device) for name in place_columns}}


def check_places(columns: Mapping[str, Column], condition: Condition) -> list[str]:
    """Return the columns that tiles fill in. Raises `ValueError` if `condition` has values of them."""
    found = list_place_columns(columns)
    for name in found:
        if not bool(columns[name].is_null(condition[name]).all()):
            raise ValueError(f"condition: {name}: is the place of each tile and found from it; leave it out")
    return found


@dataclass(frozen=True)
class GivenRows:
    """The labels (None if there are none) and raw columns of images, which apply to each of their tiles, the names of
    what was given, as in `Measured`, and the columns that hold the place of a tile."""

    labels: list[int | None] | None
    columns: Condition
    names: list[str]
    place_columns: list[str]

    def select(self, places: Sequence[Place]) -> tuple[Any, Condition]:
        """Return the labels and columns of tiles."""
        labels = None if self.labels is None else [self.labels[place.image] for place in places]
        return labels, rows_of_tiles(self.columns, places, self.place_columns)


def read_given(
    pipeline: ImagePipeline, labels: Label | Sequence[Label], condition: GivenCondition, count: int
) -> GivenRows:
    """Read what is given for `count` images. Raises `ValueError`."""
    ids, columns = pipeline.label_ids(labels, count, condition), pipeline.read_condition(condition, count)
    null = pipeline.prior.num_classes
    rows = None if ids is None else [None if number == null else number for number in ids.tolist()]
    places = check_places(pipeline.conditions, columns)
    return GivenRows(rows, columns, name_given(pipeline.prior, ids, columns), places)
