"""Log-probabilities and bits per token under a prior, in batches that fit into memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from prior import Prior
from prior.columns import LABEL
from tokenizer import TokenGrid, Tokenizer

from ..frequencies import Frequencies
from ..images import ImageDataset
from ..processes.group import ALONE, ProcessGroup
from ..shuffling import random_rows, spread_rows
from ..tokens import TokenSplit
from .figures import WITHOUT
from .reconstruction import images_at_a_time

EVALUATED_ROWS = 2000  # limit during training; `smalti evaluate` uses all held-out rows
MOST_SUMMED = 100  # classes for which the mixture over them is evaluated, since each takes a pass
EVALUATED_TOKENS = 1 << 24  # limit during training over all passes, for priors that need several passes per row
TABLE_SIZE = 1 << 26  # limit on the elements of `Marginal`'s table (256 MiB of float32)
LOGITS = 1 << 28  # limit on the logits computed at a time (1 GiB of float32)


def rows_at_a_time(grid: TokenGrid) -> int:
    """Return the batch size for rows of tokens: 256, or fewer so that a batch has at most `LOGITS` logits."""
    return max(1, min(256, LOGITS // (len(grid) * grid.vocab_size)))


def rows_evaluated(model: Prior, rows: int) -> int:
    """Return how many of `rows` training evaluates: at most `EVALUATED_ROWS`, fewer if `log_prob` takes many passes."""
    passes, size = model.likelihood_passes, len(model.grid)
    most = EVALUATED_ROWS if passes == 1 else max(1, EVALUATED_TOKENS // (passes * size))
    return min(rows, most, EVALUATED_ROWS)


def bits_per_token(
    model: Any, split: TokenSplit, limit: int | None = None, num_orders: int = 1, group: ProcessGroup = ALONE
) -> float:
    """Return the mean -log2 p per token over `limit` evenly spread rows. num_orders: as in `Prior.log_prob`."""
    nats = log_probs(model, split, spread_rows(len(split), limit), num_orders, group)
    return -float(nats.mean()) / (math.log(2) * len(model.grid))


@torch.no_grad()  # not inference_mode, which breaks the buffers that sharded weights are gathered into
def log_probs(
    model: Any, split: TokenSplit, rows: np.ndarray, num_orders: int = 1, group: ProcessGroup = ALONE
) -> Tensor:
    """Return log p of the given rows, `(len(rows),)` float64 nats on the CPU. num_orders: as in `Prior.log_prob`."""
    size = min(rows_at_a_time(model.grid), len(rows))

    def score(start: int) -> Tensor:
        some = rows[start : start + size]
        # In lockstep, pad the last batch, because the number of a model's passes may depend on the batch size.
        batch = np.resize(some, size) if group.lockstep else some
        tokens = split.rows(batch).to(model.device)
        nats = model.log_prob(tokens, condition=split.given[batch], num_orders=num_orders)
        return nats[: len(some)].cpu().double()

    return torch.cat(group.map(score, range(0, len(rows), size)))


def evaluate_likelihood(
    tokenizer: Tokenizer,
    prior: Prior,
    train: TokenSplit,
    test: TokenSplit,
    held_out: ImageDataset,
    num_orders: int,
    frequencies: Frequencies,
    group: ProcessGroup = ALONE,
) -> dict[str, Any]:
    """Return bits per token of the prior on the held-out images, whose tokens are `test`; those of a `Marginal` fitted
    to training tokens; and bits per dim if the decoder has a likelihood. A prior is given what is known of each image,
    except for the figures of `vary_given` and `evaluate_open_class`. frequencies: of the classes."""
    grid, nats = prior.grid, log_probs(prior, test, np.arange(len(test)), num_orders, group)
    return {
        "bits_per_token": float(-nats.mean()) / (math.log(2) * len(grid)),
        **{key: bits_per_token(prior, part, num_orders=num_orders, group=group) for key, part in vary_given(test)},
        **evaluate_open_class(prior, test, frequencies, num_orders, group),
        **evaluate_frames(prior, tokenizer.spec.frames, test, group),
        **evaluate_marginal(prior, train, test, group),
        "uniform_bits_per_token": math.log2(grid.vocab_size),
        **evaluate_bits(tokenizer, held_out, test, nats, group),
    }


def evaluate_open_class(
    prior: Prior, test: TokenSplit, frequencies: Frequencies, num_orders: int = 1, group: ProcessGroup = ALONE
) -> dict[str, Any]:
    """Return bits per token of the mixture over the classes, given the other columns, and those of the null class on
    the same images: at most `EVALUATED_ROWS`, evenly spread. Empty for priors without classes or with more than
    `MOST_SUMMED`, and for one whose likelihood is a bound."""
    if not 0 < prior.num_classes <= MOST_SUMMED or not prior.exact:
        return {}
    others = test.given.without([LABEL])
    unknown = others.over(LABEL, frequencies.log_prob(LABEL, others))
    some = rows_evaluated(prior, len(test))
    mixture, null = (
        bits_per_token(prior, replace(test, given=given), some, num_orders, group) for given in (unknown, others)
    )
    return {
        "class_unknown_bits_per_token": mixture,
        "null_class_bits_per_token": null,
        "class_unknown_rows": some,
        "class_unknown_note": frequencies.describe(LABEL, others.names),
    }


@torch.inference_mode()
def evaluate_frames(prior: Prior, frames: int, split: TokenSplit, group: ProcessGroup = ALONE) -> dict[str, Any]:
    """Return the mean bits of each frame of clips given the frames before it, `frame_bits`, and of a frame on average.
    Empty for images, for a prior that decodes the frames in another order, and for one whose likelihood is a bound."""
    decoded = prior.position_order.div(len(prior.grid) // frames, rounding_mode="floor")  # the frame of each token
    if frames == 1 or not prior.exact or bool((decoded.diff() < 0).any()):
        return {}
    size = rows_at_a_time(prior.grid)

    def score(start: int) -> Tensor:
        rows = np.arange(start, min(start + size, len(split)))
        nats = prior.token_log_probs(split.rows(rows).to(prior.device), condition=split.given[rows])
        return nats.reshape(len(rows), frames, -1).cpu().double().sum(2)

    bits = -torch.cat(group.map(score, range(0, len(split), size))).mean(0) / math.log(2)
    return {"bits_per_frame": float(bits.mean()), "frame_bits": bits.tolist()}


def evaluate_nats(
    prior: Prior, draws: list[TokenSplit], num_orders: int = 1, group: ProcessGroup = ALONE
) -> dict[str, Any]:
    """Return the mean -log p of a black and white image. draws: the same images, binarised anew each time; with several
    also return their number, and the standard deviation over draws of the mean over images."""
    means = []
    for split in draws:
        means.append(-float(log_probs(prior, split, np.arange(len(split)), num_orders, group).mean()))
    several = {"nats_per_image_deviation": statistics.stdev(means), "draws": len(means)} if len(means) > 1 else {}
    return {"nats_per_image": statistics.fmean(means), **several}


def vary_given(split: TokenSplit) -> Iterator[tuple[str, TokenSplit]]:
    """Yield names of figures and the split without anything given; with columns other than the class, also without each
    one, and with the values of other images, which a prior that listens finds less likely."""
    given = split.given
    yield "unconditional_bits_per_token", replace(split, given=given.without())
    if set(given.names) <= {LABEL}:
        return
    for name in given.names:
        yield f"{WITHOUT}{name}", replace(split, given=given.without([name]))
    cycle, other = random_rows(len(split), len(split), seed=0), torch.empty(len(split), dtype=torch.long)
    other[cycle] = cycle.roll(1)  # no image keeps its own
    yield "shuffled_bits_per_token", replace(split, given=given[other])


def evaluate_marginal(prior: Prior, train: TokenSplit, test: TokenSplit, group: ProcessGroup = ALONE) -> dict[str, Any]:
    """Return bits per token under the frequencies of ids at each position, per class if both splits have labels.
    `marginal_note` says if classes were left out because their table is too large. Empty if even the table without
    classes is too large."""
    wanted = prior.num_classes if LABEL in train.given.rows else 0
    fitting = TABLE_SIZE // (len(prior.grid) * prior.grid.vocab_size)
    if not fitting:
        return {}
    classes = wanted if wanted < fitting else 0

    def fit() -> Prior:
        marginal = Prior.create("marginal", grid=prior.grid, num_classes=classes)
        marginal.initialize(cast(Tensor, train.ids()), train.given)
        return marginal

    marginal = group.on_main(fit)
    bits = bits_per_token(marginal, test.of_columns(marginal.columns), group=group)
    note = {"marginal_note": "all classes together"} if classes < wanted else {}
    return {"marginal_bits_per_token": bits, "marginal_rows": len(train), **note}


@torch.inference_mode()
def evaluate_bits(
    tokenizer: Tokenizer, held_out: ImageDataset, test: TokenSplit, nats: Tensor, group: ProcessGroup = ALONE
) -> dict[str, Any]:
    """Return bits per dim of the held-out images with its standard error over images, and its two parts: the tokens,
    whose log p is `nats` `(n,)`, and the pixels given the tokens. Empty if the decoder has no likelihood, and for
    `data.binarize`, which leaves no 8-bit images.

    If `nats` are conditional on the class, so are the bits: a code would also have to send the class, up to
    log2(classes) bits per image.
    """
    if not tokenizer.has_likelihood or held_out.config.binarize is not None:
        return {}

    def score(rows: np.ndarray) -> Tensor:
        images, tokens = held_out.batch(rows).to(tokenizer.device), test.rows(rows).to(tokenizer.device)
        return cast(Tensor, tokenizer.pixel_log_prob(images, tokens)).cpu().double()

    parts = np.array_split(np.arange(len(test)), -(-len(test) // images_at_a_time(held_out.spec)))
    pixels = group.map(score, parts)
    dims = math.log(2) * math.prod(held_out.spec.shape)
    prior, decoder = -nats / dims, -torch.cat(pixels) / dims
    total = prior + decoder
    return {
        "bits_per_dim": float(total.mean()),
        "bits_per_dim_error": float(total.std(correction=0)) / math.sqrt(len(total)),
        "prior_bits_per_dim": float(prior.mean()),
        "pixel_bits_per_dim": float(decoder.mean()),
    }
