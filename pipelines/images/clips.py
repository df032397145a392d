"""Clips, from and to the forms of users: inside a pipeline, a clip is a strip `(C, T * H, W)`, its frames below one
another, so that all other code sees images."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from .arrays import values_of
from .pictures import Shape, check_output_type, convert_images, describe_type, show_of, single_shapes, to_images


def frame_shape(tokenizer: Any) -> Shape:
    """Return (C, H, W) of a tokenizer's frames, or of its images if they are no clips."""
    channels, height, width = tokenizer.image_shape
    return channels, height // tokenizer.frames, width


def to_clips(strips: Tensor, frames: int) -> Tensor:
    """Return clips `(B, T, C, H, W)` of strips `(B, C, T * H, W)`."""
    return strips.unflatten(2, (frames, -1)).transpose(1, 2)


def to_strips(clips: Tensor) -> Tensor:
    """Return strips `(B, C, T * H, W)` of clips `(B, T, C, H, W)`."""
    return clips.transpose(1, 2).flatten(2, 3)


def read_images(images: Any, tokenizer: Any) -> Tensor:
    """Convert images in any form that `pictures.as_batch` accepts, or clips in any form that `list_frames` does, to
    float `(B, C, H, W)` in [-1, 1]; see `pictures.to_images`. Clips become strips, and may be strips already."""
    shape, values = tokenizer.image_shape, values_of(tokenizer)
    if tokenizer.frames == 1 or is_strip(images, shape):
        return to_images(images, shape, values)
    frames = to_images(list_frames(images, frame_shape(tokenizer), tokenizer.frames), frame_shape(tokenizer), values)
    return to_strips(frames.reshape(len(frames) // tokenizer.frames, tokenizer.frames, *frames.shape[1:]))


def write_images(images: Tensor, output_type: str, tokenizer: Any) -> Any:
    """Convert float images `(B, C, H, W)` in [-1, 1] to `output_type`; see `pictures.convert_images`. Strips become
    clips: a list of lists of PIL images, an array (B, T, H, W, C) or a tensor `(B, T, C, H, W)`."""
    check_output_type(output_type)
    values, show, frames = values_of(tokenizer), show_of(tokenizer), tokenizer.frames
    if frames == 1:
        return convert_images(images, output_type, values, show)
    converted = convert_images(to_clips(images, frames).flatten(0, 1), output_type, values, show)
    if isinstance(converted, list):
        return [converted[start : start + frames] for start in range(0, len(converted), frames)]
    return converted.reshape(len(images), frames, *converted.shape[1:])


def list_frames(clips: Any, shape: Shape, frames: int) -> Any:
    """Return all frames of clips in one form that `pictures.as_batch` accepts, clip by clip.

    Takes a tensor `(B, T, C, H, W)`, or `(T, C, H, W)` for one clip; an array (B, T, H, W, C), or (T, H, W, C) for one
    clip, for grey frames also without C; a list of single clips, each of which may be a list of T frames. Raises
    `ValueError` for anything else.
    """
    if isinstance(clips, (list, tuple)):
        return [frame for clip in clips for frame in list_frames_of_one(clip, clips, shape, frames)]
    if is_one_clip(clips, shape, frames):
        return clips
    if not isinstance(clips, (Tensor, np.ndarray)) or tuple(clips.shape[1:]) not in clip_shapes(clips, shape, frames):
        refuse_clips(clips, shape, frames)
    return clips.reshape(len(clips) * frames, *clips.shape[2:])


def list_frames_of_one(clip: Any, clips: Any, shape: Shape, frames: int) -> list[Any]:
    """Return the frames of one clip of a list of `clips`."""
    if isinstance(clip, (list, tuple)) and len(clip) != frames:
        raise ValueError(f"clips must have {frames} frames each (got {len(clip)})")
    if not isinstance(clip, (list, tuple)) and not is_one_clip(clip, shape, frames):
        refuse_clips(clips, shape, frames)
    return list(clip)


def clip_shapes(like: Tensor | np.ndarray, shape: Shape, frames: int) -> list[tuple[int, ...]]:
    """Return the valid shapes of one clip, as a tensor or an array."""
    return [(frames, *frame) for frame in ([shape] if isinstance(like, Tensor) else single_shapes(shape))]


def is_one_clip(clip: Any, shape: Shape, frames: int) -> bool:
    """Return whether this is a single clip, as a tensor or an array."""
    return isinstance(clip, (Tensor, np.ndarray)) and tuple(clip.shape) in clip_shapes(clip, shape, frames)


def is_strip(images: Any, shape: Shape) -> bool:
    """Return whether this is a tensor or array of strips, or an array of a single one."""
    if isinstance(images, Tensor):
        return tuple(images.shape[1:]) == shape
    singles = single_shapes(shape)
    return isinstance(images, np.ndarray) and (images.shape in singles or images.shape[1:] in singles)


def refuse_clips(clips: Any, shape: Shape, frames: int) -> NoReturn:
    """Raise a `ValueError` that lists the valid forms of clips."""
    channels, height, width = shape
    raise ValueError(
        f"images must be clips of {frames} frames: tensors of shape (B, {frames}, {channels}, {height}, {width}), "
        f"arrays of shape (B, {frames}, {height}, {width}, {channels}), lists of lists of {frames} PIL images, or a "
        f"list of single clips; got {describe_type(clips)}"
    )
