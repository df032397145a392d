"""FID, Inception Score and reconstruction FID with torch-fidelity's Inception weights, comparable with papers.

FID: Heusel et al. 2017 (arXiv:1706.08500). Inception Score: Salimans et al. 2016 (arXiv:1606.03498). The network is
Inception of 2015 with TensorFlow's resizing, as in torch-fidelity and in ADM's evaluator (Dhariwal and Nichol 2021).
ADM's reference files hold the mean and covariance of its 2048 features.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.spec import to_uint8

from ..config import UserError
from ..images import ImageDataset, Splits
from ..processes.group import ProcessGroup
from .frechet import Moments, distance, moments_of_parts
from .quality import AT_A_TIME, LEAST, fixed_permutation, stack_frames
from .samples import EvaluatedSamples

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS = f"weights-inception-2015-12-05-{SHA256[:8]}.pth"
FEATURES = 2048


@dataclass(frozen=True)
class Inception:
    """The network and the reference of FID: the `held_out` images, the `train` images, or `published` moments read from
    the file called `reference`.

    net: 8-bit images `(B, 3, H, W)` -> features `(B, 2048)` and logits without bias `(B, 1008)`.
    """

    net: Callable[[Tensor], tuple[Tensor, Tensor]]
    device: torch.device
    reference: str = "held_out"
    published: Moments | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits, on the CPU, of images `(B, ..., C, H, W)` in [-1, 1]; grey is repeated to
        RGB."""
        features, logits = self.net(to_uint8(stack_frames(images)).expand(-1, 3, -1, -1).to(self.device))
        return features.cpu(), logits.cpu()

    def moments(
        self,
        images: ImageDataset,
        group: ProcessGroup,
        *,
        count: int | None = None,
        transform: Callable[[Tensor], Tensor] = lambda batch: batch,
    ) -> Moments:
        """Return the moments of the features of `count` images (default: all), each batch changed by `transform`."""
        rows = torch.arange(len(images)) if count is None else fixed_permutation(len(images))[:count]
        return moments_of_parts(lambda part: self(transform(images.batch(part)))[0], rows.split(AT_A_TIME), group)

    def figures(
        self,
        images: Splits,
        reconstruct: Callable[[Tensor], Tensor],
        samples: EvaluatedSamples | None,
        group: ProcessGroup,
    ) -> dict[str, Any]:
        """Return `rfid` of all held-out images and, if there are enough samples, `fid`, `inception_score` and the FID
        of real images outside the reference set. Each figure comes with its protocol."""
        train, held_out = images.train, images.held_out
        real = self.moments(held_out, group)
        figures: dict[str, Any] = {
            "rfid": distance(self.moments(held_out, group, transform=reconstruct), real),
            "rfid_protocol": f"{len(held_out):,} held-out images and their reconstructions; {WEIGHTS}",
        }
        equally_many = self.reference == "held_out"
        count = 0 if samples is None else samples.count
        if equally_many:
            count = min(count, len(train), len(held_out))
        if samples is None or count < LEAST:
            return figures
        sampled, score, deviation = self.evaluate_samples(samples, count, group)
        figures["inception_score"], figures["inception_score_deviation"] = score, deviation
        figures["inception_score_protocol"] = f"{samples.count:,} samples in 10 parts; {WEIGHTS}"
        if equally_many:
            against, name = self.moments(held_out, group, count=count), f"{count:,} held-out images"
            figures["train_fid"] = distance(self.moments(train, group, count=count), against)
        elif self.published:
            against, name = self.published, f"mu and sigma of {self.reference}"
        else:
            against, name = self.moments(train, group), f"all {len(train):,} training images"
        if not equally_many:
            figures["held_out_fid"] = distance(real, against)
        figures["fid"] = distance(sampled, against)
        figures["fid_protocol"] = f"{count:,} samples against {name}; {WEIGHTS}"
        return figures

    def evaluate_samples(
        self, samples: EvaluatedSamples, count: int, group: ProcessGroup
    ) -> tuple[Moments, float, float]:
        """Return the moments of the first `count` samples, and the Inception Score of all: mean and standard deviation
        over ten parts."""
        from torch_fidelity.metric_isc import isc_features_to_metric

        logits: dict[int, Tensor] = {}

        def features(part: int) -> Tensor:
            found, logits[part] = self(samples.images(part))
            return found[: max(0, count - part)]

        sampled = moments_of_parts(features, samples.parts, group)
        score = isc_features_to_metric(torch.cat(group.map(logits.__getitem__, samples.parts)))
        return sampled, score["inception_score_mean"], score["inception_score_std"]


def load_inception(weights: str | None, reference: str, device: torch.device) -> Inception | None:
    """Load the network with torch-fidelity's weights from a local file; return None if `weights` is None. Raises
    `UserError` for any other file (only these weights give FID, and torch-fidelity unpickles the file), and for an
    invalid `reference`."""
    known = reference in ("held_out", "train")
    if not known and not Path(reference).is_file():
        raise UserError(f"reference: expected held_out, train or an existing .npz file (got {reference!r})")
    if weights is None:
        if reference != "held_out":
            raise UserError("reference: only affects FID, which needs inception_weights=FILE")
        return None
    published = None if known else read_moments(Path(reference))
    if not Path(weights).is_file():
        raise UserError(f"inception_weights: no such file: {weights}")
    if find_spec("torch_fidelity") is None:
        raise UserError('inception_weights: FID needs torch-fidelity: pip install "smalti[evaluate]"')
    with open(weights, "rb") as file:
        if (found := hashlib.file_digest(file, "sha256").hexdigest()) != SHA256:
            raise UserError(f"inception_weights: {weights} is not {WEIGHTS} (its sha256 begins with {found[:8]})")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights)
    return Inception(net.to(device), device, reference if known else Path(reference).name, published)


def read_moments(path: Path) -> Moments:
    """Read `mu` and `sigma` from an `.npz` file such as ADM's. Raises `UserError` unless it holds the moments of 2048
    features."""
    try:
        with np.load(path) as arrays:
            mean, covariance = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"reference: {path}: no readable mu and sigma ({error})") from error
    if mean.shape != (FEATURES,) or covariance.shape != (FEATURES, FEATURES):
        raise UserError(f"reference: {path}: mu and sigma should have {FEATURES} features (got {mean.shape})")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all() and np.allclose(covariance, covariance.T)):
        raise UserError(f"reference: {path}: mu and sigma should be finite, and sigma symmetric")
    return Moments(torch.from_numpy(mean), torch.from_numpy(covariance))
