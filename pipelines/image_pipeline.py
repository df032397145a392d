"""`ImagePipeline`: a tokenizer and a prior in one folder, from which images are sampled, completed and scored."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image as PILImage
from torch import Tensor

from prior.orders import select_order
from prior.sampling import Order
from tokenizer.base import LikelihoodError

from . import completion, representation
from .anomaly import calibrating, healing, scores
from .compression.coding import compress, decompress, exact_pixels
from .images.grids import class_grid
from .images.origin import shareable
from .images.pictures import check_output_type, convert_images
from .processes.group import ALONE, ProcessGroup
from .stages import sampling
from .stages.base import Label, Stages
from .stages.watching import serialized

SAMPLED = 80  # images of a sample picture


class ImagePipeline(Stages):
    """Both stages of image generation.

    Most abilities are functions whose first argument is the pipeline; as methods they have the same names, arguments
    and documentation. `Stages` says how a pipeline is made of a tokenizer and a prior, saved and loaded.
    """

    # Making images

    __call__ = sampling.sample
    complete = completion.complete

    # Scoring images

    @serialized
    @torch.no_grad()
    def log_prob(
        self,
        images: Any,
        labels: Label | Sequence[Label] = None,
        *,
        order: Order = None,
        num_orders: int = 1,
        num_masks: int = 1,
        batch_size: int = 256,
    ) -> Tensor:
        """log p of each image's tokens under the prior, `(B,)` nats (of the class given; else unconditional).

        order, num_orders, num_masks: as in `Prior.log_prob`. Where `prior.exact` is False an image's is an unbiased
        estimate of a lower bound, and the mean over images bounds.
        """
        tokens = self.encode(images, batch_size=batch_size)
        return self._token_log_prob(tokens, labels, order, num_orders, batch_size, num_masks)

    def _token_log_prob(
        self,
        tokens: Tensor,
        labels: Label | Sequence[Label],
        order: Order,
        num_orders: int,
        batch_size: int,
        num_masks: int = 1,
    ) -> Tensor:
        parts = [
            self.prior.log_prob(part, ids, select_order(order, rows, len(tokens)), num_orders, num_masks)
            for rows, part, ids in self.batches(tokens, labels, batch_size)
        ]
        return torch.cat(parts)

    conditional_log_prob = completion.conditional_log_prob

    @serialized
    @torch.no_grad()
    def bits_per_dim(
        self,
        images: Any,
        labels: Label | Sequence[Label] = None,
        *,
        order: Order = None,
        num_orders: int = 1,
        batch_size: int = 256,
    ) -> Tensor:
        """Bits per pixel channel of each image, `(B,)`: those of its tokens under the prior plus those of its pixels
        given the tokens; where `prior.exact` is False their mean over images is an upper bound. order, num_orders: as
        in `Prior.log_prob`.
        Raises `LikelihoodError` when the tokenizer's decoder has no likelihood."""
        batch = self.to_images(images)
        tokens, parts = self.encode_batch(batch, batch_size=batch_size), []
        for part, ids in zip(batch.split(batch_size), tokens.split(batch_size), strict=True):
            pixels = self.tokenizer.pixel_log_prob(part, ids)
            if pixels is None:
                raise LikelihoodError(
                    f"bits_per_dim needs a decoder with a likelihood, and {self.tokenizer.name!r} as it was "
                    "trained has none; log_prob gives the prior's part alone"
                )
            parts.append(pixels)
        nats = self._token_log_prob(tokens, labels, order, num_orders, batch_size) + torch.cat(parts)
        return -nats / (batch.shape[1:].numel() * np.log(2))

    # Finding anomalies

    calibrate = calibrating.calibrate
    anomaly_score = scores.anomaly_score
    anomaly_map = healing.anomaly_map

    @serialized
    def heal(
        self,
        images: Any,
        labels: Label | Sequence[Label] = None,
        *,
        quantile: float = 0.98,
        draws: int = 8,
        seed: int = 0,
    ) -> healing.Healed:
        """`images` with their most surprising tokens drawn again, and where they differ; see `healing.heal`. Raises
        `CalibrationError` without a calibration."""
        return healing.heal(self, images, quantile, draws, seed, labels)

    # Representing images

    embed = representation.embed

    # Storing images

    @serialized
    def compress(self, images: Any, *, lossless: bool = False, progress: bool = True) -> bytes:
        """A stream from which this pipeline, and no other, decodes the same tokens, in any batch, on any machine.

        images: PIL images of exactly the pipeline's size, uint8 or float `(B, C, H, W)`. lossless: keep every pixel,
        by a decoder with a likelihood or a `pixels` tokenizer; else the tokens, whose images `decompress` gives: those
        of two machines differ by one grey level in some pixels, as the decoder's float32 rounds otherwise there.
        Raises `ValueError` for images of another size (lossless: or of more than 8 bits), `LikelihoodError` where
        lossless cannot be, and `StreamError` without the package constriction.
        """
        several, shape = [images] if isinstance(images, PILImage) else images, self.tokenizer.image_shape
        if isinstance(several, (list, tuple)):
            several = [exact_pixels(one, shape, lossless) if isinstance(one, PILImage) else one for one in several]
        return compress(self, self.to_images(several), lossless=lossless, progress=progress)

    @serialized
    def decompress(
        self,
        data: bytes,
        *,
        output_type: str = "pil",
        batch_size: int | None = None,
        max_images: int | None = None,
        progress: bool = True,
    ) -> Any:
        """The images of a stream, all of them or an error: of the same tokens as were compressed, and of the same
        pixels if it was lossless, else to within one grey level (of float32 weights). batch_size: images evaluated at a
        time, a whole chunk if None; tokens do not depend on it. max_images: refuse a stream of more.

        Raises `StreamError`: `DamagedStream` for one that is damaged, `ModelMismatch` for one of another pipeline, or
        of a machine that computes other probabilities.
        """
        check_output_type(output_type)
        images = decompress(self, data, batch_size=batch_size, max_images=max_images, progress=progress)
        return convert_images(images, output_type)

    # Sharing

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        commit_message: str = "Upload pipeline",
    ) -> Any:
        """Create the Hub repository if needed and upload the pipeline folder, with model card and sample grid, in one
        commit (revision: to this branch; create_pr: in a pull request). The commit removes files of an earlier pipeline
        and keeps all others. The name of a local folder of training images is left out. variant: as in
        `save_pretrained`.

        Returns huggingface_hub's `CommitInfo`. Raises `PushError`, an `OSError`, with the reason in one line.
        """
        from .hub import push_folder, require_reachable

        require_reachable(repo_id)
        with tempfile.TemporaryDirectory() as temporary:
            folder, shared = Path(temporary) / "pipeline", copy.copy(self)
            shared.provenance = shareable(self.provenance)
            grid = self.sample_picture() if self.sample_grid is None else self.sample_grid
            shared.save_pretrained(folder, variant=variant, sample_grid=grid)
            return push_folder(
                folder,
                repo_id,
                token=token,
                private=private,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )

    def sample_picture(self, count: int = SAMPLED, seed: int = 0, group: ProcessGroup = ALONE) -> np.ndarray:
        """A grid of samples at the pipeline's settings, one class per column (of at most ten), whose name is on top,
        uint8 (H, W, 3). Each process of the group draws some of them."""
        columns = min(10, self.prior.num_classes) or 10
        size = -(-count // group.world)

        def draw(start: int) -> np.ndarray:
            rows = range(start, min(start + size, count))
            labels = [index % columns for index in rows] if self.prior.num_classes else None
            return self(num_images=len(rows), labels=labels, seed=seed + start, output_type="np", progress=False).images

        images = np.concatenate(group.map(draw, range(0, count, size)))
        names = self.class_names(torch.arange(count) % columns) if self.prior.num_classes else None
        return class_grid(images, names, columns)
