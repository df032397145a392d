"""Put a folder of images into one small file: their tokens, or with lossless=true every pixel.

Any machine gets the same tokens back; and every pixel with lossless=true, else pixels to within one grey level.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from tokenizer.base import LikelihoodError

from ..compression.coding import chunk_images, exact_pixels, write_images
from ..compression.header import StreamError
from ..compression.names import check_restorable
from ..config import OutputConfig, UserError, choose_device, run_command
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images import to_float
from ..images.decoding import open_image
from ..images.folder import find_images, is_image_name
from ..saving import PipelineFolder


class CompressConfig(OutputConfig):
    """What is compressed, with what, and where to."""

    examples = ("pipeline=runs/gpt_digits/pipeline images=my-images out=my-images.smalti",)
    often = "pipeline images out overwrite lossless device"

    pipeline: PipelineFolder = Field(description="pipeline folder, or a Hub id; decompressing needs the very same one")
    images: str = Field(description="a folder of images of the pipeline's size, or one file; names are kept")
    out: str = Field("images.smalti", description="the file to write")
    lossless: bool = Field(
        False,
        description="keep every pixel; needs a decoder with a likelihood, or a pixels "
        "tokenizer. false keeps what the tokenizer sees",
    )
    checked: bool = Field(
        True, description="decode every chunk as soon as it is made, and store it plainly if it fails"
    )
    device: str = Field("auto", description="cpu, cuda, mps or auto")


def run(config: CompressConfig) -> Path:
    """Compress, and return the file written."""
    root = Path(config.images)
    paths, names = named_images(root)
    out = Output(config.out, [config.pipeline, root], config.overwrite)
    out.check_file()
    try:
        check_restorable(names)
    except StreamError as error:
        raise UserError(f"images: {error}") from error
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=choose_device(config.device))
    size = chunk_images(pipeline)

    def parts() -> Iterator[Tensor]:
        for start in range(0, len(paths), size):
            yield torch.stack(
                [
                    read_exactly(path, pipeline.tokenizer.image_shape, config.lossless)
                    for path in paths[start : start + size]
                ]
            ).to(pipeline.device)

    began = time.monotonic()
    try:
        with lock_output(config.out), out.file() as path, open(path, "wb") as file:
            written = write_images(
                pipeline, file, parts(), len(paths), lossless=config.lossless, names=names, checked=config.checked
            )
    except (StreamError, LikelihoodError) as error:
        raise UserError(str(error)) from error
    dims = len(paths) * int(np.prod(pipeline.tokenizer.image_shape))
    was, seconds = sum(path.stat().st_size for path in paths), time.monotonic() - began
    what = "every pixel" if config.lossless else "tokens: decompressing gives reconstructions"
    print(
        f"{config.out}: {len(paths):,} images, {written:,} bytes (before: {was:,}), {written / len(paths):.1f} an "
        f"image, {8 * written / dims:.3f} bits per dim\nkept: {what}; {len(paths) / seconds:.0f} images a second, "
        f"{'checked by decoding' if config.checked else 'not checked'}"
    )
    return out.path


def named_images(root: Path) -> tuple[list[Path], list[str]]:
    """The images of a folder, or the one that `root` is, with their names in it. Raises `UserError` for none."""
    if root.is_file() and is_image_name(root.name):
        return [root], [root.name]
    if not root.is_dir():
        raise UserError(f"images: {str(root)!r} is neither a folder nor an image file")
    named = sorted((path.relative_to(root).as_posix(), path) for path in find_images(root))
    if not named:
        raise UserError(f"images: no images in {root}")
    return [path for _, path in named], [name for name, _ in named]


def read_exactly(path: Path, shape: tuple[int, int, int], lossless: bool) -> Tensor:
    """An image file as it is, float `(C, H, W)`. Raises `UserError` naming a file that is of another size or kind."""
    try:
        image: Image.Image = open_image(path)
        return to_float(exact_pixels(image, shape, lossless))
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise UserError(f"images: {path}: {error}") from error


main = partial(run_command, CompressConfig, run, verb="compress", description=__doc__)
