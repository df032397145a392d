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
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from prior.columns import LABEL, Column
from prior.given import Given
from tokenizer import Tokenizer
from tokenizer.files import one_line

from .columns import FORMATS, guess_format
from .config import UserError, tell
from .files import Output
from .images.attributes import AttributeSource, Cells, list_cells, report_kind
from .images.augment import draw_changes
from .images.checking import BadImage, check_bad, write_bad_images
from .images.classes import describe_label, is_label, number_labels
from .images.dataset import prepare_images
from .images.formats import decode_in_threads
from .images.settings import DataConfig
from .images.sources import Source
from .images.splits import Division, Inherited, SplitFacts
from .images.streaming import divide_files, names_in, read_files, require_classes
from .images.tables import Sample, suffix_of
from .prefetch import pin_memory, prefetch, to_device_async
from .shuffling import splitmix64
from .tokens.meta import label_column
from .tokens.shards import MAX_SHARDS, pack_columns, read_header, shard_names, write_shard

if TYPE_CHECKING:
    from .encode import EncodeConfig
    from .processes.group import ProcessGroup

BAD = "bad_images"
"""The remark in a file of tokens that lists the bad images of its shard."""


class Input(NamedTuple):
    """A shard, and the name of the file of tokens that it becomes. key: hash of the shard's name within the source."""

    split: str
    path: str
    name: str
    key: int


class Scan(NamedTuple):
    """What the columns of a shard hold. images: their number, None if they were not counted. labels: the name of the
    first image with each label. summaries: of each column, from `ColumnFormat.summarize`."""

    images: int | None
    labels: dict[Any, str]
    summaries: dict[str, Any]


class Batch(NamedTuple):
    """Consecutive images of a shard: the pixels (n, C, H, W) and samples of those that can be decoded, the changes of
    each draw, from `draw_changes`, None for the unchanged images; and the bad ones."""

    pixels: Tensor
    changes: list[Tensor | None]
    samples: list[Sample]
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


def open_stream(
    config: EncodeConfig, tokenizer: Tokenizer, inherited: Inherited | None, group: ProcessGroup
) -> StreamedShards:
    """Divide the shards into splits, and read their columns, on all processes together. Raises `UserError`."""
    division = divide_files(config.data, inherited)
    if group.is_main:
        if division.note:
            tell(one_line(division.note))
        if division.facts is not None:
            print(division.facts.describe(), flush=True)
        if config.data.on_error == "fail":
            tell(
                "data.streaming: images are not checked first; one that cannot be decoded ends the run when it is "
                "reached, and data.on_error=skip then continues without it"
            )
    inputs = name_files(division)
    attributes = group.on_main(lambda: open_columns(config, inputs))
    classes = names_in(inputs[0].path, config.data.label_column)
    scans = group.map(lambda shard: scan_shard(shard, config.data, attributes, classes), inputs)
    ids, columns = number_classes(config.data, inputs, scans, classes)
    for each in attributes:
        columns[each.name] = each.join([shard.path for shard in inputs], [scan.summaries[each.name] for scan in scans])
    counts = [scan.images for scan in scans if scan.images is not None]
    total = sum(counts) if len(counts) == len(scans) else None
    if group.is_main and total is not None:
        size = 4e-6 * len(tokenizer.grid) * max(counts) * (1 + config.augmentations)
        print(f"{total:,} images, at most {max(counts):,} in a shard, whose tokens take {size:.3g} MB", flush=True)
    return StreamedShards(config, division.facts, {each.name: each for each in inputs}, columns, ids, attributes, total)


def name_files(division: Division) -> list[Input]:
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


# The first pass, over the columns alone


@dataclass(frozen=True)
class StreamedColumn:
    """A column besides the class. names: those of its classes or flags in the schema of the first shard. kind: empty if
    it is not known yet."""

    name: str
    source: AttributeSource
    names: tuple[str, ...]
    kind: str

    @property
    def key(self) -> str:
        """The column of the shards."""
        return self.source.column or self.name

    def cells(self, samples: list[Sample]) -> Cells:
        """Return the column in samples of a shard."""
        values = [sample["cells"][self.key] for sample in samples]
        return replace(list_cells(values, lambda row: str(samples[row]["name"])), names=list(self.names) or None)

    def parse(self, samples: list[Sample]) -> Any:
        """Return the values in samples of a shard. Raises `ValueError`."""
        return FORMATS[self.kind].parse_cells(self.cells(samples), self.source.encoder or "")

    def join(self, paths: list[str], summaries: list[Any]) -> Column:
        """Return the column of all shards, joined in their order. Raises `UserError`."""
        found, place, kind = summaries[0], "", FORMATS[self.kind]
        try:
            for path, summary in zip(paths, summaries, strict=True):
                place = f"{path}: "
                found = found if summary is found else kind.join(found, summary)
            place = ""
            column = kind.make_column(found, self.source.encoder or "")
        except ValueError as error:
            raise UserError(one_line(f"attributes.{self.name}: {place}{error}")) from error
        report_kind(self.name, self.source, column)
        return column


def open_columns(config: EncodeConfig, inputs: list[Input]) -> list[StreamedColumn]:
    """Return the columns, each of the configured kind, or of that suggested by the first training shard with values."""
    found = [
        StreamedColumn(
            name,
            source,
            names_in(inputs[0].path, source.column or name),
            source.kind or "vector" * bool(source.encoder),
        )
        for name, source in config.attributes.items()
    ]
    for shard in inputs:
        if all(each.kind for each in found) or shard.split != "train":
            break
        samples = list(read_shard(shard, config.data, found, with_images=False))
        for k, each in enumerate(found):
            if not each.kind and any(value is not None for value in each.cells(samples)):
                found[k] = replace(each, kind=guess_format(each.cells(samples)).kind)
    return [replace(each, kind=each.kind or "number") for each in found]


def scan_shard(shard: Input, data: DataConfig, attributes: list[StreamedColumn], classes: tuple[str, ...]) -> Scan:
    """Read the columns of a shard; a tar is not read if none is needed. classes: those in the schema of the first
    shard. Raises `UserError`, which names the shard, also for one without images."""
    if suffix_of(shard.path) == ".tar" and data.label_column is None and not attributes:
        return Scan(None, {}, {})
    require_classes(shard.path, classes, data)
    samples = list(read_shard(shard, data, attributes, with_images=False))
    if not samples:
        raise UserError(f"{shard.path}: no images")
    labels, summaries = dict[Any, str](), dict[str, Any]()
    for sample in samples:
        label, name = sample["label"], sample["name"]
        if label is not None and not is_label(label):
            raise UserError(one_line(f"{name}: {describe_label(label, list(classes) or None, some=True)}"))
        labels.setdefault(label, name)
    for each in attributes:
        if names_in(shard.path, each.key) != each.names:
            raise UserError(f"attributes.{each.name}: {shard.path} and the first shard have different classes")
        try:
            values = each.parse(samples)
        except ValueError as error:
            raise UserError(one_line(f"attributes.{each.name}: {error}")) from error
        train = len(samples) if shard.split == "train" else 0
        summaries[each.name] = FORMATS[each.kind].summarize(values, list(each.names) or None, train)
    return Scan(len(samples), labels, summaries)


def number_classes(
    data: DataConfig, inputs: list[Input], scans: list[Scan], classes: tuple[str, ...]
) -> tuple[dict[Any, int], dict[str, Column]]:
    """Return the id of each label, and the column of classes; nothing without labels. Raises `UserError` if only some
    images have one."""
    labels = dict[str, dict[Any, str]]()
    for shard, scan in zip(inputs, scans, strict=True):
        labels[shard.split] = {**scan.labels, **labels.get(shard.split, {})}
    has_labels = {split: any(label is not None for label in found) for split, found in labels.items()}
    if len(set(has_labels.values())) > 1:
        raise UserError("data.label_column: some splits have labels and others do not; null ignores labels")
    if not has_labels["train"]:
        if data.label_column not in (None, LABEL):
            raise UserError(f"data.label_column: no image of {data.source} has a {data.label_column!r}")
        return {}, {}
    parts = [
        Source(len(found), lambda rows: [], list(found.values()).__getitem__, list(found), list(classes) or None)
        for found in labels.values()
    ]
    numbers, names = number_labels(parts)
    ids = dict[Any, int]()
    for part, several in numbers.items():
        ids |= dict(zip(part.labels or [], [] if several is None else several.tolist(), strict=True))
    return ids, label_column(names)


def read_shard(
    shard: Input, data: DataConfig, attributes: list[StreamedColumn], *, with_images: bool
) -> Generator[Sample]:
    """Yield the samples of a shard. Raises `UserError`."""
    columns = sorted({each.key for each in attributes})
    yield from read_files([shard.path], data, columns=columns, with_images=with_images)


# The second pass


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
    drawn: ClassVar[list[str]] = []

    @property
    def names(self) -> list[str]:
        """The names of the files to write, in order."""
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
        """Return the columns without the class."""
        return {name: column.to_dict() for name, column in self.columns.items() if name != LABEL}

    def count_draws(self, shard: Input) -> int:
        """Return how many rows each image has."""
        return 1 + self.config.augmentations * (shard.split == "train")

    def finish(self, work: Path) -> dict[str, list[int]]:
        """Return the number of rows of each file by split, and list the bad images. Raises `UserError` if there are too
        many of them."""
        sizes, bad, images = dict[str, list[int]](), dict[str, list[BadImage]](), Counter[str]()
        for shard in self.inputs.values():
            rows, remarks = read_header(work / shard.name)
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
        shown = None if show_progress else True
        chunks, bad = self._read_chunks(shards), list[BadImage]()
        with (
            tqdm(desc="encoding", unit="image", disable=shown, leave=False) as bar,
            closing(prefetch(lambda _: self._decode(next(chunks, None), tokenizer.device), count())) as batches,
        ):
            for shard in shards:
                tokens, samples = list[list[Tensor]](), list[Sample]()
                first = len(bad)
                while (batch := next(batches)) is not None:
                    tokens.append(self._encode_batch(batch, tokenizer))
                    samples += batch.samples
                    bad += batch.bad
                    bar.update(len(batch.samples) * self.count_draws(shard))
                    if self.images is not None and len(bad) > self.config.data.max_bad_fraction * self.images:
                        check_bad([(bad, self.images)], self.config.data)  # raises, as there are too many in any case
                self._write(work, shard, tokens, samples, bad[first:], tokenizer)

    def _read_chunks(self, shards: list[Input]) -> Iterator[tuple[Input, int, list[Sample]] | None]:
        """Yield a batch of samples of a shard, still encoded, with the row of the first; None after each shard."""
        for shard in shards:
            start, samples = 0, read_shard(shard, self.config.data, self.attributes, with_images=True)
            with closing(samples):
                while some := list(islice(samples, self.config.batch_size)):
                    yield shard, start, some
                    start += len(some)
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
            raise UserError(one_line(f"{bad[0].path}: {bad[0].reason} (data.on_error=skip skips such images)"))
        pixels = torch.from_numpy(np.stack([images[k] for k in good])) if good else torch.empty(0, *data.spec.shape)
        # Keyed by the shard's name and the row in it, whatever else is in the batch, and whichever process has it.
        seed = int(splitmix64(np.array([self.config.seed % 2**64 ^ shard.key], np.uint64))[0])
        rows, draws = start + np.array(good, np.int64), range(1, self.count_draws(shard))
        drawn: tuple[Any, ...] = pixels, None, *(draw_changes(rows, draw, data.augment, seed) for draw in draws)
        pixels, *changes = pin_memory(drawn) if device.type == "cuda" else drawn
        return Batch(pixels, changes, [samples[k] for k in good], bad)

    @torch.inference_mode()
    def _encode_batch(self, batch: Batch, tokenizer: Tokenizer) -> list[Tensor]:
        """Return the tokens int32 `(n, *grid.shape)` of each draw."""
        if not batch.samples:
            empty = torch.empty(0, *tokenizer.grid.shape, dtype=torch.int32, device=tokenizer.device)
            return [empty] * len(batch.changes)
        pixels, *changes = to_device_async((batch.pixels, *batch.changes), tokenizer.device)
        augment = self.config.data.augment
        return [tokenizer.encode(prepare_images(pixels, each, augment)).int() for each in changes]

    def _write(
        self,
        work: Path,
        shard: Input,
        tokens: list[list[Tensor]],
        samples: list[Sample],
        bad: list[BadImage],
        tokenizer: Tokenizer,
    ) -> None:
        """Write the file of a shard: the unchanged images, then those of each further draw. tokens: of each draw by
        batch."""
        raw, draws = dict[str, Tensor](), self.count_draws(shard)
        if LABEL in self.columns:
            raw[LABEL] = torch.tensor([self.ids[sample["label"]] for sample in samples], dtype=torch.int64)
        for each in self.attributes:
            raw[each.name] = FORMATS[each.kind].to_raw(each.parse(samples), self.columns[each.name])
        try:
            packed = pack_columns(self.columns, Given(self.columns, raw, len(samples)), slice(None))
        except ValueError as error:
            raise UserError(one_line(f"{shard.path}: {error}")) from error
        packed = {name: values.repeat(draws, *[1] * (values.ndim - 1)) for name, values in packed.items()}
        found = [(each.path.removeprefix(f"{shard.path}: "), each.row, each.reason) for each in bad]
        remarks = {BAD: json.dumps(found)} if found else None
        every = torch.cat([torch.cat(of_draw) for of_draw in zip(*tokens, strict=True)]).cpu()
        with Output(self.config.out).errors():
            write_shard(work / shard.name, every, tokenizer.grid, packed, remarks)
