"""Conditions as users write them (values by column, pictures, text), and the raw columns that a prior receives."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image as Picture
from torch import Tensor

from prior.conditions import (
    LABEL,
    ClassColumn,
    Column,
    Condition,
    FlagsColumn,
    GridColumn,
    NumberColumn,
    VectorColumn,
    describe_columns,
    describe_names,
    find_column,
    make_condition,
    parse_values,
    shorten,
)
from tokenizer import Tokenizer

from .images.pictures import find_user_stacklevel, single_shapes, to_images
from .text import NGRAMS, encode_text

if TYPE_CHECKING:
    from .image_pipeline import ImagePipeline

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
    the only grid. `label` is left to `ImagePipeline.label_ids`. Warns about numbers outside those of the training data.
    Raises `ValueError`, which names the column and what is allowed.
    """
    values = convert_values(pipeline, condition)
    raw = make_condition(pipeline.conditions, values, count, pipeline.device)
    warn_if_outside(pipeline.conditions, raw)
    return raw


def count_condition(pipeline: ImagePipeline, condition: GivenCondition) -> int | None:
    """Return how many images `condition` has values for; None if each value is for all images. Raises `ValueError` if
    columns disagree."""
    columns, labels = pipeline.conditions, choose_labels(None, condition)
    parsed = parse_values(columns, convert_values(pipeline, condition, encode=False))
    counts = {name: len(values) for name, values in parsed.items() if values.ndim > len(columns[name].shape)}
    if isinstance(labels, (list, tuple, Tensor, np.ndarray)):
        counts[LABEL] = len(labels)
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise ValueError(
            f"condition: the numbers of values differ ({found}); give one for all images, or one per image"
        )
    return next(iter(counts.values()), None)


def given_columns(columns: Mapping[str, Column], condition: Condition) -> list[str]:
    """Return the names of columns that are not null in every row."""
    return [name for name, values in condition.items() if not bool(columns[name].is_null(values).all())]


def convert_values(pipeline: ImagePipeline, condition: GivenCondition, *, encode: bool = True) -> dict[str, Any]:
    """Return values by column, without labels, in which tokens replace images and vectors text. encode: False replaces
    them by null tokens, to count them."""
    columns = pipeline.conditions
    if isinstance(condition, (Picture, Tensor, np.ndarray, list, tuple)):
        grids = [name for name, column in columns.items() if isinstance(column, GridColumn)]
        if len(grids) != 1:
            found = f"the grids are {', '.join(grids)}" if grids else f"there is no grid; {describe_columns(columns)}"
            raise ValueError(f"condition: images alone stand for the only grid, but {found}")
        condition = {grids[0]: condition}
    if not isinstance(condition, (Mapping, type(None))):
        raise ValueError(
            f"condition: expected values by column (got {shorten(condition)}); {describe_columns(columns)}"
        )
    values = {name: value for name, value in (condition or {}).items() if name != LABEL}
    for name, value in values.items():
        column = find_column(columns, name)
        try:
            if isinstance(column, GridColumn):
                values[name] = convert_pictures(column, value, pipeline.condition_tokenizers.get(name), encode)
            elif isinstance(column, VectorColumn):
                values[name] = convert_text(column, value)
        except (ValueError, TypeError) as error:
            raise ValueError(f"condition: {name}: {error}") from error
    return values


# Pictures and text


def convert_pictures(column: GridColumn, value: Any, tokenizer: Tokenizer | None, encode: bool) -> Any:
    """Replace images in the value of a grid by their tokens."""

    def convert(images: Any) -> Tensor:
        if tokenizer is None:
            raise ValueError(f"this grid has no tokenizer for images; give token ids of shape {column.shape}")
        batch = to_images(images, tokenizer.image_shape)
        return encode_images(tokenizer, batch) if encode else column.null(len(batch))

    if isinstance(value, (list, tuple)):
        chosen = [is_picture(one, column, tokenizer) for one in value]
        if not any(chosen):
            return value
        tokens = iter(convert([one for one, is_image in zip(value, chosen, strict=True) if is_image]))
        pairs = zip(value, chosen, strict=True)
        return torch.stack([next(tokens) if is_image else column.parse_one(one) for one, is_image in pairs])
    if not is_picture(value, column, tokenizer):
        return value
    is_one = isinstance(value, Picture) or tuple(value.shape) in picture_shapes(value, tokenizer)
    return convert([value])[0] if is_one else convert(value)


def is_picture(value: Any, column: GridColumn, tokenizer: Tokenizer | None) -> bool:
    """Return whether `value` is an image or a batch of images, rather than tokens or None. Bytes that may be both are
    an image."""
    if not isinstance(value, (Tensor, np.ndarray)):
        return isinstance(value, Picture)
    if value.dtype not in (torch.uint8, np.uint8):
        return "float" in str(value.dtype)
    shapes = {tuple(value.shape), tuple(value.shape[1:])}
    return column.shape not in shapes or bool(shapes.intersection(picture_shapes(value, tokenizer)))


def picture_shapes(value: Tensor | np.ndarray, tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
    """Return the possible shapes of one image of the same type as `value`."""
    if tokenizer is None:
        return []
    return [tokenizer.image_shape] if isinstance(value, Tensor) else single_shapes(tokenizer.image_shape)


def convert_text(column: VectorColumn, value: Any) -> Any:
    """Replace text in the value of a vector, or in a list of texts and None, by vectors."""
    several = list(value) if isinstance(value, (list, tuple, np.ndarray)) else [value]
    if not any(isinstance(one, str) for one in several):
        return value
    if not NGRAMS.fullmatch(column.encoder):
        by = f"encoded by {column.encoder!r}, which is not built in" if column.encoder else "not encoded"
        raise ValueError(f"text is {by}; give a vector of {column.size} numbers")
    rows = [encode_text(column.encoder, [one])[0] if isinstance(one, str) else column.parse_one(one) for one in several]
    return rows[0] if isinstance(value, str) else torch.stack(rows)


@torch.no_grad()
def encode_images(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """Encode float images `(B, C, H, W)` in batches; return tokens on the CPU."""
    parts = images.split(AT_ONCE)
    return torch.cat([tokenizer.encode(part.to(tokenizer.device, tokenizer.dtype)) for part in parts]).cpu()


def warn_if_outside(columns: Mapping[str, Column], condition: Condition) -> None:
    """Warn about numbers outside those of the training data."""
    for name, values in condition.items():
        column = columns[name]
        if isinstance(column, NumberColumn):
            low, high = torch.tensor([column.low, column.high]).to(values).unbind()
            if bool(((values < low) | (values > high)).any()):
                warnings.warn(
                    f"condition: {name}: numbers outside those of the training data, {describe_range(column)}, act "
                    "like numbers near the edge of these data",
                    stacklevel=find_user_stacklevel(),
                )


# Description


def describe_range(column: NumberColumn) -> str:
    """Return the range of each number in the training data."""
    return ", ".join(f"{low:g} to {high:g}" for low, high in zip(column.low, column.high, strict=True))


def describe_conditions(
    columns: Mapping[str, Column], tokenizers: Mapping[str, Tokenizer]
) -> list[tuple[str, str, str, str]]:
    """Return the name, kind, possible values and encoder of each column. tokenizers: those of grids."""
    rows = []
    for name, column in columns.items():
        values, encoder = "", ""
        if isinstance(column, (ClassColumn, FlagsColumn)):
            values = describe_names(column.names)
        elif isinstance(column, NumberColumn):
            values = describe_range(column)
        elif isinstance(column, VectorColumn):
            values, encoder = f"{column.size} numbers", column.encoder
        elif isinstance(column, GridColumn):
            values, tokenizer = (
                f"{' x '.join(map(str, column.shape))} ids of {column.grid.vocab_size}",
                tokenizers.get(name),
            )
            if tokenizer is not None:
                values = f"image of {' x '.join(map(str, tokenizer.image_shape[1:]))}, or {values}"
                encoder = tokenizer.name
        rows.append((name, column.kind, values, encoder))
    return rows


def example_condition(columns: Mapping[str, Column], tokenizers: Mapping[str, Tokenizer]) -> str:
    """Return Python code of a condition with a value for each column that has one worth writing."""
    found = []
    for name, column in columns.items():
        if isinstance(column, ClassColumn):
            found.append(f'"{name}": {column.names[0]!r}')
        elif isinstance(column, FlagsColumn):
            found.append(f'"{name}": {column.names[:2]!r}')
        elif isinstance(column, NumberColumn):
            numbers = ", ".join(f"{mean:.4g}" for mean in column.mean)
            found.append(f'"{name}": {numbers if len(column.mean) == 1 else f"[{numbers}]"}')
        elif isinstance(column, GridColumn) and name in tokenizers:
            found.append(f'"{name}": Image.open("{name}.png")')
        elif isinstance(column, VectorColumn) and NGRAMS.fullmatch(column.encoder):
            found.append(f'"{name}": "some words"')
    return f"{{{', '.join(found)}}}"
