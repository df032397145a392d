"""How many tokens differ between ways of drawing the same images: batches of 1 and 64, cached and not, in passes; and
how many ids and pixels of a tokenizer differ between batches.

    python -m benchmarks.trust.agreement images=2000
    python -m benchmarks.trust.agreement model=patches images=500 minutes=4 seed=0
    python -m benchmarks.trust.agreement tokenizer=digits images=5000
    python -m benchmarks.trust.agreement tokenizer=emoji images=1000 minutes=4

The noise of an image is the same in all ways, so a token differs only where two candidates tie within rounding, and the
tokens after it because of that. The reference draws 64 images at a time from a cache; a row counts images with any
other token, and tokens. `model=patches` trains a GPT over 16x16 ids of 1,024 (k-means of 4x4 patches of the training
images in `../shared/data/openmoji`) for some minutes first; `keep=FOLDER` keeps it for the next run. To compare
settings, `save=FILE` writes the reference's tokens and `against=FILE` compares with them: run it again with threads=2,
or with ATEN_CPU_CAPABILITY=avx2 and ONEDNN_MAX_CPU_ISA=AVX2. `only=true` draws the reference alone,
`whole=N` draws no more than N images by whole passes, without a cache or in parallel.

With `tokenizer=` images of its data set are encoded and decoded by a pipeline in batches of 1, 7, 64 and 256; a row
counts ids and 8-bit pixels that differ from those of batches of 256, and the largest difference in grey levels.
`digits` is the shipped tokenizer; `emoji` a convolutional one of 64x64 colours, trained for some minutes first.
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


def train_on_emoji(images: Any, minutes: float, seed: int) -> Any:
    """A convolutional tokenizer of `images` (n, 3, 64, 64): 16x16 ids of 512."""
    import torch

    from tokenizer import Tokenizer

    torch.manual_seed(seed)
    model = Tokenizer.create("vqvae", image_size=64, channels=3, widths=(64, 128), blocks=(1, 2)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    end, steps = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < end:
        batch = images[torch.randint(len(images), (16,))]
        made = model(batch)
        loss = (made.images - batch).square().mean()
        loss = loss + sum(weight * made.losses[name] for name, weight in model.loss_weights.items())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    print(f"trained for {steps} steps; loss {float(loss.detach()):.4f}")
    return model.eval()


def compare_batches(options: Any, threads: int) -> None:
    """Print how many ids and pixels depend on the batch that an image is in."""
    import torch
    from datasets import load_dataset

    from pipelines import ImagePipeline
    from pipelines.images import DataConfig, load_images, to_float
    from prior import Prior

    if options.tokenizer == "emoji":
        rows = load_dataset("../shared/data/openmoji", split="train").with_format("torch")
        images = to_float(torch.stack([row["image"][:3] for row in rows]))
        model = train_on_emoji(images, options.minutes, options.seed)
        pipe = ImagePipeline(model, Prior.create("marginal", grid=model.grid))
    else:
        pipe, splits = ImagePipeline.from_pretrained(options.tokenizer), load_images(DataConfig(source="digits"))
        parts = (splits.train, splits.validation, splits.held_out)
        images = torch.cat([to_float(part.pixels(range(len(part)))) for part in parts if part is not None])
    images = images[: options.images]

    def both(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = pipe.encode(images, batch_size=batch_size)
        pixels = pipe.decode(reference if batch_size != 256 else ids, output_type="np", batch_size=batch_size)
        return ids, torch.from_numpy(pixels).int()

    reference, pixels = both(256)
    print(f"{len(images)} images, {reference.numel()} ids, {pixels.numel()} values of pixels", end="; ")
    print(f"{threads} threads, torch {torch.__version__}")
    print(table_head("images at a time", "ids that differ", "pixels that differ", "grey levels at most"))
    for batch_size in (1, 7, 64):
        ids, others = both(batch_size)
        differs = (others - pixels).abs()
        counts = [int((ids != reference).sum()), int((differs > 0).sum()), int(differs.max())]
        print(table_row([f"{batch_size}", *map(str, counts)]))


def main() -> None:
    options = read_options(
        __doc__,
        {
            "threads": 1,
            "model": "digits",
            "tokenizer": None,
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
    if options.tokenizer:
        return compare_batches(options, threads)
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
