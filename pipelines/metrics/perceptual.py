"""LPIPS, a perceptual distance between images (Zhang et al. 2018).

torchmetrics provides the networks and their linear heads. The backbone weights are torchvision's: torch hub looks for
them in its folder and downloads what is missing.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import UserError

Net = Literal["vgg", "alex", "squeeze"]
LEAST_SIDE = 64  # pixels; smaller images are enlarged so that the last layers have more than one position


class Perceptual:
    """LPIPS of batches of images, differentiable in the first argument.

    It is not an `nn.Module`, so that its weights do not enter the state dict, the optimizer or the averaged weights of
    a model that holds it. The network is frozen, in eval mode, and always float32.

    pretrained: False keeps the random initial weights, which is enough to measure the cost of a step.

    Raises `UserError` without torchmetrics, and if the weights cannot be loaded. If several processes share a disk, let
    one of them create it first.
    """

    def __init__(self, net: Net = "vgg", device: torch.device | str = "cpu", *, pretrained: bool = True) -> None:
        if find_spec("torchmetrics") is None:
            raise UserError('loss.perceptual: LPIPS needs torchmetrics: pip install "smalti[perceptual]"')
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        with torch.random.fork_rng(devices=[]):  # the initialisation of the layers draws random numbers
            try:
                self.net = _NoTrainLpips(pretrained, net, pnet_rand=not pretrained)
            except (OSError, RuntimeError, EOFError) as error:
                folder = f"{torch.hub.get_dir()}/checkpoints"
                problem = f"cannot load the weights of {net!r} from {folder}: {' '.join(str(error).split())}"
                raise UserError(f"loss.perceptual: {problem}") from error
        self.net.requires_grad_(False).to(device)

    def __call__(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Return the mean distance, a scalar >= 0, of pairs `(B, C, H, W)` in [-1, 1] with 1 or 3 channels. Gradients
        flow to the reconstruction only."""
        with torch.autocast(images.device.type, enabled=False):
            return self.net(_as_input(reconstruction), _as_input(images.detach())).mean()


def _as_input(images: Tensor) -> Tensor:
    """Convert images `(B, C, H, W)` to float32 `(B, 3, H', W')`: grey to RGB, and no side below `LEAST_SIDE`."""
    images = images.float().expand(-1, 3, -1, -1)
    scale = LEAST_SIDE / min(images.shape[2:])
    size = [round(side * scale) for side in images.shape[2:]]
    return images if scale <= 1 else F.interpolate(images, size, mode="bilinear", align_corners=False)
