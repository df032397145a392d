"""All that writes for a user: a writer makes a folder or a file, as a method or as a verb; `WRITERS` lists them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipelines import encode, evaluate, generate, train_prior, train_tokenizer
from pipelines.commands import (
    complete,
    compress,
    decompress,
    detect,
    export,
    import_,
    probe,
    reconstruct,
    search,
    tune,
)
from pipelines.commands import inspect_ as inspect
from pipelines.images.pictures import save_picture
from pipelines.tokens import load_tokens


@dataclass(frozen=True)
class Writer:
    """write(world, out, *words): writes at `out`. kind: `whole` (a folder that is one thing), `results` (files beside
    others in a folder), `file`, `run`, or `job` (a folder that is continued). reads: what of the world it reads, which
    must not be `out`."""

    write: Callable[..., Any]
    kind: str
    reads: str | None = None
    suffix: str = ""

    def replace(self, world: Any, out: Path) -> Any:
        """Write over what is there, with `overwrite=true` where the writer has that."""
        return self.write(world, out, *(["overwrite=true"] if self.kind in ("results", "file") else []))


def verb(module: Any, *arguments: str, out: str = "out") -> Callable[..., Any]:
    """A verb with these arguments, in which names of the world stand in braces."""

    def write(world: Any, path: Path, *words: str) -> Any:
        given = [argument.format(**vars(world)) for argument in (*arguments, *words)]
        return run(module, [*given, f"{out}={path}"])

    return write


def run(module: Any, argv: list[str]) -> Any:
    """What a verb does; a refusal as the error that it is."""
    try:
        return module.main(argv)
    except SystemExit as ended:
        raise ended.__cause__ or ended from None


def picture_at(world: Any, out: Path, *words: str) -> None:
    """A picture at `out`, by the function that a program calls."""
    save_picture(np.zeros((8, 8, 3), np.uint8), out, overwrite=bool(words))


DATA = ("data.source={images}", "data.image_size=8")
TINY = ("train.steps=2", "train.batch_size=4", "train.warmup_steps=1", "track.wandb=disabled")
WRITERS: dict[str, Writer] = {
    "Tokenizer.save_pretrained": Writer(lambda world, out: world.tokenizer_model.save_pretrained(out), "whole"),
    "Prior.save_pretrained": Writer(lambda world, out: world.prior_model.save_pretrained(out), "whole"),
    "ImagePipeline.save_pretrained": Writer(lambda world, out: world.pipe.save_pretrained(out), "whole"),
    "TokenDataset.save": Writer(lambda world, out: load_tokens(world.tokens).save(out), "whole"),
    "encode": Writer(verb(encode, "tokenizer={tokenizer}", *DATA), "whole", "images"),
    "import": Writer(verb(import_, "source={source}", "image_size=8", "groups=4"), "whole", "source"),
    "export": Writer(verb(export, "tokenizer={tokenizer}", "format=torch"), "whole", "tokenizer"),
    "decompress": Writer(verb(decompress, "pipeline={pipeline}", "stream={stream}"), "new", "pipeline"),
    "generate, a folder": Writer(verb(generate, "pipeline={pipeline}", "num_images=2"), "job", "pipeline"),
    "detect": Writer(
        verb(detect, "pipeline={calibrated}", "images={images}", *DATA, "num_shown=1"), "results", "calibrated"
    ),
    "probe": Writer(verb(probe, "pipeline={pipeline}", *DATA, "num_train=20", "num_test=8"), "results", "images"),
    "evaluate": Writer(
        verb(evaluate, "pipeline={pipeline}", *DATA, "num_images=0", "update_card=false"), "results", "pipeline"
    ),
    "tune": Writer(
        verb(
            tune,
            "pipeline={pipeline}",
            *DATA,
            *("data.split=test", "data.held_out=train", "data.validation_fraction=0.7", "feature_steps=0"),
            *("num_samples=50", "store=false"),
        ),
        "results",
        "pipeline",
    ),
    "generate, a grid": Writer(verb(generate, "pipeline={pipeline}", "num_images=2"), "file", "pipeline", ".png"),
    "generate, npz": Writer(verb(generate, "pipeline={pipeline}", "num_images=2"), "file", "pipeline", ".npz"),
    "complete": Writer(verb(complete, "pipeline={pipeline}", "images={picture}", "draws=1"), "file", "picture", ".png"),
    "reconstruct": Writer(verb(reconstruct, "tokenizer={tokenizer}", *DATA), "file", "picture", ".jpg"),
    "inspect": Writer(verb(inspect, "tokenizer={tokenizer}", *DATA, "num_images=3"), "file", "picture", ".webp"),
    "search": Writer(verb(search, "pipeline={pipeline}", *DATA, "images={picture}", "k=2"), "file", "picture", ".bmp"),
    "save_picture": Writer(picture_at, "file", None, ".png"),
    "compress": Writer(verb(compress, "pipeline={pipeline}", "images={picture}"), "file", "picture", ".smalti"),
    "train_tokenizer": Writer(
        verb(train_tokenizer, *DATA, *TINY, "model.kind=vqvae", "model.widths=[8]", "model.blocks=[0]"), "run", "images"
    ),
    "train_prior": Writer(
        verb(train_prior, "tokens={tokens}", *TINY, "model.kind=gpt", "model.dim=16", "model.depth=1", "model.heads=1"),
        "run",
        "tokens",
    ),
}


def of_kind(*kinds: str, slow: tuple[str, ...] = ()) -> Any:
    """All writers of these kinds; those in `slow` take long at what is tested."""
    names = [name for name, writer in WRITERS.items() if writer.kind in kinds]
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]
    )


def published_weights(model: Any, folder: Path) -> None:
    """The model as LlamaGen publishes it: bare weights under its own names."""
    from tokenizer.published.vqgans import LLAMAGEN

    folder.mkdir()
    names = dict(model.named_parameters())
    save_file(
        {
            LLAMAGEN.published(key, len(model.config.widths)): value.detach().clone(
                memory_format=torch.contiguous_format
            )
            for key, value in names.items()
        },
        folder / "vq.safetensors",
    )


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def place(name: str, tmp_path: Path) -> Path:
    """Where a writer is to write."""
    return tmp_path / f"out{WRITERS[name].suffix}"
