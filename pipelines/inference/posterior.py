"""What images say of a column: the probabilities of listed values, or the density over a range of numbers.

With L = log p(images | value) and a temperature T,

    p(value | images) is proportional to p(value) exp(L / T).

A region of level l holds the values whose denser ones have less than l of the mass. Calibration replaces l by a
quantile of the mass that was denser than the true value of held-out images, so that regions contain the true value of
new images as often as promised (split conformal prediction)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokenizer.files import escape

from ..anomaly.distances import CalibrationError
from ..config.table import table

if TYPE_CHECKING:
    from ..metrics.charts import Pixels

SHOWN = 3
"""Values of an image in a table."""


class Scale(NamedTuple):
    """What was fitted to held-out images of one column: the temperature, and the mass that was denser than the true
    value of each image or group, in rising order."""

    temperature: float = 1.0
    denser: Sequence[float] = ()

    def level(self, level: float) -> float:
        """Return the mass below which regions of new images contain the true value with this probability. Raises
        `CalibrationError` without calibration, or with too little."""
        if not self.denser:
            raise CalibrationError("level: the column is not calibrated; run `smalti calibrate column=NAME`")
        place = math.ceil((len(self.denser) + 1) * level)
        if place > len(self.denser):
            most = len(self.denser) / (len(self.denser) + 1)
            raise CalibrationError(f"level: at most {most:.4g} with {len(self.denser):,} calibrated images")
        return math.nextafter(self.denser[place - 1], 2)


@dataclass(frozen=True, repr=False)
class Posterior:
    """p(value | images) of the column `name`, for each of B rows: an image, or a group of images.

    rows: their names. log_likelihood: `(B, V)` nats. log_prior: log probabilities of the values, or log densities at
    the points, `(B, V)`. prior: what the prior is, in words. scales: what was fitted for each row."""

    name: str
    rows: Sequence[str]
    log_likelihood: Tensor
    log_prior: Tensor
    prior: str
    scales: Sequence[Scale]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        size = self.log_likelihood.shape[1]
        return f"{type(self).__name__}({self.name}: {len(self)} rows of {size}; prior: {self.prior})"

    @property
    def log_widths(self) -> Tensor:
        """The logarithm of what a value stands for: 0, or the width of the cell around a point."""
        return torch.zeros_like(self.log_likelihood)

    @cached_property
    def log_density(self) -> Tensor:
        """log p(value | images), `(B, V)`; of a range of numbers, per unit."""
        temperatures = torch.tensor([each.temperature for each in self.scales], dtype=self.log_likelihood.dtype)
        joint = self.log_prior + self.log_likelihood / temperatures[:, None]
        return joint - (joint + self.log_widths).logsumexp(1, keepdim=True)

    @cached_property
    def probabilities(self) -> Tensor:
        """The probability of each value or, of a range of numbers, of the cell around each point, `(B, V)`."""
        return (self.log_density + self.log_widths).exp()

    @property
    def entropy(self) -> Tensor:
        """The entropy in nats, `(B,)`; of a range of numbers, of the density."""
        return -(self.probabilities * self.log_density.masked_fill(self.probabilities == 0, 0)).sum(1)

    def denser(self, log_density: Tensor) -> Tensor:
        """Return the mass of the values that are denser than these log densities `(B, ...)`."""
        order = self.log_density.argsort(1, descending=True)
        mass = torch.nn.functional.pad(self.probabilities.gather(1, order).cumsum(1), (1, 0))
        falling = -self.log_density.gather(1, order)
        return mass.gather(1, torch.searchsorted(falling, -log_density)).clamp(max=1)

    def region(self, level: float, calibrated: bool) -> Tensor:
        """Return which values are in the region of this level, bool `(B, V)`; see `credible` and `conformal`."""
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1 (got {level})")
        levels = torch.tensor([each.level(level) if calibrated else level for each in self.scales])
        return self.denser(self.log_density) < levels[:, None]

    def credible(self, level: float) -> list[Any]:
        """Return the densest values that have this probability together, for each row: a list of values or, of a range
        of numbers, the shortest interval that contains them, from low to high."""
        return self.list_region(self.region(level, calibrated=False))

    def conformal(self, level: float) -> list[Any]:
        """Like `credible`, but such that the true value of new images is contained with this probability, on average
        over calibrations. Raises `CalibrationError` for a column that is not calibrated."""
        return self.list_region(self.region(level, calibrated=True))

    def list_region(self, region: Tensor) -> list[Any]:
        raise NotImplementedError

    @property
    def mode(self) -> list[Any]:
        """The densest value of each row."""
        raise NotImplementedError

    def log_density_at(self, truth: Tensor) -> Tensor:
        """Return the log probability, or density, of the true value of each row, `(B,)`: the place of a listed value,
        or a number."""
        raise NotImplementedError

    def errors(self, truth: Tensor) -> Tensor:
        """Return for each row how far it is from the true value: 0 or 1 whether the mode is wrong or, of a range of
        numbers, the distance of the mean."""
        raise NotImplementedError

    def sample(self, count: int, generator: torch.Generator | None = None) -> list[list[Any]]:
        """Draw `count` values for each row."""
        raise NotImplementedError

    def draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        return torch.multinomial(self.probabilities, count, replacement=True, generator=generator)

    def columns(self) -> dict[str, list[Any]]:
        """Return the summaries of all rows by name, as `smalti infer` writes them."""
        raise NotImplementedError

    def rivals(self) -> tuple[list[Any], list[Any]]:
        """Return the likeliest value of each row and the next; of a range of numbers, the ends of its interval."""
        raise NotImplementedError

    def table(self, most: int = 20) -> str:
        """Return a table of the first rows, as text."""
        columns = {"": list(self.rows), **self.columns()}
        texts = [[format_value(one) for one in each[:most]] for each in columns.values()]
        more = [(f"and {len(self) - most:,} more",)] if len(self) > most else []
        return table([tuple(columns), *zip(*texts, strict=True), *more])

    def plot(self, most: int = 8) -> Pixels:
        """Return a picture of the first rows, uint8 (H, W, 3)."""
        from ..metrics.charts import BLUE, render

        shown = min(most, len(self))

        def draw(figure: Any) -> None:
            every = figure.subplots(-(-shown // 2), 2 if shown > 1 else 1, squeeze=False).flatten()
            for row, axes in enumerate(every):
                axes.set_visible(row < shown)
                if row < shown:
                    self.plot_row(axes, row, BLUE)
                    axes.set(title=self.rows[row], xlabel=self.name)

        return render(760 if shown > 1 else 400, 240 * -(-shown // 2), draw)

    def plot_row(self, axes: Any, row: int, color: str) -> None:
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class ListPosterior(Posterior):
    """Probabilities of `values`, each of which is a name, a list of flags, or the number of a candidate."""

    values: Sequence[Any] = ()

    @property
    def mode(self) -> list[Any]:
        return [self.values[place] for place in self.log_density.argmax(1).tolist()]

    def list_region(self, region: Tensor) -> list[Any]:
        order = self.log_density.argsort(1, descending=True)
        return [
            [self.values[place] for place in places if inside[place]]
            for places, inside in zip(order.tolist(), region.tolist(), strict=True)
        ]

    def log_density_at(self, truth: Tensor) -> Tensor:
        return self.log_density.gather(1, truth[:, None])[:, 0]

    def errors(self, truth: Tensor) -> Tensor:
        return (self.log_density.argmax(1) != truth).double()

    def rivals(self) -> tuple[list[Any], list[Any]]:
        first, second = self.log_density.topk(2, 1).indices.T.tolist()
        return [self.values[place] for place in first], [self.values[place] for place in second]

    def sample(self, count: int, generator: torch.Generator | None = None) -> list[list[Any]]:
        return [[self.values[place] for place in row] for row in self.draw(count, generator).tolist()]

    def columns(self) -> dict[str, list[Any]]:
        top = self.probabilities.topk(min(SHOWN, len(self.values)))
        pairs = [list(zip(*each, strict=True)) for each in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
        others = [", ".join(f"{format_value(self.values[n])} {p:.3f}" for n, p in each[1:]) for each in pairs]
        return {
            self.name: [format_value(one) for one in self.mode],
            "probability": [each[0][1] for each in pairs],
            "others": others,
            "entropy": self.entropy.tolist(),
        }

    def plot_row(self, axes: Any, row: int, color: str) -> None:
        top = self.probabilities[row].topk(min(10, len(self.values)))
        axes.barh([format_value(self.values[n]) for n in top.indices.tolist()], top.values.tolist(), color=color)
        axes.invert_yaxis()
        axes.set(xlim=(0, 1))


@dataclass(frozen=True, repr=False)
class RangePosterior(Posterior):
    """The density over a range of numbers or angles, constant within the cell around each of `points` `(B, V)`, which
    rise. edges: the ends of the range. period: 360 of angles. error: the mass `(B,)` that the last points moved."""

    points: Tensor = torch.zeros(0)
    edges: tuple[float, float] = (0, 1)
    period: float | None = None
    error: Tensor = torch.zeros(0)

    @cached_property
    def cells(self) -> tuple[Tensor, Tensor]:
        """The lower and upper ends of the cells, `(B, V)` each."""
        return find_cells(self.points, self.edges, self.period)

    @property
    def log_widths(self) -> Tensor:
        low, high = self.cells
        return (high - low).log()

    @property
    def mode(self) -> list[Any]:
        return self.points.gather(1, self.log_density.argmax(1, keepdim=True))[:, 0].tolist()

    @property
    def turns(self) -> Tensor:
        """The mean of the points on the unit circle, complex `(B,)`."""
        angles = self.points * (math.tau / self.period if self.period else 0)
        return (self.probabilities * torch.polar(torch.ones_like(angles), angles)).sum(1)

    @property
    def mean(self) -> Tensor:
        """The mean, `(B,)`; of angles, the direction of the mean on the circle."""
        if self.period is None:
            return (self.probabilities * self.points).sum(1)
        return (self.turns.angle() * self.period / math.tau).remainder(self.period)

    @property
    def std(self) -> Tensor:
        """The standard deviation, `(B,)`; of angles, sqrt(-2 ln R) with the length R of the mean on the circle."""
        if self.period is None:
            return (self.probabilities * (self.points - self.mean[:, None]).square()).sum(1).sqrt()
        return (-2 * self.turns.abs().log()).clamp(min=0).sqrt() * self.period / math.tau

    def interval(self, level: float = 0.9) -> Tensor:
        """Return the shortest interval `(B, 2)` that contains the densest numbers with this probability; of angles, the
        upper end may exceed 360."""
        return torch.tensor(self.credible(level))

    def errors(self, truth: Tensor) -> Tensor:
        apart = self.mean - truth
        return apart.abs() if self.period is None else ((apart + self.period / 2) % self.period - self.period / 2).abs()

    def log_density_at(self, truth: Tensor) -> Tensor:
        inside = truth.clamp(*self.edges) if self.period is None else truth.remainder(self.period)
        ends = self.cells[1].contiguous()
        place = torch.searchsorted(ends, inside[:, None].to(ends.dtype)).clamp(max=ends.shape[1] - 1)
        return self.log_density.gather(1, place)[:, 0]

    def rivals(self) -> tuple[list[Any], list[Any]]:
        low, high = self.interval(0.9).T.tolist()
        return low, high

    def list_region(self, region: Tensor) -> list[Any]:
        low, high = self.cells
        return [shortest_arc(*each, self.period) for each in zip(low, high, region, strict=True)]

    def sample(self, count: int, generator: torch.Generator | None = None) -> list[list[Any]]:
        places, (low, high) = self.draw(count, generator), self.cells
        parts = torch.rand(places.shape, generator=generator, dtype=low.dtype)
        found = low.gather(1, places).lerp(high.gather(1, places), parts)
        return (found if self.period is None else found.remainder(self.period)).tolist()

    def columns(self) -> dict[str, list[Any]]:
        low, high = self.interval(0.9).T.tolist()
        return {
            self.name: self.mode,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "low_90": low,
            "high_90": high,
            "entropy": self.entropy.tolist(),
        }

    def plot_row(self, axes: Any, row: int, color: str) -> None:
        low, high = self.cells
        axes.stairs(
            self.log_density[row].exp().tolist(), [*low[row].tolist(), float(high[row, -1])], fill=True, color=color
        )
        axes.set(xlim=self.edges, ylim=0)


def find_cells(points: Tensor, edges: tuple[float, float], period: float | None) -> tuple[Tensor, Tensor]:
    """Return the ends of the cells around points `(B, V)`: borders lie in the middle between neighbours. On a circle,
    the first cell begins below 0 where the last one ends."""
    middle = (points[:, 1:] + points[:, :-1]) / 2
    if period is None:
        first, last = (torch.full_like(points[:, :1], edge) for edge in edges)
    else:
        last = (points[:, -1:] + points[:, :1] + period) / 2
        first = last - period
    borders = torch.cat([first, middle, last], 1)
    return borders[:, :-1], borders[:, 1:]


def shortest_arc(low: Tensor, high: Tensor, inside: Tensor, period: float | None) -> tuple[float, float]:
    """Return the shortest interval that contains the cells that are inside; of angles, all but the largest gap."""
    starts, ends = low[inside].tolist(), high[inside].tolist()
    if period is None:
        return starts[0], ends[-1]
    gaps = [after - end for after, end in zip([*starts[1:], starts[0] + period], ends, strict=True)]
    last = max(range(len(gaps)), key=gaps.__getitem__)
    start = starts[(last + 1) % len(starts)]
    return start % period, start % period + (ends[last] - start) % period


def format_value(value: Any) -> str:
    """Format a value for a table: names as they are, flags joined by commas, numbers in four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else escape(str(value))
