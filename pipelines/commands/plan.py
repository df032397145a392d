"""Estimate the cost of a training run: parameters, GPU memory, FLOPs, hours and disk space.

It accepts the keys of `smalti train_prior` or `smalti train_tokenizer`, depending on `model.kind`, and the keys below.
It runs training steps of two batch sizes on random data on this machine, and extrapolates their memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from prior import Prior
from prior.columns import LABEL, ClassColumn, Column
from prior.given import Given
from prior.objectives import Alignment, Likelihood, alignment_problem
from tokenizer import TokenGrid, Tokenizer

from ..config import Config, UserError, choose_device, run_command, user_errors
from ..config.arguments import read_arguments, sort_words
from ..config.errors import did_you_mean, exit_codes
from ..config.importing import import_all
from ..config.table import count_of, table
from ..metrics.perceptual import Perceptual
from ..tokens.meta import META, read_meta
from ..train_prior import PriorTask, TrainPriorConfig, choose_columns, facts_of
from ..train_prior import defaults as prior_defaults
from ..train_tokenizer import TokenizerTask, TrainTokenizerConfig, build_tokenizer, require_networks
from ..train_tokenizer import defaults as tokenizer_defaults
from ..training.blocks import checkpoint_blocks, repeated_blocks

GB, USABLE = 1e9, 0.9  # bytes; usable share of the memory
LARGE = 1e11  # FLOPs per image above which smaller batches are measured


# Dense bf16 peak in TFLOP/s (without sparsity) and memory in GB, from the vendors' datasheets.
GPUS = {
    "a100": (312, 80),  # SXM
    "a100_40": (312, 40),
    "h100": (989, 80),  # SXM
    "h100_pcie": (756, 80),
    "h200": (989, 141),
    "b200": (2250, 180),  # an eighth of the HGX board
    "mi300x": (1307, 192),
    "l40s": (362, 48),
    "l4": (121, 24),
    "rtx4090": (165, 24),  # accumulating in float32
}
Count = Annotated[int, Field(ge=1, le=4096)]


class PlanConfig(Config):
    often = "gpus gpu peak_tflops utilization grid vocab_size classes rows batches device"
    examples = (
        "--config gpt_digits grid=7,7 vocab_size=128 classes=10 rows=4000 gpu=rtx4090",
        "--config vqgan_imagenet256 rows=1281167 gpus=8 gpu=a100",
    )

    out: str = Field("", description="run folder; ignored")
    gpus: int = Field(1, ge=1, le=65536, description="total number of GPUs, one process each")
    gpu: str = Field("h100", description=f"kind of GPU, with its published memory and peak: {', '.join(GPUS)}")
    peak_tflops: float | None = Field(None, gt=0, description="peak TFLOP/s of one GPU, for a kind that is not listed")
    utilization: float = Field(0.3, gt=0, le=1, description="share of the peak that training achieves")
    rows: int | None = Field(None, ge=1, description="number of training images; default: from the token dataset")
    batches: tuple[Count, Count] | None = Field(
        None, description="two batch sizes to measure memory at; default: 8,16, or 2,4 for a large model"
    )
    device: Literal["cpu", "cuda", "auto"] = Field("auto", description="device of this machine to measure on")

    @field_validator("gpu", mode="before")
    @classmethod
    def _gpu_from_number(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value  # YAML reads 4090 as a number


class PlanPriorConfig(PlanConfig, TrainPriorConfig):
    """A run of `train_prior`."""

    tokens: str = Field("", description="token dataset, which replaces grid, vocab_size and classes")
    grid: tuple[int, ...] | None = Field(None, description="shape of the token grid, such as 16,16")
    vocab_size: int | None = Field(None, ge=1, le=1 << 20, description="size of the vocabulary")
    classes: int | None = Field(None, ge=0, le=1 << 20, description="number of classes; 0: unconditional")


class PlanTokenizerConfig(PlanConfig, TrainTokenizerConfig):
    """A run of `train_tokenizer`."""


class PlannedPrior(PriorTask):
    """The task of `train_prior` on random tokens."""

    config: PlanPriorConfig
    progress = 0.5

    def __init__(self, config: PlanPriorConfig, grid: TokenGrid, columns: Mapping[str, Column]) -> None:
        self.config, self.grid = config, grid
        choices = {key: value for key, value in config.model.items() if key != "kind"}
        create = partial(Prior.create, config.model["kind"], **facts_of(grid, columns), **choices)
        self.model, self.frozen = create(), list[nn.Module]()
        objective: nn.Module = Likelihood(self.model)
        if config.objective == "cca":
            if problem := alignment_problem(self.model):
                raise UserError(f"objective: cca {problem}")
            self.frozen = [reference := create()]
            objective = Alignment(self.model, reference, 1.0, 1.0)
        self.nets = {"model": objective}
        self.param_groups = {"model": list(self.model.parameters())}

    def random_batch(self, count: int) -> tuple[Any, ...]:
        """Return tokens, a label and null values of columns; with cca also contrasting labels."""
        columns, device = self.model.columns, self.model.device
        tokens = torch.randint(self.grid.vocab_size, (count, *self.grid.shape), device=device)
        rows = {name: column.null(count, device) for name, column in columns.items()}
        rows |= {LABEL: tokens.new_zeros(count)} if LABEL in columns else {}
        return tokens, Given(columns, rows, count), *[tokens.new_zeros(count)] * len(self.frozen)


class PlannedTokenizer(TokenizerTask):
    """The task of `train_tokenizer` on random images."""

    config: PlanTokenizerConfig

    def __init__(self, config: PlanTokenizerConfig) -> None:
        channels, height, width = config.data.spec.shape
        self.config = config
        require_networks(config.loss, channels)
        self.set_up(build_tokenizer(config.model, (height, width), channels, config.data))
        self.grid, self.perceptual, self.frozen = self.tokenizer.grid, None, list[nn.Module]()
        if not self.param_groups:
            raise UserError(f"model.kind: a {self.tokenizer.name} tokenizer has no weights to train")
        if config.loss.perceptual:
            self.perceptual = Perceptual(config.loss.perceptual_net, self.tokenizer.device, pretrained=False)
            self.frozen = [self.perceptual.net]

    def random_batch(self, count: int) -> tuple[Tensor, ...]:
        return (torch.randn(count, *self.tokenizer.image_shape, device=self.tokenizer.device),)


@dataclass(frozen=True)
class Plan:
    """Requirements of a run.

    `states` (weights, gradients, moments, averages) and `checkpoint` are in bytes; `flops` are per image, forward and
    backward; `peaks` maps two batch sizes to the bytes of a step in addition to `states`."""

    config: PlanPriorConfig | PlanTokenizerConfig
    grid: TokenGrid
    rows: int | None
    parameters: int
    states: int
    checkpoint: int
    flops: int
    peaks: dict[int, int]

    @property
    def flops_per_step(self) -> int:
        return self.flops * self.config.train.batch_size

    @property
    def tflops(self) -> float:
        return self.config.peak_tflops or GPUS[self.config.gpu][0]

    @property
    def seconds_per_step(self) -> float:
        return self.flops_per_step / (self.tflops * 1e12 * self.config.gpus * self.config.utilization)

    @property
    def steps(self) -> int:
        """Number of steps, limited by `train.steps` or `train.minutes`."""
        train = self.config.train
        by_clock = None if train.minutes is None else max(1, round(60 * train.minutes / self.seconds_per_step))
        return min(steps for steps in (train.steps, by_clock) if steps is not None)

    def memory(self, images: int) -> int:
        """Estimate the bytes of one GPU with `images` per batch, extrapolating the measured `peaks` linearly."""
        (small, low), (large, high) = self.peaks.items()
        return self.states + round(low + (images - small) * (high - low) / (large - small))


def run(config: PlanPriorConfig | PlanTokenizerConfig) -> Plan:
    """Print and return the plan. Raises `UserError` and `ConfigError`."""
    check_plan(config)
    device, rows = choose_device(config.device), config.rows
    build: Callable[[], PlannedPrior | PlannedTokenizer]
    if isinstance(config, PlanPriorConfig):
        grid, columns, rows = find_facts(config)
        build = partial(PlannedPrior, config, grid, columns)
    else:
        build = partial(PlannedTokenizer, config)
    with torch.device("meta"):
        parameters, states, checkpoint = count_state_bytes(build())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if states > USABLE * free:
        raise UserError(
            f"device: {parameters:,} parameters need {format_quantity(states)}B with gradients, moments and averages, "
            f"but {device} has {format_quantity(free)}B free; run the plan on a larger machine"
        )
    with device:
        task = build()
    for module in (task.model, *task.nets.values(), *task.frozen):
        module.to(device)  # buffers that are made on the CPU, such as orders
    plan = Plan(config, task.grid, rows, parameters, states, checkpoint, *measure_training(task, device))
    print(format_plan(plan))
    return plan


def check_plan(config: PlanPriorConfig | PlanTokenizerConfig) -> None:
    """Raise `UserError` for settings that are invalid or incomplete."""
    train, processes = config.train, config.gpus * config.train.accumulate
    if config.gpu not in GPUS:
        near = did_you_mean(config.gpu, GPUS, "for others set peak_tflops")
        raise UserError(f"gpu: expected one of {', '.join(GPUS)} (got {config.gpu!r}); {near}")
    if train.batch_size % processes:
        raise UserError(f"train.batch_size: {train.batch_size} is not a multiple of gpus x accumulate ({processes})")
    if train.steps is None and train.minutes is None:
        raise UserError("train.steps: null needs train.minutes to end the run")
    if train.mixed_precision == "no" and config.peak_tflops is None:
        raise UserError("peak_tflops: missing; with train.mixed_precision=no, give the peak for float32 or TF32")
    if config.batches and config.batches[0] >= config.batches[1]:
        raise UserError(f"batches: the second must be larger (got {config.batches[0]}, {config.batches[1]})")


def find_facts(config: PlanPriorConfig) -> tuple[TokenGrid, Mapping[str, Column], int | None]:
    """Return the grid, the columns and the number of training rows, from the keys or the token dataset."""
    values = {"grid": config.grid, "vocab_size": config.vocab_size, "classes": config.classes}
    missing = [name for name, value in values.items() if value is None]
    if len(missing) == 3 and (Path(config.tokens) / META).is_file():
        meta = read_meta(Path(config.tokens))
        rows = config.rows or sum(meta.shards.get("train", [])) or None
        return meta.grid, choose_columns(meta.columns, config.attributes), rows
    if missing:
        raise UserError(
            f"{', '.join(missing)}: missing; give tokens=FOLDER, or for example grid=16,16 vocab_size=16384 "
            "classes=1000 (0: unconditional)"
        )
    with user_errors(ValueError, prefix="grid: "):
        grid = TokenGrid(config.grid or (), config.vocab_size or 0)
        label: dict[str, Column] = {LABEL: ClassColumn.numbered(config.classes)} if config.classes else {}
        return grid, choose_columns(label, config.attributes), config.rows


def count_state_bytes(task: PlannedPrior | PlannedTokenizer) -> tuple[int, int, int]:
    """Count the parameters, and the bytes of a run's states and of its checkpoint."""
    train, model = task.config.train, task.model
    weights = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    gradients = sum(parameter.nbytes for parameters in task.param_groups.values() for parameter in parameters)
    muon = task.matrices() if train.optimizer == "muon" else ()
    moments = 2 * gradients - sum(matrix.nbytes for matrix in muon)  # AdamW keeps two per weight, Muon one
    frozen = sum(value.nbytes for module in task.frozen for value in module.parameters())
    saved = sum(value.nbytes for value in model.state_dict().values())
    keeps_best = train.keep_best and task.score({"psnr": 0.0, "bits_per_token": 0.0}) is not None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, 2 * weights + gradients + moments + frozen, (2 + keeps_best) * saved + moments


def measure_training(task: PlannedPrior | PlannedTokenizer, device: torch.device) -> tuple[int, dict[int, int]]:
    """Measure the training FLOPs of an image, and the peak bytes of a step of each batch size in addition to the
    states. Gradients are allocated beforehand, as with DDP."""
    from accelerate.utils import convert_outputs_to_fp32

    train = task.config.train
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=train.mixed_precision != "no")
    task.model.train()
    if train.checkpointing:
        checkpoint_blocks([block for net in task.nets.values() for block in repeated_blocks(net)])
    for net in task.nets.values():
        net.forward = convert_outputs_to_fp32(autocast(net.forward))  # as accelerate does
    for parameters in task.param_groups.values():
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    # FLOPs of matrix products and convolutions; attention counts as two full products, masked or not.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute_gradients(task, 1)
    flops = counter.get_total_flops()
    batches = task.config.batches or ((2, 4) if flops > LARGE else (8, 16))
    return flops, {count: measure_peak_bytes(device, partial(compute_gradients, task, count)) for count in batches}


def compute_gradients(task: PlannedPrior | PlannedTokenizer, count: int) -> None:
    """Run all losses forward and backward on `count` images, at a late step, when a critic has its full weight."""
    batch, step = task.random_batch(count), sys.maxsize
    for group_name in task.active_groups(step):
        for name, parameters in task.param_groups.items():
            for parameter in parameters:
                parameter.requires_grad_(name == group_name)
        task.loss(group_name, batch, step)[0].backward()


def measure_peak_bytes(device: torch.device, call: Callable[[], None]) -> int:
    """Return the peak bytes of tensors allocated during `call`."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # silence the profiler
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler and profiler.profiler.kineto_results
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    return max(accumulate(size for _, size in events))


def format_plan(plan: Plan) -> str:
    config, train, tokens = plan.config, plan.config.train, len(plan.grid)
    images, each = plan.steps * train.batch_size, train.batch_size // (config.gpus * train.accumulate)
    memory, room = plan.memory(each), GPUS[config.gpu][1] * GB
    epochs = f"{images / plan.rows:,.1f} epochs, " if plan.rows else ""
    fits = f" of {format_quantity(room)}B, {'enough' if memory <= USABLE * room else 'too little'}"
    peak = f"{config.utilization:.0%} of {config.gpus:,} x {plan.tflops:g} TFLOP/s"
    time = format_duration(plan.steps * plan.seconds_per_step)
    small, large = plan.peaks
    rows = [
        ("parameters", f"{plan.parameters:,}"),
        ("per image", f"{format_quantity(plan.flops)}FLOP forward and backward, {tokens:,} tokens"),
        ("per step", f"{format_quantity(plan.flops_per_step)}FLOP, {count_of(train.batch_size, 'image')}"),
        ("", f"{format_duration(plan.seconds_per_step)} at {peak}"),
        ("in total", f"{plan.steps:,} steps, {epochs}{images:,} images"),
        (
            "",
            f"{format_quantity(plan.flops_per_step * plan.steps)}FLOP, {time} without evaluation, previews and saving",
        ),
        ("memory per GPU", f"{format_quantity(memory)}B{'' if config.peak_tflops else fits}, for batches of {each:,}:"),
        ("", f"{format_quantity(plan.states)}B of weights, gradients, moments and averages, and"),
        ("", f"{format_quantity(memory - plan.states)}B of activations, extrapolated from {small} and {large} images"),
    ]
    if config.gpus > 1 and isinstance(config, PlanPriorConfig) and config.objective != "cca":
        rows.append(("  with FSDP", f"about {format_quantity(memory - plan.states + plan.states / config.gpus)}B"))
    rows.append(("checkpoint", f"{format_quantity(plan.checkpoint)}B on disk; up to three at a time"))
    shape, kind = " x ".join(map(str, plan.grid.shape)), "GPU" if config.peak_tflops else config.gpu.upper()
    head = f"{config.model['kind']}: {shape} tokens per image, vocabulary of {plan.grid.vocab_size:,}, on"
    return f"{head} {config.gpus:,} x {kind} (gpus= and gpu= change this)\n{table(rows)}"


def format_quantity(number: float) -> str:
    """Format with three digits and a prefix: `43.6 T`."""
    power = min(7, max(0, (len(str(round(number))) - 1) // 3))
    return f"{number / 1000**power:.3g} {' kMGTPEZ'[power].strip()}"


def format_duration(seconds: float) -> str:
    """Format seconds in a suitable unit: `3.2 ms`, `1,170 h`."""
    units = {"h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3}
    unit = next((unit for unit, size in units.items() if seconds >= size), "ms")
    value = seconds / units[unit]
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def main(argv: list[str] | None = None) -> Plan:
    """Run the command line: of `train_tokenizer` if the last `model.kind` is a tokenizer, else of `train_prior`."""
    words = sort_words(sys.argv[1:] if argv is None else argv)
    with exit_codes():
        import_all(words.imports)
    models = [part["model"] for part in read_arguments(words)[0] if part.get("model")]
    kinds = [model.get("kind") if isinstance(model, dict) else model for model in models]
    kind = next((kind for kind in reversed(kinds) if kind), None)
    command = partial(run_command, run=run, argv=argv, verb="plan", description=__doc__)
    if Tokenizer.has(kind):
        return command(PlanTokenizerConfig, defaults=tokenizer_defaults)
    return command(PlanPriorConfig, defaults=prior_defaults)
