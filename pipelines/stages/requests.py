"""Images asked for by their numbers: each has its class and its seed, whoever makes it and in which batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prior.sampling import DecodingOptions

from ..config import UserError
from .base import Label, Stages
from .sampling import check_request, sample


@dataclass(frozen=True)
class Request:
    """Image k is of the class `classes[k % len(classes)]` and uses seed + k; classes: None is unconditional. settings:
    those of the prior's `Sampling`, by name, that are given."""

    pipeline: Stages
    classes: Sequence[Label] | None
    seed: int
    decoding: DecodingOptions
    settings: dict[str, Any]

    @property
    def class_names(self) -> list[str] | None:
        """Those that the pipeline knows; None without labels."""
        names = self.pipeline.labels or [str(number) for number in range(self.pipeline.prior.num_classes)]
        return names if self.classes else None

    def draw(
        self, numbers: Sequence[int], batch_size: int = 64, progress: bool = False
    ) -> tuple[np.ndarray, list[int] | None]:
        """Images of these numbers, uint8 (B, H, W, C), and their classes. Raises `UserError` for what does not fit the
        prior."""
        labels = [self.classes[k % len(self.classes)] for k in numbers] if self.classes else None
        try:
            made = sample(
                self.pipeline,
                len(numbers),
                labels,
                generator=[torch.Generator().manual_seed(self.seed + k) for k in numbers],
                batch_size=batch_size,
                output_type="np",
                progress=progress,
                **vars(self.decoding),
                **self.settings,
            )
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        ids = self.pipeline.label_ids(labels, len(numbers))
        return made.images, None if ids is None else ids.tolist()

    def depends_on(self) -> dict[str, Any]:
        """Return all that the pixels depend on, except the number of images. Raises `UserError` for what does not
        fit the prior."""
        pipeline = self.pipeline
        try:
            ids = pipeline.label_ids(self.classes, len(self.classes)) if self.classes else None
            sampler = check_request(pipeline, self.settings, ids, self.decoding)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        return {
            "tokenizer": pipeline.tokenizer.fingerprint(),
            "prior": pipeline.prior.fingerprint(),
            "labels": None if ids is None else ids.tolist(),
            "seed": self.seed,
            "order": self.decoding.order,
            "num_orders": self.decoding.num_orders,
            "sampler": sampler.to_dict(),
            "device": pipeline.device.type,
        }
