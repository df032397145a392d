"""Encode the images of a data set into a token dataset, with the tokenizer of stage one."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from prior.columns import LABEL, Column
from prior.given import Given, digest_rows
from tokenizer import Tokenizer
from tokenizer.config import show_value
from tokenizer.files import MANIFEST, PipelineLoadError, folders_aside, publish_folder, read_json
from tokenizer.frame_by_frame import FrameByFrame
from tokenizer.model import PROVENANCE
from tokenizer.pixels import Pixels
from tokenizer.spec import to_uint8

from .config import Config, DefaultsFrom, UserError, run_command, tell, user_errors
from .config.importing import format_imports
from .encode_stream import StreamedShards, check_stream_settings, open_shards
from .files import Output, lock_output
from .frequencies import FREQUENCIES
from .images import (
    TEST_DRAWS,
    DataConfig,
    ImageDataset,
    Splits,
    load_images,
    report_division,
    require_same_spec,
    require_same_values,
)
from .images.attributes import AttributeSource, LoadedColumn, check_sources, choose_data, load_attributes
from .images.checking import BAD_IMAGES
from .images.duplicates import warn_about_duplicates
from .images.origin import is_local
from .images.splits import SPLITS, SPLITS_KEY, Inherited, SplitFacts
from .job import JOB, OtherJobError, begin_job, read_job, require_work_folder, work_folder
from .prefetch import move_batch_async, pin_memory, prefetch
from .processes.launch import build_accelerator, group_of, leave_group_on_error
from .provenance import (
    TokenizerFolder,
    find_protected_folder,
    inherit,
    read_training_data,
    read_training_facts,
    tokenizer_defaults,
    tokenizer_folder,
    trained_data,
)
from .tokens import Meta
from .tokens.meta import CONDITIONS, META, TOKEN_FOLDER, class_names, label_column, read_meta, verify_files, write_meta
from .tokens.shards import cut_shards, pack_columns, shard_names, stored_grid, write_shard

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .processes.group import ProcessGroup

Raw = list[tuple[Tensor, ...]]
"""A batch on its way to the device: one or two results of `ImageDataset.raw_batch`."""


LAST = ("tokenizer", CONDITIONS, META, SPLITS, FREQUENCIES, BAD_IMAGES, MANIFEST)
"""What is written when all files of rows are there."""


@dataclass(frozen=True)
class Shard:
    """Rows `start` to `stop` of a split, and their file name."""

    split: str
    name: str
    start: int
    stop: int


class EncodeConfig(Config):
    """The images to encode, and the tokenizer."""

    examples = (
        "tokenizer=runs/vqvae_digits/tokenizer out=runs/digits_tokens",
        "tokenizer=runs/photos out=runs/photos_tokens data.on_error=skip",
        "tokenizer=runs/shards out=runs/shards_tokens data.streaming=true data.on_error=skip",
        "tokenizer=runs/faces out=runs/faces_tokens table=faces.csv attributes.age=age attributes.tags=tags",
        "tokenizer=runs/emoji out=runs/emoji_tokens attributes.outline.images=outlines "
        "attributes.outline.tokenizer=runs/outlines",
    )
    often = (
        "tokenizer out data.source data.label_column data.on_error attributes.NAME table augmentations batch_size "
        "rows_per_shard seed"
    )
    renamed: ClassVar[dict[str, str]] = {"conditions": "attributes"}

    tokenizer: TokenizerFolder = Field(description="folder of a tokenizer or of the run that trained it, or a Hub id")
    out: str = Field(description="folder of the token dataset")
    data: Annotated[DataConfig, DefaultsFrom("tokenizer")] = Field(
        DataConfig(), description="the images; default: those the tokenizer was trained on"
    )
    attributes: dict[str, AttributeSource] = Field(
        {},
        description="what else is known of each image, by name: a column of the source's tables, of the folder's "
        "metadata or of table",
    )
    table: str | None = Field(
        None, description="CSV, TSV, JSON lines or parquet file with a column file_name, and columns for attributes"
    )
    augmentations: int = Field(
        0, ge=0, le=1000, description="extra variants of each training image, augmented as in data.augment"
    )
    rows_per_shard: int | None = Field(
        None,
        ge=1,
        description="rows per file; null: 1,024 to 4,096, and at most 16 files for a small split; of streams, the rows "
        "of each shard",
    )
    batch_size: int = Field(256, ge=1, description="images per batch on each process")
    seed: int = Field(0, ge=0, description="seed of the augmentations, and of random crops")


def run(config: EncodeConfig) -> Path:
    """Encode all splits, dividing the files among the processes; rename the dataset to `out` at the end. Return its
    folder.

    After an interruption, the same command encodes the missing files, with any number of processes, and the result is
    identical to the bit. Raises `UserError` if the image size differs from the tokenizer's, augmentations are requested
    without data.augment, the folder holds something else, or an unfinished encode has other settings."""
    accelerator = build_accelerator()
    group = group_of(accelerator)
    tokenizer, out = Tokenizer.from_pretrained(tokenizer_folder(config.tokenizer)), Path(config.out)
    tokenizer = FrameByFrame.wrap(tokenizer, config.data.spec.frames)  # one of images encodes clips frame by frame
    tokenizers = [config.tokenizer, *(each.tokenizer for each in config.attributes.values() if each.tokenizer)]
    output = Output(out, [*map(find_protected_folder, tokenizers), config.data.path, *list_pairs(config)])
    require_consistent(config, tokenizer, output)
    config = config.model_copy(update={"data": choose_data(config.data, config.attributes)})
    if group.is_main and (difference := describe_other_units(config)):
        tell(
            f"warning: the tokenizer was trained {difference}; unless its images had splits train and test, it was "
            "trained on some that are held out now"
        )
    with leave_group_on_error(accelerator), lock_output(out, group):
        inherited = inherit(config.data, read_training_facts(config.tokenizer), regroup=True)
        is_known = inherited.rule is not None or inherited.same_source  # a tokenizer of other images is usual
        open_source = open_shards if config.data.is_stream else open_images
        images = open_source(config, tokenizer, inherited if is_known else None, group)
        job = describe_job(config, tokenizer, images, accelerator.device.type)
        if meta := group.on_main(lambda: find_finished(out, job, list_inputs(config))):
            text = f"already finished: {describe_tokens(meta)}; nothing to do"
            return finish_run(accelerator, config, meta, text, group.is_main)
        work, began = work_folder(out, "encode"), time.monotonic()

        def begin() -> list[str]:
            with output.errors():
                return begin_files(work, job, images.names)

        missing = group.on_main(begin)
        if group.is_main and config.augmentations:
            copies = "1 copy" if config.augmentations == 1 else f"{config.augmentations:,} copies"
            each = f"each copy: {config.data.augment.describe()}"
            print(f"{out}: {copies} of each training image; {each} (data.augment)", flush=True)
        if group.is_main and len(missing) < len(images.names):
            done = f"{len(images.names) - len(missing)} of {len(images.names)} shards are done"
            print(f"{out}: continuing, {done}", flush=True)
        mine = list(group.mine(missing))
        models = [tokenizer, *images.grids.values()]
        for model in models:
            model.to(accelerator.device)

        def encode() -> None:
            require_work_folder(work)
            images.encode(work, mine, tokenizer, show_progress=group.is_main)

        group.gather(encode)

        def finish() -> Meta:
            with output.errors():
                return finish_dataset(work, out, config, tokenizer, images)

        for model in models:
            model.cpu()
        meta = group.on_main(finish)
        text = f"done: {describe_tokens(meta)} in {(time.monotonic() - began) / 60:.1f} min"
        return finish_run(accelerator, config, meta, text, group.is_main)


def require_consistent(config: EncodeConfig, tokenizer: Tokenizer, output: Output) -> None:
    require_same_spec(config.data, tokenizer, "tokenizer")
    if config.augmentations and not config.data.augment.describe():
        raise UserError("augmentations: needs a setting of data.augment, for example data.augment.shift=2")
    if config.table and not config.attributes:
        raise UserError("table: needs a column to read from it, for example attributes.age=age")
    check_sources(config.data, config.attributes, config.table, config.augmentations)
    if config.data.is_stream:
        check_stream_settings(config)
    output.check_folder(TOKEN_FOLDER)


def describe_other_units(config: EncodeConfig) -> str | None:
    """Return how the tokenizer's training held out other units of these images than are held out here, if it did."""
    data, ours = trained_data({"data": read_training_data(config.tokenizer)}), config.data
    if data is None or data.source != ours.source:
        return None
    if data.is_stream != ours.is_stream:
        units = "whole shards" if data.is_stream else "single images"
        return f"with data.streaming={'true' if data.is_stream else 'false'}, which holds out {units}"
    if data.group not in (None, ours.group):
        return f"with data.group={show_value(data.group)}"
    whole = {"group": "objects", "clips=true": "clips", "frames": "clips"}
    new = (key for key in whole if getattr(ours, name := key.partition("=")[0]) and not getattr(data, name))
    return next((f"without data.{key}, which holds out whole {whole[key]}" for key in new), None)


# Images with random access


@dataclass(frozen=True)
class LoadedImages:
    """Images that can be read in any order, what is known of them, and the files to write. loaded: all columns, the
    class first."""

    config: EncodeConfig
    facts: SplitFacts | None
    splits: dict[str, ImageDataset]
    loaded: Mapping[str, LoadedColumn]
    shards: dict[str, Shard]

    @property
    def names(self) -> list[str]:
        return list(self.shards)

    @property
    def columns(self) -> dict[str, Column]:
        return {name: each.column for name, each in self.loaded.items()}

    @property
    def column_sources(self) -> dict[str, dict[str, Any]]:
        return {name: each.source for name, each in self.loaded.items()}

    @property
    def grids(self) -> dict[str, Tokenizer]:
        return {name: each.tokenizer for name, each in self.loaded.items() if each.tokenizer is not None}

    @property
    def stochastic(self) -> list[str]:
        """The splits whose files keep grey values, from which each epoch of training draws ids."""
        return ["train"] if self.config.data.binarize == "drawn" else []

    def describe_inputs(self) -> dict[str, Any]:
        return {"rows": count_rows(self.config, self.splits)}

    def describe_columns(self) -> dict[str, Any]:
        """Return the columns without the class, with hashes of their values."""
        others = {name: each for name, each in self.loaded.items() if name != LABEL}
        return {name: {**each.column.to_dict(), "values": hash_values(each)} for name, each in others.items()}

    def finish(self, work: Path) -> dict[str, list[int]]:
        """Return the number of rows of each file by split."""
        sizes: dict[str, list[int]] = {}
        for shard in self.shards.values():
            sizes.setdefault(shard.split, []).append(shard.stop - shard.start)
        return sizes

    def encode(self, work: Path, names: list[str], tokenizer: Tokenizer, *, show_progress: bool) -> None:
        """Write these files. Images of the next batch are read while the tokenizers encode."""
        from tqdm import tqdm

        config, device, models = self.config, tokenizer.device, [tokenizer, *self.grids.values()]
        images = {
            split: [part, *(self.loaded[name].images[split] for name in self.grids)]
            for split, part in self.splits.items()
        }
        shards = [self.shards[name] for name in names]
        batches = [  # within shards, so that tokens do not depend on the number of processes
            (images[shard.split], np.arange(start, min(start + config.batch_size, shard.stop)))
            for shard in shards
            for start in range(shard.start, shard.stop, config.batch_size)
        ]
        total = sum(shard.stop - shard.start for shard in shards)

        def read(batch: tuple[list[ImageDataset], np.ndarray]) -> list[Raw]:
            raws = [variants_of(part, batch[1], config.seed, stochastic=batch[0][0].is_stochastic) for part in batch[0]]
            return [[pin_memory(part) for part in raw] for raw in raws] if device.type == "cuda" else raws

        disable = None if show_progress else True
        with (
            tqdm(total=total, desc="encoding", unit="image", disable=disable, leave=False) as bar,
            closing(prefetch(read, batches)) as stream,
        ):
            for shard in shards:
                stochastic = shard.split in self.stochastic
                tokens, *others = encode_shard(models, images[shard.split], shard, stream, bar, stochastic=stochastic)
                packed = pack_shard(self.loaded, shard, dict(zip(self.grids, others, strict=True)))
                with Output(config.out).errors():
                    write_shard(work / shard.name, tokens, stored_grid(tokenizer.grid, stochastic), packed)


def open_images(
    config: EncodeConfig, tokenizer: Tokenizer, inherited: Inherited | None, group: ProcessGroup
) -> LoadedImages:
    """Load and check the images, and read their columns. Raises `UserError`."""
    images = require_same_values(
        load_images(config.data, inherited=inherited, distributed=True), tokenizer, "tokenizer"
    )
    report_division(images)
    warn_about_duplicates(images)
    splits = name_splits(images)
    if config.data.binarize == "drawn":
        splits["train"] = splits["train"].grey()
    columns = load_columns(config, splits)
    shards = plan_shards(count_rows(config, splits), config.rows_per_shard)
    return LoadedImages(config, images.facts, splits, columns, {shard.name: shard for shard in shards})


def name_splits(images: Splits) -> dict[str, ImageDataset]:
    parts = {"train": images.train, "validation": images.validation, "test": images.held_out}
    splits = {name: part for name, part in parts.items() if part is not None}
    if len({part.labels is None for part in splits.values()}) > 1:
        raise UserError("data.label_column: some splits have labels and others do not; null ignores labels")
    return splits


def load_columns(config: EncodeConfig, splits: dict[str, ImageDataset]) -> dict[str, LoadedColumn]:
    labels = {split: part.labels for split, part in splits.items() if part.labels is not None}
    label = label_column(splits["train"].class_names if labels else [])
    variants = {"augmentations": config.augmentations, "seed": config.seed}
    others = load_attributes(config.data, config.attributes, splits, table=config.table, distributed=True, **variants)
    return {**{name: LoadedColumn(column, {}, labels) for name, column in label.items()}, **others}


def count_rows(config: EncodeConfig, splits: dict[str, ImageDataset]) -> dict[str, int]:
    """Return the number of rows of each split: in training each image itself and its augmentations, and `TEST_DRAWS`
    test rows if pixels are drawn."""
    test = TEST_DRAWS if config.data.binarize == "drawn" else 1
    times = {"train": 1 + config.augmentations, "validation": 1, "test": test}
    return {name: len(part) * times[name] for name, part in splits.items()}


def plan_shards(rows: dict[str, int], rows_per_shard: int | None) -> list[Shard]:
    """Return all files to write, independent of the number of processes. Raises `UserError` for too many files."""
    with user_errors(ValueError):
        sizes = cut_shards(rows, rows_per_shard)
    return [
        Shard(split, name, stop - size, stop)
        for split, some in sizes.items()
        for name, size, stop in zip(shard_names(split, len(some)), some, accumulate(some), strict=True)
    ]


def hash_values(column: LoadedColumn) -> str:
    """Return a hash of a column's values in all splits; for grids, of the names of their images."""
    names = {split: images.names(np.arange(len(images))) for split, images in column.images.items()}
    missing = {f"{split} missing": images.missing for split, images in column.images.items()}
    return hashlib.sha256(json.dumps([names, digest_rows({**column.values, **missing})]).encode()).hexdigest()


def pack_shard(columns: Mapping[str, LoadedColumn], shard: Shard, grids: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the stored columns of a shard's rows: row = variant * n + index. grids: encoded ids by column. Raises
    `UserError`."""
    rows, found = np.arange(shard.start, shard.stop), dict[str, Tensor]()
    plain = {name: each.column for name, each in columns.items()}
    for name, each in columns.items():
        if name in grids:
            missing = each.images[shard.split].missing
            missing = missing[rows % len(missing)].view(-1, *[1] * (grids[name].ndim - 1))
            found[name] = torch.where(missing, -1, grids[name])
        else:
            values = each.values[shard.split]
            found[name] = values[rows % len(values)]
    with user_errors(ValueError):
        return pack_columns(plain, Given(plain, found, len(rows)), slice(None))


@torch.inference_mode()
def encode_shard(
    models: list[Tokenizer],
    images: list[ImageDataset],
    shard: Shard,
    stream: Iterator[list[Raw]],
    bar: Any,
    *,
    stochastic: bool = False,
) -> list[Tensor]:
    """Return the tokens `(rows, *grid.shape)` int32 of a shard by each model, whose batches come from `stream`.
    Synchronises with the GPU once, at the end. stochastic: of the first model, the grey values of each id's pixels."""
    shapes = [stored_grid(model.grid, stochastic and model is models[0]).shape for model in models]
    found = [
        [torch.empty(0, *shape, dtype=torch.int32, device=model.device)]
        for model, shape in zip(models, shapes, strict=True)
    ]
    count = 0
    while count < shard.stop - shard.start:
        for model, part, raw, tokens in zip(models, images, next(stream), found, strict=True):
            batch = [part.prepare(*move_batch_async(piece, model.device)) for piece in raw]
            rows = torch.cat(batch)
            if stochastic and model is models[0]:
                tokens.append(cast(Pixels, model).cut_patches(to_uint8(rows)).int())
            else:
                tokens.append(model.encode(rows).int())
        bar.update(len(found[0][-1]))
        count += len(found[0][-1])
    return [torch.cat(tokens).cpu() for tokens in found]


def variants_of(images: ImageDataset, rows: np.ndarray, seed: int, *, stochastic: bool) -> Raw:
    """Return the images of dataset rows, or those of their grids: row = variant * n + index, and variant 0 is the
    unchanged image. Variants are augmented, or if the images are `drawn`, other draws, whose grids do not change."""
    variants, indices = np.divmod(rows, len(images))
    if stochastic:
        return [images.raw_batch(indices, variants, seed, augment=False)]
    first = int((variants == 0).sum())  # rows ascend, so variants do
    parts = [(slice(first), False), (slice(first, None), True)]
    return [images.raw_batch(indices[at], variants[at], seed, augment=new) for at, new in parts if len(indices[at])]


# The job and its folder


def describe_job(
    config: EncodeConfig, tokenizer: Tokenizer, images: LoadedImages | StreamedShards, device: str
) -> dict[str, Any]:
    """Return everything that determines the bits of the files."""
    without: Any = {"out": True, "tokenizer": True, "data": {"cache_mb", "shuffle_window"}}
    without |= {"attributes": {"__all__": {"tokenizer"}}} if config.attributes else {"attributes": True, "table": True}
    if config.data.is_stream:  # which is continued with another treatment of bad images
        without["data"] |= {"on_error", "max_bad_fraction"}
    facts: dict[str, Any] = {"tokenizer": tokenizer.fingerprint(), "classes": class_names(images.columns)}
    facts |= {**images.describe_inputs(), "device": device}
    facts |= {"columns": found} if (found := images.describe_columns()) else {}
    facts |= {} if images.facts is None else {SPLITS_KEY: images.facts.to_dict()}
    return {"verb": "encode", **config.model_dump(mode="json", exclude=without), **facts}


def find_finished(out: Path, job: dict[str, Any], inputs: list[Path]) -> Meta | None:
    """Return the dataset in `out` if this job made it and the images have not changed since; otherwise None. Restore a
    dataset that a killed process had set aside to replace it."""
    aside = folders_aside(out)
    if not out.exists() and len(aside) == 1 and (aside[0] / META).is_file():
        aside[0].rename(out)
    try:
        if read_job(out, EncodeConfig.renamed) != job or have_changed(inputs, since=(out / JOB).stat().st_mtime):
            return None
        meta = read_meta(out)
        verify_files(out, meta, whole=False)
    except (PipelineLoadError, OSError):
        return None
    return meta


def list_inputs(config: EncodeConfig) -> list[Path]:
    data = config.data
    pattern = os.path.expanduser(data.source) if glob.has_magic(data.source) else ""
    sources = [data.path] if data.path else [Path(name) for name in glob.glob(pattern, recursive=True)]
    return sources + list_pairs(config)


def list_pairs(config: EncodeConfig) -> list[Path]:
    """Return the table of columns, if any, and the folders of condition images."""
    paths = [config.table, *(source.images for source in config.attributes.values())]
    return [Path(path).expanduser() for path in paths if path]


def have_changed(inputs: list[Path], since: float) -> bool:
    below = (Path(place, name) for top in inputs for place, _, names in os.walk(top) for name in ("", *names))
    return any(path.stat().st_mtime > since for path in (*inputs, *below) if path.exists())


def begin_files(work: Path, job: dict[str, Any], names: list[str]) -> list[str]:
    """Create or continue the work folder; return the missing ones of the files `names`. Raises `UserError` for a folder
    with files of other settings, and `PathError` for unknown files."""

    def is_result(name: str) -> bool:
        return name in LAST or name.endswith(".safetensors")  # including shards of another size

    try:
        begin_job(work, job, is_result, renamed=EncodeConfig.renamed)
    except OtherJobError as error:
        if any(work.glob("*.safetensors")):
            raise UserError(f"out: {error}, or delete {work}") from error
        begin_job(work, job, is_result, anew=True)
    there = set(os.listdir(work))
    if strange := sorted(there - {*names, *LAST, JOB}):
        raise UserError(f"out: {work} contains {strange[0]!r}, which smalti did not write; move it elsewhere")
    return [name for name in names if name not in there]


def finish_dataset(
    work: Path, out: Path, config: EncodeConfig, tokenizer: Tokenizer, images: LoadedImages | StreamedShards
) -> Meta:
    """Complete the dataset in the work folder and rename it to `out`. Raises `UserError` for a missing file."""
    if absent := [name for name in images.names if not (work / name).is_file()]:
        raise UserError(f"out: {work / absent[0]} is missing; all processes must see the same disk")
    for name in LAST:  # left by a process killed here
        shutil.rmtree(work / name) if (work / name).is_dir() else (work / name).unlink(missing_ok=True)
    sizes, path = images.finish(work), Path(config.tokenizer) / PROVENANCE
    provenance = read_json(path) if path.is_file() else {}
    provenance.pop(SPLITS_KEY, None)
    source = {**provenance, "data": config.data.model_dump(mode="json"), "local": is_local(config.data.source)}
    source |= {} if images.facts is None else {SPLITS_KEY: images.facts.to_dict()}
    facts = sizes, source, config.augmentations, tokenizer.fingerprint()
    more: dict[str, Any] = {"condition_sources": images.column_sources, "stochastic": list(images.stochastic)}
    meta = Meta(tokenizer.grid, images.columns, *facts, **more)
    write_meta(work, meta, tokenizer, images.grids)
    publish_folder(work, out, kind=TOKEN_FOLDER)
    return meta


def describe_tokens(meta: Meta) -> str:
    counts = ", ".join(f"{sum(counts)} {name}" for name, counts in meta.shards.items())
    others = [name for name in meta.columns if name != LABEL]
    given = f", with {', '.join(others)}" if others else ""
    anew = f", of {', '.join(meta.stochastic)} drawn anew in each epoch" if meta.stochastic else ""
    return f"{counts} rows of {'x'.join(map(str, meta.grid.shape))} ids below {meta.grid.vocab_size}{given}{anew}"


def finish_run(accelerator: Accelerator, config: EncodeConfig, meta: Meta, text: str, is_main: bool) -> Path:
    """Leave the process group; print the result and the next command, which is that of README."""
    out = Path(config.out)
    accelerator.end_training()
    if is_main:
        kind = "next_scale" if meta.grid.scales else "gpt"
        preset = f"{kind}_{'digits' if config.data.source == 'digits' else 'openmoji'}"
        run = quote(f"{str(out).removesuffix('_tokens')}_{kind}")
        then = f"smalti train_prior{format_imports()} --config {preset} tokens={quote(str(out))} out={run}"
        print(f"{out}: {text}; next: {then}", flush=True)
    return out


main = partial(
    run_command,
    EncodeConfig,
    run,
    verb="encode",
    description=__doc__,
    defaults=tokenizer_defaults,
    after_ctrl_c=lambda _: "the same command continues",
)


if __name__ == "__main__":
    main()
