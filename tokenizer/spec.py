"""What an image is: its size, its frames, and the type and range of its values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
ValueType = Literal["uint8", "uint16", "float32"]
OUTPUT_TYPES = ("pil", "np", "pt")
BYTES = (0.0, 255.0)  # the range of 8-bit images


@dataclass(frozen=True)
class ImageSpec:
    """What the images of a data set, a tokenizer or a pipeline are.

    frames: number of frames of a clip; 1 for images. dtype: type of the values as stored. low, high: the values that
    become -1 and 1 inside; values beyond are clipped. show: three channels that pictures show; None: the first three.
    alpha: whether the last of four channels is opacity, so that an image is an RGBA picture.

    A batch is float `(..., C, H, W)` in [-1, 1]: images, draws and frames are leading axes.
    """

    channels: int
    height: int
    width: int
    frames: int = 1
    dtype: ValueType = "uint8"
    low: float = BYTES[0]
    high: float = BYTES[1]
    show: tuple[int, int, int] | None = None
    alpha: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W), or (T, C, H, W) for clips."""
        image = (self.channels, self.height, self.width)
        return image if self.frames == 1 else (self.frames, *image)

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def frame(self) -> ImageSpec:
        return replace(self, frames=1)

    @property
    def is_bytes(self) -> bool:
        """Whether the values are 8-bit levels, which stay uint8 until they are on the device."""
        return self.dtype == "uint8" and (self.low, self.high) == BYTES

    @property
    def is_picture(self) -> bool:
        """Whether an image, or a frame, is an 8-bit picture: grey, RGB or RGBA."""
        return self.is_bytes and (self.channels in (1, 3) or self.alpha)

    @property
    def mode(self) -> str:
        """Pillow's name of a picture's mode."""
        return {1: "L", 3: "RGB", 4: "RGBA"}[self.channels]

    @property
    def stored_type(self) -> np.dtype[Any]:
        """The type of decoded images in memory: uint8 levels, or float32 in [-1, 1]."""
        return np.dtype(np.uint8 if self.is_bytes else np.float32)

    @property
    def noun(self) -> str:
        return "image" if self.frames == 1 else "clip"

    @property
    def shown_suffix(self) -> str:
        """The suffix of a file that shows one image or clip, or holds its values if no picture does."""
        if not self.is_picture:
            return ".npy"
        return ".png" if self.frames == 1 else ".gif"

    @property
    def exact_suffix(self) -> str:
        """The suffix of a file that holds every value of one image or clip: a GIF has 256 levels for all channels."""
        return ".npy" if self.shown_suffix == ".gif" and self.channels > 1 else self.shown_suffix

    def at(self, height: int, width: int) -> ImageSpec:
        return replace(self, height=height, width=width)

    def to_unit(self, values: Tensor | Array) -> Tensor:
        """Convert values of any shape to float32 in [-1, 1].

        Integers are levels as stored, and so are float arrays if the images are of type float32. Other floats are in
        [-1, 1] already. Raises `ValueError` for another type, for floats beyond [-1, 1], and for NaN and infinities."""
        if self.is_bytes:
            found = values if isinstance(values, Tensor) else torch.from_numpy(values)
            return to_float(found) if found.dtype == torch.uint8 else found.float()
        if isinstance(values, Tensor):
            array = (values.float() if values.is_floating_point() else values).detach().cpu().numpy()
        else:
            array = values
        found_type = name_type(array.dtype)
        require_finite(array)
        if found_type == "float32" and (isinstance(values, Tensor) or self.dtype != found_type):
            if array.size and np.abs(array).max() > 1 + 1e-3:
                raise ValueError(
                    f"float images must lie in [-1, 1] (got {array.min():g} to {array.max():g}); those in the range of "
                    f"the data are {self.dtype} arrays"
                )
            array = array.astype(np.float32).clip(-1, 1)
        elif found_type == self.dtype:
            array = self.scale(array)
        else:
            raise ValueError(f"images must be {self.dtype}, or float tensors in [-1, 1] (got {found_type})")
        return torch.from_numpy(array)

    def scale(self, array: Array) -> NDArray[np.float32]:
        """Map values as stored to float32 in [-1, 1]; clip those beyond the range."""
        unit = (array.astype(np.float64) - self.low) * (2 / (self.high - self.low)) - 1
        return unit.clip(-1, 1).astype(np.float32)

    def from_unit(self, images: Tensor, output_type: str) -> Any:
        """Convert float images `(..., C, H, W)` in [-1, 1] to nested lists of PIL images ("pil"; of RGBA images, with
        their transparency), or an array (..., H, W, C) of their type and range ("np"); "pt" returns them unchanged.
        Raises `ValueError` for another type."""
        check_output_type(output_type)
        if output_type == "pt":
            return images
        if output_type == "pil":
            return draw_pictures(channels_last(images) if self.alpha else self.picture(images))
        if self.is_bytes:
            return channels_last(images)
        array = images.float().cpu().movedim(-3, -1).numpy()
        array = (array.astype(np.float64).clip(-1, 1) + 1) * ((self.high - self.low) / 2) + self.low
        if self.dtype == "float32":
            return array.astype(np.float32)
        return array.round().clip(0, np.iinfo(self.dtype).max).astype(self.dtype)

    def picture(self, images: Tensor) -> NDArray[np.uint8]:
        """Return what pictures show of images `(..., C, H, W)` in [-1, 1], as uint8 (..., H, W, 1 or 3): RGBA images
        on white."""
        return channels_last(self.select_shown(images))

    def select_shown(self, images: Tensor) -> Tensor:
        """Return the one or three channels of `(..., C, H, W)` in [-1, 1] that pictures show."""
        return put_on_white(images) if self.alpha else select_shown(images, self.show)

    def check(self, images: Tensor) -> None:
        """Raise `ValueError` unless `images` is float `(B, *shape)`."""
        if not images.dtype.is_floating_point or tuple(images.shape[1:]) != self.shape:
            raise ValueError(
                f"images should be floats of shape (B, {', '.join(map(str, self.shape))}), "
                f"got {images.dtype} of shape {tuple(images.shape)}"
            )

    def require(self, other: ImageSpec, whose: str) -> None:
        """Raise `ValueError`, which begins with the setting to change, unless `other` has the same size, frames, type
        and range. whose: owner of these images, such as "pipeline"."""
        if other.frames != self.frames:
            needed, got = ("null" if each.frames == 1 else each.frames for each in (self, other))
            theirs = "images" if self.frames == 1 else f"clips of {self.frames} frames"
            raise ValueError(f"frames: the {whose} takes {theirs}; set data.frames={needed} (got {got})")
        ours, shape = (spec.frame.shape for spec in (self, other))
        if shape != ours:
            raise ValueError(
                f"image_size, data.channels: the {whose}'s {'images' if self.frames == 1 else 'frames'} are {ours} "
                f"(channels, height, width), these are {shape}"
            )
        if self.is_bytes and other.dtype != self.dtype:
            raise ValueError(
                f"dtype: the {whose}'s images are 8-bit, these are {other.dtype}; convert them, or scale pictures with "
                "data.dtype=uint8"
            )
        if (other.dtype, other.low, other.high) != (self.dtype, self.low, self.high):
            raise ValueError(
                f"range: the {whose}'s images are {self.describe_values()}; set data.dtype={self.dtype} "
                f"data.range={self.low!r},{self.high!r}"
            )
        if self.alpha != other.alpha:
            raise ValueError(f"alpha: the {whose} takes {self.describe()}; set data.alpha={str(self.alpha).lower()}")

    def describe(self) -> str:
        """Describe the images, such as `28 x 28 grey images` (height, width)."""
        colours = "RGBA" if self.alpha else {1: "grey", 3: "RGB"}.get(self.channels, f"{self.channels}-channel")
        if self.frames == 1:
            return f"{self.height} x {self.width} {colours} images"
        return f"{colours} clips of {self.frames} frames of {self.height} x {self.width}"

    def describe_values(self) -> str:
        return "8-bit" if self.is_bytes else f"{self.dtype} from {self.low:g} to {self.high:g}"


def spec_problems(
    channels: int,
    dtype: str | None,
    limits: tuple[float, float] | None,
    show: tuple[int, int, int] | None,
    measured: bool = False,
    alpha: bool = False,
) -> Iterator[str]:
    """Yield problems of settings of an `ImageSpec` as 'FIELD: problem'. measured: a range may be missing."""
    if limits is not None and not limits[0] < limits[1]:
        yield f"range: expected a smaller and a larger number (got {limits[0]:g}, {limits[1]:g})"
    if limits is None and dtype not in ("uint8", None) and not measured:
        yield f"range: missing; {dtype} images need it"
    if show is not None and channels <= 3:
        yield f"show: is for images with more than 3 channels (got {channels})"
    if alpha and (channels != 4 or dtype not in ("uint8", None) or limits is not None or show is not None):
        yield "alpha: is for 8-bit images with channels=4, without range or show"
    elif show is not None and channels > 3 and not all(0 <= channel < channels for channel in show):
        yield f"show: channels go from 0 to {channels - 1} (got {', '.join(map(str, show))})"


def check_output_type(output_type: str, *others: str) -> None:
    allowed = [*OUTPUT_TYPES, *others]
    if output_type not in allowed:
        *most, last = map(repr, allowed)
        raise ValueError(f"output_type must be {', '.join(most)} or {last} (got {output_type!r})")


def to_float(pixels: Tensor) -> Tensor:
    """Convert uint8 levels of any shape to float32 in [-1, 1]; floats are there already."""
    if pixels.is_floating_point():
        return pixels
    return pixels.float().div_(127.5).sub_(1)  # in place takes less than half the time


def to_uint8(images: Tensor) -> Tensor:
    """Invert `to_float` exactly; clamp other floats to [-1, 1] and round them."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def select_shown(images: Tensor, show: Sequence[int] | None = None) -> Tensor:
    """Return the channels of `(..., C, H, W)` that pictures show: all of 1 or 3, the first of 2, and otherwise `show`,
    by default the first three."""
    channels = images.shape[-3]
    if channels in (1, 3):
        return images
    return images[..., list(show or (0, 1, 2)) if channels > 2 else [0], :, :]


def put_on_white(images: Tensor) -> Tensor:
    """Put RGBA images `(..., 4, H, W)` in [-1, 1] on white; return `(..., 3, H, W)`."""
    colours, opacity = images[..., :3, :, :], (images[..., 3:, :, :] + 1) / 2
    return 1 - (1 - colours) * opacity


def channels_last(images: Tensor) -> NDArray[np.uint8]:
    """Return images `(..., C, H, W)` in [-1, 1] as uint8 (..., H, W, C)."""
    return cast("NDArray[np.uint8]", to_uint8(images.cpu()).movedim(-3, -1).numpy())


def draw_pictures(pixels: NDArray[np.uint8]) -> Any:
    from PIL import Image

    if pixels.ndim > 3:
        return [draw_pictures(each) for each in pixels]
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def name_type(dtype: np.dtype[Any]) -> str:
    """Return `uint8`, `uint16`, `float32` for any float, or the name of another type."""
    return "float32" if dtype.kind == "f" else dtype.newbyteorder("=").name


def require_finite(array: Array) -> None:
    if array.dtype.kind == "f" and (count := int((~np.isfinite(array)).sum())):
        raise ValueError(f"{count:,} of {array.size:,} values are NaN or infinite")
