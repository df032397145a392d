"""The page that `smalti plan` prints of a planned run: its figures, and what to mind."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from ..config.table import table, width
from .budget import FULL, STATES, memory
from .forecast import GB, WAYS, Forecast
from .pauses import LAUNCH, MOST

PREFIXES = {"Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}

Row = tuple[str, ...]


def page_of(forecast: Forecast) -> str:
    """What `smalti plan` prints."""
    machine, compared = forecast.machine, range(1, 1 + len(WAYS))
    parts = [
        f"{forecast.title}; {machine.gpus:,} {machine.name}, {machine.precision}",
        section("parameters", parameters(forecast)),
        section("training", training(forecast)),
        section("compute, forward and backward, attention as two full matrix products", compute(forecast)),
        section("beside the steps, on round numbers for disk and host", beside(forecast)),
        section("memory of a GPU, in GB of 10^9 bytes", memory_rows(forecast), numbers=compared),
        section("disk", disk(forecast)),
        "\n".join(textwrap.fill(f"warning: {note}", width()) for note in warnings(forecast)),
    ]
    return "\n\n".join(parts).rstrip()


def section(title: str, rows: list[Row], numbers: Iterable[int] = (1,)) -> str:
    """A heading, and its rows below it; `numbers` are the columns of these."""
    return f"{title}\n{textwrap.indent(table(rows, right=numbers), '  ')}"


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
    if forecast.steps is not None:
        images = forecast.steps * size
        epochs = "" if count is None else f", {images / count:,.1f} epochs"
        shown = f"steps{epochs}, {scaled(images)} images, {scaled(images * tokens)} tokens"
        by_clock = schedule.minutes is not None and forecast.steps == forecast.steps_by_clock
        shown += f"; about, in the {schedule.minutes:g} minutes that it has" if by_clock else ""
        rows.append(("the run", f"{forecast.steps:,}", shown))
    return rows


def compute(forecast: Forecast) -> list[Row]:
    """FLOPs, forward and backward, and how long they take."""
    machine, flops, step = forecast.machine, forecast.costs.work.flops, forecast.seconds_per_step
    because = f"at {machine.utilization:.0%} ({machine.because}) of {machine.tflops:g} TFLOP/s per GPU"
    if step == LAUNCH * forecast.launches:
        because = f"in which its {forecast.launches:,} operations are launched; computing takes less"
    rows: list[Row] = [
        ("a token", f"{scaled(flops / forecast.tokens_per_image)}FLOP"),
        ("an image", f"{scaled(flops)}FLOP"),
        ("a step", f"{scaled(forecast.flops_per_step)}FLOP"),
        (
            "a step takes",
            f"{step:.3g} s" if step >= 1 else f"{1000 * step:.3g} ms",
            because,
        ),
    ]
    if forecast.steps is not None and forecast.hours is not None:
        hours, all_gpus = forecast.hours, forecast.hours * machine.gpus
        taken = f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
        rows.append(("the run", f"{scaled(forecast.flops_per_step * forecast.steps)}FLOP"))
        rows.append(("the run takes", taken, f"{all_gpus:,.0f} GPU hours" if all_gpus >= 1 else ""))
    if forecast.costs.checkpointed.flops > flops:
        more = forecast.costs.checkpointed.flops / flops
        rows.append(("checkpointed", f"x {more:.2f}", "as the blocks run forward twice"))
    return rows


def beside(forecast: Forecast) -> list[Row]:
    """How long training stands still, and how often."""
    pauses, every = forecast.pauses, forecast.schedule.every
    rows = [
        ("an evaluation", f"{pauses.evaluate:.3g} s", f"every {every.evaluate:,} steps, shared by all GPUs"),
        ("a preview", f"{pauses.preview:.3g} s", f"every {every.preview:,} steps"),
        ("a save", f"{pauses.save:.3g} s", f"every {every.save:,} steps; {pauses.written:.3g} s more in a thread"),
    ]
    return [*rows, ("all of them", f"{forecast.beside:.1%}", "of the wall clock")]


def memory_rows(forecast: Forecast) -> list[Row]:
    """Memory by part and way, below the names of the ways."""
    ways, room = forecast.memory, forecast.machine.memory
    single = forecast.machine.gpus == 1
    rows: list[Row] = [("", *("one GPU" + way.removeprefix("DDP") if single else way for way in ways))]
    for part in dict.fromkeys(part for parts in ways.values() for part in parts):
        cells = [f"{parts[part] / GB:.2f}" if parts.get(part) else "" for parts in ways.values()]
        rows += [(part, *cells)] if any(cells) else []
    rows.append(("all, in training", *(f"{sum(parts.values()) / GB:.2f}" for parts in ways.values())))
    rows.append(("while evaluating", *(f"{forecast.evaluating(way) / GB:.2f}" for way in ways)))
    rows.append(("smalti evaluate, on one", *[f"{forecast.afterwards / GB:.2f}"] * len(ways)))
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
    rows.append(("a checkpoint", f"{state:,.2f} GB", kept))
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
    if forecast.steps is None:
        found.append("train.steps: null needs train.minutes to end the run; its FLOPs and hours are not told")
    if forecast.steps is not None and forecast.seconds_per_step and forecast.beside > MOST:
        enough = forecast.pauses.steps_between(forecast.seconds_per_step)
        found.append(
            f"evaluations, previews and saves take {forecast.beside:.1%} of the wall clock; at train.evaluate_every, "
            f"train.preview_every and train.save_every {enough:,} they take {MOST:.0%}"
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
