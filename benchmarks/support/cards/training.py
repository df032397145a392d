"""Training steps on a card: the loop's own on an ImageNet preset, and the same of a plain model of others."""

from __future__ import annotations

import contextlib
import gc
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.support.cards.card import Card
from benchmarks.support.options import ROOT
from benchmarks.support.references import Reference, gpt2, vq_model
from benchmarks.support.runs import NEVER
from benchmarks.support.timing import stepper

QUIET = {
    "track.wandb": "disabled",
    "train.steps": NEVER,
    "train.save_every": NEVER,
    "train.preview_every": NEVER,
    "train.evaluate_every": NEVER,
}


@dataclass(frozen=True)
class Sizes:
    """How large everything is: images of a step, classes, side of the grid and ids of stage two, side of the images of
    stage one, and changes to the presets."""

    images: int
    classes: int
    side: int
    ids: int
    pixels: int
    rows: int
    prior: tuple[str, ...] = ()
    tokenizer: tuple[str, ...] = ()


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


@dataclass(frozen=True)
class Row:
    """A line of the table: seconds of a step and of its host, images and FLOPs of a step, bytes at most and planned."""

    name: str
    seconds: float
    host: float
    images: int
    flops: float
    memory: int | None = None
    planned: float | None = None

    def cells(self, card: Card) -> list[str]:
        """As they are shown."""
        gigabytes = "" if self.memory is None else f"{self.memory / 1e9:.2f}"
        ratio = "" if self.memory is None or not self.planned else f"{self.memory / self.planned:.2f}"
        return [
            self.name,
            f"{self.images}",
            f"{1e3 * self.seconds:.1f}",
            f"{1e3 * self.host:.1f}",
            f"{self.images / self.seconds:.0f}",
            f"{self.flops / self.seconds / card.peak:.1%}",
            gigabytes,
            ratio,
        ]


HEAD = (
    "model, bf16",
    "images",
    "step, ms",
    "host, ms",
    "images/s",
    "of peak",
    "memory, GB",
    "over plan",
)


def write_tokens(folder: Path, sizes: Sizes) -> Path:
    """A token dataset of random ids."""
    import torch

    from pipelines.tokens import TokenDataset, TokenSplit
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.create(
        "vqvae",
        image_size=(4 * sizes.side, 4 * sizes.side),
        channels=1,
        widths=(8,),
        blocks=(1,),
        quantizer={"kind": "ema", "codes": sizes.ids, "dim": 8},
    )
    ids = torch.randint(sizes.ids, (sizes.rows, sizes.side, sizes.side))
    split = TokenSplit(ids, torch.arange(sizes.rows) % sizes.classes)
    classes, both = [str(k) for k in range(sizes.classes)], {"train": split, "test": split}
    TokenDataset(tokenizer.grid, classes, both, tokenizer, {}).save(folder / "tokens")
    return folder / "tokens"


def write_images(folder: Path, sizes: Sizes) -> Path:
    """A folder of random pictures."""
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(sizes.rows):
        pixels = rng.integers(0, 256, (sizes.pixels, sizes.pixels, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:04d}.png")
    return folder / "images"


def prior_arguments(folder: Path, sizes: Sizes, *more: str) -> list[str]:
    """A command line of `train_prior`."""
    given = [f"tokens={folder / 'tokens'}", f"train.batch_size={sizes.images}", *sizes.prior]
    return arguments("prior/gpt_imagenet256", folder, *given, *more)


def tokenizer_arguments(folder: Path, sizes: Sizes, *more: str) -> list[str]:
    """A command line of `train_tokenizer`, without the perceptual network, whose weights would be downloaded."""
    data = [f"data.source={folder / 'images'}", "data.held_out=null", f"data.image_size={sizes.pixels}"]
    size = [f"train.batch_size={max(2, sizes.images // 2)}", "loss.perceptual=0"]
    return arguments("tokenizer/vqgan_imagenet256", folder, *data, *size, *sizes.tokenizer, *more)


def arguments(preset: str, folder: Path, *more: str) -> list[str]:
    """Of a preset, in which nothing is saved, evaluated or shown."""
    quiet = [f"{key}={value}" for key, value in QUIET.items()]
    return ["--config", str(ROOT / "configs" / f"{preset}.yaml"), f"out={folder / 'run'}", *quiet, *more]


def config_of(argv: list[str]) -> Any:
    """The configuration of the model that the verb of a command line trains."""
    task = task_of(argv)[0]
    return getattr(task, "tokenizer", task.model).config


def measure_loop(card: Card, name: str, argv: list[str], repeats: int) -> Row:
    """The step that the verbs take."""
    import torch

    torch.manual_seed(0)
    task, config = task_of(argv, card)
    planned = plan_of(argv, card)
    with stepper(task, config) as step:
        seconds, host = card.times(step, repeats)
        memory = card.memory(step)
    del task, step
    gc.collect()
    count = config.train.batch_size
    return Row(name, seconds, host, count, planned.flops_per_step, memory, planned.memory(count))


def task_of(argv: list[str], card: Card | None = None) -> tuple[Any, Any]:
    """The task of the verb, and its configuration."""
    from pipelines.config.command import parse
    from pipelines.train_prior import PriorTask, TrainPriorConfig
    from pipelines.train_tokenizer import TokenizerTask, TrainTokenizerConfig

    if any(part.startswith("tokens=") for part in argv):
        config: Any = parse(TrainPriorConfig, argv, verb="benchmark", description="")
        return PriorTask(config), config
    config = parse(TrainTokenizerConfig, argv, verb="benchmark", description="")
    return TokenizerTask(config, card.device if card else "cpu"), config


def plan_of(argv: list[str], card: Card) -> Any:
    """What `smalti plan` says of one card, measured on it."""
    from pipelines.commands import plan

    with contextlib.redirect_stdout(io.StringIO()):
        return plan.main([*argv, "gpus=1", f"device={card.device}"])


def measure_peer(card: Card, name: str, peer: Reference, images: int, flops: float, repeats: int) -> Row:
    """Forward, backward, clipping and fused AdamW of a plain model, under bf16 autocast."""
    import torch

    model, loss = peer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(card.device.type, torch.bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds, host = card.times(step, repeats)
    return Row(name, seconds, host, images, flops, card.memory(step))


def peer_of_prior(card: Card, config: Any, sizes: Sizes) -> Reference:
    """transformers' GPT-2 of the sizes of a prior's configuration."""
    import torch

    ids = torch.randint(sizes.ids, (sizes.images, sizes.side, sizes.side), device=card.device)
    with card.device:
        return gpt2(config, ids)


def peer_of_tokenizer(card: Card, config: Any, images: int) -> Reference:
    """diffusers' `VQModel` of the widths of a tokenizer's configuration."""
    import torch

    batch = torch.rand(images, config.channels, *config.image_size, device=card.device) * 2 - 1
    with card.device:
        return vq_model((tuple(config.widths), config.blocks, config.groups), config, batch)
