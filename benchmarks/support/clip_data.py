"""Moving digits as folders of frames, and volumes with blobs as `.npy` files, written as users have them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from benchmarks.support.condition_data import FRAMES, halve, read_source, write_split

VOLUME = (8, 24, 24)
SIDE, STEP = 32, 4  # of a frame, and of a move along an axis, in pixels
SMALLEST, LARGEST, APART = 1.6, 2.2, 7.0  # width of a blob, and distance of two, in pixels
BLOBS = (1, 2, 3)
VISIBLE = 110  # the least intensity of a blob's middle


def make_motion(folder: Path, limit: int) -> Path:
    """Write clips of a digit of half size that moves over a torus, once: a folder of frames for each. In each step it
    moves by one patch of the tokenizer, or stays, along each axis, the same in all steps of a clip."""
    work = begin(folder)
    for split, digits, _ in () if folder.is_dir() else read_source("motion", limit):
        clips, velocities = move_digits(digits, len(digits) // 2)
        columns = {f"velocity_{axis}": velocities[:, k].repeat(FRAMES).tolist() for k, axis in enumerate("yx")}
        write_split(work / split, clips.reshape(-1, SIDE, SIDE), columns)
        (work / split / "metadata.csv").unlink()  # clips have no column of earlier frames
        np.savetxt(work / f"{split}.csv", velocities, "%d", ",")
    if work.is_dir():
        work.rename(folder)
    return folder


def move_digits(digits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return clips uint8 (n, T, H, W), and their velocities (n, 2): pixels down and to the right."""
    rng, small = np.random.default_rng(count), halve(digits)
    clips, velocities = np.zeros((count, FRAMES, SIDE, SIDE), np.uint8), STEP * rng.integers(-1, 2, (count, 2))
    for clip, velocity in zip(clips, velocities, strict=True):
        digit = np.pad(small[rng.integers(len(small))], (0, SIDE - small.shape[1]))
        first = np.roll(digit, rng.integers(SIDE, size=2), (0, 1))
        for frame in range(FRAMES):
            clip[frame] = np.roll(first, frame * velocity, (0, 1))
    return clips, velocities


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
