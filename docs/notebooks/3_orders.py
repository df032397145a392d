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
# # Orders
#
# The chain rule holds for any order of the tokens. It also holds for an ordered partition of the grid into **blocks**:
#
# $$p(\text{tokens}) = \prod_{b} \; \prod_{i \in b} p(\text{token}_i \mid \text{tokens of the blocks before } b).$$
#
# With one token per block this is the chain rule of [notebook 1](1_chain_rule.py). With larger blocks, the prior
# samples a whole block in one pass, and the tokens of a block are independent given the earlier blocks. This is not an
# approximation: the model is *defined* this way, and its density is exact. But independence costs bits, and this
# notebook measures how many.
#
# Training is short here, so differences of a few hundredths of a bit are noise.
# [docs/orders.md](../orders.md#what-it-costs) has results of longer training.
#
# **You will see** orders as pictures, the bits of each position in each order, what fewer passes cost in bits, and
# digits that grow in these orders.

# %%
import contextlib
import io
import math
import time

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from pipelines import ImagePipeline
from pipelines.images import DataConfig, load_images
from pipelines.steps import encode, train_prior
from pipelines.tokens import load_tokens
from prior.orders import block_numbers, make_partition

plt.rcParams.update({"figure.dpi": 110, "image.cmap": "gray", "image.interpolation": "nearest"})

# %% [markdown]
# ## One token at a time
#
# `make_partition` takes the name of an order. It returns the sizes of the blocks and `order`, where `order[r]` is the
# raster index of the token of rank r. Here each block has one token. The colour is the rank, dark first; the line
# connects consecutive tokens.

# %%
names = ["raster", "column", "snake", "hilbert", "z_curve", "spiral_in", "spiral_out", "random:0"]
figure, axes = plt.subplots(2, 4, figsize=(10, 5.2), layout="constrained")
for axis, name in zip(axes.flat, names, strict=True):
    order, blocks = make_partition(name, (7, 7))
    axis.imshow(torch.argsort(order).view(7, 7), cmap="viridis")
    axis.plot(order % 7, order // 7, color="white", lw=1)
    axis.set(title=name, xticks=[], yticks=[])

# %% [markdown]
# ## Several tokens at once
#
# Now the colour is the number of the block. Cells of one colour are sampled in the same pass. `rows` and `halton:8`
# take about the same number of passes. In `rows`, neighbours to the left and right share a block; in `halton:8`,
# neighbours are in different blocks.

# %%
names = ["diagonal", "wave:2", "rows", "regions:4", "halton:8", "spread:5", "dyadic", "raster/4"]
figure, axes = plt.subplots(2, 4, figsize=(10, 5.4), layout="constrained")
for axis, name in zip(axes.flat, names, strict=True):
    order, blocks = make_partition(name, (7, 7))
    numbers = block_numbers(order, blocks).view(7, 7)
    axis.imshow(numbers, cmap="viridis")
    for cell, number in enumerate(numbers.flatten().tolist()):
        color = "white" if number < len(blocks) / 2 else "black"
        axis.text(cell % 7, cell // 7, number, ha="center", va="center", fontsize=8, color=color)
    axis.set(title=f"{name}: {len(blocks)} passes", xticks=[], yticks=[])

# %% [markdown]
# ## The tokens
#
# The package contains a trained pipeline of digits. We use its tokenizer to encode all digits once, and train only
# priors.

# %%
shipped = ImagePipeline.from_pretrained("digits")
shipped.tokenizer.save_pretrained("runs/orders/tokenizer")
dataset = encode(tokenizer="runs/orders/tokenizer", data={"source": "digits"}, out="runs/orders/tokens")
test = load_tokens(dataset).splits["test"]
tokens, labels = test.tokens.long(), test.given.raw("label")

# %% [markdown]
# Each prior below is a small transformer that trains for the same number of steps on the same tokens. `gpt` samples one
# token at a time, in any order. `blocks` takes any ordered partition; it differs only in the mask.


# %%
def trained(kind: str, order: str, steps: int = 250, **model: object) -> ImagePipeline:
    """Train a prior with this order, and return its pipeline."""
    name = "-".join([kind, order.replace(":", "-"), *model])
    start, log = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(log):  # one line per run is enough
        run = train_prior(
            "gpt_digits",
            tokens=dataset,
            out=f"runs/orders/{name}",
            model={"kind": kind, "dim": 48, "depth": 3, "heads": 4, "order": order, **model},
            train={"steps": steps, "batch_size": 32, "ema_decay": 0.98, "warmup_steps": 20},
            track={"wandb": "disabled"},
        )
    print(f"{kind}, {order}: trained in {time.perf_counter() - start:.0f} s")
    return ImagePipeline.from_pretrained(run)


@torch.no_grad()
def token_bits(pipe: ImagePipeline) -> Tensor:
    """Return the mean held-out bits of the token at each position, (7, 7)."""
    return -pipe.prior.token_log_probs(tokens, labels).mean(0) / math.log(2)


# %% [markdown]
# ## Does the order matter?
#
# First, one token at a time. Every order has the same number of conditionals, and a perfect model would give the same
# density in each. A trained model does not: a conditional is easier to learn if the tokens that it depends on are near.
# In a random order the first tokens have no known neighbours.

# %%
one = {order: trained("gpt", order) for order in ["raster", "snake", "hilbert", "random:0"]}
cost = {order: token_bits(pipe) for order, pipe in one.items()}
figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
for axis, (order, found) in zip(axes, cost.items(), strict=True):
    drawn = axis.imshow(found, cmap="magma", vmin=0, vmax=7)
    axis.set(title=f"{order}: {found.mean():.2f} bits", xticks=[], yticks=[])
figure.colorbar(drawn, ax=axes, label="bits of a token", shrink=0.9)
plt.show()

# %% [markdown]
# A bright cell is a token that is hard to predict. In raster and snake order, each token has known neighbours beside
# and above it. The Hilbert curve moves between regions, and the early tokens of the random order have no known
# neighbours. Both cost more, after the same number of steps.
#
# ## Bits against passes
#
# Now several tokens at a time. The reference is `blocks` in raster order: the same network with one token per block.

# %%
names = ["raster", "diagonal", "spread:8", "rows"]
several = {order: trained("blocks", order) for order in names}
for order, pipe in several.items():
    cost[f"blocks, {order}"] = token_bits(pipe)

# %%
points = {"gpt, raster": (one["raster"], cost["raster"])}
points |= {order: (pipe, cost[f"blocks, {order}"]) for order, pipe in several.items()}
base = cost["blocks, raster"].mean()
plt.figure(figsize=(7, 3.4))
for name, (pipe, found) in points.items():
    passes, value = len(pipe.prior.blocks), found.mean()
    plt.scatter(passes, value, s=40, color="tab:gray" if name.startswith("gpt") else "tab:blue")
    plt.annotate(name, (passes, value), xytext=(6, 5), textcoords="offset points", fontsize=9)
    print(f"{name:12} {passes:2} passes, {value:.3f} bits per token, price {value - base:+.3f}")
plt.xlabel("passes per image")
plt.ylabel("held-out bits per token")
plt.xlim(0, 60)
plt.margins(y=0.2)
plt.show()
assert cost["blocks, rows"].mean() > cost["blocks, diagonal"].mean()

# %% [markdown]
# `diagonal` takes a quarter of the passes and costs little: the tokens of a diagonal touch only at their corners.
# `rows` and `spread:8` take even fewer passes, and cost several times as much.
#
# **Which tokens cost more?** We subtract the cost in raster order from the cost in each block order. Red tokens cost
# more than in raster order, blue ones less; the numbers are the blocks. `rows` costs a little more everywhere, because
# a token does not see its left neighbour. `spread:8` costs more in its first blocks, where few tokens are known. Some
# tokens of its last blocks cost less, because they have known neighbours on all sides. In total `spread:8` costs more
# than `rows` after this short training. A network needs time to learn from distant tokens: with `steps=1000` the
# difference to raster order is +0.26 for `spread:8` and +0.32 for `rows`, and in
# [docs/orders.md](../orders.md#what-it-costs) orders of distant tokens are clearly better than `rows`.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for axis, order in zip(axes, names[1:], strict=True):
    extra = cost[f"blocks, {order}"] - cost["blocks, raster"]
    drawn = axis.imshow(extra, cmap="RdBu_r", vmin=-3, vmax=3)
    numbers = block_numbers(several[order].prior.order, several[order].prior.blocks)
    for cell, number in enumerate(numbers.tolist()):
        axis.text(cell % 7, cell // 7, number, ha="center", va="center", fontsize=7)
    axis.set(title=f"{order}: {extra.mean():+.2f} bits per token", xticks=[], yticks=[])
figure.colorbar(drawn, ax=axes, label="bits more than raster", shrink=0.9)
plt.show()

# %% [markdown]
# ## Watch the sampling
#
# We show one sample of each prior at eight stages. Tokens that are not sampled yet are decoded as the most frequent
# id.

# %%
empty = tokens.flatten().bincount().argmax()


def moments(pipe: ImagePipeline, label: int, seed: int, count: int = 8) -> Tensor:
    """Decode a sample at `count` stages, (count, 1, 28, 28)."""
    done = pipe(1, labels=label, seed=seed).tokens
    number, last = pipe.prior.block_of.view(7, 7), len(pipe.prior.blocks) - 1
    stages = [torch.where(number <= round(last * step / (count - 1)), done, empty) for step in range(count)]
    return pipe.decode(torch.cat(stages), output_type="pt")


figure, axes = plt.subplots(4, 1, figsize=(8, 4.6), layout="constrained")
for axis, (order, pipe) in zip(axes, several.items(), strict=True):
    axis.imshow(torch.cat(list(moments(pipe, label=3, seed=1)[:, 0]), 1), vmin=-1, vmax=1)
    axis.set_ylabel(f"{order}\n{len(pipe.prior.blocks)} passes", rotation=0, ha="right", va="center", fontsize=9)
    axis.set(xticks=[], yticks=[])

# %% [markdown]
# Finished samples, one class per column, with the time for 20 images:

# %%
figure, axes = plt.subplots(4, 1, figsize=(9, 7.6), layout="constrained")
for axis, (order, pipe) in zip(axes, several.items(), strict=True):
    start = time.perf_counter()
    images = pipe(20, labels=list(range(10)) * 2, seed=0, output_type="pt").images[:, 0]
    seconds = time.perf_counter() - start
    axis.imshow(torch.cat([torch.cat(list(row), 1) for row in images.split(10)]), vmin=-1, vmax=1)
    axis.set_ylabel(f"{order}\n{seconds:.2f} s", rotation=0, ha="right", va="center", fontsize=9)
    axis.set(xticks=[], yticks=[])

# %% [markdown]
# ## Any order
#
# A prior can also learn all orders at once: in training, each image uses a random order (`any_order=true`). This is a
# harder task, so in each order it is worse than a prior for that order alone. In return it can condition on *any set of
# known tokens*.

# %%
any_order = trained("gpt", "raster", steps=500, any_order=True)
with torch.no_grad():
    for order in ["raster", "spiral_in", "hilbert", "random:5"]:
        nats = any_order.prior.log_prob(tokens, labels, order=order)
        print(f"{order:10} {-nats.mean() / (49 * math.log(2)):.3f} bits per token")

# %% [markdown]
# After twice as many steps as the raster prior, it is about half a bit worse in raster order: the largest difference in
# this notebook. Longer training reduces it: 0.3 bits with `steps=2000`, compared to a raster prior with `steps=1000`.
#
# This is useful for completion. We give the *lower* half of held-out digits and sample the upper half. The raster prior
# starts at the top and cannot condition on later tokens: its upper halves fit the class, but not the lower half. The
# any-order prior takes the known half first.

# %%
images = load_images(DataConfig(source="digits")).held_out.batch(range(8))
known = torch.zeros(28, 28, dtype=torch.bool)
known[16:] = True  # True = given, keep it
hidden = torch.where(known, images, -0.4)
rows = {"held out": images, "known": hidden}
for name, pipe in {"raster": one["raster"], "any order": any_order}.items():
    rows[name] = pipe.complete(images, known, labels=labels[:8].tolist(), seed=0, output_type="pt").images

figure, axes = plt.subplots(4, 1, figsize=(8, 4.4), layout="constrained")
for axis, (name, row) in zip(axes, rows.items(), strict=True):
    axis.imshow(torch.cat(list(row[:, 0]), 1), vmin=-1, vmax=1)
    axis.axhline(15.5, color="tab:red", lw=0.8)
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    axis.set(xticks=[], yticks=[])

# %% [markdown]
# ## Fewer passes at no cost
#
# One method needs fewer passes at no cost in bits: `parallel=True` guesses all remaining tokens, checks them in one
# pass with the noise of each image, and continues from the first wrong one. The tokens are the same. It saves time
# where a pass over many tokens takes as long as a pass over a few, as on a GPU.

# %%
plain = shipped(4, labels=[0, 3, 5, 8], seed=0)
checked = shipped(4, labels=[0, 3, 5, 8], seed=0, parallel=True)
assert torch.equal(plain.tokens, checked.tokens)
print("the same tokens:", torch.equal(plain.tokens, checked.tokens))

# %% [markdown]
# ## What to remember
#
# - The order is part of the model. The density is exact for blocks of any size.
# - Fewer passes cost bits. The cost depends on *which* tokens share a pass and on the length of training. Here
#   diagonals cost least. Distant tokens cost more than neighbours after short training, and less after longer training.
# - An any-order prior completes from any known tokens. In each order it needs more bits, here more than any block
#   order.
#
# [Notebook 4](4_density.py) puts densities to use.
