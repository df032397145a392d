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
# The chain rule holds for any order of the tokens, and for more than that. Cut the grid into **blocks**, and say which
# block comes first:
#
# $$p(\text{tokens}) = \prod_{b} \; \prod_{i \in b} p(\text{token}_i \mid \text{tokens of the blocks before } b).$$
#
# With one token a block this is the chain rule of [notebook 1](1_chain_rule.py). With larger blocks, a whole block is
# drawn in one pass, and its tokens do not see each other. That is no approximation: the model is *defined* so, and its
# density is exact and sums to one. But tokens that would have liked to talk can no longer do so. This costs bits, and
# this notebook measures how many.
#
# All trainings here are short, so differences of a few hundredths of a bit are noise. [docs/orders.md](../orders.md)
# has longer ones.

# %%
import contextlib
import io
import math
import os
import time

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from pipelines import ImagePipeline, encode, train_prior
from pipelines.images import DataConfig, load_images
from pipelines.tokens import load_tokens
from prior.orders import block_numbers, make_partition

SHARE = float(os.environ.get("SMALTI_NOTEBOOK_SHARE", "1"))  # below 1, trainings are shorter
plt.rcParams.update({"figure.dpi": 110, "image.cmap": "gray", "image.interpolation": "nearest"})

# %% [markdown]
# ## One token after the other
#
# `make_partition` knows orders by name, and returns `order`, where `order[r]` is the raster index of the token of rank
# r, and the sizes of the blocks. Here each block is one token. The colour is the rank, dark first, and the line is the
# walk.

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
# Now the colour is the number of the block. Cells of one colour are drawn in the same pass. `rows` and `halton:8` take
# about as many passes. In the one, the neighbours of a cell are in its own block, in the other they are in other
# blocks.

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
# A trained pipeline of digits comes with the package. We take its tokenizer, write the ids of all digits once, and then
# only train priors.

# %%
shipped = ImagePipeline.from_pretrained("digits")
shipped.tokenizer.save_pretrained("runs/orders/tokenizer")
dataset = encode.main(["tokenizer=runs/orders/tokenizer", "data.source=digits", "out=runs/orders/tokens"])
test = load_tokens(dataset).splits["test"]
tokens, labels = test.tokens.long(), test.labels.long()

# %% [markdown]
# Each prior below is a small transformer, trained for as many steps on the same tokens. `gpt` draws one token at a
# time, in any order. `blocks` is its sister that takes any ordered partition: only the mask differs.


# %%
def trained(kind: str, order: str, steps: int = 250, **model: object) -> ImagePipeline:
    """A pipeline whose prior draws in this order."""
    name = "-".join([kind, order.replace(":", "-"), *model])
    sizes = {"dim": 48, "depth": 3, "heads": 4, "order": order, **model}
    arguments = ["--config", "gpt_digits", f"tokens={dataset}", f"out=runs/orders/{name}", f"model.kind={kind}"]
    arguments += [f"model.{key}={str(value).lower()}" for key, value in sizes.items()]
    arguments += [f"train.steps={round(steps * SHARE)}", "train.batch_size=32", "train.ema_decay=0.98"]
    arguments += ["train.warmup_steps=20", "track.wandb=disabled"]
    start, said = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stdout(said):  # a line for each is enough
        run = train_prior.main(arguments)
    print(f"{kind}, {order}: trained in {time.perf_counter() - start:.0f} s")
    return ImagePipeline.from_pretrained(run / "pipeline")


@torch.no_grad()
def token_bits(pipe: ImagePipeline) -> Tensor:
    """Mean held-out bits of the token at each position, (7, 7)."""
    return -pipe.prior.token_log_probs(tokens, labels).mean(0) / math.log(2)


# %% [markdown]
# ## Does the walk matter?
#
# First one token at a time. Every order has the same number of conditionals, and a perfect model would give the same
# density in each. A learned one does not: a conditional is easier to learn if what it depends on is near. In a random
# order, the first tokens are drawn with nothing near them.

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
# A bright cell is a token that is hard to guess when its turn comes. Raster and snake always stand beside what they
# drew last and below what they drew before. The curve jumps between regions, and in the random order the early tokens
# have nothing near them: both cost more, after as many steps.
#
# ## The price of passes
#
# Now several tokens at a time. `blocks` in raster order is the fair beginning: the same network with one token a block.

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
# Diagonals take a quarter of the passes, and cost little: the tokens of a diagonal touch only at their corners. `rows`
# and `spread:8` take even fewer, and cost several times as much.
#
# **Where is the price paid?** We subtract the cost in raster order from that of each block order. Red tokens have
# become dearer, blue ones cheaper; the numbers are those of the blocks. `rows` pays a little everywhere, for the left
# neighbour that it cannot see. `spread:8` pays in its first blocks, where hardly anything is known. Some of its last
# ones are cheaper than in raster order, because a token then has known neighbours on all sides. In sum it costs more
# than `rows` here. What a network can make of far neighbours it has to learn, so such orders gain from longer training:
# with `steps=1000` in this notebook it is +0.26 for `spread:8` and +0.32 for `rows`, and in
# [docs/orders.md](../orders.md#what-it-costs) orders of far tokens are clearly ahead of `rows`.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
for axis, order in zip(axes, names[1:], strict=True):
    dearer = cost[f"blocks, {order}"] - cost["blocks, raster"]
    drawn = axis.imshow(dearer, cmap="RdBu_r", vmin=-3, vmax=3)
    numbers = block_numbers(several[order].prior.order, several[order].prior.blocks)
    for cell, number in enumerate(numbers.tolist()):
        axis.text(cell % 7, cell // 7, number, ha="center", va="center", fontsize=7)
    axis.set(title=f"{order}: {dearer.mean():+.2f} bits per token", xticks=[], yticks=[])
figure.colorbar(drawn, ax=axes, label="bits more than raster", shrink=0.9)
plt.show()

# %% [markdown]
# ## Watch it being drawn
#
# A sample of each, at eight moments between the first pass and the last. What is not drawn yet is painted with the most
# frequent id.

# %%
empty = tokens.flatten().bincount().argmax()


def moments(pipe: ImagePipeline, label: int, seed: int, count: int = 8) -> Tensor:
    """A sample as it grows, (count, 1, 28, 28)."""
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
# And finished ones, one class per column, with the time that 20 images took.

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
# A prior may also learn all orders at once: in training, each image comes in a random one (`any_order=true`). It has
# more to learn, so in each single order it is behind a prior that knows only that one. What it gains: it can look at
# *whatever is known*.

# %%
any_order = trained("gpt", "raster", steps=500, any_order=True)
with torch.no_grad():
    for order in ["raster", "spiral_in", "hilbert", "random:5"]:
        nats = any_order.prior.log_prob(tokens, labels, order=order)
        print(f"{order:10} {-nats.mean() / (49 * math.log(2)):.3f} bits per token")

# %% [markdown]
# After twice as many steps as the raster prior's, it is about half a bit behind in raster order: the largest price in
# this notebook. Longer training makes it smaller: 0.3 bits with `steps=2000`, beside a raster prior with
# `steps=1000`.
#
# What it is for: we keep the *lower* half of held-out digits and let it draw the upper one. The raster prior starts
# at the top, and cannot look at what comes later in its order: its upper halves fit the class, but not the lower
# half. The prior of any order looks at the known half first.

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
# ## For nothing: guess and check
#
# There is one way to fewer passes that costs no bits at all. `parallel=True` guesses all remaining tokens, checks them
# in one pass with the noise that each image would have used, and goes on from the first wrong one. The images are the
# same, to the token. It pays where a pass over many tokens takes as long as one over a few: on a GPU.

# %%
plain = shipped(4, labels=[0, 3, 5, 8], seed=0)
checked = shipped(4, labels=[0, 3, 5, 8], seed=0, parallel=True)
assert torch.equal(plain.tokens, checked.tokens)
print("the same tokens:", torch.equal(plain.tokens, checked.tokens))

# %% [markdown]
# ## What to remember
#
# - An order is a choice of the model. One token a block, or many: the density is exact in each.
# - Few passes cost bits, and the price depends on *who* is drawn together, and on how long one trains. Diagonals cost
#   least here. Far tokens cost more than neighbours after trainings as short as these, and less after longer ones.
# - A prior of any order completes from anything. In each single order it pays for that, here more than any other prior.
#
# [Notebook 4](4_density.py) shows what a density is good for.
