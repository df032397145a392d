"""How good samples are: distances between sets of images in a feature space that has a name.

Precision and recall: Kynkaanniemi et al. 2019 (arXiv:1904.06991). SSIM: Wang et al. 2004 (IEEE TIP 13(4)).

Each figure depends on the number of images, so both sides have the same number. Beside each figure of the samples
stands the figure of as many training images: real images that are not the held-out ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.precision import in_finest

from ..images import ImageDataset
from ..processes.group import ALONE, ProcessGroup
from ..shuffling import samples_of
from .frechet import frechet_distance

Change = Callable[[Tensor], Tensor]

FEATURES = 64
LONGEST_SIDE = 64  # larger images are averaged down to it, or the classifier would take minutes
BATCH, LEARNING_RATE, SEED = 128, 4e-3, 0
AT_A_TIME = 256  # images, or rows
LEAST = 10  # images on each side; with fewer, a third-nearest neighbour says nothing
NEIGHBOURS = 3  # of precision and recall


class Classifier(nn.Module):
    """Images `(B, C, H, W)` in [-1, 1] of any size -> features `(B, 64)` -> logits `(B, classes)`."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = [(channels, 32), (32, FEATURES), (FEATURES, FEATURES)]
        layers = [part for pair in widths for part in (nn.Conv2d(*pair, 3, stride=2, padding=1), nn.ReLU())]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * FEATURES, FEATURES))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, classes))

    def features(self, images: Tensor) -> Tensor:
        """What the last layer reads before its nonlinearity: nearer to a Gaussian, and no unit is dead."""
        side = max(images.shape[2:])
        if side > LONGEST_SIDE:
            size = [max(4, n * LONGEST_SIDE // side) for n in images.shape[2:]]
            images = F.interpolate(images, size, mode="area")
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.features(images))


@dataclass(frozen=True)
class FeatureSpace:
    """Images `(B, C, H, W)` in [-1, 1] -> float64 rows `(B, d)`. name: what distances in it are called after; origin:
    how it was made."""

    name: str
    origin: str
    extract: Change
    scale: float = 1.0

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Rows `(B, d)`, on the CPU."""
        return torch.cat([self.extract(part).cpu().double() for part in images.split(AT_A_TIME)]) * self.scale

    def of(
        self, images: ImageDataset, chosen: Tensor, through: Change | None = None, group: ProcessGroup = ALONE
    ) -> Tensor:
        """Rows of the chosen images of a data set, or of what `through` makes of them."""

        def rows(part: Tensor) -> Tensor:
            batch = images.batch(part)
            return self(through(batch) if through else batch)

        return torch.cat(group.map(rows, chosen.split(AT_A_TIME)))


def feature_space(
    train: ImageDataset, held_out: ImageDataset, steps: int, source: str, group: ProcessGroup = ALONE
) -> FeatureSpace:
    """A classifier of the training images' labels; random convolutions where there are none, or for no `steps`. Scaled
    so that a feature of training images has variance 1 on average."""
    steps = steps if train.labels is not None and len(train.class_names) > 1 else 0

    def make() -> tuple[Classifier, str]:
        net = train_classifier(train, steps)
        if not steps:
            return net, f"a small convolutional net with random weights, seed {SEED}"
        epochs = f"{steps} steps ({steps * BATCH / len(train):.1f} epochs) on {source}"
        return net, f"a small classifier, {epochs}, seed {SEED}, accuracy {accuracy(net, held_out):.1%}"

    net, origin = group.on_main(make)
    space = FeatureSpace(f"{'classifier' if steps else 'random-conv'}-{FEATURES}", origin, net.features)
    variance = float(space.of(train, shuffled(len(train))[:2000], group=group).var(0, correction=0).mean())
    return replace(space, scale=variance**-0.5 if variance > 0 else 1.0)


def train_classifier(images: ImageDataset, steps: int) -> Classifier:
    """A classifier of the labels; with 0 steps, random weights. On the CPU, where a seed means the same everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # and not a GPU's, which would stay seeded
        net = Classifier(images.image_shape[0], max(1, len(images.class_names)))
    if steps:
        assert images.labels is not None
        optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for step in range(steps):
            rows, _ = samples_of(len(images), BATCH, SEED, step)
            loss = F.cross_entropy(net(images.batch(rows)), images.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.inference_mode()
def accuracy(net: Classifier, images: ImageDataset) -> float:
    """Share of (at most 2,000) labelled images that it gives their label."""
    assert images.labels is not None
    some = shuffled(len(images))[:2000]
    right = [net(images.batch(part)).argmax(1) == images.labels[part] for part in some.split(256)]
    return float(torch.cat(right).double().mean())


def shuffled(count: int) -> Tensor:
    """All of `count` positions in an order that is random but always the same: its first n are a fair sample."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SEED))


# Reconstructions ----------------------------------------------------------------------------------


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair, `(B,)`, of `(B, C, H, W)` in [-1, 1]: the mean over channels and Gaussian
    windows (11 x 11, sigma 1.5; the largest odd size that fits smaller images) that lie within the image. At most 1.

    In float64: variances are differences of means of squares, which cancel where an image is flat.
    """
    kind, images, others = images.dtype, in_finest(images), in_finest(others)
    channels, size = images.shape[1], min(11, *images.shape[2:])
    size -= 1 - size % 2
    offsets = torch.arange(size, dtype=images.dtype, device=images.device) - size // 2
    weights = torch.softmax(-(offsets**2) / (2 * 1.5**2), 0).expand(channels, 1, size)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, weights[..., None], groups=channels), weights[..., None, :], groups=channels)

    a, b = (images + 1) / 2, (others + 1) / 2
    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return (light * (2 * covariance + 0.03**2) / (variances + 0.03**2)).flatten(1).mean(1).clamp(max=1).to(kind)


# Sets of rows -------------------------------------------------------------------------------------


def nearest_rows(rows: Tensor, others: Tensor, k: int = 1, group: ProcessGroup = ALONE) -> tuple[Tensor, Tensor]:
    """Distances and indices `(n, k)` of the `k` nearest `others` `(m, d)` of each of `rows` `(n, d)`, ascending."""
    mode = "donot_use_mm_for_euclid_dist" if rows.dtype == torch.float64 else "use_mm_for_euclid_dist"

    def nearest(part: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.cdist(part, others, compute_mode=mode).topk(k, largest=False)
        return found.values, found.indices

    found = group.map(nearest, rows.split(AT_A_TIME))
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


def neighbourhoods(real: Tensor, fake: Tensor, group: ProcessGroup = ALONE) -> dict[str, float]:
    """precision and recall of `fake` `(n, d)` against `real` `(n, d)`: the share of rows of one set that lie in a ball
    around a row of the other, which reaches to its third nearest neighbour. Raises `ValueError` for sets of different
    sizes, and for too few rows."""
    if len(real) != len(fake) or len(real) <= NEIGHBOURS:
        raise ValueError(f"needs equally many rows, more than {NEIGHBOURS} (got {len(real)} and {len(fake)})")
    return {"precision": share_inside(fake, real, group), "recall": share_inside(real, fake, group)}


def share_inside(rows: Tensor, centres: Tensor, group: ProcessGroup = ALONE) -> float:
    """The share of `rows` `(n, d)` in a ball around one of `centres` `(m, d)`."""
    radii = nearest_rows(centres, centres, NEIGHBOURS + 1, group)[0][:, -1]  # the first neighbour is the row itself

    def inside(part: Tensor) -> Tensor:
        return (torch.cdist(part, centres, compute_mode="donot_use_mm_for_euclid_dist") <= radii).any(1)

    return float(torch.cat(group.map(inside, rows.split(AT_A_TIME))).double().mean())


# All of it ----------------------------------------------------------------------------------------


def compare(
    space: FeatureSpace,
    drawn: Tensor,
    train: ImageDataset,
    held_out: ImageDataset,
    reconstruct: Change,
    group: ProcessGroup = ALONE,
) -> tuple[dict[str, float], Tensor, Tensor]:
    """The figures of samples, whose rows are `drawn` `(n, d)`, not more than there are images of a split; and all of
    them, the likeliest copies first, with the positions of the training images nearest to them, `(n,)` each.

    Held-out images are compared to samples, to training images (prefix `train_`: what a perfect model reaches) and to
    reconstructions of training images (`reconstruction_`: what a perfect prior reaches with this tokenizer). Samples
    that are much nearer to training images than held-out images are may be copies.
    """
    count = len(drawn)
    seen, unseen = shuffled(len(train)), shuffled(len(held_out))[:count]
    known, real = space.of(train, seen, group=group), space.of(held_out, unseen, group=group)
    sets = {"": drawn, "train_": known[:count], "reconstruction_": space.of(train, seen[:count], reconstruct, group)}
    figures: dict[str, float] = {"num_compared": count}
    for prefix, rows in sets.items():
        found = {"frechet_distance": frechet_distance(rows, real), **neighbourhoods(real, rows, group)}
        figures |= {prefix + name: value for name, value in found.items()}
    distances, indices = (found[:, 0] for found in nearest_rows(drawn, known, group=group))
    figures["nearest_distance"] = float(distances.median())
    figures["held_out_nearest_distance"] = float(nearest_rows(real, known, group=group)[0].median())
    # Plain distances would list the simplest images; a copy is nearer to its original than other originals are.
    spacing = nearest_rows(known[indices], known, 2, group)[0][:, -1]
    order = (distances / spacing.clamp(min=1e-12)).argsort(stable=True)
    return figures, order, seen[indices[order]]
