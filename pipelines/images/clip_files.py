"""Clips and volumes: folders of frames, arrays, animations, TIFF volumes and MP4, cut into windows of consecutive
frames."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from tokenizer.spec import Array, ImageSpec

from ..config import is_first_process, tell
from ..config.table import count_of
from .animations import MP4, require_video
from .folder import ARRAY_SUFFIXES, IMAGE_SUFFIXES, Find, files_below, image_paths, natural_key, suffix_of
from .formats import (
    PARSING,
    WORKERS,
    ClipWindow,
    Payload,
    check_pixel_count,
    open_image,
    read_image_file,
    read_numpy,
    read_page,
    require_plain_page,
)
from .sources import Source

ALWAYS_CLIPS = {".gif", *ARRAY_SUFFIXES}  # whatever the other files of their folder are
MAYBE_CLIPS = {".png", ".webp", ".tif", ".tiff"}
STILLS = IMAGE_SUFFIXES - ALWAYS_CLIPS
OPEN_CLIPS = 2 * WORKERS  # at a time, for each split
FrameKeys = Sequence[int] | NDArray[np.int64]


class FileKind(NamedTuple):
    """How to find the paths of the images or clips of a folder, and to open such files as images or windows."""

    find: Find
    open: Callable[[Source], Source]


def choose_file_kind(spec: ImageSpec) -> FileKind:
    if spec.frames == 1:
        return FileKind(image_paths, lambda files: files)
    return FileKind(find_clips, partial(cut_windows, frames=spec.frames))


# Finding clips


def find_clips(folder: Path) -> list[str]:
    """Return the clips of a folder: files of several frames, and folders of image files, which may be `folder` itself.
    In a folder whose first PNG, WEBP or TIFF has several frames, each file is a clip."""
    beside: dict[str, list[str]] = {}
    for path in image_paths(folder):
        beside.setdefault(os.path.dirname(path), []).append(path)
    videos = (path for path in files_below(folder) if path.suffix.lower() == MP4)
    found = [str(path) for path in videos if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
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


@dataclass(frozen=True, eq=False)
class WindowSource(Source):
    """Windows of clips. `paths` are those of their clips; a clip that cannot be read, or is too short, is one row.

    frames: of a window. starts: the first frame of each row. counts: the number of frames of each clip that can be
    read."""

    frames: int = 1
    starts: Sequence[int] = ()
    counts: Sequence[int] = ()

    @property
    def unused(self) -> int:
        """The number of frames at the ends of clips that are in no window."""
        return sum(count % self.frames for count in self.counts if count >= self.frames)

    def split_clips(self) -> Source:
        """Return the frames of all windows: row `frames * window + k` is frame k of a window."""
        frames, paths = self.frames, self.paths or []

        def read(wanted: Sequence[int]) -> list[Payload]:
            windows = self.payloads([row // frames for row in wanted])
            return [
                window.frame(row % frames) if isinstance(window, ClipWindow) else window
                for row, window in zip(wanted, windows, strict=True)
            ]

        def name(row: int) -> str:
            return f"{paths[row // frames]}[{self.starts[row // frames] + row % frames}]"

        labels = None if self.labels is None else [label for label in self.labels for _ in range(frames)]
        return Source(self.size * frames, read, name, labels, paths=[path for path in paths for _ in range(frames)])


def cut_windows(files: Source, frames: int) -> WindowSource:
    """Return the consecutive windows of each clip, from its start; frames left over are not used."""
    paths = files.paths or []

    def find_frames(path: str) -> FrameKeys | str:
        try:
            return open_clip(path).frame_keys
        except Exception as error:  # Pillow raises almost anything for damaged files
            return str(error) or type(error).__name__

    with ThreadPoolExecutor(WORKERS) as pool:
        found = list(pool.map(find_frames, paths))
    places, keys, problems = list[tuple[int, int]](), dict[int, FrameKeys](), dict[int, str]()
    for number, frame_keys in enumerate(found):
        if isinstance(frame_keys, str):
            problems[number] = frame_keys
        elif (count := len(frame_keys)) < frames:
            problems[number] = f"{count_of(count, 'frame')}, fewer than data.frames={frames}"
        else:
            keys[number] = frame_keys
        last = len(keys.get(number, range(frames))) - frames  # a bad clip is one row
        places += [(number, start) for start in range(0, last + 1, frames)]

    @lru_cache(OPEN_CLIPS)  # neighbouring windows share one
    def open_numbered(number: int) -> Clip:
        return open_clip(paths[number], keys[number])

    def read_frame(number: int, index: int, deep: bool) -> Array | Image.Image:
        return open_numbered(number).read(index, deep)

    def read(wanted: Sequence[int]) -> list[Payload]:
        some = [places[row] for row in wanted]
        return [
            problems.get(number) or ClipWindow(partial(read_frame, number), start, frames) for number, start in some
        ]

    def name(row: int) -> str:
        number, start = places[row]
        return paths[number] if number in problems else f"{paths[number]}[{start}:{start + frames}]"

    def repeat(values: list[Any] | None) -> list[Any] | None:
        return None if values is None else [values[number] for number, _ in places]

    starts = [start for _, start in places]
    counts = [len(frame_keys) for frame_keys in found if not isinstance(frame_keys, str)]
    known: dict[str, Any] = {"labels": repeat(files.labels), "paths": repeat(paths), "objects": repeat(files.objects)}
    return WindowSource(len(places), read, name, frames=frames, starts=starts, counts=counts, **known)


def report_windows(sources: Sequence[Source]) -> None:
    """Print one line about the clips of all splits, if there are any."""
    splits = [source for source in sources if isinstance(source, WindowSource)]
    if not splits or not is_first_process():
        return
    frames, clips = splits[0].frames, sum(len(source.counts) for source in splits)
    windows = sum(count // frames for source in splits for count in source.counts)
    rest = sum(source.unused for source in splits)
    unused = f"; {rest:,} frames at the ends of clips are not used" if rest else ""
    tell(f"data.frames: {clips:,} clips, {windows:,} windows of {frames} frames{unused}")


# Reading frames


class Clip(ABC):
    """The frames of a clip. Several threads may read them. Opening a path raises `ValueError`, or whatever Pillow does.

    frame_keys: by what each frame is found: its number or, in a video, its time."""

    frame_keys: FrameKeys

    def __len__(self) -> int:
        return len(self.frame_keys)

    @abstractmethod
    def read(self, index: int, deep: bool) -> Array | Image.Image:
        """Return one frame: an array (H, W), (H, W, C) or (C, H, W) of the values as stored if the clip is an array or
        `deep`, otherwise an upright picture, which is to be converted to 8 bits. Raises `ValueError` for a frame of
        another size than the first, and for a TIFF that has no 8-bit form."""


def open_clip(path: str, frame_keys: FrameKeys | None = None) -> Clip:
    """Open a clip. frame_keys: those found before, so that a file need not be searched again."""
    if os.path.isdir(path):
        return FolderClip(path)
    if suffix_of(path) in ARRAY_SUFFIXES:
        return ArrayClip(path)
    return (VideoClip if suffix_of(path) == MP4 else AnimationClip)(path, frame_keys)


class FolderClip(Clip):
    """A folder of image files."""

    def __init__(self, path: str) -> None:
        names = [name for name in os.listdir(path) if suffix_of(name) in STILLS and not name.startswith(".")]
        self._files = [Path(path, name) for name in sorted(names, key=natural_key)]
        self._size = open_image(self._files[0], deep=True).size
        self.frame_keys = range(len(names))

    def read(self, index: int, deep: bool) -> Array | Image.Image:
        image = open_image(self._files[index], deep=True)
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("a file of several frames among single ones")
        return convert_frame(image, self._size, deep)


class AnimationClip(Clip):
    """A GIF, PNG, WEBP or TIFF of several frames."""

    def __init__(self, path: str, frame_keys: FrameKeys | None = None) -> None:
        self._path, self._image, self._lock = Path(path), open_image(Path(path), deep=True), Lock()
        self._size = self._image.size
        self.frame_keys = range(getattr(self._image, "n_frames", 1)) if frame_keys is None else frame_keys

    def read(self, index: int, deep: bool) -> Array | Image.Image:
        with self._lock:
            if index < self._image.tell() and self._image.format == "PNG":  # which Pillow cannot wind back
                self._image = open_image(self._path, deep=True)
            self._image.seek(index)
            return convert_frame(self._image, self._size, deep)


class ArrayClip(Clip):
    """An array (T, H, W), (T, H, W, C) or (T, C, H, W); a `.npy` file is mapped, not read."""

    def __init__(self, path: str) -> None:
        if suffix_of(path) == ".npz":
            array = read_numpy(read_image_file(Path(path)))
        else:
            require_file(path)
            with PARSING:
                array = np.load(path, mmap_mode="r")  # objects are refused by default
        if array.ndim not in (3, 4) or not array.size:
            raise ValueError(f"shape {array.shape}; a clip needs (T, H, W), (T, H, W, C) or (T, C, H, W)")
        self._array = array
        self.frame_keys = range(len(array))

    def read(self, index: int, deep: bool) -> Array | Image.Image:
        return np.asarray(self._array[index])


class VideoClip(Clip):
    """An MP4. Frames are found by their times, which need not be regular: the decoder continues from the last frame, or
    starts at the key frame before. `frame_keys` are both times, (T, 2)."""

    def __init__(self, path: str, frame_keys: FrameKeys | None = None) -> None:
        require_video()
        require_file(path)
        import av

        try:
            self._file, self._lock = av.open(path, format="mp4"), Lock()  # other formats may name other files
        except av.FFmpegError as error:
            raise ValueError(f"not an MP4, or damaged: {error.strerror}") from error
        weakref.finalize(self, self._file.close)  # which a garbage collection would do late
        if not self._file.streams.video:
            raise ValueError("no video in this file")
        self._stream, self._next = self._file.streams.video[0], -1
        self._stream.codec_context.thread_count = 1  # clips are decoded side by side
        self._size = self._stream.width, self._stream.height
        check_pixel_count(*self._size)
        self._times = self._find_times() if frame_keys is None else np.asarray(frame_keys)
        self.frame_keys = self._times

    def _find_times(self) -> NDArray[np.int64]:
        packets = (packet for packet in self._file.demux(self._stream) if packet.pts is not None)
        found = np.array([(packet.pts, packet.is_keyframe, packet.is_discard) for packet in packets], np.int64)
        if not len(found) or not found[:, 1].any():
            raise ValueError("no frames in this video")
        times, key_times = np.sort(found[found[:, 2] == 0, 0]), np.sort(found[found[:, 1] == 1, 0])
        return np.stack([times, key_times[np.searchsorted(key_times, times, "right").clip(1) - 1]], 1)

    def read(self, index: int, deep: bool) -> Array | Image.Image:
        with self._lock:
            (time, key_time), following, self._next = self._times[index].tolist(), self._next, -1
            if index != following:
                self._file.seek(key_time, stream=self._stream)
                self._frames: Iterator[Any] = self._file.decode(self._stream)
            frame = next((frame for frame in self._frames if frame.pts >= time), None)
            if frame is None or frame.pts != time or frame.is_corrupt:  # the decoder makes up what is damaged
                raise ValueError("cannot be decoded")
            require_size((frame.width, frame.height), self._size)
            values = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
            self._next = index + 1
        return values if deep else Image.fromarray(values)


def convert_frame(image: Image.Image, size: tuple[int, int], deep: bool) -> Array | Image.Image:
    require_size(image.size, size)
    if isinstance(image, TiffImageFile) and not deep:
        require_plain_page(image)
    return read_page(image) if deep else ImageOps.exif_transpose(image)


def require_size(size: tuple[int, int], first: tuple[int, int]) -> None:
    if size != first:
        raise ValueError("{} x {} pixels, unlike the first of its clip, {} x {}".format(*size, *first))


def require_file(path: str) -> None:
    if not os.path.isfile(path):  # reading a pipe may never end
        raise ValueError("missing, or not a regular file")
