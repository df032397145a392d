"""The settings of a data set: which images to use, and their shape."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from tokenizer.base import PLAIN
from tokenizer.spec import BYTES, ImageSpec, ValueType, spec_problems

from ..config import Config, UserError, user_errors
from .augment import AugmentConfig
from .binarize import Binarize
from .folder import holds_files
from .sources import IMAGE, LABEL

Side = Annotated[int, Field(ge=4, le=4096)]
Unit = Literal["image", "object", "clip", "folder", "shard"]

OPTIONAL = {
    **dict.fromkeys(("frames", "group", "key", "dtype", "range", "show", "crop", "binarize")),
    "clips": False,
    "alpha": False,
    "crops_per_image": 1,
}
"""Settings that files hold only if they are set."""
UNIT_SETTINGS = ("clips", "frames", "group")  # settings that say which images belong together
NOT_BINARIZED = "binarize: images are not streamed, cropped or cut from clips; unset streaming, frames, crop"
EXCLUSIVE = (
    ("clips", "group", "clips and group both say which images belong together: set only one"),
    ("clips", "frames", "clips=true is for images; with frames, whole clips are held out anyway"),
    ("streaming", "frames", "frames: clips are not streamed; set streaming=false"),
    ("crop", "frames", "frames: clips are not cropped at random; set crop=null"),
    ("streaming", "binarize", NOT_BINARIZED),
    ("alpha", "frames", "alpha: is for images, not for the frames of clips; set alpha=false"),
    ("frames", "binarize", NOT_BINARIZED),
    ("crop", "binarize", NOT_BINARIZED),
)
"""Pairs of settings of which only one may be set, and why."""


class DataConfig(Config):
    """The images to use, and their shape."""

    # `default=` is spelled out so that type checkers see which arguments are optional.

    source: str = Field(
        default="digits",
        description="`digits` (5,000 MNIST digits), a folder of images, parquet or webdataset (.tar) files as a file, "
        "folder, pattern or URL, or a Hub id",
    )
    streaming: bool = Field(
        default=False,
        description="read shards (parquet, .tar) in sequence, for data that does not fit on the disk: shuffling is "
        "approximate, whole shards are held out and become files of tokens, and images are not checked first; for a "
        "folder of image files, only the check is skipped",
    )
    shuffle_window: int = Field(
        default=10_000,
        ge=1,
        description="with streaming, the size of the shuffle buffer: encoded images held in memory",
    )
    split: str = Field(
        default="train",
        description="the split to train on; in a folder of images, the subfolder of that name (`train` without such a "
        "subfolder: all images)",
    )
    held_out: str | None = Field(
        default=None,
        description="the split to evaluate on; null: `test`, or else the only split called validation, val, valid or "
        "dev, or else part of `split`",
    )
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1, description="share of `split` to hold out")
    validation_fraction: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share of `split` to set aside for choosing the best weights; null: 5%, at most 2,000 images, but "
        "no images if that is fewer than 10; 0: use the held-out images instead",
    )
    clips: bool = Field(
        default=False,
        description="each folder of images is a clip, whose images go into the same split, and whose name is no class",
    )
    frames: int | None = Field(
        default=None,
        ge=2,
        le=4096,
        description="the source holds clips or volumes (folders of frames, arrays, GIF, PNG, WEBP, TIFF, MP4), which "
        "are cut into windows of this many frames; all windows of a clip go into the same split",
    )
    group: str | None = Field(
        default=None,
        description="column that names the object of each image, or else a regular expression that finds it in the "
        "image's path within the source, as its first group or else the whole match; all images of an object go into "
        "the same split",
    )
    key: str | None = Field(
        default=None,
        description="column of a table that identifies each image and so decides its split; null: the image's bytes",
    )
    image_size: Side | tuple[Side, Side] = Field(
        default=28, description="one number, or [height, width]; images of other sizes are resized and cropped"
    )
    channels: int = Field(
        default=1, ge=1, le=16, description="1 for grey, 3 for RGB; any number up to 16 for arrays and pages of a TIFF"
    )
    dtype: ValueType | None = Field(
        default=None, description="type of the values in a folder of images; null: that of the first training image"
    )
    range: tuple[float, float] | None = Field(
        default=None,
        description="smallest and largest value, which become -1 and 1 inside; null: 0 to 255 for uint8, else measured "
        "on the training images",
    )
    show: tuple[int, int, int] | None = Field(
        default=None, description="of more than 3 channels, those that pictures show in red, green and blue"
    )
    alpha: bool = Field(
        default=False,
        description="with channels=4: RGBA pictures, whose fourth channel is opacity; otherwise pictures are put on "
        "white",
    )
    image_column: str = Field(default=IMAGE, description="column of the images; in a .tar, their suffix")
    label_column: str | None = Field(default=LABEL, description="column of the classes; null ignores classes")
    augment: AugmentConfig = Field(default=AugmentConfig(), description="random augmentation of the training images")
    crop: Literal["random"] | None = Field(
        default=None,
        description="`random`: train on random crops of `image_size` from images at their own size, which are only "
        "enlarged if they are smaller; other splits use a centred grid of crops; null: resize images",
    )
    crops_per_image: int = Field(
        default=1,
        ge=1,
        le=100_000,
        description="with crop, the crops of each training image in an epoch, and in a token dataset",
    )
    binarize: Binarize | None = Field(
        default=None,
        description="make grey images black and white, for the tokenizer `pixels` of 2 levels. `threshold`: cut at mid "
        "grey; `drawn`: each pixel is white with probability value / 255, anew in each epoch of training, and by fixed "
        "seeds elsewhere",
    )
    on_error: Literal["skip", "fail"] = Field(
        default="fail", description="what to do with images that cannot be decoded: skip them, or end the run"
    )
    max_bad_fraction: float = Field(
        default=0.01, ge=0, le=1, description="with `skip`, a larger share of bad images ends the run"
    )
    limit: int | None = Field(default=None, ge=1, description="use at most this many images of each split")
    cache_mb: int = Field(default=2048, ge=0, description="memory for decoded images, in MiB")

    @field_validator("image_size", mode="before")
    @classmethod
    def _image_size_is_no_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"expected one number, or height and width such as 64,64 (got {value[:100]!r})")
        return value

    @model_validator(mode="after")
    def _settings_agree(self) -> DataConfig:
        if self.split == self.held_out:
            raise ValueError(f"split and held_out are both {self.split!r}: evaluation needs images not trained on")
        for problem in spec_problems(self.channels, self.dtype, self.range, self.show, measured=True, alpha=self.alpha):
            raise ValueError(problem)
        if self.crops_per_image > 1 and self.crop is None:
            raise ValueError("crops_per_image needs crop=random; without crops, set crops_per_image=1")
        if self.binarize is not None and self.channels != 1:
            raise ValueError(f"binarize: needs grey images, channels=1 (got {self.channels})")
        if self.binarize is not None and (self.dtype not in (None, "uint8") or self.range is not None):
            raise ValueError("binarize: needs 8-bit images; set dtype=null range=null")
        unset = (None, False)
        for one, other, problem in EXCLUSIVE:
            if getattr(self, one) not in unset and getattr(self, other) not in unset:
                raise ValueError(problem)
        return self

    @model_serializer(mode="wrap")
    def _omit_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        return {key: value for key, value in found.items() if (key, value) not in OPTIONAL.items()}

    def without_crop(self) -> DataConfig:
        return self.model_copy(update={"crop": None, "crops_per_image": 1})

    @property
    def path(self) -> Path | None:
        """The local path of the source; None for the digits, a Hub id, a pattern or a URL."""
        path = Path(os.path.expanduser(self.source))
        return path if self.source != "digits" and path.exists() else None

    @property
    def folder(self) -> Path | None:
        path = self.path
        return path if path is not None and path.is_dir() and holds_files(path) else None

    @property
    def is_stream(self) -> bool:
        return self.streaming and self.source != "digits" and self.folder is None

    @property
    def unit(self) -> Unit:
        """What splits never divide, of images with random access."""
        found: dict[Unit, Any] = {"object": self.group, "clip": self.frames, "folder": self.clips or None}
        return next((unit for unit, value in found.items() if value is not None), "image")

    @property
    def spec(self) -> ImageSpec:
        """What the images are; their type and range only if these are declared or were measured."""
        height, width = self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)
        dtype, (low, high) = self.dtype or "uint8", self.range or BYTES
        return ImageSpec(self.channels, height, width, self.frames or 1, dtype, low, high, self.show, self.alpha)

    @property
    def stored_values(self) -> dict[str, Any]:
        """The facts about images that a tokenizer keeps beside their shape."""
        values = {"dtype": self.dtype or "uint8", "range": self.range, "show": self.show, "alpha": self.alpha}
        return {key: value for key, value in values.items() if (key, value) not in PLAIN.items()}


def require_plain_data(config: DataConfig) -> None:
    """Raise `UserError` for images of another depth or with other channels than those of digits and streams."""
    if config.channels not in (1, 3) or config.dtype not in (None, "uint8") or config.range is not None:
        key = "data.channels" if config.channels not in (1, 3) else "data.range" if config.range else "data.dtype"
        what = "data.streaming=true" if config.streaming else f"data.source={config.source}"
        raise UserError(f"{key}: {what} reads 8-bit images with 1 or 3 channels only")


def require_same_spec(
    config: DataConfig, tokenizer: Any, whose: str = "pipeline", *, single_frames: bool = False
) -> None:
    """Raise `UserError` unless the declared images are those of a tokenizer, also in black and white. whose: for
    messages. single_frames: clips are read as the images of their frames."""
    require_spec(tokenizer.spec, config.spec.frame if single_frames else config.spec, whose)
    require_two_levels(config, tokenizer.name, getattr(tokenizer.config, "levels", 0))


def require_spec(spec: ImageSpec, images: ImageSpec, whose: str) -> None:
    with user_errors(ValueError, prefix="data."):
        spec.require(images, whose)


def require_two_levels(config: DataConfig, kind: str, levels: int) -> None:
    """Raise `UserError` if images are binarised for a tokenizer other than `pixels` of 2 levels."""
    if config.binarize is not None and (kind, levels) != ("pixels", 2):
        its = f"{kind} of {levels} levels" if kind == "pixels" else kind
        raise UserError(
            f"data.binarize: needs the tokenizer pixels of 2 levels, this is {its}; set data.binarize=null or "
            "model.kind=pixels model.levels=2"
        )
