"""Turn a file that `smalti compress` wrote back into a folder of images.

The tokens are those that were compressed, or there is an error. The pixels are, too, if the file is lossless; else they
are what the decoder makes of the tokens here, to within one grey level of what it makes of them elsewhere.
"""

from __future__ import annotations

import mmap
from functools import partial
from pathlib import Path

from pydantic import Field

from tokenizer.files import atomic_folder

from ..compression.coding import open_stream, read_images
from ..compression.header import Data, Limits, StreamError, TruncatedStream
from ..compression.names import restored
from ..config import Config, UserError, choose_device, run_command
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images.pictures import convert_images
from ..saving import PipelineFolder

IN_MEMORY = 256 << 20
"""Bytes of a stream that is read as a whole; a larger one is mapped, and who reads it while it is cut is ended."""


class DecompressConfig(Config):
    """What is decompressed, with what, and where to."""

    examples = ("pipeline=runs/gpt_digits/pipeline stream=my-images.smalti out=my-images-again",)

    pipeline: PipelineFolder = Field(description="the pipeline that compressed: folder or Hub id")
    stream: str = Field(description="the file that `smalti compress` wrote")
    out: str = Field(
        "decompressed", description="a new or empty folder for PNG files, which appears whole or not at all"
    )
    max_images: int = Field(1 << 24, ge=1, description="refuse files that announce more images")
    batch_size: int | None = Field(
        None, ge=1, description="images evaluated at a time; default: a whole chunk. Tokens do not depend on it"
    )
    device: str = Field("auto", description="cpu, cuda, mps or auto")


def run(config: DecompressConfig) -> Path:
    """Decompress, and return the folder written."""
    path = Path(config.stream)
    if not path.is_file():
        raise UserError(f"stream: {str(path)!r} is not a file")
    out = Output(config.out, [path, config.pipeline])
    out.check_folder(None)
    pipeline = ImagePipeline.from_pretrained(config.pipeline, device=choose_device(config.device))
    try:
        with lock_output(config.out), open(path, "rb") as file:
            if not (size := path.stat().st_size):
                raise TruncatedStream("the file is empty")
            mapped = size > IN_MEMORY
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if mapped else file.read()
            with out.errors(), atomic_folder(config.out, kind=None) as folder:
                count = write_folder(pipeline, data, folder, config)
    except StreamError as error:
        raise UserError(f"stream: {path}: {error}") from error
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror or error}") from error
    print(f"{count:,} images: {config.out}")
    return out.path


def write_folder(pipeline: ImagePipeline, data: Data, folder: Path, config: DecompressConfig) -> int:
    """Write the images of a stream as PNG files, by their names or numbered; returns how many."""
    stream, coder = open_stream(pipeline, data, Limits(max_images=config.max_images))
    names, count = stream.names, 0
    for images in read_images(pipeline, stream, coder, batch_size=config.batch_size):
        for image in convert_images(images, "pil"):
            name = names[count] if names is not None else f"{count:08d}.png"
            file = folder / restored(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                raise StreamError(f"two images are called {name!r}")
            image.save(file)
            count += 1
    return count


main = partial(run_command, DecompressConfig, run, verb="decompress", description=__doc__)
