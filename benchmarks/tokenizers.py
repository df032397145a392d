"""Every tokenizer at equal bits and equal training time, and how well the same prior learns its tokens.

    pip install -e ".[dev]"
    python benchmarks/tokenizers.py data=openmoji only=                      # how long a step takes
    python benchmarks/tokenizers.py data=openmoji minutes=4 gpt_minutes=4    # 576 bits: 8x8 ids of 512
    python benchmarks/tokenizers.py data=fashion_mnist minutes=3 seeds=3     # 392 bits: 7x7 ids of 256
    python benchmarks/tokenizers.py data=digits minutes=0.02 gpt_minutes=0.02 limit=200 only=ema,fsq  # does it run?
    python benchmarks/tokenizers.py data=digits model.widths=[32] train.batch_size=16 gpt.model.depth=2  # or others

Images, networks and optimizer are those of `configs/tokenizer/vqvae_{data}.yaml`; a contender replaces the quantizer
(or the tokenizer, or adds a critic) and keeps the bits of an image as nearly as it can. The images are in the folder
`source=`, or called `data` in the folder SMALTI_DATA or ../shared/data, or where the preset says. A key with a dot
changes that preset for all contenders, with `gpt.` before it the prior's.

Equal time: first a step of every contender is timed, in turn, in one pass (medians of CPU seconds, kept as `steps.json`
under `out`). Then each trains for as many steps as fit into `minutes`, whatever else the machine does by then. The
GPT of `configs/prior/gpt_{data}.yaml` is trained on the tokens of each for `gpt_minutes`, likewise. What is finished
stays under `out` and is not done again; several processes may share it, with different `only=ema,lfq`, once the steps
are timed. A contender that is timed later is timed beside `ema`, and scaled by how long that took before. With
`seeds=3` all is trained three times, from other weights and in another order of the images.

PSNR (dB), SSIM, usage and perplexity of ids: over all held-out images. bits per image: what the ids could hold. GPT:
-log2 p of the held-out tokens given their labels, per token and per image. Figures are means over seeds, +- half of the
95 % t-interval. `rate_distortion.png` has the GPT's bits of an image against the PSNR: a tokenizer is better than
another only if it is above it at no more bits.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
if __name__ == "tokenizers":  # a script of this folder imports transformers, which wants the package of this name
    import importlib

    sys.path.sort(key=lambda folder: Path(folder).resolve() == HERE.resolve())  # this folder last
    del sys.modules["tokenizers"]
    importlib.import_module("tokenizers")
else:
    from pace import NEVER, TIMED_STEPS, cpu_seconds_of, interval, stepper, steps_within, with_interval, write_whole
    from sampling import table_head

ROOT = HERE.parent
REFERENCE = "ema"
VARIANTS = {"digits": 4, "openmoji": 8}  # augmented copies of each image for the GPT, where there are few images
TIMED_IMAGES = 512
SHOWN, SHOWN_SIDE = 10, 96
CRITIC = {"weight": 0.4, "adaptive": True, "width": 32, "layers": 2, "lr": 2.0}
OPTIONS = ("data", "source", "limit", "augmentations", "minutes", "gpt_minutes", "seeds", "only", "threads", "out")

Node = dict[str, Any]


# Contenders ---------------------------------------------------------------------------------------


def shares(bits: int) -> tuple[int, int]:
    """Into how many ids of how many values the bits of a position are split: 8 into 2 of 16, 9 into 3 of 8; 7, which
    cannot be, into 2 of 11."""
    levels = 3 if bits % 2 and not bits % 3 else 2
    return levels, round(2 ** (bits / levels))


def scalars(bits: int) -> list[int]:
    """Levels of FSQ whose product is 2^bits, none above 8."""
    parts = -(-bits // 3)
    return sorted((2 ** (bits // parts + (k < bits % parts)) for k in range(parts)), reverse=True)


def quantizers(bits: int, dim: int) -> dict[str, Node]:
    """The quantizers, each with `bits` bits at a position, and codes of width `dim` where there are any."""
    book = {"codes": 2**bits, "dim": dim}
    levels, each = shares(bits)
    return {
        "ema": {"kind": "ema", **book},
        "vq": {"kind": "vq", **book},
        "vq_rotation": {"kind": "vq", **book, "gradient": "rotation"},
        "vq_normalized": {"kind": "vq", "codes": 2**bits, "dim": 8, "normalize": True},
        "simvq": {"kind": "simvq", **book},
        "ibq": {"kind": "ibq", **book},
        "gumbel": {"kind": "gumbel", **book},
        "fsq": {"kind": "fsq", "levels": scalars(bits)},
        "lfq": {"kind": "lfq", "bits": bits},
        "bsq": {"kind": "bsq", "bits": bits},
        "rvq": {"kind": "rvq", "depth": levels, "book": {"kind": "ema", "codes": each, "dim": dim}},
    }


def contenders(preset: Node, out: Path) -> dict[str, Node]:
    """What each contender says on top of the tokenizer's preset, by name."""
    model = preset["model"]
    codes, dim = model["quantizer"]["codes"], model["quantizer"]["dim"]
    bits = round(math.log2(codes))
    levels, each = shares(bits)
    shape = {key: value for key, value in model.items() if key not in ("kind", "quantizer")}
    found = {name: {"model": {**model, "quantizer": node}} for name, node in quantizers(bits, dim).items()}
    ema = found[REFERENCE]["model"]
    found["critic"] = {"model": ema, "critic": CRITIC}
    found["vit"] = {"model": {"kind": "vit", "factor": model["factor"], "quantizer": ema["quantizer"]}}
    vae = {"kind": "klvae", **shape, "latent": levels, "bins": each}
    binned = {"kind": "posthoc", "bins": each, "vae": vae}
    found["klvae"] = {"model": vae}
    found["posthoc"] = {"model": binned, "init": str(out / "klvae" / "run" / "tokenizer")}
    return found


def missing(spec: Node) -> str | None:
    """What a contender needs and is not there, if anything."""
    from pipelines.train_tokenizer import TrainTokenizerConfig
    from tokenizer import Tokenizer
    from tokenizer.quantizers import Quantizer

    model = spec["model"]
    if model["kind"] not in Tokenizer.available():
        return f"there is no tokenizer {model['kind']!r}"
    if model.get("quantizer", {"kind": "ema"})["kind"] not in Quantizer.available():
        return f"there is no quantizer {model['quantizer']['kind']!r}"
    strange = [key for key in spec if key not in TrainTokenizerConfig.model_fields]
    return f"train_tokenizer has no {strange[0]!r}" if strange else None


def trainable(spec: Node) -> bool:
    """Whether it takes training steps; what starts from another tokenizer takes none."""
    return "init" not in spec


# Configurations -----------------------------------------------------------------------------------


def images_of(name: str, given: str | None) -> str | None:
    """The folder of the images, or None for what the preset says."""
    folder = Path(os.environ.get("SMALTI_DATA") or ROOT.parent / "shared" / "data") / name
    return given or (str(folder) if folder.is_dir() else None)


def tokenizer_node(preset: Node, spec: Node, source: str | None, limit: int | None, steps: int, run: Path) -> Node:
    """The configuration of `train_tokenizer` for so many steps."""
    data = {**preset["data"], **({"source": source} if source else {}), "limit": limit}
    return {
        **preset,
        "data": data,
        "out": str(run),
        "track": {"wandb": "disabled"},
        **paced(spec, steps),
        "train": train_node(preset, steps),
    }


def paced(spec: Node, steps: int) -> Node:
    """A contender with what it does by steps fitted to so many of them: a critic learns alone for a fifth, and is
    listened to more and more for another; Gumbel noise cools over three quarters."""
    model = spec["model"]
    if model.get("quantizer", {}).get("kind") == "gumbel":
        model = {**model, "quantizer": {**model["quantizer"], "anneal_steps": 3 * steps // 4}}
    if "critic" in spec:
        spec = {**spec, "critic": {**spec["critic"], "warmup": steps // 5, "ramp": steps // 5}}
    return {**spec, "model": model}


def train_node(preset: Node, steps: int) -> Node:
    """A preset's `train` with another end. Resume states are written now and then, for an interrupted benchmark."""
    never = {"evaluate_every": NEVER, "preview_every": NEVER, "save_every": 500}
    return {**preset["train"], "steps": steps, "minutes": None, **never}


def write_node(node: Node, path: Path) -> str:
    """The configuration as a file for --config."""
    from pipelines.config.arguments import write_yaml

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write_yaml(node))
    return str(path)


# Timing -------------------------------------------------------------------------------------------


def tokenizer_times(nodes: dict[str, Node], folder: Path) -> dict[str, float]:
    """Median seconds of a training step of each."""
    import torch

    from pipelines.config.command import parse
    from pipelines.train_tokenizer import TokenizerTask, TrainTokenizerConfig

    with contextlib.ExitStack() as stack:
        steps = []
        for name, node in nodes.items():
            argv = ["--config", write_node(node, folder / f"{name}.yaml")]
            config = parse(TrainTokenizerConfig, argv, verb="train_tokenizer", description="")
            torch.manual_seed(config.train.seed)
            steps.append(stack.enter_context(stepper(TokenizerTask(config), config)))
        return dict(zip(nodes, cpu_seconds_of(steps), strict=True))


def untrained(node: Node, folder: Path) -> Any:
    """An untrained tokenizer of a configuration: its grid is what counts."""
    from pipelines.config.command import parse
    from pipelines.train_tokenizer import TrainTokenizerConfig, build_tokenizer

    argv = ["--config", write_node({**node, "init": None}, folder / "grid.yaml")]
    config = parse(TrainTokenizerConfig, argv, verb="train_tokenizer", description="")
    channels, *size = config.data.image_shape
    return build_tokenizer(config.model, tuple(size), channels)


def gpt_times(tokenizers: dict[str, Any], preset: Node, folder: Path) -> dict[str, float]:
    """Median seconds of a training step of the GPT on random ids of each tokenizer's grid."""
    import torch

    from pipelines.config.command import parse
    from pipelines.tokens import TokenDataset, TokenSplit
    from pipelines.train_prior import PriorTask, TrainPriorConfig

    with contextlib.ExitStack() as stack:
        steps = []
        for name, tokenizer in tokenizers.items():
            grid, tokens = tokenizer.grid, folder / "tokens" / name
            split = TokenSplit(torch.randint(grid.vocab_size, (TIMED_IMAGES, *grid.shape)), torch.zeros(TIMED_IMAGES))
            both = {"train": split, "test": split}
            TokenDataset(grid, [str(k) for k in range(10)], both, tokenizer, {}).save(tokens)
            node = {**preset, "tokens": str(tokens), "out": str(folder), "track": {"wandb": "disabled"}}
            argv = ["--config", write_node(node, folder / f"{name}.yaml")]
            config = parse(TrainPriorConfig, argv, verb="train_prior", description="")
            steps.append(stack.enter_context(stepper(PriorTask(config), config)))
        return dict(zip(tokenizers, cpu_seconds_of(steps), strict=True))


def scaled(before: dict[str, float], now: dict[str, float], reference: str) -> dict[str, float]:
    """Times of two passes, the later one in units of the earlier: by the reference, which was timed in both."""
    factor = before[reference] / now[reference] if before else 1.0
    return {**{name: seconds * factor for name, seconds in now.items()}, **before}


def grid_name(grid: Any) -> str:
    """`8x8x512`: the GPT takes equally long on equal grids."""
    return "x".join(map(str, (*grid.shape, grid.vocab_size)))


def timed(nodes: dict[str, Node], only: list[str], gpt: Node, path: Path) -> Node:
    """Seconds per step of `tokenizer` by contender and of `gpt` by grid, kept in `path`. The first pass times all, a
    later one those of `only` that are new."""
    kept = json.loads(path.read_text()) if path.is_file() else {"tokenizer": {}, "gpt": {}, "grids": {}}
    new = [name for name in nodes if name not in kept["grids"] and (name in only or not kept["grids"])]
    if not new:
        return kept
    wanted = [REFERENCE, *(name for name in new if name != REFERENCE)]
    print(f"timing {TIMED_STEPS} steps of {', '.join(wanted)}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {name: untrained(nodes[name], folder) for name in wanted}
        grids = {grid_name(model.grid): model for model in models.values()}
        chosen = {name: nodes[name] for name in wanted if trainable(nodes[name])}
        seconds, gpt_seconds = tokenizer_times(chosen, folder), gpt_times(grids, gpt, folder)
    reference = grid_name(models[REFERENCE].grid)
    found = {
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "machine": platform.processor() or platform.machine(),
        "tokenizer": scaled(kept["tokenizer"], seconds, REFERENCE),
        "gpt": scaled(kept["gpt"], gpt_seconds, reference),
        "grids": {**{name: grid_name(model.grid) for name, model in models.items()}, **kept["grids"]},
    }
    write_whole(found, path)
    return found


# Training and measuring ---------------------------------------------------------------------------


def train(node: Node, gpt: Node, variants: int, folder: Path) -> None:
    """The tokenizer, its tokens, and the GPT on them, by the verbs."""
    from pipelines import encode, train_prior, train_tokenizer

    train_tokenizer.main(["--config", write_node(node, folder / "tokenizer.yaml")])
    tokens = folder / "tokens"
    if not (tokens / "manifest.json").is_file():
        encode.main([f"tokenizer={folder / 'run' / 'tokenizer'}", f"out={tokens}", f"augmentations={variants}"])
    train_prior.main(["--config", write_node({**gpt, "tokens": str(tokens)}, folder / "gpt.yaml")])


def similarity(tokenizer: Any, images: Any) -> float:
    """Mean SSIM of all images and their reconstructions."""
    import torch

    from pipelines.metrics.quality import ssim

    found = []
    with torch.inference_mode():
        for rows in torch.arange(len(images)).split(256):
            batch = images.batch(rows)
            found.append(ssim(batch, tokenizer.decode(tokenizer.encode(batch))))
    return float(torch.cat(found).mean())


def picture_row(images: Any) -> Any:
    """Images `(n, C, H, W)` side by side, as a PIL image."""
    from PIL import Image

    from pipelines.images.pictures import grid_picture

    return Image.fromarray(grid_picture(images, len(images), min_side=SHOWN_SIDE))


def measure(folder: Path) -> Node:
    """The figures of a trained contender; its reconstructions, and what they are of, as pictures in `folder`."""
    import torch

    from pipelines import ImagePipeline
    from pipelines.images import DataConfig, load_images
    from pipelines.metrics.likelihood import bits_per_token
    from pipelines.metrics.reconstruction import evaluate_reconstruction
    from pipelines.tokens import load_tokens

    pipe, data = ImagePipeline.from_pretrained(folder / "gpt" / "pipeline"), load_tokens(folder / "tokens")
    images = load_images(DataConfig.model_validate(data.source["data"])).held_out
    shown = images.batch(torch.linspace(0, len(images) - 1, SHOWN).long())
    picture_row(shown).save(folder / "originals.png")
    picture_row(pipe.tokenizer.decode(pipe.tokenizer.encode(shown))).save(folder / "reconstructions.png")
    found = evaluate_reconstruction(pipe.tokenizer, images)
    return {
        "vocab_size": data.grid.vocab_size,
        "tokens": len(data.grid),
        "bits": len(data.grid) * math.log2(data.grid.vocab_size),
        "psnr": found["psnr"],
        "ssim": similarity(pipe.tokenizer, images),
        "usage": found["codebook_usage"],
        "perplexity": found["codebook_perplexity"],
        "parameters": sum(p.numel() for p in pipe.tokenizer.parameters()),
        "bits_per_token": bits_per_token(pipe.prior, data.splits["test"]),
    }


def contend(name: str, spec: Node, presets: dict[str, Node], times: Node, settings: Node, out: Path) -> Node:
    """Train and measure one contender; its figures, kept in `out`."""
    path, folder = out / name / "figures.json", out / name
    if path.is_file():
        return json.loads(path.read_text())
    seconds, gpt_seconds = times["tokenizer"].get(name), times["gpt"][times["grids"][name]]
    steps = steps_within(settings["minutes"], seconds) if seconds else 1
    gpt_steps = steps_within(settings["gpt_minutes"], gpt_seconds)
    print(f"{name}: {steps} steps, then {gpt_steps} of the GPT", file=sys.stderr, flush=True)
    node = tokenizer_node(presets["tokenizer"], spec, settings["source"], settings["limit"], steps, folder / "run")
    gpt_train = train_node(presets["gpt"], gpt_steps)
    gpt = {**presets["gpt"], "out": str(folder / "gpt"), "track": {"wandb": "disabled"}, "train": gpt_train}
    train(node, gpt, settings["augmentations"], folder)
    counted = {"seconds_per_step": seconds, "steps": steps if seconds else None, "gpt_steps": gpt_steps}
    figures = {**measure(folder), **counted}
    write_whole(figures, path)
    return figures


def with_seed(presets: dict[str, Node], seed: int) -> dict[str, Node]:
    """Both presets with another seed."""
    return {kind: {**preset, "train": {**preset["train"], "seed": seed}} for kind, preset in presets.items()}


# The table ----------------------------------------------------------------------------------------


def line(name: str, runs: list[Node]) -> str:
    """A row of the table: `runs` are the figures of each seed."""
    first = runs[0]

    def each(figure: str, digits: int, scale: float = 1.0) -> str:
        return with_interval([scale * run[figure] for run in runs], digits)

    cells = [
        name,
        f"{first['tokens']} of {first['vocab_size']}",
        f"{first['bits']:.1f}".removesuffix(".0"),
        each("psnr", 2),
        each("ssim", 4),
        each("usage", 1, 100) + " %",
        each("perplexity", 1),
        f"{1e3 * first['seconds_per_step']:.1f}" if first["seconds_per_step"] else "",
        f"{first['steps']:,}" if first["steps"] else "",
        each("bits_per_token", 4),
        each("bits_per_token", 1, first["tokens"]),
    ]
    return f"| {' | '.join(cells)} |"


def ranked(found: dict[str, list[Node]]) -> list[str]:
    """Names, best reconstructions first."""
    return sorted(found, key=lambda name: -statistics.mean(run["psnr"] for run in found[name]))


def show(found: dict[str, list[Node]]) -> None:
    """The table."""
    print(
        table_head(
            "tokenizer",
            "ids",
            "bits per image",
            "PSNR, dB",
            "SSIM",
            "usage",
            "perplexity",
            "ms per step",
            "steps",
            "GPT: bits per token",
            "GPT: bits per image",
        )
    )
    for name in ranked(found):
        print(line(name, found[name]))


def rate_distortion(found: dict[str, list[Node]], title: str) -> Any:
    """The GPT's bits of an image against the PSNR: a dot for each tokenizer, and a cross as wide and as high as the
    95 % intervals over seeds. Tokenizers that another one beats in both are grey."""
    from pipelines.metrics.charts import BLUE, GREY, INK, charts_in_row, few_ticks, head
    from pipelines.metrics.pages import page

    rates = {name: [run["bits_per_token"] * run["tokens"] for run in runs] for name, runs in found.items()}
    levels = {name: [run["psnr"] for run in runs] for name, runs in found.items()}
    at = {name: (statistics.mean(rates[name]), statistics.mean(levels[name])) for name in found}
    x_values, y_values = zip(*at.values(), strict=True)

    def draw(axes: Any) -> None:
        head(axes, "", "held-out PSNR, dB")
        axes.set(xlim=(0.9 * min(x_values), 1.08 * max(x_values)), ylim=(min(y_values) - 0.4, max(y_values) + 0.4))
        axes.set_xlabel("bits of an image's tokens under the GPT")
        few_ticks(axes.xaxis, 8)
        few_ticks(axes.yaxis, 4)
        for name, (rate, level) in at.items():
            beaten = any(r <= rate and p >= level for other, (r, p) in at.items() if other != name)
            halves = [0.0 if math.isnan(half) else half for half in (interval(rates[name]), interval(levels[name]))]
            axes.errorbar(rate, level, halves[1], halves[0], color=GREY, linewidth=1)
            axes.plot(rate, level, "o", color=GREY if beaten else BLUE, markersize=8)
            axes.annotate(name, (rate, level), (7, 7), textcoords="offset points", color=GREY if beaten else INK)

    return page(title, [], [charts_in_row([draw], 760, 480)])


def sheet(names: list[str], out: Path) -> Path:
    """The same held-out images, and under them the reconstructions of each contender, with its name at the left."""
    from PIL import Image, ImageDraw, ImageFont

    first = {name: next(iter(sorted(out.glob(f"seed*/{name}")))) for name in names}
    paths = {"held-out images": first[names[0]] / "originals.png"}
    paths |= {name: folder / "reconstructions.png" for name, folder in first.items()}
    rows, title = {name: Image.open(path).convert("RGB") for name, path in paths.items()}, 150
    width, height = next(iter(rows.values())).size
    picture = Image.new("RGB", (title + width, len(rows) * height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(17)
    for index, (name, row) in enumerate(rows.items()):
        draw.text((6, index * height + height // 2 - 10), name, fill="black", font=font)
        picture.paste(row, (title, index * height))
    picture.save(out / "reconstructions.png")
    return out / "reconstructions.png"


def agreed(settings: Node, path: Path) -> None:
    """Keep the settings with the first contender; exits where they were others."""
    if not path.is_file():
        write_whole(settings, path)
    kept = json.loads(path.read_text())
    if other := [key for key in settings if settings[key] != kept.get(key)]:
        raise SystemExit(f"{path.parent}: was made with {other[0]}={kept.get(other[0])}; choose another out=")


def read_presets(name: str, changes: list[str]) -> dict[str, Node]:
    """The two presets of a data set, with `key.path=value` changes; exits where there are none."""
    from pipelines.config.arguments import read_file, read_override
    from tokenizer.settings import merge

    paths = {"tokenizer": f"tokenizer/vqvae_{name}.yaml", "gpt": f"prior/gpt_{name}.yaml"}
    if absent := [path for path in paths.values() if not (ROOT / "configs" / path).is_file()]:
        raise SystemExit(f"data={name}: there is no preset configs/{absent[0]}")
    presets = {kind: read_file(str(ROOT / "configs" / path)) for kind, path in paths.items()}
    for change in changes:
        presets = merge(presets, read_override(change if change.startswith("gpt.") else f"tokenizer.{change}"))
    return presets


def compare(name: str, options: dict[str, str], changes: list[str]) -> None:
    """Time, train and measure what is asked for; then the table."""
    out = Path(options.get("out", "runs/tokenizers")).absolute() / name
    presets = read_presets(name, changes)
    known = contenders(presets["tokenizer"], out)
    only = [part for part in options.get("only", ",".join(known)).split(",") if part]
    if strange := [part for part in only if part not in known]:
        raise SystemExit(f"only={strange[0]}: choose among {', '.join(known)}")
    reasons = {part: reason for part in known if (reason := missing(known[part]))}
    for part, reason in reasons.items():
        print(f"{part}: left out, {reason}", flush=True)
    settings = {
        "minutes": float(options.get("minutes", 3)),
        "gpt_minutes": float(options.get("gpt_minutes", 3)),
        "augmentations": int(options.get("augmentations", VARIANTS.get(name, 0))),
        "limit": int(options["limit"]) if "limit" in options else None,
        "source": images_of(name, options.get("source")),
        "changes": changes,
    }
    few = min(TIMED_IMAGES, settings["limit"] or TIMED_IMAGES)
    nodes = {
        part: tokenizer_node(presets["tokenizer"], known[part], settings["source"], few, 1, out / part)
        for part in known
        if part not in reasons
    }
    times = timed(nodes, only, presets["gpt"], out / "steps.json")
    for seed in range(int(options.get("seeds", 1))):
        folder = out / f"seed{seed}"
        specs, seeded = contenders(presets["tokenizer"], folder), with_seed(presets, seed)
        for part in [part for part in only if part not in reasons]:
            agreed(settings, out / "settings.json")
            if not trainable(specs[part]) and not (folder / "klvae" / "figures.json").is_file():
                print(f"{part}: left out until klvae, from which it starts, is finished", flush=True)
                continue
            print(line(part, [contend(part, specs[part], seeded, times, settings, folder)]), flush=True)
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
    show(found)
    save_picture(rate_distortion(found, f"{out.name}: rate and distortion"), out / "rate_distortion.png")
    print(f"\nthe same held-out images by each: {sheet(ranked(found), out)}")
    print(f"bits against PSNR: {out / 'rate_distortion.png'}")


def main() -> None:
    changes = [argument for argument in sys.argv[1:] if "." in argument.partition("=")[0]]
    options = dict(argument.split("=", 1) for argument in sys.argv[1:] if argument not in changes)
    if strange := [key for key in options if key not in OPTIONS]:
        raise SystemExit(f"{strange[0]}: unknown; there are {', '.join(OPTIONS)}, and keys of the presets, with a dot")
    os.environ["OMP_NUM_THREADS"] = options.get("threads") or os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
    import torch

    from pipelines.config import UserError
    from tokenizer.files.errors import PipelineLoadError

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        compare(options.get("data", "fashion_mnist"), options, changes)
    except (UserError, PipelineLoadError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
