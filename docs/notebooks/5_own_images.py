# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own images
#
# This notebook goes from a folder of photos to samples, measures them, and shares the pipeline. The photos are crops of
# two pictures that come with scikit-learn, so that it runs anywhere in a few minutes. To use your own, set `FOLDER` and
# skip the cell that makes the crops.
#
# **You will see** a damaged file found before training starts, photos beside their reconstructions, samples by class,
# a table of measurements, photos completed from their upper half, and the files that you would share.

# %%
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from pipelines import ImagePipeline
from pipelines.config import UserError
from pipelines.images import DataConfig, load_images
from pipelines.steps import encode, evaluate, train_prior, train_tokenizer
from tokenizer import Tokenizer

FOLDER = "my-photos"
plt.rcParams.update({"figure.dpi": 110, "image.interpolation": "nearest"})

# %% [markdown]
# ## A folder of photos
#
# ```text
# my-photos/train/temple/0000.png      split, class, image
# my-photos/test/temple/0000.png
# ```
#
# The folders `train` and `test` are optional: without `test`, a tenth of the images is held out. Classes are optional,
# too. PNG, JPEG, WEBP, BMP, GIF, TIFF and PPM are read, resized and cropped to the size that you ask for.
#
# We cut square crops out of two photos, a temple and a flower. Training crops come from the upper part of a photo, and
# test crops from the lower part, so that no pixel is in both. Do the same with frames of a video: a random split would
# put neighbouring frames into training and test set, and the test would be too easy.

# %%
photos = dict(zip(("temple", "flower"), load_sample_images().images, strict=True))
chance = np.random.default_rng(0)
for split, count, top, bottom in [("train", 300, 0, 270), ("test", 60, 270, 427)]:
    for name, photo in photos.items():
        folder = Path(FOLDER, split, name)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            side = chance.integers(96, 150)
            x, y = chance.integers(60, 500 - side), chance.integers(top, bottom - side)
            Image.fromarray(photo[y : y + side, x : x + side]).save(folder / f"{number:04}.png")

# %% [markdown]
# ## Look before you train
#
# Real folders contain surprises. We add a text file with the name of a PNG. Smalti decodes all images before
# training starts, and reports the bad one within seconds.

# %%
Path(FOLDER, "train", "flower", "9999.png").write_text("I am not an image")
try:
    load_images(DataConfig(source=FOLDER, image_size=32, channels=3))
except UserError as error:
    print("error:", error)

# %% [markdown]
# We delete the file. (`data.on_error=skip` would skip it and list it in `bad_images.jsonl`.) Then we count the images
# of each class and split, and look at them *as the model will see them*.

# %%
Path(FOLDER, "train", "flower", "9999.png").unlink()
data = load_images(DataConfig(source=FOLDER, image_size=32, channels=3))
for name, split in data.by_name().items():
    counts = Counter(data.train.class_names[label] for label in split.labels.tolist())
    print(f"{name:10} {len(split):4} images, {dict(counts)}")


# %%
def picture(images: Tensor) -> Tensor:
    """Put images (B, 3, H, W) in [-1, 1] in a row, (H, B * W, 3) in [0, 1]."""
    return (torch.cat(list(images), 2).movedim(0, 2) + 1) / 2


def stack(rows: dict[str, Tensor]) -> None:
    """Show rows of images under each other, with their names."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.85 * len(rows)), layout="constrained")
    for axis, (name, row) in zip(np.atleast_1d(axes), rows.items(), strict=True):
        axis.imshow(picture(row))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])


def of_class(split, label: int, count: int) -> Tensor:
    """Return the first images of a class."""
    return split.batch((split.labels == label).nonzero()[:count, 0])


stack({name: of_class(data.train, label, 12) for label, name in enumerate(data.train.class_names)})

# %% [markdown]
# ## Stage one
#
# We start from the preset of digits and change the source, the size and the channels. In a shell this is
#
# ```sh
# smalti train_tokenizer --config vqvae_digits data.source=my-photos data.image_size=32 data.channels=3 out=runs/mine
# ```
#
# and `accelerate launch -m pipelines.train_tokenizer ...` does the same on several devices. The sides of the images
# must be multiples of the tokenizer's `factor`, here 4: 32x32 pixels become 8x8 tokens. A few hundred steps are enough
# to see the method work. [docs/data.md](../data.md#how-good-in-how-many-minutes) lists results of longer training.

# %%
quiet = {"wandb": "disabled"}
stage_one = train_tokenizer(
    "vqvae_digits",
    data={"source": FOLDER, "image_size": 32, "channels": 3},
    out="runs/mine",
    train={"steps": 300, "log_every": 50},
    track=quiet,
)

# %%
tokenizer = Tokenizer.from_pretrained(stage_one / "tokenizer")
held_out = torch.cat([of_class(data.held_out, label, 6) for label in range(2)])
with torch.no_grad():
    decoded = tokenizer(held_out).images
stack({"held out": held_out, "8x8 tokens": decoded})

# %% [markdown]
# A prior cannot add what the tokenizer has lost. If the reconstructions are not good enough, train longer, use more
# codes (`model.quantizer.codes=256`) or a smaller `model.factor`. [The guide](../guide.md#choose-a-tokenizer) lists the
# other options.
#
# ## Stage two
#
# `augmentations=3` also encodes three variants of each image, slightly rotated and scaled as configured in the preset's
# `data.augment`. With few images this delays overfitting. The tokenizer remembers the source of the images.

# %%
dataset = encode(tokenizer=stage_one, out="runs/mine_tokens", augmentations=3)
stage_two = train_prior(
    "gpt_digits",
    tokens=dataset,
    out="runs/mine_gpt",
    model={"dim": 48},
    train={"steps": 400, "log_every": 50, "warmup_steps": 20},
    track=quiet,
)

# %% [markdown]
# Classes have the names of their folders.

# %%
pipe = ImagePipeline.from_pretrained(stage_two)
print(pipe, pipe.labels)
stack({name: pipe(12, labels=name, seed=0, output_type="pt").images for name in pipe.labels})

# %% [markdown]
# ## How good is it?
#
# `evaluate` uses the held-out images. It reports the error of the tokenizer, bits per token with their baselines, and
# class agreement: the share of samples whose nearest training image, by pixels, has the requested class.

# %%
figures = evaluate(pipeline=stage_two, num_images=160, feature_steps=150)

# %% [markdown]
# ## Complete images
#
# The pipeline can do everything that [notebook 4](4_density.py) did with digits. Here it completes held-out photos from
# their upper half, three times each. It was trained on the upper parts of both photos only, and it gets no class here,
# so some completions show the wrong subject.

# %%
known = torch.zeros(32, 32, dtype=torch.bool)
known[:16] = True  # the upper half is given
draws = pipe.complete(held_out, known, draws=3, seed=0, output_type="pt").images
rows = {"image": held_out, "known": torch.where(known, held_out, 0.6)}
stack(rows | {f"draw {k + 1}": draws[:, k] for k in range(3)})

# %% [markdown]
# ## Share it
#
# The pipeline is a folder: weights as safetensors, configurations, the measurements, and a model card with samples. The
# path of your image folder is left out.

# %%
folder = stage_two / "pipeline"
for path in sorted(folder.rglob("*")):
    if path.is_file():
        print(f"{path.stat().st_size:8,} bytes  {path.relative_to(folder)}")

# %% [markdown]
# With an account on the Hub, two commands share it. Others load it by name, check each file against the manifest, and
# get the same image from the same seed. Nothing is unpickled, and no code from the repository runs.
#
# ```sh
# hf auth login
# smalti push folder=runs/mine_gpt/pipeline to=your-name/photos
# ```
#
# ```python
# pipe = ImagePipeline.from_pretrained("your-name/photos")
# ```
#
# The model card shows this picture of samples:

# %%
samples = np.asarray(Image.open(folder / "samples.png"))
plt.figure(figsize=(2.4, 4.8))
plt.imshow(samples[: 2 * samples.shape[1]])
plt.title("the top of samples.png", fontsize=9)
plt.axis("off")
plt.show()

# %% [markdown]
# ## What to remember
#
# - A folder with one subfolder per class is enough. Look at it with `load_images` before you train.
# - Three commands train a pipeline: `train_tokenizer`, `encode`, `train_prior`. Each prints the next one.
# - Run `evaluate` before you `push`, so that the model card contains the measurements.
#
# Larger images, more of them, and many GPUs: [docs/data.md](../data.md) and [docs/scaling.md](../scaling.md).
