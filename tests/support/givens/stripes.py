"""Images of stripes: normal and anomalous ones, a pipeline trained on normal ones, and a labelled set on disk."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from small import make_prior, make_tokenizer

from pipelines import ImagePipeline
from pipelines.anomaly.calibrating import calibrate
from pipelines.anomaly.examine import Examination
from pipelines.images import DataConfig

SIZE = 16


def stripes(count, seed=0, side=SIZE):
    """Normal images, uint8: sine stripes of random phase, wavelength and direction, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    phase, length = (torch.rand(count, 1, 1, generator=generator) for _ in range(2))
    upright = torch.rand(count, 1, 1, generator=generator) < 0.5
    across = torch.arange(side, dtype=torch.float32).expand(side, side)
    position = torch.where(upright, across, across.t())
    waves = 70 + 50 * (2 * math.pi * (position / (5 + 4 * length) + phase)).sin()
    noise = 4 * torch.randn(count, side, side, generator=generator)
    return (waves + noise).round().clamp(0, 255).to(torch.uint8)[:, None]


def constant(side=SIZE):
    return torch.arange(0, 256, 5, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, side, side)


def uniform(count, side=SIZE):
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (count, 1, side, side), generator=generator, dtype=torch.uint8)


def planted(images):
    """Images with a 6x6 patch of noise at (4, 4)."""
    images = images.clone()
    images[:, :, 4:10, 4:10] = uniform(len(images), 6)
    return images


def save_images(folder, images, names=None, sizes=((SIZE, SIZE),)):
    """Save grey images as PNGs with these names, or numbered; they are cut to these sizes in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images[:, 0].numpy()):
        height, width = sizes[number % len(sizes)]
        Image.fromarray(image[:height, :width]).save(folder / f"{names[number] if names else f'{number:03d}'}.png")


def trained_on_stripes() -> ImagePipeline:
    """A small pipeline, trained on stripes and calibrated."""
    torch.manual_seed(0)
    images = stripes(512, seed=1).float() / 127.5 - 1
    tokenizer = make_tokenizer("vqvae", (SIZE, SIZE), 1).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 4e-3)
    for step in range(70):
        batch = images[torch.arange(64) + 64 * (step % 8)]
        out = tokenizer(batch)
        loss = (out.images - batch).square().mean() + sum(
            weight * out.losses[name] for name, weight in tokenizer.loss_weights.items()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens = tokenizer.eval().encode(images)
    prior = make_prior("gpt", tokenizer.grid.shape, tokenizer.grid.vocab_size, num_classes=0, any_order=True)
    prior.initialize(tokens, prior.read_given(None, None, len(tokens)))
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.AdamW(prior.parameters(), 5e-3)
    for step in range(100):
        batch = tokens[torch.arange(64) + 64 * (step % 8)]
        loss = prior.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pipe = ImagePipeline(tokenizer, prior)
    calibrate(pipe, stripes(1000, seed=2))
    return pipe


def statistics_of(pipe, images, **options):
    """Return the statistics of images of the model's size, by name."""
    rows = [each.statistics for each in Examination.open(pipe, images, **options).examine(["statistics"])]
    return {name: torch.cat([each[name] for each in rows]) for name in rows[0]}


def write_set(root, shape=(8, 12), channels=1, per_class=20, classes=2):
    """Write images of stripes with random phase and noise."""
    chance = np.random.default_rng(0)
    for split, count in (("train", 2 * per_class), ("test", per_class)):
        for label in range(classes):
            for number in range(count):
                along = np.arange(shape[1 - label % 2]) + chance.integers(4)
                stripes = 200 * (along // 2 % 2)
                image = np.broadcast_to(stripes if label % 2 == 0 else stripes[:, None], shape)
                image = image[..., None] + chance.integers(0, 50, (*shape, channels))
                path = root / split / f"kind{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.squeeze().astype(np.uint8)).save(path)
    return DataConfig(source=str(root), image_size=shape, channels=channels)
