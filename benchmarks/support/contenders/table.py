"""The table of `benchmarks/tokenizers/equal_bits.py`: a line for each contender, best reconstructions first."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benchmarks.support.contenders.nodes import Node
from benchmarks.support.tables import table_head, table_row, with_interval

Runs = list[Node]  # the figures of each seed
Cell = Callable[[Runs], str]


def mean_of(figure: str, digits: int, scale: float = 1.0) -> Cell:
    """A figure's mean over seeds, with its interval."""
    return lambda runs: with_interval([scale * run[figure] for run in runs], digits)


# Title, a figure that a run has if it has this column, and what is written.
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


def has(runs: Runs, figure: str) -> bool:
    """Whether each run has this figure."""
    return all(run.get(figure) is not None for run in runs)


def ranked(found: dict[str, Runs]) -> list[str]:
    """Names, best reconstructions first."""
    return sorted(found, key=lambda name: -statistics.mean(run["psnr"] for run in found[name]))


def line(name: str, runs: Runs, columns: list[tuple[str, str, Cell]] = COLUMNS) -> str:
    """A row of the table; a cell is empty where there is no such figure."""
    return table_row([name, *(cell(runs) if has(runs, figure) else "" for _, figure, cell in columns)])


def table(found: dict[str, Runs]) -> str:
    """All rows, and the columns that any of them has a figure in."""
    columns = [column for column in COLUMNS if any(has(runs, column[1]) for runs in found.values())]
    rows = [line(name, found[name], columns) for name in ranked(found)]
    return "\n".join([table_head("tokenizer", *(title for title, _, _ in columns)), *rows])


def best_sizes(found: dict[str, Runs]) -> dict[str, Runs]:
    """Of names that say a network and a size, as `vit-small`, the one of each network with the highest PSNR."""
    best: dict[str, str] = {}
    for name in ranked(found):
        best.setdefault(name.rpartition("-")[0] or name, name)
    return {name: found[name] for name in best.values()}
