"""Reconstruct held-out images with a tokenizer; draw them beside the originals, and measure quality.

With tile=true, images keep their size, and overlapping tiles are blended. A stride of a whole tile leaves seams.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenizer import Tokenizer
from tokenizer.base import codebook_usage
from tokenizer.losses import pixel_losses, psnr
from tokenizer.spec import to_float

from ..anomaly.sheets import draw_rows, factor_of
from ..config import OutputConfig, run_command, user_errors
from ..files import Output
from ..images import ImageDataset
from ..images.pictures import PICTURE_SUFFIXES, write_picture
from ..images.views import View, decode_large, encode_large, read_large
from ..metrics.reconstruction import SOME, evaluate_reconstruction, reconstruction_picture
from ..options import TileSettings, UsesTokenizer
from ..provenance import find_protected_folder, tokenizer_defaults
from ..shuffling import spread_rows

BATCH = 256  # tiles that are reconstructed at a time


class ReconstructConfig(UsesTokenizer, TileSettings, OutputConfig):
    examples = (
        "tokenizer=runs/vqvae_digits/tokenizer",
        "tokenizer=runs/vqvae_digits/tokenizer data.source=my-images num_images=8",
    )
    often = "tokenizer out overwrite data.source num_images tile stride device"

    out: str = Field("reconstructions.png", description="picture to write")
    num_images: int = Field(32, ge=1, le=1024, description="number of images in the picture")


def run(config: ReconstructConfig) -> dict[str, Any]:
    """Write the picture; print figures; return PSNR (dB), losses, codebook usage and perplexity of all held-out images,
    and SSIM of some images unless they are cut into tiles."""
    out = Output(config.out, [find_protected_folder(config.tokenizer), config.data.path], config.overwrite)
    out.check_file(PICTURE_SUFFIXES)
    tokenizer, images = config.load_with_images(whole=config.tile)
    view = config.choose_view(tokenizer.spec)
    if not view.is_tiled:
        figures = evaluate_reconstruction(tokenizer, images, ssim_images=SOME)
        picture = reconstruction_picture(tokenizer, images, config.num_images)
    else:
        figures, picture = reconstruct_tiled(tokenizer, images, view, config.num_images)
    with out.file() as path:
        write_picture(picture, path)
    similarity = f"SSIM {figures['ssim']:.3f}, " if "ssim" in figures else ""
    print(
        f"{config.out}: PSNR {figures['psnr']:.2f} dB over {len(images):,} held-out images, "
        f"{similarity}{figures['codebook_usage']:.1%} of {tokenizer.grid.vocab_size} codes used"
    )
    return figures


@torch.inference_mode()
def reconstruct_tiled(
    tokenizer: Tokenizer, images: ImageDataset, view: View, count: int
) -> tuple[dict[str, Any], np.ndarray]:
    """Reconstruct images by their tiles, one after another. Return figures, and a picture of `count` evenly spread
    images beside their reconstructions, reduced to at most 512 pixels a side. Raises `UserError` for an image that is
    smaller than a tile."""
    several, chosen = images.whole_images(np.arange(len(images))), set(spread_rows(len(images), count).tolist())
    ids, sums = torch.zeros(tokenizer.grid.vocab_size, dtype=torch.long), Counter[str]()
    rows, names = list[list[Tensor]](), list[list[str]]()
    for number in range(len(several)):
        with user_errors(ValueError, prefix="data: "):
            image = to_float(read_large(several, number, view))
        tokens = encode_large(tokenizer, image, view, BATCH)
        ids += torch.bincount(tokens.flatten().cpu(), minlength=len(ids))
        decoded = decode_large(tokenizer, tokens, image.shape[-2:], view, BATCH).cpu()
        found = {"psnr": psnr(decoded[None], image[None]).mean(), **pixel_losses(decoded, image)}
        sums.update({name: float(value) for name, value in found.items()})
        if number in chosen:
            pair = tokenizer.spec.select_shown(torch.stack([image, decoded]))
            rows.append(list(F.avg_pool2d(pair, factor_of(image.shape[1:]), ceil_mode=True)))
            names.append([Path(several.names[number]).name, "reconstruction"])
    figures: dict[str, Any] = {name: total / len(several) for name, total in sums.items()}
    figures |= {f"codebook_{name}": float(value) for name, value in codebook_usage(ids).items()}
    return figures, draw_rows(rows, names)


main = partial(
    run_command, ReconstructConfig, run, verb="reconstruct", description=__doc__, defaults=tokenizer_defaults
)
