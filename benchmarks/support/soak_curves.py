"""The curves of a soak: a row of charts for each case, what was measured against steps."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZE = (1500, 300)
"""Pixels of a row."""
MARGIN = 16
CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (  # title, unit, what is shown under which name
    ("memory", "MB", {"own": "memory_mb", "with what is free": "before_mb", "children": "children_mb"}),
    ("handles, threads", "number", {"handles": "handles", "threads": "threads", "children": "children"}),
    ("time of a step", "ms", {"wall": "step_ms", "processor": "cpu_ms"}),
    ("disk", "MB", {}),
)


def picture(rows: list[dict[str, Any]]) -> NDArray[np.uint8]:
    """All cases below each other, (H, W, 3)."""
    from pipelines.metrics.charts import charts_in_row

    cases = dict.fromkeys(row["case"] for row in rows)
    parts = [charts_in_row(charts(case, [row for row in rows if row["case"] == case]), *SIZE) for case in cases]
    white = ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))
    return np.pad(np.concatenate(parts), white, constant_values=255)


def charts(case: str, rows: list[dict[str, Any]]) -> list[Any]:
    """Those of a case."""
    disk = {name.removeprefix("disk/"): name for row in rows for name in row if name.startswith("disk/")}
    largest = sorted(disk, key=lambda name: -rows[-1].get(disk[name], 0))[:4]
    found = []
    for title, unit, named in CHARTS:
        shown = named or {name: disk[name] for name in largest}
        if shown:
            found.append(partial(chart, title=f"{case}: {title}", unit=unit, rows=rows, shown=shown))
    return found


def chart(axes: Any, *, title: str, unit: str, rows: list[dict[str, Any]], shown: dict[str, str]) -> None:
    """Lines from zero, so that what looks flat is flat."""
    from pipelines.metrics.charts import COLORS, few_ticks, head, legend

    colors = dict(zip(shown, COLORS, strict=False))
    steps = [row["step"] for row in rows]
    values = {name: [row.get(key, 0.0) for row in rows] for name, key in shown.items()}
    head(axes, title, unit)
    axes.set(xlim=(0, steps[-1]), ylim=(0, 1.15 * max(max(each) for each in values.values()) or 1))
    for name, each in values.items():
        axes.plot(steps, each, color=colors[name], linewidth=1.5)
    few_ticks(axes.xaxis, 4, whole=True)
    few_ticks(axes.yaxis, 4)
    legend(axes, colors)
