"""Markdown tables, means over seeds with intervals, and JSON files."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


def table_head(*names: str) -> str:
    """Return the first two lines of a Markdown table."""
    return f"{table_row(names)}\n|{'---|' * len(names)}"


def table_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % t-interval of the mean over seeds; NaN for one seed."""
    from scipy.stats import t

    if len(values) < 2:
        return math.nan
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def with_interval(values: Sequence[float], digits: int = 2) -> str:
    """Format as `1.23 +- 0.04`, or the value alone for one seed."""
    mean, half = statistics.mean(values), interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" +- {half:.{digits}f}")


def cache_json(path: Path, measure: Callable[[], Any]) -> Any:
    """Return what `measure()` returns, cached in `path`."""
    if not path.is_file():
        print(f"measuring {path}", file=sys.stderr, flush=True)
        write_json(measure(), path)
    return json.loads(path.read_text())


def write_json(data: Any, path: Path) -> None:
    """Write JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1))
    temporary.replace(path)
