"""Moving digits as folders of frames, and volumes with blobs as `.npy` files, written as users have them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from benchmarks.support.condition_data import FRAMES, make_clips, read_source, write_split

VOLUME = (8, 24, 24)
SMALLEST, LARGEST, APART = 1.6, 2.2, 7.0  # width of a blob, and distance of two, in pixels
BLOBS = (1, 2, 3)
VISIBLE = 110  # the least intensity of a blob's middle


def make_motion(folder: Path, limit: int) -> Path:
    """Write clips of two digits that move at one velocity over a torus, once: a folder of frames for each."""
    work = begin(folder)
    for split, digits, _ in () if folder.is_dir() else read_source("motion", limit):
        frames, columns = make_clips(digits, len(digits) // 5)
        write_split(work / split, frames, columns)
        (work / split / "metadata.csv").unlink()  # clips have no column of earlier frames
        every = [columns["velocity_y"][::FRAMES], columns["velocity_x"][::FRAMES]]
        np.savetxt(work / f"{split}.csv", np.stack(every, 1), "%d", ",")
    if work.is_dir():
        work.rename(folder)
    return folder


def make_volumes(folder: Path, limit: int) -> Path:
    """Write volumes with one to three blobs, once: a `.npy` file for each, in the folder of their number."""
    work = begin(folder)
    for split, count in () if folder.is_dir() else (("train", limit), ("test", limit // 8)):
        rng = np.random.default_rng(count)
        for number in range(count):
            blobs = BLOBS[number % len(BLOBS)]
            (work / split / str(blobs)).mkdir(parents=True, exist_ok=True)
            np.save(work / split / str(blobs) / f"{number:05d}.npy", make_volume(rng, blobs))
    if work.is_dir():
        work.rename(folder)
    return folder


def begin(folder: Path) -> Path:
    """Return the folder in which one is made, without what an interrupted run left there."""
    work = folder.with_name(f".{folder.name}")
    shutil.rmtree(work, ignore_errors=True)
    return work


def make_volume(rng: np.random.Generator, blobs: int) -> np.ndarray:
    """Return a volume with separate Gaussian blobs, uint8 (T, H, W)."""
    middles: list[np.ndarray] = []
    while len(middles) < blobs:
        middle = rng.uniform(2, np.array(VOLUME) - 3)
        if all(np.linalg.norm(middle - other) > APART for other in middles):
            middles.append(middle)
    place = np.stack(np.meshgrid(*map(np.arange, VOLUME), indexing="ij"), -1)
    volume = np.zeros(VOLUME)
    for middle in middles:
        width = rng.uniform(SMALLEST, LARGEST)
        volume = np.maximum(volume, np.exp(-((place - middle) ** 2).sum(-1) / (2 * width**2)))
    return (255 * volume).round().astype(np.uint8)


def count_blobs(volume: np.ndarray) -> int:
    """Return the number of blobs in a volume (T, H, W): of connected bright voxels."""
    from scipy import ndimage

    return int(ndimage.label(volume >= VISIBLE)[1])


def find_velocities(clips: np.ndarray) -> np.ndarray:
    """Return how far each frame of clips (n, T, H, W) has moved over the torus since the one before, as the peak of
    their correlation: whole pixels down and to the right, (n, T - 1, 2)."""
    spectra = np.fft.fft2(clips.astype(np.float64))
    peaks = np.fft.ifft2(spectra[:, 1:] * spectra[:, :-1].conj()).real
    height, width = clips.shape[2:]
    down, right = np.unravel_index(peaks.reshape(*peaks.shape[:2], -1).argmax(-1), (height, width))
    return np.stack([(down + height // 2) % height - height // 2, (right + width // 2) % width - width // 2], -1)
