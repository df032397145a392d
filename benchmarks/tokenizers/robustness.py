r"""Does it help samples to prepare the decoder for a prior's mistakes, in training or afterwards?

    pip install -e ".[dev]"
    python -m benchmarks.tokenizers.robustness threads=1 seeds=3
    python -m benchmarks.tokenizers.robustness threads=1 only=none,swap    # some
    python -m benchmarks.tokenizers.robustness threads=1 seeds=3 pipeline=runs/gpt_fashion_mnist/pipeline   # of that
    python -m benchmarks.tokenizers.robustness steps=4 prior_steps=4 more=2 samples=20 limit=300 features=2 \
        out=runs/trial    # does it run?

Both stages by the presets of Fashion-MNIST, smaller and by Muon. `none`: plain. `swap`: latent perturbation (RobusTok,
Qiu et al. 2025): in half of the images a tenth of the tokens is painted as one of the 8 codes nearest to theirs, while
encoder and codebook learn from the true ones; `swap-strong`: a quarter, in all images.

Then the decoder of `none`, or of `pipeline`, learns alone for `more` steps. `decoder-real`: to paint an image from its
tokens, which takes as long and is what the others compete with. `decoder-near`: as in `swap-strong`. `decoder-drawn`:
half of the tokens are drawn again, each given the true ones before it. `decoder-sampled`: 3 of 10 are sampled around
the others, at the guidance of the samples (RobusTok's post-training); drawing them is not in the equal time.

Frechet distance of `samples` samples, and of the reconstructions of as many training images, from all held-out images,
in the features of one classifier; class agreement by nearest neighbours; PSNR of 2,000 held-out images (dB); bits per
token of the GPT; CPU seconds of training (with `pipeline`, of the decoder's alone). Means over seeds, +- half of the
95 % t-interval; `gain`: by how much the distance of the samples is below that of `none` or `decoder-real` of the same
seed, which for decoders is of the same tokens. What is finished stays under `out`; other options want another.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.support.contenders.nodes import Node, images_of, read_presets, with_seed, write_node
from benchmarks.support.judges import Judge
from benchmarks.support.mistaken_tokens import finetuned, perturbed
from benchmarks.support.options import choose, read_options, use_threads
from benchmarks.support.runs import NEVER
from benchmarks.support.tables import table_head, table_row, with_interval, write_whole

SWAPS = {"none": (0.0, 0.0), "swap": (0.5, 0.1), "swap-strong": (1.0, 0.25)}  # shares of images, and of their tokens
DECODERS = {"decoder-real": "real", "decoder-near": "near", "decoder-drawn": "drawn", "decoder-sampled": "sampled"}
CHANGES = ["model.blocks=[1]", "train.batch_size=32", "train.lr=3e-3", "train.warmup_steps=50", "train.muon_lr=0.05"]
CHANGES += ["train.optimizer=muon", "train.mixed_precision=auto", "gpt.train.optimizer=muon", "gpt.train.muon_lr=0.01"]
CHANGES += ["gpt.model.dim=64", "gpt.model.depth=4", "gpt.train.lr=6e-3"]
OPTIONS = {"steps": 400, "prior_steps": 300, "more": 100, "samples": 1000, "guidance": 2.0, "limit": 20000}
OPTIONS |= {
    "features": 400,
    "seeds": 1,
    "only": None,
    "source": None,
    "pipeline": None,
    "threads": 0,
    "out": "runs/robustness",
}
COLUMNS = {"frechet": 3, "gain": 3, "reconstructions": 3, "agreement": 3, "psnr": 2, "bits": 3, "seconds": 0}


def train(name: str, seed: int, options: SimpleNamespace, folder: Path) -> None:
    """Both stages, by the verbs, unless that was done; keeps the CPU seconds of each."""
    from pipelines import encode, train_prior, train_tokenizer

    def node(kind: str, steps: int, **more: Any) -> Node:
        never = {"evaluate_every": NEVER, "preview_every": NEVER, "save_every": NEVER, "minutes": None}
        preset = with_seed(read_presets("fashion_mnist", CHANGES), seed)[kind]
        return {**preset, "track": {"wandb": "disabled"}, **more, "train": {**preset["train"], **never, "steps": steps}}

    if (folder / "seconds.json").is_file():
        return
    source, run, times = images_of("fashion_mnist", options.source), folder / "stage1", [time.process_time()]
    data = {"source": source or "zalando-datasets/fashion_mnist", "limit": options.limit}
    first = node("tokenizer", options.steps, data=data, out=str(run))
    second = node("gpt", options.prior_steps, tokens=str(folder / "tokens"), out=str(folder / "gpt"))
    with perturbed(*SWAPS[name]):
        train_tokenizer.main(["--config", write_node(first, folder / "tokenizer.yaml")])
    times.append(time.process_time())
    encode.main([f"tokenizer={run / 'tokenizer'}", f"out={folder / 'tokens'}"])
    times.append(time.process_time())
    train_prior.main(["--config", write_node(second, folder / "gpt.yaml")])
    write_whole([times[1] - times[0], time.process_time() - times[2]], folder / "seconds.json")


def contend(name: str, seed: int, options: SimpleNamespace, judges: list[Judge]) -> dict[str, float]:
    """Train and measure one contender; its figures, kept under `out`. The first that is measured makes the judge."""
    from pipelines import ImagePipeline
    from pipelines.evaluate import encode_all
    from pipelines.metrics.likelihood import bits_per_token
    from pipelines.provenance import defaults

    out, swap = Path(options.out).absolute(), name if name in SWAPS else "none"
    kept, folder = out / "figures" / f"{name}-{seed}.json", out / swap / f"seed{seed}"
    if kept.is_file():
        return json.loads(kept.read_text())
    if options.pipeline is None:
        train(swap, seed, options, folder)
    place = options.pipeline or str(folder / "gpt" / "pipeline")
    pipe = ImagePipeline.from_pretrained(place)
    if not judges:
        judges.append(Judge(defaults({"pipeline": place})["data"], options.features))
        print(judges[0].space.origin, flush=True)
    images, seconds = (
        judges[0].images,
        0.0 if options.pipeline else sum(json.loads((folder / "seconds.json").read_text())),
    )
    bits = {}
    if name in DECODERS:
        seconds += finetuned(pipe, DECODERS[name], seed, images.train, options.more, options.guidance)
    else:
        bits = {"bits": bits_per_token(pipe.prior, encode_all(pipe, images.held_out))}
    found = {**judges[0].figures(pipe, options.samples, seed, options.guidance), **bits, "seconds": seconds}
    write_whole(found, kept)
    return found


def main() -> None:
    options = read_options(__doc__, OPTIONS)
    chosen, judges = choose(options.only, [*SWAPS, *DECODERS]), []
    use_threads(options.threads)
    found = {name: [] for name in chosen}
    for seed in range(options.seeds):
        for name in chosen:
            found[name].append(contend(name, seed, options, judges))
    print(table_head("decoder", *COLUMNS))
    for name, figures in found.items():
        rival = found.get("decoder-real" if name in DECODERS else "none", figures)
        columns = {key: [each[key] for each in figures if key in each] for key in COLUMNS}
        columns["gain"] = [a["frechet"] - b["frechet"] for a, b in zip(rival, figures, strict=True) if rival != figures]
        cells = [with_interval(columns[key], digits) if columns[key] else "" for key, digits in COLUMNS.items()]
        print(table_row([name, *cells]))


if __name__ == "__main__":
    main()
