"""What a pipeline compresses held-out images to, against general coders, and on how many routes its streams decode.

    pip install -e ".[dev]" imagecodecs
    python -m benchmarks.uses.compression pipeline=runs/gpt_fashion_mnist/pipeline
    python -m benchmarks.uses.compression pipeline=runs/causal_conv_fashion_8bit/pipeline lossless=true

All held-out images of the pipeline's own data (`source=FOLDER`: of that folder; `count=N`: the first N) as one archive
on either side. PNG, WebP, JPEG-LS and JPEG XL get the images in sheets of 100 by 100, in which each may look across
its neighbours, or one below the other, whichever comes out smaller; zlib gets all bytes in a row. "own bits": -log2 p
of the images under the model, in float32. Images a second: one run.

routes=N: the first N images are decoded in batches of 1, 7 and 64, on 1 and 2 threads, with the cache and without it
(uncached: N / 10 images), and with AVX2 alone, and must come back alike. float32=N: the same codec on float32, how many
chunks of 64 images decode in other batches than they were made in.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.support.options import need, read_options, use_threads
from benchmarks.support.tables import table_head, table_row

SIDE = 100  # images in a row of a sheet
BATCHES, THREADS = (1, 7, 64), (1, 2)


def layouts(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """(n, C, H, W) as sheets `(rows, columns[, C])`: squares of images, and one below the other."""
    count, channels, height, width = pixels.shape
    images = pixels.transpose(0, 2, 3, 1)
    padded = np.concatenate([images, np.zeros((-count % SIDE, height, width, channels), np.uint8)])
    rows = padded.reshape(-1, SIDE, height, width, channels).swapaxes(1, 2)
    yield rows.reshape(-1, SIDE * width, channels).squeeze(-1) if channels == 1 else rows.reshape(-1, SIDE * width, 3)
    tall = images.reshape(-1, width, channels)
    yield tall.squeeze(-1) if channels == 1 else tall


def in_strips(coder: Callable[[np.ndarray], bytes], height: int) -> Callable[[np.ndarray], int]:
    """Bytes of sheets cut to what the format allows."""
    return lambda sheet: sum(len(coder(np.ascontiguousarray(part))) for part in pieces(sheet, height))


def pieces(sheet: np.ndarray, height: int) -> list[np.ndarray]:
    return [sheet[start : start + height] for start in range(0, len(sheet), height)]


def peers(pixels: np.ndarray) -> dict[str, int]:
    """Bytes of all images as one archive of each coder, the smaller of the layouts."""
    import imagecodecs as coders

    forms = {
        "PNG": in_strips(lambda sheet: coders.png_encode(sheet, level=9), 1 << 30),
        "WebP lossless": in_strips(lambda sheet: coders.webp_encode(rgb(sheet), lossless=True, level=100), 16_380),
        "JPEG-LS": in_strips(coders.jpegls_encode, 65_000),
        "JPEG XL, effort 9": in_strips(lambda sheet: coders.jpegxl_encode(sheet, lossless=True, effort=9), 28_000),
    }
    sizes = {"zlib": len(zlib.compress(np.ascontiguousarray(pixels).tobytes(), 9))}
    return sizes | {name: min(map(size, layouts(pixels))) for name, size in forms.items()}


def rgb(sheet: np.ndarray) -> np.ndarray:
    """WebP knows no grey images."""
    return np.ascontiguousarray(np.repeat(sheet[..., None], 3, -1)) if sheet.ndim == 2 else sheet


def own_bits(pipe: Any, images: Any, lossless: bool) -> float:
    """-log2 p of all images, or of their tokens."""
    dims = images[0].numel()
    bits = [
        pipe.bits_per_dim(part).double() * dims if lossless else -pipe.log_prob(part).double() / np.log(2)
        for part in images.split(256)
    ]
    return float(sum(part.sum() for part in bits))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return function(), time.perf_counter() - began


def compare(pipe: Any, pixels: Any, lossless: bool, with_peers: bool) -> None:
    """Print what each coder needs."""
    images, dims = pipe.to_images(pixels), pixels.numel()
    data, plain = timed(lambda: pipe.compress(images, lossless=lossless))
    found, back = timed(lambda: pipe.decompress(data, output_type="pt"))
    if lossless:
        assert bool((((found + 1) * 127.5).round().byte() == pixels).all())
    else:
        assert bool((found == pipe.decode(pipe.encode(images), output_type="pt")).all())
    bits = own_bits(pipe, images, lossless)
    print(
        f"\n{pipe}\n{len(pixels):,} images, {'every pixel' if lossless else 'tokens'}: own bits {bits / dims:.4f} "
        f"per dim, stream {8 * len(data) / dims:.4f}: {8 * len(data) / bits - 1:+.2%}"
    )
    print(f"images a second: {len(pixels) / plain:.0f} encoded, {len(pixels) / back:.0f} decoded\n")
    print(table_head("coder", "bytes an image", "bits per dim", "stream / this"))
    rows = {"this pipeline": len(data), **(peers(pixels.numpy()) if with_peers else {})}
    for name, size in rows.items():
        cells = (name, f"{size / len(pixels):.1f}", f"{8 * size / dims:.3f}", f"{len(data) / size:.3f}")
        print(table_row(cells), flush=True)


def routes(pipe: Any, folder: Path, pixels: Any, lossless: bool) -> None:
    """Print on which routes a stream of these images decodes to the same."""
    import torch

    data, few = (pipe.compress(part, lossless=lossless) for part in (pixels, pixels[: max(1, len(pixels) // 10)]))
    expected = pipe.decompress(data, output_type="pt")
    before, member = torch.get_num_threads(), type(pipe.prior)
    print("\n" + table_head("route", "images", "differ"))
    for cached, threads, batch in itertools.product((True, False), THREADS, BATCHES):
        torch.set_num_threads(threads)
        slow = {"start": member.start_uncached, "next_logits": member.next_logits_uncached}
        with contextlib.nullcontext() if cached else mock.patch.multiple(member, **slow):
            found = pipe.decompress(data if cached else few, output_type="pt", batch_size=batch)
        differ = int((found != expected[: len(found)]).flatten(1).any(1).sum())
        name = f"batch {batch}, {threads} thread(s), {'cached' if cached else 'uncached'}"
        print(f"| {name} | {len(found):,} | {differ} |", flush=True)
    torch.set_num_threads(before)
    print(f"| AVX2 alone, batch 64 | {len(expected):,} | {elsewhere(folder, data, expected)} |", flush=True)


def elsewhere(folder: Path, data: bytes, expected: Any) -> int:
    """How many images come out otherwise in a process that may not use all of this processor's instructions."""
    with tempfile.TemporaryDirectory() as temporary:
        at = Path(temporary)
        (at / "stream").write_bytes(data)
        code = (
            "import sys, numpy\nfrom pipelines import ImagePipeline\n"
            "pipe = ImagePipeline.from_pretrained(sys.argv[1])\nstream = open(sys.argv[2] + '/stream', 'rb').read()\n"
            "found = pipe.decompress(stream, output_type='pt', batch_size=64, progress=False)\n"
            "numpy.save(sys.argv[2] + '/found.npy', found.numpy())"
        )
        limited = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
        subprocess.run([sys.executable, "-c", code, str(folder), temporary], check=True, env={**os.environ, **limited})
        # The decoder of images is float32 and rounds otherwise there: tokens and pixels are what is promised.
        found = np.load(at / "found.npy")
    return int((np.abs(found - expected.numpy()) > 1 / 255).reshape(len(found), -1).any(1).sum())


def control(pipe: Any, pixels: Any, lossless: bool) -> None:
    """Print how many chunks would not decode in other batches in float32."""
    from pipelines.compression import coding
    from pipelines.compression.container import ModelMismatch

    failed, chunks = 0, pixels.split(64)
    with mock.patch.object(coding, "to_double", lambda model, device: model.to(device).eval()):
        for chunk in chunks:
            try:
                pipe.decompress(pipe.compress(chunk, lossless=lossless), batch_size=33)
            except ModelMismatch:
                failed += 1
    print(f"\nfloat32 instead: {failed} of {len(chunks)} chunks of 64 images did not decode")


def main() -> None:
    given = {"pipeline": str, "source": None, "count": 0, "lossless": False, "peers": True, "routes": 0, "float32": 0}
    options = read_options(__doc__, given)
    if options.peers:
        need("imagecodecs")
    use_threads()
    import torch

    from pipelines import ImagePipeline
    from pipelines.images import DataConfig, load_images

    folder = Path(options.pipeline)
    pipe = ImagePipeline.from_pretrained(folder)
    source = pipe.provenance["data"] | ({"source": options.source} if options.source else {})
    held_out = load_images(DataConfig(**source)).held_out
    count = min(len(held_out), options.count or len(held_out))
    pixels = held_out.pixels(torch.arange(count))
    compare(pipe, pixels, options.lossless, options.peers)
    if options.routes:
        routes(pipe, folder, pixels[: options.routes], options.lossless)
    if options.float32:
        control(pipe, pixels[: options.float32], options.lossless)


if __name__ == "__main__":
    main()
