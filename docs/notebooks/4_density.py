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
# # Densities at work
#
# A model that assigns probabilities to images can do more than sample. This notebook uses the trained pipeline of
# digits in the package for four tasks: completion, anomaly detection, compression and classification.
#
# **You will see** digits completed from a part, strange images and the scores that find them, digits as streams of a
# few bytes, and the class of a digit by Bayes' rule. No model is trained. [The likelihood of an
# image](../likelihood.md) has the theory.

# %%
import io
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines import ImagePipeline
from pipelines.images import DataConfig, load_images

plt.rcParams.update({"figure.dpi": 110, "image.cmap": "gray", "image.interpolation": "nearest"})

pipe = ImagePipeline.from_pretrained("digits")
print(pipe)

# %% [markdown]
# We use only digits that it was not trained on. Half of these were used to calibrate its anomaly scores, so we take the
# other half.

# %%
data = load_images(DataConfig(source="digits"))
new = range(1, len(data.held_out), 2)
images, labels = data.held_out.batch(new), data.held_out.labels[list(new)]
print(len(images), "new digits", tuple(images.shape[1:]))


def line(images: Tensor) -> Tensor:
    """Put images (B, 1, H, W) in a row, (H, B * W)."""
    return torch.cat(list(images[:, 0]), 1)


def stack(rows: dict[str, Tensor], height: float = 0.95) -> list[plt.Axes]:
    """Show rows of images under each other, with their names."""
    figure, axes = plt.subplots(len(rows), 1, figsize=(9, height * len(rows)), layout="constrained")
    for axis, (name, row) in zip(axes, rows.items(), strict=True):
        axis.imshow(line(row), vmin=-1, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
    return list(axes)


# %% [markdown]
# ## Completion
#
# `known` is True where a pixel is given. `complete` encodes the known pixels and samples the other tokens from
# $p(\text{hidden} \mid \text{known})$. We sample four completions of each image. Known pixels are returned unchanged.

# %%
known = torch.zeros(28, 28, dtype=torch.bool)
known[:16] = True  # the upper part is given
some = images[:10]
draws = pipe.complete(some, known, draws=4, seed=0, output_type="pt").images
rows = {"image": some, "known": torch.where(known, some, -0.4)}
axes = stack(rows | {f"draw {k + 1}": draws[:, k] for k in range(4)})
for axis in axes[1:]:
    axis.axhline(15.5, color="tab:red", lw=0.8)

# %% [markdown]
# The same conditional can be *evaluated*. We combine the upper part of each of eight digits with the lower part of each
# of them, and compute $\log p(\text{lower} \mid \text{upper})$. The true lower part should be among the most probable
# of its row.

# %%
eight = images[:8]
pairs = torch.where(known, eight[:, None], eight[None, :])  # (i, j): upper part of i, lower part of j
nats = pipe.conditional_log_prob(pairs.flatten(0, 1), known).view(8, 8)
bits = -nats / math.log(2)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
left.imshow(torch.cat([line(row) for row in pairs]), vmin=-1, vmax=1)
left.set(title="upper part of the row, lower part of the column", xticks=[], yticks=[])
drawn = right.imshow(bits - bits.min(1, keepdim=True).values, cmap="magma_r")
right.plot(range(8), range(8), "o", mfc="none", mec="tab:green", ms=14)
right.set(title="bits more than the best of the row; circles: the true pairs", xticks=[], yticks=[])
figure.colorbar(drawn, ax=right, shrink=0.8)
plt.show()

# %% [markdown]
# ## Anomalies
#
# A first idea: anomalies are improbable, so use $-\log p$ as a score. Here are damaged digits and images of other
# kinds, with the bits of each.


# %%
def strange_images() -> dict[str, Tensor]:
    """Make images (1, 28, 28) unlike the training images."""
    chance = torch.Generator().manual_seed(0)
    seven, six, zero = images[0], images[1], images[2]
    dotted, broken, checks = six.clone(), zero.clone(), torch.full((1, 28, 28), -1.0)
    dotted[:, 3:7, 21:25] = 1  # a spot where nothing should be
    broken[:, 11:18] = -1  # a band is missing
    checks[:, ::4] = 1
    return {
        "a digit": seven,
        "with a spot": dotted,
        "with a gap": broken,
        "inverted": -six,
        "on its side": six.transpose(1, 2).flip(1),
        "noise": torch.rand(1, 28, 28, generator=chance) * 2 - 1,
        "stripes": checks,
        "black": torch.full((1, 28, 28), -1.0),
    }


strange = strange_images()
batch = torch.stack(list(strange.values()))
bits = -pipe.log_prob(batch) / math.log(2)
digits = -pipe.log_prob(images) / math.log(2)


# %%
def labelled(values: list[str], title: str) -> None:
    """Show the strange images, each with a text below."""
    figure, axes = plt.subplots(1, len(batch), figsize=(10, 1.9), layout="constrained")
    for axis, image, name, value in zip(axes, batch, strange, values, strict=True):
        axis.imshow(image[0], vmin=-1, vmax=1)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(value, fontsize=9)
        axis.set(xticks=[], yticks=[])
    figure.suptitle(title, fontsize=10)


labelled([f"{value:.0f} bits" for value in bits], "bits of the tokens")

# %%
plt.figure(figsize=(9, 2.8))
plt.hist(digits, bins=40, color="0.75", label="new digits")
for number, (name, value) in enumerate(zip(strange, bits.tolist(), strict=True)):
    plt.axvline(value, color=f"C{number}", label=name)
plt.xlabel("bits of the tokens")
plt.ylabel("images")
plt.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
plt.show()
assert bits[[4, 7]].max() < digits.max(), "on its side, and black, are within the range of digits"

# %% [markdown]
# Noise, stripes and the inverted digit stand out. But the nine on its side and the black image cost no more bits than
# many digits. This is expected: their tokens are frequent, and simple images are likely under any model (Nalisnick
# et al. 2019). A probable image can be an anomaly.
#
# The default score, `joint`, combines two other criteria: the distance of the prior's features from those of normal
# images, and how far the image's statistics (bits, reconstruction error) are from their usual range, *in either
# direction*. Calibration fits both to normal images.
#
# **p-values** make a score interpretable: the share of normal images with at least this score. At most 5 % of new
# normal images have $p \le 0.05$, on average over calibrations.

# %%
p_strange = pipe.anomaly_score(batch, p_values=True)
labelled([f"p = {value:.3f}" for value in p_strange], "p-values of the score joint")

# %%
count = len(images)
p_new = pipe.anomaly_score(images[:count], p_values=True)
plt.figure(figsize=(6, 2.6))
plt.hist(p_new, bins=20, range=(0, 1), color="0.75", edgecolor="white")
plt.axhline(count / 20, color="tab:red", ls="--", label="all p equally frequent")
plt.xlabel("p-value of a new digit")
plt.ylabel("images")
plt.legend(fontsize=8)
plt.show()
print(f"{(p_new <= 0.05).double().mean():.1%} of {count} new digits have p <= 0.05")
assert p_strange[[3, 5, 6, 7]].max() < 0.05, "inverted, noise, stripes and black are found"

# %% [markdown]
# The black image is detected now, and so are all other images that are not digits. The nine on its side is not
# detected: its strokes are those of digits. The spot and the gap are too small compared to the whole image.
#
# The p-values of new digits are roughly uniform. The share below 0.05 varies between calibrations; the guarantee of 5 %
# is about the average, and this calibration used 250 images. (`confidence=0.9` gives thresholds that hold in nine of
# ten calibrations.)
#
# **Where** is the anomaly? Each token has its own $-\log_2 p$ given the earlier ones. `anomaly_map` distributes these
# bits over the pixels of the token's patch, so that all pixels sum to the bits of the image. The spot and the gap are
# visible as bright regions. (In the inverted digit only the first row is surprising; after it the model expects a white
# background.)

# %%
maps = pipe.anomaly_map(batch[:4])
figure, axes = plt.subplots(2, 4, figsize=(8, 4.3), layout="constrained")
for (above, below), image, name, found in zip(axes.T, batch, strange, maps, strict=False):
    above.imshow(image[0], vmin=-1, vmax=1)
    above.set(title=name, xticks=[], yticks=[])
    drawn = below.imshow(found, cmap="magma", vmin=0, vmax=float(maps.max()))
    below.set(xticks=[], yticks=[])
figure.colorbar(drawn, ax=axes[1], label="bits")
plt.show()

# %% [markdown]
# ## Compression
#
# A density is a code. An entropy coder writes an event of probability $p$ in about $-\log_2 p$ bits. `compress` writes
# the tokens of all images into one stream; `decompress` returns the same tokens on any machine. It also stores the most
# likely class of each image, which makes the stream shorter than $-\log_2 p$ without a class.

# %%
count = 200
batch_to_store = images[:count]
stream = pipe.compress(batch_to_store, progress=False)
restored = pipe.decompress(stream, output_type="pt", progress=False)
promised = -pipe.log_prob(batch_to_store).sum().item() / math.log(2) / 8

stored = pipe.reconstruct(batch_to_store, output_type="pt")
print(f"{len(stream)} bytes for {count} digits, {len(stream) / count:.1f} each")
print(f"-log2 p without a class is {promised / count:.1f} bytes each")
print(f"fixed-length ids would take {49 * 9 / 8:.1f}, and 8-bit pixels 784")
print("the decompressed images equal the reconstructions:", torch.equal(restored, stored))

# %% [markdown]
# How do other coders compare? They are made for large pictures, so we put all digits on one sheet, and encode it with
# JPEG and WebP at several qualities, and with PNG, which is lossless. PSNR measures the distance to the original.


# %%
def sheet(images: Tensor) -> Image.Image:
    """Put images into one 8-bit picture, twenty per row."""
    rows = [line(row) for row in images.split(20)]
    return Image.fromarray(((torch.cat(rows) + 1) * 127.5).round().to(torch.uint8).numpy())


def psnr(error: Tensor) -> float:
    """Return the PSNR in dB of errors of pixels in [-1, 1]."""
    return 10 * math.log10(4 / error.square().mean().item())


def coded(kind: str, **settings: object) -> tuple[float, float]:
    """Return bytes per image, and PSNR."""
    file = io.BytesIO()
    sheet(batch_to_store).save(file, kind, **settings)
    back = torch.frombuffer(bytearray(Image.open(file).convert("L").tobytes()), dtype=torch.uint8)
    there = torch.frombuffer(bytearray(sheet(batch_to_store).tobytes()), dtype=torch.uint8)
    return len(file.getvalue()) / count, psnr((back.double() - there.double()) / 127.5) if kind != "PNG" else math.inf


curves = {kind: [coded(kind, quality=q) for q in (1, 5, 10, 20, 40, 60, 80)] for kind in ("JPEG", "WEBP")}
png = coded("PNG", optimize=True)[0]
ours = len(stream) / count, psnr(stored - batch_to_store)

# %%
plt.figure(figsize=(7, 3.4))
for kind, points in curves.items():
    plt.plot(*zip(*points, strict=True), "o-", label=kind, ms=4)
plt.plot(*ours, "*", ms=16, color="tab:red", label="the pipeline")
plt.axvline(png, color="0.5", ls="--", label="PNG, lossless")
plt.xlabel("bytes per digit")
plt.ylabel("PSNR, dB")
plt.legend(fontsize=8)
plt.show()
print(f"the pipeline: {ours[0]:.1f} bytes at {ours[1]:.1f} dB; PNG {png:.0f} bytes")
assert len(stream) / count < png / 4

# %% [markdown]
# The comparison is unfair: our coder was trained on digits, and JPEG is for all images. It shows how much knowledge of
# the data helps. (Both sides need the model, as both sides of JPEG need its tables. With a decoder that has a pixel
# likelihood, `lossless=True` preserves every pixel: [docs/density.md](../density.md#compression).)
#
# ## Classification
#
# **Bayes.** The prior models $p(\text{tokens} \mid \text{class})$. With Bayes' rule the generator is a classifier, and
# [`infer`](../infer.md) applies it to any column:
#
# $$p(\text{class} \mid x) = \frac{p(\text{class})\, p(x \mid \text{class})}{\sum_c p(c)\, p(x \mid c)}.$$

# %%
count = len(images)
tokens, truth = pipe.encode(images[:count]), labels[:count]
posterior = pipe.infer(images[:count], "label").probabilities  # (B, 10)
guess = posterior.argmax(1)
accuracy = (guess == truth).double().mean().item()
confusion = torch.zeros(10, 10).index_put_((truth, guess), torch.ones(count), accumulate=True)
wrong = (guess != truth).nonzero()[:, 0]

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=[1, 1.6])
left.imshow(confusion.sqrt(), cmap="Blues")
for at, number in enumerate(confusion.flatten().long().tolist()):
    color = "white" if number > confusion.max() / 3 else "black"
    left.text(at % 10, at // 10, number or "", ha="center", va="center", fontsize=7, color=color)
left.set(title=f"{accuracy:.1%} correct", xlabel="predicted", ylabel="true", xticks=range(10), yticks=range(10))
shown = wrong[:10]
right.imshow(torch.cat([line(part) for part in images[shown].split(5)]), vmin=-1, vmax=1)
for place, at in enumerate(shown.tolist()):
    text = f"{truth[at]} as {guess[at]}"
    right.text(28 * (place % 5) + 1, 28 * (place // 5) + 4, text, color="tab:orange", fontsize=9)
right.set(title="the first errors: true class and prediction", xticks=[], yticks=[])
assert accuracy > 0.85

# %% [markdown]
# **Representations.** To predict the next token, the prior has to recognize the digit. `embed` returns the features of
# one layer as a vector. On the left are new digits, on the right their nearest training digits, by cosine similarity in
# the middle layer.

# %%
size = 1500
library = data.train.batch(range(size))
index = F.normalize(pipe.embed(library), dim=1)
queries = F.normalize(pipe.embed(images[:8]), dim=1)
nearest = (queries @ index.T).topk(9).indices

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 6), layout="constrained", width_ratios=[1, 9])
left.imshow(torch.cat(list(images[:8, 0])), vmin=-1, vmax=1)
left.set(title="new", xticks=[], yticks=[])
right.imshow(torch.cat([line(library[row]) for row in nearest]), vmin=-1, vmax=1)
right.set(title=f"nearest of {size} training digits", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# **Linear probes** measure how much class information a representation contains. For each layer we fit a linear map
# from vectors to classes by least squares, and measure its accuracy on new digits. The prior reads the image without a
# class. The vector of a layer is the mean over positions, as in `embed`.

# %%
train_tokens = pipe.encode(library)


def vectors(images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Return the inputs of the linear maps, (B, dim) each."""
    with torch.no_grad():
        layers = [pipe.prior.features(tokens, layer=layer) for layer in range(pipe.prior.feature_layers)]
    found = {f"prior.{k}": F.layer_norm(each, each.shape[-1:]).mean(1) for k, each in enumerate(layers)}
    return {
        "pixels": images.flatten(1),
        "codes": F.one_hot(tokens.flatten(1), pipe.prior.grid.vocab_size).double().mean(1),
        **found,
    }


def probe(inside: Tensor, outside: Tensor) -> float:
    """Fit a linear map by ridge regression; return its accuracy on new digits."""
    mean, spread = inside.double().mean(0), inside.double().std()
    inside, outside = (F.pad((part.double() - mean) / spread, (0, 1), value=1) for part in (inside, outside))
    wanted = F.one_hot(data.train.labels[:size], 10).double()
    penalty = 0.003 * size * torch.eye(inside.shape[1]).double()
    weights = torch.linalg.solve(inside.T @ inside + penalty, inside.T @ wanted)
    return ((outside @ weights).argmax(1) == truth).double().mean().item()


# %%
inside, outside = vectors(library, train_tokens), vectors(images[:count], tokens)
accuracies = {layer: probe(inside[layer], outside[layer]) for layer in inside}
layers = list(accuracies)[::-1]
plt.figure(figsize=(7, 2.6))
bars = plt.barh(layers, [accuracies[layer] for layer in layers], color="tab:blue")
plt.bar_label(bars, fmt="%.3f", padding=3)
plt.xlim(0, 1.1)
plt.xlabel(f"accuracy on {count} new digits, after {size} labels")
plt.show()

# %% [markdown]
# `codes` counts the ids and ignores their positions. A layer of the prior has 64 features. A linear map on the middle
# layers is about as accurate as one on all 784 pixels, although the prior was not trained to classify.
#
# ## What to remember
#
# - Conditionals can be sampled, which completes images, and evaluated.
# - A probable image can be an anomaly. Use features and both tails of the statistics, and read p-values.
# - A good density is a good code.
# - A generator is also a classifier, and its layers contain class information.
#
# [Notebook 5](5_own_images.py) trains a pipeline on your own images.
