"""Train stage two: a prior over a token dataset; its snapshot is a whole pipeline folder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from prior import Prior
from prior.checks import NotCausalError, is_built_in, require_causal, with_random_weights
from prior.objectives import Alignment, Likelihood, alignment_problem
from prior.sampling import GUIDANCE, SamplingOptions
from tokenizer.config import Node
from tokenizer.files import PipelineLoadError, read_json
from tokenizer.model import CONFIG

from .config import Config, UserError, Within, run_command
from .config.importing import as_asked
from .image_pipeline import ImagePipeline
from .images.origin import TOKENS, place_of
from .metrics.likelihood import bits_per_token, rows_evaluated
from .options import GUIDANCE_SCALE, TEMPERATURE, Sampling
from .processes.group import ALONE, ProcessGroup
from .provenance import file_of
from .saving import INDEX, PIPELINE, located
from .shuffling import DROPOUT, OTHER, by_row, other_labels, perturbed, samples_of
from .tokens import TokenDataset, TokenSplit, load_tokens
from .training.schedule import TrainConfig
from .training.sharding import is_sharding
from .training.stopping import what_is_saved
from .training.task import Split, Task
from .training.tracking import TrackConfig
from .training.trainer import train

if TYPE_CHECKING:
    from accelerate import Accelerator


class SamplerConfig(Sampling):
    """The pipeline's default settings."""

    temperature: float | None = Field(1.0, ge=0, description=TEMPERATURE)
    guidance_scale: float | None = Field(1.0, ge=0, description=GUIDANCE_SCALE)

    @model_validator(mode="after")
    def _fits_together(self) -> SamplerConfig:
        given = self.sampling_settings()
        SamplingOptions(**{name: given[name] for name in SamplingOptions.names() if name in given})  # raises
        return self


class AlignmentConfig(Config):
    """Condition Contrastive Alignment (Chen et al. 2024), which trains guidance away."""

    beta: float = Field(0.5, gt=0, description="the optimum is about guidance of 1 + 1/beta; the paper has 0.02")
    negatives: float | None = Field(
        None, ge=0, description="lambda, weight of images under a wrong label; null: the number of classes"
    )


class TrainPriorConfig(Config):
    """A run of stage two."""

    examples = (
        "--config gpt_digits train.minutes=1",
        "tokens=runs/photos_tokens out=runs/photos_gpt model.kind=gpt model.depth=6 train.steps=5000",
    )
    often = (
        "out tokens model.kind init label_dropout sampler.temperature sampler.guidance_scale "
        "train.minutes train.steps train.batch_size train.lr track.wandb"
    )

    out: str = Field(description="run folder: metrics, previews, checkpoints, and the pipeline itself")
    tokens: str = Field(description="token dataset, as `smalti encode` wrote it, or the id of one on the Hub")
    revision: str | None = Field(None, description="branch, tag or commit of a token dataset on the Hub")
    blocks: int | None = Field(
        None,
        ge=16,
        le=4096,
        description="read blocks of this many rows and mix the rows of as many blocks, for tokens on a slow disk that "
        "memory cannot hold; null: all rows in a random order",
    )
    model: Annotated[dict[str, Any], Node("prior.base:Prior")] = Field({"kind": "gpt"}, description="the prior")
    init: Annotated[str | None, Within("pipeline", INDEX)] = Field(
        None,
        description="folder, its run, or Hub id of a pipeline whose prior to start from; the model is then by default "
        "its own",
    )
    objective: Literal["likelihood", "cca"] | None = Field(
        None,
        description="likelihood, which null is, too; or cca, which fine-tunes the prior of `init` to need no guidance",
    )
    cca: AlignmentConfig | None = Field(None, description="settings of objective=cca; null: their defaults")
    label_dropout: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of images trained without their label, which unconditional sampling and guidance need; with "
        "1 the prior has no classes",
    )
    perturb: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of tokens replaced by uniform random ids in training, for a background prior, which learns "
        "textures but not shapes (0.1 to 0.3)",
    )
    sampler: SamplerConfig = Field(SamplerConfig(), description="default sampling settings of the pipeline")
    train: TrainConfig = Field(TrainConfig(), description="how long and how fast")
    track: TrackConfig = Field(TrackConfig(), description="where the numbers go")

    @model_validator(mode="after")
    def _contrasts_something(self) -> TrainPriorConfig:
        if self.cca is not None and self.objective != "cca":
            raise ValueError("cca: goes with objective=cca")
        if self.objective == "cca" and self.label_dropout == 1:
            raise ValueError("label_dropout: must be below 1 with objective=cca, which contrasts labels")
        return self


class PriorTask(Task):
    """One player: the prior."""

    shardable = True
    snapshots = {"pipeline": PIPELINE}
    shows_preview = True

    def __init__(self, config: TrainPriorConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.data = config, load_tokens(config.tokens, revision=config.revision)
        if config.label_dropout == 1:  # no class would ever be trained
            self.data = without_labels(self.data)
        self.train_split, self.judged = training_splits(self.data)
        self.model: Prior = build_prior(config.model, self.data)
        self.is_checked = not is_built_in(self.model)  # asked now: sharding gives a model a class of torch's
        if self.is_checked:
            self.require_causal(with_random_weights(self.model))
        start = start_from(self.model, self.data.class_names, config.init) if config.init else None
        if start is None:
            self.model.initialize(cast(Tensor, self.train_split.tokens), self.train_split.labels)
        self.init = None if start is None else {"source": config.init, "fingerprint": start.fingerprint()}
        self.nets: dict[str, nn.Module] = {"model": self.make_objective(start, device)}
        self.players = {"model": list(self.model.parameters())}
        self.rows, self.tokens_per_row = len(self.train_split), len(self.data.grid)
        self.evaluated = {split: rows_evaluated(self.model, len(rows)) for split, rows in self.judged.items()}
        self.pipeline(self.model)  # raises now, before training, what it would raise after it

    def make_objective(self, reference: Prior | None, device: torch.device | str) -> nn.Module:
        """What turns a batch into a loss; only the reference is placed on the device, as nothing else will do that.
        Raises `UserError` for a prior, or data, that it cannot be of."""
        if self.config.objective != "cca":
            return Likelihood(self.model)
        if reference is None:
            raise UserError("init: missing; objective=cca fine-tunes the prior of a trained pipeline, init=PIPELINE")
        if problem := alignment_problem(self.model):
            raise UserError(f"objective: cca {problem}")
        self.counts = torch.bincount(cast(Tensor, self.train_split.labels).long(), minlength=self.data.num_classes)
        if int(self.counts.count_nonzero()) < 2:
            raise UserError("objective: cca needs training rows of two classes or more")
        settings = self.config.cca or AlignmentConfig()
        weight = self.data.num_classes if settings.negatives is None else settings.negatives
        return Alignment(self.model, reference.to(device), settings.beta, weight)

    def batch(self, indices: np.ndarray, epochs: np.ndarray, seed: int) -> tuple[Tensor, ...]:
        """Tokens `(B, *grid.shape)` and labels `(B,)`, the null class where dropped or where the data has none; for an
        objective that contrasts them, also labels `(B,)` that the images do not have."""
        rows, labels = torch.from_numpy(indices), self.train_split.labels
        tokens = self.train_split.rows(indices)
        if self.config.perturb:
            tokens = perturbed(tokens, indices, epochs, seed, self.config.perturb, self.data.grid.vocab_size)
        null = torch.full((len(rows),), self.data.num_classes)
        if labels is None:
            return tokens, null
        own, dropped = labels[rows].long(), by_row(indices, epochs, seed, DROPOUT) < self.config.label_dropout
        given = torch.where(torch.from_numpy(dropped), null, own)
        if self.config.objective != "cca":
            return tokens, given
        return tokens, given, other_labels(own, self.counts, by_row(indices, epochs, seed, OTHER))

    def samples(self, batch_size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """All rows in a random order, or in blocks where `blocks` is set."""
        return samples_of(self.rows, batch_size, seed, step, self.config.blocks)

    def loss(self, player: str, batch: Any, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective, on the orders or masks that the prior draws for this step."""
        loss, terms = self.nets["model"](*batch, self.model.training_inputs(batch[0], self.progress))
        return loss, terms

    def preview(self, model: nn.Module, group: ProcessGroup = ALONE) -> dict[str, np.ndarray]:
        """Samples, one class per column, with the same seeds at every step."""
        return {"samples": self.pipeline(model).sample_picture(group=group)}

    def require_causal(self, model: Prior) -> None:
        """Raise `UserError` for a prior whose logits depend on tokens that it has still to predict."""
        labels = self.train_split.labels
        try:
            require_causal(model, self.train_split.rows(np.zeros(1, np.int64)), None if labels is None else labels[0])
        except NotCausalError as error:
            raise UserError(f"model: {error}") from error

    def evaluate(self, model: nn.Module, split: Split, group: ProcessGroup = ALONE) -> dict[str, float]:
        """Bits per token on a split."""
        if self.is_checked:
            self.require_causal(cast(Prior, model))
        return {"bits_per_token": bits_per_token(model, self.judged[split], self.evaluated[split], group=group)}

    def score(self, evaluation: dict[str, float]) -> float | None:
        """Fewer bits are better; of a prior that is to need no guidance, they say nothing."""
        bits = evaluation.get("bits_per_token")
        return None if bits is None or self.config.objective == "cca" else -bits

    def quality(self, evaluation: dict[str, float]) -> str:
        """Bits per token; an upper bound where the prior is not exact."""
        bits = evaluation.get("bits_per_token")
        return "" if bits is None else f"{'' if self.model.exact else 'at most '}{bits:.3f} bits per token"

    def outcome(self, run: Path) -> str:
        """The pipeline's folder, and the command that makes images with it."""
        folder = quote(str(run / "pipeline"))
        return f"pipeline: {folder}; next: smalti generate{as_asked()} pipeline={folder}"

    def pipeline(self, model: nn.Module) -> ImagePipeline:
        """Both stages, sharing `model`'s weights."""
        sampler = self.config.sampler.sampling_settings()
        if not self.data.num_classes:  # there is no class to guide towards
            sampler = {name: value for name, value in sampler.items() if name not in GUIDANCE}
        tokenizer = self.data.tokenizer.to(self.model.device)
        return ImagePipeline(tokenizer, cast(Prior, model), labels=self.data.class_names, sampler=sampler)

    def save(self, model: nn.Module, run: Path, facts: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        """The pipeline's folder, with where its images came from and a sample grid on its card."""
        pipeline = self.pipeline(model)
        if self.init:
            facts = {**facts, "objective": self.config.objective or "likelihood", "init": self.init}
        pipeline.provenance = {**self.data.source, "prior": facts, TOKENS: place_of(self.config.tokens)}
        pipeline.save_pretrained(run / "pipeline", sample_grid=pictures["samples"])


def training_splits(data: TokenDataset) -> tuple[TokenSplit, dict[Split, TokenSplit]]:
    """The split to train on, and those to evaluate on: `test`, and `validation` if there are rows in it. Raises
    `UserError` when one is missing or empty."""
    for name in ("train", "test"):
        if not len(data.splits.get(name, ())):
            raise UserError(f"tokens: the dataset has no rows in its {name!r} split; it has {sorted(data.splits)}")
    judged: dict[Split, TokenSplit] = {"held_out": data.splits["test"]}
    if len(data.splits.get("validation", ())):
        judged["validation"] = data.splits["validation"]
    return data.splits["train"], judged


def without_labels(data: TokenDataset) -> TokenDataset:
    """Return the same tokens without classes."""
    splits = {name: TokenSplit(split.tokens, None) for name, split in data.splits.items()}
    return replace(data, class_names=[], splits=splits)


def build_prior(node: dict[str, Any], data: TokenDataset) -> Prior:
    """The prior of a checked `{kind: ...}` node for the dataset's grid and classes. Raises `ConfigError`."""
    choices = {key: value for key, value in node.items() if key != "kind"}
    return Prior.create(
        node["kind"], grid=data.grid, num_classes=data.num_classes, tokenizer=data.tokenizer.fingerprint(), **choices
    )


FREE = ("dropout", "attention_dropout", "label_smoothing", "anneal", "random_share")
"""Settings of priors that say how they are trained, and not what they are."""


def start_from(prior: Prior, class_names: list[str], source: str) -> Prior:
    """Copy the weights of the prior of the pipeline `source` into `prior`; return that prior, for a reference.

    Raises `UserError` for one over the tokens of another tokenizer, of other classes, or with other settings than those
    of training alone; `PipelineLoadError` for a folder that is no good pipeline.
    """
    try:
        pipeline = ImagePipeline.from_pretrained(source)
    except PipelineLoadError as error:
        raise type(error)(f"init: {error}") from error
    theirs, mine = pipeline.prior, prior.config.to_dict()
    other = theirs.config.to_dict()
    if theirs.config.tokenizer != prior.config.tokenizer or theirs.grid != prior.grid:
        raise UserError(f"init: {source}: its prior is over the tokens of another tokenizer than tokens=")
    if (theirs.num_classes, pipeline.labels) != (prior.num_classes, class_names):
        there, here = (
            f"has {count} classes" + (f" ({', '.join(names)})" if names else "")
            for count, names in ((theirs.num_classes, pipeline.labels), (prior.num_classes, class_names))
        )
        raise UserError(f"init: {source}: {there}, and tokens= {here}")
    if theirs.name != prior.name:
        raise UserError(f"init: {source}: its prior is of model.kind={theirs.name}, not {prior.name}; leave that out")
    if differing := [key for key in {**mine, **other} if key not in FREE and mine.get(key) != other.get(key)]:
        pairs = ", ".join(f"model.{key}: {other.get(key)!r} there, {mine.get(key)!r} here" for key in differing)
        raise UserError(f"init: {source}: a prior of another configuration ({pairs})")
    prior.load_state_dict(theirs.state_dict())
    return theirs


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The model of the pipeline `init`, as a preset holds it; nothing where it cannot be read: loading the pipeline
    will say why."""
    path = file_of(str(located(str(given.get("init") or ""))), f"prior/{CONFIG}")
    saved = read_json(path) if path else {}
    if not Prior.has(saved.get("kind")):
        return {}
    member: Any = Prior.find(saved["kind"])
    facts = member.choices().facts
    return {"model": {key: value for key, value in saved.items() if key not in facts}}


def run(config: TrainPriorConfig) -> Path:
    """Train, and return the run folder; `pipeline/` in it is what `from_pretrained` wants."""

    def build(accelerator: Accelerator) -> Task:
        if config.objective == "cca" and is_sharding(accelerator):
            raise UserError("objective: cca keeps a whole copy of the prior on each process; launch it without FSDP")
        return PriorTask(config, accelerator.device)

    return train(build, config)


main = partial(
    run_command,
    TrainPriorConfig,
    run,
    verb="train_prior",
    description=__doc__,
    defaults=defaults,
    after_ctrl_c=lambda config: what_is_saved(Path(config.out)),
)


if __name__ == "__main__":
    main()
