"""How fast images come: kept in memory, read from files or copied tables when they are due, and streamed from shards.

    python -m benchmarks.speed.image_data
    python -m benchmarks.speed.image_data images=2000 height=375 width=500 batch_size=64 step=0.2

JPEGs are made on the spot, `images` of `height` x `width`, and are wanted as `size` x `size`. Each row is a process of
its own: `ready` is the time to the first batch (for files and parquet read whole, every image is decoded before it),
`images/s` what comes when nobody else works, `per core` the same for a second of one core's time, `waiting` the share
of its time that a trainer waits whose steps take `step` seconds on another device (the loop prepares one step while
another one runs), `MiB` the most memory above that of the imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.options import read_options, with_helpers_of_tests

DEFAULTS = {
    "images": 2000,
    "height": 375,
    "width": 500,
    "size": 256,
    "batch_size": 64,
    "step": 0.2,
    "seconds": 5.0,
}
ROWS = {
    "files, kept": {"source": "files", "cache_mb": 16384},
    "files, lazy": {"source": "files", "cache_mb": 0},
    "files, unchecked": {"source": "files", "streaming": True},
    "parquet, kept": {"source": "parquet", "cache_mb": 16384},
    "parquet, lazy": {"source": "parquet", "cache_mb": 0},
    "parquet, streamed": {"source": "parquet", "streaming": True},
    "tar, lazy": {"source": "tar", "cache_mb": 0},
    "tar, streamed": {"source": "tar", "streaming": True},
}


def make_jpeg(seed: int, height: int, width: int) -> bytes:
    """A picture with some structure at every scale, at quality 90."""
    import io

    from PIL import Image

    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for side in (4, 16, 64):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) / 3
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_all(folder: Path, count: int, height: int, width: int) -> float:
    """The same images as files, as parquet with row groups of 100, and as tar shards; returns kB per image."""
    with_helpers_of_tests()
    from givens.image_files import write_parquet, write_tar

    rows = [(f"{k:06d}", make_jpeg(k, height, width), k % 10) for k in range(count)]
    for key, data, label in rows:
        path = folder / "files" / str(label) / f"{key}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for number in range(0, count, 250):
        write_parquet(folder / "parquet" / f"train-{number:06d}.parquet", rows[number : number + 250], group=100)
        write_tar(folder / "tar" / f"train-{number:06d}.tar", rows[number : number + 250], suffix="jpg")
    return sum(len(data) for _, data, _ in rows) / count / 1000


def measure(folder: Path, options: dict[str, Any], size: int, batch_size: int, step: float, seconds: float) -> None:
    """Print the figures of one row."""
    from threading import Event, Thread

    import psutil
    import torch

    from pipelines.images import DataConfig, load_images

    torch.set_num_threads(1)
    process, done, most = psutil.Process(), Event(), [0]
    before = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], process.memory_info().rss - before)

    Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    data = DataConfig(**{**options, "source": str(folder / options["source"])}, image_size=size, channels=3)
    train = load_images(data, stream=True).train

    def batch(number: int) -> Any:
        return train.batch(train.samples(batch_size, 0, number)[0])

    batch(0)
    ready, number, began, worked = time.perf_counter() - began, 1, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        batch(number)
        number += 1
    count = (number - 1) * batch_size
    rate, per_core = count / (time.perf_counter() - began), count / (time.process_time() - worked)
    waited, began = 0.0, time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(batch, number)
        while time.perf_counter() - began < seconds:
            since = time.perf_counter()
            following.result()
            waited += time.perf_counter() - since
            following, number = pool.submit(batch, number + 1), number + 1
            time.sleep(step)  # which is what a GPU is to this processor
    share = waited / (time.perf_counter() - began)
    done.set()
    figures = {"ready": ready, "rate": rate, "per_core": per_core, "waiting": share, "memory": most[0] / 2**20}
    print(json.dumps(figures))


def decoding(height: int, width: int, size: int, seconds: float = 2.0) -> float:
    """Images that one thread decodes and resizes in a second of its processor's time."""
    from pipelines.images.decoding import decode

    files, count, began = [make_jpeg(k, height, width) for k in range(8)], 0, time.thread_time()
    while time.thread_time() - began < seconds:
        decode(files[count % 8], (3, size, size))
        count += 1
    return count / (time.thread_time() - began)


def row_of(name: str, folder: str) -> dict[str, float]:
    """The figures of one row, from a process of its own that gets the same options."""
    command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], f"row={name}", f"folder={folder}"]
    environment = {
        **os.environ,
        "HF_HOME": f"{folder}/home",
        "HF_DATASETS_CACHE": f"{folder}/datasets",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = read_options(__doc__, {**DEFAULTS, "row": None, "folder": None})
    height, width, size = options.height, options.width, options.size
    if options.row:
        measure(Path(options.folder), ROWS[options.row], size, options.batch_size, options.step, options.seconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = write_all(Path(folder), options.images, height, width)
        print(
            f"{options.images} JPEGs of {height} x {width}, {kilobytes:.0f} kB each, wanted as {size} x {size}; "
            f"{len(os.sched_getaffinity(0))} cores, one of which decodes {decoding(height, width, size):.0f} images/s"
        )
        print(f"{'':20}{'ready s':>10}{'images/s':>10}{'per core':>10}{'waiting':>10}{'MiB':>8}")
        for name in ROWS:
            found = row_of(name, folder)
            timed = f"{found['ready']:10.1f}{found['rate']:10.0f}{found['per_core']:10.0f}"
            print(f"{name:20}{timed}{found['waiting']:10.1%}{found['memory']:8.0f}", flush=True)


if __name__ == "__main__":
    main()
