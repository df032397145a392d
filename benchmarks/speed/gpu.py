"""Measure training, sampling and encoding on a GPU, next to reference models, in one table.

    pip install -e ".[dev,benchmarks]"
    python -m benchmarks.speed.gpu
    python -m benchmarks.speed.gpu docs=docs/results.md    # also update the page
    python -m benchmarks.speed.gpu device=cpu tiny=true repeats=1 out=build/trial.md    # a trial run without a GPU

`make gpu` runs the tests marked `gpu` first. Weights, tokens and images are random. Sizes are those of the ImageNet
presets with the share of one GPU of eight: 32 images of 16x16 ids of 16,384 for `gpt_imagenet256`, 16 of 256x256 pixels
for `vqgan_imagenet256`, without its perceptual network.

step: a step of the training loop under bf16 autocast, with data loading, clipping, checks and averaged weights; for
references, forward, backward, clipping and fused AdamW. It is a tenth of ten in a row. host: time until the call
returns. of peak: FLOPs by torch's counter (attention as two full products) over time, as a share of the card's
published bf16 peak; for unknown cards, of the measured peak of a matrix product of side 8192. memory: peak bytes of
tensors in a step; over plan: as a share of the estimate of `smalti plan`. Sampling is without guidance, from logits of
standard deviation 3, with one CUDA graph for all steps; "kernel by kernel" is without it, as with a step callback.
GPT-2 has a static cache and is compiled, and kernel by kernel a growing one. A token step is the time of a call divided
by the tokens of an image. Medians of `repeats` calls. The table is written to `out`, and replaces the section `## On a
GPU` of the page `docs`. A row that fails has its error, and the exit code is 1.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

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
from benchmarks.support.references import Reference
from benchmarks.support.tables import table_head, table_row

PARTS = ("training", "sampling", "coding")
HEADING = "## On a GPU"


def training_rows(card: Card, sizes: Sizes, folder: Path, repeats: int) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield names and measurements of training steps: both stages, eager and compiled, and the references."""
    at_once = [f"critic.{name}=0" for name in ("start", "warmup", "ramp")]
    gpt, vqgan = prior_arguments(folder, sizes), tokenizer_arguments(folder, sizes, "critic.weight=0")
    cases = {
        "gpt_imagenet256": gpt,
        "vqgan_imagenet256, without critic": vqgan,
        "vqgan_imagenet256": tokenizer_arguments(folder, sizes, *at_once),
    }
    flops: dict[str, float] = {}
    for name, argv in cases.items():
        for label, compiled in ((name, "false"), (f"{name}, compiled", "true")):
            yield label, partial(measure_loop, card, label, [*argv, f"train.compile={compiled}"], repeats, flops)

    def measure(name: str, build: Callable[[], Reference], images: int, same: str) -> str:
        return measure_reference(card, name, build, images, flops.get(same), repeats)

    few, without_critic = max(2, sizes.images // 2), list(cases)[1]
    build = partial(reference_tokenizer, card, model_config(vqgan), few)
    yield "diffusers VQModel", partial(measure, "diffusers VQModel", build, few, without_critic)
    build = partial(reference_prior, card, model_config(gpt), sizes)
    yield "transformers GPT-2", partial(measure, "transformers GPT-2", build, sizes.images, "gpt_imagenet256")


def measure_parts(card: Card, sizes: Sizes, only: list[str], repeats: int, failed: list[str]) -> Iterator[str]:
    """The lines of all tables. failed: receives the names of rows that could not be measured."""

    def attempt(name: str, head: Sequence[str], measure: Callable[[], str]) -> str:
        """Return a row, or one with the error, as the others are worth measuring without it."""
        try:
            return measure()
        except (Exception, SystemExit) as error:  # a command exits on a user's mistake
            traceback.print_exc()
            failed.append(name)
            reason = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".replace("|", "/")
            return table_row([name, reason[:200], *[""] * (len(head) - 2)])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes.write_data(folder)
        if "training" in only:
            yield table_head(*HEAD)
            for label, measure in training_rows(card, sizes, folder, repeats):
                yield attempt(label, HEAD, measure)
            yield ""
        torch.backends.cudnn.benchmark = False  # as when a pipeline is used
        if card.device.type == "cuda":
            torch.cuda.empty_cache()
        parts = {
            "sampling": (SAMPLING_HEAD, sampling_rows, prior_arguments),
            "coding": (CODING_HEAD, coding_rows, tokenizer_arguments),
        }
        for part, (head, rows, arguments) in parts.items():
            if part in only:
                yield table_head(*head)
                for label, images, cells in rows(card, model_config(arguments(folder, sizes)), sizes, repeats):
                    measure = lambda: table_row([label, images, *cells()])  # noqa: B023, E731
                    yield attempt(label, head, measure)
                yield ""


def describe_setup(card: Card) -> str:
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


def run(options: SimpleNamespace) -> tuple[str, list[str]]:
    """Measure, printing each line as soon as it is known; return all lines, and the names of failed rows."""
    card = find_card(options.device, 256 if options.tiny else MATRIX)
    lines = [describe_setup(card), ""]
    print("\n".join(lines), flush=True)
    only, failed = choose(options.only, list(PARTS)), list[str]()
    for line in measure_parts(card, TINY if options.tiny else FULL, only, options.repeats, failed):
        print(line, flush=True)
        lines.append(line)
    return "\n".join(lines) + "\n", failed


def main() -> None:
    options = read_options(
        __doc__,
        {"device": "cuda", "tiny": False, "repeats": 10, "only": ",".join(PARTS), "out": "build/gpu.md", "docs": None},
    )
    require_packages("transformers", "diffusers")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    text, failed = run(options)
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    if options.docs:
        update_page(Path(options.docs), text)
    print(f"written: {out}{f' and {options.docs}' if options.docs else ''}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
