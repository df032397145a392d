"""The classes and columns of a stream: read from its shards without the images, for names and statistics.

Each shard is summarised by one process (`scan_shard`), and the summaries are joined in the order of the shards, so that
the columns do not depend on the number of processes. A process holds the cells of a thousand rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from prior.columns import LABEL, MAX_NAMES, Column

from ..columns import FORMATS, guess_format
from ..config import UserError, user_errors
from ..tokens.meta import label_column
from .attributes import CELLS, AttributeSource, RawColumn, list_cells, report_kind
from .classes import describe_label, is_label, number_labels, warn_about_absent
from .settings import DataConfig
from .sources import Source
from .streaming import read_shards, require_same_classes
from .tables import Sample, names_in, url_suffix


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
        return self.source.column or self.name

    def cells(self, samples: list[Sample]) -> RawColumn:
        values = [sample["cells"][self.key] for sample in samples]
        return replace(list_cells(values, lambda row: str(samples[row]["name"])), names=list(self.names) or None)

    def parse(self, samples: list[Sample]) -> Any:
        return FORMATS[self.kind].parse_cells(self.cells(samples), self.source.encoder or "")

    def summarize(self, samples: list[Sample], train: int) -> Any:
        """Return what the column depends on of samples, the first `train` of which are trained on. Raises
        `ValueError`."""
        return FORMATS[self.kind].summarize(self.parse(samples), list(self.names) or None, train)

    def join(self, one: Any, other: Any, shard: Input) -> Any:
        """Return the summary of two, the first of which may be None. shard: that of the other. Raises `ValueError`."""
        try:
            return other if one is None else one.join(other)
        except ValueError as error:
            raise ValueError(f"{shard.path}: {error}") from error

    def to_raw(self, samples: list[Sample], column: Column) -> Tensor:
        return FORMATS[self.kind].to_raw(self.parse(samples), column)


def join_column(each: StreamedColumn, inputs: list[Input], scans: list[Scan]) -> Column:
    """Return a column of all shards, joined in their order. Raises `UserError`."""
    found = None
    with user_errors(ValueError, prefix=f"attributes.{each.name}: "):
        for shard, scan in zip(inputs, scans, strict=True):
            found = each.join(found, scan.summaries[each.name], shard)
        column = FORMATS[each.kind].make_column(found, each.source.encoder or "")
    report_kind(each.name, each.source, column)
    return column


def choose_column_kinds(
    data: DataConfig, sources: Mapping[str, AttributeSource], inputs: list[Input]
) -> list[StreamedColumn]:
    """Return the columns, each of the configured kind, or of that which the first cells of the training
    shards suggest."""
    found = list[StreamedColumn]()
    for name, source in sources.items():
        names = names_in(inputs[0].path, source.column or name)
        kind = source.kind or ("vector" if source.encoder else "")
        found.append(StreamedColumn(name, source, names, kind))
    for shard in inputs:
        if all(each.kind for each in found) or shard.split != "train":
            break
        for samples in read_shard(shard, data, found, with_images=False):
            for k, each in enumerate(found):
                if not each.kind and any(value is not None for value in each.cells(samples)):
                    found[k] = replace(each, kind=guess_format(each.cells(samples)).kind)
    return [replace(each, kind=each.kind or "number") for each in found]


def scan_shard(shard: Input, data: DataConfig, attributes: list[StreamedColumn], classes: tuple[str, ...]) -> Scan:
    """Read the columns of a shard; a tar is not read if none is needed. classes: those in the schema of the first
    shard. Raises `UserError`, which names the shard, also for one without images."""
    if url_suffix(shard.path) == ".tar" and data.label_column is None and not attributes:
        return Scan(None, {}, {})
    require_same_classes(shard.path, classes, data)
    for each in attributes:
        if names_in(shard.path, each.key) != each.names:
            raise UserError(f"attributes.{each.name}: {shard.path} and the first shard have different classes")
    images, labels, summaries = 0, dict[Any, str](), dict[str, Any]()
    for samples in read_shard(shard, data, attributes, with_images=False):
        images += len(samples)
        for sample in samples:
            label, name = sample["label"], sample["name"]
            if label is not None and not is_label(label):
                raise UserError(f"{name}: {describe_label(label, list(classes) or None, some=True)}")
            labels.setdefault(label, name)
        if len(labels) > MAX_NAMES:
            raise UserError(f"data.label_column: more than {MAX_NAMES:,} classes in {shard.path}")
        for each in attributes:
            with user_errors(ValueError, prefix=f"attributes.{each.name}: "):
                found = each.summarize(samples, len(samples) * (shard.split == "train"))
                summaries[each.name] = each.join(summaries.get(each.name), found, shard)
    if not images:
        raise UserError(f"{shard.path}: no images")
    return Scan(images, labels, summaries)


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
    warn_about_absent(names, {ids[label] for label in labels["train"]})
    return ids, label_column(names)


def read_shard(
    shard: Input, data: DataConfig, attributes: list[StreamedColumn], size: int = CELLS, *, with_images: bool
) -> Iterator[list[Sample]]:
    columns = sorted({each.key for each in attributes})
    samples = read_shards([shard.path], data, columns=columns, with_images=with_images)
    while some := list(islice(samples, size)):
        yield some
