"""Time training steps on a GPU, of the training loop on ImageNet presets and of reference models."""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.card import Card
from benchmarks.support.options import ROOT
from benchmarks.support.random_data import write_random_images, write_random_tokens
from benchmarks.support.references import Reference, gpt2, vq_model
from benchmarks.support.runs import NEVER
from benchmarks.support.tables import table_row
from benchmarks.support.timing import build_task, stepper
from pipelines.commands import plan

STEPS = 10  # between two waits
HEAD = ("model, bf16", "images", "step, ms", "host, ms", "images/s", "of peak", "memory, GB", "over plan")


@dataclass(frozen=True)
class Sizes:
    """Images per step, classes, grid side and vocabulary of stage two, image side of stage one, rows of the data, and
    changes to the presets."""

    images: int
    classes: int
    side: int
    ids: int
    pixels: int
    rows: int
    prior: tuple[str, ...] = ()
    tokenizer: tuple[str, ...] = ()

    def write_data(self, folder: Path) -> None:
        write_random_tokens(folder / "tokens", self.side, self.ids, self.rows, self.classes)
        write_random_images(folder / "images", self.pixels, self.rows)


FULL = Sizes(images=32, classes=1000, side=16, ids=16384, pixels=256, rows=256)
TINY = Sizes(
    images=2,
    classes=10,
    side=2,
    ids=64,
    pixels=32,
    rows=32,
    prior=("model.dim=64", "model.depth=1", "model.heads=2"),
    tokenizer=("model.widths=[32,32,32]", "model.blocks=1", "model.z_channels=16", "model.quantizer.codes=64"),
)


def prior_arguments(folder: Path, sizes: Sizes, *more: str) -> list[str]:
    given = [f"tokens={folder / 'tokens'}", f"train.batch_size={sizes.images}", *sizes.prior]
    return preset_arguments("prior/gpt_imagenet256", folder, *given, *more)


def tokenizer_arguments(folder: Path, sizes: Sizes, *more: str) -> list[str]:
    """Return a command line for `train_tokenizer`, without the perceptual network, whose weights need a download."""
    data = [f"data.source={folder / 'images'}", "data.held_out=null", f"data.image_size={sizes.pixels}"]
    size = [f"train.batch_size={max(2, sizes.images // 2)}", "loss.perceptual=0"]
    return preset_arguments("tokenizer/vqgan_imagenet256", folder, *data, *size, *sizes.tokenizer, *more)


def preset_arguments(preset: str, folder: Path, *more: str) -> list[str]:
    """Return a command line for a preset, without tracking, checkpoints, evaluations and previews."""
    quiet = [f"train.{key}={NEVER}" for key in ("steps", "save_every", "preview_every", "evaluate_every")]
    paths = ["--config", str(ROOT / "configs" / f"{preset}.yaml"), f"out={folder / 'run'}"]
    return [*paths, "track.wandb=disabled", *quiet, *more]


def model_config(argv: list[str]) -> Any:
    task, _ = build_task(argv, is_prior(argv))
    return getattr(task, "tokenizer", task.model).config


def is_prior(argv: list[str]) -> bool:
    return any(part.startswith("tokens=") for part in argv)


def measure_loop(card: Card, name: str, argv: list[str], repeats: int, flops: dict[str, float]) -> str:
    """Measure a step of the training loop; return its table row. flops: receives its FLOPs, by name."""
    torch.backends.cudnn.benchmark = not is_prior(argv)  # as in the run
    task, config = build_task(argv, is_prior(argv), card.device)
    with contextlib.redirect_stdout(io.StringIO()):
        planned = plan.main([*argv, "gpus=1", f"device={card.device}"])
    images, flops[name] = config.train.batch_size, planned.flops_per_step
    with stepper(task, config) as step:
        seconds, host = card.times(step, repeats, in_a_row=STEPS)
        memory = card.memory(step)
    del task, step
    gc.collect()
    return format_row(card, name, seconds, host, images, flops[name], memory, planned.memory(images))


def measure_reference(
    card: Card, name: str, build: Callable[[], Reference], images: int, flops: float | None, repeats: int
) -> str:
    """Measure a step of a reference model (forward, backward, clipping and fused AdamW under bf16 autocast); return its
    table row."""
    model, loss = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(card.device.type, torch.bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds, host = card.times(step, repeats, in_a_row=STEPS)
    return format_row(card, name, seconds, host, images, flops, card.memory(step))


def format_row(
    card: Card,
    name: str,
    seconds: float,
    host: float,
    images: int,
    flops: float | None,
    memory: int | None,
    planned: float | None = None,
) -> str:
    """Format a row of the table with the columns `HEAD`. memory, planned: peak bytes, measured and planned."""
    cells = [name, f"{images}", f"{1e3 * seconds:.1f}", f"{1e3 * host:.1f}", f"{images / seconds:.0f}"]
    cells += [f"{flops / seconds / card.peak:.1%}" if flops else "", "" if memory is None else f"{memory / 1e9:.2f}"]
    return table_row([*cells, "" if memory is None or not planned else f"{memory / planned:.2f}"])


def reference_prior(card: Card, config: Any, sizes: Sizes) -> Reference:
    ids = torch.randint(sizes.ids, (sizes.images, sizes.side, sizes.side), device=card.device)
    with card.device:
        return gpt2(config, ids)


def reference_tokenizer(card: Card, config: Any, images: int) -> Reference:
    batch = torch.rand(images, config.channels, *config.image_size, device=card.device) * 2 - 1
    with card.device:
        return vq_model((tuple(config.widths), config.blocks, config.groups), config, batch)
