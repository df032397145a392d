"""Sample quality: distances between sets of images in a feature space, and SSIM.

Precision and recall: Kynkaanniemi et al. 2019 (arXiv:1904.06991). SSIM: Wang et al. 2004 (IEEE TIP 13(4)).

Each figure depends on the number of images, so both sets have the same size. Each figure of samples is reported beside
that of as many training images, which are real images outside the held-out set.
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
LONGEST_SIDE = 64  # larger images are downsampled to keep the classifier fast
BATCH, LEARNING_RATE, SEED = 128, 4e-3, 0
AT_A_TIME = 256  # images or rows per batch
LEAST = 10  # minimum images per set; with fewer, a third-nearest neighbour is meaningless
NEIGHBOURS = 3  # of precision and recall


class Classifier(nn.Module):
    """Images `(B, ..., C, H, W)` in [-1, 1] of any size -> features `(B, 64)` -> logits `(B, classes)`."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = [(channels, 32), (32, FEATURES), (FEATURES, FEATURES)]
        layers = [part for pair in widths for part in (nn.Conv2d(*pair, 3, stride=2, padding=1), nn.ReLU())]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * FEATURES, FEATURES))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, classes))

    def features(self, images: Tensor) -> Tensor:
        """Return the last layer's inputs before the nonlinearity: closer to Gaussian, and without dead units."""
        images = stack_frames(images)
        side = max(images.shape[2:])
        if side > LONGEST_SIDE:
            size = [max(4, n * LONGEST_SIDE // side) for n in images.shape[2:]]
            images = F.interpolate(images, size, mode="area")
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@dataclass(frozen=True)
class FeatureSpace:
    """A map from images `(B, C, H, W)` in [-1, 1] to float64 rows `(B, d)` on the CPU. name: appears in the names of
    distances. origin: how the space was made."""

    name: str
    origin: str
    extract: Change
    scale: float = 1.0

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self.extract(part).cpu().double() for part in images.split(AT_A_TIME)]) * self.scale

    def of(
        self, images: ImageDataset, chosen: Tensor, transform: Change | None = None, group: ProcessGroup = ALONE
    ) -> Tensor:
        """Return the rows of the chosen images of a data set, each batch changed by `transform` if given."""

        def rows(part: Tensor) -> Tensor:
            batch = images.batch(part)
            return self(transform(batch) if transform else batch)

        return torch.cat(group.map(rows, chosen.split(AT_A_TIME)))


def feature_space(
    train: ImageDataset, held_out: ImageDataset, steps: int, source: str, group: ProcessGroup = ALONE
) -> FeatureSpace:
    """Return the features of a classifier trained on the labels, or of random convolutions if there are no labels or
    `steps` is 0, scaled so that the features of training images have variance 1 on average."""
    steps = steps if train.labels is not None and len(train.class_names) > 1 else 0

    def make() -> tuple[Classifier, str]:
        net = train_classifier(train, steps)
        if not steps:
            return net, f"a small convolutional net with random weights, seed {SEED}"
        epochs = f"{steps} steps ({steps * BATCH / len(train):.1f} epochs) on {source}"
        return net, f"a small classifier, {epochs}, seed {SEED}, accuracy {accuracy(net, held_out):.1%}"

    net, origin = group.on_main(make)
    space = FeatureSpace(f"{'classifier' if steps else 'random-conv'}-{FEATURES}", origin, net.features)
    variance = float(space.of(train, fixed_permutation(len(train))[:2000], group=group).var(0, correction=0).mean())
    return replace(space, scale=variance**-0.5 if variance > 0 else 1.0)


def train_classifier(images: ImageDataset, steps: int) -> Classifier:
    """Train a classifier of the labels; 0 steps leave random weights. On the CPU, for reproducibility."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # not torch.manual_seed, which would also seed GPUs for good
        net = Classifier(images.spec.channels, max(1, len(images.class_names)))
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
    """Return the accuracy of `net` on at most 2,000 labelled images."""
    assert images.labels is not None
    some = fixed_permutation(len(images))[:2000]
    right = [net(images.batch(part)).argmax(1) == images.labels[part] for part in some.split(256)]
    return float(torch.cat(right).double().mean())


def stack_frames(images: Tensor) -> Tensor:
    """Return images `(B, ..., C, H, W)` as `(B, C, H', W)` for networks of images: frames lie below one another."""
    return images.movedim(-3, 1).flatten(2, -2)


def fixed_permutation(count: int) -> Tensor:
    """Return a fixed random permutation of `count` positions: its first n are a fair sample."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SEED))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Return the structural similarity of each pair of images `(B, ..., C, H, W)` in [-1, 1], `(B,)`, at most 1: the
    mean over channels and over Gaussian windows within the image (11 x 11, sigma 1.5; the largest odd size that fits
    smaller images).

    Computed in float64: variances are differences of mean squares, which cancel where an image is flat.
    """
    kind, (images, others) = images.dtype, (in_finest(stack_frames(each)) for each in (images, others))
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


def nearest_rows(rows: Tensor, others: Tensor, k: int = 1, group: ProcessGroup = ALONE) -> tuple[Tensor, Tensor]:
    """Return distances and indices `(n, k)`, ascending, of the `k` nearest `others` `(m, d)` of each of `rows`."""
    mode = "donot_use_mm_for_euclid_dist" if rows.dtype == torch.float64 else "use_mm_for_euclid_dist"

    def nearest(part: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.cdist(part, others, compute_mode=mode).topk(k, largest=False)
        return found.values, found.indices

    found = group.map(nearest, rows.split(AT_A_TIME))
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


def neighbourhoods(real: Tensor, fake: Tensor, group: ProcessGroup = ALONE) -> dict[str, float]:
    """Return precision and recall of `fake` `(n, d)` against `real` `(n, d)`: the share of rows of one set inside some
    ball around a row of the other, whose radius is the distance to that row's third nearest neighbour."""
    if len(real) != len(fake) or len(real) <= NEIGHBOURS:
        raise ValueError(
            f"the sets must have the same number of rows, more than {NEIGHBOURS} (got {len(real)} and {len(fake)})"
        )
    return {"precision": share_inside(fake, real, group), "recall": share_inside(real, fake, group)}


def share_inside(rows: Tensor, centres: Tensor, group: ProcessGroup = ALONE) -> float:
    """Return the share of `rows` `(n, d)` inside a ball around some of `centres` `(m, d)`."""
    radii = nearest_rows(centres, centres, NEIGHBOURS + 1, group)[0][:, -1]  # the nearest neighbour is the row itself

    def inside(part: Tensor) -> Tensor:
        return (torch.cdist(part, centres, compute_mode="donot_use_mm_for_euclid_dist") <= radii).any(1)

    return float(torch.cat(group.map(inside, rows.split(AT_A_TIME))).double().mean())


def compare_samples(
    space: FeatureSpace,
    sampled: Tensor,
    train: ImageDataset,
    held_out: ImageDataset,
    reconstruct: Change,
    group: ProcessGroup = ALONE,
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Return the figures of samples; the samples in order of how likely they are copies; and the positions of their
    nearest training images, `(n,)` each. sampled: their rows `(n, d)`, at most as many as each split has images.

    Held-out images are compared with samples, with training images (prefix `train_`: what a perfect model reaches) and
    with reconstructions of training images (`reconstruction_`: what a perfect prior reaches with this tokenizer).
    Samples that are much nearer to training images than held-out images are may be copies.
    """
    count = len(sampled)
    seen, unseen = fixed_permutation(len(train)), fixed_permutation(len(held_out))[:count]
    known, real = space.of(train, seen, group=group), space.of(held_out, unseen, group=group)
    sets = {"": sampled, "train_": known[:count], "reconstruction_": space.of(train, seen[:count], reconstruct, group)}
    figures: dict[str, float] = {"num_compared": count}
    for prefix, rows in sets.items():
        found = {"frechet_distance": frechet_distance(rows, real), **neighbourhoods(real, rows, group)}
        figures |= {prefix + name: value for name, value in found.items()}
    distances, indices = (found[:, 0] for found in nearest_rows(sampled, known, group=group))
    figures["nearest_distance"] = float(distances.median())
    figures["held_out_nearest_distance"] = float(nearest_rows(real, known, group=group)[0].median())
    # Plain distances would rank the simplest images first. A copy is nearer to its original than other images are.
    spacing = nearest_rows(known[indices], known, 2, group)[0][:, -1]
    order = (distances / spacing.clamp(min=1e-12)).argsort(stable=True)
    return figures, order, seen[indices[order]]
