"""Train stage two: a prior over a token dataset. Writes a pipeline folder (tokenizer and prior)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from prior import Prior
from prior.checks import NotCausalError, is_built_in, require_causal, with_random_weights
from prior.columns import LABEL, Column, find_column
from prior.objectives import Alignment, Likelihood, alignment_problem
from prior.options import GUIDANCE_FIELDS, SamplingOptions
from tokenizer import TokenGrid
from tokenizer.config import Node
from tokenizer.files import PipelineLoadError, read_json
from tokenizer.model import CONFIG

from .config import Config, RunSubfolder, UserError, run_command, user_errors
from .config.importing import format_imports
from .frequencies import Frequencies
from .image_pipeline import ImagePipeline
from .images.origin import TOKENS_KEY, resolve_source
from .metrics.likelihood import bits_per_token, rows_evaluated
from .metrics.pairs import condition_picture
from .options import GUIDANCE_SCALE, TEMPERATURE, Sampling
from .processes.group import ALONE, ProcessGroup
from .provenance import are_divided_differently, find_file
from .saving import INDEX, PIPELINE, resolve_shipped
from .shuffling import OTHER, draw_by_row, draw_nulls, other_labels, perturb_tokens, samples_of
from .tokens import TokenDataset, TokenSplit, load_tokens
from .tokens.meta import class_names
from .training.schedule import TrainConfig
from .training.sharding import is_sharding
from .training.stopping import describe_saved
from .training.task import Split, Task
from .training.tracking import TrackConfig
from .training.trainer import train
from .training.transfer import transfer_weights

if TYPE_CHECKING:
    from accelerate import Accelerator


class SamplerConfig(Sampling):
    """Default sampling settings of the pipeline."""

    temperature: float | None = Field(1.0, ge=0, description=TEMPERATURE)
    guidance_scale: float | None = Field(1.0, ge=0, description=GUIDANCE_SCALE)

    @model_validator(mode="after")
    def _fits_together(self) -> SamplerConfig:
        given = self.sampling_settings()
        SamplingOptions(**{name: given[name] for name in SamplingOptions.names() if name in given})  # raises
        return self


class AlignmentConfig(Config):
    """Condition Contrastive Alignment (Chen et al. 2024): fine-tuning that makes guidance unnecessary."""

    beta: float = Field(
        0.5, gt=0, description="the optimum corresponds to a guidance scale of about 1 + 1/beta; 0.02 in the paper"
    )
    negatives: float | None = Field(
        None, ge=0, description="lambda, the weight of images with a wrong label; null: the number of classes"
    )


class TrainPriorConfig(Config):
    """Configuration of a run of stage two."""

    presets = "prior"
    examples = (
        "--config gpt_digits train.steps=500",
        "tokens=runs/photos_tokens out=runs/photos_gpt model.kind=gpt model.depth=6 train.steps=5000",
    )
    often = (
        "out tokens model.kind init label_dropout attributes sampler.guidance_scale "
        "train.steps train.minutes train.batch_size train.lr track.wandb"
    )
    renamed: ClassVar[dict[str, str]] = {"conditions": "attributes"}

    out: str = Field(description="run folder: metrics, previews, checkpoints, and the pipeline itself")
    tokens: str = Field(description="token dataset: a folder that `smalti encode` wrote, or a Hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a token dataset on the Hub")
    blocks: int | None = Field(
        None,
        ge=16,
        le=4096,
        description="read rows in blocks of this size and shuffle within windows of as many blocks, for tokens on a "
        "slow disk that exceed memory; null: shuffle all rows",
    )
    model: Annotated[dict[str, Any], Node("prior.base:Prior")] = Field({"kind": "gpt"}, description="the prior")
    init: Annotated[str | None, RunSubfolder("pipeline", INDEX)] = Field(
        None,
        description="pipeline whose prior initializes this one: its folder, its run or a Hub id; also sets the "
        "default of `model`",
    )
    objective: Literal["likelihood", "cca"] | None = Field(
        None,
        description="null or likelihood: maximum likelihood; cca: fine-tune the prior of `init` so that it needs no "
        "guidance",
    )
    cca: AlignmentConfig | None = Field(None, description="settings of objective=cca; null: their defaults")
    label_dropout: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of images trained without label and columns, for guidance; 1: a prior without them",
    )
    attributes: list[str] | None = Field(None, description="columns to condition on; null: all")
    condition_dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="with columns, share of the other images trained without their label, and likewise without each "
        "column, so that each condition may be left out",
    )
    perturb: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of training tokens replaced by uniform random ids (0.1 to 0.3), for a background prior "
        "that learns textures but not shapes",
    )
    sampler: SamplerConfig = Field(SamplerConfig(), description="default sampling settings of the pipeline")
    train: TrainConfig = Field(TrainConfig(), description="length and optimization of training")
    track: TrackConfig = Field(TrackConfig(), description="trackers of metrics and previews")

    @model_validator(mode="after")
    def _check_objective(self) -> TrainPriorConfig:
        if self.cca is not None and self.objective != "cca":
            raise ValueError("cca: needs objective=cca")
        if self.objective == "cca" and self.label_dropout == 1:
            raise ValueError("label_dropout: must be below 1 with objective=cca, which contrasts classes")
        if self.attributes and self.label_dropout == 1:
            raise ValueError("label_dropout: must be below 1 with attributes, which would never be trained")
        return self


class PriorTask(Task):
    """Train a prior."""

    shardable = True
    snapshots = {"pipeline": PIPELINE}
    shows_preview = True

    def __init__(self, config: TrainPriorConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.data = config, load_tokens(config.tokens, revision=config.revision)
        columns = choose_columns(self.data.columns, config.attributes)
        self.data = self.data.of_columns({} if config.label_dropout == 1 else columns)  # 1: none would ever be trained
        self.train_split, self.eval_splits = select_splits(self.data)
        self.frequencies = self.data.frequencies
        if not self.frequencies.tables:  # a dataset of 0.3
            self.frequencies = Frequencies.count(self.train_split.given)
        self.model: Prior = build_prior(config.model, self.data)
        self.is_checked = not is_built_in(self.model)  # before sharding, which changes the class
        if self.is_checked:
            self.require_causal(with_random_weights(self.model))
        if config.init:
            fingerprint, self.notes = start_from(self.model, self.data, config.init)
            self.init = {"source": config.init, "fingerprint": fingerprint}
        else:
            self.model.initialize(cast(Tensor, self.train_split.ids()), self.train_split.given)
        self.attributes = self.model.config.conditions
        if self.attributes:
            self.facts = {"columns": {name: column.kind for name, column in self.attributes.items()}}
        self.nets: dict[str, nn.Module] = {"model": self.make_objective(device)}
        self.param_groups = {"model": list(self.model.parameters())}
        self.rows, self.tokens_per_row = len(self.train_split), len(self.data.grid)
        self.evaluated = {split: rows_evaluated(self.model, len(rows)) for split, rows in self.eval_splits.items()}
        self.pipeline(self.model)  # raise its errors before training, not after

    def make_objective(self, device: torch.device | str) -> nn.Module:
        """Build the module that maps a batch to a loss, with a frozen copy of the prior on the device. Raises
        `UserError` for a prior or data that does not suit the objective."""
        if self.config.objective != "cca":
            return Likelihood(self.model)
        if self.init is None:
            raise UserError("init: missing; objective=cca fine-tunes the prior of a trained pipeline (init=PIPELINE)")
        if problem := alignment_problem(self.model):
            raise UserError(f"objective: cca {problem}")
        self.counts = torch.bincount(self.train_split.given.raw(LABEL), minlength=self.data.num_classes)
        if int(self.counts.count_nonzero()) < 2:
            raise UserError("objective: cca needs training rows of two classes or more")
        settings = self.config.cca or AlignmentConfig()
        weight = self.data.num_classes if settings.negatives is None else settings.negatives
        return Alignment(self.model, copy.deepcopy(self.model).to(device), settings.beta, weight)

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> tuple[Any, ...]:
        """Return tokens `(B, *grid.shape)` and what is given of them, null where it is dropped; for `cca` also wrong
        labels `(B,)`."""
        tokens, given = self.train_split.rows(indices, epochs, seed), self.train_split.given[indices]
        if self.config.perturb:
            tokens = perturb_tokens(tokens, indices, epochs, seed, self.config.perturb, self.data.grid.vocab_size)
        wrong = []
        if self.config.objective == "cca":
            wrong = [other_labels(given.raw(LABEL), self.counts, draw_by_row(indices, epochs, seed, OTHER))]
        shares = self.config.label_dropout, self.config.condition_dropout if self.attributes else 0.0
        return tokens, given.without(draw_nulls(given.columns, indices, epochs, seed, *shares)), *wrong

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        return samples_of(self.rows, batch_size, seed, step, self.config.blocks)

    def loss(self, group_name: str, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        inputs = self.model.training_inputs(batch[0], self.progress)
        loss, terms = self.nets["model"](*batch, inputs)
        return loss, terms

    def preview(self, model: nn.Module, group: ProcessGroup = ALONE) -> dict[str, np.ndarray]:
        """Return samples with the same seeds at every step: one class per column, or with columns those of held-out
        rows."""
        pipeline = self.pipeline(model)
        if self.attributes:
            return {"samples": condition_picture(pipeline, self.eval_splits["held_out"], group=group)}
        return {"samples": pipeline.sample_picture(group=group)}

    def require_causal(self, model: Prior) -> None:
        first = np.zeros(1, np.int64)
        with user_errors(NotCausalError, prefix="model: "):
            require_causal(model, self.train_split.rows(first), self.train_split.given[first])

    def evaluate(self, model: nn.Module, split: Split, group: ProcessGroup = ALONE) -> dict[str, float]:
        if self.is_checked:
            self.require_causal(cast(Prior, model))
        return {"bits_per_token": bits_per_token(model, self.eval_splits[split], self.evaluated[split], group=group)}

    def score(self, evaluation: dict[str, float]) -> float | None:
        """Return the negative bits per token; None with `cca`, because bits do not measure what it improves."""
        bits = evaluation.get("bits_per_token")
        return None if bits is None or self.config.objective == "cca" else -bits

    def quality(self, evaluation: dict[str, float]) -> str:
        bits = evaluation.get("bits_per_token")
        return "" if bits is None else f"{'' if self.model.exact else 'at most '}{bits:.3f} bits per token"

    def outcome(self, run: Path) -> str:
        folder = quote(str(run / "pipeline"))
        return f"pipeline: {folder}; next: smalti generate{format_imports()} pipeline={folder}"

    def pipeline(self, model: nn.Module) -> ImagePipeline:
        """Return a pipeline of both stages that shares `model`'s weights."""
        sampler = self.config.sampler.sampling_settings()
        if not self.data.columns:  # nothing to guide towards
            sampler = {name: value for name, value in sampler.items() if name not in GUIDANCE_FIELDS}
        tokenizer = self.data.tokenizer.to(self.model.device)
        others = {name: one.to(self.model.device) for name, one in self.data.condition_tokenizers.items()}
        more: dict[str, Any] = {"sampler": sampler, "condition_tokenizers": others}
        pipeline = ImagePipeline(tokenizer, cast(Prior, model), labels=self.data.class_names, **more)
        pipeline.frequencies = self.frequencies
        return pipeline

    def save(self, model: nn.Module, run: Path, facts: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        pipeline = self.pipeline(model)
        if self.init:
            facts = {**facts, "objective": self.config.objective or "likelihood", "init": self.init}
        pipeline.provenance = {**self.data.source, "prior": facts, TOKENS_KEY: resolve_source(self.config.tokens)}
        pipeline.save_pretrained(run / "pipeline", sample_grid=pictures["samples"])


def select_splits(data: TokenDataset) -> tuple[TokenSplit, dict[Split, TokenSplit]]:
    """Return the split to train on and those to evaluate on: `test`, and `validation` unless empty. Raises `UserError`
    if `train` or `test` is missing or empty."""
    for name in ("train", "test"):
        if not len(data.splits.get(name, ())):
            raise UserError(f"tokens: the dataset has no rows in its {name!r} split; it has {sorted(data.splits)}")
    splits: dict[Split, TokenSplit] = {"held_out": data.splits["test"]}
    if len(data.splits.get("validation", ())):
        splits["validation"] = data.splits["validation"]
    return data.splits["train"], splits


def choose_columns(columns: Mapping[str, Column], names: list[str] | None) -> dict[str, Column]:
    """Return the class, if there is one, and the chosen columns; None: all. Raises `UserError` for an unknown name."""
    others = {name: column for name, column in columns.items() if name != LABEL}
    with user_errors(ValueError):
        chosen = others if names is None else {name: find_column(others, name, "attributes") for name in names}
    return {**{name: column for name, column in columns.items() if name == LABEL}, **chosen}


def facts_of(grid: TokenGrid, columns: Mapping[str, Column]) -> dict[str, Any]:
    """Return the keys of a prior's configuration that say what its data are."""
    others = {name: column for name, column in columns.items() if name != LABEL}
    return {"grid": grid, "num_classes": len(class_names(columns)), "conditions": others}


def build_prior(node: dict[str, Any], data: TokenDataset) -> Prior:
    choices = {key: value for key, value in node.items() if key != "kind"}
    facts = facts_of(data.grid, data.columns)
    return Prior.create(node["kind"], **facts, tokenizer=data.tokenizer.fingerprint(), **choices)


TRAINING_ONLY = ("dropout", "attention_dropout", "label_smoothing", "anneal", "random_share")
"""Settings of priors that do not affect a trained one."""


def start_from(prior: Prior, data: TokenDataset, source: str) -> tuple[str, tuple[str, ...]]:
    """Copy the weights of the prior in the pipeline `source` that fit into `prior`. Return the fingerprint of the
    copied prior, and lines about the classes and columns that start anew or were left out.

    Raises `UserError` if the tokenizers or settings differ (except settings that affect training only), its classes
    have no names to match or it was trained on images that `data` holds out, and `PipelineLoadError` for an invalid
    pipeline.
    """
    try:
        pipeline = ImagePipeline.from_pretrained(source)
    except PipelineLoadError as error:
        raise type(error)(f"init: {error}") from error
    theirs, mine = pipeline.prior, prior.config.to_dict()
    other = theirs.config.to_dict()
    if theirs.config.tokenizer != prior.config.tokenizer or theirs.grid != prior.grid:
        raise UserError(f"init: {source}: its prior was trained with another tokenizer than tokens=")
    if theirs.num_classes != len(pipeline.labels):
        raise UserError(
            f"init: {source}: its {theirs.num_classes} classes have no names to match with those of tokens="
        )
    if theirs.name != prior.name:
        raise UserError(f"init: {source}: its prior has model.kind={theirs.name}, not {prior.name}; remove model.kind")
    ignored = {*TRAINING_ONLY, "num_classes", "conditions"}
    ignored |= set() if prior.config.conditions and theirs.config.conditions else {"condition_width"}
    if differing := [key for key in {**mine, **other} if key not in ignored and mine.get(key) != other.get(key)]:
        pairs = ", ".join(f"model.{key}: {other.get(key)!r} there, {mine.get(key)!r} here" for key in differing)
        raise UserError(f"init: {source}: its prior has other settings ({pairs})")
    if are_divided_differently(pipeline.provenance, data.source):
        raise UserError(
            f"init: {source}: its images were divided differently from those of tokens=, which hold out some that it "
            f"was trained on; encode them again with its division (smalti encode tokenizer={source})"
        )
    return theirs.fingerprint(), transfer_weights(prior, data.columns, theirs, pipeline.columns)


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Return the model settings of the pipeline `init` as defaults; {} if unreadable, which loading it will report."""
    path = find_file(str(resolve_shipped(str(given.get("init") or ""))), f"prior/{CONFIG}")
    saved = read_json(path) if path else {}
    if not Prior.has(saved.get("kind")):
        return {}
    member: Any = Prior.find(saved["kind"])
    facts = member.choices().facts
    return {"model": {key: value for key, value in saved.items() if key not in facts}}


def run(config: TrainPriorConfig) -> Path:
    """Train and return the run folder; `ImagePipeline.from_pretrained` loads its `pipeline/`."""

    def build(accelerator: Accelerator) -> Task:
        if config.objective == "cca" and is_sharding(accelerator):
            raise UserError(
                "objective: cca keeps an unsharded copy of the prior on each process; launch it without FSDP"
            )
        return PriorTask(config, accelerator.device)

    return train(build, config)


main = partial(
    run_command,
    TrainPriorConfig,
    run,
    verb="train_prior",
    description=__doc__,
    defaults=defaults,
    after_ctrl_c=lambda config: describe_saved(Path(config.out)),
)


if __name__ == "__main__":
    main()
