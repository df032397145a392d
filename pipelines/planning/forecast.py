"""The figures of a planned run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from ..training.schedule import TrainConfig
from .budget import FULL, Sizes, at_evaluation, memory, seconds
from .costs import Costs
from .pauses import FORWARD, FUSED, LAUNCH, Every, Looks, Pauses, pauses_of

GB = 1e9
WAYS = ("DDP", "DDP, checkpointed", "FSDP", "FSDP, checkpointed")


@dataclass(frozen=True)
class Machine:
    """`gpus` of a kind that is called `name`, with `memory` in GB and a peak of `tflops` TFLOP/s, of which a share
    (`utilization`) is reached, for the reason that `because` gives; `precision` is that of training."""

    name: str
    gpus: int
    memory: float
    tflops: float
    utilization: float
    because: str
    precision: str


@dataclass(frozen=True)
class Schedule:
    """Images of a step, in how many micro-batches, how many steps and minutes, of which the first ends the run (None:
    the other does), how many steps between evaluations, previews and saves, and whether blocks are checkpointed and
    compiled."""

    batch_size: int
    accumulate: int
    steps: int | None
    minutes: float | None
    every: Every
    checkpointing: bool
    compile: bool


def schedule_of(train: TrainConfig) -> Schedule:
    """What a run says of its steps."""
    every = Every(train.evaluate_every, train.preview_every, train.save_every)
    return Schedule(
        train.batch_size, train.accumulate, train.steps, train.minutes, every, train.checkpointing, train.compile
    )


@dataclass(frozen=True)
class Forecast:
    """What a run takes. `dataset`, `snapshot` and `frequencies` (of the table that `smalti evaluate` compares a prior
    with) are bytes; `shards` says whether FSDP is for it; a step costs as much as so many forward `passes`."""

    title: str
    machine: Machine
    schedule: Schedule
    sizes: Sizes
    costs: Costs
    looks: Looks
    tokens_per_image: int
    rows: int | None
    shards: bool
    dataset: int | None
    snapshot: int
    frequencies: int = 0
    passes: int = FORWARD
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
        """If the assumed share of the peak is reached; or for which operations are launched, where that is more."""
        machine = self.machine
        computing = seconds(self.flops_per_step, machine.gpus, machine.tflops, machine.utilization)
        return max(computing, LAUNCH * self.launches)

    @property
    def launches(self) -> int:
        """Operations of a step, about: `passes` times those of a forward pass; compiled, some in one."""
        together = FUSED if self.schedule.compile else 1
        return self.passes * self.schedule.accumulate * self.costs.launches // together

    @property
    def pauses(self) -> Pauses:
        """What the run does beside its steps."""
        machine = self.machine
        reached = machine.tflops * 1e12 * machine.utilization
        flops = FORWARD * self.costs.work.flops / self.passes
        return pauses_of(self.looks, flops, machine.gpus, reached, self.sizes.state, self.snapshot)

    @property
    def beside(self) -> float:
        """The share of the wall clock for which training stands still."""
        return self.pauses.share(self.schedule.every, self.seconds_per_step)

    @property
    def whole_step(self) -> float:
        """Seconds from one step to the next, with a step's share of all that is done beside them."""
        return self.seconds_per_step / (1 - self.beside)

    @property
    def steps_by_clock(self) -> int | None:
        """About how many steps `minutes` allow; None without these."""
        minutes = self.schedule.minutes
        return None if minutes is None else max(1, round(60 * minutes / self.whole_step))

    @property
    def steps(self) -> int | None:
        """Of the whole run, if it has an end."""
        return min((count for count in (self.schedule.steps, self.steps_by_clock) if count is not None), default=None)

    @property
    def hours(self) -> float | None:
        """Of the whole run, if it has an end."""
        return None if self.steps is None else self.steps * self.whole_step / 3600

    def evaluating(self, way: str) -> int:
        """Bytes on the main process while it evaluates."""
        fsdp = way.startswith("FSDP")
        return at_evaluation(self.sizes, self.memory[way], self.costs.evaluation, self.machine.gpus, fsdp)

    @property
    def afterwards(self) -> int:
        """Bytes of `smalti evaluate`: the snapshot, an evaluation, and the table of frequencies."""
        return self.snapshot + self.costs.evaluation + self.frequencies

    def needs(self, way: str) -> int:
        """Bytes on the fullest GPU at the worst moment."""
        return max(sum(self.memory[way].values()), self.evaluating(way))

    def fits(self, way: str) -> bool:
        """Whether it leaves a tenth of a GPU free."""
        return self.needs(way) <= FULL * GB * self.machine.memory
