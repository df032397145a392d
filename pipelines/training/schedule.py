"""Training settings and the learning rate schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..config import Config

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Decay rate of a moment of Adam."""


RestoreNo = BeforeValidator(lambda value: "no" if value is False else value)  # YAML reads a bare `no` as false


class TrainConfig(Config):
    """Training settings. Steps are optimizer steps, batch sizes are global."""

    steps: int | None = Field(
        2000, ge=1, description="optimizer steps, which all schedules follow; null: they follow `minutes`"
    )
    minutes: float | None = Field(
        None,
        gt=0,
        description="limit in minutes, which may end a run before its `steps` and before the learning rate has "
        "fallen; figures say so",
    )
    batch_size: int = Field(128, ge=1, description="images per step, over all processes and micro-batches")
    accumulate: int = Field(
        1, ge=1, description="micro-batches per process and step, over which gradients are accumulated"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: Muon for convolution kernels and for matrices of at least 16 x 16 between embeddings and "
        "head, AdamW for the rest",
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(0.02, gt=0, description="peak learning rate of Muon, on the same schedule")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up to the peak learning rate")
    decay_from: float = Field(
        0.6, ge=0, lt=1, description="share of training after which the learning rate falls linearly to `final_lr`"
    )
    final_lr: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a share of the peak")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), description="AdamW's decay rates for its moments")
    weight_decay: float = Field(
        0.02,
        ge=0,
        description="AdamW's weight decay for matrices and tables; biases, norms and Muon's weights do not decay",
    )
    clip: float = Field(1.0, gt=0, description="maximum norm of the gradients, which are scaled down to it")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay of the moving average of the weights, which is evaluated and saved"
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="seeds initial weights, data order, augmentation and dropout")
    log_every: int = Field(50, ge=1, description="steps between lines in metrics.jsonl")
    preview_every: int = Field(1000, ge=1, description="steps between previews")
    evaluate_every: int = Field(1000, ge=1, description="steps between evaluations on validation images")
    save_every: int = Field(1000, ge=1, description="steps between saves of a checkpoint and a snapshot")
    keep_best: bool = Field(
        True,
        description="deliver the averaged weights with the best bits per token or PSNR on validation images; if "
        "false, or without such images or figures, deliver the newest",
    )
    checkpointing: bool = Field(
        False,
        description="recompute each block in the backward pass instead of storing its activations: saves memory, "
        "takes a quarter to a third more time, and gives the same losses",
    )
    mixed_precision: Annotated[Literal["auto", "no", "bf16"] | None, RestoreNo] = Field(
        None,
        description="bf16: layers compute in bfloat16, weights and losses stay float32; auto: bf16 if the GPU "
        "supports it, or the CPU has AMX or AVX512-BF16; null: the setting of `accelerate launch`",
    )
    compile: bool = Field(
        False, description="compile each block with torch.compile: the first step is slow, later steps are faster"
    )
    timeout: float = Field(
        1800.0,
        ge=1,
        le=1e6,
        description="seconds that processes wait for another that is silent or still evaluating",
    )


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Return the learning rate: a linear warm-up over steps, the peak, and from `decay_from` on a linear fall in
    `progress` (clamped to [0, 1]) to `final_lr` of the peak (Haegele et al. 2024, arXiv 2405.18392)."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = min(1.0, (1 - min(1.0, progress)) / (1 - config.decay_from))
    return config.lr * warmup * (config.final_lr + (1 - config.final_lr) * left)


def describe_cut(steps: int, cut: Mapping[str, Any]) -> str:
    """Describe that a limit in minutes ended a run after `steps`. cut: the limit, and the steps that were planned."""
    return f"stopped by train.minutes={cut['minutes']:g} after {steps:,} of {cut['steps']:,} steps"
