"""Reconstruct held-out images with a tokenizer; draw them beside the originals, and measure quality."""

from __future__ import annotations

from functools import partial
from typing import Any

from pydantic import Field

from ..config import OutputConfig, run_command
from ..files import Output
from ..images.pictures import SUFFIXES, write_picture
from ..metrics.reconstruction import SOME, evaluate_reconstruction, reconstruction_picture
from ..options import UsesTokenizer
from ..provenance import find_protected_folder, tokenizer_defaults


class ReconstructConfig(UsesTokenizer, OutputConfig):
    """Which tokenizer, and which images."""

    examples = (
        "tokenizer=runs/vqvae_digits/tokenizer",
        "tokenizer=runs/vqvae_digits/tokenizer data.source=my-images num_images=8",
    )
    often = "tokenizer out overwrite data.source num_images device"

    out: str = Field("reconstructions.png", description="picture to write")
    num_images: int = Field(32, ge=1, le=1024, description="number of images in the picture")


def run(config: ReconstructConfig) -> dict[str, Any]:
    """Write the picture; print figures; return PSNR (dB), losses, codebook usage and perplexity of all held-out images,
    and SSIM of some."""
    out = Output(config.out, [find_protected_folder(config.tokenizer), config.data.path], config.overwrite)
    out.check_file(SUFFIXES)
    tokenizer, images = config.load_with_images()
    figures = evaluate_reconstruction(tokenizer, images, ssim_images=SOME)
    picture = reconstruction_picture(tokenizer, images, config.num_images)
    with out.file() as path:
        write_picture(picture, path)
    print(
        f"{config.out}: PSNR {figures['psnr']:.2f} dB over {len(images):,} held-out images, "
        f"SSIM {figures['ssim']:.3f}, {figures['codebook_usage']:.1%} of {tokenizer.grid.vocab_size} codes used"
    )
    return figures


main = partial(
    run_command, ReconstructConfig, run, verb="reconstruct", description=__doc__, defaults=tokenizer_defaults
)
