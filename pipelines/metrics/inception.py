"""FID, Inception Score and the FID of reconstructions, as the field reports them, under torch-fidelity's weights.

FID: Heusel et al. 2017 (arXiv:1706.08500). Inception Score: Salimans et al. 2016 (arXiv:1606.03498). The network is the
one of 2015 with TensorFlow's resizing, as in torch-fidelity, and in ADM's evaluator (Dhariwal and Nichol 2021), whose
reference files hold the mean and the covariance of its 2048 features.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from ..images import ImageDataset, to_uint8
from ..processes.group import ProcessGroup
from .frechet import Moments, joined, moments_in_parts, moments_of

T = TypeVar("T")
Change = Callable[[Tensor], Tensor]

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS = f"weights-inception-2015-12-05-{SHA256[:8]}.pth"
FEATURES, LOGITS = 2048, 1008
AT_A_TIME = 256  # images
SPLITS, SHUFFLE = 10, 2020  # of the Inception Score, and the seed of its order, as torch-fidelity has them
HEADER = 1 << 10  # bytes of an array beside its numbers, at most


@dataclass(frozen=True)
class Inception:
    """Images `(B, C, H, W)` in [-1, 1] -> features `(B, 2048)`, and logits without bias `(B, 1008)`, float32."""

    net: Callable[[Tensor], tuple[Tensor, Tensor]]
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Both on the device. What is looked at are 8-bit images; grey ones are shown three times."""
        return self.net(to_uint8(images).expand(-1, 3, -1, -1).to(self.device))

    def moments(
        self,
        batches: Sequence[T],
        images_of: Callable[[T], Tensor],
        group: ProcessGroup,
        logits: dict[T, Tensor] | None = None,
    ) -> Moments:
        """Moments of the features of the images of all batches, each batch looked at by one process, which puts the
        logits of its own into `logits`."""

        def features_of(batch: T) -> Tensor:
            features, found = self(images_of(batch))
            if logits is not None:
                logits[batch] = found.cpu()
            return features

        parts = group.gather(lambda: self._moments(map(features_of, group.mine(batches))))
        found, *more = [part for part in parts if part is not None]
        for part in more:
            found = joined(found, part)
        return found

    def _moments(self, parts: Iterable[Tensor]) -> Moments | None:
        precise = self.device if self.device.type == "cuda" else torch.device("cpu")  # not all others have float64
        found = moments_in_parts(part.to(precise) for part in parts)
        return found and replace(found, mean=found.mean.cpu(), factor=found.factor.cpu())

    def of(self, images: ImageDataset, chosen: Tensor, group: ProcessGroup, through: Change | None = None) -> Moments:
        """Moments of the chosen images of a data set, or of what `through` makes of them."""

        def images_of(part: Tensor) -> Tensor:
            batch = images.batch(part)
            return through(batch) if through else batch

        return self.moments(chosen.split(AT_A_TIME), images_of, group)


def load_inception(weights: str, device: torch.device) -> Inception:
    """The network, with torch-fidelity's weights in a local file. Raises `UserError` for another file, as FID is the
    distance under these weights alone, and torch-fidelity unpickles it; and without the package."""
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"inception_weights: there is no file {path}")
    if find_spec("torch_fidelity") is None:
        raise UserError('inception_weights: FID needs torch_fidelity: pip install "smalti[evaluate]"')
    with path.open("rb") as file:
        content = file.read(128 << 20)  # the right file has 91 MiB
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise UserError(
            f"inception_weights: {path} is not torch-fidelity's {WEIGHTS} (its sha256 begins with {found[:8]})"
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    wanted = ["2048", "logits_unbiased"]
    # The bytes that were hashed, not the file, which may be another one by now.
    net = FeatureExtractorInceptionV3("inception-v3-compat", wanted, io.BytesIO(content))
    return Inception(net.to(device), device)


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and standard deviation over ten parts of exp E KL(p(y | x) || p(y)), of logits `(n, 1008)`, n at least 10.

    Images are shuffled first, as torch-fidelity does: samples may come class by class.
    """
    order = np.random.RandomState(SHUFFLE).permutation(len(logits))
    log_p = logits[torch.from_numpy(order)].double().log_softmax(1)
    scores = []
    for part in range(SPLITS):
        some = log_p[part * len(log_p) // SPLITS : (part + 1) * len(log_p) // SPLITS]
        scores.append(float((some.exp() * (some - some.exp().mean(0).log())).sum(1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


# Reference files ----------------------------------------------------------------------------------


def read_reference(path: Path) -> tuple[Moments, str]:
    """`mu` and `sigma` of a `.npz` such as ADM's, and the beginning of their sha256. Nothing else of the file is read,
    and nothing is unpickled. Raises `UserError` for what is not the moments of 2048 features."""
    try:
        with zipfile.ZipFile(path) as archive:
            mean, covariance = (_read_array(archive, *wanted) for wanted in ARRAYS.items())
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"reference: {path} cannot be read: {error}") from error
    scale = covariance.diagonal().abs().max()
    for wrong, what in (
        (not bool(mean.isfinite().all() and covariance.isfinite().all()), "holds numbers that are not finite"),
        (not torch.allclose(covariance, covariance.t(), rtol=0, atol=1e-6 * float(scale)), "sigma is not symmetric"),
        (bool((covariance.diagonal() < 0).any()), "sigma has negative variances"),
    ):
        if wrong:
            raise UserError(f"reference: {path}: {what}")
    digest = hashlib.sha256(mean.numpy().tobytes() + covariance.numpy().tobytes()).hexdigest()
    return moments_of(0, mean, (covariance + covariance.t()) / 2), digest[:8]


ARRAYS = {"mu.npy": (FEATURES,), "sigma.npy": (FEATURES, FEATURES)}


def _read_array(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> Tensor:
    """An array of floats of this shape, float64. Raises `ValueError`, before it is read, for another one."""
    most = 8 * int(np.prod(shape)) + HEADER
    if name not in archive.namelist():
        raise ValueError(f"there is no {name.removesuffix('.npy')} in it")
    entry = archive.getinfo(name)
    if entry.file_size > most:
        raise ValueError(f"{name} has {entry.file_size:,} bytes, {most:,} at most are allowed")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed as numpy never does")
    with archive.open(name) as file:
        content = io.BytesIO(file.read(most))
    version = np.lib.format.read_magic(content)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    found, by_columns, kind = read(content)
    if found != shape or kind not in (np.dtype("<f8"), np.dtype("<f4")):
        wanted = " x ".join(map(str, shape))
        raise ValueError(f"{name} has shape {found} and type {kind}, {wanted} of float64 or float32 is allowed")
    numbers = np.frombuffer(content.read(), kind)
    if numbers.size != np.prod(shape):
        raise ValueError(f"{name} is cut off")
    return torch.from_numpy(numbers.reshape(shape, order="F" if by_columns else "C").astype(np.float64))
