"""Look into a tokenizer: a one-page report of which codes it uses, what they stand for, and what it reconstructs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from tokenizer import Tokenizer

from ..config import Of, OutputConfig, choose_device, run_command
from ..files import Output
from ..images import DataConfig, ImageDataset, check_shape, load_images, to_uint8
from ..images.pictures import SUFFIXES, write_picture
from ..images.unseen import require_unseen
from ..metrics.charts import GREY, RED, Pixels, bars, charts_in_row, histogram
from ..metrics.codebook import HEIGHT, draw_distances, draw_usage, part_names
from ..metrics.inspection import Findings, examine
from ..metrics.pages import mosaic, page
from ..metrics.reconstruction import drafts
from ..metrics.texture import texture_line
from ..provenance import TokenizerFolder, data_of, read_with, tokenizer_defaults, tokenizer_folder, trained_data

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 1240  # pixels of the page's columns together
CODE_SIDE = 48  # pixels
EMPTY = 231  # grey: a code that has no place in any image
LISTED = 12  # so many ids are named in a line


class InspectConfig(OutputConfig):
    """Which tokenizer, looking at which images."""

    examples = ("tokenizer=runs/vqvae_digits/tokenizer",)
    often = "tokenizer out overwrite data.source num_images num_codes device"

    tokenizer: TokenizerFolder = Field(
        description="folder of a tokenizer, a run or a pipeline, or a tokenizer's Hub id"
    )
    out: str = Field("inspection.png", description="the report to write, a picture")
    data: Annotated[DataConfig, Of("tokenizer")] = Field(
        DataConfig(), description="the images; defaults to those the tokenizer was trained on"
    )
    num_images: int = Field(24, ge=3, le=96, description="reconstructions shown: a third each of best, middle, worst")
    num_codes: int = Field(256, ge=1, le=1024, description="codes shown, the most used ones and a few unused")
    device: str = Field("auto", description="cpu, cuda, mps or auto")


def report(tokenizer: Any, images: ImageDataset, found: Findings, num_images: int, source: str) -> Pixels:
    """The page."""
    exact = tokenizer.reversible
    charts: list[Any] = [
        partial(
            draw_usage,
            uses=found.uses.double().numpy(),
            names=found.names,
            useless=int((found.uses == 0).sum()),
            low=0.5,
            unit="times used",
            word=found.word,
        )
    ]
    if len(found.uses) > 1:
        charts.append(partial(draw_levels, names=found.names, levels=found.figures["levels"]))
    if found.distances:
        charts.append(partial(draw_distances, distances=found.distances))
    if not exact:
        title = "How well images come back"
        series = {"images": found.psnr.double().numpy()}
        charts.append(partial(histogram, title=title, series=series, label="PSNR in dB"))
    rows = [charts_in_row(charts, WIDTH, HEIGHT)]
    if found.alone is not None:
        rows.append(code_picture(found, found.alone))
    if not exact:
        rows += draft_picture(tokenizer, images, num_images)
        rows += example_pictures(tokenizer, images, found.psnr, num_images)
    lines = [f"{len(images):,} held-out images of {source}", *sentences(found, exact)]
    return page(headline(tokenizer), lines, rows)


def headline(tokenizer: Any) -> str:
    """What the tokenizer is, in a line."""
    quantizer = getattr(getattr(tokenizer, "quantizer", None), "name", "")
    kind = f"{tokenizer.name} with {quantizer}" if quantizer else tokenizer.name
    channels, height, width = tokenizer.image_shape
    levels, shape = tokenizer.levels, tokenizer.grid.shape
    sides = [shape[0] // levels, *shape[1:], *([levels] if levels > 1 else [])]
    grid = " + ".join(part_names(tokenizer)) if tokenizer.grid.scales else " x ".join(map(str, sides))
    return f"{kind}: images {channels} x {height} x {width}, tokens {grid}, {tokenizer.grid.vocab_size:,} codes"


def sentences(found: Findings, exact: bool) -> list[str]:
    """The findings in lines, printed and written on the page."""
    f, vocab = found.figures, found.uses.shape[1]
    what = "scale" if "scales" in f else "level"
    lines = [
        "every image comes back as it was"
        if exact
        else f"PSNR {f['psnr']:.2f} dB, from {f['psnr_worst']:.2f} (worst image) to {f['psnr_best']:.2f} (best)",
        f"{f['codebook_usage']:.1%} of {vocab:,} codes used, perplexity {f['codebook_perplexity']:.1f}",
    ]
    if not exact:
        lines.insert(1, f"SSIM {f['ssim']:.3f}, {texture_line(f)}")
    if len(found.uses) > 1:
        each = [f"{level['usage']:.1%} ({level['perplexity']:.1f})" for level in f["levels"]]
        lines.append(f"used (perplexity) at each {what}: {listed(each, f'{what}s')}")
    if "scales" in f:
        errors, shares = ([scale[name] for scale in f["scales"]] for name in ("psnr", "left"))
        lines.append(f"PSNR of the first scales alone: {listed([f'{error:.1f}' for error in errors])} dB")
        lines.append(f"latent variance left after each: {listed([f'{share:.0%}' for share in shares])}")
    if "prefixes" in f:
        counts, errors = ([prefix[name] for prefix in f["prefixes"]] for name in ("tokens", "psnr"))
        lines.append(f"PSNR of the first {listed(counts)} tokens: {listed([f'{error:.1f}' for error in errors])} dB")
    lacking = [(level, codes) for level, codes in enumerate(f["unused_codes"]) if codes]
    for level, codes in lacking[:LISTED]:
        where = f" of {found.names[level]}" if len(found.uses) > 1 else ""
        lines.append(f"{found.word} codes{where} ({len(codes):,}): {listed(codes)}")
    if len(lacking) > LISTED:
        lines.append(f"and {found.word} codes in {len(lacking) - LISTED} more {what}s")
    if lacking and found.word == "unused":
        lines.append(
            f"an unused code may be rare only: {float(found.uses.double().mean()):.1f} tokens for each code "
            "were looked at"
        )
    return lines


def listed(things: list[Any], what: str = "") -> str:
    """The first few of `things`, and how many more there are."""
    more = [f"and {len(things) - LISTED:,} more {what}".rstrip()] if len(things) > LISTED else []
    return " ".join([", ".join(map(str, things[:LISTED])), *more])


def draw_levels(axes: Axes, names: list[str], levels: list[dict[str, float]]) -> None:
    """The share of codes used at each level or scale, with the perplexity above."""
    what = "level" if names[0].startswith("level") else "scale"
    names = [name.removeprefix("level ") for name in names]
    values = {name: 100 * level["usage"] for name, level in zip(names, levels, strict=True)}
    texts = {name: f"{level['perplexity']:.0f}" for name, level in zip(names, levels, strict=True)}
    title = f"Codes used at each {what}, with perplexity"
    bars(axes, title, values, labels=(what, "% used"), texts=texts, top=100)


def code_picture(found: Findings, alone: Tensor) -> Pixels:
    """Codes one by one, `alone` (k, C, h, w), the most used first; ids of unused ones are red."""
    cells = []
    for n, tile in enumerate(alone):
        picture = fitted(tile, CODE_SIDE)
        below = [] if found.in_place is None else [np.full_like(picture, EMPTY)]
        if found.in_place is not None and bool(torch.isfinite(found.in_place[n]).all()):
            below = [fitted(found.in_place[n], CODE_SIDE)]
        cells.append(stacked([picture, *below]))
    level = f" of {found.names[0]}" if len(found.uses) > 1 else ""
    title = f"Codes{level}, decoded one by one, most used first"
    if len(found.shown) < found.uses.shape[1]:
        title += f" ({len(found.shown):,} of {found.uses.shape[1]:,})"
    about = "each alone, on all positions"
    if found.in_place is not None:
        about = f"above: {about}; below: what is decoded around its places in images, on average"
    colors = [GREY if used else RED for used in found.uses[0][found.shown].tolist()]
    columns = WIDTH // (max(CODE_SIDE, *(cell.shape[1] for cell in cells)) + 4)
    return mosaic(
        title, cells, [str(code) for code in found.shown.tolist()], columns, WIDTH, colors=colors, subtitle=about
    )


@torch.inference_mode()
def draft_picture(tokenizer: Any, images: ImageDataset, count: int) -> list[Pixels]:
    """Some images, each above its `drafts`; nothing where there are none."""
    decoders, columns = drafts(tokenizer), max(6, count // 3)
    if not decoders:
        return []
    originals = images.batch(np.linspace(0, len(images) - 1, min(columns, len(images))).astype(np.int64))
    tokens = tokenizer.encode(originals.to(tokenizer.device))
    versions = [originals, *(decode(tokens).cpu() for decode in decoders)]
    side = WIDTH // columns - 8
    cells = [stacked([fitted(image, side) for image in column]) for column in zip(*versions, strict=True)]
    counts = listed(list(tokenizer.prefixes))
    rows = "scales: original above, then one scale more in each row"
    if not tokenizer.grid.scales:
        rows = f"tokens: original above, then from {counts} in each row"
    title = f"Reconstructions from the first {rows}"
    return [mosaic(title, cells, [""] * len(cells), columns, WIDTH)]


@torch.inference_mode()
def example_pictures(tokenizer: Any, images: ImageDataset, decibels: Tensor, count: int) -> list[Pixels]:
    """The best, middle and worst of the images, each above its reconstruction and its PSNR."""
    order, third = decibels.argsort(descending=True).tolist(), max(1, min(count, len(decibels)) // 3)
    start = (len(order) - third) // 2
    groups = {"Best": order[:third], "Middle": order[start : start + third], "Worst": order[: -third - 1 : -1]}
    groups = {"All": order} if len(order) < 3 else groups
    columns, rows = max(6, count // 3), []
    side = WIDTH // columns - 8
    for name, chosen in groups.items():
        originals = images.batch(chosen)
        decoded = tokenizer.decode(tokenizer.encode(originals.to(tokenizer.device))).cpu()
        pairs = [stacked([fitted(a, side), fitted(b, side)]) for a, b in zip(originals, decoded, strict=True)]
        captions = [f"{decibels[index]:.1f} dB" for index in chosen]
        title = f"{name} reconstructions: original above, PSNR below"
        rows.append(mosaic(title, pairs, captions, columns, WIDTH))
    return rows


def fitted(image: Tensor, side: int) -> Pixels:
    """`image` (C, H, W) in [-1, 1] as a picture that fits a square; small ones repeat their pixels."""
    pixels = to_uint8(image).movedim(0, -1).numpy()
    pixels = np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels
    longest = max(pixels.shape[:2])
    if longest <= side:
        times = side // longest
        return pixels.repeat(times, 0).repeat(times, 1)
    height, width = (max(1, round(length * side / longest)) for length in pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))


def stacked(pictures: list[Pixels]) -> Pixels:
    """Pictures one above the other, two pixels apart."""
    width = max(picture.shape[1] for picture in pictures)
    padded = [
        np.pad(picture, ((0, 2), (0, width - picture.shape[1]), (0, 0)), constant_values=255) for picture in pictures
    ]
    return np.concatenate(padded)[:-2]


def run(config: InspectConfig) -> dict[str, Any]:
    """Write the report; print the findings and return them: see `figures_of`, `l1`, `l2`, `look_figures`."""
    out = Output(config.out, [read_with(config.tokenizer), config.data.path], config.overwrite)
    out.check_file(SUFFIXES)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder(config.tokenizer), device=choose_device(config.device))
    check_shape(config.data, tokenizer.image_shape, "tokenizer")
    require_unseen(config.data, trained_data({"data": data_of(config.tokenizer)}), "held_out")
    images = load_images(config.data).held_out
    found = examine(tokenizer, images, config.num_codes)
    picture = report(tokenizer, images, found, config.num_images, config.data.source)
    with out.file() as path:
        write_picture(picture, path)
    print(f"{config.out}: {len(images):,} held-out images", *sentences(found, tokenizer.reversible), sep="\n  ")
    return found.figures


main = partial(run_command, InspectConfig, run, verb="inspect", description=__doc__, defaults=tokenizer_defaults)
