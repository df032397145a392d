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
# # Two stages
#
# [Notebook 1](1_chain_rule.py) modelled pixels one by one. A digit of 28x28 has 784 pixels, a photograph has millions,
# and most of them are redundant. So we work in two stages:
#
# 1. a **tokenizer** learns to encode an image as a small grid of ids, and to decode it;
# 2. a **prior** learns the distribution of these grids, $p(\text{tokens} \mid \text{class})$.
#
# To sample an image, we sample a grid from the prior and decode it. We train both stages with the standard steps, for
# about a minute each. [docs/results.md](../results.md) has results of longer training.
#
# **You will see** digits and their reconstructions from 49 ids, pictures of the codes, the bits per token that the
# prior saves, and sampled digits of each class.

# %%
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from pipelines import ImagePipeline
from pipelines.images import DataConfig, load_images
from pipelines.steps import encode, train_prior, train_tokenizer
from pipelines.tokens import load_tokens
from prior import Prior
from tokenizer import Tokenizer

plt.rcParams.update({"figure.dpi": 110, "image.cmap": "gray", "image.interpolation": "nearest"})

# %% [markdown]
# ## The images
#
# The data set has 5,000 digits. 1,000 are held out, and a twentieth of the others is used for validation. Images are
# floats in [-1, 1] of shape `(B, C, H, W)`.

# %%
data = load_images(DataConfig(source="digits"))
images, labels = data.held_out.batch(range(16)), data.held_out.labels
print({name: len(split) for name, split in data.by_name().items()}, "images of", tuple(images.shape[1:]))


# %%
def show(images: Tensor, title: str, columns: int = 16) -> None:
    """Show grey images (B, 1, H, W) in [-1, 1] side by side."""
    rows = [torch.cat(list(row[:, 0]), 1) for row in images.split(columns)]
    plt.figure(figsize=(10, 0.4 + 10 / columns * len(rows)))
    plt.imshow(torch.cat(rows), vmin=-1, vmax=1)
    plt.title(title, fontsize=10, loc="left")
    plt.axis("off")
    plt.show()


show(images, "held-out digits")

# %% [markdown]
# ## Stage one: VQ-VAE
#
# The VQ-VAE (van den Oord et al. 2017) is an autoencoder with a bottleneck of ids. Convolutions turn 28x28 pixels into
# a grid of 7x7 vectors $z$. A **codebook** holds 512 vectors $e_k$, and each $z$ is replaced by one that is near and,
# as the second stage pays for each id, not rare (`model.quantizer.rate`; with a rate of 0, it is the nearest one):
#
# $$\text{token}_{ij} = \arg\min_k \, \lVert z_{ij} - e_k \rVert^2 - \text{rate} \cdot s \cdot \ln p_k .$$
#
# $p_k$ is the running frequency of code k, and $s$ the mean squared distance to the nearest code.
#
# The decoder reconstructs the image from the chosen codes. `argmin` has no gradient, so the decoder's gradient is
# copied to the encoder (the straight-through estimator), and a second loss pulls each $z$ towards its code.
#
# Each command is a function: `train_tokenizer("vqvae_digits", ...)` is `smalti train_tokenizer --config vqvae_digits
# ...`. The arguments after the preset override its settings.

# %%
quiet = {"wandb": "disabled"}
stage_one = train_tokenizer(
    "vqvae_digits",
    out="runs/two_stages/vqvae",
    train={"steps": 400, "log_every": 25},
    track=quiet,
)

# %% [markdown]
# A run logs its metrics to `metrics.jsonl`, one JSON object per line. The pixel error falls. The *perplexity* of the
# codebook is the effective number of codes in use, at most 512; it falls after 100 steps, when codes get their price.


# %%
def read(run: Path, name: str) -> tuple[list[int], list[float]]:
    """Read the steps and values of a run's metric."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return tuple(zip(*[(line["step"], line[name]) for line in lines if name in line], strict=True))


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.semilogy(*read(stage_one, "l2"))
left.set(xlabel="step", ylabel="mean squared error")
right.plot(*read(stage_one, "codebook_perplexity"))
right.set(xlabel="step", ylabel="perplexity of the codebook")
plt.show()

# %% [markdown]
# ## Reconstructions
#
# The tokenizer is a module with `encode` and `decode`. The first row shows held-out digits, the second their
# reconstructions from 49 ids.

# %%
tokenizer = Tokenizer.from_pretrained(stage_one / "tokenizer")
with torch.no_grad():
    tokens = tokenizer.encode(images)
    painted = tokenizer.decode(tokens)
show(torch.cat([images, painted]), "held-out digits, and their reconstructions")

error = (painted - images).square().mean().item()
psnr = 10 * math.log10(4 / error)  # the range of pixels is 2, squared 4
print(f"{tuple(images.shape[1:])} pixels -> {tuple(tokens.shape[1:])} ids below {tokenizer.grid.vocab_size}")
print(f"{28 * 28 * 8} bits -> {49 * 9} bits, PSNR {psnr:.1f} dB")
assert psnr > 12

# %% [markdown]
# We can draw a token grid with one colour per id. The colours are arbitrary, because ids have no order.

# %%
figure, axes = plt.subplots(3, 5, figsize=(10, 6.2), layout="constrained")
for column, (above, middle, below) in enumerate(axes.T):
    above.imshow(images[column, 0], vmin=-1, vmax=1)
    middle.imshow(tokens[column], cmap="turbo", vmin=0, vmax=511)
    for cell, token in enumerate(tokens[column].flatten().tolist()):
        color = "black" if 100 < token < 420 else "white"
        middle.text(cell % 7, cell // 7, token, ha="center", va="center", fontsize=6, color=color)
    below.imshow(painted[column, 0], vmin=-1, vmax=1)
for axis, title in zip(axes[:, 0], ["image", "tokens", "decoded"], strict=True):
    axis.set_ylabel(title)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])

# %% [markdown]
# ## The codebook
#
# What does a code represent? In 1,000 training digits we crop 12x12 pixels around each token, with the token's own 4x4
# pixels in the middle, and average these crops for each code. The most frequent codes come first. Many show black next
# to a stroke; others show strokes of one direction, line ends and bends.

# %%
some = data.train.batch(range(1000))
with torch.no_grad():
    used = tokenizer.encode(some).flatten()
around = torch.nn.functional.pad(some, (4, 4, 4, 4), value=-1).unfold(2, 12, 4).unfold(3, 12, 4)
around = around.reshape(-1, 12, 12)  # one for each token, in the order of `used`
counts = torch.bincount(used, minlength=512)
means = torch.zeros(512, 12, 12).index_add_(0, used, around) / counts.clamp(min=1)[:, None, None]
by_use = counts.argsort(descending=True)[:128]

# %%
cells = torch.nn.functional.pad(means[by_use], (1, 1, 1, 1), value=0.2)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=[2.2, 1])
left.imshow(torch.cat([torch.cat(list(row), 1) for row in cells.split(16)]), vmin=-1, vmax=1)
left.set(title="mean crop of each code, most frequent first", xticks=[], yticks=[])
right.semilogy(counts[by_use].clamp(min=0.5))
right.set(title="frequency", xlabel="code, by frequency", ylabel="count in 1,000 digits")
plt.show()

# %% [markdown]
# **A token has a position.** We replace the token in the middle of a digit by three others and compare the pixels. The
# decoder's convolutions spread a token slightly beyond its own 4x4 pixels, so that neighbouring patches join smoothly.

# %%
ONE = 6  # a digit with a stroke in the middle
changed = tokens[ONE : ONE + 1].repeat(4, 1, 1)
changed[1:, 3, 3] = by_use[[0, 30, 60]]
with torch.no_grad():
    variants = tokenizer.decode(changed)[:, 0]
figure, axes = plt.subplots(2, 4, figsize=(8, 4.1), layout="constrained")
for (above, below), variant, token in zip(axes.T, variants, changed[:, 3, 3].tolist(), strict=True):
    above.imshow(variant, vmin=-1, vmax=1)
    above.set(title=f"token {token}", xticks=[], yticks=[])
    below.imshow(variant - variants[0], cmap="RdBu_r", vmin=-1, vmax=1)
    below.add_patch(plt.Rectangle((11.5, 11.5), 4, 4, fill=False, color="black"))
    below.set(title="difference", xticks=[], yticks=[])

# %% [markdown]
# ## The token dataset
#
# The second stage never sees pixels. `encode` saves the ids and labels of all images, with a copy of the tokenizer.
# `augmentations=1` adds one slightly rotated and scaled variant of each training image.

# %%
dataset = encode(tokenizer=stage_one, out="runs/two_stages/tokens", augmentations=1)
written = load_tokens(dataset)
for name, split in written.splits.items():
    print(f"{name:10} {len(split):5} grids, {split.tokens.dtype}")
print(sorted(path.name for path in dataset.iterdir()))

# %% [markdown]
# ## Two baselines
#
# Two models need no network:
#
# - **uniform**: each of the 512 ids is equally likely. That is $\log_2 512 = 9$ bits per token.
# - **marginal**: the frequency of each id at each position in each class. It ignores neighbours.

# %%
train, test = written.splits["train"], written.splits["test"]
test_tokens, test_labels = test.tokens.long(), test.given.raw("label")


@torch.no_grad()
def bits_per_token(prior: Prior, labels: Tensor | None) -> float:
    """Return the held-out bits per token."""
    return -prior.log_prob(test_tokens, labels).mean().item() / (len(prior.grid) * math.log(2))


marginal = Prior.create("marginal", grid=written.grid, num_classes=10)
marginal.initialize(train.tokens, train.given)
bits = {"uniform": math.log2(written.grid.vocab_size), "marginal": bits_per_token(marginal, test_labels)}
print({name: round(value, 3) for name, value in bits.items()})

# %% [markdown]
# ## Stage two: a GPT over tokens
#
# The prior is a small causal transformer. It predicts each id from the class and the earlier ids, row by row. In
# training the class is dropped for a tenth of the images, so that the same network also models $p(\text{tokens})$
# without a class.

# %%
stage_two = train_prior(
    "gpt_digits",
    tokens=dataset,
    out="runs/two_stages/gpt",
    train={"steps": 500, "log_every": 25, "warmup_steps": 20},
    track=quiet,
)

# %% [markdown]
# The result of stage two is a **pipeline**: a folder with both stages, which `from_pretrained` loads from the run.

# %%
pipe = ImagePipeline.from_pretrained(stage_two)
bits["gpt"] = bits_per_token(pipe.prior, test_labels)
bits["gpt, no class"] = bits_per_token(pipe.prior, None)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
left.plot(*read(stage_two, "bits_per_token"))
left.set(title="training", xlabel="step", ylabel="bits per token")
bars = right.barh(list(bits)[::-1], list(bits.values())[::-1])
right.bar_label(bars, fmt="%.2f", padding=3)
right.set(title="held-out bits per token", xlim=(0, 8))
print(pipe)
assert bits["gpt"] < bits["marginal"] < bits["uniform"]

# %% [markdown]
# **Where are the bits?** `token_log_probs` returns log p of each token. Its mean over held-out digits, by position,
# shows which tokens are hard to predict. Corners are nearly always black. The middle, where the strokes are, costs
# most.

# %%
with torch.no_grad():
    nats = pipe.prior.token_log_probs(test_tokens, test_labels)
plt.figure(figsize=(4, 3.2))
plt.imshow(-nats.mean(0) / math.log(2), cmap="magma")
plt.colorbar(label="bits")
plt.title("mean cost of a token", fontsize=10)
plt.show()

# %% [markdown]
# ## Samples
#
# Image $k$ uses the seed `seed + k`, so it is the same in any batch. A `guidance_scale` above 1 follows the class more
# closely and reduces variety. This preset uses 1.5. Columns are classes.

# %%
columns = list(range(10))
out = pipe(num_images=50, labels=columns * 5, seed=0, output_type="pt")
show(out.images, f"samples, classes 0 to 9, {bits['gpt']:.2f} bits per token", columns=10)

# %% [markdown]
# The output also contains the tokens, and `decode` turns them into the same images. We can also sample from the
# baselines and use the same decoder. It cannot repair a grid that makes no sense.

# %%
assert torch.equal(pipe.decode(out.tokens, output_type="pt"), out.images)
ten = torch.tensor(columns)
loose = marginal.sample(10, ten, generator=torch.Generator().manual_seed(0))
uniform = torch.randint(512, (10, 7, 7), generator=torch.Generator().manual_seed(0))
rows = [pipe.decode(each, output_type="pt") for each in (uniform, loose)]
show(torch.cat(rows), "above: uniform ids; below: marginal, classes 0 to 9", columns=10)

# %% [markdown]
# **Guidance and temperature.** Each column has one seed; only the settings differ between rows.

# %%
settings = [{"temperature": 0.5}, {}, {"guidance_scale": 1.0}, {"guidance_scale": 4.0}, {"temperature": 1.3}]
figure, axes = plt.subplots(len(settings), 1, figsize=(8, 4.6), layout="constrained")
for axis, given in zip(axes, settings, strict=True):
    row = pipe(num_images=10, labels=columns, seed=7, output_type="pt", **given).images
    axis.imshow(torch.cat(list(row[:, 0]), 1), vmin=-1, vmax=1)
    name = ", ".join(f"{key} {value}" for key, value in given.items()) or "preset"
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    axis.set(xticks=[], yticks=[])

# %% [markdown]
# ## What to remember
#
# - A tokenizer shortens the sequence: 49 ids for 784 pixels. No prior can restore what the tokenizer loses.
# - The prior only predicts ids; bits per token measure how well.
# - A pipeline contains both stages. `pipe(...)` samples; `encode`, `decode` and `log_prob` give access to the steps in
#   between.
#
# [Notebook 3](3_orders.py) compares orders of sampling the ids, and sampling several at once.
