"""Turn a data set's images into a token dataset, with the tokenizer of stage one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tokenizer import Tokenizer
from tokenizer.storage import read_json

from .config import Config, UserError, run_command
from .images import DataConfig, ImageDataset, check_shape, load_images
from .processes import build_accelerator
from .tokens import META, TokenDataset, TokenSplit, load_tokens, smallest_type
from .train_tokenizer import PROVENANCE

if TYPE_CHECKING:
    from accelerate import Accelerator


class EncodeConfig(Config):
    """What is encoded with what."""

    tokenizer: str = Field(description="folder of the tokenizer, as `train_tokenizer` wrote it, or a Hub id")
    out: str = Field(description="folder of the token dataset")
    data: DataConfig = Field(DataConfig(), description="the images; defaults to those the tokenizer was trained on")
    augmentations: int = Field(
        0, ge=0, le=1000, description="extra variants of each training image, made by data.augment"
    )
    batch_size: int = Field(256, ge=1, description="images at a time on each process")
    seed: int = Field(0, ge=0, description="chooses the augmentations")


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The data source that the tokenizer named on the command line was trained on."""
    path = Path(str(given.get("tokenizer", ""))) / PROVENANCE
    return {"data": read_json(path).get("data", {})} if path.is_file() else {}


def run(config: EncodeConfig) -> Path:
    """Encode both splits, every process its share, and write the dataset once; returns its folder.

    Raises `UserError` for images of another size than the tokenizer's, or augmentations without data.augment.
    """
    accelerator = build_accelerator()
    tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    check_shape(config.data, tokenizer.image_shape, "tokenizer")
    if config.augmentations and not any(config.data.augment.model_dump().values()):
        raise UserError(
            "augmentations: needs a data.augment.* that changes something, for example data.augment.shift=2"
        )
    out = Path(config.out)
    if out.is_dir() and any(out.iterdir()) and not (out / META).is_file():
        raise UserError(
            f"out: {out} is not empty and not a token dataset; choose another folder, nothing was overwritten"
        )
    images = load_images(config.data)
    if (images.train.labels is None) != (images.held_out.labels is None):
        raise UserError("data.label_column: only one of the two splits has labels; null uses both without")
    tokenizer.to(accelerator.device)
    splits = {}
    for name, split in (("train", images.train), ("test", images.held_out)):
        variants = 1 + (config.augmentations if name == "train" else 0)
        tokens = encode_split(accelerator, tokenizer, split, variants, config, name)
        splits[name] = TokenSplit(tokens, None if split.labels is None else split.labels.repeat(variants))
    if accelerator.is_main_process:
        path = Path(config.tokenizer) / PROVENANCE
        facts = read_json(path) if path.is_file() else {}
        source = {**facts, "data": config.data.model_dump(mode="json")}
        names = images.train.class_names if images.train.labels is not None else []
        TokenDataset(tokenizer.grid, names, splits, tokenizer.cpu(), source, config.augmentations).save(out)
        written = load_tokens(out)
        sizes = ", ".join(f"{len(split)} {name}" for name, split in written.splits.items())
        print(f"{out}: {sizes} rows of {'x'.join(map(str, written.grid.shape))} ids below {written.grid.vocab_size}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return out


@torch.inference_mode()
def encode_split(
    accelerator: Accelerator, tokenizer: Tokenizer, images: ImageDataset, variants: int, config: EncodeConfig, name: str
) -> Tensor:
    """Tokens `(variants * n, *grid.shape)`: all images as they are, then each further variant of all images.

    Every process encodes a contiguous share; all of them get the whole.
    """
    from tqdm import tqdm

    count, world = len(images) * variants, accelerator.num_processes
    share = -(-count // world)
    mine = np.arange(accelerator.process_index * share, (accelerator.process_index + 1) * share).clip(max=count - 1)
    encoded = torch.zeros(share, *tokenizer.grid.shape, dtype=torch.int32)
    hidden = None if accelerator.is_main_process else True
    with tqdm(total=share, desc=f"encoding {name}", unit="image", disable=hidden, leave=False) as bar:
        for start in range(0, share, config.batch_size):
            rows = mine[start : start + config.batch_size]
            batch = variants_of(images, rows, config.seed)
            encoded[start : start + len(rows)] = tokenizer.encode(batch.to(accelerator.device)).cpu().int()
            bar.update(len(rows))
    gathered = accelerator.gather(encoded.to(accelerator.device)).cpu() if world > 1 else encoded
    return gathered[:count].to(smallest_type(tokenizer.grid.vocab_size))


def variants_of(images: ImageDataset, rows: np.ndarray, seed: int) -> Tensor:
    """Images `(B, C, H, W)` of dataset rows: row = variant * n + index, and variant 0 is the image as it is."""
    which, indices = np.divmod(rows, len(images))
    parts = [
        images.batch(indices[which == variant], seed=seed, epoch=int(variant), augment=bool(variant))
        for variant in np.unique(which)
    ]
    return torch.cat(parts)  # rows ascend, so variants do


def main(argv: list[str] | None = None) -> Any:
    """The command line."""
    return run_command(EncodeConfig, run, argv, verb="encode", description=__doc__, defaults=defaults)


if __name__ == "__main__":
    main()
