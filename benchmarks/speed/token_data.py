"""What a token dataset of ImageNet's shape costs to write, to load and to draw batches from, as training does.

    python -m benchmarks.speed.token_data out=runs/token_data rows=1281167 times=10

Synthetic ids: `rows` images of 16x16 ids of 16,384, in 16 bits; one thread. Each line is a process of its own. Rows per
second: of `Task.samples` and `PriorTask.batch` together, over 200 steps around the end of an epoch; of its own: per
second that the machine gave to this thread, where others work on it too; beside the slowest of these steps. The trainer
asks for the next step's batch while it takes this one. A row is 256 tokens. Private: the most memory of its own
that the process had beyond what it had before it loaded, page cache left out. `times`: rows of the same number of
images with that many augmentations, in their order alone. `cold=yes`: the same with the files put out of the page cache
before the first step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.support.options import read_options
from benchmarks.support.tables import table_head, table_row

GRID, VOCAB = (16, 16), 16384
SIZES = (256, 1024)
STEPS = 200
CASES: dict[str, dict[str, Any]] = {  # label -> how it is loaded, what is trained
    "in memory": {"mapped": False},
    "mapped": {"mapped": True},
    "mapped, in blocks of 256": {"mapped": True, "blocks": 256},
    "mapped, a tenth perturbed": {"mapped": True, "perturb": 0.1},
}


def write(folder: Path, rows: int) -> float:
    """Write a dataset of so many training rows; returns seconds."""
    import torch

    from pipelines.tokens import TokenDataset, TokenSplit
    from pipelines.tokens.shards import smallest_type
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.create(
        "vqvae",
        image_size=(64, 64),
        channels=1,
        widths=(8,),
        blocks=(0,),
        quantizer={"kind": "vq", "codes": VOCAB, "dim": 4},
    )
    assert tokenizer.grid.shape == GRID, tokenizer.grid
    splits = {}
    for name, count in (("train", rows), ("test", 1000)):
        tokens = torch.randint(VOCAB, (count, *GRID), dtype=torch.int16).view(torch.uint16)
        assert tokens.dtype == smallest_type(VOCAB)
        splits[name] = TokenSplit(tokens, torch.randint(1000, (count,)))
    data = TokenDataset(tokenizer.grid, [str(k) for k in range(1000)], splits, tokenizer, {})
    began = time.perf_counter()
    data.save(folder)
    return time.perf_counter() - began


def private() -> int:
    """Bytes of this process's own memory: not of files, not shared."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def watched() -> Iterator[list[int]]:
    """The most private memory, seen every few milliseconds, beyond that at the start."""
    peak, start, done = [0], private(), threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], private() - start)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def forget(folder: Path) -> None:
    """Put the files of a folder out of the page cache."""
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure(folder: Path, label: str, cold: bool) -> dict[str, Any]:
    """Seconds to load, memory, rows per second and the slowest step for each batch size."""
    import torch

    from pipelines import train_prior
    from pipelines.tokens import dataset as tokens

    torch.set_num_threads(1)
    options = dict(CASES[label])
    mapped = options.pop("mapped")
    model = {"kind": "gpt", "dim": 16, "depth": 1, "heads": 1}
    config = train_prior.TrainPriorConfig(out="", tokens=str(folder), model=model, **options)
    began, loading = time.perf_counter(), tokens.load_tokens
    train_prior.load_tokens = partial(loading, mapped=mapped, verify=False)
    with watched() as peak:
        task = train_prior.PriorTask(config)
        found: dict[str, Any] = {"load": time.perf_counter() - began}
        for size in SIZES:
            if cold:
                forget(folder)
            found[str(size)] = steps_of(task, size, STEPS // 10 if cold else STEPS)
    return {**found, "private": peak[0]}


def steps_of(task: Any, size: int, steps: int) -> tuple[float, float, float]:
    """Rows per second around the end of an epoch, those per second of its own, and the slowest step in ms."""
    first, times, own = max(0, task.rows // size - steps // 2), [], time.thread_time()
    for step in range(first, first + steps):
        began = time.perf_counter()
        task.batch(*task.samples(size, 0, step), 0)
        times.append(time.perf_counter() - began)
    return size * steps / sum(times), size * steps / (time.thread_time() - own), max(times) * 1e3


def verified(folder: Path) -> float:
    """Seconds to hash every file."""
    from tokenizer.files import verify_manifest

    began = time.perf_counter()
    verify_manifest(folder)
    return time.perf_counter() - began


def in_a_process(*arguments: str) -> Any:
    """What this command prints, as JSON, when it is started with these arguments."""
    command = [sys.executable, "-m", __spec__.name, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def order_line(rows: int) -> str:
    """What the order of so many rows costs a step."""
    from pipelines.shuffling import samples_of

    cells = []
    for size in SIZES:
        first, times = max(0, rows // size - STEPS // 2), []
        for step in range(first, first + STEPS):
            began = time.perf_counter()
            samples_of(rows, size, 0, step)
            times.append(time.perf_counter() - began)
        cells.append(f"{size}: {sum(times) / STEPS * 1e3:.2f} ms a step, the slowest {max(times) * 1e3:.2f}")
    return f"order of {rows:,} rows, across the end of an epoch: {'; '.join(cells)}"


def main() -> None:
    given = {"out": "runs/token_data", "rows": 1281167, "times": 10, "cold": False, "case": None, "write": False}
    options = read_options(__doc__, given)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder, rows, cold = Path(options.out), options.rows, options.cold
    if options.case:
        print(json.dumps(measure(folder, options.case, cold)))
        return
    if options.write:
        print(json.dumps(write(folder, rows)))
        return
    seconds = in_a_process(f"out={folder}", f"rows={rows}", "write=yes")
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6
    print(f"{rows:,} rows, {size:,.0f} MB: written in {seconds:.1f} s, hashed in {verified(folder):.1f} s")
    print(order_line(rows * options.times), flush=True)
    head = [f"batch {size}: {what}" for size in SIZES for what in ("rows/s", "of its own", "slowest step, ms")]
    print(f"\n{table_head('loaded', 'seconds', 'private, MB', *head)}")
    for label in CASES:
        found = in_a_process(f"out={folder}", f"case={label}", f"cold={'yes' if cold else 'no'}")
        cells = [label, f"{found['load']:.2f}", f"{found['private'] / 1e6:.0f}"]
        for size in SIZES:
            speed, own, slowest = found[str(size)]
            cells += [f"{speed:,.0f}", f"{own:,.0f}", f"{slowest:.1f}"]
        print(table_row(cells), flush=True)


if __name__ == "__main__":
    main()
