"""The table and the pictures of `benchmarks/tokenizers/equal_bits.py`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.support.contenders import Node
from benchmarks.support.tables import interval, table_head, table_row, with_interval
from pipelines.images.pictures import grid_picture
from pipelines.metrics.charts import BLUE, GREY, INK, render
from tokenizer.spec import to_uint8

Runs = list[Node]  # figures, one node per seed
Cell = Callable[[Runs], str]
MIN_SIDE = 96  # minimum width of an image in a picture, in pixels


def mean_of(figure: str, digits: int, scale: float = 1.0) -> Cell:
    """Format a figure's mean over seeds, with its interval."""
    return lambda runs: with_interval([scale * run[figure] for run in runs], digits)


# Title, the figure that the column needs, and its format.
COLUMNS: list[tuple[str, str, Cell]] = [
    ("ids", "tokens", lambda runs: f"{runs[0]['tokens']} of {runs[0]['vocab_size']}"),
    ("bits per image", "bits", lambda runs: f"{runs[0]['bits']:.1f}".removesuffix(".0")),
    ("parameters", "parameters", lambda runs: f"{runs[0]['parameters'] / 1e6:.2f} M"),
    ("PSNR, dB", "psnr", mean_of("psnr", 2)),
    ("SSIM", "ssim", mean_of("ssim", 4)),
    ("usage", "usage", lambda runs: mean_of("usage", 1, 100)(runs) + " %"),
    ("perplexity", "perplexity", mean_of("perplexity", 1)),
    ("ms per step", "seconds_per_step", mean_of("seconds_per_step", 1, 1e3)),
    ("steps", "steps", lambda runs: f"{runs[0]['steps']:,}"),
    ("GPT: bits per token", "bits_per_token", mean_of("bits_per_token", 4)),
    ("GPT: bits per image", "bits_per_token", lambda runs: mean_of("bits_per_token", 1, runs[0]["tokens"])(runs)),
]


def has_figure(runs: Runs, figure: str) -> bool:
    return all(run.get(figure) is not None for run in runs)


def rank(found: dict[str, Runs]) -> list[str]:
    return sorted(found, key=lambda name: -statistics.mean(run["psnr"] for run in found[name]))


def format_row(name: str, runs: Runs, columns: list[tuple[str, str, Cell]] = COLUMNS) -> str:
    return table_row([name, *(cell(runs) if has_figure(runs, figure) else "" for _, figure, cell in columns)])


def format_table(found: dict[str, Runs]) -> str:
    """Format the table, without columns for which no contender has a figure."""
    columns = [column for column in COLUMNS if any(has_figure(runs, column[1]) for runs in found.values())]
    rows = [format_row(name, found[name], columns) for name in rank(found)]
    return "\n".join([table_head("tokenizer", *(title for title, _, _ in columns)), *rows])


def picture_row(images: Any) -> Any:
    """Arrange images `(n, C, H, W)` side by side in a PIL image."""
    pixels = to_uint8(images).movedim(1, -1).numpy()
    return Image.fromarray(grid_picture(pixels, len(images), min_side=MIN_SIDE))


def draw_reconstructions(names: list[str], out: Path) -> Path:
    """Draw held-out images, and below them the reconstructions of each contender."""
    first = {name: next(iter(sorted(out.glob(f"seed*/{name}")))) for name in names}
    paths = {"held-out images": first[names[0]] / "originals.png"}
    paths |= {name: folder / "reconstructions.png" for name, folder in first.items()}
    rows, margin = {name: Image.open(path).convert("RGB") for name, path in paths.items()}, 150
    width, height = next(iter(rows.values())).size
    picture = Image.new("RGB", (margin + width, len(rows) * height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(17)
    for index, (name, row) in enumerate(rows.items()):
        draw.text((6, index * height + height // 2 - 10), name, fill="black", font=font)
        picture.paste(row, (margin, index * height))
    picture.save(out / "reconstructions.png")
    return out / "reconstructions.png"


def draw_rate_distortion(found: dict[str, Runs], title: str) -> Any:
    """Plot the GPT's bits per image against PSNR, with 95 % intervals over seeds. Dominated tokenizers are grey."""
    rates = {name: [run["bits_per_token"] * run["tokens"] for run in runs] for name, runs in found.items()}
    levels = {name: [run["psnr"] for run in runs] for name, runs in found.items()}
    at = {name: (statistics.mean(rates[name]), statistics.mean(levels[name])) for name in found}
    x_values, y_values = zip(*at.values(), strict=True)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set(xlim=(0.9 * min(x_values), 1.08 * max(x_values)), ylim=(min(y_values) - 0.4, max(y_values) + 0.4))
        axes.set(title=title, xlabel="bits of an image's tokens under the GPT", ylabel="held-out PSNR, dB")
        for name, (rate, level) in at.items():
            dominated = any(r <= rate and p >= level for other, (r, p) in at.items() if other != name)
            halves = [0.0 if math.isnan(half) else half for half in (interval(rates[name]), interval(levels[name]))]
            axes.errorbar(rate, level, halves[1], halves[0], color=GREY, linewidth=1)
            axes.plot(rate, level, "o", color=GREY if dominated else BLUE, markersize=8)
            axes.annotate(name, (rate, level), (7, 7), textcoords="offset points", color=GREY if dominated else INK)

    return render(760, 480, draw)
