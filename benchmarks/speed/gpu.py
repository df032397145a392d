"""Measure training, sampling and encoding on a GPU, next to reference models, in one table.

    pip install -e ".[dev,benchmarks]"
    python -m benchmarks.speed.gpu
    python -m benchmarks.speed.gpu docs=docs/results.md    # also update the page
    python -m benchmarks.speed.gpu device=cpu tiny=true repeats=1 out=build/trial.md    # a trial run without a GPU

`make gpu` runs the tests marked `gpu` first. Weights, tokens and images are random. Sizes are those of the ImageNet
presets with the share of one GPU of eight: 32 images of 16x16 ids of 16,384 for `gpt_imagenet256`, 16 of 256x256 pixels
for `vqgan_imagenet256`, without its perceptual network.

step: a step of the training loop under bf16 autocast, with data loading, clipping, checks and averaged weights; for
references, forward, backward, clipping and fused AdamW. host: time until the call returns. of peak: FLOPs by torch's
counter (attention as two full products) over time, as a share of the card's published bf16 peak; for unknown cards, of
the measured peak of a matrix product of side 8192. memory: peak bytes of tensors in a step; over plan: as a share of
the estimate of `smalti plan`. Sampling is without guidance, from logits of standard deviation 3, with one CUDA graph
for all steps; "kernel by kernel" is without it, as with a step callback. A token step is the time of a call divided by
the tokens of an image. Medians of `repeats` calls. The table is written to `out`, and replaces the section `## On a
GPU` of the page `docs`.
"""

from __future__ import annotations

import datetime
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from benchmarks.support.card import MATRIX, Card, describe_software, find_card
from benchmarks.support.card_sampling import CODING_HEAD, SAMPLING_HEAD, coding_rows, sampling_rows
from benchmarks.support.card_training import (
    FULL,
    HEAD,
    TINY,
    Sizes,
    measure_loop,
    measure_reference,
    model_config,
    prior_arguments,
    reference_prior,
    reference_tokenizer,
    tokenizer_arguments,
)
from benchmarks.support.options import choose, read_options, require_packages
from benchmarks.support.tables import table_head, table_row

PARTS = ("training", "sampling", "coding")
HEADING = "## On a GPU"


def training_lines(card: Card, sizes: Sizes, folder: Path, repeats: int) -> Iterator[str]:
    """The table of training steps: both stages, eager and compiled, and the references."""
    import torch

    yield table_head(*HEAD)
    at_once = [f"critic.{name}=0" for name in ("start", "warmup", "ramp")]
    gpt, vqgan = prior_arguments(folder, sizes), tokenizer_arguments(folder, sizes, "critic.weight=0")
    cases = {
        "gpt_imagenet256": gpt,
        "vqgan_imagenet256, without critic": vqgan,
        "vqgan_imagenet256": tokenizer_arguments(folder, sizes, *at_once),
    }
    flops = {}
    for name, argv in cases.items():
        for compiled in (False, True):
            label = f"{name}, compiled" if compiled else name
            row, flops[name] = measure_loop(card, label, [*argv, f"train.compile={str(compiled).lower()}"], repeats)
            yield row
    reference, known = reference_prior(card, model_config(gpt), sizes), flops["gpt_imagenet256"]
    yield measure_reference(card, "transformers GPT-2", reference, sizes.images, known, repeats)
    images, known = max(2, sizes.images // 2), flops["vqgan_imagenet256, without critic"]
    reference = reference_tokenizer(card, model_config(vqgan), images)
    yield measure_reference(card, "diffusers VQModel", reference, images, known, repeats)
    if card.device.type == "cuda":
        torch.cuda.empty_cache()


def measure_parts(card: Card, sizes: Sizes, only: list[str], repeats: int) -> Iterator[str]:
    """The lines of all tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes.write_data(folder)
        if "training" in only:
            yield from training_lines(card, sizes, folder, repeats)
            yield ""
        if "sampling" in only:
            yield table_head(*SAMPLING_HEAD)
            for cells in sampling_rows(card, model_config(prior_arguments(folder, sizes)), sizes, repeats):
                yield table_row(cells)
            yield ""
        if "coding" in only:
            yield table_head(*CODING_HEAD)
            for cells in coding_rows(card, model_config(tokenizer_arguments(folder, sizes)), sizes, repeats):
                yield table_row(cells)
            yield ""


def describe_setup(card: Card) -> str:
    """The card, software, date and command of the measurements."""
    peak = "unknown" if card.published is None else f"{card.published / 1e12:.0f} TFLOP/s published"
    return (
        f"{card.name}; {describe_software()}; {datetime.date.today()}; bf16 peak {peak}, {card.measured / 1e12:.1f} "
        f"measured; `python -m benchmarks.speed.gpu`, random weights, one run."
    )


def update_page(page: Path, text: str) -> None:
    """Replace the section of the page; exits if it has none."""
    old = page.read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(HEADING)}\n(.*?)(?=^## |\Z)", old, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f"docs={page}: no section {HEADING!r}")
    page.write_text(f"{old[: found.start(1)]}\n{text.strip()}\n\n{old[found.end(1) :]}", encoding="utf-8")


def run(options: SimpleNamespace) -> str:
    """Measure, printing each line as soon as it is known, and return all lines."""
    card = find_card(options.device, 256 if options.tiny else MATRIX)
    lines = [describe_setup(card), ""]
    print("\n".join(lines), flush=True)
    only = choose(options.only, list(PARTS))
    for line in measure_parts(card, TINY if options.tiny else FULL, only, options.repeats):
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
    require_packages("transformers", "diffusers")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    text = run(options)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    if options.docs:
        update_page(Path(options.docs), text)
    print(f"written: {out}{f' and {options.docs}' if options.docs else ''}")


if __name__ == "__main__":
    main()
