"""The gallery's pictures: real, reconstructed and sampled images in labelled rows, a column for each class."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipelines.metrics.charts import Pixels

MOST_BYTES = 150_000
COLUMNS = 10
PITCH = 60  # pixels at least from a column to the next, for a class's name
MARGIN, HEADER, LINE, ASIDE, GAP, APART = 8, 34, 14, 108, 2, 10
KINDS = ("real", "reconstructed", "sampled")
# Rows of each kind, and of how many colours, 0 for all: what comes first and is small enough is taken.
WAYS = (
    ((2, 2, 4), 0),
    ((2, 2, 2), 0),
    ((2, 2, 4), 256),
    ((1, 1, 3), 256),
    ((1, 1, 2), 256),
    ((1, 1, 2), 64),
    ((1, 1, 1), 64),
)
ROWS = {kind: max(rows[n] for rows, _ in WAYS) for n, kind in enumerate(KINDS)}


def enlarged(image: np.ndarray) -> Pixels:
    """(H, W, C) uint8 as RGB, its pixels repeated until a side has 56."""
    times = max(1, -(-56 // image.shape[1]))
    image = image.repeat(times, 0).repeat(times, 1)
    return np.repeat(image, 3, 2) if image.shape[2] == 1 else image


def compose(rows: dict[str, Sequence[Sequence[np.ndarray]]], labels: Sequence[str]) -> Pixels:
    """One picture of `rows` of images (H, W, C), kind by kind; a kind's name stands left of its first row, a column's
    name, of `labels`, above it, in two lines where it has a hyphen; there may be no labels."""
    from pipelines.metrics.charts import GREY, INK, render, write

    first = enlarged(next(iter(rows.values()))[0][0])
    height, width = first.shape[:2]
    pitch = max(PITCH, width + GAP)
    columns = max(len(row) for kind in rows.values() for row in kind)
    top = MARGIN + (HEADER if labels else 0)
    places, starts = {}, {}
    for kind, parts in rows.items():
        starts[kind] = top
        for n, row in enumerate(parts):
            for column, image in enumerate(row):
                places[kind, n, column] = (top, ASIDE + column * pitch, enlarged(image))
            top += height + GAP
        top += APART
    size = (ASIDE + columns * pitch + MARGIN, top)

    def draw(figure: Figure) -> None:
        for kind, start in starts.items():
            write(figure, (MARGIN, start + 2), kind, ASIDE - MARGIN, size=12, color=INK)
        for column, label in enumerate(labels[:columns]):
            for n, line in enumerate(in_two(label)):
                write(figure, (ASIDE + column * pitch, MARGIN + n * LINE), line, pitch - 4, size=10, color=GREY)

    board = render(size, draw)
    for down, across, image in places.values():
        board[down : down + height, across : across + width] = image
    return board


def in_two(label: str) -> list[str]:
    """The lines of a label: parted where it has alternatives, or else at a hyphen."""
    return label.split(" / " if " / " in label else "-", 1)


def encoded(picture: Pixels, colors: int) -> bytes:
    """A PNG file, in grey where all is grey; else of so many colours, 0 for all."""
    grey = bool((picture == picture[..., :1]).all())
    image: Any = Image.fromarray(picture[..., 0] if grey else picture)
    if colors and not grey:
        image = image.quantize(colors, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def write_small(
    rows: dict[str, Sequence[Sequence[np.ndarray]]], labels: Sequence[str], path: Path, most: int = MOST_BYTES
) -> dict[str, Any]:
    """Write a picture of at most so many bytes, with as many of the rows as fit; returns how many of each kind there
    are, and of how many colours, 0 for all. Exits where not even the smallest is small enough."""
    for counts, colors in WAYS:
        shown = {kind: rows[kind][:count] for kind, count in zip(KINDS, counts, strict=True)}
        data = encoded(compose(shown, labels), colors)
        if len(data) <= most:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            return {"rows": dict(zip(KINDS, counts, strict=True)), "colors": colors, "bytes": len(data)}
    raise SystemExit(f"{path}: {len(data):,} bytes, more than {most:,}")


def rows_of(pipe: Any, held_out: Any, seed: int) -> tuple[dict[str, list[list[np.ndarray]]], list[str]]:
    """For each of the first ten classes with held-out images the first of these (a class's last again, where it has too
    few), what the tokenizer keeps of them, and samples with the pipeline's own settings, in rows; and the classes'
    names. Without classes, images evenly spread over the set."""
    import torch

    count, classes = ROWS["real"], []
    if pipe.prior.num_classes and held_out.labels is not None:
        classes = sorted(set(held_out.labels.tolist()))[:COLUMNS]
    columns = len(classes) or COLUMNS
    if classes:
        of_class = [(held_out.labels == label).nonzero().flatten().tolist() for label in classes]
        chosen = [[found[min(row, len(found) - 1)] for found in of_class] for row in range(count)]
    else:
        chosen = np.linspace(0, len(held_out) - 1, columns * count).astype(int).reshape(count, columns).tolist()
    real = [held_out.batch(row) for row in chosen]
    kept = [pipe.reconstruct(row, output_type="pt") for row in real]
    given = classes * ROWS["sampled"] if classes else None
    samples = pipe(
        num_images=columns * ROWS["sampled"], labels=given, seed=seed, output_type="pt", progress=False
    ).images
    drawn = list(torch.as_tensor(samples).split(columns))
    found = {kind: [in_pixels(row) for row in parts] for kind, parts in zip(KINDS, (real, kept, drawn), strict=True)}
    return found, [pipe.labels[label] for label in classes]


def in_pixels(images: Any) -> list[np.ndarray]:
    """Images `(B, C, H, W)` in [-1, 1] as uint8 arrays (H, W, C)."""
    from pipelines.images import to_uint8

    return list(to_uint8(images.cpu()).movedim(1, -1).numpy())
