"""What columns need of files, tables and widgets: pictures and texts become values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image as Picture
from torch import Tensor

from prior.columns import Column, GridColumn, VectorColumn
from tokenizer import Tokenizer

from .images.clips import clip_shapes, frame_shape, read_images
from .images.pictures import single_shapes
from .text import NGRAMS, encode_text

AT_ONCE = 256  # pictures encoded together


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
