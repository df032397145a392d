"""Say what a training run will take before it is started: parameters, memory per GPU, FLOPs, hours, disk.

It takes the command line of `smalti train_prior` or `smalti train_tokenizer` as it is (the model's kind says which),
and the keys below. The model is run on paper: nothing is trained, no image is read, no memory is taken.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from prior.objectives import alignment_problem
from tokenizer import Tokenizer
from tokenizer.files import read_json
from tokenizer.model import CONFIG

from ..config import Config, UserError, run_command
from ..config.arguments import read_arguments, sorted_words
from ..config.command import parse
from ..config.importing import import_asked
from ..image_pipeline import SAMPLED
from ..metrics.likelihood import EVALUATED_ROWS, classes_of_table, rows_evaluated
from ..metrics.reconstruction import images_at_a_time
from ..planning.budget import FLOAT32, LABEL, parts_of_prior, parts_of_tokenizer, sizes_of
from ..planning.costs import (
    ALIGNED,
    Recipe,
    Turn,
    costs_of,
    critic_turn,
    likelihood_batch,
    perceptual_network,
    prior_turn,
    tokenizer_turn,
)
from ..planning.facts import facts_of
from ..planning.forecast import Forecast, schedule_of
from ..planning.machine import machine_of, precision_of
from ..planning.page import page_of
from ..planning.paper import on_meta
from ..planning.pauses import FORWARD, Looks
from ..provenance import tokenizer_folder
from ..tokens.shards import bytes_per_row
from ..train_prior import TrainPriorConfig
from ..train_prior import defaults as of_pipeline
from ..train_tokenizer import EVALUATED_IMAGES, Stage, TrainTokenizerConfig, build_tokenizer
from ..train_tokenizer import defaults as of_init
from ..training.adversary import make_adversary
from ..training.blocks import repeated_blocks
from ..training.losses import loss_weights_of
from ..training.optimizers import hidden_matrices

RECONSTRUCTED = 96  # images of the two pictures of a tokenizer's preview
NO_MODEL = (
    "model.kind: nothing to plan; give the command line of train_prior or train_tokenizer, as in "
    "`smalti plan --config configs/prior/gpt_imagenet256.yaml`"
)


class PlanConfig(Config):
    """Where the run will take place, and what its data will be like."""

    often = "gpus gpu gpu_memory utilization precision tokenizer grid vocab_size classes rows"
    examples = (
        "--config gpt_digits tokenizer=vqvae_digits classes=10 rows=4000 gpus=1 gpu=rtx4090",
        "--config vqgan_imagenet256 rows=1281167 gpus=8 gpu=a100",
    )

    gpus: int = Field(8, ge=1, le=65536, description="GPUs, those of all machines together; a process for each")
    gpu: Literal["a100", "a100_40", "h100", "h100_pcie", "h200", "b200", "mi300x", "l40s", "l4", "rtx4090"] = Field(
        "h100", description="their kind, whose memory and peak are as published (dense, bf16)"
    )
    gpu_memory: float | None = Field(None, gt=0, description="GB of one GPU, for another kind")
    peak_tflops: float | None = Field(None, gt=0, description="peak of one GPU in TFLOP/s, for another kind")
    utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the peak that is reached; null: as expected, 0.2, with train.compile 0.3",
    )
    precision: Literal["bf16", "float32"] | None = Field(
        None, description="accelerate's, or none, which needs peak_tflops; null: by train.mixed_precision, else bf16"
    )
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
    rows: int | None = Field(
        None, ge=1, description="number of training rows, where nothing says it; without it, there are no epochs"
    )


class PlanPriorConfig(PlanConfig, TrainPriorConfig):
    """A run of stage two."""

    out: str = Field("", description="run folder; not used")
    tokens: str = Field("", description="token dataset; read where it is there already")


class PlanTokenizerConfig(PlanConfig, TrainTokenizerConfig):
    """A run of stage one."""

    out: str = Field("", description="run folder; not used")


def run(config: PlanConfig) -> Forecast:
    """Print the plan, and return its figures. Raises `UserError` and `ConfigError`."""
    if not isinstance(config, PlanPriorConfig | PlanTokenizerConfig):
        raise UserError(NO_MODEL)
    if precision_of(config) == "float32" and config.peak_tflops is None:
        raise UserError("peak_tflops: precision=float32 needs the peak in float32, or in TF32 if that is allowed")
    forecast = forecast_prior(config) if isinstance(config, PlanPriorConfig) else forecast_tokenizer(config)
    print(page_of(forecast))
    return forecast


# Priors -------------------------------------------------------------------------------------------


def forecast_prior(config: PlanPriorConfig) -> Forecast:
    """What training this prior takes."""
    facts = facts_of(config, stage_one(config))
    model = on_meta(lambda: facts.prior_of(config.model))
    frozen = on_meta(lambda: facts.prior_of(config.model)) if config.objective == "cca" else None
    if frozen and (problem := alignment_problem(model)):
        raise UserError(f"objective: cca {problem}")
    blocks = repeated_blocks(model)
    muon = hidden_matrices(model) if config.train.optimizer == "muon" else ()
    sizes = sizes_of(parts_of_prior(model), model, {"model": model}, blocks, config.train.keep_best, muon)
    sizes = replace(sizes, frozen=sizes.weights if frozen else 0)
    bf16 = precision_of(config) == "bf16"
    costs = costs_of(
        lambda images: [prior_turn(model, images, bf16, frozen)],
        lambda: likelihood_batch(model),
        model,
        beside=[frozen] if frozen else [],
        blocks=blocks,
        count=micro_batch(config),
    )
    shape = "x".join(map(str, facts.grid.shape))
    per_row = bytes_per_row(facts.grid) + (LABEL if facts.classes else 0)
    counted = classes_of_table(facts.grid, facts.classes)
    evaluated, steps = rows_evaluated(model, EVALUATED_ROWS), config.sampler.steps or len(model.position_blocks)
    return Forecast(
        f"{model.name} over {shape} tokens of {facts.grid.vocab_size:,} ids, {facts.classes:,} classes",
        machine_of(config),
        schedule_of(config.train),
        sizes,
        costs,
        Looks(evaluated, model.likelihood_passes, SAMPLED, steps, costs.launches),
        tokens_per_image=len(facts.grid),
        rows=facts.rows,
        shards=not frozen,
        dataset=None if facts.rows is None else per_row * facts.rows,
        snapshot=FLOAT32 * sizes.parameters + facts.tokenizer_bytes,
        frequencies=0 if counted is None else FLOAT32 * (counted + 1) * len(facts.grid) * facts.grid.vocab_size,
        passes=ALIGNED if frozen else FORWARD,
    )


def stage_one(config: PlanPriorConfig) -> Tokenizer | None:
    """The tokenizer that the prior is planned for, without storage, where one is named."""
    return on_meta(lambda: planned_tokenizer(str(config.tokenizer))) if config.tokenizer else None


def planned_tokenizer(source: str) -> Tokenizer:
    """The tokenizer of a preset, or of a folder. Raises `UserError` and `ConfigError`."""
    folder = Path(tokenizer_folder(source))
    if not (folder / CONFIG).is_file():
        try:
            config = parse(TrainTokenizerConfig, ["--config", source], verb="train_tokenizer", description=None)
        except UserError as error:
            raise UserError(f"tokenizer: neither a tokenizer's folder nor a preset: {error}") from error
        return tokenizer_of(config)
    data = read_json(folder / CONFIG)
    member: Any = Tokenizer.find(data.pop("kind", ""))
    return member(member.Config(**data))


# Tokenizers ---------------------------------------------------------------------------------------


def forecast_tokenizer(config: PlanTokenizerConfig) -> Forecast:
    """What training this tokenizer takes. Raises `UserError` for one that trains nothing."""
    recipe = on_meta(lambda: recipe_of(config))
    tokenizer, critic = recipe.tokenizer, recipe.adversary.critic if recipe.adversary else None
    if not any(parameter.requires_grad for parameter in tokenizer.parameters()):
        raise UserError(f"model.kind: a {tokenizer.name} tokenizer has no weights to train, so it takes no GPU")
    players: dict[str, nn.Module] = {"model": tokenizer, **({"critic": critic} if critic is not None else {})}
    blocks = [block for player in players.values() for block in repeated_blocks(player)]
    scored = critic is None and recipe.perceptual is None  # else no figure tells which weights are best
    keeps_best = config.train.keep_best and scored
    stage = on_meta(lambda: Stage(tokenizer, critic))
    muon = hidden_matrices(tokenizer) if config.train.optimizer == "muon" else ()
    sizes = sizes_of(parts_of_tokenizer(tokenizer, critic), stage, players, blocks, keeps_best, muon)
    bf16 = precision_of(config) == "bf16"
    evaluated = (images_at_a_time(tokenizer.image_shape), *tokenizer.image_shape)
    costs = costs_of(
        lambda images: all_turns(recipe, images, bf16),
        lambda: tokenizer.decode(tokenizer.encode(torch.zeros(evaluated))),
        stage,
        beside=[recipe.perceptual.net] if recipe.perceptual else [],
        blocks=blocks,
        count=micro_batch(config),
    )
    size = "x".join(map(str, tokenizer.image_shape[1:]))
    shape, ids = "x".join(map(str, tokenizer.grid.shape)), tokenizer.grid.vocab_size
    lacking = config.loss.perceptual and recipe.perceptual is None
    return Forecast(
        f"{tokenizer.name}, images of {size} to {shape} tokens of {ids:,} ids",
        machine_of(config),
        schedule_of(config.train),
        sizes,
        costs,
        Looks(EVALUATED_IMAGES, 1, RECONSTRUCTED, 1, costs.launches),
        tokens_per_image=len(tokenizer.grid),
        rows=config.rows,
        shards=False,
        dataset=None,
        snapshot=sum(value.numel() * value.itemsize for value in tokenizer.state_dict().values()),
        notes=['the perceptual network is not counted; pip install "smalti[perceptual]"'] if lacking else [],
    )


def tokenizer_of(config: TrainTokenizerConfig) -> Tokenizer:
    """The tokenizer of a run. Raises `ConfigError`."""
    channels, height, width = config.data.image_shape
    return build_tokenizer(config.model, (height, width), channels)


def all_turns(recipe: Recipe, count: int, bf16: bool) -> list[Turn]:
    """The turns of a step, both players playing."""
    turns = [tokenizer_turn(recipe, count, bf16)]
    return turns if recipe.adversary is None else [*turns, critic_turn(recipe, count, bf16)]


def recipe_of(config: PlanTokenizerConfig) -> Recipe:
    """What is trained, and with what. Raises `ConfigError` and `UserError`."""
    tokenizer, loss = tokenizer_of(config), config.loss
    adversary = make_adversary(config.critic, config.data.image_shape) if config.critic.weight else None
    network = perceptual_network(loss.perceptual_net) if loss.perceptual else None
    return Recipe(tokenizer, loss_weights_of(loss, tokenizer), adversary, network, loss.perceptual)


# The command line ---------------------------------------------------------------------------------


def micro_batch(config: Any) -> int:
    """Images that a GPU works on at a time; rounded up where they do not divide."""
    return -(-config.train.batch_size // (config.gpus * config.train.accumulate))


def config_for(argv: list[str]) -> type[PlanConfig]:
    """The configuration that the command line is of: a prior's, a tokenizer's, or neither."""
    words = sorted_words(argv)
    import_asked(words.imports)
    given: dict[str, Any] = {}
    for part in read_arguments(words)[0]:
        models = [node for node in (given.get("model"), part.get("model")) if isinstance(node, dict)]
        model = {key: value for node in models for key, value in node.items()}
        given = {**given, **part, "model": model}
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
