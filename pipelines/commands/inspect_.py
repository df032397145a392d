"""Inspect a tokenizer: write a one-page report of codebook usage, patches of codes, and reconstructions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenizer.base import codebook_usage
from tokenizer.losses import psnr
from tokenizer.quantizers.price import count_tokens
from tokenizer.spec import ImageSpec

from ..config import OutputConfig, run_command
from ..files import Output
from ..images import ImageDataset
from ..images.grids import class_grid
from ..images.pictures import PICTURE_SUFFIXES, write_picture
from ..metrics.charts import Chart, Pixels, draw_histogram, draw_usage, page
from ..metrics.codebook import part_names
from ..metrics.reconstruction import images_at_a_time, list_prefix_decoders, reconstruction_picture
from ..options import UsesTokenizer
from ..provenance import find_protected_folder, tokenizer_defaults
from ..shuffling import spread_rows

WIDTH = 1200  # maximum width of a row of pictures, in pixels, unless a single one is wider


class InspectConfig(UsesTokenizer, OutputConfig):
    examples = ("tokenizer=runs/vqvae_digits/tokenizer",)
    often = "tokenizer out overwrite data.source num_images num_codes device"

    out: str = Field("inspection.png", description="report to write, a picture")
    num_images: int = Field(24, ge=1, le=96, description="number of reconstructions, evenly spread from best to worst")
    num_codes: int = Field(256, ge=1, le=1024, description="number of codes to draw, most used first")


def run(config: InspectConfig) -> dict[str, Any]:
    """Write the report, and print and return its figures."""
    out = Output(config.out, [find_protected_folder(config.tokenizer), config.data.path], config.overwrite)
    out.check_file(PICTURE_SUFFIXES)
    tokenizer, images = config.load_with_images()
    uses, errors = examine(tokenizer, images)
    figures = compute_figures(uses, errors)
    lines = describe_tokenizer(tokenizer, figures)
    lines.append(f"measured on {len(images):,} held-out images of {config.data.source}")
    picture = draw_page(tokenizer, images, uses, errors, lines, config)
    with out.file() as path:
        write_picture(picture, path)
    print(config.out, *lines, sep="\n  ")
    return figures


@torch.inference_mode()
def examine(tokenizer: Any, images: ImageDataset) -> tuple[Tensor, Tensor]:
    """Count each code in each level or scale, `(parts, V)`, and measure the PSNR of each image in dB, `(n,)`."""
    counts, errors = [], []
    for part in torch.arange(len(images)).split(images_at_a_time(tokenizer.spec)):
        batch = images.batch(part).to(tokenizer.device)
        tokens = tokenizer.encode(batch)
        counts.append(count_tokens(tokens, tokenizer.parts, tokenizer.grid.vocab_size).cpu())
        errors.append(psnr(tokenizer.decode(tokens), batch).cpu())
    return torch.stack(counts).sum(0), torch.cat(errors)


def compute_figures(uses: Tensor, errors: Tensor) -> dict[str, Any]:
    """Return PSNR in dB, and usage and perplexity of the codebook, overall and per level or scale."""
    every, *levels = (
        {name: float(value) for name, value in codebook_usage(counts).items()} for counts in (uses.sum(0), *uses)
    )
    return {
        "psnr": float(errors.double().mean()),
        "psnr_worst": float(errors.min()),
        "psnr_best": float(errors.max()),
        **{f"codebook_{name}": value for name, value in every.items()},
        "levels": levels,
    }


def describe_tokenizer(tokenizer: Any, f: dict[str, Any]) -> list[str]:
    """Describe the tokenizer and its figures in lines of text."""
    image, grid = (" x ".join(map(str, shape)) for shape in (tokenizer.image_shape, tokenizer.grid.shape))
    error = f"PSNR {f['psnr']:.2f} dB, from {f['psnr_worst']:.2f} (worst image) to {f['psnr_best']:.2f} (best)"
    lines = [
        f"{tokenizer.name}: images of {image}, {grid} tokens of {tokenizer.grid.vocab_size:,} codes",
        "lossless: every image is reconstructed exactly" if tokenizer.reversible else error,
        f"{f['codebook_usage']:.1%} of the codes used, perplexity {f['codebook_perplexity']:.1f}",
    ]
    if len(names := part_names(tokenizer)) > 1:
        each = (f"{name}: {level['usage']:.1%}" for name, level in zip(names, f["levels"], strict=True))
        lines.append(f"codes used, {', '.join(each)}")
    return lines


@torch.inference_mode()
def draw_page(
    tokenizer: Any, images: ImageDataset, uses: Tensor, errors: Tensor, lines: list[str], config: InspectConfig
) -> Pixels:
    """Draw the page: charts, codes, and reconstructions from best to worst."""
    names, pictures = part_names(tokenizer), dict[str, Pixels]()
    charts: list[Chart] = [partial(draw_usage, uses=uses.double().numpy(), names=names, label="uses")]
    if (tokenizer.placed or tokenizer.grid.scales) and not tokenizer.grid.channels:
        some = images.batch(spread_rows(len(images), images_at_a_time(tokenizer.spec))).to(tokenizer.device)
        codes, patches = mean_patches(tokenizer, some, config.num_codes)
        title = f"The {len(codes):,} most used codes: mean reconstruction around them"
        pictures[title] = arrange_tiles(patches, [str(code) for code in codes], 20, tokenizer.spec)
    if not tokenizer.reversible:
        charts.append(partial(draw_histogram, values=errors.double().numpy(), title="Images", label="PSNR in dB"))
        if list_prefix_decoders(tokenizer):
            title = "Originals, and reconstructions from an increasing number of tokens"
            pictures[title] = reconstruction_picture(tokenizer, images, min(16, config.num_images))
        chosen = errors.argsort(descending=True)[spread_rows(len(errors), config.num_images)]
        originals = images.batch(chosen).to(tokenizer.device)
        decoded = tokenizer.decode(tokenizer.encode(originals))
        pairs = torch.cat([originals, F.pad(decoded, (0, 0, 1, 0), value=1.0)], dim=-2).cpu()
        captions = [f"{error:.1f} dB" for error in errors[chosen].tolist()]
        title = "Reconstructions below their originals, from best to worst"
        pictures[title] = arrange_tiles(pairs, captions, 8, tokenizer.spec)
    return page(lines, charts, pictures)


def mean_patches(tokenizer: Any, images: Tensor, count: int) -> tuple[list[int], Tensor]:
    """Return the most frequent codes of the first level, or of the finest scale, in `images` `(B, *spec.shape)`, and
    the mean reconstruction around each: three by three patches `(k, C, 3h, 3w)`."""
    shape, part = (tokenizer.grid.scales or [tokenizer.grid.shape])[-1], -1 if tokenizer.grid.scales else 0
    tokens = tokenizer.encode(images)
    decoded = tokenizer.decode(tokens).cpu().flatten(0, -4)
    h, w = images.shape[-2] * tokenizer.levels // shape[-2], images.shape[-1] // shape[-1]
    around = F.unfold(F.pad(decoded, (w, w, h, h), mode="replicate"), (3 * h, 3 * w), stride=(h, w)).mT.flatten(0, 1)
    ids = tokens.flatten(1).split(tokenizer.parts, 1)[part].flatten().cpu()
    used, counts = ids.unique(return_counts=True)
    codes = used[counts.argsort(descending=True, stable=True)][:count].tolist()
    means = torch.stack([around[ids == code].mean(0) for code in codes])
    return codes, means.view(len(codes), -1, 3 * h, 3 * w)


def arrange_tiles(images: Tensor, captions: list[str], columns: int, spec: ImageSpec) -> Pixels:
    """Arrange images `(n, ..., C, H, W)` in [-1, 1] in rows with captions; small images are enlarged."""
    scale, pixels = max(1, WIDTH // columns // images.shape[-1]), spec.picture(images)
    pixels = pixels.repeat(scale, -3).repeat(scale, -2)
    return class_grid(pixels, captions, max(1, min(columns, WIDTH // pixels.shape[-2])))


main = partial(run_command, InspectConfig, run, verb="inspect", description=__doc__, defaults=tokenizer_defaults)
