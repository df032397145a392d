"""The figures of a planned run, and the page that shows them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from ..config.arguments import WIDTH
from ..config.table import table
from .budget import FULL, STATES, Sizes, at_evaluation, memory, seconds
from .costs import Costs

GB = 1e9
WAYS = ("DDP", "DDP, checkpointed", "FSDP", "FSDP, checkpointed")
PREFIXES = {"Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}

Row = tuple[str, ...]


@dataclass(frozen=True)
class Machine:
    """`gpus` of a kind that is called `name`, with `memory` in GB and a peak of `tflops` TFLOP/s, of which a share
    (`utilization`) is reached; `precision` is that of training."""

    name: str
    gpus: int
    memory: float
    tflops: float
    utilization: float
    precision: str


@dataclass(frozen=True)
class Schedule:
    """Images of a step, in how many micro-batches, how many steps (None: the run ends by the clock), and whether blocks
    are checkpointed."""

    batch_size: int
    accumulate: int
    steps: int | None
    checkpointing: bool


@dataclass(frozen=True)
class Forecast:
    """What a run takes. `dataset` and `snapshot` are bytes; `shards` says whether FSDP is for it."""

    title: str
    machine: Machine
    schedule: Schedule
    sizes: Sizes
    costs: Costs
    tokens_per_image: int
    rows: int | None
    shards: bool
    dataset: int | None
    snapshot: int
    notes: list[str] = field(default_factory=list)

    @property
    def share(self) -> int:
        """Images of a step for each GPU, rounded up where they do not divide."""
        return -(-self.schedule.batch_size // self.machine.gpus)

    @property
    def images_at_a_time(self) -> int:
        """Of them, those of a micro-batch."""
        return -(-self.share // self.schedule.accumulate)

    @cached_property
    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes on the fullest GPU, by part, for each way to train."""
        gpus, sizes, accumulate = self.machine.gpus, self.sizes, self.schedule.accumulate
        found = {WAYS[0]: memory(sizes, self.costs.work.turns, gpus, accumulate=accumulate)}
        if sizes.blocks:
            found[WAYS[1]] = memory(sizes, self.costs.checkpointed.turns, gpus, accumulate=accumulate)
        if sizes.blocks and self.shards and gpus > 1:
            found[WAYS[2]] = memory(sizes, self.costs.work.turns, gpus, fsdp=True)
            found[WAYS[3]] = memory(sizes, self.costs.checkpointed.turns, gpus, fsdp=True)
        return found

    @property
    def flops_per_step(self) -> int:
        """Of all GPUs together."""
        return self.costs.work.flops * self.schedule.batch_size

    @property
    def seconds_per_step(self) -> float:
        """If the assumed share of the peak is reached."""
        machine = self.machine
        return seconds(self.flops_per_step, machine.gpus, machine.tflops, machine.utilization)

    @property
    def hours(self) -> float | None:
        """Of the whole run; None where it ends by the clock."""
        steps = self.schedule.steps
        return None if steps is None else steps * self.seconds_per_step / 3600

    def evaluating(self, way: str) -> int:
        """Bytes on the main process while it evaluates."""
        fsdp = way.startswith("FSDP")
        return at_evaluation(self.sizes, self.memory[way], self.costs.evaluation, self.machine.gpus, fsdp)

    def needs(self, way: str) -> int:
        """Bytes on the fullest GPU at the worst moment."""
        return max(sum(self.memory[way].values()), self.evaluating(way))

    def fits(self, way: str) -> bool:
        """Whether it leaves a tenth of a GPU free."""
        return self.needs(way) <= FULL * GB * self.machine.memory


# The page -----------------------------------------------------------------------------------------


def page_of(forecast: Forecast) -> str:
    """What `smalti plan` prints."""
    machine, compared = forecast.machine, range(1, 1 + len(WAYS))
    parts = [
        f"{forecast.title}; {machine.gpus:,} {machine.name}, {machine.precision}",
        section("parameters", parameters(forecast)),
        section("training", training(forecast)),
        section("compute, forward and backward, attention as two full matrix products", compute(forecast)),
        section("memory of a GPU, in GB of 10^9 bytes", memory_rows(forecast), numbers=compared),
        section("disk", disk(forecast)),
        "\n".join(textwrap.fill(f"warning: {note}", WIDTH) for note in warnings(forecast)),
    ]
    return "\n\n".join(parts).rstrip()


def section(heading: str, rows: list[Row], numbers: Iterable[int] = (1,)) -> str:
    """A heading, and its rows below it; `numbers` are the columns of these."""
    return f"{heading}\n{textwrap.indent(table(rows, right=numbers), '  ')}"


def parameters(forecast: Forecast) -> list[Row]:
    """How many, by part."""
    total = forecast.sizes.parameters
    rows = [(name, f"{count:,}", f"{count / max(1, total):.1%}") for name, count in forecast.sizes.parts.items()]
    return [*rows, ("all", f"{total:,}")]


def training(forecast: Forecast) -> list[Row]:
    """Rows, epochs and batches."""
    schedule, tokens, count = forecast.schedule, forecast.tokens_per_image, forecast.rows
    rows: list[Row] = []
    if count is not None:
        rows.append(("an epoch", f"{count:,}", f"images, {count * tokens:,} tokens"))
    size = schedule.batch_size
    parts = f" in {schedule.accumulate} parts" if schedule.accumulate > 1 else ""
    rows.append(("a step", f"{size:,}", f"images, {forecast.share:,} per GPU{parts}; {size * tokens:,} tokens"))
    if schedule.steps is not None:
        images = schedule.steps * size
        epochs = "" if count is None else f", {images / count:,.1f} epochs"
        shown = f"steps{epochs}, {scaled(images)} images, {scaled(images * tokens)} tokens"
        rows.append(("the run", f"{schedule.steps:,}", shown))
    return rows


def compute(forecast: Forecast) -> list[Row]:
    """FLOPs, forward and backward, and how long they take."""
    machine, flops, step = forecast.machine, forecast.costs.work.flops, forecast.seconds_per_step
    rows: list[Row] = [
        ("a token", f"{scaled(flops / forecast.tokens_per_image)}FLOP"),
        ("an image", f"{scaled(flops)}FLOP"),
        ("a step", f"{scaled(forecast.flops_per_step)}FLOP"),
        (
            "a step takes",
            f"{step:.3g} s" if step >= 1 else f"{1000 * step:.3g} ms",
            f"at {machine.utilization:.0%} (assumed) of {machine.tflops:g} TFLOP/s per GPU",
        ),
    ]
    if forecast.schedule.steps is not None and forecast.hours is not None:
        rows.append(("the run", f"{scaled(forecast.flops_per_step * forecast.schedule.steps)}FLOP"))
        rows.append(("the run takes", f"{forecast.hours:,.1f} h", f"{forecast.hours * machine.gpus:,.0f} GPU hours"))
    if forecast.costs.checkpointed.flops > flops:
        more = forecast.costs.checkpointed.flops / flops
        rows.append(("checkpointed", f"x {more:.2f}", "as the blocks run forward twice"))
    return rows


def memory_rows(forecast: Forecast) -> list[Row]:
    """Memory by part and way, below the names of the ways."""
    ways, room = forecast.memory, forecast.machine.memory
    single = forecast.machine.gpus == 1
    rows: list[Row] = [("", *("one GPU" + way.removeprefix("DDP") if single else way for way in ways))]
    for part in dict.fromkeys(part for parts in ways.values() for part in parts):
        cells = [f"{parts[part] / GB:.2f}" if parts.get(part) else "" for parts in ways.values()]
        rows += [(part, *cells)] if any(cells) else []
    rows.append(("all, in training", *(f"{sum(parts.values()) / GB:.2f}" for parts in ways.values())))
    rows.append(("main process, evaluating", *(f"{forecast.evaluating(way) / GB:.2f}" for way in ways)))
    rows.append((f"of {room:.3g} GB", *(f"{forecast.needs(way) / GB / room:.0%}" for way in ways)))
    rows.append(("fits, a tenth being left free", *("yes" if forecast.fits(way) else "no" for way in ways)))
    return rows


def disk(forecast: Forecast) -> list[Row]:
    """What is written."""
    rows: list[Row] = []
    if forecast.dataset is not None:
        rows.append(("token dataset", f"{forecast.dataset / GB:,.2f} GB", "training rows"))
    state, most = forecast.sizes.state / GB, STATES + 1
    kept = f"{STATES} are kept, {most} are there while one is written: {most * state:,.2f} GB"
    rows.append(("a resume state", f"{state:,.2f} GB", kept))
    rows.append(("snapshot for users", f"{forecast.snapshot / GB:,.2f} GB"))
    return rows


def scaled(number: float) -> str:
    """Three digits and a prefix: `43.6 T`."""
    for prefix, size in PREFIXES.items():
        if number >= size:
            return f"{number / size:.3g} {prefix}" if number / size < 999.5 else f"{number / size:.0f} {prefix}"
    return f"{number:.3g} "


# What to mind -------------------------------------------------------------------------------------


def warnings(forecast: Forecast) -> list[str]:
    """What training would refuse, what does not fit and what would, and what was not known."""
    gpus, schedule, found = forecast.machine.gpus, forecast.schedule, list(forecast.notes)
    shares, size = gpus * schedule.accumulate, schedule.batch_size
    if size % shares:
        near = sorted({max(1, size // shares) * shares, -(-size // shares) * shares})
        found.append(
            f"train.batch_size: {size} is not a multiple of gpus x train.accumulate ({gpus} x "
            f"{schedule.accumulate}), which training refuses; {' or '.join(map(str, near))} is"
        )
    if schedule.steps is None:
        found.append(
            "train.steps: null, so the run ends by train.minutes, and neither its FLOPs nor its hours are told"
        )
    if forecast.rows is None:
        found.append("rows: not known, so there are no epochs; give rows=N")
    way = WAYS[1] if schedule.checkpointing and WAYS[1] in forecast.memory else WAYS[0]
    if not forecast.fits(way):
        needed = forecast.needs(way) / GB
        found.append(f"{way} needs {needed:.3g} GB, and there are {forecast.machine.memory:.3g} GB; {remedy(forecast)}")
    return found


def remedy(forecast: Forecast) -> str:
    """What would make it fit: another way to train, or smaller micro-batches."""
    if others := [way for way in forecast.memory if forecast.fits(way)]:
        return f"what fits: {'; '.join(others)}"
    if all(forecast.evaluating(way) > FULL * GB * forecast.machine.memory for way in forecast.memory):
        return "the evaluation alone is too large for it"
    room, most = FULL * GB * forecast.machine.memory, {}
    for way in forecast.memory:
        turns = (forecast.costs.checkpointed if way.endswith("checkpointed") else forecast.costs.work).turns
        moving = max(sum(turn.parts.values()) + turn.working for turn in turns)  # grows with the images
        parts = memory(forecast.sizes, turns, forecast.machine.gpus, way.startswith("FSDP"), accumulate=2)
        most[way] = int(0.99 * forecast.images_at_a_time * (room - sum(parts.values()) + moving) // moving)
    way = max(most, key=lambda name: most[name])
    if most[way] < 1:
        return "nothing here makes it fit: it takes more GPUs with FSDP, or larger ones"
    return f"what fits: {way} with {most[way]:,} images at a time or fewer, by train.accumulate or more GPUs"
