"""Compare tokenizers at equal bits and equal training time, and how well a GPT learns the tokens of each.

    pip install -e ".[dev]"
    python -m benchmarks.tokenizers.equal_bits data=openmoji only=                      # only time the steps
    python -m benchmarks.tokenizers.equal_bits data=openmoji minutes=4 gpt_minutes=4    # 704 bits: 8x8 ids of 2,048
    python -m benchmarks.tokenizers.equal_bits data=fashion_mnist minutes=3 seeds=3     # 392 bits: 7x7 ids of 256
    python -m benchmarks.tokenizers.equal_bits data=digits minutes=0.02 gpt_minutes=0.02 limit=200 only=ema,fsq  # quick
    python -m benchmarks.tokenizers.equal_bits data=digits "model.widths=[32]" train.batch_size=16 gpt.model.depth=2

Images, networks and optimizer are those of `configs/tokenizer/vqvae_{data}.yaml`. A contender replaces the quantizer or
the tokenizer, or adds a critic, and keeps the number of bits per image as close as it can. Images are read from the
folder `source=`, from `data` below SMALTI_DATA or ../shared/data, or from the preset's source. Dotted keys change the
preset for all contenders; with the prefix `gpt.` they change the prior's.

Equal time: one pass times a step of every contender in turn (median CPU seconds, cached as `steps.json` below `out`).
Each then trains for the number of steps that fit into `minutes`, so load on the machine changes no result. The GPT of
`configs/prior/gpt_{data}.yaml` is trained likewise for `gpt_minutes` on the tokens of each. Finished contenders are
read from `out`, and several processes may share it with different `only=ema,lfq` once the steps are timed. A contender
that is added later is timed together with `ema`, and its time is rescaled. `seeds=3` trains everything three times.

PSNR (dB), SSIM, usage and perplexity are over all held-out images. Bits per image: capacity of the ids. GPT: -log2 p of
held-out tokens given their labels. Values are means over seeds, +- half of the 95 % t-interval. `rate_distortion.png`
plots the GPT's bits per image against PSNR: a tokenizer is better only if its PSNR is higher at no more bits.
`gpt_minutes=0` skips the GPT.
"""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.support.contender_figures import (
    draw_rate_distortion,
    draw_reconstructions,
    format_row,
    format_table,
    picture_row,
    rank,
)
from benchmarks.support.contender_times import TIMED_IMAGES, time_steps
from benchmarks.support.contenders import (
    Node,
    contenders,
    find_images,
    is_trained,
    read_presets,
    tokenizer_node,
    train_node,
    with_seed,
    write_node,
)
from benchmarks.support.options import choose, read_options, read_value, use_threads
from benchmarks.support.tables import cache_json, write_json
from benchmarks.support.timing import steps_within
from pipelines import ImagePipeline, encode, train_prior, train_tokenizer
from pipelines.config import UserError
from pipelines.images import DataConfig, load_images
from pipelines.images.pictures import save_picture
from pipelines.metrics.likelihood import bits_per_token
from pipelines.metrics.reconstruction import evaluate_reconstruction
from pipelines.provenance import read_data_settings
from pipelines.tokens import load_tokens
from tokenizer import Tokenizer
from tokenizer.files import PipelineLoadError
from tokenizer.model import PROVENANCE

VARIANTS = {"digits": 4, "openmoji": 8}  # augmented copies per image for the GPT, for small data sets
PREVIEW_IMAGES = 10
OPTIONS = {
    "data": "fashion_mnist",
    "source": None,
    "limit": 0,
    "augmentations": None,
    "minutes": 3.0,
    "gpt_minutes": 3.0,
    "seeds": 1,
    "only": None,
    "threads": 0,
    "out": "runs/tokenizers",
}


def train(node: Node, gpt: Node | None, variants: int, folder: Path) -> None:
    """Train the tokenizer, encode the images, and train the GPT, if any."""
    train_tokenizer.main(["--config", write_node(node, folder / "tokenizer.yaml")])
    if gpt is None:
        return
    tokens = folder / "tokens"
    if not (tokens / "manifest.json").is_file():
        encode.main([f"tokenizer={folder / 'run' / 'tokenizer'}", f"out={tokens}", f"augmentations={variants}"])
    train_prior.main(["--config", write_node({**gpt, "tokens": str(tokens)}, folder / "gpt.yaml")])


def measure(folder: Path) -> Node:
    """Measure a trained contender, and save held-out images and their reconstructions in `folder`."""
    place = folder / "run" / "tokenizer"
    tokenizer, data = Tokenizer.from_pretrained(place), read_data_settings(place / PROVENANCE)
    images = load_images(DataConfig.model_validate(data)).held_out
    preview = images.batch(torch.linspace(0, len(images) - 1, PREVIEW_IMAGES).long())
    picture_row(preview).save(folder / "originals.png")
    with torch.inference_mode():
        picture_row(tokenizer.decode(tokenizer.encode(preview))).save(folder / "reconstructions.png")
    found, grid = evaluate_reconstruction(tokenizer, images, ssim_images=len(images)), tokenizer.grid
    return {
        "vocab_size": grid.vocab_size,
        "tokens": len(grid),
        "bits": len(grid) * math.log2(grid.vocab_size),
        **{name: value for name, value in found.items() if name.startswith(("psnr", "ssim"))},
        "usage": found["codebook_usage"],
        "perplexity": found["codebook_perplexity"],
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        **measure_bits(folder),
    }


def measure_bits(folder: Path) -> Node:
    """Measure the GPT's bits per held-out token, if a GPT was trained."""
    if not (folder / "gpt" / "pipeline").is_dir():
        return {}
    prior, data = ImagePipeline.from_pretrained(folder / "gpt" / "pipeline").prior, load_tokens(folder / "tokens")
    return {"bits_per_token": bits_per_token(prior, data.splits["test"])}


def train_and_measure(name: str, spec: Node, presets: dict[str, Node], times: Node, settings: Node, out: Path) -> Node:
    folder = out / name
    seconds, gpt_seconds = times["tokenizer"].get(name), times["gpt"].get(times["grids"][name])
    steps = steps_within(settings["minutes"], seconds) if seconds else 1
    gpt_steps = steps_within(settings["gpt_minutes"], gpt_seconds) if settings["gpt_minutes"] else 0
    print(f"{name}: {steps} steps, then {gpt_steps} of the GPT", file=sys.stderr, flush=True)
    node = tokenizer_node(presets["tokenizer"], spec, settings["source"], settings["limit"], steps, folder / "run")
    gpt_train = train_node(presets["gpt"], gpt_steps)
    gpt = {**presets["gpt"], "out": str(folder / "gpt"), "track": {"wandb": "disabled"}, "train": gpt_train}
    train(node, gpt if gpt_steps else None, settings["augmentations"], folder)
    counted = {"seconds_per_step": seconds, "steps": steps if seconds else None, "gpt_steps": gpt_steps}
    return {**measure(folder), **counted}


# The command line ---------------------------------------------------------------------------------


def check_settings(settings: Node, path: Path) -> None:
    """Save the settings with the first contender; exit if they differ later."""
    if not path.is_file():
        write_json(settings, path)
    saved = json.loads(path.read_text())
    if other := [key for key in settings if settings[key] != saved.get(key)]:
        raise SystemExit(f"{path.parent}: was made with {other[0]}={saved.get(other[0])}; choose another out=")


def compare(options: SimpleNamespace) -> None:
    """Time, train and measure the contenders, and print the table."""
    out = Path(options.out).absolute() / options.data
    presets = read_presets(options.data, options.changes)
    known = contenders(presets["tokenizer"], out)
    only = choose(options.only, list(known))
    source, limit = find_images(options.data, options.source), min(TIMED_IMAGES, options.limit or TIMED_IMAGES)
    variants = options.augmentations
    settings = {  # which all contenders in a folder share
        "minutes": options.minutes,
        "gpt_minutes": options.gpt_minutes,
        "augmentations": read_value("augmentations", variants, 0) if variants else VARIANTS.get(options.data, 0),
        "limit": options.limit or None,
        "source": source,
        "changes": options.changes,
    }
    nodes = {
        name: tokenizer_node(presets["tokenizer"], spec, source, limit, 1, out / name) for name, spec in known.items()
    }
    times = time_steps(nodes, only, presets["gpt"] if settings["gpt_minutes"] else None, out / "steps.json")
    for seed in range(options.seeds):
        folder = out / f"seed{seed}"
        specs, seeded = contenders(presets["tokenizer"], folder), with_seed(presets, seed)
        for name in only:
            check_settings(settings, out / "settings.json")
            if not is_trained(specs[name]) and not (folder / "klvae" / "figures.json").is_file():
                print(f"{name}: skipped until klvae is finished, because it starts from that", flush=True)
                continue
            make = partial(train_and_measure, name, specs[name], seeded, times, settings, folder)
            figures = cache_json(folder / name / "figures.json", make)
            print(format_row(name, [figures]), flush=True)
    report(list(known), times, out)


def report(known: list[str], times: Node, out: Path) -> None:
    """Print the times if nothing is finished, else the table and the paths of the pictures."""
    paths = {name: sorted(out.glob(f"seed*/{name}/figures.json")) for name in known}
    found = {name: [json.loads(path.read_text()) for path in some] for name, some in paths.items() if some}
    if not found:
        for kind in ("tokenizer", "gpt"):
            print(f"ms per step, {kind}:", ", ".join(f"{n} {1e3 * s:.1f}" for n, s in times[kind].items()))
        return
    settings = json.loads((out / "settings.json").read_text())
    seeds = sorted({len(runs) for runs in found.values()})
    print(
        f"\n{out.name}: {settings['minutes']:g} minutes of training each, {settings['gpt_minutes']:g} of the GPT, "
        f"{times['threads']} threads, {' or '.join(map(str, seeds))} seed(s)\n"
    )
    print(format_table(found))
    print(f"\nreconstructions of the same held-out images: {draw_reconstructions(rank(found), out)}")
    if all("bits_per_token" in run for runs in found.values() for run in runs):
        picture = draw_rate_distortion(found, f"{out.name}: rate and distortion")
        save_picture(picture, out / "rate_distortion.png", overwrite=True)
        print(f"bits against PSNR: {out / 'rate_distortion.png'}")


def main() -> None:
    options = read_options(__doc__, OPTIONS, dotted=True)
    use_threads(options.threads)
    try:
        compare(options)
    except (UserError, PipelineLoadError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
