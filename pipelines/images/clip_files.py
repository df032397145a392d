"""Clips and volumes: folders of frames, arrays, animations and TIFF volumes, cut into windows of consecutive frames."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from tokenizer.spec import Array, ImageSpec

from ..config import UserError, is_first_process, tell
from .arrays import PARSING, decode_array, read_npz, read_page
from .decoding import (
    WORKERS,
    Payload,
    Pixels,
    Rows,
    SplitRows,
    Window,
    open_image,
    pixels_of,
    read_file,
    require_plain_page,
    require_small_tiles,
)
from .folder import ARRAY_SUFFIXES, SUFFIXES, image_paths, natural_key, open_folder, suffix_of

if TYPE_CHECKING:
    from .dataset import DataConfig

ALWAYS_CLIPS = {".gif", *ARRAY_SUFFIXES}
"""Suffixes of files that are clips, whatever the other files of their folder are."""
MAYBE_CLIPS = {".png", ".webp", ".tif", ".tiff"}
STILLS = SUFFIXES - ALWAYS_CLIPS
OPEN_CLIPS = 2 * WORKERS  # at a time, for each split


@dataclass(frozen=True)
class WindowRows(Rows):
    """A split whose rows are windows of clips. `paths` are those of their clips; a clip that cannot be read, or is too
    short, is one row."""

    starts: Sequence[int] = ()
    """First frame of each row."""
    counts: Sequence[int] = ()
    """Number of frames of each clip that can be read."""


# Finding clips


def open_clips(root: Path, config: DataConfig) -> SplitRows:
    """Return the splits of a folder of clips, as windows of `config.frames` frames. Classes come from sheets, which
    list files or folders of clips, and otherwise from the folders above the clips. Raises `UserError`."""
    splits = open_folder(root, config, find_separate_clips)

    def open_split(open_rows: Callable[[], Rows]) -> Rows:
        rows = open_rows()
        windows = cut_windows(rows.paths or [], config.frames or 1, rows.labels)
        if rows.objects is None:
            return windows
        objects = dict(zip(rows.paths or [], rows.objects, strict=True))
        return replace(windows, objects=[objects[path] for path in windows.paths or []])

    return {name: partial(open_split, rows) for name, rows in splits.items()}


def find_separate_clips(folder: Path) -> list[str]:
    """Return the clips of a split. Raises `UserError` if they cannot be told apart, because frames lie in its folder
    itself."""
    found = find_clips(folder)
    if str(folder) in found:
        raise UserError(
            f"data.frames: {folder} holds single images, not clips; put the frames of each clip into a folder of its "
            "own (data.frames=null: each image is an image)"
        )
    return found


def find_clips(folder: Path) -> list[str]:
    """Return the clips of a folder: files of several frames, and folders of image files, which may be `folder` itself.
    In a folder whose first PNG, WEBP or TIFF has several frames, each file is a clip."""
    beside: dict[str, list[str]] = {}
    for path in image_paths(folder):
        beside.setdefault(os.path.dirname(path), []).append(path)
    found = list[str]()
    for parent, paths in beside.items():
        found += [path for path in paths if suffix_of(path) in ALWAYS_CLIPS]
        stills = [path for path in paths if suffix_of(path) in STILLS]
        if stills:
            found += stills if has_several_frames(min(stills, key=natural_key)) else [parent]
    return sorted(found, key=os.fsencode)


def has_several_frames(path: str) -> bool:
    """Whether a file is an animation or has several pages; False if it cannot be read, which decoding reports."""
    try:
        return suffix_of(path) in MAYBE_CLIPS and getattr(open_image(Path(path), deep=True), "n_frames", 1) > 1
    except Exception:
        return False


# Cutting clips into windows


def cut_windows(paths: list[str], frames: int, labels: list[Any] | None = None) -> WindowRows:
    """Return the consecutive windows of each clip, from its start; frames left over are not used. labels: of each
    clip."""
    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(pool.map(count_frames, paths))
    places, problems = list[tuple[int, int]](), dict[int, str]()
    for number, count in enumerate(found):
        if isinstance(count, str) or count < frames:
            few = f"{count} frame{'s'[: count != 1]}, fewer than data.frames={frames}"
            problems[number] = count if isinstance(count, str) else few
            places.append((number, 0))
        else:
            places += [(number, start) for start in range(0, count - frames + 1, frames)]
    open_clip = lru_cache(OPEN_CLIPS)(lambda number: Clip(paths[number]))  # neighbouring windows share one

    def read_frame(number: int, index: int, deep: bool) -> Array | Image.Image:
        return open_clip(number).read(index, deep)

    def read(wanted: Sequence[int]) -> list[Payload]:
        some = [places[row] for row in wanted]
        return [problems.get(number) or Window(partial(read_frame, number), start, frames) for number, start in some]

    def name(row: int) -> str:
        number, start = places[row]
        return paths[number] if number in problems else f"{paths[number]}[{start}:{start + frames}]"

    return WindowRows(
        len(places),
        read,
        name,
        None if labels is None else [labels[number] for number, _ in places],
        None,
        [paths[number] for number, _ in places],
        starts=[start for _, start in places],
        counts=[count for count in found if isinstance(count, int)],
    )


def count_frames(path: str) -> int | str:
    """Return the number of frames of a clip, or the reason why it cannot be read."""
    try:
        return len(Clip(path))
    except Exception as error:  # Pillow raises almost anything for damaged files
        return str(error) or type(error).__name__


def report_windows(splits: Sequence[Rows], frames: int) -> None:
    """Print one line about the clips of all splits."""
    counts = [count for rows in splits if isinstance(rows, WindowRows) for count in rows.counts]
    windows, rest = sum(count // frames for count in counts), sum(count % frames for count in counts if count >= frames)
    unused = f"; {rest:,} frames at the ends of clips are not used" if rest else ""
    if is_first_process():
        tell(f"data.frames: {len(counts):,} clips, {windows:,} windows of {frames} frames{unused}")


def split_windows(rows: Rows, frames: int) -> Rows:
    """Return the single frames of a split's windows: row `frames * window + k` is frame k of a window."""
    assert isinstance(rows, WindowRows) and rows.paths is not None
    paths, starts = rows.paths, rows.starts

    def read(wanted: Sequence[int]) -> list[Payload]:
        windows = rows.read([row // frames for row in wanted])
        return [
            window.frame(row % frames) if isinstance(window, Window) else window
            for row, window in zip(wanted, windows, strict=True)
        ]

    def name(row: int) -> str:
        return f"{paths[row // frames]}[{starts[row // frames] + row % frames}]"

    def repeat(values: list[Any] | None) -> list[Any] | None:
        return None if values is None else [value for value in values for _ in range(frames)]

    return Rows(rows.size * frames, read, name, repeat(rows.labels), None, repeat(paths))


# Reading frames


class Clip:
    """The frames of a folder of images, of an array, or of a file of several frames. Several threads may read them.

    Raises `ValueError`, and whatever Pillow raises, for a clip that cannot be opened."""

    def __init__(self, path: str) -> None:
        self._files = list[str]()
        self._array: Array | None = None
        self._image: Image.Image | None = None
        self._lock = Lock()
        if os.path.isdir(path):
            names = [name for name in os.listdir(path) if suffix_of(name) in STILLS and not name.startswith(".")]
            self._files = [os.path.join(path, name) for name in sorted(names, key=natural_key)]
            self._size = open_image(Path(self._files[0]), deep=True).size
        elif suffix_of(path) in ARRAY_SUFFIXES:
            self._array = read_volume(Path(path))
        else:
            self._image = open_image(Path(path), deep=True)
            self._size = self._image.size

    def __len__(self) -> int:
        if self._array is not None:
            return len(self._array)
        return len(self._files) or getattr(self._image, "n_frames", 1)

    def read(self, index: int, deep: bool) -> Array | Image.Image:
        """Return one frame: an array (H, W), (H, W, C) or (C, H, W) of the values as stored if the clip is an array or
        `deep`, otherwise a picture, which is to be converted to 8 bits. Raises `ValueError` for a frame of another size
        than the first, and for a TIFF that has no 8-bit form."""
        if self._array is not None:
            return np.asarray(self._array[index])
        if self._image is None:
            image = open_image(Path(self._files[index]), deep=True)
            if getattr(image, "n_frames", 1) > 1:
                raise ValueError("a file of several frames among single ones")
            return self._page(image, deep)
        with self._lock:
            self._image.seek(index)
            return self._page(self._image, deep)

    def _page(self, image: Image.Image, deep: bool) -> Array | Image.Image:
        """Return the current frame of a file."""
        if image.size != self._size:
            found, first = (" x ".join(map(str, size)) for size in (image.size, self._size))
            raise ValueError(f"{found} pixels, unlike the first of its clip, {first}")
        if isinstance(image, TiffImageFile):
            require_small_tiles(image)
            if not deep:
                require_plain_page(image)
        return read_page(image) if deep else ImageOps.exif_transpose(image)


def read_volume(path: Path) -> Array:
    """Return the array of a clip, (T, H, W), (T, H, W, C) or (T, C, H, W); a `.npy` file is mapped, not read. Raises
    `ValueError`."""
    if suffix_of(str(path)) == ".npz":
        array = read_npz(read_file(path))
    elif not path.is_file():  # mapping a pipe may never end
        raise ValueError("missing, or not a regular file")
    else:
        with PARSING:
            array = np.load(path, mmap_mode="r")  # objects are refused by default
    if array.ndim not in (3, 4) or not array.size:
        raise ValueError(f"shape {array.shape}; a clip needs (T, H, W), (T, H, W, C) or (T, C, H, W)")
    return array


def decode_window(window: Window, spec: ImageSpec) -> Pixels:
    """Return the frames of a window in one array `spec.shape`, each resized and cropped as images are. Raises
    `ValueError`, which names the frame."""
    parts = []
    for index in range(window.start, window.start + window.frames):
        try:
            frame = window.read(index, not spec.is_picture)
            parts.append(decode_array(frame, spec) if isinstance(frame, np.ndarray) else pixels_of(frame, spec))
        except Exception as error:  # Pillow raises almost anything for damaged files
            raise ValueError(f"frame {index}: {str(error) or type(error).__name__}") from error
    return np.stack(parts).reshape(spec.shape)
