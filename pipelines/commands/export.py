"""Export a tokenizer to ONNX or torch.export files for other programs, and check their results."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pydantic import Field

from tokenizer import Tokenizer
from tokenizer.spec import to_float

from ..config import Config, run_command, user_errors
from ..exports import EXPORT, EXPORT_SUFFIXES, ExportError, Format, export_tokenizer
from ..files import Output, lock_output
from ..options import open_files, read_files, require_pictures
from ..provenance import TokenizerFolder, find_protected_folder, tokenizer_folder

MOST = 32  # images used for the check


class ExportConfig(Config):
    examples = (
        "tokenizer=runs/vqvae_digits/tokenizer out=digits_onnx",
        "tokenizer=runs/gpt_digits/pipeline format=torch images=photos out=digits_pt2",
    )
    often = "tokenizer out format images"

    tokenizer: TokenizerFolder = Field(
        description="folder of a tokenizer, a run or a pipeline, or a tokenizer's Hub id"
    )
    out: str = Field(description="folder to write: encoder, decoder, and export.json, which describes them")
    format: Format = Field("onnx", description="onnx (with the extra `export`) or torch, which torch.export.load reads")
    images: str | None = Field(None, description="image or folder of images for the check, besides noise")


def run(config: ExportConfig) -> Path:
    """Write both files, run them, print the comparison, and return the folder. Raises `UserError`, and writes nothing,
    for a tokenizer that cannot be exported or whose files return other results."""
    out = Output(config.out, [find_protected_folder(config.tokenizer), *([config.images] if config.images else [])])
    out.check_folder(EXPORT)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder(config.tokenizer))
    images = None
    if config.images:
        require_pictures(tokenizer.spec, "images")
        source = open_files([config.images], tokenizer.spec, MOST)
        images = to_float(read_files(source, range(source.size), tokenizer.spec))
    with user_errors(ExportError, prefix=f"format: {config.format}: "), lock_output(config.out), out.errors():
        compared = export_tokenizer(tokenizer, config.out, config.format, images)
    same = f"all {compared.tokens:,} tokens agree"
    if compared.close_calls:
        same = f"all but {compared.close_calls} of {compared.tokens:,} tokens agree (rounding ties)"
    suffix = EXPORT_SUFFIXES[config.format]
    print(
        f"{config.out}: encoder{suffix} and decoder{suffix}; on {compared.images} images {same}, and pixels differ by "
        f"at most {compared.pixel_difference:.1g} of 2"
    )
    return Path(config.out)


main = partial(run_command, ExportConfig, run, verb="export", description=__doc__)
