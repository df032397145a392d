"""A small convolutional network that judges samples of labelled images: how many show the class that was asked for, and
how far its features of them are from those of test images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.images import ImageDataset
from pipelines.metrics.frechet import frechet_distance

WIDTHS = (32, 64, 128)
BATCH = 128


class Judge(nn.Module):
    """A stage per width, each of two convolutions and a pooling, then the mean over positions: the features."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((channels, *WIDTHS), WIDTHS, strict=False):
            for source in (before, width):
                layers += [nn.Conv2d(source, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.body, self.head = nn.Sequential(*layers), nn.Linear(WIDTHS[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images).mean((2, 3))

    def forward(self, images: Tensor) -> Any:
        return self.head(F.dropout(self.features(images), 0.3, self.training))

    @torch.no_grad()
    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and the classes of images (B, C, H, W) in [-1, 1]."""
        self.eval()
        features = torch.cat([self.features(part) for part in images.split(500)])
        return features, self.head(features).argmax(1)

    def agreement(self, images: Tensor, labels: Tensor) -> float:
        return float((self.judge(images)[1] == labels).double().mean())

    def distance(self, images: Tensor, others: Tensor) -> float:
        """Return the Frechet distance of the features."""
        return frechet_distance(self.judge(images)[0].double(), self.judge(others)[0].double())


def train_judge(train: ImageDataset, path: Path, steps: int = 1200, seed: int = 0) -> Judge:
    """Train a judge, or load the one in `path`. Images are moved by up to two pixels, and brightened or darkened."""
    labels = torch.as_tensor(train.labels)
    torch.manual_seed(seed)
    judge = Judge(train.spec.channels, int(labels.max()) + 1)
    if path.is_file():
        judge.load_state_dict(torch.load(path))
        return judge
    images = read_images(train)
    epoch = len(images) // BATCH
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        if step % epoch == 0:
            order = torch.randperm(len(images))
        rows = order[step % epoch * BATCH :][:BATCH]
        x, y = torch.randint(5, (2,)).tolist()
        moved = F.pad(images[rows], (2, 2, 2, 2), "replicate")[..., y : y + images.shape[-2], x : x + images.shape[-1]]
        light = 1 + 0.3 * torch.randn(len(rows), 1, 1, 1)
        loss = F.cross_entropy(judge.train()((moved + 1) * light - 1), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(judge.state_dict(), path)
    return judge


def read_images(images: ImageDataset, most: int | None = None) -> Tensor:
    """Return the first `most` images, in [-1, 1]."""
    count = min(len(images), most or len(images))
    return torch.cat([images.batch(range(at, min(at + 1000, count))) for at in range(0, count, 1000)])
