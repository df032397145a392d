"""Say what a training run will take before it is started: parameters, memory, FLOPs, hours and disk.

It takes the command line of `smalti train_prior` or `smalti train_tokenizer` as it is (the model's kind says which),
and the keys below. Training steps on random data are run on this machine, and their memory is extrapolated.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import psutil
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from prior import Prior
from prior.objectives import Alignment, Likelihood, alignment_problem
from tokenizer import TokenGrid, Tokenizer
from tokenizer.files import read_json
from tokenizer.losses import total_loss
from tokenizer.model import CONFIG

from ..config import Config, UserError, choose_device, run_command
from ..config.arguments import read_arguments, sorted_words
from ..config.command import parse
from ..config.importing import import_asked
from ..config.table import table
from ..metrics.perceptual import Perceptual
from ..provenance import tokenizer_folder
from ..tokens.meta import META, read_meta
from ..train_prior import TrainPriorConfig
from ..train_prior import defaults as of_pipeline
from ..train_tokenizer import TrainTokenizerConfig, build_tokenizer
from ..train_tokenizer import defaults as of_init
from ..training.adversary import make_adversary
from ..training.blocks import checkpoint_blocks, repeated_blocks
from ..training.losses import loss_weights_of
from ..training.optimizers import hidden_matrices

GB, FULL = 1e9, 0.9  # bytes; share of a memory that can be planned with
LARGE = 1e11  # FLOPs of an image, from which on few are run


class GPU(NamedTuple):
    """Dense bf16 peak in TFLOP/s (no sparsity), and memory in GB, as its vendor publishes them."""

    tflops: float
    memory: float


GPUS = {
    "a100": GPU(312, 80),  # NVIDIA A100 datasheet, SXM
    "a100_40": GPU(312, 40),
    "h100": GPU(989, 80),  # NVIDIA H100 datasheet, SXM: half of its 1,979 with sparsity
    "h100_pcie": GPU(756, 80),  # likewise, half of 1,513
    "h200": GPU(989, 141),  # NVIDIA H200 datasheet, SXM
    "b200": GPU(2250, 180),  # NVIDIA HGX B200 datasheet, an eighth of the board
    "mi300x": GPU(1307, 192),  # AMD Instinct MI300X data sheet
    "l40s": GPU(362, 48),  # NVIDIA L40S datasheet
    "l4": GPU(121, 24),  # NVIDIA L4 datasheet, half of its 242 with sparsity
    "rtx4090": GPU(165, 24),  # NVIDIA Ada whitepaper, accumulating in float32
}
Count = Annotated[int, Field(ge=1, le=4096)]


class PlanConfig(Config):
    """Where the run will take place, and what its data will be like."""

    often = "gpus gpu peak_tflops utilization tokenizer grid vocab_size classes rows batches device"
    examples = (
        "--config gpt_digits tokenizer=vqvae_digits classes=10 rows=4000 gpu=rtx4090",
        "--config vqgan_imagenet256 rows=1281167 gpus=8 gpu=a100",
    )

    gpus: int = Field(1, ge=1, le=65536, description="GPUs, those of all machines together; a process for each")
    gpu: Literal["a100", "a100_40", "h100", "h100_pcie", "h200", "b200", "mi300x", "l40s", "l4", "rtx4090"] = Field(
        "h100", description="their kind, whose memory and peak are as published (dense, bf16)"
    )
    peak_tflops: float | None = Field(None, gt=0, description="peak of one GPU in TFLOP/s, for another kind")
    utilization: float = Field(0.3, gt=0, le=1, description="share of the peak that training reaches")
    tokenizer: str | None = Field(
        None,
        description="for a prior whose token dataset is not there yet: a preset of train_tokenizer, or a tokenizer's "
        "folder, from which grid and vocabulary follow",
    )
    grid: tuple[int, ...] | None = Field(None, description="shape of an image's tokens, where nothing says it")
    vocab_size: int | None = Field(None, ge=1, le=1 << 20, description="number of ids, where nothing says it")
    classes: int | None = Field(
        None, ge=0, le=1 << 20, description="number of classes, where nothing says it; 0: no labels"
    )
    rows: int | None = Field(None, ge=1, description="number of training rows, where nothing says it, for the epochs")
    batches: tuple[Count, Count] | None = Field(
        None,
        description="two batch sizes, of which steps are run to extrapolate memory linearly; null: 8 and 16, "
        "or 1 and 2 of a large model",
    )
    device: str = Field("auto", description="where these steps are run: cpu, cuda or auto")


class PlanPriorConfig(PlanConfig, TrainPriorConfig):
    """A run of stage two."""

    out: str = Field("", description="run folder; not used")
    tokens: str = Field("", description="token dataset; read where it is there already")


class PlanTokenizerConfig(PlanConfig, TrainTokenizerConfig):
    """A run of stage one."""

    out: str = Field("", description="run folder; not used")


@dataclass(frozen=True)
class Plan:
    """What a run takes. `states` (weights, gradients, moments and averages) and `checkpoint` are in bytes; `flops` are
    those of an image, forward and backward; `peaks` are the bytes beside `states` that steps of two batch sizes took on
    `device`."""

    config: PlanPriorConfig | PlanTokenizerConfig
    device: torch.device
    grid: TokenGrid
    rows: int | None
    parameters: int
    states: int
    checkpoint: int
    flops: int
    flops_of_sample: int
    peaks: dict[int, int]

    @property
    def flops_per_step(self) -> int:
        """FLOPs of all GPUs together."""
        return self.flops * self.config.train.batch_size

    @property
    def tflops(self) -> float:
        """Peak of one GPU in TFLOP/s."""
        return self.config.peak_tflops or GPUS[self.config.gpu].tflops

    @property
    def seconds_per_step(self) -> float:
        """Seconds of a step on all GPUs, at the share of the peak that is assumed."""
        return self.flops_per_step / (self.tflops * 1e12 * self.config.gpus * self.config.utilization)

    @property
    def steps(self) -> int:
        """Steps of the whole run, which ends by `train.steps` or by the clock."""
        train = self.config.train
        by_clock = None if train.minutes is None else max(1, round(60 * train.minutes / self.seconds_per_step))
        return min(steps for steps in (train.steps, by_clock) if steps is not None)

    def memory(self, images: int) -> int:
        """Bytes of a GPU that works on so many images at a time, on the line through the measured `peaks`."""
        (small, low), (large, high) = self.peaks.items()
        return self.states + round(low + (images - small) * (high - low) / (large - small))


def run(config: PlanConfig) -> Plan:
    """Print the plan, and return it. Raises `UserError` and `ConfigError`."""
    if not isinstance(config, PlanPriorConfig | PlanTokenizerConfig):
        raise UserError("model.kind: missing; give the command line of train_prior or train_tokenizer")
    device = check(config)
    build: Callable[[], PriorStep | TokenizerStep]
    rows = config.rows
    if isinstance(config, PlanPriorConfig):
        grid, classes, rows = facts_of(config)
        build = partial(PriorStep, config, grid, classes)
    else:
        build = partial(TokenizerStep, config)
    with torch.device("meta"):
        parameters, states, checkpoint = sizes_of(build())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if states > FULL * free:
        raise UserError(
            f"device: {parameters:,} parameters take {states / GB:.1f} GB with gradients, moments and averages, and "
            f"{device} has {free / GB:.1f} GB free; plan this run on a larger machine"
        )
    with device:
        step = build()
    plan = Plan(config, device, step.grid, rows, parameters, states, checkpoint, *measure(step))
    print(page(plan))
    return plan


def check(config: PlanPriorConfig | PlanTokenizerConfig) -> torch.device:
    """The device to measure on. Raises `UserError` for settings that training would refuse, or that say too little."""
    train, device = config.train, choose_device(config.device)
    shares = config.gpus * train.accumulate
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: memory is measured on cpu or cuda (got {config.device!r})")
    if train.batch_size % shares:
        raise UserError(f"train.batch_size: {train.batch_size} is no multiple of gpus x train.accumulate ({shares})")
    if train.steps is None and train.minutes is None:
        raise UserError("train.steps: null needs train.minutes to end the run")
    if train.mixed_precision == "no" and config.peak_tflops is None:
        raise UserError("peak_tflops: missing; with train.mixed_precision=no it is that of float32 or TF32")
    if config.batches and config.batches[0] >= config.batches[1]:
        raise UserError(f"batches: the second should be larger (got {config.batches[0]}, {config.batches[1]})")
    return device


# Facts of the data --------------------------------------------------------------------------------


def facts_of(config: PlanPriorConfig) -> tuple[TokenGrid, int, int | None]:
    """Grid, number of classes, and training rows: those that the keys give, else those of the tokenizer or the token
    dataset. Raises `UserError` for missing ones."""
    known, classes, rows = None, config.classes, config.rows
    if config.tokenizer:
        known = grid_of_tokenizer(config.tokenizer)
    elif (Path(config.tokens) / META).is_file():
        meta = read_meta(Path(config.tokens))
        known, rows = meta.grid, rows or sum(meta.shards.get("train", [])) or None
        classes = len(meta.class_names) if classes is None else classes
    shape, ids = config.grid, config.vocab_size
    if known is not None:
        shape, ids = shape or known.shape, ids or known.vocab_size
    if shape is None or ids is None or classes is None:
        values = {"grid": shape, "vocab_size": ids, "classes": classes}
        missing = ", ".join(name for name, value in values.items() if value is None)
        raise UserError(
            f"{missing}: missing, and there is no token dataset {config.tokens!r}; for example grid=16,16 "
            "vocab_size=16384 classes=1000 (0: no labels); tokenizer=PRESET says grid and vocab_size"
        )
    try:
        if known is not None and known.shape == shape:  # it may have scales, levels and channels
            return replace(known, vocab_size=ids), classes, rows
        return TokenGrid(shape, ids), classes, rows
    except ValueError as error:
        raise UserError(f"grid: {error}") from error


def grid_of_tokenizer(source: str) -> TokenGrid:
    """The grid of the tokenizer in a folder, or of a preset. Raises `UserError` and `ConfigError`."""
    saved = Path(tokenizer_folder(source)) / CONFIG
    with torch.device("meta"):
        if saved.is_file():
            data = read_json(saved)
            return Tokenizer.create(data.pop("kind", ""), **data).grid
        try:
            config = parse(TrainTokenizerConfig, ["--config", source], verb="train_tokenizer", description=None)
        except UserError as error:
            raise UserError(f"tokenizer: neither a tokenizer's folder nor a preset: {error}") from error
        channels, height, width = config.data.image_shape
        return build_tokenizer(config.model, (height, width), channels).grid


# Training steps -----------------------------------------------------------------------------------


class PriorStep:
    """Training steps of a prior on random tokens; with objective=cca, beside a frozen copy. Raises `ConfigError`, and
    `UserError` for a prior that cannot be aligned."""

    def __init__(self, config: PlanPriorConfig, grid: TokenGrid, classes: int) -> None:
        self.config, self.grid, self.classes = config, grid, classes
        choices = {key: value for key, value in config.model.items() if key != "kind"}
        make = partial(Prior.create, config.model["kind"], grid=grid, num_classes=classes, **choices)
        self.model, self.frozen = make(), [make()] if config.objective == "cca" else []
        if self.frozen and (problem := alignment_problem(self.model)):
            raise UserError(f"objective: cca {problem}")
        self.trained = [self.model]
        self.loss = Alignment(self.model, self.frozen[0], 1.0, 1.0) if self.frozen else Likelihood(self.model)

    def losses(self, count: int, autocast: Any) -> Iterator[Tensor]:
        """Yield the loss on `count` images."""
        tokens = torch.randint(self.grid.vocab_size, (count, *self.grid.shape), device=self.model.device)
        labels = [torch.zeros(count, dtype=torch.long, device=tokens.device)] * (1 + len(self.frozen))
        with autocast:
            yield self.loss(tokens, *labels, self.model.training_inputs(tokens, 0.5))[0]

    def sample(self) -> None:
        """Sample the tokens of an image, with the settings of the run."""
        labels = torch.zeros(1, dtype=torch.long, device=self.model.device)
        if self.classes:
            self.model.sample(1, labels, **self.config.sampler.sampling_settings())
        else:
            self.model.sample(1)


class TokenizerStep:
    """Training steps of a tokenizer, and of its critic, on random images; with LPIPS, beside its network. Raises
    `ConfigError` and `UserError`."""

    def __init__(self, config: PlanTokenizerConfig) -> None:
        channels, height, width = config.data.image_shape
        self.config, self.model = config, build_tokenizer(config.model, (height, width), channels)
        self.grid, loss, critic = self.model.grid, config.loss, config.critic
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UserError(f"model.kind: a {self.model.name} tokenizer has no weights to train")
        self.weights = loss_weights_of(loss, self.model)
        self.adversary = make_adversary(critic, config.data.image_shape) if critic.weight else None
        self.late = critic.start + critic.warmup + critic.ramp  # a step in which the critic has its full weight
        device = self.model.device
        self.perceptual = Perceptual(loss.perceptual_net, device, pretrained=False) if loss.perceptual else None
        self.trained: list[Any] = [self.model, *([self.adversary.critic] if self.adversary else [])]
        self.frozen = [self.perceptual.net] if self.perceptual else []

    def losses(self, count: int, autocast: Any) -> Iterator[Tensor]:
        """Yield the loss of the tokenizer on `count` images, and then that of its critic."""
        images = torch.randn(count, *self.model.image_shape, device=self.model.device)
        with autocast:
            output = self.model(images)
        loss, _ = total_loss(output, images, self.weights)
        if self.perceptual is not None:
            loss = loss + self.config.loss.perceptual * self.perceptual(output.images, images)
        if self.adversary is None:
            yield loss
            return
        self.adversary.critic.requires_grad_(False)
        with autocast:
            added, _ = self.adversary.tokenizer_term(output.images, loss, self.model.last_layer, self.late)
        yield loss + added
        self.adversary.critic.requires_grad_(True)
        with autocast:
            yield self.adversary.critic_term(self.adversary.critic, images, output.images.detach())[0]

    def sample(self) -> None:
        """Encode and decode an image."""
        self.model.decode(self.model.encode(torch.randn(1, *self.model.image_shape, device=self.model.device)))


# Measuring ----------------------------------------------------------------------------------------


def sizes_of(step: PriorStep | TokenizerStep) -> tuple[int, int, int]:
    """The number of parameters, and the bytes of a run's states and of a checkpoint of it."""
    train, modules = step.config.train, step.trained
    parameters = [parameter for module in modules for parameter in module.parameters()]
    weights = sum(value.nbytes for module in modules for value in (*module.parameters(), *module.buffers()))
    gradients = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    muon = hidden_matrices(step.model) if train.optimizer == "muon" else ()
    moments = 2 * gradients - sum(matrix.nbytes for matrix in muon)  # AdamW has two of a weight, Muon one
    frozen = sum(value.nbytes for module in step.frozen for value in module.parameters())
    states = 2 * weights + gradients + moments + frozen  # with the averaged weights
    keeps_best = train.keep_best and len(modules) == 1 and not frozen  # else no figure says which are best
    saved = sum(value.nbytes for module in modules for value in module.state_dict().values())
    return sum(p.numel() for p in parameters), states, (2 + keeps_best) * saved + moments


def measure(step: PriorStep | TokenizerStep) -> tuple[int, int, dict[int, int]]:
    """FLOPs of training on an image and of sampling one; and the peak of a step of each batch size, in bytes beside the
    states. Gradients are there before, as they are with DDP, or with several micro-batches."""
    train, device = step.config.train, step.model.device
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=train.mixed_precision != "no")
    for module in step.trained:
        module.train()
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    if train.checkpointing:
        checkpoint_blocks([block for module in step.trained for block in repeated_blocks(module)])

    def take(count: int) -> None:
        for loss in step.losses(count, autocast):
            loss.backward()

    flops = count_flops(partial(take, 1))
    batches = step.config.batches or ((1, 2) if flops > LARGE else (8, 16))
    peaks = {count: peak_bytes(device, partial(take, count)) for count in batches}
    step.model.eval()
    with torch.no_grad():
        return flops, count_flops(step.sample), peaks


def count_flops(run: Callable[[], None]) -> int:
    """FLOPs of the matrix products and convolutions in `run`; attention as two full products, however it is masked."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def peak_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """The most bytes of tensors during `run`, beside those that are there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    level = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = level or "9"  # else the profiler prints when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    if level is None:
        del os.environ["KINETO_LOG_LEVEL"]
    results: Any = profiler.profiler and profiler.profiler.kineto_results
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    return max(accumulate(size for _, size in events))


# The page -----------------------------------------------------------------------------------------


def page(plan: Plan) -> str:
    """What `smalti plan` prints."""
    config, train, tokens = plan.config, plan.config.train, len(plan.grid)
    count, images, hours = train.batch_size, plan.steps * train.batch_size, plan.steps * plan.seconds_per_step / 3600
    share = count // (config.gpus * train.accumulate)
    memory, each = plan.memory(share), plan.memory(2) - plan.memory(1)
    time = f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.3g} min"
    epochs = f"{images / plan.rows:,.1f} epochs, " if plan.rows else ""
    made = "a sample" if isinstance(config, PlanPriorConfig) else "a reconstruction"
    rows = [
        ("parameters", f"{plan.parameters:,}"),
        (made, f"{scaled(plan.flops_of_sample)}FLOP, {tokens:,} tokens"),
        ("a training step", f"{scaled(plan.flops_per_step)}FLOP, {count:,} images, {count * tokens:,} tokens"),
        ("", f"{plan.seconds_per_step:.3g} s at {config.utilization:.0%} of {config.gpus:,} x {plan.tflops:g} TFLOP/s"),
        ("the run", f"{plan.steps:,} steps, {epochs}{images:,} images, {images * tokens:,} tokens"),
        ("", f"{scaled(plan.flops_per_step * plan.steps)}FLOP, {time}; evaluations, previews and saves come on top"),
        (
            "memory of a GPU",
            f"{memory / GB:.3g} GB for {share:,} images at a time: {plan.states / GB:.3g} GB of weights,",
        ),
        ("", f"gradients, moments and averages, and {scaled(each)}B for each image, measured here on {plan.device}"),
    ]
    if config.gpus > 1 and isinstance(config, PlanPriorConfig) and config.objective != "cca":
        sharded = memory - plan.states + plan.states // config.gpus
        rows.append(("  with FSDP", f"about {sharded / GB:.3g} GB"))
    if config.peak_tflops is None:
        room = GPUS[config.gpu].memory
        rows.append((f"  of {config.gpu}", f"{room:g} GB: {'enough' if memory <= FULL * GB * room else 'too little'}"))
    rows.append(("a checkpoint", f"{plan.checkpoint / GB:.3g} GB on disk; three of them while one is written"))
    shape = " x ".join(map(str, plan.grid.shape))
    return f"{config.model['kind']}, an image is {shape} tokens of {plan.grid.vocab_size:,} ids\n{table(rows)}"


def scaled(number: float) -> str:
    """Three digits and a prefix: `43.6 T`."""
    power = min(7, max(0, (len(str(round(number))) - 1) // 3))
    return f"{number / 1000**power:.3g} {' kMGTPEZ'[power].strip()}"


# The command line ---------------------------------------------------------------------------------


def config_for(argv: list[str]) -> type[PlanConfig]:
    """The configuration that the command line is of: a prior's, a tokenizer's, or neither."""
    words = sorted_words(argv)
    import_asked(words.imports)
    given: dict[str, Any] = {}
    for part in read_arguments(words)[0]:
        models = [node for node in (given.get("model"), part.get("model")) if isinstance(node, dict)]
        given = {**given, **part, "model": {key: value for node in models for key, value in node.items()}}
    kind = given.get("model", {}).get("kind")
    second = {"tokens", "objective"} & set(given)
    if Tokenizer.has(kind) or (not kind and not second and {"data", "loss", "critic", "init"} & set(given)):
        return PlanTokenizerConfig
    return PlanPriorConfig if kind is not None or second else PlanConfig


def main(argv: list[str] | None = None) -> Any:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    cls = config_for(argv)
    defaults: dict[Any, Any] = {PlanTokenizerConfig: of_init, PlanPriorConfig: of_pipeline}
    return run_command(cls, run, argv, verb="plan", description=__doc__, defaults=defaults.get(cls))
