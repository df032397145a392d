"""Contract checks for tokenizers and quantizers defined outside this package."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .base import Tokenizer
from .quantizers.base import Quantizer

NOT_HIDDEN = "attributes hide no methods"
WEIGHTED = "losses are finite scalars with weights"
BATCH = 16
"""Vectors with which quantizers are checked, `(BATCH, dim, H, W)`."""


def describe_hidden_methods(model: nn.Module, family: type[nn.Module]) -> str | None:
    """Describe attributes of `model` that hide a method of its `family`, such as a layer called `start`."""
    names = sorted({*vars(model), *model._modules, *model._parameters, *model._buffers})
    hidden = [name for name in names if inspect.isfunction(getattr(family, name, None))]
    methods = ", ".join(f"self.{name} hides the method {family.__name__}.{name}()" for name in hidden)
    return f"{methods}; rename the attribute" if hidden else None


def check_tokenizer(tokenizer: Tokenizer) -> Iterator[tuple[str, str | None]]:
    """Test a tokenizer on random images; yield (promise, problem or None) for each promise."""
    if hidden := describe_hidden_methods(tokenizer, Tokenizer):
        yield NOT_HIDDEN, hidden
        return
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, *tokenizer.image_shape, generator=generator) * 2 - 1
    problem = problem_of(lambda: tokenizer.initialize(images))
    yield "it can be initialized from images", problem
    tokenizer.eval()

    def tokens_fit() -> None:
        tokens = tokenizer.encode(images)
        wanted = (len(images), *tokenizer.grid.shape)
        expect(tokens.dtype == torch.int64, f"encode returns {tokens.dtype}, not int64")
        expect(tuple(tokens.shape) == wanted, f"encode returns tokens of shape {tuple(tokens.shape)}, not {wanted}")
        tokenizer.grid.check(tokens)

    def images_fit() -> None:
        decoded = tokenizer.decode(tokenizer.encode(images))
        expect(decoded.shape == images.shape, f"decode returns images of shape {tuple(decoded.shape)}")
        expect(float(decoded.abs().max()) <= 1, "decode returns images outside [-1, 1]")

    def forward_agrees() -> None:
        result, tokens = tokenizer(images), tokenizer.encode(images)
        expect(torch.equal(result.tokens, tokens), "forward and encode give different tokens")
        error = float((result.images.clamp(-1, 1) - tokenizer.decode(tokens)).abs().max())
        expect(error < 1e-4, f"decode(encode(images)) and forward differ by up to {error:.3g}")

    def batches_agree() -> None:
        expect(torch.equal(tokenizer.encode(images[:1]), tokenizer.encode(images)[:1]), "tokens depend on the batch")

    def losses_are_weighted() -> None:
        check_losses(tokenizer(images).losses, tokenizer.loss_weights)

    checks = {
        "tokens have the shape and range of the grid": tokens_fit,
        "decode returns images in [-1, 1]": images_fit,
        "decode(encode(x)) equals forward(x).images": forward_agrees,
        "tokens do not depend on the batch": batches_agree,
        WEIGHTED: losses_are_weighted,
    }
    for promise, check in checks.items():
        yield promise, problem_of(check)


def check_quantizer(quantizer: Quantizer) -> Iterator[tuple[str, str | None]]:
    """Test a quantizer on random vectors; yield (promise, problem or None) for each promise."""
    if hidden := describe_hidden_methods(quantizer, Quantizer):
        yield NOT_HIDDEN, hidden
        return
    quantizer.eval()
    size, generator = quantizer.scales[-1] if quantizer.scales else (4, 4), torch.Generator().manual_seed(0)
    z, direction = torch.randn(2, BATCH, quantizer.dim, *size, generator=generator)
    z *= torch.linspace(0.1, 3, BATCH).view(-1, 1, 1, 1)  # so that no image has the statistics of the batch

    def tokens_fit() -> None:
        tokens = quantizer.quantize(z).tokens
        expect(tokens.dtype == torch.int64, f"quantize returns tokens of {tokens.dtype}, not int64")
        expect(
            bool(((tokens >= 0) & (tokens < quantizer.vocab_size)).all()),
            f"quantize returns ids outside [0, {quantizer.vocab_size})",
        )

    def lookup_inverts() -> None:
        result = quantizer.quantize(z)
        error = float((quantizer.lookup(result.tokens) - result.z_q).abs().max())
        expect(error < 1e-4, f"lookup(tokens) and z_q differ by up to {error:.3g}")

    def batches_agree() -> None:
        before = {name: value.clone() for name, value in quantizer.named_buffers()}
        together, alone = quantizer.encode(z), torch.cat([quantizer.encode(one) for one in z.split(1)])
        expect(torch.equal(together, quantizer.quantize(z).tokens), "encode and quantize give different tokens")
        share = float((together != alone).double().mean())
        expect(not share, f"{share:.0%} of the tokens differ when vectors are encoded alone and in a batch of {BATCH}")
        moved = [name for name, value in quantizer.named_buffers() if not torch.equal(value, before[name])]
        expect(not moved, f"encoding in eval mode changes {', '.join(moved)}; only training may (see SelfUpdating)")

    def gradients_arrive() -> None:
        given = z.clone().requires_grad_()
        with torch.enable_grad():
            z_q = quantizer.train().quantize(given).z_q
            loss = (z_q * direction).sum()  # without the quantizer's losses, which reach z in other ways
            found = torch.autograd.grad(loss, given, allow_unused=True)[0] if loss.requires_grad else None
        expect(found is not None, "z_q passes no gradient to z; return straight_through(z, codes)")
        assert found is not None
        expect(bool(found.isfinite().all()), "the gradient of z is not finite")
        absent = [channel for channel in range(quantizer.dim) if not bool(found[:, channel].any())]
        expect(not absent, f"z_q passes no gradient to {len(absent)} of {quantizer.dim} channels of z")

    def losses_are_weighted() -> None:
        with torch.enable_grad():
            check_losses(quantizer.train().quantize(z).losses, quantizer.loss_weights)

    checks: dict[str, Callable[[], None]] = {
        "tokens are ids of the codebook": tokens_fit,
        "lookup inverts quantize": lookup_inverts,
        "tokens do not depend on the batch": batches_agree,
        "z_q passes a gradient to every channel": gradients_arrive,
        WEIGHTED: losses_are_weighted,
    }
    for promise, check in checks.items():
        quantizer.eval()
        yield promise, problem_of(check)


def check_losses(losses: dict[str, torch.Tensor], weights: dict[str, float]) -> None:
    wrong = [name for name, loss in losses.items() if loss.ndim or not bool(loss.isfinite())]
    expect(not wrong, f"losses that are not finite scalars: {', '.join(wrong)}")
    absent = [name for name in losses if name not in weights]
    expect(not absent, f"loss_weights has no weight for {', '.join(absent)} (0 ignores a loss)")


def problem_of(check: Callable[[], Any]) -> str | None:
    """Run a check without gradients; return its problem in one line, or None."""
    try:
        with torch.no_grad():
            check()
    except Exception as error:  # a user's model may raise anything
        first = (str(error).strip().splitlines() or [""])[0]
        return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"
    return None


def expect(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
