"""Turn a data set's images into a token dataset, with the tokenizer of stage one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tokenizer import Tokenizer
from tokenizer.files import read_json
from tokenizer.model import PROVENANCE

from .config import Config, Of, UserError, run_command
from .config.importing import as_asked
from .config.terminal import by_clause
from .files import Output, lock_output
from .images import DataConfig, ImageDataset, Splits, check_shape, load_images
from .images.dataset import is_stream
from .images.origin import is_local
from .jobs import Piece
from .jobs.sharing import Share, shared
from .prefetch import pin_memory, prefetch, to_device_async
from .processes.launched import apart, build_accelerator, team_of
from .stages.provenance import TokenizerFolder, read_with, tokenizer_defaults, tokenizer_folder
from .tokens import Meta
from .tokens.appending import (
    class_numbers,
    earlier_settings,
    existing,
    match_validation_split,
    missing_variants,
    same_images,
)
from .tokens.finished import made_before, told
from .tokens.meta import TOKENS, manifest_hash
from .tokens.pieces import EncodeJob, cut, recover, shards_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Raw = list[tuple[Tensor, ...]]
"""A batch as it travels, in one part or two, each as `ImageDataset.raw_batch` returns it."""


class EncodeConfig(Config):
    """Which images are encoded, with which tokenizer."""

    examples = (
        "tokenizer=runs/vqvae_digits/tokenizer out=runs/digits_tokens",
        "tokenizer=runs/photos out=runs/photos_tokens data.on_error=skip",
    )
    often = (
        "tokenizer out data.source data.label_column data.on_error augmentations "
        "append only batch_size rows_per_shard seed"
    )

    tokenizer: TokenizerFolder = Field(description="folder of the tokenizer, of the run that trained it, or a Hub id")
    out: str = Field(description="folder of the token dataset")
    data: Annotated[DataConfig, Of("tokenizer")] = Field(
        DataConfig(), description="the images; defaults to those the tokenizer was trained on"
    )
    augmentations: int = Field(
        0, ge=0, le=1000, description="extra variants of each training image, made by data.augment"
    )
    append: bool = Field(
        False,
        description="add to the dataset in `out` what it does not have: other images, or further augmentations of the "
        "same",
    )
    only: Literal["train", "validation", "test"] | None = Field(
        None, description="with append=true, add to this split alone"
    )
    rows_per_shard: int | None = Field(
        None, ge=1, description="rows of a file; null: one file for a split below 64 MiB, else 16,384 rows"
    )
    batch_size: int = Field(256, ge=1, description="images at a time on each process")
    seed: int = Field(0, ge=0, description="chooses the augmentations")


def run(config: EncodeConfig) -> Path:
    """Encode all splits, each process its share; the dataset gets its name at the end. Returns its folder.

    Started again after it was killed, it makes what is missing, and the result is the same to the bit. Raises
    `UserError` for images of another size than the tokenizer's, augmentations without data.augment, a folder of
    something else or of an unfinished encode with another configuration, and for rows that do not fit the dataset to
    which they are added.
    """
    accelerator = build_accelerator()
    team = team_of(accelerator)
    tokenizer, out = Tokenizer.from_pretrained(tokenizer_folder(config.tokenizer)), Path(config.out)
    check_settings(config, tokenizer, out)
    with apart(accelerator), lock_output(out, team):
        team.first(lambda: recover(out))
        old = existing(out, tokenizer) if config.append else None
        config = config.model_copy(
            update={"data": match_validation_split(config.data, earlier_settings(out, old), old)}
        )
        images = load_images(config.data, together=True)
        if len({part.labels is None for part in images.named().values()}) > 1:
            raise UserError("data.label_column: some splits have labels and others do not; null uses all without")
        variants = variants_to_make(config, images, old)
        numbers = class_numbers(images.train, old)
        pieces, began = plan(config, images, variants), time.monotonic()
        part = part_of(config, variants, pieces)
        if meta := None if old else team.first(lambda: there_already(config, tokenizer, images, part)):
            return end(accelerator, out, f"already finished: {told(meta)}; nothing to do", team.leads)
        job = EncodeJob(out, tokenizer.grid, pieces, depends_on(config, tokenizer, pieces, accelerator.device.type))
        job.sizes({} if old is None else old.shards, merge=config.rows_per_shard is None)  # before the work
        share = shared(job, team)
        encode_pieces(share, tokenizer.to(accelerator.device), images, numbers, config, job)
        accelerator.wait_for_everyone()
        meta = team.first(lambda: publish(job, config, tokenizer.cpu(), images, old, part))
        minutes = (time.monotonic() - began) / 60
        return end(accelerator, out, f"done: {told(meta)} in {minutes:.1f} min", team.leads)


def part_of(config: EncodeConfig, variants: dict[str, tuple[int, int]], pieces: list[Piece]) -> dict[str, Any]:
    """What a dataset says of the rows of one encode."""
    counts = rows_by_split(pieces)
    return {
        "data": config.data.model_dump(mode="json"),
        "seed": config.seed,
        "variants": {split: end for split, (_, end) in variants.items()},
        "rows": {split: counts.get(split, 0) for split in variants},
    }


def there_already(config: EncodeConfig, tokenizer: Tokenizer, images: Splits, part: dict[str, Any]) -> Meta | None:
    """The dataset, if this encode has made it before."""
    names = images.train.class_names if images.train.labels is not None else []
    return made_before(Path(config.out), part, names, tokenizer.fingerprint(), config.rows_per_shard, config.data)


def end(accelerator: Accelerator, out: Path, text: str, leads: bool) -> Path:
    """Say what there is and what comes next."""
    accelerator.end_training()
    if leads:
        run = quote(f"{str(out).removesuffix('_tokens')}_prior")
        then = f"smalti train_prior{as_asked()} tokens={quote(str(out))} out={run}"
        print(by_clause(f"{out}: {text}; next: {then}"), flush=True)
    return out


def by_split(images: Splits) -> dict[str, ImageDataset]:
    """The images of each split of the token dataset."""
    parts = {"train": images.train, "validation": images.validation, "test": images.held_out}
    return {split: part for split, part in parts.items() if part is not None}


def check_settings(config: EncodeConfig, tokenizer: Tokenizer, out: Path) -> None:
    """Raise `UserError` for mistakes that can be found before images are read."""
    check_shape(config.data, tokenizer.image_shape, "tokenizer")
    if is_stream(config.data):
        raise UserError("data.streaming: encode reads images in any order; data.streaming=false copies them to disk")
    if config.augmentations and not any(config.data.augment.model_dump().values()):
        raise UserError(
            "augmentations: needs a data.augment.* that changes something, for example data.augment.shift=2"
        )
    if config.only and not config.append:
        raise UserError("only: a new dataset has all splits; append=true adds to one of them")
    Output(out, [read_with(config.tokenizer), config.data.path]).check_folder(TOKENS)


def variants_to_make(config: EncodeConfig, images: Splits, old: Meta | None) -> dict[str, tuple[int, int]]:
    """For each split that gets rows, its first variant and the end; see `missing_variants`."""
    splits = [split for split in by_split(images) if config.only in (None, split)]
    wanted = {split: 1 + config.augmentations * (split == "train") for split in splits}
    return missing_variants(old, config.data.model_dump(mode="json"), config.seed, wanted)


def plan(config: EncodeConfig, images: Splits, variants: dict[str, tuple[int, int]]) -> list[Piece]:
    """All pieces to make, in the order of their rows; row = variant * n + index."""
    sizes = {name: len(part) for name, part in by_split(images).items()}
    return [
        piece
        for split, (first, end) in variants.items()
        for piece in cut(split, first * sizes[split], end * sizes[split], config.batch_size, config.rows_per_shard)
    ]


def depends_on(config: EncodeConfig, tokenizer: Tokenizer, pieces: list[Piece], device: str) -> dict[str, Any]:
    """All that the rows depend on, to the bit."""
    settings = config.model_dump(mode="json", exclude={"out", "tokenizer"})
    counts = rows_by_split(pieces)
    return {
        **settings,
        "tokenizer": tokenizer.fingerprint(),
        "rows": dict(counts),
        "device": device,
        "added_to": manifest_hash(Path(config.out)) if config.append else None,
    }


def rows_by_split(pieces: list[Piece]) -> dict[str, int]:
    """How many rows the pieces of each split hold."""
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts[piece.split] += piece.rows
    return counts


def encode_pieces(
    share: Share,
    tokenizer: Tokenizer,
    images: Splits,
    numbers: Tensor | None,
    config: EncodeConfig,
    job: EncodeJob,
) -> None:
    """Make the pieces that are missing, each process its share. numbers: for each class of the images its number in the
    dataset."""
    from tqdm import tqdm

    if share.team.leads and (done := len(job.pieces) - len(share.missing)):
        print(f"{config.out}: continuing, {done} of {len(job.pieces)} pieces are there", flush=True)
    mine, parts, device = share.mine, by_split(images), tokenizer.device
    hidden = None if share.team.leads else True
    total = sum(piece.rows for piece in mine)
    batches = [(parts[piece.split], rows) for piece in mine for rows in rows_of(piece, config.batch_size)]

    def make(batch: tuple[ImageDataset, np.ndarray]) -> Raw:
        raw = variants_of(*batch, config.seed)
        return [pin_memory(part) for part in raw] if device.type == "cuda" else raw

    with (
        tqdm(total=total, desc="encoding", unit="image", disable=hidden, leave=False) as bar,
        closing(prefetch(make, batches)) as stream,
    ):
        for piece in mine:
            split = parts[piece.split]
            tokens = encode_piece(tokenizer, split, piece, stream, bar)
            labels = None if split.labels is None else split.labels[np.arange(piece.start, piece.stop) % len(split)]
            job.keep_rows(piece, tokens, labels if numbers is None or labels is None else numbers[labels])


def rows_of(piece: Piece, batch_size: int) -> list[np.ndarray]:
    """The rows of each batch. Batches start with the piece, so they do not depend on the number of processes."""
    cuts = range(piece.start, piece.stop, batch_size)
    return [np.arange(start, min(start + batch_size, piece.stop)) for start in cuts]


@torch.inference_mode()
def encode_piece(tokenizer: Tokenizer, images: ImageDataset, piece: Piece, stream: Iterator[Raw], bar: Any) -> Tensor:
    """Tokens `(piece.rows, *grid.shape)` int32, of the piece's batches, which come from the `stream`. A GPU is waited
    for once, at the end."""
    tokens, done = [], 0
    while done < piece.rows:
        parts = [images.prepare(*to_device_async(part, tokenizer.device)) for part in next(stream)]
        tokens.append(tokenizer.encode(torch.cat(parts)).int())
        bar.update(len(tokens[-1]))
        done += len(tokens[-1])
    return torch.cat(tokens).cpu()


def variants_of(images: ImageDataset, rows: np.ndarray, seed: int) -> Raw:
    """The images of dataset rows: row = variant * n + index, and variant 0 is the image as it is."""
    variants, indices = np.divmod(rows, len(images))
    first = int((variants == 0).sum())  # rows ascend, so variants do
    parts = [(slice(first), False), (slice(first, None), True)]
    return [images.raw_batch(indices[at], variants[at], seed, augment=new) for at, new in parts if len(indices[at])]


def publish(
    job: EncodeJob, config: EncodeConfig, tokenizer: Tokenizer, images: Splits, old: Meta | None, part: dict[str, Any]
) -> Meta:
    """Put the pieces, after the rows that were there, into the dataset; returns what it then says of itself."""
    data = part["data"]
    if old is None:
        path = Path(config.tokenizer) / PROVENANCE
        known = read_json(path) if path.is_file() else {}
        source = {**known, "data": data, "local": is_local(config.data.source)}
        names = images.train.class_names if images.train.labels is not None else []
        meta = Meta(tokenizer.grid, names, {}, source, config.augmentations, tokenizer.fingerprint(), [part])
    else:
        more = config.augmentations if same_images(old.source.get("data") or {}, data) else 0
        meta = replace(old, augmentations=max(old.augmentations, more), parts=[*old.parts, part])
    before = {} if old is None else shards_of(job.out, old)
    return job.publish(meta, before, tokenizer, merge=config.rows_per_shard is None)


main = partial(
    run_command,
    EncodeConfig,
    run,
    verb="encode",
    description=__doc__,
    defaults=tokenizer_defaults,
    kept=lambda _: "the same command continues",
)


if __name__ == "__main__":
    main()
