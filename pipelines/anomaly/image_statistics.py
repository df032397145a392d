"""Statistics of an image under the models: bits of tokens and pixels, reconstruction error, features of the prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from prior.conditions import Encoded, select_rows

from ..condition_values import GivenCondition, choose_labels, name_given

if TYPE_CHECKING:
    from ..image_pipeline import ImagePipeline, Label

MAX_FEATURES = 128


class Measured(NamedTuple):
    """Measurements of n images: `statistics`, each `(n,)` or `(n, d)`; `surprise`, the bits of each token, float32
    `(n, N)`; `error`, the mean of |x - decode(encode(x))| over images and channels, `(H, W)`; `given`, the names of
    the columns that were given, and `label` for labels."""

    statistics: dict[str, Tensor]
    surprise: Tensor
    error: Tensor
    given: list[str]


def statistics(
    pipeline: ImagePipeline,
    images: Any,
    labels: Label | Sequence[Label] = None,
    batch_size: int = 256,
    *,
    condition: GivenCondition = None,
) -> dict[str, Tensor]:
    """Return the statistics of images, each float64 `(n,)` except `features`:

    `token_bits` under the prior, given labels and columns if any; `pixel_bits` given the tokens, if the tokenizer has a
    likelihood; `error`, the mean over pixels of |x - decode(encode(x))|, from 0 to 2; `background_bits`, token bits
    under the background prior, if any; `features` `(n, d)`, the prior's middle layer averaged over positions (at most
    128 evenly spaced channels), if the prior has layers.
    """
    return measure(pipeline, images, labels, batch_size, condition=condition).statistics


def measure(
    pipeline: ImagePipeline,
    images: Any,
    labels: Label | Sequence[Label] = None,
    batch_size: int = 256,
    *,
    condition: GivenCondition = None,
) -> Measured:
    """Measure all images; the result is on the CPU. Raises `ValueError` for an empty batch or invalid images."""
    return measure_batch(pipeline, pipeline.to_images(images), labels, batch_size, condition=condition)


@torch.no_grad()
def measure_batch(
    pipeline: ImagePipeline,
    batch: Tensor,
    labels: Label | Sequence[Label] = None,
    batch_size: int = 256,
    *,
    condition: GivenCondition = None,
) -> Measured:
    """Like `measure`, for float images `(B, C, H, W)` in [-1, 1], as returned by `to_images`."""
    if not len(batch):
        raise ValueError("expected at least one image")
    labels, rows = choose_labels(labels, condition), pipeline.read_condition(condition, len(batch))
    parts, surprise, total_error = [], [], torch.zeros(batch.shape[2:], dtype=torch.float64)
    for place, part, given in pipeline.batches(batch, labels, batch_size, rows):
        tokens = pipeline.encode_batch(part)
        token_bits = bits(pipeline.prior.token_log_probs(tokens, given).flatten(1))
        error = (pipeline.decode_batch(tokens) - part).abs().mean(1).cpu().double()
        found = {"token_bits": token_bits.sum(1), "error": error.flatten(1).mean(1)}
        if (pixels := pipeline.tokenizer.pixel_log_prob(part, tokens)) is not None:
            found["pixel_bits"] = bits(pixels)
        if pipeline.background is not None:
            ids = given.labels if isinstance(given, Encoded) else given
            columns = select_rows(rows, place) if pipeline.background.conditions else {}
            own = pipeline.background.encode_condition(ids, len(part), columns)
            found["background_bits"] = bits(pipeline.background.token_log_probs(tokens, own).flatten(1)).sum(1)
        if pipeline.prior.feature_layers:
            features = pipeline.prior.features(tokens, given).mean(1).cpu().double()
            found["features"] = features[:, :: -(-features.shape[1] // MAX_FEATURES)]
        parts.append(found)
        surprise.append(token_bits.float())
        total_error += error.sum(0)
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    names = name_given(pipeline.prior, pipeline.label_ids(labels, len(batch)), rows)
    return Measured(together, torch.cat(surprise), total_error / len(batch), names)


def bits(nats: Tensor) -> Tensor:
    """Convert log-probabilities to bits, float64 on the CPU."""
    return -nats.cpu().double() / math.log(2)
