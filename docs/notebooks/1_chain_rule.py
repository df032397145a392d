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
# # Autoregressive models from the chain rule
#
# What is the probability of an image? An image is many numbers, and there is no table of all images. The chain rule
# turns the question into many small ones. For a grid of $N$ tokens $x_1 \dots x_N$, in any fixed order,
#
# $$p(x) = \prod_{i=1}^{N} p(x_i \mid x_1, \dots, x_{i-1}).$$
#
# This is exact. Each factor is a classifier: it sees the earlier tokens and predicts the probability of each value of
# the next one. A model of this kind is called *autoregressive*.
#
# All models in this notebook are such products. They differ in **how they prevent the network from seeing later
# tokens.** We write the first one by hand, and take the others from `prior/`, where each is one file.
#
# **You will see** the masks of five architectures as pictures, digits sampled from each of them, how many bits each
# needs per pixel, and probabilities of all images that add up to 1.

# %%
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.images import DataConfig, load_images
from prior import Prior
from prior.orders import make_order
from tokenizer import TokenGrid

plt.rcParams.update({"figure.dpi": 110, "image.cmap": "gray", "image.interpolation": "nearest"})
_ = torch.manual_seed(0)

# %% [markdown]
# ## Small binary digits
#
# To train models in seconds, we use small images: digits of 12x12 pixels, black or white. A pixel is a token
# with two values. `load_images` holds out some digits, on which we will measure.

# %%
images = load_images(DataConfig(source="digits", image_size=12))


def binary(split) -> Tensor:
    """Return all images of a split as tokens (B, 12, 12) in {0, 1}."""
    return (split.pixels(range(len(split)))[:, 0] > 80).long()


train_tokens, test_tokens = binary(images.train), binary(images.held_out)[:400]
grid = TokenGrid((12, 12), 2)
print(f"{len(train_tokens)} grids to train on, {len(test_tokens)} held out; {len(grid)} tokens each")


# %%
def show(tokens: Tensor, title: str, columns: int = 16) -> None:
    """Show binary grids (B, H, W) side by side, separated by grey lines."""
    cells = F.pad(tokens.float(), (1, 1, 1, 1), value=0.5)
    rows = [torch.cat(list(row), 1) for row in cells.split(columns)]
    plt.figure(figsize=(10, 0.68 * len(rows)))
    plt.imshow(torch.cat(rows), vmin=0, vmax=1)
    plt.title(title, fontsize=10, loc="left")
    plt.axis("off")
    plt.show()


show(test_tokens[:32], "held-out digits")

# %% [markdown]
# ## The measure: bits per token
#
# Training minimizes $-\log p(x)$ of the training images. We report the same quantity on held-out images, per token and
# in bits:
#
# $$\text{bits per token} = -\frac{1}{N \ln 2} \, \log p(x).$$
#
# Fewer bits are better. A fair coin for each pixel costs 1 bit, which any model should beat. The first baseline is
# `marginal`, the frequency of white at each position. It knows where digits are, but treats pixels as independent.

# %%
bits = {"fair coins": 1.0}


@torch.no_grad()
def bits_per_token(prior) -> float:
    """Return the held-out bits per token."""
    return -prior.log_prob(test_tokens).mean().item() / (len(grid) * math.log(2))


marginal = Prior.create("marginal", grid=grid)
marginal.initialize(train_tokens, None)  # counting is all the training it needs
bits["marginal"] = bits_per_token(marginal)
show(marginal.sample(16, generator=torch.Generator().manual_seed(0)), "samples of marginal: independent pixels")
print(f"marginal: {bits['marginal']:.3f} bits per token")

# %% [markdown]
# ## By hand: a fully visible model
#
# The simplest classifier of a binary pixel is a logistic regression on all earlier pixels,
#
# $$p(x_i = 1 \mid x_{<i}) = \sigma\Big(b_i + \sum_{j<i} W_{ij} \, x_j\Big).$$
#
# There are $N$ of them, one for each pixel. Their weights fit into one matrix, and "$j < i$" says that the matrix is
# **strictly lower triangular**. That is the whole model (Frey et al. 1996 call it a fully visible belief network).
#
# One matrix product with the true image gives all $N$ factors. This is called *teacher forcing*: in training, the
# earlier pixels are known.


# %%
class FullyVisible(nn.Module):
    """A logistic regression for each pixel on all pixels before it."""

    def __init__(self, grid: TokenGrid) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(torch.zeros(len(grid), len(grid)))
        self.bias = nn.Parameter(torch.zeros(len(grid)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, N) of pixels x (B, N) in {0, 1}."""
        return x @ self.weight.tril(-1).T + self.bias  # tril(-1) also removes the diagonal

    def log_prob(self, tokens: Tensor) -> Tensor:
        """log p (B,) in nats: the sum of the N factors."""
        x = tokens.flatten(1).to(self.weight.dtype)
        return -F.binary_cross_entropy_with_logits(self(x), x, reduction="none").sum(1)


# %% [markdown]
# The training loop is that of any classifier: the learning rate rises, then falls to zero. All models here have
# `log_prob`, so all can use it.


# %%
def train(prior, steps: int, lr: float):
    """Maximize the log-likelihood of the training grids."""
    optimizer = torch.optim.AdamW(prior.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        batch = train_tokens[torch.randint(len(train_tokens), (32,))]
        loss = -prior.log_prob(batch).mean() / len(prior.grid)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(prior.parameters(), 0.1)  # avoids large first steps
        optimizer.step()
        schedule.step()
    return prior.eval()


by_hand = train(FullyVisible(grid), steps=1500, lr=1e-2)
bits["by hand"] = bits_per_token(by_hand)
print(f"by hand: {bits['by hand']:.3f} bits per token, marginal: {bits['marginal']:.3f}")

# %% [markdown]
# What has it learned? Row $i$ of the matrix has a weight for each earlier pixel, so we can draw it as an image. Red
# weights make a white pixel at the green square more likely, blue ones less likely. Near pixels matter most. Below and
# to the right of the square all weights are zero, because these pixels come later.

# %%
figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
for axis, (row, column) in zip(axes, [(3, 6), (5, 4), (7, 7), (9, 5)], strict=True):
    weights = by_hand.weight.detach().tril(-1)[row * 12 + column].view(12, 12)
    drawn = axis.imshow(weights, cmap="RdBu_r", vmin=-3, vmax=3)
    axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, color="tab:green"))
    axis.set(title=f"row {row}, column {column}", xticks=[], yticks=[])
figure.colorbar(drawn, ax=axes, label="weight", shrink=0.8)
plt.show()

# %% [markdown]
# **Sampling** follows the product from left to right: draw $x_1$, then $x_2$ given $x_1$, and so on. It takes $N$
# steps, because each pixel needs those before it.


# %%
@torch.no_grad()
def draw(model: FullyVisible, count: int) -> Tensor:
    """Sample (count, 12, 12), one pixel after the other."""
    x = torch.zeros(count, len(model.grid))
    for i in range(len(model.grid)):
        x[:, i] = torch.bernoulli(torch.sigmoid(model(x)[:, i]))
    return x.view(-1, *model.grid.shape).long()


torch.manual_seed(0)
show(draw(by_hand, 32), "samples of the model by hand")

# %% [markdown]
# We see strokes now, but few digits. A logistic regression can express "white if the left neighbour is white". It
# cannot express "white if the left neighbour is white *unless* the upper one is white as well". That requires hidden
# layers.
#
# ## MADE: hidden layers with masks
#
# A hidden unit mixes many inputs, so after one layer each output would depend on each input. MADE (Germain et al. 2015)
# gives each hidden unit a *degree* $d$ and removes two kinds of connections:
#
# - the unit sees the tokens of rank $< d$ (ranks count from 0);
# - the logit at rank $r$ sees the units of degree $\le r$.
#
# So only tokens of rank $< d \le r$ reach logit $r$. The picture shows the masks for 9 tokens and 16 hidden units;
# white connections stay, black ones are removed. The product of both masks counts the paths from token to logit. It
# must be strictly lower triangular, like the matrix above.

# %%
small_made = Prior.create("made", grid=TokenGrid((3, 3), 2), hidden=(16,))
(degrees,) = small_made.degrees()  # one layer of 16 units
ranks = torch.arange(9)
first_mask = ranks < degrees[:, None]  # (16, 9)
second_mask = degrees <= ranks[:, None]  # (9, 16)
paths = second_mask.long() @ first_mask.long()  # (9, 9)

figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
panels = [
    ("tokens to hidden units", first_mask, "token", "hidden unit"),
    ("hidden units to logits", second_mask, "hidden unit", "logit"),
    ("number of paths", paths, "token", "logit"),
]
for axis, (title, picture, x, y) in zip(axes, panels, strict=True):
    drawn = axis.imshow(picture, vmin=0)
    axis.set(title=title, xlabel=x, ylabel=y)
figure.colorbar(drawn, ax=axes[2], shrink=0.8)
assert torch.equal(paths > 0, small_made.receptive_field), "receptive_field disagrees"

# %% [markdown]
# Every prior has a `receptive_field`: entry `[i, j]` is True if logit $i$ sees token $j$. The last line compared it to
# the paths.
#
# Now we train MADE on the digits with the same loop. (For real work use `smalti train_prior`.)

# %%
made = train(Prior.create("made", grid=grid, hidden=(256,)), steps=1200, lr=3e-3)
bits["made"] = bits_per_token(made)
show(made.sample(32, generator=torch.Generator().manual_seed(0)), f"samples of MADE, {bits['made']:.3f} bits per token")

# %% [markdown]
# ## Causal convolutions
#
# MADE has separate weights for each pixel. A convolution shares them: an edge looks the same everywhere. If we read the
# grid as a sequence, a *causal* convolution sees only earlier steps. With $k$ taps, a layer sees $k - 1$ steps farther
# than the one below it. WaveNet (van den Oord et al. 2016) doubles the distance between the taps from layer to layer,
# so the reach grows exponentially for the same number of weights.

# %%
figure, axes = plt.subplots(2, 1, figsize=(10, 4.2), layout="constrained")
for axis, (title, dilations) in zip(
    axes, [("taps side by side", [1, 1, 1, 1]), ("dilations 1, 2, 4, 8", [1, 2, 4, 8])], strict=True
):
    nodes = {23}  # the nodes that reach the output at step 23, from the top layer down
    axis.scatter(*zip(*[(x, y) for x in range(24) for y in range(5)], strict=True), s=12, color="0.8")
    for layer in range(4, 0, -1):
        step = dilations[layer - 1]
        edges = [(x, x - back) for x in nodes for back in (0, step)]
        for above, below in edges:
            axis.plot([below, above], [layer - 1, layer], color="tab:blue", lw=1)
        nodes = {below for _, below in edges}
    axis.scatter(sorted(nodes), [0] * len(nodes), s=26, color="tab:red", zorder=3)
    axis.set(title=f"{title}: {len(nodes)} steps visible", yticks=range(5), ylabel="layer", xlim=(-0.7, 23.7))
axes[1].set_xlabel("step")
plt.show()

# %% [markdown]
# We can check this in the network: the gradient of a logit with respect to each token's embedding shows which tokens
# it depends on. We take a row of 48 tokens, random weights, and the last logit.


# %%
def influence(model: Prior, embedding: nn.Module, at: int) -> Tensor:
    """Return the gradient magnitude of the logits at `at` for each token's embedding, `grid.shape`; random tokens."""
    embeddings: list[Tensor] = []
    hook = embedding.register_forward_hook(lambda module, inputs, output: embeddings.append(output))
    logits = model(torch.randint(model.grid.vocab_size, (4, *model.grid.shape)))
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, at].square().sum(), embeddings[0])
    return gradient.abs().sum((0, -1))


row = TokenGrid((48,), 2)
reach = []
torch.manual_seed(0)
for depth in range(1, 6):
    conv = Prior.create("causal_conv", grid=row, depth=depth, dim=16, skip=32).double()
    size = influence(conv, conv.token_embedding, at=47)
    reach.append(F.pad(size, (0, 48 - len(size))) > 0)  # the last token is never an input

plt.figure(figsize=(10, 2))
plt.imshow(torch.stack(reach), cmap="Blues", aspect="auto", vmax=1.4)
plt.yticks(range(5), [f"depth {depth}" for depth in range(1, 6)])
plt.xlabel("token")
plt.title("which tokens the last logit depends on", fontsize=10, loc="left")
plt.show()
print("visible tokens:", [int(seen.sum()) for seen in reach])

# %% [markdown]
# The reach doubles with each block: 2, 4, 8, 16, 32 inputs. A grid is read row by row, so the pixel above is 12 steps
# away. Seven blocks reach back 128 of the 144 steps.

# %%
causal_conv = train(Prior.create("causal_conv", grid=grid, depth=7, dim=24, skip=32), steps=250, lr=6e-3)
bits["causal_conv"] = bits_per_token(causal_conv)
samples = causal_conv.sample(32, generator=torch.Generator().manual_seed(0))
show(samples, f"samples of causal_conv, {bits['causal_conv']:.3f} bits per token")

# %% [markdown]
# ## PixelCNN and its blind spot
#
# In an image the pixel above is as near as the pixel to the left. PixelCNN (van den Oord et al. 2016) therefore uses
# 2-D convolutions with a masked kernel: the rows above, and the left part of its own row.

# %%
kernel_mask = torch.ones(5, 5)
kernel_mask[2, 2:] = 0  # the centre (in the first layer) and the pixels to its right
kernel_mask[3:] = 0  # rows below
plt.figure(figsize=(2.2, 2.2))
plt.imshow(kernel_mask)
plt.gca().add_patch(plt.Rectangle((1.5, 1.5), 1, 1, color="tab:red"))
plt.title("the mask of a 5x5 kernel", fontsize=10)
plt.xticks([])
plt.yticks([])
plt.show()

# %% [markdown]
# A stack of such layers sees farther with each layer. But the kernel never extends to the right in its own row, so a
# path to the right must also go up. The gradient shows the effect. Blue tokens reach the red one, and grey ones come
# later. White ones come earlier **but are never seen**: the *blind spot*.
#
# The gated PixelCNN (van den Oord et al. 2016b) has two stacks. The *vertical* stack sees the rows above, without a
# mask. The *horizontal* stack sees the left part of its own row, and receives the features of the vertical stack at
# each layer. Together they see all earlier tokens.

# %%
SIDE, CENTRE = 15, 7 * 15 + 7


def seen_by(name: str, depth: int) -> Tensor:
    """Find by the gradient which tokens reach the logits in the centre, bool (15, 15)."""
    torch.manual_seed(0)
    sizes = {"dim": 8, "first_kernel": 3, "kernel": 3}
    model = Prior.create(name, grid=TokenGrid((SIDE, SIDE), 4), depth=depth, **sizes).double()
    seen = influence(model, model.embedding, CENTRE) > 0
    assert torch.equal(seen.flatten(), model.receptive_field[CENTRE]), "receptive_field disagrees"
    return seen


# %%
figure, axes = plt.subplots(2, 4, figsize=(10, 5.4), layout="constrained")
earlier = (torch.arange(SIDE**2) < CENTRE).view(SIDE, SIDE)
for line, name in zip(axes, ["pixelcnn", "gated_pixelcnn"], strict=True):
    for axis, depth in zip(line, [1, 2, 4, 8], strict=True):
        seen = seen_by(name, depth)
        picture = torch.full((SIDE, SIDE, 3), 0.8)
        picture[earlier] = 1.0
        picture[seen] = torch.tensor([0.2, 0.45, 0.75])
        picture[7, 7] = torch.tensor([0.84, 0.15, 0.15])
        axis.imshow(picture)
        unseen = int((earlier & ~seen).sum())
        axis.set_title(f"{name}, depth {depth}\n{unseen} earlier tokens unseen", fontsize=9)
        axis.set(xticks=[], yticks=[])

# %% [markdown]
# At depth 8 the gated PixelCNN sees every earlier token. The blind spot of the plain one remains at any depth. Both
# define a correct density: a model may ignore earlier tokens, as long as it does not see later ones.

# %%
sizes = {"grid": grid, "dim": 16, "depth": 4, "first_kernel": 5, "kernel": 3}
for name in ("pixelcnn", "gated_pixelcnn"):
    torch.manual_seed(0)
    model = train(Prior.create(name, **sizes), steps=250, lr=1e-2)
    bits[name] = bits_per_token(model)
    show(
        model.sample(16, generator=torch.Generator().manual_seed(0)),
        f"samples of {name}, {bits[name]:.3f} bits per token",
    )

# %% [markdown]
# ## Masked attention
#
# In a transformer each position weighs all positions by a softmax of scores. A causal mask sets the scores of later
# tokens to $-\infty$ before the softmax. They get weight 0, and each row of weights still sums to one.

# %%
torch.manual_seed(0)
scores = torch.randn(9, 9)
may_attend = torch.ones(9, 9, dtype=torch.bool).tril()  # True = may attend, as in torch
weights = scores.masked_fill(~may_attend, -torch.inf).softmax(-1)

figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
panels = [("scores", scores, "RdBu_r"), ("may attend", may_attend, "gray"), ("weights", weights, "Blues")]
for axis, (title, picture, colors) in zip(axes, panels, strict=True):
    figure.colorbar(axis.imshow(picture, cmap=colors), ax=axis, shrink=0.7)
    axis.set(title=title, xlabel="key", ylabel="query")
print("sums of the rows:", [round(total, 4) for total in weights.sum(-1).tolist()])

# %% [markdown]
# The mask includes the diagonal, although a token must not see itself. The reason is a shift: the input at rank $r$ is
# the token of rank $r - 1$, with a start vector at rank 0.
#
# The mask only requires "earlier in the order", so any order of the grid works; notebook 3 is about orders. In the
# picture both axes are in raster order on a 4x4 grid: row $i$ shows the tokens that logit $i$ sees.

# %%
orders = ["raster", "snake", "spiral_in", "random:0"]
figure, axes = plt.subplots(2, 4, figsize=(10, 5.2), layout="constrained")
for (above, below), order in zip(axes.T, orders, strict=True):
    ranks = torch.argsort(make_order(order, (4, 4)))
    gpt = Prior.create("gpt", grid=TokenGrid((4, 4), 2), dim=16, depth=1, heads=2, order=order)
    assert torch.equal(gpt.receptive_field, ranks < ranks[:, None])
    above.imshow(ranks.view(4, 4), cmap="viridis")
    for cell, rank in enumerate(ranks.tolist()):
        color = "white" if rank < 8 else "black"
        above.text(cell % 4, cell // 4, rank, ha="center", va="center", color=color)
    above.set(title=f"{order}: ranks", xticks=[], yticks=[])
    below.imshow(gpt.receptive_field)
    below.set(title="receptive field", xlabel="token", ylabel="logit")

# %%
gpt = train(Prior.create("gpt", grid=grid, dim=48, depth=2, heads=4), steps=250, lr=1e-2)
bits["gpt"] = bits_per_token(gpt)
show(gpt.sample(32, generator=torch.Generator().manual_seed(0)), f"samples of gpt, {bits['gpt']:.3f} bits per token")

# %% [markdown]
# ## Side by side
#
# These models trained for different numbers of seconds, so this is not a ranking of architectures
# ([docs/results.md](../results.md#the-ladder) compares them). It shows that seeing earlier tokens saves bits, in each
# architecture.

# %%
names = list(bits)
plt.figure(figsize=(8, 2.8))
bars = plt.barh(names[::-1], [bits[name] for name in names[::-1]], color="tab:blue")
plt.bar_label(bars, fmt="%.3f", padding=3)
plt.xlim(0, 1.12)
plt.xlabel("held-out bits per token (fewer is better)")
plt.show()
assert all(bits[name] < bits["marginal"] for name in names[2:]), bits

# %% [markdown]
# ## Is it really a density?
#
# A density sums to one over *all* grids. For large grids this cannot be checked, but for tiny ones it can: 3x3 binary
# tokens make $2^9 = 512$ grids, and we add up their probabilities. The weights are random, because the sum must be one
# for any weights. It is a property of the masks.

# %%
tiny = TokenGrid((3, 3), 2)
every_grid = torch.cartesian_prod(*[torch.arange(2)] * 9).view(-1, 3, 3)
small = {"dim": 16, "depth": 2}
models = {
    "marginal": {},
    "made": {"hidden": (32,)},
    "causal_conv": {**small, "skip": 16},
    "pixelcnn": small,
    "gated_pixelcnn": small,
    "pixelcnn_pp": {"dim": 16},
    "pixelsnail": {"dim": 16},
    "gpt": {**small, "heads": 2},
    "blocks": {**small, "heads": 2, "order": "diagonal"},
    "masked": {**small, "heads": 2},
}


# %%
def randomized(model: nn.Module) -> nn.Module:
    """Draw large random weights, because untrained models give almost the same probability to every grid."""
    for weights in model.parameters():
        nn.init.normal_(weights, std=0.3)
    return model.double().eval()


torch.manual_seed(0)
chances = {"by hand": randomized(FullyVisible(tiny))}
chances |= {name: randomized(Prior.create(name, grid=tiny, **settings)) for name, settings in models.items()}
with torch.no_grad():
    chances = {name: model.log_prob(every_grid).double().exp() for name, model in chances.items()}
for name, p in chances.items():
    print(f"{name:15} sum of p over {len(p)} grids: {p.sum():.6f}, the likeliest has {p.max():.3f}")
assert all(abs(p.sum() - 1) < 1e-4 for p in chances.values())

# %% [markdown]
# Without the masks, a pixel that sees itself can simply copy itself. We set the diagonal of the matrix by hand: now
# each factor is near 1 for *every* grid. The loss looks excellent, and training would find such weights at once, but
# the result is not a density. The curves add up the probabilities of the grids, most probable first. All end at one,
# except the curve of the model that peeks.

# %%
peek, bias = 6 * torch.eye(9), -3.0  # the diagonal that tril(-1) removes
x = every_grid.flatten(1).float()
nats = -F.binary_cross_entropy_with_logits(x @ peek + bias, x, reduction="none").sum(1)
chances["by hand, peeking"] = nats.exp()

plt.figure(figsize=(8, 3.2))
for name, p in chances.items():
    style = {"color": "tab:red", "lw": 2.5} if "peeking" in name else {"color": "tab:blue", "lw": 1}
    plt.loglog(range(1, 513), p.sort(descending=True).values.cumsum(0), **style)
plt.text(30, 30, "by hand, peeking", color="tab:red", ha="right")
plt.text(30, 1.3, "all others", color="tab:blue", ha="right")
plt.axhline(1, color="0.6", lw=0.8, ls="--")
plt.xlim(1, 512)
plt.ylim(0.03, 600)
plt.xlabel("number of grids, likeliest first")
plt.ylabel("sum of p")
plt.show()
print(f"with peeking the sum is {chances['by hand, peeking'].sum():.1f}")

# %% [markdown]
# The last check compares `log_prob` to `sample`. In 20,000 samples each grid must occur as often as its probability
# says, within the noise of counting.

# %%
torch.manual_seed(0)
pair = randomized(Prior.create("gpt", grid=tiny, dim=16, depth=2, heads=2))
drawn = pair.sample(20_000, generator=torch.Generator().manual_seed(0)).flatten(1)
counts = torch.bincount((drawn * 2 ** torch.arange(8, -1, -1)).sum(1), minlength=512)
with torch.no_grad():
    expected = 20_000 * pair.log_prob(every_grid).double().exp()

plt.figure(figsize=(3.6, 3.6))
plt.scatter(expected, counts, s=8)
plt.plot([0, expected.max()], [0, expected.max()], color="tab:red", lw=1)
plt.xlabel("expected from log_prob")
plt.ylabel("counted in 20,000 samples")
plt.show()
off = ((counts - expected) / expected.clamp(min=1).sqrt()).abs()
print(f"mean deviation of a count: {off.mean():.2f} standard deviations (0.80 by chance)")

# %% [markdown]
# ## What to remember
#
# - The chain rule turns classifiers into an exact density, for any order.
# - Each architecture has a mask: a triangular matrix, degrees, causal kernels, two stacks, or $-\infty$ in a softmax.
# - Training takes one pass for all tokens; sampling takes $N$ steps.
# - A model that sees too little pays in bits. A model that sees later tokens reports wrong bits, which a sum over all
#   tiny grids detects.
#
# [The next notebook](2_two_stages.py) adds a tokenizer, so that images can be large.
