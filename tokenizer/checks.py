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


def describe_hidden_methods(model: nn.Module, family: type[nn.Module]) -> str | None:
    """Describe the attributes of `model` that hide a method of its `family`, such as a layer called `start` in a prior.
    Return None if there are none."""
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

    def losses_are_scalars() -> None:
        losses = tokenizer(images).losses
        wrong = [name for name, loss in losses.items() if loss.ndim or not bool(loss.isfinite())]
        expect(not wrong, f"losses that are not finite scalars: {', '.join(wrong)}")

    checks = {
        "tokens have the shape and range of the grid": tokens_fit,
        "decode returns images in [-1, 1]": images_fit,
        "decode(encode(x)) equals forward(x).images": forward_agrees,
        "tokens do not depend on the batch": batches_agree,
        "losses are finite scalars": losses_are_scalars,
    }
    for promise, check in checks.items():
        yield promise, problem_of(check)


def check_quantizer(quantizer: Quantizer) -> Iterator[tuple[str, str | None]]:
    """Test a quantizer on random vectors; yield (promise, problem or None) for each promise."""
    if hidden := describe_hidden_methods(quantizer, Quantizer):
        yield NOT_HIDDEN, hidden
        return
    quantizer.eval()
    size = quantizer.scales[-1] if quantizer.scales else (4, 4)
    z = torch.randn(4, quantizer.dim, *size, generator=torch.Generator().manual_seed(0))

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

    def gradients_arrive() -> None:
        quantizer.train()
        given = z.clone().requires_grad_()
        with torch.enable_grad():
            result = quantizer.quantize(given)
            (result.z_q.square().sum() + sum(result.losses.values(), torch.zeros(()))).backward()
        quantizer.eval()
        reached = torch.zeros(quantizer.dim) if given.grad is None else given.grad.abs().amax((0, 2, 3))
        expect(bool((reached > 0).all()), "some channels of z receive no gradient")

    checks: dict[str, Callable[[], None]] = {
        "tokens are ids of the codebook": tokens_fit,
        "lookup inverts quantize": lookup_inverts,
        "every channel receives a gradient": gradients_arrive,
    }
    for promise, check in checks.items():
        yield promise, problem_of(check)


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
    """Raise `ValueError` with `problem` unless `holds`."""
    if not holds:
        raise ValueError(problem)
