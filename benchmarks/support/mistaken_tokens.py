"""What prepares a decoder for a prior's mistakes: tokens that it is shown in the place of an image's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NEAR = 8  # codes among which another one is chosen
SWAPPED = (1.0, 0.25)  # shares of the images, and of their tokens
DRAWN, KEPT = 0.5, 0.7  # shares of the tokens
BATCH, LEARNING_RATE = 32, 1e-3
TOGETHER = 16  # steps whose tokens are drawn together


@contextmanager
def perturbed(images: float, share: float) -> Iterator[None]:
    """Within it, tokenizers in training paint a share of the tokens of a share of the images as codes near theirs."""
    from tokenizer.autoencoder import Autoencoder

    plain = Autoencoder._reconstruction

    def painted(self: Any, batch: Any, z: Any, tokens: Any, losses: Any) -> Any:
        if self.training:
            codes, others = codes_of(self), near_tokens(self, tokens, images, share)
            z = z + (codes[others] - codes[tokens]).movedim(-1, 1).detach()
        return plain(self, batch, z, tokens, losses)

    Autoencoder._reconstruction = painted if images else plain  # type: ignore[method-assign]
    try:
        yield
    finally:
        Autoencoder._reconstruction = plain  # type: ignore[method-assign]


def codes_of(tokenizer: Any) -> Any:
    """The vector of each id, `(V, D)`."""
    import torch

    return tokenizer.quantizer.lookup(torch.arange(tokenizer.grid.vocab_size)[:, None, None]).flatten(1)


def near_tokens(tokenizer: Any, tokens: Any, images: float, share: float, generator: Any = None) -> Any:
    """Tokens `(B, H, W)`, a share of which, in a share of the images, is one of the `NEAR` codes nearest to theirs."""
    import torch

    codes = codes_of(tokenizer)
    near = torch.cdist(codes, codes).topk(NEAR + 1, largest=False).indices[:, 1:]
    others = near[tokens, torch.randint(NEAR, tokens.shape, generator=generator)]
    chosen = torch.rand(tokens.shape, generator=generator) < share
    return torch.where(chosen & (torch.rand(len(tokens), 1, 1, generator=generator) < images), others, tokens)


def finetuned(pipe: Any, kind: str, seed: int, images: Any, steps: int, guidance: float) -> float:
    """Train the decoder of `pipe` alone to paint `images` from tokens of a kind, as `mistaken`; returns CPU seconds,
    without those of drawing tokens."""
    import torch
    import torch.nn.functional as F

    seconds, generator = 0.0, torch.Generator().manual_seed(seed)
    parameters = list(pipe.tokenizer.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for rows in torch.randint(len(images), (steps, BATCH), generator=generator).split(TOGETHER):
        batch, labels = images.batch(rows.flatten()), images.labels[rows.flatten()]
        tokens = mistaken(pipe, kind, pipe.encode(batch), labels, generator, guidance)
        began = time.process_time()
        for wanted, given in zip(batch.split(BATCH), tokens.split(BATCH), strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                painted = pipe.tokenizer._decode_tokens(given)
            F.mse_loss(painted.float(), wanted).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        seconds += time.process_time() - began
    return seconds


def mistaken(pipe: Any, kind: str, tokens: Any, labels: Any, generator: Any, guidance: float) -> Any:
    """`real`: tokens `(B, H, W)` as they are; `near`: with some that are codes near theirs; `drawn`: with some that the
    prior draws given the true ones before them; `sampled`: with some that it samples around the others."""
    import torch

    chance = torch.rand(tokens.shape, generator=generator)
    if kind == "near":
        return near_tokens(pipe.tokenizer, tokens, *SWAPPED, generator=generator)
    if kind == "sampled":
        given = {"tokens": tokens, "known": chance < KEPT, "guidance_scale": guidance}
        return pipe.prior.sample(len(tokens), labels, generator=generator, **given)
    if kind == "drawn":
        with torch.inference_mode():
            odds = pipe.prior(tokens, labels).softmax(-1).flatten(0, 1)
        drawn = torch.multinomial(odds, 1, generator=generator).view_as(tokens)
        return torch.where(chance < DRAWN, drawn, tokens)
    return tokens
