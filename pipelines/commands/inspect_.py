"""Look into a tokenizer: a one-page report of which codes it uses, what they stand for, and what it reconstructs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from tokenizer import Tokenizer

from ..config import Config, UserError, choose_device, run_command
from ..config.outputs import check_out_file
from ..images import DataConfig, ImageDataset, check_shape, load_images, to_uint8
from ..images.pictures import SUFFIXES, save_picture
from ..metrics.charts import FAINT, GREY, RED, WHITE, Panel, Picture, bars, histogram, mosaic, page
from ..metrics.codebook import distance_panel, usage_panel
from ..metrics.inspection import Findings, examine
from ..stages.provenance import tokenizer_folder
from .reconstruct import defaults

WIDTH, HEIGHT = 1240, 270  # of the page's columns together, and of a chart, in pixels
CODE_SIDE = 48  # pixels
LISTED = 12  # so many ids are named in a line


class InspectConfig(Config):
    """Which tokenizer, looking at which images."""

    tokenizer: str = Field(description="folder of a tokenizer or of a pipeline, or a tokenizer's Hub id")
    out: str = Field("inspection.png", description="the report to write, a picture")
    data: DataConfig = Field(DataConfig(), description="the images; defaults to those the tokenizer was trained on")
    num_images: int = Field(24, ge=3, le=96, description="reconstructions shown: a third each of best, middle, worst")
    num_codes: int = Field(256, ge=1, le=1024, description="codes shown, the most used ones and a few unused")
    device: str = Field("auto", description="cpu, cuda, mps or auto")


def report(tokenizer: Any, images: ImageDataset, found: Findings, num_images: int, source: str) -> np.ndarray:
    """The page, uint8 (H, W, 3)."""
    exact = tokenizer.reversible
    charts: list[Any] = [
        partial(
            usage_panel,
            found.uses.double().numpy(),
            int((found.uses == 0).sum()),
            low=0.5,
            unit="times used",
            word=found.word,
        )
    ]
    if len(found.uses) > 1:
        charts.append(partial(level_panel, found.figures["levels"]))
    if found.distances:
        charts.append(partial(distance_panel, found.distances))
    if not exact:
        title = "How well images come back"
        charts.append(partial(histogram, title, {"images": found.psnr.double().numpy()}, label="PSNR in dB"))
    width = (WIDTH - 20 * (len(charts) - 1)) // len(charts)
    rows: list[list[Picture]] = [[chart((width, HEIGHT)).image for chart in charts], [code_picture(found)]]
    rows += [] if exact else [[row] for row in example_pictures(tokenizer, images, found.psnr, num_images)]
    lines = [f"{len(images):,} held-out images of {source}", *sentences(found, exact)]
    return page(headline(tokenizer), lines, rows)


def headline(tokenizer: Any) -> str:
    """What the tokenizer is, in a line."""
    quantizer = getattr(getattr(tokenizer, "quantizer", None), "name", "")
    kind = f"{tokenizer.name} with {quantizer}" if quantizer else tokenizer.name
    channels, height, width = tokenizer.image_shape
    levels, shape = tokenizer.levels, tokenizer.grid.shape
    sides = [shape[0] // levels, *shape[1:], *([levels] if levels > 1 else [])]
    grid = " x ".join(map(str, sides))
    return f"{kind}: images {channels} x {height} x {width}, tokens {grid}, {tokenizer.grid.vocab_size:,} codes"


def sentences(found: Findings, exact: bool) -> list[str]:
    """The findings in lines, printed and written on the page."""
    f, vocab = found.figures, found.uses.shape[1]
    lines = [
        "every image comes back as it was"
        if exact
        else f"PSNR {f['psnr']:.2f} dB, from {f['psnr_worst']:.2f} (worst image) to {f['psnr_best']:.2f} (best)",
        f"{f['codebook_usage']:.1%} of {vocab:,} codes used, perplexity {f['codebook_perplexity']:.1f}",
    ]
    if len(found.uses) > 1:
        each = [f"{level['usage']:.1%} ({level['perplexity']:.1f})" for level in f["levels"]]
        lines.append(f"used (perplexity) at each level: {listed(each, 'levels')}")
    lacking = [(level, codes) for level, codes in enumerate(f["unused_codes"], 1) if codes]
    for level, codes in lacking[:LISTED]:
        where = f" of level {level}" if len(found.uses) > 1 else ""
        lines.append(f"{found.word} codes{where} ({len(codes):,}): {listed(codes)}")
    if len(lacking) > LISTED:
        lines.append(f"and {found.word} codes in {len(lacking) - LISTED} more levels")
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


def level_panel(levels: list[dict[str, float]], size: tuple[int, int]) -> Panel:
    """The share of codes used at each level, with the perplexity above."""
    names = [str(number) for number in range(1, len(levels) + 1)]
    values = {name: 100 * level["usage"] for name, level in zip(names, levels, strict=True)}
    texts = {name: f"{level['perplexity']:.0f}" for name, level in zip(names, levels, strict=True)}
    title = "Codes used at each level, with perplexity"
    return bars(title, values, size, labels=("level", "% used"), texts=texts, top=100)


def code_picture(found: Findings) -> Picture:
    """Codes one by one, the most used first; ids of unused ones are red."""
    cells = []
    for n, tile in enumerate(found.alone):
        picture = fitted(tile, CODE_SIDE)
        below = [] if found.in_place is None else [Image.new("RGB", picture.size, FAINT)]
        if found.in_place is not None and bool(torch.isfinite(found.in_place[n]).all()):
            below = [fitted(found.in_place[n], CODE_SIDE)]
        cells.append(stacked([picture, *below]))
    level = " of level 1" if len(found.uses) > 1 else ""
    title = f"Codes{level}, decoded one by one, most used first"
    if len(found.shown) < found.uses.shape[1]:
        title += f" ({len(found.shown):,} of {found.uses.shape[1]:,})"
    about = "each alone, on all positions"
    if found.in_place is not None:
        about = f"above: {about}; below: what is decoded around its places in images, on average"
    colors = [GREY if used else RED for used in found.uses[0][found.shown].tolist()]
    columns = WIDTH // (max(CODE_SIDE, *(cell.width for cell in cells)) + 4)
    return mosaic(
        title, cells, [str(code) for code in found.shown.tolist()], columns, WIDTH, colors=colors, subtitle=about
    )


@torch.inference_mode()
def example_pictures(tokenizer: Any, images: ImageDataset, decibels: Tensor, count: int) -> list[Picture]:
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


def fitted(image: Tensor, side: int) -> Picture:
    """`image` (C, H, W) in [-1, 1] as a picture that fits a square; small ones repeat their pixels."""
    pixels = to_uint8(image).movedim(0, -1).numpy()
    picture = Image.fromarray(np.repeat(pixels, 3, -1) if pixels.shape[-1] == 1 else pixels)
    longest = max(picture.size)
    if longest <= side:
        times = side // longest
        return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    size = [max(1, round(length * side / longest)) for length in picture.size]
    return picture.resize((size[0], size[1]), Image.Resampling.BOX)


def stacked(pictures: list[Picture]) -> Picture:
    """Pictures one above the other, two pixels apart."""
    height = sum(picture.height + 2 for picture in pictures) - 2
    board = Image.new("RGB", (max(picture.width for picture in pictures), height), WHITE)
    top = 0
    for picture in pictures:
        board.paste(picture, (0, top))
        top += picture.height + 2
    return board


def run(config: InspectConfig) -> dict[str, Any]:
    """Write the report; print the findings and return them: see `figures_of`, and `l1` and `l2`."""
    if Path(config.out).suffix.lower() not in SUFFIXES:
        raise UserError(f"out: {config.out!r} should end in {', '.join(SUFFIXES)}")
    inputs = [config.tokenizer, config.data.path]
    check_out_file(config.out, inputs)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder(config.tokenizer), device=choose_device(config.device))
    check_shape(config.data, tokenizer.image_shape, "tokenizer")
    images = load_images(config.data).held_out
    found = examine(tokenizer, images, config.num_codes)
    picture = report(tokenizer, images, found, config.num_images, config.data.source)
    try:
        save_picture(picture, config.out, inputs=inputs)
    except OSError as error:
        raise UserError(f"out: {config.out} can not be written ({error.strerror or error})") from error
    print(f"{config.out}: {len(images):,} held-out images", *sentences(found, tokenizer.reversible), sep="\n  ")
    return found.figures


def main(argv: list[str] | None = None) -> Any:
    """The command line."""
    return run_command(InspectConfig, run, argv, verb="inspect", description=__doc__, defaults=defaults)


if __name__ == "__main__":
    main()
