"""Ids, likelihoods and samples are computed in full float32, whatever torch's settings, which are restored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small import (
    PRIORS,
    QUANTIZERS,
    TOKENIZERS,
    draw_tokens,
    generators,
    latents,
    make_prior,
    make_quantizer,
    make_tokenizer,
    train_on,
)
from torch.utils._python_dispatch import TorchDispatchMode

from tokenizer import Tokenizer
from tokenizer.likelihoods import Likelihood
from tokenizer.precision import PRECISIONS

BACKENDS = torch.backends
PRODUCTS = ("mm", "conv", "linear", "matmul", "attention", "cdist", "einsum")  # in the names of operations

every_prior = pytest.mark.parametrize("name", PRIORS)


@pytest.fixture
def lowered() -> Iterator[None]:
    """Torch may round all float32 products: to TF32 on a GPU, to bfloat16 on a CPU."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


class ProductSettings(TorchDispatchMode):
    """Records the settings at each product: precision, autocast, and cuDNN's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: set[str] = set()
        self.autocast: set[bool] = set()
        self.cudnn: set[bool] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in func.__name__ for word in PRODUCTS):
            self.rounded |= {holder.fp32_precision for holder in PRECISIONS}
            self.autocast.add(torch.is_autocast_enabled("cpu"))
            self.cudnn.add(torch.backends.cuda.cudnn_sdp_enabled())
        return func(*args, **(kwargs or {}))


def seen_in(call: Callable[[], Any]) -> ProductSettings:
    """The settings at the products of a call under autocast, which does not change them."""
    before = [holder.fp32_precision for holder in PRECISIONS]
    with ProductSettings() as seen, torch.autocast("cpu", torch.bfloat16):
        call()
    assert [holder.fp32_precision for holder in PRECISIONS] == before and BACKENDS.cuda.cudnn_sdp_enabled()
    return seen


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("likelihood", [None, *Likelihood.available()])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_are_precise(name, likelihood):
    """In ids, images and likelihoods; training uses the user's settings."""
    if likelihood and "likelihood" not in Tokenizer.find(name).Config.model_fields:
        return
    model = make_tokenizer(name, **({"likelihood": {"kind": likelihood}} if likelihood else {})).eval()
    images = torch.rand(3, *model.image_shape) * 2 - 1

    def use():
        tokens = model.encode(images)
        model.decode(tokens)
        if model.has_likelihood:
            model.pixel_log_prob(images, tokens)
            model.value_log_probs(tokens, torch.zeros_like(images, dtype=torch.long), 1)

    assert seen_in(use).rounded <= {"ieee"}
    if list(model.parameters()):
        assert {"bf16", "tf32"} <= seen_in(lambda: model(images)).rounded


@pytest.mark.usefixtures("lowered")
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizers_are_precise_in_training(name):
    book = {"book": {"kind": "simvq", "codes": 32, "dim": 8}} if name == "rvq" else {}
    model = make_quantizer(name, **book).train()

    def use():
        for _ in range(3):
            found = train_on(model, latents(model, 4, 3, 2))
        model.lookup(found.tokens)

    seen = seen_in(use)
    assert seen.rounded <= {"ieee"} and seen.autocast <= {False}


@pytest.mark.usefixtures("lowered")
@every_prior
def test_likelihoods_and_features_are_precise(name):
    model = make_prior(name)
    tokens = draw_tokens(model, 2)
    assert seen_in(lambda: model.log_prob(tokens)).rounded <= {"ieee"}
    if model.feature_layers:
        assert seen_in(lambda: model.features(tokens)).rounded == {"ieee"}
        assert {"bf16", "tf32"} <= seen_in(lambda: model(tokens)).rounded


@pytest.mark.sparse
@pytest.mark.usefixtures("lowered")
@every_prior
@pytest.mark.parametrize("path", [{}, {"cache": False}, {"parallel": True}], ids=str)
def test_samples_are_precise(name, path):
    """Without autocast and TF32, and without cuDNN's attention, which would plan for every number of keys."""
    model = make_prior(name)
    seen = seen_in(lambda: model.sample(4, generator=generators(4), **path))
    assert seen.rounded <= {"ieee"} and seen.autocast <= {False} and seen.cudnn <= {False}
    assert seen.rounded or not model.feature_layers


@every_prior
@torch.no_grad()
def test_a_likelihood_is_as_precise_as_the_weights(name):
    """At least float32."""
    model = make_prior(name)
    tokens = draw_tokens(model, 2)
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float32,) * 2):
        assert model.to(dtype).token_log_probs(tokens).dtype == expected
