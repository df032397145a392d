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
# From a folder of images to a pipeline on the Hub, which others load by its name. The folder is made here, so that the
# notebook runs anywhere. With images of your own, leave that cell out, and put the name of your folder into `FOLDER`.
#
# The Hub is a small server on this machine, for the same reason. For the real one, leave the next cell out, and log in
# once with `hf auth login`.

# %%
from local_hub import start_hub  # beside this notebook

hub = start_hub("hub")
print("a Hub of our own is running")

# %%
import os
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from pipelines import ImagePipeline, encode, evaluate, train_prior, train_tokenizer
from pipelines.commands import push
from pipelines.config import UserError
from pipelines.images import DataConfig, load_images
from tokenizer import Tokenizer

FOLDER = "my-images"
SHARE = float(os.environ.get("SMALTI_NOTEBOOK_SHARE", "1"))  # below 1, trainings are shorter
plt.rcParams.update({"figure.dpi": 110, "image.interpolation": "nearest"})

# %% [markdown]
# ## A folder
#
# ```text
# my-images/train/circle/0000.png      the split, the class, the image
# my-images/test/circle/0000.png
# ```
#
# Folders `train` and `test` are optional: without `test`, a tenth is held out. So are the classes. PNG, JPEG, WEBP, BMP
# and GIF of any size are read; they are resized and cropped to what you ask for. Ours are coloured shapes in four
# classes.

# %%
COLORS = ["#d1495b", "#edae49", "#00798c"]
CORNERS = {"square": 4, "star": 10, "triangle": 3}


def shape(kind: str, chance: np.random.Generator) -> Image.Image:
    """A shape on white, of random colour, size and place, 48x48; drawn large and made small for smooth edges."""
    image, color = Image.new("RGB", (192, 192), "white"), str(chance.choice(COLORS))
    radius, (x, y) = chance.integers(52, 76), chance.integers(84, 108, 2)
    if kind == "circle":
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    else:
        steps = np.arange(CORNERS[kind])
        turns = 2 * np.pi * (steps + (0.5 if kind == "square" else 0)) / CORNERS[kind] - np.pi / 2
        radii = np.where((steps % 2 == 1) & (kind == "star"), 0.45, 1) * radius
        corners = zip(x + radii * np.cos(turns), y + radii * np.sin(turns), strict=True)
        ImageDraw.Draw(image).polygon(list(corners), fill=color)
    return image.resize((48, 48), Image.Resampling.LANCZOS)


chance = np.random.default_rng(0)
for split, count in {"train": 200, "test": 40}.items():
    for kind in ("circle", "square", "star", "triangle"):
        folder = Path(FOLDER, split, kind)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shape(kind, chance).save(folder / f"{number:04}.png")

# %% [markdown]
# ## Look before you train
#
# Real folders have surprises in them. We put one in: a file that is called PNG and is none. Smalti decodes all images
# before a training starts, and says which one is bad. This takes seconds, and not an epoch.

# %%
Path(FOLDER, "train", "star", "9999.png").write_text("I am no image")
try:
    load_images(DataConfig(source=FOLDER, image_size=24, channels=3))
except UserError as error:
    print("error:", error)

# %% [markdown]
# We remove it. (`data.on_error=skip` would leave it out, count it, and list it in `bad_images.jsonl`.) Then we look at
# what is there: how many of each class, in which splits, and the pictures themselves *as the model will see them*.

# %%
Path(FOLDER, "train", "star", "9999.png").unlink()
data = load_images(DataConfig(source=FOLDER, image_size=24, channels=3))
for name, split in data.by_name().items():
    counts = Counter(data.train.class_names[label] for label in split.labels.tolist())
    print(f"{name:10} {len(split):4} images, {dict(counts)}")


# %%
def picture(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] in a row, (H, B * W, 3) in [0, 1]."""
    return (torch.cat(list(images), 2).movedim(0, 2) + 1) / 2


def stack(rows: dict[str, Tensor]) -> None:
    """Rows of images under each other, with their names."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.85 * len(rows)), layout="constrained")
    for axis, (name, row) in zip(np.atleast_1d(axes), rows.items(), strict=True):
        axis.imshow(picture(row))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])


def of_class(split, label: int, count: int) -> Tensor:
    """The first images of a class."""
    return split.batch((split.labels == label).nonzero()[:count, 0])


stack({name: of_class(data.train, label, 12) for label, name in enumerate(data.train.class_names)})

# %% [markdown]
# ## Stage one
#
# We begin with the preset of digits and say what differs: the source, the size, three channels. In a shell this is
#
# ```sh
# smalti train_tokenizer --config vqvae_digits data.source=my-images data.image_size=24 data.channels=3 out=runs/mine
# ```
#
# and `accelerate launch -m pipelines.train_tokenizer ...` does the same on many devices. The image's side has to be a
# multiple of the tokenizer's `factor`, which is 4 here: 24x24 pixels become 6x6 ids.

# %%
steps = round(300 * SHARE)
stage_one = train_tokenizer.main(
    ["--config", "vqvae_digits", f"data.source={FOLDER}", "data.image_size=24", "data.channels=3", "out=runs/mine"]
    + [f"train.steps={steps}", "train.minutes=2", "train.log_every=50", "track.wandb=disabled"]
)

# %%
tokenizer = Tokenizer.from_pretrained(stage_one / "tokenizer")
held_out = torch.cat([of_class(data.held_out, label, 3) for label in range(4)])
with torch.no_grad():
    painted = tokenizer(held_out).images
stack({"held out": held_out, "6x6 ids": painted})

# %% [markdown]
# If these are not good enough, no prior will help: train longer, take more codes (`model.quantizer.codes=256`) or a
# smaller `model.factor`. [The guide](../guide.md#choose-a-tokenizer) says what else there is.
#
# ## Stage two
#
# `augmentations=3` encodes three more variants of each image, a little turned and scaled, as the preset's
# `data.augment` says. Of few images that is worth much: the prior sees more grids before it knows them by heart. The
# source of the images need not be said again; the tokenizer remembers it.

# %%
dataset = encode.main([f"tokenizer={stage_one / 'tokenizer'}", "out=runs/mine_tokens", "augmentations=3"])
steps = round(400 * SHARE)
stage_two = train_prior.main(
    ["--config", "gpt_digits", f"tokens={dataset}", "out=runs/mine_gpt", "model.dim=48", "train.warmup_steps=20"]
    + [f"train.steps={steps}", "train.minutes=2", "train.log_every=50", "track.wandb=disabled"]
)

# %% [markdown]
# Classes have kept the names of their folders.

# %%
pipe = ImagePipeline.from_pretrained(stage_two / "pipeline")
print(pipe, pipe.labels)
stack({name: pipe(12, labels=name, seed=0, output_type="pt").images for name in pipe.labels})

# %% [markdown]
# ## How good is it?
#
# `evaluate` measures on the held-out images what can be measured without opinions: the tokenizer's error, bits per
# token beside their baselines, and how often a small classifier, trained on your images, takes a sample for what it was
# asked to be.

# %%
figures = evaluate.main(
    [f"pipeline={stage_two / 'pipeline'}", "num_images=160", f"feature_steps={max(50, round(150 * SHARE))}"]
)

# %% [markdown]
# ## To the Hub
#
# `push` uploads the folder: weights as safetensors, configurations, the figures that were just measured, a model card
# with a picture of samples. The path of your folder is left out, as it is nobody's business.

# %%
push.main([f"folder={stage_two / 'pipeline'}", "to=me/mine", "private=false"])
for name, path in hub.files("me/mine").items():
    print(f"{path.stat().st_size:8,} bytes  {name}")

# %% [markdown]
# Anyone who can reach the Hub now loads it by its name. Every file is checked against the manifest, nothing is
# unpickled, and no code of the repository runs. With the same seed, the same images come out.

# %%
theirs = ImagePipeline.from_pretrained("me/mine")
names = ["circle", "square", "star", "triangle"] * 3
ours = pipe(12, labels=names, seed=5, output_type="pt").images
loaded = theirs(12, labels=names, seed=5, output_type="pt").images
stack({"before": ours, "from the Hub": loaded})
assert torch.equal(ours, loaded)

# %% [markdown]
# And it can do what [notebook 4](4_density.py) did with digits. Here it completes held-out shapes from their upper
# half, three times each.

# %%
known = torch.zeros(24, 24, dtype=torch.bool)
known[:12] = True  # the upper half is given
draws = theirs.complete(held_out, known, draws=3, seed=0, output_type="pt").images
rows = {"image": held_out, "known": torch.where(known, held_out, 0.6)}
stack(rows | {f"draw {k + 1}": draws[:, k] for k in range(3)})

# %% [markdown]
# The picture of samples on the model card is the first that others will see of it:

# %%
plt.figure(figsize=(3.4, 6.4))
plt.imshow(Image.open(hub.files("me/mine")["samples.png"]))
plt.title("samples.png, one class per column", fontsize=9)
plt.axis("off")
plt.show()

# %% [markdown]
# ## What to remember
#
# - A folder with a subfolder for each class is enough. Look at it through `load_images` before you train.
# - Three commands: `train_tokenizer`, `encode`, `train_prior`. Each says in its last line what comes next.
# - `evaluate` before you share, so that the card says how good it is. `push`, and others load it by its name.
#
# Larger images, more of them, and many GPUs: [docs/data.md](../data.md) and [docs/scaling.md](../scaling.md).
