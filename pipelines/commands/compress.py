"""Compress a folder of images, or clips, into one small file of tokens, or with lossless=true of every pixel.

The file decodes to the same tokens on any machine; with lossless=true to the same pixels, otherwise to pixels that may
differ by one grey level. Without a label, the file stores the likeliest class of each image if that shortens it, which
takes longer; condition.label=null skips this. Clips are cut into windows of the pipeline's frames.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from prior.columns import LABEL
from tokenizer.base import LikelihoodError
from tokenizer.spec import ImageSpec, to_float

from ..compression.coding import (
    chunk_images,
    read_exact,
    restored_suffix,
    sizes_of,
    whole_image,
    write_images,
    write_tiles,
)
from ..compression.container import StreamError
from ..condition_keys import UsesCondition
from ..config import OutputConfig, UserError, run_command, tell, user_errors
from ..config.table import count_of
from ..files import Output, lock_output
from ..images.clip_files import WindowSource
from ..images.formats import open_image
from ..images.sources import Source
from ..images.views import LazyImages, View
from ..options import REMOVE, UsesPipeline, open_files, read_files, require_pictures
from ..rate import check_rate


class CompressConfig(UsesCondition, UsesPipeline, OutputConfig):
    examples = ("pipeline=runs/gpt_digits/pipeline images=my-images out=my-images.smalti",)
    often = "pipeline images out overwrite condition.NAME conditions lossless rate resize tile device"

    images: str = Field(description="image or clip of the pipeline's size, or a folder of these; file names are stored")
    out: str = Field("images.smalti", description="file to write; decompress it with the same pipeline and condition")
    lossless: bool = Field(
        False, description="store every pixel, for which the tokenizer needs a likelihood; false: only the tokens"
    )
    rate: float = Field(
        0.0,
        ge=0,
        description="above 0: choose ids that are cheaper for the prior where the picture hardly changes",
    )
    resize: bool = Field(False, description="resize and crop images of another size; false: refuse them")
    tile: bool = Field(False, description="cut larger images of any size into tiles; lossy ones may show seams")


def run(config: CompressConfig) -> Path:
    """Compress the images and return the file."""
    if config.tile and config.resize:
        raise UserError("tile: keeps the size of images, which resize=true changes; give one of them")
    root = Path(config.images)
    out = Output(config.out, [config.pipeline, root], config.overwrite)
    out.check_file()
    pipeline = config.load_pipeline()
    require_pictures(pipeline.spec, "compress")
    with user_errors(ValueError):
        check_rate(pipeline, config.rate)
    spec, shape, at_once = pipeline.spec, pipeline.spec.shape, chunk_images(pipeline)
    source = open_files([config.images], spec)
    paths, count = source.paths or [], source.size
    if spec.frames > 1 and root.is_dir() and {*map(str, root.rglob("*.np[yz]"))} - {*paths}:
        raise UserError(f"images: {root} holds .npy clips and others; compress each kind from a folder of its own")
    names = name_restored(paths, root, restored_suffix(pipeline, config.lossless))
    if isinstance(source, WindowSource) and source.unused:
        ends = count_of(source.unused, "frame")
        tell(f"images: {ends} at the ends of clips are left out; {spec.frames} in a row are compressed together")
    keys = config.read_condition(pipeline, count, paths)

    def parts() -> Iterator[Tensor]:
        for first in range(0, count, at_once):
            rows = range(first, min(first + at_once, count))
            yield torch.stack([read_image_or_clip(source, row, spec, config) for row in rows]).to(pipeline.device)

    def read_whole(number: int) -> Tensor:
        try:
            return whole_image(open_image(Path(paths[number])), spec, config.lossless)
        except Exception as error:  # damaged files make Pillow raise almost anything
            raise UserError(f"images: {paths[number]}: {error}{REMOVE}") from error

    whole, sizes = LazyImages([f"images: {path}" for path in paths], read_whole), [spec.size] * count
    if config.tile:
        with user_errors(ValueError):
            sizes = sizes_of(whole, View.side_by_side(spec))
        if {*sizes} == {spec.size}:
            tell("tile: not needed, because all images have the size of the pipeline")
    began = time.monotonic()
    chooses = LABEL not in keys.written
    options: dict[str, Any] = {
        "lossless": config.lossless,
        "rate": config.rate,
        "names": names,
        "chooses_classes": chooses,
    }
    with (
        user_errors(StreamError, LikelihoodError),
        lock_output(config.out),
        out.file() as path,
        open(path, "wb") as file,
    ):
        if config.tile:
            written = write_tiles(pipeline, file, whole, sizes, keys.given, **options)
        else:
            written = write_images(pipeline, file, parts(), keys.given, **options)
    files = [part for path in dict.fromkeys(map(Path, paths)) for part in (path.iterdir() if path.is_dir() else [path])]
    before, seconds = sum(file.stat().st_size for file in files), time.monotonic() - began
    bits = 8 * written / (np.prod(shape[:-2]) * sum(height * width for height, width in sizes))
    what = "every pixel" if config.lossless else "tokens, which decompress to reconstructions"
    print(
        f"{config.out}: {count_of(count, spec.noun)}, {written:,} bytes (before: {before:,}), "
        f"{written / count:.1f} per {spec.noun}, {bits:.3f} bits per dim\n"
        f"stored: {what}; {count / seconds:,.1f} {spec.noun}s per second"
    )
    return out.path


def name_restored(paths: list[str], root: Path, suffix: str) -> list[str]:
    """Return the names of the decompressed files below `root`; windows of the same clip in `paths` are numbered."""
    names, counts, numbers = list[str](), Counter(paths), Counter[str]()
    for path in paths:
        name = Path(path).relative_to(root if root.is_dir() and Path(path) != root else root.parent).as_posix()
        if counts[path] == 1:
            names.append(name if name.lower().endswith(suffix) else name + suffix)
        else:
            names.append(f"{name.removesuffix(suffix)}_{numbers[path]:05d}{suffix}")
            numbers[path] += 1
    return names


def read_image_or_clip(source: Source, row: int, spec: ImageSpec, config: CompressConfig) -> Tensor:
    """Read an image, or a clip, float `spec.shape`. Raises `UserError` for another size without `resize`."""
    if config.resize:
        return to_float(read_files(source, [row], spec)[0])
    try:
        (payload,) = source.payloads([row])
        return to_float(read_exact(payload, spec, config.lossless))
    except Exception as error:  # as above
        hint = "; resize=true resizes and crops images, tile=true cuts images into tiles"
        hint = hint if "pixels" in str(error) else REMOVE
        raise UserError(f"images: {source.name(row)}: {error}{hint}") from error


main = partial(run_command, CompressConfig, run, verb="compress", description=__doc__)
