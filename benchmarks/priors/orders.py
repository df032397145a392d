"""Every order of a grid as one picture: which block draws each cell.

    pip install -e .
    python -m benchmarks.priors.orders out=docs/images/orders.png

The number of the block is in the cell; the first blocks are dark. Below a grid: the name and its number of passes.
"""

from __future__ import annotations

from typing import Any

from benchmarks.support.options import read_options

SIDE, CELL, GAP, COLUMNS, CAPTION = 8, 34, 40, 6, 58
NAMES = (
    ("raster", "column", "snake", "spiral_in", "spiral_out", "z_curve"),
    ("hilbert", "subsample", "random:0", "halton", "spread", "random:0:8"),
    ("diagonal", "wave:2", "regions:4", "rows", "dyadic", "hilbert/4"),
    ("halton:13", "halton:8", "halton:5", "spread:13", "spread:8", "spread:5"),
)
# Of equal steps to the eye, from the first block to the last: viridis (van der Walt and Smith 2015).
RAMP = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))


def shade(share: float) -> tuple[int, ...]:
    """The colour of the ramp at a share in [0, 1]."""
    at = share * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    return tuple(round(a + (at - low) * (b - a)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))


def draw_order(draw: Any, corner: tuple[int, int], name: str, fonts: dict[str, Any]) -> None:
    """The grid of one order with its corner there, and its name below."""
    from prior.orders import block_numbers, make_partition

    left, top = corner
    order, blocks = make_partition(name, (SIDE, SIDE))
    for at, number in enumerate(block_numbers(order, blocks).tolist()):
        color = shade(number / (len(blocks) - 1))
        x, y = left + at % SIDE * CELL, top + at // SIDE * CELL
        draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=color)
        bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 125
        ink = (25, 30, 36) if bright else (255, 255, 255)
        draw.text((x + CELL // 2 - 1, y + CELL // 2 - 1), str(number + 1), fill=ink, font=fonts["number"], anchor="mm")
    below = top + SIDE * CELL + 4
    draw.text((left, below), name, fill=(34, 38, 43), font=fonts["name"])
    passes = f"{len(blocks)} passes"
    draw.text((left + SIDE * CELL - 2, below + 2), passes, fill=(98, 104, 112), font=fonts["passes"], anchor="ra")


def picture() -> Any:
    """All orders, in rows."""
    from PIL import Image, ImageDraw, ImageFont

    sizes = {"number": 15, "name": 21, "passes": 18}
    fonts = {use: ImageFont.load_default(size) for use, size in sizes.items()}
    across, down = SIDE * CELL + GAP, SIDE * CELL + CAPTION
    image = Image.new("RGB", (COLUMNS * across + GAP, len(NAMES) * down + GAP), "white")
    draw = ImageDraw.Draw(image)
    for row, names in enumerate(NAMES):
        for col, name in enumerate(names):
            draw_order(draw, (GAP + col * across, GAP + row * down), name, fonts)
    return image


def main() -> None:
    options = read_options(__doc__, {"out": "docs/images/orders.png"})
    picture().quantize(64).save(options.out, optimize=True)  # a quarter of the bytes
    print(options.out)


if __name__ == "__main__":
    main()
