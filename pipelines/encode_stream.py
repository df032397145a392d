"""Encode images that are read in sequence: with `data.streaming`, each shard (parquet, .tar) becomes a file of tokens.

Shards are divided among the processes, and each is read once, in order, without a copy: no image is decoded twice, and
the check is the decoding. A file of tokens is a function of its shard, so the dataset is the same to the bit for any
number of processes, and finished files are skipped when the command is started again. A process holds the images of a
few batches, and the tokens and columns of one shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prior.columns import LABEL, Column
from prior.given import Given
from tokenizer import Tokenizer

from .config import UserError, tell, user_errors
from .files import Output
from .images.augment import draw_changes
from .images.checking import BadImage, check_bad, write_bad_images
from .images.dataset import prepare_images
from .images.formats import decode_in_threads
from .images.splits import Division, Inherited, SplitFacts
from .images.stream_columns import (
    Input,
    StreamedColumn,
    choose_column_kinds,
    join_column,
    number_classes,
    read_shard,
    scan_shard,
)
from .images.streaming import divide_files
from .images.tables import Sample, names_in
from .prefetch import move_batch_async, pin_memory, prefetch
from .shuffling import splitmix64
from .tokens.shards import MAX_SHARDS, pack_columns, read_shard_header, shard_names, write_shard

if TYPE_CHECKING:
    from .encode import EncodeConfig
    from .processes.group import ProcessGroup

BAD = "bad_images"
"""The remark in a file of tokens that lists the bad images of its shard."""


class Batch(NamedTuple):
    """Consecutive images of a shard: the pixels (n, C, H, W) and stored columns of those that can be decoded, the
    changes of each draw, from `draw_changes`, None for the unchanged images; and the bad ones."""

    pixels: Tensor
    changes: list[Tensor | None]
    columns: dict[str, Tensor]
    bad: list[BadImage]


def check_stream_settings(config: EncodeConfig) -> None:
    """Raise `UserError` for settings that a stream cannot follow."""
    if config.data.crop is not None:
        raise UserError("data.crop: needs random access; data.streaming=false copies the images to the disk")
    if config.rows_per_shard is not None:
        raise UserError(
            "rows_per_shard: with data.streaming, each shard becomes one file of as many rows; set it to null"
        )
    if config.data.limit is not None:
        raise UserError(
            f"data.limit: with data.streaming, whole shards are encoded; set it to null (got {config.data.limit})"
        )
    for name, source in config.attributes.items():
        if source.tokenizer is not None or source.kind == "grid":
            raise UserError(f"attributes.{name}: a stream has one image a row, and no pairs; set data.streaming=false")


def open_shards(
    config: EncodeConfig, tokenizer: Tokenizer, inherited: Inherited | None, group: ProcessGroup
) -> StreamedShards:
    """Divide the shards into splits, and read their columns, on all processes together. Raises `UserError`."""
    division = divide_files(config.data, inherited)
    if group.is_main:
        if division.note:
            tell(division.note)
        if division.facts is not None:
            print(division.facts.describe(), flush=True)
        if config.data.on_error == "fail":
            tell(
                "data.streaming: images are not checked first; one that cannot be decoded ends the run when it is "
                "reached, and data.on_error=skip then continues without it"
            )
    inputs = list_shards(division)
    attributes = group.on_main(lambda: choose_column_kinds(config.data, config.attributes, inputs))
    classes = names_in(inputs[0].path, config.data.label_column)
    scans = group.map(lambda shard: scan_shard(shard, config.data, attributes, classes), inputs)
    ids, columns = number_classes(config.data, inputs, scans, classes)
    for each in attributes:
        columns[each.name] = join_column(each, inputs, scans)
    counts = [scan.images for scan in scans if scan.images is not None]
    total = sum(counts) if len(counts) == len(scans) else None
    if group.is_main and total is not None:
        size = 4e-6 * len(tokenizer.grid) * max(counts) * (1 + config.augmentations)
        print(f"{total:,} images, at most {max(counts):,} in a shard, whose tokens take {size:.3g} MB", flush=True)
    return StreamedShards(config, division.facts, {each.name: each for each in inputs}, columns, ids, attributes, total)


def list_shards(division: Division) -> list[Input]:
    """Return the shards of all splits, and the file that each becomes. Raises `UserError` for too many."""
    inputs = list[Input]()
    for split, part in (("train", "train"), ("validation", "validation"), ("test", "held_out")):
        if part in division.parts:
            rows, positions, units = division.parts[part]
            names = shard_names(split, len(positions))
            inputs += [
                Input(split, rows.name(k), name, int(units[k])) for k, name in zip(positions, names, strict=True)
            ]
    if len(inputs) > MAX_SHARDS:
        raise UserError(
            f"data.source: {len(inputs):,} shards, but a token dataset has at most {MAX_SHARDS:,} files; make fewer "
            "and larger shards"
        )
    return inputs


@dataclass(frozen=True)
class StreamedShards:
    """Shards to encode, by the name of the file that each becomes. ids: the class of each label. images: their
    number, None if they were not counted."""

    config: EncodeConfig
    facts: SplitFacts | None
    inputs: dict[str, Input]
    columns: dict[str, Column]
    ids: dict[Any, int]
    attributes: list[StreamedColumn]
    images: int | None
    grids: ClassVar[dict[str, Tokenizer]] = {}
    stochastic: ClassVar[list[str]] = []

    @property
    def names(self) -> list[str]:
        return list(self.inputs)

    @property
    def column_sources(self) -> dict[str, dict[str, Any]]:
        return {each.name: each.source.describe(each.name) for each in self.attributes}

    def describe_inputs(self) -> dict[str, Any]:
        """Return what else determines the bits of the files: a hash of the paths and sizes of the shards."""
        found = [
            [*shard[:3], os.path.getsize(shard.path) if os.path.exists(shard.path) else None]
            for shard in self.inputs.values()
        ]
        return {"shards": len(found), "shards_digest": hashlib.sha256(json.dumps(found).encode()).hexdigest()}

    def describe_columns(self) -> dict[str, Any]:
        return {name: column.to_dict() for name, column in self.columns.items() if name != LABEL}

    def count_draws(self, shard: Input) -> int:
        return 1 + self.config.augmentations * (shard.split == "train")

    def finish(self, work: Path) -> dict[str, list[int]]:
        """Return the number of rows of each file by split, and list the bad images. Raises `UserError` if there are too
        many of them."""
        sizes, bad, images = dict[str, list[int]](), dict[str, list[BadImage]](), Counter[str]()
        for shard in self.inputs.values():
            rows, remarks = read_shard_header(work / shard.name)
            found = [BadImage(f"{shard.path}: {name}", *others) for name, *others in json.loads(remarks.get(BAD, "[]"))]
            sizes.setdefault(shard.split, []).append(rows)
            bad.setdefault(shard.split, []).extend(found)
            images[shard.split] += rows // self.count_draws(shard) + len(found)
        check_bad([(bad[split], images[split]) for split in sizes], self.config.data)
        write_bad_images(work, bad)
        return sizes

    def encode(self, work: Path, names: list[str], tokenizer: Tokenizer, *, show_progress: bool) -> None:
        """Write these files. The next batches are read and decoded while the tokenizer encodes. Raises `UserError`."""
        from tqdm import tqdm

        shards = [self.inputs[name] for name in names]
        disable = None if show_progress else True
        chunks, bad = self._read_chunks(shards), list[BadImage]()
        with (
            tqdm(desc="encoding", unit="image", disable=disable, leave=False) as bar,
            closing(prefetch(lambda _: self._decode(next(chunks, None), tokenizer.device), count())) as batches,
        ):
            for shard in shards:
                tokens, columns, first = list[list[Tensor]](), list[dict[str, Tensor]](), len(bad)
                while (batch := next(batches)) is not None:
                    tokens.append(self._encode_batch(batch, tokenizer))
                    columns.append(batch.columns)
                    bad += batch.bad
                    bar.update(len(batch.pixels) * self.count_draws(shard))
                    if self.images is not None and len(bad) > self.config.data.max_bad_fraction * self.images:
                        check_bad([(bad, self.images)], self.config.data)  # raises, as there are too many in any case
                self._write(work, shard, tokens, columns, bad[first:], tokenizer)

    def _read_chunks(self, shards: list[Input]) -> Iterator[tuple[Input, int, list[Sample]] | None]:
        """Yield a batch of samples of a shard, still encoded, with the row of the first; None after each shard."""
        for shard in shards:
            start = 0
            for samples in read_shard(
                shard, self.config.data, self.attributes, self.config.batch_size, with_images=True
            ):
                yield shard, start, samples
                start += len(samples)
            yield None

    def _decode(self, chunk: tuple[Input, int, list[Sample]] | None, device: torch.device) -> Batch | None:
        """Decode a batch, and draw the changes of its images. Raises `UserError` for a bad image that may not be
        skipped."""
        if chunk is None:
            return None
        data, (shard, start, samples) = self.config.data, chunk
        images = decode_in_threads([sample.pop("data") for sample in samples], data.spec)
        good = [k for k, image in enumerate(images) if not isinstance(image, str)]
        bad = [
            BadImage(sample["name"], start + k, image)
            for k, (sample, image) in enumerate(zip(samples, images, strict=True))
            if isinstance(image, str)
        ]
        if bad and data.on_error == "fail":
            raise UserError(f"{bad[0].path}: {bad[0].reason} (data.on_error=skip skips such images)")
        pixels = torch.from_numpy(np.stack([images[k] for k in good])) if good else torch.empty(0, *data.spec.shape)
        # Keyed by the shard's name and the row in it, whatever else is in the batch, and whichever process has it.
        seed = int(splitmix64(np.array([self.config.seed % 2**64 ^ shard.key], np.uint64))[0])
        rows, draws = start + np.array(good, np.int64), range(1, self.count_draws(shard))
        batch: tuple[Any, ...] = pixels, None, *(draw_changes(rows, draw, data.augment, seed) for draw in draws)
        pixels, *changes = pin_memory(batch) if device.type == "cuda" else batch
        return Batch(pixels, changes, self._pack(shard, [samples[k] for k in good]), bad)

    def _pack(self, shard: Input, samples: list[Sample]) -> dict[str, Tensor]:
        with user_errors(ValueError, prefix=f"{shard.path}: "):
            raw = {each.name: each.to_raw(samples, self.columns[each.name]) for each in self.attributes}
            if LABEL in self.columns:
                raw[LABEL] = torch.tensor([self.ids[sample["label"]] for sample in samples], dtype=torch.int64)
            return pack_columns(self.columns, Given(self.columns, raw, len(samples)), slice(None))

    @torch.inference_mode()
    def _encode_batch(self, batch: Batch, tokenizer: Tokenizer) -> list[Tensor]:
        """Return tokens int32 `(n, *grid.shape)` for each draw."""
        if not len(batch.pixels):
            empty = torch.empty(0, *tokenizer.grid.shape, dtype=torch.int32, device=tokenizer.device)
            return [empty] * len(batch.changes)
        pixels, *changes = move_batch_async((batch.pixels, *batch.changes), tokenizer.device)
        augment = self.config.data.augment
        return [tokenizer.encode(prepare_images(pixels, each, augment)).int() for each in changes]

    def _write(
        self,
        work: Path,
        shard: Input,
        tokens: list[list[Tensor]],
        columns: list[dict[str, Tensor]],
        bad: list[BadImage],
        tokenizer: Tokenizer,
    ) -> None:
        """Write the file of a shard: the unchanged images, then those of each further draw. tokens, columns: by
        batch."""
        joined = {name: torch.cat([batch[name] for batch in columns]) for name in columns[0]}
        draws = self.count_draws(shard)
        packed = {name: rows.repeat(draws, *[1] * (rows.ndim - 1)) for name, rows in joined.items()}
        found = [(each.path.removeprefix(f"{shard.path}: "), each.row, each.reason) for each in bad]
        remarks = {BAD: json.dumps(found)} if found else None
        every = torch.cat([torch.cat(of_draw) for of_draw in zip(*tokens, strict=True)]).cpu()
        with Output(self.config.out).errors():
            write_shard(work / shard.name, every, tokenizer.grid, packed, remarks)
