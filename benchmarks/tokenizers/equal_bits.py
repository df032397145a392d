"""Every tokenizer at equal bits and equal training time, and how well the same prior learns its tokens.

    pip install -e ".[dev]"
    python -m benchmarks.tokenizers.equal_bits data=openmoji only=                      # how long a step takes
    python -m benchmarks.tokenizers.equal_bits data=openmoji minutes=4 gpt_minutes=4    # 576 bits: 8x8 ids of 512
    python -m benchmarks.tokenizers.equal_bits data=fashion_mnist minutes=3 seeds=3     # 392 bits: 7x7 ids of 256
    python -m benchmarks.tokenizers.equal_bits data=digits minutes=0.02 gpt_minutes=0.02 limit=200 only=ema,fsq  # runs?
    python -m benchmarks.tokenizers.equal_bits data=digits "model.widths=[32]" train.batch_size=16 gpt.model.depth=2
    python -m benchmarks.tokenizers.equal_bits set=peers data=openmoji minutes=3 gpt_minutes=0 threads=1  # peers
    python -m benchmarks.tokenizers.equal_bits set=rows data=openmoji gpt.model.dim=64 gpt.train.batch_size=32  # titok

Images, networks and optimizer are those of `configs/tokenizer/vqvae_{data}.yaml`; a contender replaces the quantizer
(or the tokenizer, or adds a critic) and keeps the bits of an image as nearly as it can. The images are in the folder
`source=`, or called `data` in the folder SMALTI_DATA or ../shared/data, or where the preset says. A key with a dot
changes that preset for all contenders, with `gpt.` before it the prior's.

With `set=peers` the contenders are other networks: the preset's, the decoder of before it (`nearest`), `vqgan`, `vit`
and diffusers' `VQModel`, each in three sizes with the preset's training; a second table has each at its best size. To
train them otherwise, say how, as train.optimizer=adamw train.lr=1e-3, and choose another `out`. With `set=rows` they
are `titok`, with nested dropout and without, `vit` and the preset without its critic;
`benchmarks/tokenizers/prefixes.py` has what the first tokens of a `titok` hold.

Equal time: first a step of every contender is timed, in turn, in one pass (medians of CPU seconds, kept as `steps.json`
under `out`). Then each trains for as many steps as fit into `minutes`, whatever else the machine does by then. The
GPT of `configs/prior/gpt_{data}.yaml` is trained on the tokens of each for `gpt_minutes`, likewise. What is finished
stays under `out` and is not done again; several processes may share it, with different `only=ema,lfq`, once the steps
are timed. A contender that is timed later is timed beside `ema`, and scaled by how long that took before. With
`seeds=3` all is trained three times, from other weights and in another order of the images.

PSNR (dB), SSIM, usage and perplexity of ids: over all held-out images. bits per image: what the ids could hold. GPT:
-log2 p of the held-out tokens given their labels, per token and per image. Figures are means over seeds, +- half of the
95 % t-interval. `rate_distortion.png` has the GPT's bits of an image against the PSNR: a tokenizer is better than
another only if it is above it at no more bits. With `gpt_minutes=0` there is no GPT, and no such picture.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

from benchmarks.support.contenders.nodes import (
    Node,
    images_of,
    missing,
    read_presets,
    tokenizer_node,
    train_node,
    trainable,
    with_seed,
    write_node,
)
from benchmarks.support.contenders.peers import peers
from benchmarks.support.contenders.pictures import picture_row, rate_distortion, sheet
from benchmarks.support.contenders.quantizers import contenders
from benchmarks.support.contenders.rows import rows
from benchmarks.support.contenders.table import best_sizes, line, ranked, table
from benchmarks.support.contenders.times import TIMED_IMAGES, timed
from benchmarks.support.options import choose, read_options, read_value, use_threads
from benchmarks.support.tables import write_whole
from benchmarks.support.timing import steps_within

SETS = {"quantizers": (contenders, "ema"), "peers": (peers, "subpixel-medium"), "rows": (rows, "vqvae")}
"""What is compared, and which of it is timed in every pass."""

VARIANTS = {"digits": 4, "openmoji": 8}  # augmented copies of each image for the GPT, where there are few images
SHOWN = 10  # images in the picture
OPTIONS = {
    "set": "quantizers",
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
    """The tokenizer, its tokens, and the GPT on them, by the verbs; without a GPT the tokenizer alone."""
    from pipelines import encode, train_prior, train_tokenizer

    train_tokenizer.main(["--config", write_node(node, folder / "tokenizer.yaml")])
    if gpt is None:
        return
    tokens = folder / "tokens"
    if not (tokens / "manifest.json").is_file():
        encode.main([f"tokenizer={folder / 'run' / 'tokenizer'}", f"out={tokens}", f"augmentations={variants}"])
    train_prior.main(["--config", write_node({**gpt, "tokens": str(tokens)}, folder / "gpt.yaml")])


def measure(folder: Path) -> Node:
    """The figures of a trained contender; its reconstructions, and what they are of, as pictures in `folder`."""
    import torch

    from pipelines.images import DataConfig, load_images
    from pipelines.metrics.reconstruction import evaluate_reconstruction
    from pipelines.provenance import data_beside
    from tokenizer import Tokenizer
    from tokenizer.model import PROVENANCE

    place = folder / "run" / "tokenizer"
    tokenizer, data = Tokenizer.from_pretrained(place), data_beside(place / PROVENANCE)
    images = load_images(DataConfig.model_validate(data)).held_out
    shown = images.batch(torch.linspace(0, len(images) - 1, SHOWN).long())
    picture_row(shown).save(folder / "originals.png")
    with torch.inference_mode():
        picture_row(tokenizer.decode(tokenizer.encode(shown))).save(folder / "reconstructions.png")
    found, grid = evaluate_reconstruction(tokenizer, images, ssim_images=len(images)), tokenizer.grid
    return {
        "vocab_size": grid.vocab_size,
        "tokens": len(grid),
        "bits": len(grid) * math.log2(grid.vocab_size),
        **{name: value for name, value in found.items() if name.startswith(("psnr", "ssim"))},
        "usage": found["codebook_usage"],
        "perplexity": found["codebook_perplexity"],
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        **bits_of(folder),
    }


def bits_of(folder: Path) -> Node:
    """What a GPT, if one was trained, needs for a held-out token."""
    from pipelines import ImagePipeline
    from pipelines.metrics.likelihood import bits_per_token
    from pipelines.tokens import load_tokens

    if not (folder / "gpt" / "pipeline").is_dir():
        return {}
    prior, data = ImagePipeline.from_pretrained(folder / "gpt" / "pipeline").prior, load_tokens(folder / "tokens")
    return {"bits_per_token": bits_per_token(prior, data.splits["test"])}


def contend(name: str, spec: Node, presets: dict[str, Node], times: Node, settings: Node, out: Path) -> Node:
    """Train and measure one contender; its figures, kept in `out`."""
    path, folder = out / name / "figures.json", out / name
    if path.is_file():
        return json.loads(path.read_text())
    seconds, gpt_seconds = times["tokenizer"].get(name), times["gpt"].get(times["grids"][name])
    steps = steps_within(settings["minutes"], seconds) if seconds else 1
    gpt_steps = steps_within(settings["gpt_minutes"], gpt_seconds) if settings["gpt_minutes"] else 0
    print(f"{name}: {steps} steps, then {gpt_steps} of the GPT", file=sys.stderr, flush=True)
    node = tokenizer_node(presets["tokenizer"], spec, settings["source"], settings["limit"], steps, folder / "run")
    gpt_train = train_node(presets["gpt"], gpt_steps)
    gpt = {**presets["gpt"], "out": str(folder / "gpt"), "track": {"wandb": "disabled"}, "train": gpt_train}
    train(node, gpt if gpt_steps else None, settings["augmentations"], folder)
    counted = {"seconds_per_step": seconds, "steps": steps if seconds else None, "gpt_steps": gpt_steps}
    figures = {**measure(folder), **counted}
    write_whole(figures, path)
    return figures


# The command line ---------------------------------------------------------------------------------


def agreed(settings: Node, path: Path) -> None:
    """Keep the settings with the first contender; exits where they were others."""
    if not path.is_file():
        write_whole(settings, path)
    kept = json.loads(path.read_text())
    if other := [key for key in settings if settings[key] != kept.get(key)]:
        raise SystemExit(f"{path.parent}: was made with {other[0]}={kept.get(other[0])}; choose another out=")


def settings_of(options: SimpleNamespace) -> Node:
    """What all contenders of a folder share."""
    variants, name = options.augmentations, options.data
    return {
        "minutes": options.minutes,
        "gpt_minutes": options.gpt_minutes,
        "augmentations": read_value("augmentations", variants, 0) if variants else VARIANTS.get(name, 0),
        "limit": options.limit or None,
        "source": images_of(name, options.source),
        "changes": options.changes,
    }


def compare(options: SimpleNamespace) -> None:
    """Time, train and measure what is asked for; then the table."""
    if options.set not in SETS:
        raise SystemExit(f"set={options.set}: choose among {', '.join(SETS)}")
    of_set, reference = SETS[options.set]
    out = Path(options.out).absolute() / (options.data if of_set is contenders else f"{options.data}_{options.set}")
    presets = read_presets(options.data, options.changes)
    known = of_set(presets["tokenizer"], out)
    only = choose(options.only, list(known))
    reasons = {name: reason for name in known if (reason := missing(known[name]))}
    for name, reason in reasons.items():
        print(f"{name}: left out, {reason}", flush=True)
    settings = settings_of(options)
    few = min(TIMED_IMAGES, settings["limit"] or TIMED_IMAGES)
    nodes = {
        name: tokenizer_node(presets["tokenizer"], known[name], settings["source"], few, 1, out / name)
        for name in known
        if name not in reasons
    }
    gpt = presets["gpt"] if settings["gpt_minutes"] else None
    times = timed(nodes, only, gpt, out / "steps.json", reference)
    for seed in range(options.seeds):
        folder = out / f"seed{seed}"
        specs, seeded = of_set(presets["tokenizer"], folder), with_seed(presets, seed)
        for name in [name for name in only if name not in reasons]:
            agreed(settings, out / "settings.json")
            if not trainable(specs[name]) and not (folder / "klvae" / "figures.json").is_file():
                print(f"{name}: left out until klvae, from which it starts, is finished", flush=True)
                continue
            print(line(name, [contend(name, specs[name], seeded, times, settings, folder)]), flush=True)
    report(known, times, out)


def report(known: dict[str, Node], times: Node, out: Path) -> None:
    """Times if nothing is finished yet, else the table and the pictures of all that is."""
    paths = {name: sorted(out.glob(f"seed*/{name}/figures.json")) for name in known}
    found = {name: [json.loads(path.read_text()) for path in kept] for name, kept in paths.items() if kept}
    if not found:
        for kind in ("tokenizer", "gpt"):
            print(f"ms per step, {kind}:", ", ".join(f"{n} {1e3 * s:.1f}" for n, s in times[kind].items()))
        return
    from pipelines.images.pictures import save_picture

    kept = json.loads((out / "settings.json").read_text())
    seeds = sorted({len(runs) for runs in found.values()})
    print(
        f"\n{out.name}: {kept['minutes']:g} minutes of training each, {kept['gpt_minutes']:g} of the GPT, "
        f"{times['threads']} threads, {' or '.join(map(str, seeds))} seed(s)\n"
    )
    print(table(found))
    if len(best := best_sizes(found)) < len(found):
        print(f"\neach network at its best size\n\n{table(best)}")
    print(f"\nthe same held-out images by each: {sheet(ranked(found), out)}")
    if all("bits_per_token" in run for runs in found.values() for run in runs):
        picture = rate_distortion(found, f"{out.name}: rate and distortion")
        save_picture(picture, out / "rate_distortion.png", overwrite=True)
        print(f"bits against PSNR: {out / 'rate_distortion.png'}")


def main() -> None:
    options = read_options(__doc__, OPTIONS, dotted=True)
    use_threads(options.threads)

    from pipelines.config import UserError
    from tokenizer.files import PipelineLoadError

    try:
        compare(options)
    except (UserError, PipelineLoadError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
