"""Load a data set: open `data.source`, divide it, settle what its images are, and decode each once.

Pixels stay in memory if they fit. With `data.streaming`, shards are read in sequence instead (`streaming`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tokenizer.spec import ValueType

from ..config import UserError, is_first_process, tell
from ..shuffling import spread_rows
from .checking import BadImage, PixelCache, check_bad, decode_all
from .classes import number_labels
from .clip_files import choose_file_kind, report_windows
from .crops import CentredCrops, RandomCrops
from .dataset import ImageDataset, Splits
from .folder import open_folder
from .formats import CHUNK, WORKERS, good_values, guess_type, try_decode
from .settings import DataConfig, require_plain_data
from .sources import Source, SourceSplits, open_digits
from .splits import Inherited, SplitPart, divide_images
from .streaming import StreamedImages, open_streamed_splits
from .tables import open_tables

RANGE_SAMPLE, MOST_CLIPPED = 64, 0.01
"""Number of training images whose values are compared with `data.range`, and the share beyond it that is silent."""


def load_images(
    config: DataConfig,
    *,
    inherited: Inherited | None = None,
    distributed: bool = False,
    stream: bool = False,
    check: bool = True,
    single_frames: bool = False,
) -> Splits:
    """Open the source, decode every image once and return its splits.

    inherited: the division of training. distributed: all launched processes call this; each checks a share of the
    images that do not fit in memory. stream: with `data.streaming`, return the training images as `StreamedImages`
    instead of up to 2,000 of them with random access. check: False decodes images only on access, unless
    `on_error=skip`. single_frames: with `data.frames`, return the frames of the clips as images, in the splits of their
    clips. Raises `UserError` for a source that is missing, empty or lacks a split, for missing or negative labels, and
    for images that cannot be decoded (with `on_error=skip`, only for more than `max_bad_fraction`)."""
    streamed: StreamedImages | None = None
    if config.is_stream:
        division, streamed = open_streamed_splits(config, stream, inherited)
    else:
        division = divide_images(open_source(config), config, inherited)
        config = settle_values(config, division.parts["train"])
    sources = list(dict.fromkeys(part.source for part in division.parts.values()))
    report_windows(sources)
    labels, class_names = number_labels(sources)
    is_lazy = streamed is None and (config.streaming or not check) and config.on_error == "fail"
    room, decoded = config.cache_mb * 2**20 if check else 0, dict[str, tuple[SplitPart, list[BadImage], PixelCache]]()
    for name, part in division.parts.items():
        view, bad = choose_view(config, name), list[BadImage]()
        memory = view.reserve(len(part.positions), 0 if is_lazy else room, config.spec)
        if not is_lazy:
            decode = partial(view.decode_one, spec=config.spec)
            good, bad = decode_all(part.source, part.positions, decode, memory, distributed)
            part, room = part._replace(positions=good), memory.room
        decoded[name] = part, bad, memory
    check_bad([(bad, len(division.parts[name].positions)) for name, (_, bad, _) in decoded.items()], config)
    datasets: dict[str, ImageDataset] = {
        name: choose_view(config, name)(config, part, labels[part.source], class_names, bad=bad, memory=memory)
        for name, (part, bad, memory) in decoded.items()
    }
    if streamed is not None and stream:
        streamed.class_names = class_names
        datasets["train"] = streamed
    if single_frames:
        datasets = {name: images.split_into_frames() for name, images in datasets.items()}
    return Splits(**datasets, facts=division.facts, note=division.note, is_carved=division.is_carved)


def choose_view(config: DataConfig, part: str) -> type[ImageDataset]:
    if config.crop is None:
        return ImageDataset
    return RandomCrops if part == "train" else CentredCrops


def open_source(config: DataConfig) -> SourceSplits:
    """Return the splits of `config.source` by name. An existing path takes precedence over a Hub id."""
    if config.folder is not None:
        kind = choose_file_kind(config.spec)
        splits = open_folder(config.folder, config, kind.find)
        return {name: partial(lambda open_split: kind.open(open_split()), each) for name, each in splits.items()}
    if config.frames is not None:
        raise UserError(f"data.frames: clips are read from a folder of files (got {config.source})")
    return open_digits() if config.source == "digits" else open_tables(config)


def settle_values(config: DataConfig, train: SplitPart) -> DataConfig:
    """Return the settings with the type and range of the images: those of the training images if they are not
    declared, and neither for 8 bits. Raises `UserError` for the digits, and if all values are equal; warns
    about a range that clips more than 1 % of a sample."""
    if config.source == "digits":
        require_plain_data(config)
        return config
    source, positions = train.source, train.positions
    payloads = (payload for position in positions.tolist() for payload in source.payloads([position]))
    readable = next((payload for payload in payloads if not isinstance(payload, str)), None)  # of clips, no short one
    dtype = config.dtype or guess_type(readable, config.channels)
    if config.binarize is not None and dtype not in (None, "uint8"):
        raise UserError(f"data.binarize: needs 8-bit images; those of {config.source} are {dtype}")
    if config.range is not None:
        config = config.model_copy(update={"dtype": dtype or "uint8"})
        warn_about_range(config, source, positions)
    elif dtype in ("uint16", "float32"):
        limits = measure_range(source, positions, config.channels, dtype)
        if limits is None or limits[0] >= limits[1]:
            first = int(positions[0])
            reason = try_decode(source.payloads([first])[0], replace(config.spec, dtype=dtype))
            found = reason if limits is None else f"all are {limits[0]:g}; give data.range=LOW,HIGH"
            what = f"the values of {len(positions)} training images cannot be measured"
            raise UserError(f"data.range: {what}; the first is {source.name(first)}: {found}")
        config = config.model_copy(update={"dtype": dtype, "range": limits})
        if is_first_process():
            tell(f"data.range: {dtype} from {limits[0]:g} to {limits[1]:g}, measured on the training images")
    return config


def measure_range(
    source: Source, positions: NDArray[np.int64], channels: int, dtype: ValueType
) -> tuple[float, float] | None:
    """Return the smallest and largest value of the images or clips at `positions` of this type; None without any."""

    def bounds(chunk: list[int]) -> list[tuple[float, float]]:
        arrays = (good_values(payload, channels, dtype) for payload in source.payloads(chunk))
        return [(float(array.min()), float(array.max())) for array in arrays if array is not None]

    chunks = [positions[start : start + CHUNK].tolist() for start in range(0, len(positions), CHUNK)]
    with ThreadPoolExecutor(WORKERS) as pool:
        found = [pair for pairs in pool.map(bounds, chunks) for pair in pairs]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else None


def warn_about_range(config: DataConfig, source: Source, positions: NDArray[np.int64]) -> None:
    """Print one line if the declared range clips more than 1 % of the values of a sample."""
    some = positions[spread_rows(len(positions), RANGE_SAMPLE)].tolist()
    spec, shares = config.spec, list[float]()
    for payload in source.payloads(some):
        array = good_values(payload, spec.channels, spec.dtype)
        shares.append(0.0 if array is None else float(((array < spec.low) | (array > spec.high)).mean()))
    if (mean := float(np.mean(shares))) > MOST_CLIPPED and is_first_process():
        worst = source.name(some[int(np.argmax(shares))])
        clips = f"data.range={spec.low:g},{spec.high:g} clips {mean:.1%} of the values, most in {worst}"
        tell(f"warning: {clips}; data.range=null measures it")
