"""Models that `torch.compile` has wrapped: a wrapper is a callable, and a pipeline asks more of a model."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from prior import Prior
from tokenizer import Tokenizer

M = TypeVar("M", Prior, Tokenizer)


def unwrapped(model: Any, family: type[M], part: str) -> M:
    """The model in what `torch.compile(model)` returned, itself compiled in place with the same options; any other
    model of the family as it is. part: its name in a pipeline.

    Compiled is what `nn.Module.compile` would compile: of a prior its whole passes (likelihoods, `parallel`,
    `cache=False`; steps with a cache are none), of a tokenizer its networks. Raises `TypeError` for anything else.
    """
    if isinstance(model, family):
        return model
    inner, compiled = getattr(model, "_orig_mod", None), getattr(model, "dynamo_ctx", None)
    if not isinstance(inner, family) or compiled is None:
        raise TypeError(
            f"{part} should be a {family.__name__} (got {type(model).__name__}); to compile one, pipe.{part}.compile()"
        )
    modules: list[Any] = networks_of(inner) if isinstance(inner, Tokenizer) else [inner]
    for module in modules:
        module._compiled_call_impl = compiled(module._call_impl)
    return inner


def networks_of(tokenizer: Tokenizer) -> list[Any]:
    """The modules that `encode` and `decode` call, not those that only hold others."""
    return [child for child in tokenizer.children() if type(child).forward is not nn.Module.forward]
