"""Random tokens and images on disk, for benchmarks of speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.tokens import TokenDataset, TokenSplit
from prior.columns import ClassColumn
from prior.given import Given
from tokenizer import Tokenizer


def write_random_tokens(folder: Path, side: int, vocab_size: int, rows: int, classes: int = 10) -> Path:
    quantizer = {"kind": "ema", "codes": vocab_size, "dim": 8}
    sizes = {"image_size": (4 * side, 4 * side), "channels": 1, "widths": (8,), "blocks": (1,)}
    tokenizer = Tokenizer.create("vqvae", **sizes, quantizer=quantizer)
    return write_tokens_of(tokenizer, folder, rows, classes)


def write_tokens_of(tokenizer: Any, folder: Path, rows: int, classes: int = 10) -> Path:
    grid, columns = tokenizer.grid, {"label": ClassColumn.numbered(classes)}
    given = Given(columns, {"label": torch.arange(rows) % classes}, rows)
    split = TokenSplit(torch.randint(grid.vocab_size, (rows, *grid.shape)), given)
    TokenDataset(grid, columns, {"train": split, "test": split}, tokenizer, {}).save(folder)
    return folder


def write_random_images(folder: Path, side: int, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return folder
