"""The figures of a planned run, and the page that shows them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..config.arguments import WIDTH
from .budget import FULL, GPUS, STATES, Sizes, at_evaluation, memory, seconds
from .costs import Turn

GB = 1e9
WAYS = ("DDP", "DDP, checkpointed", "FSDP", "FSDP, checkpointed")
LABELS, NUMBERS = 30, 12  # widths of columns
PREFIXES = {"Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}


@dataclass(frozen=True)
class Forecast:
    """What a run takes. `turns` and `flops` (forward and backward of one image) are those of a step as it is, and
    `again` and `more` those with its blocks checkpointed; `evaluation`, `dataset` and `snapshot` are bytes; `shards`
    says whether FSDP is for it."""

    title: str
    config: Any
    sizes: Sizes
    turns: list[Turn]
    again: list[Turn]
    flops: int
    more: int
    evaluation: int
    tokens_per_image: int
    rows: int | None
    shards: bool
    dataset: int | None
    snapshot: int
    notes: list[str] = field(default_factory=list)

    @property
    def gpu_memory(self) -> float:
        """GB of one GPU."""
        return float(self.config.gpu_memory or GPUS[self.config.gpu].memory)

    @property
    def tflops(self) -> float:
        """Peak of one GPU."""
        return float(self.config.peak_tflops or GPUS[self.config.gpu].tflops)

    @property
    def share(self) -> int:
        """Images of a step for each GPU, rounded up where they do not divide."""
        return -(-int(self.config.train.batch_size) // int(self.config.gpus))

    @property
    def images_at_a_time(self) -> int:
        """Of them, those of a micro-batch."""
        return -(-self.share // int(self.config.train.accumulate))

    @cached_property
    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes on the fullest GPU, by part, for each way to train."""
        gpus, sizes, accumulate = self.config.gpus, self.sizes, self.config.train.accumulate
        found = {WAYS[0]: memory(sizes, self.turns, gpus, accumulate=accumulate)}
        if sizes.blocks:
            found[WAYS[1]] = memory(sizes, self.again, gpus, accumulate=accumulate)
        if sizes.blocks and self.shards and gpus > 1:
            found[WAYS[2]] = memory(sizes, self.turns, gpus, fsdp=True)
            found[WAYS[3]] = memory(sizes, self.again, gpus, fsdp=True)
        return found

    @property
    def flops_per_step(self) -> int:
        """Of all GPUs together."""
        return self.flops * int(self.config.train.batch_size)

    @property
    def seconds_per_step(self) -> float:
        """If the assumed share of the peak is reached."""
        return seconds(self.flops_per_step, self.config.gpus, self.tflops, self.config.utilization)

    @property
    def hours(self) -> float | None:
        """Of the whole run; None where it ends by the clock."""
        steps = self.config.train.steps
        return None if steps is None else steps * self.seconds_per_step / 3600

    def evaluating(self, way: str) -> int:
        """Bytes on the main process while it evaluates."""
        fsdp = way.startswith("FSDP")
        return at_evaluation(self.sizes, self.memory[way], self.evaluation, self.config.gpus, fsdp)

    def needs(self, way: str) -> int:
        """Bytes on the fullest GPU at the worst moment."""
        return max(sum(self.memory[way].values()), self.evaluating(way))

    def fits(self, way: str) -> bool:
        """Whether it leaves a tenth of a GPU free."""
        return self.needs(way) <= FULL * GB * self.gpu_memory


# The page -----------------------------------------------------------------------------------------


def page_of(forecast: Forecast) -> str:
    """What `smalti plan` prints."""
    config = forecast.config
    gpu = f"{config.gpus:,} x {config.gpu}" if config.gpu_memory is None else f"{config.gpus:,} GPUs"
    lines = [f"{forecast.title}; {gpu}, {config.precision}", ""]
    for section in (parameters, training, compute, memory_table, disk):
        lines += [*section(forecast), ""]
    lines += [line for note in warnings(forecast) for line in textwrap.wrap(f"warning: {note}", WIDTH)]
    return "\n".join(lines).rstrip()


def row(label: str, value: str, rest: str = "") -> str:
    """A line of the page."""
    return f"  {label:<{LABELS}}{value:>{NUMBERS + 2}}{'  ' if rest else ''}{rest}"


def parameters(forecast: Forecast) -> list[str]:
    """How many, by part."""
    total = forecast.sizes.parameters
    lines = [row(name, f"{count:,}", f"{count / max(1, total):.1%}") for name, count in forecast.sizes.parts.items()]
    return ["parameters", *lines, row("all", f"{total:,}")]


def training(forecast: Forecast) -> list[str]:
    """Rows, epochs and batches."""
    config, tokens, rows = forecast.config, forecast.tokens_per_image, forecast.rows
    train, steps = config.train, config.train.steps
    lines = ["training"]
    if rows is not None:
        lines.append(row("an epoch", f"{rows:,}", f"images, {rows * tokens:,} tokens"))
    parts = f" in {train.accumulate} parts" if train.accumulate > 1 else ""
    lines.append(
        row(
            "a step",
            f"{train.batch_size:,}",
            f"images, {forecast.share:,} per GPU{parts}; {train.batch_size * tokens:,} tokens",
        )
    )
    if steps is not None:
        images = steps * train.batch_size
        epochs = "" if rows is None else f", {images / rows:,.1f} epochs"
        lines.append(
            row("the run", f"{steps:,}", f"steps{epochs}, {scaled(images)} images, {scaled(images * tokens)} tokens")
        )
    return lines


def compute(forecast: Forecast) -> list[str]:
    """FLOPs, forward and backward, and how long they take."""
    config, flops = forecast.config, forecast.flops
    lines = [
        "compute, forward and backward, attention as two full matrix products",
        row("a token", f"{scaled(flops / forecast.tokens_per_image)}FLOP"),
        row("an image", f"{scaled(flops)}FLOP"),
        row("a step", f"{scaled(forecast.flops_per_step)}FLOP"),
    ]
    speed = f"at {config.utilization:.0%} (assumed) of {forecast.tflops:g} TFLOP/s per GPU"
    step = forecast.seconds_per_step
    lines.append(row("a step takes", f"{step:.3g} s" if step >= 1 else f"{1000 * step:.3g} ms", speed))
    if forecast.hours is not None:
        lines.append(row("the run", f"{scaled(forecast.flops_per_step * config.train.steps)}FLOP"))
        lines.append(row("the run takes", f"{forecast.hours:,.1f} h", f"{forecast.hours * config.gpus:,.0f} GPU hours"))
    if forecast.more > flops:
        lines.append(row("checkpointed", f"x {forecast.more / flops:.2f}", "as the blocks run forward twice"))
    return lines


def memory_table(forecast: Forecast) -> list[str]:
    """Memory by part and way."""
    ways, room = forecast.memory, forecast.gpu_memory
    names = {way: "one GPU" + way.removeprefix("DDP") if forecast.config.gpus == 1 else way for way in ways}
    widths = [max(NUMBERS, len(name)) + 2 for name in names.values()]

    def line(label: str, cells: Iterable[str]) -> str:
        return (f"  {label:<{LABELS}}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))).rstrip()

    lines = [line("", names.values())]
    for part in dict.fromkeys(part for parts in ways.values() for part in parts):
        cells = [f"{parts[part] / GB:.2f}" if parts.get(part) else "" for parts in ways.values()]
        lines += [line(part, cells)] if any(cells) else []
    lines.append(line("all, in training", [f"{sum(parts.values()) / GB:.2f}" for parts in ways.values()]))
    lines.append(line("main process, evaluating", [f"{forecast.evaluating(way) / GB:.2f}" for way in ways]))
    lines.append(line(f"of {room:.3g} GB", [f"{forecast.needs(way) / GB / room:.0%}" for way in ways]))
    lines.append(line("fits, a tenth being left free", ["yes" if forecast.fits(way) else "no" for way in ways]))
    return ["memory of a GPU, in GB of 10^9 bytes", *lines]


def disk(forecast: Forecast) -> list[str]:
    """What is written."""
    lines = ["disk"]
    if forecast.dataset is not None:
        lines.append(row("token dataset", f"{forecast.dataset / GB:,.2f} GB", "training rows"))
    state = forecast.sizes.state / GB
    lines.append(
        row(
            "a resume state",
            f"{state:,.2f} GB",
            f"{STATES} are kept, {STATES + 1} are there while one is written: {(STATES + 1) * state:,.2f} GB",
        )
    )
    lines.append(row("snapshot for users", f"{forecast.snapshot / GB:,.2f} GB"))
    return lines


def scaled(number: float) -> str:
    """Three digits and a prefix: `43.6 T`."""
    for prefix, size in PREFIXES.items():
        if number >= size:
            return f"{number / size:.3g} {prefix}" if number / size < 999.5 else f"{number / size:.0f} {prefix}"
    return f"{number:.3g} "


# What to mind -------------------------------------------------------------------------------------


def warnings(forecast: Forecast) -> list[str]:
    """What training would refuse, what does not fit and what would, and what was not known."""
    config, found = forecast.config, list(forecast.notes)
    shares, size = config.gpus * config.train.accumulate, config.train.batch_size
    if size % shares:
        near = sorted({max(1, size // shares) * shares, -(-size // shares) * shares})
        found.append(
            f"train.batch_size: {size} is not a multiple of gpus x train.accumulate ({config.gpus} x "
            f"{config.train.accumulate}), which training refuses; {' or '.join(map(str, near))} is"
        )
    if config.train.steps is None:
        found.append(
            "train.steps: null, so the run ends by train.minutes, and neither its FLOPs nor its hours are told"
        )
    if forecast.rows is None:
        found.append("rows: not known, so there are no epochs; give rows=N")
    way = WAYS[1] if getattr(config.train, "checkpointing", False) and WAYS[1] in forecast.memory else WAYS[0]
    if not forecast.fits(way):
        needed = forecast.needs(way) / GB
        found.append(f"{way} needs {needed:.3g} GB, and there are {forecast.gpu_memory:.3g} GB; {remedy(forecast)}")
    return found


def remedy(forecast: Forecast) -> str:
    """What would make it fit: another way to train, or smaller micro-batches."""
    if others := [way for way in forecast.memory if forecast.fits(way)]:
        return f"what fits: {'; '.join(others)}"
    if all(forecast.evaluating(way) > FULL * GB * forecast.gpu_memory for way in forecast.memory):
        return "the evaluation alone is too large for it"
    room, most = FULL * GB * forecast.gpu_memory, {}
    for way in forecast.memory:
        turns = forecast.again if way.endswith("checkpointed") else forecast.turns
        moving = max(sum(turn.parts.values()) + turn.working for turn in turns)  # grows with the images
        parts = memory(forecast.sizes, turns, forecast.config.gpus, way.startswith("FSDP"), accumulate=2)
        most[way] = int(0.99 * forecast.images_at_a_time * (room - sum(parts.values()) + moving) // moving)
    way = max(most, key=lambda name: most[name])
    if most[way] < 1:
        return "nothing here makes it fit: it takes more GPUs with FSDP, or larger ones"
    return f"what fits: {way} with {most[way]:,} images at a time or fewer, by train.accumulate or more GPUs"
