"""Compress held-out images with a pipeline, and compare with general-purpose coders.

    pip install -e ".[dev]" imagecodecs
    python -m benchmarks.uses.compression pipeline=runs/gpt_fashion_mnist/pipeline
    python -m benchmarks.uses.compression pipeline=runs/causal_conv_fashion_8bit/pipeline lossless=true

Each coder writes all held-out images of the pipeline's data (or of `source=FOLDER`; `count=N`: only the first N) as one
archive. PNG, WebP, JPEG-LS and JPEG XL get a sheet of 100 images per row, or one column of images, whichever comes out
smaller, or with `files=true` each image by itself; zlib gets the raw bytes. WebP may change the colours of pixels that
are transparent. "own bits": -log2 p of the images under the model, without a class, in float32. Images per second are
from one run.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.support.options import read_options, require_packages, use_threads
from benchmarks.support.tables import table_head, table_row
from pipelines import ImagePipeline
from pipelines.images import DataConfig, load_images

SIDE = 100  # images in a row of a sheet


def make_layouts(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """Arrange images (n, C, H, W) as a sheet `(rows, columns[, C])` and as a column."""
    count, channels, height, width = pixels.shape
    images = pixels.transpose(0, 2, 3, 1)
    padded = np.concatenate([images, np.zeros((-count % SIDE, height, width, channels), np.uint8)])
    rows = padded.reshape(-1, SIDE, height, width, channels).swapaxes(1, 2)
    for sheet in (rows.reshape(-1, SIDE * width, channels), images.reshape(-1, width, channels)):
        yield sheet.squeeze(-1) if channels == 1 else sheet


def count_in_strips(coder: Callable[[np.ndarray], bytes], height: int) -> Callable[[np.ndarray], int]:
    """Return a function that counts the bytes of a sheet, cut into strips of the greatest height that the format
    allows."""

    def size(sheet: np.ndarray) -> int:
        strips = (sheet[start : start + height] for start in range(0, len(sheet), height))
        return sum(len(coder(np.ascontiguousarray(strip))) for strip in strips)

    return size


def measure_peers(pixels: np.ndarray, files: bool) -> dict[str, int]:
    """Count the bytes of all images by each coder: as one archive in the better layout, or as files."""
    import imagecodecs as coders

    forms = {
        "PNG": count_in_strips(lambda sheet: coders.png_encode(sheet, level=9), 1 << 30),
        "WebP lossless": count_in_strips(
            lambda sheet: coders.webp_encode(to_rgb(sheet), lossless=True, level=100), 16_380
        ),
        "JPEG-LS": count_in_strips(coders.jpegls_encode, 65_000),
        "JPEG XL, effort 9": count_in_strips(
            lambda sheet: coders.jpegxl_encode(sheet, lossless=True, effort=9), 28_000
        ),
    }
    if pixels.shape[1] == 4:
        del forms["JPEG-LS"]
    if files:
        images = [[*make_layouts(image)][-1] for image in np.split(pixels, len(pixels))]  # columns of one image
        return {name: sum(map(size, images)) for name, size in forms.items()}
    sizes = {"zlib": len(zlib.compress(np.ascontiguousarray(pixels).tobytes(), 9))}
    return sizes | {name: min(map(size, make_layouts(pixels))) for name, size in forms.items()}


def to_rgb(sheet: np.ndarray) -> np.ndarray:
    """Convert to RGB, because WebP has no grey images."""
    return np.ascontiguousarray(np.repeat(sheet[..., None], 3, -1)) if sheet.ndim == 2 else sheet


def compute_bits(pipe: Any, images: Any, lossless: bool) -> float:
    dims = images[0].numel()
    bits = [
        pipe.bits_per_dim(part).double() * dims if lossless else -pipe.log_prob(part).double() / np.log(2)
        for part in images.split(256)
    ]
    return float(sum(part.sum() for part in bits))


def time_call(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def compare(pipe: Any, pixels: Any, lossless: bool, with_peers: bool, files: bool) -> None:
    """Check the round trip, and print the size for each coder."""
    images, dims = pipe.to_images(pixels), pixels.numel()
    data, plain = time_call(lambda: pipe.compress(images, lossless=lossless))
    found, back = time_call(lambda: pipe.decompress(data, output_type="pt"))
    if lossless:
        assert bool((((found + 1) * 127.5).round().byte() == pixels).all())
    else:
        assert bool((found == pipe.decode(pipe.encode(images), output_type="pt")).all())
    bits = compute_bits(pipe, images, lossless)
    print(
        f"\n{pipe}\n{len(pixels):,} images, {'every pixel' if lossless else 'tokens'}: own bits {bits / dims:.4f} "
        f"per dim, stream {8 * len(data) / dims:.4f}: {8 * len(data) / bits - 1:+.2%}"
    )
    print(f"images per second: {len(pixels) / plain:.0f} encoded, {len(pixels) / back:.0f} decoded\n")
    print(table_head("coder", "bytes an image", "bits per dim", "stream / this"))
    rows = {"this pipeline": len(data), **(measure_peers(pixels.numpy(), files) if with_peers else {})}
    for name, size in rows.items():
        cells = (name, f"{size / len(pixels):.1f}", f"{8 * size / dims:.3f}", f"{len(data) / size:.3f}")
        print(table_row(cells), flush=True)


def main() -> None:
    given = {"pipeline": str, "source": None, "count": 0, "lossless": False, "peers": True, "files": False}
    options = read_options(__doc__, given)
    if options.peers:
        require_packages("imagecodecs")
    use_threads()
    pipe = ImagePipeline.from_pretrained(options.pipeline)
    source = pipe.provenance["data"] | ({"source": options.source} if options.source else {})
    held_out = load_images(DataConfig(**source)).held_out
    count = min(len(held_out), options.count or len(held_out))
    pixels = held_out.pixels(torch.arange(count))
    compare(pipe, pixels, options.lossless, options.peers, options.files)


if __name__ == "__main__":
    main()
