"""Write a tokenizer as ONNX or torch.export files, which other programs run, and check them by running them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from tokenizer import Tokenizer

from ..config import Config, UserError, run_command
from ..exports import EXPORT, export_tokenizer
from ..exports.formats import FORMATS, Format
from ..exports.tracing import PARTS, ExportError
from ..files import Output, lock_output
from ..images import to_float
from ..images.decoding import open_image, pixels_of
from ..images.folder import find_images
from ..provenance import TokenizerFolder, read_with, tokenizer_folder

MOST = 32  # given images on which it is checked


class ExportConfig(Config):
    """Which tokenizer, and as what."""

    examples = (
        "tokenizer=runs/vqvae_digits/tokenizer out=digits_onnx",
        "tokenizer=runs/gpt_digits/pipeline format=torch images=photos out=digits_pt2",
    )
    often = "tokenizer out format images"

    tokenizer: TokenizerFolder = Field(
        description="folder of a tokenizer, a run or a pipeline, or a tokenizer's Hub id"
    )
    out: str = Field(description="the folder to write: encoder, decoder, and export.json, which describes them")
    format: Format = Field(
        "onnx", description="onnx (needs the extra `export`), or torch, which `torch.export.load` reads"
    )
    images: str | None = Field(
        None, description="an image or a folder of them, on which it is checked, beside images of noise"
    )


def run(config: ExportConfig) -> Path:
    """Write both files, run them, print what was compared, and return the folder. Raises `UserError` for a tokenizer
    that cannot be written so, or whose files give something else; nothing is left then."""
    inputs = [read_with(config.tokenizer), *([config.images] if config.images else [])]
    out = Output(config.out, inputs)
    out.check_folder(EXPORT)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder(config.tokenizer))
    images = given_images(config.images, tokenizer.image_shape) if config.images else None
    try:
        with lock_output(config.out), out.errors():
            compared = export_tokenizer(tokenizer, config.out, config.format, images)
    except ExportError as error:
        raise UserError(f"format: {config.format}: {error}; nothing was written") from error
    files = " and ".join(f"{part}{FORMATS[config.format].suffix}" for part in PARTS)
    same = f"all {compared.tokens:,} tokens are the same"
    if compared.close_calls:
        same = f"all but {compared.close_calls} of {compared.tokens:,} tokens are the same (close calls)"
    print(
        f"{config.out}: {files}; on {compared.images} images {same}, pixels differ by at most "
        f"{compared.pixel_difference:.1g} of 2"
    )
    return Path(config.out)


def given_images(source: str, shape: tuple[int, int, int]) -> Tensor:
    """Some of the images at `source` as `(B, C, H, W)` in [-1, 1], resized and cropped to the tokenizer's size. Raises
    `UserError` for none, and for one that cannot be read."""
    path = Path(source)
    if not path.exists():
        raise UserError(f"images: there is no file or folder {source}")
    paths = sorted(find_images(path))[:MOST] if path.is_dir() else [path]
    if not paths:
        raise UserError(f"images: there are no images in {source}")
    found = []
    for each in paths:
        try:
            found.append(to_float(torch.from_numpy(pixels_of(open_image(each), shape).copy())))
        except Exception as error:  # Pillow has many kinds
            raise UserError(f"images: {each}: {error}") from error
    return torch.stack(found)


main = partial(run_command, ExportConfig, run, verb="export", description=__doc__)
