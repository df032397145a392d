"""How many tokens differ between ways of drawing the same images: batches of 1 and 64, cached and not, in passes.

    python -m benchmarks.trust.agreement images=2000
    python -m benchmarks.trust.agreement model=patches images=500 minutes=4 seed=0

The noise of an image is the same in all ways, so a token differs only where two candidates tie within rounding, and the
tokens after it because of that. The reference draws 64 images at a time from a cache; a row counts images with any
other token, and tokens. `model=patches` trains a GPT over 16x16 ids of 1,024 (k-means of 4x4 patches of the training
images in `../shared/data/openmoji`) for some minutes first; `keep=FOLDER` keeps it for the next run. To compare
settings, `save=FILE` writes the reference's tokens and `against=FILE` compares with them: run it again with threads=2,
or with ATEN_CPU_CAPABILITY=avx2 and ONEDNN_MAX_CPU_ISA=AVX2. `only=true` draws the reference alone,
`whole=N` draws no more than N images by whole passes, without a cache or in parallel.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.support.options import read_options, use_threads
from benchmarks.support.tables import table_head, table_row


def train_on_patches(minutes: float, seed: int) -> Any:
    """A GPT over 16x16 ids of 1,024, trained on patches of emoji."""
    import torch
    from datasets import load_dataset

    from prior import Prior
    from tokenizer import TokenGrid

    torch.manual_seed(seed)
    rows = load_dataset("../shared/data/openmoji", split="train").with_format("torch")
    images = torch.stack([row["image"][:3] for row in rows]).float() / 255
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)  # (n, 16, 16, 48)
    flat = patches.flatten(0, 2)
    codes = flat[torch.randperm(len(flat))[:1024]] + 1e-3 * torch.randn(1024, 48)
    for _ in range(5):
        nearest = torch.cat([torch.cdist(part, codes).argmin(1) for part in flat.split(1 << 15)])
        sums = torch.zeros_like(codes).index_add_(0, nearest, flat)
        counts = torch.bincount(nearest, minlength=1024)[:, None]
        codes = torch.where(counts > 0, sums / counts.clamp(min=1), codes)
    tokens = nearest.view(-1, 16, 16)
    model = Prior.create("gpt", grid=TokenGrid((16, 16), 1024), dim=192, depth=6, heads=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    end, steps = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        loss = model.loss(tokens[torch.randint(len(tokens), (16,))])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    print(f"trained for {steps} steps; loss {float(loss.detach()):.3f} nats per token")
    return model.eval()


def main() -> None:
    options = read_options(
        __doc__,
        {
            "threads": 1,
            "model": "digits",
            "images": 2000,
            "minutes": 4.0,
            "seed": 0,
            "only": False,
            "whole": 0,
            "keep": None,
            "save": None,
            "against": None,
        },
    )
    threads = use_threads(options.threads)
    import torch
    from safetensors.torch import load_file, save_file

    from pipelines import ImagePipeline
    from prior import Prior

    if options.model == "patches" and options.keep and Path(options.keep).exists():
        model = Prior.from_pretrained(options.keep).eval()
    elif options.model == "patches":
        model = train_on_patches(options.minutes, options.seed)
        if options.keep:
            model.save_pretrained(options.keep)
    else:
        model = ImagePipeline.from_pretrained(options.model).prior
    classes = model.num_classes

    def draw(batch: int, images: int = options.images, **ways: Any) -> torch.Tensor:
        parts = []
        for start in range(0, images, batch):
            rows = range(start, min(start + batch, images))
            labels = torch.tensor([row % classes for row in rows]) if classes else None
            noise = [torch.Generator().manual_seed(options.seed + row) for row in rows]
            parts.append(model.sample(len(rows), labels, generator=noise, **ways))
        return torch.cat(parts).flatten(1)

    reference = draw(64)
    if options.save:
        save_file({"tokens": reference}, options.save)
    others = {}
    if not options.only:
        others["1 image at a time"] = draw(1)
        others["17 images at a time"] = draw(17)
        whole = options.whole or options.images
        others["without a cache"] = draw(64, whole, cache=False)
        others["parallel passes"] = draw(64, whole, parallel=True)
    if options.against:
        others[f"tokens of {options.against}"] = load_file(options.against)["tokens"]
    print(f"{options.images} images of {reference.shape[1]} tokens, {threads} threads, torch {torch.__version__}")
    print(table_head("way", "images", "images that differ", "tokens that differ"))
    for way, tokens in others.items():
        differs = tokens != reference[: len(tokens)]
        print(table_row([way, f"{len(tokens)}", f"{int(differs.any(1).sum())}", f"{int(differs.sum())}"]))


if __name__ == "__main__":
    main()
