"""Pictures of what tokenizers do: reconstructions side by side, and rate against distortion."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.support.contenders.nodes import Node
from benchmarks.support.tables import interval

SHOWN_SIDE = 96  # of an image, in pixels


def picture_row(images: Any) -> Any:
    """Images `(n, C, H, W)` side by side, as a PIL image."""
    from PIL import Image

    from pipelines.images.pictures import grid_picture

    return Image.fromarray(grid_picture(images, len(images), min_side=SHOWN_SIDE))


def sheet(names: list[str], out: Path) -> Path:
    """The same held-out images, and under them the reconstructions of each contender, with its name at the left."""
    from PIL import Image, ImageDraw, ImageFont

    first = {name: next(iter(sorted(out.glob(f"seed*/{name}")))) for name in names}
    paths = {"held-out images": first[names[0]] / "originals.png"}
    paths |= {name: folder / "reconstructions.png" for name, folder in first.items()}
    rows, title = {name: Image.open(path).convert("RGB") for name, path in paths.items()}, 150
    width, height = next(iter(rows.values())).size
    picture = Image.new("RGB", (title + width, len(rows) * height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(17)
    for index, (name, row) in enumerate(rows.items()):
        draw.text((6, index * height + height // 2 - 10), name, fill="black", font=font)
        picture.paste(row, (title, index * height))
    picture.save(out / "reconstructions.png")
    return out / "reconstructions.png"


def rate_distortion(found: dict[str, list[Node]], title: str) -> Any:
    """The GPT's bits of an image against the PSNR: a dot for each tokenizer, and a cross as wide and as high as the
    95 % intervals over seeds. Tokenizers that another one beats in both are grey."""
    from pipelines.metrics.charts import BLUE, GREY, INK, render

    rates = {name: [run["bits_per_token"] * run["tokens"] for run in runs] for name, runs in found.items()}
    levels = {name: [run["psnr"] for run in runs] for name, runs in found.items()}
    at = {name: (statistics.mean(rates[name]), statistics.mean(levels[name])) for name in found}
    x_values, y_values = zip(*at.values(), strict=True)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.set(xlim=(0.9 * min(x_values), 1.08 * max(x_values)), ylim=(min(y_values) - 0.4, max(y_values) + 0.4))
        axes.set(title=title, xlabel="bits of an image's tokens under the GPT", ylabel="held-out PSNR, dB")
        for name, (rate, level) in at.items():
            beaten = any(r <= rate and p >= level for other, (r, p) in at.items() if other != name)
            halves = [0.0 if math.isnan(half) else half for half in (interval(rates[name]), interval(levels[name]))]
            axes.errorbar(rate, level, halves[1], halves[0], color=GREY, linewidth=1)
            axes.plot(rate, level, "o", color=GREY if beaten else BLUE, markersize=8)
            axes.annotate(name, (rate, level), (7, 7), textcoords="offset points", color=GREY if beaten else INK)

    return render(760, 480, draw)
