"""Logistics against a softmax as what a prior of 8-bit pixels puts out: bits per dim, and images a second of streams.

    pip install -e ".[dev,compress]"
    python -m benchmarks.priors.intensities tokens=runs/fashion_8bit_tokens        # of the preset `pixels_fashion_8bit`
    python -m benchmarks.priors.intensities tokens=runs/fashion_8bit_tokens minutes=0.1 images=8        # does it run?

Each network learns twice for `minutes` of processor time on one thread, once with `model.head=logistic` and once with a
logit for each of the 256 values. Bits per dim on at most `rows` of the validation and of the test images. Streams: the
first `images` of the test images as one lossless stream, not decoded again while it is made, and read; images that come
back otherwise are an error.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.support.fitting import bits_of_images, fitted
from benchmarks.support.options import read_options
from benchmarks.support.tables import table_head, table_row

BATCH = 16
NETWORKS: dict[str, dict[str, Any]] = {
    "pixelcnn_pp": {"dim": 24, "depth": 1, "row_embedding": False},
    "gated_pixelcnn": {"dim": 24, "depth": 6, "hidden": 48},
    "gpt": {"dim": 48, "depth": 3, "heads": 3, "window": (3, 4)},
}
HEADS: dict[str, Any] = {"softmax": None, "logistic": {"kind": "logistic", "components": 5}}


def streamed(model: Any, data: Any, images: int) -> tuple[float, float, float]:
    """Bits per dim of a stream, and how many images a second are encoded and decoded. Exits if one is another then."""
    import torch

    from pipelines import ImagePipeline

    pipe = ImagePipeline(data.tokenizer, model)
    pixels = data.tokenizer.decode(data.splits["test"].rows(slice(0, images)).long())
    begin = time.process_time()
    stream = pipe.compress(pixels, lossless=True, progress=False)
    middle = time.process_time()
    found = pipe.decompress(stream, output_type="pt", progress=False)
    end = time.process_time()
    if not torch.equal(((found + 1) * 127.5).round(), ((pixels + 1) * 127.5).round()):
        raise SystemExit("the images that came back are others")
    return 8 * len(stream) / pixels.numel(), images / (middle - begin), images / (end - middle)


def main() -> None:
    options = read_options(
        __doc__, {"tokens": str, "minutes": 3.0, "seed": 0, "lr": 3e-3, "rows": 1000, "images": 64, "only": None}
    )
    import torch

    from pipelines.tokens import load_tokens

    torch.set_num_threads(1)
    data = load_tokens(options.tokens)
    dims = len(data.grid)
    print(f"{options}\n")
    head = ("network", "head", "parameters", "steps", "validation", "test", "stream", "encoded/s", "decoded/s")
    print(table_head(*head))
    for kind, config in NETWORKS.items():
        if options.only not in (None, kind):
            continue
        for name, node in HEADS.items():
            settings = {**config, "head": node}
            model, steps = fitted(kind, settings, data, BATCH, options.minutes, options.lr, options.seed)
            bits = [bits_of_images(model, data.splits[split], options.rows) / dims for split in ("validation", "test")]
            rate, coded, read = streamed(model, data, options.images)
            count = sum(parameter.numel() for parameter in model.parameters())
            figures = [*(f"{value:.3f}" for value in (*bits, rate)), f"{coded:.1f}", f"{read:.1f}"]
            print(table_row([kind, name, f"{count:,}", str(steps), *figures]), flush=True)


if __name__ == "__main__":
    main()
