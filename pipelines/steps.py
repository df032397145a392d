"""The five steps as Python functions, for notebooks and scripts.

    from pipelines.steps import train_tokenizer, encode, train_prior, generate, evaluate

    run = train_tokenizer("vqvae_digits", out="runs/mine", train={"steps": 400})
    tokens = encode(tokenizer=run, out="runs/mine_tokens", augmentations=4)
    run = train_prior("gpt_digits", tokens=tokens, out="runs/mine_gpt", **{"train.steps": 500})
    figures = evaluate(pipeline=run)

Each function is the command of the same name. `config` is a preset or a YAML file, or a list of them. The keyword
arguments override it; they are the keys of the command, as nested dicts or with dots. A mistake is a `UserError` with a
line for each problem. Started again, a function continues as the command does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizer.files import one_line

from . import encode as encoding
from . import evaluate as evaluation
from . import generate as generation
from . import train_prior as stage_two
from . import train_tokenizer as stage_one
from .config import UserError
from .config.command import build_config

Files = str | Path | Sequence[str | Path]
"""A preset or a YAML file, or several, of which later ones override earlier ones."""


def as_list(config: Files) -> Sequence[str | Path]:
    """Return the presets and files as a list. Raises `UserError` for anything else."""
    files = [config] if isinstance(config, str | Path) else config
    if not (isinstance(files, Sequence) and all(isinstance(file, str | Path) for file in files)):
        raise UserError(f"config: expected a preset, a file, or a list of them (got {one_line(repr(config))[:80]})")
    return files


def train_tokenizer(config: Files = (), **settings: Any) -> Path:
    """Train stage one. Returns the run folder, which `encode` takes as `tokenizer`; its `tokenizer/` is the model for
    `Tokenizer.from_pretrained`, its `metrics.jsonl` the record."""
    cls, defaults = stage_one.TrainTokenizerConfig, stage_one.defaults
    return stage_one.run(build_config(cls, as_list(config), settings, defaults))


def encode(config: Files = (), **settings: Any) -> Path:
    """Encode images as tokens. Returns the folder of the token dataset, for `train_prior` and `load_tokens`."""
    cls, defaults = encoding.EncodeConfig, encoding.tokenizer_defaults
    return encoding.run(build_config(cls, as_list(config), settings, defaults))


def train_prior(config: Files = (), **settings: Any) -> Path:
    """Train stage two. Returns the run folder, which `ImagePipeline.from_pretrained` and the other steps load."""
    cls, defaults = stage_two.TrainPriorConfig, stage_two.defaults
    return stage_two.run(build_config(cls, as_list(config), settings, defaults))


def generate(config: Files = (), **settings: Any) -> Path:
    """Draw samples into a grid, an `.npz` or a folder. Returns its path. For images in memory, call the pipeline."""
    return generation.run(build_config(generation.GenerateConfig, as_list(config), settings))


def evaluate(config: Files = (), **settings: Any) -> dict[str, Any]:
    """Measure a pipeline on held-out images. Prints a table and returns the figures, as in `evaluation.json`."""
    cls, defaults = evaluation.EvaluateConfig, evaluation.defaults
    return evaluation.run(build_config(cls, as_list(config), settings, defaults))
