"""Settings shared by several verbs, and image arguments of the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from tokenizer import Tokenizer
from tokenizer.spec import ImageSpec

from .config import Config, DefaultsFrom, UserError, choose_device, is_first_process, tell, user_errors
from .config.table import count_of
from .image_pipeline import ImagePipeline
from .images import DataConfig, ImageDataset, Splits, load_images, require_same_spec, require_same_values
from .images.clip_files import choose_file_kind
from .images.formats import decode_in_threads
from .images.sources import Source, of_files
from .images.splits import Inherited
from .images.unseen import require_unseen
from .images.views import View
from .provenance import TokenizerFolder, inherit, read_training_facts, tokenizer_folder, trained_data
from .saving import PipelineFolder
from .shuffling import spread_rows

DEVICE = "cpu, cuda, mps or auto"
TEMPERATURE, GUIDANCE_SCALE = "below 1 is safer, 0 is greedy", "above 1 follows the class more closely"
UNKNOWN = "whether images were added or removed since training, which would move others, is not known"
REMOVE = "; remove or replace this file, then run the command again"
ImageChoice = int | str | list[int | str] | None
"""Image files, folders of images, or indices into a split; or classes, by id or name."""


def find_division(data: DataConfig, facts: dict[str, Any], part: str) -> Inherited:
    """Return how to divide the images, given the provenance of a model. Raises `UserError` for other settings than in
    training, in runs of 0.3 only if images of this `part` were trained on."""
    inherited = inherit(data, facts)
    if inherited.rule == "position":
        require_unseen(data, trained_data(facts), part)
    return inherited


class UsesPipeline(Config):
    """Base of verbs that load a pipeline."""

    pipeline: PipelineFolder = Field(description="pipeline folder, run, Hub id or `digits`")
    device: str = Field("auto", description=DEVICE)

    def load_pipeline(self) -> ImagePipeline:
        """Load the pipeline onto its device. Raises `PipelineLoadError`, or `UserError` if it is not available."""
        return ImagePipeline.from_pretrained(self.pipeline, device=choose_device(self.device))


class UsesImages(UsesPipeline):
    """Base of verbs that load a pipeline and a data set."""

    data: Annotated[DataConfig, DefaultsFrom("pipeline")] = Field(
        DataConfig(), description="the images; defaults to those the pipeline was trained on"
    )

    def load_images(
        self,
        pipeline: ImagePipeline,
        part: str = "held_out",
        *,
        whole: bool = False,
        check: bool = True,
        distributed: bool = False,
    ) -> Splits:
        """Load the images in the pipeline's shape, divided as for training, and print what is not known about that.
        whole: images are read at their own size, and none is decoded now. check, distributed: see `load_images`. Raises
        `UserError` for another shape, and if images of this `part` ("validation" or "held_out") were trained on."""
        require_same_spec(self.data, pipeline.tokenizer)
        data = self.data.without_crop() if whole else self.data
        inherited = find_division(self.data, pipeline.provenance, part)
        splits = load_images(data, inherited=inherited, check=check and not whole, distributed=distributed)
        may_change = inherited.rule == "position" and data.source != "digits"
        if may_change and (part == "validation" or splits.is_carved):
            splits = replace(splits, note=f"{data.source} is divided as in 0.3, by position: {UNKNOWN}")
        if splits.note and is_first_process():
            tell(splits.note)
        return require_same_values(splits, pipeline.tokenizer)


class TileSettings(Config):
    """Base of verbs that take images larger than the model."""

    tile: bool = Field(
        False, description="keep images at their own size, and cover them with overlapping tiles of the model's size"
    )
    stride: int | None = Field(
        None, ge=1, description="with tile, the distance of the tiles in pixels; null: half of a tile's shorter side"
    )

    def choose_view(self, spec: ImageSpec) -> View:
        """Return how images are seen: whole or, with `tile`, by tiles. Raises `UserError`."""
        if not self.tile and self.stride is not None:
            raise UserError("stride: needs tile=true")
        stride = max(1, min(spec.size) // 2) if self.stride is None else self.stride
        with user_errors(ValueError):
            return View.of(spec, stride if self.tile else None)


class UsesTiles(UsesImages, TileSettings):
    """Base of verbs that load a pipeline, and a data set of images that may be larger than the model."""

    def read_pixels(self, pipeline: ImagePipeline, images: ImageDataset, rows: NDArray[np.int64]) -> Any:
        """Return images of a data set as users give them to the pipeline, `(B, *spec.shape)` or, with `tile`, at their
        own size. Stochastic black and white ones are seeded by their pixels, not by their row, so that a picture has
        the same score and digest wherever it comes from."""
        if self.tile:
            return pipeline.list_images(images.whole_images(rows))
        return images.pixels(rows) if pipeline.binarized is None else pipeline.binarize(images.grey().pixels(rows))


class UsesTokenizer(Config):
    """Base class for verbs that load a tokenizer and a data set."""

    tokenizer: TokenizerFolder = Field(
        description="folder of a tokenizer, a run or a pipeline, or a tokenizer's Hub id"
    )
    data: Annotated[DataConfig, DefaultsFrom("tokenizer")] = Field(
        DataConfig(), description="the images; defaults to those the tokenizer was trained on"
    )
    device: str = Field("auto", description=DEVICE)

    def load_with_images(self, *, whole: bool = False) -> tuple[Tokenizer, ImageDataset]:
        """Load the tokenizer onto its device, and the held-out images (see `UsesImages.load_images`)."""
        folder = tokenizer_folder(self.tokenizer)
        tokenizer = Tokenizer.from_pretrained(folder, device=choose_device(self.device))
        single = tokenizer.spec.frames == 1  # trained on the frames of clips
        require_same_spec(self.data, tokenizer, "tokenizer", single_frames=single)
        inherited = find_division(self.data, read_training_facts(self.tokenizer), "held_out")
        data = self.data.without_crop() if whole else self.data
        splits = load_images(data, inherited=inherited, single_frames=single, check=not whole)
        if splits.note and is_first_process():
            tell(splits.note)
        return tokenizer, require_same_values(splits, tokenizer, "tokenizer").held_out


class Sampling(Config):
    """Sampling settings, which default to the pipeline's own."""

    temperature: float | None = Field(None, ge=0, description=TEMPERATURE)
    top_k: int | None = Field(None, ge=1, description="sample only from the k most likely ids")
    top_p: float | None = Field(
        None, gt=0, le=1, description="sample only from the most likely ids with this total probability"
    )
    guidance_scale: float | None = Field(None, ge=0, description=GUIDANCE_SCALE)
    guidance_end: float | None = Field(
        None,
        ge=0,
        description="guidance at the last token, changing from guidance_scale at the first; null: constant",
    )
    guidance_power: float | None = Field(
        None,
        gt=0,
        description="exponent of a power-cosine guidance schedule; larger values change it later; null: linear",
    )
    steps: int | None = Field(
        None, ge=1, description="for a masked-token prior: sample in this many passes, faster but not exactly"
    )

    def sampling_settings(self) -> dict[str, Any]:
        return self.model_dump(include=set(Sampling.model_fields), exclude_none=True)


def choose_images(
    choice: ImageChoice, most: int, spec: ImageSpec, held_out: Callable[[], ImageDataset]
) -> tuple[Tensor, list[str]]:
    """Load the images that a user chose, as `ImageDataset.pixels` returns them, and their names: files (of clips also
    folders of frames), up to `most` evenly spread files of folders or windows of clips, or indices of held-out images;
    by default `most` held-out images. Raises `UserError`."""
    paths, indices = split_choice(choice)
    if paths:
        source = open_files(paths, spec)
        chosen = spread_rows(source.size, most if source.size > len(paths) else None).tolist()
        return read_files(source, chosen, spec), [source.name(row) for row in chosen]
    images = held_out()
    if outside := [index for index in indices if not 0 <= index < len(images)]:
        raise UserError(f"images: indices of the held-out split go from 0 to {len(images) - 1} (got {outside[0]})")
    chosen = indices or spread_rows(len(images), most).tolist()
    return images.pixels(chosen), images.names(chosen)


def require_pictures(spec: ImageSpec, verb: str) -> None:
    """Raise `UserError` for a verb that reads and writes 8-bit pictures only."""
    if not spec.is_picture:
        raise UserError(
            f"{verb}: takes 8-bit images with 1 or 3 channels, or RGBA (data.alpha=true); those of this tokenizer have "
            f"{count_of(spec.channels, 'channel')} of {spec.dtype} (the Python methods take arrays)"
        )


def open_files(paths: list[str], spec: ImageSpec, most: int | None = None) -> Source:
    """Return the images of the first `most` image files, or the windows of the first `most` clips (files, and folders
    of frames), among `paths` and in the folders among them, sorted by name within each folder. Raises `UserError` for a
    path that does not exist, and if there are none."""
    kind, files = choose_file_kind(spec), list[Path]()
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"images: no such file or folder: {path}")
        files += sorted(map(Path, kind.find(path))) if path.is_dir() else [path]
    if not files:
        raise UserError(f"images: no {spec.noun}s in {', '.join(paths)}")
    return kind.open(of_files([str(file) for file in files[:most]]))


def read_files(source: Source, rows: Sequence[int], spec: ImageSpec) -> Tensor:
    """Read some images of a source, resized and cropped, as `ImageDataset.pixels` returns them. Raises `UserError` with
    a line for each of the first ten that cannot be decoded."""
    decoded = decode_in_threads(source.payloads(rows), spec)
    bad = [f"{source.name(row)}: {found}" for row, found in zip(rows, decoded, strict=True) if isinstance(found, str)]
    if bad:
        lines = [f"images: {line}{'' if 'pip install' in line else REMOVE}" for line in bad[:10]]
        more = [f"images: and {len(bad) - 10:,} more"] if len(bad) > 10 else []
        raise UserError(*lines, *more)
    return torch.from_numpy(np.stack([pixels for pixels in decoded if not isinstance(pixels, str)]))


def split_choice(images: ImageChoice) -> tuple[list[str], list[int]]:
    """Return the paths and the indices that a user chose. Raises `UserError` if both are given."""
    every = [] if images is None else images if isinstance(images, list) else [images]
    paths, indices = [one for one in every if isinstance(one, str)], [one for one in every if isinstance(one, int)]
    if paths and indices:
        raise UserError("images: give files and folders, or indices of the held-out split, not both")
    return paths, indices
