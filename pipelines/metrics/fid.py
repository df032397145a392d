"""What Inception says of samples and of reconstructions; beside each figure, how it was taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError
from ..images import Splits
from ..processes.group import ALONE, ProcessGroup
from .frechet import Moments, distance
from .inception import SPLITS, WEIGHTS, Inception, inception_score, load_inception, read_reference
from .quality import LEAST, shuffled
from .samples import Samples

Figures = dict[str, Any]


@dataclass(frozen=True)
class Ruler:
    """The network, and what samples are held against: `held_out` images, `train` images, or the `published` moments of
    a file, which is then the `reference` (its name)."""

    inception: Inception
    reference: str = "held_out"
    published: Moments | None = None

    def figures(
        self,
        images: Splits,
        reconstruct: Callable[[Tensor], Tensor],
        samples: Samples | None,
        group: ProcessGroup = ALONE,
    ) -> Figures:
        """`rfid` of all held-out images; and of samples, if there are some, `fid` and `inception_score`, beside the FID
        of real images that were not the reference."""
        everything = torch.arange(len(images.held_out))
        real = self.inception.of(images.held_out, everything, group)
        rebuilt = self.inception.of(images.held_out, everything, group, reconstruct)
        figures: Figures = {
            "rfid": distance(rebuilt, real),
            "rfid_protocol": self.told(f"{real.count:,} held-out images and their reconstructions", images),
        }
        if samples is None or samples.count < LEAST:
            return figures
        return figures | self.of_samples(images, samples, real, group)

    def of_samples(self, images: Splits, samples: Samples, real: Moments, group: ProcessGroup) -> Figures:
        """Figures of samples; real: moments of all held-out images."""
        logits: dict[int, Tensor] = {}
        drawn = self.inception.moments(samples.parts, samples.images, group, logits)
        mean, deviation = inception_score(torch.cat(group.map(logits.__getitem__, samples.parts)))
        parts = f"{samples.count:,} samples in {SPLITS} parts, whose deviation is told"
        figures: Figures = {
            "inception_score": mean,
            "inception_score_deviation": deviation,
            "inception_score_protocol": self.told(parts, images),
        }
        if self.reference == "held_out":
            return figures | self.against_held_out(images, samples, drawn, group)
        against, what = self.published, f"mu and sigma of {self.reference}"
        if against is None:
            against = self.inception.of(images.train, torch.arange(len(images.train)), group)
            what = f"all {against.count:,} training images"
        return figures | {
            "fid": distance(drawn, against),
            "fid_protocol": self.told(f"{drawn.count:,} samples against {what}", images),
            "held_out_fid": distance(real, against),
        }

    def against_held_out(self, images: Splits, samples: Samples, drawn: Moments, group: ProcessGroup) -> Figures:
        """FID of samples, whose moments are `drawn`, and of training images, with equally many images on each side."""
        train, held_out = images.train, images.held_out
        count = min(samples.count, len(train), len(held_out))
        if count < LEAST:
            return {}
        if count < samples.count:
            parts = [part for part in samples.parts if part < count]
            drawn = self.inception.moments(parts, lambda part: samples.images(part)[: count - part], group)
        real = self.inception.of(held_out, shuffled(len(held_out))[:count], group)
        return {
            "fid": distance(drawn, real),
            "fid_protocol": self.told(f"{count:,} samples against {count:,} held-out images", images),
            "train_fid": distance(self.inception.of(train, shuffled(len(train))[:count], group), real),
        }

    def told(self, what: str, images: Splits) -> str:
        """How a figure was taken."""
        height, width = images.held_out.image_shape[1:]
        return f"{what}; 8-bit images of {height} x {width}, resized to 299 x 299 as TensorFlow 1 does; {WEIGHTS}"


def make_ruler(weights: str | None, reference: str, device: torch.device) -> Ruler | None:
    """The ruler that was asked for, or None. Raises `UserError` for files that are not what they should be."""
    known = reference in ("held_out", "train")
    if not known and not Path(reference).is_file():
        raise UserError(f"reference: {reference!r} is neither held_out, train nor a file")
    if weights is None:
        if reference != "held_out":
            raise UserError("reference: it is what FID is taken against, which needs inception_weights=FILE")
        return None
    if known:
        return Ruler(load_inception(weights, device), reference)
    published, digest = read_reference(Path(reference))
    name = f"{Path(reference).name} (sha256 of both {digest}...)"
    return Ruler(load_inception(weights, device), name, published)
