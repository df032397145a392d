"""Decompress a file written by `smalti compress` into a folder of images or clips.

The tokens, and the pixels of a lossless file, are exactly those that were compressed; otherwise the command fails.
Pixels of other files are decoded from the tokens and may differ by one grey level between machines. Images become PNG
files, clips GIF files; lossless clips in colour become `.npy` files (T, H, W, C), because GIF has only 256 colours.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path

from pydantic import Field

from prior.given import Given
from tokenizer.files import atomic_folder

from ..compression.coding import decode_stream, restored_suffix
from ..compression.container import Header, StreamError, read_stream
from ..condition_keys import UsesCondition
from ..config import UserError, run_command, user_errors
from ..config.table import count_of
from ..files import Output, lock_output
from ..image_pipeline import ImagePipeline
from ..images.animations import gif_bytes
from ..images.folder import ARRAY_SUFFIXES, IMAGE_SUFFIXES, suffix_of
from ..images.pictures import npy_bytes, png_bytes
from ..options import UsesPipeline, require_pictures

ENCODERS = {".png": png_bytes, ".gif": gif_bytes, ".npy": npy_bytes}


class DecompressConfig(UsesCondition, UsesPipeline):
    examples = ("pipeline=runs/gpt_digits/pipeline stream=my-images.smalti out=my-images-again",)

    stream: str = Field(description="file that `smalti compress` wrote with the same pipeline")
    out: str = Field("decompressed", description="new or empty folder for the files; on errors nothing is written")
    batch_size: int | None = Field(None, ge=1, description="images decoded at a time; default: a whole chunk")


def run(config: DecompressConfig) -> Path:
    """Decompress the file and return the folder."""
    path = Path(config.stream)
    out = Output(config.out, [path, config.pipeline])
    out.check_folder(None)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"stream: {path}: {error.strerror}") from error
    pipeline = config.load_pipeline()
    require_pictures(pipeline.spec, "decompress")
    with (
        user_errors(StreamError, prefix=f"stream: {path}: "),
        lock_output(config.out),
        out.errors(),
        atomic_folder(config.out, kind=None) as folder,
    ):
        header, _ = read_stream(data)
        suffix = restored_suffix(pipeline, header.lossless)
        given = read_condition_of(config, pipeline, header, suffix)
        header, parts = decode_stream(pipeline, data, condition=given, batch_size=config.batch_size)
        names = iter(header.names or [f"{number:08d}{suffix}" for number in range(header.images)])
        for images in parts:
            for image in pipeline.convert_images(images, "np"):
                file = folder / next(names)
                file.parent.mkdir(parents=True, exist_ok=True)
                with open(file, "xb") as stream:  # "x": where case does not count, never overwrite another image
                    stream.write(ENCODERS[suffix](image))
    print(f"{config.out}: {count_of(header.images, pipeline.spec.noun)}")
    return out.path


def read_condition_of(config: DecompressConfig, pipeline: ImagePipeline, header: Header, suffix: str) -> Given:
    """Read the condition of the images. A table has the names of the files that were compressed: of clips, perhaps
    those of folders, or of longer clips, whose windows are numbered. Raises `UserError`."""
    names = [name_compressed(name, suffix) for name in header.names] or None
    try:
        return config.read_condition(pipeline, header.images, names).given
    except UserError:
        if config.conditions is None or names is None or suffix == ".png":
            raise
    files = [name.removesuffix(suffix) for name in header.names]
    clips = [re.sub(r"_\d{5}$", "", file) for file in files]
    windows = Counter(clips)
    clips = [clip if windows[clip] > 1 else file for clip, file in zip(clips, files, strict=True)]
    return config.read_condition(pipeline, header.images, clips).given


def name_compressed(name: str, suffix: str) -> str:
    """Return the name of the file that was compressed, of which the restored one may have one more suffix."""
    short = name.removesuffix(suffix)
    return short if suffix_of(short) in {*IMAGE_SUFFIXES, *ARRAY_SUFFIXES} else name


main = partial(run_command, DecompressConfig, run, verb="decompress", description=__doc__)
