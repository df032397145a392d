"""Look into a tokenizer: a one-page report of which codes it uses, what they draw, and what it reconstructs."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tokenizer import Tokenizer
from tokenizer.base import codebook_usage
from tokenizer.losses import psnr

from ..config import OutputConfig, choose_device, run_command
from ..files import Output
from ..images import ImageDataset, check_shape, load_images, to_uint8
from ..images.grids import class_grid
from ..images.pictures import SUFFIXES, write_picture
from ..images.unseen import require_unseen
from ..metrics.charts import Chart, Pixels, draw_histogram, draw_usage, page
from ..metrics.codebook import code_distances, count_tokens, draw_distances, part_names
from ..metrics.reconstruction import drafts, images_at_a_time, reconstruction_picture
from ..options import UsesTokenizer
from ..provenance import data_of, read_with, tokenizer_defaults, tokenizer_folder, trained_data
from ..shuffling import spread

WIDTH = 1200  # pixels of a row of pictures at most, if a single one is not wider
LISTED = 12  # ids or levels in a line


class InspectConfig(UsesTokenizer, OutputConfig):
    """Which tokenizer, on which images."""

    examples = ("tokenizer=runs/vqvae_digits/tokenizer",)
    often = "tokenizer out overwrite data.source num_images num_codes device"

    out: str = Field("inspection.png", description="the report to write, a picture")
    num_images: int = Field(24, ge=3, le=96, description="reconstructions drawn: a third each of best, middle, worst")
    num_codes: int = Field(256, ge=1, le=1024, description="codes drawn, the most used ones")


class Findings(NamedTuple):
    """uses: of each code in each level or scale, `(parts, V)`. psnr: dB of each image, `(n,)`. drafts: the mean PSNR of
    the first tokens alone, of more and more of them, for tokenizers that decode these."""

    uses: Tensor
    psnr: Tensor
    drafts: list[float]


def run(config: InspectConfig) -> dict[str, Any]:
    """Write the report, print its figures and return them."""
    out = Output(config.out, [read_with(config.tokenizer), config.data.path], config.overwrite)
    out.check_file(SUFFIXES)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder(config.tokenizer), device=choose_device(config.device))
    check_shape(config.data, tokenizer.image_shape, "tokenizer")
    require_unseen(config.data, trained_data({"data": data_of(config.tokenizer)}), "held_out")
    images = load_images(config.data).held_out
    found = examine(tokenizer, images)
    figures = figures_of(found)
    lines = [f"{len(images):,} held-out images of {config.data.source}", *sentences(tokenizer, figures)]
    picture = draw_page(tokenizer, images, found, lines, config)
    with out.file() as path:
        write_picture(picture, path)
    print(config.out, *lines, sep="\n  ")
    return figures


@torch.inference_mode()
def examine(tokenizer: Any, images: ImageDataset) -> Findings:
    """Encode and decode all images."""
    counts, errors, draft_errors = [], [], []
    for part in torch.arange(len(images)).split(images_at_a_time(tokenizer.image_shape)):
        batch = images.batch(part).to(tokenizer.device)
        tokens = tokenizer.encode(batch)
        counts.append(count_tokens(tokens, tokenizer.parts, tokenizer.grid.vocab_size).cpu())
        errors.append(psnr(tokenizer.decode(tokens), batch).cpu())
        draft_errors.append([psnr(decode(tokens), batch).double().sum().item() for decode in drafts(tokenizer)])
    of_drafts = [sum(column) / len(images) for column in zip(*draft_errors, strict=True)]
    return Findings(torch.stack(counts).sum(0), torch.cat(errors), of_drafts)


# Figures


def figures_of(found: Findings) -> dict[str, Any]:
    """JSON values: PSNR in dB of images, and of their first tokens alone; usage and perplexity of all ids together and
    of each level or scale, with its unused ids."""

    def usage(counts: Tensor) -> dict[str, float]:
        return {name: float(value) for name, value in codebook_usage(counts).items()}

    return {
        "psnr": float(found.psnr.double().mean()),
        "psnr_worst": float(found.psnr.min()),
        "psnr_best": float(found.psnr.max()),
        **{f"codebook_{name}": value for name, value in usage(found.uses.sum(0)).items()},
        "levels": [usage(level) for level in found.uses],
        "unused_codes": [(level == 0).nonzero().flatten().tolist() for level in found.uses],
        "drafts": found.drafts,
    }


def sentences(tokenizer: Any, figures: dict[str, Any]) -> list[str]:
    """The figures in lines, printed and written on the page."""
    f, names = figures, part_names(tokenizer)
    lines = [f"PSNR {f['psnr']:.2f} dB, from {f['psnr_worst']:.2f} (worst image) to {f['psnr_best']:.2f} (best)"]
    if tokenizer.reversible:
        lines = ["lossless: every image is reconstructed exactly"]
    if f["drafts"]:
        of = "scales" if tokenizer.grid.scales else f"{listed(list(tokenizer.prefixes))} tokens"
        lines.append(f"PSNR of the first {of} alone: {listed([f'{error:.1f}' for error in f['drafts']])} dB")
    lines.append(
        f"{f['codebook_usage']:.1%} of {tokenizer.grid.vocab_size:,} codes used, "
        f"perplexity {f['codebook_perplexity']:.1f}"
    )
    if len(names) > 1:
        each = [f"{n}: {one['usage']:.1%} ({one['perplexity']:.1f})" for n, one in zip(names, f["levels"], strict=True)]
        lines.append(f"used (perplexity) at {listed(each)}")
    for name, codes in [pair for pair in zip(names, f["unused_codes"], strict=True) if pair[1]][:LISTED]:
        where = f" of {name}" if len(names) > 1 else ""
        lines.append(f"{len(codes):,} codes{where} not used in these images: {listed(codes)}")
    return lines


def headline(tokenizer: Any) -> str:
    """The tokenizer's kind and sizes in a line."""
    quantizer = getattr(getattr(tokenizer, "quantizer", None), "name", "")
    kind = f"{tokenizer.name} with {quantizer}" if quantizer else tokenizer.name
    image, grid = (" x ".join(map(str, shape)) for shape in (tokenizer.image_shape, tokenizer.grid.shape))
    return f"{kind}: images of {image}, {grid} tokens of {tokenizer.grid.vocab_size:,} codes"


def listed(things: list[Any]) -> str:
    """The first few of `things`, and how many more there are."""
    more = f" and {len(things) - LISTED:,} more" if len(things) > LISTED else ""
    return ", ".join(map(str, things[:LISTED])) + more


# The page


@torch.inference_mode()
def draw_page(tokenizer: Any, images: ImageDataset, found: Findings, lines: list[str], config: InspectConfig) -> Pixels:
    """Draw charts, codes, and the best, middle and worst reconstructions."""
    some = images.batch(spread(len(images), images_at_a_time(tokenizer.image_shape))).to(tokenizer.device)
    charts: list[Chart] = [
        partial(draw_usage, uses=found.uses.double().numpy(), names=part_names(tokenizer), label="uses")
    ]
    pictures: dict[str, Pixels] = {}
    if distances := code_distances(tokenizer, some):
        charts.append(partial(draw_distances, distances=distances))
    if (tokenizer.placed or tokenizer.grid.scales) and not tokenizer.grid.channels:
        codes, patches = mean_patches(tokenizer, some, config.num_codes)
        title = (
            f"Most used codes ({len(codes):,} of {tokenizer.grid.vocab_size:,}): what is decoded around their places"
        )
        pictures[title + ", on average"] = tiles(patches, [str(code) for code in codes], 20)
    if not tokenizer.reversible:
        errors = {"images": found.psnr.double().numpy()}
        charts.append(partial(draw_histogram, title="Reconstructions", series=errors, label="PSNR in dB"))
        if found.drafts:
            drawn = reconstruction_picture(tokenizer, images, min(16, config.num_images))
            pictures["Originals, and reconstructions from more and more of their tokens"] = drawn
        order, third = found.psnr.argsort(descending=True), -(-min(config.num_images, len(images)) // 3)
        first = (len(order) - third) // 2
        groups = {"Best": order[:third], "Middle": order[first : first + third], "Worst": order.flip(0)[:third]}
        for name, chosen in groups.items():
            originals = images.batch(chosen).to(tokenizer.device)
            decoded = tokenizer.decode(tokenizer.encode(originals))
            pairs = torch.cat([originals, F.pad(decoded, (0, 0, 1, 0), value=1.0)], dim=2).cpu()
            captions = [f"{error:.1f} dB" for error in found.psnr[chosen].tolist()]
            pictures[f"{name} reconstructions, below their originals"] = tiles(pairs, captions, max(6, third))
    return page([headline(tokenizer), *lines], charts, pictures)


def mean_patches(tokenizer: Any, images: Tensor, count: int) -> tuple[list[int], Tensor]:
    """The codes of the first level, or of the finest scale, that `images` (B, C, H, W) have most often, and the mean
    reconstruction around the places of each: three by three patches `(k, C, 3h, 3w)`."""
    shape, part = (tokenizer.grid.scales or [tokenizer.grid.shape])[-1], -1 if tokenizer.grid.scales else 0
    tokens = tokenizer.encode(images)
    decoded = tokenizer.decode(tokens).cpu()
    h, w = images.shape[2] * tokenizer.levels // shape[0], images.shape[3] // shape[1]
    around = F.unfold(F.pad(decoded, (w, w, h, h), mode="replicate"), (3 * h, 3 * w), stride=(h, w)).mT.flatten(0, 1)
    ids = tokens.flatten(1).split(tokenizer.parts, 1)[part].flatten().cpu()
    used, counts = ids.unique(return_counts=True)
    codes = used[counts.argsort(descending=True, stable=True)][:count].tolist()
    means = torch.stack([around[ids == code].mean(0) for code in codes])
    return codes, means.view(len(codes), -1, 3 * h, 3 * w)


def tiles(images: Tensor, captions: list[str], columns: int) -> Pixels:
    """Images `(n, C, H, W)` in [-1, 1] in rows below captions; small ones are enlarged, rows of large ones shorter."""
    scale, pixels = max(1, WIDTH // columns // images.shape[3]), to_uint8(images)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    return class_grid(pixels.movedim(1, -1).numpy(), captions, max(1, min(columns, WIDTH // pixels.shape[3])))


main = partial(run_command, InspectConfig, run, verb="inspect", description=__doc__, defaults=tokenizer_defaults)
