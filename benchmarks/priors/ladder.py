"""Compare all priors on the same tokens at equal training time.

    pip install -e ".[dev]"
    python -m benchmarks.priors.ladder data=digits augmentations=4 minutes=1     # 7x7 ids of 128; no download
    python -m benchmarks.priors.ladder data=fashion_mnist minutes=2 seeds=3      # 7x7 ids of 256
    python -m benchmarks.priors.ladder data=fashion_binary minutes=2 seeds=3     # 28x28 binary pixels

Each preset `configs/prior/*_{data}.yaml` is trained by `smalti train_prior` on the tokens of
`configs/tokenizer/{vqvae,pixels}_{data}.yaml` (`source=FOLDER` replaces the images), with `seeds` seeds, for the number
of steps that fit into `minutes` of CPU time. Steps are timed once, in turn, and cached as `steps.json`, so load on the
machine during training changes no result. Finished runs are read from `out`; `only=gpt,made` selects priors.

bits: -log2 p per token of the held-out split given its labels (`rows=2000`: of 2,000 evenly spaced images); nats: per
image. `<=` marks a bound. Means over seeds, +- half of the 95 % t-interval. agreement: share of 1,000 samples to which
a 1-nearest-neighbour classifier on decoded training tokens assigns the requested class; the last row is for held-out
images.

`speed=1` adds a table of sampling speed for the first seed: seconds for 64 images, classes in turn, without guidance,
median of three. Uncached sampling takes one full pass per token; if it takes over a minute, it is extrapolated from 16
passes. Parallel sampling gives the same images from fewer passes: seconds, passes per image (rows through the network /
images), and their share of the tokens. Four orders mixed: the reduction in bits per token on 2,000 images.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.support.options import ROOT, choose, read_options, use_threads
from benchmarks.support.runs import smalti, train_once
from benchmarks.support.tables import cache_json, table_head, table_row, with_interval
from benchmarks.support.timing import prior_presets, seconds_of, step_seconds, steps_within
from pipelines import ImagePipeline
from pipelines.images.pictures import save_picture
from pipelines.metrics.agreement import nearest_label
from pipelines.metrics.likelihood import bits_per_token
from pipelines.tokens import load_tokens
from prior import Prior

NEIGHBOURS, SAMPLES, TIMED, SLOW = 20_000, 1000, 64, 60.0
TOKENIZER_STEPS, MIXED_ROWS = 1500, 2000
OPTIONS = {
    "data": "fashion_mnist",
    "source": None,
    "augmentations": 0,
    "minutes": 2.0,
    "seeds": 1,
    "rows": 0,
    "only": None,
    "speed": False,
    "threads": 0,
    "out": "runs/ladder",
}


def make_tokens(data: str, source: str | None, variants: int, out: Path) -> Path:
    """Create the token dataset with the VQ-VAE or pixel preset of the data."""
    folder, images = out / "tokens", [f"data.source={source}"] if source else []
    if not (folder / "manifest.json").is_file():
        presets = [ROOT / "configs" / "tokenizer" / f"{kind}_{data}.yaml" for kind in ("vqvae", "pixels")]
        preset = next(preset for preset in presets if preset.is_file())
        ends = ["train.minutes=null", f"train.steps={TOKENIZER_STEPS}", "track.wandb=disabled"]
        smalti("train_tokenizer", "--config", str(preset), f"out={out / 'tokenizer'}", *ends, *images)
        smalti("encode", f"tokenizer={out / 'tokenizer' / 'tokenizer'}", f"out={folder}", f"augmentations={variants}")
    return folder


def time_steps(presets: dict[str, Path], tokens: Path, path: Path) -> dict[str, float]:
    """Return the CPU seconds of a training step of each preset, timed in one pass and cached in `path`."""
    fixed = [f"tokens={tokens}", f"out={path.parent}", "track.wandb=disabled"]
    arguments = {kind: ["--config", str(preset), *fixed] for kind, preset in presets.items()}
    return cache_json(path, lambda: step_seconds(arguments, of_prior=True))


def train(preset: Path, tokens: Path, steps: int, seed: int, run: Path) -> Path:
    more = (f"tokens={tokens}", f"train.seed={seed}")
    train_once("train_prior", preset, steps, run, *more, never=("preview", "save"))
    return run / "pipeline"


def time_uncached(prior: Any, labels: Any) -> tuple[float, bool]:
    """Return the seconds to sample with one full pass per token, and whether they are extrapolated."""
    tokens = torch.zeros(len(labels), *prior.grid.shape, dtype=torch.long)
    encoded = prior.encode_given(prior.read_given(labels, None, len(labels)))
    with torch.inference_mode():
        (one_pass,) = seconds_of([lambda: prior(tokens, encoded)], 3)
        if one_pass * len(prior.grid) > SLOW:
            return len(prior.grid) * seconds_of([lambda: prior(tokens, encoded)], 16)[0], True
    return seconds_of([lambda: prior.sample(len(labels), labels, cache=False)], 1)[0], False


def time_sampling(pipe: Any) -> dict[str, Any]:
    """Measure the seconds for 64 samples, and the passes per image."""
    prior, labels = pipe.prior, torch.arange(TIMED) % pipe.prior.num_classes
    figures: dict[str, Any] = {"passes": pipe.sampler.steps}
    if pipe.sampler.steps:  # a masked prior: every pass is a full one
        (figures["cached"],) = seconds_of([lambda: prior.sample(TIMED, labels, steps=pipe.sampler.steps)], 3)
        return figures
    (figures["cached"],) = seconds_of([lambda: prior.sample(TIMED, labels)], 3)
    figures["uncached"], figures["extrapolated"] = time_uncached(prior, labels)
    rows: list[int] = []
    hook = prior.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    (figures["parallel"],) = seconds_of([lambda: prior.sample(TIMED, labels, parallel=True)], 3)
    hook.remove()
    figures["parallel_passes"] = sum(rows) / TIMED / 4  # three timed runs and a warm-up
    return figures


def measure_mixture_gain(pipe: Any, split: Any) -> float | None:
    """Measure the reduction in bits per token by mixing four orders; None unless the prior supports any order."""
    if not (pipe.prior.any_order and pipe.prior.exact):
        return None
    one, four = (bits_per_token(pipe.prior, split, MIXED_ROWS, num_orders=count) for count in (1, 4))
    return one - four


def measure_agreement(pipe: Any, data: Any) -> dict[str, float]:
    """Measure the class agreement of samples, and of decoded held-out tokens."""
    train, test = data.splits["train"], data.splits["test"]
    known = pipe.decode(train.tokens[:NEIGHBOURS].long(), output_type="pt")
    real = pipe.decode(test.tokens[:SAMPLES].long(), output_type="pt")
    wanted = torch.arange(SAMPLES) % pipe.prior.num_classes
    drawn = pipe(SAMPLES, wanted.tolist(), seed=0, guidance_scale=1.0, output_type="pt", progress=False).images
    shares = [
        float((nearest_label(images, known, train.given.raw("label")[:NEIGHBOURS]) == labels).double().mean())
        for images, labels in ((drawn, wanted), (real, test.given.raw("label")[:SAMPLES]))
    ]
    return {"agreement": shares[0], "real_agreement": shares[1]}


def measure(pipe: Any, data: Any, rows: int, run: Path) -> dict[str, Any]:
    """Measure a pipeline, and save samples in `run`. rows: held-out images for bits per token, 0 for all."""
    save_picture(pipe.sample_picture(), run / "samples.png", overwrite=True)
    return {
        "parameters": sum(p.numel() for p in pipe.prior.parameters()),
        "bits": bits_per_token(pipe.prior, data.splits["test"], rows or None),
        "exact": pipe.prior.exact,
        **measure_agreement(pipe, data),
    }


def measure_once(pipe: Any, data: Any, rows: int, run: Path) -> dict[str, Any]:
    return cache_json(run / "ladder.json", lambda: measure(pipe, data, rows, run))


def measure_speed(pipe: Any, data: Any) -> dict[str, Any]:
    return {**time_sampling(pipe), "mixture_gain": measure_mixture_gain(pipe, data.splits["test"])}


def build_marginal(data: Any) -> Any:
    """Build the baseline: counted token frequencies, independent per position."""
    prior = Prior.create("marginal", grid=data.grid, num_classes=data.num_classes)
    prior.initialize(data.splits["train"].tokens, data.splits["train"].given)
    return ImagePipeline(data.tokenizer, prior, labels=data.class_names)


def draw_samples(kinds: list[str], out: Path) -> Path:
    """Draw two rows of samples of each prior, one class per column."""
    grids = [Image.open(out / kind / "seed0" / "samples.png").convert("RGB") for kind in kinds]
    width, height, title, columns = grids[0].width, grids[0].height // 4, 22, 2
    rows = -(-len(grids) // columns)
    picture = Image.new("RGB", (columns * (width + 12) - 12, rows * (height + title)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    for index, (kind, grid) in enumerate(zip(kinds, grids, strict=True)):
        left, top = index % columns * (width + 12), index // columns * (height + title)
        draw.text((left, top + 2), kind, fill="black", font=font)
        picture.paste(grid.crop((0, 0, width, height)), (left, top + title))
    picture.save(out / "samples.png")
    return out / "samples.png"


def format_passes(f: dict[str, Any], name: str, tokens: int) -> str:
    if name not in f:
        return ""
    return f"{f[name]:.2f}, {f[f'{name}_passes']:.1f} ({f[f'{name}_passes'] / tokens:.1%})"


def format_row(name: str, runs: list[dict[str, Any]], seconds: float | None, steps: int | None, tokens: int) -> str:
    bound = "" if runs[0]["exact"] else "<= "
    nats = [run["bits"] * tokens * math.log(2) for run in runs]
    cells = [
        name,
        f"{runs[0]['parameters']:,}",
        f"{1e3 * seconds:.1f}" if seconds else "",
        f"{steps:,}" if steps else "",
        bound + with_interval([run["bits"] for run in runs], 4),
        bound + with_interval(nats, 2),
        with_interval([100 * run["agreement"] for run in runs], 1) + " %",
    ]
    return table_row(cells)


def format_speed_row(name: str, f: dict[str, Any], tokens: int) -> str:
    rough = "~" if f.get("extrapolated") else ""
    cells = [
        name,
        f"{f['cached']:.2f}" + (f" ({f['passes']} passes)" if f["passes"] else ""),
        f"{rough}{f['uncached']:.0f}" if "uncached" in f else "",
        format_passes(f, "parallel", tokens),
        f"{f['mixture_gain']:+.4f}" if f["mixture_gain"] is not None else "",
    ]
    return table_row(cells)


def print_speed_table(pipes: dict[str, Any], data: Any, out: Path) -> None:
    print(f"\n64 samples, seconds, on {os.environ['OMP_NUM_THREADS']} thread(s)\n")
    print(table_head("prior", "cached", "uncached", "parallel: s, passes", "four orders mixed"))
    for kind, pipe in pipes.items():
        found = cache_json(out / kind / "seed0" / "speed.json", lambda pipe=pipe: measure_speed(pipe, data))
        print(format_speed_row(kind, found, len(data.grid)), flush=True)


def compare(data: Any, tokens: Path, presets: dict[str, Path], options: SimpleNamespace, out: Path) -> None:
    """Time, train and measure, and print the tables."""
    minutes, seeds, rows = options.minutes, options.seeds, options.rows
    seconds = time_steps(presets, tokens, out / "steps.json")
    only = choose(",".join(presets) if options.only is None else options.only, list(seconds))
    steps = {kind: steps_within(minutes, seconds[kind]) for kind in only}
    pipes, found = {"marginal": build_marginal(data)}, {}
    (out / "marginal" / "seed0").mkdir(parents=True, exist_ok=True)
    found["marginal"] = [measure_once(pipes["marginal"], data, rows, out / "marginal" / "seed0")]
    for seed in range(seeds):
        for kind in only:
            run = out / kind / f"seed{seed}"
            pipe = ImagePipeline.from_pretrained(train(presets[kind], tokens, steps[kind], seed, run))
            pipes.setdefault(kind, pipe)
            found.setdefault(kind, []).append(measure_once(pipe, data, rows, run))
            print(format_row(kind, found[kind][-1:], seconds[kind], steps[kind], len(data.grid)), flush=True)
    shape = "x".join(map(str, data.grid.shape))
    of = f"{len(data.splits['train']):,} training rows of {shape} ids of {data.grid.vocab_size}"
    print(f"\n{out.name}: {of}, {minutes:g} CPU minutes each, {seeds} seed(s)\n")
    print(table_head("prior", "parameters", "ms per step", "steps", "bits per token", "nats per image", "agreement"))
    ranked = sorted(found, key=lambda kind: -sum(run["bits"] for run in found[kind]) / len(found[kind]))
    for kind in ranked:
        print(format_row(kind, found[kind], seconds.get(kind), steps.get(kind), len(data.grid)))
    print(f"| held-out images | | | | | | {100 * found['marginal'][0]['real_agreement']:.1f} % |")
    if options.speed:
        print_speed_table({kind: pipes[kind] for kind in ranked}, data, out)
    print(f"\nsamples of each, two per class: {draw_samples(ranked, out)}")


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    presets = prior_presets(options.data)
    out = Path(options.out).absolute() / options.data
    use_threads(options.threads)
    tokens = make_tokens(options.data, options.source, options.augmentations, out)
    compare(load_tokens(str(tokens)), tokens, presets, options, out)


if __name__ == "__main__":
    main()
