"""What a prior gives to tokens: bits per token and log-probabilities, in batches that fit."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from prior import Prior
from tokenizer import TokenGrid, Tokenizer

from ..images import ImageDataset
from ..processes.group import ALONE, ProcessGroup
from ..shuffling import spread
from ..tokens import TokenSplit
from .reconstruction import images_at_a_time

EVALUATED_ROWS = 2000  # at most, by training; `smalti evaluate` looks at all that are held out
EVALUATED_TOKENS = 1 << 24  # in all passes together, at most, by training, of a prior that takes several for a row
TABLE = 1 << 26  # numbers, 256 MiB of float32, that the table of `Marginal` may have
LOGITS = 1 << 28  # numbers, 1 GiB of float32, that an evaluation makes at a time at most


def rows_at_a_time(grid: TokenGrid) -> int:
    """Rows of tokens to evaluate at a time: 256, or as many as have `LOGITS` logits."""
    return max(1, min(256, LOGITS // (len(grid) * grid.vocab_size)))


def rows_evaluated(model: Prior, rows: int) -> int:
    """The number of `rows` that training evaluates: at most `EVALUATED_ROWS`, and fewer where `log_prob` takes many
    passes."""
    passes, size = model.likelihood_passes, len(model.grid)
    most = EVALUATED_ROWS if passes == 1 else max(1, EVALUATED_TOKENS // (passes * size))
    return min(rows, most, EVALUATED_ROWS)


def bits_per_token(
    model: Any, split: TokenSplit, limit: int | None = None, num_orders: int = 1, group: ProcessGroup = ALONE
) -> float:
    """Mean -log2 p per token over `limit` rows, evenly spread; num_orders: as in `Prior.log_prob`."""
    nats = log_probs(model, split, spread(len(split), limit), num_orders, group)
    return -float(nats.mean()) / (math.log(2) * len(model.grid))


@torch.no_grad()  # inference mode would reach into the memory that sharded weights are gathered in
def log_probs(
    model: Any, split: TokenSplit, rows: np.ndarray, num_orders: int = 1, group: ProcessGroup = ALONE
) -> Tensor:
    """log p `(len(rows),)` of the rows asked for, float64 nats on the CPU; num_orders: as in `Prior.log_prob`."""
    size = min(rows_at_a_time(model.grid), len(rows))

    def score(start: int) -> Tensor:
        some = rows[start : start + size]
        # In lockstep the last batch is filled up: how many passes a model takes may depend on the size of its batch.
        batch = np.resize(some, size) if group.lockstep else some
        tokens = split.rows(batch).to(model.device)
        labels = None if split.labels is None else split.labels[torch.from_numpy(batch)].to(model.device)
        return model.log_prob(tokens, labels, num_orders=num_orders)[: len(some)].cpu().double()

    return torch.cat(group.map(score, range(0, len(rows), size)))


def evaluate_likelihood(
    tokenizer: Tokenizer,
    prior: Prior,
    train: TokenSplit,
    test: TokenSplit,
    held_out: ImageDataset,
    num_orders: int,
    group: ProcessGroup = ALONE,
) -> dict[str, Any]:
    """Bits per token of the prior on held-out images, whose tokens are `test`, beside those of `Marginal` fitted to
    tokens of training images; and bits per dim, where the decoder has a likelihood. All of a prior that has classes is
    given the class of each image, except `unconditional_bits_per_token`."""
    grid = prior.grid
    unlabelled = TokenSplit(test.tokens, None)
    known = test if prior.num_classes else unlabelled
    nats = log_probs(prior, known, np.arange(len(known)), num_orders, group)
    return {
        "bits_per_token": float(-nats.mean()) / (math.log(2) * len(grid)),
        "unconditional_bits_per_token": bits_per_token(prior, unlabelled, num_orders=num_orders, group=group),
        **evaluate_marginal(prior, train, known, group),
        "uniform_bits_per_token": math.log2(grid.vocab_size),
        **evaluate_bits(tokenizer, held_out, test, nats, group),
    }


def classes_of_table(grid: TokenGrid, classes: int) -> int | None:
    """Of how many classes `evaluate_marginal` counts ids: all, or 0, together, or None, not at all."""
    fitting = TABLE // (len(grid) * grid.vocab_size)
    return classes if classes < fitting else 0 if fitting else None


def evaluate_marginal(prior: Prior, train: TokenSplit, test: TokenSplit, group: ProcessGroup = ALONE) -> dict[str, Any]:
    """Bits per token of position frequencies, of each class where both have labels. `marginal_note` says where the
    table of all classes would be too large, and it is without them; no figure where even that one is."""
    wanted = prior.num_classes if train.labels is not None else 0
    classes = classes_of_table(prior.grid, wanted)
    if classes is None:
        return {}

    def fit() -> Prior:
        marginal = Prior.create("marginal", grid=prior.grid, num_classes=classes)
        marginal.initialize(cast(Tensor, train.tokens), train.labels if classes else None)
        return marginal

    test = test if classes else TokenSplit(test.tokens, None)
    bits = bits_per_token(group.on_main(fit), test, group=group)
    note = {"marginal_note": "of all classes together"} if classes < wanted else {}
    return {"marginal_bits_per_token": bits, "marginal_rows": len(train), **note}


@torch.inference_mode()
def evaluate_bits(
    tokenizer: Tokenizer, held_out: ImageDataset, test: TokenSplit, nats: Tensor, group: ProcessGroup = ALONE
) -> dict[str, Any]:
    """Bits per dim of held-out images, with the standard error over images; and the parts of it, of the tokens, whose
    log p are `nats` `(n,)`, and of the pixels given the tokens. Nothing if the decoder has no likelihood.

    Where `nats` are given the class, so are the bits: a code would have to send it as well, up to log2(classes) bits an
    image.
    """
    if not tokenizer.has_likelihood:
        return {}

    def score(rows: np.ndarray) -> Tensor:
        images, tokens = held_out.batch(rows).to(tokenizer.device), test.rows(rows).to(tokenizer.device)
        return cast(Tensor, tokenizer.pixel_log_prob(images, tokens)).cpu().double()

    parts = np.array_split(np.arange(len(test)), -(-len(test) // images_at_a_time(held_out.image_shape)))
    pixels = group.map(score, parts)
    dims = math.log(2) * math.prod(held_out.image_shape)
    prior, decoder = -nats / dims, -torch.cat(pixels) / dims
    total = prior + decoder
    return {
        "bits_per_dim": float(total.mean()),
        "bits_per_dim_error": float(total.std(correction=0)) / math.sqrt(len(total)),
        "prior_bits_per_dim": float(prior.mean()),
        "pixel_bits_per_dim": float(decoder.mean()),
    }
