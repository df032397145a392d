"""How far a reconstruction is from an image as a network of image features sees it: LPIPS (Zhang et al. 2018).

torchmetrics has the networks and their linear heads; the backbone's weights are torchvision's, in the folder that torch
hub keeps. They are pickles, so only files whose sha256 is known are opened. A missing file is fetched, unless
HF_HUB_OFFLINE says that there is no network; a host that is silent for `PATIENCE` seconds counts as away.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from urllib.error import HTTPError

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from torch import Tensor

from ..config import UserError

# Where torchvision has each backbone from, and the sha256 of the file (its name has the first eight digits).
WEIGHTS = {
    "vgg": (
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
    ),
    "alex": (
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ),
    "squeeze": (
        "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
        "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
    ),
}
PATIENCE = 5.0  # seconds, for each address of the host and for each part of an answer
LEAST_SIDE = 64  # pixels; smaller images are enlarged, so that the last layers still see more than one place


class Perceptual:
    """LPIPS of batches of images, differentiable in the first; `net` is one of `WEIGHTS`.

    No module, so that no state dict, optimizer or average of a model that holds it ever sees its weights, which are
    frozen and in eval mode. Always in float32.

    Raises `UserError` without torchmetrics, for another net, and as `weights_file` does. Where several processes share
    a disk, let one of them build it first.
    """

    def __init__(self, net: str = "vgg", device: torch.device | str = "cpu") -> None:
        if net not in WEIGHTS:
            raise UserError(f"perceptual: the network must be one of {', '.join(WEIGHTS)} (got {net!r})")
        if find_spec("torchmetrics") is None:
            raise UserError('perceptual: LPIPS needs torchmetrics: pip install "smalti[perceptual]"')
        weights_file(net)
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        with torch.random.fork_rng(devices=[]):  # layers draw weights before they are given theirs
            self.net = _NoTrainLpips(net=net)  # type: ignore[arg-type]
        self.net.requires_grad_(False).to(device)

    def __call__(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Mean distance, a scalar >= 0, of pairs `(B, C, H, W)` in [-1, 1]; the gradient reaches the first only.
        Raises `ValueError` unless both have the same shape with 1 or 3 channels."""
        if reconstruction.shape != images.shape or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                "perceptual: expected two batches (B, C, H, W) of 1 or 3 channels "
                f"(got {tuple(reconstruction.shape)} and {tuple(images.shape)})"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self.net(as_seen(reconstruction), as_seen(images.detach())).mean()


def as_seen(images: Tensor) -> Tensor:
    """float32 `(B, 3, H', W')` of images `(B, C, H, W)`: grey as RGB, and no side below `LEAST_SIDE`."""
    images = images.float().expand(-1, 3, -1, -1)
    shorter = min(images.shape[2:])
    if shorter >= LEAST_SIDE:
        return images
    size = [round(side * LEAST_SIDE / shorter) for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


def weights_file(net: str) -> Path:
    """The file with the weights of backbone `net`, where torchvision looks for it, fetched if it is not there yet.
    Raises `UserError` if it cannot be had, and for a damaged or another file."""
    url, expected = WEIGHTS[net]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not os.path.isfile(path):  # False also where the folder cannot be looked into
        fetch(url, path, expected)
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"perceptual: {path} can not be read ({error.strerror or error})") from error
    if found != expected:
        raise UserError(
            f"perceptual: {path} is damaged or not the file of this name (its sha256 begins with {found[:8]}); "
            f"delete it, or put {url} in its place"
        )
    return path


def fetch(url: str, path: Path, expected: str) -> None:
    """Download `url` to `path`, which appears once it is whole. Raises `UserError`, telling where to place the file."""
    place = f"place {url} in {path.parent}"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"perceptual: {path.name} is missing, and HF_HUB_OFFLINE forbids to fetch it; {place}")
    print(f"perceptual: fetching {url}", file=sys.stderr, flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with patience(PATIENCE):
            torch.hub.download_url_to_file(url, str(path), hash_prefix=expected, progress=sys.stderr.isatty())
    except (OSError, HTTPException, RuntimeError) as error:
        raise UserError(
            f"perceptual: {path.name} is missing and could not be fetched ({reason_of(error)}); {place}"
        ) from error


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """In here a socket gives up on a host that is silent for so long; torch hub has no argument for it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def reason_of(error: Exception) -> str:
    """Why a download failed, in a few words on one line."""
    if isinstance(error, HTTPError):
        return f"the server says {error.code}"
    if isinstance(error, RuntimeError):  # torch hub's for another sha256
        return "what came is not that file"
    cause = getattr(error, "reason", error)
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__).splitlines()[0]
