"""How far a reconstruction is from an image as a network of image features sees it: LPIPS (Zhang et al. 2018).

torchmetrics has the networks and their linear heads. The backbone's weights are torchvision's: torch hub looks for them
in its folder, and fetches what is missing.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import UserError

Net = Literal["vgg", "alex", "squeeze"]
LEAST_SIDE = 64  # pixels; smaller images are enlarged, so that the last layers still see more than one place


class Perceptual:
    """LPIPS of batches of images, differentiable in the first.

    It is not a module, so that its weights never reach the state dict, the optimizer or the average of a model that
    holds it. They are frozen and in eval mode. Always in float32.

    pretrained: False leaves the weights as they are drawn, which is enough to measure what a step costs.

    Raises `UserError` without torchmetrics, and where the weights cannot be had. Where several processes share a disk,
    let one of them build it first.
    """

    def __init__(self, net: Net = "vgg", device: torch.device | str = "cpu", *, pretrained: bool = True) -> None:
        if find_spec("torchmetrics") is None:
            raise UserError('loss.perceptual: LPIPS needs torchmetrics: pip install "smalti[perceptual]"')
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        with torch.random.fork_rng(devices=[]):  # layers draw weights before they are given theirs
            try:
                self.net = _NoTrainLpips(pretrained, net, pnet_rand=not pretrained)
            except (OSError, RuntimeError, EOFError) as error:
                folder = f"{torch.hub.get_dir()}/checkpoints"
                reason = " ".join(str(error).split())
                raise UserError(f"loss.perceptual: no weights of {net!r} in {folder}: {reason}") from error
        self.net.requires_grad_(False).to(device)

    def __call__(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Mean distance, a scalar >= 0, of pairs `(B, C, H, W)` in [-1, 1] of 1 or 3 channels; the gradient reaches the
        first only."""
        with torch.autocast(images.device.type, enabled=False):
            return self.net(_as_seen(reconstruction), _as_seen(images.detach())).mean()


def _as_seen(images: Tensor) -> Tensor:
    """float32 `(B, 3, H', W')` of images `(B, C, H, W)`: grey as RGB, and no side below `LEAST_SIDE`."""
    images = images.float().expand(-1, 3, -1, -1)
    scale = LEAST_SIDE / min(images.shape[2:])
    if scale <= 1:
        return images
    return F.interpolate(
        images, [round(side * scale) for side in images.shape[2:]], mode="bilinear", align_corners=False
    )
