"""Every prior on the same tokens for the same time, in one table.

    pip install -e ".[dev]"
    python benchmarks/ladder.py data=digits augmentations=4 minutes=2     # 7x7 ids of 128; needs no other data
    python benchmarks/ladder.py data=fashion_mnist minutes=6              # 7x7 ids of 256
    python benchmarks/ladder.py data=fashion_binary minutes=15            # 28x28 pixels, black or white (static)

Each preset `configs/prior/*_{data}.yaml` is trained by `smalti train_prior` for `minutes`, whatever it says of its end,
on the tokens of `configs/tokenizer/{vqvae,pixels}_{data}.yaml` (`source=FOLDER`: with the images of that folder). What
is done is kept under `out` and not done again.

bits: -log2 p per token of the whole held-out split, given its labels; nats: the same per image. A `<=` is a bound.
64 samples: seconds for 64 images, one per class in turn, without guidance; the median of three. Uncached is one whole
pass per token: where that takes over a minute it is worked out from 16 passes. Parallel gives the same images from
fewer passes: seconds, passes per image (rows through the network / images) and those as a share of the tokens; guessed:
with `made` of the same ladder as the guessing prior.
Agreement: how many of 1,000 samples a 1-nearest-neighbour classifier on decoded training tokens gives the class that
was asked for; the last row has it for the held-out images.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from sampling import seconds_of, table_head

ROOT = Path(__file__).parents[1]
NEIGHBOURS, SAMPLES, TIMED, SLOW = 20_000, 1000, 64, 60.0


def smalti(verb: str, *arguments: str) -> None:
    """Run a verb as a user would."""
    subprocess.run([sys.executable, "-m", f"pipelines.{verb}", *arguments], check=True, cwd=ROOT)


def tokens_of(data: str, source: str | None, variants: str, out: Path) -> Path:
    """The token dataset, made by the data's VQ-VAE preset, or the one of its pixels."""
    folder, images = out / "tokens", [f"data.source={source}"] if source else []
    if not (folder / "manifest.json").is_file():
        presets = [ROOT / "configs" / "tokenizer" / f"{kind}_{data}.yaml" for kind in ("vqvae", "pixels")]
        preset = next(preset for preset in presets if preset.is_file())
        smalti("train_tokenizer", "--config", str(preset), f"out={out / 'tokenizer'}", "track.wandb=disabled", *images)
        smalti("encode", f"tokenizer={out / 'tokenizer' / 'tokenizer'}", f"out={folder}", f"augmentations={variants}")
    return folder


def train(preset: Path, tokens: Path, minutes: float, run: Path) -> Path:
    """The pipeline of a preset, trained for `minutes`; exits where it was trained for another time."""
    done = run / "minutes"
    if not done.is_file():
        never = [f"train.{what}_every=1000000" for what in ("evaluate", "preview", "save")]
        smalti("train_prior", "--config", str(preset), f"tokens={tokens}", f"out={run}", "train.steps=null",
               f"train.minutes={minutes}", "track.wandb=disabled", *never)  # fmt: skip
        done.write_text(str(minutes))
    if float(done.read_text()) != minutes:
        raise SystemExit(f"{run}: was trained for {done.read_text()} minutes; choose another out=")
    return run / "pipeline"


def uncached_seconds(prior: Any, labels: Any) -> tuple[float, bool]:
    """Seconds of sampling by one whole pass per token, and whether they were worked out from some of the passes."""
    import torch

    tokens = torch.zeros(len(labels), *prior.grid.shape, dtype=torch.long)
    with torch.inference_mode():
        (one_pass,) = seconds_of([lambda: prior(tokens, labels)], 3)
        if one_pass * len(prior.grid) > SLOW:
            return len(prior.grid) * seconds_of([lambda: prior(tokens, labels)], 16)[0], True
    return seconds_of([lambda: prior.sample(len(labels), labels, cache=False)], 1)[0], False


def sampling(pipe: Any, guess: Any) -> dict[str, Any]:
    """Seconds per 64 samples and passes per image."""
    import torch

    prior, labels = pipe.prior, torch.arange(TIMED) % pipe.prior.num_classes
    figures: dict[str, Any] = {"steps": pipe.sampler.steps}
    if pipe.sampler.steps:  # a masked-token prior: every pass is a whole one
        (figures["cached"],) = seconds_of([lambda: prior.sample(TIMED, labels, steps=pipe.sampler.steps)], 3)
        return figures
    (figures["cached"],) = seconds_of([lambda: prior.sample(TIMED, labels)], 3)
    figures["uncached"], figures["extrapolated"] = uncached_seconds(prior, labels)
    for name, given in (("parallel", {}), ("guessed", {"guess": guess})):
        if name == "guessed" and guess is None:
            continue
        rows: list[int] = []
        hook = prior.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(len(inputs[0])))
        (figures[name],) = seconds_of([lambda given=given: prior.sample(TIMED, labels, parallel=True, **given)], 3)
        hook.remove()
        figures[f"{name}_passes"] = sum(rows) / TIMED / 4  # of three timed runs and the one before them
    return figures


def likelihood(pipe: Any, split: Any) -> dict[str, Any]:
    """Held-out bits per token in the prior's own order; and, where it takes any, how many fewer a mixture of four
    orders needs, over the first 2,000 rows."""
    from pipelines.train_prior import bits_per_token

    figures: dict[str, Any] = {"bits": bits_per_token(pipe.prior, split), "exact": pipe.prior.exact}
    if pipe.prior.any_order and pipe.prior.exact:
        one, four = (bits_per_token(pipe.prior, split, 2000, num_orders=count) for count in (1, 4))
        figures["mixture_gain"] = one - four
    return figures


def agreement(pipe: Any, data: Any) -> dict[str, float]:
    """Class agreement of samples, and of the held-out split's decoded tokens."""
    import torch

    from pipelines.evaluate import nearest_label

    train, test = data.splits["train"], data.splits["test"]
    known = pipe.decode(train.tokens[:NEIGHBOURS].long(), output_type="pt")
    real = pipe.decode(test.tokens[:SAMPLES].long(), output_type="pt")
    wanted = torch.arange(SAMPLES) % pipe.prior.num_classes
    drawn = pipe(SAMPLES, wanted.tolist(), seed=0, guidance_scale=1.0, output_type="pt", progress=False).images
    shares = [
        float((nearest_label(images, known, train.labels[:NEIGHBOURS]) == labels).double().mean())
        for images, labels in ((drawn, wanted), (real, test.labels[:SAMPLES]))
    ]
    return {"agreement": shares[0], "real_agreement": shares[1]}


def measure(pipe: Any, data: Any, guess: Any, run: Path) -> dict[str, Any]:
    """All figures of a pipeline, kept in `run`; and a sheet of samples."""
    from pipelines.pictures import save_picture

    path = run / "ladder.json"
    if path.is_file():
        return json.loads(path.read_text())
    figures = {"parameters": sum(p.numel() for p in pipe.prior.parameters()), "threads": os.environ["OMP_NUM_THREADS"]}
    log = run / "metrics.jsonl"
    if log.is_file():
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        figures["training_steps"] = max(line["step"] for line in lines)
        figures["training_tokens_per_second"] = statistics.median(
            line["tokens_per_second"] for line in lines if "tokens_per_second" in line
        )
    figures |= likelihood(pipe, data.splits["test"]) | sampling(pipe, guess) | agreement(pipe, data)
    save_picture(pipe.sample_picture(), run / "samples.png")
    path.write_text(json.dumps(figures, indent=1))
    return figures


def marginal(data: Any) -> Any:
    """The floor of the table: counted, not trained."""
    from pipelines import ImagePipeline
    from prior import Prior

    prior = Prior.create("marginal", grid=data.grid, num_classes=data.num_classes)
    prior.initialize(data.splits["train"].tokens, data.splits["train"].labels)
    return ImagePipeline(data.tokenizer, prior, labels=data.class_names)


def sheet(kinds: list[str], out: Path) -> Path:
    """Two rows of each prior's samples, a class per column, with its name above."""
    from PIL import Image, ImageDraw, ImageFont

    grids = [Image.open(out / kind / "samples.png").convert("RGB") for kind in kinds]
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


def passes(f: dict[str, Any], name: str, tokens: int) -> str:
    """Seconds and passes per image of a way to sample in parallel."""
    if name not in f:
        return ""
    return f"{f[name]:.2f}, {f[f'{name}_passes']:.1f} ({f[f'{name}_passes'] / tokens:.1%})"


def line(name: str, f: dict[str, Any], tokens: int) -> str:
    """A row of the table."""
    import math

    bound, gain = "" if f["exact"] else "<= ", f.get("mixture_gain")
    bits = f"{bound}{f['bits']:.4f}" + (f" ({-gain:+.4f} with four orders mixed)" if gain else "")
    speed = f.get("training_tokens_per_second")
    rough = "~" if f.get("extrapolated") else ""
    cells = [
        name,
        f"{f['parameters']:,}",
        f"{speed / 1000:.1f} k" if speed else "",
        bits,
        f"{bound}{f['bits'] * tokens * math.log(2):.2f}",
        f"{f['cached']:.2f}" + (f" ({f['steps']} steps)" if f["steps"] else ""),
        f"{rough}{f['uncached']:.0f}" if "uncached" in f else "",
        passes(f, "parallel", tokens),
        passes(f, "guessed", tokens),
        f"{f['agreement']:.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    name, minutes = options.get("data", "fashion_mnist"), float(options.get("minutes", 6))
    out = Path(options.get("out", "runs/ladder")).absolute() / name
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    tokens = tokens_of(name, options.get("source"), options.get("augmentations", "0"), out)
    presets = {preset.stem.removesuffix(f"_{name}"): preset
               for preset in sorted((ROOT / "configs" / "prior").glob(f"*_{name}.yaml"))}  # fmt: skip
    if not presets:
        raise SystemExit(f"data={name}: there are no presets configs/prior/*_{name}.yaml")
    folders = {kind: train(preset, tokens, minutes, out / kind) for kind, preset in presets.items()}
    from pipelines import ImagePipeline
    from pipelines.tokens import load_tokens

    data = load_tokens(str(tokens))
    pipes = {kind: ImagePipeline.from_pretrained(folder) for kind, folder in folders.items()}
    pipes["marginal"] = marginal(data)
    guess = pipes["made"].prior if "made" in pipes else None
    found = {}
    for kind, pipe in pipes.items():
        (out / kind).mkdir(exist_ok=True)
        found[kind] = measure(pipe, data, None if pipe.prior is guess else guess, out / kind)
        print(line(kind, found[kind], len(data.grid)), flush=True)
    print(f"\n{name}: {len(data.splits['train']):,} training rows of {'x'.join(map(str, data.grid.shape))} ids of "
          f"{data.grid.vocab_size}, {minutes:g} minutes each, {found['marginal']['threads']} threads\n")  # fmt: skip
    print(table_head("prior", "parameters", "training tokens/s", "bits per token", "nats per image",
                     "64 samples, s: cached", "uncached", "parallel", "parallel, guessed", "agreement"))  # fmt: skip
    ranked = sorted(found, key=lambda kind: -found[kind]["bits"])
    for kind in ranked:
        print(line(kind, found[kind], len(data.grid)))
    print(f"| held-out images | | | | | | | | | {found['marginal']['real_agreement']:.1%} |")
    print(f"\nsamples of each, two per class: {sheet(ranked, out)}")


if __name__ == "__main__":
    main()
