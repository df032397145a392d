"""The gallery's page: picture after picture, with what made it and what was measured."""

from __future__ import annotations

import math
import platform
from typing import Any

Node = dict[str, Any]
COMMAND = "python -m benchmarks.uses.gallery"
INTRODUCTION = f"""# Gallery

What pairs of presets give: held-out images, what the tokenizer keeps of them, and samples of the prior. A column is a
class. Nothing is picked: of each class the first held-out images, and the samples of the first seeds, with the settings
that the pipeline stores. One command makes all of it, runs and page, and goes on where it was stopped; `make gallery`
installs what it needs first:

```sh
{COMMAND}
```
"""
NOTHING = "\nNo pictures yet.\n"
TITLES = {
    "train_tokenizer": "tokenizer",
    "encode": "tokens",
    "train_prior": "prior",
    "tune": "sampling settings",
    "evaluate": "evaluation",
}


def page(records: list[Node]) -> str:
    """The page of all that was made, in order."""
    parts = [section(record) for record in records]
    return INTRODUCTION + ("\n" + "\n".join(parts) if parts else NOTHING)


def section(record: Node) -> str:
    """One picture and what is below it."""
    name, figures = record["name"], record["figures"]
    rows = "\n".join(f"| {what} | {value} |" for what, value in figure_rows(figures, record))
    commands = "\n".join(record["commands"])
    return f"""## {record["title"]}

![{record["title"]}: real, reconstructed and sampled images](images/gallery/{name}.png)

{" ".join([record["about"], *notes(record)])}

| figure | value |
|---|---|
{rows}

{minutes_line(record)}

```sh
{commands}
```
"""


def notes(record: Node) -> list[str]:
    """What has to be known of the picture and the runs."""
    found = []
    if side := record.get("enlarged_from"):
        found.append(f"The images at hand have {side} pixels a side, and were enlarged.")
    if record["share"] != 1:
        found.append(f"**A trial: {record['share']:g} of the presets' training.**")
    if record["limit"]:
        found.append(f"**{record['limit']:,} training images at most.**")
    if colors := record["picture"]["colors"]:
        found.append(f"The picture was reduced to {colors} colours.")
    if "tune" not in record["minutes"]:
        found.append("The settings of sampling are the preset's.")
    return found


def minutes_line(record: Node) -> str:
    """Minutes of each stage, machine, date and seeds."""
    minutes = ", ".join(f"{TITLES[stage]} {value:.1f}" for stage, value in record["minutes"].items())
    last = record["sample_seed"] + record["samples"] - 1
    return (
        f"Minutes: {minutes}; {sum(record['minutes'].values()):.1f} in all. {record['machine']}, {record['date']}. "
        f"One run, training seed {record['seed']}; samples of seeds {record['sample_seed']} to {last}."
    )


def figure_rows(f: Node, record: Node) -> list[tuple[str, str]]:
    """The figures of `smalti evaluate`, each with what it is to be compared to."""
    shape, vocab = record["grid"], record["vocab_size"]
    bits = math.prod(shape) * math.log2(vocab)
    rows = [
        ("ids", f"{'x'.join(map(str, shape))} of {vocab}: {bits:,.0f} bits an image"),
        ("PSNR / SSIM, held out", f"{f['psnr']:.2f} dB / {f['ssim']:.3f}, {f['num_images']:,} images"),
        ("bits per token", f"{f['bits_per_token']:.3f}, uniform {f['uniform_bits_per_token']:.3f}"),
    ]
    if f.get("bits_per_dim") is not None:
        rows.append(("bits per dim", f"{f['bits_per_dim']:.3f}"))
    if "frechet_distance" in f:
        beside = ", ".join(
            f"{name} {f[f'{key}_frechet_distance']:.3f}"
            for key, name in (("train", "training images"), ("reconstruction", "their reconstructions"))
        )
        compared = f"{f['num_compared']:,} images a side"
        rows.append((f"Frechet distance, {f['feature_space']}", f"{f['frechet_distance']:.3f}; {beside}; {compared}"))
    if "class_agreement" in f:
        beside = f"real {f['real_class_agreement']:.1%}, reconstructed {f['reconstruction_class_agreement']:.1%}"
        rows.append(("class agreement", f"{f['class_agreement']:.1%}; {beside}"))
    return [*rows, ("sampling", (record["sampler"] or "as the prior is") + chosen_on(record.get("chosen_on")))]


def chosen_on(tuning: Node | None) -> str:
    """What the settings of sampling were chosen on."""
    if tuning is None:
        return ""
    from pipelines.commands.tune import FEW_VALIDATION

    few = ", which is rough" if tuning["images"] < FEW_VALIDATION else ""
    early = f"; {tuning['ended']}" if tuning["ended"] else ""
    return f"; chosen on {tuning['images']:,} validation images{few}{early}"


def machine(threads: int) -> str:
    """The processor, the threads, and torch's version."""
    import torch

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    return f"{threads} thread{'s' if threads > 1 else ''} of {name}, torch {torch.__version__.partition('+')[0]}"
