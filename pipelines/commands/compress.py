"""Compress a folder of images into one small file of tokens, or with lossless=true of every pixel.

The file decodes to the same tokens on any machine; with lossless=true to the same pixels, otherwise to pixels that may
differ by one grey level. Without a label, the file stores the likeliest class of each image if that shortens it, which
takes longer; condition.label=null skips this.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from prior.columns import LABEL
from tokenizer.base import LikelihoodError
from tokenizer.spec import ImageSpec, to_float

from ..compression.coding import chunk_images, exact_pixels, sizes_of, whole_image, write_images, write_tiles
from ..compression.container import StreamError
from ..condition_keys import UsesCondition
from ..config import OutputConfig, UserError, run_command, tell
from ..config.table import count_of
from ..files import Output, lock_output
from ..images.formats import open_image
from ..images.sources import of_files
from ..images.views import LazyImages
from ..options import REMOVE, UsesPipeline, find_files, read_files, require_pictures


class CompressConfig(UsesCondition, UsesPipeline, OutputConfig):
    """Which images, which pipeline, and the output file."""

    examples = ("pipeline=runs/gpt_digits/pipeline images=my-images out=my-images.smalti",)
    often = "pipeline images out overwrite condition.NAME conditions lossless resize tile device"

    images: str = Field(description="folder of images of the pipeline's size, or one image; file names are kept")
    out: str = Field(
        "images.smalti", description="file to write; decompressing requires the same pipeline and condition"
    )
    lossless: bool = Field(
        False,
        description="keep every pixel; requires a decoder with a likelihood, or a pixels tokenizer. "
        "false: keep only the tokens",
    )
    resize: bool = Field(False, description="resize and crop images of another size; false: refuse them")
    tile: bool = Field(
        False,
        description="take images of any size from the pipeline's on, as tiles side by side; lossy ones may show seams",
    )


def run(config: CompressConfig) -> Path:
    """Compress the images and return the file."""
    if config.tile and config.resize:
        raise UserError("tile: keeps the size of images, which resize=true changes; give one of them")
    root = Path(config.images)
    paths = find_files([config.images])
    names = [name_restored(path.relative_to(root if root.is_dir() else root.parent)) for path in paths]
    out = Output(config.out, [config.pipeline, root], config.overwrite)
    out.check_file()
    pipeline = config.load_pipeline()
    require_pictures(pipeline.spec, "compress")
    keys = config.read_condition(pipeline, len(paths), [str(path) for path in paths])
    size, spec, shape = chunk_images(pipeline), pipeline.spec, pipeline.spec.shape

    def parts() -> Iterator[Tensor]:
        for first in range(0, len(paths), size):
            images = [read_image(path, spec, config) for path in paths[first : first + size]]
            yield torch.stack(images).to(pipeline.device)

    def read_whole(number: int) -> Tensor:
        try:
            return whole_image(open_image(paths[number]), shape[0], config.lossless)
        except Exception as error:  # as in `read_image`
            raise UserError(f"images: {paths[number]}: {error}{REMOVE}") from error

    whole, sizes = LazyImages([f"images: {path}" for path in paths], read_whole), [spec.size] * len(paths)
    if config.tile:
        try:
            sizes = sizes_of(whole, shape)
        except ValueError as error:
            raise UserError(str(error)) from error
        if {*sizes} == {spec.size}:
            tell("tile: not needed, because all images have the size of the pipeline")
    began = time.monotonic()
    try:
        with lock_output(config.out), out.file() as temporary, open(temporary, "wb") as file:
            given, chooses = keys.given, LABEL not in keys.written
            options: dict[str, Any] = {"lossless": config.lossless, "names": names, "chooses_classes": chooses}
            if config.tile:
                written = write_tiles(pipeline, file, whole, sizes, given, **options)
            else:
                written = write_images(pipeline, file, parts(), given, **options)
    except (StreamError, LikelihoodError) as error:
        raise UserError(str(error)) from error
    before, seconds = sum(path.stat().st_size for path in paths), time.monotonic() - began
    bits = 8 * written / (shape[0] * sum(height * width for height, width in sizes))
    what = "every pixel" if config.lossless else "tokens, which decompress to reconstructions"
    print(
        f"{config.out}: {count_of(len(paths), 'image')}, {written:,} bytes (before: {before:,}), "
        f"{written / len(paths):.1f} per image, {bits:.3f} bits per dim\n"
        f"kept: {what}; {len(paths) / seconds:,.1f} images per second"
    )
    return out.path


def name_restored(path: Path) -> str:
    """Return the name of the PNG file for the decompressed image."""
    name = path.as_posix()
    return name if path.suffix.lower() == ".png" else f"{name}.png"


def read_image(path: Path, spec: ImageSpec, config: CompressConfig) -> Tensor:
    """Read an image, float `(C, H, W)`. Raises `UserError` for an unsupported mode, or for another size without
    `resize`."""
    if config.resize:
        return to_float(read_files(of_files([str(path)]), [0], spec)[0])
    try:
        return to_float(exact_pixels(open_image(path), spec, config.lossless))
    except Exception as error:  # damaged files make Pillow raise almost anything
        hint = "; resize=true resizes and crops images, tile=true cuts them into tiles"
        hint = hint if "pixels" in str(error) else REMOVE
        raise UserError(f"images: {path}: {error}{hint}") from error


main = partial(run_command, CompressConfig, run, verb="compress", description=__doc__)
