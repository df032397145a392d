"""What a GPU does with this code, in one table: training, sampling, encoding; beside plain models of others.

    pip install -e ".[dev,benchmarks]"
    python -m benchmarks.speed.gpu
    python -m benchmarks.speed.gpu docs=docs/results.md    # and puts the table into the page
    python -m benchmarks.speed.gpu device=cpu tiny=true repeats=1 out=build/rehearsal.md    # does it run?

`make gpu` first runs the tests marked `gpu`, which check what this takes for granted. Weights, tokens and images are
random; the sizes are those of the ImageNet presets with a GPU's share of eight: 32 images of 16x16 ids of 16,384 for
`gpt_imagenet256`, 16 of 256x256 for `vqgan_imagenet256`, without its perceptual network.

step: that of the loop, under bf16 autocast, with data, clipping, checks and averaged weights; of the others forward,
backward, clipping and fused AdamW. host: until the call returns, before the GPU is done. of peak: FLOPs by torch's
counter, attention as two full products, over time and the card's published bf16 peak, or the measured one of a product
of side 8192 where it is not known. memory: most bytes of tensors in a step; over plan: as a share of what `smalti plan`
says. Sampling is without guidance, from logits of standard deviation 3, by one CUDA graph for all steps; "kernel by
kernel" is without it, as for a caller who watches each step. A token step is the time of a call over the tokens of an
image. Medians of `repeats` calls. The table goes to `out`; `docs` is a page whose section `## On a GPU` it replaces.
"""

from __future__ import annotations

import datetime
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from benchmarks.support.cards.card import MATRIX, Card, find_card, software
from benchmarks.support.cards.sampling import CODING_HEAD, SAMPLING_HEAD, coding_rows, sampling_rows
from benchmarks.support.cards.training import (
    FULL,
    HEAD,
    TINY,
    Sizes,
    config_of,
    measure_loop,
    measure_peer,
    peer_of_prior,
    peer_of_tokenizer,
    prior_arguments,
    tokenizer_arguments,
    write_images,
    write_tokens,
)
from benchmarks.support.options import choose, need, read_options
from benchmarks.support.tables import table_head, table_row

PARTS = ("training", "sampling", "coding")
HEADING = "## On a GPU"


def training_lines(card: Card, sizes: Sizes, folder: Path, repeats: int) -> Iterator[str]:
    """Steps of both stages, as they are and compiled, and of others' models."""
    import torch

    yield table_head(*HEAD)
    at_once = [f"critic.{name}=0" for name in ("start", "warmup", "ramp")]
    cases = {
        "gpt_imagenet256": prior_arguments(folder, sizes),
        "vqgan_imagenet256, without critic": tokenizer_arguments(folder, sizes, "critic.weight=0"),
        "vqgan_imagenet256": tokenizer_arguments(folder, sizes, *at_once),
    }
    flops = {}
    for name, argv in cases.items():
        for compiled in (False, True):
            label = f"{name}, compiled" if compiled else name
            row = measure_loop(card, label, [*argv, f"train.compile={str(compiled).lower()}"], repeats)
            flops[name] = row.flops
            yield table_row(row.cells(card))
    first, second, _ = cases.values()
    prior, tokenizer = config_of(first), config_of(second)
    images = max(2, sizes.images // 2)
    peers = {
        "transformers GPT-2": (peer_of_prior(card, prior, sizes), sizes.images, flops["gpt_imagenet256"]),
        "diffusers VQModel": (
            peer_of_tokenizer(card, tokenizer, images),
            images,
            flops["vqgan_imagenet256, without critic"],
        ),
    }
    for name, (peer, count, known) in peers.items():
        yield table_row(measure_peer(card, name, peer, count, known, repeats).cells(card))
    if card.device.type == "cuda":
        torch.cuda.empty_cache()


def parts_of(card: Card, sizes: Sizes, only: list[str], repeats: int) -> Iterator[str]:
    """The lines of all tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder, sizes)
        write_images(folder, sizes)
        if "training" in only:
            yield from training_lines(card, sizes, folder, repeats)
            yield ""
        if "sampling" in only:
            yield table_head(*SAMPLING_HEAD)
            for cells in sampling_rows(card, config_of(prior_arguments(folder, sizes)), sizes, repeats):
                yield table_row(cells)
            yield ""
        if "coding" in only:
            yield table_head(*CODING_HEAD)
            for cells in coding_rows(card, config_of(tokenizer_arguments(folder, sizes)), sizes, repeats):
                yield table_row(cells)
            yield ""


def heading_of(card: Card) -> str:
    """What the figures are of."""
    peak = "not published here" if card.published is None else f"{card.published / 1e12:.0f} TFLOP/s published"
    return (
        f"{card.name}; {software()}; {datetime.date.today()}; bf16 peak {peak}, {card.measured / 1e12:.1f} measured; "
        f"`python -m benchmarks.speed.gpu`, random weights, one run."
    )


def put_into(page: Path, text: str) -> None:
    """Replace what the page's section says. Exits where there is no such section."""
    old = page.read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(HEADING)}\n(.*?)(?=^## |\Z)", old, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f"docs={page}: has no section {HEADING!r}")
    page.write_text(f"{old[: found.start(1)]}\n{text.strip()}\n\n{old[found.end(1) :]}", encoding="utf-8")


def run(options: SimpleNamespace) -> str:
    """Measure, printing each line when it is there; returns all of them."""
    card = find_card(options.device, 256 if options.tiny else MATRIX)
    lines = [heading_of(card), ""]
    print("\n".join(lines), flush=True)
    only = choose(options.only, list(PARTS))
    for line in parts_of(card, TINY if options.tiny else FULL, only, options.repeats):
        print(line, flush=True)
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> None:
    options = read_options(
        __doc__,
        {
            "device": "cuda",
            "tiny": False,
            "repeats": 10,
            "only": ",".join(PARTS),
            "out": "build/gpu.md",
            "docs": None,
        },
    )
    need("transformers", "diffusers")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    text = run(options)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    if options.docs:
        put_into(Path(options.docs), text)
    print(f"written: {out}{f' and {options.docs}' if options.docs else ''}")


if __name__ == "__main__":
    main()
